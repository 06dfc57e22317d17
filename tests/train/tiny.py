"""What the tests of training share: a network, recordings and runs that take a moment."""

import torch

from mvat.audio import SAMPLE_RATE
from mvat.models import Manner
from train.config import DataConfig, ModelConfig, OptimConfig, RunConfig, ValidConfig
from train.data import Segments
from train.solver import Solver

TINY = Manner(hidden=6, depth=1).config


def config(out, epochs=2, **changes) -> RunConfig:
    data = DataConfig("generated", segment_seconds=0.25, stride_seconds=0.25, tempo_share=0.0, workers=0)
    valid = ValidConfig(metrics=[], select="loss")
    return RunConfig(str(out), ModelConfig(None, TINY), data, OptimConfig(epochs, 4), valid, **changes)


def segments(pairs, settings) -> Segments:
    lengths = (settings.data.segment_seconds, settings.data.stride_seconds)
    return Segments(pairs, *(round(seconds * SAMPLE_RATE) for seconds in lengths))


def solver(out, pairs, epochs=2, teacher=None, **changes) -> Solver:
    torch.manual_seed(0)
    settings = config(out, epochs, **changes)
    return Solver(settings, Manner(**TINY), teacher, segments(pairs, settings), pairs, "student")


def tensors_equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(tensors_equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(tensors_equal, a, b))
    return a == b
