import math

import pytest
import torch
from torch import Tensor

from mvat.kernels import global_attention
from mvat.kernels.chunks import chunk, overlap_add


def arguments(batch: int, n: int, length: int, segment: int = 64, heads: int = 1, dtype=torch.float64) -> list:
    width = segment * heads * heads
    shapes = (batch, n, length), (width, segment), (width, segment), (width, segment), (segment, width)
    scales = 1.0, *([1 / math.sqrt(segment)] * 3), 1 / math.sqrt(width)
    tensors = [s * torch.randn(shape, dtype=dtype) for s, shape in zip(scales, shapes, strict=True)]
    return [*tensors, heads, segment]


def cut(x: Tensor, segment: int) -> Tensor:
    """One sequence [T] as its chunks [P, C], cut one by one."""
    hop, silence = segment // 2, x.new_zeros(segment)
    padded = torch.cat((silence, x, silence))
    count = math.floor((len(x) + segment) / hop) + 1
    return torch.stack([padded[i * hop : i * hop + segment] for i in range(count)])


def add(chunks: Tensor, length: int) -> Tensor:
    """Chunks [P, C] added where they were cut from: [T]."""
    segment = chunks.shape[1]
    total = chunks.new_zeros(length + 2 * segment + segment)
    for i, piece in enumerate(chunks):
        total[i * segment // 2 : i * segment // 2 + segment] += piece
    return total[segment : segment + length]


def formula(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, heads: int, segment: int) -> Tensor:
    d = segment * heads
    y = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for c in range(x.shape[1]):
            tokens = cut(x[b, c], segment)
            mixed = []
            for h in range(heads):
                part = slice(h * d, (h + 1) * d)
                q, k, v = tokens @ w_q[part].T, tokens @ w_k[part].T, tokens @ w_v[part].T
                weights = torch.exp(q @ k.T / math.sqrt(d))
                mixed.append(weights / weights.sum(1, keepdim=True) @ v)
            y[b, c] = add(torch.cat(mixed, 1) @ w_o.T, x.shape[2]) / 2
    return y


@pytest.mark.parametrize("segment, heads", [(64, 1), (32, 2), (2, 3), (6, 1)])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 59), (1, 7, 127), (1, 1, 1023), (3, 1, 64)])
def test_matches_the_formula(shape: tuple[int, int, int], segment: int, heads: int) -> None:
    values = arguments(*shape, segment, heads)
    torch.testing.assert_close(global_attention(*values), formula(*values), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 63, 64, 65, 1023, 4001])
def test_float32_and_any_length(length: int) -> None:
    values = arguments(1, 2, length)
    single = [v.float() if isinstance(v, Tensor) else v for v in values]
    got, exact = global_attention(*single), formula(*values)
    assert got.dtype == torch.float32
    assert (got - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("layout", ["sliced", "transposed", "every second", "expanded"])
def test_views(layout: str) -> None:
    _, *rest = arguments(2, 3, 1, 16)
    x = {
        "sliced": torch.randn(4, 5, 70, dtype=torch.float64)[1:3, 1:-1, 3:],
        "transposed": torch.randn(2, 59, 3, dtype=torch.float64).transpose(1, 2),
        "every second": torch.randn(2, 3, 60, dtype=torch.float64)[..., ::2],
        "expanded": torch.randn(2, 1, 59, dtype=torch.float64).expand(2, 3, 59),
    }[layout]
    torch.testing.assert_close(global_attention(x, *rest), formula(x, *rest), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shape, segment, heads", [((2, 1, 5), 4, 1), ((1, 2, 3), 2, 2), ((1, 1, 1), 4, 1)])
def test_gradcheck(shape: tuple[int, int, int], segment: int, heads: int) -> None:
    *tensors, heads, segment = arguments(*shape, segment, heads)
    tensors = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *v: global_attention(*v, heads, segment), tensors)


@pytest.mark.parametrize("shape", [(0, 3, 50), (2, 0, 50), (2, 3, 0)])
def test_empty(shape: tuple[int, int, int]) -> None:
    x, *rest = arguments(*shape, 16)
    y = global_attention(x.requires_grad_(), *rest)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape


def test_silence_and_extremes() -> None:
    x, *rest = arguments(1, 2, 200, 16, dtype=torch.float32)
    assert not global_attention(torch.zeros_like(x), *rest).any()
    for scale in (1e-30, 1e4, 1e8):  # the softmax becomes uniform, then one-hot
        scaled = (scale * x).requires_grad_()
        y = global_attention(scaled, *rest)
        y.sum().backward()
        assert torch.isfinite(y).all() and y.any() and torch.isfinite(scaled.grad).all()
    # Between equal tokens nothing is chosen: tiny signals attend to the mean of all chunks, padding included.
    *tensors, heads, segment = [v.double() if isinstance(v, Tensor) else v for v in (1e-12 * x, *rest)]
    token = chunk(tensors[0], segment).mean(2, keepdim=True) @ tensors[3].T @ tensors[4].T
    uniform = overlap_add(token.expand(-1, -1, (200 + 16) // 8 + 1, -1), 200) / 2
    torch.testing.assert_close(global_attention(*tensors, heads, segment), uniform, rtol=1e-9, atol=0)


def test_the_padding_takes_part_in_the_softmax() -> None:
    """One chunk of pure padding in front, one behind where C / 2 divides T: each gets weight e^0."""
    segment, x = 4, torch.ones(1, 1, 4, dtype=torch.float64)
    eye = torch.eye(segment, dtype=torch.float64)
    tokens = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.float64)
    mixed = torch.softmax(tokens @ tokens.T / 2, 1) @ tokens
    expected = torch.cat((mixed[1, 2:] + mixed[2, :2], mixed[2, 2:] + mixed[3, :2])) / 2
    torch.testing.assert_close(global_attention(x, eye, eye, eye, eye, 1, segment)[0, 0], expected)


def test_chunks_are_a_strided_view_and_add_up_again() -> None:
    """Design, points 1 and 3: row stride C / 2, and every sample in exactly two chunks."""
    for length in (1, 31, 32, 33, 777):
        x = torch.randn(2, 3, length, dtype=torch.float64)
        chunks = chunk(x, 64)
        assert chunks.stride()[-2:] == (32, 1)
        assert torch.equal(chunks[1, 2], cut(x[1, 2], 64))
        assert torch.equal(overlap_add(chunks, length), 2 * x)
        other = torch.randn(chunks.shape, dtype=torch.float64)
        torch.testing.assert_close(overlap_add(other, length)[1, 2], add(other[1, 2], length), rtol=0, atol=1e-15)


@pytest.mark.parametrize("heads", [1, 2])
def test_keys_and_values_can_be_absorbed(heads: int) -> None:
    """Design, point 2: scores = (X A) X' and output = (softmax X) M', with a C x C pair A, M a head."""
    x, w_q, w_k, w_v, w_o, heads, segment = arguments(2, 2, 333, 32, heads)
    d = segment * heads
    tokens = chunk(x, segment)
    mixed = torch.zeros_like(tokens)
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        a = w_q[part].T @ w_k[part] / math.sqrt(d)
        m = w_o[:, part] @ w_v[part]
        mixed = mixed + torch.softmax(tokens @ a @ tokens.mT, -1) @ tokens @ m.T
    expected = global_attention(x, w_q, w_k, w_v, w_o, heads, segment)
    torch.testing.assert_close(overlap_add(mixed, 333) / 2, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_under_autocast(dtype: torch.dtype) -> None:
    x, *weights, heads, segment = arguments(2, 2, 127, 16, dtype=torch.float32)
    half = x.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype):
        y = global_attention(half, *weights, heads, segment)
    y.sum().backward()
    assert y.dtype == half.grad.dtype == dtype
    exact = formula(half.detach().double(), *[w.double() for w in weights], heads, segment)
    assert (y - exact).norm() <= 0.03 * exact.norm()


def test_compile_of_any_length() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(global_attention, fullgraph=True, dynamic=True, backend="eager")
    for length in (59, 127):
        values = arguments(2, 2, length, 16)
        torch.testing.assert_close(compiled(*values), global_attention(*values))


def test_compile() -> None:
    torch._dynamo.reset()
    *tensors, heads, segment = arguments(2, 2, 127, 16, 2)
    tensors = [t.requires_grad_() for t in tensors]
    compiled = torch.compile(global_attention, fullgraph=True, backend="aot_eager")
    for got, expected in zip(
        torch.autograd.grad(compiled(*tensors, heads, segment).square().sum(), tensors),
        torch.autograd.grad(global_attention(*tensors, heads, segment).square().sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "place, value, error, message",
    [
        (0, [1.0], TypeError, "x must be a tensor, got list"),
        (0, torch.zeros(9), ValueError, r"x must have shape \[B, n, T\], got \[9\]"),
        (1, torch.zeros(16, 8), ValueError, r"w_q must have shape \[8, 8\], got \[16, 8\]"),
        (2, torch.zeros(8, 8, dtype=torch.float64), TypeError, "w_k must have the input's dtype torch.float32"),
        (3, torch.zeros(8, 8, device="meta"), ValueError, "w_v must be on the input's device cpu, got meta"),
        (4, torch.zeros(8, 9), ValueError, r"w_o must have shape \[8, 8\], got \[8, 9\]"),
        (5, 0, ValueError, "heads must be an integer of at least 1, got 0"),
        (5, 1.0, ValueError, "heads must be an integer of at least 1, got 1.0"),
        (6, 7, ValueError, "segment_len must be an even integer of at least 2, got 7"),
        (6, 0, ValueError, "segment_len must be an even integer of at least 2, got 0"),
        (6, 16, ValueError, r"w_q must have shape \[16, 16\], got \[8, 8\]"),
    ],
)
def test_bad_input_is_named(place: int, value: object, error: type[Exception], message: str) -> None:
    values = arguments(1, 2, 20, 8, dtype=torch.float32)
    values[place] = value
    with pytest.raises(error, match=f"^global_attention: .*{message}"):
        global_attention(*values)
