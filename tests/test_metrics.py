import csv
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvat.metrics import METRICS, Failure, ScoreError, score, score_files, si_sdr


def speech_like(seconds: float, seed: int = 0) -> np.ndarray:
    """Harmonics under a syllable-like envelope: enough for PESQ to find utterances in."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * 16000)) / 16000
    voice = sum(np.sin(2 * np.pi * 140 * k * t + rng.uniform(0, 6)) / k for k in range(1, 20))
    return 0.05 * voice * (np.sin(2 * np.pi * 1.5 * t) > -0.3) + 1e-4 * rng.standard_normal(len(t))


def noisy(clean: np.ndarray, level: float = 0.02) -> np.ndarray:
    return clean + level * np.random.default_rng(1).standard_normal(len(clean))


class Deadly(os.PathLike):
    """A path that kills whatever process opens it."""

    def __fspath__(self) -> str:
        os.kill(os.getpid(), signal.SIGKILL)
        return ""


def test_golden_scores(shared):
    golden = json.loads((shared / "golden" / "composite_vbd16k_noisy_test.json").read_text())
    corpus = shared / "corpus" / "vbd16k"
    names = ["p257_003", "p257_023", "p257_030"]
    pairs = [
        (name, corpus / "clean_testset_wav" / f"{name}.flac", corpus / "noisy_testset_wav" / f"{name}.flac")
        for name in names
    ]
    scores = score_files(pairs, progress=False)
    assert scores.failures == [] and scores.count() == dict.fromkeys(METRICS, len(names))
    for name in names:
        assert scores.rows[name] == pytest.approx({m: golden[name][m] for m in METRICS}, abs=1e-3), name
        assert scores.rows[name]["si_sdr"] == pytest.approx(golden[name]["si_sdr"], abs=1e-6)


# SI-SDR


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.integers(3, 2000),
    scale=st.floats(1e-3, 1e3),
    sign=st.sampled_from([-1, 1]),
    offset=st.floats(-5, 5),
)
def test_si_sdr_formula_and_invariances(seed, length, scale, sign, offset):
    rng = np.random.default_rng(seed)
    clean = rng.standard_normal(length)
    estimate = clean + rng.uniform(0.01, 3) * rng.standard_normal(length)
    squared = np.corrcoef(clean, estimate)[0, 1] ** 2  # SI-SDR is rho^2 / (1 - rho^2), rho Pearson's correlation
    expected = 10 * np.log10(squared / (1 - squared))
    assert si_sdr(clean, estimate) == pytest.approx(expected, abs=1e-6)
    assert si_sdr(clean, sign * scale * estimate + offset) == pytest.approx(expected, abs=1e-6)
    assert si_sdr(scale * clean + offset, estimate) == pytest.approx(expected, abs=1e-6)


def test_si_sdr_extremes():
    clean = np.array([1.0, -1.0, 1.0, -1.0])
    orthogonal = np.array([1.0, 1.0, -1.0, -1.0])
    assert si_sdr(clean, clean) == np.inf
    assert si_sdr(clean, 0.3 * clean + 0.1) == np.inf
    assert si_sdr(clean, orthogonal) == -np.inf
    assert si_sdr(clean, clean + 0.1 * orthogonal) == pytest.approx(20)
    assert si_sdr(clean.astype(np.float32), (clean + 0.1 * orthogonal).astype(np.float32)) == pytest.approx(20)


# One pair


def test_score_order_and_direction():
    clean = speech_like(2)
    good, bad = score(clean, noisy(clean, 0.01)), score(clean, noisy(clean, 0.1))
    assert tuple(good) == METRICS
    assert all(good[metric] > bad[metric] for metric in METRICS)
    assert tuple(score(clean, noisy(clean), ["si_sdr", "stoi"])) == ("si_sdr", "stoi")


@pytest.mark.parametrize(
    ("clean", "estimate", "metric", "reason"),
    [
        (np.zeros(16000), speech_like(1), "all", "clean signal is silent"),
        (speech_like(1), np.full(16000, 0.5), "all", "estimate signal is silent"),
        (speech_like(1), speech_like(1.5), "all", r"\[16000\] and \[24000\]"),
        (np.ones((1, 16000)), np.ones((1, 16000)), "all", "one length"),
        (speech_like(1), np.where(np.arange(16000) == 7, np.nan, 0.1), "all", "estimate signal has NaN"),
        (np.zeros(0), np.zeros(0), "all", "empty"),
        (speech_like(0.3), noisy(speech_like(0.3)), "stoi", "too short"),
        (speech_like(0.1), noisy(speech_like(0.1)), "pesq_wb", "1/4 of a second"),
        (speech_like(1), 0.5 * speech_like(1), "si_sdr", "infinite"),
    ],
)
def test_unscorable_pair(clean, estimate, metric, reason):
    with pytest.raises(ScoreError, match=reason) as caught:
        score(clean, estimate, METRICS if metric == "all" else [metric])
    assert caught.value.metric == metric


def test_score_refuses_what_is_no_signal():
    with pytest.raises(TypeError, match="clean: expected a floating-point array.*int16"):
        score(np.ones(16000, np.int16), speech_like(1))
    with pytest.raises(ValueError, match="unknown metric 'pesq', expected some of pesq_wb"):
        score(speech_like(1), speech_like(1), ["pesq"])
    with pytest.raises(ValueError, match="different metrics"):
        score(speech_like(1), speech_like(1), [])


# Many pairs


@pytest.fixture(scope="module")
def mixed_pairs():
    """Four pairs that can be scored, four that cannot."""
    clean = [speech_like(1 + 0.2 * i, seed=i) for i in range(4)]
    return [
        ("d", clean[0], noisy(clean[0])),
        ("silent", np.zeros(16000), noisy(clean[0])[:16000]),
        ("a", clean[1], noisy(clean[1])),
        ("perfect", clean[2], clean[2]),
        ("missing", clean[2], Path("nowhere") / "missing.wav"),
        ("c", clean[2], noisy(clean[2])),
        ("unlike", clean[1], clean[2]),
        ("b", clean[3], noisy(clean[3])),
    ]


def test_score_files_does_not_depend_on_workers(mixed_pairs):
    here, pool = (score_files(mixed_pairs, ("stoi", "si_sdr"), workers, progress=False) for workers in (0, 3))
    assert list(here.rows) == list(pool.rows) == [name for name, _, _ in mixed_pairs]
    assert here.failures == pool.failures
    numbers = [np.array([list(row.values()) for row in scores.rows.values()], float) for scores in (here, pool)]
    np.testing.assert_allclose(*numbers, rtol=1e-9)  # None, now NaN, in the same places


def test_failures_are_listed_and_not_averaged(mixed_pairs, tmp_path):
    scores = score_files(mixed_pairs, ("stoi", "si_sdr"), workers=0, progress=False)
    assert scores.unscored() == ["silent", "perfect", "missing", "unlike"]
    assert [failure.metric for failure in scores.failures] == ["all", "si_sdr", "all", "all"]
    assert scores.count() == {"stoi": 5, "si_sdr": 4}
    good = [si_sdr(clean, estimate) for name, clean, estimate in mixed_pairs if len(name) == 1]
    assert scores.mean()["si_sdr"] == pytest.approx(np.mean(good))
    assert scores.rows["perfect"]["stoi"] == pytest.approx(1) and scores.rows["perfect"]["si_sdr"] is None

    scores.to_json(tmp_path / "scores.json", {"label": "noisy"})
    written = json.loads((tmp_path / "scores.json").read_text())
    assert list(written) == ["label", "mean", "scored", "failed", "files"]
    assert written["files"] == scores.rows and written["mean"] == scores.mean()
    assert written["failed"][1] == {"name": "perfect", "metric": "si_sdr", "reason": scores.failures[1].reason}

    scores.to_csv(tmp_path / "scores.csv")
    lines = list(csv.DictReader((tmp_path / "scores.csv").open()))
    assert [line["name"] for line in lines] == [name for name, _, _ in mixed_pairs]
    assert lines[3]["si_sdr"] == "" and float(lines[0]["si_sdr"]) == scores.rows["d"]["si_sdr"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.csv", "scores.json"]


def test_nothing_scored_has_no_mean(tmp_path):
    scores = score_files([("x", np.zeros(9), np.zeros(9))], ("stoi",), workers=0, progress=False)
    assert scores.mean() == {"stoi": None} and scores.count() == {"stoi": 0}
    assert score_files([], progress=False).rows == {}


def test_file_of_another_format_is_a_failure(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    clean = speech_like(1)
    soundfile.write(tmp_path / "fast.wav", clean, 48000)
    soundfile.write(tmp_path / "stereo.wav", np.stack([clean, clean], 1), 16000)
    (tmp_path / "text.wav").write_text("no audio")
    pairs = [(name, clean, tmp_path / f"{name}.wav") for name in ("fast", "stereo", "text")]
    scores = score_files(pairs, ("si_sdr",), workers=0, progress=False)
    assert [failure[:2] for failure in scores.failures] == [("fast", "all"), ("stereo", "all"), ("text", "all")]
    assert all(str(tmp_path) in failure.reason for failure in scores.failures)
    assert "48000 Hz" in scores.failures[0].reason and "2 channel" in scores.failures[1].reason


def test_dying_process_costs_one_recording():
    clean = speech_like(1)
    pairs = [(name, clean, noisy(clean)) for name in "abcd"]
    pairs.insert(2, ("deadly", Deadly(), clean))
    scores = score_files(pairs, ("si_sdr",), workers=2, progress=False)
    assert scores.unscored() == ["deadly"] and "process died" in scores.failures[0].reason
    assert scores.count() == {"si_sdr": 4} and list(scores.rows) == [name for name, _, _ in pairs]


def test_processes_that_cannot_start(tmp_path):
    """A script without the __main__ guard gets one clear error, not a hang."""
    import subprocess
    import sys

    script = tmp_path / "unguarded.py"
    script.write_text(
        "import numpy as np\nfrom mvat.metrics import score_files\n"
        "x = np.random.default_rng(0).standard_normal(16000)\n"
        "score_files([('x', x, x + 1)], ['si_sdr'], workers=1, progress=False)\n"
    )
    repository = str(Path(__file__).resolve().parents[1])
    run = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": repository},
    )
    assert run.returncode != 0 and 'if __name__ == "__main__"' in run.stderr


def test_score_files_refuses_bad_arguments():
    clean = speech_like(1)
    with pytest.raises(ValueError, match="name of its own, given twice: 'x'"):
        score_files([("x", clean, clean), ("x", clean, clean)])
    with pytest.raises(TypeError, match="x: expected a floating-point array, got list"):
        score_files([("x", clean, [1, 2])])
    with pytest.raises(ValueError, match="workers must be 0 or more, got -1"):
        score_files([("x", clean, clean)], workers=-1)


def test_failure_is_a_plain_triple():
    assert Failure("x", "stoi", "too short")._asdict() == {"name": "x", "metric": "stoi", "reason": "too short"}
