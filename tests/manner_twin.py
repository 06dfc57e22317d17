"""MANNER's modules written plainly, with the attribute names, signatures and structure of the authors' repository."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Swish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.sigmoid(x)


class Wrapped(nn.Module):
    def __init__(self, *arguments, **keywords) -> None:
        super().__init__()
        self.conv = nn.Conv1d(*arguments, **keywords)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class BasicConv(nn.Module):
    def __init__(self, a: int, b: int, kernel: int = 1, relu: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv1d(a, b, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm1d(b, momentum=0.01)
        self.relu = nn.ReLU() if relu else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return x if self.relu is None else self.relu(x)


class ResConBlock(nn.Module):
    def __init__(self, a: int, b: int, kernel: int = 31) -> None:
        super().__init__()
        depthwise = Wrapped(a, a, kernel, padding=kernel // 2, groups=a, bias=False)
        self.point_conv1 = nn.Sequential(Wrapped(a, 2 * a, 1), nn.BatchNorm1d(2 * a), nn.GLU(dim=1))
        self.depth_conv = nn.Sequential(depthwise, nn.BatchNorm1d(a), Swish())
        self.point_conv2 = nn.Sequential(Wrapped(a, b, 1), nn.BatchNorm1d(b), Swish())
        self.conv = BasicConv(b, b)
        self.shortcut = BasicConv(a, b)

    def forward(self, x: Tensor) -> Tensor:
        u = self.conv(self.point_conv2(self.depth_conv(self.point_conv1(x))))
        return F.relu(u + self.shortcut(x))


class ChannelAttention(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(n, n // 2), nn.ReLU(), nn.Linear(n // 2, n))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc(x.amax(2)) + self.fc(x.mean(2)))[:, :, None]


class GlobalAttention(nn.Module):
    def __init__(self, head: int, width: int) -> None:
        super().__init__()
        self.n_head, self.d_k = head, width * head
        self.w_qs = nn.Linear(width, head * self.d_k, bias=False)
        self.w_ks = nn.Linear(width, head * self.d_k, bias=False)
        self.w_vs = nn.Linear(width, head * self.d_k, bias=False)
        self.fc = nn.Linear(head * self.d_k, width, bias=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [B, n, P, C] each
        q, k, v = (
            w(x).unflatten(-1, (self.n_head, self.d_k)).transpose(2, 3)
            for w, x in ((self.w_qs, q), (self.w_ks, k), (self.w_vs, v))
        )
        weights = torch.softmax(q @ k.transpose(3, 4) / math.sqrt(self.d_k), -1)
        return self.fc((weights @ v).transpose(2, 3).flatten(3))


class LocalAttention(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.depth_conv = nn.Sequential(Wrapped(n, n, 31, padding=15, groups=n, bias=False), nn.BatchNorm1d(n), Swish())
        self.conv = BasicConv(2, 1, 7)

    def forward(self, x: Tensor) -> Tensor:  # [B, n, P, C]
        u = self.depth_conv(x.transpose(1, 2).flatten(0, 1))
        weights = torch.sigmoid(self.conv(torch.stack((u.amax(1), u.mean(1)), 1)))
        return x * weights.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class Chunks(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.chunk_size = width

    def cut(self, x: Tensor) -> Tensor:
        return F.pad(x, (self.chunk_size,) * 2).unfold(2, self.chunk_size, self.chunk_size // 2)

    def add(self, chunks: Tensor, length: int) -> Tensor:
        width = self.chunk_size
        pieces = chunks.flatten(0, 1).transpose(1, 2)
        x = F.fold(pieces, (length + 2 * width, 1), (width, 1), stride=(width // 2, 1))
        return x.view(*chunks.shape[:2], -1)[..., width : width + length] / 2


def gate(c: int, activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(c, c, 1), activation)


class MultiviewAttentionBlock(nn.Module):
    def __init__(self, c: int, width: int, head: int) -> None:
        super().__init__()
        self.inter = n = int(c / 3)
        self.dsp = Chunks(width)
        self.in_branch0 = BasicConv(c, n, relu=True)
        self.in_branch1 = BasicConv(c, n, relu=True)
        self.in_branch2 = BasicConv(c, n, relu=True)
        self.channel_attn = ChannelAttention(n)
        self.global_attn = GlobalAttention(head, width)
        self.local_attn = LocalAttention(n)
        self.out_branch0 = BasicConv(n, n, 3, relu=True)
        self.out_branch1 = BasicConv(n, n, 3, relu=True)
        self.out_branch2 = BasicConv(n, n, 3, relu=True)
        self.conv = BasicConv(3 * n, c)
        self.shortcut = BasicConv(c, c)
        self.output_tanh = gate(c, nn.Tanh())
        self.output_sigmoid = gate(c, nn.Sigmoid())
        self.gate_conv = gate(c, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[2]
        channel = self.channel_attn(self.in_branch0(x))
        chunks = self.dsp.cut(self.in_branch1(x))
        global_ = self.dsp.add(self.global_attn(chunks, chunks, chunks), length)
        local = self.dsp.add(self.local_attn(self.dsp.cut(self.in_branch2(x))), length)
        u = self.conv(torch.cat((self.out_branch0(channel), self.out_branch1(global_), self.out_branch2(local)), 1))
        return self.shortcut(x) + self.gate_conv(self.output_tanh(u) * self.output_sigmoid(u))


class Encoder(nn.Module):
    def __init__(self, c: int, kernel: int, stride: int, width: int, head: int, attends: bool = True) -> None:
        super().__init__()
        self.down_conv = nn.Sequential(nn.Conv1d(c, c, kernel, stride), nn.BatchNorm1d(c), nn.ReLU())
        self.conv_block = ResConBlock(c, 2 * c)
        if attends:
            self.attn_block = MultiviewAttentionBlock(2 * c, width, head)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_block(self.down_conv(x))
        return self.attn_block(x) if hasattr(self, "attn_block") else x


class Decoder(nn.Module):
    def __init__(self, c: int, kernel: int, stride: int, width: int, head: int, attends: bool = True) -> None:
        super().__init__()
        self.conv_block = ResConBlock(2 * c, c)
        self.up_conv = nn.Sequential(nn.ConvTranspose1d(c, c, kernel, stride), nn.BatchNorm1d(c), nn.ReLU())
        if attends:
            self.attn_block = MultiviewAttentionBlock(c, width, head)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up_conv(self.conv_block(x))
        return self.attn_block(x) if hasattr(self, "attn_block") else x


class MaskGate(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.output = gate(c, nn.Tanh())
        self.output_gate = gate(c, nn.Sigmoid())
        self.mask = gate(c, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.mask(self.output(x) * self.output_gate(x))


class MannerBlock(nn.Module):
    def __init__(self, hidden, depth, kernel_size, stride, head, segment_len, small) -> None:
        super().__init__()
        self.in_conv = nn.Sequential(nn.Conv1d(1, hidden, 3, padding=1), nn.BatchNorm1d(hidden), nn.ReLU())
        self.out_conv = nn.Sequential(nn.Conv1d(hidden, 1, 3, padding=1))
        layers = [
            (hidden * 2**level, kernel_size, stride, segment_len, head, not small or level == depth - 1)
            for level in range(depth)
        ]
        self.encoder = nn.ModuleList(Encoder(*layer) for layer in layers)
        self.decoder = nn.ModuleList(Decoder(*layer) for layer in reversed(layers))
        deepest = hidden * 2**depth
        self.linear = nn.Sequential(nn.Linear(deepest, deepest, bias=False), nn.ReLU())
        self.mask_gate = MaskGate(hidden)

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.in_conv(x)
        skips = []
        for encoder in self.encoder:
            x = encoder(x)
            skips.append(x)
        x = self.linear(x.transpose(1, 2)).transpose(1, 2)
        for decoder in self.decoder:
            x = decoder(x + skips.pop()[..., : x.shape[2]])
        return self.out_conv(first * self.mask_gate(x))


class MANNER(nn.Module):
    eps = 1e-3

    def __init__(self, hidden=6, depth=2, kernel_size=8, stride=4, head=1, segment_len=8, small=False) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.depth = kernel_size, stride, depth
        self.manner_block = MannerBlock(hidden, depth, kernel_size, stride, head, segment_len, small)

    def padding(self, length: int) -> int:
        for _ in range(self.depth):
            length = max(math.ceil((length - self.kernel_size) / self.stride) + 1, 1)
        for _ in range(self.depth):
            length = (length - 1) * self.stride + self.kernel_size
        return length

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[2]
        deviation = x.mean(1, keepdim=True).std(2, keepdim=True)
        x = F.pad(x / (self.eps + deviation), (0, self.padding(length) - length))
        return self.manner_block(x)[..., :length] * deviation
