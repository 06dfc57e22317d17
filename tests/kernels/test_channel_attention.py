import pytest
import torch
from torch import Tensor

from mvat.kernels import channel_attention


def arguments(batch: int, n: int, length: int, hidden: int | None = None, dtype=torch.float64) -> list[Tensor]:
    hidden = n // 2 if hidden is None else hidden
    shapes = (batch, n, length), (hidden, n), (hidden,), (n, hidden), (n,)
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def formula(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    def fc(v: Tensor) -> Tensor:
        return w2 @ torch.clamp(w1 @ v + b1, min=0) + b2

    clips = []
    for clip in x.double():
        largest = torch.stack([max(row) for row in clip])
        mean = torch.stack([sum(row) / len(row) for row in clip])
        gate = 1 / (1 + torch.exp(-(fc(largest) + fc(mean))))
        clips.append(torch.stack([row * g for row, g in zip(clip, gate, strict=True)]))
    return torch.stack(clips)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 1), (1, 7, 59), (2, 20, 127), (1, 5, 1023)])
def test_matches_the_formula(shape: tuple[int, int, int]) -> None:
    values = arguments(*shape)
    torch.testing.assert_close(channel_attention(*values), formula(*values), rtol=1e-12, atol=1e-12)
    single = [v.float() for v in values]
    torch.testing.assert_close(channel_attention(*single).double(), formula(*values), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["sliced", "transposed", "every second", "expanded"])
def test_views(layout: str) -> None:
    _, *weights = arguments(2, 6, 1)
    x = {
        "sliced": torch.randn(4, 8, 70, dtype=torch.float64)[1:3, 1:-1, 3:],
        "transposed": torch.randn(2, 59, 6, dtype=torch.float64).transpose(1, 2),
        "every second": torch.randn(2, 6, 60, dtype=torch.float64)[..., ::2],
        "expanded": torch.randn(2, 1, 59, dtype=torch.float64).expand(2, 6, 59),
    }[layout]
    torch.testing.assert_close(channel_attention(x, *weights), formula(x, *weights), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 5, 6), (1, 1, 3), (3, 2, 1)])
def test_gradcheck(shape: tuple[int, int, int]) -> None:
    assert torch.autograd.gradcheck(channel_attention, [v.requires_grad_() for v in arguments(*shape)])


def test_a_tied_maximum_sends_its_gradient_to_the_first() -> None:
    x = torch.zeros(1, 2, 4, dtype=torch.float64)
    x[0, 0, 1] = x[0, 0, 3] = 1.0
    x[0, 1] = -2.0  # one gate depends on x[:, 1] by its maximum and mean
    identity, zero = torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(channel_attention(x, identity, zero, identity, zero).sum(), x)
    gate = torch.sigmoid(torch.tensor(1.5, dtype=torch.float64))
    slope = 2.0 * gate * (1 - gate)  # d/dgate of sum(x) = 2, relu open for maximum (1) and mean (0.5)
    expected = gate + slope * torch.tensor([0.25, 1.25, 0.25, 0.25], dtype=torch.float64)
    torch.testing.assert_close(dx[0, 0], expected)


def test_empty_batch_silence_and_extremes() -> None:
    _, *weights = arguments(1, 4, 1, dtype=torch.float32)
    empty = torch.zeros(0, 4, 9, requires_grad=True)
    y = channel_attention(empty, *weights)
    assert y.shape == (0, 4, 9)
    y.sum().backward()
    assert not channel_attention(torch.zeros(2, 4, 9), *weights).any()
    for scale in (1e-30, 1e30):
        x = (scale * torch.randn(2, 4, 9)).requires_grad_()
        y = channel_attention(x, *weights)
        y.sum().backward()
        assert torch.isfinite(y).all() and torch.isfinite(x.grad).all()
    poisoned = torch.randn(2, 4, 9)
    poisoned[1, 2, 3] = torch.nan
    y = channel_attention(poisoned, *weights)
    assert torch.isfinite(y[0]).all() and y[1].isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_under_autocast(dtype: torch.dtype) -> None:
    x, *weights = arguments(2, 6, 59, dtype=torch.float32)
    half = x.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype):
        y = channel_attention(half, *weights)
    y.sum().backward()
    assert y.dtype == half.grad.dtype == dtype
    exact = formula(half.detach(), *[w.double() for w in weights])
    torch.testing.assert_close(y.double(), exact, rtol=0.05, atol=0.05)


def test_compile() -> None:
    torch._dynamo.reset()
    values = [v.requires_grad_() for v in arguments(2, 6, 59)]
    compiled = torch.compile(channel_attention, fullgraph=True, backend="aot_eager")
    for got, expected in zip(
        torch.autograd.grad(compiled(*values).square().sum(), values),
        torch.autograd.grad(channel_attention(*values).square().sum(), values),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "place, value, error, message",
    [
        (0, "x", TypeError, "x must be a tensor, got str"),
        (0, torch.zeros(4, 9), ValueError, r"x must have shape \[B, n, T\], got \[4, 9\]"),
        (0, torch.zeros(1, 4, 9, dtype=torch.int16), TypeError, "x must have a floating dtype, got torch.int16"),
        (0, torch.zeros(1, 4, 0), ValueError, r"at least one channel and one sample in time, got shape \[1, 4, 0\]"),
        (1, None, TypeError, "fc1_weight must be a tensor, got NoneType"),
        (1, torch.zeros(2, 5), ValueError, r"fc1_weight must have shape \[2, 4\], got \[2, 5\]"),
        (2, torch.zeros(3), ValueError, r"fc1_bias must have shape \[2\], got \[3\]"),
        (3, torch.zeros(4, 2, dtype=torch.float64), TypeError, "fc2_weight must have the input's dtype torch.float32"),
        (4, torch.zeros(4, device="meta"), ValueError, "fc2_bias must be on the input's device cpu, got meta"),
    ],
)
def test_bad_input_is_named(place: int, value: object, error: type[Exception], message: str) -> None:
    values: list[object] = list(arguments(1, 4, 9, dtype=torch.float32))
    values[place] = value
    with pytest.raises(error, match=f"^channel_attention: .*{message}"):
        channel_attention(*values)


def test_no_channel_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one channel"):
        channel_attention(*arguments(1, 0, 9))


def test_autocast_does_not_excuse_float64() -> None:
    x, *weights = arguments(1, 4, 9, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="torch.float64"):
        channel_attention(x.double(), *weights)
