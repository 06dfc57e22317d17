"""attention_transfer_loss: all pairs of views of a student and its teacher, 24 for s-8.1gf and base."""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.harness import Case, Settings
from benchmarks.peers import op_variants
from benchmarks.shapes import Point, layers, points
from mvat.kernels import attention_transfer_loss
from mvat.kernels.attention_transfer_loss import attention_transfer_loss_reference
from mvat.models.blocks import ChannelAttention

_VIEWS = 3


def _shapes(preset: str, point: Point) -> list[tuple[int, int, int]]:
    """Of a model's views."""
    found = layers(preset, point.samples, ChannelAttention)
    return [(point.batch, layer.channels, layer.length) for layer in found for _ in range(_VIEWS)]


def _reference(*features: Tensor) -> Tensor:
    half = len(features) // 2
    return attention_transfer_loss_reference(features[:half], features[half:])


def _op(*features: Tensor) -> Tensor:
    half = len(features) // 2
    return attention_transfer_loss(features[:half], features[half:])


def cases(settings: Settings) -> Iterator[Case]:
    student, teacher = ("tiny", "tiny") if settings.quick else ("s-8.1gf", "base")
    for point in points(settings.quick):
        if point.preset == student:
            shapes = _shapes(student, point), _shapes(teacher, point)

            def inputs(shapes: tuple[list[tuple[int, int, int]], ...] = shapes) -> list[Tensor]:
                """The student's views, which want a gradient, then the teacher's."""
                students, teachers = ([torch.randn(shape) for shape in side] for side in shapes)
                return [x.requires_grad_() for x in students] + teachers

            yield Case(
                "attention_transfer_loss",
                {
                    "place": f"{student} from {teacher}",
                    "seconds": point.seconds,
                    "B": point.batch,
                    "pairs": len(shapes[0]),
                },
                inputs=inputs,
                reference=lambda: _reference,
                variants=op_variants(
                    _reference,
                    _op,
                    ["attention_transfer_loss", "attention_map"],
                    settings,
                    point.seconds == 4 and point.batch <= 4,
                ),
            )
