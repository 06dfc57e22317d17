"""python -m benchmarks.plots RESULTS.json FOLDER: pictures (PNG) of a results file.

speed-<op>.png (speed against eager), floor-<op>.png (share of the floor), length-<op>.png (time and memory against
length, one clip), throughput.png (seconds of audio a second).
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.results import Row
from benchmarks.table import by_variant
from mvat.files import replacing


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write the pictures of the timed rows; gives their paths, none where nothing was timed."""
    timed = [row for row in rows if row.status == "timed"]
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for op in dict.fromkeys(row.op for row in timed):
        mine = [row for row in timed if row.op == op]
        eager = {row.group: row.median for row in mine if row.variant == "eager"}
        against = [row for row in mine if row.variant != "eager" and row.group in eager]
        if against:
            title = f"{op}: times as fast as eager"
            path = folder / f"speed-{op}.png"
            written.append(_bars(path, against, lambda row, e=eager: e[row.group] / row.median, title, 1.0))
        title = f"{op}: share of the floor"
        written.append(_bars(folder / f"floor-{op}.png", mine, lambda row: row.share, title, 1.0))
        written += _lengths(folder / f"length-{op}.png", mine)
    models = [row for row in timed if row.audio_seconds]
    if models:
        title = "seconds of audio a second"
        path = folder / "throughput.png"
        written.append(_bars(path, models, lambda row: row.audio_seconds / row.median, title, None))
    return written


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    """A figure drawn without a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns)


def _save(figure: Any, path: Path) -> Path:
    with replacing(path) as part:
        figure.savefig(part, dpi=110)
    return path


def _bars(path: Path, rows: Sequence[Row], value: Callable[[Row], float], title: str, mark: float | None) -> Path:
    """One bar a row, coloured by variant; a line at `mark`."""
    figure, axes = _figure(9, 1.2 + 0.25 * len(rows))
    for variant, colour in _colours(rows):
        places = [i for i, row in enumerate(rows) if row.variant == variant]
        axes.barh(places, [value(rows[i]) for i in places], color=colour, label=variant)
    axes.set_yticks(range(len(rows)), [row.group.removeprefix(f"{row.op} ") for row in rows], fontsize=7)
    axes.invert_yaxis()
    if mark is not None:
        axes.axvline(mark, color="black", linewidth=0.8)
    axes.set_title(title)
    axes.legend(fontsize=7)
    return _save(figure, path)


def _lengths(path: Path, rows: Sequence[Row]) -> Iterator[Path]:
    """Time and memory against length with one clip, a line for each variant, place and pass; nothing without a line."""
    key = "seconds" if "seconds" in rows[0].shape else "T"
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if row.shape.get("B") == 1:
            rest = " ".join(str(v) for k, v in row.shape.items() if k not in ("B", key))
            lines.setdefault(f"{row.variant} {rest} {row.pass_name}", []).append(row)
    lines = {label: sorted(line, key=lambda row: row.shape[key]) for label, line in lines.items() if len(line) > 1}
    if not lines:
        return
    figure, (time, memory) = _figure(13, 5, columns=2)
    for label, line in lines.items():
        lengths = [row.shape[key] for row in line]
        time.loglog(lengths, [1e3 * row.median for row in line], marker="o", label=label)
        memory.loglog(lengths, [max(row.peak_extra or 0, 1) / 1e6 for row in line], marker="o")
    name = "length in seconds" if key == "seconds" else "length in samples"
    for axes, what in ((time, "milliseconds"), (memory, "peak extra memory in MB")):
        axes.set_xlabel(name)
        axes.set_title(f"{rows[0].op}: {what}")
    time.legend(fontsize=6)
    yield _save(figure, path)


def _colours(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """A colour for each variant, in fixed order."""
    for i, variant in enumerate(by_variant(rows)):
        yield variant, f"C{i}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="a file of benchmarks/results/")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    options = parser.parse_args(arguments)
    for path in draw(results.read(options.results)[0], options.folder):
        print(path)


if __name__ == "__main__":
    main()
