"""A stage of a convolution chain on a GPU: `mvat.kernels.norm_act_conv`, forward and backward, in Triton.

Here stand convolutions without groups; depthwise.py has the others.

Every product has time in its rows. A gather takes tap j of a tile of columns q from position q step + first + j turn of
its input, and its columns n = (channel, phase) go to position q phases + phase - shift of its output:

    convolution of stride S        step S, first -padding, turn 1; one phase
    its transpose                  step 1, first 0, turn -1, taps phase + j S; S phases, shift padding

The gradient of either is the other, so that `conv_kernel` and `data_kernel` differ in what they do before and after:

    conv_kernel      u = act(norm(x)) -> y = u W + b, moments of y           reads x once, writes y once
    data_kernel      grad -> du = grad W' -> dz = du act'(z), its sums       reads grad and x once, writes dz once
    weight_kernel    dW = grad' u and the sums of grad                       reads grad and x once

That is one read and one write of the features forward, and backward four reads and one write; a pointwise stage of up
to 64 or 32 channels on either side takes both gradients from one reading, `pointwise_kernel`: two reads and one write.
Where a tile does not hold all channels of the output, tiles of the same columns follow one another, and so do the taps
of a weight's gradient: what they read again should lie in the second cache. u and z are never stored.

A program sums over its own tile, or over a share of tiles that depends on the sizes and the device; nothing is atomic.
A norm is applied as ((x - mean) inverse) weight + bias in float32; products read operands as global_attention's do.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvat.kernels.norm_act_conv import length_out
from mvat.kernels.triton import common, depthwise
from mvat.kernels.triton.common import (
    PAIRS,
    TYPES,
    AppliedNorm,
    activate,
    activate_back,
    activated,
    before,
    dense_rows,
    norm_rows,
    operand,
    statistics,
    store_moments,
    total,
    unit,
    width,
)
from mvat.kernels.triton.plans import ConvPlan, Kind, choose_conv

_SIZES = [
    "eps", "normed", "biased", "tiles", "C", "N", "T", "T_out", "Q", "x_batch", "x_channel", "g_batch", "g_channel",
    "w_in", "w_out", "w_tap", "kernel", "taps", "step", "first", "turn", "phases", "shift", "B", "splits", "bias_taps",
    "whole", "wanted",
]  # fmt: skip


@triton.jit
def _weights(w, c, n, j, C, N, w_in, w_out, w_tap, kernel, phases, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """[c, n] of tap j, n = (channel, phase)."""
    tap = n % phases + j * phases
    at = c[:, None].to(tl.int64) * w_in + (n // phases * w_out + tap * w_tap)[None, :]
    return operand(
        tl.load(w + at, mask=(c[:, None] < C) & ((n < N) & (tap < kernel))[None, :], other=0.0), DTYPE, PRECISION
    )


@triton.jit(do_not_specialize=_SIZES)
def conv_kernel(x_in, norm_weight, norm_bias, mean, var, w, bias, y, moments, eps, normed, biased, wanted, tiles, C,
                N, T, T_out, x_batch, x_channel, w_in, w_out, w_tap, kernel, taps, step, first, turn, phases, shift,
                B, UNIT: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, INNER: tl.constexpr,
                DTYPE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """A tile of y: all input channels and taps. moments [3, N, B tiles] where wanted."""
    across = tl.cdiv(N, COLS)
    tile, b = tl.program_id(0) // across % tiles, tl.program_id(0) // across // tiles
    q = tile * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) % across * COLS + tl.arange(0, COLS)
    T *= UNIT
    x_channel = x_channel.to(tl.int64) * UNIT
    x_in += b.to(tl.int64) * x_batch * UNIT
    inner = tl.cdiv(C, INNER)
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for i in range(0, taps * inner):
        c = i % inner * INNER + tl.arange(0, INNER)
        t = q * step + (first + i // inner * turn)
        there = (c < C) & (normed != 0)
        m, r, s, a = norm_rows(norm_weight, norm_bias, mean, var, eps, c, there)
        gm, gr, gs, ga = m, r, s, a
        if ACT >= 3:
            gm, gr, gs, ga = norm_rows(norm_weight, norm_bias, mean, var, eps, c + C, there)
        u = activated(x_in, t[:, None], c[None, :].to(tl.int64), m[None, :], r[None, :], s[None, :], a[None, :],
        gm[None, :],
                       gr[None, :], gs[None, :], ga[None, :], x_channel, C, ((t >= 0) & (t < T))[:,
                       None] & (c < C)[None, :],
                       ACT)  # fmt: skip
        v = _weights(w, c, n, i // inner, C, N, w_in, w_out, w_tap, kernel, phases, DTYPE, PRECISION)
        acc = tl.dot(operand(u, DTYPE, PRECISION), v, acc, input_precision=PRECISION)
    acc += tl.load(bias + n // phases, mask=(n < N) & (biased != 0), other=0.0)[None, :]
    out = acc.to(y.dtype.element_ty)
    s = q[:, None] * phases + (n % phases)[None, :] - shift
    T_out *= UNIT
    there = (n < N)[None, :] & (s >= 0) & (s < T_out)
    o = b.to(tl.int64) * (N // phases) + n // phases
    tl.store(y + o[None, :] * T_out + s, out, mask=there)
    if wanted:
        entries = B * tiles
        at = n.to(tl.int64) * entries + b * tiles + tile
        store_moments(moments, at, N.to(tl.int64) * entries, out.to(tl.float32), there, n < N, 0)


@triton.jit(do_not_specialize=_SIZES)
def data_kernel(g_in, x_in, norm_weight, norm_bias, mean, var, w, dz, sums, eps, normed, tiles, C, N, T, T_out,
                x_batch, x_channel, g_batch, g_channel, w_in, w_out, w_tap, kernel, taps, step, first, turn, phases,
                shift, B, UNIT: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
                INNER: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """A tile of dz: all C channels of grad and all taps. T is grad's length, T_out that of x; sums [2, 1 or 2 N, B
    tiles].
    """
    across = tl.cdiv(N, COLS)
    tile, b = tl.program_id(0) // across % tiles, tl.program_id(0) // across // tiles
    q = tile * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) % across * COLS + tl.arange(0, COLS)
    T *= UNIT
    g_channel = g_channel.to(tl.int64) * UNIT
    g_in += b.to(tl.int64) * g_batch * UNIT
    inner = tl.cdiv(C, INNER)
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for i in range(0, taps * inner):
        c = i % inner * INNER + tl.arange(0, INNER)
        t = q * step + (first + i // inner * turn)
        there = ((t >= 0) & (t < T))[:, None] & (c < C)[None, :]
        g = tl.load(g_in + c[None, :].to(tl.int64) * g_channel + t[:, None], mask=there, other=0.0)
        v = _weights(w, c, n, i // inner, C, N, w_in, w_out, w_tap, kernel, phases, DTYPE, PRECISION)
        acc = tl.dot(operand(g, DTYPE, PRECISION), v, acc, input_precision=PRECISION)
    s = q[:, None] * phases + (n % phases)[None, :] - shift
    T_out *= UNIT
    there = (n < N)[None, :] & (s >= 0) & (s < T_out)
    x_channel = x_channel.to(tl.int64) * UNIT
    x_in += b.to(tl.int64) * x_batch * UNIT
    entries = B * tiles
    at = n.to(tl.int64) * entries + b * tiles + tile
    before(acc, x_in, norm_weight, norm_bias, mean, var, dz, sums, eps, normed, n // phases, N // phases, s, b, at,
    n < N,
            there, x_channel, T_out, entries, phases, ACT, 0)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def weight_kernel(g_in, x_in, norm_weight, norm_bias, mean, var, partials, bias_partials, eps, normed, tiles, C, N,
                   T, Q, x_batch, x_channel, g_batch, g_channel, kernel, step, first, B, splits, bias_taps, whole,
                   TURNED: tl.constexpr, UNIT: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr,
                   COLS: tl.constexpr, INNER: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One tap's products over a share of the tiles: of what stays at q [N channels, Q samples] and of what the tap
    moves to q step + first + tap [C channels, T samples]. grad stays and u moves, or TURNED: for a transposed
    convolution.

    partials [splits, kernel, N, C]; bias_partials [splits, bias_taps, channels of grad], of the taps that see samples
    of grad for the first time: those before `whole`, and all at the last q.
    """
    along, across = tl.cdiv(N, ROWS), tl.cdiv(C, COLS)
    part = tl.program_id(0) // across
    tap, split = part // along % kernel, part // along // kernel
    n = part % along * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % across * COLS + tl.arange(0, COLS)
    Q *= UNIT
    T *= UNIT
    x_channel = x_channel.to(tl.int64) * UNIT
    g_channel = g_channel.to(tl.int64) * UNIT
    channel = n if TURNED else c
    half = N if TURNED else C
    there = (channel < half) & (normed != 0)
    m, r, s, a = norm_rows(norm_weight, norm_bias, mean, var, eps, channel, there)
    m, r, s, a = m[:, None], r[:, None], s[:, None], a[:, None]
    gm, gr, gs, ga = m, r, s, a
    if ACT >= 3:
        gm, gr, gs, ga = norm_rows(norm_weight, norm_bias, mean, var, eps, channel + half, there)
        gm, gr, gs, ga = gm[:, None], gr[:, None], gs[:, None], ga[:, None]
    acc = tl.zeros([ROWS, COLS], tl.float32)
    bias = tl.zeros([COLS if TURNED else ROWS], tl.float32)
    for i in range(split, B * tiles, splits):
        b = (i // tiles).to(tl.int64)
        q = i % tiles * INNER + tl.arange(0, INNER)
        t = q * step + first + tap
        stays = (n < N)[:, None] & (q < Q)[None, :]
        moves = (c < C)[:, None] & ((t >= 0) & (t < T) & (q < Q))[None, :]
        if TURNED:
            u = activated(x_in + b * x_batch * UNIT, q[None, :], n[:, None].to(tl.int64), m, r, s, a, gm, gr, gs, ga,
                           x_channel, N, stays, ACT)  # fmt: skip
            g = tl.load(
                g_in + b * g_batch * UNIT + c[:, None].to(tl.int64) * g_channel + t[None, :], mask=moves, other=0.0
            )
            bias += tl.sum(tl.where(((tap < whole) | (q == Q - 1))[None, :], g.to(tl.float32), 0.0), 1)
            one, two = u, g
        else:
            u = activated(x_in + b * x_batch * UNIT, t[None, :], c[:, None].to(tl.int64), m, r, s, a, gm, gr, gs, ga,
                           x_channel, C, moves, ACT)  # fmt: skip
            g = tl.load(
                g_in + b * g_batch * UNIT + n[:, None].to(tl.int64) * g_channel + q[None, :], mask=stays, other=0.0
            )
            bias += tl.sum(g.to(tl.float32), 1)
            one, two = g, u
        one, two = operand(one, DTYPE, PRECISION), operand(two, DTYPE, PRECISION)
        acc = tl.dot(one, tl.trans(two), acc, input_precision=PRECISION)
    at = (split * kernel + tap).to(tl.int64) * N + n[:, None]
    tl.store(partials + at * C + c[None, :], acc, mask=(n < N)[:, None] & (c < C)[None, :])
    if TURNED:
        if part % along == 0:
            tl.store(bias_partials + (split * bias_taps + tap) * C + c, bias, mask=c < C)
    else:
        if (tl.program_id(0) % across == 0) & (tap < bias_taps):
            tl.store(bias_partials + (split * bias_taps + tap) * N + n, bias, mask=n < N)


@triton.jit(do_not_specialize=_SIZES)
def pointwise_kernel(g_in, x_in, norm_weight, norm_bias, mean, var, w, dz, sums, partials, bias_partials, eps, normed,
                     tiles, C, N, T, x_batch, x_channel, g_batch, g_channel, w_in, w_out, B, splits,
                     UNIT: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
                     INNER: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Both gradients of a pointwise stage of C channels of grad and N of u, over a share of the tiles.

    sums [2, 1 or 2 N, splits], partials [splits, C, N], bias_partials [splits, C].
    """
    T *= UNIT
    x_channel = x_channel.to(tl.int64) * UNIT
    g_channel = g_channel.to(tl.int64) * UNIT
    c, n = tl.arange(0, INNER), tl.arange(0, COLS)
    halves: tl.constexpr = 2 if ACT >= 3 else 1
    known = (n < N) & (normed != 0)
    m, r, s, a = norm_rows(norm_weight, norm_bias, mean, var, eps, n, known)
    m, r, s, a = m[None, :], r[None, :], s[None, :], a[None, :]
    gm, gr, gs, ga = m, r, s, a
    if ACT >= 3:
        gm, gr, gs, ga = norm_rows(norm_weight, norm_bias, mean, var, eps, n + N, known)
        gm, gr, gs, ga = gm[None, :], gr[None, :], gs[None, :], ga[None, :]
    v = _weights(w, c, n, 0, C, N, w_in, w_out, 0, 1, 1, DTYPE, PRECISION)
    acc = tl.zeros([INNER, COLS], tl.float32)
    bias = tl.zeros([INNER], tl.float32)
    sum_z = tl.zeros([COLS], tl.float32)
    sum_n = tl.zeros([COLS], tl.float32)
    sum_gz = tl.zeros([COLS], tl.float32)
    sum_gn = tl.zeros([COLS], tl.float32)
    wide = n[None, :].to(tl.int64)
    for i in range(tl.program_id(0), B * tiles, splits):
        b = (i // tiles).to(tl.int64)
        t = (i % tiles * ROWS + tl.arange(0, ROWS))[:, None]
        there = (t < T) & (n < N)[None, :]
        g = tl.load(g_in + b * g_batch * UNIT + c[None, :].to(tl.int64) * g_channel + t,
        mask=(t < T) & (c < C)[None, :],
                    other=0.0)  # fmt: skip
        bias += tl.sum(g.to(tl.float32), 0)
        g = operand(g, DTYPE, PRECISION)
        x = x_in + b * x_batch * UNIT
        normal = (tl.load(x + wide * x_channel + t, mask=there, other=0.0).to(tl.float32) - m) * r
        z = normal * s + a
        gate, gate_normal = z, normal
        if ACT >= 3:
            gate_normal = (tl.load(x + (wide + N) * x_channel + t, mask=there, other=0.0).to(tl.float32) - gm) * gr
            gate = gate_normal * gs + ga
        u = tl.where(there, activate(z, gate, ACT), 0.0)
        acc = tl.dot(tl.trans(g), operand(u, DTYPE, PRECISION), acc, input_precision=PRECISION)
        d, other = activate_back(tl.dot(g, v, input_precision=PRECISION), z, gate, ACT)
        d = tl.where(there, d, 0.0)
        to = dz + (b * (halves * N) + wide) * T + t
        tl.store(to, d, mask=there)
        sum_z += tl.sum(d, 0)
        sum_n += tl.sum(d * normal, 0)
        if ACT >= 3:
            other = tl.where(there, other, 0.0)
            tl.store(to + N.to(tl.int64) * T, other, mask=there)
            sum_gz += tl.sum(other, 0)
            sum_gn += tl.sum(other * gate_normal, 0)
    split = tl.program_id(0)
    tl.store(partials + (split * C + c[:, None]) * N + n[None, :], acc, mask=(c < C)[:, None] & (n < N)[None, :])
    tl.store(bias_partials + split * C + c, bias, mask=c < C)
    tl.store(sums + n * splits + split, sum_z, mask=n < N)
    tl.store(sums + (halves * N + n) * splits + split, sum_n, mask=n < N)
    if ACT >= 3:
        tl.store(sums + (N + n) * splits + split, sum_gz, mask=n < N)
        tl.store(sums + (3 * N + n) * splits + split, sum_gn, mask=n < N)


@dataclass(frozen=True)
class Gather:
    """How a tile of columns finds its samples; the module's table."""

    taps: int
    step: int
    first: int
    turn: int
    phases: int
    shift: int

    @classmethod
    def of(cls, kernel: int, stride: int, padding: int, transposed: bool) -> "Gather":
        if transposed:
            return cls(triton.cdiv(kernel, stride), 1, 0, -1, stride, padding)
        return cls(kernel, stride, -padding, 1, 1, 0)

    def columns(self, length: int) -> int:
        """Tiles have to reach over this many q for an output of this length."""
        return triton.cdiv(length + self.shift, self.phases)


def forward(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, mean: Tensor | None, var: Tensor | None, weight:
    Tensor,
    bias: Tensor | None, eps: float, activation: int, stride: int, padding: int, groups: int, transposed: bool,
    training: bool, want_statistics: bool, plan: ConvPlan | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """torch.ops.mvat.norm_act_conv; `plan` is for tests."""
    B, _, T = x.shape
    C, out, K = weight.shape if transposed else (weight.shape[1], weight.shape[0], weight.shape[2])
    y = x.new_empty(B, out, length_out(T, K, stride, padding, transposed))
    if not y.numel():
        return y, x.new_zeros((2 if want_statistics else 0, out), dtype=torch.float32)
    kind = Kind.of(x)
    plan = plan or choose_conv(kind, common.capability(x.device))
    x, weight, bias = dense_rows(x), weight.float(), None if bias is None else bias.contiguous()
    norm = AppliedNorm.of(norm_weight, norm_bias, mean, var, eps, weight)
    with torch.cuda.device_of(x):
        if groups > 1:
            return depthwise.forward(x, norm, weight, bias, y, activation, padding, want_statistics, kind, plan)
        gather, (w_in, w_out, w_tap, weight) = Gather.of(K, stride, padding, transposed), _packed(weight, transposed)
        N, block = out * gather.phases, plan.forward
        tiles, cols = triton.cdiv(gather.columns(y.shape[2]), block.rows), width(N, block.cols)
        moments = x.new_empty((3, N, B * tiles) if want_statistics else 1, dtype=torch.float32)
        wide = unit(x, y)
        conv_kernel[(B * tiles * triton.cdiv(N, cols),)](
            x, *norm.tensors, weight, weight if bias is None else bias, y, moments, norm.eps, norm.given,
            int(bias is not None), int(want_statistics), tiles, C, N, T // wide, y.shape[2] // wide,
            x.stride(0) // wide,
            x.stride(1) // wide, w_in, w_out, w_tap, K, *vars(gather).values(), B, UNIT=wide, ACT=activation,
            ROWS=block.rows, COLS=cols, INNER=width(C, block.inner), DTYPE=TYPES[kind.dtype], PRECISION=kind.precision,
            num_warps=block.warps, num_stages=block.stages,
        )  # fmt: skip
        return y, statistics(moments, out) if want_statistics else moments.new_empty(0, out)


def backward(
    grad: Tensor, x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, mean: Tensor | None, var: Tensor |
    None,
    weight: Tensor, has_bias: bool, eps: float, activation: int, stride: int, padding: int, groups: int, transposed:
    bool,
    plan: ConvPlan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """torch.ops.mvat.norm_act_conv_backward, likewise."""
    dz = x.new_empty(x.shape)
    if not dz.numel():
        sums = x.new_zeros((2, x.shape[1]), dtype=torch.float32)
        d_bias = grad.sum((0, 2), dtype=torch.float32)  # padding alone makes outputs of no samples
        return dz, sums, torch.zeros_like(weight), d_bias if has_bias else d_bias.new_empty(0)
    kind = Kind.of(x)
    plan = plan or choose_conv(kind, common.capability(x.device))
    x, grad, weight = dense_rows(x), dense_rows(grad), weight.float()
    norm = AppliedNorm.of(norm_weight, norm_bias, mean, var, eps, weight)
    with torch.cuda.device_of(x):
        if groups > 1:
            sums, d_weight, d_bias = depthwise.backward(grad, x, norm, weight, dz, activation, padding, kind, plan)
        elif _is_pointwise(weight, stride, padding, transposed, plan.pointwise.cols):
            sums, d_weight, d_bias = _pointwise(grad, x, norm, weight, dz, activation, kind, plan)
        else:
            back = Gather.of(weight.shape[2], stride, padding, not transposed)
            sums = _data(grad, x, norm, weight, dz, activation, back, transposed, kind, plan)
            d_weight, d_bias = weight_gradient(
                grad, x, norm, weight, activation, stride, padding, transposed, kind, plan
            )
    return dz, sums, d_weight, d_bias if has_bias else d_bias.new_empty(0)


def _is_pointwise(weight: Tensor, stride: int, padding: int, transposed: bool, most: int) -> bool:
    return weight.shape[2] == stride == 1 and not padding and not transposed and max(weight.shape[:2]) <= most


def _pointwise(
    grad: Tensor, x: Tensor, norm: AppliedNorm, weight: Tensor, dz: Tensor, activation: int, kind: Kind, plan: ConvPlan
) -> tuple[Tensor, Tensor, Tensor]:
    """dz is filled; the sums [2, channels], the gradients of weight and bias."""
    (B, _, T), (C, N, _), block = x.shape, weight.shape, plan.pointwise
    tiles = triton.cdiv(T, block.rows)
    splits = min(B * tiles, 2 * common.processors(x.device))
    sums, partials, bias = (
        x.new_empty(s, dtype=torch.float32) for s in ((2, x.shape[1], splits), (splits, C, N), (splits, C))
    )
    wide = unit(x, grad)
    pointwise_kernel[(splits,)](
        grad, x, *norm.tensors, weight, dz, sums, partials, bias, norm.eps, norm.given, tiles, C, N, T // wide,
        x.stride(0) // wide, x.stride(1) // wide, grad.stride(0) // wide, grad.stride(1) // wide, weight.stride(0),
        weight.stride(1), B, splits, UNIT=wide, ACT=activation, ROWS=block.rows, COLS=width(N, block.cols),
        INNER=width(C, block.cols), DTYPE=TYPES[kind.dtype], PRECISION=kind.precision, num_warps=block.warps,
        num_stages=block.stages,
    )  # fmt: skip
    return total(sums, x.shape[1]), partials.sum(0)[..., None], bias.sum(0)


def _data(
    grad: Tensor, x: Tensor, norm: AppliedNorm, weight: Tensor, dz: Tensor, activation: int, gather: Gather,
    transposed: bool, kind: Kind, plan: ConvPlan,
) -> Tensor:  # fmt: skip
    """dz is filled; the sums [2, channels]."""
    B, channels, T = x.shape
    N, block = (channels // 2 if activation in PAIRS else channels) * gather.phases, plan.data
    tiles, cols = triton.cdiv(gather.columns(T), block.rows), width(N, block.cols)
    sums = x.new_empty(2, channels * gather.phases, B * tiles, dtype=torch.float32)
    w_in, w_out, w_tap, packed = _packed(weight, not transposed)
    wide = unit(x, grad)
    data_kernel[(B * tiles * triton.cdiv(N, cols),)](
        grad, x, *norm.tensors, packed, dz, sums, norm.eps, norm.given, tiles, grad.shape[1], N, grad.shape[2] // wide,
        T // wide, x.stride(0) // wide, x.stride(1) // wide, grad.stride(0) // wide, grad.stride(1) // wide, w_in,
        w_out,
        w_tap, weight.shape[2], *vars(gather).values(), B, UNIT=wide, ACT=activation, ROWS=block.rows, COLS=cols,
        INNER=width(grad.shape[1], block.inner), DTYPE=TYPES[kind.dtype], PRECISION=kind.precision,
        num_warps=block.warps,
        num_stages=block.stages,
    )  # fmt: skip
    return total(sums, channels)


def weight_gradient(
    grad: Tensor, x: Tensor, norm: AppliedNorm, weight: Tensor, activation: int, stride: int, padding: int,
    transposed: bool, kind: Kind, plan: ConvPlan,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of weight and bias."""
    (N, C, K), block = weight.shape, plan.weights
    stays, moves = (x, grad) if transposed else (grad, x)
    B, Q, T = x.shape[0], stays.shape[2], moves.shape[2]
    rows, cols, tiles = width(N, block.rows), width(C, block.cols), triton.cdiv(Q, block.inner)
    others = K * triton.cdiv(N, rows) * triton.cdiv(C, cols)
    splits = max(1, min(B * tiles, 2 * common.processors(x.device) // others))
    partials = x.new_empty(splits, K, N, C, dtype=torch.float32)
    bias = x.new_empty(splits, K if transposed else 1, grad.shape[1], dtype=torch.float32)
    wide = unit(x, grad)
    weight_kernel[(splits * others,)](
        grad, x, *norm.tensors, partials, bias, norm.eps, norm.given, tiles, C, N, T // wide, Q // wide,
        x.stride(0) // wide,
        x.stride(1) // wide, grad.stride(0) // wide, grad.stride(1) // wide, K, stride, -padding, B, splits,
        bias.shape[1],
        stride, TURNED=transposed, UNIT=wide, ACT=activation, ROWS=rows, COLS=cols, INNER=block.inner,
        DTYPE=TYPES[kind.dtype], PRECISION=kind.precision, num_warps=block.warps, num_stages=block.stages,
    )  # fmt: skip
    return partials.sum(0).permute(1, 2, 0).contiguous(), bias.sum((0, 1))


def _packed(weight: Tensor, transposed: bool) -> tuple[int, int, int, Tensor]:
    """A weight's strides over channels in, channels out and taps, and itself, every tap's matrix dense."""
    if weight.shape[2] > 1:
        weight = weight.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    a, b, tap = weight.stride()
    return (a, b, tap, weight) if transposed else (b, a, tap, weight)
