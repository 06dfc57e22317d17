import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mvat.kernels import backend, native
from mvat.kernels.attention_map import attention_map, attention_map_reference

needs_kernel = pytest.mark.skipif(
    native.missing("attention_map") is not None, reason=f"no kernel: {native.missing('attention_map')}"
)
POWERS = (1.0, 1.5, 2.0, 3.0, 4.5)


def fused(x: Tensor, p: float = 2.0) -> Tensor:
    with backend.use_backend("fused"):
        return attention_map(x, p)


def forward_backward(function, x: Tensor, grad: Tensor, p: float) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    q = function(x, p)
    return q.detach(), torch.autograd.grad(q, x, grad.to(q.dtype))[0]


def assert_as_exact_as_eager(x: Tensor, p: float) -> None:
    """Map and gradient: error against float64 at most twice the reference's, beside one rounding of the result."""
    grad = torch.randn(x.shape[0], x.shape[2])
    pairs = zip(
        forward_backward(fused, x, grad, p),
        forward_backward(attention_map_reference, x, grad, p),
        forward_backward(attention_map_reference, x.double(), grad.double(), p),
        strict=True,
    )
    for got, eager, exact in pairs:
        assert got.shape == exact.shape and got.dtype == x.dtype and torch.isfinite(got).all()
        rounding = torch.finfo(x.dtype).eps / 2 * exact.norm()
        assert (got - exact).norm() <= 2 * (eager - exact).norm() + rounding


@needs_kernel
@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 59), (2, 20, 127), (1, 20, 1023), (1, 7, 4001), (1, 960, 249)])
def test_map_and_gradient_are_as_exact_as_eager(shape: tuple[int, int, int], p: float) -> None:
    assert_as_exact_as_eager(torch.randn(shape), p)


@needs_kernel
@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 3), st.integers(0, 21), st.integers(0, 4200), st.sampled_from(POWERS), st.sampled_from([0, 1, 2]))
def test_any_shape_and_layout(batch: int, channels: int, length: int, p: float, layout: int) -> None:
    if layout == 0:
        x = torch.randn(batch, channels, length)
    elif layout == 1:
        x = torch.randn(batch + 1, channels + 2, length + 5)[1:, 1:-1, 3:-2]
    else:
        x = torch.randn(batch, length, channels).transpose(1, 2)
    assert_as_exact_as_eager(x, p)


@needs_kernel
@pytest.mark.parametrize("view", ["every second sample", "expanded", "flipped batch", "negative bit"])
def test_views(view: str) -> None:
    x = {
        "every second sample": lambda: torch.randn(2, 5, 118)[..., ::2],
        "expanded": lambda: torch.randn(2, 1, 59).expand(2, 5, 59),
        "flipped batch": lambda: torch.randn(3, 5, 59).flip(0).transpose(0, 1),
        "negative bit": lambda: torch.view_as_complex(torch.randn(2, 5, 59, 2)).conj().imag,
    }[view]()
    for p in (1.0, 2.0):
        assert_as_exact_as_eager(x, p)


@needs_kernel
@pytest.mark.parametrize("p", POWERS)
def test_silence_gives_zero(p: float) -> None:
    q, dx = forward_backward(fused, torch.zeros(2, 9, 130), torch.ones(2, 130), p)
    assert not q.any() and not dx.any()
    assert not fused(torch.ones(2, 0, 5), p).any()


@pytest.mark.parametrize("p", (1.0, 1.0001, 1.5, 2.0, 3.0))
def test_the_reference_has_no_nan_gradient_at_zero(p: float) -> None:
    assert not forward_backward(attention_map_reference, torch.zeros(1, 3, 4), torch.ones(1, 4), p)[1].any()


@needs_kernel
@pytest.mark.parametrize("scale", [1e-18, 1e18])
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0])
def test_extreme_magnitudes(scale: float, p: float) -> None:
    x = torch.randn(2, 60, 200, dtype=torch.float64)
    q, dx = forward_backward(fused, (x * scale).float(), torch.ones(2, 200), p)
    exact_q, exact_dx = forward_backward(attention_map_reference, (x * scale).float().double(), torch.ones(2, 200), p)
    torch.testing.assert_close(q.double(), exact_q, rtol=2e-7, atol=0)
    torch.testing.assert_close(dx.double(), exact_dx, rtol=3e-7, atol=0)


@needs_kernel
@pytest.mark.parametrize("p", [1.5, 2.0])
def test_overflow_and_nan_stay_visible(p: float) -> None:
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), 3e38, 0.0]).reshape(1, 1, 5)
    q, dx = forward_backward(fused, x, torch.ones(1, 5), p)
    eager_q, eager_dx = forward_backward(attention_map_reference, x, torch.ones(1, 5), p)
    torch.testing.assert_close(q, eager_q, equal_nan=True)
    torch.testing.assert_close(dx, eager_dx, equal_nan=True)


@needs_kernel
@pytest.mark.parametrize("p", POWERS)
def test_gradcheck(p: float) -> None:
    x = torch.randn(2, 11, 7, dtype=torch.float64)
    x = (x + 0.1 * x.sign()).requires_grad_()  # away from 0, where |x| has no derivative
    assert torch.autograd.gradcheck(lambda v: fused(v, p), (x,))


@needs_kernel
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0])
def test_the_thread_count_changes_nothing(p: float) -> None:
    x, grad = torch.randn(2, 60, 4001), torch.randn(2, 4001)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(forward_backward(fused, x, grad, p))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 5, 33), (0, 5, 33), (2, 0, 33)])
def test_opcheck(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, grad = torch.randn(shape, dtype=dtype), torch.randn(shape[0], shape[2], dtype=dtype)
    torch.library.opcheck(torch.ops.mvat.attention_map, (x.clone().requires_grad_(), 2.0))
    torch.library.opcheck(torch.ops.mvat.attention_map, (x.transpose(1, 2), 1.5))
    torch.library.opcheck(torch.ops.mvat.attention_map_backward, (grad, x, 2.0))


@pytest.mark.parametrize("mode", ["auto", "eager"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(mode: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda v, p: attention_map(v, p).sqrt(), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    x, grad = torch.randn(2, 7, 59), torch.randn(2, 59)
    with backend.use_backend(mode):
        got = forward_backward(compiled, x, grad, 1.5)
    expected = forward_backward(lambda v, p: attention_map_reference(v, p).sqrt(), x, grad, 1.5)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@needs_kernel
def test_compile_with_inductor_calls_the_kernel() -> None:
    torch._dynamo.reset()
    x = torch.randn(2, 7, 59)
    with torch.no_grad(), torch.profiler.profile() as profile:
        got = torch.compile(attention_map, fullgraph=True)(x)
    torch.testing.assert_close(got, attention_map_reference(x))
    assert "mvat::attention_map" in {event.key for event in profile.key_averages()}


@needs_kernel
def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(1, 3, 5, requires_grad=True)
    (dx,) = torch.autograd.grad(fused(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative is not supported by the fused kernel"):
        dx.sum().backward()
    with backend.use_backend("eager"):
        (dx,) = torch.autograd.grad(attention_map(x).sum(), x, create_graph=True)
    dx.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 2))


@needs_kernel
def test_inference_mode_and_deterministic_algorithms() -> None:
    x = torch.randn(1, 3, 5)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.inference_mode():
            torch.testing.assert_close(fused(x), attention_map_reference(x))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    x, grad = torch.randn(2, 60, 33).to(dtype), torch.randn(2, 33)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        q, dx = forward_backward(attention_map, x, grad, 2.0)
    assert q.dtype == torch.float32 and dx.dtype == dtype
    torch.testing.assert_close(q, x.float().square().sum(1))
    torch.testing.assert_close(dx, (2 * x.float() * grad[:, None]).to(dtype))
    with (
        backend.use_backend("fused"),
        pytest.raises(RuntimeError, match="torch.*float.* on cpu no fused kernel is written yet"),
    ):
        attention_map(x)


@needs_kernel
def test_autocast_leaves_float32_to_the_kernel() -> None:
    x = torch.randn(2, 7, 33)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused(x), fused(x.clone())) and fused(x).dtype == torch.float32


@pytest.mark.parametrize(
    "x, p, error, message",
    [
        ([1.0], 2.0, TypeError, "x must be a tensor, got list"),
        (torch.ones(1, 2, 3, dtype=torch.int64), 2.0, TypeError, "got torch.int64"),
        (torch.ones(1, 2, 3, dtype=torch.complex64), 2.0, TypeError, "got torch.complex64"),
        (torch.ones(2, 3), 2.0, ValueError, r"shape \[B, C, T\], got \[2, 3\]"),
        (torch.ones(1, 2, 3), 0.5, ValueError, "at least 1, got 0.5"),
        (torch.ones(1, 2, 3), float("nan"), ValueError, "at least 1, got nan"),
        (torch.ones(1, 2, 3), float("inf"), ValueError, "at least 1, got inf"),
        (torch.ones(1, 2, 3), "2", TypeError, "p must be a number, got str"),
    ],
)
def test_bad_input_is_named(x: object, p: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"attention_map: .*{message}"):
        attention_map(x, p)


@needs_kernel
def test_the_operator_itself_checks_its_input() -> None:
    x = torch.randn(2, 3, 5)
    with pytest.raises(RuntimeError, match=r"expected x \[B, C, T\]"):
        torch.ops.mvat.attention_map(x[0], 2.0)
    with pytest.raises(RuntimeError, match="expected float32 or float64"):
        torch.ops.mvat.attention_map(x.half(), 2.0)
    with pytest.raises(RuntimeError, match="finite p >= 1"):
        torch.ops.mvat.attention_map(x, 0.5)
    with pytest.raises(RuntimeError, match=r"expected grad \[B, T\]"):
        torch.ops.mvat.attention_map_backward(torch.randn(2, 4), x, 2.0)
