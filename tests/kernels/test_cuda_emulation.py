"""The CUDA kernels on a CPU: every launcher against the float64 reference, through tests/emulation/cuda_emu.h."""

import math
import platform
import shutil
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from mvat.kernels.attention_map import attention_map_reference

pytest.importorskip("pybind11", reason="the emulation's module is built with pybind11")
pytest.importorskip("ninja", reason="the emulation's module is built with ninja")
if platform.machine() != "x86_64" or not shutil.which("g++"):
    pytest.skip("the emulation needs g++ and an x86-64 processor", allow_module_level=True)

from tests.emulation.build import load  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAN = float("nan")


@pytest.fixture(scope="module")
def emulated() -> ModuleType:
    return load()


def feature(emulated: ModuleType, x: Tensor) -> object:
    assert x.dim() == 3 and (x.stride(2) == 1 or x.shape[2] <= 1)
    dtype = getattr(emulated.Type, str(x.dtype).removeprefix("torch."))
    return emulated.Feature(x.data_ptr(), *x.shape, x.stride(0), x.stride(1), dtype)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A fresh output: what a kernel leaves unwritten stays NaN."""
    return torch.full(shape, NAN).to(dtype)


def assert_near(got: Tensor, exact: Tensor, error: float = 2e-6) -> None:
    """The error's norm is at most `error` of the exact values' norm, beside the rounding of the result's dtype."""
    assert got.shape == exact.shape and not torch.isnan(got).any()
    rounding = torch.finfo(got.dtype).eps / 2 if got.dtype != torch.float32 else 0
    assert (got.double() - exact).norm() <= (error + rounding) * exact.norm() + 1e-30


# ---- the emulation itself


def self_test(emulated: ModuleType, which: int) -> tuple[Tensor, Tensor]:
    x, out = torch.randn(64), poisoned(64)
    emulated.self_test(which, x.data_ptr(), out.data_ptr())
    return x, out


def test_emulation_runs_a_right_kernel(emulated: ModuleType) -> None:
    x, out = self_test(emulated, 0)
    assert torch.equal(out, x.flip(0))


def test_emulation_notices_a_missing_barrier(emulated: ModuleType) -> None:
    assert torch.isnan(self_test(emulated, 1)[1]).any()


@pytest.mark.parametrize("which", [2, 3])
def test_emulation_notices_a_barrier_or_shuffle_that_not_all_reach(emulated: ModuleType, which: int) -> None:
    with pytest.raises(RuntimeError, match="different barriers or shuffles"):
        self_test(emulated, which)


def test_emulation_notices_a_write_past_the_shared_memory(emulated: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="past the dynamic shared memory"):
        self_test(emulated, 4)


def test_emulation_poisons_shared_memory(emulated: ModuleType) -> None:
    x, out = self_test(emulated, 5)
    torch.testing.assert_close(out[0], x.sum())
    assert math.isnan(out[1])


# ---- attention_map


def reference_gradient(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.double().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, grad.double())[0]


def check_attention_map(emulated: ModuleType, x: Tensor, p: float) -> None:
    batch, channels, length = x.shape
    grad, q, dx = torch.randn(batch, length), poisoned(batch, length), poisoned(*x.shape, dtype=x.dtype)
    emulated.attention_map(feature(emulated, x), p, q.data_ptr())
    emulated.attention_map_backward(grad.data_ptr(), feature(emulated, x), p, dx.data_ptr())
    exact_q, exact_dx = reference_gradient(lambda v: attention_map_reference(v, p), x, grad)
    assert_near(q, exact_q)
    assert_near(dx, exact_dx)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 3, 5), (2, 20, 127), (1, 33, 264), (1, 150, 60), (3, 4, 1028), (0, 2, 3), (2, 0, 3)]
)
def test_attention_map(emulated: ModuleType, shape: tuple[int, int, int], p: float, dtype: torch.dtype) -> None:
    check_attention_map(emulated, torch.randn(shape).to(dtype), p)


@pytest.mark.parametrize("start", [0, 1, 4])
def test_attention_map_of_a_view(emulated: ModuleType, start: int) -> None:
    check_attention_map(emulated, torch.randn(4, 9, 80)[::2, 1:, start : start + 60], 2.0)
    check_attention_map(emulated, torch.randn(1, 5, 60).expand(3, 5, 60), 2.0)


def test_attention_map_of_silence_and_of_nan(emulated: ModuleType) -> None:
    for p in (1.0, 1.5, 2.0):
        x, grad = torch.zeros(1, 5, 8), torch.ones(1, 8)
        x[0, 2, 3] = NAN
        q, dx = poisoned(1, 8), poisoned(1, 5, 8)
        emulated.attention_map(feature(emulated, x), p, q.data_ptr())
        emulated.attention_map_backward(grad.data_ptr(), feature(emulated, x), p, dx.data_ptr())
        assert torch.equal(torch.isnan(q), torch.arange(8)[None] == 3) and not q.nan_to_num().any()
        assert not dx.nan_to_num().any() and torch.isnan(dx).sum() == (p > 1)
