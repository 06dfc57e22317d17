"""Which implementation of an op runs: the fused kernel or the plain PyTorch reference.

Every op registers one function that says, for a device type and a dtype, why its fused kernel cannot run there (or
None where it can). `use_fused` asks it once a call; `table` asks it for everything, which is what `mvat doctor` prints.
"""

import os
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch

MODES = ("auto", "fused", "eager")

#: The reason an op gives while nobody has written a fused kernel for it: nothing a user could mend, so no warning.
NOT_WRITTEN = "no fused kernel is written yet"

_supports: dict[str, Callable[[str, torch.dtype], str | None]] = {}
_warned: set[tuple[str, str]] = set()


def _checked(mode: str, origin: str) -> str:
    if mode not in MODES:
        raise ValueError(f"{origin} must be one of {', '.join(MODES)}, got {mode!r}")
    return mode


# A plain module variable, not a ContextVar: torch.compile guards on it and recompiles when it changes.
# What the environment says is checked where it is first asked for, so that a command can refuse it in one line.
_mode = os.environ.get("MVAT_BACKEND", "auto")


class use_backend:
    """Choose the back end for the whole process: as a call, or as a context manager that restores the former choice.

    All threads share the choice; threads that want different ones must take turns.

    Args:
        mode: "auto" takes the fused kernel where there is one for the input's device and dtype, else the reference,
            with one warning per op and reason; "fused" raises RuntimeError where there is no fused kernel; "eager"
            always takes the reference. The variable MVAT_BACKEND sets the choice at start-up.

    Raises:
        ValueError: for another mode.
    """

    def __init__(self, mode: str) -> None:
        global _mode
        self._former = _mode
        _mode = _checked(mode, "the back end")

    def __enter__(self) -> "use_backend":
        return self

    def __exit__(self, *exception: object) -> None:
        global _mode
        _mode = self._former


def current_backend() -> str:
    """The mode in force: "auto", "fused" or "eager"; ValueError where MVAT_BACKEND holds another word."""
    return _checked(_mode, "the environment variable MVAT_BACKEND")


def register(op: str, supports: Callable[[str, torch.dtype], str | None]) -> None:
    """Make `op` known; supports(device_type, dtype) gives None where the fused kernel runs, else the reason why not."""
    _supports[op] = supports


def not_written(device_type: str, dtype: torch.dtype) -> str | None:
    """The `supports` of an op that has only its reference."""
    return NOT_WRITTEN


def use_fused(op: str, x: torch.Tensor, limit: str | None = None) -> bool:
    """Whether `op` takes its fused kernel for the input x; warns or raises as `use_backend` describes.

    limit: the op's own reason against this call (its sizes, say), where the registered function has none.
    """
    if current_backend() == "eager" or x.device.type == "meta":
        return False
    reason = _supports[op](x.device.type, x.dtype) or limit
    if reason is None and _is_transformed():
        reason = "it has no forward-mode derivative and no torch.func transform"
    if reason is None:
        return True
    if _mode == "fused":
        raise RuntimeError(f'{op}: the back end is "fused", but for {x.dtype} on {x.device.type} {reason}')
    # Neither the tracer nor the fake tensors of torch.compile should leave a warning behind.
    if reason != NOT_WRITTEN and not torch.compiler.is_compiling() and (op, reason) not in _warned:
        _warned.add((op, reason))
        warnings.warn(f"{op} runs the plain PyTorch reference: {reason}", RuntimeWarning, stacklevel=3)
    return False


def _is_transformed() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is under way.

    A custom operator gives a zero tangent there without a word.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


class Row(NamedTuple):
    """What runs for one op, device type and dtype; reason is empty where the fused kernel does."""

    op: str
    device: str
    dtype: str
    implementation: str
    reason: str


def table(devices: tuple[str, ...] = ("cpu", "cuda")) -> list[Row]:
    """One row per registered op, device type and floating dtype, as "auto" would choose."""
    rows = []
    for op, supports in _supports.items():
        for device in devices:
            for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
                reason = supports(device, dtype)
                name = "fused" if reason is None else "reference"
                rows.append(Row(op, device, str(dtype).removeprefix("torch."), name, reason or ""))
    return rows
