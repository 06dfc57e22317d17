"""MANNER, the multi-view attention network for speech enhancement in the time domain.

Source: Park et al., "MANNER: Multi-view Attention Network for Noise Erasure", ICASSP 2022 (arXiv 2203.02181). Attribute
names are those of the official checkpoints, so that an official state_dict loads with strict=True.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvat.kernels import attention_map, norm_act_conv
from mvat.kernels.checks import check_features, check_segment_len
from mvat.models import pretrained
from mvat.models.blocks import MaskGate, MultiView, ResCon, Views, conv_end
from mvat.models.presets import PRESETS

#: Of the widest layer; a single convolution would have 64 GB of weights.
MOST_CHANNELS = 65536


class Encoder(nn.Module):
    """Strided convolution, Conformer block, multi-view attention: [B, c, T] -> [B, 2 c, T'], T' = (T - K) // S + 1."""

    def __init__(self, channels: int, kernel_size: int, stride: int, attention: MultiView | None) -> None:
        super().__init__()
        self.down_conv = nn.Sequential(
            nn.Conv1d(channels, channels, kernel_size, stride), nn.BatchNorm1d(channels), nn.ReLU()
        )
        self.conv_block = ResCon(channels, 2 * channels)
        self.attn_block = attention

    def before_attention(self, x: Tensor) -> Tensor:
        return self.conv_block(conv_end(x, self.down_conv))

    def forward(self, x: Tensor) -> Tensor:
        x = self.before_attention(x)
        return x if self.attn_block is None else self.attn_block(x)


class Decoder(nn.Module):
    """Conformer block, transposed convolution, multi-view attention: [B, 2 c, T] -> [B, c, (T - 1) S + K]."""

    def __init__(self, channels: int, kernel_size: int, stride: int, attention: MultiView | None) -> None:
        super().__init__()
        self.conv_block = ResCon(2 * channels, channels)
        self.up_conv = nn.Sequential(
            nn.ConvTranspose1d(channels, channels, kernel_size, stride), nn.BatchNorm1d(channels), nn.ReLU()
        )
        self.attn_block = attention

    def before_attention(self, x: Tensor) -> Tensor:
        return conv_end(self.conv_block(x), self.up_conv)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before_attention(x)
        return x if self.attn_block is None else self.attn_block(x)


class MannerBlock(nn.Module):
    """The network proper, on normalised and padded audio [B, in_channels, T]."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden: int,
        depth: int,
        kernel_size: int,
        stride: int,
        head: int,
        segment_len: int,
        attention_layers: str,
    ) -> None:
        super().__init__()
        self.in_conv = nn.Sequential(nn.Conv1d(in_channels, hidden, 3, padding=1), nn.BatchNorm1d(hidden), nn.ReLU())
        self.out_conv = nn.Sequential(nn.Conv1d(hidden, out_channels, 3, padding=1))
        encoders: list[Encoder] = []
        decoders: list[Decoder] = []
        for level in range(depth):
            channels = hidden * 2**level
            attends = attention_layers == "all" or level == depth - 1
            attention = [MultiView(c, segment_len, head) if attends else None for c in (2 * channels, channels)]
            encoders.append(Encoder(channels, kernel_size, stride, attention[0]))
            decoders.insert(0, Decoder(channels, kernel_size, stride, attention[1]))
        self.encoder = nn.ModuleList(encoders)
        self.decoder = nn.ModuleList(decoders)
        deepest = hidden * 2**depth
        self.linear = nn.Sequential(nn.Linear(deepest, deepest, bias=False), nn.ReLU())
        self.mask_gate = MaskGate(hidden)

        self.attention_blocks = sum(layer.attn_block is not None for layer in (*encoders, *decoders))

    def _attend(self, block: MultiView | None, x: Tensor, want: str, p: float, collected: list[Any]) -> Tensor | None:
        """The block's output; what is wanted of it goes to `collected`. None when nothing after it is needed."""
        if block is None:
            return x
        if not want:
            return block(x)
        views = block.views(x)
        if want == "views":
            collected.append(views)
        elif want == "maps":
            collected.append(Views(*(attention_map(view, p) for view in views)))
            if len(collected) == self.attention_blocks:
                return None
        x = block.merge(x, views)
        if want == "blocks":
            collected.append(x)
        return x

    def forward(self, x: Tensor, want: str = "", p: float = 2.0) -> tuple[Tensor | None, list[Any]]:
        """The enhanced audio [B, out_channels, T] and, one per multi-view block in execution order, what is wanted.

        Args:
            x: normalised audio [B, in_channels, T], T a valid length.
            want: "" nothing; "views" a Views of features; "blocks" the block's output; "maps" a Views of maps, in which
                case the audio is None and nothing after the last map is computed.
            p: the power of the maps.
        """
        features = conv_end(x, self.in_conv)
        collected: list[Any] = []
        skips: list[Tensor] = []
        h: Tensor | None = features
        for encoder in self.encoder:
            h = self._attend(encoder.attn_block, encoder.before_attention(h), want, p, collected)
            skips.append(h)
        # A linear layer over channels is a 1x1 convolution.
        h = F.relu(norm_act_conv(h, self.linear[0].weight[..., None]))
        for decoder in self.decoder:
            h = decoder.before_attention(h + skips.pop()[..., : h.shape[-1]])
            h = self._attend(decoder.attn_block, h, want, p, collected)
            if h is None:
                return None, collected
        return conv_end(features * self.mask_gate(h), self.out_conv), collected


def valid_length(length: int, depth: int, kernel_size: int, stride: int) -> int:
    """The shortest length >= `length` that `depth` strided convolutions and their transposes give back exactly.

    One sample of the deepest level reaches over `reach` samples, each further one over `step` more: in this form, with
    integers alone, torch.export sees that every skip is as long as what it is added to.
    """
    reach = step = 1
    for _ in range(depth):
        reach = (reach - 1) * stride + kernel_size
        step *= stride
    return reach + step * ((length - reach + step - 1) // step) if length > reach else reach


def _rescale(module: nn.Module, reference: float = 0.1) -> None:
    """Divide every convolution's weight and bias by sqrt(std(weight) / reference)."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d) and not layer.weight.is_meta:  # which has no values
            scale = (layer.weight.detach().std() / reference).sqrt()
            layer.weight.data /= scale
            if layer.bias is not None:
                layer.bias.data /= scale


class Manner(nn.Module):
    """MANNER with 16 kHz audio in and out.

    Args:
        in_channels, out_channels: audio channels.
        hidden: channels of the outermost level, doubled at every deeper one; at least 2, at least 6 where they
            carry attention.
        depth: number of encoders and of decoders.
        kernel_size, stride: of the down and up convolutions; 1 <= stride <= kernel_size.
        growth: factor of channels from level to level; only 2 exists.
        head: heads of the global view.
        segment_len: samples of a chunk of the global and local views, even.
        attention_layers: "all", or "deepest" for MANNER (small), whose only attention blocks stand in the deepest
            encoder and the deepest decoder.

    Raises:
        ValueError: for arguments outside these bounds, or hidden * 2^depth above 65536.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        hidden: int = 60,
        depth: int = 4,
        kernel_size: int = 8,
        stride: int = 4,
        growth: int = 2,
        head: int = 1,
        segment_len: int = 64,
        attention_layers: str = "all",
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "hidden": hidden,
            "depth": depth,
            "kernel_size": kernel_size,
            "stride": stride,
            "growth": growth,
            "head": head,
            "segment_len": segment_len,
            "attention_layers": attention_layers,
        }
        _check_config(self.config)
        self.manner_block = MannerBlock(
            in_channels, out_channels, hidden, depth, kernel_size, stride, head, segment_len, attention_layers
        )
        _rescale(self)

    @classmethod
    def from_preset(cls, name: str) -> "Manner":
        """A freshly initialised model of `mvat.models.PRESETS`; ValueError for an unknown name."""
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"the preset must be one of {', '.join(PRESETS)}, got {name!r}")
        return cls(**PRESETS[name])

    @classmethod
    def from_pretrained(cls, source: str | Path = pretrained.SHIPPED) -> "Manner":
        """A model with its weights, in evaluation mode.

        Args:
            source: by default the student that comes with mvat; else a folder with config.json and model.safetensors
                (`save_pretrained`); a file of weights, either a checkpoint of `train/` or an official one
                ({"state_dict": ...}, the architecture read off the weights); or a name on the Hugging Face hub.

        Raises:
            FileNotFoundError: if a path does not exist and is no hub name either.
            ValueError: if the file cannot be read safely, or does not fit strictly; names the file and the reason.
        """
        config, state, origin = pretrained.load(source)
        try:
            with torch.device("meta"):  # no memory is taken before the weights fit
                model = cls(**config)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{origin}: the configuration does not fit Manner: {error}") from None
        pretrained.check_fit(model, state, origin)
        model.to_empty(device="cpu").load_state_dict(state)
        return model.eval()

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write config.json and model.safetensors into the folder, which is made if it does not exist.

        Args:
            folder: where to write.
            dtype: what to keep the matrices in, such as torch.float16 for half the size; None keeps theirs. Loading
                gives float32 again.

        Raises:
            TypeError, ValueError: for a dtype that is none of float16, bfloat16, float32 and float64, or whose
                range a weight exceeds; nothing is written.
        """
        pretrained.save(folder, self.config, self.state_dict(), dtype)

    def forward(
        self,
        x: Tensor,
        return_views: bool = False,
        return_maps: bool = False,
        return_blocks: bool = False,
        p: float = 2.0,
        scale: Tensor | None = None,
    ) -> Any:
        """Enhance audio.

        Args:
            x: noisy audio [B, in_channels, T], 16 kHz, T >= 1.
            return_views: give (y, views), one Views of features [B, n, T_l] per multi-view block in execution order.
            return_maps: give the blocks' Views of attention maps [B, T_l] alone (no y, no feature kept alive).
            return_blocks: give (y, outputs), the multi-view blocks' outputs [B, c, T_l].
            p: the power of the maps, at least 1.
            scale: the standard deviation [B, 1, 1] to normalise by in place of x's own: that of the whole, where x is a
                part of a longer recording.

        Returns:
            y [B, out_channels, T], or as above.

        Raises:
            TypeError, ValueError: for a wrong type or shape, or more than one of the three requests.
        """
        check_features("Manner", "x", x, ("B", "in_channels", "T"))
        if x.shape[1] != self.config["in_channels"] or x.shape[2] < 1:
            raise ValueError(
                f"Manner: x must have shape [B, {self.config['in_channels']}, T >= 1], got {list(x.shape)}"
            )
        if return_views + return_maps + return_blocks > 1:
            raise ValueError("Manner: only one of return_views, return_maps, return_blocks can be asked for")
        want = "views" if return_views else "maps" if return_maps else "blocks" if return_blocks else ""
        length = x.shape[2]
        if scale is None:
            # The standard deviation of a single sample is not defined; it is taken as silence.
            defined = length > 1 and x.shape[0] > 0
            scale = x.mean(1, keepdim=True).std(2, keepdim=True) if defined else x.new_zeros(x.shape[0], 1, 1)
        elif not isinstance(scale, Tensor) or scale.shape != (x.shape[0], 1, 1):
            given = list(scale.shape) if isinstance(scale, Tensor) else type(scale).__name__
            raise ValueError(f"Manner: scale must be a tensor [{x.shape[0]}, 1, 1], got {given}")
        x = x / (1e-3 + scale)
        c = self.config
        x = F.pad(x, (0, valid_length(length, c["depth"], c["kernel_size"], c["stride"]) - length))
        y, collected = self.manner_block(x, want, p)
        if y is None:
            return collected
        # A copy: a view's contiguity, which is another where nothing is cut, would become torch.export's condition.
        y = torch.narrow_copy(y, 2, 0, length) * scale
        return (y, collected) if want else y


def _check_config(config: dict[str, Any]) -> None:
    for name in ("in_channels", "out_channels", "hidden", "depth", "kernel_size", "stride", "growth", "head"):
        if not isinstance(config[name], int) or isinstance(config[name], bool) or config[name] < 1:
            raise ValueError(f"{name} must be a positive integer, got {config[name]!r}")
    if config["growth"] != 2:
        raise ValueError(f"growth must be 2, got {config['growth']}")
    if config["stride"] > config["kernel_size"]:
        raise ValueError(f"stride must be at most kernel_size = {config['kernel_size']}, got {config['stride']}")
    check_segment_len("Manner", config["segment_len"])
    if config["attention_layers"] not in ("all", "deepest"):
        raise ValueError(f'attention_layers must be "all" or "deepest", got {config["attention_layers"]!r}')
    if config["hidden"] < 2:
        raise ValueError("hidden must be at least 2, got 1: a convolution's weights are rescaled by their deviation")
    if config["hidden"] > MOST_CHANNELS >> config["depth"]:
        raise ValueError(
            f"hidden * 2 ** depth, the widest layer's channels, must be at most {MOST_CHANNELS}, got hidden = "
            f"{config['hidden']}, depth = {config['depth']}"
        )
    narrowest = config["hidden"] * (1 if config["attention_layers"] == "all" else 2 ** (config["depth"] - 1))
    if narrowest < 6:
        raise ValueError(f"an attention block needs at least 6 channels, got hidden = {config['hidden']}")
