"""The student that comes with mvat: what it must do to any recording. Its scores are in its card."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import mvat
from mvat import audio, cli
from mvat.metrics import score
from mvat.models.pretrained import SHIPPED


@pytest.fixture(scope="module")
def student() -> mvat.Manner:
    return mvat.Manner.from_pretrained()


def test_it_is_the_small_preset_in_evaluation_mode_and_in_float32(student):
    assert student.config == mvat.Manner.from_preset("s-8.1gf").config and not student.training
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}


def test_the_package_stays_small():
    assert {path.name for path in SHIPPED.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert (SHIPPED / "model.safetensors").stat().st_size <= 4e6
    assert json.loads((SHIPPED / "config.json").read_text())


@pytest.mark.parametrize("frames", [1, 597, 16000, 80000])
def test_silence_stays_silence(student, frames):
    """At most one step of 16 bits."""
    assert np.abs(mvat.enhance(np.zeros(frames, np.float32), student)).max() <= 2**-15


def test_the_command_uses_it_without_being_told(student, tmp_path: Path):
    t = np.arange(32000) / 16000
    speaks = np.sin(3 * np.pi * t) > 0
    voice = 0.05 * speaks * sum(np.sin(2 * np.pi * 140 * k * t) / k for k in range(1, 20))
    noisy = (voice + 0.01 * np.random.default_rng(0).standard_normal(32000)).astype(np.float32)
    source, out = tmp_path / "noisy.wav", tmp_path / "out.wav"
    audio.write(source, noisy[None], 16000)
    assert cli.main(["enhance", str(source), "-o", str(out)]) == 0
    written, expected = audio.read(out)[0][0], mvat.enhance(audio.read(source)[0][0], student)
    assert np.abs(written - expected).max() <= 2**-15
    pauses = ~speaks & np.roll(~speaks, 800) & np.roll(~speaks, -800)  # 50 ms from the voice
    assert np.square(written[pauses]).mean() < 0.1 * np.square(noisy[pauses]).mean()  # noise is what it removes
    assert np.square(written[speaks]).mean() > 0.5 * np.square(voice[speaks]).mean()


def test_speech_is_enhanced_and_clean_speech_is_left_alone(student, shared: Path):
    """A speaker and noises that its training has not heard; every fifth recording of the set that its card scores."""
    pairs = shared / "corpus" / "vbd16k"
    noisy_scores, scores, kept = [], [], []
    for path in sorted((pairs / "clean_testset_wav").iterdir())[::5]:
        clean, noisy = (audio.read(pairs / f"{kind}_testset_wav" / path.name)[0][0] for kind in ("clean", "noisy"))
        noisy_scores.append(score(clean, noisy, ("pesq_wb", "stoi")))
        scores.append(score(clean, mvat.enhance(noisy, student), ("pesq_wb", "stoi")))
        kept.append(score(clean, mvat.enhance(clean, student), ("pesq_wb",))["pesq_wb"])
    gain = {name: np.mean([b[name] - a[name] for a, b in zip(noisy_scores, scores, strict=True)]) for name in scores[0]}
    assert gain["pesq_wb"] >= 0.2 and gain["stoi"] >= 0
    assert np.mean(kept) >= 4
