"""The batch normalisation that the ops carry inside: its parameters as one tuple, its reference formula."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvat.kernels import native
from mvat.kernels.checks import check_parameter

#: A norm as the operators take it: weight, bias, mean and variance [C], or four times None.
Applied = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Norm(NamedTuple):
    """A batch norm's tensors, each [C], and scalars.

    In training the statistics are those of the batch, and running_mean and running_var are updated in place:
    running = (1 - momentum) * running + momentum * batch, the variance unbiased, as torch.nn.BatchNorm1d does.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    momentum: float = 0.1
    eps: float = 1e-5

    @classmethod
    def of(cls, module: nn.BatchNorm1d) -> "Norm":
        """The norm of a module that tracks its statistics, counting the batch when the module is in training mode.

        Raises:
            ValueError: for a module without affine parameters, running statistics or momentum.
        """
        mean, var, momentum = module.running_mean, module.running_var, module.momentum
        if mean is None or var is None or momentum is None or module.weight is None:
            raise ValueError(f"a norm needs affine parameters, running statistics and a momentum, got {module}")
        if module.training and module.num_batches_tracked is not None:
            module.num_batches_tracked.add_(1)
        return cls(module.weight, module.bias, mean, var, momentum, module.eps)


def check_norm(op: str, name: str, norm: object, channels: int, x: Tensor, statistics: Tensor | None = None) -> None:
    """TypeError or ValueError unless `norm` is a Norm (or an equal tuple) for this number of channels.

    Its features' statistics, where there are any, must be [2, channels].
    """
    if not isinstance(norm, tuple) or len(norm) != len(Norm._fields):
        raise TypeError(f"{op}: {name} must be a tuple ({', '.join(Norm._fields)}), got {type(norm).__name__}")
    for field, value in zip(Norm._fields[:2], norm[:2], strict=True):
        check_parameter(op, f"{name}.{field}", value, (channels,), x)
    for field, value in zip(Norm._fields[2:4], norm[2:4], strict=True):
        # The statistics stay float32 where the parameters are half precision, so their dtype is their own.
        check_parameter(op, f"{name}.{field}", value, (channels,), x, any_dtype=True)
    if statistics is not None:
        check_parameter(op, f"the statistics for {name}", statistics, (2, channels), x, any_dtype=True)


def batch_norm_reference(x: Tensor, norm: Norm, training: bool) -> Tensor:
    """x [B, C, ...] normalised over every dimension but C: (x - mean) / sqrt(var + eps) * weight + bias."""
    weight, bias, mean, var, momentum, eps = norm
    return F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)


def applied(norm: Norm | None, x: Tensor, training: bool, statistics: Tensor | None = None) -> Applied:
    """What a fused operator applies to x [B, C, T]: the running statistics, or in training those of the batch.

    In training the running statistics are moved. `statistics` are x's own, [2, C], where its producer gathered them.

    Raises:
        ValueError: in training with a single value a channel, which has no variance.
    """
    if norm is None:
        return None, None, None, None
    weight, bias, mean, var = (value.to(native.wide(x.dtype)) for value in norm[:4])
    if not training:
        return weight, bias, mean, var
    count = x.shape[0] * x.shape[2]
    if count == 1:
        raise ValueError(f"batch norm in training needs more than 1 value per channel, got x {list(x.shape)}")
    with torch.no_grad():
        mean, var = torch.ops.mvat.batch_statistics(x) if statistics is None else statistics
        if count:
            keep = 1 - norm.momentum
            norm.running_mean.mul_(keep).add_(mean, alpha=norm.momentum)
            norm.running_var.mul_(keep).add_(var, alpha=norm.momentum * count / (count - 1))
    return weight, bias, mean, var


def norm_gradient(dz: Tensor, x: Tensor, norm: Applied, sums: Tensor, eps: float, training: bool) -> Tensor:
    """The gradient of x from dz, the one behind the norm, and sums [2, C] of dz and of dz times the normalised x."""
    weight, _, mean, var = norm
    if weight is None:
        return dz
    return torch.ops.mvat.norm_gradient(dz, x, weight, mean, var, sums, eps, x.shape[0] * x.shape[2], training)


native.implement_in_triton("batch_statistics", "norm_gradient")
if native.missing("norm_gradient") is None:
    torch.library.register_fake(
        "mvat::batch_statistics", lambda x: x.new_empty((2, x.shape[1]), dtype=native.wide(x.dtype))
    )
    torch.library.register_fake("mvat::norm_gradient", lambda dz, x, *_: x.new_empty(x.shape))
    torch.library.register_autograd("mvat::norm_gradient", native.no_second_derivative("batch norm"))
