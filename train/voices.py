"""Prepare pairs of real voices in real noises, from the freely licensed recordings of a few Debian packages.

Speakers and noise recordings are never in two splits. Training noise is recorded, coloured, or babble of the training
voices; test noise is recorded, or shaped like and babbled by the validation voice, which training has not heard.
"""

import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from mvat import audio
from mvat.files import write_text
from train import manifest
from train.manifest import SAMPLE_RATE, Manifest
from train.mixing import (
    TEST_SNRS,
    TRAIN_SNRS,
    NoiseSource,
    babble,
    check_seed,
    coloured_noises,
    excerpt,
    high_pass,
    long_term_spectrum,
    minutes_by_split,
    row,
    speech_shaped,
    write_pairs,
)
from train.sources import (
    DEMO_PACKAGES,
    PACKAGE_SETS,
    SOURCES,
    Noise,
    SourceUnavailable,
    Voice,
    check_packages,
    fetch,
    unpack,
)

__all__ = [
    "DEMO_PACKAGES",
    "PACKAGE_SETS",
    "SOURCES",
    "SourceUnavailable",
    "default_cache",
    "prepare_voices",
    "speech_pieces",
]

_log = logging.getLogger(__name__)

# Tones, silence and monkeys among the prompts.
_NO_SPEECH = {
    "ascending-2tone",
    "beep",
    "beeperr",
    "confbridge-join",
    "confbridge-leave",
    "descending-2tone",
    "tt-monkeys",
}
_NOISE_SECONDS = 120  # of one file
_LONGEST = 6.0  # seconds of an utterance
_SHORTEST = 2.0


def prepare_voices(
    out: Path,
    *,
    train_minutes: float = 12.0,
    valid_minutes: float = 1.0,
    test_minutes: float = 2.0,
    train_snrs: Sequence[float] = TRAIN_SNRS,
    test_snrs: Sequence[float] = TEST_SNRS,
    seed: int = 0,
    packages: Sequence[str] = DEMO_PACKAGES,
    cache: Path | None = None,
    progress: bool = True,
) -> Manifest:
    """Download the packages, cut and join their prompts to utterances, mix them with noise, and note the licences.

    Args:
        out: New folder, or one that this function made with the same settings.
        train_minutes: Minutes of training pairs; where the voices are shorter, they return in other noise.
        valid_minutes: Minutes of validation pairs.
        test_minutes: Minutes of test pairs.
        train_snrs: Signal-to-noise ratios of the training and validation pairs, in dB.
        test_snrs: Those of the test pairs.
        seed: The same seed and package versions give the same files.
        packages: Names out of SOURCES; at least one voice for each split.
        cache: Folder for the downloads; by default mvat in the user's cache folder.
        progress: Show progress bars.

    Raises:
        ValueError: A package that is not in SOURCES, a split without a voice, a negative amount or seed, or SNRs that
            are not finite numbers.
        ManifestError: The folder is foreign, was made with other settings, or cannot be written.
        SourceUnavailable: A package cannot be downloaded or used. Nothing has been written to `out` then.
    """
    out = Path(out)
    packages = sorted(set(packages))
    check_packages(packages)
    silent = set(manifest.SPLITS) - {voice.split for name in packages for voice in SOURCES[name].voices}
    if silent:
        raise ValueError(f"the packages {', '.join(packages)} hold no voice for: {', '.join(sorted(silent))}")
    check_seed(seed)
    minutes = minutes_by_split(train_minutes, valid_minutes, test_minutes)
    if not (len(train_snrs) and len(test_snrs) and np.isfinite([*train_snrs, *test_snrs]).all()):
        raise ValueError(
            f"signal-to-noise ratios must be finite, at least one, not {list(train_snrs)}, {list(test_snrs)}"
        )
    snrs = {"train": list(train_snrs), "valid": list(train_snrs), "test": list(test_snrs)}
    settings = {"source": "voices", "packages": packages, "minutes": minutes, "snrs": snrs, "seed": seed}
    done = manifest.check_folder(out, settings)
    if done:
        return done

    files = fetch(packages, cache or default_cache(), progress)
    recordings = _Recordings()
    for name, file in files.items():
        recordings.add(name, file, progress)

    manifest.claim(out, settings)
    for name, text in recordings.copyrights.items():
        write_text(out / f"copyright-{name}.txt", text)
    write_text(out / "LICENSES.md", _licences(recordings.versions))
    splits = {}
    for index, split in enumerate(manifest.SPLITS):
        rng = np.random.default_rng([seed, index])
        noises = _noises(recordings, split)
        utterances = _utterances(rng, recordings.voices[split])
        splits[split] = write_pairs(out, split, minutes[split], snrs[split], utterances, noises, rng, progress)
    return manifest.save(out, "voices", splits, audio.resampler_name())


def default_cache() -> Path:
    """The folder for downloads: mvat in $XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mvat"


def speech_pieces(samples: np.ndarray) -> list[np.ndarray]:
    """Cut a recording at its pauses.

    Args:
        samples: Float32 [T] at 16 kHz.

    Returns:
        The stretches of speech of 0.15 to 6 s, with 0.1 s of what surrounds them, faded in and out.
    """
    hop = SAMPLE_RATE // 100
    frames = samples[: len(samples) // hop * hop].reshape(-1, hop)
    if not len(frames):
        return []
    levels = 10 * np.log10(np.mean(frames.astype(np.float64) ** 2, axis=1) + 1e-12)
    peak, floor = levels.max(), np.percentile(levels, 5)
    if peak < -50:
        return []
    speech = np.flatnonzero(levels > max(peak - 40, min(floor + 8, peak - 25)))
    runs = np.split(speech, np.flatnonzero(np.diff(speech) > 30) + 1)
    pieces = []
    for run in runs:
        if 15 <= run[-1] + 1 - run[0] <= _LONGEST * 100 - 20:
            piece = samples[max(0, run[0] - 10) * hop : (run[-1] + 11) * hop].copy()
            fade = np.linspace(0, 1, hop, dtype=np.float32)
            piece[:hop] *= fade
            piece[-hop:] *= fade[::-1]
            pieces.append(piece)
    return pieces


class _Recordings:
    """What the packages hold, decoded.

    Attributes:
        voices: Split -> speaker -> pieces of speech.
        noises: Split -> kind of noise -> recordings, high-passed.
        joined: Kinds of noise whose recordings follow one another.
        versions: Package -> version.
        copyrights: Package -> text of its copyright file.
    """

    def __init__(self) -> None:
        self.voices: dict[str, dict[str, list[np.ndarray]]] = {split: {} for split in manifest.SPLITS}
        self.noises: dict[str, dict[str, list[np.ndarray]]] = {split: {} for split in manifest.SPLITS}
        self.joined: set[str] = set()
        self.versions: dict[str, str] = {}
        self.copyrights: dict[str, str] = {}

    def add(self, package: str, file: Path, progress: bool) -> None:
        """Unpack a package and decode what is used of it.

        Raises:
            SourceUnavailable: It cannot be unpacked or decoded, or its voice is not there.
        """
        source = SOURCES[package]
        with tempfile.TemporaryDirectory(dir=file.parent) as name:
            folder = Path(name)
            version = unpack(file, folder)
            for voice in source.voices:
                pieces = _prompts(package, folder, voice, progress)
                self.voices[voice.split].setdefault(voice.speaker, []).extend(pieces)
            noises = {noise: found for noise in source.noises if (found := _noise(folder, noise))}
            if not source.voices and not noises:
                _log.warning("package %s %s holds none of its known recordings; left out", package, version)
                return
            for noise, found in noises.items():
                self.noises[noise.split].setdefault(noise.name, []).extend(found)
                if noise.joined:
                    self.joined.add(noise.name)
            notice = folder / "usr/share/doc" / package / "copyright"
            if not notice.is_file():
                raise SourceUnavailable(f"package {package} {version} has no copyright file to go by")
            self.copyrights[package] = notice.read_text(encoding="utf-8", errors="replace")
            self.versions[package] = version


def _prompts(package: str, folder: Path, voice: Voice, progress: bool) -> list[np.ndarray]:
    """Pieces of speech of one voice of a package."""
    from tqdm import tqdm

    found = {file for pattern in voice.files for file in folder.rglob(pattern)}
    files = sorted(file for file in found if file.is_file() and not file.is_symlink())
    files = [file for file in files if file.stem not in _NO_SPEECH and file.parent.name != "silence"]
    bar = tqdm(files, desc=f"decoding {voice.speaker}", unit="file", disable=None if progress else True)
    pieces = [piece for file in bar for piece in speech_pieces(_decode(file))]
    if not pieces:
        raise SourceUnavailable(f"package {package} holds no speech of {voice.speaker} here")
    return pieces


def _noise(folder: Path, noise: Noise) -> list[np.ndarray]:
    """Recordings of one kind of noise, without what cannot be heard."""
    files = sorted(file for pattern in noise.files for file in folder.rglob(pattern))
    recordings = (_decode(file, _NOISE_SECONDS) for file in files)
    return [high_pass(recording) for recording in recordings if np.any(recording)]


def _decode(file: Path, seconds: float = float("inf")) -> np.ndarray:
    """Decode the beginning of a file to float32 [T], mono at 16 kHz.

    Raises:
        SourceUnavailable: It cannot be decoded.
    """
    av = audio.require("av")
    blocks: list[np.ndarray] = []
    try:
        with av.open(str(file), format="g722" if file.suffix == ".g722" else None) as container:
            rate = container.streams.audio[0].rate
            mono = av.AudioResampler(format="flt", layout="mono", rate=rate)
            length = 0
            for frame in container.decode(audio=0):
                blocks += [out.to_ndarray()[0] for out in mono.resample(frame)]
                length += frame.samples
                if length >= seconds * rate:
                    break
    except (av.FFmpegError, IndexError) as error:
        raise SourceUnavailable(f"{file.name}: cannot be decoded ({error})") from error
    return audio.resample(np.concatenate(blocks), rate, SAMPLE_RATE) if blocks else np.zeros(0, np.float32)


def _utterances(rng: np.random.Generator, voices: dict[str, list[np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """Endless utterances; speakers share the time by the square root of how much there is of them.

    So a long recording is heard more than a short one, which does not return too often, yet does not drown it. Taking
    the speakers in turn instead could tie them to kinds of noise, which come in turn.
    """
    endless = {speaker: _joined(rng, pieces) for speaker, pieces in voices.items()}
    shares = {speaker: sum(map(len, pieces)) ** 0.5 for speaker, pieces in voices.items()}
    spoken = dict.fromkeys(voices, 0.0)
    while True:
        speaker = min(spoken, key=spoken.__getitem__)
        utterance = next(endless[speaker])
        spoken[speaker] += len(utterance) / shares[speaker]
        yield speaker, utterance


def _joined(rng: np.random.Generator, pieces: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Join pieces, each with its own short pauses, to utterances of 2 to 6 s; in a new order when all were used."""
    row: list[np.ndarray] = []
    wanted = _SHORTEST
    while True:
        for index in rng.permutation(len(pieces)):
            seconds = sum(map(len, row)) / SAMPLE_RATE
            full = seconds + len(pieces[index]) / SAMPLE_RATE > _LONGEST
            done = seconds >= (_SHORTEST if full else wanted)
            if done:
                yield np.concatenate(row)
                wanted = rng.uniform(_SHORTEST, _LONGEST - 1)
            if done or full:
                row = []
            row.append(pieces[index])


def _noises(recordings: _Recordings, split: str) -> dict[str, NoiseSource]:
    """The kinds of noise of a split."""

    def recorded(files: list[np.ndarray]) -> NoiseSource:
        return lambda rng, frames: excerpt(rng, files[rng.integers(len(files))], frames)

    def voices_of(name: str) -> list[np.ndarray]:
        return [piece for pieces in recordings.voices[name].values() for piece in pieces]

    def joined(files: list[np.ndarray]) -> NoiseSource:
        return lambda rng, frames: excerpt(rng, row(rng, files, frames), frames)

    noises = {
        name: joined(files) if name in recordings.joined else recorded(files)
        for name, files in sorted(recordings.noises[split].items())
    }
    if split != "valid":  # the validation voice alone is left for babble, and it is the one that speaks
        voices = voices_of("train" if split == "train" else "valid")
        spectrum = long_term_spectrum(np.concatenate(voices))
        noises |= {"babble": partial(babble, voices=voices), "speech-shaped": partial(speech_shaped, spectrum=spectrum)}
    return noises if split == "test" else noises | coloured_noises()


def _licences(versions: dict[str, str]) -> str:
    """The table of sources, licences and changes."""
    rows = []
    for package, version in versions.items():
        source = SOURCES[package]
        if source.voices:
            used = ", ".join(f"voice of {voice.split} ({voice.speaker})" for voice in source.voices)
            used += ", babble" if any(voice.split != "test" for voice in source.voices) else ""
            change = "decoded to 16 kHz, cut at pauses, joined to utterances of 2 to 6 s, levelled, mixed with noise"
        else:
            used = ", ".join(f"noise of {noise.split} ({noise.name})" for noise in source.noises)
            change = "decoded, made mono, resampled to 16 kHz, high-passed at 60 Hz, excerpts mixed with speech"
        rows.append(f"| {package} | {version} | {source.licence} | {source.credit} | {used} | {change} |")
    return "\n".join(
        [
            "# Sources and licences",
            "",
            "The recordings come from Debian packages, whose copyright files lie beside this one with the full terms.",
            "Noisy files combine recordings and so carry the licences of all they are made of. White, pink, brown and",
            "speech-shaped noises are synthetic; the last has the spectrum of a voice.",
            "",
            "| package | version | licence | attribution | used as | what was done |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )
