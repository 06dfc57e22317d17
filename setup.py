"""Builds mvat._C, the C++ and CUDA operators. Everything else about the package stands in pyproject.toml.

The extension keeps to PyTorch's stable ABI and Python's limited API: one binary serves every PyTorch >= 2.11 and every
Python >= 3.11. Without a C++ compiler the pure-Python part is installed, and the operators run their plain PyTorch
references; a compiler that fails is an error. The CUDA part is built where PyTorch has CUDA and nvcc is found, for the
architectures in TORCH_CUDA_ARCH_LIST, else those of the GPUs in sight, else all that it is tested on.
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
    "-g0",  # Python's own flags ask for debugging symbols: five times the size
    "-Wno-psabi",  # vectors as arguments: nothing that takes them is ever called
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
]
if platform.machine().lower() in ("x86_64", "amd64"):
    COMPILE.append("-mprefer-vector-width=512")
COMPILE_CUDA = ["-O3", "-std=c++20", "-Xcompiler", "-fvisibility=hidden"]
ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
OLDER_ARCHITECTURES = "8.0;8.6;8.9;9.0+PTX"  # all that nvcc knows before 12.8


def find_compiler() -> str | None:
    """The C++ compiler's program: $CXX, c++, g++ or clang++, whichever is there first, or None."""
    for command in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        if command and shutil.which(command):
            return command
    return None


def has_cuda() -> bool:
    """Whether the CUDA part is built: PyTorch has CUDA, and its compiler is found. Chooses the architectures then."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return False
    if CUDA_HOME is None or not shutil.which("nvcc", path=os.path.join(CUDA_HOME, "bin")):
        print(
            f"mvat: NO NVCC FOUND ($CUDA_HOME, PATH): installing without the CUDA kernels; for them install the CUDA "
            f"toolkit {torch.version.cuda} and build again",
            file=sys.stderr,
        )
        return False
    if not torch.cuda.is_available():
        older = tuple(map(int, torch.version.cuda.split("."))) < (12, 8)
        chosen = os.environ.get("TORCH_CUDA_ARCH_LIST") or (OLDER_ARCHITECTURES if older else ARCHITECTURES)
        os.environ["TORCH_CUDA_ARCH_LIST"] = chosen
    return True


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
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    files = sorted(path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*"))
    cuda = has_cuda()
    sources = [str(path) for path in files if path.suffix in (".cpp", ".cu") and (cuda or "cuda" not in path.parts)]
    compile_cpp = [*COMPILE, "-DUSE_CUDA"] if cuda else COMPILE
    module = (CUDAExtension if cuda else CppExtension)(
        "mvat._C",
        sources,
        depends=[str(path) for path in files if path.suffix == ".h"],
        extra_compile_args={"cxx": compile_cpp, "nvcc": COMPILE_CUDA},
        py_limited_api=True,
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**extension())
