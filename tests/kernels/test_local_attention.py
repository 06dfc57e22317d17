import math

import pytest
import torch
from torch import Tensor

from mvat.kernels import Norm, local_attention
from mvat.kernels.local_attention import local_attention_reference


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


@pytest.mark.parametrize("training", [False, True])
def test_silence_and_extremes(training: bool) -> None:
    _, *rest = arguments((1, 3, 1), 16, training, torch.float32)
    assert not local_attention(torch.zeros(1, 3, 200), *rest).any()
    for scale in (1e-30, 1e15):
        x = (scale * torch.randn(1, 3, 200)).requires_grad_()
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
