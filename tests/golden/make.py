"""A second specification of MANNER and its training loss, and the maker of the golden files beside it.

Nothing here imports mvat. The network is written with plain torch.nn modules in float64, every chunk cut out and added
back in a loop, every softmax spelled out: slow and easy to follow. Run it to write the files again:

    python tests/golden/make.py
"""

import ast
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent
MODELS = {
    "all_h6": {
        "clip": (2, 377), "hidden": 6, "depth": 2, "kernel_size": 8, "stride": 4, "head": 1, "segment_len": 32,
        "attention_layers": "all",
    },
    "deepest_h7_head2": {
        "clip": (3, 301), "hidden": 7, "depth": 2, "kernel_size": 6, "stride": 3, "head": 2, "segment_len": 16,
        "attention_layers": "deepest",
    },
}  # fmt: skip
STFTS = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))  # n_fft, hop, window


class BasicConv(nn.Module):
    def __init__(self, a: int, b: int, kernel: int = 1, padding: int = 0, relu: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv1d(a, b, kernel, padding=padding, bias=False)
        self.bn = nn.BatchNorm1d(b, momentum=0.01)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return x.relu() if self.relu else x


class Wrapped(nn.Module):
    """The official names have a `conv` inside the Sequential."""

    def __init__(self, *arguments, **keywords) -> None:
        super().__init__()
        self.conv = nn.Conv1d(*arguments, **keywords)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ResCon(nn.Module):
    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.point_conv1 = nn.Sequential(Wrapped(a, 2 * a, 1), nn.BatchNorm1d(2 * a), nn.GLU(dim=1))
        self.depth_conv = nn.Sequential(
            Wrapped(a, a, 31, padding=15, groups=a, bias=False), nn.BatchNorm1d(a), nn.SiLU()
        )
        self.point_conv2 = nn.Sequential(Wrapped(a, b, 1), nn.BatchNorm1d(b), nn.SiLU())
        self.conv = BasicConv(b, b)
        self.shortcut = BasicConv(a, b)

    def forward(self, x: Tensor) -> Tensor:
        u = self.conv(self.point_conv2(self.depth_conv(self.point_conv1(x))))
        return (u + self.shortcut(x)).relu()


def cut_chunks(x: Tensor, width: int) -> list[Tensor]:
    """x [B, n, T] padded by `width` zeros on both sides, as floor((T + C) / (C / 2)) + 1 chunks [B, n, C]."""
    batch, n, length = x.shape
    silence = x.new_zeros(batch, n, width)
    padded = torch.cat((silence, x, silence), 2)
    count = (length + width) // (width // 2) + 1
    return [padded[:, :, i * width // 2 : i * width // 2 + width] for i in range(count)]


def add_chunks(chunks: list[Tensor], length: int) -> Tensor:
    """The chunks added where they were cut from, divided by 2, without the padding: [B, n, T]."""
    batch, n, width = chunks[0].shape
    total = torch.zeros(batch, n, length + 2 * width, dtype=torch.float64)
    for i, piece in enumerate(chunks):
        place = torch.zeros_like(total)
        place[:, :, i * width // 2 : i * width // 2 + width] = piece
        total = total + place
    return total[:, :, width : width + length] / 2


class ChannelAttention(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(n, n // 2), nn.ReLU(), nn.Linear(n // 2, n))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc(x.max(2).values) + self.fc(x.mean(2)))[:, :, None]


class GlobalAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.width, self.heads, self.d = width, heads, width * heads
        self.w_qs = nn.Linear(width, heads * self.d, bias=False)
        self.w_ks = nn.Linear(width, heads * self.d, bias=False)
        self.w_vs = nn.Linear(width, heads * self.d, bias=False)
        self.fc = nn.Linear(heads * self.d, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.stack(cut_chunks(x, self.width), 2)  # [B, n, P, C]
        q, k, v = self.w_qs(tokens), self.w_ks(tokens), self.w_vs(tokens)
        heads = []
        for i in range(self.heads):
            part = slice(i * self.d, (i + 1) * self.d)
            scores = torch.einsum("bnid,bnjd->bnij", q[..., part], k[..., part]) / math.sqrt(self.d)
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
            heads.append(torch.einsum("bnij,bnjd->bnid", weights, v[..., part]))
        out = self.fc(torch.cat(heads, -1))
        return add_chunks(list(out.unbind(2)), x.shape[2])


class LocalAttention(nn.Module):
    def __init__(self, n: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.depth_conv = nn.Sequential(
            Wrapped(n, n, 31, padding=15, groups=n, bias=False), nn.BatchNorm1d(n), nn.SiLU()
        )
        self.conv = BasicConv(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        chunks = cut_chunks(x, self.width)
        u = self.depth_conv(torch.cat(chunks))  # [P B, n, C]
        attention = torch.sigmoid(self.conv(torch.stack((u.max(1).values, u.mean(1)), 1)))
        weighted = [z * a for z, a in zip(chunks, attention.split(x.shape[0]), strict=True)]
        return add_chunks(weighted, x.shape[2])


class MultiView(nn.Module):
    def __init__(self, c: int, width: int, heads: int) -> None:
        super().__init__()
        n = int(c / 3)
        self.in_branch0 = BasicConv(c, n, relu=True)
        self.in_branch1 = BasicConv(c, n, relu=True)
        self.in_branch2 = BasicConv(c, n, relu=True)
        self.channel_attn = ChannelAttention(n)
        self.global_attn = GlobalAttention(width, heads)
        self.local_attn = LocalAttention(n, width)
        self.out_branch0 = BasicConv(n, n, 3, 1, relu=True)
        self.out_branch1 = BasicConv(n, n, 3, 1, relu=True)
        self.out_branch2 = BasicConv(n, n, 3, 1, relu=True)
        self.conv = BasicConv(3 * n, c)
        self.shortcut = BasicConv(c, c)
        self.output_tanh = nn.Sequential(nn.Conv1d(c, c, 1))
        self.output_sigmoid = nn.Sequential(nn.Conv1d(c, c, 1))
        self.gate_conv = nn.Sequential(nn.Conv1d(c, c, 1))
        self.views: dict[str, Tensor] = {}
        self.without = ""  # a view to take out, to see whether it matters

    def forward(self, x: Tensor) -> Tensor:
        self.views = {
            "channel": self.channel_attn(self.in_branch0(x)),
            "global": self.global_attn(self.in_branch1(x)),
            "local": self.local_attn(self.in_branch2(x)),
        }
        kept = [v * (name != self.without) for name, v in self.views.items()]
        outs = [self.out_branch0(kept[0]), self.out_branch1(kept[1]), self.out_branch2(kept[2])]
        u = self.conv(torch.cat(outs, 1))
        gate = torch.tanh(self.output_tanh(u)) * torch.sigmoid(self.output_sigmoid(u))
        return self.shortcut(x) + self.gate_conv(gate).relu()


class Layer(nn.Module):
    """An encoder or a decoder: its parts are called by the network in their own order."""


class MaskGate(nn.Module):
    def __init__(self, h: int) -> None:
        super().__init__()
        self.output = nn.Sequential(nn.Conv1d(h, h, 1))
        self.output_gate = nn.Sequential(nn.Conv1d(h, h, 1))
        self.mask = nn.Sequential(nn.Conv1d(h, h, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.mask(torch.tanh(self.output(x)) * torch.sigmoid(self.output_gate(x))).relu()


class Reference(nn.Module):
    """MANNER, design after Park et al., ICASSP 2022; `views()` tells the multi-view blocks' views of the last call."""

    def __init__(
        self, hidden=60, depth=4, kernel_size=8, stride=4, head=1, segment_len=64, attention_layers="all",
        in_channels=1, out_channels=1, growth=2,
    ) -> None:  # fmt: skip
        super().__init__()
        self.depth, self.kernel_size, self.stride = depth, kernel_size, stride
        block = self.manner_block = nn.Module()
        block.in_conv = nn.Sequential(nn.Conv1d(in_channels, hidden, 3, padding=1), nn.BatchNorm1d(hidden), nn.ReLU())
        block.out_conv = nn.Sequential(nn.Conv1d(hidden, out_channels, 3, padding=1))
        block.encoder, block.decoder = nn.ModuleList(), nn.ModuleList()
        for level in range(depth):
            c = hidden * growth**level
            attends = attention_layers == "all" or level == depth - 1
            encoder = Layer()
            encoder.down_conv = nn.Sequential(nn.Conv1d(c, c, kernel_size, stride), nn.BatchNorm1d(c), nn.ReLU())
            encoder.conv_block = ResCon(c, 2 * c)
            encoder.attn_block = MultiView(2 * c, segment_len, head) if attends else nn.Identity()
            block.encoder.append(encoder)
            decoder = Layer()
            decoder.conv_block = ResCon(2 * c, c)
            decoder.up_conv = nn.Sequential(nn.ConvTranspose1d(c, c, kernel_size, stride), nn.BatchNorm1d(c), nn.ReLU())
            decoder.attn_block = MultiView(c, segment_len, head) if attends else nn.Identity()
            block.decoder.insert(0, decoder)
        c = hidden * growth**depth
        block.linear = nn.Sequential(nn.Linear(c, c, bias=False), nn.ReLU())
        block.mask_gate = MaskGate(hidden)

    def blocks(self) -> list[MultiView]:
        layers = [*self.manner_block.encoder, *self.manner_block.decoder]
        return [layer.attn_block for layer in layers if isinstance(layer.attn_block, MultiView)]

    def views(self) -> list[dict[str, Tensor]]:
        return [block.views for block in self.blocks()]

    def valid_length(self, length: int) -> int:
        for _ in range(self.depth):
            length = max(math.ceil((length - self.kernel_size) / self.stride) + 1, 1)
        for _ in range(self.depth):
            length = (length - 1) * self.stride + self.kernel_size
        return length

    def forward(self, x: Tensor) -> Tensor:
        batch, _, length = x.shape
        deviation = x.std(2, unbiased=True, keepdim=True)
        x = x / (1e-3 + deviation)
        x = torch.cat((x, x.new_zeros(batch, x.shape[1], self.valid_length(length) - length)), 2)
        block = self.manner_block
        first = x = block.in_conv(x)
        skips = []
        for encoder in block.encoder:
            x = encoder.attn_block(encoder.conv_block(encoder.down_conv(x)))
            skips.append(x)
        x = block.linear(x.transpose(1, 2)).transpose(1, 2)
        for decoder in block.decoder:
            x = x + skips.pop()[:, :, : x.shape[2]]
            x = decoder.attn_block(decoder.up_conv(decoder.conv_block(x)))
        return block.out_conv(first * block.mask_gate(x))[:, :, :length] * deviation


def magnitude(x: Tensor, n_fft: int, hop: int, window: int) -> Tensor:
    """x [T]: the frames of a centred, reflect-padded signal under a periodic Hann window, [frames, n_fft / 2 + 1]."""
    half = n_fft // 2
    padded = torch.cat((x[1 : half + 1].flip(0), x, x[-half - 1 : -1].flip(0)))
    hann = 0.5 - 0.5 * torch.cos(2 * math.pi * torch.arange(window, dtype=torch.float64) / window)
    left = (n_fft - window) // 2
    hann = torch.cat((hann.new_zeros(left), hann, hann.new_zeros(n_fft - window - left)))
    frames = [padded[i : i + n_fft] * hann for i in range(0, len(x) + 1, hop)]
    spectrum = torch.fft.rfft(torch.stack(frames))
    return torch.sqrt((spectrum.real**2 + spectrum.imag**2).clamp(min=1e-7))


def distance(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Estimate x [T] to target y [T]: the distance, its spectral convergence, its log magnitudes (0.5 included)."""
    convergence = logarithm = 0.0
    for stft in STFTS:
        a, b = magnitude(x, *stft), magnitude(y, *stft)
        convergence = convergence + 0.5 / 3 * torch.sqrt(((b - a) ** 2).sum()) / torch.sqrt((b**2).sum())
        logarithm = logarithm + 0.5 / 3 * (torch.log(b) - torch.log(a)).abs().mean()
    return (x - y).abs().mean() + convergence + logarithm, convergence, logarithm


def weighted_loss(estimate: Tensor, clean: Tensor, noisy: Tensor) -> dict[str, Tensor]:
    """All [B, T]: the loss and its parts per clip, named as in the golden files."""
    rows: dict[str, list[Tensor]] = {
        "clean_loss": [],
        "clean_sc": [],
        "clean_mag": [],
        "noise_loss": [],
        "weighted": [],
    }
    for e, c, m in zip(estimate, clean, noisy, strict=True):
        speech, sc, mag = distance(e, c)
        noise = distance(m - e, m - c)[0]
        a = (c**2).sum() / ((c**2).sum() + ((m - c) ** 2).sum() + 2e-7)
        for name, value in zip(rows, (speech, sc, mag, noise, a * speech + (1 - a) * noise), strict=True):
            rows[name].append(value)
    parts = {name: torch.stack(values) for name, values in rows.items()}
    return {"loss": parts.pop("weighted").mean(), **parts}


def flat(tensors: dict[str, Tensor], dtype: str = "float") -> np.ndarray:
    """All values in one array: a zip file spends hundreds of bytes on every member."""
    return torch.cat([getattr(t.detach(), dtype)().flatten() for t in tensors.values()]).numpy()


def read(path: Path) -> dict[str, np.ndarray]:
    """A golden file with `state/<name>`, `grad/<name>` and `after/<name>` spread out again."""
    content = dict(np.load(path))
    if "names" not in content:
        return content
    shapes = ast.literal_eval(str(content.pop("names")))
    running = [k for k in shapes if "running" in k]
    parameters = [k for k in shapes if k not in running and not k.endswith("num_batches_tracked")]
    for kind, names in (("state", list(shapes)), ("grad", parameters), ("after", running)):
        values = iter(np.split(content.pop(kind), np.cumsum([math.prod(shapes[k]) for k in names])[:-1]))
        content |= {f"{kind}/{k}": next(values).reshape(shapes[k]) for k in names}
    return content


def make_model(clip: tuple[int, int], **config) -> tuple[dict[str, np.ndarray], str]:
    """One file's arrays and, for the reader, how much each view moves the output."""
    model = Reference(**config).double()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if not value.is_floating_point():
                continue
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif value.dim() == 1:  # biases and norms: a norm's weight stays positive, so that signals pass
                value.normal_(0, 0.2)
                if name.endswith("weight"):
                    value.add_(1.2)
            else:
                value.mul_(2.0)
            value.copy_(value.half())  # float16 holds these numbers exactly
    names = {k: list(v.shape) for k, v in model.state_dict().items()}
    arrays = {
        "config": np.array(repr(config)),
        "names": np.array(repr(names)),
        "state": flat(model.state_dict(), "half"),
    }
    x, r = (torch.randn(clip[0], 1, clip[1], dtype=torch.float64).half().double() for _ in range(2))
    arrays |= {"x": x.half().numpy(), "r": r.half().numpy()}

    model.eval()
    with torch.no_grad():
        y = model(x)
        arrays["y_eval"] = y.numpy()
        arrays |= {
            f"views/{i}/{k}": v.float().numpy() for i, views in enumerate(model.views()) for k, v in views.items()
        }
        moved = {}
        for view in ("channel", "global", "local"):
            for block in model.blocks():
                block.without = view
            moved[view] = float((model(x) - y).norm() / y.norm())
    for block in model.blocks():
        block.without = ""

    model.train()
    y = model(x)
    (y * r).sum().backward()
    arrays["y_train"] = y.detach().numpy()
    arrays["grad"] = flat({k: p.grad for k, p in model.named_parameters()})
    arrays["after"] = flat({k: b for k, b in model.named_buffers() if "running" in k})
    return arrays, f"without a view y_eval moves by {moved}"


def make_loss() -> dict[str, np.ndarray]:
    time = torch.arange(1500, dtype=torch.float64) / 16_000
    clean = torch.stack([torch.sin(2 * math.pi * f * time) * torch.exp(-20 * time) / 4 for f in (220.0, 660.0)])
    noisy = clean + 0.05 * torch.randn_like(clean)
    estimate = clean + 0.02 * torch.randn_like(clean)
    signals = [s.half().double() for s in (clean, noisy, estimate)]
    clean, noisy, estimate = signals
    parts = weighted_loss(estimate.requires_grad_(), clean, noisy)
    parts["loss"].backward()
    arrays = {k: v.detach().numpy() for k, v in parts.items()}
    arrays |= {k: v.detach().half().numpy() for k, v in zip(("clean", "noisy", "estimate"), signals, strict=True)}
    return arrays | {"grad_estimate": estimate.grad.float().numpy()}


def main() -> None:
    for name, config in MODELS.items():
        torch.manual_seed(0)
        arrays, remark = make_model(**config)
        np.savez_compressed(FOLDER / f"{name}.npz", **arrays)
        print(f"{name}.npz: {remark}")
    torch.manual_seed(0)
    np.savez_compressed(FOLDER / "loss.npz", **make_loss())


if __name__ == "__main__":
    main()
