"""The report's sections on training: all runs in one chart a quantity, and each run by itself."""

from collections.abc import Sequence
from html import escape

from train.report import figures, pieces
from train.report.figures import Curve, Panel
from train.report.runs import SHOWN, Run, System

_TITLES = {
    "train total": "Training loss",
    "train enhancement": "Training loss: enhancement",
    "train transfer": "Training loss: transfer",
    "valid loss": "Validation loss",
    **{f"valid {name}": f"Validation {shown.title}{shown.unit and ',' + shown.unit}" for name, shown in SHOWN.items()},
    "valid unscored": "Validation: recordings not scored",
    "lr": "Learning rate",
    "audio_seconds_per_second": "Seconds of audio a second",
    "peak_memory_gb": "Peak memory, GB",
    "gradient_norm": "Gradient norm",
    "waiting": "Share of time waiting for data",
    "skipped": "Skipped steps",
    "unreadable": "Unreadable examples",
}
_NOT_DRAWN = ("seconds",)  # of an epoch: audio a second says the same


def curves(systems: Sequence[System]) -> str:
    """Every quantity that some history.json holds, over the epochs, all runs together where there are several."""
    trained = [system for system in systems if any(run.series for run in system.runs)]
    if not trained:
        return pieces.section("Training", pieces.missing("No run has a history.json."))
    if sum(bool(run.series) for system in trained for run in system.runs) == 1:
        return ""
    drawn = []
    for name in _quantities([run for system in trained for run in system.runs]):
        lines = [
            Curve(system.style, place, *run.series[name])
            for system in trained
            for place, run in enumerate(system.runs)
            if name in run.series
        ]
        if any(any(line.y) for line in lines):
            drawn.append(figures.curves(_title(name), lines))
    several = any(len(system.runs) > 1 for system in trained)
    note = pieces.note("Seeds of one system: solid, dashed, dotted.") if several else ""
    return pieces.section("Training", pieces.keys(trained), note, pieces.charts(drawn))


def progress(systems: Sequence[System]) -> str:
    """How the training of each run went, over its steps."""
    runs = [(system, run) for system in systems for run in system.runs if run.series]
    if not runs:
        return ""
    unfolded = len(runs) <= 3
    blocks = [_one(system, run, unfolded) for system, run in runs]
    return pieces.section("How training went", *blocks)


def _one(system: System, run: Run, unfolded: bool) -> str:
    drawn = [name for name in _quantities([run]) if any(run.series[name][1])]
    panels = [Panel(_title(name), *_over_steps(run, name)) for name in drawn]
    name = system.label if len(system.runs) == 1 else f"{system.label}, {run.folder.name}"
    key = f'<span class="key {system.style}"></span>'
    where = "steps" if run.steps else "epochs"
    picture = figures.progress(f"Training of {name} over its {where}", panels, where, system.style)
    return (
        f"<details{' open' if unfolded else ''}><summary>{key}<b>{escape(name)}</b>: {escape(_summary(run))}</summary>"
        f'<div class="wide"><div class="progress">{picture}</div></div></details>\n'
    )


def _quantities(runs: Sequence[Run]) -> list[str]:
    """Names of what was recorded, the known ones first and in order; of a loss with one part, the loss alone."""
    there = dict.fromkeys(name for run in runs for name in run.series if name not in _NOT_DRAWN)
    if all(run.series.get("train enhancement") == run.series.get("train total") for run in runs):
        there.pop("train enhancement", None)
    return [name for name in _TITLES if name in there] + [name for name in there if name not in _TITLES]


def _title(name: str) -> str:
    if name in _TITLES:
        return _TITLES[name]
    words = name.replace("_", " ")
    return words[:1].upper() + words[1:]


def _over_steps(run: Run, name: str) -> tuple[list[float], list[float]]:
    epochs, values = run.series[name]
    return ([run.steps.get(epoch, float("nan")) for epoch in epochs] if run.steps else epochs), values


def _summary(run: Run) -> str:
    """The run in one line: how long, how good, how fast."""
    epochs = max(x[-1] for x, _ in run.series.values())
    parts = [f"{epochs:.0f} epoch{'s' if epochs != 1 else ''}"]
    if run.steps:
        parts.append(f"{max(run.steps.values()):,.0f} steps")
    if "seconds" in run.series:
        parts.append(_duration(sum(run.series["seconds"][1])))
    for metric, sign in (("pesq_wb", 1), ("si_sdr", 1), ("loss", -1)):
        if f"valid {metric}" in run.series:
            x, y = run.series[f"valid {metric}"]
            best = max(range(len(y)), key=lambda i: sign * y[i])
            shown = SHOWN.get(metric)
            title, digits, unit = (shown.title, shown.digits, shown.unit) if shown else ("loss", 4, "")
            parts.append(f"best validation {title} {y[best]:.{digits}f}{unit} in epoch {x[best]:.0f}")
            break
    speed = run.series.get("audio_seconds_per_second", ([], []))[1]
    if speed:
        parts.append(f"{sorted(speed)[len(speed) // 2]:.0f} s of audio a second")
    memory = max(run.series.get("peak_memory_gb", ([], [0.0]))[1])
    if memory:
        parts.append(f"{memory:.1f} GB")
    parts += [
        f"{_title(name).lower()}: {sum(run.series[name][1]):.0f}"
        for name in ("skipped", "unreadable")
        if name in run.series
    ]
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
