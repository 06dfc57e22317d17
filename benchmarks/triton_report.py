"""Registers, spills, shared memory and tensor cores of the Triton kernels on every architecture, without a GPU.

python -m benchmarks.triton_report            compile every configuration that a launcher can choose, print the report
python -m benchmarks.triton_report --renew    and write it to mvat/kernels/triton/budget.json; with --only those alone
python -m benchmarks.triton_report --main     what presets run under autocast, on three architectures

tests/test_triton_build.py holds the kernels to that file. Triton must not interpret here: the tests run this command.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from benchmarks.triton_launches import Launch, launches

REPO = Path(__file__).resolve().parents[1]
BUDGET = REPO / "mvat" / "kernels" / "triton" / "budget.json"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
#: What --main compiles of global_attention, with segment_len 64: autocast's products on three generations; float32's
#: compile far longer. Of the stages it takes one configuration a kernel, in bfloat16 on the last of MAIN_STAGES.
MAIN = {("bf16", 80), ("bf16", 90), ("bf16", 120)}
MAIN_STAGES = ("s-8.1gf", 90)
#: Kernels that form no products.
WITHOUT_PRODUCTS = {"pad", "statistics", "moments", "gradient", "norm_act", "norm_act_backward"}
#: Whose stages are compiled: few and many channels.
PRESETS = ("base", "s-8.1gf")
#: Bytes of shared memory that a block may take.
SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


class Usage(NamedTuple):
    """What a kernel takes: registers a thread, bytes of stack (spills) and of shared memory, product instruction."""

    registers: int
    spills: int
    shared: int
    instruction: str


def configurations() -> list[Launch]:
    """Every compilation that the budget holds."""
    return launches(ARCHITECTURES, PRESETS, (64, 32))


def main_configurations() -> list[Launch]:
    """Those of --main."""
    preset, architecture = MAIN_STAGES
    attention = launches(ARCHITECTURES, (), (64,))
    stages = {launch.kernel: launch for launch in launches((architecture,), (preset,), ()) if launch.kind == "bf16"}
    return [launch for launch in attention if (launch.kind, launch.architecture) in MAIN] + list(stages.values())


def compile_launch(launch: Launch) -> Usage:
    """Compile one kernel and read what it takes from the code."""
    import triton
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    # PyTorch's memory begins at multiples of 16 bytes; no length is known to be one.
    pointers = [name for name, type_name in launch.signature.items() if type_name.startswith("*")]
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    compiled = triton.compile(
        ASTSource(kernel, launch.signature, launch.constants, aligned),
        target=GPUTarget("cuda", launch.architecture, 32),
        options={"num_warps": launch.warps, "num_stages": launch.stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    ptx = compiled.asm["ptx"]
    found = [name for name in ("tcgen05.mma", "wgmma.mma_async", "mma.sync") if name in ptx]
    return Usage(usage["REG"], usage["STACK"] + usage["LOCAL"], compiled.metadata.shared, found[0] if found else "none")


def compile_all(which: list[Launch], jobs: int) -> dict[str, dict[str, Usage]]:
    """{name: {architecture: usage}}, in the order given."""
    usage: dict[str, dict[str, Usage]] = {}
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        for launch, result in zip(which, pool.map(compile_launch, which, chunksize=1), strict=True):
            usage.setdefault(launch.name, {})[str(launch.architecture)] = result
            for fault in faults({launch.name: {str(launch.architecture): result}}):
                print(fault, file=sys.stderr, flush=True)
    return usage


def faults(usage: dict[str, dict[str, Usage]]) -> list[str]:
    """What no kernel may do: spill, take more shared memory than there is, form its products without tensor cores."""
    found = []
    for name, numbers in usage.items():
        for architecture, (_, spills, shared, instruction) in numbers.items():
            if spills:
                found.append(f"{name} on sm_{architecture} spills {spills} bytes")
            if shared > SHARED[int(architecture)]:
                found.append(f"{name} on sm_{architecture} takes {shared} bytes of shared memory")
            if instruction == "none" and name.split()[0] not in WITHOUT_PRODUCTS:
                found.append(f"{name} on sm_{architecture} uses no tensor core")
    return found


def table(usage: dict[str, dict[str, Usage]]) -> str:
    """Registers, behind a plus the bytes of spills, and kilobytes of shared memory."""
    lines = [f"{'registers (+ spills) / shared KiB':76}" + "".join(f"{f'sm_{a}':>12}" for a in ARCHITECTURES)]
    for name, numbers in usage.items():
        cells = []
        for architecture in map(str, ARCHITECTURES):
            if architecture not in numbers:
                cells.append("")
                continue
            registers, spills, shared, _ = numbers[architecture]
            cells.append(f"{registers}{f'+{spills}' if spills else ''}/{shared / 1024:.0f}")
        lines.append(f"{name:76}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def renew(usage: dict[str, dict[str, Usage]], every: list[Launch], version: str) -> None:
    """Write the budget: what was compiled, and of the other configurations what it held of this version of Triton."""
    held = json.loads(BUDGET.read_text())
    former = held["kernels"] if held["triton"] == version else {}
    kernels: dict[str, dict[str, Sequence[int | str]]] = {}
    for launch in every:
        name, architecture = launch.name, str(launch.architecture)
        numbers = usage.get(name, {}).get(architecture) or former.get(name, {}).get(architecture)
        if numbers is not None:
            kernels.setdefault(name, {})[architecture] = numbers
    text = json.dumps({"triton": version, "kernels": kernels}, indent=1)
    BUDGET.write_text(re.sub(r"\[\s+(\d+),\s+(\d+),\s+(\d+),\s+(\S+)\s+\]", r"[\1, \2, \3, \4]", text) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--renew", action="store_true", help=f"write {BUDGET.relative_to(REPO)}")
    parser.add_argument("--main", action="store_true", help="what the tests compile")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--only", default="", help="kernels, kinds and architectures with this pattern in their name")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    if os.environ.pop("TRITON_INTERPRET", None):
        parser.error("unset TRITON_INTERPRET: the interpreter compiles nothing")
    import triton

    every = main_configurations() if arguments.main else configurations()
    which = [launch for launch in every if re.search(arguments.only, f"{launch.name} sm_{launch.architecture}")]
    usage = compile_all(which, arguments.jobs)
    print(json.dumps(usage) if arguments.json else table(usage))
    if arguments.renew:
        renew(usage, every, triton.__version__)
    sys.exit(bool(faults(usage)))


if __name__ == "__main__":
    main()
