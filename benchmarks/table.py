"""python -m benchmarks.table RESULTS.json: the results as Markdown, one table an op."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.results import Row

_SHORT = {"does not fit": "does not fit", "absent": "–", "left out": "too long", "wrong": "WRONG", "failed": "FAILED"}


def markdown(rows: Sequence[Row], machine: dict[str, Any]) -> str:
    """Tables of medians; in brackets the speed against the first variant, and the share of the floor."""
    text = [
        f"Measured on {machine['gpu'] or machine['cpu']} ({machine['threads']} threads, {machine['device']}), PyTorch "
        f"{machine['versions']['torch']}, {machine['date'][:10]}. A cell: median (speed against eager, share of the "
        "floor); `~` where the machine was noisy; – where there is nothing to run."
    ]
    if machine.get("warning"):
        text.append(f"**Not to be trusted: {machine['warning']}.**")
    for op in dict.fromkeys(row.op for row in rows):
        text.append(f"**{op}**\n\n" + _table([row for row in rows if row.op == op]))
    return "\n\n".join(text) + "\n"


def _table(rows: Sequence[Row]) -> str:
    """One line a case and pass, one column a variant that ran or could have run somewhere."""
    variants = [name for name in by_variant(rows) if any(r.status != "absent" for r in rows if r.variant == name)]
    lines = ["| case | pass | " + " | ".join(variants) + " |", "|---|---|" + "---|" * len(variants)]
    for group in dict.fromkeys(row.group for row in rows):
        members = {row.variant: row for row in rows if row.group == group}
        first = next(iter(members.values()))
        case = ", ".join(str(v) if k in ("place", "stage") else f"{k} {v}" for k, v in first.shape.items())
        cells = [cell(members.get(name), members.get("eager")) for name in variants]
        lines.append(f"| {case} | {first.pass_name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


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
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("results", type=Path, help="a file of benchmarks/results/")
    options = parser.parse_args(arguments)
    print(markdown(*results.read(options.results)), end="")


if __name__ == "__main__":
    main()
