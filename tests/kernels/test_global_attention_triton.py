"""The Triton kernels of the global view in the interpreter, which rounds as a GPU does, against float64."""

import dataclasses
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from mvat.kernels import backend, global_attention, native, use_backend
from mvat.kernels.chunks import chunk, overlap_add
from mvat.kernels.global_attention import absorb, global_attention_reference

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, test_cuda.py runs the kernels")

if not torch.cuda.is_available():
    pytest.importorskip("triton")

    from mvat.kernels.triton import global_attention as kernels
    from mvat.kernels.triton.plans import Kind, Plan, Small, SmallTile, Tile, choose
    from tests.kernels import interpreter

    interpreter.install()

    TILE = Tile(32, 16, 4, 1)
    #: Tiles that the interpreter is quick with; several of them in a sequence of a few hundred samples.
    LARGE = Plan(TILE, Tile(16, 0, 4, 1), TILE, TILE, Tile(32, 0, 4, 1), Small(0, 4), Small(0, 4))
    SMALL = dataclasses.replace(LARGE, small_forward=Small(64, 4), small_backward=Small(32, 4))

    @dataclasses.dataclass(frozen=True)
    class Split(Plan):
        """The keys in three parts, the last of which may be empty."""

        def splits(self, programs: int, chunks: int, processors: int) -> int:
            return 3

    SPLIT = Split(**vars(LARGE))
    PLANS = {"large": LARGE, "split": SPLIT, "small": SMALL}

#: How float32 and half precision meet products: the features' dtype, what torch.set_float32_matmul_precision is given.
KINDS = {
    "bfloat16": (torch.bfloat16, "highest"),
    "float16": (torch.float16, "highest"),
    "tf32": (torch.float32, "high"),
    "tf32x3": (torch.float32, "highest"),
}
Function = Callable[..., Tensor]


@pytest.fixture
def precision():
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


class _Run(torch.autograd.Function):
    """The launchers under autograd, as the operator would call them on a GPU."""

    @staticmethod
    def forward(ctx, x: Tensor, a: Tensor, m: Tensor, segment_len: int, plan: "Plan") -> Tensor:
        y, softmax, mixed = kernels.forward(x, a, m, segment_len, True, plan)
        ctx.save_for_backward(x, a, m, softmax, mixed)
        ctx.rest = segment_len, plan
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        return *kernels.backward(grad, *ctx.saved_tensors, *ctx.rest), None, None


def fused(plan: "Plan", segment_len: int = 64) -> Function:
    def run(x: Tensor, *weights: Tensor) -> Tensor:
        a, m = absorb(*(w.to(native.wide(x.dtype)) for w in weights), 1)
        return _Run.apply(x, a, m, segment_len, plan)

    return run


def _tf32(x: Tensor) -> Tensor:
    return ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


class _Product(torch.autograd.Function):
    """A product of float32 matrices with operands in tf32, and so its gradients."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return _tf32(a) @ _tf32(b)

    @staticmethod
    def backward(ctx, grad: Tensor):
        a, b = ctx.saved_tensors
        return _tf32(grad) @ _tf32(b).mT, _tf32(a).mT @ _tf32(grad)


def eager_tf32(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, heads: int, segment_len: int) -> Tensor:
    """The reference's formula with every product in tf32."""
    tokens = chunk(x, segment_len).contiguous()
    q, k, v = (_Product.apply(tokens, w.T.expand(*tokens.shape[:2], -1, -1)) for w in (w_q, w_k, w_v))
    weights = torch.softmax(_Product.apply(q, k.mT) / segment_len**0.5, -1)
    mixed = _Product.apply(weights, v)
    return overlap_add(_Product.apply(mixed, w_o.T.expand(*tokens.shape[:2], -1, -1)), x.shape[2]) / 2


def eager(kind: str, segment_len: int) -> Function:
    function = eager_tf32 if kind == "tf32" else global_attention_reference
    return lambda *tensors: function(*tensors, 1, segment_len)


def inputs(kind: str, shape: tuple[int, int, int], segment_len: int = 64, scale: float = 1.0) -> list[Tensor]:
    weights = [torch.randn(segment_len, segment_len) / segment_len**0.5 for _ in range(4)]
    return [t.to(KINDS[kind][0]) for t in (scale * torch.randn(shape), *weights)]


def forward_backward(function: Function, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


def compare(kind: str, plan: "Plan", tensors: list[Tensor], segment_len: int = 64) -> None:
    """Every output's and gradient's error against float64: at most twice eager's in the same dtype, or a rounding."""
    grad = torch.randn(tensors[0].shape).to(tensors[0].dtype)
    exact = forward_backward(
        lambda *t: global_attention_reference(*t, 1, segment_len), [t.double() for t in tensors], grad
    )
    theirs = forward_backward(eager(kind, segment_len), tensors, grad)
    ours = forward_backward(fused(plan, segment_len), tensors, grad)
    # Three tf32 products keep 22 bits of theirs.
    eps = {"tf32": 2**-11, "tf32x3": 2**-22}.get(kind, torch.finfo(tensors[0].dtype).eps)
    for i, (a, b, c) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert a.shape == c.shape and a.dtype == tensors[0].dtype and torch.isfinite(a).all()
        assert (a - c).norm() <= 2 * (b - c).norm() + eps * c.norm(), (i, (a - c).norm() / c.norm())


@pytest.mark.parametrize("plan", ["large", "split"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 3, 1), (2, 1, 37), (1, 2, 1007), (1, 1, 1312)])
def test_as_exact_as_eager(plan: str, kind: str, shape: tuple[int, int, int], precision) -> None:
    """Lengths: a sample, less than a chunk, no multiple of the hop, one whose last chunk is padding alone."""
    precision(KINDS[kind][1])
    compare(kind, PLANS[plan], inputs(kind, shape))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 3, 1), (2, 3, 249), (3, 1, 448), (1, 3, 900), (1, 1, 1900)])
def test_whole_sequences_in_a_tile(kind: str, shape: tuple[int, int, int], precision) -> None:
    """Four, two and one in the forward tile; two, one and none in the backward tile. The last group is not full."""
    precision(KINDS[kind][1])
    compare(kind, SMALL, inputs(kind, shape))


@pytest.mark.parametrize("plan", ["large", "split", "small"])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_32(plan: str, kind: str, precision) -> None:
    precision(KINDS[kind][1])
    compare(kind, PLANS[plan], inputs(kind, (2, 2, 203), 32), 32)


@pytest.mark.parametrize("plan", ["large", "split", "small"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-4, 4.0, 1e3])
def test_extremes(plan: str, kind: str, scale: float, precision) -> None:
    """The softmax becomes uniform, then peaked, then one-hot: finite, and as exact as eager's.

    Between scores of a million the weights' gradients vanish and rounding is all that is left of them, in eager too:
    there only the output is compared.
    """
    precision(KINDS[kind][1])
    tensors = inputs(kind, (1, 2, 449), scale=scale)
    if scale < 1e3:
        return compare(kind, PLANS[plan], tensors)
    grad = torch.randn(tensors[0].shape)
    exact = global_attention_reference(*(t.double() for t in tensors), 1, 64)
    theirs, ours = (forward_backward(f, tensors, grad) for f in (eager(kind, 64), fused(PLANS[plan])))
    assert all(torch.isfinite(t).all() for t in ours)
    assert (ours[0] - exact).norm() <= 2 * (theirs[0] - exact).norm() + 1e-6 * exact.norm()


@pytest.mark.parametrize("plan", ["large", "split", "small"])
def test_silence(plan: str) -> None:
    """Zeros give zeros; the gradient is that of a mean over all chunks."""
    tensors = inputs("tf32x3", (1, 2, 300))
    tensors[0].zero_()
    y, *_ = forward_backward(fused(PLANS[plan]), tensors, torch.ones(1, 2, 300))
    assert not y.any()
    compare("tf32x3", PLANS[plan], tensors)


@pytest.mark.parametrize("plan", ["large", "small"])
@pytest.mark.parametrize("shape", [(0, 3, 50), (2, 0, 50), (2, 3, 0)])
def test_empty(plan: str, shape: tuple[int, int, int]) -> None:
    tensors = inputs("tf32x3", shape)
    y, dx, *weights = forward_backward(fused(PLANS[plan]), tensors, torch.zeros(shape))
    assert y.shape == dx.shape == shape and not any(w.any() for w in weights)


@pytest.mark.parametrize("plan", ["large", "small"])
@pytest.mark.parametrize("view", ["transposed", "every second sample", "expanded", "sliced"])
def test_layouts(plan: str, view: str) -> None:
    x, *weights = inputs("bfloat16", (3, 2, 300))
    grad = torch.randn(1).to(x.dtype).expand(x.shape)
    x = {
        "transposed": lambda: x.transpose(1, 2).contiguous().transpose(1, 2),
        "every second sample": lambda: x[..., ::2],
        "expanded": lambda: x[:1].expand(3, -1, -1),
        "sliced": lambda: x[::2, 1:, 3:251],
    }[view]()
    grad = grad[: len(x), : x.shape[1], : x.shape[2]]
    ours = forward_backward(fused(PLANS[plan]), [x, *weights], grad)
    dense = forward_backward(fused(PLANS[plan]), [x.contiguous().clone(), *weights], grad.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(ours, dense, strict=True))


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("plan", ["large", "split", "small"])
@pytest.mark.parametrize("kind", ["bfloat16", "tf32"])
def test_a_nan_is_handed_on(plan: str, kind: str, precision) -> None:
    precision(KINDS[kind][1])
    x, *weights = inputs(kind, (2, 2, 101))
    x[1, 0, 50] = torch.nan
    y = fused(PLANS[plan])(x, *weights)
    assert torch.equal(y.isnan(), global_attention_reference(x, *weights).isnan())


@pytest.mark.parametrize("plan", ["large", "split", "small"])
def test_what_is_kept_means_what_the_cpu_kernel_means(plan: str) -> None:
    x, *weights = inputs("tf32x3", (2, 2, 300))
    a, m = absorb(*weights, 1)
    _, softmax, mixed = kernels.forward(x, a, m, 64, True, PLANS[plan])
    tokens = chunk(x, 64).double()[:, :, None]
    scores = tokens @ a.double() @ tokens.mT
    sums = softmax[..., 1].double() * torch.exp2(softmax[..., 0].double())
    torch.testing.assert_close(sums, scores.exp().sum(-1), rtol=1e-5, atol=0)
    torch.testing.assert_close(mixed.double(), scores.softmax(-1) @ tokens, rtol=1e-5, atol=1e-6)
    y, *kept = kernels.forward(x, a, m, 64, False, PLANS[plan])
    assert torch.equal(y, kernels.forward(x, a, m, 64, True, PLANS[plan])[0])
    fakes = [t.shape for t in torch.ops.mvat.global_attention(x.to("meta"), a.to("meta"), m.to("meta"), 64, False)[1:]]
    assert [t.shape for t in kept] == fakes


def test_fresh_memory_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers full of NaN give the same bits."""
    tensors, grad = inputs("bfloat16", (2, 2, 300)), torch.randn(2, 2, 300)
    expected = [forward_backward(fused(plan), tensors, grad) for plan in PLANS.values()]
    plain = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: plain(*a, **k).fill_(torch.nan))
    for plan, want in zip(PLANS.values(), expected, strict=True):
        got = forward_backward(fused(plan), tensors, grad)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_the_plan_follows_device_and_size() -> None:
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)):
        for kind in Kind:
            plan = choose(kind, capability)
            assert plan.splits(20 * 16, 2005, 132) == 1  # a clip of base: tiles of queries are enough
            assert plan.splits(16, 2005, 132) > 1  # one sequence
            assert plan.splits(1, 65, 132) == max(1, 65 // (4 * plan.forward.step))
    with pytest.raises(RuntimeError, match="takes compute capability 8.0 or more, this GPU has 7.5"):
        choose(Kind.BF16, (7, 5))
    tiles = [Small(64, 4).tile(p) for p in (3, 17, 64)]
    assert tiles == [SmallTile(16, 4, 4), SmallTile(32, 2, 4), SmallTile(64, 1, 4)]
    assert Small(64, 4).holds(64) and not Small(64, 4).holds(65) and not Small(0, 4).holds(3)


def test_what_the_kernels_cannot_take_is_said() -> None:
    x = torch.zeros(1, 1, 50)
    for heads, segment_len in ((2, 64), (1, 16)):
        a = torch.zeros(heads, segment_len, segment_len)
        with pytest.raises(ValueError, match="one head and segment_len 32 or 64 are expected"):
            kernels.forward(x, a, a, segment_len, True)


def test_on_cuda_one_head_and_two_lengths_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake tensors: what runs, its outputs' shapes, and the one warning where the reference does."""
    if native.missing("global_attention") is not None:
        pytest.skip(f"no operator: {native.missing('global_attention')}")
    monkeypatch.setattr(backend, "_warned", set())
    # The package's name for this module is its function; PyTorch's attention takes no fake tensors of an absent device.
    module = sys.modules["mvat.kernels.global_attention"]
    monkeypatch.setattr(module, "global_attention_reference", lambda x, *rest: x)
    with FakeTensorMode(), torch.device("cuda"):
        for segment_len in (64, 32):
            x, weight = (torch.empty(s, dtype=torch.bfloat16) for s in ((2, 3, 500), (segment_len, segment_len)))
            with use_backend("fused"):
                y = global_attention(x, *[weight] * 4, segment_len=segment_len)
            assert (y.shape, y.dtype) == (x.shape, x.dtype)
        x, weight = torch.empty(2, 3, 500), torch.empty(16, 16)
        with use_backend("fused"), pytest.raises(RuntimeError, match="one head and a segment_len of 32 or 64"):
            global_attention(x, *[weight] * 4, segment_len=16)
        with use_backend("auto"), pytest.warns(RuntimeWarning, match="one head and a segment_len of 32 or 64") as seen:
            for _ in range(2):
                assert global_attention(x, *[weight] * 4, segment_len=16).shape == x.shape
        assert len(seen) == 1


def test_the_operator_has_the_kernels_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.missing("global_attention") is not None:
        pytest.skip(f"no operator: {native.missing('global_attention')}")
    rows = {row.dtype: row for row in backend.table(("cuda",)) if row.op == "global_attention"}
    assert {name for name, row in rows.items() if row.implementation == "fused"} == {"float32", "bfloat16", "float16"}
    key = torch._C._dispatch_has_kernel_for_dispatch_key
    assert key("mvat::global_attention", "CUDA") and key("mvat::global_attention_backward", "CUDA")
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *names: False)
    assert native.missing("global_attention", "cuda") == "Triton is not installed; run `pip install triton`"
