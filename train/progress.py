"""How far a run has come, as its checkpoints hold it."""

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from train.config import OptimConfig, ValidConfig
from train.step import Report


@dataclass
class Progress:
    """The same on all processes.

    Attributes:
        epoch: finished ones.
        position: batches seen of the one under way.
        step: batches seen in all.
        streak: moves skipped in a row.
        best: the best value of valid.select so far, the higher the better (a loss negated).
        unimproved: validations since then.
        finished: whether the run has come to its end.
        history: a row an epoch, see `Running.row`.
    """

    epoch: int = 0
    position: int = 0
    step: int = 0
    streak: int = 0
    best: float | None = None
    unimproved: int = 0
    finished: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)

    def end_epoch(self, row: dict[str, Any], optim: OptimConfig, valid: ValidConfig) -> bool:
        """Take in the row of an epoch; whether it is the best so far.

        A score that is missing or no number is never the best, but the last epoch is where none could be scored.
        """
        self.epoch, self.position = row["epoch"], 0
        self.history.append(row)
        better = False
        if "valid" in row:
            value = row["valid"].get(valid.select, math.nan)
            value = -value if valid.select == "loss" else value
            better = math.isfinite(value) and (self.best is None or value > self.best)
            self.unimproved = 0 if better else self.unimproved + 1
            if better:
                self.best = value
        impatient = valid.patience is not None and self.unimproved >= valid.patience
        self.finished = self.epoch == optim.epochs or impatient
        return better or (self.finished and self.best is None)


@dataclass
class Running:
    """What one process has counted of the epoch under way.

    Attributes:
        batches: that entered the sums.
        sums: of the losses over these batches.
        skipped: moves that were not made, since a loss or gradient was not finite.
        unreadable: examples that could not be read.
        waited: seconds spent waiting for data.
        seconds: spent in all.
    """

    batches: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    skipped: int = 0
    unreadable: int = 0
    waited: float = 0.0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._since = time.perf_counter()

    def start(self) -> None:
        """Count seconds from here, beside those counted before."""
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Count seconds up to here."""
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now

    def add(self, report: Report) -> None:
        """Count a move."""
        if not report.finite:
            self.skipped += 1
            return
        self.batches += report.batches
        for name, value in report.parts.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * report.batches

    def as_dict(self) -> dict[str, Any]:
        """Plain values, from which Running(**values) goes on."""
        return dataclasses.asdict(self)


def row(running: Sequence[Running], epoch: int, step: int, rate: float, audio: float, memory: float) -> dict[str, Any]:
    """An epoch's row in history.json.

    Args:
        running: of all processes.
        epoch, step, rate: as the row holds them.
        audio: seconds of audio trained on.
        memory: the most memory in bytes.

    Returns:
        epoch; step, batches seen so far; lr; seconds; audio_seconds_per_second; waiting, the largest share of the time
        that a process waited for data; peak_memory_gb; skipped, moves not made since a loss or gradient was not
        finite; unreadable, examples that others took the place of; gradient_norm, its mean; train, the mean of every
        loss. After a validation, valid is added, its results. Readers must do without waiting, skipped, unreadable and
        gradient_norm, which rows of former versions do not have.
    """
    batches = sum(r.batches for r in running)
    means = {name: math.fsum(r.sums.get(name, 0.0) for r in running) / batches for name in running[0].sums}
    seconds = max(r.seconds for r in running)
    return {
        "epoch": epoch,
        "step": step,
        "lr": rate,
        "seconds": round(seconds, 3),
        "audio_seconds_per_second": round(audio / seconds, 2),
        "waiting": round(max(r.waited / r.seconds for r in running), 4),
        "peak_memory_gb": round(memory / 1e9, 3),
        "skipped": running[0].skipped,
        "unreadable": sum(r.unreadable for r in running),
        "gradient_norm": means.pop("gradient_norm"),
        "train": means,
    }
