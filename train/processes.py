"""The processes of a run: device and precision, what they decide together, signals, memory."""

import contextlib
import ctypes
import os
import re
import resource
import signal
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from torch import nn

from mvat.models import sync_batch_norm
from train.config import OptimConfig

#: How long a process waits for another one: over its share of a validation, and for one that has vanished.
PATIENCE = timedelta(minutes=30)


class RunError(ValueError):
    """A run that cannot start or go on; the message names the folder and the reason."""


class DivergedError(RunError):
    """A run whose loss is not finite any more; the same command would end the same way."""


class Stopped(KeyboardInterrupt):
    """A run that was asked to stop and has saved where it stood.

    Attributes:
        signal: the signal that asked, by which the exit status is 128 + signal.
    """

    def __init__(self, number: int, where: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} {where}; the same command goes on there")
        self.signal = number


def start(optim: OptimConfig) -> Accelerator:
    """Device, precision and processes; several processes on a CPU too, which accelerate must be told."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    accelerator = Accelerator(
        cpu=world > 1 and not torch.cuda.is_available(),
        mixed_precision=optim.precision,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    if accelerator.num_processes != world:
        raise RunError(f"{world} processes were started, but accelerate sees {accelerator.num_processes}")
    if world > 1:
        # The group lives as long as the process. When it goes, PyTorch waits for gloo's threads with Python's lock
        # held, and these need the lock to let go of tensors that Python has seen: now and then that waits for ever.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(torch.distributed.group.WORLD))
    return accelerator


def share_model(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The model on its device and, under several processes, with batch statistics and gradients of all of them."""
    if accelerator.num_processes > 1:
        model = sync_batch_norm(model)
    prepared = accelerator.prepare_model(model)
    # accelerate makes every forward one of mixed precision with float32 results; here the training step says where.
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    return prepared


def gather(accelerator: Accelerator, value: Any) -> list[Any]:
    """The values of all processes, in their order, on all of them."""
    return gather_object([value]) if accelerator.num_processes > 1 else [value]


def own_cores() -> int:
    """This process's part of the machine's cores, at least 1."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def leave(accelerator: Accelerator) -> None:
    """Part from the other processes, which do the same: the first one keeps what they meet by."""
    accelerator.wait_for_everyone()
    accelerator.end_training()


@contextlib.contextmanager
def clear_errors(folder: Path, data: str) -> Iterator[None]:
    """RunError in plain words for what PyTorch and the system say when a neighbour or a reading process is gone.

    Args:
        folder, data: where the run writes and reads, for the message.
    """
    try:
        yield
    except RuntimeError as error:
        reason = " ".join((str(error).strip().splitlines() or [""])[0].split())
        if "DataLoader worker" in reason:
            raise RunError(
                f"{data}: a process that reads training data died ({reason}); often memory has run out, which a "
                "smaller data.workers saves; the same command goes on from the last checkpoint"
            ) from error
        signs = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
        if isinstance(error, torch.distributed.DistError) or any(sign in reason for sign in signs):
            time.sleep(0.1)  # while gloo's threads let go of their tensors, which they cannot once Python ends
            reason = re.sub(r"^\[\S+\] ", "", reason).split(". ")[0]  # without the place in the library, without advice
            raise RunError(
                f"{folder}: another process of this run ended or cannot be reached ({reason}); "
                "the same command goes on from the last checkpoint"
            ) from error
        raise
    except OSError as error:
        raise RunError(f"{folder}: cannot be written to: {error.strerror or error}") from error


class Signals:
    """SIGTERM and SIGINT as a wish, `asked`, that the loop meets where it can save; a second one ends at once."""

    HANDLED = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.asked = 0

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """While in here, signals are wishes. Only a process's main thread can watch; elsewhere nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        former = {number: signal.signal(number, self._ask) for number in self.HANDLED}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = number


def ignore_signals(worker: int) -> None:
    """For processes that read data: a signal to the whole group shall not take them from a loop that saves first."""
    for number in Signals.HANDLED:
        signal.signal(number, signal.SIG_IGN)


def reset_peak_memory() -> None:
    """Let `peak_memory` count from here."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):  # Linux alone can reset it; elsewhere it counts from the process's start
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> float:
    """Bytes: the most memory this process has held since the reset, on the GPU where there is one."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
