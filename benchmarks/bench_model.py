"""The whole model, enhancing: the presets against torch.compile, ONNX Runtime and MANNER's original repository."""

import importlib.util
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import original
from benchmarks.harness import Case, Run, Settings, Variant
from benchmarks.peers import compiled, not_fused
from benchmarks.shapes import Point, build, points
from mvat.kernels import backend

#: The ops of a forward pass.
OPS = tuple(row.op for row in backend.table(("cpu",)) if row.op not in ("attention_map", "attention_transfer_loss"))
_ONNX = ("onnx", "onnxscript", "onnxruntime")


def _onnx_session(preset: str, samples: int, batch: int) -> Run:
    """The exported reference in ONNX Runtime on the CPU, with PyTorch's number of threads."""
    import onnxruntime

    # The exporter warns of a package that the model does not need.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    program = torch.onnx.export(build(preset), (torch.zeros(batch, 1, samples),), dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would go on spinning into the next variant's samples.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        program.save(path)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def _onnx(point: Point, settings: Settings) -> Variant:
    lacking = [package for package in _ONNX if importlib.util.find_spec(package) is None]
    missing = f"not installed: {', '.join(lacking)}" if lacking else ""
    if settings.device != "cpu":
        missing = "measured on a CPU only"
    return Variant(
        lambda: _onnx_session(point.preset, point.samples, point.batch),
        algorithm=lambda: build(point.preset),
        missing=missing,
    )


def _manner(point: Point, manner: Path | None) -> Variant:
    return Variant(
        lambda: original.build(manner, point.preset),
        algorithm=lambda: build(point.preset),
        missing="" if manner else "no checkout of MANNER's repository was given (--manner PATH)",
    )


def cases(settings: Settings) -> Iterator[Case]:
    for point in points(settings.quick):

        def make(point: Point = point) -> nn.Module:
            return build(point.preset)

        variants = {
            "eager": Variant(make),
            "fused": Variant(make, "auto", missing=not_fused(OPS, settings.device, torch.float32)),
            "onnxruntime": _onnx(point, settings),
            "manner": _manner(point, settings.manner),
        }
        if point.named and settings.compile:
            variants["compile"] = compiled(make)
        with torch.device("meta"):
            weights = sum(p.numel() * p.itemsize for p in build(point.preset).parameters())

        def inputs(point: Point = point) -> list[Tensor]:
            return [torch.randn(point.batch, 1, point.samples)]

        yield Case(
            "model",
            {"place": point.preset, "seconds": point.seconds, "B": point.batch},
            inputs=inputs,
            reference=lambda make=make: make().double(),
            variants=variants,
            passes=("forward",),
            bound=5,  # the errors of some 500 layers; see `build` for what a wrong kernel does
            weight_bytes=weights,
            audio_seconds=point.seconds * point.batch,
        )
