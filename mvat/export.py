"""Models as files for other runtimes: torch.export, AOTInductor, ONNX.

    pt2   the graph that torch.export captures, with mvat's operators in it; read by torch.export.load
    aoti  the same graph compiled by AOTInductor, around mvat's operators; read by torch._inductor.aoti_load_package
    onnx  the graph of the plain PyTorch references, in one file without external data; for ONNX Runtime and others

pt2 and aoti hold what the back end in force runs: with the fused kernels the process that loads the file must
`import mvat.kernels` before, which registers the operators; under `use_backend("eager")` they need PyTorch alone. An
aoti package holds machine code for the processor that made it.

Input and output are audio [batch, channels, samples], 16 kHz, float32. Batch and samples are dynamic, the latter from
`shortest` on: below, a single sample is left on the deepest level, and torch.export never takes a size of 1 for a
dynamic one. Where a runtime wants fixed shapes, `samples` fixes them, and the batch at 1.
"""

import copy
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from mvat.files import replacing
from mvat.kernels import current_backend, use_backend
from mvat.models import Manner
from mvat.models.manner import valid_length

__all__ = ["FORMATS", "Exported", "check_request", "export_model", "shortest"]

#: The formats and the ending of a file's name.
FORMATS = {"pt2": ".pt2", "aoti": ".pt2", "onnx": ".onnx"}
#: The largest error of an exported program that is let through, as a share of the model's peak output.
TOLERANCE = 1e-4
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

Run = Callable[[Tensor], Tensor]


class Exported(NamedTuple):
    """What was written: the input's shape, dynamic sizes by name, and the largest error found, a share of the peak."""

    shape: str
    error: float


def shortest(model: Manner) -> int:
    """The fewest samples that a dynamic export takes: one more than one sample of the deepest level reaches over."""
    return _valid(model, 1) + 1


def export_model(
    model: Manner, path: str | os.PathLike[str], format: str, samples: int | None = None, overwrite: bool = False
) -> Exported:
    """Write a model for another runtime, and let it stand only where it computes what the model does.

    The file is loaded again, run on noise of several lengths and batches, compared with the model, and takes its name
    last: a failure leaves a former file as it was.

    Args:
        model: in evaluation mode, float32, on the CPU.
        path: the file to write, ending in .pt2 or, for ONNX, .onnx.
        format: "pt2", "aoti" or "onnx", see the module.
        samples: fixes the length, and the batch at 1; by default both are dynamic.
        overwrite: whether the file may exist.

    Raises:
        TypeError, ValueError: for a model or a request that cannot be exported, such as a folder that does not exist.
        FileExistsError: if the file exists and is not to be replaced.
        ImportError: for ONNX without its packages; names the pip command.
        RuntimeError: if PyTorch cannot export the model, or the result does not compute what the model does.
    """
    path = Path(path)
    check_request(path, format, overwrite)
    _check_model(model)
    if samples is not None and (not isinstance(samples, int) or samples < 1):
        raise ValueError(f"export: samples must be a positive integer or None, got {samples!r}")
    write, load = _WRITERS[format], _LOADERS[format]
    # Frozen, so that the program can be run where gradients are recorded; the fused operators would refuse.
    model = copy.deepcopy(model).requires_grad_(False)
    with replacing(path) as part, torch.no_grad(), _quiet():
        with use_backend("eager" if format == "onnx" else current_backend()):
            write(_capture(model, samples), part)
        error = _largest_error(model, load(part), _probes(model, samples))
    channels = model.config["in_channels"]
    if samples is not None:
        return Exported(f"[1, {channels}, {samples}]", error)
    return Exported(f"[batch, {channels}, samples >= {shortest(model)}]", error)


def check_request(path: str | os.PathLike[str], format: str, overwrite: bool = False) -> None:
    """Raise as `export_model` does for what can be told without a model."""
    path = Path(path)
    if format not in FORMATS:
        raise ValueError(f"the format must be one of {', '.join(FORMATS)}, got {format!r}")
    if path.suffix != FORMATS[format]:
        raise ValueError(f"{path}: the name of a file of format {format} must end in {FORMATS[format]}")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise ValueError(f"{path} is a folder")
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(f"{path} exists; --overwrite (overwrite=True) replaces it")
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None] if format == "onnx" else []
    if missing:
        raise ImportError(f"the format onnx takes packages that are not installed: pip install {' '.join(missing)}")
    if format == "aoti":
        _check_compiler()


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ValueError("the format aoti takes a C++ compiler: apt install g++, or set CXX to one") from None


def _check_model(model: object) -> None:
    if not isinstance(model, Manner):
        raise TypeError(f"export: model must be a mvat.Manner, got {type(model).__name__}")
    if any(module.training for module in model.modules()):
        raise ValueError("export: the model is in training mode; call model.eval() first")
    for name, value in model.named_parameters():
        if value.device.type != "cpu" or value.dtype != torch.float32:
            raise ValueError(
                f"export: the model must be float32 on the CPU, got {name} {value.dtype} on {value.device}"
            )


def _valid(model: Manner, length: int) -> int:
    return valid_length(length, *(model.config[name] for name in ("depth", "kernel_size", "stride")))


def _noise(model: Manner, batch: int, samples: int) -> Tensor:
    generator = torch.Generator().manual_seed(samples)
    return 0.1 * torch.randn(batch, model.config["in_channels"], samples, generator=generator)


def _capture(model: Manner, samples: int | None) -> ExportedProgram:
    if samples is not None:
        return torch.export.export(model, (_noise(model, 1, samples),), strict=False)
    # Sizes of 0 and 1 are always taken for fixed: the example has none.
    example = _noise(model, 2, 2 * shortest(model))
    dynamic = {"x": {0: Dim("batch", min=1), 2: Dim("samples", min=shortest(model))}}
    # Whether the padding is positive for every length is beyond the prover; the program asks it when it runs.
    return torch.export.export(
        model, (example,), dynamic_shapes=dynamic, strict=False, prefer_deferred_runtime_asserts_over_guards=True
    )


def _write_pt2(program: ExportedProgram, path: Path) -> None:
    torch.export.save(program, path)


def _write_aoti(program: ExportedProgram, path: Path) -> None:
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def _write_onnx(program: ExportedProgram, path: Path) -> None:
    names = {axis: name for axis, name in ((0, "batch"), (2, "samples")) if program.range_constraints}
    exported = torch.onnx.export(
        program,
        input_names=["noisy"],
        output_names=["enhanced"],
        dynamic_shapes={"x": names} if names else None,
        dynamo=True,
        verbose=False,
    )
    # Without a file name a program is given.
    cast(torch.onnx.ONNXProgram, exported).save(path, external_data=False)


def _load_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"noisy": x.numpy()})[0])


_WRITERS: dict[str, Callable[[ExportedProgram, Path], None]] = {
    "pt2": _write_pt2,
    "aoti": _write_aoti,
    "onnx": _write_onnx,
}
_LOADERS: dict[str, Callable[[Path], Run]] = {
    "pt2": lambda path: torch.export.load(path).module(),
    "aoti": lambda path: torch._inductor.aoti_load_package(str(path)),
    "onnx": _load_onnx,
}


def _probes(model: Manner, samples: int | None) -> list[Tensor]:
    """Noise to compare on: the shortest, a length that needs no padding, an odd one, a second; one clip and more."""
    if samples is not None:
        return [_noise(model, 1, samples)]
    least = shortest(model)
    return [
        _noise(model, batch, length)
        for batch, length in ((1, least), (2, _valid(model, least)), (3, 3 * least + 1), (1, max(16_000, 4 * least)))
    ]


def _largest_error(model: Manner, run: Run, probes: list[Tensor]) -> float:
    """RuntimeError where an output is of another shape, or further from the model's than `TOLERANCE`."""
    largest = 0.0
    for x in probes:
        expected, got = model(x), run(x)
        if got.shape != expected.shape:
            raise RuntimeError(f"export: for {list(x.shape)} the result gives {list(got.shape)}; nothing was written")
        error = float((got - expected).abs().max() / expected.abs().max())
        if not error <= TOLERANCE:
            raise RuntimeError(
                f"export: for {list(x.shape)} the result is {error:.1e} of the peak away from the model's output, more "
                f"than {TOLERANCE:g}; nothing was written"
            )
        largest = max(largest, error)
    return largest


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters say of their own deprecations and of packages that the model does not need."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
