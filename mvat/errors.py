"""How a command ends for what its user must mend: one line on stderr, exit status 2. Nothing heavy is imported."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

__all__ = ["Parser", "failed", "interrupted", "listed", "named", "one_line"]


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises ValueError in place of printing its usage and leaving."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see `{self.prog} --help`)")


def named(text: str) -> Path:
    """The type of an argument that names a file or folder to write; an empty one would be the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"expected a name, got {text!r}")
    return Path(text)


def failed(program: str, error: BaseException | str, details: Iterable[str] = ()) -> int:
    """Print "<program>: error: <what and why>" in one line, below it the details, indented; gives the exit status."""
    text = error if isinstance(error, str) else one_line(error)
    print(listed(f"{program}: error: {text}", details), file=sys.stderr)
    return 2


def interrupted(program: str) -> int:
    """Print that Ctrl-C ended the program; gives the exit status."""
    print(f"{program}: interrupted", file=sys.stderr)
    return 130


def listed(title: str, details: Iterable[str]) -> str:
    """A title and below it one indented line a detail."""
    return "\n  ".join([title, *(" ".join(detail.split()) for detail in details)])


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks: the name first, where the system refused a file."""
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    return " ".join(text.split()) or type(error).__name__
