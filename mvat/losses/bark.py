"""The hearing model of wide-band PESQ: filters, loudness over time and Bark bands.

Source: ITU-T Recommendations P.862 and P.862.2, whose tables and constants for 16 kHz stand here.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mvat.losses.signals import power, spectrum

#: Of each Bark band: how many bins of a spectrum of 512 samples it holds, its centre and width in Bark, the correction
#: of its power, and the power at the threshold of hearing.
_BANDS = (
    (1, 0.078672, 0.157344, 100, 5.12862e07),
    (1, 0.316341, 0.317994, 100, 2.45471e06),
    (1, 0.636559, 0.322441, 100, 70794.6),
    (1, 0.961246, 0.326934, 100, 4897.79),
    (1, 1.29045, 0.331474, 100, 1174.9),
    (1, 1.62422, 0.336061, 100, 389.045),
    (1, 1.9626, 0.340697, 100, 104.713),
    (1, 2.30564, 0.345381, 100, 45.7088),
    (2, 2.65338, 0.350114, 50, 17.7828),
    (1, 3.00589, 0.354897, 100, 9.77237),
    (1, 3.3632, 0.359729, 100, 4.89779),
    (1, 3.72537, 0.364611, 100, 3.0903),
    (1, 4.09245, 0.369544, 99.9999, 1.90546),
    (1, 4.46449, 0.374529, 100, 1.25893),
    (2, 4.84153, 0.379565, 53.0471, 0.977237),
    (1, 5.22364, 0.384653, 110, 0.724436),
    (1, 5.61087, 0.389794, 117.992, 0.562341),
    (2, 6.00326, 0.394989, 65, 0.457088),
    (2, 6.40087, 0.400236, 68.7601, 0.389045),
    (2, 6.80375, 0.405538, 69.9999, 0.331131),
    (2, 7.21197, 0.410894, 71.4288, 0.295121),
    (2, 7.62557, 0.416306, 75, 0.269153),
    (2, 8.04461, 0.421773, 76.8434, 0.25704),
    (2, 8.46915, 0.427297, 80.9688, 0.251189),
    (2, 8.89923, 0.432877, 88.6461, 0.251189),
    (3, 9.33493, 0.438514, 63.8644, 0.251189),
    (3, 9.77629, 0.444209, 68.1553, 0.251189),
    (3, 10.2234, 0.449962, 72.5478, 0.263027),
    (3, 10.6762, 0.455774, 75.5848, 0.288403),
    (4, 11.135, 0.461645, 58.3792, 0.30903),
    (3, 11.5996, 0.467577, 80.9508, 0.338844),
    (4, 12.0701, 0.473569, 64.1357, 0.371535),
    (5, 12.5467, 0.479621, 54.3848, 0.398107),
    (4, 13.0294, 0.485736, 73.8219, 0.436516),
    (5, 13.5182, 0.491912, 64.4371, 0.467735),
    (6, 14.0133, 0.498151, 59.1765, 0.489779),
    (6, 14.5146, 0.504454, 65.5213, 0.501187),
    (7, 15.0222, 0.510819, 61.3998, 0.501187),
    (8, 15.5362, 0.51725, 58.144, 0.512861),
    (9, 16.0567, 0.523745, 57.0045, 0.524807),
    (9, 16.5838, 0.530308, 64.1263, 0.524807),
    (12, 17.1174, 0.536934, 54.311, 0.524807),
    (12, 17.6577, 0.543629, 61.115, 0.512861),
    (15, 18.2047, 0.55039, 55.0778, 0.47863),
    (16, 18.7585, 0.55722, 56.8493, 0.42658),
    (18, 19.3191, 0.564119, 55.6289, 0.371535),
    (21, 19.8868, 0.571085, 53.1371, 0.363078),
    (25, 20.4614, 0.578125, 54.9858, 0.416869),
    (20, 21.043, 0.585232, 79.547, 0.537032),
)
#: The factors of power and of loudness that calibrate the model.
_POWER, _LOUDNESS = 6.910853e-06, 1.866055e-01
#: The exponent of loudness over power (Zwicker).
_ZWICKER = 0.23


_COUNTS, _CENTRE, _WIDTH, _CORRECTION, _THRESHOLD = np.array(_BANDS).T
#: [257, 49] the power of a band from that of the bins; neither the constant part nor the highest bin is heard.
_OF_BINS = np.zeros((257, len(_BANDS)))
_OF_BINS[np.arange(1, 256), np.repeat(np.arange(len(_BANDS)), _COUNTS.astype(int))[1:]] = 1
_OF_BINS *= _POWER * _CORRECTION
_EXPONENT = _ZWICKER * (6 / (_CENTRE + 2)).clip(1, 2) ** 0.15


class Bark(NamedTuple):
    """The constants of the model on one device.

    Attributes:
        bands: [257, 49] power of a band from the power of the bins.
        width: [49] in Bark.
        threshold: [49] power at the threshold of hearing.
        exponent: [49] of loudness over power.
    """

    bands: Tensor
    width: Tensor
    threshold: Tensor
    exponent: Tensor

    def power(self, x: Tensor) -> Tensor:
        """The power [B, frames, 49] in Bark bands of clips [B, T], in frames of 512 samples every 256."""
        return power(spectrum(x, 512, 256, 512, center=False).transpose(1, 2)) @ self.bands

    def audible(self, power: Tensor, factor: float = 1.0) -> Tensor:
        """The power [..., 49], with 0 for a band not above `factor` times the threshold of hearing."""
        return power * (power > factor * self.threshold)

    def loudness(self, power: Tensor) -> Tensor:
        """Loudness [..., 49] in sone, of power [..., 49]."""
        rise = (0.5 + 0.5 * power / self.threshold) ** self.exponent - 1
        return _LOUDNESS * (2 * self.threshold) ** self.exponent * rise.clamp(min=0)


def bark(dtype: torch.dtype, device: torch.device) -> Bark:
    """The constants; made anew by every call, since what is kept from one mode of PyTorch cannot serve in another."""
    return Bark(*(torch.as_tensor(c, dtype=dtype, device=device) for c in (_OF_BINS, _WIDTH, _THRESHOLD, _EXPONENT)))


def filtered(x: Tensor) -> tuple[Tensor, Tensor]:
    """Clips [B, T] as the model hears them, and their level [B], the power between 350 and 3250 Hz.

    What it hears is the clip behind P.862.2's filter, which takes away rumble; the level is P.862's, over a length to
    which it adds 0.32 s of silence.
    """
    frames = x.shape[1]
    size = frames + 1024  # by then the filter has died down to 1e-12
    bins = torch.fft.rfft(x, size)
    index = torch.arange(size // 2 + 1, dtype=x.dtype, device=x.device)
    hertz, z = index * (16000 / size), torch.polar(torch.ones_like(index), index * (-2 * math.pi / size))
    # Beside its band 10 dB less a hertz below and 2 above.
    decibel = torch.minimum(10 * (hertz - 350), 2 * (3250 - hertz)).clamp(-300, 0)
    level = 2 / size * (power(bins) * 10 ** (decibel / 10)).sum(1) / (frames + 5120)
    response = (2.740826 - 5.4816519 * z + 2.740826 * z**2) / (1 - 1.9444777 * z + 0.94597794 * z**2)
    return torch.fft.irfft(bins * response, size)[:, :frames], level
