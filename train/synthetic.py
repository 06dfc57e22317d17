"""Speech-like signals from a source-filter model, for machines without recordings and for tests.

A voice is a pulse train of varying pitch through four formants that glide from vowel to vowel, with fricatives, stops,
syllable rhythm and pauses. The generator needs numpy alone; `prepare_synthetic` writes a data set.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from train import manifest
from train.manifest import SAMPLE_RATE, Manifest
from train.mixing import (
    COLOURS,
    TEST_SNRS,
    TRAIN_SNRS,
    NoiseSource,
    babble,
    check_seed,
    coloured,
    coloured_noises,
    level,
    long_term_spectrum,
    minutes_by_split,
    mix,
    speech_shaped,
    write_pairs,
)

__all__ = ["VOICES", "Voice", "make_pair", "make_speech", "prepare_synthetic", "voice"]

VOICES = {"train": range(0, 12), "valid": range(12, 14), "test": range(14, 18)}
"""Numbers of the voices of each split."""

_HOP = 128  # control frames of 8 ms, in windows four times as long
_WINDOW = 4 * _HOP
_FFT = 2 * _WINDOW  # room for the ringing of the formants
# Formants of a, e, i, o, u, schwa and two more, in Hz, for a tract of average length.
_VOWELS = np.array(
    [
        (730, 1090, 2440, 3400),
        (530, 1840, 2480, 3500),
        (270, 2290, 3010, 3600),
        (570, 840, 2410, 3300),
        (300, 870, 2240, 3300),
        (500, 1500, 2500, 3500),
        (660, 1720, 2410, 3400),
        (490, 1350, 1690, 3300),
    ],
    float,
)
_BANDWIDTHS = np.array((80, 100, 140, 200), float)


@dataclass(frozen=True)
class Voice:
    """What makes a voice.

    Attributes:
        name: Of the speaker.
        pitch: Mean fundamental frequency in Hz.
        tract: Factor of the formants; above 1 for a short vocal tract.
        breath: Level of aspiration noise against the voiced part.
        pace: Factor of the syllables' length.
    """

    name: str
    pitch: float
    tract: float
    breath: float
    pace: float


def voice(number: int) -> Voice:
    """The voice of a number from 0 on, the same at every call; even ones are low, odd ones high."""
    rng = np.random.default_rng([0x5EED, number])
    high = number % 2
    return Voice(
        name=f"voice{number:02d}",
        pitch=float(rng.uniform(*((170, 250) if high else (85, 145)))),
        tract=float(rng.uniform(*((1.05, 1.25) if high else (0.88, 1.05)))),
        breath=float(rng.uniform(0.01, 0.05)),
        pace=float(rng.uniform(0.85, 1.2)),
    )


def make_speech(rng: np.random.Generator, seconds: float, speaker: Voice | None = None) -> np.ndarray:
    """Generate speech.

    Args:
        rng: Source of randomness.
        seconds: Length.
        speaker: Who speaks; by default any training voice.

    Returns:
        Float32 [round(16000 * seconds)] at -25 dB of full scale.

    Raises:
        ValueError: Less than 0.1 s.
    """
    if seconds < 0.1:
        raise ValueError(f"seconds must be at least 0.1, not {seconds}")
    if speaker is None:
        speaker = voice(int(rng.choice(VOICES["train"])))
    length = round(seconds * SAMPLE_RATE)
    frames = length // _HOP + 5
    voiced, hiss, pitch, formants, centre = _score(rng, frames, speaker)

    # Pulses at every whole turn of the phase, spread over two samples so that the pitch is not quantised.
    times = np.arange(frames * _HOP)
    phase = np.cumsum(np.interp(times, np.arange(frames) * _HOP, pitch) / SAMPLE_RATE)
    turns = np.flatnonzero(np.diff(np.floor(phase))) + 1
    late = (phase[turns] % 1) / (pitch[turns // _HOP] / SAMPLE_RATE)
    pulses = np.zeros(len(times))
    height = np.sqrt(SAMPLE_RATE / pitch[turns // _HOP])
    pulses[turns] = height * (1 - late.clip(0, 1))
    pulses[turns - 1] += height * late.clip(0, 1)
    noise = rng.standard_normal(len(times))

    frequencies = np.fft.rfftfreq(_FFT, 1 / SAMPLE_RATE)
    vocal = _formant_filter(frequencies, formants)
    sibilant = np.exp(-0.5 * ((frequencies - centre[:, None]) / 1200) ** 2)
    window = np.hanning(_WINDOW + 1)[:-1]
    spectra = np.fft.rfft(_blocks(pulses + speaker.breath * noise, frames) * window, _FFT) * (voiced[:, None] * vocal)
    spectra += np.fft.rfft(_blocks(noise, frames) * window, _FFT) * (hiss[:, None] * sibilant)
    blocks = np.fft.irfft(spectra, _FFT)

    speech = np.zeros((frames + _FFT // _HOP) * _HOP)
    for tap in range(_FFT // _HOP):
        speech[tap * _HOP : (tap + frames) * _HOP] += blocks[:, tap * _HOP : (tap + 1) * _HOP].reshape(-1)
    return level(speech[:length])


def make_pair(rng: np.random.Generator, seconds: float) -> tuple[np.ndarray, np.ndarray]:
    """A training voice in coloured noise or babble, at 0 to 15 dB.

    Args:
        rng: Source of randomness.
        seconds: Length, at least 0.1.

    Returns:
        Clean and noisy, float32 [round(16000 * seconds)] each.
    """
    clean = make_speech(rng, seconds)
    kind = rng.choice([*COLOURS, "babble"])
    if kind == "babble":
        noise = np.sum([make_speech(rng, seconds) for _ in range(4)], axis=0)
    else:
        noise = coloured(rng, len(clean), COLOURS[kind])
    noisy = mix(clean, noise, rng.uniform(TRAIN_SNRS[0], TRAIN_SNRS[-1]))
    scale = np.float32(min(1.0, 0.99 / max(np.abs(noisy).max(), np.abs(clean).max())))
    return clean * scale, noisy * scale


def prepare_synthetic(
    out: Path,
    *,
    train_minutes: float = 12.0,
    valid_minutes: float = 1.0,
    test_minutes: float = 2.0,
    train_snrs: Sequence[float] = TRAIN_SNRS,
    test_snrs: Sequence[float] = TEST_SNRS,
    seed: int = 0,
    progress: bool = True,
) -> Manifest:
    """Write a data set of generated voices in generated noise; voices and noises of test are unseen in training.

    Args:
        out: New folder, or one that this function made with the same settings.
        train_minutes: Minutes of training pairs.
        valid_minutes: Minutes of validation pairs.
        test_minutes: Minutes of test pairs.
        train_snrs: Signal-to-noise ratios of the training and validation pairs, in dB.
        test_snrs: Those of the test pairs.
        seed: The same seed gives the same files.
        progress: Show progress bars.

    Raises:
        ValueError: A negative amount or seed.
        ManifestError: The folder is foreign, was made with other settings, or cannot be written.
    """
    out = Path(out)
    check_seed(seed)
    minutes = minutes_by_split(train_minutes, valid_minutes, test_minutes)
    snrs = {"train": list(train_snrs), "valid": list(train_snrs), "test": list(test_snrs)}
    settings = {"source": "synthetic", "minutes": minutes, "snrs": snrs, "seed": seed}
    done = manifest.check_folder(out, settings)
    if done:
        return done
    manifest.claim(out, settings)
    splits = {}
    for index, split in enumerate(manifest.SPLITS):
        rng = np.random.default_rng([seed, index])
        noises = _noises(rng, split)
        splits[split] = write_pairs(
            out, split, minutes[split], snrs[split], _utterances(rng, split), noises, rng, progress
        )
    return manifest.save(out, "synthetic", splits)


def _utterances(rng: np.random.Generator, split: str) -> Iterator[tuple[str, np.ndarray]]:
    """Endless utterances of 2 to 6 s, the voices of the split in turn."""
    while True:
        for number in VOICES[split]:
            speaker = voice(number)
            yield speaker.name, make_speech(rng, rng.uniform(2, 6), speaker)


def _noises(rng: np.random.Generator, split: str) -> dict[str, NoiseSource]:
    """Babble and coloured noise; for test, babble and noise shaped like voices that are not trained on."""
    voices = VOICES["train" if split == "train" else "valid"]
    speech = [make_speech(rng, 4, voice(number)) for number in voices]
    noises: dict[str, NoiseSource] = {"babble": partial(babble, voices=speech)}
    if split == "test":
        return noises | {"speech-shaped": partial(speech_shaped, spectrum=long_term_spectrum(np.concatenate(speech)))}
    return noises | coloured_noises()


def _score(rng: np.random.Generator, frames: int, speaker: Voice) -> tuple[np.ndarray, ...]:
    """What is said: levels of voice and hiss, pitch, formants [frames, 4] and centre of the hiss, frame by frame."""
    voiced, hiss, pitch = np.zeros(frames), np.zeros(frames), np.zeros(frames)
    formants, centre = np.zeros((frames, 4)), np.full(frames, 4000.0)

    def frames_of(low: float, high: float) -> int:
        return max(1, round(rng.uniform(low, high) * speaker.pace * SAMPLE_RATE / _HOP))

    at, left, accent = 0, 0, 1.0
    while at < frames:
        if left == 0:  # a new phrase, after a pause unless it is the first
            left, fall = int(rng.integers(3, 9)), rng.uniform(0.04, 0.08)
            accent = rng.uniform(1.1, 1.3)
            start = at
            at += frames_of(0.15, 0.5) if at else frames_of(0.02, 0.1)
            formants[start:at], pitch[start:at] = _VOWELS[5], accent
        onset = rng.choice(["none", "fricative", "stop"], p=[0.3, 0.4, 0.3])
        consonant = {"none": 0, "fricative": frames_of(0.05, 0.12), "stop": frames_of(0.04, 0.08)}[onset]
        vowel = frames_of(0.09, 0.24)
        target = _VOWELS[rng.integers(len(_VOWELS))]
        span, begin = slice(at, at + consonant + vowel), at + consonant
        formants[span], pitch[span] = target, accent * rng.uniform(0.95, 1.1)
        if onset == "fricative":
            hiss[at:begin], centre[span] = rng.uniform(0.1, 0.5), rng.uniform(2500, 6500)
        elif onset == "stop":
            hiss[begin - 1 : begin + 1], centre[span] = rng.uniform(0.3, 0.8), rng.uniform(1500, 4500)
        voiced[begin : span.stop] = rng.uniform(0.6, 1.0)
        at, left, accent = span.stop, left - 1, accent * (1 - fall)

    glide = np.hanning(11)[1:-1]  # articulators need some 40 ms
    jitter = 1 + 0.01 * rng.standard_normal(frames)
    return (
        _smooth(voiced, glide[2:-2]),
        _smooth(hiss, np.hanning(5)[1:-1]),
        speaker.pitch * _smooth(pitch, glide) * jitter,
        speaker.tract * np.stack([_smooth(track, glide) for track in formants.T], axis=1),
        _smooth(centre, glide),
    )


def _smooth(track: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Weighted moving average that keeps length and ends."""
    edge = len(kernel) // 2
    return np.convolve(np.pad(track, edge, mode="edge"), kernel / kernel.sum(), mode="valid")


def _formant_filter(frequencies: np.ndarray, formants: np.ndarray) -> np.ndarray:
    """Response [frames, bins] of four resonances in a row, with the glottis' fall of 6 dB an octave above 150 Hz."""
    higher = 1 + (frequencies / 3500) ** 2  # stands for the formants above the fourth
    response = np.tile((higher / (1 + 1j * frequencies / 150)).astype(np.complex64), (len(formants), 1))
    squares = (formants.T**2).astype(np.float32)[:, :, None]
    for centres, bandwidth in zip(squares, _BANDWIDTHS, strict=True):
        response *= centres / (centres - np.complex64(frequencies**2 - 1j * frequencies * bandwidth))
    return response


def _blocks(samples: np.ndarray, frames: int) -> np.ndarray:
    """Windows [frames, 4 * hop] that start at every hop."""
    padded = np.pad(samples, (0, _WINDOW))
    return np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::_HOP][:frames]
