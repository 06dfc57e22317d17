"""global_attention: the global view, against the best composition of stock PyTorch as well."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import Case, Run, Settings, Variant
from benchmarks.peers import op_variants
from benchmarks.shapes import Layer, Point, features, layers, parameter, places
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


def _levels(settings: Settings) -> Iterator[tuple[Layer, Point, dict[str, Any]]]:
    """One clip of base at every level: P = 10, 34, 128, 503, 2005 in 4 s and 15005 in 30 s; beside `places`."""
    if settings.quick:
        return
    seen = {(shape["B"], shape["C"], shape["T"]) for _, _, shape in places(GlobalAttention, False)}
    for point in (Point("base", 4, 1), Point("base", 30, 1)):
        everywhere = layers(point.preset, point.samples, GlobalAttention)
        for layer in sorted(everywhere, key=lambda x: x.length)[-1 if point.seconds == 30 else 0 :]:
            key = (point.batch, layer.channels, layer.length)
            if key not in seen:
                seen.add(key)
                place = f"{point.preset} {layer.name}"
                yield layer, point, {"place": place, "B": point.batch, "C": layer.channels, "T": layer.length}


def _only(function: Run, kernel: SDPBackend) -> Run:
    """PyTorch's attention held to one of its kernels."""

    def run(*tensors: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return function(*tensors)

    return run


def _stock(composed: Run, settings: Settings, dtype: torch.dtype) -> dict[str, Variant]:
    """The composition as PyTorch runs it; in half precision on a GPU also by FlashAttention and by cuDNN alone."""
    variants = {"stock": Variant(lambda: composed)}
    if settings.device == "cuda" and dtype != torch.float32:
        for name, kernel, there in (
            ("stock, FlashAttention", SDPBackend.FLASH_ATTENTION, torch.backends.cuda.is_flash_attention_available()),
            ("stock, cuDNN", SDPBackend.CUDNN_ATTENTION, torch.backends.cudnn.is_available()),
        ):
            missing = "" if there else "this PyTorch is built without it"
            variants[name] = Variant(lambda kernel=kernel: _only(composed, kernel), missing=missing)
    return variants


def cases(settings: Settings) -> Iterator[Case]:
    dtypes = (torch.float32, torch.bfloat16) if settings.device == "cuda" else (torch.float32,)
    # The cheapest first, so that a limit of time cuts the dearest.
    *levels, longest = _levels(settings) if not settings.quick else (None,)
    ordered = (*levels, *places(GlobalAttention, settings.quick), longest)
    for layer, point, shape in filter(None, ordered):
        reference, op, composed = (
            _bind(function, layer.module) for function in (global_attention_reference, global_attention, stock)
        )
        for dtype in dtypes:
            variants = op_variants(reference, op, ["global_attention"], settings, point.named, dtype)
            yield Case(
                "global_attention",
                shape,
                inputs=lambda layer=layer, point=point: [
                    features(layer, point),
                    *map(parameter, layer.module.parameters()),
                ],
                reference=lambda reference=reference: reference,
                variants=variants | _stock(composed, settings, dtype),
                dtype=dtype,
            )
