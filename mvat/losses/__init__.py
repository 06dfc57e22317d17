"""Training losses: two for the enhancement itself, and what distillation adds to them."""

from collections.abc import Callable

from torch import Tensor

from mvat.losses.mrstft import mrstft_distance, weighted_mrstft_loss
from mvat.losses.perceptual import disturbance, perceptual_loss
from mvat.losses.signals import SHORTEST
from mvat.losses.transfer import (
    VIEW_NAMES,
    AttentionTransferLoss,
    block_pairs,
    block_transfer_loss,
    check_views,
    multi_view_transfer_loss,
    output_distillation_loss,
)

__all__ = [
    "ENHANCEMENT_LOSSES",
    "SHORTEST",
    "VIEW_NAMES",
    "AttentionTransferLoss",
    "block_pairs",
    "block_transfer_loss",
    "check_views",
    "disturbance",
    "mrstft_distance",
    "multi_view_transfer_loss",
    "output_distillation_loss",
    "perceptual_loss",
    "weighted_mrstft_loss",
]

#: Loss functions of (estimate, clean, noisy) by the names that a configuration gives them.
ENHANCEMENT_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "weighted_mrstft": weighted_mrstft_loss,
    "perceptual": perceptual_loss,
}
