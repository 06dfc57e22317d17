"""What the Triton kernels share: operands of products, norms and activations of a tile, moments, sizes of launches.

Programs leave partial sums and partial moments (count, mean, M2) behind, [..., channels, entries], and `total` and
`statistics` put them together in an order that depends on the sizes alone.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}

#: Activations as the kernels count them: mvat.kernels.norm_act_conv.ACTIVATIONS, and mask_gate's behind them.
IDENTITY, RELU, SILU, GLU, GATE = range(5)
#: Those that make one channel of two, the second half of x's beside the first.
PAIRS = (GLU, GATE)
COMBINE_BLOCK = 1024


@triton.jit
def operand(values, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Values as a product's operand. Tensor cores cut float32 off where tf32 ends, which biases sums: round it here."""
    values = values.to(DTYPE)
    if DTYPE == tl.float32 and PRECISION == "tf32":
        bits = (values.to(tl.int32, bitcast=True) + 0x1000) & -0x2000  # a NaN's carry would make it a zero
        values = tl.where(values == values, bits.to(tl.float32, bitcast=True), values)
    return values


@triton.jit
def norm_rows(weight, bias, mean, var, eps, c, there):
    """Mean, inverse deviation, weight and bias of channels c; the identity where there is none, or no norm at all."""
    inverse = tl.load(var + c, mask=there, other=1.0) + tl.where(there, eps, 0.0)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(inverse))
    weight = tl.load(weight + c, mask=there, other=1.0)
    return tl.load(mean + c, mask=there, other=0.0), inverse, weight, tl.load(bias + c, mask=there, other=0.0)


@triton.jit
def sigmoid(z):
    return 1.0 / (1.0 + tl.exp2(z * -1.4426950408889634))


@triton.jit
def tanh(z):
    """Near zero a polynomial in z^2, elsewhere (1 - e) / (1 + e) with e = exp(-2 |z|)."""
    square = z * z
    p = square * -0.006264368072152138 + 0.021064136177301407
    p = p * square - 0.05385029688477516
    p = p * square + 0.13332565128803253
    p = p * square - 0.33333316445350647
    e = tl.exp2(tl.abs(z) * -2.8853900817779268)
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(z) < 0.55, z + z * square * p, tl.where(z < 0.0, -far, far))


@triton.jit
def activate(z, gate, ACT: tl.constexpr):
    """The activation of z; `gate` is the channel beside it where the activation takes a pair."""
    if ACT == 1:
        z = tl.where(z < 0.0, 0.0, z)  # a NaN is handed on
    elif ACT == 2:
        z = z * sigmoid(z)
    elif ACT == 3:
        z = z * sigmoid(gate)
    elif ACT == 4:
        z = tanh(z) * sigmoid(gate)
    return z


@triton.jit
def activate_back(d, z, gate, ACT: tl.constexpr):
    """From the gradient behind the activation to those of z and of the gate, the latter unused without a pair."""
    other = d
    if ACT == 1:
        d = tl.where(z <= 0.0, 0.0, d)
    elif ACT == 2:
        s = sigmoid(z)
        d = d * (s * (1.0 + z * (1.0 - s)))
    elif ACT == 3:
        s = sigmoid(gate)
        d = d * s
        other = d * z * (1.0 - s)
    elif ACT == 4:
        t, s = tanh(z), sigmoid(gate)
        other = d * t * s * (1.0 - s)
        d = d * s * (1.0 - t * t)
    return d, other


@triton.jit
def activated(x, t, c, mean, inverse, weight, bias, gate_mean, gate_inverse, gate_weight, gate_bias, x_channel, C,
              there, ACT: tl.constexpr):  # fmt: skip
    """act(norm(x)) at positions t of channels c, zero where not there; everything broadcasts."""
    z = tl.load(x + c * x_channel + t, mask=there, other=0.0).to(tl.float32)
    z = (z - mean) * inverse * weight + bias
    gate = z
    if ACT >= 3:
        gate = tl.load(x + (c + C) * x_channel + t, mask=there, other=0.0).to(tl.float32)
        gate = (gate - gate_mean) * gate_inverse * gate_weight + gate_bias
    return tl.where(there, activate(z, gate, ACT), 0.0)


@triton.jit
def before(d, x, norm_weight, norm_bias, mean, var, dz, sums, eps, normed, c, channels, t, b, at, valid, there,
           x_channel, T, entries, phases, ACT: tl.constexpr, AXIS: tl.constexpr):  # fmt: skip
    """From the gradient d of the activated tile, channels c off AXIS, to dz and to its sums (at `at`)."""
    known = valid & (normed != 0)
    halves: tl.constexpr = 2 if ACT >= 3 else 1
    m, r, s, a = norm_rows(norm_weight, norm_bias, mean, var, eps, c, known)
    m, r, s, a = tl.expand_dims(m, AXIS), tl.expand_dims(r, AXIS), tl.expand_dims(s, AXIS), tl.expand_dims(a, AXIS)
    wide = tl.expand_dims(c, AXIS).to(tl.int64)
    normal = (tl.load(x + wide * x_channel + t, mask=there, other=0.0).to(tl.float32) - m) * r
    z = normal * s + a
    gate, gate_normal = z, normal
    if ACT >= 3:
        gm, gr, gs, ga = norm_rows(norm_weight, norm_bias, mean, var, eps, c + channels, known)
        gm, gr = tl.expand_dims(gm, AXIS), tl.expand_dims(gr, AXIS)
        gate_normal = (tl.load(x + (wide + channels) * x_channel + t, mask=there, other=0.0).to(tl.float32) - gm) * gr
        gate = gate_normal * tl.expand_dims(gs, AXIS) + tl.expand_dims(ga, AXIS)
    d, other = activate_back(d, z, gate, ACT)
    d = tl.where(there, d, 0.0)
    to = dz + (b.to(tl.int64) * (halves * channels) + wide) * T + t
    plane = channels.to(tl.int64) * phases * entries
    tl.store(to, d, mask=there)
    tl.store(sums + at, tl.sum(d, AXIS), mask=valid)
    tl.store(sums + halves * plane + at, tl.sum(d * normal, AXIS), mask=valid)
    if ACT >= 3:
        other = tl.where(there, other, 0.0)
        tl.store(to + channels.to(tl.int64) * T, other, mask=there)
        tl.store(sums + plane + at, tl.sum(other, AXIS), mask=valid)
        tl.store(sums + 3 * plane + at, tl.sum(other * gate_normal, AXIS), mask=valid)


@triton.jit
def store_moments(moments, at, plane, values, there, mask, AXIS: tl.constexpr):
    """Count, mean and M2 of values along AXIS, where `there`; the three planes of `moments` lie `plane` apart."""
    count = tl.sum(there.to(tl.float32), AXIS)
    least = tl.maximum(count, 1.0)
    mean = tl.sum(tl.where(there, values, 0.0), AXIS) / least
    off = tl.where(there, values - tl.expand_dims(mean, AXIS), 0.0)
    rest = tl.sum(off, AXIS) / least  # what rounding left out of the mean
    tl.store(moments + at, count, mask=mask)
    tl.store(moments + plane + at, mean + rest, mask=mask)
    squares = tl.sum(off * off, AXIS) - count * rest * rest
    tl.store(moments + 2 * plane + at, tl.where(squares < 0.0, 0.0, squares), mask=mask)


@triton.jit(do_not_specialize=["channels", "entries"])
def statistics_kernel(moments, out, channels, entries, BLOCK: tl.constexpr):
    """Mean and biased variance [2, channels] from moments [3, channels, entries]; a program takes a channel."""
    c = tl.program_id(0).to(tl.int64)
    plane = channels.to(tl.int64) * entries
    moments += c * entries
    total = 0.0
    mean = 0.0
    for start in range(0, entries, BLOCK):
        at = start + tl.arange(0, BLOCK)
        count = tl.load(moments + at, mask=at < entries, other=0.0)
        total += tl.sum(count, 0)
        mean += tl.sum(count * tl.load(moments + plane + at, mask=at < entries, other=0.0), 0)
    mean = mean / total
    squares = 0.0
    rest = 0.0
    for start in range(0, entries, BLOCK):
        at = start + tl.arange(0, BLOCK)
        count = tl.load(moments + at, mask=at < entries, other=0.0)
        off = tl.load(moments + plane + at, mask=at < entries, other=0.0) - mean
        rest += tl.sum(count * off, 0)
        squares += tl.sum(tl.load(moments + 2 * plane + at, mask=at < entries, other=0.0) + count * off * off, 0)
    rest = rest / total  # what rounding left out of the mean
    tl.store(out + c, mean + rest)
    squares = squares / total - rest * rest
    tl.store(out + channels + c, tl.where(squares < 0.0, 0.0, squares))


@dataclass(frozen=True)
class AppliedNorm:
    """A norm as the kernels take it: four tensors, whatever they hold where `given` is 0."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    eps: float
    given: int

    @classmethod
    def of(
        cls,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        eps: float,
        wide: Tensor,
    ) -> "AppliedNorm":
        """`wide`: any tensor in float32."""
        if weight is None or bias is None or mean is None or var is None:
            return cls((wide, wide, wide, wide), 0.0, 0)
        return cls((weight.contiguous(), bias.contiguous(), mean.contiguous(), var.contiguous()), eps, 1)


def statistics(moments: Tensor, channels: int) -> Tensor:
    """[2, channels], mean and biased variance, from partial moments [3, channels * any, entries]."""
    out = moments.new_empty(2, channels)
    entries = moments.shape[1] // channels * moments.shape[2]
    statistics_kernel[(channels,)](moments, out, channels, entries, BLOCK=COMBINE_BLOCK, num_warps=4)
    return out


def total(partials: Tensor, channels: int) -> Tensor:
    """[n, channels], the sums of partial ones [n, channels * any, entries]."""
    return partials.view(partials.shape[0], channels, -1).sum(-1)


def dense_rows(x: Tensor) -> Tensor:
    """x as it is where samples lie side by side, else a copy."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def unit(*features: Tensor) -> int:
    """4 where every row of these features begins and ends at a multiple of four samples, so that loads are wide; else
    1.
    """
    return 4 if all(n % 4 == 0 for x in features for n in (*x.stride()[:2], x.shape[2])) else 1


def width(channels: int, most: int) -> int:
    """Channels of a tile: a power of two, at least 32, at most `most`: every width is another compilation."""
    return min(most, max(32, triton.next_power_of_2(channels)))


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """The GPU's; Hopper's where the interpreter runs on a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors; one where the interpreter runs on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
