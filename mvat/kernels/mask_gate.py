"""The gate that closes a multi-view block and makes the network's mask.

    y = relu(W3 (tanh(W1 u + b1) * sigmoid(W2 u + b2)) + b3) + shortcut_norm(shortcut),        u = norm(x)

All three are 1x1 convolutions; the norms are left out where none is given.

The CPU kernel (csrc/cpu/mask_gate.cpp) takes a tile of up to 768 samples of all channels through the whole formula
while it lies in the second cache. x is normalised on its way into the tile, W1 and W2 are one product, and the
shortcut is normalised and added as y is written: x and the shortcut are read once, y is written once, nothing else is
kept. The backward pass reads y's gradient, x and the shortcut, makes the gates anew, and writes the gradient behind
x's norm. It gathers the weights' gradients and the sums over batch and time that both norms' gradients take
(mvat.kernels.norm); in training one more pass each turns the gradients behind the norms into those of x and of the
shortcut. Partial sums belong to runs of tiles that depend on the shape alone, so the number of threads changes no bit.

On a GPU (mvat/kernels/triton/mask_gate.py) gates of up to 64 channels, forward in bfloat16 up to 128, are one kernel
forward, which reads x and the shortcut once and writes y once. Backward a kernel reads y's gradient, x and the shortcut
and leaves the gradients before the gates' activations and of the last product, and tanh * sigmoid; two of
norm_act_conv's make dz and the weights' gradients of them, another those of W3: at most 11 passes over features as
large as x read and 5 written where all widths are equal. Wider gates are stages of norm_act_conv throughout. Compiled
and tested as those are.

Source: Park et al., "MANNER", ICASSP 2022; the gate itself is that of WaveNet (van den Oord et al., 2016).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mvat.kernels import native
from mvat.kernels.backend import register, use_fused
from mvat.kernels.checks import check_features, check_parameter
from mvat.kernels.norm import (
    Norm,
    applied,
    batch_norm_reference,
    call,
    check_norm,
    norm_gradient,
    shared_group,
    shared_statistics,
    shared_sums,
)
from mvat.kernels.norm_act_conv import conv_reference


def mask_gate_reference(
    x: Tensor,
    tanh_weight: Tensor,
    tanh_bias: Tensor,
    sigmoid_weight: Tensor,
    sigmoid_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    shortcut: Tensor | None = None,
    *,
    norm: Norm | None = None,
    shortcut_norm: Norm | None = None,
    training: bool = False,
) -> Tensor:
    """`mask_gate` in plain PyTorch."""
    if norm is not None:
        x = batch_norm_reference(x, norm, training)
    if shortcut is not None and shortcut_norm is not None:
        shortcut = batch_norm_reference(shortcut, shortcut_norm, training)
    gate = torch.tanh(conv_reference(x, tanh_weight, tanh_bias))
    gate = gate * torch.sigmoid(conv_reference(x, sigmoid_weight, sigmoid_bias))
    y = F.relu(conv_reference(gate, out_weight, out_bias))
    return y if shortcut is None else shortcut + y


def mask_gate(
    x: Tensor,
    tanh_weight: Tensor,
    tanh_bias: Tensor,
    sigmoid_weight: Tensor,
    sigmoid_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    shortcut: Tensor | None = None,
    *,
    norm: Norm | None = None,
    shortcut_norm: Norm | None = None,
    training: bool = False,
    statistics: Tensor | None = None,
    shortcut_statistics: Tensor | None = None,
) -> Tensor:
    """Gate the features and pass them through a third convolution and ReLU, the shortcut added.

    Args:
        x: features [B, c, T].
        tanh_weight, tanh_bias, sigmoid_weight, sigmoid_bias: 1x1 convolutions, [h, c, 1] and [h].
        out_weight, out_bias: 1x1 convolution, [o, h, 1] and [o].
        shortcut: [B, o, T], added after the ReLU, or None.
        norm, shortcut_norm: batch norms of x and of the shortcut, where those are raw outputs of a convolution.
        training: True takes the norms' statistics of the batch and updates the running ones in place.
        statistics, shortcut_statistics: those of x and of the shortcut, from the stages that made them
            (`norm_act_conv`).

    Returns:
        [B, o, T].

    Raises:
        TypeError, ValueError: for a wrong type, dtype, shape or device.
    """
    op = "mask_gate"
    check_features(op, "x", x)
    batch, channels, length = x.shape
    hidden = tanh_weight.shape[0] if isinstance(tanh_weight, Tensor) and tanh_weight.dim() else 0
    out = out_weight.shape[0] if isinstance(out_weight, Tensor) and out_weight.dim() else 0
    for name, weight, bias in (("tanh", tanh_weight, tanh_bias), ("sigmoid", sigmoid_weight, sigmoid_bias)):
        check_parameter(op, f"{name}_weight", weight, (hidden, channels, 1), x)
        check_parameter(op, f"{name}_bias", bias, (hidden,), x)
    check_parameter(op, "out_weight", out_weight, (out, hidden, 1), x)
    check_parameter(op, "out_bias", out_bias, (out,), x)
    if 0 in (channels, hidden, out):
        raise ValueError(f"{op}: weights must not be empty, got {hidden} x {channels} and {out} x {hidden}")
    if shortcut is not None:
        check_parameter(op, "shortcut", shortcut, (batch, out, length), x)
    if norm is not None:
        check_norm(op, "norm", norm, channels, x, statistics)
    if shortcut_norm is not None:
        check_norm(op, "shortcut_norm", shortcut_norm, out, x, shortcut_statistics)
    weights = tanh_weight, tanh_bias, sigmoid_weight, sigmoid_bias, out_weight, out_bias
    if not use_fused(op, x):
        return mask_gate_reference(x, *weights, shortcut, norm=norm, shortcut_norm=shortcut_norm, training=training)
    x, wide = native.autocast(x), native.wide(x.dtype)
    shortcut = None if shortcut is None else shortcut.to(x.dtype)
    norm, shortcut_norm = (None if value is None else Norm(*value) for value in (norm, shortcut_norm))
    group = shared_group(op, training, norm, shortcut_norm)
    (statistics, shortcut_statistics), total = shared_statistics(
        group, (norm, x, statistics), (shortcut_norm, shortcut, shortcut_statistics)
    )
    return call(
        op,
        group,
        x,
        *applied(norm, x, training, statistics, total),
        torch.cat((tanh_weight, sigmoid_weight)).to(wide),
        torch.cat((tanh_bias, sigmoid_bias)).to(wide),
        out_weight.to(wide),
        out_bias.to(wide),
        shortcut,
        *applied(shortcut_norm, shortcut, training, shortcut_statistics, total),
        0.0 if norm is None else norm.eps,
        0.0 if shortcut_norm is None else shortcut_norm.eps,
        training,
    )


native.implement_in_triton("mask_gate", "mask_gate_backward")
register("mask_gate", native.supports("mask_gate", ("cpu", "cuda")))


def _fake(x, norm_weight, norm_bias, mean, var, gates, gates_bias, last, *_):
    return x.new_empty((x.shape[0], last.shape[0], x.shape[2]))


def _fake_backward(grad, x, norm_weight, norm_bias, mean, var, gates, gates_bias, last, last_bias, shortcut, *_):
    weights = [t.new_empty(t.shape) for t in (gates, gates_bias, last, last_bias)]
    sums = last.new_empty((2, x.shape[1]))
    return x.new_empty(x.shape), sums, *weights, last.new_empty((0 if shortcut is None else 2, last.shape[0]))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.eps, ctx.shortcut_eps, ctx.training = inputs
    ctx.group = None
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    x, *norm = ctx.saved_tensors[:5]
    shortcut, *shortcut_norm = ctx.saved_tensors[9:]
    dz, sums, *weights, shortcut_sums = torch.ops.mvat.mask_gate_backward(
        grad, *ctx.saved_tensors, ctx.eps, ctx.shortcut_eps
    )
    (total, shortcut_total), count = shared_sums(ctx.group, x.shape[0] * x.shape[2], sums, shortcut_sums)
    dx = norm_gradient(dz, x, tuple(norm), total, ctx.eps, ctx.training, count)
    d_norm = (None, None) if norm[0] is None else (sums[1], sums[0])
    d_shortcut, d_shortcut_norm = None, (None, None)
    if shortcut is not None:
        d_shortcut = norm_gradient(
            grad, shortcut, tuple(shortcut_norm), shortcut_total, ctx.shortcut_eps, ctx.training, count
        )
        if shortcut_norm[0] is not None:
            d_shortcut_norm = shortcut_sums[1], shortcut_sums[0]
    return dx, *d_norm, None, None, *weights, d_shortcut, *d_shortcut_norm, *(None,) * 5


native.complete("mask_gate", _fake, _fake_backward, _setup_context, _backward)
