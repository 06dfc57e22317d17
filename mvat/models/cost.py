"""What a model costs: parameters and FLOPs, both counted from the code."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mvat.models.manner import Manner


def count_parameters(model: nn.Module) -> int:
    """The number of trainable values."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def count_flops(config: Mapping[str, Any], seconds: float = 4.0) -> int:
    """FLOPs of one forward pass over one clip, 2 a multiply-add, of the references (keys and values included).

    Args:
        config: arguments of `Manner`.
        seconds: the clip's length at 16 kHz.

    Nothing is computed: the model is traced on the meta device. Elementwise operations are not counted.
    """
    with torch.device("meta"):
        model = Manner(**config).eval()
        clip = torch.zeros(1, model.config["in_channels"], round(16_000 * seconds))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(clip)
    return counter.get_total_flops()
