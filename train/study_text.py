"""What a study says, in Markdown: tables, sentences, study.md."""

from collections.abc import Mapping
from typing import Any

from train.report.runs import SHOWN, Metric

Json = dict[str, Any]


def shown(metric: str) -> Metric:
    """How a metric is shown."""
    return SHOWN.get(metric) or Metric(metric.replace("_", " ").upper(), 3)


def title(metric: str) -> str:
    """A metric with its unit, "SI-SDR, dB"."""
    return shown(metric).title + shown(metric).unit.replace(" ", ", ")


def way(system: Json) -> str:
    """How a student was taught: the method's name, or "alone"."""
    return "alone" if system["transfer"] == "none" else system["method"]


def table(study: Json) -> str:
    """The study's table in Markdown: a row a system; in a cell the mean over seeds (lowest to highest), and below it
    the difference to the student alone with its 95 % interval."""
    metrics = study["config"]["metrics"]
    titles = [title(metric) for metric in metrics]
    lines = [
        "| | weight | parameters | GFLOPs | seeds | " + " | ".join(titles) + " |",
        "|---|---:|---:|---:|---:|" + "---:|" * len(titles),
    ]
    for system in study["systems"]:
        weight = "" if system["weight"] is None else f"{system['weight']:g}"
        size = "" if system["parameters"] is None else f"{system['parameters'] / 1e6:.2f} M"
        cost = "" if system["gflops"] is None else f"{system['gflops']:.2f}"
        seeds = "" if system["kind"] == "noisy" else str(len(system["seeds"]))
        seeds += f" ({len(system['diverged'])} diverged)" if system["diverged"] else ""
        cells = [_cell(system, metric) for metric in metrics]
        lines.append(f"| {system['label']} | {weight} | {size} | {cost} | {seeds} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(system: Json, metric: str) -> str:
    scores, digits = system["scores"][metric], shown(metric).digits
    if scores is None:
        return ""
    text = f"{scores['mean']:.{digits}f}"
    if len(system["seeds"]) > 1:
        text += f" ({scores['low']:.{digits}f} to {scores['high']:.{digits}f})"
    found = system.get("difference", {}).get(metric)
    return text + (f"<br>{interval_text(found, digits)}" if found else "")


def interval_text(found: Json, digits: int) -> str:
    """A difference with its interval, "+0.100 [-0.020, +0.220]", to one digit more than the scores."""
    digits += 1  # a difference is smaller than what it is a difference of
    text = f"{found['mean']:+.{digits}f}"
    return text if found["low"] is None else f"{text} [{found['low']:+.{digits}f}, {found['high']:+.{digits}f}]"


def verdicts(study: Json) -> list[str]:
    """A sentence a student and method: in which scores it is above or below the student alone."""
    sentences = []
    for system in study["systems"]:
        by_verdict: dict[str, list[str]] = {}
        for metric, found in system.get("difference", {}).items():
            if found:
                by_verdict.setdefault(found["verdict"], []).append(shown(metric).title)
        parts = [
            f"{word} in {', '.join(by_verdict[verdict])}"
            for verdict, word in (
                ("higher", "above the student alone"),
                ("lower", "below the student alone"),
                ("undecided", "undecided"),
            )
            if verdict in by_verdict
        ]
        over = {found["over"] for found in system.get("difference", {}).values() if found}
        if parts:
            chance = " With one seed this says nothing of other seeds." if over == {"files"} else ""
            sentences.append(f"{system['label']}: {'; '.join(parts)}.{chance}")
    return sentences


def like_quality(study: Json) -> str:
    """The ratios of parameters and GFLOPs at like quality: a row for the methods that agree, a column a metric."""
    found = study["like_quality"]
    if not found:
        return "The teacher is not above the noisy input in any score: there is no quality for a student to reach.\n"
    rows: dict[str, list[str]] = {}
    for method in next(iter(found.values())):
        cells = [
            f"{at['student']}: {at['parameters']:.2f}x parameters, {at['gflops']:.2f}x GFLOPs"
            if (at := found[metric][method])
            else "not reached"
            for metric in found
        ]
        rows.setdefault(" | ".join(cells), []).append(method)
    lines = [
        "| method | " + " | ".join(shown(metric).title for metric in found) + " |",
        "|---|" + "---|" * len(found),
        *(f"| {', '.join(methods)} | {cells} |" for cells, methods in rows.items()),
    ]
    return """Like quality: the smallest student whose mean over seeds is not below the teacher's lowest seed, and how
many times its parameters and GFLOPs the teacher has (this project's own definition), in the scores in
which the teacher is above the noisy input.

""" + "".join(f"{line}\n" for line in lines)


def note(study: Json) -> str:
    """How to read the table."""
    differences = [found for system in study["systems"] for found in system.get("difference", {}).values() if found]
    over = " or ".join(sorted({found["over"] for found in differences if found["low"] is not None}))
    cell = "A cell holds the mean over seeds (lowest to highest)"
    if not differences:
        return f"{cell}.\n"
    return f"{cell}, and below it the difference to the student alone of equal seed and recording" + (
        f", with its 95 % interval over {over}. The intervals are not corrected for their number.\n" if over else ".\n"
    )


def edges_note(study: Json) -> str:
    """How many weights were chosen at an end of their candidates."""
    trials = study["trials"]
    ends = [(min(trial["scores"])[0], max(trial["scores"])[0]) for trial in trials]
    count = sum(trial["chosen"] in end for trial, end in zip(trials, ends, strict=True))
    if not count:
        return ""
    return f"{count} of {len(trials)} weights were chosen at an end of their candidates: a better one may lie beyond.\n"


def readme(study: Json) -> str:
    """What README shows of a study: scores of the noisy input, the teacher and the student alone, then what every
    method adds to them; the metrics of one student after those of another."""
    metrics = study["config"]["metrics"]
    systems = study["systems"]
    students = list(dict.fromkeys(system["student"] for system in systems if system["kind"] == "student"))
    titles = [title(metric) for metric in metrics]
    heads = [text if i else f"{student}: {text}" for student in students for i, text in enumerate(titles)]
    rows: dict[str, dict[str, list[str]]] = {}
    for system in systems:
        taught = system["kind"] == "student"
        name = way(system) if taught else system["label"]
        cells = [(_gain if "difference" in system else _score)(system, metric) for metric in metrics]
        rows.setdefault(name, {}).update(dict.fromkeys([system["student"]] if taught else students, cells))
    empty = [""] * len(metrics)
    lines = [
        "| | " + " | ".join(heads) + " |",
        "|---|" + "---:|" * len(heads),
        *(
            f"| {name} | " + " | ".join(cell for student in students for cell in row.get(student, empty)) + " |"
            for name, row in rows.items()
        ),
    ]
    seeds = max((len(system["seeds"]) for system in systems), default=0)
    recordings = f"Means over {len(study['files'])} recordings and up to {seeds} seeds."
    text = f"""
{recordings} Signs mark differences to the student alone, ± half of
their 95 % interval, bold where it leaves out 0; the intervals are not corrected for their number.
{edges_note(study)}
{like_quality(study)}"""
    return "\n".join(lines) + "\n" + text


def _score(system: Json, metric: str) -> str:
    scores = system["scores"][metric]
    return f"{scores['mean']:.{shown(metric).digits}f}" if scores else ""


def _gain(system: Json, metric: str) -> str:
    """A difference with half of its interval, "+0.10 ± 0.12"."""
    found = system["difference"].get(metric)
    if not found:
        return ""
    digits = shown(metric).digits
    text = f"{round(found['mean'], digits) + 0.0:+.{digits}f}"  # no negative zero
    if found["low"] is not None:
        text += f" ± {(found['high'] - found['low']) / 2:.{digits}f}"
    return text if found["verdict"] == "undecided" else f"**{text}**"


def whole(study: Json) -> str:
    """Everything that a page shows of a study beside its pictures."""
    return f"{table(study)}\n{note(study)}{edges_note(study)}\n{like_quality(study)}"


def summary(study: Json) -> str:
    """What the command prints at its end."""
    lines = [note(study), table(study).replace("<br>", "; "), *verdicts(study)]
    lines += ["", like_quality(study)]
    return "\n".join(lines)


def page(study: Json, figures: Mapping[str, str]) -> str:
    """study.md; `figures` holds file name -> caption."""
    config, versions = study["config"], study["versions"]
    trained = [run["steps"] for run in study["runs"] if run["kind"] != "noisy" and run["steps"]]
    steps = " to ".join(str(count) for count in sorted({min(trained), max(trained)})) if trained else "no"
    state = "" if study["complete"] else "**Not finished yet: the rows hold what has been done so far.**\n\n"
    trials = ["| student | method | weight: score | chosen |", "|---|---|---|---:|"]
    for trial in study["trials"]:
        scores = [
            f"{weight:g}: {'none' if score is None else format(score, '.3f')}" for weight, score in trial["scores"]
        ]
        trials.append(f"| {trial['student']} | {trial['method']} | {', '.join(scores)} | {trial['chosen']:g} |")
    sentences = "\n".join(f"- {sentence}" for sentence in verdicts(study))
    chosen = "\n".join(trials) if study["trials"] else "There was nothing to choose: every method has one candidate."
    pictures = "\n".join(f"![{caption}]({name})\n" for name, caption in figures.items())
    trial_seeds = ", ".join(map(str, config["trials"]["seeds"]))
    return f"""# Does attention transfer distil?

{state}{study["date"]}, {study["machine"]}, mvat {versions["mvat"]}, PyTorch {versions["torch"]}.
Data {config["run"]["data"]["path"]}, {len(study["files"])} test recordings; {steps} training steps a run.

{note(study)}
{table(study)}
{sentences}

## The weights

Chosen on the validation recordings by {study["select"]}, after trials of {config["trials"]["epochs"]} epochs with
seed {trial_seeds}.

{chosen}

{edges_note(study)}
## Like quality

{like_quality(study)}
{pictures}"""
