"""Training by several processes: batch norms that take the statistics of all their batches together."""

import copy
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from mvat.kernels import Norm
from mvat.kernels.norm import batch_norm_reference


class SyncBatchNorm1d(nn.BatchNorm1d):
    """A torch.nn.BatchNorm1d over the batches of all processes, on any device; what torch.nn.SyncBatchNorm is on GPUs.

    Args:
        num_features, eps, momentum: as torch.nn.BatchNorm1d.
        process_group: the processes that share statistics; None for all, or for this one where there are no others.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        process_group: "dist.ProcessGroup | None" = None,
        **factory: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, **factory)
        self.process_group = process_group

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        return batch_norm_reference(x, Norm.of(self), self.training)

    def __deepcopy__(self, memo: dict[int, Any]) -> "SyncBatchNorm1d":
        """A process group is not copied: the copy belongs to the same one."""
        memo[id(self.process_group)] = self.process_group
        other = memo[id(self)] = type(self).__new__(type(self))
        other.__dict__ = copy.deepcopy(self.__dict__, memo)
        return other


def sync_batch_norm(model: nn.Module, process_group: "dist.ProcessGroup | None" = None) -> nn.Module:
    """Let the model's batch norms take their statistics over several processes in training mode.

    Every torch.nn.BatchNorm1d in the model is replaced by a `SyncBatchNorm1d` with the same parameters and buffers,
    so that optimisers and state_dicts stay what they are; the call may come before or after them, and before
    DistributedDataParallel. torch.nn.SyncBatchNorm.convert_sync_batchnorm does the same on GPUs, but refuses a CPU.

    Processes that each hold a part of a batch then compute the outputs and the running statistics of one process that
    holds it whole. The sum of their gradients is that of the sum of their losses. DistributedDataParallel takes the
    mean: with a loss that is the mean over the clips of each process, all processes holding equally many, its gradients
    are those of the mean over the whole batch. With shares of any size, B clips in all, let each of W processes take
    W / B times the sum over its own clips, which may be none.

    In evaluation mode, with one process, or without torch.distributed, nothing is sent.

    Args:
        model: changed in place.
        process_group: the processes that share statistics, None for all.

    Returns:
        The model; a new module only where the model itself is a batch norm.

    Raises:
        ValueError: for a batch norm without affine parameters, running statistics or momentum.
    """
    made = {bn: _converted(bn, process_group) for bn in model.modules() if isinstance(bn, nn.BatchNorm1d)}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, nn.BatchNorm1d):  # one that stands in several places stays one
                setattr(parent, name, made[child])
    return made[model] if isinstance(model, nn.BatchNorm1d) else model


def _converted(bn: nn.BatchNorm1d, process_group: "dist.ProcessGroup | None") -> SyncBatchNorm1d:
    if bn.weight is None or bn.running_mean is None or bn.momentum is None:
        raise ValueError(f"a norm needs affine parameters, running statistics and a momentum, got {bn}")
    other = SyncBatchNorm1d(bn.num_features, bn.eps, bn.momentum, process_group, device="meta")
    for name, value in (*bn._parameters.items(), *bn._buffers.items()):
        setattr(other, name, value)
    return other.train(bn.training)
