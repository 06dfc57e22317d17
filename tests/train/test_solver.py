import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from mvat.models import Manner, count_parameters
from train import checkpoint, command
from train.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TransferConfig, ValidConfig, differences
from train.data import ArrayPairs, Segments
from train.solver import RunError, Solver
from train.synthetic import make_pair
from train.transfer import Transfer

REPO = Path(__file__).resolve().parents[2]
TINY = Manner(hidden=6, depth=2).config


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(0)
    return ArrayPairs([(f"s{i}", *make_pair(rng, 0.5)) for i in range(4)])


def config(out, epochs=2, **changes) -> RunConfig:
    data = DataConfig("generated", segment_seconds=0.25, stride_seconds=0.25, tempo_share=0.0, workers=0)
    valid = ValidConfig(metrics=[], select="loss")
    return RunConfig(str(out), ModelConfig(None, TINY), data, OptimConfig(epochs, 4), valid, **changes)


def segments(pairs) -> Segments:
    return Segments(pairs, 4000, 4000)


def solver(out, pairs, epochs=2, teacher=None, **changes) -> Solver:
    torch.manual_seed(0)
    return Solver(config(out, epochs, **changes), Manner(**TINY), teacher, segments(pairs), pairs, "student")


def tensors_equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(tensors_equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(tensors_equal, a, b))
    return a == b


def test_training_learns_and_leaves_what_it_promises(tmp_path, pairs):
    history = solver(tmp_path / "run", pairs, epochs=6).fit()
    assert history[-1]["train"]["total"] < history[0]["train"]["total"] - 0.05
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} == {"best.pt", "last.pt", "config.yaml", "history.json", "tensorboard"}
    written = json.loads((run / "history.json").read_text())
    assert written["epochs"] == history and written["parameters"] == count_parameters(Manner(**TINY))
    assert yaml.safe_load((run / "config.yaml").read_text())["optim"]["epochs"] == 6
    best = min(history, key=lambda row: row["valid"]["loss"])
    assert checkpoint.load(run / "best.pt")["epoch"] == best["epoch"]
    model = Manner.from_pretrained(run / "last.pt")
    assert model.config == TINY and not model.training


def test_the_one_cycle_is_stepped_by_batch_and_ends_low(tmp_path, pairs):
    trained = solver(tmp_path / "run", pairs)
    steps = len(trained.loader)
    assert trained.scheduler.total_steps == 2 * steps
    trained.fit()
    assert trained.step == 2 * steps
    assert trained.scheduler.get_last_lr()[0] == pytest.approx(1e-3 / 25 / 1e4)
    rates = [row["lr"] for row in trained.history]
    assert rates[0] > 100 * rates[1] > 0


class Stop(Exception):
    pass


def stopped_after(epoch, monkeypatch, run):
    """Run until this epoch's checkpoint is written, then stop as a kill would, before anything else."""
    record = Solver._record

    def stop(self, row):
        record(self, row)
        if row["epoch"] == epoch:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Solver, "_record", stop)
        with pytest.raises(Stop):
            run()


@pytest.mark.parametrize("method", ["none", "mvat"])
def test_a_stopped_run_ends_bit_for_bit_as_one_that_was_not(tmp_path, pairs, monkeypatch, method):
    def make(name):
        torch.manual_seed(1)
        teacher = Manner(**TINY) if method != "none" else None
        return solver(tmp_path / name, pairs, 3, teacher, transfer=TransferConfig(method, "teacher"))

    make("whole").fit()
    stopped_after(1, monkeypatch, make("parts").fit)
    stopped_after(2, monkeypatch, make("parts").fit)
    make("parts").fit()
    whole, parts = (checkpoint.load(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    for key in ("state_dict", "optimizer", "scheduler", "epoch", "step", "best"):
        assert tensors_equal(whole[key], parts[key]), key
    for a, b in zip(whole["history"], parts["history"], strict=True):
        assert (a["train"], a["valid"]) == (b["train"], b["valid"])


def test_a_finished_run_does_nothing_and_another_configuration_is_refused(tmp_path, pairs):
    first = solver(tmp_path / "run", pairs, 1).fit()
    before = (tmp_path / "run" / "last.pt").read_bytes()
    assert solver(tmp_path / "run", pairs, 1).fit() == first
    with pytest.raises(RunError, match=r"another configuration \(optim.epochs: 1 and 2\)"):
        solver(tmp_path / "run", pairs, 2).fit()
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


def test_a_run_goes_on_from_another_path_but_not_with_other_data(tmp_path, pairs):
    solver(tmp_path / "run", pairs, 1).fit()
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    assert len(solver(moved, pairs, 1, label="renamed").fit()) == 1
    fewer = ArrayPairs([(name, *pairs.read(i)) for i, name in enumerate(pairs.names[:2])])
    with pytest.raises(RunError, match="holds a run of 2 updates, now there would be 1"):
        solver(moved, fewer, 1).fit()


def test_a_stop_between_the_writes_loses_nothing(tmp_path, pairs, monkeypatch):
    """Killed after best.pt and history.json, before last.pt: the epoch is done again and all three are there."""
    save = checkpoint.save

    def killed(path, content):
        if path.name == "last.pt":
            raise Stop
        save(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", killed)
        with pytest.raises(Stop):
            solver(tmp_path / "run", pairs, 1).fit()
    (tmp_path / "run" / ".last.999.part.pt").write_bytes(b"half")
    with_break = solver(tmp_path / "run", pairs, 1).fit()
    without = solver(tmp_path / "whole", pairs, 1).fit()
    assert [(row["train"], row["valid"]) for row in with_break] == [(row["train"], row["valid"]) for row in without]
    assert {p.name for p in (tmp_path / "run").glob("*.pt")} == {"best.pt", "last.pt"}
    assert not (tmp_path / "run" / ".last.999.part.pt").exists()


def test_scores_that_are_not_numbers_are_never_the_best(tmp_path, pairs):
    trained = solver(tmp_path / "run", pairs, 4)
    better = [trained._is_better({"epoch": i, "valid": {"loss": v}}) for i, v in enumerate((float("nan"), 1.0, 2.0), 1)]
    assert better == [False, True, False]
    unscored = solver(tmp_path / "other", pairs, 2)
    assert [unscored._is_better({"epoch": i, "valid": {}}) for i in (1, 2)] == [False, True]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, pairs, monkeypatch):
    trained = solver(tmp_path / "run", pairs, 2)
    monkeypatch.setattr("train.solver.weighted_mrstft_loss", lambda y, *_: (y * float("nan")).mean())
    with pytest.raises(RunError, match="epoch 1 is not finite"):
        trained.fit()
    assert not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"optim": OptimConfig(2, 4, accumulate=0)}, "optim.accumulate must be at least 1, got 0"),
        ({"optim": OptimConfig(2, 4, lr=-1.0)}, "optim.lr must be positive"),
        ({"optim": OptimConfig(0, 4)}, "optim.epochs must be at least 1"),
        ({"optim": OptimConfig(1, 400)}, "do not fill one batch of 400"),
        ({"valid": ValidConfig(metrics=["mos"])}, "valid.metrics must be some of"),
        ({"valid": ValidConfig(metrics=["stoi"])}, "valid.select"),
        ({"data": DataConfig("d", segment_seconds=0.01)}, "data.segment_seconds must be at least"),
        ({"transfer": TransferConfig("none", p=0.5)}, "p must be finite and at least 1"),
        ({"transfer": TransferConfig("none", weight=-1)}, "transfer.weight must be 0 or more"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_before_anything_is_written(tmp_path, pairs, change, reason):
    wrong = dataclasses.replace(config(tmp_path / "run"), **change)
    with pytest.raises(ValueError, match=reason):
        Solver(wrong, Manner(**TINY), None, segments(pairs), pairs, "student")
    assert not (tmp_path / "run").exists()


def test_several_processes_share_the_examples_and_write_once(tmp_path):
    """Two processes on a CPU, through the real launcher: disjoint examples, equal weights, one history."""
    script = tmp_path / "run.py"
    script.write_text(TWO_PROCESSES)
    command_line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command_line, str(script), str(tmp_path / "run")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"run.{rank}.json").read_text()) for rank in (0, 1))
    assert not set(first["seen"]) & set(second["seen"]) and len(first["seen"]) == len(second["seen"]) == 8
    assert first["weights"] == second["weights"]
    assert done.stdout.count("epoch 1/1") == 1


TWO_PROCESSES = """
import json, sys
import numpy as np
import torch
from mvat.models import Manner
from train.config import DataConfig, ModelConfig, OptimConfig, RunConfig, ValidConfig
from train.data import ArrayPairs, Segments
from train.solver import Solver

rng = np.random.default_rng(0)
pairs = ArrayPairs([(f"s{i}", *rng.standard_normal((2, 4000)).astype(np.float32)) for i in range(16)])
arguments = Manner(hidden=6, depth=2).config
data = DataConfig("generated", segment_seconds=0.25, tempo_share=0.0, workers=0)
valid = ValidConfig(metrics=[], select="loss")
config = RunConfig(sys.argv[1], ModelConfig(None, arguments), data, OptimConfig(1, 4), valid)
torch.manual_seed(0)
solver = Solver(config, Manner(**arguments), None, Segments(pairs, 4000, 16000), pairs, "student")
seen = []
item = type(solver.examples).__getitem__
type(solver.examples).__getitem__ = lambda self, key: (seen.append(key[1]), item(self, key))[1]
solver.fit()
weights = sum(p.detach().double().abs().sum().item() for p in solver.model.parameters())
rank = solver.accelerator.process_index
open(f"{sys.argv[1]}.{rank}.json", "w").write(json.dumps({"seen": seen, "weights": weights}))
"""


def test_a_damaged_checkpoint_is_named_and_left_alone(tmp_path, pairs):
    solver(tmp_path / "run", pairs, 1).fit()
    last = tmp_path / "run" / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(ValueError, match="last.pt: not a readable checkpoint"):
        solver(tmp_path / "run", pairs, 1).fit()
    assert last.stat().st_size == 1000


def test_a_full_disk_leaves_the_former_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"epoch": 1})

    def full(content, file):
        with open(file, "wb") as part:
            part.write(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")  # as torch.save does

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="last.pt: .*unexpected pos"):
        checkpoint.save(path, {"epoch": 2})
    assert checkpoint.load(path)["epoch"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_an_unwritable_folder_is_one_clear_error(tmp_path, pairs):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file/run: cannot be written to"):
        solver(tmp_path / "file" / "run", pairs, 1).fit()


@pytest.mark.parametrize("method", ["mvat", "attention", "output"])
def test_every_method_reaches_the_student_and_leaves_the_teacher(method):
    student, teacher = Manner(**TINY), Manner(hidden=8, depth=2)
    transfer = Transfer(TransferConfig(method, "t"), student, teacher)
    transfer.train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    estimate, loss = transfer.student_and_loss(student.train(), torch.randn(2, 1, 2400))
    assert estimate.shape == (2, 1, 2400)
    loss.backward()
    reached = [p.grad is not None and p.grad.abs().sum() > 0 for p in student.manner_block.encoder[0].parameters()]
    assert sum(reached) > len(reached) / 2
    assert all(p.grad is None for p in teacher.parameters()) and not teacher.training
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_transfer_checks_teacher_pairs_and_views():
    student, teacher = Manner(**TINY), Manner(hidden=8, depth=2, attention_layers="deepest")
    with pytest.raises(ValueError, match="needs a teacher"):
        Transfer(TransferConfig("mvat"), student, None)
    with pytest.raises(ValueError, match="name the pairs"):
        Transfer(TransferConfig("mvat", "t"), student, teacher)
    with pytest.raises(ValueError, match="does not exist"):
        Transfer(TransferConfig("mvat", "t", pairs=[(9, 0)]), student, teacher)
    with pytest.raises(ValueError, match="views"):
        Transfer(TransferConfig("mvat", "t", pairs=[(1, 0)], views=["middle"]), student, teacher)
    paired = Transfer(TransferConfig("mvat", "t", pairs=[(1, 0), (2, 1)]), student, teacher)
    _, loss = paired.student_and_loss(student, torch.randn(1, 1, 2400))
    assert loss.item() > 0


def test_configuration_from_yaml_and_options_names_what_is_wrong(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("out: runs/x\nmodel: {preset: base}\ndata: {path: d, tempo: [0.8, 1.2]}\n")
    parsed = command.parse(["--config", str(file), "--optim.lr", "0.5", "--transfer.pairs", "[[0, 1]]"], "test")
    assert (parsed.out, parsed.optim.lr, parsed.data.tempo, parsed.transfer.pairs) == (
        "runs/x",
        0.5,
        (0.8, 1.2),
        [(0, 1)],
    )
    assert isinstance(parsed.optim, OptimConfig)
    file.write_text("out: runs/x\nmodel: {preset: base}\ndata: {path: d, pathh: e}\n")
    with pytest.raises(ValueError, match="pathh"):
        command.parse(["--config", str(file)], "test")
    with pytest.raises(ValueError, match="lr"):
        command.parse(["--out", "x", "--data.path", "d", "--optim.lr", "fast"], "test")
    for text, reason in (("", "expected keys and values"), ("a: [1", "not valid YAML"), ("- 1", "got list")):
        file.write_text(text)
        with pytest.raises(ValueError, match=f"c.yaml: .*{reason}"):
            command.parse(["--config", str(file)], "test")
    with pytest.raises(ValueError, match="none.yaml: No such file"):
        command.parse([f"--config={tmp_path}/none.yaml"], "test")


def test_a_command_ends_with_one_line_and_code_2(tmp_path, capsys):
    arguments = ["--out", str(tmp_path / "run"), "--data.path", str(tmp_path)]
    for extra, reason in (
        (["--model.preset", "huge"], "model.preset must be one of"),
        (["--model.preset", "s-4.1gf"], "manifest"),
        (["--model.preset", "s-4.1gf", "--optim.speed", "9"], "optim.speed"),
        (["--model.arguments", "{hiden: 6}"], "model.arguments: .*hiden"),
        (["--model.arguments", "{hidden: 2}"], "model.arguments: .*at least 6 channels"),
        (["--model.preset", "s-4.1gf", "--transfer.method", "mvat"], "trained on its own"),
    ):
        assert command.main(arguments + extra, "test", "teacher") == 2
        error = capsys.readouterr().err.strip()
        assert re.search(reason, error) and "\n" not in error, error
    assert not (tmp_path / "run").exists()


def test_differences_name_the_keys():
    assert differences({"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 5, "d": 3}}) == ["b.c: 2 and 5"]


def test_random_states_round_trip(tmp_path):
    import random

    checkpoint.save(tmp_path / "c.pt", {"random": checkpoint.random_states()})
    drawn = random.random(), np.random.rand(), torch.rand(1).item()
    checkpoint.restore_random_states(checkpoint.load(tmp_path / "c.pt")["random"])
    assert drawn == (random.random(), np.random.rand(), torch.rand(1).item())
