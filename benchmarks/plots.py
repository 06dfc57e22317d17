"""Pictures (PNG) of results: one an op, and the throughput of the models.

An op's picture has four parts: speed against eager and share of the floor (the cases of README's table), and time and
memory of one clip against its length.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import Row
from benchmarks.table import by_variant, in_overview
from mvat.files import replacing

THROUGHPUT = "throughput.png"
_COLOURS = {"eager": "C7", "fused": "C3", "compile": "C0", "stock": "C1", "onnxruntime": "C2", "manner": "C4"}


def planned(rows: Sequence[Row]) -> list[str]:
    """The names of the pictures of these rows."""
    timed = [row for row in rows if row.status == "timed"]
    names = [f"{op}.png" for op in dict.fromkeys(row.op for row in timed)]
    return names + [THROUGHPUT] * any(row.audio_seconds for row in timed)


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write the pictures of the timed rows; gives their paths, none where nothing was timed."""
    timed = [row for row in rows if row.status == "timed"]
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for op in dict.fromkeys(row.op for row in timed):
        written.append(_op(folder / f"{op}.png", [row for row in timed if row.op == op]))
    models = [row for row in timed if row.audio_seconds and row.shape["seconds"] == 4]
    if THROUGHPUT in planned(rows):
        figure, axes = _figure(9, 1.4 + 0.17 * len(models), 1, 1)
        title = "seconds of audio a second, clips of 4 s"
        _bars(axes[0][0], models, lambda row: row.audio_seconds / row.median, title)
        written.append(_save(figure, folder / THROUGHPUT))
    return written


def _op(path: Path, rows: Sequence[Row]) -> Path:
    shown = [row for row in rows if in_overview(row)]
    eager = {row.group: row.median for row in shown if row.variant == "eager"}
    against = [row for row in shown if row.variant != "eager" and row.group in eager]
    figure, axes = _figure(14, 5.5 + 0.2 * len(shown), 2, 2)
    _bars(axes[0][0], against, lambda row: eager[row.group] / row.median, "times as fast as eager", 1.0)
    _bars(axes[0][1], shown, lambda row: row.share, "share of the floor", 1.0)
    _lengths(*axes[1], rows)
    figure.suptitle(rows[0].op)
    return _save(figure, path)


def _figure(width: float, height: float, rows: int, columns: int) -> tuple[Any, Any]:
    """A figure drawn without a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Any, path: Path) -> Path:
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=90)
    return path


def _bars(axes: Any, rows: Sequence[Row], value: Callable[[Row], float], title: str, mark: float | None = None) -> None:
    """One bar a row, coloured by variant, the rows of a case side by side; a line at `mark`."""
    places = {id(row): place for place, row in enumerate(sorted(rows, key=lambda row: _case(row)))}
    for variant, colour in _colours(rows):
        mine = [row for row in rows if row.variant == variant]
        bars = axes.barh([places[id(row)] for row in mine], [value(row) for row in mine], color=colour, label=variant)
        axes.bar_label(bars, fmt="%.3g", fontsize=6, padding=2)
    cases: dict[str, list[int]] = {}
    for row in rows:
        cases.setdefault(_case(row), []).append(places[id(row)])
    axes.set_yticks([sum(at) / len(at) for at in cases.values()], list(cases), fontsize=7)
    axes.invert_yaxis()
    if mark is not None:
        axes.axvline(mark, color="black", linewidth=0.8)
    axes.set_title(title, fontsize=10)
    if rows:
        axes.legend(fontsize=7)


def _case(row: Row) -> str:
    places = " ".join(str(row.shape[key]) for key in ("stage", "place") if key in row.shape)
    name = f"{row.op} {places}" if row.audio_seconds else places  # models and steps share a picture
    return f"{name}, B {row.shape['B']}, {row.dtype} {row.pass_name}"


def _lengths(time: Any, memory: Any, rows: Sequence[Row]) -> None:
    """Time and memory of one clip against its length, backward included: a line a variant and longest feature."""
    key = "seconds" if "seconds" in rows[0].shape else "T"
    last = "forward+backward" if any(row.pass_name == "forward+backward" for row in rows) else rows[0].pass_name
    alone = [row for row in rows if row.shape["B"] == 1 and row.pass_name == last]
    longest: dict[str, Row] = {}
    for row in alone:
        preset = row.shape["place"].split()[0]
        longest[preset] = max(longest.get(preset, row), row, key=lambda row: row.shape[key])
    for style, (preset, longest_row) in zip(("-", "--", ":"), longest.items(), strict=False):
        for variant, colour in _colours(alone):
            line = [r for r in alone if r.variant == variant and r.shape["place"] == longest_row.shape["place"]]
            line.sort(key=lambda row: row.shape[key])
            if len(line) > 1:
                lengths, look = [row.shape[key] for row in line], {"color": colour, "linestyle": style, "marker": "o"}
                time.loglog(lengths, [1e3 * row.median for row in line], label=f"{variant}, {preset}", **look)
                memory.loglog(lengths, [max(row.peak_extra or 0, 1) / 1e6 for row in line], **look)
    for axes, what in ((time, "milliseconds"), (memory, "peak extra memory in MB")):
        axes.set_xlabel("length in seconds" if key == "seconds" else "length in samples")
        axes.set_title(f"{what}, one clip, {last}", fontsize=10)
    if time.lines:
        time.legend(fontsize=7)


def _colours(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """The variants' colours, the same in every picture."""
    for variant in by_variant(rows):
        yield variant, _COLOURS.get(variant, "C5")
