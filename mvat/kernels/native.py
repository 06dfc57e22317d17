"""The compiled operators: importing mvat._C registers them under torch.ops.mvat. Here stands why one is not there."""

import importlib
import shutil

import torch

_REBUILD = "run `pip install --no-build-isolation --force-reinstall --no-deps .` in mvat's source folder"


def _load() -> str | None:
    """Load mvat._C; None where that worked, else what is wrong and the command that mends it."""
    try:
        importlib.import_module("mvat._C")
    except ModuleNotFoundError:
        if any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
            return f"the C++ extension is not built; {_REBUILD}"
        return (
            "the C++ extension is not built (no C++ compiler was found); "
            f"install one (for example `apt install g++`) and {_REBUILD}"
        )
    except ImportError as error:
        return f"the C++ extension does not load ({error}); {_REBUILD}"
    return None


_missing = _load()


def missing(operator: str) -> str | None:
    """Why torch.ops.mvat.<operator> is not there, with the command that mends it; None where it is.

    To be asked once, at import: torch.compile wants its operators registered before it traces.
    """
    if _missing is None and not hasattr(torch.ops.mvat, operator):
        return f"the C++ extension is older than this source and has no {operator}; {_REBUILD}"
    return _missing
