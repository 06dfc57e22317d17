"""Weights for inference: batch norms folded into the convolutions, for the operators that run a whole block at once.

    bn(W x + b) = (s W) x + (s b + t),   s = weight / sqrt(running_var + eps),   t = bias - s running_mean

A fold is kept beside its module and renewed whenever what it was made of is another tensor, was written to, or has
other values: identity and version tell of load_state_dict, .to() and optimisers, and a fingerprint of all
values of writes that PyTorch does not count, such as `parameter.data.lerp_` of a moving average. That reads the weights
once a call, which costs less than to fold them anew.
"""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mvat.kernels import native
from mvat.kernels.backend import current_backend
from mvat.kernels.norm_act_conv import length_out

_missing = native.missing("multi_view_merge")
_folds: "WeakKeyDictionary[nn.Module, _Fold]" = WeakKeyDictionary()


def folded(module: nn.Module, x: Tensor, fold: Callable[[Any], list[Tensor]]) -> list[Tensor] | None:
    """What `fold` makes of the module for inference on x, from the last call where it still holds.

    None where whole blocks do not run: a gradient may be asked for, a batch norm is in training, x is not float32 on a
    CPU, the graph is being traced, or the back end is "eager".
    """
    if torch.is_grad_enabled() or module.training or _missing is not None or current_backend() == "eager":
        return None
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.compiler.is_compiling() or _is_traced(x):
        return None
    known = _folds.get(module)
    if known is None or not known.holds():
        known = _Fold(module, fold)
        if not known.valid:
            return None
        _folds[module] = known
    return None if any(bn.training for bn in known.norms) else known.tensors


def _is_traced(x: Tensor) -> bool:
    """Whether values cannot be looked at: a subclass of Tensor, a transform of torch.func, a mode of tracing."""
    return (
        type(x) is not Tensor
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.jit.is_tracing()
    )


class _Fold:
    """The tensors of one module's fold, and how to tell that they hold no more."""

    def __init__(self, module: nn.Module, fold: Callable[[Any], list[Tensor]]) -> None:
        self.norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm1d | nn.SyncBatchNorm)]
        # (dictionary, key, object): attributes of the module's tree, looked up again without nn.Module's slow access.
        self.entries: list[tuple[dict[str, Any], str, Any]] = []
        for part in module.modules():
            for attributes in (part._modules, part._parameters, part._buffers):
                self.entries += [(attributes, name, value) for name, value in attributes.items()]
        self.sources = [value for *_, value in self.entries if isinstance(value, Tensor) and value.is_floating_point()]
        self.valid = all(
            type(t) in (Tensor, nn.Parameter) and t.dtype == torch.float32 and t.device.type == "cpu"
            for t in self.sources
        )
        if self.valid:
            self.eps = [bn.eps for bn in self.norms]
            self.versions = self._versions()
            self.fingerprint = torch.ops.mvat.fingerprint(self.sources)
            self.tensors = fold(module)

    def _versions(self) -> list[int]:
        # Tensors made in inference mode have none.
        return [-1 if t.is_inference() else t._version for t in self.sources]

    def holds(self) -> bool:
        return (
            all(attributes.get(name) is value for attributes, name, value in self.entries)
            and [bn.eps for bn in self.norms] == self.eps
            and self._versions() == self.versions
            and torch.ops.mvat.fingerprint(self.sources) == self.fingerprint
        )


def conv_norm(conv: nn.Conv1d | nn.ConvTranspose1d, bn: nn.BatchNorm1d | None = None) -> tuple[Tensor, Tensor]:
    """Weight [out, in / groups, kernel], also of a transposed convolution, and bias [out], in float64."""
    weight = conv.weight.double()
    if isinstance(conv, nn.ConvTranspose1d):
        weight = weight.transpose(0, 1)
    bias = weight.new_zeros(weight.shape[0]) if conv.bias is None else conv.bias.double()
    if bn is None:
        return weight, bias
    scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
    return weight * scale[:, None, None], bias * scale + bn.bias.double() - bn.running_mean.double() * scale


def ready(*tensors: Tensor) -> list[Tensor]:
    """As the operators take them."""
    return [t.float().contiguous() for t in tensors]


def stacked(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Several convolutions of one input as one."""
    return torch.cat([w for w, _ in parts]), torch.cat([b for _, b in parts])


if _missing is None:
    torch.library.register_fake(
        "mvat::conv_act",
        lambda x, weight, bias, stride, padding, transposed, activation: x.new_empty(
            (x.shape[0], weight.shape[1], length_out(x.shape[2], weight.shape[0], stride, padding, transposed))
        ),
    )
    torch.library.register_fake(
        "mvat::conformer_block", lambda x, *weights: x.new_empty((x.shape[0], weights[-1].shape[0], x.shape[2]))
    )
    torch.library.register_fake("mvat::multi_view_merge", lambda x, *_: x.new_empty(x.shape))
