"""What holds of the fused stages of a chain beyond their formulas: rounding, layouts, threads, derivatives."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from mvat.kernels import Norm, mask_gate, native, norm_act, norm_act_conv, use_backend

pytestmark = pytest.mark.skipif(
    native.missing("norm_act_conv") is not None, reason=f"no kernel: {native.missing('norm_act_conv')}"
)

LENGTHS = [59, 127, 1023, 4001]


class Case(NamedTuple):
    """A call: its features' channels, the shapes of its other tensors, the channels of its norms, the call itself.

    Its tensors are all features, all parameters, then weight and bias of every norm; call takes them, the norms made.
    """

    features: tuple[int, ...]
    parameters: tuple[tuple[int, ...], ...]
    norms: tuple[int, ...]
    call: Callable[[list[Tensor], list[Norm], bool], Tensor]

    def tensors(self, batch: int, length: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Leaves; the convolutions keep the features' scale, and no norm is the identity."""
        features = [torch.randn(batch, channels, length, dtype=dtype) for channels in self.features]
        parameters = [torch.randn(s, dtype=dtype) / max(1, torch.Size(s[1:]).numel()) ** 0.5 for s in self.parameters]
        norms = [
            make(c, dtype=dtype)
            for c in self.norms
            for make in (lambda *a, **k: 0.5 + torch.rand(*a, **k), torch.randn)
        ]
        return [t.requires_grad_() for t in (*features, *parameters, *norms)]

    def run(self, tensors: list[Tensor], training: bool, mode: str = "fused") -> Tensor:
        first = len(self.features) + len(self.parameters)
        norms = []
        for i, channels in enumerate(self.norms):
            weight, bias = tensors[first + 2 * i : first + 2 * i + 2]
            steps = torch.linspace(0.5, 1.5, channels, dtype=weight.dtype)
            norms.append(Norm(weight, bias, steps - 1, steps))
        with use_backend(mode):
            return self.call(tensors[:first], norms, training)


STAGES: dict[str, tuple[int, tuple[int, ...], dict[str, Any]]] = {
    # channels, weight, options
    "1x1": (6, (9, 6, 1), {}),
    "1x1 of many channels": (70, (13, 35, 1), {"activation": "glu"}),
    "3": (6, (5, 6, 3), {"activation": "silu", "padding": 1}),
    "down": (6, (6, 6, 8), {"activation": "relu", "stride": 4}),
    "up": (6, (6, 5, 8), {"activation": "relu", "stride": 4, "transposed": True}),
    "depthwise": (12, (6, 1, 31), {"activation": "glu", "padding": 15, "groups": 6}),
    "grouped": (6, (4, 3, 3), {"activation": "silu", "groups": 2, "stride": 2}),
}


def conv(channels: int, shape: tuple[int, ...], normed: bool, **options: Any) -> Case:
    def call(tensors: list[Tensor], norms: list[Norm], training: bool) -> Tensor:
        return norm_act_conv(*tensors, norm=norms[0] if normed else None, training=training, **options)

    out = shape[1] if options.get("transposed") else shape[0]
    return Case((channels,), (shape, (out,)), (channels,) if normed else (), call)


def chain(tensors: list[Tensor], norms: list[Norm], training: bool) -> Tensor:
    """Two convolutions and a shortcut's, every norm but the first with the statistics its features came with."""
    x, first, second, side = tensors
    u, of_u = norm_act_conv(x, first, padding=1, want_statistics=True)
    v, of_v = norm_act_conv(
        u, second, norm=norms[0], activation="glu", training=training, statistics=of_u, want_statistics=True
    )
    shortcut, of_shortcut = norm_act_conv(x, side, want_statistics=True)
    return norm_act(
        v,
        norms[1],
        "silu",
        shortcut=shortcut,
        shortcut_norm=norms[2],
        training=training,
        statistics=of_v,
        shortcut_statistics=of_shortcut,
    )


GATE = ((5, 6, 1), (5,), (5, 6, 1), (5,), (4, 5, 1), (4,))
CASES = {
    **{
        name: conv(channels, shape, name != "grouped", **options) for name, (channels, shape, options) in STAGES.items()
    },
    "end": Case((6,), (), (6,), lambda x, norms, training: norm_act(*x, *norms, "glu", training=training)),
    "end with a shortcut": Case(
        (6, 6),
        (),
        (6, 6),
        lambda x, norms, training: norm_act(
            x[0], norms[0], "relu", shortcut=x[1], shortcut_norm=norms[1], training=training
        ),
    ),
    "gate": Case((6,), GATE, (), lambda x, norms, training: mask_gate(*x)),
    "gate with norms": Case(
        (6, 4),
        GATE,
        (6, 4),
        lambda x, norms, training: mask_gate(
            x[0], *x[2:], x[1], norm=norms[0], shortcut_norm=norms[1], training=training
        ),
    ),
    "chain": Case((6,), ((6, 6, 3), (4, 3, 1), (4, 6, 1)), (6, 4, 4), chain),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def forward_backward(case: Case, tensors: list[Tensor], grad: Tensor, training: bool, mode: str) -> list[Tensor]:
    y = case.run(tensors, training, mode)
    return [y.detach(), *torch.autograd.grad(y, tensors, grad.to(y.dtype))]


def gradient_for(case: Case, tensors: list[Tensor], training: bool) -> Tensor:
    with torch.no_grad():
        return torch.randn_like(case.run(tensors, training))


def check_exactness(case: Case, length: int, training: bool, mean: float = 0.0) -> None:
    """Root mean square over seeds of every output's and gradient's error: at most twice eager's, or one rounding."""
    squares = torch.zeros(2, len(case.tensors(1, 1)) + 1, dtype=torch.float64)
    for seed in range(6):
        torch.manual_seed(seed)
        tensors = case.tensors(2, length)
        with torch.no_grad():
            for features in tensors[: len(case.features)]:
                features += mean
        grad = gradient_for(case, tensors, training)
        wide = [t.detach().double().requires_grad_() for t in tensors]
        exact = forward_backward(case, wide, grad, training, "eager")
        for row, mode in enumerate(("eager", "fused")):
            for i, (got, expected) in enumerate(
                zip(forward_backward(case, tensors, grad, training, mode), exact, strict=True)
            ):
                squares[row, i] += ((got.double() - expected).norm() / expected.norm().clamp(min=1e-30)).square()
    eager, ours = (squares / 6).sqrt()
    assert (ours <= (2 * eager).clamp(min=2e-7)).all(), (eager, ours)


@pytest.mark.parametrize("length", LENGTHS)
def test_as_exact_as_eager(case: Case, length: int) -> None:
    for training in (False, True):
        check_exactness(case, length, training)


@pytest.mark.parametrize("name", ["3", "depthwise", "end", "end with a shortcut", "gate with norms"])
def test_as_exact_as_eager_beside_a_large_mean(name: str) -> None:
    for length in LENGTHS:
        check_exactness(CASES[name], length, True, mean=1000.0)


def spread(t: Tensor) -> Tensor:
    """The same values, every second of them in memory."""
    return torch.stack((t, torch.full_like(t, torch.nan)), -1)[..., 0].detach().requires_grad_()


def turned(t: Tensor) -> Tensor:
    """The same values, in memory in the reverse order of dimensions."""
    order = range(t.dim() - 1, -1, -1)
    return t.permute(*order).contiguous().permute(*order).detach().requires_grad_()


@pytest.mark.parametrize("view", [spread, turned])
def test_layouts(case: Case, view: Callable[[Tensor], Tensor]) -> None:
    tensors = case.tensors(3, 100)
    grad = gradient_for(case, tensors, True)
    expected = forward_backward(case, tensors, grad, True, "fused")
    got = forward_backward(case, [view(t) for t in tensors], view(grad), True, "fused")
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_expanded_and_sliced(case: Case) -> None:
    """Features of one clip for all, cut out of longer ones; a gradient that is the same for all."""
    tensors, count = case.tensors(3, 100), len(case.features)
    views = [t[:1, :, 3:92].expand(3, -1, -1).detach().requires_grad_() for t in tensors[:count]]
    dense = [v.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for v in views]
    got, expected = (
        torch.autograd.grad(case.run([*features, *tensors[count:]], True).sum(), [*features, *tensors[count:]])
        for features in (views, dense)
    )
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("batch, length", [(1, 4001), (5, 249)])
def test_the_thread_count_changes_nothing(case: Case, batch: int, length: int) -> None:
    tensors = case.tensors(batch, length)
    grad = gradient_for(case, tensors, True)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(forward_backward(case, tensors, grad, True, "fused"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("training", [False, True])
def test_gradcheck(case: Case, training: bool) -> None:
    tensors = case.tensors(2, 12, torch.float64)
    assert torch.autograd.gradcheck(lambda *t: case.run(list(t), training), tensors, fast_mode=True)


@pytest.mark.parametrize("operator", ["norm_act_conv", "norm_act", "mask_gate", "batch_statistics", "norm_gradient"])
def test_opcheck(operator: str) -> None:
    def leaf(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=torch.float64).requires_grad_()

    def norm(channels: int) -> tuple[Tensor, ...]:
        return leaf(channels), leaf(channels), leaf(channels).detach(), leaf(channels).detach()

    def calls(batch: int) -> list[tuple[Any, ...]]:
        x, y, eps = leaf(batch, 4, 70), leaf(batch, 4, 70), 1e-5
        gates = leaf(10, 4, 1), leaf(10), leaf(4, 5, 1), leaf(4)
        weight, _, mean, var = (t.detach() for t in norm(4))
        return {
            "norm_act_conv": [
                # Of an empty batch there are no statistics: they are NaN.
                (x, *norm(4), leaf(6, 2, 3), leaf(6), eps, 3, 2, 1, 1, False, True, batch > 0),
                (x, *[None] * 4, leaf(4, 3, 8), None, eps, 1, 4, 0, 1, True, False, False),
            ],
            "norm_act": [
                (x, *norm(4), y, *norm(4), eps, eps, 2, True),
                (x, *norm(4), None, *[None] * 4, eps, eps, 3, False),
            ],
            "mask_gate": [(x, *norm(4), *gates, y, *norm(4), eps, eps, True)],
            "batch_statistics": [(x.detach(),)] if batch else [],
            "norm_gradient": [
                (y.detach(), x.detach(), weight, mean, var, leaf(2, 4).detach(), eps, 70.0 * batch, batch > 0)
            ],
        }[operator]

    for arguments in (*calls(2), *calls(0)):
        torch.library.opcheck(getattr(torch.ops.mvat, operator).default, arguments)


@pytest.mark.parametrize("name", ["chain", "gate with norms"])
def test_compile(name: str) -> None:
    torch._dynamo.reset()
    case = CASES[name]
    tensors = case.tensors(2, 59, torch.float64)
    grad = gradient_for(case, tensors, True)

    def function(*tensors: Tensor) -> Tensor:
        return case.run(list(tensors), True)

    y = torch.compile(function, fullgraph=True, backend="aot_eager")(*tensors)
    got = [y.detach(), *torch.autograd.grad(y, tensors, grad)]
    for ours, expected in zip(got, forward_backward(case, tensors, grad, True, "fused"), strict=True):
        torch.testing.assert_close(ours, expected)


def test_a_second_derivative_is_refused(case: Case) -> None:
    tensors = case.tensors(2, 59)
    (first,) = torch.autograd.grad(case.run(tensors, True).square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="a second derivative is not supported by the fused kernel"):
        first.sum().backward()


def test_inference_mode_and_no_grad(case: Case) -> None:
    tensors = case.tensors(2, 200)
    for training in (False, True):
        expected = case.run(tensors, training).detach()
        with torch.inference_mode():
            assert torch.equal(case.run(tensors, training), expected)
        with torch.no_grad():
            assert torch.equal(case.run(tensors, training), expected)


def test_only_what_wants_a_gradient_gets_one(case: Case) -> None:
    """With any one tensor frozen, the others' gradients are what they were."""
    tensors = case.tensors(2, 100)
    grad = gradient_for(case, tensors, True)
    expected = forward_backward(case, tensors, grad, True, "fused")[1:]
    for frozen in range(len(tensors) if len(tensors) > 1 else 0):
        some = [t.detach() if i == frozen else t for i, t in enumerate(tensors)]
        free = [t for t in some if t.requires_grad]
        got = torch.autograd.grad(case.run(some, True), free, grad)
        rest = [e for i, e in enumerate(expected) if i != frozen]
        assert all(torch.equal(a, b) for a, b in zip(got, rest, strict=True))
        assert not some[frozen].requires_grad and some[frozen].grad is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_is_handed_on(case: Case, value: float) -> None:
    """In the features: output and the features' gradient are not finite where eager's are not, and equal elsewhere."""
    for place in (0, 37, 99):
        tensors = case.tensors(2, 101)
        with torch.no_grad():
            tensors[0][1, -1, place] = value
        grad = gradient_for(case, tensors, False)
        got, expected = (forward_backward(case, tensors, grad, False, mode)[:2] for mode in ("fused", "eager"))
        assert not (got[0].isfinite().all() and value != value)
        for ours, theirs in zip(got, expected, strict=True):
            finite = theirs.isfinite()
            assert torch.equal(ours.isfinite(), finite)
            torch.testing.assert_close(ours[finite], theirs[finite], rtol=1e-4, atol=1e-5)


def test_a_nan_in_a_parameter_is_handed_on(case: Case) -> None:
    tensors = [t.detach() for t in case.tensors(2, 101)]
    for i in range(len(case.features), len(tensors)):
        broken = [t.clone() for t in tensors]
        broken[i].view(-1)[-1] = torch.nan
        nan = case.run(broken, False).isnan()
        assert nan.any() and (nan | ~case.run(broken, False, "eager").isnan()).all()


def test_extremes(case: Case) -> None:
    for scale in (0, 1e-20, 1e15):
        tensors = case.tensors(2, 200)
        with torch.no_grad():
            for t in tensors[: len(case.features)]:
                t *= scale
        grad = gradient_for(case, tensors, True)
        assert all(torch.isfinite(t).all() for t in forward_backward(case, tensors, grad, True, "fused"))


def test_empty_batch(case: Case) -> None:
    tensors = case.tensors(0, 59)
    y = case.run(tensors, False)
    gradients = torch.autograd.grad(y.sum(), tensors)
    assert y.shape == case.run(case.tensors(1, 59), False)[:0].shape
    assert all(g.shape == t.shape and not g.any() for g, t in zip(gradients, tensors, strict=True))


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("stage", STAGES)
def test_the_statistics_are_those_of_the_output(stage: str, offset: float) -> None:
    """Also where the mean is a thousand times the deviation."""
    channels, shape, options = STAGES[stage]
    for length in (59, 4001):
        x, weight, bias = (t.detach() for t in conv(channels, shape, normed=False).tensors(2, length))
        bias = bias.new_full((len(weight) if "transposed" not in options else weight.shape[1],), offset)
        with use_backend("fused"):
            y, statistics = norm_act_conv(x, weight, bias, want_statistics=True, **options)
            alone = torch.ops.mvat.batch_statistics(y)
        var, mean = torch.var_mean(y.double(), (0, 2), correction=0)
        for got in (statistics, alone):
            torch.testing.assert_close(got, torch.stack((mean, var)).float(), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_running_statistics_are_batch_norms(dtype: torch.dtype) -> None:
    modules = [nn.BatchNorm1d(6, momentum=0.3, dtype=dtype) for _ in range(3)]
    weight = torch.randn(4, 6, 3, dtype=dtype)
    for length in (59, 4001, 127):
        x = 3 + 2 * torch.randn(2, 6, length, dtype=dtype)
        with use_backend("fused"):
            norm_act_conv(x, weight, norm=Norm.of(modules[0]), training=True)
            y, statistics = norm_act_conv(x, torch.eye(6, dtype=dtype)[..., None], want_statistics=True)
            norm_act(y, Norm.of(modules[1]), training=True, statistics=statistics)
        modules[2](x)
    *ours, theirs = modules
    for module in ours:
        assert module.num_batches_tracked == theirs.num_batches_tracked == 3
        torch.testing.assert_close(module.running_mean, theirs.running_mean)
        torch.testing.assert_close(module.running_var, theirs.running_var)
