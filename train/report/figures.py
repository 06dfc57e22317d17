"""The pictures of the report: inline SVG whose colours are CSS variables, so that they follow a light or dark page."""

import base64
import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

DB_RANGE = 80  # of the spectrograms, below the loudest point
_FFT, _HOP = 512, 160
_LEVELS = 48  # of colour: few compress well, and more cannot be told apart

# What is drawn in the first colour is shown in the second.
_STYLE = {
    "#010101": "currentColor",
    "#020202": "var(--rule)",
    "#030303": "var(--noisy)",
    "#040404": "var(--teacher)",
    "#050505": "var(--none)",
    "#060606": "var(--mvat)",
    "#070707": "var(--output)",
    "#080808": "var(--attention)",
    **{f"#09090{i}": f"var(--spare{i})" for i in range(1, 9)},
}
_COLOUR = {css[6:-1]: colour for colour, css in _STYLE.items() if css.startswith("var")}
_INK, _RULE = "#010101", _COLOUR["rule"]
_RC: Any = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _RULE,
    "grid.linewidth": 0.5,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.5,
    "lines.solid_capstyle": "round",
}


_DASHES: Any = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (4, 1.2, 1, 1.2)))


class Curve(NamedTuple):
    """One line of a chart: the name of a colour in report.css, a dash pattern by seed, and its points."""

    style: str
    seed: int
    x: Sequence[float]
    y: Sequence[float]


class Panel(NamedTuple):
    """One small chart of a single line."""

    title: str
    x: Sequence[float]
    y: Sequence[float]


def curves(title: str, lines: Sequence[Curve]) -> str:
    """A quantity over the epochs, one line a run; `seed` counts the runs of one colour and chooses the dashes."""
    with _drawing(f"{title} over the epochs") as (figure, svg):
        figure.set_size_inches(4.2, 2.5)
        axes = figure.add_axes((0.125, 0.19, 0.865, 0.69))
        for line in lines:
            dashes = _DASHES[line.seed % len(_DASHES)]
            marker = "o" if len(line.x) == 1 else None
            axes.plot(line.x, line.y, color=_COLOUR[line.style], linestyle=dashes, marker=marker, markersize=4)
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_formatter("{x:g}")
    return svg()


def progress(label: str, panels: Sequence[Panel], x_label: str, style: str) -> str:
    """One run's training, a small chart a quantity, four beside each other.

    Args:
        label: What is drawn, for screen readers; unlike that of every other figure of the page.
        panels: The charts.
        x_label: Below the lowest charts, "steps" or "epochs".
        style: The name of the run's colour.
    """
    columns = 4
    rows = -(-len(panels) // columns)
    with _drawing(label) as (figure, svg):
        figure.set_size_inches(11, 1.75 * rows + 0.3)
        height = figure.get_figheight()
        grid = figure.subplots(rows, columns, squeeze=False)
        figure.subplots_adjust(
            left=0.045, right=0.99, top=1 - 0.28 / height, bottom=0.5 / height, hspace=0.62, wspace=0.26
        )
        for place, axes in enumerate(grid.flat):
            if place >= len(panels):
                axes.set_visible(False)
                continue
            panel = panels[place]
            marker = "o" if len(panel.x) == 1 else None
            axes.plot(panel.x, panel.y, color=_COLOUR[style], marker=marker, markersize=4)
            axes.set_title(panel.title)
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.xaxis.set_major_formatter(_thousands)
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.yaxis.set_major_formatter("{x:g}")
            if place + columns >= len(panels):
                axes.set_xlabel(x_label, labelpad=1)
    return svg()


def _thousands(value: float, position: int | None = None) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10000 else f"{value:g}"


def paired(title: str, x: Sequence[float], y: Sequence[float], x_label: str, y_label: str, colour: str) -> str:
    """Every recording as a point, two runs' scores against each other, with the line on which they are equal."""
    with _drawing(f"{title}: {y_label} against {x_label}, one point a recording") as (figure, svg):
        figure.set_size_inches(3.6, 3.6)
        axes = figure.add_axes((0.19, 0.12, 0.77, 0.81))
        low, high = min(*x, *y), max(*x, *y)
        margin = 0.06 * (high - low) or 0.5
        limits = (low - margin, high + margin)
        axes.plot(limits, limits, color=_INK, linewidth=0.8)
        axes.plot(x, y, "o", color=_COLOUR[colour], markersize=5, alpha=0.75, markeredgewidth=0)
        better, worse = (sum(np.sign(b - a) == sign for a, b in zip(x, y, strict=True)) for sign in (1, -1))
        axes.text(0.03, 0.97, f"{better} higher", transform=axes.transAxes, va="top")
        axes.text(0.97, 0.03, f"{worse} lower", transform=axes.transAxes, ha="right")
        axes.set(xlim=limits, ylim=limits, title=title, xlabel=x_label, ylabel=y_label)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5))
            axis.set_major_formatter("{x:g}")
    return svg()


def decibels(samples: np.ndarray) -> np.ndarray:
    """Power spectrogram of [T] samples in dB, [257, frames], Hann windows of 32 ms every 10 ms."""
    padded = np.pad(samples, _FFT // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, _FFT)[::_HOP] * np.hanning(_FFT)
    return 10 * np.log10(np.abs(np.fft.rfft(frames).T) ** 2 + 1e-12)


def spectrogram(spectrum: np.ndarray, top: float, label: str, time_axis: bool) -> str:
    """A spectrogram.

    Args:
        spectrum: dB, [257, frames], as from `decibels`.
        top: The dB that get the brightest colour; DB_RANGE below is black.
        label: Whose it is, for screen readers.
        time_axis: Whether to write the seconds below.
    """
    with _drawing(f"Spectrogram: {label}") as (figure, svg):
        below, height = (0.36 if time_axis else 0.06), 1.25
        figure.set_size_inches(8, height + below + 0.06)
        axes = figure.add_axes((0.055, below / figure.get_figheight(), 0.92, height / figure.get_figheight()))
        duration = spectrum.shape[1] * _HOP / 16000
        palette = matplotlib.colormaps["magma"].resampled(_LEVELS)
        axes.imshow(
            np.clip(spectrum - top, -DB_RANGE, 0),
            palette,
            aspect="auto",
            interpolation="none",
            origin="lower",
            extent=(0, duration, 0, 8),
            vmin=-DB_RANGE,
            vmax=0,
        )
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.set_yticks([0, 2, 4, 6, 8], ["0", "", "4", "", "8 kHz"])
        axes.set_xticks(np.arange(0, duration, 0.5 if duration > 1 else 0.1))
        axes.xaxis.set_major_formatter("{x:g} s")
        axes.tick_params(labelbottom=time_axis)
    return svg()


def colour_bar() -> str:
    """The colour scale of the spectrograms."""
    with _drawing(f"Colour scale from -{DB_RANGE} to 0 dB") as (figure, svg):
        figure.set_size_inches(3, 0.42)
        axes = figure.add_axes((0.08, 0.55, 0.84, 0.4))
        axes.imshow(np.arange(_LEVELS)[None], "magma", aspect="auto", extent=(-DB_RANGE, 0, 0, 1), interpolation="none")
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.set_yticks([])
        axes.set_xticks(np.linspace(-DB_RANGE, 0, 5))
        axes.xaxis.set_major_formatter("{x:g} dB")
    return svg()


def attention_maps(rows: Sequence[Mapping[str, Any]], duration: float) -> str:
    """Maps over time, a row of three panels a block.

    Args:
        rows: For each block its "block" (name) and, for each view ("channel", "global", "local"), a list of
            (style, normalised map [T], distance to the teacher or None for the teacher itself).
        duration: Seconds the maps cover.
    """
    views = ("channel", "global", "local")
    with _drawing("Attention maps of teacher and students over time, block by block") as (figure, svg):
        figure.set_size_inches(11, 0.95 * len(rows) + 0.75)
        grid = figure.subplots(len(rows), 3, sharex=True, squeeze=False)
        height = figure.get_figheight()
        figure.subplots_adjust(
            left=0.095, right=0.995, top=1 - 0.3 / height, bottom=0.42 / height, hspace=0.22, wspace=0.04
        )
        for panels, row in zip(grid, rows, strict=True):
            panels[0].set_ylabel(row["block"], rotation=0, ha="right", va="center")
            for axes, view in zip(panels, views, strict=True):
                _overlay(axes, row[view], duration)
        for axes, view in zip(grid[0], views, strict=True):
            axes.set_title(f"{view} view", pad=5)
        for axes in grid[-1]:
            axes.set_xlabel("seconds")
    return svg()


def _overlay(axes: Any, maps: Sequence[tuple[str, np.ndarray, float | None]], duration: float) -> None:
    axes.set_yticks([])
    axes.spines[["left"]].set_visible(False)
    axes.margins(x=0)
    place = 1.105 - 0.11 * len(maps)
    for name, values, distance in maps:
        # Root mean squares of a few hundred stretches keep the norm, and the file small.
        parts = np.array([np.sqrt(np.mean(part**2)) for part in np.array_split(values, min(300, len(values)))])
        time = (np.arange(len(parts)) + 0.5) * duration / len(parts)
        colour = _COLOUR[name]
        if distance is None:
            axes.fill_between(time, parts, color=colour, alpha=0.3, linewidth=0)
        else:
            axes.plot(time, parts, color=colour, linewidth=1.1)
            place += 0.11
            axes.text(
                place,
                0.97,
                f"{distance:.2f}",
                color=colour,
                transform=axes.transAxes,
                ha="right",
                va="top",
                weight="bold",
            )
    axes.set_ylim(bottom=0, top=axes.get_ylim()[1] * 1.25)


@contextmanager
def _drawing(label: str) -> Iterator[tuple[Figure, Any]]:
    """A figure to draw on, and a function that gives its SVG afterwards."""
    with matplotlib.rc_context({**_RC, "svg.hashsalt": label}):
        figure = Figure()
        target = io.StringIO()
        yield figure, lambda: _embeddable(target.getvalue(), label)
        figure.savefig(
            target, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )


def _embeddable(svg: str, label: str) -> str:
    """Matplotlib's SVG made fit to stand inside an HTML page, many on one page."""
    svg = svg[svg.index("<svg") :]
    view_box = re.search(r'viewBox="([^"]*)"', svg)
    opening = f'<svg viewBox="{view_box[1] if view_box else ""}" role="img" aria-label="{html.escape(label)}">'
    svg = re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r'#([\w.-]+)(?:\)|")', svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda match: match[0] if match[1] in used else "", svg)
    svg = re.sub(r"font-family: [^;]*; ", "", svg)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
    svg = re.sub(r"(?<=data:image/png;base64,)[^\"]+", _fewer_colours, svg)
    for drawn, shown in _STYLE.items():
        svg = svg.replace(drawn, shown)
    return re.sub(r"\n\s*", "\n", svg)


def _fewer_colours(png: re.Match[str]) -> str:
    """A PNG in base64 with a palette: a quarter of the size of Matplotlib's four channels."""
    image = Image.open(io.BytesIO(base64.b64decode(png[0]))).convert("RGB").quantize(_LEVELS)
    target = io.BytesIO()
    image.save(target, "PNG", optimize=True)
    return base64.b64encode(target.getvalue()).decode()
