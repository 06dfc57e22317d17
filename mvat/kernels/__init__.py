"""Drop-in ops of multi-view attention and attention transfer, each with a plain PyTorch reference beside it."""

from mvat.kernels.attention_map import attention_map
from mvat.kernels.attention_transfer_loss import attention_transfer_loss
from mvat.kernels.backend import current_backend, use_backend
from mvat.kernels.channel_attention import channel_attention
from mvat.kernels.global_attention import global_attention
from mvat.kernels.local_attention import local_attention
from mvat.kernels.mask_gate import mask_gate
from mvat.kernels.norm import Norm
from mvat.kernels.norm_act_conv import norm_act, norm_act_conv

__all__ = [
    "Norm",
    "attention_map",
    "attention_transfer_loss",
    "channel_attention",
    "current_backend",
    "global_attention",
    "local_attention",
    "mask_gate",
    "norm_act",
    "norm_act_conv",
    "use_backend",
]
