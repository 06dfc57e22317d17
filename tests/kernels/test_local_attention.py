import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mvat.kernels import Norm, backend, local_attention, native
from mvat.kernels.local_attention import local_attention_reference

needs_kernel = pytest.mark.skipif(
    native.missing("local_attention") is not None, reason=f"no kernel: {native.missing('local_attention')}"
)
LEAVES = (0, 1, 2, 3, 6, 7, 8)  # of the eleven tensors: all but the running statistics


def norm(channels: int, dtype=torch.float64, momentum: float = 0.1, eps: float = 1e-5) -> Norm:
    values = [torch.rand(channels), torch.randn(channels), torch.randn(channels), torch.rand(channels) + 0.5]
    return Norm(*(v.to(dtype) for v in values), momentum, eps)


def arguments(shape: tuple[int, int, int], segment: int = 64, training: bool = False, dtype=torch.float64) -> list:
    n = shape[1]
    x, depthwise = torch.randn(shape, dtype=dtype), torch.randn(n, 1, 31, dtype=dtype) / 5
    return [x, depthwise, norm(n, dtype), torch.randn(1, 2, 7, dtype=dtype), norm(1, dtype, 0.01), segment, training]


def conv(row: Tensor, kernel: Tensor) -> Tensor:
    """row [C] with zeros at its own ends, correlated with an odd kernel."""
    reach = len(kernel) // 2
    padded = torch.cat((row.new_zeros(reach), row, row.new_zeros(reach)))
    return torch.stack([(padded[i : i + len(kernel)] * kernel).sum() for i in range(len(row))])


def normalise(rows: list[Tensor], norm: Norm, channel: int, training: bool) -> list[Tensor]:
    """All rows of one channel; in training by their own statistics, and the running ones are moved."""
    mean, var = norm.running_mean[channel].clone(), norm.running_var[channel].clone()
    if training:
        values = torch.cat(rows)
        mean, var = values.mean(), values.var(unbiased=False)
        norm.running_mean[channel] += norm.momentum * (mean.detach() - norm.running_mean[channel])
        norm.running_var[channel] += norm.momentum * (values.detach().var() - norm.running_var[channel])
    return [(r - mean) / torch.sqrt(var + norm.eps) * norm.weight[channel] + norm.bias[channel] for r in rows]


def formula(
    x: Tensor, depthwise: Tensor, norm1: Norm, kernel: Tensor, norm2: Norm, segment: int, training: bool
) -> Tensor:
    batch, n, length = x.shape
    hop, silence = segment // 2, x.new_zeros(batch, n, segment)
    padded = torch.cat((silence, x, silence), 2)
    places = [(b, i * hop) for b in range(batch) for i in range(math.floor((length + segment) / hop) + 1)]
    u = []
    for c in range(n):
        rows = [conv(padded[b, c, start : start + segment], depthwise[c, 0]) for b, start in places]
        u.append([r / (1 + torch.exp(-r)) for r in normalise(rows, norm1, c, training)])
    rows = []
    for features in zip(*u, strict=True):
        stacked = torch.stack(features)
        rows.append(conv(stacked.max(0).values, kernel[0, 0]) + conv(stacked.mean(0), kernel[0, 1]))
    y = torch.zeros(batch, n, length + 3 * segment, dtype=x.dtype)
    for (b, start), row in zip(places, normalise(rows, norm2, 0, training), strict=True):
        piece = padded[b, :, start : start + segment] / (1 + torch.exp(-row))
        y[b, :, start : start + segment] += piece / 2
    return y[..., segment : segment + length]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "shape, segment", [((1, 1, 1), 64), ((2, 2, 59), 64), ((1, 7, 127), 32), ((1, 2, 401), 64), ((3, 4, 6), 6)]
)
def test_matches_the_formula(shape: tuple[int, int, int], segment: int, training: bool) -> None:
    values = arguments(shape, segment, training)
    copies = [Norm(*(t.clone() for t in v[:4]), *v[4:]) if isinstance(v, Norm) else v for v in values]
    torch.testing.assert_close(local_attention(*values), formula(*copies), rtol=1e-11, atol=1e-12)
    for ours, theirs in zip(values, copies, strict=True):
        if isinstance(ours, Norm):
            torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-11, atol=1e-12)


def test_evaluation_leaves_the_statistics_alone() -> None:
    values = arguments((2, 3, 100), 16)
    before = [t.clone() for v in values if isinstance(v, Norm) for t in v[:4]]
    local_attention(*values)
    after = [t for v in values if isinstance(v, Norm) for t in v[:4]]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("length", [1, 31, 32, 33, 1023, 4001])
def test_float32_and_any_length(length: int) -> None:
    values = arguments((1, 3, length))
    single = [Norm(*(t.float() for t in v[:4])) if isinstance(v, Norm) else v for v in values]
    single = [v.float() if isinstance(v, Tensor) else v for v in single]
    got, exact = local_attention(*single), local_attention(*values)
    assert got.dtype == torch.float32
    assert (got - exact).norm() <= 1e-5 * exact.norm()


def test_it_is_a_mask() -> None:
    """Design, point 4: y[b, c, t] = x[b, c, t] m[b, t] with one m, 0 < m < 1, for all channels."""
    values = arguments((2, 4, 333), 32)
    x = values[0]
    mask = formula(*values) / x
    assert (mask > 0).all() and (mask < 1).all()
    torch.testing.assert_close(mask, mask[:, :1].expand_as(mask), rtol=0, atol=1e-12)
    torch.testing.assert_close(local_attention(*values) / x, mask, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", ["sliced", "transposed", "every second", "expanded"])
def test_views(layout: str) -> None:
    _, *rest = arguments((2, 3, 1), 16)
    x = {
        "sliced": torch.randn(4, 5, 70, dtype=torch.float64)[1:3, 1:-1, 3:],
        "transposed": torch.randn(2, 59, 3, dtype=torch.float64).transpose(1, 2),
        "every second": torch.randn(2, 3, 60, dtype=torch.float64)[..., ::2],
        "expanded": torch.randn(2, 1, 59, dtype=torch.float64).expand(2, 3, 59),
    }[layout]
    torch.testing.assert_close(local_attention(x, *rest), formula(x, *rest), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(2, 2, 5), (1, 1, 3)])
def test_gradcheck(shape: tuple[int, int, int], training: bool) -> None:
    x, depthwise, norm1, kernel, norm2, *_ = arguments(shape)
    depthwise, kernel = depthwise[..., 13:18], kernel[..., 2:5]  # any odd kernel will do
    tensors = [t.clone().requires_grad_() for t in (x, depthwise, *norm1[:2], kernel, *norm2[:2])]

    def function(x, depthwise, weight1, bias1, kernel, weight2, bias2):
        first, second = Norm(weight1, bias1, *norm1[2:]), Norm(weight2, bias2, *norm2[2:])
        return local_attention(x, depthwise, first, kernel, second, 4, training)

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(0, 3, 50), (2, 3, 0)])
def test_empty(shape: tuple[int, int, int], training: bool) -> None:
    values = arguments(shape, 16, training)
    y = local_attention(values[0].requires_grad_(), *values[1:])
    y.sum().backward()
    assert y.shape == values[0].grad.shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [False, True])
def test_silence_and_extremes(training: bool, dtype: torch.dtype) -> None:
    _, *rest = arguments((1, 3, 1), 16, training, dtype)
    assert not local_attention(torch.zeros(1, 3, 200, dtype=dtype), *rest).any()
    for scale in (1e-30, 1e4, 1e15):
        x = (scale * torch.randn(1, 3, 200, dtype=dtype)).requires_grad_()
        y = local_attention(x, *rest)
        y.sum().backward()
        assert torch.isfinite(y).all() and y.any() and torch.isfinite(x.grad).all()


def test_gradients_with_and_without_grad_mode_agree_on_the_value() -> None:
    """The maximum is taken in another form where no gradient is asked for."""
    values = arguments((2, 3, 100), 16)
    with torch.no_grad():
        without = local_attention_reference(*values)
    assert torch.equal(without, local_attention_reference(values[0].requires_grad_(), *values[1:]).detach())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_under_autocast(dtype: torch.dtype, training: bool) -> None:
    values = arguments((2, 3, 127), 16, training, torch.float32)
    half = values[0].to(dtype).requires_grad_()
    exact = local_attention(half.detach().float(), *values[1:])
    with torch.autocast("cpu", dtype):
        y = local_attention(half, *values[1:])
    y.sum().backward()
    assert y.dtype == half.grad.dtype == dtype and values[2].running_mean.dtype == torch.float32
    assert (y - exact).norm() <= 0.05 * exact.norm()


@pytest.mark.parametrize("training", [False, True])
def test_compile(training: bool) -> None:
    torch._dynamo.reset()
    values = arguments((2, 3, 127), 16, training)
    copies = [Norm(*(t.clone() for t in v[:4]), *v[4:]) if isinstance(v, Norm) else v for v in values]
    compiled = torch.compile(local_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*values), local_attention(*copies))
    torch.testing.assert_close(values[2].running_var, copies[2].running_var)
    leaves = [values[0].requires_grad_(), values[1].requires_grad_()]
    for got, expected in zip(
        torch.autograd.grad(compiled(*values).square().sum(), leaves),
        torch.autograd.grad(local_attention(*values).square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


def flat(values: list) -> list[Tensor]:
    """The eleven tensors of `arguments`, as the operator takes them."""
    return [values[0], values[1], *values[2][:4], values[3], *values[4][:4]]


def forward_backward(function, tensors: list[Tensor], segment: int, training: bool, grad: Tensor) -> list[Tensor]:
    """y, the gradients of all seven leaves, and the running statistics as they are left behind."""
    t = [v.detach().clone(memory_format=torch.preserve_format) for v in tensors]
    for i in LEAVES:
        t[i].requires_grad_()
    y = function(t[0], t[1], Norm(*t[2:6]), t[6], Norm(*t[7:11], 0.01), segment, training)
    gradients = torch.autograd.grad(y, [t[i] for i in LEAVES], grad.to(y.dtype))
    return [y.detach(), *gradients, *(t[i] for i in (4, 5, 9, 10))]


def fused(*values) -> Tensor:
    with backend.use_backend("fused"):
        return local_attention(*values)


def assert_as_exact_as_eager(shape: tuple[int, int, int], segment: int, training: bool, mean: float = 0) -> None:
    """Everything in float32, over four draws: error against float64 at most twice the reference's, beside roundings."""
    fused_error, eager_error, scale = torch.zeros(3, 12, dtype=torch.float64)
    for _ in range(4):
        t = flat(arguments(shape, segment, training))
        t[0] += mean
        # As trained: the running statistics are the batch's.
        local_attention_reference(t[0], t[1], Norm(*t[2:6], 1.0), t[6], Norm(*t[7:11], 1.0), segment, True)
        tensors, grad = [v.float() for v in t], torch.randn(shape)
        wants = forward_backward(local_attention_reference, [t.double() for t in tensors], segment, training, grad)
        gots = forward_backward(fused, tensors, segment, training, grad)
        eagers = forward_backward(local_attention_reference, tensors, segment, training, grad)
        for place, (got, eager, want) in enumerate(zip(gots, eagers, wants, strict=True)):
            assert got.shape == want.shape and got.dtype == torch.float32 and torch.isfinite(got).all()
            fused_error[place] += (got - want).square().sum()
            eager_error[place] += (eager - want).square().sum()
            scale[place] += want.square().sum()
    rounding = 4 * torch.finfo(torch.float32).eps * scale.sqrt()
    assert (fused_error.sqrt() <= 2 * eager_error.sqrt() + rounding).all(), (fused_error / eager_error).sqrt()


@needs_kernel
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "shape, segment",
    [
        ((16, 4, 1), 64),
        ((3, 7, 59), 64),
        ((2, 20, 1023), 32),
        ((1, 20, 4001), 64),
        ((1, 320, 249), 64),
        ((2, 3, 333), 10),
    ],
)
def test_as_exact_as_eager(shape: tuple[int, int, int], segment: int, training: bool) -> None:
    assert_as_exact_as_eager(shape, segment, training)


@needs_kernel
@pytest.mark.parametrize("training", [False, True])
def test_as_exact_as_eager_far_from_zero(training: bool) -> None:
    assert_as_exact_as_eager((2, 20, 2000), 64, training, 1000)


@needs_kernel
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(0, 1200)),
    st.integers(1, 40),
    st.tuples(st.integers(0, 20), st.integers(0, 5)),
    st.booleans(),
    st.integers(0, 2),
)
def test_any_shape_kernel_and_layout(
    shape: tuple[int, int, int], half: int, reaches: tuple[int, int], training: bool, layout: int
) -> None:
    (batch, n, length), (reach, reach2) = shape, reaches
    tensors = flat(arguments(shape))
    if layout == 1:
        tensors[0] = torch.randn(batch + 1, n + 2, length + 5, dtype=torch.float64)[1:, 1:-1, 3:-2]
    elif layout == 2:
        tensors[0] = torch.randn(batch, length, n, dtype=torch.float64).transpose(1, 2)
    tensors[1] = torch.randn(n, 1, 2 * reach + 1, dtype=torch.float64)
    tensors[6] = torch.randn(1, 2, 2 * reach2 + 1, dtype=torch.float64)
    grad = torch.randn(batch, n, length, dtype=torch.float64)
    for got, want in zip(
        forward_backward(fused, tensors, 2 * half, training, grad),
        forward_backward(local_attention_reference, tensors, 2 * half, training, grad),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


@needs_kernel
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("view", ["every second sample", "expanded", "flipped batch", "negative bit"])
def test_views_and_their_gradients(view: str, training: bool) -> None:
    x = {
        "every second sample": lambda: torch.randn(2, 5, 118, dtype=torch.float64)[..., ::2],
        "expanded": lambda: torch.randn(2, 1, 59, dtype=torch.float64).expand(2, 5, 59),
        "flipped batch": lambda: torch.randn(5, 2, 59, dtype=torch.float64).flip(0).transpose(0, 1),
        "negative bit": lambda: torch.view_as_complex(torch.randn(2, 5, 59, 2, dtype=torch.float64)).conj().imag,
    }[view]()
    _, *rest = arguments((2, 5, 59), 16, training)
    copies = [Norm(*(t.clone() for t in v[:4]), *v[4:]) if isinstance(v, Norm) else v for v in rest]
    grad = torch.randn(2, 59, 5, dtype=torch.float64).transpose(1, 2)
    x.requires_grad_()
    got, want = fused(x, *rest), local_attention_reference(x, *copies)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, x, grad), torch.autograd.grad(want, x, grad))


@needs_kernel
def test_the_maximum_goes_to_the_first_of_equal_channels() -> None:
    tensors = flat(arguments((1, 3, 200), 16))
    tensors[0] = tensors[0][:, :1].expand(1, 3, 200)
    for i in (1, 2, 3, 4, 5):
        tensors[i] = tensors[i][:1].expand_as(tensors[i])
    grad = torch.randn(1, 3, 200, dtype=torch.float64)
    got = forward_backward(fused, tensors, 16, False, grad)
    for a, b in zip(got, forward_backward(local_attention_reference, tensors, 16, False, grad), strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.equal(got[2][0], got[2][1]) and torch.equal(got[2][1], got[2][2])


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_is_handed_on(dtype: torch.dtype) -> None:
    values = arguments((2, 3, 300), 16, dtype=dtype)
    values[0][1, 1, 100] = math.nan
    got, eager = fused(*values), local_attention_reference(*values)
    assert torch.equal(got.isnan(), eager.isnan()) and 3 < got.isnan().sum() < 200
    torch.testing.assert_close(got, eager, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert fused(*values[:-1], True).isnan().all()


@needs_kernel
@pytest.mark.parametrize("training", [False, True])
def test_the_thread_count_changes_nothing(training: bool) -> None:
    tensors = [t.float() for t in flat(arguments((2, 7, 4001), 64, training))]
    grad, results = torch.randn(2, 7, 4001), []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(forward_backward(fused, tensors, 64, training, grad))
    torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 5, 33), (0, 5, 33), (2, 5, 0)])
def test_opcheck(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    for training in (False, True):
        tensors = flat(arguments(shape, 16, training, dtype))
        rest = (16, 1e-5, 1e-5, training)
        for i in LEAVES:
            tensors[i].requires_grad_()
        torch.library.opcheck(torch.ops.mvat.local_attention, (*tensors, *rest))
        tensors = [t.detach() for t in tensors]
        _, *saved = torch.ops.mvat.local_attention(*tensors, *rest)
        parameters = [tensors[i] for i in (1, 2, 3, 6, 7)]
        inputs = (torch.randn(shape, dtype=dtype), tensors[0], *parameters, *saved, *rest)
        torch.library.opcheck(torch.ops.mvat.local_attention_backward, inputs)


@needs_kernel
def test_compile_with_inductor_calls_the_kernel() -> None:
    torch._dynamo.reset()
    values = arguments((2, 3, 127), 16, dtype=torch.float32)
    with torch.no_grad(), torch.profiler.profile() as profile:
        got = torch.compile(local_attention, fullgraph=True)(*values)
    torch.testing.assert_close(got, local_attention_reference(*values))
    assert "mvat::local_attention" in {event.key for event in profile.key_averages()}


@needs_kernel
def test_a_second_derivative_is_refused() -> None:
    values = arguments((1, 3, 20), 16)
    x = values[0].requires_grad_()
    (dx,) = torch.autograd.grad(fused(*values).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative is not supported by the fused kernel"):
        dx.sum().backward()
    with backend.use_backend("eager"):
        (dx,) = torch.autograd.grad(local_attention(*values).sum(), x, create_graph=True)
    dx.sum().backward()


@needs_kernel
@pytest.mark.parametrize("training", [False, True])
def test_inference_mode_and_deterministic_algorithms(training: bool) -> None:
    values = arguments((1, 3, 50), 16, training)
    copies = [Norm(*(t.clone() for t in v[:4]), *v[4:]) if isinstance(v, Norm) else v for v in values]
    torch.use_deterministic_algorithms(True)
    try:
        with torch.inference_mode():
            torch.testing.assert_close(fused(*values), local_attention_reference(*copies))
    finally:
        torch.use_deterministic_algorithms(False)


@needs_kernel
@pytest.mark.parametrize("training", [False, True])
def test_an_empty_batch_leaves_the_statistics_as_the_reference_does(training: bool) -> None:
    tensors = flat(arguments((0, 3, 50), 16))
    grad = torch.empty(0, 3, 50, dtype=torch.float64)
    got = forward_backward(fused, tensors, 16, training, grad)
    for a, b in zip(got, forward_backward(local_attention_reference, tensors, 16, training, grad), strict=True):
        torch.testing.assert_close(a, b)


@needs_kernel
@pytest.mark.parametrize("training", [False, True])
def test_autocast_leaves_float32_to_the_kernel(training: bool) -> None:
    values = arguments((2, 3, 127), 16, training, torch.float32)
    outside = fused(*values)
    values[1], values[3] = values[1].bfloat16().requires_grad_(), values[3].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = fused(*values)
    y.sum().backward()
    assert y.dtype == torch.float32 and values[1].grad.dtype == torch.bfloat16
    torch.testing.assert_close(y, outside, rtol=0.1, atol=0.1)


@needs_kernel
def test_half_precision_has_no_kernel_here() -> None:
    values = arguments((1, 3, 20), 16, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="torch.bfloat16 on cpu no fused kernel is written yet"):
        fused(*values)


@needs_kernel
def test_running_statistics_of_another_dtype() -> None:
    values = arguments((1, 3, 200), 16, True, torch.float32)
    values[2] = values[2]._replace(running_mean=torch.zeros(3).double(), running_var=torch.ones(3).double())
    fused(*values)
    assert values[2].running_mean.dtype == torch.float64 and values[2].running_mean.any()


FLOAT = norm(3, torch.float32)


@pytest.mark.parametrize(
    "place, value, error, message",
    [
        (0, None, TypeError, "x must be a tensor, got NoneType"),
        (0, torch.zeros(3, 9), ValueError, r"x must have shape \[B, n, T\], got \[3, 9\]"),
        (0, torch.zeros(1, 0, 9), ValueError, r"x must have at least one channel, got shape \[1, 0, 9\]"),
        (1, torch.zeros(3, 1, 30), ValueError, r"depthwise_weight must have an odd kernel, got shape \[3, 1, 30\]"),
        (1, torch.zeros(2, 1, 31), ValueError, r"depthwise_weight must have shape \[3, 1, 31\], got \[2, 1, 31\]"),
        (1, torch.zeros(()), ValueError, r"depthwise_weight must have shape .*, got \[\]"),
        (2, FLOAT.weight, TypeError, r"norm1 must be a tuple \(weight, bias, .*\), got Tensor"),
        (2, FLOAT._replace(bias=None), TypeError, "norm1.bias must be a tensor, got NoneType"),
        (2, FLOAT._replace(running_mean=torch.zeros(2)), ValueError, r"norm1.running_mean must have shape \[3\]"),
        (2, FLOAT._replace(running_var=torch.zeros(3, device="meta")), ValueError, "running_var must be on .* cpu"),
        (3, torch.zeros(1, 3, 7), ValueError, r"conv_weight must have shape \[1, 2, 7\], got \[1, 3, 7\]"),
        (3, torch.zeros(1, 2, 7).double(), TypeError, "conv_weight must have the input's dtype torch.float32"),
        (4, FLOAT, ValueError, r"norm2.weight must have shape \[1\], got \[3\]"),
        (5, 15, ValueError, "segment_len must be an even integer of at least 2, got 15"),
    ],
)
def test_bad_input_is_named(place: int, value: object, error: type[Exception], message: str) -> None:
    values = arguments((1, 3, 20), 16, dtype=torch.float32)
    values[place] = value
    with pytest.raises(error, match=f"^local_attention: .*{message}"):
        local_attention(*values)


@needs_kernel
@pytest.mark.parametrize(
    "place, value, message",
    [
        (0, torch.randn(3, 20), r"expected x \[B, n, T\] with n >= 1"),
        (0, torch.randn(1, 3, 20).half(), "expected float32 or float64"),
        (1, torch.randn(3, 1, 4), r"expected depthwise \[n, 1, K\], K odd"),
        (2, torch.randn(2), "expected 3 elements in weight1, got 2"),
        (5, torch.randn(3).double(), "in var1, .* or another dtype"),
        (6, torch.randn(1, 1, 7), r"expected conv \[1, 2, K\], K odd"),
        (11, 15, "expected an even segment_len >= 2, got 15"),
    ],
)
def test_the_operator_itself_checks_its_input(place: int, value: object, message: str) -> None:
    values = [*flat(arguments((1, 3, 20), 16, dtype=torch.float32)), 16, 1e-5, 1e-5, False]
    values[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.mvat.local_attention(*values)
