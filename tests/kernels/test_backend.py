import os
import subprocess
import sys
import warnings

import pytest
import torch

from mvat import kernels
from mvat.kernels import attention_map, backend, current_backend, native, use_backend
from mvat.losses import weighted_mrstft_loss
from mvat.models import Manner
from train.config import TransferConfig
from train.transfer import Transfer

needs_kernel = pytest.mark.skipif(
    native.missing("attention_map") is not None, reason=f"no kernel: {native.missing('attention_map')}"
)


@pytest.fixture(autouse=True)
def restored():
    with use_backend(current_backend()):
        yield


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch):
    """An op with a kernel for float32 on the CPU only: op(dtype) says which implementation runs."""

    def supports(device: str, dtype: torch.dtype) -> str | None:
        return None if (device, dtype) == ("cpu", torch.float32) else f"no kernel for {dtype}"

    monkeypatch.setattr(backend, "_supports", {**backend._supports, "an_op": supports})
    monkeypatch.setattr(backend, "_warned", set())
    return lambda dtype: backend.use_fused("an_op", torch.zeros(1, dtype=dtype))


def test_a_call_holds_and_a_context_restores() -> None:
    assert current_backend() == os.environ.get("MVAT_BACKEND", "auto")
    use_backend("eager")
    assert current_backend() == "eager"
    with use_backend("fused"):
        assert current_backend() == "fused"
        with use_backend("auto"):
            assert current_backend() == "auto"
            with pytest.raises(KeyError), use_backend("eager"):
                raise KeyError
            assert current_backend() == "auto"
        assert current_backend() == "fused"
    assert current_backend() == "eager"


@pytest.mark.parametrize("mode", ["cuda", "", None, 1])
def test_an_unknown_mode_is_refused_and_changes_nothing(mode: object) -> None:
    use_backend("eager")
    with pytest.raises(ValueError, match="the back end must be one of auto, fused, eager, got"):
        use_backend(mode)
    assert current_backend() == "eager"


def run(code: str, mode: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "MVAT_BACKEND": mode}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_the_environment_variable() -> None:
    result = run("import mvat.kernels; print(mvat.kernels.current_backend())", "eager")
    assert result.stdout == "eager\n", result.stderr
    assert run("import mvat.kernels", "fast").returncode == 0
    result = run("import mvat.kernels; mvat.kernels.current_backend()", "fast")
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.endswith("the environment variable MVAT_BACKEND must be one of auto, fused, eager, got 'fast'")


def test_what_each_mode_takes(op) -> None:
    use_backend("fused")
    assert op(torch.float32)
    with pytest.raises(RuntimeError, match='an_op: the back end is "fused", but .* no kernel for torch.float64'):
        op(torch.float64)
    use_backend("eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not op(torch.float32) and not op(torch.float64)


def test_one_warning_an_op_and_reason(op) -> None:
    use_backend("auto")
    assert op(torch.float32)
    with pytest.warns(RuntimeWarning, match="an_op runs the plain PyTorch reference: no kernel for .*64") as seen:
        assert not op(torch.float64) and not op(torch.float64)
    assert len(seen) == 1 and seen[0].filename == __file__
    with pytest.warns(RuntimeWarning, match="no kernel for torch.float16") as seen:
        assert not op(torch.float16) and not op(torch.float16)
    assert len(seen) == 1


def test_an_op_may_refuse_a_call_by_its_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_supports", {"an_op": lambda device, dtype: None})
    monkeypatch.setattr(backend, "_warned", set())
    with use_backend("fused"):
        assert backend.use_fused("an_op", torch.zeros(1))
        with pytest.raises(RuntimeError, match="on cpu it takes one head"):
            backend.use_fused("an_op", torch.zeros(1), "it takes one head")
    with use_backend("auto"), pytest.warns(RuntimeWarning, match="it takes one head"):
        assert not backend.use_fused("an_op", torch.zeros(1), "it takes one head")


def test_an_op_that_nobody_has_written_yet_does_not_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_supports", {"an_op": backend.not_written})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with use_backend("auto"):
            assert not backend.use_fused("an_op", torch.zeros(1))
    with use_backend("fused"), pytest.raises(RuntimeError, match="no fused kernel is written yet"):
        backend.use_fused("an_op", torch.zeros(1))


def test_the_table_has_every_op_device_and_dtype(op) -> None:
    rows = backend.table()
    public = {"attention_map", "attention_transfer_loss", "channel_attention", "global_attention", "local_attention"}
    assert public | {"mask_gate", "norm_act_conv", "an_op"} <= {row.op for row in rows}
    assert public <= set(kernels.__all__)
    assert len({row[:3] for row in rows}) == len(rows) == len({row.op for row in rows}) * 2 * 4
    assert all((row.implementation == "fused") == (row.reason == "") for row in rows)
    assert ("an_op", "cpu", "float32", "fused", "") in rows
    assert ("an_op", "cuda", "float32", "reference", "no kernel for torch.float32") in rows


def fused_calls(function) -> set[str]:
    with torch.profiler.profile() as profile:
        function()
    return {event.key for event in profile.key_averages() if event.key.startswith("mvat::")}


def everything() -> None:
    """Every op forward, and backward where it has a gradient."""
    model, x = Manner(hidden=6, depth=1, segment_len=8), torch.randn(2, 1, 50)
    y, views = model(x, return_views=True)
    maps = model(x, return_maps=True)
    loss = kernels.attention_transfer_loss([v for block in views for v in block], [q for block in maps for q in block])
    (y.sum() + loss).backward()


def test_eager_calls_no_kernel() -> None:
    with use_backend("eager"):
        assert fused_calls(everything) == set()


@needs_kernel
def test_auto_calls_the_kernels() -> None:
    with use_backend("auto"):
        called = fused_calls(everything)
    ops = {"attention_transfer_loss", "channel_attention", "local_attention", "mask_gate", "norm_act_conv", "norm_act"}
    assert {f"mvat::{op}{which}" for op in ops for which in ("", "_backward")} | {"mvat::attention_map"} <= called


@needs_kernel
def test_a_training_step_of_a_preset_runs_the_kernels() -> None:
    """One step of s-4.1gf distilled from itself: forward, loss, backward, Adam."""
    student, teacher = (Manner.from_preset("s-4.1gf") for _ in range(2))
    transfer = Transfer(TransferConfig(method="mvat"), student, teacher)
    optimizer = torch.optim.Adam(student.parameters())
    noisy = torch.randn(1, 1, 1600)

    def step() -> None:
        estimate, distance = transfer.student_and_loss(student.train(), noisy)
        (weighted_mrstft_loss(estimate, noisy, 1.1 * noisy) + distance).backward()
        optimizer.step()

    with use_backend("auto"):
        called = fused_calls(step)
    views = {"channel_attention", "global_attention", "local_attention"}
    ops = {"attention_transfer_loss", *views, "mask_gate", "norm_act_conv", "norm_act"}
    assert {f"mvat::{op}{which}" for op in ops for which in ("", "_backward")} | {"mvat::attention_map"} <= called
    assert "mvat::norm_gradient" in called


@needs_kernel
def test_a_compiled_function_follows_the_switch() -> None:
    torch._dynamo.reset()
    x = torch.randn(2, 3, 9)
    compiled = torch.compile(attention_map, fullgraph=True, backend="eager")
    for mode, kernel in (("auto", True), ("eager", False), ("fused", True)):
        with use_backend(mode):
            assert bool(fused_calls(lambda: compiled(x))) == kernel
