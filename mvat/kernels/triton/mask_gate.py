"""The gate of a multi-view block on a GPU: `mvat.kernels.mask_gate`, forward and backward, in Triton.

Channels up to the plan's number stay in a program through the whole formula. Forward, `gate_kernel` reads x and the
shortcut once and writes y once. Backward, `gate_backward_kernel` makes the gates anew, reads grad, x and the shortcut
once and writes the gradients before the gates' activations (twice the width), tanh * sigmoid and the last product's
gradient; from these norm_act_conv's kernels make dz and the weights' gradients. All of it in one kernel was tried: the
weights' gradients and the operands of six products together take more registers than there are.

Wider gates, which only short features have, are two stages of norm_act_conv, the second with the activation tanh(first
half) sigmoid(second half), and an end of norm_act. With p the raw gates and z the last product, features of twice and
once the size, forward writes and reads both beside x, the shortcut and y; backward makes both anew.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvat.kernels.norm import Applied
from mvat.kernels.triton import common, norm_act, norm_act_conv
from mvat.kernels.triton.common import (
    GATE,
    IDENTITY,
    RELU,
    TYPES,
    AppliedNorm,
    dense_rows,
    norm_rows,
    operand,
    sigmoid,
    tanh,
    unit,
    width,
)
from mvat.kernels.triton.plans import GatePlan, Kind, choose_gate

_SIZES = [
    "eps", "normed", "added", "s_eps", "s_normed", "tiles", "C", "H", "Z", "T", "B", "splits", "x_batch", "x_channel",
    "s_batch", "s_channel", "g_batch", "g_channel",
]  # fmt: skip
_Optional = Tensor | None


@triton.jit
def _matrix(w, i, j, rows, columns, row, column, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """[i, j] of a matrix of rows and columns, these strides apart."""
    there = (i[:, None] < rows) & (j[None, :] < columns)
    return operand(tl.load(w + i[:, None] * row + j[None, :] * column, mask=there, other=0.0), DTYPE, PRECISION)


@triton.jit
def _normal(x, c, t, there, channel, m, r):
    """x^ of a tile."""
    return (tl.load(x + c[None, :].to(tl.int64) * channel + t, mask=there, other=0.0).to(tl.float32) - m) * r


@triton.jit(do_not_specialize=_SIZES)
def gate_kernel(x_in, norm_weight, norm_bias, mean, var, gates, gates_bias, last, last_bias, shortcut, s_weight,
                s_bias, s_mean, s_var, y, eps, normed, added, s_eps, s_normed, tiles, C, H, Z, T, x_batch, x_channel,
                s_batch, s_channel, UNIT: tl.constexpr, ROWS: tl.constexpr, IN: tl.constexpr, HIDDEN: tl.constexpr,
                OUT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """A tile of y, all channels."""
    b = (tl.program_id(0) // tiles).to(tl.int64)
    t = (tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS))[:, None]
    T *= UNIT
    c, h, o = tl.arange(0, IN), tl.arange(0, HIDDEN), tl.arange(0, OUT)
    m, r, s, a = norm_rows(norm_weight, norm_bias, mean, var, eps, c, (c < C) & (normed != 0))
    there = (t < T) & (c < C)[None, :]
    u = _normal(x_in + b * x_batch * UNIT, c, t, there, x_channel.to(tl.int64) * UNIT, m[None, :], r[None, :])
    u = operand(tl.where(there, u * s[None, :] + a[None, :], 0.0), DTYPE, PRECISION)
    one = tl.dot(u, _matrix(gates, c, h, C, H, 1, C, DTYPE, PRECISION), input_precision=PRECISION)
    two = tl.dot(u, _matrix(gates + H * C, c, h, C, H, 1, C, DTYPE, PRECISION), input_precision=PRECISION)
    one += tl.load(gates_bias + h, mask=h < H, other=0.0)[None, :]
    two += tl.load(gates_bias + H + h, mask=h < H, other=0.0)[None, :]
    p = operand(tanh(one) * sigmoid(two), DTYPE, PRECISION)
    z = tl.dot(p, _matrix(last, h, o, H, Z, 1, H, DTYPE, PRECISION), input_precision=PRECISION)
    z += tl.load(last_bias + o, mask=o < Z, other=0.0)[None, :]
    z = tl.where(z < 0.0, 0.0, z)  # a NaN is handed on
    there = (t < T) & (o < Z)[None, :]
    if added:
        m, r, s, a = norm_rows(s_weight, s_bias, s_mean, s_var, s_eps, o, (o < Z) & (s_normed != 0))
        row = shortcut + b * s_batch * UNIT
        side = _normal(row, o, t, there, s_channel.to(tl.int64) * UNIT, m[None, :], r[None, :])
        z += side * s[None, :] + a[None, :]
    tl.store(y + (b * Z + o[None, :]) * T + t, z, mask=there)


@triton.jit(do_not_specialize=_SIZES)
def gate_backward_kernel(g_in, x_in, norm_weight, norm_bias, mean, var, gates, gates_bias, last, last_bias, shortcut,
                         s_mean, s_var, d_gates, product, d_last, sums, eps, normed, added, s_eps, s_normed, tiles, C,
                         H,
                         Z, T, B, x_batch, x_channel, s_batch, s_channel, g_batch, g_channel, UNIT: tl.constexpr,
                         ROWS: tl.constexpr, IN: tl.constexpr, HIDDEN: tl.constexpr, OUT: tl.constexpr,
                         DTYPE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """A tile, all channels: the gradients before the gates' activations and of the last product, and tanh * sigmoid.

    sums [2 H + 3 Z, B tiles]: of the gates' gradients, of d_last, of grad, of grad times the shortcut's x^.
    """
    tile, b = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    t = (tile * ROWS + tl.arange(0, ROWS))[:, None]
    T *= UNIT
    c, h, o = tl.arange(0, IN), tl.arange(0, HIDDEN), tl.arange(0, OUT)
    m, r, s, a = norm_rows(norm_weight, norm_bias, mean, var, eps, c, (c < C) & (normed != 0))
    there = (t < T) & (c < C)[None, :]
    u = _normal(x_in + b * x_batch * UNIT, c, t, there, x_channel.to(tl.int64) * UNIT, m[None, :], r[None, :])
    u = operand(tl.where(there, u * s[None, :] + a[None, :], 0.0), DTYPE, PRECISION)
    one = tl.dot(u, _matrix(gates, c, h, C, H, 1, C, DTYPE, PRECISION), input_precision=PRECISION)
    two = tl.dot(u, _matrix(gates + H * C, c, h, C, H, 1, C, DTYPE, PRECISION), input_precision=PRECISION)
    one = tanh(one + tl.load(gates_bias + h, mask=h < H, other=0.0)[None, :])
    two = sigmoid(two + tl.load(gates_bias + H + h, mask=h < H, other=0.0)[None, :])
    hidden = (t < T) & (h < H)[None, :]
    own = (t < T) & (o < Z)[None, :]
    p = one * two
    tl.store(product + (b * H + h[None, :]) * T + t, p, mask=hidden)
    z = tl.dot(
        operand(p, DTYPE, PRECISION), _matrix(last, h, o, H, Z, 1, H, DTYPE, PRECISION), input_precision=PRECISION
    )
    z += tl.load(last_bias + o, mask=o < Z, other=0.0)[None, :]
    row = g_in + b * g_batch * UNIT
    g = tl.load(row + o[None, :].to(tl.int64) * g_channel * UNIT + t, mask=own, other=0.0).to(tl.float32)
    entries = B * tiles
    sums += b * tiles + tile
    if added:
        m, r, _, _ = norm_rows(s_mean, s_mean, s_mean, s_var, s_eps, o, (o < Z) & (s_normed != 0))
        row = shortcut + b * s_batch * UNIT
        normal = _normal(row, o, t, own, s_channel.to(tl.int64) * UNIT, m[None, :], r[None, :])
        tl.store(sums + (2 * H + Z + o).to(tl.int64) * entries, tl.sum(g, 0), mask=o < Z)
        tl.store(sums + (2 * H + 2 * Z + o).to(tl.int64) * entries, tl.sum(g * normal, 0), mask=o < Z)
    g = tl.where(z <= 0.0, 0.0, g)
    tl.store(d_last + (b * Z + o[None, :]) * T + t, g, mask=own)
    tl.store(sums + (2 * H + o).to(tl.int64) * entries, tl.sum(g, 0), mask=o < Z)
    d = tl.dot(
        operand(g, DTYPE, PRECISION), _matrix(last, o, h, Z, H, H, 1, DTYPE, PRECISION), input_precision=PRECISION
    )
    d_two = d * p * (1.0 - two)
    d *= two * (1.0 - one * one)
    to = d_gates + (b * (2 * H) + h[None, :]) * T + t
    tl.store(to, d, mask=hidden)
    tl.store(to + H.to(tl.int64) * T, d_two, mask=hidden)
    tl.store(sums + h.to(tl.int64) * entries, tl.sum(tl.where(hidden, d, 0.0), 0), mask=h < H)
    tl.store(sums + (H + h).to(tl.int64) * entries, tl.sum(tl.where(hidden, d_two, 0.0), 0), mask=h < H)


def forward(
    x: Tensor, norm_weight: _Optional, norm_bias: _Optional, mean: _Optional, var: _Optional, gates: Tensor,
    gates_bias: Tensor, last: Tensor, last_bias: Tensor, shortcut: _Optional, shortcut_weight: _Optional,
    shortcut_bias: _Optional, shortcut_mean: _Optional, shortcut_var: _Optional, eps: float, shortcut_eps: float,
    training: bool, plan: GatePlan | None = None,
) -> Tensor:  # fmt: skip
    """torch.ops.mvat.mask_gate; `plan` is for tests."""
    (B, C, T), (Z, H) = x.shape, last.shape[:2]
    y = x.new_empty(B, Z, T)
    if not y.numel():
        return y
    kind = Kind.of(x)
    plan = plan or choose_gate(kind, common.capability(x.device))
    others = shortcut, shortcut_weight, shortcut_bias, shortcut_mean, shortcut_var
    if max(C, H, Z) > plan.forward.cols:
        _, z = _products(x, (norm_weight, norm_bias, mean, var), gates, gates_bias, last, last_bias, eps, plan)
        return norm_act.forward(z, None, None, None, None, *others, 0.0, shortcut_eps, RELU, training, after=True)
    x, side = dense_rows(x), dense_rows(x if shortcut is None else shortcut)
    norm = AppliedNorm.of(norm_weight, norm_bias, mean, var, eps, gates)
    other = AppliedNorm.of(*others[1:], shortcut_eps, gates)
    block, wide = plan.forward, unit(x, side)
    tiles = triton.cdiv(T, block.rows)
    with torch.cuda.device_of(x):
        gate_kernel[(B * tiles,)](
            x, *norm.tensors, gates.contiguous(), gates_bias.contiguous(), last.contiguous(), last_bias.contiguous(),
            side,
            *other.tensors, y, norm.eps, norm.given, int(shortcut is not None), other.eps, other.given, tiles, C, H, Z,
            T // wide, x.stride(0) // wide, x.stride(1) // wide, side.stride(0) // wide, side.stride(1) // wide,
            UNIT=wide,
            ROWS=block.rows, IN=width(C, block.cols), HIDDEN=width(H, block.cols), OUT=width(Z, block.cols),
            DTYPE=TYPES[kind.dtype], PRECISION=kind.precision, num_warps=block.warps, num_stages=block.stages,
        )  # fmt: skip
    return y


def backward(
    grad: Tensor, x: Tensor, norm_weight: _Optional, norm_bias: _Optional, mean: _Optional, var: _Optional, gates:
    Tensor,
    gates_bias: Tensor, last: Tensor, last_bias: Tensor, shortcut: _Optional, shortcut_weight: _Optional,
    shortcut_bias: _Optional, shortcut_mean: _Optional, shortcut_var: _Optional, eps: float, shortcut_eps: float,
    plan: GatePlan | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """torch.ops.mvat.mask_gate_backward, likewise."""
    (B, C, T), (Z, H) = x.shape, last.shape[:2]
    dz, added = x.new_empty(x.shape), shortcut is not None
    if not dz.numel():
        weights = (torch.zeros_like(t) for t in (gates, gates_bias, last, last_bias))
        return dz, gates.new_zeros(2, C), *weights, gates.new_zeros(2 * added, Z)
    kind = Kind.of(x)
    plan = plan or choose_gate(kind, common.capability(x.device))
    own, others = (norm_weight, norm_bias, mean, var), (shortcut_weight, shortcut_bias, shortcut_mean, shortcut_var)
    none: Applied = (None,) * 4
    if max(C, H, Z) > plan.backward.cols:
        p, z = _products(x, own, gates, gates_bias, last, last_bias, eps, plan)
        grad, _, shortcut_sums = norm_act.backward(
            grad, z, *none, shortcut, *others, 0.0, shortcut_eps, RELU, after=True
        )
        dp, sums, d_last, d_last_bias = norm_act_conv.backward(
            grad, p, *none, last, True, 0.0, GATE, 1, 0, 1, False, plan.wide
        )
        d_gates_bias = sums[0]
        dz, sums, d_gates, _ = norm_act_conv.backward(
            dp, x, *own, gates, False, eps, IDENTITY, 1, 0, 1, False, plan.wide
        )
        return dz, sums, d_gates, d_gates_bias, d_last, d_last_bias, shortcut_sums
    x, grad, side = dense_rows(x), dense_rows(grad), dense_rows(grad if shortcut is None else shortcut)
    norm, other = AppliedNorm.of(*own, eps, gates), AppliedNorm.of(*others, shortcut_eps, gates)
    block, wide = plan.backward, unit(x, grad, side)
    tiles = triton.cdiv(T, block.rows)
    dp, p, d = (x.new_empty(B, channels, T) for channels in (2 * H, H, Z))
    sums = gates.new_empty(2 * H + 3 * Z, B * tiles)
    with torch.cuda.device_of(x):
        gate_backward_kernel[(B * tiles,)](
            grad, x, *norm.tensors, gates.contiguous(), gates_bias.contiguous(), last.contiguous(),
            last_bias.contiguous(),
            side, *other.tensors[2:], dp, p, d, sums, norm.eps, norm.given, int(added), other.eps, other.given, tiles,
            C, H, Z,
            T // wide, B, x.stride(0) // wide, x.stride(1) // wide, side.stride(0) // wide, side.stride(1) // wide,
            grad.stride(0) // wide, grad.stride(1) // wide, UNIT=wide, ROWS=block.rows, IN=width(C, block.cols),
            HIDDEN=width(H, block.cols), OUT=width(Z, block.cols), DTYPE=TYPES[kind.dtype], PRECISION=kind.precision,
            num_warps=block.warps, num_stages=block.stages,
        )  # fmt: skip
    d_gates_bias, d_last_bias = sums[: 2 * H].sum(1), sums[2 * H : 2 * H + Z].sum(1)
    shortcut_sums = sums[2 * H + Z :].sum(1).view(2, Z) if added else gates.new_empty(0, Z)
    nothing = AppliedNorm.of(*none, 0.0, gates)
    d_last, _ = norm_act_conv.weight_gradient(d, p, nothing, last, IDENTITY, 1, 0, False, kind, plan.wide)
    dz, sums, d_gates, _ = norm_act_conv.backward(dp, x, *own, gates, False, eps, IDENTITY, 1, 0, 1, False, plan.wide)
    return dz, sums, d_gates, d_gates_bias, d_last, d_last_bias, shortcut_sums


def _products(
    x: Tensor, norm: Applied, gates: Tensor, gates_bias: Tensor, last: Tensor, last_bias: Tensor, eps: float, plan:
    GatePlan
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The raw gates, tanh's channels then sigmoid's, and the last product of the gate."""
    none: Applied = (None,) * 4
    p, _ = norm_act_conv.forward(
        x, *norm, gates, gates_bias, eps, IDENTITY, 1, 0, 1, False, False, False, plan.wide
    )  # fmt: skip
    z, _ = norm_act_conv.forward(p, *none, last, last_bias, 0.0, GATE, 1, 0, 1, False, False, False, plan.wide)
    return p, z
