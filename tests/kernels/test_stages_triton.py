"""The Triton kernels of the convolution chains in the interpreter, which rounds as a GPU does, against float64."""

import dataclasses
import sys
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from mvat.kernels import Norm, backend, mask_gate, native, norm_act, norm_act_conv, use_backend
from mvat.kernels.norm_act_conv import conv_reference
from mvat.models.blocks import MultiView, ResCon, Views, conv_end
from tests.kernels.test_fused_stages import CASES, Case, conv, forward_backward

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, test_cuda.py runs the kernels"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
    pytest.mark.skipif(native.missing("norm_act_conv") is not None, reason=f"{native.missing('norm_act_conv')}"),
]

if not torch.cuda.is_available():
    pytest.importorskip("triton")

    from mvat.kernels.triton import common, plans
    from mvat.kernels.triton import mask_gate as gate_kernels
    from mvat.kernels.triton import norm_act_conv as conv_kernels
    from tests.kernels.on_cpu import OPERATORS, triton_on_cpu

#: How float32 and half precision meet products: the features' dtype, what torch.set_float32_matmul_precision is given.
KINDS = {
    "bfloat16": (torch.bfloat16, "highest"),
    "float16": (torch.float16, "highest"),
    "tf32": (torch.float32, "high"),
    "tf32x3": (torch.float32, "highest"),
}

STAGES: dict[str, Case] = {
    **{name: case for name, case in CASES.items() if name != "grouped"},
    "two samples": conv(1, (1, 1, 1), True),
    "3 of 1": conv(1, (4, 1, 3), False, padding=1),
    "1x1 to glu": conv(8, (5, 4, 1), True, activation="glu"),
    "1x1 padded": conv(3, (2, 3, 1), True, padding=2),
    "1x1 strided": conv(3, (2, 3, 1), True, activation="silu", stride=2),
    "5 by 3": conv(4, (8, 4, 5), True, activation="relu", stride=3, padding=2),
    "up 5 by 3": conv(4, (4, 3, 5), True, activation="silu", stride=3, padding=1, transposed=True),
    "up with glu": conv(4, (2, 3, 4), True, activation="glu", stride=2, transposed=True),
    "depthwise of 33": conv(3, (3, 1, 33), True, activation="silu", padding=17, groups=3),
    "depthwise of 4": conv(2, (2, 1, 4), False, padding=6, groups=2),
}


@pytest.fixture(scope="module", autouse=True)
def interpreted() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        yield from triton_on_cpu()


@pytest.fixture
def precision() -> Iterator[Callable[[str], None]]:
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of everything in a few samples and channels, and a gate too wide for one kernel."""
    tile, few = plans.Block(16, 32, 32, 4, 1), plans.Tile(16, 0, 4, 1)
    weights = dataclasses.replace(tile, rows=32, inner=16)
    plan = plans.ConvPlan(tile, tile, weights, plans.Block(16, 4, 0, 4, 1), few, few)
    gate = plans.GatePlan(plans.Block(16, 4, 0, 4, 1), plans.Block(16, 4, 0, 4, 1), plan)
    monkeypatch.setattr(conv_kernels, "choose_conv", lambda kind, capability: plan)
    monkeypatch.setattr(gate_kernels, "choose_gate", lambda kind, capability: gate)
    monkeypatch.setattr(common, "processors", lambda device: 3)


#: Mantissa bits of a float32 operand that its products do without.
_DROPPED = {"tf32": 13, "tf32x3": 2}


def rounded(x: Tensor, bits: int) -> Tensor:
    """To nearest, ties away from zero, the last bits cleared."""
    return ((x.view(torch.int32) + (1 << bits - 1)) & -(1 << bits)).view(torch.float32)


class _Conv(torch.autograd.Function):
    """conv_reference of float32 with rounded operands, in its gradients too."""

    @staticmethod
    def forward(ctx, bits: int, x: Tensor, weight: Tensor, bias: Tensor | None, *rest):
        x, weight = rounded(x.contiguous(), bits), rounded(weight.contiguous(), bits)
        ctx.save_for_backward(x, weight)
        ctx.rest, ctx.bias, ctx.bits = rest, bias is not None, bits
        return conv_reference(x, weight, bias, *rest)

    @staticmethod
    def backward(ctx, grad: Tensor):
        leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            y = conv_reference(*leaves, None, *ctx.rest)
        dx, dw = torch.autograd.grad(y, leaves, rounded(grad.contiguous(), ctx.bits))
        return None, dx, dw, grad.sum((0, 2)) if ctx.bias else None, *[None] * len(ctx.rest)


def eager(kind: str, monkeypatch: pytest.MonkeyPatch, case: Case, tensors: list[Tensor], grad: Tensor, training: bool):
    """The references, their products in float32 with what the kind keeps of operands."""

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None, *rest) -> Tensor:
        return _Conv.apply(_DROPPED[kind], x, weight, bias, *rest)

    with monkeypatch.context() as patch:
        if kind in _DROPPED:
            for module in ("norm_act_conv", "mask_gate"):
                patch.setattr(sys.modules[f"mvat.kernels.{module}"], "conv_reference", convolve)
        return forward_backward(case, tensors, grad, training, "eager")


def compare(kind: str, case: Case, length: int, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output's and gradient's error against float64: at most twice eager's in the same dtype, or a rounding.

    Eager forms its products as the kernels do: three tf32 products keep 22 bits of theirs.
    """
    dtype = KINDS[kind][0]
    eps = {"tf32": 2**-11, "tf32x3": 2**-22}.get(kind, torch.finfo(dtype).eps)
    tensors = [t.detach().to(dtype).requires_grad_() for t in case.tensors(2, length)]
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    with torch.no_grad():
        grad = torch.randn_like(case.run(doubles, training, "eager")).to(dtype)
    exact = forward_backward(case, doubles, grad, training, "eager")
    ours = forward_backward(case, tensors, grad, training, "fused")
    theirs = eager(kind, monkeypatch, case, tensors, grad, training)
    for i, (a, b, c) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert a.shape == c.shape and a.dtype == dtype and torch.isfinite(a).all(), i
        assert (a - c).norm() <= 2 * (b - c).norm() + eps * c.norm(), (i, (a - c).norm() / c.norm())


#: The stages that every kind of products is tried with; tf32 and float16 only differ in what products read.
_NAMES = ("1x1", "3", "down", "up", "depthwise", "end", "end with a shortcut", "gate with norms", "chain")
_PAIRS = [(name, kind) for name in _NAMES for kind in ("bfloat16", "tf32x3")]
_PAIRS += [(name, kind) for name in ("1x1", "up", "depthwise", "gate with norms") for kind in ("float16", "tf32")]


@pytest.mark.parametrize("name, kind", _PAIRS)
def test_as_exact_as_eager(name: str, kind: str, precision, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training, a shape of one tile."""
    precision(KINDS[kind][1])
    compare(kind, STAGES[name], 37, True, monkeypatch)


@pytest.mark.parametrize(
    "name", [name for name in STAGES if name not in ("1x1", "1x1 of many channels", "end", "gate")]
)
def test_tiles(name: str, small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles, shares, steps of the sum and columns in the plural; evaluation, rows of no multiple of four."""
    training = len(name) % 2 == 0
    compare("tf32x3", STAGES[name], 40 if training else 35, training, monkeypatch)


@pytest.mark.parametrize("out, channels", [(4, 1), (8, 12), (60, 20), (160, 60)])
def test_channels(out: int, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the plan of a GPU: one tile of channels and several of them, the fused gradient of few and the two of
    many."""
    compare("bfloat16", conv(channels, (out, channels, 1), True, activation="relu"), 21, True, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics(dtype: torch.dtype, small_tiles: None) -> None:
    """Of y as it is stored, of samples far from zero too, and the same whoever gathers them."""
    x = (torch.randn(2, 4, 45) + 50).to(dtype)
    bias = torch.randn(6)
    for stride, transposed in ((1, False), (2, True)):
        kernel = torch.randn(4, 6, 3) if transposed else torch.randn(6, 4, 3)
        arguments = None, None, None, None, kernel, bias, 0.0, 1, stride, 0, 1, transposed, True, True
        y, got = torch.ops.mvat.norm_act_conv(x, *arguments)
        again = torch.ops.mvat.batch_statistics(y)
        exact = torch.stack((y.double().mean((0, 2)), y.double().var((0, 2), correction=0)))
        for found in (got, again):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=1e-6)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "every second sample": lambda t: t[..., ::2],
    "expanded": lambda t: t[:1, :, :1].expand(2, -1, 24),
    "sliced": lambda t: t[::2, :, 3:27],
    "padded rows": lambda t: torch.cat((t, t), 2)[..., :24],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", ["3", "end with a shortcut"])
def test_layouts(name: str, view: str) -> None:
    case = STAGES[name]
    tensors = [t.detach() for t in case.tensors(2, 48)]
    tensors[: len(case.features)] = [VIEWS[view](t) for t in tensors[: len(case.features)]]
    dense = [t.contiguous().clone().requires_grad_() for t in tensors]
    grad = torch.randn(1).expand_as(case.run(dense, False, "eager"))
    views = [t.requires_grad_() for t in tensors]
    ours = forward_backward(case, views, grad, True, "fused")
    plain = forward_backward(case, dense, grad.contiguous(), True, "fused")
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("name", ["depthwise", "gate with norms"])
def test_fresh_memory_is_not_read(name: str, small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers full of NaN give the same bits."""
    case = STAGES[name]
    tensors = case.tensors(2, 37)
    grad = torch.randn_like(case.run(tensors, False, "eager"))
    expected = forward_backward(case, tensors, grad, True, "fused")
    plain = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: plain(*a, **k).fill_(torch.nan))
    got = forward_backward(case, tensors, grad, True, "fused")
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", ["1x1", "depthwise", "up", "end with a shortcut", "gate", "gate with norms"])
def test_an_empty_batch(name: str) -> None:
    case = STAGES[name]
    tensors = case.tensors(0, 40)
    y, *gradients = forward_backward(case, tensors, case.run(tensors, True, "fused").detach(), True, "fused")
    assert y.shape[0] == 0 and not any(g.any() for g in gradients)
    assert [g.shape for g in gradients] == [t.shape for t in tensors]


@pytest.mark.parametrize("options", [{"padding": 2}, {"padding": 2, "groups": 4}, {"stride": 2, "transposed": True}])
def test_no_samples_leave_the_bias(options: dict) -> None:
    """Padding alone, or taps beyond the stride, make outputs of an input without samples: the bias is all of them."""
    x = torch.randn(2, 4, 0, requires_grad=True)
    weight = torch.randn(4, 1 if "groups" in options else 4, 3, requires_grad=True)
    bias = torch.randn(4, requires_grad=True)
    y = norm_act_conv(x, weight, bias, **options)
    assert y.shape[2] and torch.equal(y, bias[:, None].expand_as(y))
    dx, d_weight, d_bias = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert dx.shape == x.shape and not d_weight.any()
    assert torch.equal(d_bias, torch.full((4,), 2.0 * y.shape[2]))


@pytest.mark.parametrize("name", ["1x1", "down", "up", "end", "gate"])
def test_a_nan_is_handed_on(name: str) -> None:
    case = STAGES[name]
    tensors = [t.detach() for t in case.tensors(2, 40)]
    tensors[0][1, 0, 20] = torch.nan
    assert torch.equal(case.run(tensors, False).isnan(), case.run(tensors, False, "eager").isnan())


def operators() -> Iterator[tuple[str, tuple[object, ...]]]:
    """A call of every operator, features in bfloat16."""
    x, weight, row = torch.randn(2, 4, 21).bfloat16(), torch.randn(6, 4, 3), torch.rand(2, 4)
    norm = (*row, *torch.rand(2, 4))
    y, _ = torch.ops.mvat.norm_act_conv(x, *norm, weight, None, 1e-5, 2, 1, 1, 1, False, True, True)
    yield "norm_act_conv", (x, *norm, weight, None, 1e-5, 2, 1, 1, 1, False, True, True)
    yield "norm_act_conv_backward", (y, x, *norm, weight, True, 1e-5, 2, 1, 1, 1, False)
    yield "norm_act", (x, *norm, x, *norm, 1e-5, 1e-5, 1, True)
    yield "norm_act_backward", (x, x, *norm, x, *norm, 1e-5, 1e-5, 1)
    yield "batch_statistics", (x,)
    yield "norm_gradient", (x, x, norm[0], *norm[2:], row, 1e-5, 42.0, True)
    weights = torch.randn(10, 4, 1), torch.randn(10), torch.randn(4, 5, 1), torch.randn(4)
    yield "mask_gate", (x, *norm, *weights, x, *norm, 1e-5, 1e-5, True)
    yield "mask_gate_backward", (x, x, *norm, *weights, x, *norm, 1e-5, 1e-5)


def test_opcheck() -> None:
    seen = set()
    for name, arguments in operators():
        tests = "test_schema", "test_faketensor", "test_autograd_registration"
        torch.library.opcheck(getattr(torch.ops.mvat, name), arguments, test_utils=tests)
        seen.add(name)
    assert seen == set(OPERATORS)


def test_compile() -> None:
    torch._dynamo.reset()
    case = STAGES["1x1"]
    tensors = case.tensors(2, 30)
    compiled = torch.compile(lambda t: case.run(t, True), fullgraph=True, backend="aot_eager")
    y = case.run(tensors, True)
    got = compiled(tensors)
    for a, b in zip(
        (got, *torch.autograd.grad(got.sum(), tensors)), (y, *torch.autograd.grad(y.sum(), tensors)), strict=True
    ):
        assert torch.equal(a, b)


def test_autocast_on_a_gpu_means_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake tensors: what a convolution would take in half precision, so do its stages; parameters stay float32.

    Without a GPU, PyTorch turns its autocast off.
    """
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    with FakeTensorMode(), torch.device("cuda"), use_backend("fused"):
        x, norm = torch.empty(2, 6, 50), Norm(*(torch.empty(6) for _ in range(4)))
        y, statistics = norm_act_conv(x, torch.empty(4, 6, 1), norm=norm, want_statistics=True)
        assert (y.dtype, statistics.dtype, statistics.shape) == (torch.bfloat16, torch.float32, (2, 4))
        assert norm_act(x.bfloat16(), norm, shortcut=x).dtype == torch.bfloat16
        assert (
            mask_gate(x, *(torch.empty(s) for s in ((5, 6, 1), 5, (5, 6, 1), 5, (4, 5, 1), 4))).dtype == torch.bfloat16
        )


@pytest.mark.parametrize(
    "shape, options, reason",
    [
        ((4, 2, 3), {"groups": 2}, "one group, or a group a channel"),
        ((4, 1, 35), {"groups": 4}, "at most 33 taps"),
        ((4, 1, 3), {"groups": 4, "stride": 2}, "with stride 1"),
        ((4, 3, 2), {"stride": 3, "transposed": True}, "at least as many taps as its stride"),
    ],
)
def test_what_the_kernels_cannot_take_is_said(shape, options, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_warned", set())
    module = sys.modules["mvat.kernels.norm_act_conv"]
    monkeypatch.setattr(module, "norm_act_conv_reference", lambda x, *rest, **options: x)
    with FakeTensorMode(), torch.device("cuda"):
        x, weight = torch.empty(2, 4, 50), torch.empty(shape)
        with use_backend("fused"), pytest.raises(RuntimeError, match=reason):
            norm_act_conv(x, weight, **options)
        with use_backend("auto"), pytest.warns(RuntimeWarning, match=reason):
            norm_act_conv(x, weight, **options)


def test_inference_on_a_gpu_runs_the_stages() -> None:
    """The folded blocks are the CPU's: on a GPU a block in evaluation is a chain with running statistics."""
    with torch.device("meta"):
        modules = torch.nn.ModuleList(
            [ResCon(6, 12), MultiView(6), torch.nn.Sequential(torch.nn.Conv1d(6, 6, 8, 4))]
        ).eval()
    called = set()
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad(), use_backend("fused"):
        for module in modules.modules():
            for tensors in (module._parameters, module._buffers):
                tensors |= {name: torch.empty(t.shape, dtype=t.dtype) for name, t in tensors.items() if t is not None}
        with torch.profiler.profile() as profile:
            x = torch.empty(2, 6, 100)
            assert modules[0](x).shape == (2, 12, 100)
            assert modules[1].merge(x, Views(*x.split(2, 1))).shape == x.shape
            assert conv_end(x, modules[2]).shape == (2, 6, 24)
        called = {event.key for event in profile.key_averages()}
    assert {"mvat::norm_act_conv", "mvat::norm_act", "mvat::mask_gate"} <= called
    assert not called & {"mvat::conv_act", "mvat::conformer_block", "mvat::multi_view_merge"}


def test_the_operators_have_the_kernels_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row for row in backend.table(("cuda",)) if row.op in ("mask_gate", "norm_act_conv")]
    assert len(rows) == 8
    assert all((row.implementation == "fused") == (row.dtype != "float64") for row in rows)
    key = torch._C._dispatch_has_kernel_for_dispatch_key
    assert all(key(f"mvat::{op}", "CUDA") for op in OPERATORS)


def test_the_kind_follows_either_setting_of_float32_precision(precision) -> None:
    """Reading one of PyTorch's two interfaces raises where the other alone was used."""
    x, settings = torch.empty(1), torch.backends.cuda.matmul
    for name, kind in (("highest", plans.Kind.TF32X3), ("high", plans.Kind.TF32), ("medium", plans.Kind.TF32)):
        precision(name)
        assert plans.Kind.of(x) == kind
    precision("highest")
    for name, kind in (("tf32", plans.Kind.TF32), ("ieee", plans.Kind.TF32X3)):
        settings.fp32_precision = name
        assert plans.Kind.of(x) == kind


def test_the_plan_follows_device_and_kind() -> None:
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)):
        for kind in plans.Kind:
            plan = plans.choose_gate(kind, capability).wide
            assert plan == plans.choose_conv(kind, capability) and plan.short.rows < plan.depthwise.rows
    for choose in (plans.choose_conv, plans.choose_gate):
        with pytest.raises(RuntimeError, match="takes compute capability 8.0 or more, this GPU has 7.5"):
            choose(plans.Kind.BF16, (7, 5))
