"""channel_attention: the channel view."""

from collections.abc import Iterator

from benchmarks.harness import Case, Settings
from benchmarks.peers import op_variants
from benchmarks.shapes import features, parameter, places
from mvat.kernels import channel_attention
from mvat.kernels.channel_attention import channel_attention_reference
from mvat.models.blocks import ChannelAttention


def cases(settings: Settings) -> Iterator[Case]:
    for layer, point, shape in places(ChannelAttention, settings.quick):
        yield Case(
            "channel_attention",
            shape,
            inputs=lambda layer=layer, point=point: [
                features(layer, point),
                *map(parameter, layer.module.parameters()),
            ],
            reference=lambda: channel_attention_reference,
            variants=op_variants(
                channel_attention_reference, channel_attention, ["channel_attention"], settings, point.named
            ),
        )
