"""Training examples that are mixed while they are read: clean speech, noise and room impulse responses at random.

Only the excerpts that are needed are read, at any rate and number of channels. All arrays are float32 [T] at 16 kHz.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from mvat import audio
from mvat.audio import SAMPLE_RATE
from train.manifest import Recording
from train.mixing import active_rms, reverberate
from train.tempo import change_tempo

__all__ = ["LEVEL", "PEAK", "REVERB_SHARE", "SNR", "Mixer", "Mixture", "Mixtures"]

SNR = (-5.0, 20.0)
"""Range of the signal-to-noise ratio in dB. The DNS challenge's synthesizer came with 0 to 40 dB, later -5 to 25 dB;
its synthetic test set has 0 to 20 dB."""
LEVEL = (-35.0, -15.0)
"""Range of a mixture's level in dB of full scale (RMS), the DNS challenge's."""
REVERB_SHARE = 0.5
"""Share of the mixtures with reverberation, where there are impulse responses."""
PEAK = 0.99
"""No sample of a mixture or its clean track is larger: louder mixtures are turned down, both tracks alike."""
PAUSE = 0.2
"""Seconds between two recordings of clean speech that are joined, the DNS challenge's."""
SHORTEST_PIECE = 0.5
"""Seconds: what is left of a joined row of recordings stays silent below this."""
SILENCE = -60.0
"""Excerpts whose active parts are below this level, in dB of full scale, are drawn again."""
TRIES = 20
"""Excerpts that are silent or cannot be read, one after the other, before mixing gives up."""


class Mixture(NamedTuple):
    """A clean track and its noisy version, [T] each, and what they are made of."""

    clean: np.ndarray
    noisy: np.ndarray
    speaker: str
    noise: str
    snr: float


class Mixer:
    """Draws mixtures from recordings, each recording of a role as likely as any other.

    A recording of speech that is shorter than the mixture is followed by others of its group, brought to its level.
    The clean track is speech as recorded or, with reverberation, the direct sound and the reflections that arrive
    within 50 ms of it; the noisy one has the whole reverberation. The signal-to-noise ratio is that of the speech in
    the noisy track to the noise, over the active parts of each (`active_rms`).

    Args:
        clean, noise, rirs: the recordings; rirs, room impulse responses, may be empty.
        snr: range in dB.
        level: range of the noisy track's RMS in dB of full scale.
        reverb_share: share of the mixtures with reverberation; None is REVERB_SHARE where there are impulse responses.
        tempo: lowest and highest tempo of the speech.
        tempo_share: share of the mixtures whose tempo is changed.

    Raises:
        ValueError: no clean speech, no noise, or a range or share that is none.
    """

    def __init__(
        self,
        clean: Sequence[Recording],
        noise: Sequence[Recording],
        rirs: Sequence[Recording] = (),
        *,
        snr: tuple[float, float] = SNR,
        level: tuple[float, float] = LEVEL,
        reverb_share: float | None = None,
        tempo: tuple[float, float] = (1.0, 1.0),
        tempo_share: float = 0.0,
    ) -> None:
        for name, files in (("clean speech", clean), ("noise", noise)):
            if not files:
                raise ValueError(f"there is no {name} to mix")
        for name, bounds in (("snr", snr), ("level", level)):
            if not -math.inf < bounds[0] <= bounds[1] < math.inf:
                raise ValueError(f"{name} must be a range in dB, lowest first, got {list(bounds)}")
        if level[1] > 0:
            raise ValueError(f"level must be at most 0 dB of full scale, got {list(level)}")
        if not 0 < tempo[0] <= tempo[1]:
            raise ValueError(f"tempo must be a positive range, lowest first, got {list(tempo)}")
        if reverb_share is None:
            reverb_share = REVERB_SHARE if rirs else 0.0
        for name, share in (("reverb_share", reverb_share), ("tempo_share", tempo_share)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {share}")
        if reverb_share and not rirs:
            raise ValueError(f"reverb_share {reverb_share} needs impulse responses, and there are none")
        self.clean, self.noise, self.rirs = clean, noise, rirs
        self.snr, self.level, self.reverb_share = snr, level, reverb_share
        self.tempo, self.tempo_share = tempo, 0.0 if tempo[0] == tempo[1] == 1 else tempo_share
        self._groups: dict[str, list[Recording]] = {}
        for recording in clean:
            self._groups.setdefault(recording.group, []).append(recording)

    def draw(self, rng: np.random.Generator, frames: int) -> Mixture:
        """A mixture of this many samples, a function of the generator's state.

        Raises:
            ValueError: too many excerpts in a row are silent or cannot be read; the last one is named.
        """
        tempo = rng.uniform(*self.tempo) if rng.random() < self.tempo_share else 1.0
        dry, speaker = self._speech(rng, math.ceil(frames * tempo))
        if tempo != 1:
            dry = change_tempo(dry, tempo)[:frames]
        noise, kind = self._noise(rng, frames)
        speech = clean = dry
        if rng.random() < self.reverb_share:
            speech, clean = reverberate(dry, self._response(rng, frames))
        snr = rng.uniform(*self.snr)
        noisy = speech + noise * np.float32(active_rms(speech) / active_rms(noise) * 10 ** (-snr / 20))
        rms = math.sqrt(np.mean(np.square(noisy, dtype=np.float64)))
        peak = max(float(np.abs(track).max()) for track in (clean, noisy))
        gain = np.float32(min(10 ** (rng.uniform(*self.level) / 20) / rms, PEAK / peak))
        return Mixture(clean * gain, noisy * gain, speaker, kind, snr)

    def _speech(self, rng: np.random.Generator, frames: int) -> tuple[np.ndarray, str]:
        """One voice: an excerpt of a long recording, or several short ones with pauses; and who speaks."""
        row = np.zeros(frames, np.float32)
        filled, among = 0, self.clean
        while filled == 0 or frames - filled >= SHORTEST_PIECE * SAMPLE_RATE:
            recording, piece = _excerpt(rng, among, frames - filled)
            if filled == 0:
                group = self._groups[recording.group]
                among = group if len(group) > 1 else self.clean
                speaker = recording.group
            row[filled : filled + len(piece)] = piece
            filled += len(piece) + round(PAUSE * SAMPLE_RATE)
        return row, speaker

    def _noise(self, rng: np.random.Generator, frames: int) -> tuple[np.ndarray, str]:
        """An excerpt of one recording, which starts over where it is too short; and what it is."""
        recording, piece = _excerpt(rng, self.noise, frames)
        if len(piece) < frames:
            piece = np.resize(np.roll(piece, rng.integers(len(piece))), frames)
        return piece, recording.group

    def _response(self, rng: np.random.Generator, frames: int) -> np.ndarray:
        """One channel of an impulse response, as much of it as is heard within an excerpt."""

        def read(recording: Recording) -> np.ndarray | None:
            wanted = min(recording.frames, math.ceil(2 * frames * recording.sample_rate / SAMPLE_RATE))
            samples, rate = audio.read(recording.path, 0, wanted)
            response = samples[rng.integers(len(samples))]
            return audio.resample(response, rate, SAMPLE_RATE) if response.any() else None

        return _usable(rng, self.rirs, read)[1]


class Mixtures(Dataset):
    """Training examples of one length. An item is asked for as (epoch, index) and is a function of these and the seed.

    Args:
        mixer: what draws them.
        length: in samples.
        examples: how many an epoch has.
        seed: of the draws.
    """

    def __init__(self, mixer: Mixer, length: int, examples: int, seed: int = 0) -> None:
        if length < 1 or examples < 1:
            raise ValueError(f"mixtures need a positive length and number, got {length} samples and {examples}")
        self.mixer, self.length, self.examples, self.seed = mixer, length, examples, seed

    def __len__(self) -> int:
        return self.examples

    def __getitem__(self, item: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(clean, noisy), each [1, length], float32."""
        epoch, index = item
        mixture = self.mixer.draw(np.random.default_rng((self.seed, epoch, index)), self.length)
        return torch.from_numpy(mixture.clean)[None], torch.from_numpy(mixture.noisy)[None]


def _excerpt(rng: np.random.Generator, recordings: Sequence[Recording], frames: int) -> tuple[Recording, np.ndarray]:
    """A random part of a random recording, or all of a shorter one; its channels' mean with an active RMS of 1."""

    def read(recording: Recording) -> np.ndarray | None:
        wanted = min(recording.frames, math.ceil(frames * recording.sample_rate / SAMPLE_RATE))
        samples, rate = audio.read(recording.path, int(rng.integers(recording.frames - wanted + 1)), wanted)
        part = audio.resample(samples.mean(0), rate, SAMPLE_RATE)[:frames]
        rms = active_rms(part)
        return part / np.float32(rms) if rms > 10 ** (SILENCE / 20) else None

    return _usable(rng, recordings, read)


def _usable(
    rng: np.random.Generator, recordings: Sequence[Recording], read: Callable[[Recording], np.ndarray | None]
) -> tuple[Recording, np.ndarray]:
    """A random recording and what `read` gives of it, drawn again where that is None or the file cannot be read."""
    for _ in range(TRIES):
        recording = recordings[int(rng.integers(len(recordings)))]
        reason = f"{recording.path}: is silent"
        try:
            samples = read(recording)
        except audio.AudioError as error:
            reason = str(error)
            warnings.warn(f"{error}; another recording is drawn", stacklevel=2)
            continue
        if samples is not None:
            return recording, samples
    raise ValueError(f"{TRIES} recordings drawn in a row are silent or cannot be read, the last: {reason}")
