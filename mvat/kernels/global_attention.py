"""The global view of a multi-view block: self-attention between overlapped chunks of each channel.

Each channel of each clip is a sequence of its own: P chunks X [P, C] (see `mvat.kernels.chunks`), and with
d = C * heads for each head

    q, k, v = X Wq', X Wk', X Wv'          [P, d] a head
    Y = concat_heads(softmax(q k' / sqrt(d)) v) Wo'          [P, C]
    y = overlap_add(Y) / 2          [T]

The padding makes whole chunks of zeros at the ends; they take part in the softmax.

Source: Park et al., "MANNER", ICASSP 2022.
"""

import torch.nn.functional as F
from torch import Tensor

from mvat.kernels.backend import not_written, register, use_fused
from mvat.kernels.checks import check_features, check_integer, check_parameter, check_segment_len
from mvat.kernels.chunks import chunk, overlap_add

register("global_attention", not_written)


def global_attention_reference(
    x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, heads: int = 1, segment_len: int = 64
) -> Tensor:
    """`global_attention` in plain PyTorch.

    scaled_dot_product_attention rather than softmax between two batched products: 3 times faster forward and 2 times
    forward and backward at (1, 20, 64084) on a CPU, level at T = 4000, and its memory does not grow with P squared.
    The chunks are copied once: on the strided view it is several times slower.
    """
    batch, n, length = x.shape
    tokens = chunk(x, segment_len).contiguous().flatten(0, 1)  # [B n, P, C]
    q, k, v = (F.linear(tokens, w).unflatten(-1, (heads, -1)).transpose(1, 2) for w in (w_q, w_k, w_v))
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [B n, P, heads d]
    return overlap_add(F.linear(mixed, w_o).unflatten(0, (batch, n)), length) / 2


def global_attention(
    x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, heads: int = 1, segment_len: int = 64
) -> Tensor:
    """Self-attention between the overlapped chunks of every channel.

    Args:
        x: features [B, n, T].
        w_q, w_k, w_v: weights [heads * d, C] with C = segment_len and d = C * heads, heads major.
        w_o: weight [C, heads * d].
        heads: the number of heads.
        segment_len: C, the chunk's length in samples, even.

    Returns:
        [B, n, T].

    Raises:
        TypeError, ValueError: for a wrong type, dtype, shape or device.
    """
    op = "global_attention"
    check_features(op, "x", x, ("B", "n", "T"))
    check_segment_len(op, segment_len)
    check_integer(op, "heads", heads, 1)
    width = segment_len * heads * heads
    for name, weight in (("w_q", w_q), ("w_k", w_k), ("w_v", w_v)):
        check_parameter(op, name, weight, (width, segment_len), x)
    check_parameter(op, "w_o", w_o, (segment_len, width), x)
    use_fused(op, x)
    return global_attention_reference(x, w_q, w_k, w_v, w_o, heads, segment_len)
