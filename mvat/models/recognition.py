"""Which class of ours a module can be, told by names, kinds and shapes, not by where its own class comes from."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from mvat.models.blocks import MaskGate, MultiView, ResCon
from mvat.models.manner import Decoder, Encoder, Manner


class Kind(NamedTuple):
    """A class of ours that can take a module's place.

    Attributes:
        names: of the children by which such a module is known.
        build: ours, of the module's sizes.
        trial: channels and samples of an input to try it with, given ours.
    """

    ours: type[nn.Module]
    names: frozenset[str]
    build: Callable[[Any], Any]
    trial: Callable[[Any], tuple[int, int]]


def _build_multi_view(module: Any) -> MultiView:
    width, segment_len = module.global_attn.w_qs.weight.shape
    return MultiView(module.shortcut.conv.weight.shape[0], segment_len, math.isqrt(width // segment_len))


def _build_layer(ours: type[Encoder | Decoder], conv: Any, module: Any) -> Encoder | Decoder:
    attention = getattr(module, "attn_block", None)
    attention = None if attention is None else _build_multi_view(attention)
    return ours(conv.weight.shape[0], conv.kernel_size[0], conv.stride[0], attention)


def _build_manner(module: Any) -> Manner:
    block = module.manner_block
    hidden, in_channels, _ = block.in_conv[0].weight.shape
    conv = block.encoder[0].down_conv[0]
    deepest = _build_multi_view(block.encoder[len(block.encoder) - 1].attn_block).global_attn
    return Manner(
        in_channels=in_channels,
        out_channels=block.out_conv[0].weight.shape[0],
        hidden=hidden,
        depth=len(block.encoder),
        kernel_size=conv.kernel_size[0],
        stride=conv.stride[0],
        head=deepest.head,
        segment_len=deepest.segment_len,
        attention_layers="deepest" if getattr(block.encoder[0], "attn_block", None) is None else "all",
    )


KINDS = (
    Kind(
        Manner,
        frozenset({"manner_block"}),
        _build_manner,
        # A few samples at the deepest level, and one more, so that there is something to pad.
        lambda ours: (
            ours.config["in_channels"],
            4 * ours.config["stride"] ** ours.config["depth"] + ours.config["kernel_size"] + 1,
        ),
    ),
    Kind(
        Encoder,
        frozenset({"down_conv", "conv_block"}),
        lambda module: _build_layer(Encoder, module.down_conv[0], module),
        lambda ours: (
            ours.down_conv[0].in_channels,
            20 * ours.down_conv[0].stride[0] + ours.down_conv[0].kernel_size[0],
        ),
    ),
    Kind(
        Decoder,
        frozenset({"conv_block", "up_conv"}),
        lambda module: _build_layer(Decoder, module.up_conv[0], module),
        lambda ours: (ours.conv_block.shortcut.conv.in_channels, 20),
    ),
    Kind(
        MultiView,
        frozenset({"in_branch0", "global_attn", "local_attn"}),
        _build_multi_view,
        lambda ours: (ours.shortcut.conv.in_channels, 2 * ours.global_attn.segment_len + 1),
    ),
    Kind(
        ResCon,
        frozenset({"point_conv1", "depth_conv", "point_conv2"}),
        lambda module: ResCon(*reversed(module.shortcut.conv.weight.shape[:2])),
        lambda ours: (ours.shortcut.conv.in_channels, 40),
    ),
    Kind(
        MaskGate,
        frozenset({"output", "output_gate", "mask"}),
        lambda module: MaskGate(module.output[0].weight.shape[0]),
        lambda ours: (ours.output[0].in_channels, 20),
    ),
)


def kind_of(module: nn.Module) -> Kind | None:
    """What a module resembles, None where nothing."""
    children = {name for name, _ in module.named_children()}
    return next((kind for kind in KINDS if kind.names <= children), None)


#: Modules without parameters that the original has where ours computes the same in its kernels.
_ACTIVATIONS = (nn.ReLU, nn.GLU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Identity)
_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_SETTINGS: dict[type, tuple[str, ...]] = {
    nn.Conv1d: _CONV,
    nn.ConvTranspose1d: (*_CONV, "output_padding"),
    nn.BatchNorm1d: ("affine", "track_running_stats"),
}


def difference(module: nn.Module, ours: nn.Module) -> str:
    """The first difference in structure, "" where there is none."""
    theirs = dict(module.named_modules(remove_duplicate=False))
    expected = dict(ours.named_modules())
    for name, part in expected.items():
        if name not in theirs:
            return f"it has no {name}"
        other = theirs[name]
        is_torch = type(part).__module__.startswith("torch.")
        # Subclasses of PyTorch's own may compute anything, parametrised ones are such.
        if is_torch and type(other) is not type(part):
            return f"{name} is a {type(other).__name__} instead of a {type(part).__name__}"
        for setting in _SETTINGS.get(type(part), ()):
            given, wanted = getattr(other, setting), getattr(part, setting)
            if given != wanted:
                return f"{name} has {setting} {given!r} instead of {wanted!r}"
        if isinstance(other, nn.BatchNorm1d) and other.momentum is None:
            return f"{name} has no momentum"
        for tensors in ("_parameters", "_buffers"):
            shapes = [{k: list(v.shape) for k, v in vars(m)[tensors].items() if v is not None} for m in (other, part)]
            if shapes[0] != shapes[1]:
                return f"{name or 'it'} has {tensors[1:]} {shapes[0]} instead of {shapes[1]}"
    for name, other in theirs.items():
        if name in expected:
            continue
        if next(other.parameters(), None) is not None or next(other.buffers(), None) is not None:
            return f"it has a part with parameters of its own, {name}"
        if type(other).__module__.startswith("torch.") and not isinstance(other, _ACTIVATIONS):
            return f"it has a {type(other).__name__} of its own, {name}"
    return ""
