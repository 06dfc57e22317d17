"""The blocks of MANNER. Attribute names are those of the official checkpoints; all arithmetic is in `mvat.kernels`."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mvat.kernels import (
    Norm,
    channel_attention,
    global_attention,
    local_attention,
    mask_gate,
    norm_act,
    norm_act_conv,
)

Conv = nn.Conv1d | nn.ConvTranspose1d


class Views(NamedTuple):
    """The three views of one multi-view block: features [B, n, T], or their attention maps [B, T]."""

    channel: Tensor
    global_: Tensor
    local: Tensor


def conv_stage(x: Tensor, conv: Conv, bn: nn.BatchNorm1d | None = None, activation: str = "identity") -> Tensor:
    """conv(activation(bn(x))) with the modules' parameters: one stage of a chain, its output not normalised yet."""
    return norm_act_conv(
        x,
        conv.weight,
        conv.bias,
        norm=None if bn is None else Norm.of(bn),
        activation=activation,
        stride=conv.stride[0],
        padding=conv.padding[0],
        groups=conv.groups,
        transposed=isinstance(conv, nn.ConvTranspose1d),
        training=bn is not None and bn.training,
    )


def chain_end(x: Tensor, bn: nn.BatchNorm1d, activation: str = "identity") -> Tensor:
    """activation(bn(x)): the end of a chain."""
    return norm_act(x, Norm.of(bn), activation, training=bn.training)


class BasicConv(nn.Module):
    """A convolution without bias and its batch norm (momentum 0.01)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_channels, out_channels, kernel_size, padding=padding, bias=False)
        self.bn = nn.BatchNorm1d(out_channels, momentum=0.01)

    def forward(self, x: Tensor, activation: str = "identity") -> Tensor:
        return chain_end(conv_stage(x, self.conv), self.bn, activation)


class BareConv(nn.Module):
    """A convolution under the attribute `conv`, as the official checkpoints name it inside a Sequential."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, groups: int, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv1d(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, groups=groups, bias=bias
        )


def _conv_norm(in_channels: int, out_channels: int, kernel_size: int = 1, groups: int = 1, bias: bool = True):
    conv = BareConv(in_channels, out_channels, kernel_size, groups, bias)
    return nn.Sequential(conv, nn.BatchNorm1d(out_channels))


class ResCon(nn.Module):
    """The residual Conformer block [B, a, T] -> [B, b, T]: 1x1 GLU, depthwise SiLU, 1x1 SiLU, 1x1, shortcut, ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.point_conv1 = _conv_norm(in_channels, 2 * in_channels)
        self.depth_conv = _conv_norm(in_channels, in_channels, 31, groups=in_channels, bias=False)
        self.point_conv2 = _conv_norm(in_channels, out_channels)
        self.conv = BasicConv(out_channels, out_channels)
        self.shortcut = BasicConv(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        u = conv_stage(x, self.point_conv1[0].conv)
        u = conv_stage(u, self.depth_conv[0].conv, self.point_conv1[1], "glu")
        u = conv_stage(u, self.point_conv2[0].conv, self.depth_conv[1], "silu")
        u = conv_stage(u, self.conv.conv, self.point_conv2[1], "silu")
        return norm_act(
            u,
            Norm.of(self.conv.bn),
            "relu",
            shortcut=conv_stage(x, self.shortcut.conv),
            shortcut_norm=Norm.of(self.shortcut.bn),
            training=self.conv.bn.training,
        )


class ChannelAttention(nn.Module):
    """The channel view: parameters of `mvat.kernels.channel_attention`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(channels, channels // 2), nn.ReLU(), nn.Linear(channels // 2, channels))

    def forward(self, x: Tensor) -> Tensor:
        first, _, second = self.fc
        return channel_attention(x, first.weight, first.bias, second.weight, second.bias)


class GlobalAttention(nn.Module):
    """The global view: parameters of `mvat.kernels.global_attention`."""

    def __init__(self, segment_len: int, head: int) -> None:
        super().__init__()
        self.segment_len, self.head = segment_len, head
        width = segment_len * head * head
        self.w_qs = nn.Linear(segment_len, width, bias=False)
        self.w_ks = nn.Linear(segment_len, width, bias=False)
        self.w_vs = nn.Linear(segment_len, width, bias=False)
        self.fc = nn.Linear(width, segment_len, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.w_qs.weight, self.w_ks.weight, self.w_vs.weight, self.fc.weight
        return global_attention(x, *weights, self.head, self.segment_len)


class LocalAttention(nn.Module):
    """The local view: parameters of `mvat.kernels.local_attention`."""

    def __init__(self, channels: int, segment_len: int) -> None:
        super().__init__()
        self.segment_len = segment_len
        self.depth_conv = _conv_norm(channels, channels, 31, groups=channels, bias=False)
        self.conv = BasicConv(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        depthwise, bn, *_ = self.depth_conv  # MANNER's own has its activation behind them
        return local_attention(
            x,
            depthwise.conv.weight,
            Norm.of(bn),
            self.conv.conv.weight,
            Norm.of(self.conv.bn),
            self.segment_len,
            bn.training,
        )


def _gate_conv(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(channels, channels, 1))


class MultiView(nn.Module):
    """The multi-view attention block [B, c, T] -> [B, c, T]: channel, global and local views, merged and gated."""

    def __init__(self, channels: int, segment_len: int = 64, head: int = 1) -> None:
        super().__init__()
        n = channels // 3
        for i in range(3):
            self.add_module(f"in_branch{i}", BasicConv(channels, n))
        self.channel_attn = ChannelAttention(n)
        self.global_attn = GlobalAttention(segment_len, head)
        self.local_attn = LocalAttention(n, segment_len)
        for i in range(3):
            self.add_module(f"out_branch{i}", BasicConv(n, n, 3, padding=1))
        self.conv = BasicConv(3 * n, channels)
        self.shortcut = BasicConv(channels, channels)
        self.output_tanh = _gate_conv(channels)
        self.output_sigmoid = _gate_conv(channels)
        self.gate_conv = _gate_conv(channels)

    def views(self, x: Tensor) -> Views:
        """Each view right after its own attention, [B, n, T] (our definition of what is transferred)."""
        return Views(
            self.channel_attn(self.in_branch0(x, "relu")),
            self.global_attn(self.in_branch1(x, "relu")),
            self.local_attn(self.in_branch2(x, "relu")),
        )

    def merge(self, x: Tensor, views: Views) -> Tensor:
        """The block's output from its input x and its views."""
        channel, global_, local = views
        branches = (
            self.out_branch0(channel, "relu"),
            self.out_branch1(global_, "relu"),
            self.out_branch2(local, "relu"),
        )
        gates = self.output_tanh[0], self.output_sigmoid[0], self.gate_conv[0]
        parameters = [p for conv in gates for p in (conv.weight, conv.bias)]
        return mask_gate(self.conv(torch.cat(branches, 1)), *parameters, shortcut=self.shortcut(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(x, self.views(x))


class MaskGate(nn.Module):
    """The network's mask [B, h, T]: parameters of `mvat.kernels.mask_gate`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.output = _gate_conv(channels)
        self.output_gate = _gate_conv(channels)
        self.mask = _gate_conv(channels)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.output[0], self.output_gate[0], self.mask[0]
        return mask_gate(x, *[p for conv in gates for p in (conv.weight, conv.bias)])
