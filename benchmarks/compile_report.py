"""Registers, spills and shared memory of every CUDA kernel on every architecture, without a GPU: nvcc is enough.

python -m benchmarks.compile_report            print the report
python -m benchmarks.compile_report --renew    and write it to csrc/cuda/budget.json

tests/test_cuda_build.py holds the kernels to that file.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
SOURCES = sorted((REPO / "csrc" / "cuda").glob("*.cu"))
BUDGET = REPO / "csrc" / "cuda" / "budget.json"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# Architectures that share their PTX share most of the compiler's time.
TARGETS = (
    "-gencode=arch=compute_80,code=[sm_80,sm_86,sm_89]",
    "-gencode=arch=compute_90,code=sm_90",
    "-gencode=arch=compute_100,code=[compute_100,sm_100,sm_120]",
)

#: {source: {kernel: {architecture: (registers, bytes of spills, bytes of static shared memory)}}}
Usage = dict[str, dict[str, dict[str, list[int]]]]


def find_nvcc() -> str | None:
    """CUDA's compiler: on PATH, or in $CUDA_HOME."""
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(os.environ.get("CUDA_HOME", ""), "bin"))


def release(nvcc: str) -> str:
    """The compiler's release, such as "13.0"."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", text)
    return found[1] if found else "unknown"


def compile_source(nvcc: str, source: Path, folder: Path) -> str:
    """Compile one .cu to folder/<stem>.o for every architecture, with PTX for later ones; the text that ptxas printed.

    Raises:
        RuntimeError: with the compiler's messages where it fails.
    """
    command = [nvcc, "-O3", "-std=c++20", "-Xcompiler", "-fPIC", "-Xptxas", "-v", *TARGETS]
    command += ["-c", str(source), "-o", str(folder / f"{source.stem}.o")]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        raise RuntimeError(f"nvcc cannot compile {source.name}:\n{result.stdout}")
    return result.stdout


def parse(text: str) -> dict[str, dict[str, list[int]]]:
    """What ptxas -v says of each kernel, by its short name."""
    names = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout
    usage: dict[str, dict[str, list[int]]] = {}
    kernel = architecture = ""
    spills = 0
    for line in names.splitlines():
        if found := re.search(r"Compiling entry function '(.*)' for 'sm_(\d+)", line):
            architecture = found[2]
            short = re.search(r"(\w+_kernel(?:<[^()]*>)?)\(", found[1] + "(")
            kernel = short[1] if short else found[1]
        elif found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spills = int(found[1]) + int(found[2])
        elif found := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            usage.setdefault(kernel, {})[architecture] = [int(found[1]), spills, int(shared[1]) if shared else 0]
    return usage


def compile_all(nvcc: str, folder: Path, jobs: int = 2) -> Usage:
    """Compile every source into folder."""
    with ThreadPoolExecutor(jobs) as pool:
        texts = list(pool.map(lambda source: compile_source(nvcc, source, folder), SOURCES))
    return {source.name: parse(text) for source, text in zip(SOURCES, texts, strict=True)}


def table(usage: Usage) -> str:
    """The report: registers, and behind a plus the bytes of spills."""
    lines = [f"{'registers (+ bytes of spills)':48}" + "".join(f"{f'sm_{a}':>9}" for a in ARCHITECTURES)]
    for source, kernels in usage.items():
        lines.append(source)
        for kernel, numbers in sorted(kernels.items()):
            cells = (numbers[str(a)] for a in ARCHITECTURES)
            texts = [f"{registers}+{spills}" if spills else f"{registers}" for registers, spills, _ in cells]
            lines.append(f"  {kernel:46}" + "".join(f"{text:>9}" for text in texts))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--renew", action="store_true", help=f"write {BUDGET.relative_to(REPO)}")
    arguments = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        parser.error("no nvcc on PATH nor in $CUDA_HOME")
    folder = REPO / "build" / "cuda"
    folder.mkdir(parents=True, exist_ok=True)
    usage = compile_all(nvcc, folder)
    print(table(usage))
    if arguments.renew:
        text = json.dumps({"nvcc": release(nvcc), "kernels": usage}, indent=1)
        # One line a kernel and architecture.
        BUDGET.write_text(re.sub(r"\[\s+(\d+),\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2, \3]", text) + "\n")


if __name__ == "__main__":
    main()
