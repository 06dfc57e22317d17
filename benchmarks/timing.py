"""Samples of time: the clock of a device, variants interleaved, quartiles, and whether the machine was quiet."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

#: A sample on a CPU lasts at least this long, or the clock's own cost would show.
SHORTEST_SAMPLE = 2e-3
ROUNDS = (8, 60)
#: What a quiet machine's speed may change by, on top of the quartiles: on some the clock rate alone does as much.
DRIFT = 0.05


class Clock:
    """Seconds a call takes.

    On a CPU the wall clock around several calls. On a GPU device events around each call, the L2 cache overwritten
    before it, as it is when an op stands in a network.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._flush = None
        if device == "cuda":
            cache = torch.cuda.get_device_properties(0).L2_cache_size
            self._flush = torch.empty(2 * cache, dtype=torch.uint8, device="cuda")

    def __call__(self, run: Callable[[], object], calls: int = 1) -> float:
        if self._flush is None:
            started = time.perf_counter()
            for _ in range(calls):
                run()
            return (time.perf_counter() - started) / calls
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for before, after in events:
            self._flush.zero_()
            before.record()
            run()
            after.record()
        torch.cuda.synchronize()
        return sum(before.elapsed_time(after) for before, after in events) / calls / 1e3

    def calls(self, once: float) -> int:
        """How many calls make a sample, for a call of `once` seconds."""
        return 1 if self.device == "cuda" else max(1, math.ceil(SHORTEST_SAMPLE / max(once, 1e-9)))


def rounds(seconds: float, budget: float) -> int:
    """How many rounds of `seconds` fit into the budget, within ROUNDS."""
    least, most = ROUNDS
    return max(least, min(most, int(budget / max(seconds, 1e-9))))


def interleave(samplers: Mapping[str, Callable[[], float]], count: int) -> dict[str, list[float]]:
    """One sample of each in turn, A B C A B C, so that a drift of the machine meets all alike."""
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(count):
        for name, sampler in samplers.items():
            samples[name].append(sampler())
    return samples


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile, interpolated; of one sample the sample itself."""
    if len(samples) == 1:
        return (samples[0],) * 3
    first, median, third = statistics.quantiles(samples, n=4, method="inclusive")
    return first, median, third


def drifts(samples: Sequence[float]) -> bool:
    """Whether the two halves of the samples disagree, see `disagree`; fewer than eight samples say nothing."""
    middle = len(samples) // 2
    return len(samples) >= 8 and disagree(samples[:middle], samples[middle:])


def disagree(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether neither's quartiles hold the other's median, nor come within DRIFT of it."""
    ends = quartiles(one), quartiles(other)
    return not any(a[0] / (1 + DRIFT) <= b[1] <= a[2] * (1 + DRIFT) for a, b in (ends, ends[::-1]))


def busy(share: float | None = None) -> str:
    """A warning where other processes keep the machine busy, else ""; to be asked while nothing of ours runs.

    Args:
        share: of the processors' time that is in use, by default as it is now. (The system's load average would still
            hold the benchmark before.)
    """
    share = _share_in_use() if share is None else share
    return f"the machine is busy: {share:.0%} of its processors' time is in use by others" if share > 0.1 else ""


def _share_in_use(seconds: float = 1.0) -> float:
    before = _processor_times()
    time.sleep(seconds)
    total, idle = (after - former for after, former in zip(_processor_times(), before, strict=True))
    return 1 - idle / max(total, 1)


def _processor_times() -> tuple[int, int]:
    """Ticks of all processors since the start, and those of them that were idle or waiting for a disk."""
    ticks = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return sum(ticks), ticks[3] + ticks[4]
