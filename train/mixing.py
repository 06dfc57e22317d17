"""Mix clean speech with noise at a given SNR: levels, coloured and speech-shaped noise, babble, and sets of pairs.

All arrays are float32 [T] at 16 kHz. numpy alone, except for `write_pairs`, which writes files.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from train.manifest import SAMPLE_RATE, Entry

__all__ = [
    "COLOURS",
    "SPEECH_LEVEL",
    "TEST_SNRS",
    "TRAIN_SNRS",
    "active_rms",
    "babble",
    "check_seed",
    "coloured",
    "coloured_noises",
    "excerpt",
    "high_pass",
    "level",
    "long_term_spectrum",
    "minutes_by_split",
    "mix",
    "reverberate",
    "rms",
    "row",
    "speech_shaped",
    "write_pairs",
]

SPEECH_LEVEL = -25.0
"""Level of clean speech in dB of full scale (RMS)."""
TRAIN_SNRS = (0.0, 5.0, 10.0, 15.0)
TEST_SNRS = (2.5, 7.5, 12.5, 17.5)
"""The signal-to-noise ratios of VoiceBank-DEMAND, in dB."""
COLOURS = {"white": 0.0, "pink": 1.0, "brown": 2.0}
"""Exponent of 1/f of the power spectrum."""

NoiseSource = Callable[[np.random.Generator, int], np.ndarray]
"""Gives so many frames of noise at any level."""


def level(samples: np.ndarray, dbfs: float = SPEECH_LEVEL) -> np.ndarray:
    """Scale to an RMS level.

    Raises:
        ValueError: The samples are silent.
    """
    own = rms(samples)
    if own == 0:
        raise ValueError("silence has no level")
    return (samples * (10 ** (dbfs / 20) / own)).astype(np.float32)


def mix(clean: np.ndarray, noise: np.ndarray, snr: float) -> np.ndarray:
    """Add noise, scaled so that the ratio of the mean powers is `snr` dB.

    Args:
        clean: [T].
        noise: [T].
        snr: In dB.

    Returns:
        Float32 [T].

    Raises:
        ValueError: Different lengths, or either is silent.
    """
    if clean.shape != noise.shape:
        raise ValueError(f"clean has shape {list(clean.shape)}, noise {list(noise.shape)}: they must be equal")
    powers = rms(clean), rms(noise)
    if 0 in powers:
        raise ValueError("cannot mix at an SNR: the clean signal or the noise is silent")
    return (clean + noise * (powers[0] / powers[1] * 10 ** (-snr / 20))).astype(np.float32)


def active_rms(samples: np.ndarray) -> float:
    """RMS of samples [T] over the active tenths of a second: those within 40 dB of the loudest one (our definition).

    So neither the pauses of speech nor those of intermittent noise lower its level. A last part of less than a tenth of
    a second does not count, unless it is all there is.
    """
    block = SAMPLE_RATE // 10
    blocks = samples[: len(samples) // block * block].reshape(-1, block) if len(samples) > block else samples[None]
    powers = np.mean(np.square(blocks, dtype=np.float64), axis=1)
    return float(np.sqrt(powers[powers >= 1e-4 * powers.max()].mean()))


def reverberate(speech: np.ndarray, response: np.ndarray, early: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """Speech in a room: the whole of it, and what arrives early.

    The direct sound, the strongest sample of the response, arrives without delay, so that both are aligned with the
    speech. Early is what arrives until `early` seconds after it (our definition).

    Args:
        speech: [T].
        response: The room's impulse response, [N], not silent.
        early: In seconds.

    Returns:
        Float32 [T] and [T]: reverberant, early.
    """
    direct = int(np.argmax(np.abs(response)))
    response = response[: direct + len(speech)]
    total = len(speech) + len(response)
    padded = -(-total // 4096) * 4096  # a length with small factors
    spectrum = np.fft.rfft(speech, padded)
    parts = (response, response[: direct + 1 + round(early * SAMPLE_RATE)])
    whole, first = (np.fft.irfft(spectrum * np.fft.rfft(part, padded), padded) for part in parts)
    place = slice(direct, direct + len(speech))
    return whole[place].astype(np.float32), first[place].astype(np.float32)


def coloured(rng: np.random.Generator, frames: int, exponent: float) -> np.ndarray:
    """Gaussian noise whose power falls as 1/f^exponent above 50 Hz, RMS 1."""
    frequencies = np.fft.rfftfreq(frames, 1 / SAMPLE_RATE)
    return _shaped(rng, frames, np.where(frequencies < 50, 0, np.maximum(frequencies, 50.0) ** (-exponent / 2)))


def coloured_noises() -> dict[str, NoiseSource]:
    """White, pink and brown noise."""
    return {name: partial(coloured, exponent=exponent) for name, exponent in COLOURS.items()}


def long_term_spectrum(speech: np.ndarray) -> np.ndarray:
    """Mean magnitude spectrum [257] of some speech, at least 512 samples."""
    blocks = speech[: len(speech) // 512 * 512].reshape(-1, 512) * np.hanning(512)
    return np.sqrt((np.abs(np.fft.rfft(blocks)) ** 2).mean(0))


def speech_shaped(rng: np.random.Generator, frames: int, spectrum: np.ndarray) -> np.ndarray:
    """Gaussian noise with the long-term spectrum [257] of some speech, RMS 1."""
    bins = np.linspace(0, len(spectrum) - 1, frames // 2 + 1)
    return _shaped(rng, frames, np.interp(bins, np.arange(len(spectrum)), spectrum))


def babble(rng: np.random.Generator, frames: int, voices: Sequence[np.ndarray], talkers: int = 6) -> np.ndarray:
    """Several talkers at equal level, each an endless row of randomly chosen utterances.

    Args:
        rng: Source of randomness.
        frames: Length wanted.
        voices: Utterances to choose from.
        talkers: How many speak at once.
    """
    total = np.zeros(frames, np.float32)
    for _ in range(talkers):
        total += level(excerpt(rng, row(rng, voices, frames), frames))
    return total


def row(rng: np.random.Generator, recordings: Sequence[np.ndarray], frames: int) -> np.ndarray:
    """Randomly chosen recordings one after the other, one more than `frames` needs: an excerpt can start anywhere."""
    chosen: list[np.ndarray] = []
    while sum(map(len, chosen)) < frames + max(map(len, chosen), default=1):
        chosen.append(recordings[int(rng.integers(len(recordings)))])
    return np.concatenate(chosen)


def excerpt(rng: np.random.Generator, recording: np.ndarray, frames: int) -> np.ndarray:
    """A random part of a recording, which is repeated where it is too short; near-silent parts are passed over.

    Raises:
        ValueError: The recording is silent.
    """
    overall = rms(recording)
    if overall == 0:
        raise ValueError("the recording is silent")
    if len(recording) < frames:
        recording = np.tile(recording, -(-frames // len(recording)))
    while True:
        start = rng.integers(len(recording) - frames + 1)
        part = recording[start : start + frames]
        # Some part of this length reaches the overall level, so the search ends.
        if rms(part) > 0.1 * overall:
            return part


def high_pass(samples: np.ndarray, cutoff: float = 60.0) -> np.ndarray:
    """Remove what lies below the cutoff in Hz, with a slope of half an octave."""
    frequencies = np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE)
    gain = 0.5 - 0.5 * np.cos(np.pi * np.clip((frequencies / cutoff - 0.7) / 0.7, 0, 1))
    return np.fft.irfft(np.fft.rfft(samples) * gain, len(samples)).astype(np.float32)


def check_seed(seed: int) -> None:
    """ValueError for a seed that numpy's generators do not take."""
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, not {seed}")


def minutes_by_split(train: float, valid: float, test: float) -> dict[str, float]:
    """How much to make of each split.

    Raises:
        ValueError: An amount is negative or not a finite number.
    """
    minutes = {"train": train, "valid": valid, "test": test}
    for split, amount in minutes.items():
        if not 0 <= amount < float("inf"):
            raise ValueError(f"minutes of {split} must be 0 or more, not {amount}")
    return minutes


def write_pairs(
    folder: Path,
    split: str,
    minutes: float,
    snrs: Sequence[float],
    utterances: Iterator[tuple[str, np.ndarray]],
    noises: Mapping[str, NoiseSource],
    rng: np.random.Generator,
    progress: bool = True,
) -> list[Entry]:
    """Mix and write 16-bit pairs until there are enough, every noise at every SNR in turn.

    Args:
        folder: The data set; files go to <folder>/<split>/clean and <folder>/<split>/noisy.
        split: "train", "valid" or "test".
        minutes: How much to write; none for 0.
        snrs: In dB.
        utterances: Endless pairs of a speaker and clean speech.
        noises: The kinds of noise.
        rng: Source of randomness.
        progress: Show a progress bar.

    Raises:
        AudioError: A file cannot be written.
    """
    from tqdm import tqdm

    from mvat import audio

    folders = [folder / split / side for side in ("clean", "noisy")]
    for side in folders:
        side.mkdir(parents=True, exist_ok=True)
    kinds = list(noises)
    entries: list[Entry] = []
    total = round(minutes * 60)
    written = 0.0
    with tqdm(
        total=total, desc=f"mixing {split}", unit="s", disable=None if progress else True, bar_format=_BAR
    ) as bar:
        while written < total:
            speaker, clean = next(utterances)
            kind = kinds[len(entries) % len(kinds)]
            snr = snrs[len(entries) // len(kinds) % len(snrs)]
            clean = level(clean)
            noisy = mix(clean, noises[kind](rng, len(clean)), snr)
            scale = min(1.0, 0.99 / max(np.abs(clean).max(), np.abs(noisy).max()))
            name = f"{speaker}_{len(entries) + 1:04d}"
            clean_file, noisy_file = (side / f"{name}.wav" for side in folders)
            audio.write(clean_file, clean * np.float32(scale), SAMPLE_RATE)
            audio.write(noisy_file, noisy * np.float32(scale), SAMPLE_RATE)
            entries.append(Entry(name, speaker, clean_file, noisy_file, len(clean), kind, snr))
            written += len(clean) / SAMPLE_RATE
            bar.update(min(total, round(written)) - bar.n)
    return entries


_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} s of audio [{elapsed}<{remaining}]"


def rms(samples: np.ndarray) -> float:
    """The root mean square."""
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))


def _shaped(rng: np.random.Generator, frames: int, magnitude: np.ndarray) -> np.ndarray:
    """Gaussian noise with this magnitude spectrum [frames // 2 + 1], RMS 1."""
    noise = np.fft.irfft(np.fft.rfft(rng.standard_normal(frames)) * magnitude, frames)
    return (noise / max(rms(noise), 1e-30)).astype(np.float32)
