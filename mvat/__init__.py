"""mvat: fast multi-view attention and attention transfer for time-domain speech enhancement."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mvat.inference import enhance
    from mvat.kernels import use_backend
    from mvat.models import Manner
    from mvat.patching import patch, patch_report, unpatch

__version__ = "0.1.0"

__all__ = ["Manner", "__version__", "enhance", "patch", "patch_report", "unpatch", "use_backend"]

# Looked up at first use, so that `mvat --help` need not wait for PyTorch.
_HOMES = {
    "Manner": "mvat.models",
    "enhance": "mvat.inference",
    "patch": "mvat.patching",
    "patch_report": "mvat.patching",
    "unpatch": "mvat.patching",
    "use_backend": "mvat.kernels",
}
_MODULES = ("audio", "export", "inference", "kernels", "losses", "metrics", "models")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"mvat.{name}")
    raise AttributeError(f"module 'mvat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
