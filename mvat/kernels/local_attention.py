"""The local view of a multi-view block: a mask over time from a depthwise convolution inside each chunk.

For every chunk z [n, C] (see `mvat.kernels.chunks`), with * the convolution of kernel 31 along the chunk, zero padded
at the chunk's own ends, and + a convolution of kernel 7,

    u = silu(norm1(depthwise_weight * z))          [n, C], norm1 over batch, chunks and positions
    a = sigmoid(norm2(conv_weight + [max_n u, mean_n u]))          [C]

and y = overlap_add(z a) / 2. Since a does not depend on the channel, this is a mask:

    y[b, c, t] = x[b, c, t] * m[b, t],     m = overlap_add(a) / 2,

so that no feature is unfolded for the product.

Source: Park et al., "MANNER", ICASSP 2022; the mask identity is ours.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mvat.kernels.backend import not_written, register, use_fused
from mvat.kernels.checks import check_features, check_parameter, check_segment_len
from mvat.kernels.chunks import chunk, overlap_add
from mvat.kernels.depthwise import depthwise_reference
from mvat.kernels.norm import Norm, batch_norm_reference, check_norm

register("local_attention", not_written)


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
    length = x.shape[-1]
    kernel, kernel2 = depthwise_weight.shape[-1], conv_weight.shape[-1]
    u = depthwise_reference(chunk(x, segment_len), depthwise_weight, padding=kernel // 2)
    u = F.silu(batch_norm_reference(u, norm1, training))
    # amax is five times faster but splits the gradient between equal maxima: only where no gradient is asked for.
    maximum = u.max(1).values if u.requires_grad else u.amax(1)
    pooled = torch.stack((maximum, u.mean(1)), 1)  # [B, 2, P, C]
    a = F.conv2d(pooled, conv_weight[:, :, None], padding=(0, kernel2 // 2))
    a = torch.sigmoid(batch_norm_reference(a, norm2, training))  # [B, 1, P, C]
    return x * (overlap_add(a, length) / 2)


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
        norm2: the batch norm of the single mask channel.
        segment_len: C, the chunk's length in samples, even.
        training: True takes the statistics of the batch and updates the running ones in place.

    Returns:
        [B, n, T].

    Raises:
        TypeError, ValueError: for a wrong type, dtype, shape or device.
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
    use_fused(op, x)
    return local_attention_reference(x, depthwise_weight, norm1, conv_weight, norm2, segment_len, training)
