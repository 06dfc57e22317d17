"""Writing files so that a failure leaves the former ones whole."""

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def making(folder: Path) -> Iterator[None]:
    """The folder is made where it is missing; on leaving, what was made and stayed empty is removed again."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        with contextlib.suppress(OSError):  # the first that is not empty
            for path in missing:
                path.rmdir()


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path` to write to; on leaving, it is flushed to disk and takes the name `path`.

    If the body raises, the temporary file is removed and `path` stays as it was. The temporary name keeps the suffix,
    by which some writers choose a format.
    """
    path = Path(path)
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.filename is not None and os.fspath(error.filename) == str(part):
            error.filename = str(path)  # the name that a user knows
        raise
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file as `replacing` does."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def _sync_folder(folder: Path) -> None:
    """Make a renaming last through a power failure, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
