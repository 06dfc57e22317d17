"""Registers, spills, shared memory and tensor cores of the Triton kernels on every architecture, without a GPU.

python -m benchmarks.triton_report            compile every configuration that a launcher can choose, print the report
python -m benchmarks.triton_report --renew    and write it to mvat/kernels/triton/budget.json
python -m benchmarks.triton_report --main     what presets run under autocast, on three architectures

tests/test_triton_build.py holds the kernels to that file. Triton must not interpret here: the tests run this command.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

REPO = Path(__file__).resolve().parents[1]
BUDGET = REPO / "mvat" / "kernels" / "triton" / "budget.json"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
#: What --main compiles, with segment_len 64: autocast's products on three generations; float32's compile far longer.
MAIN = {("bf16", 80), ("bf16", 90), ("bf16", 120)}
#: Bytes of shared memory that a block may take.
SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}

#: The kernels' arguments by type: "operand" is what products read, "feature" that of x; all others are i32.
TYPES = {
    "operand": ("xp", "gp", "padded", "q_out", "do_out", "dq_out", "q_in", "do_in", "dq_in"),
    "feature": ("x_in", "g_in", "y", "dx", "mixed"),
    "*fp32": ("a", "m", "softmax", "parts", "sums", "stat", "partials"),
}


class Launch(NamedTuple):
    """One compilation: a kernel, the kind of its products, the features' type, its constants."""

    kernel: str
    kind: str
    feature: str
    constants: dict[str, Any]
    warps: int
    stages: int
    architecture: int

    @property
    def name(self) -> str:
        constants = " ".join(f"{name}={value}" for name, value in self.constants.items())
        return f"{self.kernel} {self.kind} {self.feature} {constants} warps={self.warps} stages={self.stages}"


class Usage(NamedTuple):
    """What a kernel takes: registers a thread, bytes of stack (spills) and of shared memory, product instruction."""

    registers: int
    spills: int
    shared: int
    instruction: str


def launches(architectures: tuple[int, ...], lengths: tuple[int, ...]) -> Iterator[Launch]:
    """What the launchers of mvat.kernels.triton.global_attention can choose, segment_len one of `lengths`."""
    from mvat.kernels.triton.global_attention import PAD_BLOCK
    from mvat.kernels.triton.plans import Kind, choose

    features = {Kind.BF16: ("bf16",), Kind.TF32: ("fp32", "fp16"), Kind.TF32X3: ("fp32",)}
    for architecture in architectures:
        for kind in Kind:
            plan = choose(kind, divmod(architecture, 10))
            found: list[tuple[str, dict[str, Any], int, int]] = [("pad", {"BLOCK": PAD_BLOCK}, 4, 3)]
            for split in (False, True):
                tile = plan.forward
                constants = {"R": tile.rows, "STEP": tile.step, "SPLIT": split}
                found.append(("forward", constants, tile.warps, tile.stages))
            for name, tile in (("queries", plan.over_queries), ("keys", plan.over_keys)):
                found.append((name, {"R": tile.rows, "STEP": tile.step}, tile.warps, tile.stages))
            for name, tile in (("combine", plan.combine), ("weights", plan.weights)):
                found.append((name, {"R": tile.rows}, tile.warps, tile.stages))
            for name, small in (("small_forward", plan.small_forward), ("small_backward", plan.small_backward)):
                for tile in {small.tile(chunks) for chunks in range(1, small.rows + 1)}:
                    found.append((name, {"R": tile.rows, "PACK": tile.pack}, tile.warps, 1))
            for segment_len in lengths:
                for feature in features[kind]:
                    for name, constants, warps, stages in sorted(found, key=str):
                        constants = {"C": segment_len} | constants
                        yield Launch(name, kind.value, feature, constants, warps, stages, architecture)


def compile_launch(launch: Launch) -> Usage:
    """Compile one kernel and read what it takes from the code."""
    import triton
    import triton.language as tl
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mvat.kernels.triton import global_attention
    from mvat.kernels.triton.plans import Kind

    kernel, kind = getattr(global_attention, f"{launch.kernel}_kernel"), Kind(launch.kind)
    operand = "bf16" if kind is Kind.BF16 else "fp32"
    dtype = tl.bfloat16 if kind is Kind.BF16 else tl.float32
    constants = launch.constants | {"PRECISION": kind.precision, "DTYPE": dtype}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = {"operand": f"*{operand}", "feature": f"*{launch.feature}"}
    signature = {name: "constexpr" if name in constants else "i32" for name in kernel.arg_names}
    for type_name, names in TYPES.items():
        signature |= {name: types.get(type_name, type_name) for name in names if name in signature}
    # PyTorch's memory begins at multiples of 16 bytes; no length is known to be one.
    pointers = [name for name, type_name in signature.items() if type_name.startswith("*")]
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
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
            if instruction == "none" and not name.startswith("pad "):
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--renew", action="store_true", help=f"write {BUDGET.relative_to(REPO)}")
    parser.add_argument("--main", action="store_true", help="segment_len 64 in bfloat16 on three architectures")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--only", default="", help="kernels, kinds and architectures with this pattern in their name")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    if os.environ.pop("TRITON_INTERPRET", None):
        parser.error("unset TRITON_INTERPRET: the interpreter compiles nothing")
    import triton

    which = list(launches(ARCHITECTURES, (64,) if arguments.main else (64, 32)))
    if arguments.main:
        which = [launch for launch in which if (launch.kind, launch.architecture) in MAIN]
    which = [launch for launch in which if re.search(arguments.only, f"{launch.name} sm_{launch.architecture}")]
    usage = compile_all(which, arguments.jobs)
    print(json.dumps(usage) if arguments.json else table(usage))
    if arguments.renew:
        text = json.dumps({"triton": triton.__version__, "kernels": usage}, indent=1)
        BUDGET.write_text(re.sub(r"\[\s+(\d+),\s+(\d+),\s+(\d+),\s+(\S+)\s+\]", r"[\1, \2, \3, \4]", text) + "\n")
    sys.exit(bool(faults(usage)))


if __name__ == "__main__":
    main()
