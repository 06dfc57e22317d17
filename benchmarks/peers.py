"""What an op is compared with: its reference, its fused kernel where there is one, torch.compile of the reference."""

from collections.abc import Callable, Sequence

import torch

from benchmarks.harness import Run, Settings, Variant
from mvat.kernels import backend


def op_variants(
    reference: Run, op: Run, ops: Sequence[str], settings: Settings, named: bool, dtype: torch.dtype = torch.float32
) -> dict[str, Variant]:
    """eager, fused and, on a named shape, torch.compile.

    Args:
        reference: the plain PyTorch function.
        op: the public function, which runs fused kernels under the back end "auto".
        ops: the registered ops whose kernels it may run; without any of them there is nothing fused to measure.
        named: whether this shape is one of those that torch.compile is measured on.
    """
    variants = {
        "eager": Variant(lambda: reference),
        "fused": Variant(lambda: op, "auto", missing=not_fused(ops, settings.device, dtype)),
    }
    if named and settings.compile:
        variants["compile"] = compiled(lambda: reference)
    return variants


def compiled(make: Callable[[], Run]) -> Variant:
    """torch.compile of what `make` makes, for these shapes alone.

    Compiled code of former shapes is dropped first: after eight, PyTorch would run the rest uncompiled.
    """

    def compile_it() -> Run:
        torch.compiler.reset()
        return torch.compile(make(), dynamic=False)

    return Variant(compile_it, algorithm=make)


def not_fused(ops: Sequence[str], device: str, dtype: torch.dtype) -> str:
    """Why none of these ops has a fused kernel here, "" where one has."""
    name = str(dtype).removeprefix("torch.")
    reasons = [row.reason for row in backend.table((device,)) if row.op in ops and row.dtype == name]
    return "" if "" in reasons else "; ".join(dict.fromkeys(reasons))
