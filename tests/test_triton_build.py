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
from benchmarks.triton_report import configurations
print(*sorted(f"{launch.name} {launch.architecture}" for launch in configurations()), sep="\\n")
"""
    result = run("-W", "ignore", "-c", script)
    assert result.returncode == 0, result.stderr
    held = sorted(f"{name} {a}" for name, numbers in budget["kernels"].items() for a in numbers)
    assert result.stdout.splitlines() == held, RENEW


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
