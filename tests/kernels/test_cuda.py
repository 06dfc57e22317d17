"""The CUDA and Triton kernels on a GPU: against float64, for every dtype, layout and mode; skipped where none is."""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mvat.kernels import (
    Norm,
    attention_map,
    attention_transfer_loss,
    backend,
    channel_attention,
    global_attention,
    local_attention,
    native,
)
from mvat.kernels.attention_map import attention_map_reference
from mvat.kernels.attention_transfer_loss import attention_transfer_loss_reference
from mvat.kernels.channel_attention import channel_attention_reference
from mvat.kernels.global_attention import absorb, global_attention_reference
from mvat.kernels.local_attention import local_attention_reference

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        native.missing("attention_map", "cuda") is not None, reason=f"{native.missing('attention_map', 'cuda')}"
    ),
]

DEVICE = "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# n and T of base's encoders and decoders at 4 s, and odd ones.
SHAPES = [(2, 40, 16000), (1, 20, 64084), (4, 320, 249), (2, 4, 4001), (1, 1, 1), (3, 7, 59), (0, 5, 64)]


class Case(NamedTuple):
    """An op as a function of one list of tensors: first its features, then its parameters, then running statistics."""

    fused: Callable[[list[Tensor]], Tensor]
    reference: Callable[[list[Tensor]], Tensor]
    make: Callable[[tuple[int, int, int]], list[Tensor]]
    features: int
    constants: int = 0  # how many tensors at the end take no gradient


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.float64) * scale


def make_channel(shape: tuple[int, int, int]) -> list[Tensor]:
    n, hidden = shape[1], max(1, shape[1] // 2)
    shapes = ((hidden, n), (hidden,), (n, hidden), (n,))
    return [random(*shape), *(random(*s, scale=1 / (n + 4)) for s in shapes)]


def make_local(shape: tuple[int, int, int]) -> list[Tensor]:
    n = shape[1]
    statistics = [random(n, scale=0.2), random(n).abs() + 0.5, random(1), random(1).abs() + 0.5]
    parameters = [random(n, 1, 31, scale=0.2), random(n).abs() + 0.5, random(n), random(1, 2, 7), random(1), random(1)]
    return [random(*shape), *parameters, *statistics]


def local(function: Callable[..., Tensor], training: bool) -> Callable[[list[Tensor]], Tensor]:
    def call(v: list[Tensor]) -> Tensor:
        running = [t.clone() for t in v[7:]]
        norm1, norm2 = Norm(v[2], v[3], running[0], running[1]), Norm(v[5], v[6], running[2], running[3], 0.01)
        return function(v[0], v[1], norm1, v[4], norm2, 64, training)

    return call


def make_global(shape: tuple[int, int, int], segment_len: int = 64) -> list[Tensor]:
    return [random(*shape), *(random(segment_len, segment_len, scale=segment_len**-0.5) for _ in range(4))]


def loss(function: Callable[..., Tensor], form: str) -> Callable[[list[Tensor]], Tensor]:
    return lambda v: function(v[:2], v[2:], form=form, reduction="none")


def make_loss(shape: tuple[int, int, int]) -> list[Tensor]:
    b, n, t = shape
    return [random(b, 4, t), random(b, n, t), random(b, n, t), random(b, 2 * n, t)]


CASES = {
    "attention_map": Case(
        lambda v: attention_map(v[0]), lambda v: attention_map_reference(v[0]), lambda s: [random(*s)], 1
    ),
    "loss, paper": Case(
        loss(attention_transfer_loss, "paper"), loss(attention_transfer_loss_reference, "paper"), make_loss, 4, 2
    ),
    "loss, code": Case(
        loss(attention_transfer_loss, "code"), loss(attention_transfer_loss_reference, "code"), make_loss, 4, 2
    ),
    "channel_attention": Case(
        lambda v: channel_attention(*v), lambda v: channel_attention_reference(*v), make_channel, 1
    ),
    "global_attention": Case(lambda v: global_attention(*v), lambda v: global_attention_reference(*v), make_global, 1),
    "global_attention, chunks of 32": Case(
        lambda v: global_attention(*v, 1, 32),
        lambda v: global_attention_reference(*v, 1, 32),
        lambda s: make_global(s, 32),
        1,
    ),
    "local_attention, training": Case(
        local(local_attention, True), local(local_attention_reference, True), make_local, 1, 4
    ),
    "local_attention, evaluation": Case(
        local(local_attention, False), local(local_attention_reference, False), make_local, 1, 4
    ),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def forward_backward(
    function: Callable[[list[Tensor]], Tensor], case: Case, tensors: list[Tensor], grad: Tensor | None = None
) -> list[Tensor]:
    """The result and the gradients of everything that takes one. grad: float64, for the result; by default ones."""
    count = len(tensors) - case.constants
    leaves = [t.detach().requires_grad_(i < count) for i, t in enumerate(tensors)]
    y = function(leaves)
    upper = torch.ones_like(y) if grad is None else grad.to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves[:count], upper)]


def cast(case: Case, tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Features in dtype; parameters and statistics in float32."""
    return [t.to(dtype if i < case.features else torch.float32) for i, t in enumerate(tensors)]


def autocast(dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(DEVICE, dtype)


@each_case
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_exact_as_eager(case: Case, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """float32 parameters throughout: for half precision this is what autocast hands over."""
    if shape[0] == 0 and case is CASES["local_attention, training"]:
        pytest.skip("no batch, no statistics")
    tensors = cast(case, case.make(shape), dtype)
    doubles = [t.double() for t in tensors]
    grad = torch.randn_like(case.reference(doubles))
    exact = forward_backward(case.reference, case, doubles, grad)
    with autocast(dtype):
        eager = forward_backward(case.reference, case, tensors, grad)
        with backend.use_backend("fused"):
            got = forward_backward(case.fused, case, tensors, grad)
    for i, (a, b, c) in enumerate(zip(got, eager, exact, strict=True)):
        assert a.shape == c.shape and torch.isfinite(a).all()
        rounding = torch.finfo(a.dtype).eps * c.norm() + torch.finfo(a.dtype).tiny * a.numel() ** 0.5
        assert (a - c).norm() <= 2 * (b - c).norm() + rounding, i


@each_case
def test_layouts(case: Case) -> None:
    """Features that are not contiguous give what their copies give."""
    tensors = cast(case, case.make((4, 6, 400)), torch.float32)
    views = [
        lambda t: t[::2, :, 3:300],
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: t[..., ::2],
        lambda t: t[:1].expand(3, -1, -1),
        lambda t: t.flip(0).neg(),
    ]
    for view in views:
        features = [view(t) for t in tensors[: case.features]]
        with backend.use_backend("fused"):
            got = case.fused(features + tensors[case.features :])
            want = case.fused([t.contiguous().clone() for t in features] + tensors[case.features :])
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@each_case
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_are_equal_to_the_bit(case: Case, dtype: torch.dtype) -> None:
    tensors = cast(case, case.make((4, 40, 4001)), dtype)
    with autocast(dtype), backend.use_backend("fused"):
        one, two = (forward_backward(case.fused, case, tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@each_case
def test_compile(case: Case) -> None:
    torch._dynamo.reset()
    tensors = cast(case, case.make((2, 6, 130)), torch.float32)
    compiled = torch.compile(case.fused, fullgraph=True, backend="aot_eager")
    with backend.use_backend("fused"):
        for a, b in zip(
            forward_backward(compiled, case, tensors), forward_backward(case.fused, case, tensors), strict=True
        ):
            torch.testing.assert_close(a, b)


@each_case
def test_another_stream_and_a_captured_graph(case: Case) -> None:
    """Every launch goes to the current stream: a CUDA graph holds them all."""
    if "training" in next(name for name, value in CASES.items() if value is case):
        pytest.skip("the running statistics are the caller's")
    tensors = cast(case, case.make((2, 6, 400)), torch.float32)
    with backend.use_backend("fused"), torch.no_grad():
        want = case.fused(tensors)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            case.fused(tensors)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = case.fused(tensors)
        graph.replay()
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5, 130), (0, 5, 130)])
def test_opcheck(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    ops = torch.ops.mvat
    x, grad = random(*shape).to(dtype), random(*shape).to(dtype)
    wide = random(shape[0], shape[2]).float()
    torch.library.opcheck(ops.attention_map, (x.clone().requires_grad_(), 2.0))
    torch.library.opcheck(ops.attention_map_backward, (wide, x, 2.0))

    students, teachers = [x, wide.to(dtype)], [grad, x]
    values, maps, scalars = ops.attention_transfer_loss(students, teachers, 2.0, True)
    torch.library.opcheck(ops.attention_transfer_loss, (students, teachers, 2.0, True))
    torch.library.opcheck(
        ops.attention_transfer_loss_backward, (torch.ones_like(values), students, maps, scalars, 2.0, True)
    )

    weights = [t.float() for t in make_channel(shape)[1:]]
    torch.library.opcheck(ops.channel_attention, (x.clone().requires_grad_(), *weights))
    _, gate, pooled, index = ops.channel_attention(x, *weights)
    torch.library.opcheck(ops.channel_attention_backward, (grad, x, gate, pooled, index, *weights[:3]))

    depthwise, weight1, bias1, conv, weight2, bias2, mean1, var1, mean2, var2 = (
        t.float() for t in make_local(shape)[1:]
    )
    for training in (False, True):
        inputs = (depthwise, weight1, bias1, mean1, var1, conv, weight2, bias2, mean2, var2, 64, 1e-5, 1e-5, training)
        torch.library.opcheck(ops.local_attention, (x.clone().requires_grad_(), *inputs))
        saved = ops.local_attention(x, *inputs)[1:]
        inputs = (grad, x, depthwise, weight1, bias1, conv, weight2, *saved, 64, 1e-5, 1e-5, training)
        torch.library.opcheck(ops.local_attention_backward, inputs)

    a, m = absorb(*(t.float() for t in make_global(shape)[1:]), 1)
    torch.library.opcheck(ops.global_attention, (x.clone().requires_grad_(), a, m, 64, True))
    saved = ops.global_attention(x, a, m, 64, True)[1:]
    torch.library.opcheck(ops.global_attention_backward, (grad, x, a, m, *saved, 64))


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("length", [1, 249, 1002, 4001, 64084])
def test_global_attention_by_float32_precision(length: int, precision: str) -> None:
    """Every plan, with keys split where there is one sequence; tf32's products against those of cuBLAS."""
    case, before = CASES["global_attention"], torch.get_float32_matmul_precision()
    tensors = cast(case, make_global((1, 1, length)), torch.float32)
    doubles = [t.double() for t in tensors]
    grad = torch.randn_like(doubles[0])
    exact = forward_backward(case.reference, case, doubles, grad)
    try:
        torch.set_float32_matmul_precision(precision)
        with backend.use_backend("fused"):
            got = forward_backward(case.fused, case, tensors, grad)
    finally:
        torch.set_float32_matmul_precision(before)
    bound = {"highest": 2e-6, "high": 2e-3}[precision]
    for i, (a, c) in enumerate(zip(got, exact, strict=True)):
        assert (a - c).norm() <= bound * c.norm(), i


def test_global_attention_takes_memory_of_the_length() -> None:
    """P = 15005: one map of scores would take 450 MB in bfloat16. Split keys leave sums in float32."""
    x, *weights = (t.to(torch.bfloat16).requires_grad_() for t in make_global((1, 1, 480_084)))
    size = x.numel() * x.itemsize
    for backward, bound in ((False, 12), (True, 24)):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.set_grad_enabled(backward), backend.use_backend("fused"):
            y = global_attention(x, *weights)
            if backward:
                torch.autograd.grad(y.sum(), [x, *weights])
        assert torch.cuda.max_memory_allocated() - before <= bound * size + 2**24


def test_global_attention_says_what_it_cannot_take() -> None:
    x = random(1, 2, 100).float()
    weights = [torch.randn(s, device=DEVICE) for s in [(256, 64)] * 3 + [(64, 256)]]
    with (
        backend.use_backend("fused"),
        pytest.raises(RuntimeError, match="takes one head and a segment_len of 32 or 64"),
    ):
        global_attention(x, *weights, heads=2)
    with backend.use_backend("auto"):
        y = global_attention(x, *weights, heads=2)
    torch.testing.assert_close(y, global_attention_reference(x, *weights, 2))


def test_silence_equal_maps_and_nan() -> None:
    x = random(2, 5, 100).float()
    silence = torch.zeros_like(x).requires_grad_()
    equal = x.clone().requires_grad_()
    with backend.use_backend("fused"):
        attention_transfer_loss([silence, equal], [x, x]).backward()
        assert silence.grad is not None and not silence.grad.any()
        assert equal.grad is not None and not equal.grad.any()
        x[1, 2, 3] = float("nan")
        assert torch.isnan(attention_transfer_loss([x], [equal.detach()]))
        assert torch.isnan(attention_map(x)).sum() == 1
        weights = [t.float() for t in make_channel((2, 5, 100))[1:]]
        assert torch.isnan(channel_attention(x, *weights)[1]).all()


def test_the_first_of_equal_maxima_gets_the_gradient() -> None:
    x = torch.zeros(1, 2, 9000, device=DEVICE)
    x[0, :, [4095, 4096, 8999]] = 1
    weights = [t.float() for t in make_channel((1, 2, 9000))[1:]]
    _, gate, pooled, index = torch.ops.mvat.channel_attention(x, *weights)
    assert index.tolist() == [[4095, 4095]] and pooled[0].tolist() == [[1, 1]]


def test_what_the_kernels_cannot_take_is_said() -> None:
    x = random(1, 2, 100)
    with pytest.raises(RuntimeError, match="expected float32, bfloat16 or float16"):
        torch.ops.mvat.attention_map(x, 2.0)
    with pytest.raises(RuntimeError, match="finite p >= 1"):
        torch.ops.mvat.attention_map(x.float(), 0.5)
