"""What a result was measured on, and where it is kept: benchmarks/results/<machine>/<date>-<commit>.json."""

import datetime
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).with_name("results")
_REPOSITORY = Path(__file__).parents[1]
_PACKAGES = ("torch", "numpy", "triton", "onnxruntime")


def device() -> str:
    """What is measured here: "cuda" where there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine_info(device: str) -> dict[str, Any]:
    """Models, versions, threads, date."""
    return {
        "name": name(device),
        "device": device,
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in _PACKAGES},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def commit_info() -> dict[str, Any]:
    """The commit (7 digits, or "unknown" outside a checkout), whether tracked files differ from it, the code's digest.

    The digest is of what is measured, csrc/ and mvat/: it stays when results are committed.
    """
    commit = _git("rev-parse", "--short=7", "HEAD")
    dirty = bool(_git("status", "--porcelain", "--untracked-files=no"))
    return {"id": commit or "unknown", "dirty": dirty, "code": code_digest()}


def code_digest() -> str:
    """12 hexadecimal digits over the names and contents of the sources in csrc/ and mvat/."""
    digest = hashlib.sha256()
    kinds = {".py", ".cpp", ".cu", ".cuh", ".h"}
    files = (path for folder in ("csrc", "mvat") for path in (_REPOSITORY / folder).rglob("*") if path.suffix in kinds)
    for path in sorted(files):
        digest.update(str(path.relative_to(_REPOSITORY)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def results_path(machine: dict[str, Any], commit: dict[str, Any], folder: Path = RESULTS, part: str = "") -> Path:
    """The file of a run, or of a named part of one; one of the same day and commit is replaced."""
    dirty = "-dirty" if commit["dirty"] else ""
    return folder / machine["name"] / f"{machine['date'][:10]}-{commit['id']}{dirty}{part and '-' + part}.json"


def name(device: str) -> str:
    """The machine's folder, such as "amd-epyc-avx2-2-cores" or "nvidia-h200"."""
    kind = f"{cpu_model()} {torch.backends.cpu.get_cpu_capability()} {len(os.sched_getaffinity(0))} cores"
    text = torch.cuda.get_device_name() if device == "cuda" else kind
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def cpu_model() -> str:
    """The processor's name and family where Linux tells them, else its architecture.

    The family because a virtual machine may hide which generation its processor is of ("AMD EPYC").
    """
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    name, family = (re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE) for key in ("model name", "cpu family"))
    if not name:
        return platform.machine()
    return f"{name[1].strip()} family {family[1].strip()}" if family else name[1].strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    """The command's output; "" where git or the checkout is missing. No lock is taken, so nothing else is disturbed."""
    try:
        command = ["git", "--no-optional-locks", *arguments]
        return subprocess.run(command, cwd=_REPOSITORY, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
