"""python -m benchmarks.step_profile OUT.txt: one distillation step op by op, on the eager and on the fused back end.

Writes the profiler's table of each back end, the costliest ops first.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import machine
from benchmarks.shapes import build
from benchmarks.steps import add_arguments, audio, step
from mvat.files import write_text
from mvat.kernels import use_backend

_ROWS = 40


def profiled(student: str, teacher: str, batch: int, samples: int, backend: str, device: str) -> str:
    """The table of one step, after two to warm up."""
    torch.manual_seed(0)
    with use_backend(backend):
        run = step(build(student).to(device), build(teacher).to(device))
        clips = [x.to(device) for x in audio(batch, samples)]
        for _ in range(2):
            run(*clips)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
        with profile(activities=activities) as result:
            run(*clips)
            if device == "cuda":
                torch.cuda.synchronize()
    by = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    head = f"{student} from {teacher}, {batch} clips of {samples} samples, {device}, back end {backend}"
    return f"{head}\n{result.key_averages().table(sort_by=by, row_limit=_ROWS, max_name_column_width=60)}\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_profile", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the text file to write")
    add_arguments(parser, batch=4)
    parser.add_argument("--samples", type=int, default=64_000, help="of a clip (default: %(default)s)")
    options = parser.parse_args(arguments)
    device = machine.device()
    shape = options.student, options.teacher, options.batch, options.samples
    write_text(options.out, "\n".join(profiled(*shape, backend, device) for backend in ("eager", "auto")))
    print(options.out)


if __name__ == "__main__":
    main()
