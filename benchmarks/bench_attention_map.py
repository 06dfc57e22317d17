"""attention_map: the sum over channels of a view's squares, on the views of a teacher and of students."""

from collections.abc import Iterator

from benchmarks.harness import Case, Settings
from benchmarks.peers import op_variants
from benchmarks.shapes import features, places
from mvat.kernels import attention_map
from mvat.kernels.attention_map import attention_map_reference
from mvat.models.blocks import ChannelAttention


def cases(settings: Settings) -> Iterator[Case]:
    for layer, point, shape in places(ChannelAttention, settings.quick):
        yield Case(
            "attention_map",
            shape,
            inputs=lambda layer=layer, point=point: [features(layer, point)],
            reference=lambda: attention_map_reference,
            variants=op_variants(attention_map_reference, attention_map, ["attention_map"], settings, point.named),
        )
