"""python -m benchmarks.distillation_run OUT.json: a student learns from a teacher on generated speech, fused and eager.

For a machine with PyTorch and numpy alone. Each back end trains for the same time from the same seed on the same clips;
the file holds the steps a second, the loss of every step and how far the losses are apart over the steps both made.
The teacher is untrained: what is shown is that training runs, how fast, and that both back ends agree.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.shapes import build
from benchmarks.steps import add_arguments, step
from mvat.files import write_text
from mvat.kernels import use_backend
from train.synthetic import make_pair

_PAIRS = 64  # made once: the generator must not be what is measured


def clips(batch: int, seconds: float, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Clean and noisy [B, 1, T] without end, the same from every start."""
    rng = np.random.default_rng(0)
    pairs = [[torch.from_numpy(x) for x in make_pair(rng, seconds)] for _ in range(max(batch, _PAIRS))]
    clean, noisy = (torch.stack(side)[:, None].to(device) for side in zip(*pairs, strict=True))
    while True:
        chosen = torch.from_numpy(rng.permutation(len(pairs))[:batch]).to(device)
        yield clean[chosen], noisy[chosen]


def train(student: str, teacher: str, batch: int, seconds: float, minutes: float, backend: str) -> dict[str, Any]:
    """Steps for some minutes on one back end: steps a second after the first three, and the losses."""
    device = machine.device()
    losses: list[float] = []
    with use_backend(backend):
        run = step(build(student).to(device), build(teacher).to(device))
        data = clips(batch, seconds, device)
        started = time.perf_counter()
        while len(losses) < 5 or time.perf_counter() - started < 60 * minutes:
            losses.append(round(run(*next(data))[0].item(), 6))  # .item() waits for the device
            if len(losses) == 3:
                started = time.perf_counter()
        elapsed = time.perf_counter() - started
    return {"backend": backend, "steps": len(losses), "steps_a_second": (len(losses) - 3) / elapsed, "losses": losses}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distillation_run", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the JSON file to write")
    add_arguments(parser, batch=8)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a clip (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=1.0, help="on each back end (default: %(default)s)")
    options = parser.parse_args(arguments)
    shape = options.student, options.teacher, options.batch, options.seconds, options.minutes
    runs = [train(*shape, backend) for backend in ("auto", "eager")]
    common = min(run["steps"] for run in runs)
    ours, plain = (np.array(run["losses"][:common]) for run in runs)
    info = machine.machine_info(machine.device())
    content = {
        "machine_info": info,
        "commit_info": machine.commit_info(),
        "arguments": {key: value for key, value in vars(options).items() if key != "out"},
        "largest_relative_difference_of_losses": float(np.abs(ours / plain - 1).max()),
        "speed_up": runs[0]["steps_a_second"] / runs[1]["steps_a_second"],
        "runs": runs,
    }
    write_text(options.out, json.dumps(content, indent=1) + "\n")
    print(f"{options.out}: {content['speed_up']:.2f} times eager's steps a second over {common} common steps")


if __name__ == "__main__":
    main()
