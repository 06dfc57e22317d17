"""The batch normalisation that the ops carry inside: its parameters as one tuple, its reference formula."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from mvat.kernels.checks import check_parameter


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


def check_norm(op: str, name: str, norm: object, channels: int, x: Tensor) -> None:
    """TypeError or ValueError unless `norm` is a Norm (or an equal tuple) for this number of channels."""
    if not isinstance(norm, tuple) or len(norm) != len(Norm._fields):
        raise TypeError(f"{op}: {name} must be a tuple ({', '.join(Norm._fields)}), got {type(norm).__name__}")
    for field, value in zip(Norm._fields[:2], norm[:2], strict=True):
        check_parameter(op, f"{name}.{field}", value, (channels,), x)
    for field, value in zip(Norm._fields[2:4], norm[2:4], strict=True):
        # The statistics stay float32 where the parameters are half precision, so their dtype is their own.
        check_parameter(op, f"{name}.{field}", value, (channels,), x, any_dtype=True)


def batch_norm_reference(x: Tensor, norm: Norm, training: bool) -> Tensor:
    """x [B, C, ...] normalised over every dimension but C: (x - mean) / sqrt(var + eps) * weight + bias."""
    weight, bias, mean, var, momentum, eps = norm
    return F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
