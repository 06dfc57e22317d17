"""mvat.patch on MANNER's modules as their authors name them: what it changes, and what it must leave alone."""

import copy
import functools
import io
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import mvat
from benchmarks import patch_check
from tests import manner_twin as twin
from tests.manner_twin import MANNER

SIZES = [
    {},
    {"small": True},
    {"hidden": 7, "depth": 2, "kernel_size": 6, "stride": 3, "head": 2, "segment_len": 16},
    {"hidden": 6, "depth": 1, "small": True},
    {"hidden": 4, "depth": 3, "kernel_size": 4, "stride": 2, "small": True},
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On tensors as small as these a second one only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def audio(batch: int = 2, samples: int = 301) -> Tensor:
    return torch.randn(batch, 1, samples)


def run(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """One training pass: output, gradients, buffers."""
    model.train().zero_grad()
    y = model(x)
    (y * torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype)).sum().backward()
    gradients = {f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **gradients, **dict(model.named_buffers())}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype and got[name].shape == value.shape, name
        torch.testing.assert_close(got[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def kinds(model: nn.Module) -> list[str]:
    return [part.kind for part in mvat.patch_report(model).taken]


def classes(model: nn.Module) -> list[tuple[type, set[str]]]:
    return [(type(module), set(vars(module))) for module in model.modules()]


@pytest.mark.parametrize("sizes", SIZES)
def test_the_same_network_only_its_code_is_ours(sizes: dict) -> None:
    model = MANNER(**sizes).double()
    copied, x = copy.deepcopy(model), audio().double()
    parameters, modules, state = list(model.parameters()), list(model.modules()), torch.get_rng_state()
    assert mvat.patch(model) is model
    assert torch.equal(torch.get_rng_state(), state)
    assert kinds(model) == ["Manner"] and mvat.patch_report(model).left == ()
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert isinstance(model, MANNER) and isinstance(model, mvat.Manner) and type(model).__name__ == "MANNER"
    assert model.padding(301) == copied.padding(301)
    assert_same(model.state_dict(), copied.state_dict(), 0)
    assert_same(run(model, x), run(copied, x))
    assert_same({"y": model.eval()(x)}, {"y": copied.eval()(x)})


def test_the_same_losses_with_the_former_optimiser() -> None:
    model = MANNER(depth=1, segment_len=32)
    copied = copy.deepcopy(model)
    optimisers = [torch.optim.Adam(m.parameters(), lr=1e-3) for m in (model, copied)]
    clean = audio(samples=120)
    noisy = clean + 0.3 * audio(samples=120)
    losses: list[list[float]] = [[], []]
    for step in range(20):
        if step == 3:
            mvat.patch(model)
        for m, optimiser, values in zip((model, copied), optimisers, losses, strict=True):
            optimiser.zero_grad()
            loss = (m(noisy) - clean).abs().mean()
            loss.backward()
            optimiser.step()
            values.append(loss.item())
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


@pytest.mark.parametrize("small", [False, True])
def test_unpatch_leaves_no_trace(small: bool) -> None:
    model = MANNER(small=small)
    before = classes(model)
    mvat.patch(model)
    assert classes(model) != before
    run(model, audio())
    assert mvat.unpatch(model) is model
    assert classes(model) == before
    assert classes(mvat.unpatch(model)) == before


BLOCKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ResCon": (lambda: twin.ResConBlock(4, 8), 4),
    "MultiView": (lambda: twin.MultiviewAttentionBlock(7, 8, 2), 7),
    "Encoder": (lambda: twin.Encoder(6, 8, 4, 8, 1), 6),
    "Decoder": (lambda: twin.Decoder(6, 8, 4, 8, 1, attends=False), 12),
    "MaskGate": (lambda: twin.MaskGate(5), 5),
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_inside_another_model(kind: str) -> None:
    make, channels = BLOCKS[kind]
    model = nn.ModuleDict({"mine": nn.Sequential(nn.Conv1d(2, channels, 5), make(), nn.Tanh())}).double()
    x, copied = torch.randn(2, 2, 50).double(), copy.deepcopy(model)
    mvat.patch(model)
    assert [(p.name, p.kind) for p in mvat.patch_report(model).taken] == [("mine.1", kind)]
    assert_same(run(model["mine"], x), run(copied["mine"], x))


def test_an_mvat_model_needs_no_patch() -> None:
    model = mvat.Manner(hidden=6, depth=1, segment_len=8)
    assert type(mvat.patch(model)) is mvat.Manner
    assert "the model (Manner) as Manner: mvat's own" in str(mvat.patch_report(model))


def test_report_before_and_after() -> None:
    model = MANNER()
    model.manner_block.encoder[1].attn_block.register_forward_hook(lambda *_: None)
    before = mvat.patch_report(model)
    assert before.taken == () and "encoder.0 (Encoder) as Encoder: not patched; mvat.patch takes it" in str(before)
    report = mvat.patch_report(mvat.patch(model))
    left = {part.name: part.reason for part in report.left}
    reason = "has hooks, which would not be called"
    assert left == {
        "": f"manner_block.encoder.1.attn_block {reason}",
        "manner_block.encoder.1": f"attn_block {reason}",
    }
    assert "  manner_block.encoder.1.attn_block (MultiviewAttentionBlock) as MultiView\n" in str(report)
    assert "left alone:\n  the model (MANNER) as Manner: " in str(report)


# What is left alone: one thing is changed in a block of an encoder. The other block is taken, and the encoder computes
# what it did.

CASES = []


def left_alone(block: str, reason: str) -> Callable[[Callable[[nn.Module], object]], None]:
    return lambda change: CASES.append(pytest.param(block, reason, change, id=change.__name__))


@left_alone("conv_block", "depth_conv.0.conv has kernel_size (15,) instead of (31,)")
def kernel(block):
    block.depth_conv[0] = twin.Wrapped(6, 6, 15, padding=7, groups=6, bias=False)


@left_alone(
    "conv_block", "conv.conv has parameters {'weight': [12, 12, 1], 'bias': [12]} instead of {'weight': [12, 12"
)
def bias(block):
    block.conv.conv = nn.Conv1d(12, 12, 1)


@left_alone("conv_block", "depth_conv.0.conv has padding_mode 'circular' instead of 'zeros'")
def padding(block):
    block.depth_conv[0].conv.padding_mode = "circular"


@left_alone("conv_block", "it computes something else than ResCon: the output in training differs by")
def activation(block):
    block.depth_conv[2] = nn.Tanh()


@left_alone("conv_block", "a trial of a copy failed: OSError: no such file")
def broken(block):
    block.__class__ = Broken


@left_alone("conv_block", "it has a Dropout of its own, point_conv2.3")
def dropout(block):
    block.point_conv2.append(nn.Dropout())


@left_alone("conv_block", "the output in training differs by")
def dropout_in_forward(block):
    block.__class__ = WithDropout


@left_alone("conv_block", "it computes something else than ResCon")
def forward(block):
    block.__class__ = Louder


@left_alone("conv_block", "it has a forward of its own, set on the instance")
def forward_on_the_instance(block):
    block.forward = functools.partial(type(block).forward, block)


@left_alone("conv_block", "conv.conv is a Causal instead of a Conv1d")
def convolution(block):
    block.conv.conv.__class__ = Causal


@left_alone("conv_block", "conv.bn has track_running_stats False instead of True")
def statistics(block):
    block.conv.bn = nn.BatchNorm1d(12, track_running_stats=False)


@left_alone("conv_block", "conv.bn has no momentum")
def momentum(block):
    block.conv.bn.momentum = None


@left_alone("conv_block", "conv.bn is a SyncBatchNorm instead of a BatchNorm1d")
def norm(block):
    block.conv.bn = nn.SyncBatchNorm(12)


@left_alone("conv_block", "it has a part with parameters of its own, adapter")
def part(block):
    block.adapter = nn.Conv1d(6, 6, 1)


@left_alone("conv_block", "it has parameters {'scale': [1]} instead of {}")
def parameter(block):
    block.scale = nn.Parameter(torch.ones(1))


@left_alone("attn_block", "it has no out_branch2")
def two_branches(block):
    del block.out_branch2
    block.__class__ = TwoBranches


@left_alone("attn_block", "local_attn has an attribute segment_len of its own")
def attribute(block):
    block.local_attn.segment_len = 3


@left_alone("attn_block", "global_attn has an attribute head of its own")
def method(block):
    block.global_attn.__class__ = WithHead


@left_alone("conv_block", "conv.conv is a ParametrizedConv1d instead of a Conv1d")
def weight_norm(block):
    nn.utils.parametrizations.weight_norm(block.conv.conv)


@left_alone("conv_block", "conv.conv has hooks, which would not be called")
def pruning(block):
    prune.l1_unstructured(block.conv.conv, "weight", 1)


@left_alone("conv_block", "conv has hooks")
def forward_hook(block):
    block.conv.register_forward_hook(lambda *_: None)


@left_alone("conv_block", "point_conv1.1 has hooks")
def forward_pre_hook(block):
    block.point_conv1[1].register_forward_pre_hook(lambda *_: None)


@left_alone("attn_block", "global_attn.w_qs has hooks")
def backward_hook(block):
    block.global_attn.w_qs.register_full_backward_hook(lambda *_: None)


@left_alone("attn_block", "dsp has hooks")
def backward_pre_hook(block):
    block.dsp.register_full_backward_pre_hook(lambda *_: None)


@left_alone("conv_block", "conv is compiled")
def compiled_part(block):
    block.conv = torch.compile(block.conv, backend="eager")


@left_alone("conv_block", "it is compiled")
def compiled_in_place(block):
    block.compile(backend="eager")


@left_alone("conv_block", "its parameters are bfloat16, on cpu the kernels take float32 and float64")
def half_precision(block):
    block.bfloat16()


@left_alone("conv_block", "its parameters have several dtypes: float32, float64")
def dtypes(block):
    block.conv.float()


@left_alone("conv_block", "it lies on several devices: cpu, meta")
def devices(block):
    block.conv.to("meta")


@left_alone("conv_block", "it has no values yet (device meta)")
def no_values(block):
    block.to("meta")


@left_alone("conv_block", "conv.bn.running_mean is a Odd instead of a plain tensor")
def kind_of_tensor(block):
    block.conv.bn.running_mean = block.conv.bn.running_mean.as_subclass(Odd)


class Louder(twin.ResConBlock):
    def forward(self, x: Tensor) -> Tensor:
        return 1.001 * super().forward(x)


class WithDropout(twin.ResConBlock):
    def forward(self, x: Tensor) -> Tensor:
        return torch.dropout(super().forward(x), 0.5, self.training)


class TwoBranches(twin.MultiviewAttentionBlock):
    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x)


class Broken(twin.ResConBlock):
    def forward(self, x: Tensor) -> Tensor:
        raise OSError("no such file\nas this one")


class WithHead(twin.GlobalAttention):
    head = 7


class Causal(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).roll(1, 2)


class Odd(Tensor):
    pass


@pytest.mark.parametrize(("block", "reason", "change"), CASES)
def test_left_alone(block: str, reason: str, change: Callable[[nn.Module], object]) -> None:
    encoder = twin.Encoder(6, 8, 4, 8, 1).double()
    change(encoder.get_submodule(block))
    if change.__name__ not in ("half_precision", "dtypes"):
        encoder.double()
    encoder.eval()
    before, x = list(encoder.get_submodule(block).modules()), torch.randn(2, 6, 60).double()
    types = [type(module) for module in before]
    try:
        expected = encoder(x)
    except (RuntimeError, OSError):  # not every one of these encoders computes anything
        expected = None
    mvat.patch(encoder)
    report = mvat.patch_report(encoder)
    left = {part.name: part.reason for part in report.left}
    assert left.keys() == {"", block}
    assert reason in left[block]
    other = {"conv_block": "MultiView", "attn_block": "ResCon"}[block]
    assert [part.kind for part in report.taken] == [other]
    assert [type(module) for module in before] == types
    if expected is not None:
        torch.testing.assert_close(encoder(x), expected, rtol=1e-9, atol=1e-9)


def test_a_part_that_stands_elsewhere_too() -> None:
    model = MANNER()
    model.extra = model.manner_block.encoder[0].conv_block.shortcut
    expected = model.extra(torch.ones(1, 6, 3))
    mvat.patch(model)
    left = {part.name: part.reason for part in mvat.patch_report(model).left}
    assert left["manner_block.encoder.0.conv_block"] == "shortcut stands elsewhere in the model too"
    assert type(model.extra) is twin.BasicConv and torch.equal(model.extra(torch.ones(1, 6, 3)), expected)


@pytest.mark.parametrize("change", [{"eps": 1e-2}, {"config": {}}], ids=str)
def test_a_network_that_differs_gives_its_layers(change: dict) -> None:
    model = MANNER()
    vars(model).update(change)
    assert kinds(mvat.patch(model)) == ["Encoder", "Encoder", "Decoder", "Decoder", "MaskGate"]
    assert vars(model).items() >= change.items()


def test_nothing_to_take_is_an_error_that_changes_nothing() -> None:
    half = MANNER().half()
    before = classes(half)
    with pytest.raises(
        ValueError, match=r"patch: nothing was taken: the model \(MANNER\) as Manner: its param.* float16"
    ):
        mvat.patch(half)
    assert classes(half) == before
    with pytest.raises(ValueError, match="nothing was taken: it has no part of a MANNER network"):
        mvat.patch(nn.Linear(1, 1))
    for function in (mvat.patch, mvat.unpatch, mvat.patch_report):
        with pytest.raises(TypeError, match=f"{function.__name__}: the model must be a module, got dict"):
            function({})


MADE: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "scripted or traced": lambda m: torch.jit.trace(m, torch.randn(2, 6, 9)),
    "a traced graph": torch.fx.symbolic_trace,
}


@pytest.mark.parametrize("name", MADE)
def test_code_that_is_made_already_is_refused(name: str) -> None:
    with warnings.catch_warnings(action="ignore"):  # torch.jit is deprecated
        model = MADE[name](twin.MaskGate(6))
    before = classes(model)
    with pytest.raises(ValueError, match=f"nothing was taken: .* as MaskGate: it is {name}: patch"):
        mvat.patch(model)
    assert classes(model) == before


def test_a_patched_model_compiles_and_is_not_unpatched_then() -> None:
    model = mvat.patch(twin.MultiviewAttentionBlock(6, 8, 1).eval())
    x = torch.randn(2, 6, 50)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    with pytest.raises(ValueError, match="unpatch: the model is compiled"):
        mvat.unpatch(compiled)
    assert kinds(model) == kinds(mvat.patch(compiled)) == ["MultiView"]


# Hooks.


def test_hooks_on_what_is_taken_are_called() -> None:
    model = MANNER()
    called = []
    block = model.manner_block.encoder[0].attn_block
    for name, module in (("model", model), ("attn_block", block)):
        module.register_forward_hook(lambda *_, name=name: called.append(name))
        module.register_full_backward_hook(lambda *_, name=name: called.append(f"{name} backward"))
    mvat.patch(model)
    assert called == []
    assert "manner_block.encoder.0.attn_block" in {part.name for part in mvat.patch_report(model).taken}
    model(audio().requires_grad_()).sum().backward()
    assert sorted(called) == ["attn_block", "attn_block backward", "model", "model backward"]


def test_late_hooks_are_reported_and_patch_looks_afresh() -> None:
    model = mvat.patch(MANNER())
    handle = model.manner_block.encoder[0].register_forward_hook(lambda *_: None)
    assert "manner_block.encoder.0 has hooks, which are not called" in str(mvat.patch_report(model))
    assert kinds(mvat.patch(model)) == ["Encoder", "Encoder", "Decoder", "Decoder", "MaskGate"]
    handle.remove()
    assert kinds(mvat.patch(model)) == ["Manner"]


def test_a_hook_on_all_modules_keeps_everything() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(ValueError, match="every module has hooks"):
            mvat.patch(MANNER())
    finally:
        handle.remove()


# States of a model.


def test_patch_twice_is_patch_once() -> None:
    model = mvat.patch(MANNER())
    before = classes(model)
    assert classes(mvat.patch(model)) == before


def test_a_failure_keeps_a_former_patch() -> None:
    model = mvat.patch(MANNER()).half()
    with pytest.raises(ValueError, match="float16"):
        mvat.patch(model)
    assert kinds(model) == ["Manner"]


def test_frozen_and_tied_parameters() -> None:
    model = MANNER().double()
    block = model.manner_block.encoder[0].attn_block
    block.in_branch1.conv.weight = block.in_branch0.conv.weight
    model.manner_block.decoder.requires_grad_(False)
    block.local_attn.requires_grad_(False)
    copied, x = copy.deepcopy(model), audio().double()
    assert kinds(mvat.patch(model)) == ["Manner"]
    assert block.in_branch1.conv.weight is block.in_branch0.conv.weight
    assert_same(run(model, x), run(copied, x))


def test_batch_norms_kept_in_evaluation() -> None:
    model = MANNER().double()
    copied, x = copy.deepcopy(model), audio().double()
    mvat.patch(model)
    outputs = []
    for m in (model, copied):
        m.train()
        for module in m.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()
        outputs.append({"y": m(x).detach(), **dict(m.named_buffers())})
    assert_same(*outputs)


def test_other_momentum_and_eps_are_kept() -> None:
    model = MANNER().double()
    for i, module in enumerate(m for m in model.modules() if isinstance(m, nn.BatchNorm1d)):
        module.momentum, module.eps = 0.2 + 0.001 * i, 1e-3 * (i + 1)
    copied, x = copy.deepcopy(model), audio().double()
    assert kinds(mvat.patch(model)) == ["Manner"]
    assert_same(run(model, x), run(copied, x))


def test_one_module_at_two_places_of_a_block() -> None:
    model = MANNER().double()
    block = model.manner_block.encoder[0].attn_block
    block.in_branch1 = block.in_branch0
    copied, x = copy.deepcopy(model), audio().double()
    assert kinds(mvat.patch(model)) == ["Manner"]
    assert_same(run(model, x), run(copied, x))
    assert type(mvat.unpatch(model).manner_block.encoder[0].attn_block.in_branch1) is twin.BasicConv


@pytest.mark.parametrize("way", ["deepcopy", "save"])
def test_copies_are_patched_too(way: str) -> None:
    model, x = mvat.patch(MANNER().eval()), audio()
    if way == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert type(other) is type(model) and kinds(other) == ["Manner"]
    assert torch.equal(other(x), model(x))
    assert next(other.parameters()) is not next(model.parameters())
    mvat.unpatch(other)
    assert type(other) is MANNER and kinds(model) == ["Manner"]
    torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-6)


def test_state_dict_goes_both_ways() -> None:
    plain, patched = MANNER(), mvat.patch(MANNER())
    patched.load_state_dict(plain.state_dict())
    assert_same(patched.state_dict(), plain.state_dict(), 0)
    plain.load_state_dict(patched.state_dict())


def test_a_network_gets_what_ours_has(tmp_path) -> None:
    model, x = mvat.patch(MANNER(hidden=7, kernel_size=6, stride=3, small=True).eval()), audio(1)
    assert len(model(x, return_maps=True)) == 2
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(mvat.Manner.from_pretrained(tmp_path)(x), model(x))


def test_data_parallel() -> None:
    model = nn.DataParallel(MANNER())
    x = audio()
    expected = model(x)
    mvat.patch(model)
    assert [part.name for part in mvat.patch_report(model).taken] == ["module"]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_distributed_data_parallel(tmp_path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        plain = MANNER().double()
        model = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
        mvat.patch(model)
        assert [part.name for part in mvat.patch_report(model).taken] == ["module"]
        x = audio().double()
        run(model, x)
        assert_same(run(model.module, x), run(plain, x) and run(plain, x))
    finally:
        torch.distributed.destroy_process_group()


def test_the_check_on_a_checkout_of_manner(
    tmp_path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patch_check, "SECONDS_TO_TIME", 0)
    monkeypatch.setattr(patch_check, "SAMPLES", 1200)
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "models.py").write_text(
        "from tests import manner_twin\n"
        "class MANNER(manner_twin.MANNER):\n"
        "    def __init__(self, in_channels, out_channels, growth, **sizes):\n"
        "        super().__init__(**sizes)\n"
    )
    assert patch_check.main(["tiny", "--manner", str(tmp_path), "--seconds", "0.01", "--steps", "2"]) == 0
    row = capsys.readouterr().out.splitlines()[-1].split(" | ")
    assert row[:2] == ["tiny", "Manner"] and row[7] == "same" and float(row[9]) > 0
