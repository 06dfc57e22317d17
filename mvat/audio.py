"""Audio files: inspect, read, write and resample, whole or block by block; one clear error for what cannot be used.

Samples are float32 in [-1, 1]. soundfile and soxr are imported when a function needs them.
"""

import importlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from mvat.files import replacing

__all__ = [
    "SAMPLE_RATE",
    "AudioError",
    "AudioInfo",
    "blocks",
    "info",
    "kept_subtype",
    "read",
    "require",
    "resample",
    "resample_blocks",
    "resampler_name",
    "write",
    "writing",
]

SAMPLE_RATE = 16000
#: More are a mistake, most likely samples taken for channels, and crash the resampler; libsndfile writes no more.
MOST_CHANNELS = 1024

_FORMATS = {".wav": "WAV", ".flac": "FLAC"}
_PCM_BITS = {"PCM_U8": 8, "PCM_S8": 8, "PCM_16": 16, "PCM_24": 24, "PCM_32": 32}
_WAV_DATA = re.compile(r"^data : (\d+) \(should be (\d+)\)", re.MULTILINE)
#: Sample formats whose length is exact; a file of another one (ADPCM and the like) is written as 16 bit.
_EXACT = (*_PCM_BITS, "FLOAT", "DOUBLE", "ULAW", "ALAW")
#: Bytes of samples that fit into a WAV; more take an RF64, which is a WAV with 64-bit lengths.
_WAV_MOST = 2**32 - 2**16
# A program that writes WAV into a pipe cannot know the length and declares about 2 or 4 GiB.
_WAV_UNKNOWN = 0x7FFFF000


class AudioError(ValueError):
    """A file that cannot be used as audio; the message is ``<path>: <reason>``."""


class AudioInfo(NamedTuple):
    """What the header of an audio file says.

    Attributes:
        path: The file.
        sample_rate: Samples a second.
        channels: Number of channels.
        frames: Samples a channel.
        format: Container, such as "WAV" or "FLAC".
        subtype: Sample format, such as "PCM_16" or "FLOAT".
    """

    path: Path
    sample_rate: int
    channels: int
    frames: int
    format: str
    subtype: str


def require(name: str) -> ModuleType:
    """Import an optional package.

    Raises:
        ModuleNotFoundError: It is not installed; the message is the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{name} is needed for audio files: pip install {name}", name=name) from error


def info(path: str | os.PathLike[str]) -> AudioInfo:
    """Read the header of an audio file.

    Raises:
        AudioError: The file is missing, no audio, empty, or a WAV cut short.
    """
    with _opened(path) as file:
        return AudioInfo(Path(path), file.samplerate, file.channels, file.frames, file.format, file.subtype)


def read(path: str | os.PathLike[str], start: int = 0, frames: int = -1) -> tuple[np.ndarray, int]:
    """Read an audio file, or a part of it.

    Args:
        path: A file in any format that libsndfile knows.
        start: First frame.
        frames: Number of frames; -1 reads to the end.

    Returns:
        Samples, float32 [channels, T], and the sample rate.

    Raises:
        AudioError: The file is missing, no audio, empty, corrupt, cut short, holds NaN or infinity, or is too short
            for the part asked for.
    """
    with _opened(path) as file:
        count = file.frames - start if frames < 0 else frames
        if start < 0 or count < 1 or start + count > file.frames:
            raise AudioError(f"{path}: frames {start} to {start + count} asked for, the file has {file.frames}")
        return _decoded(file, path, start, count), file.samplerate


def blocks(path: str | os.PathLike[str], frames: int = 2**18) -> Iterator[np.ndarray]:
    """Read an audio file block by block.

    Args:
        path: As for `read`.
        frames: Frames of every block but the last.

    Yields:
        Samples, float32 [channels, T], T <= frames.

    Raises:
        AudioError: As `read` does, at the block that cannot be read.
    """
    with _opened(path) as file:
        for start in range(0, file.frames, frames):
            yield _decoded(file, path, start, min(frames, file.frames - start))


def write(path: str | os.PathLike[str], samples: np.ndarray, rate: int, subtype: str = "PCM_16") -> None:
    """Write an audio file under a temporary name beside, then rename it.

    Integer formats are rounded to the nearest step and limited, never wrapped; 16-bit samples that were read are
    written back bit for bit.

    Args:
        path: A file ending in .wav or .flac.
        samples: Floating point, [T] or [channels, T].
        rate: Samples a second.
        subtype: libsndfile's name of the sample format.

    Raises:
        AudioError: Another suffix, a sample format the container lacks, a rate that is no positive integer, more than
            1024 channels, no samples, NaN or infinity, another shape, or a folder that is missing or unwritable.
        TypeError: The samples are not floating point.
    """
    samples = np.asarray(samples)
    if not np.issubdtype(samples.dtype, np.floating):
        raise TypeError(f"{path}: samples must be floating point, not {samples.dtype}")
    if samples.ndim not in (1, 2) or samples.size == 0:
        raise AudioError(f"{path}: samples must be [T] or [channels, T] and not empty, not {list(samples.shape)}")
    samples = np.atleast_2d(samples)
    with writing(path, rate, len(samples), samples.shape[1], subtype) as put:
        put(samples)


@contextmanager
def writing(
    path: str | os.PathLike[str], rate: int, channels: int, frames: int, subtype: str = "PCM_16"
) -> Iterator[Callable[[np.ndarray], None]]:
    """Write an audio file block by block, as `write` does: it has its name when the context is left, and not before.

    Args:
        path, rate, subtype: As for `write`.
        channels: Number of channels.
        frames: Samples a channel that will be written; a .wav becomes an RF64 where they need more than 4 GiB.

    Yields:
        A function that writes a block, floating point [channels, T].

    Raises:
        AudioError: As `write` does.
    """
    soundfile = require("soundfile")
    path = Path(path)
    container = _FORMATS.get(path.suffix.lower())
    if container is None:
        raise AudioError(f"{path}: can write .wav and .flac only")
    if not soundfile.check_format(container, subtype):
        raise AudioError(f"{path}: {container} cannot hold {subtype}")
    if not path.parent.is_dir():
        raise AudioError(f"{path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise AudioError(f"{path}: is a folder")
    if not _is_rate(rate):
        raise AudioError(f"{path}: the sample rate must be a positive integer, not {rate!r}")
    if channels > MOST_CHANNELS:
        raise AudioError(f"{path}: cannot hold {channels} channels, at most {MOST_CHANNELS}; samples are [channels, T]")
    bits = {"FLOAT": 32, "ULAW": 8, "ALAW": 8, **_PCM_BITS}.get(subtype, 64)
    if container == "WAV" and frames * channels * bits // 8 > _WAV_MOST:
        container = "RF64"

    def put(samples: np.ndarray) -> None:
        if not np.isfinite(samples).all():
            raise AudioError(f"{path}: the samples to write hold NaN or infinity")
        file.write(_quantise(samples, subtype).T)

    try:
        with (
            replacing(path) as part,
            soundfile.SoundFile(part, "w", rate, channels, subtype, format=container) as file,
        ):
            yield put
    except OSError as error:
        raise AudioError(f"{path}: cannot be written ({error.strerror or error})") from error
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{path}: cannot be written ({error.error_string})") from error


def kept_subtype(subtype: str, path: str | os.PathLike[str]) -> str:
    """The sample format to write to `path` what was read as `subtype`: that one, or the nearest the file can hold."""
    container = _FORMATS.get(Path(path).suffix.lower())
    if container and subtype in _EXACT and require("soundfile").check_format(container, subtype):
        return subtype
    return "PCM_24" if subtype in ("PCM_32", "FLOAT", "DOUBLE") else "PCM_16"


def resample(samples: np.ndarray, rate_in: int, rate_out: int) -> np.ndarray:
    """Resample along the last axis with soxr's best quality.

    Args:
        samples: Floating point, [..., T].
        rate_in: Rate of the samples.
        rate_out: Rate wanted.

    Returns:
        float32 [..., T'], T' = T * rate_out / rate_in rounded to the nearest integer.

    Raises:
        ValueError: A rate is no positive integer.
    """
    for name, rate in (("rate_in", rate_in), ("rate_out", rate_out)):
        if not _is_rate(rate):
            raise ValueError(f"resample: {name} must be a positive integer, not {rate!r}")
    samples = np.asarray(samples, dtype=np.float32)
    if rate_in == rate_out:
        return samples
    flat = samples.reshape(-1, samples.shape[-1])
    result = require("soxr").resample(np.ascontiguousarray(flat.T), rate_in, rate_out, quality="VHQ")
    return np.ascontiguousarray(result.T).reshape(*samples.shape[:-1], -1)


def resample_blocks(blocks: Iterable[np.ndarray], rate_in: int, rate_out: int, length: int) -> Iterator[np.ndarray]:
    """Resample block by block; the blocks' sum is what `resample` gives, bit for bit, but for its length.

    Args:
        blocks: Floating point [channels, T], one after the other.
        rate_in: Rate of the samples.
        rate_out: Rate wanted.
        length: Samples a channel to give: what is more is cut, what is less is filled with zeros.

    Yields:
        float32 [channels, T'].
    """
    stream, left = None, length
    for block in blocks:
        if stream is None:
            stream = require("soxr").ResampleStream(rate_in, rate_out, len(block), dtype="float32", quality="VHQ")
        flat = np.ascontiguousarray(block.T, dtype=np.float32)
        result = stream.resample_chunk(flat)[:left]
        left -= len(result)
        yield np.ascontiguousarray(result.T)
    if stream is not None:
        result = stream.resample_chunk(flat[:0], last=True)[:left]
        yield np.ascontiguousarray(np.pad(result, ((0, left - len(result)), (0, 0))).T)


def resampler_name() -> str:
    """Name, quality and version of the resampler, for manifests."""
    return f"soxr VHQ {require('soxr').__version__}"


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """A soundfile.SoundFile whose header has been checked; libsndfile's errors become AudioError."""
    soundfile = require("soundfile")
    if os.path.isdir(path):
        raise AudioError(f"{path}: is a folder, expected an audio file")
    if not os.path.exists(path):
        raise AudioError(f"{path}: no such file")
    if os.path.getsize(path) == 0:
        raise AudioError(f"{path}: is empty")
    if not os.access(path, os.R_OK):  # to libsndfile one more unknown format
        raise AudioError(f"{path}: Permission denied")
    try:
        with soundfile.SoundFile(path) as file:
            # libsndfile shortens the data of a cut WAV silently and tells so in its log alone.
            cut = _WAV_DATA.search(file.extra_info)
            if cut and int(cut[2]) < int(cut[1]) < _WAV_UNKNOWN:
                raise AudioError(f"{path}: cut short, {cut[2]} of {cut[1]} bytes of samples are there")
            if file.frames < 1:
                raise AudioError(f"{path}: holds no samples")
            yield file
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{path}: no readable audio ({error.error_string})") from error
    except TypeError as error:  # soundfile's answer to headerless files such as .raw
        raise AudioError(f"{path}: no readable audio ({error})") from error


def _decoded(file: Any, path: str | os.PathLike[str], start: int, count: int) -> np.ndarray:
    """Frames of an open file, float32 [channels, count]."""
    try:
        if file.tell() != start:
            file.seek(start)
        samples = file.read(count, dtype="float32", always_2d=True)
    except require("soundfile").LibsndfileError as error:
        raise AudioError(f"{path}: corrupt or cut short ({error.error_string or 'decoding failed'})") from error
    if len(samples) != count:
        raise AudioError(f"{path}: cut short, {start + len(samples)} of {start + count} frames could be read")
    if not np.isfinite(samples).all():
        raise AudioError(f"{path}: holds NaN or infinite samples")
    return np.ascontiguousarray(samples.T)


def _is_rate(rate: object) -> bool:
    return isinstance(rate, Integral) and not isinstance(rate, bool) and int(rate) > 0


def _quantise(samples: np.ndarray, subtype: str) -> np.ndarray:
    """Round to the steps of an integer format, as int32 whose high bits libsndfile keeps; else leave as it is."""
    bits = _PCM_BITS.get(subtype)
    if bits is None:
        return samples
    steps = 2.0 ** (bits - 1)
    whole = np.clip(np.rint(samples * np.float64(steps)), -steps, steps - 1)
    return whole.astype(np.int32) << (32 - bits)
