"""Training through kills, signals, lost neighbours, full disks: nothing is lost, everything is said."""

import fcntl
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from mvat.models import Manner
from tests.train.tiny import TINY, solver, tensors_equal
from train import checkpoint, command
from train.config import DataConfig, ModelConfig, RunConfig, TransferConfig, ValidConfig
from train.curves import NAME
from train.data import ArrayPairs, Segments
from train.solver import RunError, Solver, Stopped
from train.validation import validate

REPO = Path(__file__).resolve().parents[2]


class Stop(Exception):
    pass


def stopped_after(epoch, monkeypatch, run):
    """Run until this epoch's checkpoint is written, then stop as a kill would, before anything else."""
    save = Solver._save

    def stop(self, *arguments, **options):
        save(self, *arguments, **options)
        if self.progress.epoch == epoch:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Solver, "_save", stop)
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
    for key in ("state_dict", "optimizer", "scheduler", "epoch", "step", "progress"):
        assert tensors_equal(whole[key], parts[key]), key
    for a, b in zip(whole["history"], parts["history"], strict=True):
        assert (a["train"], a["valid"]) == (b["train"], b["valid"])


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


@pytest.mark.parametrize("moment", ["step", "validation"])
def test_a_signal_ends_the_step_saves_and_the_run_goes_on_there(tmp_path, pairs, monkeypatch, moment):
    def make(name):
        return solver(tmp_path / name, pairs, 2)

    whole = make("whole")
    whole.fit()
    stopped = make("run")
    if moment == "step":
        read = Segments.__getitem__
        asked = itertools.count()

        def get(self, item):
            if next(asked) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return read(self, item)

        monkeypatch.setattr(Segments, "__getitem__", get)
        place = "at step 1 of epoch 1"
    else:
        read_pair = ArrayPairs.read

        def read(self, index, start=0, frames=-1):
            if frames == -1 and index == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return read_pair(self, index, start, frames)

        monkeypatch.setattr(ArrayPairs, "read", read)
        place = f"at step {len(stopped.loader)} of epoch 1"
    with pytest.raises(Stopped, match=f"stopped by SIGTERM {place}; the same command goes on there") as stop:
        stopped.fit()
    assert stop.value.signal == signal.SIGTERM and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.undo()
    resumed = make("run")
    resumed.fit()
    assert tensors_equal(dict(whole.model.state_dict()), dict(resumed.model.state_dict()))
    for a, b in zip(whole.progress.history, resumed.progress.history, strict=True):
        assert (a["train"], a["valid"], a["step"]) == (b["train"], b["valid"], b["step"])


def test_scores_during_which_a_signal_came_are_not_believed(pairs):
    """It may have reached the processes that compute them."""
    valid, accelerator = ValidConfig(metrics=["si_sdr"], select="si_sdr", samples=1), Accelerator()
    settings = RunConfig("run", ModelConfig(None, TINY), DataConfig("noise"), valid=valid)
    model = Manner(**TINY).eval()
    result, samples = validate(model, pairs, settings, accelerator, lambda: 0)
    assert result.keys() == {"loss", "si_sdr"} and [sample.name for sample in samples] == ["s0"]
    answers = iter([0] * len(pairs.names) + [signal.SIGTERM])
    assert validate(model, pairs, settings, accelerator, lambda: next(answers)) is None


def test_a_stopped_command_says_so_and_has_the_signals_status(tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise Stopped(signal.SIGTERM, "at step 7 of epoch 2")

    monkeypatch.setattr(command, "run", stop)
    assert command.main(["--out", "x", "--data.path", "y", "--model.preset", "base"], "test", "teacher") == 143
    assert capsys.readouterr().err == "stopped by SIGTERM at step 7 of epoch 2; the same command goes on there\n"


def test_a_run_killed_at_any_moment_ends_as_one_never_stopped():
    """One process, and one of two; tests/train/kill.py kills more often by itself."""
    both = "from tests.train.kill import main; exit(main(['--kills=20']) or main(['--kills=4', '--processes=2']))"
    done = subprocess.run(
        [sys.executable, "-c", both],
        cwd=REPO,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "20 kills over" in done.stdout and "\n4 kills over" in done.stdout


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
    # Every recording is validated once, by the same weights and running statistics, with one result for both.
    assert sorted(first["validated"] + second["validated"]) == list(range(16)) and len(first["validated"]) == 8
    assert first["valid"] == second["valid"]
    assert first["valid"]["loss"] == pytest.approx(first["alone"], rel=1e-6)
    assert first["skipped"] == second["skipped"] == 1


TWO_PROCESSES = """
import json, sys
import numpy as np
import torch
from mvat.losses import weighted_mrstft_loss
from mvat.models import Manner
from tests.train.tiny import segments
from train.config import DataConfig, ModelConfig, OptimConfig, RunConfig, ValidConfig
from train.data import ArrayPairs, Segments
from train.solver import Solver

rng = np.random.default_rng(0)
pairs = ArrayPairs([(f"s{i}", *rng.standard_normal((2, 4000)).astype(np.float32)) for i in range(16)])
arguments = Manner(hidden=6, depth=2).config
data = DataConfig("generated", segment_seconds=0.25, tempo_share=0.0, workers=0)
valid = ValidConfig(metrics=["si_sdr"], select="loss")
config = RunConfig(sys.argv[1], ModelConfig(None, arguments), data, OptimConfig(1, 4), valid)
torch.manual_seed(0)
examples = segments(pairs, config)
validated = []
recordings = ArrayPairs([(name, *pairs.read(i)) for i, name in enumerate(pairs.names)])
read = recordings.read
recordings.read = lambda i: (validated.append(i), read(i))[1]
solver = Solver(config, Manner(**arguments), None, examples, recordings, "student")
rank = solver.accelerator.process_index
seen = []
item = type(examples).__getitem__

def get(self, key):
    seen.append(key[1])
    clean, noisy = item(self, key)
    if rank and len(seen) == 8:  # one process alone meets it, both skip the step
        noisy[0, 0] = float("nan")
    return clean, noisy

type(examples).__getitem__ = get
(row,) = solver.fit()
alone = []
for i in range(16):
    clean, noisy = (torch.from_numpy(x)[None, None] for x in read(i))
    with torch.no_grad():
        alone.append(weighted_mrstft_loss(solver.model.eval()(noisy), clean, noisy).item())
weights = [value.double().abs().sum().item() for value in solver.model.state_dict().values()]
found = {"seen": seen, "weights": weights, "validated": validated, "valid": row["valid"], "skipped": row["skipped"]}
open(f"{sys.argv[1]}.{rank}.json", "w").write(json.dumps(found | {"alone": float(np.mean(alone))}))
"""


def test_a_folder_that_another_process_trains_into_is_left_alone(tmp_path, pairs):
    solver(tmp_path / "run", pairs, 1).fit()
    (tmp_path / "run" / "last.pt").unlink()
    events = tmp_path / "run" / "tensorboard" / NAME
    before = events.read_bytes()
    ready, done = os.pipe()
    other = os.fork()
    if not other:
        with open(events, "ab") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            os.write(done, b".")
            signal.pause()
    os.read(ready, 1)
    try:
        with pytest.raises(RunError, match="run: another process is training into it"):
            solver(tmp_path / "run", pairs, 1).fit()
        assert events.read_bytes() == before
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
    solver(tmp_path / "run", pairs, 1).fit()


def test_a_damaged_checkpoint_is_named_and_left_alone(tmp_path, pairs):
    solver(tmp_path / "run", pairs, 1).fit()
    last = tmp_path / "run" / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(ValueError, match="last.pt: not a readable checkpoint"):
        solver(tmp_path / "run", pairs, 1).fit()
    assert last.stat().st_size == 1000


def test_a_full_disk_leaves_the_former_checkpoint_and_says_so(tmp_path, pairs, monkeypatch):
    """A limit on the size of files stands for the full disk: the system refuses a write in the midst of the file."""
    save = checkpoint.save

    def full(path, content):
        if path.name == "last.pt" and content["epoch"] == 2:
            former = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size // 2, former[1]))
            try:
                save(path, content)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, former)
        save(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        with pytest.raises(RunError, match="run: cannot write the checkpoint: .*last.pt: "):
            solver(tmp_path / "run", pairs, 2).fit()
    assert checkpoint.load(tmp_path / "run" / "last.pt")["epoch"] == 1
    assert not list((tmp_path / "run").glob(".*"))
    solver(tmp_path / "whole", pairs, 2).fit()
    solver(tmp_path / "run", pairs, 2).fit()
    run, whole = (checkpoint.load(tmp_path / name / "last.pt")["state_dict"] for name in ("run", "whole"))
    assert tensors_equal(run, whole)


def test_an_unwritable_folder_is_one_clear_error(tmp_path, pairs):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file/run: cannot be written to"):
        solver(tmp_path / "file" / "run", pairs, 1).fit()


def test_a_clock_that_jumps_changes_no_number(tmp_path, pairs, monkeypatch):
    hours = itertools.count(10**6, -3600)
    monkeypatch.setattr("time.time", lambda: float(next(hours)))
    (row,) = solver(tmp_path / "run", pairs, 1).fit()
    assert 0 < row["seconds"] < 3600 and row["audio_seconds_per_second"] > 0 and 0 <= row["waiting"] <= 1
