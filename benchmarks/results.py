"""Rows of results and their file.

The file has the shape of pytest-benchmark's, so that its tools read it:

    pytest-benchmark compare OLD.json NEW.json --histogram=out

pytest-benchmark's own fixture measures one function after the other; ours are interleaved and on a GPU timed by device
events, so the samples come from our clock and only the file is pytest-benchmark's. Nor is it needed to run. Rows
without a time (absent, wrong, too big) stand beside under "untimed", a key its tools pass over.
"""

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.floors import LIMIT
from benchmarks.timing import drifts, quartiles
from mvat.files import write_text

#: What a row can be. "checked": the answer is right, nothing was timed. "left out": not run on purpose.
STATUSES = ("timed", "checked", "absent", "does not fit", "left out", "wrong", "failed")


@dataclass
class Row:
    """One variant of one case in one pass.

    Args:
        op, shape, pass_name, variant, dtype: what ran.
        status: one of STATUSES; detail says why, where it is neither "timed" nor "checked".
        error: relative distance to the float64 reference, the worst of outputs and gradients.
        samples: seconds a call.
        flops, moved, working_set: of the floor: FLOPs of the products, bytes read and written at least, bytes touched.
        floor: seconds.
        peak_extra: bytes held by one call beyond its inputs.
        audio_seconds: of audio in one call, 0 where the row is no model's.
    """

    op: str
    shape: dict[str, Any]
    pass_name: str
    variant: str
    dtype: str
    status: str = "checked"
    detail: str = ""
    error: float | None = None
    samples: list[float] = field(default_factory=list)
    flops: float = 0.0
    moved: int = 0
    working_set: int = 0
    floor: float = 0.0
    peak_extra: int | None = None
    audio_seconds: float = 0.0

    @property
    def group(self) -> str:
        """What the variants that are compared with each other share."""
        return f"{self.op} {' '.join(f'{k}={v}' for k, v in self.shape.items())} {self.dtype} {self.pass_name}"

    @property
    def median(self) -> float:
        """Seconds a call; only of a timed row."""
        return quartiles(self.samples)[1]

    @property
    def share(self) -> float:
        """The share of the floor that the median reaches."""
        return self.floor / self.median

    @property
    def noisy(self) -> bool:
        """Whether the machine changed its speed meanwhile."""
        return drifts(self.samples)

    @property
    def problem(self) -> str:
        """Why this row makes the run fail, else ""."""
        if self.status in ("wrong", "failed"):
            return f"{self.group} {self.variant}: {self.status}: {self.detail}"
        if self.status == "timed" and self.share > LIMIT:
            return f"{self.group} {self.variant}: {self.share:.2f} of the floor: the count or the rate is wrong"
        return ""


def _as_benchmark(row: Row) -> dict[str, Any]:
    q1, median, q3 = quartiles(row.samples)
    mean = statistics.fmean(row.samples)
    low, high = q1 - 1.5 * (q3 - q1), q3 + 1.5 * (q3 - q1)
    name = f"{row.group}[{row.variant}]"
    deviation = statistics.stdev(row.samples) if len(row.samples) > 1 else 0.0
    far, outside = (
        sum(not a <= s <= b for s in row.samples) for a, b in ((mean - deviation, mean + deviation), (low, high))
    )
    return {
        "group": row.group,
        "name": name,
        "fullname": name,
        "params": {"variant": row.variant},
        "param": row.variant,
        "options": {},
        "extra_info": {key: value for key, value in asdict(row).items() if key != "samples"},
        "stats": {
            "min": min(row.samples),
            "max": max(row.samples),
            "mean": mean,
            "stddev": deviation,
            "rounds": len(row.samples),
            "median": median,
            "iqr": q3 - q1,
            "q1": q1,
            "q3": q3,
            "iqr_outliers": outside,
            "stddev_outliers": far,
            "outliers": f"{far};{outside}",
            "ld15iqr": min((s for s in row.samples if s >= low), default=q1),
            "hd15iqr": max((s for s in row.samples if s <= high), default=q3),
            "ops": 1 / mean,
            "total": sum(row.samples),
            "iterations": 1,
            "data": row.samples,
        },
    }


def write(path: Path, rows: Iterable[Row], machine: Mapping[str, Any], commit: Mapping[str, Any]) -> None:
    """Write a results file; its folder is made.

    Args:
        machine, commit: what `benchmarks.machine` tells.
    """
    rows = list(rows)
    content = {
        "machine_info": dict(machine),
        "commit_info": dict(commit),
        "benchmarks": [_as_benchmark(row) for row in rows if row.status == "timed"],
        "untimed": [asdict(row) for row in rows if row.status != "timed"],
        "datetime": machine["date"],
        "version": "mvat-benchmarks-1",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1) + "\n")


def read(path: str | Path) -> tuple[list[Row], dict[str, Any], dict[str, Any]]:
    """The rows of a results file, timed rows first, its machine and its commit.

    Raises:
        ValueError: if it is no results file of this harness; names it.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        timed = [Row(**b["extra_info"], samples=b["stats"]["data"]) for b in content["benchmarks"]]
        return timed + [Row(**row) for row in content["untimed"]], content["machine_info"], content["commit_info"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a results file of `python -m benchmarks` ({error!r})") from None
