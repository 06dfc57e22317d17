"""What the cases start from: a recording, a model, data sets, runs, all tiny and all good."""

import json
from pathlib import Path

import numpy as np
import torch

import mvat
from mvat import audio
from train import manifest

ARGUMENTS = {"hidden": 6, "depth": 1, "segment_len": 8}
#: What every training case shares; a case's own options stand behind it.
BASE = """\
out: run
seed: 1
model:
  arguments: {hidden: 6, depth: 1, segment_len: 8}
data: {path: data, segment_seconds: 0.25, stride_seconds: 0.25, workers: 0}
optim: {epochs: 1, batch_size: 1}
valid: {metrics: [si_sdr], select: si_sdr}
"""


def build(folder: Path) -> None:
    """Make the scene in an empty folder."""
    tone(folder / "in.wav", 4000)
    (folder / "precious.txt").write_text("precious\n")
    torch.manual_seed(0)
    model = mvat.Manner(**ARGUMENTS)
    model.save_pretrained(folder / "model")
    torch.save({"state_dict": model.state_dict(), "model_config": model.config}, folder / "best.pt")
    (folder / "base.yaml").write_text(BASE)
    _pairs(folder / "data")
    _recordings(folder / "mixed")
    for name, frames in (("p1_001", 2000), ("p2_001", 2000)):
        for split in ("trainset", "testset"):
            for side in ("clean", "noisy"):
                tone(folder / "voicebank" / f"{side}_{split}_wav" / f"{name}.wav", frames)
    _experiment(folder / "runs" / "student")


def tone(path: Path, frames: int, rate: int = 16000, channels: int = 1, subtype: str = "PCM_16") -> None:
    """A recording of noise, the same for the same name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(sum(path.name.encode()))
    audio.write(path, 0.1 * rng.standard_normal((channels, frames)), rate, subtype)


def _pairs(folder: Path) -> None:
    """A prepared data set of pairs: three to train on, of two speakers, one each to validate and to test on."""
    splits = {}
    manifest.claim(folder, {"source": "synthetic"})
    for split, names in (("train", ("a_1", "a_2", "b_1")), ("valid", ("c_1",)), ("test", ("d_1",))):
        splits[split] = []
        for name in names:
            files = [folder / split / side / f"{name}.wav" for side in ("clean", "noisy")]
            for file in files:
                tone(file, 4800)
            splits[split].append(manifest.Entry(name, name[0], *files, frames=4800, noise="white", snr=0.0))
    manifest.save(folder, "synthetic", splits)


def _recordings(folder: Path) -> None:
    """A prepared data set to mix: the pairs' clean and noisy files stand for speech and noise."""
    manifest.claim(folder, {"source": "dns"})
    found: dict[str, list[manifest.Recording]] = {role: [] for role in manifest.ROLES}
    for role in ("clean", "noise"):
        file = folder / role / "a.wav"
        tone(file, 16000)
        # Relative paths are kept as they are, so that the scene can be copied.
        found[role].append(manifest.Recording(f"mixed/{role}/a.wav", 16000, 16000, 1, "a"))
    files = [folder / "valid" / side / "v_1.wav" for side in ("clean", "noisy")]
    for file in files:
        tone(file, 4800)
    splits = {"valid": [manifest.Entry("v_1", "v", *files, frames=4800)]}
    manifest.save(folder, "dns", splits, recordings=found)


def _experiment(folder: Path) -> None:
    """A run's folder as training and evaluation leave it, but for weights."""
    folder.mkdir(parents=True)
    described = {"label": "student", "kind": "student", "method": "none", "seed": 1, "parameters": 9, "gflops": 0.1}
    epochs = [{"epoch": 1, "step": 2, "lr": 0.1, "train": {"total": 1.0}, "valid": {"si_sdr": 3.0}}]
    scores = {
        "set": "test",
        "data": "data/manifest.json",
        "mean": {"si_sdr": 3.0},
        "scored": {"si_sdr": 1},
        "failed": [],
        "files": {"d_1": {"si_sdr": 3.0}},
    }
    for name, content in (
        ("history", {"format": "mvat-history-1", **described, "epochs": epochs}),
        ("scores", {"format": "mvat-scores-1", **described, **scores}),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
