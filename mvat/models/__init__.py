"""MANNER, its blocks as modules of their own, its presets, its cost."""

from mvat.models.blocks import (
    ChannelAttention,
    GlobalAttention,
    LocalAttention,
    MaskGate,
    MultiView,
    ResCon,
    Views,
)
from mvat.models.cost import count_flops, count_parameters
from mvat.models.distributed import SyncBatchNorm1d, sync_batch_norm
from mvat.models.manner import Manner
from mvat.models.presets import PRESETS

__all__ = [
    "PRESETS",
    "ChannelAttention",
    "GlobalAttention",
    "LocalAttention",
    "Manner",
    "MaskGate",
    "MultiView",
    "ResCon",
    "SyncBatchNorm1d",
    "Views",
    "count_flops",
    "count_parameters",
    "sync_batch_norm",
]
