"""Committed results: an experiment's scores as one small JSON file, and the table that README shows of it.

    python -m train.results save runs/demo docs/results/demo.json       one file from an experiment's or study's folder
    python -m train.results readme README.md                            renew README's tables from the files it names
    python -m train.results check README.md                             1 if a table is not what its file says

In README a table stands between `<!-- results: PATH -->` and `<!-- end -->`. A study's file is its study.json, as
`python -m train.study` wrote it; `<!-- whole results: PATH -->` asks for all of its table in place of a short one.
"""

import json
import re
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mvat import __version__
from mvat.errors import failed
from mvat.files import write_text
from train import study_results, study_text
from train.evaluate import read_record
from train.report.runs import SHOWN, System, collect

FORMAT = "mvat-results-1"
_TABLE = re.compile(r"(<!-- (?P<whole>whole )?results: (?P<path>\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def gather(experiment: Path) -> dict[str, Any]:
    """The scores of every run of an experiment, grouped by what differs in nothing but the seed; a study's own record.

    Raises:
        ValueError: if the folder holds no run, or a malformed file.
    """
    if (experiment / "study.json").is_file():
        return read_record(experiment / "study.json", study_results.FORMAT)
    systems = [_system(system) for system in collect(experiment)]
    return {"format": FORMAT, "mvat": __version__, "torch": torch.__version__, "systems": systems}


def _system(system: System) -> dict[str, Any]:
    runs = [
        {
            "seed": run.seed,
            "epochs": len(run.series.get("lr", ([], []))[0]),
            "mean": {name: run.mean(name) for name in SHOWN},
            "unscored": run.unscored(),
        }
        for run in system.runs
        if run.scores
    ]
    first = system.first
    described = {"label": system.label, "kind": first.kind, "method": first.method}
    return described | {"parameters": first.parameters, "gflops": first.gflops, "runs": runs}


def table(results: dict[str, Any]) -> str:
    """A Markdown table: a row a system, the mean over seeds and, where there are several, lowest to highest."""
    # Files that older versions wrote lack the later metrics.
    there = {name for system in results["systems"] for run in system["runs"] for name in run["mean"]}
    shown = {name: metric for name, metric in SHOWN.items() if name in there}
    titles = [metric.title + metric.unit.rstrip().replace(" dB", ", dB") for metric in shown.values()]
    lines = [
        "| | parameters | GFLOPs | seeds | " + " | ".join(titles) + " |",
        "|---|---:|---:|---:|" + "---:|" * len(titles),
    ]
    for system in results["systems"]:
        size = "" if system["parameters"] is None else f"{system['parameters'] / 1e6:.2f} M"
        cost = "" if system["gflops"] is None else f"{system['gflops']:.2f}"
        seeds = "" if system["kind"] == "noisy" else str(len(system["runs"]))
        cells = [
            _cell([run["mean"].get(name) for run in system["runs"]], metric.digits) for name, metric in shown.items()
        ]
        lines.append(f"| {system['label']} | {size} | {cost} | {seeds} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    text = f"{statistics.fmean(known):.{digits}f}"
    return text if len(known) == 1 else f"{text} ({min(known):.{digits}f} to {max(known):.{digits}f})"


def renewed(text: str, folder: Path) -> str:
    """The text of a README with every table made from the file it names, relative to `folder`.

    Raises:
        ValueError: if a file is missing or not of this format, or the text has no table.
    """

    def replace(match: re.Match[str]) -> str:
        path = folder / match["path"]
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: cannot be read ({error})") from None
        formats = {FORMAT: table, study_results.FORMAT: study_text.whole if match["whole"] else study_text.readme}
        if results.get("format") not in formats:
            raise ValueError(f"{path}: is not of format {' or '.join(map(repr, formats))}")
        return match[1] + formats[results["format"]](results) + match[4]

    new, count = _TABLE.subn(replace, text)
    if not count:
        raise ValueError("holds no table between <!-- results: PATH --> and <!-- end -->")
    return new


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        match arguments:
            case ["-h" | "--help"]:
                print(__doc__)
            case ["save", experiment, file] if file.strip():
                Path(file).parent.mkdir(parents=True, exist_ok=True)
                results = gather(Path(experiment))
                is_study = results["format"] == study_results.FORMAT
                write_text(file, study_results.dumps(results) if is_study else json.dumps(results, indent=1) + "\n")
            case ["readme" | "check" as verb, file]:
                readme = Path(file)
                text = readme.read_text(encoding="utf-8")
                new = renewed(text, readme.parent)
                if verb == "check" and new != text:
                    print(f"{readme}: a table is out of date: python -m train.results readme {readme}", file=sys.stderr)
                    return 1
                if new != text:
                    write_text(readme, new)
            case _:
                given = shlex.join(arguments) or "nothing"
                raise ValueError(
                    f"expected save FOLDER FILE, readme FILE or check FILE, got {given} "
                    "(see `python -m train.results --help`)"
                )
    except (ValueError, OSError) as error:
        return failed("train.results", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
