"""The channel view of a multi-view block: a gate per channel from its maximum and its mean over time.

    fc(v) = W2 relu(W1 v + b1) + b2
    y[b, c, t] = x[b, c, t] * sigmoid(fc(max_t x) + fc(mean_t x))[b, c]

Source: Park et al., "MANNER: Multi-view Attention Network for Noise Erasure", ICASSP 2022, after the channel
attention of CBAM (Woo et al., ECCV 2018).

The CPU kernel (csrc/cpu/channel_attention.cpp) finds maximum and mean in one pass, in place whatever the batch and
channel strides, and scales in a second one that goes backwards through what the first left in the caches. Medians in
milliseconds, float32, 2 cores, eager, fused and torch.compile in turn; middle of three runs, which differed by up to a
factor of two on the larger shapes:

    [B, n, T]         forward: eager  fused  compile    and backward: eager  fused  compile
    [1, 320, 62]               0.145  0.078   0.144                   0.63   0.32    0.64
    [4, 320, 249]              0.39   0.17    0.24                    1.29   0.69    1.25
    [16, 320, 249]             1.29   0.77    0.65                    8.2    3.6     4.0
    [16, 160, 1000]            1.9    1.15    0.91                   15.6    6.2     5.7

The forward pass loses to torch.compile at batch 16. Tried: one small clip a thread instead of waves of clips (slower
at batch 16: every clip streams the weights anew), waves of 0.5 to 16 MB (no difference beyond noise).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mvat.kernels import native
from mvat.kernels.backend import register, use_fused
from mvat.kernels.checks import check_features, check_parameter


def channel_attention_reference(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor
) -> Tensor:
    """`channel_attention` in plain PyTorch.

    adaptive_max_pool1d rather than amax: it sends the gradient to one maximum, as the original does, and its backward
    is twice as fast on a CPU. On a GPU its backward is not deterministic, that of max is.
    """
    maximum = x.max(-1).values if x.is_cuda else F.adaptive_max_pool1d(x, 1)[..., 0]
    pooled = torch.stack((maximum, x.mean(-1)))  # [2, B, n]
    hidden = F.relu(F.linear(pooled, fc1_weight, fc1_bias))
    gate = torch.sigmoid(F.linear(hidden, fc2_weight, fc2_bias).sum(0))
    return x * gate[..., None]


def channel_attention(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor) -> Tensor:
    """Scale every channel by a gate computed from its maximum and its mean over time.

    Args:
        x: features [B, n, T], float32, float64, or half precision.
        fc1_weight, fc1_bias: the first linear layer, [n // 2, n] and [n // 2] (any hidden width is accepted).
        fc2_weight, fc2_bias: the second linear layer, [n, n // 2] and [n].

    Returns:
        [B, n, T]. A maximum sends its gradient to the first index that attains it.

    Raises:
        TypeError, ValueError: for a wrong type, dtype, shape or device, or an empty channel or time axis.
    """
    op = "channel_attention"
    check_features(op, "x", x, ("B", "n", "T"))
    n = x.shape[1]
    hidden = fc1_weight.shape[0] if isinstance(fc1_weight, Tensor) and fc1_weight.dim() else 0
    check_parameter(op, "fc1_weight", fc1_weight, (hidden, n), x)
    check_parameter(op, "fc1_bias", fc1_bias, (hidden,), x)
    check_parameter(op, "fc2_weight", fc2_weight, (n, hidden), x)
    check_parameter(op, "fc2_bias", fc2_bias, (n,), x)
    if n == 0 or x.shape[2] == 0:
        raise ValueError(f"{op}: x must have at least one channel and one sample in time, got shape {list(x.shape)}")
    if use_fused(op, x):
        wide = native.wide(x.dtype)
        parameters = (p if p.dtype == wide else p.to(wide) for p in (fc1_weight, fc1_bias, fc2_weight, fc2_bias))
        return torch.ops.mvat.channel_attention(x, *parameters)[0]
    return channel_attention_reference(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)


register("channel_attention", native.supports("channel_attention", ("cpu", "cuda")))


def _setup_context(ctx, inputs, output) -> None:
    x, weight1, bias1, weight2, _ = inputs
    _, gate, pooled, index = output
    ctx.mark_non_differentiable(gate, pooled, index)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, gate, pooled, index, weight1, bias1, weight2)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 5
    return torch.ops.mvat.channel_attention_backward(grad, *ctx.saved_tensors)


def _fake(x, weight1, bias1, weight2, bias2):
    rows = x.shape[:2]
    return (
        x.new_empty(x.shape),
        weight1.new_empty(rows),
        weight1.new_empty((2, *rows)),
        x.new_empty(rows, dtype=torch.int64),
    )


def _fake_backward(grad, x, gate, pooled, index, weight1, bias1, weight2):
    shapes = weight1.shape, bias1.shape, weight2.shape, weight2.shape[:1]
    return x.new_empty(x.shape), *(weight1.new_empty(shape) for shape in shapes)


native.complete("channel_attention", _fake, _fake_backward, _setup_context, _backward)
