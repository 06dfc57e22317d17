"""Small pieces of HTML that the page's sections share."""

from collections.abc import Sequence
from html import escape

from train.report.runs import SHOWN, System


def section(title: str, *content: str) -> str:
    """A section under a heading."""
    return f"<section>\n<h2>{title}</h2>\n{''.join(content)}\n</section>"


def label(system: System) -> str:
    """A system's name beside its colour."""
    return f'<span class="key {system.style}"></span>{escape(system.label)}'


def keys(systems: Sequence[System]) -> str:
    """The legend of the charts below it."""
    return '<ul class="keys">' + "".join(f"<li>{label(system)}</li>" for system in systems) + "</ul>\n"


def charts(drawn: Sequence[str]) -> str:
    """Charts side by side, as many as there is room for."""
    return '<div class="charts">\n' + "\n".join(f"<div>{chart}</div>" for chart in drawn) + "\n</div>"


def note(text: str) -> str:
    """A sentence of explanation; HTML."""
    return f'<p class="note">{text}</p>\n'


def missing(text: str) -> str:
    """What is not there, and why."""
    return f'<p class="missing">{escape(text)}</p>\n'


def table(heads: Sequence[str], rows: Sequence[str], kind: str = "") -> str:
    """A table that scrolls where the page is narrow."""
    cells = "".join(f"<th>{head}</th>" for head in heads)
    return (
        f'<div class="wide"><table class="{kind}">\n<thead><tr>{cells}</tr></thead>\n<tbody>{"".join(rows)}</tbody>\n'
        "</table></div>\n"
    )


def row(kind: str, cells: Sequence[str]) -> str:
    """A row of a table."""
    return f'<tr class="{kind}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>\n"


def heading(metric: str) -> str:
    """A metric's name with its unit."""
    shown = SHOWN[metric]
    return shown.title + (shown.unit and "," + shown.unit)


def text(value: object) -> str:
    """A value, or a dash."""
    return "–" if value is None else escape(str(value))


def number(value: float | None, digits: int) -> str:
    """A number, or a dash."""
    return "–" if value is None else f"{value:.{digits}f}"


def parameters(count: int | None) -> str:
    """A number of parameters, or a dash."""
    if count is None:
        return "–"
    return f"{count / 1e6:.2f} M" if count >= 1e6 else f"{count / 1e3:.1f} k"
