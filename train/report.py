"""One self-contained HTML page about an experiment: python -m train.report EXPERIMENT_DIR

Shows whatever runs the folder holds: scores, curves, spectrograms, audio, attention maps, configurations.
"""

import argparse
import base64
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from mvat import __version__, audio
from mvat.files import write_text
from mvat.models import Manner
from train import manifest, report_figures
from train.report_figures import Curve, style
from train.report_runs import SHOWN, Run, System, collect, comparisons, find, lead, verdict

SECONDS = 5  # of a recording that are shown and can be heard
_VIEWS = ("channel", "global", "local")
_CURVES = {
    "train total": "Training loss",
    "train enhancement": "Training loss: enhancement",
    "train transfer": "Training loss: transfer",
    "valid loss": "Validation loss",
    "valid pesq_wb": "Validation PESQ wb",
    "valid stoi": "Validation STOI",
    "valid si_sdr": "Validation SI-SDR, dB",
    "lr": "Learning rate",
    "audio_seconds_per_second": "Seconds of audio a second",
    "peak_memory_gb": "Peak memory, GB",
}


class Sample(NamedTuple):
    """A recording to look at and listen to."""

    entry: manifest.Entry
    why: str


class Maps(NamedTuple):
    """The attention maps on one recording: place of the system -> block -> view -> map [T_l] of norm 1."""

    recording: str
    seconds: float
    by_model: dict[int, dict[str, dict[str, np.ndarray]]]


def report(experiment: Path, progress: bool = True) -> Path:
    """Writes report.html into an experiment's folder.

    Args:
        experiment: A folder with one folder a run.
        progress: Whether to show a progress bar.

    Returns:
        The file written.

    Raises:
        ValueError: There is no run, or a JSON file is malformed; names the file.
        OSError: The file cannot be written.
    """
    systems = collect(experiment)
    path = experiment / "report.html"
    write_text(path, page(experiment, systems, progress))
    return path


def page(experiment: Path, systems: Sequence[System], progress: bool = True) -> str:
    """The whole document."""
    name = escape(experiment.resolve().name)
    sections = (
        _header(name, systems),
        _scores(systems),
        _pairs(systems),
        _curves(systems),
        _samples(systems, progress),
        _configurations(systems),
    )
    css = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}: mvat report</title>\n<style>\n{css}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


# Scores


def _header(name: str, systems: Sequence[System]) -> str:
    verdicts = "".join(f"<p>{escape(verdict(*pair))}</p>" for pair in comparisons(systems))
    scored = [run.scores for system in systems for run in system.runs if run.scores]
    sets = sorted({(scores["set"], scores["data"]) for scores in scored})
    facts = ""
    for kind, data in sets:
        count = max(len(scores["files"]) for scores in scored if (scores["set"], scores["data"]) == (kind, data))
        facts += f"{count} recordings of the {kind} set of {Path(data).parent.name}. "
    warning = _missing("The runs were scored on different sets; compare with care.") if len(sets) > 1 else ""
    return (
        f'<header>\n<h1>Speech enhancement: {name}</h1>\n<p class="lead">{escape(lead(systems))}</p>\n{verdicts}\n'
        f'<p class="facts">{escape(facts)}MV-AT is multi-view attention transfer from teacher to student. '
        f"mvat {__version__}.</p>\n{warning}</header>"
    )


def _scores(systems: Sequence[System]) -> str:
    columns = "".join(f"<th>{metric.title}{metric.unit and ',' + metric.unit}</th>" for metric in SHOWN.values())
    rows = "".join(row for system in systems for row in _score_rows(system, _best(systems)))
    failed = "".join(_failed(run) for system in systems for run in system.runs)
    waiting = [run.folder.name for system in systems for run in system.runs if not run.scores]
    note = _missing(f"Not scored yet (python -m train.evaluate): {', '.join(waiting)}.") if waiting else ""
    return (
        '<section>\n<h2>Scores</h2>\n<p class="note">Means over the recordings of the set; higher is better. Bold: the '
        "best student. Several seeds: their mean, and the lowest and highest of them. GFLOPs are for four seconds of "
        'audio.</p>\n<div class="wide"><table class="scores">\n<thead><tr><th>System</th><th>Seed</th>'
        f"<th>Parameters</th><th>GFLOPs</th>{columns}<th>Not scored</th></tr></thead>\n"
        f"<tbody>{rows}</tbody>\n</table></div>\n{note}{failed}</section>"
    )


def _best(systems: Sequence[System]) -> dict[str, str]:
    """Metric -> the best student's score as it is written."""
    best = {}
    for metric, shown in SHOWN.items():
        means = [mean for system in find(systems, "student") if (mean := system.mean(metric)) is not None]
        if means:
            best[metric] = f"{max(means):.{shown.digits}f}"
    return best


def _score_rows(system: System, best: Mapping[str, str]) -> Iterator[str]:
    cells = []
    for metric, shown in SHOWN.items():
        means = system.means(metric)
        several = len(means) > 1
        text = _number(system.mean(metric), shown.digits)
        bold = system.first.kind == "student" and text == best.get(metric)
        spread = f"<small>{min(means):.{shown.digits}f} … {max(means):.{shown.digits}f}</small>" if several else ""
        cells.append((f"<b>{text}</b>" if bold else text) + spread)
    single = len(system.runs) == 1
    seed = _text(system.first.seed) if single else f"{len(system.runs)} seeds"
    cost = (_parameters(system.first.parameters), _number(system.first.gflops, 2))
    unscored = [count for run in system.runs if (count := run.unscored()) is not None]
    yield _row("", (_label(system), seed, *cost, *cells, _text(sum(unscored) if unscored else None)))
    for run in () if single else system.runs:
        cells = [_number(run.mean(metric), shown.digits) for metric, shown in SHOWN.items()]
        yield _row("seed", (escape(run.folder.name), _text(run.seed), "", "", *cells, _text(run.unscored())))


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


def _pairs(systems: Sequence[System]) -> str:
    charts = []
    for alone, mvat in comparisons(systems):
        for name, metric in SHOWN.items():
            a, b = alone.rows(name), mvat.rows(name)
            names = [recording for recording in a if recording in b]
            if names and name != "stoi":
                x, y = [a[n] for n in names], [b[n] for n in names]
                title = metric.title + (metric.unit and "," + metric.unit)
                charts.append(report_figures.paired(title, x, y, str(alone.label), str(mvat.label), "mvat"))
    if not charts:
        return ""
    return (
        '<section>\n<h2>Recording by recording</h2>\n<p class="note">Each point is one recording; above the line MV-AT '
        f"is better than the student alone. With several seeds a point is their mean.</p>\n{_charts(charts)}</section>"
    )


# Training


def _curves(systems: Sequence[System]) -> str:
    names = [name for name in _CURVES if any(name in run.series for system in systems for run in system.runs)]
    charts = []
    for name in names:
        lines = [
            Curve(style(system.first.kind, system.first.method), place, *run.series[name])
            for system in systems
            for place, run in enumerate(system.runs)
            if name in run.series
        ]
        if any(any(line.y) for line in lines):
            charts.append(report_figures.curves(_CURVES[name], lines))
    if not charts:
        return f"<section>\n<h2>Training</h2>\n{_missing('No run has a history.json.')}</section>"
    trained = [system for system in systems if any(run.series for run in system.runs)]
    several = any(len(system.runs) > 1 for system in trained)
    note = '<p class="note">Seeds of one system: solid, dashed, dotted.</p>\n' if several else ""
    return f"<section>\n<h2>Training</h2>\n{_keys(trained)}{note}{_charts(charts)}</section>"


# Recordings


def _samples(systems: Sequence[System], progress: bool) -> str:
    """Spectrograms and players of a few recordings, and the attention maps on them."""
    chosen, reason = _choose(systems)
    if not chosen:
        return f"<section>\n<h2>Listen and look</h2>\n{_missing(reason)}</section>"
    shown = [system for system in systems if system.first.kind != "noisy"]
    models, notes = _models(shown)
    blocks, maps = [], []
    for sample in tqdm(chosen, desc="report", unit="recording", disable=None if progress else True):
        blocks.append(_sample(sample, systems, shown))
        noisy = _excerpt(sample.entry.noisy)
        by_model = {place: _maps(model, noisy) for place, model in models.items()}
        maps.append(Maps(sample.entry.name, len(noisy) / audio.SAMPLE_RATE, by_model))
    return (
        '<section>\n<h2>Listen and look</h2>\n<p class="note">At most the first '
        f"{SECONDS} seconds of each recording. All spectrograms share one scale, 0 dB being the loudest point of the "
        f'recording\'s signals.</p>\n<div class="bar">{report_figures.colour_bar()}</div>\n'
        + "\n".join(blocks)
        + "</section>\n<section>\n<h2>Attention maps</h2>\n"
        + "".join(_missing(note) for note in notes)
        + _attention(shown, maps)
        + "</section>"
    )


def _choose(systems: Sequence[System]) -> tuple[list[Sample], str]:
    """The recordings with the least, the median and the greatest gain of the best student; or why there are none."""
    students = [
        s for s in find(systems, "student") or find(systems, "teacher") if (s.first.folder / "enhanced").is_dir()
    ]
    if not students:
        return [], "No run has enhanced recordings (python -m train.evaluate writes them)."
    best = max(students, key=lambda system: system.mean("si_sdr") or -np.inf)
    scores = best.first.scores or next(run.scores for run in best.runs if run.scores)
    try:
        entries = {entry.name: entry for entry in manifest.load(scores["data"]).split(scores["set"])}
    except ValueError as error:
        return [], f"The recordings cannot be read: {error}"
    noisy = find(systems, "noisy")
    before, after = noisy[0].rows("si_sdr") if noisy else {}, best.first.rows("si_sdr")
    gains = {name: value - before.get(name, 0) for name, value in after.items() if name in entries}
    ranked = sorted(gains, key=lambda name: gains[name])
    if not ranked:
        return [], "No recording of the set has an SI-SDR."
    what = f"gain in SI-SDR of “{best.label}”" if noisy else f"SI-SDR of “{best.label}”"
    places = {"least": 0, "median": len(ranked) // 2, "greatest": len(ranked) - 1}
    names: dict[str, str] = {}
    for word, place in places.items():
        names.setdefault(ranked[place], word)
    return [Sample(entries[n], f"the {word} {what}, {gains[n]:+.1f} dB") for n, word in names.items()], ""


def _sample(sample: Sample, systems: Sequence[System], shown: Sequence[System]) -> str:
    entry = sample.entry
    noisy = find(systems, "noisy")
    signals: list[tuple[str, str, Path, Run | None]] = [
        ("noisy", "noisy", entry.noisy, noisy[0].first if noisy else None)
    ]
    for system in shown:
        first = system.first
        seed = f", seed {first.seed}" if len(system.runs) > 1 else ""
        path = first.folder / "enhanced" / f"{entry.name}.wav"
        signals.append((style(first.kind, first.method), f"{system.label}{seed}", path, first))
    signals.append(("clean", "clean", entry.clean, None))

    heard: list[tuple[str, str, np.ndarray | None, str]] = []
    for key, label, path, run in signals:
        try:
            heard.append((key, label, _excerpt(path), _one_line(run, entry.name)))
        except audio.AudioError:
            heard.append((key, label, None, ""))
    spectra = [None if samples is None else report_figures.decibels(samples) for _, _, samples, _ in heard]
    top = max(float(spectrum.max()) for spectrum in spectra if spectrum is not None)
    cells = []
    for (key, label, samples, numbers), spectrum in zip(heard, spectra, strict=True):
        title = f'<span class="key {key}"></span><b>{escape(label)}</b>'
        if samples is None or spectrum is None:
            cells.append(f'<div>{title}</div><div class="note">no enhanced file</div>')
            continue
        picture = report_figures.spectrogram(spectrum, top, f"{label}, {entry.name}", time_axis=key == "clean")
        cells.append(f"<div>{title}<small>{numbers}</small>{_player(samples, label)}</div><div>{picture}</div>")
    about = ", ".join(filter(None, (entry.noise, None if entry.snr is None else f"{entry.snr:g} dB SNR", sample.why)))
    return (
        f'<h3>{escape(entry.name)}</h3><p class="note">{escape(about)}</p>\n<div class="sample">\n'
        + "\n".join(cells)
        + "\n</div>"
    )


def _excerpt(path: Path) -> np.ndarray:
    return audio.read(path)[0][0][: SECONDS * audio.SAMPLE_RATE]


def _one_line(run: Run | None, name: str) -> str:
    parts = []
    for metric in ("pesq_wb", "si_sdr"):
        value = run.rows(metric).get(name) if run else None
        if value is not None:
            parts.append(f"{SHOWN[metric].title} {value:.{SHOWN[metric].digits}f}{SHOWN[metric].unit}")
    return " · ".join(parts)


def _player(samples: np.ndarray, label: str) -> str:
    target = io.BytesIO()
    audio.require("soundfile").write(target, np.clip(samples, -1, 1), audio.SAMPLE_RATE, "PCM_16", format="FLAC")
    data = base64.b64encode(target.getvalue()).decode()
    return (
        f'<audio controls preload="metadata" aria-label="{escape(label)}" src="data:audio/flac;base64,{data}"></audio>'
    )


# Attention maps


def _models(shown: Sequence[System]) -> tuple[dict[int, Manner], list[str]]:
    """Place in `shown` -> model of the system's first run; and what could not be loaded."""
    models, notes = {}, []
    for place, system in enumerate(shown):
        checkpoint = system.first.folder / "best.pt"
        try:
            models[place] = Manner.from_pretrained(checkpoint)
        except (ValueError, OSError) as error:
            notes.append(f"“{system.label}” is left out: {error}")
    return models, notes


@torch.inference_mode()
def _maps(model: Manner, noisy: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """Block name -> view -> map [T_l] of norm 1 (0 where all is silent), float64."""
    blocks = model(torch.from_numpy(noisy)[None, None], return_maps=True)
    depth = model.config["depth"]
    levels = range(depth) if model.config["attention_layers"] == "all" else range(depth - 1, depth)
    names = [f"encoder {level + 1}" for level in levels] + [f"decoder {level + 1}" for level in reversed(levels)]
    result = {}
    for name, views in zip(names, blocks, strict=True):
        arrays = [view[0].double().numpy() for view in views]
        result[name] = {
            view: array / (np.linalg.norm(array) or 1.0) for view, array in zip(_VIEWS, arrays, strict=True)
        }
    return result


def _attention(shown: Sequence[System], maps: Sequence[Maps]) -> str:
    loaded = maps[0].by_model
    teacher = next((place for place in loaded if shown[place].first.kind == "teacher"), None)
    students = [place for place in loaded if shown[place].first.kind == "student"]
    if teacher is None or not students:
        return _missing("Maps are compared where a teacher's and a student's checkpoint (best.pt) are there.")
    rows = [_map_rows(shown, recording.by_model, teacher, students) for recording in maps]
    drawn = maps[len(maps) // 2], rows[len(maps) // 2]
    if not drawn[1]:
        return _missing("Teacher and students have no block in common whose maps are equally long.")
    return (
        '<p class="note">What each view of each block attends to over time: the sum over channels of squared features '
        "(p = 2), normalised to length 1. The distance between a student's map and the teacher's is 0 where they are "
        f"equal and at most 1.41. The table averages over blocks and the recordings above ({len(maps)}). "
        "Encoder 1 and decoder 1 are the outermost.</p>\n"
        + _distances(shown, students, [row for recording in rows for row in recording])
        + f'<h3>{escape(drawn[0].recording)}</h3><p class="note">The numbers are the distances from the teacher in '
        "that panel.</p>"
        + _keys([shown[place] for place in (teacher, *students)])
        + f'<div class="wide"><div class="maps">{report_figures.attention_maps(drawn[1], drawn[0].seconds)}</div></div>'
    )


def _map_rows(
    shown: Sequence[System], by_model: Mapping[int, Any], teacher: int, students: Sequence[int]
) -> list[dict[str, Any]]:
    """For each block that the students share with the teacher, what `report_figures.attention_maps` draws."""
    rows = []
    for block, views in by_model[teacher].items():
        row: dict[str, Any] = {"block": block}
        for view, map_ in views.items():
            row[view] = [("teacher", map_, None)]
            for place in students:
                own = by_model[place].get(block, {}).get(view)
                if own is not None and own.shape == map_.shape:
                    distance = float(np.linalg.norm(own - map_))
                    row[view].append((style("student", shown[place].first.method), own, distance))
        if all(len(row[view]) == 1 + len(students) for view in _VIEWS):
            rows.append(row)
    return rows


def _distances(shown: Sequence[System], students: Sequence[int], rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of the mean distances from the teacher."""
    means = np.array(
        [[np.mean([row[view][1 + i][2] for row in rows]) for view in _VIEWS] for i in range(len(students))]
    )
    means = np.concatenate([means, means.mean(1, keepdims=True)], 1)
    lines = []
    for place, values in zip(students, means, strict=True):
        texts = [f"{value:.3f}" for value in values]
        closest = [f"{value:.3f}" for value in means.min(0)]
        cells = [f"<b>{text}</b>" if text == least else text for text, least in zip(texts, closest, strict=True)]
        lines.append(_row("", (_label(shown[place]), *cells)))
    heads = "".join(f"<th>{view}</th>" for view in (*_VIEWS, "all views"))
    return (
        f'<div class="wide"><table><thead><tr><th>Mean distance from the teacher\'s maps</th>{heads}</tr></thead>\n'
        f"<tbody>{''.join(lines)}</tbody></table></div>\n"
    )


# Pieces


def _configurations(systems: Sequence[System]) -> str:
    runs = [run for system in systems for run in system.runs if run.config is not None]
    details = "\n".join(
        f"<details><summary>{escape(run.folder.name)}: {escape(run.label)}</summary>"
        f"<pre>{escape(run.config or '')}</pre></details>"
        for run in runs
    )
    return f"<section>\n<h2>Configuration</h2>\n{details or _missing('No run has a config.yaml.')}\n</section>"


def _label(system: System) -> str:
    return f'<span class="key {style(system.first.kind, system.first.method)}"></span>{escape(system.label)}'


def _keys(systems: Sequence[System]) -> str:
    return '<ul class="keys">' + "".join(f"<li>{_label(system)}</li>" for system in systems) + "</ul>\n"


def _charts(charts: Sequence[str]) -> str:
    return '<div class="charts">\n' + "\n".join(f"<div>{chart}</div>" for chart in charts) + "\n</div>"


def _row(kind: str, cells: Sequence[str]) -> str:
    return f'<tr class="{kind}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>\n"


def _missing(text: str) -> str:
    return f'<p class="missing">{escape(text)}</p>\n'


def _text(value: object) -> str:
    return "–" if value is None else escape(str(value))


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _parameters(count: int | None) -> str:
    if count is None:
        return "–"
    return f"{count / 1e6:.2f} M" if count >= 1e6 else f"{count / 1e3:.1f} k"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m train.report", description="Write EXPERIMENT/report.html, one self-contained page."
    )
    parser.add_argument("experiment", type=Path, help="folder with one folder a run, such as runs/demo")
    options = parser.parse_args(arguments)
    try:
        path = report(options.experiment)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
