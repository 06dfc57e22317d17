"""The convolution chains' kernels on a GPU, against the references in float64 and in the same dtype."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mvat.kernels import Norm, mask_gate, native, use_backend
from mvat.kernels.norm_act_conv import activation_index
from tests.kernels.test_fused_stages import CASES, Case, conv

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        native.missing("norm_act_conv", "cuda") is not None, reason=f"{native.missing('norm_act_conv', 'cuda')}"
    ),
]

DEVICE = "cuda"


def gate(channels: int) -> Case:
    weights = ((channels, channels, 1), (channels,)) * 3

    def call(t: list[Tensor], norms: list[Norm], training: bool) -> Tensor:
        return mask_gate(t[0], *t[2:], t[1], norm=norms[0], shortcut_norm=norms[1], training=training)

    return Case((channels, channels), weights, (channels, channels), call)


#: A case and its length: those of small sizes, and stages of the presets, the widest and the longest among them.
SIZES: dict[str, tuple[Case, int]] = {
    **{name: (CASES[name], 59) for name in ("1x1 of many channels", "end", "gate with norms", "chain")},
    "in_conv": (conv(1, (60, 1, 3), False, padding=1), 64084),
    "base 60 to 120": (conv(60, (120, 60, 1), True, activation="silu"), 16020),
    "base 120 to 240": (conv(120, (240, 120, 1), True, activation="silu"), 4004),
    "base 480 to 960": (conv(480, (960, 480, 1), True, activation="silu"), 249),
    "base depthwise": (conv(120, (60, 1, 31), True, activation="glu", padding=15, groups=60), 16020),
    "base deep depthwise": (conv(960, (480, 1, 31), True, activation="glu", padding=15, groups=480), 249),
    "base down": (conv(60, (60, 60, 8), False, stride=4), 64084),
    "base up": (conv(60, (60, 60, 8), False, stride=4, transposed=True), 16020),
    "base branch": (conv(20, (20, 20, 3), False, padding=1), 64084),
    "s-8.1gf 12 to 24": (conv(12, (24, 12, 1), True, activation="silu"), 16020),
    "base gate": (gate(60), 64084),
    "base wide gate": (gate(240), 4004),
}
#: Every case in bfloat16; the others where each kernel comes once, since compiling is most of the time.
_WIDE = ("in_conv", "base 60 to 120", "base depthwise", "base down", "base up", "base gate", "end")
_PAIRS = [(name, torch.bfloat16) for name in SIZES] + [(name, torch.float32) for name in _WIDE]
_PAIRS += [("base 60 to 120", torch.float16), ("base depthwise", torch.float16)]
each_pair = pytest.mark.parametrize("name, dtype", _PAIRS)


@pytest.fixture(autouse=True)
def on_the_gpu() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


def inputs(name: str, dtype: torch.dtype) -> list[Tensor]:
    """Features in dtype; parameters in float32, as autocast hands them over."""
    case, length = SIZES[name]
    tensors = case.tensors(2, length)
    return [t.detach().to(dtype if i < len(case.features) else torch.float32) for i, t in enumerate(tensors)]


def forward_backward(name: str, tensors: list[Tensor], mode: str, grad: Tensor | None = None) -> list[Tensor]:
    """In training; the result, then the gradients."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    dtype = tensors[0].dtype
    half = dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(DEVICE, dtype) if half else contextlib.nullcontext():
        y = SIZES[name][0].run(leaves, True, mode)
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y) if grad is None else grad.to(y.dtype))]


@each_pair
def test_as_exact_as_eager(name: str, dtype: torch.dtype) -> None:
    """Root mean square over seeds; in float32 a product of three in tf32 keeps 22 bits."""
    squares = 0.0
    for seed in range(3):
        torch.manual_seed(seed)
        tensors = inputs(name, dtype)
        doubles = [t.double() for t in tensors]
        with torch.no_grad():
            grad = torch.randn_like(SIZES[name][0].run(doubles, True, "eager"))
        exact = forward_backward(name, doubles, "eager", grad)
        both = [forward_backward(name, tensors, mode, grad) for mode in ("fused", "eager")]
        assert all(torch.isfinite(t).all() for t in both[0])
        errors = [[(a - c).square().sum() for a, c in zip(found, exact, strict=True)] for found in both]
        squares = squares + torch.tensor([*errors, [c.square().sum() for c in exact]], dtype=torch.float64)
    eps = 2**-22 if dtype == torch.float32 else torch.finfo(dtype).eps
    for i, (ours, theirs, size) in enumerate(squares.sqrt().T.tolist()):
        assert ours <= 2 * theirs + eps * size, (i, ours / size, theirs / size)


@each_pair
def test_two_runs_are_equal_to_the_bit(name: str, dtype: torch.dtype) -> None:
    tensors = inputs(name, dtype)
    one, two = (forward_backward(name, tensors, "fused") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("name", ["chain", "gate with norms"])
def test_compile(name: str) -> None:
    torch._dynamo.reset()
    case, tensors = SIZES[name][0], [t.requires_grad_() for t in inputs(name, torch.float32)]
    compiled = torch.compile(lambda t: case.run(t, True), fullgraph=True, backend="aot_eager")
    y, got = case.run(tensors, True), compiled(tensors)
    torch.testing.assert_close(got, y)
    for a, b in zip(torch.autograd.grad(got.sum(), tensors), torch.autograd.grad(y.sum(), tensors), strict=True):
        torch.testing.assert_close(a, b)


def test_opcheck() -> None:
    x, norm = torch.randn(2, 6, 50, dtype=torch.bfloat16), [torch.rand(6) + 0.5 for _ in range(4)]
    stage = (1e-5, activation_index("silu"), 1, 1, 1, False, True, True)
    torch.library.opcheck(
        torch.ops.mvat.norm_act_conv, (x.clone().requires_grad_(), *norm, torch.randn(4, 6, 3), torch.randn(4), *stage)
    )
    gates = torch.randn(10, 6, 1), torch.randn(10), torch.randn(6, 5, 1), torch.randn(6)
    torch.library.opcheck(
        torch.ops.mvat.mask_gate, (x.clone().requires_grad_(), *norm, *gates, x, *norm, 1e-5, 1e-5, True)
    )


def test_statistics_of_samples_far_from_zero() -> None:
    x = torch.randn(4, 20, 64084) + 50
    exact = torch.stack((x.double().mean((0, 2)), x.double().var((0, 2), correction=0)))
    torch.testing.assert_close(torch.ops.mvat.batch_statistics(x).double(), exact, rtol=2e-6, atol=1e-6)
    with use_backend("fused"):
        assert torch.ops.mvat.batch_statistics(x[:0]).shape == (2, 20)
