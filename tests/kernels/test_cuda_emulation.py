"""The CUDA kernels on a CPU: every launcher against the float64 reference, through tests/emulation/cuda_emu.h."""

import math
import platform
import shutil
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mvat.kernels.attention_map import attention_map_reference
from mvat.kernels.attention_transfer_loss import attention_transfer_loss_reference
from mvat.kernels.channel_attention import channel_attention_reference
from mvat.kernels.local_attention import local_attention_reference
from mvat.kernels.norm import Norm

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
    # Subnormal numbers are multiples of tiny * eps.
    subnormal = torch.finfo(got.dtype).tiny * torch.finfo(got.dtype).eps / 2 * math.sqrt(got.numel())
    assert (got.double() - exact).norm() <= (error + rounding) * exact.norm() + subnormal


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


# ---- attention_transfer_loss


def side(emulated: ModuleType, x: Tensor) -> object:
    """A feature [B, C, T] or a map [B, T]."""
    return emulated.Side(feature(emulated, x if x.dim() == 3 else x[:, None]), x.dim() == 2)


def run_loss(
    emulated: ModuleType, student: list[Tensor], teacher: list[Tensor], grad: Tensor, p: float, paper: bool
) -> tuple[Tensor, list[Tensor]]:
    sides = [side(emulated, x) for x in student]
    loss, maps = poisoned(len(student)), poisoned(2 * sum(x.shape[0] * x.shape[-1] for x in student))
    scalars = poisoned(sum(len(x) for x in student), 4)
    others = [side(emulated, x) for x in teacher]
    pointers = loss.data_ptr(), maps.data_ptr(), scalars.data_ptr()
    emulated.attention_transfer_loss(sides, others, p, paper, *pointers)
    dx = [poisoned(*x.shape, dtype=x.dtype) for x in student]
    out = [x.data_ptr() for x in dx]
    emulated.attention_transfer_loss_backward(grad.data_ptr(), sides, *pointers[1:], p, out)
    return loss, dx


def check_loss(emulated: ModuleType, student: list[Tensor], teacher: list[Tensor], p: float, paper: bool) -> None:
    grad = torch.randn(len(student))
    loss, dx = run_loss(emulated, student, teacher, grad, p, paper)
    exact = [x.double().requires_grad_() for x in student]
    form = "paper" if paper else "code"
    expected = attention_transfer_loss_reference(exact, [x.double() for x in teacher], p=p, form=form, reduction="none")
    gradients = torch.autograd.grad(expected, exact, grad.double())
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=2e-6, atol=1e-12)
    for got, gradient in zip(dx, gradients, strict=True):
        assert_near(got, gradient, 5e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("paper", [True, False])
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0])
def test_attention_transfer_loss(emulated: ModuleType, p: float, paper: bool, dtype: torch.dtype) -> None:
    """Pairs of many sizes in one launch; a map for a student, a map for a teacher, no clip at all."""
    shapes = [(2, 3, 20, 60), (1, 5, 5, 1), (2, 2, 33, 129), (0, 2, 2, 7), (1, 1, 2, 4100), (3, 20, 40, 264)]
    student = [torch.randn(b, s, t).to(dtype) for b, s, _, t in shapes]
    teacher = [torch.randn(b, c, t).to(dtype) for b, _, c, t in shapes]
    student.append(torch.rand(2, 77).to(dtype))
    teacher.append(torch.randn(2, 3, 77))
    student.append(torch.randn(2, 3, 80).to(dtype))
    teacher.append(torch.rand(2, 80))
    check_loss(emulated, student, teacher, p, paper)


def test_attention_transfer_loss_of_more_pairs_than_a_launch_takes(emulated: ModuleType) -> None:
    student = [torch.randn(1, 2, 4 + i) for i in range(60)]
    check_loss(emulated, student, [torch.randn_like(x) for x in student], 2.0, True)


@pytest.mark.parametrize("paper", [True, False])
def test_attention_transfer_loss_of_silence_equal_maps_and_nan(emulated: ModuleType, paper: bool) -> None:
    x, silence = torch.randn(1, 6, 68), torch.zeros(1, 6, 68)
    # A view that is not aligned takes other tiles.
    apart = torch.zeros(1, 6, 69)[..., 1:].copy_(x)
    tiny = torch.full((1, 6, 68), 1e-21)
    student = [silence, silence, x, x, tiny, x]
    teacher = [silence, x, x, apart, x, silence]
    loss, dx = run_loss(emulated, student, teacher, torch.ones(6), 2.0, paper)
    assert torch.isfinite(loss).all() and not loss[[0, 2, 3]].any() and loss[[1, 4, 5]].all()
    assert all(torch.isfinite(gradient).all() for gradient in dx)
    assert not any(gradient.any() for gradient in dx[:5])
    broken = x.clone()
    broken[0, 0, 3] = NAN
    loss, dx = run_loss(emulated, [broken, x], [x, broken], torch.ones(2), 2.0, paper)
    assert torch.isnan(loss).all() and all(torch.isnan(gradient).all() for gradient in dx)


@pytest.mark.parametrize("scale", [1e-17, 1e17])
def test_attention_transfer_loss_of_extremes(emulated: ModuleType, scale: float) -> None:
    student, teacher = torch.randn(2, 4, 77), torch.randn(2, 4, 77)
    check_loss(emulated, [student * scale, student], [teacher, teacher * scale], 2.0, True)


def test_attention_transfer_loss_of_close_maps(emulated: ModuleType) -> None:
    teacher = torch.rand(2, 500) + 1
    student = teacher * (1 + 1e-5 * torch.randn(2, 500))
    check_loss(emulated, [student], [teacher], 2.0, True)


# ---- channel_attention


def check_channel_attention(emulated: ModuleType, x: Tensor, hidden: int) -> None:
    batch, n, length = x.shape
    # Small, or the gate saturates and 1 - gate loses its digits, as it does in eager.
    w1, b1, w2, b2 = (torch.randn(s) / (n + 4) for s in ((hidden, n), (hidden,), (n, hidden), (n,)))
    grad = torch.randn(x.shape).to(x.dtype)
    y, gate, pooled = poisoned(*x.shape, dtype=x.dtype), poisoned(batch, n), poisoned(2, batch, n)
    index = torch.full((batch, n), -1)
    emulated.channel_attention(
        feature(emulated, x), hidden, *(t.data_ptr() for t in (w1, b1, w2, b2, y, gate, pooled, index))
    )
    assert torch.equal(index, x.float().contiguous().max(-1).indices if x.numel() else index)
    assert torch.equal(pooled[0], x.float().amax(-1))
    gradients = [poisoned(*x.shape, dtype=x.dtype), *map(torch.empty_like, (w1, b1, w2, b2))]
    emulated.channel_attention_backward(
        feature(emulated, grad),
        feature(emulated, x),
        hidden,
        *(t.data_ptr() for t in (gate, pooled, index, w1, b1, w2, *gradients)),
    )
    exact = [t.double().requires_grad_() for t in (x, w1, b1, w2, b2)]
    # The first of equal maxima, as the kernel.
    expected = channel_attention_reference(*exact)
    assert_near(y, expected.detach())
    for got, want in zip(gradients, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        assert_near(got, want, 5e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, hidden", [((1, 1, 1), 1), ((2, 4, 60), 2), ((1, 40, 249), 20), ((3, 7, 4101), 3), ((2, 2, 8196), 40)]
)
def test_channel_attention(emulated: ModuleType, shape: tuple[int, int, int], hidden: int, dtype: torch.dtype) -> None:
    check_channel_attention(emulated, torch.randn(shape).to(dtype), hidden)


def test_channel_attention_of_views_and_of_no_clip(emulated: ModuleType) -> None:
    check_channel_attention(emulated, torch.randn(3, 9, 80)[::2, 1:, 1:60], 3)
    check_channel_attention(emulated, torch.randn(0, 3, 5), 2)


def test_channel_attention_takes_the_first_maximum_and_hands_nan_on(emulated: ModuleType) -> None:
    x = torch.zeros(1, 5, 600)
    x[0, 1, [37, 38, 599]] = 2
    x[0, 2, [401, 500]] = NAN
    x[0, 3] = -math.inf
    n = x.shape[1]
    w, b = torch.zeros(n, n), torch.zeros(n)
    y, gate, pooled, index = torch.empty_like(x), poisoned(1, n), poisoned(2, 1, n), torch.full((1, n), -1)
    emulated.channel_attention(feature(emulated, x), n, *(t.data_ptr() for t in (w, b, w, b, y, gate, pooled, index)))
    assert index.tolist() == [[0, 37, 401, 0, 0]]
    assert torch.isnan(pooled[:, 0, 2]).all() and torch.isnan(gate).all()
    torch.testing.assert_close(F.adaptive_max_pool1d(x, 1)[..., 0], pooled[0], equal_nan=True)


# ---- local_attention


def addresses(*tensors: Tensor) -> list[int]:
    return [t.data_ptr() for t in tensors]


def run_local_attention(
    emulated: ModuleType, x: Tensor, grad: Tensor, values: list[Tensor], segment: int, training: bool
) -> tuple[Tensor, list[Tensor], Tensor]:
    """y, the gradients and the statistics; values: depthwise, norm1's four tensors, conv, norm2's four."""
    depthwise, weight1, bias1, mean1, var1, conv, weight2, bias2, mean2, var2 = values
    batch, n, length = x.shape
    chunks = (length + segment) // (segment // 2) + 1
    parameters = emulated.LocalParameters(
        addresses(depthwise, weight1, bias1, conv, weight2, bias2),
        depthwise.shape[-1],
        conv.shape[-1],
        segment,
        1e-5,
        1e-5,
        training,
    )
    y, attention = poisoned(*x.shape, dtype=x.dtype), poisoned(batch, chunks, segment)
    pooled, index = poisoned(batch, 2, chunks, segment), torch.full((batch, chunks, segment), -1, dtype=torch.int32)
    statistics = poisoned(2, n + 1)
    saved = addresses(attention, pooled, index, statistics)
    source = feature(emulated, x)
    emulated.local_attention(source, parameters, addresses(mean1, var1, mean2, var2), y.data_ptr(), saved)
    assert not torch.isnan(attention).any() and not torch.isnan(statistics).any()
    gradients = [poisoned(*x.shape, dtype=x.dtype)]
    gradients += [poisoned(*t.shape) for t in (depthwise, weight1, bias1, conv, weight2, bias2)]
    emulated.local_attention_backward(feature(emulated, grad), source, parameters, saved, addresses(*gradients))
    return y, gradients, statistics


def check_local_attention(
    emulated: ModuleType, x: Tensor, taps: int, taps2: int, segment: int, training: bool, error: float = 1e-5
) -> None:
    n = x.shape[1]
    values = [torch.randn(n, 1, taps) / 5, torch.rand(n) + 0.5, torch.randn(n) / 4, torch.randn(n) / 4]
    values += [torch.rand(n) + 0.5, torch.randn(1, 2, taps2), torch.rand(1), torch.randn(1), torch.randn(1)]
    values += [torch.rand(1) + 0.5]
    grad = torch.randn(x.shape).to(x.dtype)
    y, gradients, statistics = run_local_attention(emulated, x, grad, values, segment, training)
    exact = [t.double() for t in (x, *values)]
    leaves = [exact[i].requires_grad_() for i in (0, 1, 2, 3, 6, 7, 8)]
    source, depthwise, weight1, bias1, mean1, var1, conv, weight2, bias2, mean2, var2 = exact
    # With momentum 1 the running mean becomes the batch's.
    norm1, norm2 = Norm(weight1, bias1, mean1, var1, 1.0), Norm(weight2, bias2, mean2, var2, 1.0)
    expected = local_attention_reference(source, depthwise, norm1, conv, norm2, segment, training)
    assert_near(y, expected.detach(), error)
    for got, want in zip(gradients, torch.autograd.grad(expected, leaves, grad.double()), strict=True):
        assert_near(got, want, 2 * error)
    if not training:
        assert torch.equal(
            statistics, torch.stack((torch.cat((values[3], values[8])), torch.cat((values[4], values[9]))))
        )
        return
    count = x.shape[0] * ((x.shape[2] + segment) // (segment // 2) + 1) * segment
    mean, var = torch.cat((mean1, mean2)), torch.cat((var1, var2)) * (count - 1) / count
    torch.testing.assert_close(statistics.double(), torch.stack((mean, var)), rtol=error, atol=error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "shape, taps, taps2, segment",
    [
        ((1, 1, 1), 31, 7, 64),
        ((2, 3, 249), 31, 7, 64),
        ((1, 17, 1040), 31, 7, 64),
        ((3, 5, 40), 5, 3, 6),
        ((1, 2, 130), 31, 7, 32),
        ((1, 2, 300), 33, 1, 100),
        ((1, 2, 77), 3, 9, 2),
    ],
)
def test_local_attention(
    emulated: ModuleType,
    shape: tuple[int, int, int],
    taps: int,
    taps2: int,
    segment: int,
    training: bool,
    dtype: torch.dtype,
) -> None:
    check_local_attention(emulated, torch.randn(shape).to(dtype), taps, taps2, segment, training)


def test_local_attention_of_a_view(emulated: ModuleType) -> None:
    check_local_attention(emulated, torch.randn(3, 6, 300)[::2, 1:, 3:284], 31, 7, 64, True)


def test_local_attention_of_silence(emulated: ModuleType) -> None:
    x = torch.zeros(1, 3, 200)
    values = [torch.randn(3, 1, 31), torch.ones(3), torch.zeros(3), torch.zeros(3), torch.ones(3), torch.randn(1, 2, 7)]
    values += [torch.ones(1), torch.zeros(1), torch.zeros(1), torch.ones(1)]
    y, gradients, _ = run_local_attention(emulated, x, torch.randn(x.shape), values, 64, True)
    assert not y.any() and all(torch.isfinite(gradient).all() for gradient in gradients)


def test_moments_of_a_large_mean(emulated: ModuleType) -> None:
    """mean / std = 1000: E[x^2] - mean^2 would lose every digit of the variance.

    The padding's zeros are no part of a large mean, so the moments are tested by themselves, over parts of 31 values.
    """
    x = 1000 + torch.randn(7, 600, 31)
    partial = torch.stack((torch.full((7, 600), 31.0), x.mean(2), x.var(2, correction=0) * 31), 2)
    mean, variance = poisoned(7), poisoned(7)
    emulated.join_moments(partial.data_ptr(), 7, 600, mean.data_ptr(), variance.data_ptr())
    torch.testing.assert_close(mean.double(), x.double().mean((1, 2)), rtol=1e-7, atol=0)
    torch.testing.assert_close(variance.double(), x.double().var((1, 2), correction=0), rtol=1e-5, atol=0)
    # And within a thread and a warp: channels of which only whole chunks are loud.
    loud = torch.zeros(1, 1, 64 * 96)
    loud[0, 0, 64:-64] = 1000 + torch.randn(64 * 94)
    values = [torch.ones(1, 1, 1), torch.ones(1), torch.zeros(1), torch.zeros(1), torch.ones(1), torch.zeros(1, 2, 1)]
    values += [torch.ones(1), torch.zeros(1), torch.zeros(1), torch.ones(1)]
    statistics = run_local_attention(emulated, loud, torch.randn(loud.shape), values, 64, True)[2]
    chunks = F.pad(loud.double(), (64, 64)).unfold(-1, 64, 32)
    torch.testing.assert_close(statistics[1, 0].double(), chunks.var(correction=0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_local_attention_hands_nan_on(emulated: ModuleType, training: bool) -> None:
    x = torch.randn(1, 3, 400)
    x[0, 1, 200] = NAN
    values = [torch.randn(3, 1, 31), torch.ones(3), torch.zeros(3), torch.zeros(3), torch.ones(3), torch.randn(1, 2, 7)]
    values += [torch.ones(1), torch.zeros(1), torch.zeros(1), torch.ones(1)]
    exact = [t.double() for t in (x, *values)]
    norm1, norm2 = Norm(*exact[2:6]), Norm(*exact[7:])
    expected = local_attention_reference(exact[0], exact[1], norm1, exact[6], norm2, 64, training)
    emulated_y = poisoned(1, 3, 400)
    depthwise, weight1, bias1, mean1, var1, conv, weight2, bias2, mean2, var2 = values
    parameters = emulated.LocalParameters(
        addresses(depthwise, weight1, bias1, conv, weight2, bias2), 31, 7, 64, 1e-5, 1e-5, training
    )
    chunks = (400 + 64) // 32 + 1
    saved = torch.zeros(1, chunks, 64), torch.zeros(1, 2, chunks, 64), torch.zeros(1, chunks, 64, dtype=torch.int32)
    statistics = torch.zeros(2, 4)
    running = addresses(mean1, var1, mean2, var2)
    emulated.local_attention(
        feature(emulated, x), parameters, running, emulated_y.data_ptr(), addresses(*saved, statistics)
    )
    assert torch.equal(torch.isnan(emulated_y), torch.isnan(expected))
    torch.testing.assert_close(emulated_y.double(), expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_local_attention_says_what_it_cannot_take(emulated: ModuleType) -> None:
    assert emulated.local_attention_limit(64, 31) is None and emulated.local_attention_limit(256, 31) is None
    assert "256" in emulated.local_attention_limit(258, 31)
    assert "taps" in emulated.local_attention_limit(64, 1001)
