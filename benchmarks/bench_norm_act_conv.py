"""norm_act_conv: the depthwise and the pointwise stage of a Conformer block, in evaluation and in training."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Case, Run, Settings
from benchmarks.peers import op_variants
from benchmarks.shapes import Layer, Point, norm, norm_tensors, parameter, places
from mvat.kernels import norm_act_conv
from mvat.kernels.norm_act_conv import norm_act_conv_reference
from mvat.models.blocks import ResCon

#: A stage of ResCon: the convolution it ends with, the norm it starts with, the activation between.
_STAGES = {
    "depthwise": ("depth_conv", "point_conv1", "glu"),
    "pointwise": ("point_conv2", "depth_conv", "silu"),
}


def _inputs(layer: Layer, point: Point, stage: str) -> list[Tensor]:
    conv_name, norm_name, _ = _STAGES[stage]
    conv = getattr(layer.module, conv_name)[0].conv
    channels = getattr(layer.module, norm_name)[1].num_features
    x = torch.randn(point.batch, channels, layer.length).requires_grad_()
    return [x, *norm_tensors(channels), *map(parameter, conv.parameters())]


def _bind(function: Run, layer: Layer, stage: str, training: bool) -> Run:
    conv = getattr(layer.module, _STAGES[stage][0])[0].conv
    options: dict[str, Any] = {
        "activation": _STAGES[stage][2],
        "padding": conv.padding[0],
        "groups": conv.groups,
        "training": training,
    }

    def run(x: Tensor, *rest: Tensor) -> Tensor:
        return function(x, *rest[4:], norm=norm(rest[:4]), **options)

    return run


def cases(settings: Settings) -> Iterator[Case]:
    for layer, point, shape in places(ResCon, settings.quick):
        for stage in _STAGES:
            for training, pass_name in ((False, "forward"), (True, "forward+backward")):
                reference, op = (
                    _bind(function, layer, stage, training) for function in (norm_act_conv_reference, norm_act_conv)
                )
                yield Case(
                    "norm_act_conv",
                    {"stage": stage} | shape,
                    inputs=lambda layer=layer, point=point, stage=stage: _inputs(layer, point, stage),
                    reference=lambda reference=reference: reference,
                    variants=op_variants(reference, op, ["norm_act_conv"], settings, point.named),
                    passes=(pass_name,),
                )
