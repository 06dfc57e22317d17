"""The Triton kernels without a GPU: compiled for the architectures they run on, within their budget, by every plan.

A budget is renewed by `python -m benchmarks.triton_report --renew`; its file says what changed.
"""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import triton_report

pytest.importorskip("triton")

RENEW = "if that is meant, run python -m benchmarks.triton_report --renew"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Another process: this one may have told Triton to interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=triton_report.REPO, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def budget() -> dict:
    return json.loads(triton_report.BUDGET.read_text())


def usage(kernels: dict) -> dict[str, dict[str, triton_report.Usage]]:
    return {name: {a: triton_report.Usage(*n) for a, n in numbers.items()} for name, numbers in kernels.items()}


def test_nothing_spills_and_everything_fits_and_takes_tensor_cores(budget: dict) -> None:
    found = usage(budget["kernels"])
    assert {a for numbers in found.values() for a in numbers} == {str(a) for a in triton_report.ARCHITECTURES}
    assert triton_report.faults(found) == []
    hopper = [numbers["90"] for name, numbers in found.items() if name.startswith("forward ") and "90" in numbers]
    assert hopper and all(u.instruction == "wgmma.mma_async" for u in hopper)


def test_faults_are_seen() -> None:
    bad = {
        "forward": {"80": triton_report.Usage(255, 8, 170_000, "none")},
        "pad ": {"80": triton_report.Usage(1, 0, 0, "none")},
    }
    assert len(triton_report.faults(bad)) == 3
    assert "forward" in triton_report.table(bad)


def test_the_budget_holds_every_configuration(budget: dict) -> None:
    script = """
from benchmarks.triton_report import ARCHITECTURES, launches
print(*sorted(f"{launch.name} {launch.architecture}" for launch in launches(ARCHITECTURES, (64, 32))), sep="\\n")
"""
    result = run("-c", script)
    assert result.returncode == 0, result.stderr
    held = sorted(f"{name} {a}" for name, numbers in budget["kernels"].items() for a in numbers)
    assert result.stdout.splitlines() == held, RENEW


def test_the_launchers_choose_what_is_reported() -> None:
    """Every plan at sizes of all classes, launches noted instead of run."""
    script = """
import itertools, torch
from triton.runtime.jit import JITFunction
from benchmarks.triton_report import ARCHITECTURES, launches
from mvat.kernels.triton import global_attention as kernels
from mvat.kernels.triton.plans import Kind

chosen = set()
def note(self, *arguments, grid, warmup, num_warps, num_stages=3, **constants):
    kind, feature = Kind.of(x).value, {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[x.dtype]
    constants = {n: v for n, v in constants.items() if n not in ("PRECISION", "DTYPE")}
    name = self.__name__.removesuffix("_kernel")
    chosen.add((name, kind, feature, frozenset(constants.items()), num_warps, num_stages, architecture))
JITFunction.run = note
kernels.processors = lambda device: 132
for architecture in ARCHITECTURES:
    kernels.capability = lambda device: divmod(architecture, 10)
    for dtype, precision, C in itertools.product(
        (torch.float32, torch.bfloat16, torch.float16), ("highest", "high"), (32, 64)
    ):
        torch.set_float32_matmul_precision(precision)
        for n, P in ((1, 4), (1, 20), (1, 40), (1, 2000), (300, 300)):
            x, a = torch.zeros(1, n, (P - 3) * C // 2 + 1, dtype=dtype), torch.zeros(1, C, C)
            y, *kept = kernels.forward(x, a, a, C, True)
            kernels.backward(y, x, a, a, *kept, C)
reported = {
    (u.kernel, u.kind, u.feature, frozenset(u.constants.items()), u.warps, u.stages, u.architecture)
    for u in launches(ARCHITECTURES, (64, 32))
}
print(sorted(map(str, chosen - reported)), sorted(map(str, reported - chosen)))
"""
    result = run("-c", script)
    assert result.stdout == "[] []\n", result.stdout + result.stderr


def test_the_main_configurations_compile_within_the_budget(budget: dict) -> None:
    import triton

    result = run("-m", "benchmarks.triton_report", "--main", "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    if budget["triton"] != triton.__version__:
        pytest.skip(f"the budget is that of Triton {budget['triton']}")
    allowed = usage(budget["kernels"])
    over = [
        f"{name} sm_{architecture}: {used}, budget {limit}"
        for name, numbers in usage(json.loads(result.stdout)).items()
        for architecture, used in numbers.items()
        for limit in (allowed[name][architecture],)
        if any(a > b for a, b in zip(used[:3], limit[:3], strict=True)) or used.instruction != limit.instruction
    ]
    assert not over, "\n".join([RENEW, *over])
