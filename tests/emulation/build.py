"""Builds the CUDA kernels for the CPU: csrc/cuda/*.cu through cuda_emu.h, as a Python module. Needs pybind11 and ninja.

The objects stay in build/emulation, and ninja compiles again only what changed.
"""

import functools
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
BUILD = REPO / "build" / "emulation"
NAME = "mvat_emulation"

# -O1: compiling is most of the time these tests take.
FLAGS = "-x c++ -std=c++20 -O1 -fopenmp -fPIC -fvisibility=hidden -Wall -Wno-unknown-pragmas -DMVAT_EMULATION"


def _ninja() -> str:
    import ninja

    return shutil.which("ninja", path=os.pathsep.join((ninja.BIN_DIR, os.environ.get("PATH", "")))) or "ninja"


@functools.cache
def load() -> ModuleType:
    """The module with the emulated launchers, built first where it is not up to date."""
    import pybind11

    sources = sorted((REPO / "csrc" / "cuda").glob("*.cu")) + [HERE / "self_test.cu", HERE / "bindings.cpp"]
    includes = f"-I{HERE} -isystem {pybind11.get_include()} -isystem {sysconfig.get_path('include')}"
    module = BUILD / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    objects = [BUILD / f"{source.stem}.o" for source in sources]
    lines = [
        f"flags = {FLAGS} {includes}",
        "rule compile",
        f"  command = {os.environ.get('CXX', 'g++')} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {os.environ.get('CXX', 'g++')} -shared -fopenmp $in -o $out",
        *(f"build {target}: compile {source}" for target, source in zip(objects, sources, strict=True)),
        f"build {module}: link {' '.join(map(str, objects))}",
    ]
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "build.ninja").write_text("\n".join(lines) + "\n")
    result = subprocess.run([_ninja(), "-C", str(BUILD)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        raise RuntimeError(f"the emulated kernels do not compile:\n{result.stdout}")
    spec = importlib.util.spec_from_file_location(NAME, module)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
