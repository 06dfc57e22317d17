"""Training examples: segments of pairs of clean and noisy recordings, in an order fixed by seed and epoch."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from mvat.audio import SAMPLE_RATE
from train.mixing import coloured, rms
from train.tempo import change_speed, change_tempo

#: Root mean square below which a noise is not worth making louder: 80 dB below full scale.
SILENT = 1e-4
#: Lowest and highest level of a recording's own hiss, dB to its speech.
HISS = (-60.0, -30.0)
#: Standard deviation of a microphone's gain, dB.
FILTER = 3.0


class Pair(NamedTuple):
    """A clean recording and its noisy version, float32 [T] each, 16 kHz."""

    clean: np.ndarray
    noisy: np.ndarray


class Pairs(Protocol):
    """A set of pairs that can be read in part."""

    names: list[str]
    frames: list[int]

    def read(self, index: int, start: int = 0, frames: int = -1) -> Pair:
        """Samples start .. start + frames of one pair; frames = -1 reads to the end."""


class ArrayPairs:
    """Pairs held in memory, as (name, clean, noisy)."""

    def __init__(self, pairs: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> None:
        self._pairs = [Pair(clean, noisy) for _, clean, noisy in pairs]
        self.names = [name for name, _, _ in pairs]
        self.frames = [len(pair.clean) for pair in self._pairs]

    def read(self, index: int, start: int = 0, frames: int = -1) -> Pair:
        end = None if frames < 0 else start + frames
        return Pair(*(track[start:end] for track in self._pairs[index]))


class FilePairs:
    """Pairs in files, as (name, clean path, noisy path, frames); parts are read without decoding the whole."""

    def __init__(self, entries: Sequence[tuple[str, Path, Path, int]]) -> None:
        self._paths = [(clean, noisy) for _, clean, noisy, _ in entries]
        self.names = [name for name, _, _, _ in entries]
        self.frames = [frames for _, _, _, frames in entries]

    def read(self, index: int, start: int = 0, frames: int = -1) -> Pair:
        from mvat import audio

        tracks = []
        for path in self._paths[index]:
            samples, rate = audio.read(path, start, frames)
            if rate != SAMPLE_RATE or samples.shape[0] != 1:
                raise audio.AudioError(
                    f"{path}: expected {SAMPLE_RATE} Hz mono, got {rate} Hz, {samples.shape[0]} channels"
                )
            tracks.append(samples[0])
        return Pair(*tracks)


class Segments(Dataset):
    """Training examples of one length. An item is asked for as (epoch, index) and is a function of these and the seed.

    A recording of F samples gives ceil((F - length) / stride) + 1 segments, at least one, that start inside it; what is
    missing at its end is filled with zeros. For a share of the segments the tempo of the clean track is changed and the
    noise added again, in part of them with the pitch, which makes another voice of it; for a share the noise is that of
    another segment, at the level of its own; for a share both tracks get a steady coloured hiss, so that a recording's
    own background is not taken for noise; for a share both are filtered, as if by another microphone.

    Args:
        pairs: the recordings.
        length, stride: in samples.
        tempo: lowest and highest tempo.
        tempo_share: share of the segments whose tempo is changed.
        pitch_share: share, of those, whose pitch changes with it.
        remix_share: share of the segments whose noise is another one's (Defossez et al., "Real time speech enhancement
            in the waveform domain", Interspeech 2020, who shuffle the noises of a batch).
        hiss_share: share of the segments with hiss, `HISS` dB to the clean track.
        filter_share: share of the segments that are filtered.
        seed: of the augmentation.
    """

    def __init__(
        self,
        pairs: Pairs,
        length: int,
        stride: int,
        tempo: tuple[float, float] = (1.0, 1.0),
        tempo_share: float = 0.0,
        pitch_share: float = 0.0,
        remix_share: float = 0.0,
        hiss_share: float = 0.0,
        filter_share: float = 0.0,
        seed: int = 0,
    ) -> None:
        if length < 1 or stride < 1:
            raise ValueError(f"segments need a positive length and stride, got {length} and {stride} samples")
        if not 0 < tempo[0] <= tempo[1]:
            raise ValueError(f"tempo must be a positive range, lowest first, got {tempo}")
        self.pairs, self.length, self.tempo, self.seed = pairs, length, tempo, seed
        self.tempo_share = 0.0 if tempo[0] == tempo[1] == 1 else tempo_share
        self.pitch_share, self.remix_share = pitch_share, remix_share
        self.hiss_share, self.filter_share = hiss_share, filter_share
        self._places = [
            (i, k * stride)
            for i, frames in enumerate(pairs.frames)
            for k in range(max(math.ceil((frames - length) / stride), 0) + 1)
            if k * stride < frames
        ]
        if not self._places:
            raise ValueError("there are no recordings to train on")

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, item: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(clean, noisy), each [1, length], float32."""
        epoch, index = item
        recording, start = self._places[index]
        rng = np.random.default_rng((self.seed, epoch, index))
        changed = rng.random() < self.tempo_share
        tempo = rng.uniform(*self.tempo) if changed else 1.0
        available = self.pairs.frames[recording] - start
        clean, noisy = self.pairs.read(recording, start, min(math.ceil(self.length * max(tempo, 1)), available))
        shares = (self.pitch_share, self.remix_share, self.hiss_share, self.filter_share)
        pitched, remixed, hissing, filtered = (rng.random() < share for share in shares)
        if not (changed or remixed or hissing or filtered):
            return self._tensor(clean), self._tensor(noisy)
        noise = (noisy - clean)[: self.length]
        if changed:
            clean = change_speed(clean, tempo) if pitched else change_tempo(clean, tempo)
        clean = clean[: self.length]
        # A slower clean track is longer than its noise, which then starts over.
        noise = np.resize(noise, clean.shape)
        if remixed:
            noise = self._another_noise(rng, noise)
        if hissing:
            gain = 10 ** (rng.uniform(*HISS) / 20) * rms(clean)
            clean = clean + np.float32(gain) * coloured(rng, len(clean), rng.uniform(0, 2))
        if filtered:
            clean, noise = _through_a_microphone(rng, clean, noise)
        return self._tensor(clean), self._tensor(clean + noise)

    def _another_noise(self, rng: np.random.Generator, noise: np.ndarray) -> np.ndarray:
        """The noise of a segment drawn from all, at the level of this one; this one where that is shorter or silent."""
        recording, start = self._places[rng.integers(len(self._places))]
        if self.pairs.frames[recording] - start < len(noise):
            return noise
        clean, noisy = self.pairs.read(recording, start, len(noise))
        other = noisy - clean
        level = rms(other)
        return noise if level < SILENT else other * np.float32(rms(noise) / level)

    def _tensor(self, samples: np.ndarray) -> torch.Tensor:
        padded = np.zeros((1, self.length), np.float32)
        samples = samples[: self.length]
        padded[0, : len(samples)] = samples
        return torch.from_numpy(padded)


def _through_a_microphone(rng: np.random.Generator, *tracks: np.ndarray) -> Iterator[np.ndarray]:
    """Tracks of one length through a filter whose gain in dB is smooth over the octaves, `FILTER` its deviation."""
    octaves = np.log2(np.maximum(np.fft.rfftfreq(len(tracks[0]), 1 / SAMPLE_RATE), 62.5) / 62.5)  # 0 to 7
    gain = np.interp(octaves, range(8), FILTER * rng.standard_normal(8))
    for track in tracks:
        spectrum = np.fft.rfft(track) * 10 ** (gain / 20)
        yield np.fft.irfft(spectrum, len(track)).astype(np.float32)


class EpochSampler(Sampler):
    """(epoch, index) of every example, in an order given by seed and epoch alone."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed, self.epoch = length, seed, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        return iter([(self.epoch, int(i)) for i in order])
