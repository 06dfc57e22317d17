"""The batch normalisation that the ops carry inside: its parameters as one tuple, its reference formula.

Over several processes a norm may take the statistics of all their batches together (`Norm.group`). With n values a
channel in a process, their mean m and biased variance v, and N = sum of n,

    mean = sum of m n / N,     var = sum of (v + (m - mean)^2) n / N          (Chan, Golub & LeVeque),

and the gradient of x takes the sums over all processes of dz and of dz times the normalised x, divided by N. An op
sends one message forward and one backward for all its norms, in float64. The gradients of the norm's own weight and
bias stay the process's share, as those of every other parameter.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
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

    With a process group, the batch is that of all its processes: each calls the op, and its backward pass, with a part
    of its own, of any size, empty too. Outputs and running statistics are then those of one process with the parts put
    together, and the gradients' sum over the processes is the gradient of the sum of their losses. All of them must
    come through the same ops in the same order, on the same back end, or they wait for each other.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    momentum: float = 0.1
    eps: float = 1e-5
    group: "dist.ProcessGroup | None" = None

    @classmethod
    def of(cls, module: nn.BatchNorm1d | nn.SyncBatchNorm) -> "Norm":
        """The norm of a module that tracks its statistics, counting the batch when the module is in training mode.

        A module with an attribute process_group, such as `mvat.models.SyncBatchNorm1d`, takes its statistics over that
        group, or over all processes where it is None.

        Raises:
            ValueError: for a module without affine parameters, running statistics or momentum.
        """
        mean, var, momentum = module.running_mean, module.running_var, module.momentum
        if mean is None or var is None or momentum is None or module.weight is None:
            raise ValueError(f"a norm needs affine parameters, running statistics and a momentum, got {module}")
        if module.training and module.num_batches_tracked is not None:
            module.num_batches_tracked.add_(1)
        return cls(module.weight, module.bias, mean, var, momentum, module.eps, _group_of(module))


def _group_of(module: nn.Module) -> "dist.ProcessGroup | None":
    if not hasattr(module, "process_group") or not dist.is_available() or not dist.is_initialized():
        return None
    group: Any = module.process_group
    return dist.group.WORLD if group is None else group


def check_norm(op: str, name: str, norm: object, channels: int, x: Tensor, statistics: Tensor | None = None) -> None:
    """TypeError or ValueError unless `norm` is a Norm (or an equal tuple) for this number of channels.

    Its features' statistics, where there are any, must be [2, channels].
    """
    if not isinstance(norm, tuple) or len(norm) not in (len(Norm._fields) - 1, len(Norm._fields)):
        raise TypeError(f"{op}: {name} must be a tuple ({', '.join(Norm._fields)}), got {type(norm).__name__}")
    for field, value in zip(Norm._fields[:2], norm[:2], strict=True):
        check_parameter(op, f"{name}.{field}", value, (channels,), x)
    for field, value in zip(Norm._fields[2:4], norm[2:4], strict=True):
        # The statistics stay float32 where the parameters are half precision, so their dtype is their own.
        check_parameter(op, f"{name}.{field}", value, (channels,), x, any_dtype=True)
    if statistics is not None:
        check_parameter(op, f"the statistics for {name}", statistics, (2, channels), x, any_dtype=True)


def shared_group(op: str, training: bool, *norms: Norm | None) -> "dist.ProcessGroup | None":
    """The processes that the op's norms take their statistics over; None where the process's own are meant.

    Raises:
        ValueError: where the norms name different groups.
    """
    groups = [norm.group for norm in norms if norm is not None]
    if not training or all(group is None for group in groups):
        return None
    if any(group is not groups[0] for group in groups):
        raise ValueError(f"{op}: its norms must have the same process group, or none")
    return groups[0] if dist.get_world_size(groups[0]) > 1 else None


class _Sum(torch.autograd.Function):
    """The sum of a tensor over the processes; its gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: "dist.ProcessGroup") -> Tensor:
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(grad, ctx.group), None


def batch_norm_reference(x: Tensor, norm: Norm, training: bool) -> Tensor:
    """x [B, C, ...] normalised over every dimension but C: (x - mean) / sqrt(var + eps) * weight + bias."""
    norm = Norm(*norm)
    group = shared_group("batch norm", training, norm)
    if group is None:
        return F.batch_norm(x, norm.running_mean, norm.running_var, *norm[:2], training, norm.momentum, norm.eps)
    dims, shape = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
    count = x.shape[0] * x.shape[2:].numel()
    wide = x.to(native.wide(x.dtype))
    sums = torch.cat((wide.sum(dims, dtype=torch.float64), wide.new_full((1,), count, dtype=torch.float64)))
    sums = _Sum.apply(sums, group)
    total = sums[-1].detach()
    mean = sums[:-1] / total
    centred = wide - mean.to(wide.dtype).view(shape)
    var = _Sum.apply(centred.square().sum(dims, dtype=torch.float64), group) / total
    with torch.no_grad():
        move_running(norm, mean, var, count, _checked(total, count))
    scale = ((var + norm.eps).rsqrt() * norm.weight).to(wide.dtype)
    return (centred * scale.view(shape) + norm.bias.to(wide.dtype).view(shape)).to(x.dtype)


def _checked(total: Tensor, count: int) -> Tensor | None:
    """The processes' count, None where all batches are empty; ValueError where it is 1, which has no variance.

    A process with two values need not look at it, so that a GPU is not waited for.
    """
    if count > 1 or total > 1:
        return total
    if total == 0:
        return None
    raise ValueError("batch norm in training needs more than 1 value per channel, got 1 in all processes")


def move_running(norm: Norm, mean: Tensor, var: Tensor, count: int, total: Tensor | None) -> None:
    """Move the running statistics towards the batch's, of `count` values, or of `total` in all processes."""
    keep = 1 - norm.momentum
    if total is not None:
        norm.running_mean.mul_(keep).add_(mean, alpha=norm.momentum)
        norm.running_var.mul_(keep).add_(var * (total / (total - 1)), alpha=norm.momentum)
    elif count:
        norm.running_mean.mul_(keep).add_(mean, alpha=norm.momentum)
        norm.running_var.mul_(keep).add_(var, alpha=norm.momentum * count / (count - 1))


#: One norm's part of a message: the norm, its features [B, C, T], their statistics [2, C] where they were gathered.
Part = tuple[Norm | None, Tensor | None, Tensor | None]


@torch.no_grad()
def shared_statistics(group: "dist.ProcessGroup | None", *parts: Part) -> tuple[list[Tensor | None], Tensor | None]:
    """The parts' statistics over all processes of the group, and the count that they are of, from one message.

    Without a group, the statistics as they were given and None. All features of a process have one batch and length.
    """
    if group is None:
        return [statistics for *_, statistics in parts], None
    own = [
        None if norm is None or x is None else torch.ops.mvat.batch_statistics(x) if statistics is None else statistics
        for norm, x, statistics in parts
    ]
    count = next(x.shape[0] * x.shape[2] for _, x, _ in parts if x is not None)
    merged, total = merged_statistics(group, count, *[statistics for statistics in own if statistics is not None])
    found = iter(merged)
    return [None if statistics is None else next(found) for statistics in own], total


@torch.no_grad()
def merged_statistics(group: "dist.ProcessGroup", count: int, *own: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """Statistics [2, C] over all processes from each one's own, of `count` values, and the count that they are of.

    None for the count where all batches are empty; ValueError where it is 1.
    """
    if not own:
        return [], None
    # The sum of rows that are zero elsewhere is exact, and gives every process the same bits.
    sizes = dist.get_world_size(group), 1 + sum(t.numel() for t in own)
    message = own[0].new_zeros(sizes, dtype=torch.float64)
    if count:
        row = torch.cat([t.flatten() for t in own]).double()
        message[dist.get_rank(group)] = F.pad(row, (1, 0), value=count)
    dist.all_reduce(message, group=group)
    counts, *columns = message.split([1, *[size for t in own for size in t.shape[1:] * 2]], 1)
    total = counts.sum()
    merged = []
    for like, means, variances in zip(own, columns[::2], columns[1::2], strict=True):
        share = counts / total
        mean = (means * share).sum(0)
        var = ((variances + (means - mean).square()) * share).sum(0)
        merged.append(torch.stack((mean, var)).to(like.dtype))
    return merged, _checked(total, count)


def applied(
    norm: Norm | None, x: Tensor | None, training: bool, statistics: Tensor | None = None, total: Tensor | None = None
) -> Applied:
    """What a fused operator applies to x [B, C, T]: the running statistics, or in training those of the batch.

    In training the running statistics are moved. `statistics` are x's own, [2, C], where its producer gathered them;
    with `total`, those of all processes and the number of their values (`shared_statistics`).

    Raises:
        ValueError: in training with a single value a channel, which has no variance.
    """
    if norm is None or x is None:
        return None, None, None, None
    weight, bias, mean, var = (value.to(native.wide(x.dtype)) for value in norm[:4])
    if not training:
        return weight, bias, mean, var
    count = x.shape[0] * x.shape[2]
    if count == 1 and total is None:
        raise ValueError(f"batch norm in training needs more than 1 value per channel, got x {list(x.shape)}")
    with torch.no_grad():
        mean, var = torch.ops.mvat.batch_statistics(x) if statistics is None else statistics
        move_running(norm, mean, var, count, total)
    return weight, bias, mean, var


class _Synchronised(torch.autograd.Function):
    """An operator with its own gradient formula (`native.complete`), which finds the group in ctx.group."""

    @staticmethod
    def forward(ctx: Any, operator: str, group: "dist.ProcessGroup", *inputs: Any) -> Any:
        output = getattr(torch.ops.mvat, operator)(*inputs)
        setup_context, ctx.formula = native.formulas[operator]
        setup_context(ctx, inputs, output)
        ctx.group = group
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.formula(ctx, *grads)


def call(operator: str, group: "dist.ProcessGroup | None", *inputs: Any) -> Any:
    """torch.ops.mvat.<operator>(*inputs), its norms' gradient taken over the processes of the group."""
    if group is None:
        return getattr(torch.ops.mvat, operator)(*inputs)
    return _Synchronised.apply(operator, group, *inputs)


def shared_sums(group: "dist.ProcessGroup | None", count: int, *sums: Tensor) -> tuple[Sequence[Tensor], float]:
    """What `norm_gradient` takes: sums of `count` values and that, or with a group, means over all processes and 1."""
    if group is None:
        return sums, count
    message = torch.cat([t.detach().flatten() for t in sums]).double()
    message = F.pad(message, (0, 1), value=count)
    dist.all_reduce(message, group=group)
    means = (message[:-1] / message[-1]).to(sums[0].dtype).split([t.numel() for t in sums])
    return [mean.view(t.shape) for mean, t in zip(means, sums, strict=True)], 1


def norm_gradient(
    dz: Tensor, x: Tensor, norm: Applied, sums: Tensor, eps: float, training: bool, count: float
) -> Tensor:
    """The gradient of x from dz, the one behind the norm, and sums [2, C] of dz and of dz times the normalised x.

    Sums and count are as `shared_sums` gives them.
    """
    weight, _, mean, var = norm
    if weight is None:
        return dz
    return torch.ops.mvat.norm_gradient(dz, x, weight, mean, var, sums, eps, count, training)


native.implement_in_triton("batch_statistics", "norm_gradient")
if native.missing("norm_gradient") is None:
    torch.library.register_fake(
        "mvat::batch_statistics", lambda x: x.new_empty((2, x.shape[1]), dtype=native.wide(x.dtype))
    )
    torch.library.register_fake("mvat::norm_gradient", lambda dz, x, *_: x.new_empty(x.shape))
    native.differentiable("norm_gradient", native.no_second_derivative("batch norm"))
