"""One pair of recordings: the metrics by name, and the checks before them."""

import importlib.util
import math
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np

from mvat import audio
from mvat.metrics import composite
from mvat.metrics.checks import checked
from mvat.metrics.scores import ScoreError


def si_sdr(clean: np.ndarray, estimate: np.ndarray) -> float:
    """Scale-invariant signal-to-distortion ratio of zero-mean signals.

    Args:
        clean: [T], floating point.
        estimate: [T], floating point.

    Returns:
        dB. +inf where the estimate is the clean signal up to a factor and rounding (above 280 dB, in float64), -inf
        where it has nothing of it.

    Raises:
        ScoreError: The signals differ in length, are empty, constant, or not finite.
        TypeError: A signal is not floating point.
    """
    clean, estimate = checked(clean, estimate)
    s, y = clean - clean.mean(), estimate - estimate.mean()
    # Sums rather than products of vectors, whose rounding would depend on the number of threads.
    target = np.sum(y * s) / np.sum(s * s) * s
    signal_energy, noise_energy = np.sum(target**2), np.sum((y - target) ** 2)
    if noise_energy <= 1e-28 * signal_energy:
        return math.inf
    return 10 * math.log10(signal_energy / noise_energy) if signal_energy > 0 else -math.inf


class Pair:
    """A pair to score; what several metrics need is computed once, when the first of them asks.

    Args:
        clean: [T], floating point, 16 kHz.
        estimate: [T], floating point, 16 kHz.

    Raises:
        ScoreError: No metric can score the pair.
        TypeError: A signal is not floating point.
    """

    def __init__(self, clean: np.ndarray, estimate: np.ndarray):
        self.signals = checked(clean, estimate)

    def measure(self, metric: str) -> float:
        """The score by one metric out of METRICS.

        Raises:
            ScoreError: It cannot be had.
        """
        try:
            value = _MEASURES[metric](self)
        except Exception as error:  # the packages raise errors of many kinds, plain Exception among them
            reason = error.args[0] if error.args else type(error).__name__
            raise ScoreError(metric, reason.decode() if isinstance(reason, bytes) else str(reason)) from error
        if value == math.inf:
            raise ScoreError(metric, "infinite: the estimate is the clean signal up to a factor")
        if not math.isfinite(value):
            raise ScoreError(metric, f"the score is {value}")
        return value

    @cached_property
    def pesq_wb(self) -> float:
        """Wide-band PESQ."""
        return _pesq(*self.signals, "wb")

    @cached_property
    def segsnr(self) -> float:
        """Segmental SNR, dB."""
        return composite.segsnr(*self.signals)

    @cached_property
    def distances(self) -> composite.Distances:
        """LLR and WSS of the composite measures."""
        return composite.distances(*self.signals)


_MEASURES: dict[str, Callable[[Pair], float]] = {
    "pesq_wb": lambda pair: pair.pesq_wb,
    "pesq_nb": lambda pair: _pesq(*pair.signals, "nb"),
    "stoi": lambda pair: _stoi(*pair.signals, extended=False),
    "estoi": lambda pair: _stoi(*pair.signals, extended=True),
    "si_sdr": lambda pair: si_sdr(*pair.signals),
    "segsnr": lambda pair: pair.segsnr,
    "csig": lambda pair: composite.csig(pair.pesq_wb, pair.distances),
    "cbak": lambda pair: composite.cbak(pair.pesq_wb, pair.distances, pair.segsnr),
    "covl": lambda pair: composite.covl(pair.pesq_wb, pair.distances),
}
METRICS = tuple(_MEASURES)
#: Those that run PESQ, which is slow, and whose C code can take the process down with it.
PESQ_METRICS = ("pesq_wb", "pesq_nb", "csig", "cbak", "covl")
_PACKAGE = dict.fromkeys(PESQ_METRICS, "pesq") | dict.fromkeys(("stoi", "estoi"), "pystoi")


def score(clean: np.ndarray, estimate: np.ndarray, metrics: Sequence[str] = METRICS) -> dict[str, float]:
    """Scores one estimate, in this process.

    An infinite SI-SDR (a perfect estimate, see `si_sdr`) is no number a mean can hold: it is a ScoreError like any
    other. PESQ's C code can take the process down with it on recordings with more than 50 utterances; `score_files`
    survives that.

    Args:
        clean: [T], floating point, 16 kHz.
        estimate: [T], floating point, 16 kHz.
        metrics: Names out of METRICS.

    Returns:
        Metric -> score.

    Raises:
        ScoreError: The pair cannot be scored; names the metric and the reason.
        TypeError: A signal is not floating point.
        ValueError: An unknown metric.
        ModuleNotFoundError: A metric needs a package that is not installed.
    """
    metrics = known(metrics)
    pair = Pair(clean, estimate)
    return {metric: pair.measure(metric) for metric in metrics}


def _pesq(clean: np.ndarray, estimate: np.ndarray, mode: str) -> float:
    from pesq import pesq

    return float(pesq(audio.SAMPLE_RATE, clean, estimate, mode))


def _stoi(clean: np.ndarray, estimate: np.ndarray, extended: bool) -> float:
    from pystoi import stoi

    with warnings.catch_warnings():
        # pystoi warns about a signal too short for one segment and returns 1e-5 as if that were its score.
        warnings.filterwarnings("error", message="Not enough STFT frames")
        try:
            return float(stoi(clean, estimate, audio.SAMPLE_RATE, extended=extended))
        except RuntimeWarning as warning:
            raise ValueError("too short: fewer than 30 frames (0.4 s) of speech") from warning


def known(metrics: Sequence[str]) -> tuple[str, ...]:
    """The names as a tuple, all of them known and computable here; errors as `score` raises them."""
    metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"unknown metric {metric!r}, expected some of {', '.join(METRICS)}")
        package = _PACKAGE.get(metric)
        if package and importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"{metric} needs the package {package}: pip install {package}", name=package)
    if not metrics or len(set(metrics)) < len(metrics):
        raise ValueError(f"expected one or more different metrics, got {', '.join(metrics) or 'none'}")
    return metrics
