from functools import partial

import pytest

from train import demo, results
from train.sources import SourceUnavailable
from train.synthetic import prepare_synthetic

TINY = """
out: x
model: {arguments: {hidden: 6, depth: 2}}
data: {path: x, segment_seconds: 0.25, stride_seconds: 0.5, tempo_share: 0, valid_limit: 1, workers: 0}
optim: {epochs: 1}
valid: {metrics: [si_sdr], select: si_sdr}
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A demonstration of seconds: tiny networks, a few generated recordings, no voices to be had."""
    configs = tmp_path / "configs"
    configs.mkdir()
    (configs / "demo_teacher.yaml").write_text(TINY + "label: teacher\n")
    (configs / "demo_student.yaml").write_text(TINY + "label: student, alone\n")

    def no_voices(*args, **kwargs):
        raise SourceUnavailable("no network")

    minutes = partial(prepare_synthetic, train_minutes=0.1, valid_minutes=0.05, test_minutes=0.05, progress=False)
    monkeypatch.setattr(demo, "CONFIGS", configs)
    monkeypatch.setattr(demo, "prepare_voices", no_voices)
    monkeypatch.setattr(demo, "prepare_synthetic", minutes)
    return tmp_path


def test_the_demonstration_runs_through_and_is_honest_about_the_result(tiny, capsys):
    data, out = tiny / "data", tiny / "runs" / "demo"
    status = demo.main(["--data", str(data), "--out", str(out)])
    shown = capsys.readouterr().out
    # One epoch of a tiny network does not enhance: the exit code must say so.
    assert status == 1 and "does NOT raise SI-SDR" in shown
    assert "no real voices here (no network)" in shown and "generated voices" in shown
    assert (out / "report.html").stat().st_size > 10_000
    assert len(list((out / "student_mvat" / "enhanced").glob("*.wav"))) >= 1

    gathered = results.gather(out)
    assert [s["label"] for s in gathered["systems"]] == ["noisy", "teacher", "student, alone", "student, MV-AT"]
    rows = results.table(gathered).splitlines()
    assert len(rows) == 6 and all(row.count("|") == rows[0].count("|") for row in rows)

    demo.main(["--data", str(data), "--out", str(out)])
    assert "epoch 1/1" not in capsys.readouterr().out  # finished runs are not trained again


def test_voices_that_were_asked_for_are_not_replaced(tiny, capsys):
    assert demo.main(["--data", str(tiny / "data"), "--out", str(tiny / "runs"), "--source", "voices"]) == 2
    assert capsys.readouterr().err == "train.demo: error: no network\n"
    assert not (tiny / "runs").exists()
