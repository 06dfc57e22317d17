"""`mvat doctor`: what is installed here, which implementation of each op runs, and why."""

import importlib.metadata
import importlib.util
import os
import platform
import re
from pathlib import Path

import torch

import mvat
from mvat.kernels import backend, native

#: What the packages beside PyTorch and numpy are for, by the names that pip knows.
PACKAGES = {
    "models": ("safetensors", "huggingface_hub"),
    "audio files": ("soundfile", "soxr", "tqdm"),
    "scores": ("pesq", "pystoi"),
    "training": ("accelerate", "jsonargparse[signatures]", "tensorboard", "matplotlib", "av", "PyYAML"),
    "ONNX export": ("onnx", "onnxscript", "onnxruntime"),
    "GPU kernels": ("triton",),
}
_SHORT = {"float32": "f32", "float64": "f64", "bfloat16": "bf16", "float16": "f16"}


def report() -> tuple[str, bool]:
    """The report as text, and whether all is well: the C++ extension loads or was never built."""
    extension, well = _extension()
    rows = [
        ("mvat", f"{mvat.__version__} in {Path(mvat.__file__).parent}"),
        ("Python", f"{platform.python_version()} on {platform.platform()}"),
        ("PyTorch", torch.__version__),
        ("CPU", f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"),
        ("GPU", _gpus()),
        ("extension", extension),
        *_packages(),
        ("back end", _mode()),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join([f"{name:{width}}  {text}" for name, text in rows] + ["", *_table()]), well


def cpu_name() -> str:
    """The processor, as the system calls it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _gpus() -> str:
    if not torch.backends.cuda.is_built():
        return "none used: this PyTorch is built for the CPU"
    if not torch.cuda.is_available():
        return "none found"
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return ", ".join(f"{d.name} (sm_{d.major}{d.minor}, {d.total_memory / 2**30:.0f} GiB)" for d in devices)


def _extension() -> tuple[str, bool]:
    """What is to be said of mvat._C, and whether it is sound: loaded, or never built."""
    reason = native.missing("attention_map")
    found = importlib.util.find_spec("mvat._C")
    if reason is not None or found is None or found.origin is None:
        return reason or "", found is None
    # GCC and Clang leave their names in what they compile.
    compiler = re.search(rb"GCC: \([^\0]+|[^\0]*clang version [^\0]+", Path(found.origin).read_bytes())
    name = compiler[0].decode(errors="replace") if compiler else "compiler unknown"
    return f"loaded from {found.origin} ({name})", True


def _packages() -> list[tuple[str, str]]:
    rows = []
    for purpose, names in PACKAGES.items():
        versions = {name: _version(name) for name in names}
        missing = [name for name, version in versions.items() if version is None]
        texts = [", ".join(f"{name.split('[')[0]} {version}" for name, version in versions.items() if version)]
        if missing:
            quoted = [f"'{name}'" if "[" in name else name for name in missing]
            texts.append(f"missing: pip install {' '.join(quoted)}")
        rows.append((purpose, "; ".join(filter(None, texts))))
    return rows


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name.split("[")[0])
    except importlib.metadata.PackageNotFoundError:
        return None


def _mode() -> str:
    mode = backend.current_backend()
    meaning = {
        "auto": "the fused kernel where the table says so, else the reference",
        "fused": "an error where the table names no fused kernel",
        "eager": "the reference everywhere, whatever the table says",
    }[mode]
    return f"{mode}, {'from' if 'MVAT_BACKEND' in os.environ else 'the default of'} MVAT_BACKEND: {meaning}"


def _table() -> list[str]:
    """One line an op, one column a device and dtype; reasons are numbered and stand below."""
    rows = backend.table(("cpu", "cuda") if torch.cuda.is_available() else ("cpu",))
    columns = list(dict.fromkeys((row.device, row.dtype) for row in rows))
    reasons = list(dict.fromkeys(row.reason for row in rows if row.reason))
    cells: dict[str, list[str]] = {}
    for row in rows:
        cells.setdefault(row.op, []).append(f"({reasons.index(row.reason) + 1})" if row.reason else row.implementation)
    width = max(map(len, cells))
    heads = [f"{device} {_SHORT[dtype]}" for device, dtype in columns]
    lines = [f"{'':{width}}  " + "  ".join(f"{head:9}" for head in heads)]
    lines += [f"{op:{width}}  " + "  ".join(f"{cell:9}" for cell in line) for op, line in cells.items()]
    lines += [f"({number}) the plain PyTorch reference: {reason}" for number, reason in enumerate(reasons, 1)]
    if torch.cuda.is_available() and native.missing("local_pool", "cuda") is not None:
        lines.append("local_attention on cuda runs the reference where processes share their batch norms' statistics")
    if any(row.device == "cuda" and not row.reason for row in rows):
        lines.append("fused kernels on cuda are experimental: right in emulation, not yet run on a GPU")
        in_triton = ", ".join(op for op in cells if op in native.IN_TRITON)
        lines.append(f"of them in Triton, compiled when first used: {in_triton}")
    return [line.rstrip() for line in lines]
