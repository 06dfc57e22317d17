"""python -m benchmarks.publish: the pages and pictures of all results, and README's tables, from the committed JSON.

    python -m benchmarks.publish            renew benchmarks/results/<machine>/README.md, its pictures, and README.md
    python -m benchmarks.publish --check    ends with 1 if a page is not what the results say; writes nothing

Of every case a page shows the newest file that measured it; older files stay as history. In README.md the tables stand
between `<!-- benchmarks -->` and `<!-- end of benchmarks -->`.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import machine, plots, results, table
from benchmarks.results import Row
from mvat.files import write_text

_README = Path(__file__).parents[1] / "README.md"
_BLOCK = re.compile(r"(<!-- benchmarks -->\n).*?(<!-- end of benchmarks -->)", re.DOTALL)
_REST = "<!-- benchmarks --> and <!-- end of benchmarks -->"


class Measured(NamedTuple):
    """The rows of one op, and the runs they come from: machine and commit each, newest first."""

    rows: list[Row]
    runs: list[tuple[dict[str, Any], dict[str, Any]]]

    def where(self) -> str:
        """The runs in words."""
        return "; ".join(dict.fromkeys(table.measured_on(*run) for run in self.runs))


def newest(folder: Path) -> dict[str, Measured]:
    """Of every op of a machine's folder the newest rows of each case.

    Raises:
        ValueError: if a file is not one of results; names it.
    """
    files = [results.read(path) for path in sorted(folder.glob("*.json"))]
    groups: dict[str, tuple[int, list[Row]]] = {}
    files.sort(key=lambda file: file[1]["date"])
    for number, (rows, _, _) in enumerate(files):
        for group in dict.fromkeys(row.group for row in rows):
            groups[group] = number, [row for row in rows if row.group == group]
    found: dict[str, Measured] = {}
    for op in dict.fromkeys(rows[0].op for _, rows in groups.values()):
        mine = [(number, rows) for number, rows in groups.values() if rows[0].op == op]
        runs = sorted({number for number, _ in mine}, reverse=True)
        found[op] = Measured([row for _, rows in mine for row in rows], [files[number][1:] for number in runs])
    return found


def page(name: str, measured: dict[str, Measured]) -> str:
    """A machine's page: all rows of every op, and the pictures."""
    pictures = plots.planned(_all(measured))
    parts = [
        f"# {name}\n\n"
        "Made by `python -m benchmarks.publish` from the JSON files in this folder; `make bench` measures again. A "
        "cell: the median (speed against eager, share of the floor). The floor is the time that the products and the "
        "bytes would take at rates measured in the same run; ~ the machine was noisy; – there is nothing to run.\n"
    ]
    for op, one in measured.items():
        picture = f"![{op}]({op}.png)\n\n" if f"{op}.png" in pictures else ""
        parts.append(f"## {op}\n\n{one.where()}.\n\n{picture}{table.full(one.rows)}")
    if plots.THROUGHPUT in pictures:
        parts[0] += f"\n![seconds of audio a second]({plots.THROUGHPUT})\n"
    return "\n".join(parts)


def block(machines: dict[str, dict[str, Measured]]) -> str:
    """README's part: tables of the GPU and the CPU measured last, and links to the other machines' pages."""
    runs = {
        name: sorted((run for one in measured.values() for run in one.runs), key=lambda run: run[0]["date"])
        for name, measured in machines.items()
    }
    # One op alone, measured elsewhere since, does not take the place of all.
    newest_first = sorted(runs, key=lambda name: ("model" in machines[name], runs[name][-1][0]["date"]), reverse=True)
    gpus = [name for name in newest_first if runs[name][-1][0]["gpu"]]
    cpus = [name for name in newest_first if name not in gpus]
    shown = [*gpus[:1], *cpus[:1]]
    parts = [_overview(name, machines[name], runs[name]) for name in shown]
    if not gpus:
        parts.append("GPU: not measured on a GPU yet.\n")
    if others := [name for name in newest_first if name not in shown]:
        links = (f"[{table.measured_on(*runs[name][-1])}](benchmarks/results/{name}/README.md)" for name in others)
        parts.append(f"Measured earlier: {'; '.join(links)}.\n")
    return "\n".join(parts)


def _overview(name: str, measured: dict[str, Measured], runs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    commits = dict.fromkeys(commit["id"] for _, commit in runs)
    warned = sum(bool(info.get("warning")) for info, _ in runs)
    return (
        f"{table.measured_on(*runs[-1])} (the latest). Runs: {len(runs)}, of {', '.join(commits)}; "
        f"begun with a warning: {warned}. "
        "Milliseconds, medians of interleaved samples, forward / forward and backward; "
        f"[all rows, runs and pictures](benchmarks/results/{name}/README.md).\n\n" + table.overview(_all(measured))
    )


def pages(machines: dict[str, dict[str, Measured]], folder: Path, readme: Path) -> dict[Path, str]:
    """What every page should hold: the machines' and README.

    Raises:
        ValueError: if README has no place for the tables.
    """
    made = {folder / name / "README.md": page(name, measured) for name, measured in machines.items()}
    text, count = _BLOCK.subn(lambda m: m[1] + block(machines) + m[2], readme.read_text(encoding="utf-8"))
    if not count:
        raise ValueError(f"{readme}: has no {_REST} for the tables")
    return made | {readme: text}


def _all(measured: dict[str, Measured]) -> list[Row]:
    return [row for one in measured.values() for row in one.rows]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.publish", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a page is out of date")
    parser.add_argument("--results", type=Path, default=machine.RESULTS, help="default: %(default)s")
    parser.add_argument("--readme", type=Path, default=_README, help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        folders = [path for path in sorted(options.results.iterdir()) if any(path.glob("*.json"))]
        machines = {path.name: newest(path) for path in folders}
        made = pages(machines, options.results, options.readme)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    stale = [path for path, text in made.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if options.check:
        for path in stale:
            print(f"{path}: is out of date: python -m benchmarks.publish", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        write_text(path, made[path])
        print(path)
    for name, measured in machines.items():
        plots.draw(_all(measured), options.results / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
