"""python -m benchmarks: measure everything here, next to its peers and its floor.

    python -m benchmarks               ops, model, training and distillation step; the results become a file
    python -m benchmarks --kernels     the ops alone
    python -m benchmarks --quick       answers only, on tiny shapes, in under a minute; nothing is timed or written
    python -m benchmarks --missing     only what no results of this machine and this code hold yet

Ends with status 1 if an answer is wrong, a variant fails, or a share of the floor is impossible.
"""

import argparse
import importlib
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import machine, results
from benchmarks.floors import Rates
from benchmarks.harness import Case, Settings, measure
from benchmarks.original import checkout
from benchmarks.results import Row
from benchmarks.timing import busy, disagree

KERNELS = (
    "attention_map",
    "attention_transfer_loss",
    "channel_attention",
    "global_attention",
    "local_attention",
    "mask_gate",
    "norm_act_conv",
)
WHOLE = ("model", "training_step", "distillation_step")


def collect(names: Sequence[str], settings: Settings) -> list[Case]:
    """The cases of the named benchmarks, benchmarks/bench_<name>.py each."""
    return [case for name in names for case in importlib.import_module(f"benchmarks.bench_{name}").cases(settings)]


def held(folder: Path, code: str) -> list[Row]:
    """The rows that results in a machine's folder hold for this code."""
    files = [results.read(path) for path in sorted(folder.glob("*.json"))]
    return [row for rows, _, commit in files if commit.get("code") == code for row in rows]


def repeated(rows: Sequence[Row], former: Sequence[Row]) -> str:
    """Whether the times are those of former runs of the same code, within their quartiles; "" without a former run."""
    before = {(row.group, row.variant): row.samples for row in former if row.status == "timed"}
    pairs = [
        (row.samples, before[row.group, row.variant])
        for row in rows
        if row.status == "timed" and (row.group, row.variant) in before
    ]
    if not pairs:
        return ""
    apart = sum(disagree(*pair) for pair in pairs)
    told = f"{len(pairs) - apart} of {len(pairs)} rows agree with a former run of this code within their quartiles"
    return told + ("; the machine was noisy in one of them" if apart else "")


def run(cases: Sequence[Case], settings: Settings, rates: Rates | None, seconds: float = math.inf) -> Iterator[Row]:
    """All rows, each printed when it is there; after so many seconds no further case is begun."""
    group, started = "", time.monotonic()
    for number, case in enumerate(cases, 1):
        if time.monotonic() - started > seconds:
            print(
                f"{seconds:g} s are over: {len(cases) - number + 1} of {len(cases)} cases are not measured", flush=True
            )
            return
        for row in measure(case, settings, rates):
            if row.group != group:
                group = row.group
                print(f"[{number}/{len(cases)}] {group}", flush=True)
            print(f"    {row.variant:12} {describe(row)}", flush=True)
            yield row


def describe(row: Row) -> str:
    """One line on a row's outcome."""
    if row.status == "checked":
        return f"right, error {row.error:.1e}"
    if row.status != "timed":
        return f"{row.status}: {row.detail}"
    q1, median, q3 = (1e3 * s for s in results.quartiles(row.samples))
    memory = "" if row.peak_extra is None else f", {row.peak_extra / 1e6:.1f} MB extra"
    noisy = ", NOISY: the samples drifted" if row.noisy else ""
    return f"{median:.4g} ms ({q1:.4g} to {q3:.4g}), {row.share:.0%} of the floor{memory}{noisy}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="check answers on tiny shapes; time and write nothing")
    extent.add_argument("--kernels", action="store_true", help="the ops alone, no model, no step")
    parser.add_argument("--only", choices=KERNELS + WHOLE, help="one benchmark alone")
    parser.add_argument("--missing", action="store_true", help="leave out what results of this machine and code hold")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no case after so many seconds")
    parser.add_argument("--manner", type=checkout, help="a checkout of MANNER's original repository, to compare with")
    parser.add_argument(
        "--out", type=Path, default=machine.RESULTS, help="folder of the results (default: %(default)s)"
    )
    options = parser.parse_args(arguments)

    device = machine.device()
    torch.set_num_threads(torch.get_num_threads())  # fixed from here on
    settings = Settings(device, options.quick, options.manner, not options.no_compile)
    names = (options.only,) if options.only else KERNELS if options.kernels else KERNELS + WHOLE
    if options.missing:
        there = {row.op for row in held(machine.RESULTS / machine.name(device), machine.code_digest())}
        names = tuple(name for name in names if name not in there)
    rates = None if options.quick else Rates(device)
    warning = "" if options.quick else busy()
    if warning:
        print(f"WARNING: {warning}; the times below will not repeat", flush=True)
    rows = list(run(collect(names, settings), settings, rates, options.seconds))

    problems = [row.problem for row in rows if row.problem]
    if rates is not None and rows:
        noisy = [row for row in rows if row.noisy]
        info = machine.machine_info(device) | {"rates": rates.as_dict(), "warning": warning, "noisy_rows": len(noisy)}
        commit = machine.commit_info()
        # A part of the benchmarks has a file of its own, so that it never replaces the whole.
        part = options.only or ("kernels" if options.kernels else "")
        path = machine.results_path(info, commit, options.out, part)
        told = repeated(rows, held(path.parent, commit["code"]))
        results.write(path, rows, info, commit)
        print(f"{path}: {len(rows)} rows, {len(noisy)} of them noisy")
        if told:
            print(told)
    for problem in problems:
        print(f"FAILED {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
