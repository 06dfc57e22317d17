"""The compiled operators: importing mvat._C registers them under torch.ops.mvat. Here stands why one is not there."""

import importlib
import importlib.util
import shutil
from collections.abc import Callable
from typing import Any

import torch

from mvat.kernels.backend import NOT_WRITTEN

Function = Callable[..., Any]

#: The features' dtypes that the operators take.
_DTYPES = {
    "cpu": (torch.float32, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}

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

#: Operators whose CUDA kernels are Triton's: their module in mvat.kernels.triton and the function there.
IN_TRITON: dict[str, tuple[str, str]] = {
    "batch_statistics": ("norm_act", "batch_statistics"),
    "norm_gradient": ("norm_act", "norm_gradient"),
}
for _op in ("global_attention", "mask_gate", "norm_act", "norm_act_conv"):
    IN_TRITON |= {_op: (_op, "forward"), f"{_op}_backward": (_op, "backward")}


def missing(operator: str, device_type: str = "cpu") -> str | None:
    """Why torch.ops.mvat.<operator> has no kernel for this device, with the command that mends it; None where it has.

    To be asked once, at import: torch.compile wants its operators registered before it traces.
    """
    if _missing is not None:
        return _missing
    # An operator that this library does not know raises; one that it knows may stand there without a kernel.
    known = hasattr(torch.ops.mvat, operator)
    if known and torch._C._dispatch_has_kernel_for_dispatch_key(f"mvat::{operator}", device_type.upper()):
        return None
    if device_type == "cuda" and operator in IN_TRITON:
        return "Triton is not installed; run `pip install triton`"
    if device_type == "cuda":
        return f"the C++ extension is built without CUDA (it takes nvcc and a PyTorch with CUDA); {_REBUILD}"
    return f"the C++ extension is older than this source and has no {operator}; {_REBUILD}"


def implement_in_triton(*operators: str) -> None:
    """Make the functions of mvat.kernels.triton, imported at the first call, the CUDA kernels of these operators."""
    try:
        found = importlib.util.find_spec("triton") is not None
    except ModuleNotFoundError:  # what stands in for the importer may say so
        found = False

    def lazily(module: str, function: str) -> Function:
        def call(*arguments):
            return getattr(importlib.import_module(f"mvat.kernels.triton.{module}"), function)(*arguments)

        return call

    for operator in operators:
        if found and missing(operator) is None:
            _library.impl(operator, lazily(*IN_TRITON[operator]), "CUDA")


# What is registered stays so for as long as this object lives.
_library = torch.library.Library("mvat", "IMPL")


def supports(operator: str, devices: tuple[str, ...]) -> Callable[[str, torch.dtype], str | None]:
    """The answer that `backend.register` asks of an op whose kernels are this operator's, written for these devices."""
    reasons = {device: missing(operator, device) for device in devices}

    def answer(device_type: str, dtype: torch.dtype) -> str | None:
        if device_type not in reasons or dtype not in _DTYPES[device_type]:
            return NOT_WRITTEN
        return reasons[device_type]

    return answer


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums, parameters and statistics beside features of this dtype are kept in; csrc/schemas.cpp's word."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast(x: torch.Tensor) -> torch.Tensor:
    """Features as autocast on a GPU hands them to a convolution; a CPU's kernels stay in float32."""
    if x.device.type != "cuda" or x.dtype == torch.float64 or not torch.is_autocast_enabled("cuda"):
        return x
    return x.to(torch.get_autocast_dtype("cuda"))


def no_second_derivative(operator: str) -> Function:
    """The gradient of an operator that is part of a backward pass: an error that names the op."""

    def backward(ctx, *grads):
        raise RuntimeError(
            f"{operator}: a second derivative is not supported by the fused kernel; "
            "use mvat.kernels.use_backend('eager')"
        )

    return backward


def differentiable(operator: str, backward: Function, setup_context: Function | None = None) -> None:
    """Register an operator's gradient; the arguments are those of torch.library.register_autograd.

    That function's own kernel reads the schema again at every call, which costs twice the rest of a small one (15
    arguments: 62 microseconds, so 22). It is left to the operators that take lists, which autograd.Function does not.
    """
    overload = getattr(torch.ops.mvat, operator).default
    if "Tensor[]" in str(overload._schema):
        torch.library.register_autograd(f"mvat::{operator}", backward, setup_context=setup_context)
        return

    def forward(ctx, *arguments):
        with torch._C._AutoDispatchBelowAutograd():
            output = overload(*arguments)
        if setup_context is not None:
            setup_context(ctx, arguments, output)
        return output

    function: Any = type(
        operator, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    )

    def kernel(*arguments):
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return function.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*arguments)

    _library.impl(operator, kernel, "Autograd")


#: The gradient of every complete operator: its setup_context and its backward.
formulas: dict[str, tuple[Function, Function]] = {}


def complete(
    operator: str, fake: Function, fake_backward: Function, setup_context: Function, backward: Function
) -> None:
    """Complete an operator, and its `_backward`, where they are there: outputs without values, and the gradient.

    A second derivative becomes an error: without a formula autograd only warns that it may be wrong.
    """
    if missing(operator) is not None:
        return
    formulas[operator] = setup_context, backward
    torch.library.register_fake(f"mvat::{operator}", fake)
    torch.library.register_fake(f"mvat::{operator}_backward", fake_backward)
    differentiable(operator, backward, setup_context)
    differentiable(f"{operator}_backward", no_second_derivative(operator))
