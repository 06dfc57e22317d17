"""One move of the optimiser: accumulation, clipping, averaging, what is not finite, precision."""

import math
import typing

import pytest
import torch
from accelerate.state import AcceleratorState

from mvat.kernels import use_backend
from mvat.kernels.attention_transfer_loss import FORMS
from mvat.losses import ENHANCEMENT_LOSSES
from mvat.models import Manner
from train import processes
from train.config import DataConfig, Form, ModelConfig, OptimConfig, RunConfig, TransferConfig, check
from train.step import Average, Delayed, Statistics, Step
from train.transfer import Transfer

TINY = Manner(hidden=6, depth=1).config


@pytest.fixture(autouse=True)
def precision():
    """accelerate settles on the first precision that a process asks for."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def make(teacher=None, method="none", moves=10, **optim) -> Step:
    torch.manual_seed(0)
    config = RunConfig(
        "run",
        ModelConfig(None, TINY),
        DataConfig("data"),
        OptimConfig(1, 2, **optim),
        transfer=TransferConfig(method),
    )
    accelerator, model = processes.start(config.optim), Manner(**TINY)
    transfer = Transfer(config.transfer, model, teacher).to(accelerator.device)
    return Step(config, accelerator, model, transfer, moves)


def batch(seed, size=2, length=1600):
    generator = torch.Generator().manual_seed(seed)
    clean = 0.1 * torch.randn(size, 1, length, generator=generator)
    noisy = clean + 0.05 * torch.randn(size, 1, length, generator=generator)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return clean.to(device), noisy.to(device)


def go(step, batches, count=1):
    """One move; its report."""
    (report,) = step(batches, count, 0, False) or step.finish()
    return report


def state(step):
    """All that a move may change."""
    tensors = dict(step.model.state_dict())
    for i, values in step.optimizer.state_dict()["state"].items():
        tensors |= {f"{i}.{name}": value for name, value in values.items()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("method", ["none", "mvat"])
def test_accumulated_batches_move_as_one_big_batch(method):
    """Batch norms in evaluation mode, since a batch's own statistics are those of its size."""
    teacher = Manner(**TINY) if method == "mvat" else None
    parts, whole = (make(teacher, method) for _ in range(2))
    for step in (parts, whole):
        step.model.eval()
    batches = [batch(seed) for seed in range(3)]
    before = [p.detach().clone() for p in whole.model.parameters()]
    together = tuple(torch.cat(tracks) for tracks in zip(*batches, strict=True))
    a, b = go(parts, batches, 3), go(whole, [together])
    assert a.parts == pytest.approx(b.parts, rel=1e-4) and (a.batches, b.batches) == (3, 1)
    # Adam's first move is the gradient's sign where it is not tiny: compare what it keeps of the gradient.
    for p, q in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        first, second = (s.optimizer.state[x]["exp_avg"] for s, x in ((parts, p), (whole, q)))
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-6)
    assert any(not torch.equal(p, q) for p, q in zip(before, whole.model.parameters(), strict=True))


def test_an_incomplete_group_moves_by_its_own_mean():
    first, second = make(accumulate=4), make()
    go(first, [batch(0)]), go(second, [batch(0)])
    assert all(torch.equal(a, b) for a, b in zip(state(first).values(), state(second).values(), strict=True))


def test_the_gradient_is_clipped_and_its_own_norm_reported():
    step = make(clip=0.01)
    seen = []
    step.optimizer.register_step_pre_hook(
        lambda optimizer, *_: seen.append(
            torch.nn.utils.get_total_norm([p.grad for p in step.model.parameters() if p.grad is not None])
        )
    )
    report = go(step, [batch(0)])
    assert seen[0].item() == pytest.approx(0.01, rel=1e-3)
    assert report.parts["gradient_norm"] > 0.02


def test_the_average_follows_its_formula():
    model = torch.nn.BatchNorm1d(3)
    average = Average(model, 0.15)
    expected = {name: value.double() for name, value in model.state_dict().items()}
    for n in range(5):
        for value in model.state_dict().values():
            value += 2 if value.dtype == torch.int64 else torch.randn(3)
        average.update(model)
        d = min(0.15, (1 + n) / (10 + n))
        for name, value in model.state_dict().items():
            expected[name] = expected[name] * d + value.double() * (1 - d)
    for name, value in average.model.state_dict().items():
        if value.dtype == torch.int64:
            assert value == 10 == model.state_dict()[name]
        else:
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert average.moves == 5 and not average.model.training


@pytest.mark.parametrize("what", ["input", "loss", "gradient"])
def test_what_is_not_finite_changes_nothing(what, monkeypatch):
    step = make(clip=1.0)
    go(step, [batch(0)])
    before = state(step)
    clean, noisy = batch(1)
    if what == "input":
        noisy[0, 0, 100] = math.nan
    elif what == "loss":
        clean[0, 0, 100] = math.inf
    else:
        parameter = next(step.model.parameters())
        handle = parameter.register_hook(lambda gradient: gradient * math.inf)
    report = go(step, [batch(2), (clean, noisy)], 3)  # a good batch beside the bad one
    assert not report.finite and report.batches == 2
    after = state(step)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    if what == "gradient":
        handle.remove()
    assert go(step, [batch(2)], 4).finite
    assert not torch.equal(before["manner_block.in_conv.0.weight"], state(step)["manner_block.in_conv.0.weight"])
    assert all(torch.isfinite(value).all() for value in state(step).values())


def test_statistics_come_back_only_where_told():
    norm = torch.nn.BatchNorm1d(2)
    statistics = Statistics(norm)
    statistics.keep()
    norm(torch.full((4, 2), math.nan))
    statistics.restore(torch.tensor(0.0))
    assert norm.running_mean.isnan().all() and norm.num_batches_tracked == 1
    statistics.restore(torch.tensor(1.0))
    assert norm.running_mean.tolist() == [0, 0] and norm.num_batches_tracked == 0


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_bfloat16_trains_on_a_cpu_too(backend):
    """The references compute in it; the fused kernels of a CPU stay in float32."""
    teacher = Manner(**TINY)
    with use_backend(backend):
        step = make(teacher, "mvat", precision="bf16")
        losses = [go(step, [batch(0)]).parts["total"] for _ in range(4)]
        AcceleratorState._reset_state(True)
        plain = go(make(teacher, "mvat"), [batch(0)]).parts["total"]
    assert losses[-1] < losses[0] == pytest.approx(plain, rel=0.05)
    assert (losses[0] != plain) == (backend == "eager")
    assert all(p.dtype == torch.float32 for p in step.model.parameters())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_float16_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match='optim.precision "fp16" needs a GPU'):
        check(RunConfig("run", ModelConfig(), DataConfig("data"), OptimConfig(precision="fp16")))


def test_a_scaled_loss_moves_as_a_plain_one_and_its_scale_falls_where_nothing_moves():
    """The way of float16, which a CPU goes too where it is given a scaler."""
    scaled, plain = make(clip=0.1), make(clip=0.1)
    scaled.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    a, b = go(scaled, [batch(0)]), go(plain, [batch(0)])
    assert a.finite and a.parts == pytest.approx(b.parts, rel=1e-4)
    for name, value in state(plain).items():
        torch.testing.assert_close(state(scaled)[name], value, rtol=1e-3, atol=1e-6)
    before = state(scaled)
    clean, noisy = batch(1)
    assert not go(scaled, [(clean, noisy * math.nan)]).finite
    assert all(torch.equal(before[name], value) for name, value in state(scaled).items())
    assert scaled.accelerator.scaler.get_scale() == 512.0


def test_a_compiled_step_moves_as_a_plain_one_and_keeps_the_names(monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile(model, backend="eager"))
    compiled, plain = make(compile=True), make()
    a, b = go(compiled, [batch(0)]), go(plain, [batch(0)])
    assert a.parts == pytest.approx(b.parts, rel=1e-4)
    assert compiled.model.state_dict().keys() == Manner(**TINY).state_dict().keys()


def test_the_host_reads_late_and_in_order_on_a_gpu_and_at_once_on_a_cpu():
    delayed = Delayed(torch.device("cpu"))
    assert delayed.push(torch.tensor([1.0, 2.0]), (7,)) == [([1.0, 2.0], 7)] and delayed.drain() == []
    delayed._lag = 2
    assert [delayed.push(torch.tensor([float(i)]), (i,)) for i in range(3)] == [[], [], [([0.0], 0)]]
    assert delayed.drain() == [([1.0], 1), ([2.0], 2)]


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_step_on_a_gpu_never_waits_and_skips_there(precision):
    step = make(precision=precision, clip=1.0, ema=0.9)
    batches = [batch(seed) for seed in range(4)]
    bad = (batches[0][0], batches[0][1] * math.nan)
    for i, each in enumerate(batches):  # first of all kernels are built and memory is had
        step([each], i, 0, False)
    step.finish()
    before = state(step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step([bad], 5, 0, False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [report.finite for report in step.finish()] == [False]
    assert all(torch.equal(before[name], value) for name, value in state(step).items())


def test_a_configuration_can_name_every_loss_and_form():
    hints = typing.get_type_hints(OptimConfig)
    assert sorted(typing.get_args(hints["loss"])) == sorted(ENHANCEMENT_LOSSES)
    assert typing.get_args(Form) == FORMS
