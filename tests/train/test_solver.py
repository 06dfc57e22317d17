import json

import numpy as np
import pytest
import torch
import yaml

from mvat.models import Manner, count_parameters
from train import checkpoint, command
from train.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TransferConfig, ValidConfig, differences
from train.data import ArrayPairs
from train.solver import RunError, Solver
from train.synthetic import make_pair
from train.transfer import Transfer

TINY = Manner(hidden=6, depth=2).config


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(0)
    return ArrayPairs([(f"s{i}", *make_pair(rng, 0.5)) for i in range(4)])


def config(out, epochs=2, **changes) -> RunConfig:
    data = DataConfig("generated", segment_seconds=0.25, stride_seconds=0.25, tempo_share=0.0, workers=0)
    valid = ValidConfig(metrics=[], select="loss")
    return RunConfig(str(out), ModelConfig(None, TINY), data, OptimConfig(epochs, 4), valid, **changes)


def solver(out, pairs, epochs=2, teacher=None, **changes) -> Solver:
    torch.manual_seed(0)
    return Solver(config(out, epochs, **changes), Manner(**TINY), teacher, pairs, pairs, "student")


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
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
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


def test_a_command_ends_with_one_line_and_code_2(tmp_path, capsys):
    arguments = ["--out", str(tmp_path / "run"), "--data.path", str(tmp_path)]
    for extra, reason in (
        (["--model.preset", "huge"], "model.preset must be one of"),
        (["--model.preset", "s-4.1gf"], "manifest"),
        (["--model.preset", "s-4.1gf", "--optim.speed", "9"], "optim.speed"),
        (["--model.arguments", "{hiden: 6}"], "hiden"),
    ):
        assert command.main(arguments + extra, "test", "teacher") == 2
        error = capsys.readouterr().err.strip()
        assert reason in error and "\n" not in error, error
    assert not (tmp_path / "run").exists()


def test_differences_name_the_keys():
    assert differences({"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 5, "d": 3}}) == ["b.c: 2 and 5"]


def test_random_states_round_trip(tmp_path):
    import random

    checkpoint.save(tmp_path / "c.pt", {"random": checkpoint.random_states()})
    drawn = random.random(), np.random.rand(), torch.rand(1).item()
    checkpoint.restore_random_states(checkpoint.load(tmp_path / "c.pt")["random"])
    assert drawn == (random.random(), np.random.rand(), torch.rand(1).item())
