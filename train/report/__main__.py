"""The command line of the report."""

import sys
from collections.abc import Sequence
from pathlib import Path

from mvat.errors import Parser, failed, named
from mvat.kernels import current_backend
from train.report import report


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    description = "Write one self-contained page that compares runs."
    parser = Parser(prog="python -m train.report", description=description, allow_abbrev=False)
    parser.add_argument(
        "folders", type=Path, nargs="+", metavar="FOLDER", help="experiment such as runs/demo, or a run in it"
    )
    parser.add_argument("--baseline", metavar="LABEL", help="what the others are compared with (default: noisy)")
    parser.add_argument(
        "--out",
        type=named,
        metavar="FILE",
        help="page to write (default: FOLDER/report.html; of several: report.html here)",
    )
    try:
        current_backend()
        options = parser.parse_args(arguments)
        out = options.out or (Path("report.html") if len(options.folders) > 1 else None)
        page = report(*options.folders, baseline=options.baseline, out=out)
    except (ValueError, OSError, ImportError) as error:
        return failed("train.report", error)
    print(f"{page} ({page.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
