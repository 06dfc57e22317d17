"""The local view of a multi-view block: a mask over time from a depthwise convolution inside each chunk.

For every chunk z [n, C] (see `mvat.kernels.chunks`), with * the convolution of kernel 31 along the chunk, zero padded
at the chunk's own ends, and + a convolution of kernel 7,

    u = silu(norm1(depthwise_weight * z))          [n, C], norm1 over batch, chunks and positions
    a = sigmoid(norm2(conv_weight + [max_n u, mean_n u]))          [C]

and y = overlap_add(z a) / 2. Since a does not depend on the channel, this is a mask:

    y[b, c, t] = x[b, c, t] * m[b, t],     m = overlap_add(a) / 2,

so that no feature is unfolded for the product.

The CPU kernel (csrc/cpu/local_attention.cpp) puts neighbouring blocks of C / 2 samples into the vectors' lanes: what
a block's convolution sums within the block is the same for both chunks that it lies in, so that a tap costs one
multiply-add a sample instead of two. Batch statistics and the gradient of norm1 take a reading of their own, which
convolves anew. Medians of nine in milliseconds, float32, 2 cores (AVX2), all three interleaved, C = 64:

    [B, n, T]        pass                         reference   torch.compile   fused
    [4, 40, 16000]   forward, evaluation               26           21         4.6
                     forward, training                 32           24         7.0
                     forward and backward             305          178          22
    [1, 20, 64084]   forward, evaluation               11           10         2.5
                     forward, training                 19           16         5.1
                     forward and backward             134           83          11

Best times on one core in cycles a vector of eight chunk samples, where 8.5 is the floor of the convolution's
multiply-adds alone: convolution 10, statistics 16, pooling 27, the backward pass's readings 30 and 58. Tried for the
convolution: left to the compiler, which carries rows from step to step and spills a sum, 14.6; loading every row
anew, 11.8; each row once a step, as it is now, 10.1. For the pooling: exponentials of two, four or eight vectors step
by step, no difference beyond 4 %. The rest of the pooling is some 40 instructions a vector, most of them SiLU.

Where several processes share the norms' statistics, the half with channels runs in parts (local_pool in
csrc/schemas.cpp), between which they exchange sums; the mask, which has no channels, is then the reference's.

Source: Park et al., "MANNER", ICASSP 2022; the mask identity is ours.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mvat.kernels import native
from mvat.kernels.backend import register, use_fused
from mvat.kernels.checks import check_features, check_parameter, check_segment_len
from mvat.kernels.chunks import chunk, chunk_count, overlap_add
from mvat.kernels.depthwise import depthwise_reference
from mvat.kernels.norm import (
    Norm,
    batch_norm_reference,
    check_norm,
    merged_statistics,
    move_running,
    shared_group,
    shared_sums,
)


def local_attention_reference(
    x: Tensor,
    depthwise_weight: Tensor,
    norm1: Norm,
    conv_weight: Tensor,
    norm2: Norm,
    segment_len: int = 64,
    training: bool = False,
) -> Tensor:
    """`local_attention` in plain PyTorch.

    The chunks are an image [B, n, P, C], whose depthwise convolution along its rows stops at the chunk's own ends.
    """
    u = depthwise_reference(chunk(x, segment_len), depthwise_weight, padding=depthwise_weight.shape[-1] // 2)
    u = F.silu(batch_norm_reference(u, norm1, training))
    # amax is five times faster but splits the gradient between equal maxima: only where no gradient is asked for.
    maximum = u.max(1).values if u.requires_grad else u.amax(1)
    return _masked(x, torch.stack((maximum, u.mean(1)), 1), conv_weight, norm2, training)


def _masked(x: Tensor, pooled: Tensor, conv_weight: Tensor, norm2: Norm, training: bool) -> Tensor:
    """x times the mask that the pooled rows [B, 2, P, C] make."""
    a = F.conv2d(pooled, conv_weight[:, :, None], padding=(0, conv_weight.shape[-1] // 2))
    a = torch.sigmoid(batch_norm_reference(a, norm2, training))  # [B, 1, P, C]
    return x * (overlap_add(a, x.shape[-1]) / 2)


def local_attention(
    x: Tensor,
    depthwise_weight: Tensor,
    norm1: Norm,
    conv_weight: Tensor,
    norm2: Norm,
    segment_len: int = 64,
    training: bool = False,
) -> Tensor:
    """Multiply the features by a mask over time, computed inside overlapped chunks.

    Args:
        x: features [B, n, T], n >= 1.
        depthwise_weight: [n, 1, K1], K1 odd (31 in MANNER).
        norm1: the batch norm of the n channels (`mvat.kernels.Norm`).
        conv_weight: [1, 2, K2], K2 odd (7 in MANNER); its inputs are the maximum and the mean over channels.
        norm2: the batch norm of the single mask channel, with the same process group as norm1 or none.
        segment_len: C, the chunk's length in samples, even.
        training: True takes the statistics of the batch and updates the running ones in place.

    Returns:
        [B, n, T].

    Raises:
        TypeError, ValueError: for a wrong type, dtype, shape or device.
        RuntimeError: for a second derivative of the fused kernel; where the back end is "fused" and there is none; on a
            GPU for a segment_len above 256, for more taps than fit its kernel, or where that back end is to share the
            norms' statistics with other processes.
    """
    op = "local_attention"
    check_features(op, "x", x, ("B", "n", "T"))
    check_segment_len(op, segment_len)
    n = x.shape[1]
    if n < 1:
        raise ValueError(f"{op}: x must have at least one channel, got shape {list(x.shape)}")
    for name, weight, shape in (("depthwise_weight", depthwise_weight, (n, 1)), ("conv_weight", conv_weight, (1, 2))):
        kernel = weight.shape[-1] if isinstance(weight, Tensor) and weight.dim() else 0
        check_parameter(op, name, weight, (*shape, kernel), x)
        if kernel % 2 == 0:
            raise ValueError(f"{op}: {name} must have an odd kernel, got shape {list(weight.shape)}")
    check_norm(op, "norm1", norm1, n, x)
    check_norm(op, "norm2", norm2, 1, x)
    norm1, norm2 = Norm(*norm1), Norm(*norm2)
    group = shared_group(op, training, norm1, norm2)
    if use_fused(op, x, None if group is None else _SHARED.get(x.device.type)):
        if group is not None:
            return _shared(x, depthwise_weight, norm1, conv_weight, norm2, segment_len, group)
        return _fused(x, depthwise_weight, norm1, conv_weight, norm2, segment_len, training)
    return local_attention_reference(x, depthwise_weight, norm1, conv_weight, norm2, segment_len, training)


def _fused(
    x: Tensor, depthwise: Tensor, norm1: Norm, conv: Tensor, norm2: Norm, segment_len: int, training: bool
) -> Tensor:
    # The operator leaves every input as it is; the running statistics are moved here.
    wide = native.wide(x.dtype)
    first, second = ([value.to(wide) for value in norm[:4]] for norm in (norm1, norm2))
    y, attention, _, _, statistics = torch.ops.mvat.local_attention(
        x, depthwise.to(wide), *first, conv.to(wide), *second, segment_len, norm1.eps, norm2.eps, training
    )
    count = attention.numel()
    if training and count:
        with torch.no_grad():
            mean, var = statistics[0], statistics[1] * (count / (count - 1))
            for norm, part in ((norm1, slice(None, -1)), (norm2, slice(-1, None))):
                norm.running_mean.mul_(1 - norm.momentum).add_(mean[part], alpha=norm.momentum)
                norm.running_var.mul_(1 - norm.momentum).add_(var[part], alpha=norm.momentum)
    return y


#: Why the statistics cannot be shared by several processes in the fused kernel, for each device.
_SHARED = {
    device: None
    if native.missing("local_pool", device) is None
    else f"its kernels on {device} cannot share their statistics with other processes"
    for device in ("cpu", "cuda")
}


def _shared(
    x: Tensor,
    depthwise: Tensor,
    norm1: Norm,
    conv: Tensor,
    norm2: Norm,
    segment_len: int,
    group: "dist.ProcessGroup",
) -> Tensor:
    """In training, with the statistics of all processes: the half with channels in parts, the mask as the reference."""
    depthwise = depthwise.to(x.dtype)
    with torch.no_grad():
        own = torch.ops.mvat.local_pool_statistics(x, depthwise, segment_len)
        count = x.shape[0] * chunk_count(x.shape[2], segment_len) * segment_len
        ((mean, var),), total = merged_statistics(group, count, own)
        move_running(norm1, mean, var, count, total)
    weight, bias = norm1.weight.to(x.dtype), norm1.bias.to(x.dtype)
    pooled = _Pool.apply(x, depthwise, weight, bias, mean, var, segment_len, norm1.eps, group)
    with torch.autocast(x.device.type, enabled=False):  # as the kernel that this stands for
        return _masked(x, pooled, conv.to(x.dtype), norm2, True)


class _Pool(torch.autograd.Function):
    """From x to the pooled rows [B, 2, P, C], the statistics of norm1 being those of all processes."""

    @staticmethod
    def forward(ctx, x, depthwise, weight, bias, mean, var, segment_len, eps, group):
        inputs = x, depthwise, weight, bias, mean, var
        pooled, index = torch.ops.mvat.local_pool(*inputs, segment_len, eps)
        ctx.save_for_backward(*inputs, index)
        ctx.rest, ctx.group = (segment_len, eps), group
        return pooled

    @staticmethod
    def backward(ctx, grad):
        x, *_, index = ctx.saved_tensors
        grad = torch.stack((grad[:, 0], grad[:, 1] / x.shape[1]), 1)  # every channel has its share in the mean
        sums = torch.ops.mvat.local_pool_sums(grad, *ctx.saved_tensors, *ctx.rest)
        (means,), _ = shared_sums(ctx.group, index.numel(), sums)
        dx, depthwise = torch.ops.mvat.local_pool_backward(grad, *ctx.saved_tensors, means, *ctx.rest)
        return dx, depthwise, sums[1], sums[0], None, None, None, None, None


register("local_attention", native.supports("local_attention", ("cpu", "cuda")))


def _setup_context(ctx, inputs, output) -> None:
    x, depthwise, weight1, bias1, _, _, conv, weight2, _, _, _, *ctx.rest = inputs
    _, *saved = output
    ctx.save_for_backward(x, depthwise, weight1, bias1, conv, weight2, *saved)
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 15
    gradients = torch.ops.mvat.local_attention_backward(grad, *ctx.saved_tensors, *ctx.rest)
    dx, depthwise, weight1, bias1, conv, weight2, bias2 = gradients
    return dx, depthwise, weight1, bias1, None, None, conv, weight2, bias2, None, None, None, None, None, None


def _fake(x, depthwise, weight1, bias1, mean1, var1, conv, weight2, bias2, mean2, var2, segment_len, *_):
    batch, n, length = x.shape
    chunks = chunk_count(length, segment_len)
    wide = weight1.dtype
    return (
        x.new_empty(x.shape),
        x.new_empty((batch, chunks, segment_len), dtype=wide),
        x.new_empty((batch, 2, chunks, segment_len), dtype=wide),
        x.new_empty((batch, chunks, segment_len), dtype=torch.int32),
        x.new_empty((2, n + 1), dtype=wide),
    )


def _fake_backward(grad, x, depthwise, weight1, bias1, conv, weight2, *_):
    shapes = (depthwise.shape, weight1.shape, bias1.shape, conv.shape, weight2.shape, weight2.shape)
    return x.new_empty(x.shape), *(weight1.new_empty(shape) for shape in shapes)


native.complete("local_attention", _fake, _fake_backward, _setup_context, _backward)


def _pool_fake(x, depthwise, weight1, bias1, mean1, var1, segment_len, eps1):
    chunks = chunk_count(x.shape[2], segment_len)
    rows = (x.shape[0], chunks, segment_len)
    return x.new_empty((x.shape[0], 2, *rows[1:])), x.new_empty(rows, dtype=torch.int32)


if native.missing("local_pool") is None:
    torch.library.register_fake(
        "mvat::local_pool_statistics", lambda x, depthwise, segment_len: x.new_empty((2, x.shape[1]))
    )
    torch.library.register_fake("mvat::local_pool", _pool_fake)
    torch.library.register_fake("mvat::local_pool_sums", lambda grad, x, *_: x.new_empty((2, x.shape[1])))
    torch.library.register_fake(
        "mvat::local_pool_backward", lambda grad, x, depthwise, *_: (x.new_empty(x.shape), x.new_empty(depthwise.shape))
    )
    for part in ("local_pool_sums", "local_pool_backward"):
        native.differentiable(part, native.no_second_derivative("local_attention"))
