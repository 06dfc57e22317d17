"""Checks of what a caller hands to an op: one clear error that names what was given and what was expected."""

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


def check_parameter(op: str, name: str, value: object, shape: Sequence[int], x: Tensor) -> None:
    """TypeError or ValueError unless `value` is a tensor of this shape on x's device and, outside autocast, of x's dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if list(value.shape) != list(shape):
        raise ValueError(f"{op}: {name} must have shape {list(shape)}, got {list(value.shape)}")
    if value.device != x.device:
        raise ValueError(f"{op}: {name} must be on the input's device {x.device}, got {value.device}")
    if value.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{op}: {name} must have the input's dtype {x.dtype}, got {value.dtype} (outside autocast)")


def check_segment_len(op: str, segment_len: object) -> None:
    """ValueError unless segment_len is an even number of samples, at least 2."""
    if not isinstance(segment_len, int) or segment_len < 2 or segment_len % 2:
        raise ValueError(f"{op}: segment_len must be an even integer of at least 2, got {segment_len!r}")
