"""What a pair of signals must be before any metric sees it."""

from typing import Any

import numpy as np

from mvat.metrics.scores import ALL, ScoreError


def floating(signal: Any, name: str) -> np.ndarray:
    """The signal as an array.

    Raises:
        TypeError: It is not floating point; names what was given.
    """
    array = np.asarray(signal)
    if array.dtype.kind != "f":
        raise TypeError(f"{name}: expected a floating-point array, got {type(signal).__name__} of {array.dtype}")
    return array


def checked(clean: np.ndarray, estimate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pair in float64.

    Raises:
        ScoreError: The signals differ in length, are empty, constant, or not finite.
        TypeError: A signal is not floating point.
    """
    pair = [floating(clean, "clean"), floating(estimate, "estimate")]
    if pair[0].ndim != 1 or pair[0].shape != pair[1].shape:
        shapes = " and ".join(str(list(array.shape)) for array in pair)
        raise ScoreError(ALL, f"expected two signals [T] of one length, got clean and estimate {shapes}")
    for name, array in zip(("clean", "estimate"), pair, strict=True):
        if not array.size:
            raise ScoreError(ALL, "the signals are empty")
        if not np.isfinite(array).all():
            raise ScoreError(ALL, f"the {name} signal has NaN or infinite samples")
        if array.min() == array.max():
            raise ScoreError(ALL, f"the {name} signal is silent")
    return pair[0].astype(np.float64), pair[1].astype(np.float64)
