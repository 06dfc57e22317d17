"""Results as Markdown: every row of an op, or the few that README shows."""

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.results import Row

_SHORT = {"does not fit": "does not fit", "absent": "–", "left out": "too long", "wrong": "WRONG", "failed": "FAILED"}


#: What README calls the variants, in the order of its columns.
_TITLES = {
    "eager": "eager",
    "compile": "torch.compile",
    "stock": "best of PyTorch",
    "onnxruntime": "ONNX Runtime",
    "manner": "MANNER's own code",
    "fused": "mvat",
}
#: The sides of a pass in README's cells.
_PASSES = ("forward", "forward+backward", "step")


def measured_on(machine: dict[str, Any], commit: dict[str, Any]) -> str:
    """What, where and when, in one line."""
    kind = machine["gpu"] or f"{machine['cpu']} with {machine['instruction_set']}"
    where = f"{kind} ({machine['threads']} threads, {machine['device']})"
    when = f"{machine['date'][:10]}, commit {commit['id']}{' with changes' if commit['dirty'] else ''}"
    warning = f"; warned at the start: {machine['warning']}" if machine.get("warning") else ""
    return f"{where}, PyTorch {machine['versions']['torch']}, {when}{warning}"


def full(rows: Sequence[Row]) -> str:
    """One line a case and pass, one column a variant that ran or could have run somewhere.

    A cell: the median (speed against eager, share of the floor); ~ where the machine was noisy; – where there is
    nothing to run.
    """
    variants = [name for name in by_variant(rows) if any(r.status != "absent" for r in rows if r.variant == name)]
    lines = ["| case | pass | " + " | ".join(variants) + " |", "|---|---|" + "---|" * len(variants)]
    for group in dict.fromkeys(row.group for row in rows):
        members = {row.variant: row for row in rows if row.group == group}
        first = next(iter(members.values()))
        case = _case(first)
        cells = [cell(members.get(name), members.get("eager")) for name in variants]
        lines.append(f"| {case} | {first.pass_name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def overview(rows: Iterable[Row]) -> str:
    """README's table: of every op the longest feature of each preset, of every model the clips of four seconds.

    A cell: milliseconds forward, and forward and backward.
    """
    chosen: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if in_overview(row):
            chosen.setdefault((row.op, _case(row)), []).append(row)
    names = {row.variant for members in chosen.values() for row in members if row.status != "absent"}
    variants = [name for name in _TITLES if name in names or name == "fused"]
    lines = [
        "| op | case | " + " | ".join(_TITLES[name] for name in variants) + " |",
        "|---|---|" + "---:|" * len(variants),
    ]
    for (op, case), members in chosen.items():
        cells = [_both([row for row in members if row.variant == name]) for name in variants]
        lines.append(f"| {op} | {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def in_overview(row: Row) -> bool:
    """Whether the row is of four seconds of audio: of a whole, one clip or four; of an op, one and its longest feature.

    That is 64084 samples after the last decoder, 16020 before it, in every preset.
    """
    if "seconds" in row.shape:
        return row.shape["seconds"] == 4 and row.shape["B"] in (1, 4)
    return row.shape["T"] in (64_084, 16_020) and row.shape["B"] == 1


def _case(row: Row) -> str:
    shape = ", ".join(str(v) if k in ("place", "stage") else f"{k} {v}" for k, v in row.shape.items())
    return shape if row.dtype == "float32" else f"{shape}, {row.dtype}"


def _both(rows: Sequence[Row]) -> str:
    """The cell of one variant: what its passes took."""
    ran = sorted((row for row in rows if row.status != "absent"), key=lambda row: _PASSES.index(row.pass_name))
    return " / ".join(_digits(1e3 * r.median) if r.status == "timed" else _SHORT[r.status] for r in ran) or "–"


def by_variant(rows: Sequence[Row]) -> list[str]:
    """The variants, eager first."""
    return sorted(dict.fromkeys(row.variant for row in rows), key=lambda name: name != "eager")


def cell(row: Row | None, eager: Row | None) -> str:
    """What the table says of one row."""
    if row is None:
        return "–"
    if row.status != "timed":
        return _SHORT.get(row.status, row.status)
    speed = f"{eager.median / row.median:.2f}x, " if eager is not None and eager.status == "timed" else ""
    return f"{'~' if row.noisy else ''}{_milliseconds(row.median)} ({speed}{row.share:.0%})"


def _milliseconds(seconds: float) -> str:
    return f"{_digits(1e3 * seconds)} ms" if seconds < 1 else f"{_digits(seconds)} s"


def _digits(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"
