"""What experiments' folders hold: runs, gathered into systems that differ in nothing but the seed."""

import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
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
    "segsnr": Metric("SegSNR", 2, " dB"),
    "csig": Metric("CSIG", 2),
    "cbak": Metric("CBAK", 2),
    "covl": Metric("COVL", 2),
}
KINDS = ("noisy", "teacher", "student")
METHODS = ("none", "output", "attention", "mvat")
#: Names of colours for systems whose own is taken; report.css says what they look like.
SPARE_STYLES = ("spare1", "spare2", "spare3", "spare4", "spare5", "spare6", "spare7", "spare8")


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
    steps: dict[float, float] = field(default_factory=dict)  # epoch -> steps done at its end
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


@dataclass(eq=False)
class System:
    """The runs that differ in nothing but the seed, what they are called and the name of their colour."""

    runs: list[Run]
    label: str = ""
    style: str = "none"

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

    @property
    def scored_on(self) -> set[tuple[str, str]]:
        """(set, data) of its scores."""
        return {(run.scores["set"], run.scores["data"]) for run in self.runs if run.scores}

    def rows(self, metric: str) -> dict[str, float]:
        """Recording -> score, the mean over the runs; without recordings that a run has not scored."""
        rows = [run.rows(metric) for run in self.runs if run.scores]
        return {
            name: sum(row[name] for row in rows) / len(rows) for name in (rows[0] if rows else ()) if _in(name, rows)
        }


def collect(*folders: Path) -> list[System]:
    """Every run in some folders, the noisy input first, then teachers, then students.

    Noisy input that several experiments have scored on the same set is taken once. Where two experiments call a system
    the same, the experiment's folder stands before the name.

    Args:
        folders: Experiments (a folder with one folder a run) or single runs.

    Raises:
        RecordError: A JSON file is malformed.
        ValueError: There is no run.
    """
    runs: dict[Path, Run] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
        own = read_run(folder)
        found = (
            [own] if own else [run for path in sorted(folder.iterdir()) if path.is_dir() and (run := read_run(path))]
        )
        if not found:
            raise ValueError(f"{folder}: holds no run (a folder with config.yaml, history.json or scores.json)")
        runs |= {run.folder.resolve(): run for run in found}

    order = list(dict.fromkeys(map(_experiment, runs.values())))

    def place(run: Run) -> tuple[Any, ...]:
        kind, method = KINDS.index(run.kind), METHODS.index(run.method)
        return kind, order.index(_experiment(run)), method, _natural(run.label), run.seed or 0, run.folder.name

    systems: dict[tuple[Any, ...], System] = {}
    for run in sorted(runs.values(), key=place):
        key: tuple[Any, ...] = (_experiment(run), run.kind, run.method, _without_seed(run.label))
        if run.kind == "noisy" and run.scores:
            key = ("noisy", run.scores["set"], run.scores["data"])
            if key in systems:
                continue
        # Two runs of one seed are two systems, whatever they are called: they differ in something else.
        while run.seed in [other.seed for other in systems.get(key, System([])).runs]:
            key = (*key, run.seed)
        systems.setdefault(key, System([])).runs.append(run)
    named = list(systems.values())
    _name(named)
    _colour(named)
    return named


def _natural(text: str) -> list[tuple[float, str]]:
    """A key by which "hidden 8" comes before "hidden 12"."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[-+]?\d+)?)", text)
    return [(float(part), "") if place % 2 else (-1.0, part) for place, part in enumerate(parts)]


def _experiment(run: Run) -> Path:
    return run.folder.resolve().parent


def _name(systems: Sequence[System]) -> None:
    """The label of a system's first run, without the seed where there are several, and unlike all others."""
    for system in systems:
        label = system.first.label
        system.label = _without_seed(label) if len(system.runs) > 1 else label
    counts = Counter(system.label for system in systems)
    here = Counter((_experiment(system.first), system.label) for system in systems)
    common = Path(os.path.commonpath({_experiment(system.first) for system in systems}))
    for system in systems:
        if counts[system.label] > 1:
            experiment = _experiment(system.first)
            alike = experiment == common or here[experiment, system.label] > 1
            where = experiment / system.first.folder.name if alike else experiment
            system.label = f"{where.relative_to(common)}: {system.label}"


def _colour(systems: Sequence[System]) -> None:
    """A colour for each system: that of its kind or method while it is free, else the next spare one."""
    own = [
        system.first.kind if system.first.kind in ("noisy", "teacher") else system.first.method for system in systems
    ]
    spare = [*SPARE_STYLES, *(name for name in ("mvat", "output", "attention", "none", "teacher") if name not in own)]
    taken = 0
    for place, system in enumerate(systems):
        system.style = own[place]
        if system.style in own[:place] and system.style != "noisy":
            system.style = spare[taken % len(spare)]
            taken += 1


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
                run.steps = dict(zip(*run.series.pop("step", ([], [])), strict=True))
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
    """Every number of the history's rows, by name: "train total", "valid loss", "lr", whatever else is there."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    for epoch in epochs:
        values = {name: value for name, value in epoch.items() if not isinstance(value, dict) and name != "epoch"}
        for part in ("train", "valid"):
            losses = epoch.get(part) or {}
            words = ", ".join(f"{part} {name}: {value!r}" for name, value in losses.items() if isinstance(value, str))
            if words:
                raise ValueError(f"expected a number, got {words}")
            values |= {f"{part} {name}": value for name, value in losses.items()}
        for name, value in values.items():
            if isinstance(value, int | float) and math.isfinite(value):
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
