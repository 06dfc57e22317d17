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
from mvat.kernels.checks import check_integer, check_segment_len
from mvat.kernels.norm_act_conv import activation_index
from mvat.models.folded import conv_norm, folded, ready, stacked

Conv = nn.Conv1d | nn.ConvTranspose1d
BatchNorm = nn.BatchNorm1d | nn.SyncBatchNorm


class Views(NamedTuple):
    """The three views of one multi-view block: features [B, n, T], or their attention maps [B, T]."""

    channel: Tensor
    global_: Tensor
    local: Tensor


class Raw(NamedTuple):
    """A convolution's output [B, C, T], not normalised yet, with its statistics where they were gathered."""

    features: Tensor
    statistics: Tensor | None


def conv_stage(x: Tensor | Raw, conv: Conv, bn: BatchNorm | None = None, activation: str = "identity") -> Raw:
    """conv(activation(bn(x))) with the modules' parameters: one stage of a chain, its output not normalised yet."""
    x = x if isinstance(x, Raw) else Raw(x, None)
    return _stage(x, conv, None if bn is None else Norm.of(bn), activation, bn is not None and bn.training)


def _stage(x: Raw, conv: Conv, norm: Norm | None, activation: str, training: bool) -> Raw:
    y = norm_act_conv(
        x.features,
        conv.weight,
        conv.bias,
        norm=norm,
        activation=activation,
        stride=conv.stride[0],
        padding=conv.padding[0],
        groups=conv.groups,
        transposed=isinstance(conv, nn.ConvTranspose1d),
        training=training,
        statistics=x.statistics,
        want_statistics=conv.training,
    )
    return Raw(*y) if conv.training else Raw(y, None)


def joined_stage(branches: list[Raw], bns: list[BatchNorm], activation: str, conv: Conv) -> Raw:
    """conv(activation(bn(x))) of branches [B, n, T] put side by side, each with a norm of its own.

    The raw outputs are put together and their norms taken for one, so that neither the branches nor what they are
    normalised to is kept.
    """
    if len({(type(bn), bn.momentum, bn.eps, bn.training, getattr(bn, "process_group", None)) for bn in bns}) > 1:
        ends = [chain_end(x, bn, activation) for x, bn in zip(branches, bns, strict=True)]
        return conv_stage(torch.cat(ends, 1), conv)
    norms = [Norm.of(bn) for bn in bns]
    norm = norms[0]._replace(
        **{field: torch.cat([getattr(norm, field) for norm in norms]) for field in Norm._fields[:4]}
    )
    statistics = [x.statistics for x in branches if x.statistics is not None]
    raw = Raw(
        torch.cat([x.features for x in branches], 1),
        torch.cat(statistics, 1) if len(statistics) == len(branches) else None,
    )
    y = _stage(raw, conv, norm, activation, bns[0].training)
    if bns[0].training:  # the running statistics that have moved are those of the joined norm, a copy
        with torch.no_grad():
            for field in ("running_mean", "running_var"):
                sizes = [bn.num_features for bn in bns]
                for old, new in zip(norms, getattr(norm, field).split(sizes), strict=True):
                    getattr(old, field).copy_(new)
    return y


def chain_end(x: Raw, bn: BatchNorm, activation: str = "identity") -> Tensor:
    """activation(bn(x)): the end of a chain."""
    return norm_act(x.features, Norm.of(bn), activation, training=bn.training, statistics=x.statistics)


def conv_end(x: Tensor, stage: nn.Sequential) -> Tensor:
    """A chain of one stage: convolution, batch norm where there is one, ReLU where there is one."""
    conv, *rest = stage
    bn = rest[0] if rest and isinstance(rest[0], BatchNorm) else None
    activation = "relu" if rest and isinstance(rest[-1], nn.ReLU) else "identity"
    weights = folded(stage, x, lambda stage: _fold_stage(conv, bn))
    if weights is not None:
        where = conv.stride[0], conv.padding[0], isinstance(conv, nn.ConvTranspose1d)
        return torch.ops.mvat.conv_act(x, *weights, *where, activation_index(activation))
    y = conv_stage(x, conv)
    if bn is not None:
        return chain_end(y, bn, activation)
    return y.features


def _fold_stage(conv: Conv, bn: BatchNorm | None) -> list[Tensor]:
    weight, bias = conv_norm(conv, bn)
    return ready(weight.permute(2, 0, 1), bias)


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
    """The residual Conformer block [B, a, T] -> [B, b, T]: 1x1 GLU, depthwise SiLU, 1x1 SiLU, 1x1, shortcut, ReLU.

    A chain of `mvat.kernels.norm_act_conv` stages that `norm_act` ends: dtypes, gradients and back ends are theirs. A
    sample costs 2 a^2 + 31 a + 2 a b + b^2 multiply-adds.

    Args:
        in_channels: a, at least 1.
        out_channels: b, at least 1.

    Raises:
        ValueError: for another number.

    Examples:
        >>> ResCon(12, 24).eval()(torch.randn(2, 12, 1000)).shape
        torch.Size([2, 24, 1000])

    Source: Park et al., "MANNER", ICASSP 2022, after the Conformer (Gulati et al., Interspeech 2020).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        check_integer("ResCon", "in_channels", in_channels, 1)
        check_integer("ResCon", "out_channels", out_channels, 1)
        self.point_conv1 = _conv_norm(in_channels, 2 * in_channels)
        self.depth_conv = _conv_norm(in_channels, in_channels, 31, groups=in_channels, bias=False)
        self.point_conv2 = _conv_norm(in_channels, out_channels)
        self.conv = BasicConv(out_channels, out_channels)
        self.shortcut = BasicConv(in_channels, out_channels)

    def _fold(self) -> list[Tensor]:
        first, depthwise, middle = (
            conv_norm(stage[0].conv, stage[1]) for stage in (self.point_conv1, self.depth_conv, self.point_conv2)
        )
        last, shortcut = (conv_norm(stage.conv, stage.bn) for stage in (self.conv, self.shortcut))
        return ready(*first, depthwise[0][:, 0], *depthwise[1:], *middle, last[0], shortcut[0], last[1] + shortcut[1])

    def forward(self, x: Tensor) -> Tensor:
        weights = folded(self, x, ResCon._fold)
        if weights is not None:
            return torch.ops.mvat.conformer_block(x, *weights)
        u = conv_stage(x, self.point_conv1[0].conv)
        u = conv_stage(u, self.depth_conv[0].conv, self.point_conv1[1], "glu")
        u = conv_stage(u, self.point_conv2[0].conv, self.depth_conv[1], "silu")
        u = conv_stage(u, self.conv.conv, self.point_conv2[1], "silu")
        shortcut = conv_stage(x, self.shortcut.conv)
        return norm_act(
            u.features,
            Norm.of(self.conv.bn),
            "relu",
            shortcut=shortcut.features,
            shortcut_norm=Norm.of(self.shortcut.bn),
            training=self.conv.bn.training,
            statistics=u.statistics,
            shortcut_statistics=shortcut.statistics,
        )


class ChannelAttention(nn.Module):
    """The channel view [B, n, T] -> [B, n, T]: a gate a channel, from its maximum and its mean over time.

    The module holds the parameters of `mvat.kernels.channel_attention`, which does the arithmetic: dtypes, gradients
    and back ends are its. Two readings of the input and one write; 2 n^2 multiply-adds a clip for the gate.

    Args:
        channels: n, at least 2.

    Raises:
        ValueError: for another number.

    Examples:
        >>> ChannelAttention(20)(torch.randn(2, 20, 1000)).shape
        torch.Size([2, 20, 1000])

    Source: Park et al., "MANNER", ICASSP 2022, after CBAM (Woo et al., ECCV 2018).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_integer("ChannelAttention", "channels", channels, 2)
        self.fc = nn.Sequential(nn.Linear(channels, channels // 2), nn.ReLU(), nn.Linear(channels // 2, channels))

    def forward(self, x: Tensor) -> Tensor:
        first, _, second = self.fc
        return channel_attention(x, first.weight, first.bias, second.weight, second.bias)


class GlobalAttention(nn.Module):
    """The global view [B, n, T] -> [B, n, T]: self-attention between the overlapped chunks of every channel.

    The module holds the parameters of `mvat.kernels.global_attention`, which does the arithmetic: dtypes, gradients and
    back ends are its. The weights do not depend on n. A channel is P = 2 T / C + 3 chunks and costs 2 P^2 C head
    multiply-adds once the weights are absorbed (head times as many before); memory grows as T, not as P^2.

    Args:
        segment_len: C, the chunk's length in samples, even, at least 2.
        head: heads, at least 1; each is C * head wide.

    Raises:
        ValueError: for other numbers.

    Examples:
        >>> GlobalAttention(segment_len=64, head=1)(torch.randn(2, 20, 1000)).shape
        torch.Size([2, 20, 1000])

    Source: Park et al., "MANNER", ICASSP 2022.
    """

    def __init__(self, segment_len: int, head: int) -> None:
        super().__init__()
        check_segment_len("GlobalAttention", segment_len)
        check_integer("GlobalAttention", "head", head, 1)
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
    """The local view [B, n, T] -> [B, n, T]: a mask over time from convolutions inside overlapped chunks.

    The module holds the parameters and the batch norms of `mvat.kernels.local_attention`, which does the arithmetic:
    dtypes, gradients and back ends are its. In training mode the norms take the batch's statistics and move their
    running ones. At most 62 multiply-adds a sample and channel: every sample lies in two chunks, a kernel has 31 taps.

    Args:
        channels: n, at least 1.
        segment_len: C, the chunk's length in samples, even, at least 2.

    Raises:
        ValueError: for other numbers.

    Examples:
        >>> LocalAttention(20, segment_len=64).eval()(torch.randn(2, 20, 1000)).shape
        torch.Size([2, 20, 1000])

    Source: Park et al., "MANNER", ICASSP 2022.
    """

    def __init__(self, channels: int, segment_len: int) -> None:
        super().__init__()
        check_integer("LocalAttention", "channels", channels, 1)
        check_segment_len("LocalAttention", segment_len)
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
    """The multi-view attention block [B, c, T] -> [B, c, T]: channel, global and local views, merged and gated.

    `views` gives the three views alone, `merge` makes the output of them; calling the block does both.

    Args:
        channels: c, at least 6; every view has n = c // 3 channels.
        segment_len: C, the chunk's length in samples of the global and local views, even, at least 2.
        head: heads of the global view, at least 1.

    Raises:
        ValueError: for other numbers.

    Examples:
        >>> MultiView(60).eval()(torch.randn(2, 60, 1000)).shape
        torch.Size([2, 60, 1000])

    Source: Park et al., "MANNER", ICASSP 2022.
    """

    def __init__(self, channels: int, segment_len: int = 64, head: int = 1) -> None:
        super().__init__()
        check_integer("MultiView", "channels", channels, 6)
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

    def _fold(self) -> list[Tensor]:
        inner, outer = (
            [conv_norm(branch.conv, branch.bn) for branch in branches]
            for branches in (
                (self.in_branch0, self.in_branch1, self.in_branch2),
                (self.out_branch0, self.out_branch1, self.out_branch2),
            )
        )
        inner_weight, inner_bias = stacked(inner)
        branches = torch.stack([weight.permute(2, 0, 1) for weight, _ in outer])
        # The gates' convolutions follow the merging one without an activation between them: one product.
        merge_weight, merge_bias = conv_norm(self.conv.conv, self.conv.bn)
        gates_weight, gates_bias = stacked([conv_norm(gate[0]) for gate in (self.output_tanh, self.output_sigmoid)])
        gates = gates_weight[..., 0] @ merge_weight[..., 0], gates_bias + gates_weight[..., 0] @ merge_bias
        last, shortcut = conv_norm(self.gate_conv[0]), conv_norm(self.shortcut.conv, self.shortcut.bn)
        outer_bias = torch.cat([bias for _, bias in outer])
        return ready(inner_weight.permute(2, 0, 1), inner_bias, branches, outer_bias, *gates, *last, *shortcut)

    def views(self, x: Tensor) -> Views:
        """Each view right after its own attention, [B, n, T] (our definition of what is transferred)."""
        return self._views(x, folded(self, x, MultiView._fold))

    def _views(self, x: Tensor, weights: list[Tensor] | None) -> Views:
        if weights is not None:
            features = torch.ops.mvat.conv_act(x, *weights[:2], 1, 0, False, activation_index("relu")).chunk(3, 1)
        else:
            features = tuple(branch(x, "relu") for branch in (self.in_branch0, self.in_branch1, self.in_branch2))
        return Views(self.channel_attn(features[0]), self.global_attn(features[1]), self.local_attn(features[2]))

    def merge(self, x: Tensor, views: Views) -> Tensor:
        """The block's output from its input x and its views."""
        return self._merge(x, views, folded(self, x, MultiView._fold))

    def _merge(self, x: Tensor, views: Views, weights: list[Tensor] | None) -> Tensor:
        if weights is not None:
            return torch.ops.mvat.multi_view_merge(x, *views, *weights[2:])
        branches = self.out_branch0, self.out_branch1, self.out_branch2
        u = joined_stage(
            [conv_stage(view, b.conv) for view, b in zip(views, branches, strict=True)],
            [b.bn for b in branches],
            "relu",
            self.conv.conv,
        )
        shortcut = conv_stage(x, self.shortcut.conv)
        gates = self.output_tanh[0], self.output_sigmoid[0], self.gate_conv[0]
        return mask_gate(
            u.features,
            *[p for conv in gates for p in (conv.weight, conv.bias)],
            shortcut=shortcut.features,
            norm=Norm.of(self.conv.bn),
            shortcut_norm=Norm.of(self.shortcut.bn),
            training=self.conv.bn.training,
            statistics=u.statistics,
            shortcut_statistics=shortcut.statistics,
        )

    def forward(self, x: Tensor) -> Tensor:
        weights = folded(self, x, MultiView._fold)
        return self._merge(x, self._views(x, weights), weights)


class MaskGate(nn.Module):
    """The network's mask [B, h, T] -> [B, h, T]: a gated pair of 1x1 convolutions, a third one, ReLU.

    The module holds the parameters of `mvat.kernels.mask_gate`, which does the arithmetic: dtypes, gradients and back
    ends are its. A sample costs 3 h^2 multiply-adds.

    Args:
        channels: h, at least 1.

    Raises:
        ValueError: for another number.

    Examples:
        >>> MaskGate(12)(torch.randn(2, 12, 1000)).shape
        torch.Size([2, 12, 1000])

    Source: Park et al., "MANNER", ICASSP 2022, after WaveNet's gate (van den Oord et al., 2016).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_integer("MaskGate", "channels", channels, 1)
        self.output = _gate_conv(channels)
        self.output_gate = _gate_conv(channels)
        self.mask = _gate_conv(channels)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.output[0], self.output_gate[0], self.mask[0]
        return mask_gate(x, *[p for conv in gates for p in (conv.weight, conv.bias)])
