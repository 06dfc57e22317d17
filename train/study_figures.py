"""The pictures of a study, as SVG: intervals of all methods, validation curves, quality against cost."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from train.study_text import Json, title, way

_COLOURS = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
_RC: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "study",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.linewidth": 0.5,
    "grid.color": "0.85",
}
CAPTIONS = {
    "intervals.svg": "Difference to the student alone, with its 95 % interval",
    "curves.svg": "Validation score over the epochs, mean over seeds",
    "quality.svg": "Scores against parameters and GFLOPs; a bar is the range of the seeds",
}


def draw(study: Json, curves: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, str]:
    """All pictures, by file name.

    Args:
        study: as from `study_results.gather`.
        curves: label of a system -> (epoch, validation score).
    """
    with matplotlib.rc_context(_RC):
        drawn = {
            "intervals.svg": _intervals(study),
            "curves.svg": _curves(study, curves),
            "quality.svg": _quality(study),
        }
        return {name: _svg(figure) for name, figure in drawn.items() if figure}


def _intervals(study: Json) -> Figure | None:
    systems = [system for system in study["systems"] if "difference" in system][::-1]
    if not systems:
        return None
    metrics = study["config"]["metrics"]
    figure = Figure((2.2 + 2.4 * len(metrics), 0.9 + 0.27 * len(systems)), layout="constrained")
    grid = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(grid, metrics, strict=True):
        axes.axvline(0, color="0.4", linewidth=0.8)
        for place, system in enumerate(systems):
            found = system["difference"][metric]
            if not found:
                continue
            if found["low"] is not None:
                axes.plot((found["low"], found["high"]), (place, place), color=_colour(study, system), linewidth=2)
            filled = "full" if found["verdict"] != "undecided" else "none"
            axes.plot(found["mean"], place, "o", color=_colour(study, system), markersize=5, fillstyle=filled)
        axes.set_title(_title(metric))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="x")
    grid[0].set_yticks(range(len(systems)), [system["label"] for system in systems])
    figure.supxlabel("difference to the student alone (filled: the interval leaves out 0)", fontsize=9)
    return figure


def _curves(study: Json, curves: Mapping[str, Sequence[tuple[float, float]]]) -> Figure | None:
    students = list(dict.fromkeys(s["student"] for s in study["systems"] if s["kind"] == "student"))
    if not students or not any(curves.values()):
        return None
    figure = Figure((4.5 * len(students), 3.2), layout="constrained")
    grid = figure.subplots(1, len(students), sharey=True, squeeze=False)[0]
    for axes, student in zip(grid, students, strict=True):
        for system in study["systems"]:
            points = curves.get(system["label"])
            if points and (system["kind"] == "teacher" or system["student"] == student):
                marker = "o" if len(points) == 1 else None
                axes.plot(*zip(*points, strict=True), color=_colour(study, system), label=_name(system), marker=marker)
        axes.set(title=student, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid()
    grid[0].set_ylabel(f"validation {_title(study['select'])}")
    _legend(figure, grid[0])
    return figure


def _quality(study: Json) -> Figure | None:
    systems = [system for system in study["systems"] if system["kind"] != "noisy" and system["parameters"]]
    if not systems:
        return None
    noisy = next(system for system in study["systems"] if system["kind"] == "noisy")
    names = list(dict.fromkeys(_name(system) for system in systems))
    metrics = study["config"]["metrics"]
    figure = Figure((1 + 2.7 * len(metrics), 5.4), layout="constrained")
    grid = figure.subplots(2, len(metrics), sharey="col", squeeze=False)
    costs = (("parameters", 1e6, "parameters, millions"), ("gflops", 1, "GFLOPs for 4 s"))
    for row, (key, unit, label) in zip(grid, costs, strict=True):
        sizes = sorted({system[key] / unit for system in systems})
        # Side by side, or the bars of methods that agree would hide each other; together a tenth of the axis.
        aside = (sizes[-1] / sizes[0]) ** (0.1 / len(names))
        for axes, metric in zip(row, metrics, strict=True):
            if noisy["scores"][metric]:
                axes.axhline(noisy["scores"][metric]["mean"], color="0.5", linestyle=":", label="noisy")
            for place, name in enumerate(names):
                points = [
                    (system[key] / unit, system["scores"][metric])
                    for system in sorted(systems, key=lambda system: system[key])
                    if _name(system) == name and system["scores"][metric]
                ]
                colour = next(_colour(study, system) for system in systems if _name(system) == name)
                points = [(x * aside ** (place - len(names) / 2), score) for x, score in points]
                for x, score in points:
                    axes.plot((x, x), (score["low"], score["high"]), color=colour, alpha=0.5)
                if points:
                    x, y = zip(*((x, score["mean"]) for x, score in points), strict=True)
                    axes.plot(x, y, "o-", color=colour, label=name, markersize=4, linewidth=1)
            axes.set_xscale("log")
            axes.set_xticks(sizes)
            axes.xaxis.set_major_formatter("{x:.3g}")
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel(label)
            axes.set_title(_title(metric))
            axes.grid()
    _legend(figure, grid[0][0])
    return figure


def _legend(figure: Figure, axes: Any) -> None:
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(6, len(names)), frameon=False)


def _name(system: Json) -> str:
    """What a system is called in a legend."""
    return "teacher" if system["kind"] == "teacher" else way(system)


def _colour(study: Json, system: Json) -> Any:
    if system["kind"] == "teacher":
        return "black"
    return _COLOURS[list(study["config"]["methods"]).index(system["method"]) % len(_COLOURS)]


def _title(metric: str) -> str:
    return "loss" if metric == "loss" else title(metric)


def _svg(figure: Figure) -> str:
    target = io.StringIO()
    figure.savefig(target, format="svg", facecolor="white", metadata=dict.fromkeys(("Date", "Creator")))
    return target.getvalue()
