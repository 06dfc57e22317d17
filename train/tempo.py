"""Changing the tempo of speech, without its pitch or with it.

Without, by WSOLA: output frames at a fixed hop are taken from the input near their scaled places, each shifted to where
it continues the former frame best. Source: Verhelst & Roelands, ICASSP 1993.
"""

import numpy as np

from mvat.audio import SAMPLE_RATE, require

_FRAME = 512  # 32 ms at 16 kHz: two periods of a low voice
_HOP = _FRAME // 2
_SEARCH = 128  # 8 ms to either side: half a period of a low voice


def change_tempo(x: np.ndarray, tempo: float) -> np.ndarray:
    """Speech [T] at 16 kHz, spoken `tempo` times as fast: about T / tempo samples, float32.

    Raises:
        ValueError: for a tempo that is not positive.
    """
    if not tempo > 0:
        raise ValueError(f"tempo must be positive, got {tempo}")
    length = round(len(x) / tempo)
    frames = -(-length // _HOP) + 1
    padded = np.pad(x, (_SEARCH + _HOP, _SEARCH + 2 * _FRAME + _HOP)).astype(np.float32)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_FRAME, dtype=np.float32) / _FRAME)
    out = np.zeros(frames * _HOP + _FRAME, np.float32)
    continuation = padded[_SEARCH : _SEARCH + _FRAME]
    for k in range(frames):
        place = min(round(k * _HOP * tempo), len(x))  # start of the search region in `padded`
        region = padded[place : place + _FRAME + 2 * _SEARCH]
        shift = int(np.argmax(_similarity(region, continuation)))
        out[k * _HOP : k * _HOP + _FRAME] += window * region[shift : shift + _FRAME]
        follow = place + shift + _HOP
        continuation = padded[follow : follow + _FRAME]
    return out[_HOP : _HOP + length]


def change_speed(x: np.ndarray, speed: float) -> np.ndarray:
    """Speech [T] at 16 kHz as a tape played `speed` times as fast, pitch and all: about T / speed samples, float32."""
    if not speed > 0:
        raise ValueError(f"speed must be positive, got {speed}")
    return require("soxr").resample(np.asarray(x, np.float32), SAMPLE_RATE * speed, SAMPLE_RATE, quality="HQ")


def _similarity(region: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Normalised correlation of `frame` with every window of `region`."""
    correlation = np.correlate(region, frame, mode="valid")
    energy = np.convolve(region * region, np.ones(len(frame), np.float32), mode="valid")
    return correlation / np.sqrt(np.maximum(energy, 1e-8))
