import csv
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvat import audio
from mvat.metrics import METRICS, Failure, ScoreError, composite, score, score_files, segsnr, si_sdr


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


def golden_pair(shared, name):
    corpus = shared / "corpus" / "vbd16k"
    return tuple(corpus / f"{side}_testset_wav" / f"{name}.flac" for side in ("clean", "noisy"))


@pytest.fixture
def golden(shared):
    """Recording -> metric -> score by an independent scorer."""
    return json.loads((shared / "golden" / "composite_vbd16k_noisy_test.json").read_text())


def test_golden_scores(shared, golden):
    names = ["p257_003", "p257_023", "p257_030"]
    scores = score_files([(name, *golden_pair(shared, name)) for name in names], progress=False)
    assert scores.failures == [] and scores.count() == dict.fromkeys(METRICS, len(names))
    for name in names:
        known = {metric: golden[name][metric] for metric in METRICS if metric in golden[name]}
        assert {metric: scores.rows[name][metric] for metric in known} == pytest.approx(known, abs=1e-3), name
        assert scores.rows[name]["si_sdr"] == pytest.approx(golden[name]["si_sdr"], abs=1e-6)


def test_golden_composite_measures(shared, golden):
    """Every recording, with the scorer's PESQ, so that what is left is ours."""
    for name, known in golden.items():
        clean, noisy = (audio.read(path)[0][0] for path in golden_pair(shared, name))
        distances = composite.distances(clean, noisy)
        found = {
            "csig": composite.csig(known["pesq_wb"], distances),
            "cbak": composite.cbak(known["pesq_wb"], distances, segsnr(clean, noisy)),
            "covl": composite.covl(known["pesq_wb"], distances),
        }
        assert found == pytest.approx({metric: known[metric] for metric in found}, abs=1e-3), name


# Segmental SNR and the composite measures


def test_frozen_distances():
    """Holds what agrees with the independent scorer where its recordings are not there."""
    clean = speech_like(2)
    estimate = noisy(clean, 0.001)
    assert composite.distances(clean, estimate) == pytest.approx((1.0665724, 14.5796868), rel=1e-6)
    assert segsnr(clean, estimate) == pytest.approx(14.2402492, rel=1e-6)


def test_ratings_are_the_published_regressions_within_1_to_5():
    distances = composite.Distances(llr=0.5, wss=40)
    assert composite.csig(2, distances) == pytest.approx(3.093 - 1.029 * 0.5 + 0.603 * 2 - 0.009 * 40)
    assert composite.cbak(2, distances, 8) == pytest.approx(1.634 + 0.478 * 2 - 0.007 * 40 + 0.063 * 8)
    assert composite.covl(2, distances) == pytest.approx(1.594 + 0.805 * 2 - 0.512 * 0.5 - 0.007 * 40)
    best, worst = composite.Distances(0, 0), composite.Distances(9, 300)
    assert (composite.csig(4.64, best), composite.cbak(4.64, best, 35), composite.covl(4.64, best)) == (5, 5, 5)
    assert (composite.csig(1, worst), composite.cbak(1, worst, -10), composite.covl(1, worst)) == (1, 1, 1)


def naive_llr(clean, estimate):
    """One frame by the definition: predictors from the normal equations."""
    r = [np.correlate(x, x, "full")[len(x) - 1 :][:17] for x in (clean, estimate)]
    matrices = [values[np.abs(np.subtract.outer(np.arange(17), np.arange(17)))] for values in r]
    a, b = (np.r_[1, -np.linalg.solve(m[:16, :16], m[1:, 0])] for m in reversed(matrices))
    return np.log((a @ matrices[0] @ a) / (b @ matrices[0] @ b))


def naive_peak(level, band):
    """The level that weighs a slope: up while it rises, to one band before the top, else down to where it fell."""
    slope, n = np.diff(level), band
    if slope[band] > 0:
        while n < len(slope) and slope[n] > 0:
            n += 1
        return level[n - 1]
    while n >= 0 and slope[n] <= 0:
        n -= 1
    return level[n + 1]


def test_distances_against_plain_definitions():
    rng = np.random.default_rng(0)
    clean, estimate = rng.standard_normal((2, 600)).cumsum(1)  # one frame
    window = np.hanning(482)[1:-1]
    frames = clean[:480] * window, estimate[:480] * window
    found = composite.distances(clean, estimate)
    assert found.llr == pytest.approx(naive_llr(*frames), rel=1e-6)

    level = rng.integers(0, 4, (50, 25)).astype(float)  # with ties
    slope = np.diff(level)
    weights = composite._weights(level, slope)
    for i, j in np.ndindex(slope.shape):
        expected = 20 / (20 + level[i].max() - level[i, j]) / (1 + naive_peak(level[i], j) - level[i, j])
        assert weights[i, j] == pytest.approx(expected)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
def test_distances_are_finite_whatever_is_silent_or_tonal(scale):
    t = np.arange(16000) / 16000
    tone, other = scale * np.sin(2 * np.pi * 440 * t), scale * np.sin(2 * np.pi * 441 * t)
    for clean, estimate in ((tone, other), (tone * (t > 0.3), other * (t < 0.6)), (scale * (t > 0.5), tone)):
        with np.errstate(divide="raise", invalid="raise", over="raise"):
            found = composite.distances(clean, estimate)
            assert all(0 <= value < 1e4 for value in found) and -10 <= segsnr(clean, estimate) <= 35
            assert composite.distances(clean, clean) == pytest.approx((0, 0), abs=1e-2)


def test_segmental_snr_ignores_offset_and_scale():
    clean = speech_like(1)
    estimate = noisy(clean)
    assert segsnr(clean, 3 * estimate + 0.5) == pytest.approx(segsnr(clean, estimate))
    assert segsnr(clean, clean) > 34
    with pytest.raises(ScoreError, match="estimate signal has NaN"):
        segsnr(clean, np.where(np.arange(len(clean)) == 7, np.nan, estimate))


def test_pesq_runs_once_a_pair(monkeypatch):
    import pesq

    modes = []
    monkeypatch.setattr(pesq, "pesq", lambda rate, clean, estimate, mode: modes.append(mode) or 2.0)
    clean = speech_like(0.5)
    found = score(clean, noisy(clean), ["csig", "cbak", "covl", "pesq_wb"])
    assert modes == ["wb"] and found["pesq_wb"] == 2.0


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
    good, bad = score(clean, noisy(clean, 1e-4)), score(clean, noisy(clean, 1e-3))
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
        (speech_like(0.03), noisy(speech_like(0.03)), "segsnr", "too short: fewer than 600 samples"),
        (speech_like(0.1), noisy(speech_like(0.1)), "covl", "1/4 of a second"),
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
