"""The CUDA kernels without a GPU: nvcc compiles them for every architecture, within their budget, and they register.

A budget is renewed by `python -m benchmarks.compile_report --renew`; its file says what changed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from benchmarks import compile_report
from mvat.kernels import native

REPO = Path(__file__).resolve().parents[1]
NVCC = compile_report.find_nvcc()

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH nor in $CUDA_HOME")

RENEW = "if that is meant, run python -m benchmarks.compile_report --renew"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, compile_report.Usage]:
    """The folder of the objects, and what the kernels use."""
    folder = tmp_path_factory.mktemp("cuda")
    return folder, compile_report.compile_all(NVCC or "", folder)


def test_every_kernel_is_compiled_for_every_architecture(compiled: tuple[Path, compile_report.Usage]) -> None:
    wanted = {str(architecture) for architecture in compile_report.ARCHITECTURES}
    for source, kernels in compiled[1].items():
        assert kernels, f"{source} has no kernel"
        assert all(numbers.keys() == wanted for numbers in kernels.values()), source


def test_registers_and_spills_stay_within_the_budget(compiled: tuple[Path, compile_report.Usage]) -> None:
    budget = json.loads(compile_report.BUDGET.read_text())
    if budget["nvcc"] != compile_report.release(NVCC or ""):
        pytest.skip(f"the budget is that of nvcc {budget['nvcc']}")
    assert {s: set(k) for s, k in compiled[1].items()} == {s: set(k) for s, k in budget["kernels"].items()}, RENEW
    over = [
        f"{source} {kernel} sm_{architecture}: {used}, budget {allowed}"
        for source, kernels in compiled[1].items()
        for kernel, numbers in kernels.items()
        for architecture, used in numbers.items()
        for allowed in (budget["kernels"][source][kernel][architecture],)
        if any(a > b for a, b in zip(used, allowed, strict=True))
    ]
    assert not over, "\n".join(["registers, bytes of spills, bytes of shared memory; " + RENEW, *over])


def test_the_presets_kernels_hardly_spill() -> None:
    """Spills of more than a few registers may stand in the kernels for unusual sizes (1024 threads), nowhere else."""
    budget = json.loads(compile_report.BUDGET.read_text())
    for source, kernels in budget["kernels"].items():
        for kernel, numbers in kernels.items():
            if "0, 1024" not in kernel:
                assert all(spills <= 160 for _, spills, _ in numbers.values()), (source, kernel, numbers)


#: Operators that no GPU has a kernel for.
CPU_ALONE = ("conv_act", "conformer_block", "multi_view_merge", "fingerprint") + tuple(
    f"local_pool{part}" for part in ("", "_statistics", "_sums", "_backward")
)


def test_all_operators_register_for_cuda(compiled: tuple[Path, compile_report.Usage]) -> None:
    """Linked against the PyTorch at hand, be it for a CPU alone: that loads the library and knows its CUDA kernels."""
    folder = compiled[0]
    nvcc = [NVCC or "nvcc", "-std=c++20", "-O0", "-Xcompiler", "-fPIC", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    includes = [f"-I{path}" for path in include_paths()]
    for source in ("csrc/schemas.cpp", "csrc/cuda/register.cpp"):
        target = folder / f"{Path(source).stem}_registration.o"
        subprocess.run([*nvcc, *includes, "-c", str(REPO / source), "-o", str(target)], check=True)
    library, torch_lib = folder / "mvat_cuda.so", Path(torch.__file__).parent / "lib"
    objects = [str(path) for path in folder.glob("*.o")]
    link = [f"-L{torch_lib}", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run([*nvcc, "-shared", "-o", str(library), *objects, *link], check=True)
    script = f"""
import re, torch
torch.ops.load_library({str(library)!r})
names = re.findall(r'm.def\\("(\\w+)', open({str(REPO / "csrc" / "schemas.cpp")!r}).read())
names = [name for name in names if name not in {set(CPU_ALONE) | set(native.IN_TRITON)!r}]
missing = [n for n in names if not torch._C._dispatch_has_kernel_for_dispatch_key(f"mvat::{{n}}", "CUDA")]
assert len(names) >= 8 and not missing, missing
"""
    result = subprocess.run([sys.executable, "-c", script], env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, text=True)
    assert result.returncode == 0
