"""Segmental SNR, and the composite measures CSIG, CBAK and COVL of speech enhancement.

The composite measures predict how listeners rate the distortion of the speech, the intrusiveness of the background and
the overall quality, each from 1 to 5, from wide-band PESQ and three distances between frames of 30 ms, hop 7.5 ms:

    CSIG = 3.093 - 1.029 LLR + 0.603 PESQ - 0.009 WSS
    CBAK = 1.634 + 0.478 PESQ - 0.007 WSS + 0.063 segSNR
    COVL = 1.594 + 0.805 PESQ - 0.512 LLR - 0.007 WSS

LLR, the log-likelihood ratio of linear prediction, is log(a' R a / b' R b), R being the autocorrelation matrix of the
clean frame, b its own predictor and a that of the estimate. WSS, Klatt's weighted spectral slope, compares the slopes
of the levels in 25 critical bands. Of both, the mean over the 95 % of the frames that differ least counts. segSNR is
the mean SNR in dB of the frames, each limited to -10 to 35, after the estimate was scaled to the clean signal's peak.

Source: Y. Hu, P. Loizou, "Evaluation of objective quality measures for speech enhancement", IEEE TASLP 16(1), 2008.
Where the article leaves a choice, this follows its authors' program, by which the published figures are made: the
scaling above, a peak that counts one band before it is reached from below, one frame less than there is room for.
"""

from typing import NamedTuple

import numpy as np

from mvat.metrics.checks import checked

_WINDOW, _HOP, _FFT, _ORDER = 480, 120, 1024, 16  # at 16 kHz
_KEPT = 0.95
_LIMITS = (-10.0, 35.0)  # dB
_FLOOR = 1e-10  # energy of a frame or a band, 20 dB below what rounding to 16 bits leaves: what silence counts as
_WHITE = 1e-12  # of a frame's energy, added as white noise: without it the predictor of a pure tone is all rounding

# Critical bands up to 3.8 kHz: centre and width in Hz.
_CENTRES = (
    *(50, 120, 190, 260, 330, 400, 470, 540, 617.372, 703.378, 798.717, 904.128, 1020.38, 1148.30, 1288.72, 1442.54),
    *(1610.70, 1794.16, 1993.93, 2211.08, 2446.71, 2701.97, 2978.04, 3276.17, 3597.63),
)
_WIDTHS = (
    *(70, 70, 70, 70, 70, 70, 70, 77.3724, 86.0056, 95.3398, 105.411, 116.256, 127.914, 140.423, 153.823, 168.154),
    *(183.457, 199.776, 217.153, 235.631, 255.255, 276.072, 298.126, 321.465, 346.136),
)
_GLOBAL, _LOCAL = 20.0, 1.0  # dB: Klatt's constants for the distance from the highest and from the nearest peak


class Distances(NamedTuple):
    """What the composite measures are made of, beside PESQ and segmental SNR."""

    llr: float
    wss: float


def segsnr(clean: np.ndarray, estimate: np.ndarray) -> float:
    """Segmental signal-to-noise ratio of zero-mean signals, the estimate scaled to the clean signal's peak.

    Args:
        clean: [T], floating point, 16 kHz.
        estimate: [T], floating point.

    Returns:
        dB, -10 to 35.

    Raises:
        ScoreError: The signals differ in length, are constant, or not finite.
        TypeError: A signal is not floating point.
        ValueError: The signals are shorter than 600 samples.
    """
    clean, estimate = checked(clean, estimate)
    clean, estimate = clean - clean.mean(), estimate - estimate.mean()
    clean, estimate = _frames(clean), _frames(estimate * (np.abs(clean).max() / np.abs(estimate).max()))
    signal, noise = (clean**2).sum(1), ((clean - estimate) ** 2).sum(1)
    return float(np.clip(10 * np.log10(signal / (noise + _FLOOR) + _FLOOR), *_LIMITS).mean())


def distances(clean: np.ndarray, estimate: np.ndarray) -> Distances:
    """Mean log-likelihood ratio and weighted spectral slope distance of the frames that differ least.

    Args:
        clean: [T], floating point, 16 kHz.
        estimate: [T], floating point.

    Raises:
        ValueError: The signals are shorter than 600 samples.
    """
    spectra = [np.abs(np.fft.rfft(_frames(x), _FFT)) ** 2 for x in (clean, estimate)]  # [frames, bins]
    return Distances(_least(_llr(*spectra)), _least(_wss(*spectra)))


def csig(pesq_wb: float, distances: Distances) -> float:
    """Predicted rating of the distortion of speech, 1 (worst) to 5."""
    return _rating(3.093 - 1.029 * distances.llr + 0.603 * pesq_wb - 0.009 * distances.wss)


def cbak(pesq_wb: float, distances: Distances, segsnr: float) -> float:
    """Predicted rating of the intrusiveness of the background, 1 (worst) to 5."""
    return _rating(1.634 + 0.478 * pesq_wb - 0.007 * distances.wss + 0.063 * segsnr)


def covl(pesq_wb: float, distances: Distances) -> float:
    """Predicted rating of overall quality, 1 (worst) to 5."""
    return _rating(1.594 + 0.805 * pesq_wb - 0.512 * distances.llr - 0.007 * distances.wss)


def _rating(value: float) -> float:
    return min(max(value, 1.0), 5.0)


def _frames(x: np.ndarray) -> np.ndarray:
    """[T] to windowed frames [frames, 480]."""
    count = len(x) // _HOP - _WINDOW // _HOP
    if count < 1:
        shortest = _WINDOW + _HOP
        raise ValueError(f"too short: fewer than {shortest} samples ({shortest / 16000} s), got {len(x)}")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1, _WINDOW + 1) / (_WINDOW + 1))
    return np.lib.stride_tricks.sliding_window_view(x, _WINDOW)[::_HOP][:count] * window


def _least(values: np.ndarray) -> float:
    return float(np.sort(values)[: round(_KEPT * len(values)) or 1].mean())


def _llr(clean: np.ndarray, estimate: np.ndarray) -> np.ndarray:
    """Log-likelihood ratio of each frame, from power spectra."""
    correlations = []
    for spectrum in (clean, estimate):
        r = np.fft.irfft(spectrum, _FFT)[:, : _ORDER + 1]
        r[:, 0] = (1 + _WHITE) * r[:, 0] + _FLOOR
        correlations.append(r)
    _, own = _prediction(correlations[0])
    a, _ = _prediction(correlations[1])
    # a' R a = sum over lags of the autocorrelation of a times that of the frame, either sign of the lag.
    lags = np.stack([(a[:, : _ORDER + 1 - k] * a[:, k:]).sum(1) for k in range(_ORDER + 1)], 1)
    lags[:, 1:] *= 2
    return np.log((lags * correlations[0]).sum(1) / own)


def _prediction(r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Levinson-Durbin: autocorrelations [frames, 17] to prediction filters [frames, 17] and errors [frames]."""
    a = np.zeros_like(r)
    a[:, 0], error = 1, r[:, 0].copy()
    for order in range(1, _ORDER + 1):
        reflection = -(a[:, :order] * r[:, order:0:-1]).sum(1) / error
        a[:, 1 : order + 1] += reflection[:, None] * a[:, order - 1 :: -1]
        error *= 1 - reflection**2
    return a, error


def _wss(clean: np.ndarray, estimate: np.ndarray) -> np.ndarray:
    """Weighted spectral slope distance of each frame, from power spectra."""
    filters = _critical_bands()
    levels = [10 * np.log10(np.maximum(spectrum[:, : _FFT // 2] @ filters, _FLOOR)) for spectrum in (clean, estimate)]
    slopes = [np.diff(level) for level in levels]
    weights = _weights(levels[0], slopes[0]) + _weights(levels[1], slopes[1])
    return (weights * (slopes[0] - slopes[1]) ** 2).sum(1) / weights.sum(1)


def _critical_bands() -> np.ndarray:
    """Gaussian filters, as [bins, bands], zero below -30 dB."""
    per_bin = 16000 / _FFT
    centres, widths = np.array(_CENTRES), np.array(_WIDTHS)
    places = (np.arange(_FFT // 2)[:, None] - np.floor(centres / per_bin)) * per_bin / widths
    filters = widths[0] / widths * np.exp(-11 * places**2)
    return filters * (filters > np.exp(-30 / (2 * 2.303)))


def _weights(level: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """How much each slope of a spectrum counts: most at the highest peak, then at any peak, least in valleys."""
    here, rising = level[:, :-1], slope > 0
    above, below = here.copy(), here.copy()  # the peak that a rising slope leads up to, a falling one came down from
    for band in range(1, here.shape[1]):
        below[:, band] = np.where(rising[:, band - 1], here[:, band], below[:, band - 1])
        back = here.shape[1] - 1 - band
        above[:, back] = np.where(rising[:, back + 1], above[:, back + 1], here[:, back])
    peak = np.where(rising, above, below)
    return _GLOBAL / (_GLOBAL + level.max(1, keepdims=True) - here) * _LOCAL / (_LOCAL + peak - here)
