r"""The attention map of a feature: how strongly it answers at every moment.

    Q[b, t] = sum_c |x[b, c, t]|^p                  (Zagoruyko & Komodakis's activation attention, over channels)
    dQ[b, t] / dx[b, c, t] = p |x|^(p-1) sign(x)    (0 at x = 0, for p = 1 too)

The CPU kernel (csrc/cpu/attention_map.cpp) reads x once and in place, whatever its batch and channel strides, sums in
float64 and in one order for any number of threads; a second reading with one write gives the gradient. Best of nine in
milliseconds, float32, 2 cores without AVX-512, forward and then backward, the gradient's fresh pages included (they are
most of the backward at the first size: 61 MB):

    [B, C, T]         p = 2: reference   fused         p = 3: reference   fused         p = 1.5: reference   fused
    [4, 60, 64084]     30     61        2.5  29          57    139        2.2  28           97    140       26   50
    [4, 12, 64084]      1.0    6.1      0.55 0.89         1.8    4.2      0.58 0.74          9.9    4.2      5.4  5.5
    [4, 960, 249]       0.11   0.28     0.09 0.22         0.20   0.98     0.11 0.24          2.9    1.1      1.7  1.9
    [1, 4, 249]         0.009  0.056    0.025 0.075       0.014  0.077    0.025 0.075        0.019  0.079    0.029 0.077

The smallest size is all dispatch, and the general power loses the backward pass on small features. Tried for the
reference at the first size, p = 2, on another machine: (x * x).sum(1) 22 + 41, x.square().sum(1) 27 + 68,
linalg.vecdot 28 + 51, einsum 61 + 138, linalg.vector_norm(x, dim=1).square() 33 + 47 (and 42 + 3.5 at the second).
Tried for the kernel's |x|^p: the C library's powf, 5 times slower than the polynomials of csrc/cpu/power.h.
"""

import torch
from torch import Tensor

from mvat.kernels import native
from mvat.kernels.backend import register, use_fused
from mvat.kernels.checks import check_features, check_power


def attention_map_reference(x: Tensor, p: float = 2.0) -> Tensor:
    """`attention_map` in plain PyTorch, in the form that runs fastest forward and backward; takes any device."""
    if x.dtype in (torch.bfloat16, torch.float16):
        x = x.float()
    if p == 2:
        return (x * x).sum(1)
    return x.abs().sum(1) if p == 1 else x.abs().pow(p).sum(1)


def attention_map(x: Tensor, p: float = 2.0) -> Tensor:
    """Sum over channels of the p-th powers of a feature's magnitudes.

    Args:
        x: Feature [B, C, T], float32, float64, bfloat16 or float16; any strides, any size may be 0.
        p: The power, finite, at least 1.

    Returns:
        The map Q [B, T], in float64 for a float64 input, else in float32.

    Raises:
        TypeError: if x is no floating tensor, or p no number.
        ValueError: if x has not three dimensions, or p is below 1 or not finite.
        RuntimeError: for a second derivative of the fused kernel; or where the back end is "fused" and there is none.
    """
    check_features("attention_map", "x", x)
    check_power("attention_map", p)
    if use_fused("attention_map", x):
        return torch.ops.mvat.attention_map(x, float(p))
    return attention_map_reference(x, p)


register("attention_map", native.supports("attention_map", ("cpu", "cuda")))


def _fake(x, p):
    wide = native.wide(x.dtype)
    return x.new_empty((x.shape[0], x.shape[2]), dtype=wide)


def _setup_context(ctx, inputs, output) -> None:
    x, ctx.p = inputs
    ctx.save_for_backward(x)


def _backward(ctx, grad):
    return torch.ops.mvat.attention_map_backward(grad, *ctx.saved_tensors, ctx.p), None


native.complete("attention_map", _fake, lambda grad, x, p: x.new_empty(x.shape), _setup_context, _backward)
