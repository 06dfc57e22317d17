"""Scores of enhanced speech against the clean recording.

| Metric | What | By |
|---|---|---|
| pesq_wb, pesq_nb | PESQ, wide and narrow band, as MOS-LQO | package pesq |
| stoi, estoi | intelligibility, 0 to 1 | package pystoi |
| si_sdr | scale-invariant signal-to-distortion ratio, dB | `si_sdr` |
| segsnr | segmental signal-to-noise ratio, dB | `segsnr` |
| csig, cbak, covl | predicted ratings of speech, background and overall quality, 1 to 5 | `mvat.metrics.composite` |

PESQ and (E)STOI are what the packages give on the signals as they are, SI-SDR and the others are our own:

    s = clean - mean(clean), y = estimate - mean(estimate), t = <y, s> / <s, s> s
    SI-SDR = 10 log10(||t||^2 / ||y - t||^2)   in dB

A recording that cannot be scored (silence, too short, lengths that differ, NaN, an unreadable file) is counted and
listed with its reason; it never enters a mean.
"""

from mvat.metrics.composite import segsnr
from mvat.metrics.measures import METRICS, PESQ_METRICS, score, si_sdr
from mvat.metrics.pool import Signal, score_files
from mvat.metrics.scores import ALL, Failure, ScoreError, Scores

__all__ = [
    "ALL",
    "METRICS",
    "PESQ_METRICS",
    "Failure",
    "ScoreError",
    "Scores",
    "Signal",
    "score",
    "score_files",
    "segsnr",
    "si_sdr",
]
