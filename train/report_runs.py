"""What an experiment's folder holds, and what its scores say in words: the part of the report that is not HTML."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from train.evaluate import DESCRIPTION, HISTORY_FORMAT, SCORES_FORMAT, RecordError, read_record


class Metric(NamedTuple):
    """How a score is shown."""

    title: str
    digits: int
    unit: str = ""


SHOWN = {
    "pesq_wb": Metric("PESQ wb", 2),
    "stoi": Metric("STOI", 3),
    "estoi": Metric("ESTOI", 3),
    "si_sdr": Metric("SI-SDR", 2, " dB"),
}
KINDS = ("noisy", "teacher", "student")
METHODS = ("none", "output", "attention", "mvat")


@dataclass
class Run:
    """One run folder. Whatever it does not hold is None or empty."""

    folder: Path
    label: str
    kind: str = "student"
    method: str = "none"
    seed: int | None = None
    parameters: int | None = None
    gflops: float | None = None
    series: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)  # quantity -> epochs, values
    scores: dict[str, Any] | None = None
    config: str | None = None

    def mean(self, metric: str) -> float | None:
        """Mean score, None where there is none."""
        return self.scores["mean"].get(metric) if self.scores else None

    def rows(self, metric: str) -> dict[str, float]:
        """Recording -> score, without those that have none."""
        files = self.scores["files"] if self.scores else {}
        return {name: value for name, row in files.items() if (value := row.get(metric)) is not None}

    def unscored(self) -> int | None:
        """Number of recordings that some metric could not score."""
        return len({failure["name"] for failure in self.scores["failed"]}) if self.scores else None


@dataclass
class System:
    """The runs that differ in nothing but the seed."""

    runs: list[Run]

    @property
    def label(self) -> str:
        """What the runs are called, without the seed where there are several."""
        return _without_seed(self.first.label) if len(self.runs) > 1 else self.first.label

    @property
    def first(self) -> Run:
        """The run of the lowest seed, which speaks for all of them where one must be chosen."""
        return self.runs[0]

    def means(self, metric: str) -> list[float]:
        """The mean score of every run that has one."""
        return [mean for run in self.runs if (mean := run.mean(metric)) is not None]

    def mean(self, metric: str) -> float | None:
        """The mean over the runs, None where there is none."""
        means = self.means(metric)
        return sum(means) / len(means) if means else None

    def rows(self, metric: str) -> dict[str, float]:
        """Recording -> score, the mean over the runs; without recordings that a run has not scored."""
        rows = [run.rows(metric) for run in self.runs if run.scores]
        return {
            name: sum(row[name] for row in rows) / len(rows) for name in (rows[0] if rows else ()) if _in(name, rows)
        }


def collect(experiment: Path) -> list[System]:
    """Everything in an experiment's folder, the noisy input first, then teachers, then students.

    Raises:
        RecordError: A JSON file is malformed.
        ValueError: There is no run.
    """
    if not experiment.is_dir():
        raise ValueError(f"{experiment}: no such folder")
    runs = [run for folder in sorted(experiment.iterdir()) if folder.is_dir() and (run := read_run(folder))]
    if not runs:
        raise ValueError(f"{experiment}: holds no run (a folder with config.yaml, history.json or scores.json)")

    def place(run: Run) -> tuple[int, int, str, int, str]:
        return KINDS.index(run.kind), METHODS.index(run.method), run.label, run.seed or 0, run.folder.name

    systems: dict[tuple[str, str, str], System] = {}
    for run in sorted(runs, key=place):
        systems.setdefault((run.kind, run.method, _without_seed(run.label)), System([])).runs.append(run)
    return list(systems.values())


def read_run(folder: Path) -> Run | None:
    """One run folder, or None where it is none.

    Raises:
        RecordError: A JSON file is malformed.
    """
    files = {name: folder / name for name in ("config.yaml", "history.json", "scores.json")}
    if not any(path.is_file() for path in files.values()):
        return None
    kind = next((kind for kind in KINDS if folder.name.startswith(kind)), "student")
    run = Run(folder, folder.name, kind)
    if files["config.yaml"].is_file():
        run.config = files["config.yaml"].read_text(encoding="utf-8", errors="replace")
    for name, format in (("history.json", HISTORY_FORMAT), ("scores.json", SCORES_FORMAT)):
        path = files[name]
        if not path.is_file():
            continue
        record = read_record(path, format)
        try:
            _describe(run, record)
            if format == HISTORY_FORMAT:
                run.series = _series(record["epochs"])
            else:
                run.scores = _scores(record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise RecordError(f"{path}: malformed ({reason})") from error
    return run


def _describe(run: Run, record: Mapping[str, Any]) -> None:
    for key in DESCRIPTION:
        setattr(run, key, record[key])
    if run.kind not in KINDS or run.method not in METHODS:
        raise ValueError(f"unknown kind {run.kind!r} or method {run.method!r}")
    run.label = str(run.label)


def _series(epochs: Sequence[dict[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    series: dict[str, tuple[list[float], list[float]]] = {}
    for epoch in epochs:
        values = {f"train {name}": value for name, value in epoch["train"].items()}
        values |= {f"valid {name}": value for name, value in (epoch.get("valid") or {}).items()}
        values |= {name: epoch.get(name) for name in ("lr", "audio_seconds_per_second", "peak_memory_gb")}
        for name, value in values.items():
            if value is not None:
                x, y = series.setdefault(name, ([], []))
                x.append(float(epoch["epoch"]))
                y.append(float(value))
    return series


def _scores(record: dict[str, Any]) -> dict[str, Any]:
    """The part of scores.json the report uses, its types checked."""
    return {
        "set": record["set"],
        "data": record["data"],
        "mean": {metric: _number(value) for metric, value in record["mean"].items()},
        "failed": [{key: str(failure[key]) for key in ("name", "metric", "reason")} for failure in record["failed"]],
        "files": {
            name: {metric: _number(value) for metric, value in row.items()} for name, row in record["files"].items()
        },
    }


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _without_seed(label: str) -> str:
    """A label, or a folder's name that serves as one, without "seed 1" or "_seed1" at its end."""
    return re.sub(r"[\s,_-]*seed[\s_-]*\d+$", "", label) or label


def _in(name: str, rows: Sequence[dict[str, float]]) -> bool:
    return all(name in row for row in rows)


# In words


def find(systems: Sequence[System], kind: str, method: str | None = None) -> list[System]:
    """The systems of a kind, and of a method where one is given, that have been scored."""
    return [
        system
        for system in systems
        if system.first.kind == kind
        and method in (None, system.first.method)
        and any(run.scores for run in system.runs)
    ]


def comparisons(systems: Sequence[System]) -> Iterator[tuple[System, System]]:
    """(student alone, student with MV-AT), of the same size."""
    for mvat in find(systems, "student", "mvat"):
        for alone in find(systems, "student", "none"):
            if alone.first.parameters == mvat.first.parameters:
                yield alone, mvat


def lead(systems: Sequence[System]) -> str:
    """One sentence: do the students raise SI-SDR over the noisy input?"""
    noisy, students = find(systems, "noisy"), find(systems, "student")
    if not students:
        return "No student has been scored yet."
    if not noisy:
        return "The noisy input has not been scored yet, so there is nothing to compare the students with."
    parts = []
    for student in students:
        before, after = shared_means(noisy[0], student, "si_sdr")
        if before is None or after is None:
            continue
        gain = after - before
        verb = "does not change" if round(gain, 2) == 0 else "raises" if gain > 0 else "lowers"
        change = "" if round(gain, 2) == 0 else f" by {abs(gain):.2f} dB, from {before:.2f} to {after:.2f} dB"
        common, every = len(student.rows("si_sdr")), len(noisy[0].rows("si_sdr"))
        change += f" on the {common} of {every} recordings scored" if common < every else ""
        parts.append(f"“{student.label}” {verb} the SI-SDR of the noisy input{change}")
    return "; ".join(parts) + "." if parts else "SI-SDR has not been scored."


def verdict(alone: System, mvat: System) -> str:
    """Whether MV-AT beats the student alone, with the numbers, the recordings and the seeds."""
    ahead: list[str] = []
    behind: list[str] = []
    numbers: list[str] = []
    for name, metric in SHOWN.items():
        a, b = shared_means(alone, mvat, name)
        if a is None or b is None:
            continue
        difference = round(b - a, metric.digits)
        if difference:
            (ahead if difference > 0 else behind).append(metric.title)
        numbers.append(f"{metric.title} {b:.{metric.digits}f} against {a:.{metric.digits}f}{metric.unit}")
    if not numbers:
        return "MV-AT and the student alone have no scores in common."
    if ahead and behind:
        claim = f"MV-AT is ahead of the student alone in {_list(ahead)} and behind in {_list(behind)}"
    elif ahead:
        everywhere = len(ahead) == len(numbers)
        claim = f"MV-AT beats the student alone in {'every score' if everywhere else _list(ahead)}"
    elif behind:
        claim = f"MV-AT does not beat the student alone; it is behind in {_list(behind)}"
    else:
        claim = "MV-AT and the student alone do not differ"
    return f"{claim}: {', '.join(numbers)}. {_recordings(alone, mvat)}{_chance(alone, mvat)}"


def shared_means(a: System, b: System, metric: str) -> tuple[float | None, float | None]:
    """The means of two systems over the recordings that both have scored."""
    rows = a.rows(metric), b.rows(metric)
    names = [name for name in rows[0] if name in rows[1]]
    if not names:
        return None, None
    first, second = (sum(row[name] for name in names) / len(names) for row in rows)
    return first, second


def _recordings(alone: System, mvat: System) -> str:
    a, b = alone.rows("si_sdr"), mvat.rows("si_sdr")
    common = [name for name in a if name in b]
    higher = sum(b[name] > a[name] for name in common)
    return f"SI-SDR is higher with MV-AT on {higher} of {len(common)} recordings. " if common else ""


def _chance(alone: System, mvat: System) -> str:
    means = alone.means("si_sdr"), mvat.means("si_sdr")
    if not all(means):
        return ""
    a, b = (len(values) for values in means)
    seeds = f"{a} and {b} seeds" if a != b else "one seed each" if a == 1 else f"{a} seeds each"
    if min(a, b) == 1:
        return f"With {seeds} a small difference may be chance."
    ranges = " and ".join(f"{min(values):.2f} to {max(values):.2f} dB" for values in means)
    apart = max(min(values) for values in means) > min(max(values) for values in means)
    overlap = "do not overlap" if apart else "overlap: the difference may be chance"
    return f"Over {seeds} the SI-SDR ranges, {ranges}, {overlap}."


def _list(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
