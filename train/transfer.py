"""What a student learns from its frozen teacher: one object that knows what to ask of both and how to compare it."""

import math

import torch
from torch import Tensor, nn

from mvat.kernels import attention_map
from mvat.kernels.checks import check_power
from mvat.losses import (
    block_pairs,
    block_transfer_loss,
    check_views,
    multi_view_transfer_loss,
    output_distillation_loss,
)
from mvat.models import Manner
from train.config import TransferConfig


class Transfer(nn.Module):
    """The transfer of one method; `student_and_loss` runs the student, and the teacher where there is one.

    The teacher is in evaluation mode, gets no gradient, and hands over maps only (its estimate for "output").

    Args:
        config: method, pairs, views, weight.
        student: the student, to check the pairs of blocks against.
        teacher: the teacher's model; None exactly where the method is "none".

    Raises:
        ValueError: for pairs or views that do not exist.
    """

    def __init__(self, config: TransferConfig, student: Manner, teacher: Manner | None) -> None:
        super().__init__()
        if (teacher is None) != (config.method == "none"):
            raise ValueError(
                f'transfer.method "{config.method}" {"needs a" if teacher is None else "takes no"} teacher'
            )
        self.config = config
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False)
        check_power("transfer", config.p)
        if not 0 <= config.weight < math.inf:
            raise ValueError(f"transfer.weight must be 0 or more, got {config.weight}")
        if teacher is not None and config.method != "output":
            student_blocks = student.manner_block.attention_blocks
            block_pairs(student_blocks, teacher.manner_block.attention_blocks, config.pairs)
            check_views(config.views)

    def student_and_loss(self, student: nn.Module, noisy: Tensor) -> tuple[Tensor, Tensor | None]:
        """The student's estimate for noisy [B, 1, T], and the unweighted transfer loss (None for "none")."""
        c = self.config
        if self.teacher is None:
            return student(noisy), None
        if c.method == "output":
            with torch.no_grad():
                target = self.teacher(noisy)
            estimate = student(noisy)
            return estimate, output_distillation_loss(estimate, target)
        if c.method == "attention":
            with torch.no_grad():
                _, outputs = self.teacher(noisy, return_blocks=True)
                maps = [attention_map(output, c.p) for output in outputs]
            estimate, outputs = student(noisy, return_blocks=True)
            return estimate, block_transfer_loss(outputs, maps, pairs=c.pairs, p=c.p, form=c.form)
        with torch.no_grad():
            maps = self.teacher(noisy, return_maps=True, p=c.p)
        estimate, views = student(noisy, return_views=True)
        return estimate, multi_view_transfer_loss(views, maps, pairs=c.pairs, views=c.views, p=c.p, form=c.form)

    def train(self, mode: bool = True) -> "Transfer":
        """The teacher stays in evaluation mode."""
        return self
