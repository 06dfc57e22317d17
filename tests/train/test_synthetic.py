"""Generated speech, noise and mixtures."""

import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mvat import audio
from train import manifest
from train.mixing import babble, coloured, excerpt, high_pass, level, long_term_spectrum, mix, speech_shaped
from train.synthetic import VOICES, make_pair, make_speech, prepare_synthetic, voice

REPO = Path(__file__).parents[2]
small = partial(prepare_synthetic, train_minutes=0.3, valid_minutes=0.1, test_minutes=0.2, progress=False)


def decibels(samples: np.ndarray) -> float:
    return 10 * np.log10(np.mean(samples.astype(np.float64) ** 2))


def slope(samples: np.ndarray, low: float, high: float) -> float:
    """Decibels an octave of the power spectrum."""
    power = np.abs(np.fft.rfft(samples)) ** 2
    frequencies = np.fft.rfftfreq(len(samples), 1 / 16000)
    edges = np.geomspace(low, high, 9)
    bands = [power[(frequencies >= a) & (frequencies < b)].mean() for a, b in zip(edges, edges[1:], strict=False)]
    return np.polyfit(np.log2(edges[:-1]), 10 * np.log10(bands), 1)[0]


def pitch(samples: np.ndarray) -> float:
    """Frequency of the strongest periodicity, 60 to 320 Hz, over the whole signal."""
    power = np.abs(np.fft.rfft(samples, 2 * len(samples))) ** 2
    lags = np.fft.irfft(power)[: 16000 // 60]
    return 16000 / (16000 // 320 + np.argmax(lags[16000 // 320 :]))


@pytest.mark.parametrize("seconds", [0.1, 1.0, 3.21])
def test_make_speech(seconds):
    speech = make_speech(np.random.default_rng(0), seconds)
    assert speech.dtype == np.float32 and speech.shape == (round(16000 * seconds),)
    assert np.isfinite(speech).all() and abs(decibels(speech) + 25) < 0.01


def test_speech_is_speech_like():
    speech = make_speech(np.random.default_rng(1), 20, voice(0))
    frames = 10 * np.log10(np.mean(speech.reshape(-1, 160) ** 2, axis=1) + 1e-12)
    active = frames > frames.max() - 40
    assert 0.5 < active.mean() < 0.95  # there are pauses
    assert 0.8 < pitch(speech) / voice(0).pitch < 1.3
    power = np.abs(np.fft.rfft(speech)) ** 2
    assert power[: 20 * 1000].sum() > 10 * power[20 * 4000 :].sum() > 0  # most below 1 kHz, some above 4 kHz


def test_voices_differ_between_splits():
    numbers = [number for split in VOICES.values() for number in split]
    assert len(set(numbers)) == len(numbers)
    made = [voice(number) for number in numbers]
    assert len({(v.name, v.pitch, v.tract) for v in made}) == len(made)
    low, high = (make_speech(np.random.default_rng(2), 10, voice(n)) for n in (0, 1))
    assert pitch(low) < 150 < pitch(high)
    assert voice(3) == voice(3)


def test_make_pair():
    rng = np.random.default_rng(3)
    for _ in range(8):
        clean, noisy = make_pair(rng, 2.0)
        assert clean.shape == noisy.shape == (32000,) and clean.dtype == noisy.dtype == np.float32
        assert -0.1 < decibels(clean) - decibels(noisy - clean) < 15.1
        assert np.abs(noisy).max() <= 1
    again = make_pair(np.random.default_rng(4), 1.0), make_pair(np.random.default_rng(4), 1.0)
    assert np.array_equal(again[0], again[1])
    with pytest.raises(ValueError, match="at least 0.1"):
        make_pair(rng, 0.05)


def test_generator_needs_numpy_alone():
    code = (
        "import sys\n"
        "for name in ('soundfile', 'soxr', 'scipy', 'jsonargparse', 'tqdm', 'av'): sys.modules[name] = None\n"
        "import numpy\n"
        "from train.synthetic import make_pair\n"
        "print(len(make_pair(numpy.random.default_rng(0), 1.0)[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.stdout.strip() == "16000", done.stderr


@pytest.mark.parametrize("snr", [-5.0, 0.0, 2.5, 17.5])
def test_mix(snr):
    rng = np.random.default_rng(5)
    clean, noise = make_speech(rng, 2), coloured(rng, 32000, 1.0)
    noisy = mix(clean, noise, snr)
    assert abs(decibels(clean) - decibels(noisy - clean) - snr) < 0.01


def test_mix_refuses():
    ones, zeros = np.ones(10, np.float32), np.zeros(10, np.float32)
    with pytest.raises(ValueError, match=r"\[10\], noise \[9\]"):
        mix(ones, ones[:9], 0)
    for clean, noise in ((zeros, ones), (ones, zeros)):
        with pytest.raises(ValueError, match="silent"):
            mix(clean, noise, 0)
    for function in (level, lambda silence: excerpt(np.random.default_rng(0), silence, 5)):
        with pytest.raises(ValueError, match="silen"):
            function(zeros)


@pytest.mark.parametrize(("exponent", "expected"), [(0.0, 0.0), (1.0, -3.0), (2.0, -6.0)])
def test_coloured(exponent, expected):
    noise = coloured(np.random.default_rng(6), 160001, exponent)
    assert noise.shape == (160001,) and abs(decibels(noise)) < 0.01
    assert abs(slope(noise, 100, 6400) - expected) < 0.3


def test_speech_shaped():
    rng = np.random.default_rng(7)
    speech = make_speech(rng, 20)
    noise = speech_shaped(rng, 20 * 16000, long_term_spectrum(speech))
    ratio = long_term_spectrum(noise) / long_term_spectrum(speech)
    bins = slice(5, 120)
    assert np.std(20 * np.log10(ratio[bins])) < 2
    assert noise.shape == (320000,)


def test_babble_and_excerpt():
    rng = np.random.default_rng(8)
    voices = [make_speech(rng, seconds) for seconds in (0.5, 1.3, 2.0)]
    for frames in (100, 16000, 100000):
        assert babble(rng, frames, voices).shape == (frames,)
    recording = np.concatenate([np.zeros(50000), rng.standard_normal(50000)]).astype(np.float32)
    for _ in range(20):
        assert decibels(excerpt(rng, recording, 1000)) > -25
    assert np.array_equal(excerpt(rng, recording[-10:], 20), np.tile(recording[-10:], 2))


def test_high_pass():
    time = np.arange(16000) / 16000
    low, high = (np.sin(2 * np.pi * frequency * time) for frequency in (30, 100))
    assert decibels(high_pass(low)) < -40 and abs(decibels(high_pass(high)) - decibels(high)) < 0.1


def test_prepare_synthetic(tmp_path):
    out = tmp_path / "data"
    data = small(out, seed=1)
    speakers = {}
    for split, seconds in (("train", 18), ("valid", 6), ("test", 12)):
        entries = data.split(split)
        assert seconds <= sum(e.frames for e in entries) / 16000 < seconds + 6
        speakers[split] = {e.speaker for e in entries}
        for entry in entries:
            clean, rate = audio.read(entry.clean)
            noisy, _ = audio.read(entry.noisy)
            assert rate == 16000 and clean.shape == noisy.shape == (1, entry.frames)
            assert abs(decibels(clean) - decibels(noisy - clean) - entry.snr) < 0.1
            assert decibels(clean) > -30
    assert not speakers["train"] & speakers["test"] and not speakers["train"] & speakers["valid"]
    assert not speakers["valid"] & speakers["test"]
    assert {e.noise for e in data.train} == {"babble", "white", "pink", "brown"}
    assert {e.noise for e in data.test} == {"babble", "speech-shaped"}
    assert max(Counter(e.name for e in data.train).values()) == 1
    assert manifest.load(out) == data

    # The same settings find it done; the same seed elsewhere gives the same files, another seed others.
    stamp = data.train[0].noisy.stat().st_mtime_ns
    assert small(out, seed=1) == data and data.train[0].noisy.stat().st_mtime_ns == stamp
    same, other = small(tmp_path / "same", seed=1), small(tmp_path / "other", seed=2)
    for one, two in zip(data.train, same.train, strict=True):
        assert one.noisy.read_bytes() == two.noisy.read_bytes()
    assert other.train[0].clean.read_bytes() != data.train[0].clean.read_bytes()
    with pytest.raises(manifest.ManifestError, match="seed 1, now 2"):
        small(out, seed=2)


def test_prepare_refuses(tmp_path):
    with pytest.raises(ValueError, match="minutes of train"):
        prepare_synthetic(tmp_path / "a", train_minutes=float("nan"), progress=False)
    assert not (tmp_path / "a").exists()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("precious")
    with pytest.raises(manifest.ManifestError, match="was not made by train.prepare"):
        small(tmp_path / "b")
    assert [file.name for file in (tmp_path / "b").iterdir()] == ["thesis.txt"]
    (tmp_path / "c").write_text("a file")
    with pytest.raises(manifest.ManifestError, match="expected a folder"):
        small(tmp_path / "c")
