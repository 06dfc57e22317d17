"""MANNER's loss: a distance in time and in three resolutions of time and frequency."""

import torch
from torch import Tensor

from mvat.losses.signals import RESOLUTIONS, as_clips, power, spectrum

#: The spectral part's weight, of each resolution.
_HALF_MEAN = 0.5 / len(RESOLUTIONS)


def _spectral_distance(estimate: Tensor, target: Tensor) -> Tensor:
    """Spectral convergence and the mean difference of log magnitudes of two spectra [B, F, frames]: [B]."""
    x, y = (power(s).clamp(min=1e-7).sqrt() for s in (estimate, target))
    convergence = torch.linalg.vector_norm(y - x, dim=(1, 2)) / torch.linalg.vector_norm(y, dim=(1, 2))
    return convergence + (y.log() - x.log()).abs().mean((1, 2))


def mrstft_distance(estimate: Tensor, target: Tensor) -> Tensor:
    """Per-clip distance in time and in three resolutions of time and frequency.

        mean |x - y| + 0.5 mean over STFTs of ( ||Y - X||_F / ||Y||_F + mean |ln Y - ln X| )

    Args:
        estimate, target: audio [B, T] or [B, 1, T], at least 1025 samples.

    Returns:
        [B]. Zero, with a zero gradient, where both are equal.
    """
    x, y = as_clips("mrstft_distance", estimate=estimate, target=target)
    distance = (x - y).abs().mean(1)
    for resolution in RESOLUTIONS:
        distance = distance + _HALF_MEAN * _spectral_distance(spectrum(x, *resolution), spectrum(y, *resolution))
    return distance


def weighted_mrstft_loss(estimate: Tensor, clean: Tensor, noisy: Tensor) -> Tensor:
    """The enhancement loss: the distance of speech and of residual noise, weighted by their energies in each clip.

        a D(estimate, clean) + (1 - a) D(noisy - estimate, noisy - clean),   D = `mrstft_distance`,
        a = |clean|^2 / (|clean|^2 + |noisy - clean|^2 + 2e-7),   then the mean over the batch

    The STFT is linear: the residuals' spectra are differences, and a gradient passes through one STFT a resolution.

    Args:
        estimate, clean, noisy: audio [B, T] or [B, 1, T], at least 1025 samples.

    Source: the weighted loss of MANNER (Park et al., ICASSP 2022) over Parallel WaveGAN's STFT loss.
    """
    estimate, clean, noisy = as_clips("weighted_mrstft_loss", estimate=estimate, clean=clean, noisy=noisy)
    noise = noisy - clean
    speech_energy, noise_energy = clean.square().sum(1), noise.square().sum(1)
    a = speech_energy / (speech_energy + noise_energy + 2e-7)
    # In time both distances are the same: (noisy - estimate) - (noisy - clean) is clean - estimate.
    distance = (estimate - clean).abs().mean(1)
    for resolution in RESOLUTIONS:
        x, y, mixture = (spectrum(signal, *resolution) for signal in (estimate, clean, noisy))
        speech, residual = _spectral_distance(x, y), _spectral_distance(mixture - x, mixture - y)
        distance = distance + _HALF_MEAN * (a * speech + (1 - a) * residual)
    return distance.mean()
