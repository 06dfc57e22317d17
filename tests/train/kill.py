"""Kills a training at random moments, over and over, and compares what it ends with to a training never stopped.

    python -m tests.train.kill [--kills 100] [--seed 0] [--out FOLDER]

A killed process is followed by the same command. Weights, optimiser, history and curves must come out bit for bit as
without a kill, but for times and memory. Every other kill waits until a checkpoint is being written. Needs fork.
"""

import argparse
import contextlib
import io
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mvat.models import Manner, count_flops
from train import checkpoint
from train.command import segments
from train.config import DataConfig, ModelConfig, OptimConfig, RunConfig, ValidConfig
from train.curves import NAME
from train.data import ArrayPairs
from train.solver import Solver

#: What differs between two runs by nature.
TIMES = ("seconds", "audio_seconds_per_second", "waiting", "peak_memory_gb")
MODEL = Manner(hidden=6, depth=1).config


def recordings() -> ArrayPairs:
    """Noise in noise, as good as speech here."""
    rng = np.random.default_rng(0)
    return ArrayPairs([(f"s{i}", *rng.standard_normal((2, 3200)).astype(np.float32)) for i in range(6)])


def train(out: Path, epochs: int, save_minutes: float) -> None:
    """The command that is killed and repeated: everything on that a run can have."""
    torch.set_num_threads(1)
    data = DataConfig("noise", segment_seconds=0.1, stride_seconds=0.1, tempo_share=0.0, workers=0)
    optim = OptimConfig(epochs, 2, accumulate=2, clip=1.0, ema=0.9)
    valid = ValidConfig(every=2, metrics=["si_sdr"], select="si_sdr", samples=1)
    config = RunConfig(str(out), ModelConfig(None, MODEL), data, optim, valid, label="run", save_minutes=save_minutes)
    pairs = recordings()
    torch.manual_seed(0)
    Solver(config, Manner(**MODEL), None, segments(pairs, config), pairs, "student").fit()


def child(out: Path, epochs: int, save_minutes: float) -> int:
    """`train` in a process of its own, started in no time since it is a copy of this one; its process id."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            train(out, epochs, save_minutes)
        status = 0
    finally:
        os._exit(status)


def killed(process: int, out: Path, delay: float, writing: bool) -> str:
    """Kill the process after a while, if `writing` at the next checkpoint; where it was, "" if it had ended."""
    begin = time.perf_counter()
    part = f".last.{process}.part.pt"
    while time.perf_counter() < begin + delay or (writing and not (out / part).exists()):
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            if status:
                raise SystemExit(f"the command failed with status {status}")
            return ""
        time.sleep(0 if writing else 0.001)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    names = {path.name for path in out.glob(".*.part.*")}
    if part in names:
        return "while last.pt was written"
    return "while another file was written" if names else "elsewhere"


def outcome(out: Path) -> dict[str, Any]:
    """All that must not depend on kills."""
    last = checkpoint.load(out / "last.pt")
    best = checkpoint.load(out / "best.pt")
    rows = [{key: value for key, value in row.items() if key not in TIMES} for row in last["history"]]
    kept = ("state_dict", "raw_state_dict", "moves", "optimizer", "scheduler", "epoch", "step", "progress", "curves")
    return {
        "last": {key: last[key] for key in kept},
        "best": {key: best[key] for key in ("state_dict", "epoch", "step")},
        "history": rows,
        "files": sorted(path.name for path in out.rglob("*")),
        "bytes of curves": (out / "tensorboard" / NAME).stat().st_size,
        "curves": curves(out / "tensorboard"),
    }


def curves(folder: Path) -> dict[str, list[tuple[int, Any]]]:
    """Every series as TensorBoard reads it, (step, value); the values of times left out."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "audio": 0}).Reload()
    found: dict[str, list[tuple[int, Any]]] = {}
    for tag in events.Tags()["scalars"]:
        timed = tag.startswith("speed/")
        found[tag] = [(point.step, None if timed else point.value) for point in events.Scalars(tag)]
    for tag in events.Tags()["audio"]:
        found[tag] = [(point.step, point.encoded_audio_string) for point in events.Audio(tag)]
    return found


def different(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two outcomes differ in a bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(a.keys() | b.keys(), key=str)
        return [found for key in keys for found in different(a.get(key), b.get(key), f"{where}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [found for i, pair in enumerate(zip(a, b, strict=True)) for found in different(*pair, f"{where}/{i}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
    return [] if same else [where]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.train.kill", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, help="a folder for the runs (default: a temporary one)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    count_flops(MODEL)  # whatever it imports is then there in every copy of this process
    chance = random.Random(options.seed)
    epochs = 6
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        begin = time.perf_counter()
        if os.waitpid(child(folder / "whole", epochs, 15.0), 0)[1]:
            raise SystemExit("the training failed")
        whole, seconds = outcome(folder / "whole"), time.perf_counter() - begin
        steps = [step for step, _ in whole["curves"]["train/total"]]
        assert steps == sorted(set(steps)) and steps, steps
        places: Counter[str] = Counter()
        runs, kills = 0, 0
        while kills < options.kills:
            runs += 1
            out = folder / f"killed{runs}"
            while True:
                # Often after every step, sometimes only at the end of an epoch.
                minutes = chance.choice((0.0, 0.0, seconds / 60 / epochs / 4, 15.0))
                process = child(out, epochs, minutes)
                if kills == options.kills:
                    if os.waitpid(process, 0)[1]:
                        raise SystemExit("the command failed")
                    break
                writing = kills % 2 == 1
                place = killed(process, out, chance.uniform(0, seconds / epochs * (1 if writing else 2)), writing)
                if not place:
                    break
                places[place] += 1
                kills += 1
            wrong = different(whole, outcome(out))
            if wrong:
                print(f"run {runs} differs from the one never stopped in {len(wrong)} places: {', '.join(wrong[:10])}")
                return 1
        print(
            f"{kills} kills ({', '.join(f'{count} {place}' for place, count in places.items())}) over {runs} runs of "
            f"{epochs} epochs: weights, optimiser, history and curves as those of a run never stopped, bit for bit; "
            f"{time.perf_counter() - begin:.0f} s"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
