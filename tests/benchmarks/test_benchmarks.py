"""The benchmarks themselves, on tiny shapes: answers, shapes, the command. No time is asserted anywhere."""

import dataclasses
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import machine, results
from benchmarks.__main__ import KERNELS, WHOLE, collect, main
from benchmarks.bench_global_attention import stock
from benchmarks.floors import Rates
from benchmarks.harness import Settings, Variant, measure
from benchmarks.results import Row
from benchmarks.shapes import build, layers, points
from benchmarks.steps import audio, step
from mvat.kernels import backend
from mvat.kernels.global_attention import global_attention_reference
from mvat.models import Manner
from mvat.models.blocks import ChannelAttention, LocalAttention

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_every_benchmark_and_every_op_is_in_the_command() -> None:
    files = {path.stem.removeprefix("bench_") for path in BENCHMARKS.glob("bench_*.py")}
    assert files == {*KERNELS, *WHOLE}
    assert {row.op for row in backend.table(("cpu",))} == set(KERNELS)


@pytest.mark.parametrize("kind", [ChannelAttention, LocalAttention])
def test_the_check_of_a_model_sees_a_view_that_is_a_tenth_off(kind: type[torch.nn.Module]) -> None:
    def make_wrong() -> torch.nn.Module:
        model = build("tiny")
        view = next(module for module in model.modules() if isinstance(module, kind))
        view.register_forward_hook(lambda module, inputs, output: 1.1 * output)
        return model

    (case,) = collect(["model"], Settings(quick=True))
    (row,) = measure(dataclasses.replace(case, variants={"wrong": Variant(make_wrong)}), Settings(quick=True), None)
    assert row.status == "wrong"


def test_full_runs_name_every_preset_length_and_batch() -> None:
    everything = points(quick=False)
    assert {point.preset for point in everything} == {"base", "small", "s-8.1gf"}
    assert {point.seconds for point in everything} == {1, 4, 10} and {point.batch for point in everything} == {1, 4, 16}
    assert sum(point.named for point in everything) == 2


def test_shapes_are_those_of_the_model() -> None:
    found = layers("base", 64_000, ChannelAttention)
    assert [(x.name, x.channels, x.length) for x in (found[3], found[-1])] == [
        ("encoder.3", 320, 249),
        ("decoder.3", 20, 64_084),
    ]
    assert len(found) == 8


def test_every_case_of_a_full_run_has_a_name_of_its_own() -> None:
    cases = collect(KERNELS, Settings())
    names = [(case.op, *case.shape.items(), *case.passes) for case in cases]
    assert len(names) == len(set(names))
    assert {case.shape["pairs"] for case in cases if case.op == "attention_transfer_loss"} == {24}


@pytest.mark.parametrize("distils", [False, True])
def test_a_step_trains(distils: bool) -> None:
    arguments = {"hidden": 6, "depth": 1, "segment_len": 8}
    student = Manner(**arguments)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    clean, noisy = audio(1, 1100)
    loss, *gradients = step(student, Manner(**arguments) if distils else None)(clean, noisy)
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients)
    assert len(gradients) == len(before)
    for (name, p), gradient in zip(student.named_parameters(), gradients, strict=True):
        assert torch.equal(p, before[name]) == (not gradient.any()), name


@pytest.mark.parametrize("heads", [1, 3])
def test_the_stock_composition_is_the_op(heads: int) -> None:
    width = 8 * heads * heads
    shapes = (2, 3, 61), (width, 8), (width, 8), (width, 8), (8, width)
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    torch.testing.assert_close(stock(*tensors, heads, 8), global_attention_reference(*tensors, heads, 8))


def test_quick_command_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--only", "attention_map", "--out", str(tmp_path)]) == 0
    assert "eager        right" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_timed_command_writes_a_results_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class KnownRates(Rates):
        def bandwidth(self, working_set: int) -> float:
            return 1e12

    monkeypatch.setattr(command, "collect", lambda names, settings: collect(names, Settings(quick=True))[:1])
    monkeypatch.setattr(command, "Rates", KnownRates)
    monkeypatch.setattr(KnownRates, "peaks", lambda self, dtype: {"product": 1e12})
    monkeypatch.setattr(machine, "commit_info", lambda: {"id": "abcdef0", "dirty": False, "code": "c0de"})
    assert main(["--only", "attention_map", "--out", str(tmp_path)]) == 0
    assert "former run" not in capsys.readouterr().out
    assert main(["--only", "attention_map", "--out", str(tmp_path)]) == 0
    assert "rows agree with a former run of this code" in capsys.readouterr().out
    (path,) = tmp_path.glob("*/*.json")
    assert path.name.endswith("-abcdef0-attention_map.json")
    rows, info, commit = results.read(path)
    assert {row.status for row in rows if row.variant == "eager"} == {"timed"} and info["name"] == path.parent.name
    assert commit["id"] == "abcdef0"


def test_runs_that_disagree_are_told() -> None:
    rows = [Row("op", {"B": 1}, "forward", "eager", "float32", "timed", samples=[t] * 8) for t in (1.0, 1.02, 2.0)]
    told = [command.repeated(rows[:1], former) for former in ([], rows[1:2], rows[2:])]
    assert told[0] == ""
    assert told[1] == "1 of 1 rows agree with a former run of this code within their quartiles"
    assert told[2].startswith("0 of 1 rows agree") and told[2].endswith("noisy in one of them")


def test_a_folder_that_is_not_manner_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--quick", "--manner", str(tmp_path)])
    assert f"{tmp_path} is no checkout of MANNER's repository" in capsys.readouterr().err
