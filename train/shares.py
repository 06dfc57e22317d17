"""The processes that torchrun starts, where they share out work whose results come together again."""

import atexit
import os
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class Group(NamedTuple):
    """This process's place among those that torchrun started; (0, 1) where it started none."""

    rank: int
    size: int

    @classmethod
    def here(cls) -> "Group":
        """Reads what torchrun set."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def on_this_machine(self) -> int:
        """How many of them share this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.size))

    def device(self) -> torch.device:
        """A GPU of its own for every process of a machine, where there are GPUs."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Does this process's share of the work and waits for the others.

        Args:
            work: Gives something that can be pickled.

        Returns:
            What each of them has, in the order of their ranks, in every process.

        Raises:
            RuntimeError: The work failed in another process, with its reason, or another process died. What the work
                raises here goes through, once the others know.
        """
        if self.size == 1:
            return [work()]
        if not dist.is_initialized():
            # Only results travel, so the CPU will do; the fastest process waits for the slowest.
            dist.init_process_group("gloo", timeout=timedelta(hours=6))
            atexit.register(dist.destroy_process_group)
        own: Exception | None = None
        mine: tuple[T | None, str | None]
        try:
            mine = work(), None
        except Exception as error:
            own, mine = error, (None, str(error) or type(error).__name__)
        every: list[tuple[T, str | None]] = [None] * self.size  # type: ignore[list-item]
        try:
            dist.all_gather_object(every, mine)
        except RuntimeError as error:
            raise RuntimeError(f"one of the {self.size} processes ended before its work was done") from error
        if own is not None:
            raise own
        for rank, (_, failed) in enumerate(every):
            if failed is not None:
                raise RuntimeError(f"process {rank} of {self.size}: {failed}")
        return [result for result, _ in every]
