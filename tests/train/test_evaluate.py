"""Evaluation: the noisy input and a model on a tiny data set, bad files among good ones, the command line."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mvat import audio
from mvat.metrics import si_sdr
from mvat.models import Manner, count_flops, count_parameters
from train import manifest
from train.evaluate import RecordError, evaluate, main, noisy_rows, read_record, table
from train.synthetic import make_pair

METRICS = ("stoi", "si_sdr")
NAMES = ("a", "b", "c")


@pytest.fixture
def data(tmp_path):
    """Three pairs of 0.8 to 1 s."""
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    entries = []
    for index, name in enumerate(NAMES):
        files = [folder / f"{name}_{side}.wav" for side in ("clean", "noisy")]
        for path, samples in zip(files, make_pair(rng, 0.8 + 0.1 * index), strict=True):
            audio.write(path, samples, 16000)
        entries.append(manifest.Entry(name, "s", *files, frames=audio.info(files[0]).frames))
    return manifest.save(folder, "synthetic", {"test": entries})


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny model with the history of its training beside it."""
    run = tmp_path / "runs" / "student"
    run.mkdir(parents=True)
    model = Manner(hidden=6, depth=2)
    torch.save({"state_dict": model.state_dict(), "model_config": model.config}, run / "best.pt")
    description = {
        "label": "the student",
        "kind": "student",
        "method": "mvat",
        "seed": 3,
        "parameters": 1,
        "gflops": 0.5,
    }
    (run / "history.json").write_text(json.dumps({"format": "mvat-history-1", **description, "epochs": []}))
    return run / "best.pt"


def run(data, out, checkpoint=None):
    return evaluate(data.path, out, checkpoint, metrics=METRICS, workers=0, device="cpu", progress=False)


def test_noisy_input(data, tmp_path):
    scores = run(data, tmp_path / "runs" / "noisy")
    for entry in data.test:
        pair = (audio.read(path)[0][0] for path in (entry.clean, entry.noisy))
        assert scores.rows[entry.name]["si_sdr"] == pytest.approx(si_sdr(*pair))
    record = read_record(tmp_path / "runs" / "noisy" / "scores.json", "mvat-scores-1")
    expected = {"label": "noisy", "kind": "noisy", "method": "none", "seed": None, "parameters": None, "gflops": None}
    assert {key: record[key] for key in expected} == expected
    assert record["set"] == "test" and record["data"] == str(data.path.resolve())
    assert record["scored"] == dict.fromkeys(METRICS, 3) and record["failed"] == []
    assert not (tmp_path / "runs" / "noisy" / "enhanced").exists()


def test_model(data, checkpoint):
    out = checkpoint.parent
    scores = run(data, out, checkpoint)
    record = read_record(out / "scores.json", "mvat-scores-1")
    assert (record["label"], record["method"], record["seed"], record["gflops"]) == ("the student", "mvat", 3, 0.5)
    assert record["files"] == scores.rows and record["mean"] == scores.mean()
    assert (out / "scores.csv").read_text().splitlines()[0] == "name,stoi,si_sdr"
    model = Manner.from_pretrained(checkpoint)
    for entry in data.test:
        written, rate = audio.read(out / "enhanced" / f"{entry.name}.wav")
        with torch.inference_mode():
            estimate = model(torch.from_numpy(audio.read(entry.noisy)[0])[None])[0, 0].numpy()
        assert rate == 16000 and written.shape == (1, entry.frames)
        np.testing.assert_allclose(written[0], np.clip(estimate, -1, 1), atol=2**-15)
        assert scores.rows[entry.name]["si_sdr"] == pytest.approx(si_sdr(audio.read(entry.clean)[0][0], written[0]))


def test_model_without_history_is_counted(data, checkpoint):
    (checkpoint.parent / "history.json").unlink()
    run(data, checkpoint.parent, checkpoint)
    record = json.loads((checkpoint.parent / "scores.json").read_text())
    model = Manner(hidden=6, depth=2)
    assert record["parameters"] == count_parameters(model)
    assert record["gflops"] == pytest.approx(count_flops(model.config) / 1e9)
    assert record["label"] == "student" and record["seed"] is None


def test_bad_files_are_listed_and_the_good_ones_done(data, checkpoint):
    data.test[1].noisy.write_bytes(data.test[1].noisy.read_bytes()[:1000])  # cut
    audio.write(data.test[2].clean, np.zeros(data.test[2].frames), 16000)  # silent
    scores = run(data, checkpoint.parent, checkpoint)
    assert list(scores.rows) == list(NAMES) and scores.count() == {"stoi": 1, "si_sdr": 1}
    assert [failure.name for failure in scores.failures] == ["b", "c"]
    assert str(data.test[1].noisy) in scores.failures[0].reason and "silent" in scores.failures[1].reason
    record = json.loads((checkpoint.parent / "scores.json").read_text())
    assert record["files"]["b"] == {"stoi": None, "si_sdr": None}
    assert [failure["name"] for failure in record["failed"]] == ["b", "c"]
    text = table(scores, "student")
    assert "not scored, not in the means (2 of 3 recordings)" in text and "c: all: the clean signal is silent" in text


def test_model_that_gives_nan_fails_file_by_file(data, checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["manner_block.in_conv.1.running_var"].fill_(-1)  # a finite weight, or it would be refused
    torch.save(content, checkpoint)
    scores = run(data, checkpoint.parent, checkpoint)
    assert len(scores.failures) == 3 and all("NaN" in failure.reason for failure in scores.failures)
    assert not any((checkpoint.parent / "enhanced").iterdir())


def test_scores_of_another_model_are_not_replaced(data, checkpoint, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "best.pt").write_bytes(checkpoint.read_bytes())
    with pytest.raises(ValueError, match="other: holds another model"):
        run(data, other, checkpoint)
    assert [path.name for path in other.iterdir()] == ["best.pt"]
    (other / "best.pt").unlink()
    (other / "best.pt").symlink_to(checkpoint)  # its own, wherever it lies
    assert not run(data, other, other / "best.pt").failures


def test_gain_is_taken_over_recordings_scored_in_both(data, checkpoint):
    out = checkpoint.parent
    run(data, out.parent / "noisy")
    (data.path.parent / "c_noisy.wav").write_bytes(b"")
    scores = run(data, out, checkpoint)
    noisy = noisy_rows(out, "test")
    lines = {line.split()[0]: line.split() for line in table(scores, "student", noisy).splitlines()}
    assert lines["noisy"][1] == "3" and lines["student"][1] == lines["gain"][1] == "2"
    gain = np.mean([scores.rows[name]["si_sdr"] - noisy[name]["si_sdr"] for name in "ab"])
    assert float(lines["gain"][3]) == pytest.approx(gain, abs=1e-3)


def test_noisy_scores_of_another_set_are_not_compared_with(data, checkpoint, tmp_path):
    run(data, tmp_path / "runs" / "noisy")
    run(data, checkpoint.parent, checkpoint)
    path = tmp_path / "runs" / "noisy" / "scores.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data": "elsewhere/manifest.json"}))
    assert noisy_rows(checkpoint.parent, "test") is None


def test_command(data, checkpoint, tmp_path, capsys):
    options = ["--data", str(data.path.parent), "--metrics", "si_sdr", "--workers", "0"]
    assert main([*options, "--noisy", "--out", str(tmp_path / "runs" / "noisy")]) == 0
    run_options = [*options, "--checkpoint", str(checkpoint), "--out", str(checkpoint.parent)]
    assert main(run_options) == 0
    assert "gain" in capsys.readouterr().out
    data.test[0].noisy.write_bytes(b"")
    assert main(run_options) == 1
    assert "a: all:" in capsys.readouterr().out
    for entry in data.test:
        entry.noisy.write_bytes(b"")
    assert main(run_options) == 2


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda data, checkpoint: data.path.write_text("{"), "manifest.json: cannot be read as JSON"),
        (lambda data, checkpoint: checkpoint.unlink(), "best.pt"),
        (lambda data, checkpoint: checkpoint.write_bytes(b"no checkpoint"), "best.pt"),
        (lambda data, checkpoint: (checkpoint.parent / "history.json").write_text("[]"), "history.json: is no file of"),
        (lambda data, checkpoint: (checkpoint.parent / "enhanced").write_text(""), "enhanced"),
    ],
)
def test_what_the_user_must_mend(data, checkpoint, capsys, break_it, message):
    break_it(data, checkpoint)
    options = ["--data", str(data.path), "--checkpoint", str(checkpoint), "--out", str(checkpoint.parent)]
    assert main([*options, "--metrics", "si_sdr", "--workers", "0"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.evaluate: error: ") and message in error.splitlines()[0]
    assert not (checkpoint.parent / "scores.json").exists()


def test_two_processes_share_the_set(data, checkpoint, tmp_path):
    """Three recordings, one of them bad; then a failure of the second process alone."""
    data.test[1].noisy.write_bytes(b"")
    alone = run(data, checkpoint.parent, checkpoint)
    expected = json.loads((checkpoint.parent / "scores.json").read_text())
    script = tmp_path / "both.py"
    script.write_text(
        "import os, sys\nfrom train.evaluate import main\n"
        "if __name__ == '__main__':\n"
        "    *options, checkpoint = sys.argv[1:]\n"
        "    print(main([*options, '--checkpoint', checkpoint]))\n"
        "    broken = checkpoint + 'x' * int(os.environ['RANK'])\n"
        "    print(main([*options, '--checkpoint', broken]))\n"
    )
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    out = tmp_path / "runs" / "shared"
    options = [
        "--data",
        data.path,
        "--out",
        out,
        "--metrics",
        *METRICS,
        "--workers",
        "0",
        "--device",
        "cpu",
        checkpoint,
    ]
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }
    started = [
        subprocess.Popen(
            [sys.executable, script, *options],
            env={**os.environ, **shared, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        (printed, errors), (other, silence) = (process.communicate(timeout=120) for process in started)
    finally:
        for process in started:
            process.kill()
    assert errors.startswith("train.evaluate: error: process 1 of 2: ") and "best.ptx" in errors, errors
    assert printed.splitlines()[1].split()[:2] == ["shared", "2"] and printed.splitlines()[-1] == "2", printed
    assert other == "1\n2\n" and silence == "", silence
    found = json.loads((out / "scores.json").read_text())
    assert list(found["files"]) == list(NAMES) and found["scored"] == alone.count()
    np.testing.assert_allclose(found["mean"]["si_sdr"], expected["mean"]["si_sdr"], atol=1e-2)  # in 16 bits
    assert found["failed"] == expected["failed"] and len(list((out / "enhanced").iterdir())) == 2


def test_empty_set(data, checkpoint):
    with pytest.raises(ValueError, match="the valid set is empty"):
        evaluate(data.path, checkpoint.parent, checkpoint, subset="valid")


def test_read_record_names_the_file(tmp_path):
    (tmp_path / "scores.json").write_text('{"format": "another"}')
    with pytest.raises(RecordError, match=r"scores\.json: is no file of format 'mvat-scores-1'"):
        read_record(tmp_path / "scores.json", "mvat-scores-1")
