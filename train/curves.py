"""Curves and recordings of a run for TensorBoard, exactly once however often the run is killed.

All events of a run stand in one file. A checkpoint notes the file's length, and a run that goes on from it first cuts
the file there: what a killed process wrote beyond its last checkpoint is written again at the same places, so that no
reader finds a point twice. A file for every start, as TensorBoard's own writer makes them, would leave the doubled
points to the reader and the files' order to the clock.
"""

import contextlib
import errno
import os
import struct
import time
from pathlib import Path
from typing import IO

import numpy as np

from mvat.audio import SAMPLE_RATE

NAME = "events.out.tfevents.0.mvat"
_HEADER = struct.Struct("<QI")  # length of a record and its checksum; the record and its own checksum follow
_FOOTER = 4


class Curves:
    """The event file of a run.

    Args:
        folder: made where missing.
        length: bytes to keep of the file that is there, as `flush` gave them.

    Raises:
        BlockingIOError: another process writes it.
        OSError: the file cannot be written; from every method.
    """

    def __init__(self, folder: Path, length: int = 0) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / NAME
        self._file = open(path, "a+b")  # noqa: SIM115
        _lock(self._file)
        self._file.seek(self._file.truncate(_whole(self._file, length)))  # or `tell` would give the former end
        self._event, self._records = Event, RecordWriter(self._file)
        if not os.path.getsize(path):
            self._write(file_version="brain.Event:2")

    def scalars(self, group: str, values: dict[str, float], step: int) -> None:
        """One point a value, named group/name."""
        from torch.utils.tensorboard.summary import scalar

        for name, value in values.items():
            self._write(step=step, summary=scalar(f"{group}/{name}", value))

    def recording(self, name: str, samples: np.ndarray, step: int) -> None:
        """A recording [T], limited to [-1, 1]."""
        from torch.utils.tensorboard.summary import audio

        samples = np.clip(np.nan_to_num(samples), -1, 1)
        self._write(step=step, summary=audio(name, samples[None], SAMPLE_RATE))

    def flush(self) -> int:
        """Bring everything to the disk; the file's length in bytes, for the checkpoint."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def show(self) -> None:
        """Let readers see what is written."""
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _write(self, **content: object) -> None:
        self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())


def _lock(file: IO[bytes]) -> None:
    """Hold the file until this process ends, however it ends; where the system cannot lock, go without."""
    with contextlib.suppress(ImportError):
        import fcntl

        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise
        except OSError as error:
            if error.errno == errno.EACCES:  # the other of the two that POSIX has for a lock that is taken
                file.close()
                raise BlockingIOError(error.errno, error.strerror) from None


def _whole(file: IO[bytes], length: int) -> int:
    """The end of the last whole record within the first `length` bytes."""
    end, size = 0, min(length, file.seek(0, os.SEEK_END))
    while end + _HEADER.size <= size:
        file.seek(end)
        after = end + _HEADER.size + _HEADER.unpack(file.read(_HEADER.size))[0] + _FOOTER
        if after > size:
            break
        end = after
    return end
