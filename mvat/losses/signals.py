"""Signals as the losses take them, and their spectra."""

import torch
from torch import Tensor

from mvat.kernels.checks import check_features

#: n_fft, hop and window length of MANNER's three STFTs, in samples at 16 kHz; they include the longest of all losses.
RESOLUTIONS = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))
#: Samples that the longest STFT needs to reflect its padding.
SHORTEST = max(n_fft for n_fft, _, _ in RESOLUTIONS) // 2 + 1


def as_clips(op: str, **signals: Tensor) -> list[Tensor]:
    """Signals [B, T] or [B, 1, T] as [B, T], all in float64 if one is, else in float32.

    ValueError unless all agree, there is a clip, and they are long enough to be reflected.
    """
    clips = []
    for name, signal in signals.items():
        is_flat = isinstance(signal, Tensor) and signal.dim() == 2
        check_features(op, name, signal, ("B", "T") if is_flat else ("B", "1", "T"))
        if not is_flat and signal.shape[1] != 1:
            raise ValueError(f"{op}: {name} must have shape [B, T] or [B, 1, T], got {list(signal.shape)}")
        clips.append(signal if is_flat else signal[:, 0])
    shapes = {name: list(signal.shape) for name, signal in signals.items()}
    if len({clip.shape for clip in clips}) > 1:
        raise ValueError(f"{op}: the signals must have one shape, got {shapes}")
    devices = {name: str(signal.device) for name, signal in signals.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(f"{op}: the signals must be on one device, got {devices}")
    if clips[0].shape[0] < 1 or clips[0].shape[1] < SHORTEST:
        raise ValueError(f"{op}: the signals must be at least one clip of {SHORTEST} samples, got {shapes}")
    dtype = torch.float64 if any(clip.dtype == torch.float64 for clip in clips) else torch.float32
    return [clip.to(dtype) for clip in clips]


def spectrum(x: Tensor, n_fft: int, hop: int, window_length: int, center: bool = True) -> Tensor:
    """The STFT of x [B, T], periodic Hann window, by default centred with reflect padding: [B, F, frames]."""
    window = torch.hann_window(window_length, dtype=x.dtype, device=x.device)
    return torch.stft(x, n_fft, hop, window_length, window, center, pad_mode="reflect", return_complex=True)


def power(spectrum: Tensor) -> Tensor:
    """The squared magnitude of a complex spectrum, of a finite gradient where it is zero."""
    return spectrum.real.square() + spectrum.imag.square()
