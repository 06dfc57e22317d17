"""Builds mvat._C, the C++ operators. Everything else about the package stands in pyproject.toml.

The extension keeps to PyTorch's stable ABI and Python's limited API: one binary serves every PyTorch >= 2.11 and every
Python >= 3.11. Without a C++ compiler the pure-Python part is installed, and the operators run their plain PyTorch
references; a compiler that fails is an error.
"""

import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent

COMPILE = [
    "-O3",
    "-std=c++20",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp-simd",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
]
if platform.machine().lower() in ("x86_64", "amd64"):
    COMPILE.append("-mprefer-vector-width=512")


def find_compiler() -> str | None:
    """The C++ compiler's program: $CXX, c++, g++ or clang++, whichever is there first, or None."""
    for command in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        if command and shutil.which(command):
            return command
    return None


def extension() -> dict[str, object]:
    """What setup() needs to build mvat._C; nothing where no compiler is found."""
    compiler = find_compiler()
    if compiler is None:
        print(
            "mvat: NO C++ COMPILER FOUND ($CXX, c++, g++, clang++): installing the pure-Python part only; "
            "the operators will run their slower plain PyTorch references",
            file=sys.stderr,
        )
        return {}
    # Both setuptools and PyTorch's build helper read the compiler from here.
    os.environ["CXX"] = compiler
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    module = CppExtension(
        "mvat._C",
        sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp")),
        depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")),
        extra_compile_args=COMPILE,
        py_limited_api=True,
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**extension())
