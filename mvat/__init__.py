"""mvat: fast multi-view attention and attention transfer for time-domain speech enhancement."""

from mvat.kernels import use_backend

__version__ = "0.1.0"

__all__ = ["__version__", "use_backend"]
