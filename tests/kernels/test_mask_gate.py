import pytest
import torch
from torch import Tensor

from mvat.kernels import mask_gate


def arguments(
    batch: int, c: int, length: int, hidden: int | None = None, out: int | None = None, dtype=torch.float64
) -> list[Tensor]:
    hidden, out = hidden or c, out or c
    shapes = (batch, c, length), (hidden, c, 1), (hidden,), (hidden, c, 1), (hidden,), (out, hidden, 1), (out,)
    return [torch.randn(shape, dtype=dtype) for shape in (*shapes, (batch, out, length))]


def formula(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor, shortcut: Tensor | None = None
) -> Tensor:
    """One clip and one moment after the other."""
    y = torch.zeros(x.shape[0], len(b3), x.shape[2], dtype=x.dtype)
    for b in range(x.shape[0]):
        for t in range(x.shape[2]):
            v = x[b, :, t]
            gated = torch.tanh(w1[..., 0] @ v + b1) / (1 + torch.exp(-(w2[..., 0] @ v + b2)))
            y[b, :, t] = torch.clamp(w3[..., 0] @ gated + b3, min=0)
            if shortcut is not None:
                y[b, :, t] += shortcut[b, :, t]
    return y


@pytest.mark.parametrize("hidden, out", [(None, None), (5, 2)])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 59), (1, 7, 127), (1, 20, 1023)])
def test_matches_the_formula(shape: tuple[int, int, int], hidden: int | None, out: int | None) -> None:
    *values, shortcut = arguments(*shape, hidden, out)
    expected = formula(*values)
    torch.testing.assert_close(mask_gate(*values), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mask_gate(*values, shortcut), expected + shortcut, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mask_gate(*values, shortcut=shortcut), expected + shortcut, rtol=1e-12, atol=1e-12)
    single = [v.float() for v in values]
    assert (mask_gate(*single) - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("layout", ["sliced", "transposed", "every second", "expanded"])
def test_views(layout: str) -> None:
    _, *weights, _ = arguments(2, 3, 1)
    make = {
        "sliced": lambda: torch.randn(4, 5, 62, dtype=torch.float64)[1:3, 1:-1, 3:],
        "transposed": lambda: torch.randn(2, 59, 3, dtype=torch.float64).transpose(1, 2),
        "every second": lambda: torch.randn(2, 3, 118, dtype=torch.float64)[..., ::2],
        "expanded": lambda: torch.randn(2, 1, 59, dtype=torch.float64).expand(2, 3, 59),
    }[layout]
    x, shortcut = make(), make()
    expected = formula(x, *weights, shortcut)
    torch.testing.assert_close(mask_gate(x, *weights, shortcut), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("with_shortcut", [False, True])
def test_gradcheck(with_shortcut: bool) -> None:
    values = [v.requires_grad_() for v in arguments(2, 3, 4, 2, 5)]
    assert torch.autograd.gradcheck(mask_gate, values if with_shortcut else values[:-1])


@pytest.mark.parametrize("shape, hidden, out", [((1, 0, 9), 5, 2), ((1, 3, 9), 0, 2), ((1, 3, 9), 5, 0)])
def test_empty_weights_are_refused(shape: tuple[int, int, int], hidden: int, out: int) -> None:
    x = torch.zeros(shape)
    weights = [torch.zeros(s) for s in ((hidden, shape[1], 1), (hidden,)) * 2 + ((out, hidden, 1), (out,))]
    with pytest.raises(ValueError, match="^mask_gate: weights must not be empty, got"):
        mask_gate(x, *weights)


def test_the_shortcut_is_not_changed() -> None:
    *values, shortcut = arguments(2, 3, 9)
    before = shortcut.clone()
    mask_gate(*values, shortcut)
    assert torch.equal(shortcut, before)


@pytest.mark.parametrize("shape", [(0, 3, 9), (2, 3, 0)])
def test_empty(shape: tuple[int, int, int]) -> None:
    values = arguments(*shape)
    y = mask_gate(values[0].requires_grad_(), *values[1:])
    y.sum().backward()
    assert y.shape == values[0].grad.shape == shape


def test_silence_and_extremes() -> None:
    _, w1, _, w2, _, w3, _, _ = arguments(1, 4, 1, dtype=torch.float32)
    weights = [w1, torch.zeros(4), w2, torch.zeros(4), w3, torch.zeros(4)]
    assert not mask_gate(torch.zeros(2, 4, 9), *weights).any()
    for scale in (1e-30, 1e15, 1e30):
        x = (scale * torch.randn(2, 4, 9)).requires_grad_()
        y = mask_gate(x, *weights)
        y.sum().backward()
        assert torch.isfinite(y).all() and y.any() and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_under_autocast(dtype: torch.dtype) -> None:
    *values, shortcut = arguments(2, 6, 59, dtype=torch.float32)
    half, shortcut = values[0].to(dtype).requires_grad_(), shortcut.to(dtype)
    with torch.autocast("cpu", dtype):
        y = mask_gate(half, *values[1:], shortcut)
    y.sum().backward()
    exact = formula(half.detach().double(), *[v.double() for v in values[1:]], shortcut.double())
    assert y.dtype == half.grad.dtype == dtype
    assert (y - exact).norm() <= 0.03 * exact.norm()


def test_compile() -> None:
    torch._dynamo.reset()
    values = [v.requires_grad_() for v in arguments(2, 3, 59)]
    compiled = torch.compile(mask_gate, fullgraph=True, backend="aot_eager")
    for got, expected in zip(
        torch.autograd.grad(compiled(*values).square().sum(), values),
        torch.autograd.grad(mask_gate(*values).square().sum(), values),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "place, value, error, message",
    [
        (0, 1.0, TypeError, "x must be a tensor, got float"),
        (0, torch.zeros(3, 9), ValueError, r"x must have shape \[B, C, T\], got \[3, 9\]"),
        (1, torch.zeros(5, 3), ValueError, r"tanh_weight must have shape \[5, 3, 1\], got \[5, 3\]"),
        (1, None, TypeError, "tanh_weight must be a tensor, got NoneType"),
        (2, torch.zeros(4), ValueError, r"tanh_bias must have shape \[5\], got \[4\]"),
        (3, torch.zeros(4, 3, 1), ValueError, r"sigmoid_weight must have shape \[5, 3, 1\], got \[4, 3, 1\]"),
        (4, torch.zeros(5, dtype=torch.float16), TypeError, "sigmoid_bias must have the input's dtype torch.float32"),
        (5, torch.zeros(2, 3, 1), ValueError, r"out_weight must have shape \[2, 5, 1\], got \[2, 3, 1\]"),
        (6, torch.zeros(2, device="meta"), ValueError, "out_bias must be on the input's device cpu, got meta"),
        (7, torch.zeros(1, 3, 9), ValueError, r"shortcut must have shape \[1, 2, 9\], got \[1, 3, 9\]"),
    ],
)
def test_bad_input_is_named(place: int, value: object, error: type[Exception], message: str) -> None:
    values: list[object] = list(arguments(1, 3, 9, 5, 2, dtype=torch.float32))
    values[place] = value
    with pytest.raises(error, match=f"^mask_gate: .*{message}"):
        mask_gate(*values)
