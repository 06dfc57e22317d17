"""The gate that closes a multi-view block and makes the network's mask.

    y = relu(W3 (tanh(W1 x + b1) * sigmoid(W2 x + b2)) + b3) + shortcut

All three are 1x1 convolutions. Source: Park et al., "MANNER", ICASSP 2022; the gate itself is that of WaveNet
(van den Oord et al., 2016).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mvat.kernels.backend import not_written, register, use_fused
from mvat.kernels.checks import check_features, check_parameter
from mvat.kernels.norm_act_conv import conv_reference

register("mask_gate", not_written)


def mask_gate_reference(
    x: Tensor,
    tanh_weight: Tensor,
    tanh_bias: Tensor,
    sigmoid_weight: Tensor,
    sigmoid_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    shortcut: Tensor | None = None,
) -> Tensor:
    """`mask_gate` in plain PyTorch."""
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
) -> Tensor:
    """Gate the features and pass them through a third convolution and ReLU, the shortcut added.

    Args:
        x: features [B, c, T].
        tanh_weight, tanh_bias, sigmoid_weight, sigmoid_bias: 1x1 convolutions, [h, c, 1] and [h].
        out_weight, out_bias: 1x1 convolution, [o, h, 1] and [o].
        shortcut: [B, o, T], added after the ReLU, or None.

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
    if shortcut is not None:
        check_parameter(op, "shortcut", shortcut, (batch, out, length), x)
    use_fused(op, x)
    return mask_gate_reference(x, tanh_weight, tanh_bias, sigmoid_weight, sigmoid_bias, out_weight, out_bias, shortcut)
