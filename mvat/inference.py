"""Enhance audio with a model: arrays, tensors or files of any length, sample rate and number of channels."""

import os
from collections.abc import Callable, Iterable, Iterator
from math import inf
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor, nn

from mvat import audio as files
from mvat.audio import MOST_CHANNELS, SAMPLE_RATE
from mvat.models import Manner
from mvat.windows import around, cut, starts, through_windows

__all__ = ["enhance"]

#: What window="auto" means, in seconds: the longest recording that runs whole, and the windows of a longer one.
WHOLE, WINDOW = 30.0, 10.0
#: Samples a second: fewer hold no speech and would be worked on as 16000 all the same, more are a mistake.
LOWEST_RATE, HIGHEST_RATE = 1000, 10_000_000
#: The longest window that may be asked for, in seconds: a day.
MOST_WINDOW = 86400.0
#: The shortest one.
LEAST_WINDOW = 1.0
#: Windows that a GPU runs at once; a CPU is as fast with one.
BATCH = 8

_RATES = f"{LOWEST_RATE} to {HIGHEST_RATE}"

Name = str | os.PathLike[str]
Window = float | Literal["auto"] | None


@overload
def enhance(
    audio: Tensor,
    model: nn.Module,
    sample_rate: int | None = None,
    *,
    window: Window = "auto",
    progress: bool | None = None,
) -> Tensor: ...
@overload
def enhance(
    audio: np.ndarray | Name,
    model: nn.Module,
    sample_rate: int | None = None,
    *,
    window: Window = "auto",
    progress: bool | None = None,
) -> np.ndarray: ...
@overload
def enhance(
    audio: Name, model: nn.Module, *, out: Name, window: Window = "auto", progress: bool | None = None
) -> Path: ...
@overload
def enhance(
    audio: list[Any] | tuple[Any, ...],
    model: nn.Module,
    sample_rate: int | None = None,
    *,
    window: Window = "auto",
    progress: bool | None = None,
) -> list[Any]: ...
def enhance(
    audio: Any,
    model: nn.Module,
    sample_rate: int | None = None,
    *,
    out: Name | None = None,
    window: Window = "auto",
    progress: bool | None = None,
) -> Any:
    """Remove the noise from a recording, or from several.

    Every channel is enhanced on its own (our definition). Audio at another rate than 16 kHz is resampled to it and
    back, which leaves nothing above 8 kHz. Silence stays silence.

    A recording up to 30 s is given to the model whole. A longer one runs in windows of 10 s that overlap by 1.5 s or
    more and fade into each other: the time of attention over the whole would grow with the square of its length.

    A `mvat.Manner` divides its input by the input's standard deviation. A window is divided by that of the 30 s around
    it, so that the network hears noise in a pause at the level it has beside speech, and still follows a level that
    changes for good. Any other module, a compiled one too, gets its windows alone.

    Args:
        audio: Array or tensor [T] or [channels, T], floating point, full scale at 1; or the path of a file; or a list
            of those.
        model: A `mvat.Manner` for one channel, in evaluation mode, or any module that takes and gives [B, 1, T] at
            16 kHz and keeps the clips of a batch apart. It runs on its own device and in its own precision.
        sample_rate: Samples a second of an array or tensor, 16000 where none is given. A file tells its own.
        out: For a path, the .wav or .flac file to write, which is replaced where it exists. The file is read, enhanced
            and written block by block, so that memory does not grow with its length, and has its name only when it is
            whole. Sample rate, channels, length and, where the container holds it, sample format are the input's.
        window: Seconds of audio the model is given at once, at least 1; a recording up to that length runs whole. None:
            every recording runs whole. "auto": as above.
        progress: Whether to show a progress bar on stderr; None: on a terminal, when the work takes more than 3 s.

    Returns:
        The enhanced audio, of the input's shape and sample rate: an array of its dtype for an array, a tensor of its
        dtype on its device for a tensor, a float32 array [channels, T] at the file's rate for a path, a list of those
        for a list; with `out` the path of the file written.

    Raises:
        TypeError: The audio is none of these, or not floating point; the model is no module; the rate is no integer;
            `out` without a path, or an option of the wrong type.
        ValueError: The audio is empty, of another shape, or holds NaN or infinity; the rate is below 1000 or above 10
            million, or given beside a path; the window is too short; `out` is the input; the model is in training mode,
            or gives another shape or NaN. For a file `mvat.audio.AudioError`, which names it.
    """
    _check_model(model)
    _check_window(window)
    if progress is not None and not isinstance(progress, bool):
        raise TypeError(f"enhance: progress must be True, False or None, got {progress!r}")
    several = isinstance(audio, list | tuple)
    if out is not None and (several or not isinstance(audio, str | os.PathLike)):
        kind = "several recordings" if several else type(audio).__name__
        raise TypeError(f"enhance: out needs the path of one file as audio, got {kind}; mvat.audio.write writes arrays")
    if out is not None and not isinstance(out, str | os.PathLike):
        raise TypeError(f"enhance: out must be a path, got {type(out).__name__}")
    named = [(f"audio[{i}]", item) for i, item in enumerate(audio)] if several else [("audio", audio)]
    sources = [_source(name, item, sample_rate) for name, item in named]

    with _progress(sum(source.seconds for source in sources), progress) as bar:
        results = []
        for source in sources:
            pieces = _enhanced(source, model, window, bar.update)
            results.append(_collected(pieces, source) if out is None else _written(pieces, source, out))
    return results if several else results[0]


class _Source(NamedTuple):
    """Audio to enhance."""

    given: Any
    rate: int
    shape: tuple[int, ...]
    #: The samples in blocks, tensors [channels, T_i], as often as it is called.
    blocks: Callable[[], Iterator[Tensor]]

    @property
    def seconds(self) -> float:
        return self.shape[-1] / self.rate


def _source(name: str, audio: Any, sample_rate: int | None) -> _Source:
    if isinstance(audio, str | os.PathLike):
        if sample_rate is not None:
            raise ValueError(f"enhance: sample_rate must not be given with a path, {os.fspath(audio)} tells its own")
        header = files.info(audio)
        if not LOWEST_RATE <= header.sample_rate <= HIGHEST_RATE:
            raise files.AudioError(f"{header.path}: has {header.sample_rate} samples a second, expected {_RATES}")
        if header.channels > MOST_CHANNELS:
            raise files.AudioError(f"{header.path}: has {header.channels} channels, expected at most {MOST_CHANNELS}")
        shape = (header.channels, header.frames)
        return _Source(audio, header.sample_rate, shape, lambda: map(torch.from_numpy, files.blocks(audio)))
    rate = _checked_rate(SAMPLE_RATE if sample_rate is None else sample_rate)
    _check_samples(name, audio)
    if isinstance(audio, Tensor):
        samples = audio.detach()
    else:
        # PyTorch takes neither every numpy dtype nor negative strides.
        array = np.ascontiguousarray(audio, np.float64 if audio.itemsize > 4 else np.float32)
        samples = torch.from_numpy(array if array.flags.writeable else array.copy())
    return _Source(audio, rate, tuple(audio.shape), lambda: iter([samples.reshape(-1, samples.shape[-1])]))


def _enhanced(source: _Source, model: nn.Module, window: Window, update: Callable[[float], object]) -> Iterator[Tensor]:
    """The enhanced audio in blocks [channels, T_i], at the rate and of the length of the source."""
    length = max(1, round(source.seconds * SAMPLE_RATE))
    if window == "auto":
        size = length if length <= WHOLE * SAMPLE_RATE else round(WINDOW * SAMPLE_RATE)
    else:
        size = length if window is None else round(window * SAMPLE_RATE)

    def at_16k() -> Iterator[Tensor]:
        return _resampled(source.blocks(), source.rate, SAMPLE_RATE, length)

    like = next(model.parameters(), None)
    batch = BATCH if like is not None and like.is_cuda else 1
    scales = _scales(at_16k(), length, size) if size < length and isinstance(model, Manner) else None

    def run(windows: Tensor) -> Tensor:
        scale = None if scales is None else torch.cat([next(scales) for _ in windows])
        return _run(model, windows.flatten(0, 1), scale, batch).reshape(windows.shape)

    def followed() -> Iterator[Tensor]:
        channels = 1 if len(source.shape) == 1 else source.shape[0]
        for piece in through_windows(at_16k(), length, size, run, max(1, batch // channels)):
            yield piece
            update(piece.shape[1] / SAMPLE_RATE)

    return _resampled(followed(), SAMPLE_RATE, source.rate, source.shape[-1])


def _run(model: nn.Module, rows: Tensor, scale: Tensor | None, batch: int) -> Tensor:
    """The model on every row of audio [n, T] at 16 kHz, `batch` of them at once; float64 or float32 [n, T]."""
    like = next(model.parameters(), rows)
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    result = torch.zeros(rows.shape, dtype=dtype, device=like.device)
    # Silence stays silence, whatever biases would make of it.
    for some in rows.any(1).nonzero()[:, 0].to(like.device).split(batch):
        x = rows[some.to(rows.device), None].to(like.device, like.dtype)
        with torch.inference_mode():
            y = model(x) if scale is None else model(x, scale=scale[some.cpu(), None, None].to(x))
        if not isinstance(y, Tensor) or y.shape != x.shape:
            given = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"enhance: the model must give {list(x.shape)} for {list(x.shape)}, it gave {given}")
        if not torch.isfinite(y).all():
            raise ValueError("enhance: the model's output holds NaN or infinity; is the audio in [-1, 1]?")
        result[some] = y[:, 0].to(dtype)
    return result


def _scales(blocks: Iterable[Tensor], length: int, size: int) -> Iterator[Tensor]:
    """For every window the standard deviations of the audio around it, float64 [channels]."""
    span = max(size, min(length, round(WHOLE * SAMPLE_RATE)))
    for stretch in cut(blocks, around(starts(length, size), size, length, span), span):
        yield stretch.double().std(1)


def _resampled(blocks: Iterator[Tensor], rate_in: int, rate_out: int, length: int) -> Iterator[Tensor]:
    """Audio in blocks at another rate, exactly `length` samples a channel."""
    if rate_in == rate_out:
        return blocks
    arrays = (block.float().cpu().numpy() for block in blocks)
    return map(torch.from_numpy, files.resample_blocks(arrays, rate_in, rate_out, length))


def _collected(pieces: Iterable[Tensor], source: _Source) -> Any:
    """All pieces as one array or tensor, of what the source was given as."""
    result: Any
    if isinstance(source.given, Tensor):
        result = torch.empty(source.shape, dtype=source.given.dtype, device=source.given.device)
    else:
        dtype = source.given.dtype if isinstance(source.given, np.ndarray) else np.float32
        result = np.empty(source.shape, dtype)
    begin = 0
    for piece in pieces:
        part = result[..., begin : begin + piece.shape[1]]
        piece = piece.reshape(part.shape)
        part[...] = piece if isinstance(part, Tensor) else piece.cpu().numpy()
        begin += piece.shape[-1]
    return result


def _written(pieces: Iterable[Tensor], source: _Source, out: Name) -> Path:
    """The file with all pieces."""
    out = Path(out)
    if out.exists() and out.samefile(source.given):
        raise ValueError(f"enhance: out is the input, {out}; choose another file")
    subtype = files.kept_subtype(files.info(source.given).subtype, out)
    channels, frames = source.shape
    with files.writing(out, source.rate, channels, frames, subtype) as put:
        for piece in pieces:
            put(piece.cpu().numpy())
    return out


def _progress(seconds: float, progress: bool | None) -> Any:
    """A progress bar over seconds of audio."""
    from tqdm import tqdm

    return tqdm(
        total=seconds,
        desc="enhancing",
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s of audio [{elapsed}<{remaining}]",
        disable=None if progress is None else not progress,
        delay=3 if progress is None else 0,
        leave=None,
    )


def _check_window(window: object) -> None:
    if window is None or window == "auto":
        return
    if not isinstance(window, Real) or isinstance(window, bool):
        raise TypeError(f'enhance: window must be seconds, None or "auto", got {window!r}')
    try:
        seconds = float(window)
    except OverflowError:
        seconds = inf
    if not LEAST_WINDOW <= seconds <= MOST_WINDOW:
        raise ValueError(f"enhance: window must be {LEAST_WINDOW:g} to {MOST_WINDOW:g} seconds, got {window!r}")


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"enhance: model must be a module, got {type(model).__name__}; mvat.Manner.from_pretrained loads one"
        )
    if any(module.training for module in model.modules()):
        raise ValueError("enhance: the model is in training mode; call model.eval() first")


def _checked_rate(rate: object) -> int:
    if not isinstance(rate, Integral) or isinstance(rate, bool):
        raise TypeError(f"enhance: sample_rate must be an integer, got {rate!r}")
    if not LOWEST_RATE <= int(rate) <= HIGHEST_RATE:
        raise ValueError(f"enhance: sample_rate must be {_RATES}, got {rate}")
    return int(rate)


def _check_samples(name: str, audio: object) -> None:
    if not isinstance(audio, Tensor | np.ndarray):
        raise TypeError(f"enhance: {name} must be an array, a tensor or a path, got {type(audio).__name__}")
    if isinstance(audio, Tensor):
        floating = audio.is_floating_point()
    else:
        floating = np.issubdtype(audio.dtype, np.floating)
    if not floating:
        raise TypeError(
            f"enhance: {name} must be floating point in [-1, 1], got {audio.dtype}; scale it (int16: audio / 32768)"
        )
    if audio.ndim not in (1, 2) or 0 in audio.shape:
        raise ValueError(f"enhance: {name} must be [T] or [channels, T] and not empty, got shape {list(audio.shape)}")
    if audio.ndim == 2 and audio.shape[0] > min(MOST_CHANNELS, max(audio.shape[1], 16)):
        raise ValueError(
            f"enhance: {name} must be [channels, T], got {list(audio.shape)}: {audio.shape[0]} channels; transpose it"
        )
    finite = torch.isfinite(audio) if isinstance(audio, Tensor) else np.isfinite(audio)
    if not finite.all():
        raise ValueError(f"enhance: {name} holds NaN or infinity")
