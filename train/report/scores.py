"""The report's tables of scores and the pictures of recordings compared one by one."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape

from train.report import figures, pieces
from train.report.runs import SHOWN, Run, System
from train.report.words import MOST_COMPARISONS, Difference, comparisons, difference, find

_PAIRED = ("pesq_wb", "estoi", "si_sdr")  # drawn recording by recording


def shown_metrics(systems: Sequence[System]) -> list[str]:
    """The metrics that some run has scores of, all of them where none has."""
    return [metric for metric in SHOWN if any(system.means(metric) for system in systems)] or list(SHOWN)


def scores(systems: Sequence[System]) -> str:
    """Mean scores, a row a system and, below it, a row for each of several seeds."""
    metrics = shown_metrics(systems)
    best = _best(systems)
    rows = [row for system in systems for row in _score_rows(system, metrics, best)]
    failed = "".join(_failed(run) for system in systems for run in system.runs)
    waiting = [run.folder.name for system in systems for run in system.runs if not run.scores]
    note = pieces.missing(f"Not scored yet (python -m train.evaluate): {', '.join(waiting)}.") if waiting else ""
    heads = ("System", "Seed", "Parameters", "GFLOPs", *map(pieces.heading, metrics), "Not scored")
    return pieces.section(
        "Scores",
        pieces.note(
            "Means over the recordings of the set; higher is better. "
            f"{'Bold: the best student. ' if best else ''}Several seeds: their mean, and the lowest and highest of "
            "them. GFLOPs are for four seconds of audio."
        ),
        pieces.table(heads, rows, "scores"),
        note,
        failed,
    )


def _best(systems: Sequence[System]) -> dict[str, str]:
    """Metric -> the best of several students' score as it is written."""
    best = {}
    for metric, shown in SHOWN.items():
        means = [mean for system in find(systems, "student") if (mean := system.mean(metric)) is not None]
        if len(means) > 1:
            best[metric] = f"{max(means):.{shown.digits}f}"
    return best


def _score_rows(system: System, metrics: Sequence[str], best: Mapping[str, str]) -> Iterator[str]:
    cells = []
    for metric in metrics:
        digits = SHOWN[metric].digits
        means = system.means(metric)
        several = len(means) > 1
        text = pieces.number(system.mean(metric), digits)
        bold = system.first.kind == "student" and text == best.get(metric)
        spread = f"<small>{min(means):.{digits}f} … {max(means):.{digits}f}</small>" if several else ""
        cells.append((f"<b>{text}</b>" if bold else text) + spread)
    single = len(system.runs) == 1
    seed = pieces.text(system.first.seed) if single else f"{len(system.runs)} seeds"
    cost = (pieces.parameters(system.first.parameters), pieces.number(system.first.gflops, 2))
    unscored = [count for run in system.runs if (count := run.unscored()) is not None]
    failed = pieces.text(sum(unscored) if unscored else None)
    yield pieces.row("", (pieces.label(system), seed, *cost, *cells, failed))
    for run in () if single else system.runs:
        cells = [pieces.number(run.mean(metric), SHOWN[metric].digits) for metric in metrics]
        name, seed = escape(run.folder.name), pieces.text(run.seed)
        yield pieces.row("seed", (name, seed, "", "", *cells, pieces.text(run.unscored())))


def _failed(run: Run) -> str:
    failures = run.scores["failed"] if run.scores else ()
    if not failures:
        return ""
    items = "".join(f"<li>{escape(f['name'])}: {escape(f['metric'])}: {escape(f['reason'])}</li>" for f in failures)
    count = run.unscored()
    return (
        f"<details><summary>{escape(run.folder.name)}: {count} recording{'s' if count != 1 else ''} not scored and not "
        f'in the means</summary><ul class="failed">{items}</ul></details>\n'
    )


# Differences


def differences(systems: Sequence[System], baseline: System | None) -> str:
    """How far every system is from one of them, recording by recording."""
    if baseline is None or len(systems) == 1:
        return ""
    title = f"Against “{escape(baseline.label)}”"
    if not baseline.scored_on:
        return pieces.section(title, pieces.missing(f"“{baseline.label}” has not been scored yet."))
    metrics = shown_metrics(systems)
    rows, without = [], []
    for system in systems:
        found = {metric: difference(baseline, system, metric) for metric in metrics}
        if system is baseline:
            continue
        count = max((value.recordings for value in found.values() if value), default=0)
        if not count:
            without.append(system.label)
            continue
        cells = [_difference(found[metric], SHOWN[metric].digits) for metric in metrics]
        rows.append(pieces.row("", (pieces.label(system), str(count), *cells)))
    left_out = pieces.missing(f"No recordings scored in both: {', '.join(without)}.") if without else ""
    if not rows:
        return pieces.section(title, left_out)
    return pieces.section(
        title,
        pieces.note(
            "Mean difference over the recordings that both have scored, and half the width of its 95 % confidence "
            "interval (paired, Student's t, recordings taken as independent; several seeds: their mean for each "
            "recording). Bold: better, and the interval does not reach 0."
        ),
        pieces.table(("System", "Recordings", *map(pieces.heading, metrics)), rows, "scores"),
        left_out,
    )


def _difference(found: Difference | None, digits: int) -> str:
    if found is None:
        return "–"
    rounded = round(found.mean, digits)
    text = f"{rounded:+.{digits}f}" if rounded else f"{0:.{digits}f}"
    if found.half is None:
        return text
    text = f"<b>{text}</b>" if found.mean > found.half else text
    return f"{text}<small>± {found.half:.{digits}f}</small>"


def pairs(systems: Sequence[System]) -> str:
    """Students taught by MV-AT against the same students alone, a point a recording."""
    drawn = []
    compared = list(comparisons(systems))
    for alone, mvat in compared if len(compared) <= MOST_COMPARISONS else ():
        for metric in _PAIRED:
            a, b = alone.rows(metric), mvat.rows(metric)
            names = [recording for recording in a if recording in b]
            if names:
                x, y = [a[n] for n in names], [b[n] for n in names]
                drawn.append(figures.paired(pieces.heading(metric), x, y, alone.label, mvat.label, mvat.style))
    if not drawn:
        return ""
    return pieces.section(
        "Recording by recording",
        pieces.note(
            "Each point is one recording; above the line MV-AT is better than the student alone. With several seeds a "
            "point is their mean."
        ),
        pieces.charts(drawn),
    )
