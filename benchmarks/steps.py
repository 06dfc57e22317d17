"""A step of training: forward, loss, backward, Adam; alone, or learning from a teacher."""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import Run
from mvat.losses import weighted_mrstft_loss
from mvat.models import Manner
from train.config import TransferConfig
from train.transfer import Transfer


def step(student: Manner, teacher: Manner | None, forward: Callable[..., object] | None = None) -> Run:
    """The function of one step on clean, noisy [B, 1, T]: it gives the loss and the parameters' gradients.

    Args:
        student: trained in place.
        teacher: None for a step without distillation.
        forward: what runs instead of the student, such as its compiled self.
    """
    config = TransferConfig(method="none" if teacher is None else "mvat")
    transfer = Transfer(config, student, teacher)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-4, fused=True)
    run = student.train() if forward is None else forward

    def once(clean: Tensor, noisy: Tensor) -> list[Tensor]:
        optimizer.zero_grad()
        estimate, distance = transfer.student_and_loss(run, noisy)
        loss = weighted_mrstft_loss(estimate, clean, noisy)
        if distance is not None:
            loss = loss + config.weight * distance
        loss.backward()
        optimizer.step()
        # Without a gradient is what comes after the last thing the loss asks for: nothing, in both kinds of step.
        return [loss.detach(), *(p.grad for p in student.parameters() if p.grad is not None)]

    return once


def add_arguments(parser: argparse.ArgumentParser, batch: int) -> None:
    """Options of a command that distils: student, teacher and clips at once, `batch` by default."""
    parser.add_argument("--student", default="s-8.1gf", help="preset (default: %(default)s)")
    parser.add_argument("--teacher", default="base", help="preset (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=batch, help="clips (default: %(default)s)")


def audio(batch: int, samples: int) -> list[Tensor]:
    """Clean and noisy noise, [B, 1, T] each."""
    clean = torch.randn(batch, 1, samples)
    return [clean, clean + 0.3 * torch.randn(batch, 1, samples)]
