"""The physical floor of a row: the time its products and its bytes would take at rates measured here and now.

    floor = max(FLOPs / peak of the dtype, bytes / bandwidth at this working set),     share = floor / time

Only products are counted, not elementwise operations, and every byte once, so the floor is a lower bound. A share above
LIMIT means that the count or a rate is wrong.
"""

import ctypes
import math
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.timing import Clock

LIMIT = 1.1
_LEAST_SECONDS = 0.2
_SOURCE = Path(__file__).with_name("fma.c")


class Rates:
    """Peaks of a device, each measured when first asked for.

    Args:
        device: "cpu" or "cuda".
        repeats: of each measurement at least, of which the best counts.
    """

    def __init__(self, device: str, repeats: int = 5) -> None:
        self.device, self.repeats = device, repeats
        self.clock = Clock(device)
        self._bandwidths: dict[int, float] = {}
        self._peaks: dict[torch.dtype, dict[str, float]] = {}

    def bandwidth(self, working_set: int) -> float:
        """Bytes a second, reading or copying (the faster one) as many bytes as the row touches, to a power of 2."""
        size = 2 ** max(12, round(math.log2(max(working_set, 1))))
        if size not in self._bandwidths:
            data = torch.ones(size // 4, device=self.device)
            source, target = data.chunk(2)
            read, copy = self._best(data.sum), self._best(lambda: target.copy_(source))
            self._bandwidths[size] = size / min(read, copy)
        return self._bandwidths[size]

    def peaks(self, dtype: torch.dtype) -> dict[str, float]:
        """FLOP/s of the dtype: of PyTorch's products; on a CPU of multiply-adds in registers too (0 if no compiler).

        On a GPU the tensor cores' rate stands above that of single multiply-adds; float32 may take tf32 there.
        """
        if dtype not in self._peaks:
            peaks = {"product": self._product(dtype)}
            if self.device == "cpu":
                peaks["fma"] = _fma_peak(torch.get_num_threads(), self.repeats) / (2 if dtype == torch.float64 else 1)
            self._peaks[dtype] = peaks
        return self._peaks[dtype]

    def floor(self, flops: float, moved: int, working_set: int, dtype: torch.dtype) -> float:
        """Seconds below which the row cannot fall."""
        return max(flops / max(self.peaks(dtype).values()) if flops else 0.0, moved / self.bandwidth(working_set))

    def as_dict(self) -> dict[str, dict[str, float]]:
        """All rates measured so far, for the results."""
        rates = {str(dtype).removeprefix("torch."): peaks for dtype, peaks in self._peaks.items()}
        return rates | {"bandwidth": {str(size): rate for size, rate in sorted(self._bandwidths.items())}}

    def _product(self, dtype: torch.dtype) -> float:
        """The best of a square product and a 1x1 convolution."""
        size = 8192 if self.device == "cuda" else 1024
        a = torch.randn(size, size, device=self.device).to(dtype)
        weight = a[:480, :480, None].contiguous()
        x = torch.randn(1, 480, 8 * size, device=self.device).to(dtype)
        former = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            square = 2 * size**3 / self._best(lambda: a @ a)
            pointwise = 2 * 480 * x.numel() / self._best(lambda: F.conv1d(x, weight))
        finally:
            torch.backends.cuda.matmul.allow_tf32 = former
        return max(square, pointwise)

    def _best(self, run: Callable[[], object]) -> float:
        """The best of some samples. They go on for a while: what disturbs a few of them seldom lasts that long."""
        run()
        calls = self.clock.calls(min(self.clock(run) for _ in range(3)))
        best, samples, end = math.inf, 0, time.monotonic() + _LEAST_SECONDS
        while samples < self.repeats or time.monotonic() < end:
            best, samples = min(best, self.clock(run, calls)), samples + 1
        return best


@cache
def _fma_peak(threads: int, repeats: int) -> float:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return 0.0
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "fma.so"
        subprocess.run(
            [compiler, "-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-o", target, _SOURCE],
            check=True,
        )
        library = ctypes.CDLL(str(target))
    library.run.restype, library.run.argtypes = ctypes.c_float, [ctypes.c_long, ctypes.c_float, ctypes.c_float]
    library.flops_a_step.restype = ctypes.c_long
    steps = 2_000_000
    clock = Clock("cpu")
    # ctypes lets go of the interpreter's lock, so that threads run side by side.
    with ThreadPoolExecutor(threads) as pool:
        best = min(
            clock(lambda: list(pool.map(lambda _: library.run(steps, 0.999, 0.001), range(threads))))
            for _ in range(repeats)
        )
    return threads * steps * library.flops_a_step() / best
