"""A stage of a convolution chain: the previous stage's normalisation and activation, then a convolution.

    norm_act_conv: y = conv(act(norm(x)))          norm_act: y = act(norm(x) + shortcut_norm(shortcut))

A network written as convolutions that hand their raw output on, each normalised in the next one's prologue, needs one
read and one write of the features a stage. `norm_act` ends such a chain.

The CPU kernel (csrc/cpu/norm_act_conv.cpp) takes a tile of up to 1536 columns at a time. The rows of x that it needs,
halo included, are normalised and activated into a panel that stays in the second cache, zeros where the signal ends; a
stride S splits every row into S phases, so that each tap finds its samples side by side. All products of the tile are
made from the panel, time in the lanes and the weights broadcast; no tap copies it. Nothing but y is written, and in
training the mean and variance of y are gathered from each tile before it leaves the cache, so that the next stage's
norm need not read it. A transposed convolution is the same with the phases in the output, and each of the two is the
other's gradient. The backward pass reads x and y's gradient once, makes the panel anew, and writes the gradient behind
the norm, with the weight's gradient and the sums over batch and time that are the gradients of the norm's own weight
and bias; in training they are also what one more pass needs to turn the gradient behind the norm into that of x
(mvat.kernels.norm). Partial sums belong to runs of tiles that depend on the shape alone, so the number of threads
changes no bit.

Where it loses: on features that fit the first caches the call is most of the time (12 channels of a second: a pointwise
stage forward and backward 0.28 ms, the reference 0.23). Tried on two cores with AVX-512: weights packed by tap before
the products instead of read in their own order (backward of 480 to 480 channels, 8 taps: 21.8 to 15.2 ms); channels in
the lanes of the weight's gradient from 32 channels on instead of time everywhere (480 to 960 channels, backward 10.6 to
7.4 ms); a depthwise row as a filter of its own instead of a product with one row (12 channels, 31 taps: 0.85 to 0.43 ms
forward, 1.8 to 1.15 backward); a multi-view block's four convolutions of one input made as one: no gain.

On a GPU a convolution without groups runs in Triton (mvat/kernels/triton/norm_act_conv.py), a depthwise one of stride 1
and up to 33 taps too (depthwise.py), and so do `norm_act`, batch_statistics and norm_gradient (norm_act.py); other
groups, and transposed convolutions of fewer taps than their stride, take the reference with a warning. Features are
float32, bfloat16 or float16; parameters, statistics and their gradients stay float32; products accumulate in float32
and read their operands as global_attention's do. Under autocast a stage takes its features in half precision, as the
convolution that it stands for would. Forward is one kernel, with statistics a small second one, that reads x once and
writes y once. Backward writes dz once; a pointwise stage of up to 64 channels on either side (32 in float32 unless
torch.backends.cuda.matmul.fp32_precision allows tf32) and a depthwise one read y's gradient and x once, others twice,
once for dz and once for the weight's gradient; norm_gradient reads dz and x and writes dx. Sums are partial ones of
tiles, or of shares of tiles that depend on sizes and device, added in order: results are equal to the bit from run to
run. A sample that is not finite reaches up to 63 samples to either side in a depthwise stage, not 15. Compiled for
sm_80, sm_90, sm_100 and sm_120 without spills and right in the interpreter, not run on a GPU yet.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mvat.kernels import native
from mvat.kernels.backend import register, use_fused
from mvat.kernels.checks import check_features, check_integer, check_parameter
from mvat.kernels.depthwise import depthwise_reference
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

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "silu": F.silu,
    "glu": lambda x: F.glu(x, 1),
}


def activation_index(name: str) -> int:
    """The number that stands for an activation in the operators' arguments."""
    return list(ACTIVATIONS).index(name)


def length_out(length: int, kernel: int, stride: int, padding: int, transposed: bool) -> int:
    """The length of a convolution's output, less than 1 where the input is too short."""
    if transposed:
        return (length - 1) * stride + kernel - 2 * padding
    return (length + 2 * padding - kernel) // stride + 1


def conv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    transposed: bool = False,
) -> Tensor:
    """conv1d or conv_transpose1d in the form PyTorch runs fastest.

    A 1x1 convolution is a batched product: forward, conv1d against baddbmm, two CPU cores, 7.5 and 0.7 ms at 12
    channels, 35 and 10 ms at 60, level at 480. For a depthwise one see `depthwise_reference`.
    """
    if transposed:
        return F.conv_transpose1d(x, weight, bias, stride, padding, 0, groups)
    if weight.shape[-1] == stride == groups == 1 and padding == 0:
        matrix = weight[..., 0].expand(x.shape[0], -1, -1)
        return torch.bmm(matrix, x) if bias is None else torch.baddbmm(bias[None, :, None], matrix, x)
    if groups == x.shape[1] == weight.shape[0] and stride == 1 and x.device.type == "cpu":
        return depthwise_reference(x[:, :, None], weight, bias, padding)[:, :, 0].contiguous()
    return F.conv1d(x, weight, bias, stride, padding, 1, groups)


def norm_act_conv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    activation: str = "identity",
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    transposed: bool = False,
    training: bool = False,
) -> Tensor:
    """`norm_act_conv` in plain PyTorch."""
    if norm is not None:
        x = batch_norm_reference(x, norm, training)
    return conv_reference(ACTIVATIONS[activation](x), weight, bias, stride, padding, groups, transposed)


def norm_act_reference(
    x: Tensor,
    norm: Norm,
    activation: str = "identity",
    *,
    shortcut: Tensor | None = None,
    shortcut_norm: Norm | None = None,
    training: bool = False,
) -> Tensor:
    """`norm_act` in plain PyTorch."""
    x = batch_norm_reference(x, norm, training)
    if shortcut is not None:
        x = x + (shortcut if shortcut_norm is None else batch_norm_reference(shortcut, shortcut_norm, training))
    return ACTIVATIONS[activation](x)


def _check_activation(op: str, activation: object, channels: int) -> int:
    """The number of channels after the activation; ValueError for an unknown one or an odd number under GLU."""
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if activation != "glu":
        return channels
    if channels % 2:
        raise ValueError(f"{op}: glu needs an even number of channels, got {channels}")
    return channels // 2


def norm_act_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    activation: str = "identity",
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    transposed: bool = False,
    training: bool = False,
    statistics: Tensor | None = None,
    want_statistics: bool = False,
) -> Tensor | tuple[Tensor, Tensor | None]:
    """One stage of a chain: normalise and activate the previous stage's raw output, then convolve.

    Args:
        x: the previous stage's output [B, C, T], not normalised yet.
        weight: [out, in / groups, K], or [in, out / groups, K] if transposed; in = C, or C / 2 after GLU.
        bias: [out] or None.
        norm: the previous stage's batch norm, or None.
        activation: "identity", "relu", "silu" or "glu" (over channels).
        stride, padding, groups, transposed: as torch.nn.functional.conv1d and conv_transpose1d.
        training: True takes the statistics of the batch and updates norm's running ones in place.
        statistics: those of x, from the stage that made it; without them x is read once more in training.
        want_statistics: give (y, statistics): mean and biased variance of y over batch and time, [2, out], for the next
            stage's norm in training; None where the reference ran, which makes its own.

    Returns:
        [B, out, T'], raw.

    Raises:
        TypeError, ValueError: for a wrong type, dtype, shape or device, or an unknown activation.
    """
    op = "norm_act_conv"
    check_features(op, "x", x)
    channels = _check_activation(op, activation, x.shape[1])
    for name, value, least in (("stride", stride, 1), ("padding", padding, 0), ("groups", groups, 1)):
        check_integer(op, name, value, least)
    check_features(op, "weight", weight, ("in", "out / groups", "K") if transposed else ("out", "in / groups", "K"))
    kernel = weight.shape[2]
    if transposed:
        expected = (channels, weight.shape[1], kernel)
        out = weight.shape[1] * groups
    else:
        expected = (weight.shape[0], channels // groups, kernel)
        out = weight.shape[0]
    check_parameter(op, "weight", weight, expected, x)
    if channels % groups or out % groups:
        raise ValueError(f"{op}: groups must divide {channels} channels in and {out} out, got {groups}")
    if 0 in weight.shape:
        raise ValueError(f"{op}: weight must not be empty, got {list(weight.shape)}")
    if length_out(x.shape[2], kernel, stride, padding, transposed) < 1:
        raise ValueError(
            f"{op}: x {list(x.shape)} is too short for weight {list(weight.shape)}, stride {stride}, padding {padding}"
        )
    if bias is not None:
        check_parameter(op, "bias", bias, (out,), x)
    if norm is not None:
        check_norm(op, "norm", norm, x.shape[1], x, statistics)
    if use_fused(op, x, _limit(x, channels, out, kernel, stride, groups, transposed)):
        x, wide = native.autocast(x), native.wide(x.dtype)
        norm = None if norm is None else Norm(*norm)
        group = shared_group(op, training, norm)
        (statistics,), total = shared_statistics(group, (norm, x, statistics))
        y, gathered = call(
            op,
            group,
            x,
            *applied(norm, x, training, statistics, total),
            weight.to(wide),
            None if bias is None else bias.to(wide),
            0.0 if norm is None else norm.eps,
            activation_index(activation),
            stride,
            padding,
            groups,
            transposed,
            training,
            want_statistics,
        )
        return (y, gathered) if want_statistics else y
    y = norm_act_conv_reference(
        x,
        weight,
        bias,
        norm=norm,
        activation=activation,
        stride=stride,
        padding=padding,
        groups=groups,
        transposed=transposed,
        training=training,
    )
    return (y, None) if want_statistics else y


def norm_act(
    x: Tensor,
    norm: Norm,
    activation: str = "identity",
    *,
    shortcut: Tensor | None = None,
    shortcut_norm: Norm | None = None,
    training: bool = False,
    statistics: Tensor | None = None,
    shortcut_statistics: Tensor | None = None,
) -> Tensor:
    """The end of a chain: normalise, add a shortcut (itself normalised where it has a norm), activate.

    Args:
        x: the last stage's raw output [B, C, T].
        norm: its batch norm.
        activation: "identity", "relu", "silu" or "glu" (over channels).
        shortcut: [B, C, T] added before the activation, or None.
        shortcut_norm: the shortcut's batch norm, or None.
        training: True takes the statistics of the batch and updates the running ones in place.
        statistics, shortcut_statistics: those of x and of the shortcut, from the stages that made them.

    Returns:
        [B, C, T], or [B, C / 2, T] after GLU.

    Raises:
        TypeError, ValueError: for a wrong type, dtype, shape or device, or an unknown activation.
    """
    op = "norm_act"
    check_features(op, "x", x)
    _check_activation(op, activation, x.shape[1])
    check_norm(op, "norm", norm, x.shape[1], x, statistics)
    if shortcut is not None:
        check_parameter(op, "shortcut", shortcut, x.shape, x)
    if shortcut_norm is not None:
        check_norm(op, "shortcut_norm", shortcut_norm, x.shape[1], x, shortcut_statistics)
    if use_fused("norm_act_conv", x):
        norm = Norm(*norm)
        shortcut_norm = None if shortcut_norm is None else Norm(*shortcut_norm)
        shortcut = None if shortcut is None else shortcut.to(x.dtype)
        group = shared_group(op, training, norm, shortcut_norm)
        (statistics, shortcut_statistics), total = shared_statistics(
            group, (norm, x, statistics), (shortcut_norm, shortcut, shortcut_statistics)
        )
        return call(
            op,
            group,
            x,
            *applied(norm, x, training, statistics, total),
            shortcut,
            *applied(shortcut_norm, shortcut, training, shortcut_statistics, total),
            norm.eps,
            0.0 if shortcut_norm is None else shortcut_norm.eps,
            activation_index(activation),
            training,
        )
    return norm_act_reference(x, norm, activation, shortcut=shortcut, shortcut_norm=shortcut_norm, training=training)


def _limit(x: Tensor, channels: int, out: int, kernel: int, stride: int, groups: int, transposed: bool) -> str | None:
    """What the CUDA kernels do not take of the convolutions there are."""
    if x.device.type != "cuda":
        return None
    if groups > 1 and not (groups == channels == out and stride == 1 and not transposed and kernel <= 33):
        return "on cuda its kernels take one group, or a group a channel with stride 1 and at most 33 taps"
    if transposed and kernel < stride:
        return "on cuda its kernels take a transposed convolution of at least as many taps as its stride"
    return None


native.implement_in_triton("norm_act_conv", "norm_act_conv_backward", "norm_act", "norm_act_backward")
register("norm_act_conv", native.supports("norm_act_conv", ("cpu", "cuda")))


def _conv_fake(x, norm_weight, norm_bias, mean, var, weight, bias, eps, activation, stride, padding, groups, *rest):
    transposed, _, statistics = rest
    out = weight.shape[1] * groups if transposed else weight.shape[0]
    y = x.new_empty((x.shape[0], out, length_out(x.shape[2], weight.shape[2], stride, padding, transposed)))
    return y, weight.new_empty((2 if statistics else 0, out))


def _conv_fake_backward(grad, x, norm_weight, norm_bias, mean, var, weight, has_bias, *_):
    bias = weight.new_empty(grad.shape[1] if has_bias else 0)
    return x.new_empty(x.shape), weight.new_empty((2, x.shape[1])), weight.new_empty(weight.shape), bias


def _conv_setup_context(ctx, inputs, output) -> None:
    x, *norm, weight, bias, ctx.eps = inputs[:8]
    ctx.rest, ctx.training, ctx.has_bias, ctx.group = inputs[8:13], inputs[13], bias is not None, None
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *norm, weight)


def _conv_backward(ctx, grad, _):
    if grad is None:
        return (None,) * 15
    x, *norm, weight = ctx.saved_tensors
    dz, sums, d_weight, d_bias = torch.ops.mvat.norm_act_conv_backward(
        grad, x, *norm, weight, ctx.has_bias, ctx.eps, *ctx.rest
    )
    (total,), count = shared_sums(ctx.group, x.shape[0] * x.shape[2], sums)
    dx = norm_gradient(dz, x, tuple(norm), total, ctx.eps, ctx.training, count)
    d_norm = (None, None) if norm[0] is None else (sums[1], sums[0])
    return dx, *d_norm, None, None, d_weight, d_bias if ctx.has_bias else None, *(None,) * 8


native.complete("norm_act_conv", _conv_fake, _conv_fake_backward, _conv_setup_context, _conv_backward)


def _act_fake(x, *rest):
    return x.new_empty((x.shape[0], x.shape[1] // 2 if rest[11] == activation_index("glu") else x.shape[1], x.shape[2]))


def _act_fake_backward(grad, x, *rest):
    wide = native.wide(x.dtype)
    sums = (x.new_empty((n, x.shape[1]), dtype=wide) for n in (2, 0 if rest[4] is None else 2))
    return x.new_empty(x.shape), *sums


def _act_setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.eps, ctx.shortcut_eps, ctx.activation, ctx.training = inputs
    ctx.group = None
    ctx.save_for_backward(*tensors)


def _act_backward(ctx, grad):
    tensors = ctx.saved_tensors
    x, norm, shortcut, shortcut_norm = tensors[0], tensors[1:5], tensors[5], tensors[6:]
    dz, sums, shortcut_sums = torch.ops.mvat.norm_act_backward(
        grad, *tensors, ctx.eps, ctx.shortcut_eps, ctx.activation
    )
    (total, shortcut_total), count = shared_sums(ctx.group, x.shape[0] * x.shape[2], sums, shortcut_sums)
    dx = norm_gradient(dz, x, norm, total, ctx.eps, ctx.training, count)
    gradients = [dx, sums[1], sums[0], None, None, None, None, None]
    if shortcut is not None:
        gradients[5] = norm_gradient(dz, shortcut, shortcut_norm, shortcut_total, ctx.shortcut_eps, ctx.training, count)
        if shortcut_norm[0] is not None:
            gradients[6:] = shortcut_sums[1], shortcut_sums[0]
    return *gradients, *(None,) * 6


native.complete("norm_act", _act_fake, _act_fake_backward, _act_setup_context, _act_backward)
