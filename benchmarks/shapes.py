"""The shapes of the rows, read off the models themselves: a preset is traced on the meta device and asked by hooks."""

import math
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mvat.kernels import Norm, use_backend
from mvat.models import PRESETS, Manner

#: What `--quick` checks: the smallest network with every part.
TINY = {"hidden": 6, "depth": 2, "segment_len": 8}


class Point(NamedTuple):
    """A model, seconds of audio, clips at once."""

    preset: str
    seconds: float
    batch: int

    @property
    def named(self) -> bool:
        """Whether torch.compile, which takes minutes, is measured too: one clip of 4 s of base and of s-8.1gf."""
        return self.preset in ("base", "s-8.1gf") and (self.seconds, self.batch) == (4, 1)

    @property
    def samples(self) -> int:
        return round(16_000 * self.seconds)


class Layer(NamedTuple):
    """A module of a model on the meta device, and what goes into it: [B, channels, length]."""

    name: str
    module: Any
    channels: int
    length: int


def points(quick: bool) -> list[Point]:
    """All lengths with one clip, and all batches with 4 s: a cross instead of all nine combinations; cheapest first."""
    if quick:
        return [Point("tiny", 0.1, 2)]
    cross = ((1, 1), (4, 1), (10, 1), (4, 4), (4, 16))
    return [Point(preset, *at) for preset in ("s-8.1gf", "small", "base") for at in cross]


def config(preset: str) -> dict[str, Any]:
    """Arguments of Manner."""
    return TINY if preset == "tiny" else PRESETS[preset]


def build(preset: str) -> Manner:
    """A model with the weights of random state 0, the same for every variant; in evaluation mode.

    Its batch norms have seen a quarter of a second of noise. Fresh ones let features fade on their way, so that a tenth
    of error inside a view moves the output of s-8.1gf by 1e-7 and no check would see a wrong kernel; so it moves it by
    6e-4 at least.
    """
    torch.manual_seed(0)
    model = Manner(**config(preset)).train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    momenta = [bn.momentum for bn in norms]
    for bn in norms:
        bn.momentum = 1.0
    with torch.no_grad(), use_backend("eager"):
        model(torch.randn(2, 1, 4000))
    for bn, momentum in zip(norms, momenta, strict=True):
        bn.momentum = momentum
    return model.eval()


def layers(preset: str, samples: int, kind: type[nn.Module]) -> list[Layer]:
    """The modules of a kind, in execution order."""
    found = []
    for name, module, shape in _calls(preset, samples):
        if isinstance(module, kind):
            place = name.removeprefix("manner_block.").split(".attn_block")[0].split(".conv_block")[0]
            found.append(Layer(place, module, shape[1], shape[2]))
    return found


@cache
def _calls(preset: str, samples: int) -> list[tuple[str, nn.Module, torch.Size]]:
    """Every call of a module in a forward pass of one clip: its name, itself, its first input's shape."""
    with torch.device("meta"):
        model = Manner(**config(preset)).eval()
        audio = torch.zeros(1, 1, samples)
    calls = []
    for name, module in model.named_modules():

        def note(module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            calls.append((name, module, inputs[0].shape))

        module.register_forward_pre_hook(note)
    with torch.no_grad():
        model(audio)
    return calls


def places(kind: type[nn.Module], quick: bool) -> Iterator[tuple[Layer, Point, dict[str, Any]]]:
    """At every point the longest and the deepest layer of a kind, with four clips the first one too.

    Each shape comes once, with its names for the results.
    """
    seen = set()
    for point in points(quick):
        everywhere = layers(point.preset, point.samples, kind)
        ends = [max(everywhere, key=lambda x: x.length), min(everywhere, key=lambda x: x.length)]
        for layer in (*ends, *everywhere[: point.batch == 4]):
            key = (point.batch, layer.channels, layer.length)
            if key not in seen:
                seen.add(key)
                place = f"{point.preset} {layer.name}"
                yield layer, point, {"place": place, "B": point.batch, "C": layer.channels, "T": layer.length}


def features(layer: Layer, point: Point) -> Tensor:
    """Random features [B, channels, length] that want a gradient."""
    return torch.randn(point.batch, layer.channels, layer.length).requires_grad_()


def parameter(like: Tensor) -> Tensor:
    """A random parameter of this shape, small enough that outputs are of the inputs' size; wants a gradient."""
    fan_in = math.prod(like.shape[1:]) if like.dim() > 1 else 10
    return (torch.randn(like.shape) / math.sqrt(fan_in)).requires_grad_()


def norm_tensors(channels: int) -> list[Tensor]:
    """Weight, bias, running mean and variance of a batch norm."""
    weight, bias, mean = (0.1 * torch.randn(channels) for _ in range(3))
    return [(1 + weight).requires_grad_(), bias.requires_grad_(), mean, 0.5 + torch.rand(channels)]


def norm(tensors: list[Tensor] | tuple[Tensor, ...]) -> Norm:
    """The op's argument from those four."""
    return Norm(*tensors)
