"""mask_gate: the gate that closes a multi-view block, its shortcut included."""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.harness import Case, Settings
from benchmarks.peers import op_variants
from benchmarks.shapes import Layer, Point, features, parameter, places
from mvat.kernels import mask_gate
from mvat.kernels.mask_gate import mask_gate_reference
from mvat.models.blocks import MultiView


def _inputs(layer: Layer, point: Point) -> list[Tensor]:
    square, vector = (layer.channels, layer.channels, 1), (layer.channels,)
    shapes = [torch.empty(shape, device="meta") for _ in range(3) for shape in (square, vector)]
    return [features(layer, point), *map(parameter, shapes), features(layer, point)]


def cases(settings: Settings) -> Iterator[Case]:
    # What goes through the gate has the shape of the block's input and output.
    for layer, point, shape in places(MultiView, settings.quick):
        yield Case(
            "mask_gate",
            shape,
            inputs=lambda layer=layer, point=point: _inputs(layer, point),
            reference=lambda: mask_gate_reference,
            variants=op_variants(mask_gate_reference, mask_gate, ["mask_gate"], settings, point.named),
            gradient_bound=100,  # a ReLU that float32 rounds to the other side
        )
