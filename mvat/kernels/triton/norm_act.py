"""The passes over features without a product, on a GPU: a chain's end, a batch's moments, a norm's gradient.

    norm_act           y = act(norm(x) + norm(shortcut))           reads x and the shortcut once, writes y once
    its gradient       dz behind both norms and its sums           reads grad, x and the shortcut once, writes dz once
    batch_statistics   mean and biased variance of x               reads x once
    norm_gradient      dx = w r (dz - sum(dz) / n - x^ sum(dz x^) / n), r = 1 / sqrt(var + eps), x^ = (x - mean) r
                                                                  reads dz, in training x, once, writes dx once

A program takes a block of one row, a channel of a clip; its sums and moments go to an entry of its own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvat.kernels.triton import common
from mvat.kernels.triton.common import (
    PAIRS,
    AppliedNorm,
    activate,
    activate_back,
    dense_rows,
    norm_rows,
    statistics,
    store_moments,
    total,
    unit,
)
from mvat.kernels.triton.plans import check_capability

BLOCK = 2048
_WARPS = 8
_SIZES = [
    "eps", "normed", "added", "s_eps", "s_normed", "tiles", "C", "T", "B", "x_batch", "x_channel", "s_batch",
    "s_channel",
    "g_batch", "g_channel", "count",
]  # fmt: skip


@triton.jit
def _row(tiles, C, T, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """A program's clip, channel of C, tile, samples, and which of them are there."""
    tile, c, b = tl.program_id(0) % tiles, tl.program_id(0) // tiles % C, tl.program_id(0) // tiles // C
    t = tile * BLOCK + tl.arange(0, BLOCK)
    return b.to(tl.int64), c.to(tl.int64), tile, t, t < T * UNIT


@triton.jit
def _normed(x, t, there, weight, bias, mean, var, eps, normed, c):
    """norm(x) of a row, and x^."""
    m, r, s, a = norm_rows(weight, bias, mean, var, eps, c, normed != 0)
    normal = (tl.load(x + t, mask=there, other=0.0).to(tl.float32) - m) * r
    return normal * s + a, normal


@triton.jit(do_not_specialize=_SIZES)
def norm_act_kernel(x_in, weight, bias, mean, var, shortcut, s_weight, s_bias, s_mean, s_var, y, eps, normed, added,
                    s_eps, s_normed, tiles, C, T, x_batch, x_channel, s_batch, s_channel, UNIT: tl.constexpr,
                    ACT: tl.constexpr, AFTER: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """C channels of y. AFTER: the shortcut joins behind the activation."""
    b, c, tile, t, there = _row(tiles, C, T, UNIT, BLOCK)
    z, _ = _normed(x_in + b * x_batch * UNIT + c * x_channel * UNIT, t, there, weight, bias, mean, var, eps, normed, c)
    gate, side = z, z * 0.0
    if added:
        row = shortcut + b * s_batch * UNIT + c * s_channel * UNIT
        side, _ = _normed(row, t, there, s_weight, s_bias, s_mean, s_var, s_eps, s_normed, c)
    if ACT >= 3:
        row = x_in + b * x_batch * UNIT + (c + C) * x_channel * UNIT
        gate, _ = _normed(row, t, there, weight, bias, mean, var, eps, normed, c + C)
        if added:
            row = shortcut + b * s_batch * UNIT + (c + C) * s_channel * UNIT
            other, _ = _normed(row, t, there, s_weight, s_bias, s_mean, s_var, s_eps, s_normed, c + C)
            gate += other
    if AFTER:
        z = activate(z, gate, ACT)
        z = tl.where(added != 0, z + side, z)
    else:
        z = activate(tl.where(added != 0, z + side, z), gate, ACT)
    tl.store(y + (b * C + c) * (T * UNIT) + t, z, mask=there)


@triton.jit
def _store_sums(sums, shortcut_sums, c, entry, entries, channels, d, z_normal, side, s_normal, added):
    at = c * entries + entry
    plane = channels.to(tl.int64) * entries
    tl.store(sums + at, tl.sum(d, 0))
    tl.store(sums + plane + at, tl.sum(d * z_normal, 0))
    if added:
        tl.store(shortcut_sums + at, tl.sum(side, 0))
        tl.store(shortcut_sums + plane + at, tl.sum(side * s_normal, 0))


@triton.jit(do_not_specialize=_SIZES)
def norm_act_backward_kernel(g_in, x_in, weight, bias, mean, var, shortcut, s_weight, s_bias, s_mean, s_var, dz, sums,
                             shortcut_sums, eps, normed, added, s_eps, s_normed, tiles, C, T, B, x_batch, x_channel,
                             s_batch, s_channel, g_batch, g_channel, UNIT: tl.constexpr, ACT: tl.constexpr,
                             AFTER: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """C channels of grad. sums, shortcut_sums [2, channels, B tiles]. AFTER: grad itself is the shortcut's gradient."""
    b, c, tile, t, there = _row(tiles, C, T, UNIT, BLOCK)
    halves: tl.constexpr = 2 if ACT >= 3 else 1
    entry, entries = b * tiles + tile, B * tiles
    x = x_in + b * x_batch * UNIT + c * x_channel * UNIT
    z, normal = _normed(x, t, there, weight, bias, mean, var, eps, normed, c)
    row = shortcut + b * s_batch * UNIT + c * s_channel * UNIT
    side, s_normal = z, normal
    if added:
        side, s_normal = _normed(row, t, there, s_weight, s_bias, s_mean, s_var, s_eps, s_normed, c)
        if not AFTER:
            z += side
    gate, gate_normal, gate_s_normal = z, normal, normal
    if ACT >= 3:
        gate, gate_normal = _normed(
            x + C * x_channel.to(tl.int64) * UNIT, t, there, weight, bias, mean, var, eps, normed, c + C
        )
        if added:
            row += C * s_channel.to(tl.int64) * UNIT
            other, gate_s_normal = _normed(row, t, there, s_weight, s_bias, s_mean, s_var, s_eps, s_normed, c + C)
            gate += other
    g = tl.load(g_in + b * g_batch * UNIT + c * g_channel * UNIT + t, mask=there, other=0.0).to(tl.float32)
    d, other = activate_back(g, z, gate, ACT)
    d, other = tl.where(there, d, 0.0), tl.where(there, other, 0.0)
    to = dz + (b * (halves * C) + c) * (T * UNIT) + t
    tl.store(to, d, mask=there)
    _store_sums(sums, shortcut_sums, c, entry, entries, halves * C, d, normal, g if AFTER else d, s_normal, added)
    if ACT >= 3:
        tl.store(to + C.to(tl.int64) * (T * UNIT), other, mask=there)
        _store_sums(
            sums, shortcut_sums, c + C, entry, entries, halves * C, other, gate_normal, other, gate_s_normal, added
        )


@triton.jit(do_not_specialize=_SIZES)
def moments_kernel(x_in, moments, tiles, C, T, B, x_batch, x_channel, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """moments [3, C, B tiles]."""
    b, c, tile, t, there = _row(tiles, C, T, UNIT, BLOCK)
    x = tl.load(x_in + b * x_batch * UNIT + c * x_channel * UNIT + t, mask=there, other=0.0).to(tl.float32)
    entries = B * tiles
    store_moments(moments, c * entries + b * tiles + tile, C.to(tl.int64) * entries, x, there, C > 0, 0)


@triton.jit(do_not_specialize=_SIZES)
def gradient_kernel(g_in, x_in, weight, mean, var, sums, dx, eps, count, tiles, C, T, x_batch, x_channel, g_batch,
                    g_channel, UNIT: tl.constexpr, TRAINING: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    b, c, _, t, there = _row(tiles, C, T, UNIT, BLOCK)
    m, r, s, _ = norm_rows(weight, weight, mean, var, eps, c, C > 0)
    d = tl.load(g_in + b * g_batch * UNIT + c * g_channel * UNIT + t, mask=there, other=0.0).to(tl.float32)
    if TRAINING:
        x = tl.load(x_in + b * x_batch * UNIT + c * x_channel * UNIT + t, mask=there, other=0.0).to(tl.float32)
        d -= tl.load(sums + c) / count + (x - m) * r * (tl.load(sums + C + c) / count)
    tl.store(dx + (b * C + c) * (T * UNIT) + t, s * r * d, mask=there)


def forward(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, mean: Tensor | None, var: Tensor | None,
    shortcut: Tensor | None, shortcut_weight: Tensor | None, shortcut_bias: Tensor | None, shortcut_mean: Tensor | None,
    shortcut_var: Tensor | None, eps: float, shortcut_eps: float, activation: int, training: bool, after: bool = False,
) -> Tensor:  # fmt: skip
    """torch.ops.mvat.norm_act; with `after` the shortcut joins behind the activation."""
    check_capability("norm_act", common.capability(x.device))
    B, C, T = x.shape[0], x.shape[1] // 2 if activation in PAIRS else x.shape[1], x.shape[2]
    y = x.new_empty(B, C, T)
    if not y.numel():
        return y
    x, side = dense_rows(x), dense_rows(x if shortcut is None else shortcut)
    wide, tiles = unit(x, side), triton.cdiv(T, BLOCK)
    spare = _spare(x, norm_weight, shortcut_weight)
    norm = AppliedNorm.of(norm_weight, norm_bias, mean, var, eps, spare)
    other = AppliedNorm.of(shortcut_weight, shortcut_bias, shortcut_mean, shortcut_var, shortcut_eps, spare)
    with torch.cuda.device_of(x):
        norm_act_kernel[(B * C * tiles,)](
            x, *norm.tensors, side, *other.tensors, y, norm.eps, norm.given, int(shortcut is not None), other.eps,
            other.given,
            tiles, C, T // wide, x.stride(0) // wide, x.stride(1) // wide, side.stride(0) // wide,
            side.stride(1) // wide,
            UNIT=wide, ACT=activation, AFTER=after, BLOCK=BLOCK, num_warps=_WARPS,
        )  # fmt: skip
    return y


def backward(
    grad: Tensor, x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, mean: Tensor | None, var: Tensor |
    None,
    shortcut: Tensor | None, shortcut_weight: Tensor | None, shortcut_bias: Tensor | None, shortcut_mean: Tensor | None,
    shortcut_var: Tensor | None, eps: float, shortcut_eps: float, activation: int, after: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """torch.ops.mvat.norm_act_backward, likewise: then the shortcut's sums are those of grad."""
    check_capability("norm_act", common.capability(x.device))
    (B, channels, T), C = x.shape, grad.shape[1]
    dz, added = x.new_empty(x.shape), shortcut is not None
    if not dz.numel():
        zeros = x.new_zeros((2, channels), dtype=torch.float32)
        return dz, zeros, zeros[: 2 * added].clone()
    x, grad, side = dense_rows(x), dense_rows(grad), dense_rows(x if shortcut is None else shortcut)
    wide, tiles = unit(x, grad, side), triton.cdiv(T, BLOCK)
    spare = _spare(x, norm_weight, shortcut_weight)
    norm = AppliedNorm.of(norm_weight, norm_bias, mean, var, eps, spare)
    other = AppliedNorm.of(shortcut_weight, shortcut_bias, shortcut_mean, shortcut_var, shortcut_eps, spare)
    sums, shortcut_sums = (x.new_empty((2, n, B * tiles), dtype=torch.float32) for n in (channels, channels * added))
    with torch.cuda.device_of(x):
        norm_act_backward_kernel[(B * C * tiles,)](
            grad, x, *norm.tensors, side, *other.tensors, dz, sums, shortcut_sums, norm.eps, norm.given, int(added),
            other.eps,
            other.given, tiles, C, T // wide, B, x.stride(0) // wide, x.stride(1) // wide, side.stride(0) // wide,
            side.stride(1) // wide, grad.stride(0) // wide, grad.stride(1) // wide, UNIT=wide, ACT=activation,
            AFTER=after,
            BLOCK=BLOCK, num_warps=_WARPS,
        )  # fmt: skip
    return (
        dz,
        total(sums, channels),
        total(shortcut_sums, channels) if added else x.new_empty(0, channels, dtype=torch.float32),
    )


def batch_statistics(x: Tensor) -> Tensor:
    """torch.ops.mvat.batch_statistics."""
    check_capability("batch_statistics", common.capability(x.device))
    B, C, T = x.shape
    if not x.numel():
        return x.new_zeros((2, C), dtype=torch.float32)
    x = dense_rows(x)
    wide, tiles = unit(x), triton.cdiv(T, BLOCK)
    moments = x.new_empty((3, C, B * tiles), dtype=torch.float32)
    with torch.cuda.device_of(x):
        moments_kernel[(B * C * tiles,)](
            x, moments, tiles, C, T // wide, B, x.stride(0) // wide, x.stride(1) // wide, UNIT=wide, BLOCK=BLOCK,
            num_warps=_WARPS,
        )  # fmt: skip
        return statistics(moments, C)


def norm_gradient(
    dz: Tensor, x: Tensor, weight: Tensor, mean: Tensor, var: Tensor, sums: Tensor, eps: float, count: float, training:
    bool
) -> Tensor:  # fmt: skip
    """torch.ops.mvat.norm_gradient."""
    check_capability("norm_gradient", common.capability(x.device))
    B, C, T = x.shape
    dx = x.new_empty(x.shape)
    if not dx.numel():
        return dx
    x, dz = dense_rows(x), dense_rows(dz)
    wide, tiles = unit(x, dz), triton.cdiv(T, BLOCK)
    weight, mean, var, sums = (t.contiguous() for t in (weight, mean, var, sums))
    with torch.cuda.device_of(x):
        gradient_kernel[(B * C * tiles,)](
            dz, x, weight, mean, var, sums, dx, eps, float(count), tiles, C, T // wide, x.stride(0) // wide,
            x.stride(1) // wide, dz.stride(0) // wide, dz.stride(1) // wide, UNIT=wide, TRAINING=training, BLOCK=BLOCK,
            num_warps=_WARPS,
        )  # fmt: skip
    return dx


def _spare(x: Tensor, *weights: Tensor | None) -> Tensor:
    """A tensor in float32 that stands for those of a norm that is not there; it is never read."""
    found = [w for w in weights if w is not None]
    return found[0] if found else x.new_empty(1, dtype=torch.float32)
