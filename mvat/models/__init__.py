"""MANNER, its presets, its cost."""

from mvat.models.blocks import Views
from mvat.models.cost import count_flops, count_parameters
from mvat.models.manner import Manner
from mvat.models.presets import PRESETS

__all__ = ["PRESETS", "Manner", "Views", "count_flops", "count_parameters"]
