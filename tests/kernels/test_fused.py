"""What holds of the fused channel and global views beyond their answers: operators, threads, layouts, derivatives."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mvat.kernels import channel_attention, global_attention, native, use_backend
from mvat.kernels.channel_attention import channel_attention_reference
from mvat.kernels.global_attention import absorb, global_attention_reference

pytestmark = pytest.mark.skipif(
    native.missing("global_attention") is not None, reason=f"no kernel: {native.missing('global_attention')}"
)

LENGTHS = [1, 59, 249, 4001]


class Op(NamedTuple):
    """An op, its reference, its parameters for n channels, and what its operator takes."""

    fused: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    shapes: Callable[[int], list[tuple[int, ...]]]
    operator: Any
    operator_arguments: Callable[[list[Tensor]], tuple[Any, ...]]


OPS = {
    "channel": Op(
        channel_attention,
        channel_attention_reference,
        lambda n: [(n // 2, n), (n // 2,), (n, n // 2), (n,)],
        torch.ops.mvat.channel_attention if hasattr(torch.ops.mvat, "channel_attention") else None,
        lambda tensors: tuple(tensors),
    ),
    "global": Op(
        global_attention,
        global_attention_reference,
        lambda n: [(64, 64)] * 4,
        torch.ops.mvat.global_attention if hasattr(torch.ops.mvat, "global_attention") else None,
        lambda tensors: (tensors[0], *(t.detach().requires_grad_() for t in absorb(*tensors[1:], 1)), 64, True),
    ),
}


@pytest.fixture(params=OPS)
def op(request: pytest.FixtureRequest) -> Op:
    return OPS[request.param]


def tensors(op: Op, batch: int, n: int, length: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    parameters = [torch.randn(shape, dtype=dtype) / max(shape[-1], 1) ** 0.5 for shape in op.shapes(n)]
    return [x.requires_grad_() for x in (torch.randn(batch, n, length, dtype=dtype), *parameters)]


def forward_backward(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad.to(y.dtype))]


def fused(op: Op) -> Callable[..., Tensor]:
    def run(*inputs: Tensor) -> Tensor:
        with use_backend("fused"):
            return op.fused(*inputs)

    return run


@pytest.mark.parametrize("length", LENGTHS)
def test_as_exact_as_eager(op: Op, length: int) -> None:
    """Root mean square over seeds of every output's and gradient's error: at most twice eager's, or one rounding."""
    squares = torch.zeros(2, 6, dtype=torch.float64)
    for seed in range(4):
        torch.manual_seed(seed)
        inputs, grad = tensors(op, 2, 6, length), torch.randn(2, 6, length)
        wide = [x.detach().double().requires_grad_() for x in inputs]
        exact = forward_backward(op.reference, wide, grad)
        for row, function in enumerate((op.reference, fused(op))):
            for i, (got, expected) in enumerate(zip(forward_backward(function, inputs, grad), exact, strict=True)):
                squares[row, i] += ((got.double() - expected).norm() / expected.norm().clamp(min=1e-30)).square()
    eager, ours = (squares / 4).sqrt()
    count = len(tensors(op, 1, 6, 1)) + 1
    assert (ours <= (2 * eager).clamp(min=2e-7))[:count].all(), (eager, ours)


@pytest.mark.parametrize("view", ["transposed", "every second sample", "expanded", "flipped batch"])
def test_layouts(op: Op, view: str) -> None:
    x, *parameters = tensors(op, 3, 6, 100)
    x = {
        "transposed": lambda: torch.randn(3, 100, 6).transpose(1, 2),
        "every second sample": lambda: x[..., ::2],
        "expanded": lambda: x[:1].expand(3, -1, -1),
        "flipped batch": lambda: x.flip(0)[:, 1:-1:1][:, :4].repeat_interleave(2, 1)[:, :6],
    }[view]().detach().requires_grad_()  # fmt: skip
    grad = torch.randn(x.shape)
    got = forward_backward(fused(op), [x, *parameters], grad)
    dense = [t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for t in (x, *parameters)]
    for ours, expected in zip(got, forward_backward(fused(op), dense, grad), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(1, 6, 4001), (5, 6, 249)])
def test_the_thread_count_changes_nothing(op: Op, shape: tuple[int, int, int]) -> None:
    inputs, grad = tensors(op, *shape), torch.randn(shape)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(forward_backward(fused(op), inputs, grad))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 6, 130), (0, 6, 130)])
def test_opcheck(op: Op, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    torch.library.opcheck(op.operator.default, op.operator_arguments(tensors(op, *shape, dtype=dtype)))


def test_gradcheck(op: Op) -> None:
    assert torch.autograd.gradcheck(fused(op), tensors(op, 2, 4, 70, torch.float64), fast_mode=True)


def test_a_second_derivative_is_refused(op: Op) -> None:
    inputs = tensors(op, 1, 6, 59)
    (first,) = torch.autograd.grad(fused(op)(*inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="a second derivative is not supported by the fused kernel"):
        first.sum().backward()


def test_inference_mode_and_no_grad(op: Op) -> None:
    inputs = tensors(op, 2, 6, 200)
    expected = fused(op)(*inputs).detach()
    with torch.inference_mode():
        assert torch.equal(fused(op)(*inputs), expected)
    with torch.no_grad():
        assert torch.equal(fused(op)(*inputs), expected)


def test_float32_under_autocast_stays_float32(op: Op) -> None:
    inputs = tensors(op, 2, 6, 200)
    expected = fused(op)(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused(op)(*inputs), expected)


def test_only_what_wants_a_gradient_gets_one(op: Op) -> None:
    x, *parameters = tensors(op, 2, 6, 200)
    fused(op)(x.detach(), *parameters).sum().backward()
    assert x.grad is None and all(p.grad is not None for p in parameters)
    fused(op)(x, *(p.detach() for p in parameters)).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("place", [0, 3, 99, 100])
def test_a_nan_is_handed_on(op: Op, place: int) -> None:
    inputs = [t.detach() for t in tensors(op, 2, 6, 101)]
    inputs[0][1, 2, place] = torch.nan
    with torch.no_grad():
        assert torch.equal(fused(op)(*inputs).isnan(), op.reference(*inputs).isnan())


@pytest.mark.parametrize("parameter", [1, 2, 3])
def test_a_nan_in_a_weight_is_handed_on(op: Op, parameter: int) -> None:
    inputs = [t.detach() for t in tensors(op, 2, 6, 101)]
    inputs[parameter].view(-1)[-1] = torch.nan
    with torch.no_grad():
        nan = fused(op)(*inputs).isnan()
        # PyTorch's attention gives zeros for a row of scores without a number; ours does not hide it.
        assert nan.any() and (nan | ~op.reference(*inputs).isnan()).all()


def test_weights_of_several_dtypes_under_autocast() -> None:
    x, *weights = tensors(OPS["global"], 1, 2, 100)
    expected = global_attention(x, *weights)
    with torch.autocast("cpu", torch.bfloat16):
        y = global_attention(x, weights[0].to(torch.bfloat16), *weights[1:])
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)


def test_the_first_of_equal_maxima_gets_the_gradient() -> None:
    op = OPS["channel"]
    inputs = tensors(op, 1, 6, 70)
    with torch.no_grad():
        inputs[0][0, :, [5, 20, 66]] = 7.0
    grad = torch.randn(1, 6, 70)
    for got, expected in zip(
        forward_backward(fused(op), inputs, grad), forward_backward(op.reference, inputs, grad), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_memory_grows_with_the_length_alone() -> None:
    """Six seconds: 3003 chunks, whose scores alone would take 36 MB."""
    x = torch.randn(1, 1, 96_000)
    weights = [torch.randn(64, 64) / 8 for _ in range(4)]
    with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad(), use_backend("fused"):
        global_attention(x, *weights)
    largest = max(event.self_cpu_memory_usage for event in profile.key_averages())
    assert largest < 20 * x.numel() * 4
