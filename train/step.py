"""One move of the optimiser: gradients over one or more batches, the check that all is finite, clipping, averaging.

A loss or gradient that is not finite, on any process, leaves weights, optimiser and running statistics as they were.
The device decides that by itself: the host reads what happened some steps later (`Delayed`) and never waits for it.
"""

import contextlib
import copy
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mvat.losses import ENHANCEMENT_LOSSES
from train import processes
from train.config import RunConfig
from train.transfer import Transfer


@dataclass(frozen=True)
class Report:
    """What the host learns of one move.

    Attributes:
        step: batches that the run had seen after it.
        batches: how many of them this move took.
        finite: whether it was made; otherwise it was skipped.
        stop: number of the signal by which a process was asked to stop, 0 if none was.
        save: whether a checkpoint is due.
        rate: the learning rate it was made with.
        parts: total loss, its parts, and the gradient's norm.
    """

    step: int
    batches: int
    finite: bool
    stop: int
    save: bool
    rate: float
    parts: dict[str, float]


class Step:
    """Makes moves.

    Args:
        config: optim and transfer.
        accelerator: device, precision, processes.
        model: the model to train, on the CPU or the device.
        transfer: the loss against the teacher.
        moves: of the whole run, which the schedule spans; a skipped one counts.

    Attributes:
        model: the bare model, whose names a checkpoint holds.
        average: its averaged weights where optim.ema is set, else None.
        optimizer: Adam.
        scheduler: one cycle of the learning rate.
    """

    def __init__(
        self, config: RunConfig, accelerator: Accelerator, model: nn.Module, transfer: Transfer, moves: int
    ) -> None:
        self.config, self.accelerator, self.transfer = config, accelerator, transfer
        self.model = model
        self._shared = processes.share_model(accelerator, model)
        # Compiled beside, not in place: validation over many lengths runs the bare model, and names stay plain.
        self._trained: Any = torch.compile(self._shared) if config.optim.compile else self._shared
        self.average = None if config.optim.ema is None else Average(model, config.optim.ema)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=config.optim.lr, fused=True)
        # The schedule is ours, not accelerate's, which would step it once a process.
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=config.optim.lr, total_steps=moves)
        self._statistics = Statistics(model)
        self._delayed = Delayed(accelerator.device)
        self.names = ("total", "enhancement", *(() if transfer.teacher is None else ("transfer",)), "gradient_norm")

    def __call__(self, batches: Sequence[tuple[Tensor, Tensor]], step: int, stop: int, save: bool) -> list[Report]:
        """One move by the mean gradient over the batches.

        Args:
            batches: (clean, noisy), each [B, 1, T], on the device.
            step: batches that the run has seen, these included.
            stop: number of the signal that asked this process to stop, or 0.
            save: whether this process finds a checkpoint due.

        Returns:
            Reports of the moves that the host may know of by now, in their order.
        """
        self._statistics.keep()
        count = len(batches)
        parts = torch.stack([self._backward(batch, i == count - 1, count) for i, batch in enumerate(batches)]).mean(0)
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        finite = torch.isfinite(norm) & torch.isfinite(parts).all()
        agreed = torch.stack([(~finite).float(), *(torch.full_like(norm, wish) for wish in (stop, save))])
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX)
        skipped = agreed[0]
        if self.config.optim.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.optim.clip, norm)
        rate = self.rate
        self._move(skipped)
        self._statistics.restore(skipped)
        if self.average is not None:
            self.average.update(self.model)
        values = self._delayed.push(torch.cat([agreed, parts, norm[None]]), (step, count, rate))
        return [self._report(*value) for value in values]

    @property
    def rate(self) -> float:
        """The learning rate of the next move."""
        return float(self.scheduler.get_last_lr()[0])

    def finish(self) -> list[Report]:
        """The reports still due; waits for the device."""
        return [self._report(*value) for value in self._delayed.drain()]

    def _backward(self, batch: tuple[Tensor, Tensor], last: bool, count: int) -> Tensor:
        """Add one batch's share to the gradients; the parts of its loss."""
        clean, noisy = batch
        # Gradients of several processes meet once a move.
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self._shared):
            with self.accelerator.autocast():
                estimate, transfer = self.transfer.student_and_loss(self._trained, noisy)
            enhancement = ENHANCEMENT_LOSSES[self.config.optim.loss](estimate.float(), clean, noisy)
            loss = enhancement if transfer is None else enhancement + self.config.transfer.weight * transfer
            self.accelerator.backward(loss / count)
        parts = [loss, enhancement] + ([] if transfer is None else [transfer])
        return torch.stack([part.detach().float() for part in parts])

    def _move(self, skipped: Tensor) -> None:
        """The fused optimiser leaves all as it is where it is told that something is not finite, by the tensor."""
        scaler = self.accelerator.scaler
        if scaler is None:
            self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
            self.optimizer.step()
        else:
            for found in scaler._found_inf_per_device(self.optimizer).values():
                found.copy_(skipped)
            scaler.step(self.optimizer)
            scaler.update()
        self.optimizer.zero_grad()
        if self.scheduler.last_epoch < self.scheduler.total_steps - 1:
            self.scheduler.step()

    def _report(self, values: list[float], step: int, batches: int, rate: float) -> Report:
        skipped, stop, save, *parts = values
        return Report(
            step, batches, not skipped, int(stop), bool(save), rate, dict(zip(self.names, parts, strict=True))
        )


class Statistics:
    """The running statistics of a model, to be put back after a step that was not finite."""

    def __init__(self, model: nn.Module) -> None:
        self._groups: dict[torch.dtype, list[Tensor]] = {}
        for buffer in model.buffers():
            self._groups.setdefault(buffer.dtype, []).append(buffer)
        self._kept: list[Tensor] = []

    def keep(self) -> None:
        """Copy them."""
        self._kept = [_flat(buffers) for buffers in self._groups.values()]

    def restore(self, condition: Tensor) -> None:
        """Put the copies back where the scalar `condition` is not 0; a few launches, whatever the number of layers."""
        for buffers, kept in zip(self._groups.values(), self._kept, strict=True):
            values = torch.where(condition != 0, kept, _flat(buffers)).split([b.numel() for b in buffers])
            torch._foreach_copy_(buffers, [v.view_as(b) for v, b in zip(values, buffers, strict=True)])


class Average:
    """An exponential moving average of a model's weights and running statistics.

    average += (1 - d) (current - average), d = min(decay, (1 + n) / (10 + n)) at move n, so that the random initial
    weights are soon forgotten. After a skipped step the current weights are those from before it.

    Args:
        model: what is averaged; the average starts equal to it.
        decay: d after many moves, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.moves = decay, 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take one more state of the model into the average."""
        decay = min(self.decay, (1 + self.moves) / (10 + self.moves))
        self.moves += 1
        averages, current = (list(m.parameters()) + list(m.buffers()) for m in (self.model, model))
        floats = [a.is_floating_point() for a in averages]
        torch._foreach_lerp_([*compress(averages, floats)], [*compress(current, floats)], 1 - decay)
        counters = [not is_float for is_float in floats]
        torch._foreach_copy_([*compress(averages, counters)], [*compress(current, counters)])


class Delayed:
    """Small tensors on their way to the host, read `lag` pushes later; at once where there is no GPU."""

    def __init__(self, device: torch.device, lag: int = 2) -> None:
        self._gpu = device.type == "cuda"
        self._lag = lag if self._gpu else 0
        self._queue: deque[tuple[Tensor, Any, tuple[float, ...]]] = deque()

    def push(self, values: Tensor, about: tuple[float, ...]) -> list[tuple[Any, ...]]:
        """Hand over values [K]; what is read by now, as (list of values, *about)."""
        event = None
        if self._gpu:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._queue.append((values, event, about))
        return [self._read() for _ in range(len(self._queue) - self._lag)]

    def drain(self) -> list[tuple[Any, ...]]:
        """All that is still under way."""
        return [self._read() for _ in range(len(self._queue))]

    def _read(self) -> tuple[Any, ...]:
        values, event, about = self._queue.popleft()
        if event is not None:
            event.synchronize()
        return values.tolist(), *about


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
