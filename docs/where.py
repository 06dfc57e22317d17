"""Renew the table of docs/where.md from what the ops say of themselves.

    python docs/where.py            write docs/where.md
    python docs/where.py --check    ends with 1 if it is out of date

The table tells what is written, not what is built on this machine: a kernel
that only waits for a compiler counts.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

_REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(_REPO))

from mvat.files import write_text  # noqa: E402
from mvat.kernels import backend  # noqa: E402

PAGE = _REPO / "docs" / "where.md"
_BUDGET = _REPO / "csrc" / "cuda" / "budget.json"
_BLOCK = re.compile(r"(<!-- what runs where -->\n).*?(<!-- end -->)", re.DOTALL)
_SHORT = {
    "float32": "f32",
    "float64": "f64",
    "bfloat16": "bf16",
    "float16": "f16",
}

#: Architectures: NVIDIA's name, and where it is found.
GENERATIONS = {
    "80": "Ampere<br>A100",
    "86": "Ampere<br>A10, RTX 30",
    "89": "Ada<br>L4, RTX 40",
    "90": "Hopper<br>H100, H200",
    "100": "Blackwell<br>B200",
    "120": "Blackwell<br>RTX 50",
}


def architectures() -> list[str]:
    """Those that every CUDA kernel is compiled for, such as "90".

    Raises:
        ValueError: if one has no name here.
    """
    sources = json.loads(_BUDGET.read_text())["kernels"].values()
    kernels = [kernel for source in sources for kernel in source.values()]
    shared = [name for name in kernels[0] if all(name in k for k in kernels)]
    if unknown := [name for name in shared if name not in GENERATIONS]:
        raise ValueError(
            f"docs/where.py has no name for sm_{', sm_'.join(unknown)}"
        )
    return shared


def table() -> str:
    """One line an op; the CPU and each generation of GPUs a column.

    A cell names the dtypes with a fused kernel.
    """
    columns = {"CPU": "cpu"}
    for name in architectures():
        columns[f"sm_{name}<br>{GENERATIONS[name]}"] = "cuda"
    fused: dict[tuple[str, str], list[str]] = {}
    for row in backend.table():
        dtypes = fused.setdefault((row.op, row.device), [])
        if row.reason != backend.NOT_WRITTEN:
            dtypes.append(_SHORT[row.dtype])
    lines = [
        "| op | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for op in sorted({op for op, _ in fused}):
        cells = [" ".join(fused[op, d]) or "–" for d in columns.values()]
        lines.append(f"| `{op}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """The page with its table renewed.

    Raises:
        ValueError: if it has no place for one.
    """
    text, count = _BLOCK.subn(lambda m: m[1] + table() + m[2], text)
    if not count:
        raise ValueError(
            f"{PAGE}: has no <!-- what runs where --> for the table"
        )
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    former = PAGE.read_text(encoding="utf-8")
    made = page(former)
    if made == former:
        return 0
    if options.check:
        print(f"{PAGE}: is out of date: python docs/where.py", file=sys.stderr)
        return 1
    write_text(PAGE, made)
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
