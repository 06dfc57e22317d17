"""Statistics over several processes: two on a CPU compute what one does that holds the whole batch.

The processes are started once and go through all checks, each of which is a function of this file that both run.
"""

import contextlib
import copy
import json
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mvat.kernels import Norm, local_attention, mask_gate, native, norm_act, norm_act_conv, use_backend
from mvat.models import Manner, SyncBatchNorm1d, sync_batch_norm

WORLD = 2
CLIPS = 4
FUSED = native.missing("norm_act_conv") is None
MODES = ("fused", "eager") if FUSED else ("eager",)
SHARDS = {"equal": (2, 2), "unequal": (1, 3), "an empty one": (0, 4)}


class Op(NamedTuple):
    """A call: the channels of its features, the shapes of its weights, the channels of its norms, the call itself."""

    features: tuple[int, ...]
    weights: tuple[tuple[int, ...], ...]
    norms: tuple[int, ...]
    call: Callable[[list[Tensor], list[Tensor], list[Norm]], Tensor]


def chain(x: list[Tensor], weights: list[Tensor], norms: list[Norm]) -> Tensor:
    """Stages that hand their output's statistics on."""
    y, of_y = norm_act_conv(x[0], weights[0], padding=1, want_statistics=True)
    z, of_z = norm_act_conv(
        y, weights[1], norm=norms[0], activation="glu", training=True, statistics=of_y, want_statistics=True
    )
    return norm_act(
        z,
        norms[1],
        "silu",
        shortcut=y,
        shortcut_norm=norms[2],
        training=True,
        statistics=of_z,
        shortcut_statistics=of_y,
    )


GATE = ((5, 6, 1), (5,), (5, 6, 1), (5,), (4, 5, 1), (4,))
OPS = {
    "norm_act_conv": Op(
        (6,),
        ((5, 3, 3), (5,)),
        (6,),
        lambda x, w, n: norm_act_conv(*x, *w, norm=n[0], activation="glu", stride=2, training=True),
    ),
    "norm_act": Op((6,), (), (6,), lambda x, w, n: norm_act(*x, *n, "glu", training=True)),
    "norm_act with a shortcut": Op(
        (6, 6),
        (),
        (6,),
        lambda x, w, n: norm_act(x[0], n[0], "relu", shortcut=x[1], training=True),
    ),
    "a chain": Op((3,), ((6, 3, 3), (6, 3, 1)), (6, 6, 6), chain),
    "mask_gate": Op((6,), GATE, (6,), lambda x, w, n: mask_gate(*x, *w, norm=n[0], training=True)),
    "mask_gate with a shortcut": Op(
        (6, 4),
        GATE,
        (6, 4),
        lambda x, w, n: mask_gate(x[0], *w, x[1], norm=n[0], shortcut_norm=n[1], training=True),
    ),
    "mask_gate with a norm of the shortcut alone": Op(
        (6, 4), GATE, (4,), lambda x, w, n: mask_gate(x[0], *w, x[1], shortcut_norm=n[0], training=True)
    ),
    "local_attention": Op(
        (3,),
        ((3, 1, 5), (1, 2, 3)),
        (3, 1),
        lambda x, w, n: local_attention(x[0], w[0], n[0], w[1], n[1], segment_len=8, training=True),
    ),
}
#: Those of one feature whose output is shaped like it, without a kink in them.
SMOOTH = {
    "norm_act": Op((3,), (), (3,), lambda x, w, n: norm_act(*x, *n, "silu", training=True)),
    "local_attention": OPS["local_attention"],
}


class Result(NamedTuple):
    """Of one pass: output, gradients of the features, gradients of the parameters, running statistics."""

    y: Tensor
    features: list[Tensor]
    parameters: list[Tensor]
    running: list[Tensor]


def run(op: Op, clips: slice, group, dtype: torch.dtype = torch.float64, offset: float = 0.0) -> Result:
    """One pass of the op over these of the clips, which are the same in every process; the loss is a sum over them."""
    torch.manual_seed(0)
    normal = partial(torch.randn, dtype=torch.float64)
    features = [(normal(CLIPS, channels, 41) + offset).to(dtype)[clips].requires_grad_() for channels in op.features]
    weights = [(normal(shape) / 2).to(dtype).requires_grad_() for shape in op.weights]
    affine = [(1 + normal(c) / 4).to(dtype).requires_grad_() for c in op.norms for _ in range(2)]
    running = [make(c, dtype=dtype) for c in op.norms for make in (torch.zeros, torch.ones)]
    norms = [Norm(*affine[i : i + 2], *running[i : i + 2], 0.3, 1e-3, group) for i in range(0, len(affine), 2)]
    y = op.call(features, weights, norms)
    factors = normal(CLIPS, *y.shape[1:]).to(dtype)[clips]
    gradients = torch.autograd.grad((y * factors).sum(), [*features, *weights, *affine])
    return Result(y.detach(), list(gradients[: len(features)]), list(gradients[len(features) :]), running)


def own(shards: tuple[int, ...]) -> slice:
    start = sum(shards[: dist.get_rank()])
    return slice(start, start + shards[dist.get_rank()])


def summed(values: list[Tensor]) -> list[Tensor]:
    for value in values:
        dist.all_reduce(value)
    return values


def same(ours: object, expected: object, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def check_op(op: Op, shards: tuple[int, ...], mode: str) -> None:
    with use_backend(mode):
        expected, ours = run(op, slice(None), None), run(op, own(shards), dist.group.WORLD)
    same(ours.y, expected.y[own(shards)])
    same(ours.features, [grad[own(shards)] for grad in expected.features])
    same(summed(ours.parameters), expected.parameters)
    same(ours.running, expected.running)


def check_rounding(op: Op, mode: str) -> None:
    """In float32 at most twice as far from float64 as one process, all values together: one alone may be lucky."""
    clips = own(SHARDS["unequal"])
    with use_backend(mode):
        exact = run(op, slice(None), None)
        single = run(op, slice(None), None, torch.float32)
        ours = run(op, clips, dist.group.WORLD, torch.float32)
    pairs = [
        ((ours.y, single.y[clips]), exact.y[clips]),
        *zip(zip(summed(ours.parameters), single.parameters, strict=True), exact.parameters, strict=True),
        *zip(zip(ours.running, single.running, strict=True), exact.running, strict=True),
    ]
    error, allowed = (
        sum(((values[i] - right).norm() / right.norm()).item() ** 2 for values, right in pairs) ** 0.5 for i in (0, 1)
    )
    assert error <= 2 * allowed


def check_far_from_zero(mode: str) -> None:
    """A variance of 1 about a mean of 10^4, where sums of squares in float32 would leave nothing of it."""
    with use_backend(mode):
        exact = run(OPS["norm_act"], slice(None), None, torch.float64, 1e4)
        ours = run(OPS["norm_act"], own(SHARDS["unequal"]), dist.group.WORLD, torch.float32, 1e4)
    same([v.double() for v in ours.running], exact.running, 1e-3)


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """The sizes of the messages that are sent meanwhile."""
    sizes, send = [], dist.all_reduce
    dist.all_reduce = lambda x, *args, **options: (sizes.append(x.numel()), send(x, *args, **options))[1]
    try:
        yield sizes
    finally:
        dist.all_reduce = send


def check_messages() -> None:
    """One a pass and op, whatever the number of its norms."""
    with use_backend("fused"), counted() as sizes:
        run(OPS["mask_gate with a shortcut"], own((2, 2)), dist.group.WORLD)
    assert sizes == [WORLD * (1 + 2 * (6 + 4)), 2 * (6 + 4) + 1]


def check_second_derivative(op: Op, mode: str) -> None:
    """The fused kernels have none and say so; the reference's goes through the other processes too."""

    def second(clips: slice, group) -> Tensor:
        torch.manual_seed(0)
        x, factors = torch.randn(2, CLIPS, op.features[0], 17, dtype=torch.float64)[:, clips]
        weights = [torch.randn(shape, dtype=torch.float64) for shape in op.weights]
        norms = [Norm(*torch.stack([torch.ones(c)] * 4).double(), group=group) for c in op.norms]
        y = op.call([x.requires_grad_()], weights, norms)
        (first,) = torch.autograd.grad((y * factors).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    clips = own(SHARDS["unequal"])
    with use_backend(mode):
        if mode == "fused":
            with pytest.raises(RuntimeError, match="second derivative"):
                second(clips, dist.group.WORLD)
        else:
            same(second(clips, dist.group.WORLD), second(slice(None), None)[clips])


def check_compiled() -> None:
    """In one graph, messages included."""
    op = OPS["norm_act"]
    compiled = torch.compile(op.call, backend="aot_eager", fullgraph=True)
    check_op(op._replace(call=compiled), SHARDS["unequal"], "fused")


def check_autocast() -> None:
    """A CPU's kernels stay in float32, and so does what stands beside them."""
    op, clips = OPS["local_attention"], own(SHARDS["unequal"])
    with use_backend("fused"), torch.autocast("cpu", torch.bfloat16):
        expected = run(op, slice(None), None, torch.float32)
        ours = run(op, clips, dist.group.WORLD, torch.float32)
    same(ours.y, expected.y[clips], 1e-5)
    same(ours.features, [grad[clips] for grad in expected.features], 1e-5)


def check_checkpoint(mode: str) -> None:
    op = OPS["a chain"]._replace(call=partial(checkpoint, chain, use_reentrant=False))
    check_op(op, SHARDS["unequal"], mode)


def check_a_single_value() -> None:
    x, ones = torch.randn(1 - dist.get_rank(), 3, 1), torch.ones(3)
    for mode in MODES:
        norm = Norm(ones, ones, torch.zeros(3), torch.ones(3), group=dist.group.WORLD)
        with use_backend(mode), pytest.raises(ValueError, match="more than 1 value per channel"):
            norm_act(x, norm, training=True)
        # No process has any: nothing to normalise, nothing to move.
        with use_backend(mode):
            assert norm_act(x[:0], norm, training=True).shape == (0, 3, 1)
        assert torch.equal(norm.running_mean, torch.zeros(3)) and torch.equal(norm.running_var, torch.ones(3))


def small() -> Manner:
    torch.manual_seed(0)
    return Manner(hidden=6, depth=1, segment_len=16).double()


def check_model(shards: tuple[int, ...], mode: str) -> None:
    """A step under DistributedDataParallel: the gradients of the mean over all clips."""
    single = small()
    shared = sync_batch_norm(copy.deepcopy(single))
    noisy, clean = torch.randn(2, CLIPS, 1, 331, dtype=torch.float64)
    clips = own(shards)
    with use_backend(mode):
        expected = single(noisy)
        (expected - clean).square().mean().backward()
        model = nn.parallel.DistributedDataParallel(shared)
        ours = model(noisy[clips])
        ((ours - clean[clips]).square().mean((1, 2)).sum() * (WORLD / CLIPS)).backward()
    same(ours, expected[clips])
    same([p.grad for p in shared.parameters()], [p.grad for p in single.parameters()])
    same(shared.state_dict(), single.state_dict())


def check_model_without_gradient() -> None:
    single = small()
    shared = copy.deepcopy(sync_batch_norm(copy.deepcopy(single), dist.new_group()))
    x = torch.randn(CLIPS, 1, 331, dtype=torch.float64)
    clips = own(SHARDS["unequal"])
    with torch.no_grad():
        same(shared(x[clips]), single(x)[clips])
        with counted() as sizes:
            same(shared.eval()(x[clips]), single.eval()(x)[clips])
    assert not sizes
    same(shared.state_dict(), single.state_dict())


def check_module_alone() -> None:
    x = torch.randn(CLIPS, 5, dtype=torch.float64)
    dist.broadcast(x, 0)
    clips = own(SHARDS["unequal"])
    same(sync_batch_norm(nn.BatchNorm1d(5).double())(x[clips]), nn.BatchNorm1d(5).double()(x)[clips])


CHECKS: dict[str, Callable[[], None]] = {
    **{
        f"{name}, {shards}, {mode}": partial(check_op, op, sizes, mode)
        for name, op in OPS.items()
        for shards, sizes in SHARDS.items()
        for mode in MODES
    },
    **{
        f"rounding of {name}, {mode}": partial(check_rounding, OPS[name], mode)
        for name in ("a chain", "mask_gate with a shortcut", "local_attention")
        for mode in MODES
    },
    **{
        f"second derivative of {name}, {mode}": partial(check_second_derivative, op, mode)
        for name, op in SMOOTH.items()
        for mode in MODES
    },
    **{f"checkpoint, {mode}": partial(check_checkpoint, mode) for mode in MODES},
    **{f"model, {name}, {mode}": partial(check_model, SHARDS[name], mode) for name in SHARDS for mode in MODES},
    **({"messages": check_messages, "compiled": check_compiled, "autocast": check_autocast} if FUSED else {}),
    **{f"far from zero, {mode}": partial(check_far_from_zero, mode) for mode in MODES},
    "a single value": check_a_single_value,
    "model without a gradient": check_model_without_gradient,
    "module alone": check_module_alone,
}


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=WORLD, timeout=timedelta(seconds=20)
    )
    errors: dict[str, str] = {}
    for name, check in CHECKS.items():
        if errors:  # the other process may be at another message: no more can be said
            errors[name] = f"not reached after {next(iter(errors))}"
            continue
        try:
            check()
        except Exception:
            errors[name] = traceback.format_exc()
    Path(folder, f"{rank}.json").write_text(json.dumps(errors))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(process, (str(folder),), WORLD)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes_compute_what_one_does(name: str, errors: list[dict[str, str]]) -> None:
    for rank, found in enumerate(errors):
        assert name not in found, f"process {rank}: {found[name]}"


def test_one_process_computes_what_it_did() -> None:
    single = small()
    shared = sync_batch_norm(copy.deepcopy(single))
    assert sum(isinstance(module, SyncBatchNorm1d) for module in shared.modules()) > 20
    assert list(shared.state_dict()) == list(single.state_dict())
    x = torch.randn(2, 1, 331, dtype=torch.float64)
    results = []
    for model in (single, shared):
        y = model(x)
        y.square().mean().backward()
        results.append([y, *[p.grad for p in model.parameters()], *model.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_optimisers_and_states_stay_what_they_are() -> None:
    model = small()
    parameters, buffers = list(model.parameters()), list(model.buffers())
    assert sync_batch_norm(model) is model
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(a is b for a, b in zip(buffers, model.buffers(), strict=True))


def test_a_norm_in_several_places_stays_one() -> None:
    norm = nn.BatchNorm1d(3)
    model = sync_batch_norm(nn.Sequential(norm, nn.ReLU(), norm, nn.Sequential(norm)))
    assert isinstance(model[0], SyncBatchNorm1d) and model[0] is model[2] is model[3][0]


def test_pytorch_own_conversion_is_understood() -> None:
    model = small().eval()
    x = torch.randn(2, 1, 331, dtype=torch.float64)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert torch.equal(converted(x), model(x))
    assert torch.equal(converted.train()(x), model.train()(x))


def test_norms_of_different_groups_are_refused() -> None:
    x, ones = torch.randn(2, 3, 5), torch.ones(3)
    norms = [Norm(ones, ones, ones, ones, group=group) for group in (None, object())]
    with pytest.raises(ValueError, match="norm_act: its norms must have the same process group"):
        norm_act(x, norms[0], shortcut=x, shortcut_norm=norms[1], training=True)


def test_a_norm_without_statistics_is_refused() -> None:
    with pytest.raises(ValueError, match="a norm needs affine parameters"):
        sync_batch_norm(nn.Sequential(nn.BatchNorm1d(3, affine=False)))
