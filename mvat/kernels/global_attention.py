"""The global view of a multi-view block: self-attention between overlapped chunks of each channel.

Each channel of each clip is a sequence of its own: P chunks X [P, C] (see `mvat.kernels.chunks`), and with
d = C * heads for each head

    q, k, v = X Wq', X Wk', X Wv'          [P, d] a head
    Y = concat_heads(softmax(q k' / sqrt(d)) v) Wo'          [P, C]
    y = overlap_add(Y) / 2          [T]

The padding makes whole chunks of zeros at the ends; they take part in the softmax.

The CPU kernel (csrc/cpu/global_attention.cpp) needs neither keys nor values: with A = Wq' Wk / sqrt(d) and M = Wo Wv,
formed outside, scores are (X A) X' and the output is (softmax X) M'. Neighbouring chunks share half their samples, so
that a query's scores are a two-tap filter over blocks of C / 2 samples, of which three outputs take four products
instead of six (Winograd's F(3, 2)); the weighted sum and the five products of the backward pass likewise. Softmax is
online, scores never reach memory; kept for the backward pass are each query's maximum, sum and weighted sum. Medians
in milliseconds, float32, 2 cores (AVX2), one head, C = 64, interleaved; "stock" is the best of PyTorch: A and M given
to scaled_dot_product_attention on contiguous chunks:

    [B, n, T]         forward: reference  stock  fused    and backward: reference  stock  fused
    [1, 20, 64084]               169       153    109                      589      565    432
    [4, 4, 64084]                131       133     90                      478      438    303
    [1, 40, 16020]                27        26     16                       95       83     57
    [4, 320, 249]                  5.1       4.9    3.4                     19       20     14
    [1, 160, 1002]                 2.3       2.0    1.6                      7.8      6.5    5.5
    [1, 4, 249]                    0.22      0.28   0.31                     0.66     0.81   0.80

Four channels of a quarter of a second lose: there the weights' products and the call are most of the time. With full
AVX-512 the gain doubles: [1, 20, 64084] takes 127, 121, 39 ms and 466, 425, 130.

On a GPU (mvat/kernels/triton/global_attention.py) one head with C = 64 or 32 runs in Triton, forward and backward, in
float32 (products in tf32 or in three of tf32, whichever torch.backends.cuda.matmul.fp32_precision asks for), bfloat16
and float16 (products in tf32); anything else takes the reference with a warning. Where a sequence fits into a tile (up
to 64 chunks forward and 32 backward, by GPU and dtype) that is one kernel each way; else a padded copy and one kernel
forward, with the keys split and put together again where there are few sequences, and two copies and three kernels
backward. Memory grows with T alone: beside y a copy of x and, for a gradient, what is kept, 2 T values a sequence; 2 T
float32 values a part where keys are split; backward 9 T values at the worst moment. The first call of a dtype compiles
for seconds, another length compiles nothing. Results are equal to the bit from run to run. Compiled for sm_80 to sm_120
and right in the interpreter, not run on a GPU yet.

Source: Park et al., "MANNER", ICASSP 2022.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mvat.kernels import native
from mvat.kernels.backend import register, use_fused
from mvat.kernels.checks import check_features, check_integer, check_parameter, check_segment_len
from mvat.kernels.chunks import chunk, overlap_add


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
    limit = None
    if x.device.type == "cuda" and (heads != 1 or segment_len not in (32, 64)):
        limit = "on cuda its kernel takes one head and a segment_len of 32 or 64"
    if use_fused(op, x, limit):
        with torch.autocast(x.device.type, enabled=False):
            q, k, v, o = (w.to(native.wide(x.dtype)) for w in (w_q, w_k, w_v, w_o))
            a, m = absorb(q, k, v, o, heads)
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, a, m))
        return torch.ops.mvat.global_attention(x, a, m, segment_len, keep)[0]
    return global_attention_reference(x, w_q, w_k, w_v, w_o, heads, segment_len)


def absorb(w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """A = Wq' Wk / sqrt(d) and M = Wo Wv of every head, [heads, C, C]: scores = (X A) X', output = (softmax X) M'."""
    q, k, v = (w.unflatten(0, (heads, -1)) for w in (w_q, w_k, w_v))  # [heads, d, C]
    a = q.mT @ k / math.sqrt(q.shape[1])
    return a, w_o.unflatten(1, (heads, -1)).transpose(0, 1) @ v


native.implement_in_triton("global_attention", "global_attention_backward")
register("global_attention", native.supports("global_attention", ("cpu", "cuda")))


def _fake(x: Tensor, a: Tensor, m: Tensor, segment_len: int, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    chunks = (x.shape[2] + segment_len) // (segment_len // 2) + 1
    kept = (x.shape[0] if keep else 0, x.shape[1], a.shape[0], chunks)
    softmax = x.new_empty((*kept, 2), dtype=native.wide(x.dtype))
    return x.new_empty(x.shape), softmax, x.new_empty((*kept, segment_len))


def _setup_context(ctx, inputs, output) -> None:
    x, a, m, ctx.segment_len, keep = inputs
    _, softmax, mixed = output
    if not keep:
        raise RuntimeError("mvat::global_attention: a gradient takes keep=True")
    ctx.mark_non_differentiable(softmax, mixed)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, a, m, softmax, mixed)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 5
    return *torch.ops.mvat.global_attention_backward(grad, *ctx.saved_tensors, ctx.segment_len), None, None


native.complete(
    "global_attention",
    _fake,
    lambda grad, x, a, m, softmax, mixed, segment_len: tuple(t.new_empty(t.shape) for t in (x, a, m)),
    _setup_context,
    _backward,
)
