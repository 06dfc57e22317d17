"""The parts of benchmarks/gpu_check.sh that run on any machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import distillation_run, step_profile

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.sh"
TINY = ["--student", "tiny", "--teacher", "tiny", "--batch", "1"]


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable}
    return subprocess.run(["bash", SCRIPT, *arguments], env=environment, capture_output=True, text=True)


def test_without_a_folder_it_says_how_it_is_called() -> None:
    result = check()
    assert result.returncode == 2 and "gpu_check.sh OUTDIR [PART...]" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_does_nothing(tmp_path: Path) -> None:
    result = check(str(tmp_path / "out"))
    assert result.returncode == 2 and "no torch that sees a CUDA device" in result.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_profile_of_a_step_names_its_ops(tmp_path: Path) -> None:
    step_profile.main([str(tmp_path / "profile.txt"), *TINY, "--samples", "1600"])
    text = (tmp_path / "profile.txt").read_text()
    fused, eager = sorted(text.split("back end ")[1:])
    assert fused.startswith("auto") and "mvat::norm_act_conv_backward" in fused
    assert eager.startswith("eager") and "aten::convolution_backward" in eager and "mvat::" not in eager


def test_both_back_ends_distil_alike(tmp_path: Path) -> None:
    distillation_run.main([str(tmp_path / "run.json"), *TINY, "--seconds", "0.2", "--minutes", "0.001"])
    result = json.loads((tmp_path / "run.json").read_text())
    assert [run["backend"] for run in result["runs"]] == ["auto", "eager"]
    assert all(run["steps"] >= 5 for run in result["runs"])
    assert result["largest_relative_difference_of_losses"] < 1e-3
