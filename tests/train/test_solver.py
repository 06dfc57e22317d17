"""The training loop, its configuration and its command."""

import dataclasses
import itertools
import json
import re

import numpy as np
import pytest
import torch
import yaml

from mvat.models import Manner, count_parameters
from tests.train.kill import curves
from tests.train.tiny import TINY, config, segments, solver, tensors_equal
from train import checkpoint, command
from train.config import (
    DataConfig,
    MixConfig,
    OptimConfig,
    TransferConfig,
    ValidConfig,
    completed,
    differences,
)
from train.data import ArrayPairs, Segments
from train.progress import Progress
from train.solver import DivergedError, RunError, Solver
from train.transfer import Transfer
from train.validation import validate


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
    assert trained.step.scheduler.total_steps == 2 * steps
    rates = [row["lr"] for row in trained.fit()]
    assert trained.progress.step == 2 * steps
    assert trained.step.rate == pytest.approx(1e-3 / 25 / 1e4)
    assert rates[0] > 100 * rates[1] > 0


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


def test_scores_that_are_not_numbers_are_never_the_best():
    def better(epochs, rows):
        progress = Progress()
        valid = ValidConfig(metrics=[], select="loss")
        return [
            progress.end_epoch({"epoch": i, "valid": row}, OptimConfig(epochs), valid) for i, row in enumerate(rows, 1)
        ]

    assert better(4, [{"loss": float("nan")}, {"loss": 1.0}, {"loss": 2.0}]) == [False, True, False]
    assert better(2, [{}, {}]) == [False, True]


def spoilt(pairs, clips, monkeypatch):
    """The training examples asked for as `clips`-th are NaN."""
    read, asked = Segments.__getitem__, itertools.count()

    def get(self, item):
        clean, noisy = read(self, item)
        return clean, noisy * float("nan") if next(asked) in clips else noisy

    monkeypatch.setattr(Segments, "__getitem__", get)


def test_a_batch_that_is_not_finite_is_skipped_and_counted(tmp_path, pairs, monkeypatch):
    spoilt(pairs, [5], monkeypatch)
    history = solver(tmp_path / "run", pairs, 3).fit()
    assert [row["skipped"] for row in history] == [1, 0, 0]
    assert all(np.isfinite(list(row["train"].values())).all() for row in history)
    state = checkpoint.load(tmp_path / "run" / "last.pt")["state_dict"]
    assert all(torch.isfinite(value).all() for value in state.values())


def test_an_epoch_without_a_finite_loss_ends_the_run(tmp_path, pairs, monkeypatch):
    spoilt(pairs, range(100), monkeypatch)
    with pytest.raises(DivergedError, match="not finite in any step of epoch 1"):
        solver(tmp_path / "run", pairs, 2).fit()
    assert not (tmp_path / "run" / "last.pt").exists()


def test_twenty_skipped_steps_in_a_row_end_the_run_and_keep_the_last_checkpoint(tmp_path, pairs, monkeypatch):
    settings = config(tmp_path / "run", 2)
    data = dataclasses.replace(settings.data, segment_seconds=0.1, stride_seconds=0.08)
    settings = dataclasses.replace(settings, data=data, optim=OptimConfig(2, 1))
    steps = len(segments(pairs, settings))
    assert steps >= 22
    spoilt(pairs, range(steps + 2, 1000), monkeypatch)
    with pytest.raises(DivergedError, match=f"not finite in 20 steps in a row, up to step {steps + 22}"):
        Solver(settings, Manner(**TINY), None, segments(pairs, settings), pairs, "student").fit()
    content = checkpoint.load(tmp_path / "run" / "last.pt")
    assert content["epoch"] == 1 and content["step"] == steps
    assert all(torch.isfinite(value).all() for value in content["state_dict"].values())


def test_averaged_weights_are_what_is_validated_and_loaded(tmp_path, pairs):
    settings = dataclasses.replace(config(tmp_path / "run"), optim=OptimConfig(2, 2, ema=0.9))
    trained = Solver(settings, Manner(**TINY), None, segments(pairs, settings), pairs, "student")
    history = trained.fit()
    last = checkpoint.load(tmp_path / "run" / "last.pt")
    assert tensors_equal(last["state_dict"], dict(trained.step.average.model.state_dict()))
    assert tensors_equal(last["raw_state_dict"], dict(trained.model.state_dict()))
    assert not tensors_equal(last["raw_state_dict"], last["state_dict"])
    loaded = Manner.from_pretrained(tmp_path / "run" / "last.pt")
    found, _ = validate(loaded, pairs, settings, trained.accelerator, lambda: 0)
    assert found == history[-1]["valid"]


def test_a_run_that_improves_no_more_ends_early(tmp_path, pairs, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 2.0, 0.0])
    monkeypatch.setattr("train.solver.validate", lambda *_: ({"loss": next(losses)}, []))
    settings = config(tmp_path / "run", 9)
    settings = dataclasses.replace(settings, valid=dataclasses.replace(settings.valid, patience=2))

    def make():
        return Solver(settings, Manner(**TINY), None, segments(pairs, settings), pairs, "student")

    history = make().fit()
    assert [row["valid"]["loss"] for row in history] == [3.0, 1.0, 2.0, 2.0]
    assert checkpoint.load(tmp_path / "run" / "best.pt")["epoch"] == 2
    assert make().fit() == history


def test_rows_curves_and_recordings_hold_what_they_promise(tmp_path, pairs):
    settings = config(tmp_path / "run")
    settings = dataclasses.replace(settings, valid=dataclasses.replace(settings.valid, samples=2))
    settings = dataclasses.replace(settings, optim=OptimConfig(2, 1))
    history = Solver(settings, Manner(**TINY), None, segments(pairs, settings), pairs, "student").fit()
    keys = {"epoch", "step", "lr", "seconds", "audio_seconds_per_second", "waiting", "peak_memory_gb", "skipped"}
    assert history[0].keys() == keys | {"unreadable", "gradient_norm", "train", "valid"}
    assert history[0]["gradient_norm"] > 0 and history[0]["train"].keys() == {"total", "enhancement"}
    found = curves(tmp_path / "run" / "tensorboard")
    last = history[-1]["step"]
    assert [step for step, _ in found["train/gradient_norm"]] == list(range(10, last + 1, 10))
    assert found["valid/loss"] == [(row["step"], pytest.approx(row["valid"]["loss"])) for row in history]
    for name in ("s0", "s2"):
        assert [step for step, _ in found[f"{name}/estimate"]] == [row["step"] for row in history]
        assert len(found[f"{name}/clean"]) == len(found[f"{name}/noisy"]) == 1
    assert "s1/clean" not in found


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"optim": OptimConfig(2, 4, accumulate=0)}, "optim.accumulate must be at least 1, got 0"),
        ({"optim": OptimConfig(2, 4, lr=-1.0)}, "optim.lr must be positive"),
        ({"optim": OptimConfig(0, 4)}, "optim.epochs must be at least 1"),
        ({"optim": OptimConfig(1, 4, clip=0.0)}, "optim.clip must be positive, got 0.0"),
        ({"optim": OptimConfig(1, 4, ema=1.0)}, "optim.ema must be at least 0 and less than 1, got 1.0"),
        ({"valid": ValidConfig(patience=0)}, "valid.patience must be at least 1"),
        ({"valid": ValidConfig(samples=-1)}, "valid.samples must be 0 or more"),
        ({"save_minutes": -1.0}, "save_minutes must be 0 or more"),
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
        Solver(wrong, Manner(**TINY), None, segments(pairs, wrong), pairs, "student")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["mvat", "attention", "output"])
def test_every_method_reaches_the_student_and_leaves_the_teacher(method):
    student, teacher = Manner(hidden=6, depth=2), Manner(hidden=8, depth=2)
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
    student, teacher = Manner(hidden=6, depth=2), Manner(hidden=8, depth=2, attention_layers="deepest")
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
    other = tmp_path / "d.yaml"
    other.write_text("optim: {lr: 0.25, batch_size: 7}\n")
    argv = ["--optim.lr=0.5", "--config", str(file), f"--config={other}"]
    assert command.parse(argv, "test").optim == OptimConfig(lr=0.5, batch_size=7)  # options win, then later files
    options = ["--optim.clip", "5", "--optim.ema", "0.999", "--optim.compile", "true", "--valid.patience", "9"]
    parsed = command.parse(["--config", str(file), *options, "--save_minutes", "2"], "test")
    assert parsed.optim == OptimConfig(clip=5.0, ema=0.999, compile=True)
    assert (parsed.valid.patience, parsed.save_minutes) == (9, 2.0)
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


def test_a_configuration_from_before_a_key_has_its_default(tmp_path):
    """So that its run goes on."""
    settings = config(tmp_path / "run")
    stored = settings.as_dict()
    del stored["optim"]["loss"], stored["data"]["hiss_share"], stored["save_minutes"]
    assert completed(stored) == settings.as_dict() and "loss" not in stored["optim"]
    mixed = dataclasses.replace(settings, data=dataclasses.replace(settings.data, mix=MixConfig())).as_dict()
    del mixed["data"]["mix"]["level"]
    assert completed(mixed)["data"]["mix"]["level"] == [-35.0, -15.0]


def test_random_states_round_trip(tmp_path):
    import random

    checkpoint.save(tmp_path / "c.pt", {"random": checkpoint.random_states()})
    drawn = random.random(), np.random.rand(), torch.rand(1).item()
    checkpoint.restore_random_states(checkpoint.load(tmp_path / "c.pt")["random"])
    assert drawn == (random.random(), np.random.rand(), torch.rand(1).item())


@pytest.mark.parametrize("name", ["", "best.pt"])
def test_a_teacher_that_is_not_done_is_named(tmp_path, capsys, name):
    teacher = tmp_path / name
    command.tell_unfinished(teacher)
    for finished in (True, False):
        content = {"progress": {"epoch": 3, "finished": finished}, "config": {"optim": {"epochs": 350}}}
        checkpoint.save(tmp_path / "last.pt", content)
        assert not capsys.readouterr().err
        command.tell_unfinished(teacher)
    assert f"{teacher}: its training stands at epoch 3 of 350" in capsys.readouterr().err
