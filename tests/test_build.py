"""The build: what setup.py does with and without a compiler, and what a user is told where the extension is missing."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mvat.kernels import native

REPO = Path(__file__).resolve().parents[1]

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")), reason="no C++ compiler on PATH"
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what a build needs."""
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(REPO / name, tmp_path)
    (tmp_path / "README.md").touch()
    shutil.copytree(REPO / "csrc", tmp_path / "csrc")
    package = tmp_path / "mvat"
    package.mkdir()
    (package / "__init__.py").touch()
    return tmp_path


def build(source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "build"],
        cwd=source,
        env=os.environ | {"MAX_JOBS": "2"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@needs_compiler
def test_the_extension_is_built_and_its_operators_are_registered() -> None:
    assert native.missing("attention_map") is None
    assert hasattr(torch.ops.mvat, "attention_map") and hasattr(torch.ops.mvat, "attention_map_backward")
    assert importlib.import_module("mvat._C").__file__.endswith(".abi3.so")


def test_without_a_compiler_the_python_part_is_built(source: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    result = build(source, PATH=str(empty), CXX="")
    assert result.returncode == 0, result.stdout
    assert "NO C++ COMPILER FOUND" in result.stdout
    assert list((source / "build").rglob("__init__.py")) and not list((source / "build").rglob("*.so"))


@needs_compiler
def test_a_failing_compiler_is_an_error(source: Path) -> None:
    shutil.rmtree(source / "csrc" / "cpu")
    (source / "csrc" / "module.cpp").write_text("#error broken on purpose\n")
    result = build(source)
    assert result.returncode != 0
    assert "broken on purpose" in result.stdout and "NO C++ COMPILER" not in result.stdout


@needs_compiler
def test_a_pytorch_with_cuda_but_no_nvcc_installs_the_rest(source: Path) -> None:
    shutil.rmtree(source / "csrc" / "cpu")
    script = """
import runpy, sys
import torch
import torch.utils.cpp_extension as helper
torch.version.cuda, helper.CUDA_HOME = "13.0", None
sys.argv = ["setup.py", "build"]
runpy.run_path("setup.py", run_name="__main__")
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("NO NVCC FOUND") == 1 and "toolkit 13.0" in result.stderr
    assert list((source / "build").rglob("_C.abi3.so"))


def test_the_reason_names_what_is_missing_and_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mvat._C", None)  # importing it raises ModuleNotFoundError
    command = "pip install --no-build-isolation --force-reinstall --no-deps ."
    monkeypatch.setattr(shutil, "which", lambda name: None)
    reason = native._load()
    assert reason is not None and "apt install g++" in reason and command in reason
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/" + name)
    reason = native._load()
    assert reason is not None and "is not built" in reason and "apt" not in reason and command in reason


def test_an_extension_that_does_not_load_shows_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("undefined symbol: torch_parallel_for")

    monkeypatch.setattr(importlib, "import_module", broken)
    reason = native._load()
    assert reason is not None and "undefined symbol: torch_parallel_for" in reason


def test_an_operator_that_an_older_extension_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_missing", None)
    assert "has no not_yet_written" in (native.missing("not_yet_written") or "")


def test_without_the_extension_everything_runs_and_one_warning_is_given() -> None:
    script = """
import sys, warnings
sys.modules["mvat._C"] = None
import torch
from mvat.kernels import attention_map, use_backend

x = torch.randn(2, 3, 5)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        torch.testing.assert_close(attention_map(x), x.square().sum(1))
assert len(caught) == 1 and "is not built" in str(caught[0].message), caught
assert caught[0].filename.endswith("<string>"), caught[0].filename
torch.testing.assert_close(torch.compile(attention_map, fullgraph=True, backend="eager")(x), x.square().sum(1))
use_backend("fused")
try:
    attention_map(x)
except RuntimeError as error:
    assert "is not built" in str(error)
else:
    raise AssertionError("the fused back end did not refuse")
"""
    environment = {name: value for name, value in os.environ.items() if name != "MVAT_BACKEND"}
    result = subprocess.run([sys.executable, "-c", script], cwd=REPO, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
