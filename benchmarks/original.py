"""MANNER's own code, from a checkout of its authors' repository that the user has."""

import argparse
import contextlib
import importlib
import io
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks import shapes


def checkout(text: str) -> Path:
    """The folder that an option names; argparse's error where it is no checkout of the repository."""
    path = Path(text)
    if not (path / "src" / "models.py").is_file():
        raise argparse.ArgumentTypeError(f"{path} is no checkout of MANNER's repository: it has no src/models.py")
    return path


@contextlib.contextmanager
def _importable(path: Path) -> Iterator[None]:
    """The folder's modules can be imported; afterwards the interpreter knows as many modules as before."""
    former = set(sys.modules)
    sys.path.insert(0, str(path))
    try:
        yield
    finally:
        sys.path.remove(str(path))
        for name in set(sys.modules) - former:
            if name == "src" or name.startswith("src.") or isinstance(sys.modules[name], _Absent):
                del sys.modules[name]


class _Absent(types.ModuleType):
    """Stands in for a package that is not installed."""


def _import_alone(name: str) -> types.ModuleType:
    """Import a module although a package is missing that only its training needs, such as neptune."""
    while True:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith("src"):
                raise
            sys.modules[error.name] = _Absent(error.name)


def build(path: Path, preset: str) -> nn.Module:
    """The network of a preset's sizes, with our weights, in evaluation mode."""
    ours = shapes.build(preset)
    arguments: dict[str, Any] = dict(ours.config)
    small = arguments.pop("attention_layers") == "deepest"
    with _importable(path), contextlib.redirect_stdout(io.StringIO()):
        module = _import_alone("src.models_small" if small else "src.models")
        model = module.MANNER(**arguments)
    model.load_state_dict(ours.state_dict())
    return model.eval()
