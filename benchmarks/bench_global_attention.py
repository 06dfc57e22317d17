"""global_attention: the global view, against the best composition of stock PyTorch as well."""

import math
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, Run, Settings, Variant
from benchmarks.peers import op_variants
from benchmarks.shapes import features, parameter, places
from mvat.kernels import global_attention
from mvat.kernels.chunks import chunk, overlap_add
from mvat.kernels.global_attention import global_attention_reference
from mvat.models.blocks import GlobalAttention


def stock(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, heads: int, segment_len: int) -> Tensor:
    """Keys and values absorbed into the weights: a head is softmax(X A X') X M' with A = Wq' Wk / sqrt(d), M = Wo Wv.

    The chunks X [B n, 1, P, C] are query (times A), key and value of PyTorch's own attention; a strided view that is
    copied once, for its kernel is several times slower on overlapped rows.
    """
    batch, n, length = x.shape
    q, k, v = (w.unflatten(0, (heads, -1)) for w in (w_q, w_k, w_v))  # [heads, d, C]
    a = q.transpose(1, 2) @ k / math.sqrt(segment_len * heads)
    m = w_o.unflatten(1, (heads, -1)).transpose(0, 1) @ v  # [heads, C, C]
    tokens = chunk(x, segment_len).contiguous().flatten(0, 1)[:, None]
    shared = tokens.expand(-1, heads, -1, -1)
    mixed = F.scaled_dot_product_attention(tokens @ a, shared, shared, scale=1.0) @ m.transpose(1, 2)
    return overlap_add(mixed.sum(1).unflatten(0, (batch, n)), length) / 2


def _bind(function: Run, module: GlobalAttention) -> Run:
    return lambda *tensors: function(*tensors, module.head, module.segment_len)


def cases(settings: Settings) -> Iterator[Case]:
    for layer, point, shape in places(GlobalAttention, settings.quick):
        reference, op, composed = (
            _bind(function, layer.module) for function in (global_attention_reference, global_attention, stock)
        )
        variants = op_variants(reference, op, ["global_attention"], settings, point.named)
        yield Case(
            "global_attention",
            shape,
            inputs=lambda layer=layer, point=point: [
                features(layer, point),
                *map(parameter, layer.module.parameters()),
            ],
            reference=lambda reference=reference: reference,
            variants=variants | {"stock": Variant(lambda composed=composed: composed)},
        )
