"""The Triton kernels in place of the CPU's, so that operators, autograd and fake kernels run in the interpreter."""

import importlib
from collections.abc import Iterator

import torch

from mvat.kernels import native
from tests.kernels import interpreter

OPERATORS = tuple(op for op in native.IN_TRITON if not op.startswith("global_attention"))


def triton_on_cpu() -> Iterator[None]:
    """Until the generator goes on, torch.ops.mvat's stages take CPU tensors through Triton, half precision too."""
    interpreter.install()
    library = torch.library.Library("mvat", "IMPL")
    for op in OPERATORS:
        module, function = native.IN_TRITON[op]

        def run(*arguments, module=module, function=function):
            return getattr(importlib.import_module(f"mvat.kernels.triton.{module}"), function)(*arguments)

        library.impl(op, run, "CPU", allow_override=True)
    before = native._DTYPES["cpu"]
    native._DTYPES["cpu"] = (*before, torch.bfloat16, torch.float16)
    yield
    native._DTYPES["cpu"] = before
    library._destroy()
