"""local_attention: the local view, in evaluation forward and in training forward and backward."""

from collections.abc import Iterator

from torch import Tensor

from benchmarks.harness import Case, Run, Settings
from benchmarks.peers import op_variants
from benchmarks.shapes import Layer, Point, features, norm, norm_tensors, parameter, places
from mvat.kernels import local_attention
from mvat.kernels.local_attention import local_attention_reference
from mvat.models.blocks import LocalAttention


def _inputs(layer: Layer, point: Point) -> list[Tensor]:
    depthwise, mask = layer.module.depth_conv[0].conv.weight, layer.module.conv.conv.weight
    weights = [parameter(depthwise), *norm_tensors(layer.channels), parameter(mask), *norm_tensors(1)]
    return [features(layer, point), *weights]


def _bind(function: Run, segment_len: int, training: bool) -> Run:
    def run(x: Tensor, depthwise: Tensor, *rest: Tensor) -> Tensor:
        return function(x, depthwise, norm(rest[:4]), rest[4], norm(rest[5:]), segment_len, training)

    return run


def cases(settings: Settings) -> Iterator[Case]:
    for layer, point, shape in places(LocalAttention, settings.quick):
        for training, pass_name in ((False, "forward"), (True, "forward+backward")):
            reference, op = (
                _bind(function, layer.module.segment_len, training)
                for function in (local_attention_reference, local_attention)
            )
            yield Case(
                "local_attention",
                shape,
                inputs=lambda layer=layer, point=point: _inputs(layer, point),
                reference=lambda reference=reference: reference,
                variants=op_variants(reference, op, ["local_attention"], settings, point.named),
                passes=(pass_name,),
                gradient_bound=1000,  # the maximum over channels flips between channels that are equal in float32
            )
