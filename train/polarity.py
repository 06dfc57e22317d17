"""The sign that a network starts with.

The enhancement loss is mostly made of spectral magnitudes, which do not see whether the estimate is the speech or its
negative, and random weights begin with either. A network that begins with the wrong one learns the magnitudes first and
then cannot turn: its phases stay wrong, and its SI-SDR falls while its magnitudes improve. A network's output is linear
in its last convolution, so the sign is free to choose.
"""

import copy

import torch
from torch import Tensor

from mvat.models import Manner


@torch.no_grad()
def start_upright(model: Manner, clean: Tensor, noisy: Tensor) -> bool:
    """Turn the sign of a network's last convolution where its estimates are nearer to the negative of the speech.

    Args:
        model: the network, changed in place; nothing else of it, such as running statistics, is.
        clean: the speech [B, 1, T].
        noisy: the noisy speech [B, 1, T], for which the batch's statistics are taken.

    Returns:
        Whether it was turned.
    """
    estimate = copy.deepcopy(model).train()(noisy)
    if (estimate * clean).sum() >= 0:
        return False
    for parameter in model.manner_block.out_conv.parameters():
        parameter.neg_()
    return True
