"""From a training set to batches on the device: order, place within an epoch, unreadable files, time spent waiting."""

import math
import time
from collections.abc import Iterator

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from train.data import EpochSampler, Segments
from train.mixtures import Mixtures
from train.processes import RunError, ignore_signals

#: Batches that every reading process has ready: enough to bridge a slow file.
PREFETCH = 4
#: Share of an epoch's examples that may be unreadable before the run ends.
UNREADABLE = 0.01


class Batches(Sampler):
    """The batches of one process: of every `processes` batches of the epoch's order it takes one, the last ones are
    left out where they do not fill all processes. Starts at batch `start`, for a run that goes on within an epoch.
    """

    def __init__(self, order: EpochSampler, size: int, process: int, processes: int) -> None:
        self.order, self.size, self.process, self.processes = order, size, process, processes
        self.start = 0

    def __len__(self) -> int:
        """Of a whole epoch."""
        return len(self.order) // (self.size * self.processes)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        items = list(self.order)
        for step in range(self.start, len(self)):
            first = (step * self.processes + self.process) * self.size
            yield items[first : first + self.size]


class Readable(Dataset):
    """A training set in which an example that cannot be read is replaced by another one of the same epoch.

    An item is (clean, noisy, failures), failures being the reasons, each of which names its file.
    """

    TRIES = 10

    def __init__(self, examples: Segments | Mixtures) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, Tensor, list[str]]:
        epoch, index = item
        place, failures = index, list[str]()
        while len(failures) <= self.TRIES:
            try:
                return *self.examples[epoch, place], failures
            except (ValueError, OSError) as error:
                failures.append(str(error))
            # Anywhere in the epoch, since neighbours may stand in the same file; the same place in every run.
            place = int(np.random.default_rng((epoch, index, len(failures))).integers(len(self)))
        raise RunError(f"{len(failures)} examples in a row cannot be read: {'; '.join(sorted(set(failures)))}")


def _collate(items: list[tuple[Tensor, Tensor, list[str]]]) -> tuple[Tensor, Tensor, list[str]]:
    clean, noisy = default_collate([item[:2] for item in items])
    return clean, noisy, [failure for item in items for failure in item[2]]


class Loader:
    """Batches (clean, noisy) [B, 1, T] on the device.

    Args:
        examples: the training set, of (epoch, index) items.
        seed: of the order.
        batch_size: examples of one process.
        workers: processes that read ahead.
        accelerator: device and processes.
        name: of the data, for messages.

    Attributes:
        waited: seconds that the loop has waited for a batch.
        unreadable: examples that could not be read; both may be set to what a former process counted.
    """

    def __init__(
        self,
        examples: Segments | Mixtures,
        seed: int,
        batch_size: int,
        workers: int,
        accelerator: Accelerator,
        name: str,
    ) -> None:
        self.name, self.device, self.main = name, accelerator.device, accelerator.is_main_process
        self.order = EpochSampler(len(examples), seed)
        self.batches = Batches(self.order, batch_size, accelerator.process_index, accelerator.num_processes)
        self.loader = DataLoader(
            Readable(examples),
            batch_sampler=self.batches,
            collate_fn=_collate,
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            persistent_workers=workers > 0,
            worker_init_fn=ignore_signals if workers else None,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # its own: a resumed epoch starts one iterator more than a whole one
        )
        self.waited, self.unreadable = 0.0, 0
        self._reported: dict[str, None] = {}

    def __len__(self) -> int:
        """Batches of one process in an epoch."""
        return len(self.batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from `start` on.

        Raises:
            RunError: too many examples cannot be read.
            RuntimeError: a reading process died, here or wherever the loop is by then; see `processes.clear_errors`.
        """
        self.order.epoch, self.batches.start = epoch, start
        iterator = None
        while True:
            begin = time.perf_counter()
            try:
                iterator = iter(self.loader) if iterator is None else iterator
                clean, noisy, failures = next(iterator)
            except StopIteration:
                return
            except (OSError, EOFError) as error:  # no file's: the way from another process to here
                raise RuntimeError(f"DataLoader worker gone: {error}") from error
            clean, noisy = (x.to(self.device, non_blocking=True) for x in (clean, noisy))
            self.waited += time.perf_counter() - begin
            if failures:
                self._count(failures, epoch)
            yield clean, noisy

    def _count(self, failures: list[str], epoch: int) -> None:
        """One line for every file; too many of them end the run."""
        self.unreadable += len(failures)
        for failure in failures:
            if failure not in self._reported:
                print(f"left out, another example takes its place: {failure}", flush=True)
            self._reported[failure] = None
        examples = len(self) * self.batches.size
        if self.unreadable > max(1, math.floor(UNREADABLE * examples)):
            raise RunError(
                f"{self.name}: {self.unreadable} of {examples} examples of epoch {epoch} cannot be read, more than "
                f"{UNREADABLE:.0%}: {'; '.join(self._reported)}"
            )
