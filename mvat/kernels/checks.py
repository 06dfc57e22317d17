"""Checks of what a caller hands to an op: one clear error that names what was given and what was expected."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def check_features(op: str, name: str, x: object, dims: Sequence[str] = ("B", "C", "T")) -> None:
    """TypeError unless x is a floating tensor, ValueError unless it has the named dimensions."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{op}: {name} must have a floating dtype, got {x.dtype}")
    if x.dim() != len(dims):
        raise ValueError(f"{op}: {name} must have shape [{', '.join(dims)}], got {list(x.shape)}")


def check_parameter(
    op: str, name: str, value: object, shape: Sequence[int], x: Tensor, any_dtype: bool = False
) -> None:
    """TypeError or ValueError unless `value` is a tensor of this shape on x's device and of x's dtype.

    Under autocast, or with any_dtype, the dtype is free.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if list(value.shape) != list(shape):
        raise ValueError(f"{op}: {name} must have shape {list(shape)}, got {list(value.shape)}")
    if value.device != x.device:
        raise ValueError(f"{op}: {name} must be on the input's device {x.device}, got {value.device}")
    if value.dtype == x.dtype or any_dtype:
        return
    # Autocast never casts float64.
    if torch.float64 in (value.dtype, x.dtype) or not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{op}: {name} must have the input's dtype {x.dtype}, got {value.dtype} (outside autocast)")


def check_power(op: str, p: object) -> None:
    """TypeError unless p is a number, ValueError unless it is finite and at least 1."""
    if not isinstance(p, int | float) or isinstance(p, bool):
        raise TypeError(f"{op}: p must be a number, got {type(p).__name__}")
    if not 1 <= p < math.inf:
        raise ValueError(f"{op}: p must be finite and at least 1, got {p}")


def check_choice(op: str, name: str, value: object, choices: Sequence[str]) -> None:
    """ValueError unless value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(choices)}, got {value!r}")


def check_integer(op: str, name: str, value: object, least: int) -> None:
    """ValueError unless value is an integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{op}: {name} must be an integer of at least {least}, got {value!r}")


def check_segment_len(op: str, segment_len: object) -> None:
    """ValueError unless segment_len is an even number of samples, at least 2."""
    if not isinstance(segment_len, int) or isinstance(segment_len, bool) or segment_len < 2 or segment_len % 2:
        raise ValueError(f"{op}: segment_len must be an even integer of at least 2, got {segment_len!r}")
