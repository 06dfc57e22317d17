"""The scores of many recordings, and what could not be scored."""

import csv
import io
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from mvat.files import write_text

ALL = "all"  # the metric named by a failure that concerns the whole recording


class ScoreError(ValueError):
    """A recording that a metric cannot score.

    Attributes:
        metric: Name of the metric, or "all" where no metric can score the recording.
        reason: Why, in a few words.
    """

    def __init__(self, metric: str, reason: str):
        super().__init__(reason if metric == ALL else f"{metric}: {reason}")
        self.metric = metric
        self.reason = reason


class Failure(NamedTuple):
    """One recording that one metric (or "all" of them) could not score."""

    name: str
    metric: str
    reason: str


@dataclass(frozen=True)
class Scores:
    """Scores of many recordings.

    Attributes:
        metrics: Names of the metrics, in the order asked for.
        rows: Recording name -> metric -> score, None where it could not be had; in the order of the recordings.
        failures: What could not be scored, and why.
    """

    metrics: tuple[str, ...]
    rows: dict[str, dict[str, float | None]]
    failures: list[Failure]

    def count(self) -> dict[str, int]:
        """Number of recordings scored, for each metric."""
        return {metric: len(self._values(metric)) for metric in self.metrics}

    def mean(self) -> dict[str, float | None]:
        """Mean over the recordings scored, for each metric; None where there is none."""
        values = {metric: self._values(metric) for metric in self.metrics}
        return {metric: math.fsum(v) / len(v) if v else None for metric, v in values.items()}

    def unscored(self) -> list[str]:
        """Names of the recordings that at least one metric could not score."""
        return list(dict.fromkeys(failure.name for failure in self.failures))

    def to_dict(self) -> dict[str, Any]:
        """Means, counts, failures and all scores, ready for JSON."""
        return {
            "mean": self.mean(),
            "scored": self.count(),
            "failed": [failure._asdict() for failure in self.failures],
            "files": self.rows,
        }

    def to_json(self, path: str | os.PathLike, header: Mapping[str, Any] | None = None) -> None:
        """Writes `header` and the scores to a JSON file, whole or not at all."""
        write_text(path, json.dumps({**(header or {}), **self.to_dict()}, indent=1, allow_nan=False) + "\n")

    def to_csv(self, path: str | os.PathLike) -> None:
        """Writes one line a recording to a CSV file, whole or not at all; an empty field is a score not had."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(("name", *self.metrics))
        table.writerows((name, *(row[metric] for metric in self.metrics)) for name, row in self.rows.items())
        write_text(path, text.getvalue())

    def _values(self, metric: str) -> list[float]:
        return [value for row in self.rows.values() if (value := row[metric]) is not None]
