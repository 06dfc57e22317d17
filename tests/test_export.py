"""Exported programs compute what the model does, for any batch and length; bad requests are one line."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mvat
from mvat import cli, export
from mvat.kernels import native

#: Two levels, for a skip of each kind; attention in the deepest, for the time that tracing takes.
TINY = {"hidden": 6, "depth": 2, "segment_len": 8, "attention_layers": "deepest"}
needs_kernels = pytest.mark.skipif(native.missing("attention_map") is not None, reason="the extension is not built")


@pytest.fixture(scope="module")
def model() -> mvat.Manner:
    torch.manual_seed(0)
    return mvat.Manner(**TINY).eval()


@pytest.fixture(scope="module")
def checkpoint(model: mvat.Manner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


def agrees(run, model: mvat.Manner, *sizes: tuple[int, int]) -> None:
    for batch, samples in sizes:
        x = 0.1 * torch.randn(batch, 1, samples)
        with torch.no_grad():
            expected = model(x)
        torch.testing.assert_close(run(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


#: The shortest length, 52 = 36 + 16 and 1012 = 36 + 61 * 16, which need no padding, and others.
SIZES = ((1, 37), (1, 52), (2, 53), (3, 1012), (1, 1013), (2, 4001))


@needs_kernels
def test_a_pt2_file_runs_in_a_fresh_process(model: mvat.Manner, checkpoint: Path, tmp_path: Path, capsys) -> None:
    target = tmp_path / "model.pt2"
    assert cli.main(["export", "--checkpoint", str(checkpoint), "--format", "pt2", "-o", str(target)]) == 0
    assert "[batch, 1, samples >= 37] at 16000 Hz" in capsys.readouterr().out
    inputs = [0.1 * torch.randn(batch, 1, samples) for batch, samples in SIZES]
    torch.save(inputs, tmp_path / "inputs")
    script = """
import torch
import mvat.kernels

program = torch.export.load("model.pt2")
assert "mvat.local_attention" in str(program.graph), "the fused operators are not in the graph"
torch.save([program.module()(x) for x in torch.load("inputs")], "outputs")
try:
    program.module()(torch.zeros(1, 1, 36))
except Exception as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert ">= 37" in result.stdout
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    torch.testing.assert_close(torch.load(tmp_path / "outputs"), expected, rtol=0, atol=1e-7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inputs", "model.pt2", "outputs"]


def test_an_onnx_file_runs_in_onnx_runtime(model: mvat.Manner, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    target = tmp_path / "model.onnx"
    done = export.export_model(model, target, "onnx")
    assert done.error < 1e-5 and mvat.kernels.current_backend() != "eager"
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
    assert [(x.name, x.shape) for x in session.get_inputs()] == [("noisy", ["batch", 1, "samples"])]
    assert [x.name for x in session.get_outputs()] == ["enhanced"]
    agrees(lambda x: torch.from_numpy(session.run(None, {"noisy": x.numpy()})[0]), model, *SIZES)


@pytest.mark.parametrize("samples", [20])  # shorter than a dynamic program takes
def test_a_fixed_length_may_be_any(model: mvat.Manner, tmp_path: Path, samples: int) -> None:
    target = tmp_path / "model.pt2"
    with mvat.use_backend("eager"):
        done = export.export_model(model, target, "pt2", samples=samples)
    assert done.shape == f"[1, 1, {samples}]"
    program = torch.export.load(target)
    assert "mvat." not in str(program.graph)
    agrees(program.module(), model, (1, samples))
    with pytest.raises(Exception, match=f"== {samples}"):
        program.module()(torch.zeros(1, 1, samples + 1))


def test_a_result_that_is_not_the_model_s_is_not_left(model: mvat.Manner, tmp_path: Path, monkeypatch) -> None:
    target = tmp_path / "model.pt2"
    target.write_text("precious")
    backend = mvat.kernels.current_backend()
    monkeypatch.setattr(export, "_capture", lambda model, samples: None)
    monkeypatch.setitem(export._WRITERS, "pt2", lambda program, path: path.write_text("half"))
    for wrong, reason in ((lambda x: 1.001 * model(x), "of the peak away"), (lambda x: x[..., 1:], "the result gives")):
        monkeypatch.setitem(export._LOADERS, "pt2", lambda path, wrong=wrong: wrong)
        with pytest.raises(RuntimeError, match=reason):
            export.export_model(model, target, "pt2", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"] and target.read_text() == "precious"
    assert mvat.kernels.current_backend() == backend
    assert all(p.requires_grad for p in model.parameters())


def refused(capsys, *command: str | Path, parts: tuple[str, ...]) -> None:
    assert cli.main(["export", *map(str, command)]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("mvat: error: ") and error.count("\n") == 1, error
    for part in parts:
        assert part in error


def test_a_request_that_cannot_be_met_is_one_line(checkpoint: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    there = tmp_path / "there.pt2"
    there.write_text("precious")
    (tmp_path / "folder.onnx").mkdir()
    source = ("--checkpoint", checkpoint)
    cases = (
        ((*source, "--format", "tflite", "-o", tmp_path / "a.tflite"), ("pt2, aoti, onnx", "'tflite'")),
        ((*source, "--format", "onnx", "-o", tmp_path / "a.pt2"), ("a.pt2", "must end in .onnx")),
        ((*source, "--format", "pt2", "-o", there), (f"{there} exists", "--overwrite")),
        ((*source, "--format", "pt2", "-o", tmp_path / "no" / "a.pt2"), (f"the folder {tmp_path / 'no'} does not",)),
        ((*source, "--format", "onnx", "-o", tmp_path / "folder.onnx", "--overwrite"), ("is a folder",)),
        (("--preset", "huge", "--format", "pt2", "-o", tmp_path / "a.pt2"), ("s-8.1gf", "'huge'")),
        ((*source, "--format", "pt2", "-o", tmp_path / "a.pt2", "--seconds", "0"), ("'0'",)),
        ((*source, "-o", tmp_path / "a.pt2"), ("--format",)),
    )
    for command, parts in cases:
        refused(capsys, *command, parts=parts)

    def failing(program, path: Path) -> None:
        raise RuntimeError("no such operator\nand forty lines more")

    monkeypatch.setattr(export, "_capture", lambda model, samples: None)
    monkeypatch.setitem(export._WRITERS, "pt2", failing)
    command = (*source, "--format", "pt2", "-o", tmp_path / "a.pt2")
    refused(capsys, *command, parts=("a.pt2: no such operator",))

    found = export.importlib.util.find_spec
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    command = (*source, "--format", "onnx", "-o", tmp_path / "a.onnx")
    refused(capsys, *command, parts=("pip install onnxscript",))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    command = (*source, "--format", "aoti", "-o", tmp_path / "a.pt2")
    refused(capsys, *command, parts=("C++ compiler", "apt install g++"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.onnx", "there.pt2"]
    assert there.read_text() == "precious"


def test_a_model_that_cannot_be_exported_is_named(model: mvat.Manner, tmp_path: Path) -> None:
    target = tmp_path / "model.pt2"
    with pytest.raises(TypeError, match="Manner, got Linear"):
        export.export_model(torch.nn.Linear(1, 1), target, "pt2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="call model.eval"):
        export.export_model(mvat.Manner(**TINY).train(), target, "pt2")
    with pytest.raises(ValueError, match="float32 on the CPU, got .* torch.float64"):
        export.export_model(mvat.Manner(**TINY).eval().double(), target, "pt2")
    with pytest.raises(ValueError, match="samples must be a positive integer or None, got 0"):
        export.export_model(model, target, "pt2", samples=0)
    assert list(tmp_path.iterdir()) == []
