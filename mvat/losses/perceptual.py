"""A loss for what is heard: the signal-to-noise ratio, compressed spectra, and the disturbance that PESQ measures."""

import torch
from torch import Tensor
from torch.nn import functional as F

from mvat.losses.bark import Bark, bark, filtered
from mvat.losses.signals import as_clips, power, spectrum

#: The exponent of compressed spectra, and what keeps its derivative finite where a spectrum is zero.
_COMPRESSION, _FLOOR = 0.3, 1e-6
#: The power that is added to a clip's own, 80 dB below a full scale of 1: what is quieter counts as silence.
_SILENCE = 1e-8
#: The level that is added to an estimate's, beside clean speech of unit power.
_QUIET = 1e-6


def perceptual_loss(estimate: Tensor, clean: Tensor, noisy: Tensor) -> Tensor:
    """An enhancement loss that teaches waveforms and hearing at once.

        0.04 * 10 log10(1 + 1000 |x - y|^2 / (|y|^2 + 0.01 |n|^2))
        + 0.9 mean (|X|^c - |Y|^c)^2 + 0.2 mean | |X|^c e^(i arg X) - |Y|^c e^(i arg Y) |^2,   c = 0.3
        + 0.4 `disturbance`(estimate, clean),   then the mean over the batch

    x, y and n are estimate, clean and noisy over noisy's root mean square, X and Y the STFTs of x and y, of 512 samples
    every 128, 1e-6 added to their squares; silence of 1e-8 is added to noisy's power and to the denominator. The first
    part is the signal-to-noise ratio, which counts a decibel as much in a mild noise as in a strong one and finds the
    phase; beyond 30 dB it is content. The second lets weak parts of speech count beside strong ones. The third is
    nearest to what a listener minds.

    Args:
        estimate, clean, noisy: audio [B, T] or [B, 1, T] at 16 kHz, at least 1025 samples.

    Source: our sum. Ratio: Wisdom et al., "Unsupervised sound separation using mixture invariant training", NeurIPS
    2020; spectra: Braun & Tashev, "A consolidated view of loss functions for supervised deep learning-based speech
    enhancement", TSP 2021, with weights near those of MP-SENet (Lu et al., Interspeech 2023).
    """
    estimate, clean, noisy = as_clips("perceptual_loss", estimate=estimate, clean=clean, noisy=noisy)
    gain = _gain(noisy)
    x, y, n = estimate * gain, clean * gain, noisy * gain
    error = (x - y).square().mean(1) / (y.square().mean(1) + 0.01 * n.square().mean(1) + _SILENCE)
    ratio = 10 * torch.log10(1 + 1000 * error)
    return (0.04 * ratio + _compressed_distance(x, y) + 0.4 * disturbance(estimate, clean)).mean()


def disturbance(estimate: Tensor, clean: Tensor) -> Tensor:
    """How much worse than clean speech a listener finds an estimate, by wide-band PESQ without its alignment in time.

        0.1 D + 0.0309 A

    D is the difference of loudness, beyond a dead zone, over Bark bands; A the same where the estimate adds what is not
    in the speech, which annoys more. Both are pooled over 20 frames of 32 ms with the power 6, then over time with the
    power 2. PESQ is about 0.999 + 4 / (1 + exp(1.3669 (disturbance - 4.5) + 3.8224)), for whole utterances.

    Args:
        estimate, clean: audio [B, T] or [B, 1, T] at 16 kHz, at least 1025 samples.

    Returns:
        [B], at least 0. Zero, with a zero gradient, where both are equal; it fades out where `clean` is silence, below
        -80 dB of a full scale of 1.

    Source: ITU-T P.862 and P.862.2; as a loss: Martin-Donas et al., "A deep learning loss function based on the
    perceptual evaluation of the speech quality", SPL 2018.
    """
    estimate, clean = as_clips("disturbance", estimate=estimate, clean=clean)
    gain = _gain(clean)
    x, y = estimate * gain, clean * gain
    # Powers of 1e7 and their products with the bands are beyond half precision.
    with torch.autocast(x.device.type, enabled=False):
        return y.square().mean(1) * _disturbance(x, y)


def _gain(signal: Tensor) -> Tensor:
    """What brings clips [B, T] to a root mean square of 1, silence aside: [B, 1]."""
    return (signal.square().mean(1, keepdim=True) + _SILENCE).rsqrt()


def _compressed_distance(x: Tensor, y: Tensor) -> Tensor:
    """The middle part of `perceptual_loss`: [B]."""
    spectra = [spectrum(signal, 512, 128, 512) for signal in (x, y)]
    # The floor within the power, not beside it: |X|^c has no derivative at 0.
    powers = [power(s) + _FLOOR for s in spectra]
    magnitude = [p.pow(_COMPRESSION / 2) for p in powers]
    compressed = [s * p.pow((_COMPRESSION - 1) / 2) for s, p in zip(spectra, powers, strict=True)]
    phase = power(compressed[0] - compressed[1]).mean((1, 2))
    return 0.9 * (magnitude[0] - magnitude[1]).square().mean((1, 2)) + 0.2 * phase


def _disturbance(x: Tensor, y: Tensor) -> Tensor:
    """`disturbance` of clips [B, T], y of unit power."""
    model = bark(x.dtype, x.device)
    degraded, reference = _band_power(x, model), _band_power(y, model)
    # A filter's effect on the whole clip and slow changes of level are forgiven in part.
    heard = model.audible(reference, 100).sum(2, keepdim=True) >= 1e7
    frames = (x.shape[1] + 5120) // 256 - 1
    mean = [(model.audible(bands, 100) * heard).sum(1, keepdim=True) / frames + 1000 for bands in (degraded, reference)]
    reference = reference * (mean[0] / mean[1]).clamp(0.01, 100)
    level = [model.audible(bands).sum(2) for bands in (reference, degraded)]
    ratio = _smooth((level[0] + 5e3) / (level[1] + 5e3)).clamp(3e-4, 5)
    degraded = ratio[:, :, None] * degraded

    loud = [model.loudness(bands) for bands in (degraded, reference)]
    difference = loud[0] - loud[1]
    difference = difference.sign() * (difference.abs() - 0.25 * torch.minimum(*loud)).clamp(min=0)
    added = ((degraded + 50) / (reference + 50)) ** 1.2
    added = torch.where(added < 3, 0, added).clamp(max=12)
    # A frame counts less where it is loud.
    weight = ((level[0] + 1e5) / 1e7) ** -0.04
    symmetric = _over_time(_over_bands(difference, 2, model) * weight)
    return 0.1 * symmetric + 0.0309 * _over_time(_over_bands(difference * added, 1, model) * weight)


def _band_power(x: Tensor, model: Bark) -> Tensor:
    """The power [B, frames, 49] of clips [B, T] in Bark bands, at the level that P.862 calibrates its model for."""
    heard, level = filtered(x)
    return model.power(heard) * (1e7 / (level + _QUIET))[:, None, None]


def _smooth(ratio: Tensor) -> Tensor:
    """s_n = 0.8 r_n + 0.2 s_(n-1) from s_0 = r_0 on, of ratios [B, frames]; terms below 1e-8 are left out."""
    taps = 0.8 * 0.2 ** torch.arange(11, -1, -1, dtype=ratio.dtype, device=ratio.device)
    return F.pad(ratio[:, None], (11, 0), mode="replicate")[:, 0].unfold(1, 12, 1) @ taps


def _over_bands(disturbance: Tensor, order: int, model: Bark) -> Tensor:
    """The norm of the disturbances [B, frames, 49] over all bands but the lowest, weighted by their widths."""
    total = model.width[1:].sum()
    return total ** (1 - 1 / order) * torch.linalg.vector_norm(model.width[1:] * disturbance[:, :, 1:], order, dim=2)


def _over_time(disturbance: Tensor) -> Tensor:
    """Disturbances [B, frames] as one a clip: power 6 over 20 frames, from every tenth on, then power 2: [B]."""
    frames = disturbance.shape[1]
    # The last parts hold fewer frames, and count as if silence followed.
    parts = F.pad(disturbance.clamp(max=45), (0, -frames % 10 + 10)).unfold(1, 20, 10)
    parts = torch.linalg.vector_norm(parts, 6, dim=2) / 20 ** (1 / 6)
    return torch.linalg.vector_norm(parts, 2, dim=1) / parts.shape[1] ** 0.5
