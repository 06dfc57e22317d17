"""The depthwise stage of a chain on a GPU: every channel convolved with up to 33 taps of its own, as products.

A row of blocks of 32 samples, each seen through a window of 64, meets a band matrix made of the channel's weights:

    y[32 r + j] = sum_i u[32 r - lead + i] W[i, j]          W[i, j] = w[i - j - lead + padding]

so that every sample is normalised and activated twice instead of once a tap, and tensor cores do the rest. The gradient
of u is the same with grad's windows and the weights turned round; that of w sums the diagonals of grad' U, U the
windows. Reads x once and writes y once; backward reads grad and x once and writes dz once. Sums as in norm_act_conv.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvat.kernels.triton import common
from mvat.kernels.triton.common import (
    TYPES,
    AppliedNorm,
    activate_back,
    activated,
    norm_rows,
    operand,
    statistics,
    store_moments,
    total,
    unit,
)
from mvat.kernels.triton.plans import ConvPlan, Kind, Tile

HOP = tl.constexpr(32)
WINDOW = tl.constexpr(64)
#: Taps that a band of this window and hop has room for.
MOST_TAPS = 33

_SIZES = [
    "eps", "normed", "biased", "wanted", "tiles", "C", "T", "T_out", "x_batch", "x_channel", "g_batch", "g_channel",
    "taps",
    "lead", "offset", "back_lead", "back_offset", "B", "splits",
]  # fmt: skip


@triton.jit
def _band(w, taps, offset, TURNED: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """[WINDOW, HOP] of one channel's weights: tap i - j - offset, counted from the end where TURNED."""
    tap = tl.arange(0, WINDOW)[:, None] - tl.arange(0, HOP)[None, :] - offset
    there = (tap >= 0) & (tap < taps)
    if TURNED:
        tap = taps - 1 - tap
    return operand(tl.load(w + tap, mask=there, other=0.0), DTYPE, PRECISION)


@triton.jit(do_not_specialize=_SIZES)
def depthwise_kernel(x_in, norm_weight, norm_bias, mean, var, w, bias, y, moments, eps, normed, biased, wanted, tiles,
                     C, T, T_out, x_batch, x_channel, taps, lead, offset, B, UNIT: tl.constexpr, ACT: tl.constexpr,
                     ROWS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """ROWS blocks of one channel of y. moments [3, C, B tiles] where wanted."""
    tile, c, b = tl.program_id(0) % tiles, tl.program_id(0) // tiles % C, tl.program_id(0) // tiles // C
    T *= UNIT
    T_out *= UNIT
    x_channel = x_channel.to(tl.int64) * UNIT
    x_in += b.to(tl.int64) * x_batch * UNIT
    block = (tile * ROWS + tl.arange(0, ROWS))[:, None] * HOP
    m, r, s, a = norm_rows(norm_weight, norm_bias, mean, var, eps, c, normed != 0)
    gm, gr, gs, ga = m, r, s, a
    if ACT >= 3:
        gm, gr, gs, ga = norm_rows(norm_weight, norm_bias, mean, var, eps, c + C, normed != 0)
    t = block - lead * UNIT + tl.arange(0, WINDOW)[None, :]
    u = activated(x_in, t, c.to(tl.int64), m, r, s, a, gm, gr, gs, ga, x_channel, C, (t >= 0) & (t < T), ACT)
    band = _band(w + c * taps, taps, offset, False, DTYPE, PRECISION)
    acc = tl.dot(operand(u, DTYPE, PRECISION), band, input_precision=PRECISION)
    if biased:
        acc += tl.load(bias + c)
    out = acc.to(y.dtype.element_ty)
    t = block + tl.arange(0, HOP)[None, :]
    there = t < T_out
    tl.store(y + (b.to(tl.int64) * C + c) * T_out + t, out, mask=there)
    if wanted:
        entries = B * tiles
        values = tl.reshape(out.to(tl.float32), [ROWS * HOP])
        at = c.to(tl.int64) * entries + b * tiles + tile
        store_moments(moments, at, C.to(tl.int64) * entries, values, tl.reshape(there, [ROWS * HOP]), C > 0, 0)


@triton.jit(do_not_specialize=_SIZES)
def depthwise_backward_kernel(g_in, x_in, norm_weight, norm_bias, mean, var, w, dz, sums, partials, bias_partials,
                              eps, normed, tiles, C, T, T_out, x_batch, x_channel, g_batch, g_channel, taps, lead,
                              offset, back_lead, back_offset, B, splits, UNIT: tl.constexpr, ACT: tl.constexpr,
                              ROWS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """A share of the tiles of one channel. sums [2, C or 2 C, splits], partials [splits, C, WINDOW], bias_partials
    [splits, C].
    """
    c, split = tl.program_id(0) % C, tl.program_id(0) // C
    halves: tl.constexpr = 2 if ACT >= 3 else 1
    T *= UNIT
    T_out *= UNIT
    x_channel = x_channel.to(tl.int64) * UNIT
    g_channel = g_channel.to(tl.int64) * UNIT
    wide = c.to(tl.int64)
    m, r, s, a = norm_rows(norm_weight, norm_bias, mean, var, eps, c, normed != 0)
    gm, gr, gs, ga = m, r, s, a
    if ACT >= 3:
        gm, gr, gs, ga = norm_rows(norm_weight, norm_bias, mean, var, eps, c + C, normed != 0)
    band = _band(w + c * taps, taps, back_offset, True, DTYPE, PRECISION)
    acc = tl.zeros([HOP, WINDOW], tl.float32)
    bias = 0.0
    sum_z = 0.0
    sum_n = 0.0
    sum_gz = 0.0
    sum_gn = 0.0
    for i in range(split, B * tiles, splits):
        b = (i // tiles).to(tl.int64)
        block = (i % tiles * ROWS + tl.arange(0, ROWS))[:, None] * HOP
        x, grad = x_in + b * x_batch * UNIT, g_in + b * g_batch * UNIT + wide * g_channel
        t = block - lead * UNIT + tl.arange(0, WINDOW)[None, :]
        u = activated(x, t, wide, m, r, s, a, gm, gr, gs, ga, x_channel, C, (t >= 0) & (t < T), ACT)
        t = block + tl.arange(0, HOP)[None, :]
        g = tl.load(grad + t, mask=t < T_out, other=0.0)
        bias += tl.sum(tl.sum(g.to(tl.float32), 1), 0)
        acc = tl.dot(
            tl.trans(operand(g, DTYPE, PRECISION)), operand(u, DTYPE, PRECISION), acc, input_precision=PRECISION
        )
        there = t < T
        t = block - back_lead * UNIT + tl.arange(0, WINDOW)[None, :]
        g = tl.load(grad + t, mask=(t >= 0) & (t < T_out), other=0.0)
        d = tl.dot(operand(g, DTYPE, PRECISION), band, input_precision=PRECISION)
        t = block + tl.arange(0, HOP)[None, :]
        normal = (tl.load(x + wide * x_channel + t, mask=there, other=0.0).to(tl.float32) - m) * r
        z = normal * s + a
        gate, gate_normal = z, normal
        if ACT >= 3:
            gate_normal = (tl.load(x + (wide + C) * x_channel + t, mask=there, other=0.0).to(tl.float32) - gm) * gr
            gate = gate_normal * gs + ga
        d, other = activate_back(d, z, gate, ACT)
        d = tl.where(there, d, 0.0)
        to = dz + (b * (halves * C) + wide) * T + t
        tl.store(to, d, mask=there)
        sum_z += tl.sum(tl.sum(d, 1), 0)
        sum_n += tl.sum(tl.sum(d * normal, 1), 0)
        if ACT >= 3:
            other = tl.where(there, other, 0.0)
            tl.store(to + C.to(tl.int64) * T, other, mask=there)
            sum_gz += tl.sum(tl.sum(other, 1), 0)
            sum_gn += tl.sum(tl.sum(other * gate_normal, 1), 0)
    # Tap k stands in row j at column j + k + offset.
    tap = tl.arange(0, WINDOW)
    column = tl.arange(0, HOP)[:, None] + tap[None, :] + offset
    diagonal = tl.gather(acc, tl.minimum(column, WINDOW - 1), 1)
    tl.store(partials + (split * C + wide) * WINDOW + tap, tl.sum(tl.where(column < WINDOW, diagonal, 0.0), 0))
    tl.store(bias_partials + split * C + c, bias)
    tl.store(sums + wide * splits + split, sum_z)
    tl.store(sums + (halves * C + wide) * splits + split, sum_n)
    if ACT >= 3:
        tl.store(sums + (C + wide) * splits + split, sum_gz)
        tl.store(sums + (3 * C + wide) * splits + split, sum_gn)


def forward(
    x: Tensor, norm: AppliedNorm, weight: Tensor, bias: Tensor | None, y: Tensor, activation: int, padding: int,
    want_statistics: bool, kind: Kind, plan: ConvPlan,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y is filled; with its statistics."""
    B, C, T_out = y.shape
    taps, block = weight.shape[2], _block(plan, T_out)
    wide, (lead,) = _leads((padding,), taps, unit(x, y))
    tiles, weight = triton.cdiv(T_out, block.rows * HOP.value), weight.contiguous()
    moments = x.new_empty((3, C, B * tiles) if want_statistics else 1, dtype=torch.float32)
    depthwise_kernel[(B * C * tiles,)](
        x, *norm.tensors, weight, weight if bias is None else bias, y, moments, norm.eps, norm.given,
        int(bias is not None),
        int(want_statistics), tiles, C, x.shape[2] // wide, T_out // wide, x.stride(0) // wide, x.stride(1) // wide,
        taps,
        lead // wide, lead - padding, B, UNIT=wide, ACT=activation, ROWS=block.rows, DTYPE=TYPES[kind.dtype],
        PRECISION=kind.precision, num_warps=block.warps, num_stages=block.stages,
    )  # fmt: skip
    return y, statistics(moments, C) if want_statistics else moments.new_empty(0, C)


def backward(
    grad: Tensor, x: Tensor, norm: AppliedNorm, weight: Tensor, dz: Tensor, activation: int, padding: int, kind: Kind,
    plan: ConvPlan,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dz is filled; the sums [2, channels], the gradients of weight and bias."""
    B, C, T_out = grad.shape
    T, channels, taps = x.shape[2], x.shape[1], weight.shape[2]
    block, back = _block(plan, max(T, T_out)), taps - 1 - padding
    wide, (lead, back_lead) = _leads((padding, back), taps, unit(x, grad))
    tiles, weight = triton.cdiv(max(T, T_out), block.rows * HOP.value), weight.contiguous()
    splits = max(1, min(B * tiles, 8 * common.processors(x.device) // C))
    sums, partials, bias = (
        x.new_empty(s, dtype=torch.float32) for s in ((2, channels, splits), (splits, C, WINDOW.value), (splits, C))
    )
    depthwise_backward_kernel[(C * splits,)](
        grad, x, *norm.tensors, weight, dz, sums, partials, bias, norm.eps, norm.given, tiles, C, T // wide, T_out //
        wide,
        x.stride(0) // wide, x.stride(1) // wide, grad.stride(0) // wide, grad.stride(1) // wide, taps, lead // wide,
        lead - padding, back_lead // wide, back_lead - back, B, splits, UNIT=wide, ACT=activation, ROWS=block.rows,
        DTYPE=TYPES[kind.dtype], PRECISION=kind.precision, num_warps=block.warps, num_stages=block.stages,
    )  # fmt: skip
    return total(sums, channels), partials.sum(0)[:, None, :taps].contiguous(), bias.sum(0)


def _block(plan: ConvPlan, length: int) -> Tile:
    return plan.short if length <= plan.depthwise.rows * HOP.value // 4 else plan.depthwise


def _leads(paddings: tuple[int, ...], taps: int, wide: int) -> tuple[int, list[int]]:
    """The unit of loads, and where a window begins before its block: at the padding, or at the multiple before it."""
    leads = [triton.cdiv(padding, wide) * wide for padding in paddings]
    if all(lead - padding + taps <= MOST_TAPS for lead, padding in zip(leads, paddings, strict=True)):
        return wide, leads
    return 1, list(paddings)
