"""Enhance audio with a model: arrays, tensors or files, at any sample rate and with any number of channels."""

import os
from numbers import Integral
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn

from mvat.audio import SAMPLE_RATE, read, resample

__all__ = ["enhance"]

#: More are a mistake, most likely samples taken for channels, and crash the resampler.
MOST_CHANNELS = 1024


@overload
def enhance(audio: Tensor, model: nn.Module, sample_rate: int | None = None) -> Tensor: ...
@overload
def enhance(
    audio: np.ndarray | str | os.PathLike[str], model: nn.Module, sample_rate: int | None = None
) -> np.ndarray: ...
def enhance(audio: Any, model: nn.Module, sample_rate: int | None = None) -> Any:
    """Remove the noise from a recording.

    Every channel is enhanced on its own (our definition). Audio at another rate than 16 kHz is resampled to it and
    back, which leaves nothing above 8 kHz. Silence stays silence.

    Args:
        audio: Array or tensor [T] or [channels, T], floating point, full scale at 1; or the path of a file.
        model: A `mvat.models.Manner` for one channel, in evaluation mode, or any module that takes and gives
            [B, 1, T] at 16 kHz. It runs on its own device and in its own precision.
        sample_rate: Samples a second of an array or tensor, 16000 where none is given. A file tells its own.

    Returns:
        The enhanced audio, of the input's shape and sample rate: an array of its dtype for an array, a tensor of its
        dtype on its device for a tensor, a float32 array [channels, T] at the file's rate for a path.

    Raises:
        TypeError: The audio is neither, or not floating point; the model is no module; the rate is no integer.
        ValueError: The audio is empty, of another shape, or holds NaN or infinity; the rate is not positive, or given
            beside a path; the model is in training mode, or gives another shape or NaN. For a file
            `mvat.audio.AudioError`, which names it.
    """
    _check_model(model)
    if isinstance(audio, str | os.PathLike):
        if sample_rate is not None:
            raise ValueError(f"enhance: sample_rate must not be given with a path, {os.fspath(audio)} tells its own")
        audio, sample_rate = read(audio)
    rate = _checked_rate(SAMPLE_RATE if sample_rate is None else sample_rate)
    _check_samples(audio)

    if isinstance(audio, Tensor):
        samples = audio.detach()
    else:
        # PyTorch takes neither every numpy dtype nor negative strides.
        samples = torch.from_numpy(np.ascontiguousarray(audio, np.float64 if audio.itemsize > 4 else np.float32))
    length = samples.shape[-1]
    at_16k = _resampled(samples.reshape(-1, length), rate, SAMPLE_RATE, max(1, round(length * SAMPLE_RATE / rate)))
    enhanced = _resampled(_run(model, at_16k), SAMPLE_RATE, rate, length).reshape(samples.shape)
    if not torch.isfinite(enhanced).all():
        raise ValueError("enhance: the model's output holds NaN or infinity; is the audio in [-1, 1]?")
    if isinstance(audio, Tensor):
        return enhanced.to(audio.device, audio.dtype)
    return enhanced.cpu().numpy().astype(audio.dtype, copy=False)


def _run(model: nn.Module, audio: Tensor) -> Tensor:
    """The model on audio [channels, T] at 16 kHz, one channel at a time, which keeps the memory to that of one."""
    like = next(model.parameters(), audio)
    results = []
    with torch.inference_mode():
        for channel in audio.to(like.device, like.dtype):
            x = channel[None, None]
            y = model(x)
            if not isinstance(y, Tensor) or y.shape != x.shape:
                given = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
                raise ValueError(f"enhance: the model must give {list(x.shape)} for {list(x.shape)}, it gave {given}")
            results.append(y[0, 0])
    # Stacked outside inference mode, the result is a tensor that autograd accepts.
    return torch.stack(results)


def _resampled(samples: Tensor, rate_in: int, rate_out: int, length: int) -> Tensor:
    """Samples [channels, T] at another rate, cut or padded with zeros to exactly [channels, length]."""
    if rate_in == rate_out:
        return samples
    result = torch.from_numpy(resample(samples.float().cpu().numpy(), rate_in, rate_out))[:, :length]
    return nn.functional.pad(result, (0, length - result.shape[1]))


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
    if rate <= 0:
        raise ValueError(f"enhance: sample_rate must be positive, got {rate}")
    return int(rate)


def _check_samples(audio: object) -> None:
    if not isinstance(audio, Tensor | np.ndarray):
        raise TypeError(f"enhance: audio must be an array, a tensor or a path, got {type(audio).__name__}")
    if isinstance(audio, Tensor):
        floating = audio.is_floating_point()
    else:
        floating = np.issubdtype(audio.dtype, np.floating)
    if not floating:
        raise TypeError(
            f"enhance: audio must be floating point in [-1, 1], got {audio.dtype}; scale it (int16: audio / 32768)"
        )
    if audio.ndim not in (1, 2) or 0 in audio.shape:
        raise ValueError(f"enhance: audio must be [T] or [channels, T] and not empty, got shape {list(audio.shape)}")
    if audio.ndim == 2 and audio.shape[0] > min(MOST_CHANNELS, max(audio.shape[1], 16)):
        raise ValueError(
            f"enhance: audio must be [channels, T], got {list(audio.shape)}: {audio.shape[0]} channels; transpose it"
        )
    finite = torch.isfinite(audio) if isinstance(audio, Tensor) else np.isfinite(audio)
    if not finite.all():
        raise ValueError("enhance: audio holds NaN or infinity")
