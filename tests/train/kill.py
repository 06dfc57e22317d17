"""Kills a training at random moments, over and over, and compares what it ends with to a training never stopped.

    python -m tests.train.kill [--kills 100] [--processes 1] [--seed 0] [--out FOLDER]

A killed process is followed by the same command; the last life but one is ended by SIGTERM. Weights, optimiser, history
and curves must come out bit for bit as without, but for times and memory. Every other kill waits until a checkpoint is
being written. Of several processes one is killed, and the others must end by themselves. Needs fork.
"""

import argparse
import contextlib
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mvat.models import Manner, count_flops
from tests.train.tiny import segments
from train import checkpoint
from train.config import DataConfig, ModelConfig, OptimConfig, RunConfig, ValidConfig
from train.curves import NAME
from train.data import ArrayPairs
from train.solver import Solver

#: What differs between two runs by nature.
TIMES = ("seconds", "audio_seconds_per_second", "waiting", "peak_memory_gb")
MODEL = Manner(hidden=6, depth=1).config
EPOCHS = 6


def recordings() -> ArrayPairs:
    """Noise in noise, as good as speech here."""
    rng = np.random.default_rng(0)
    return ArrayPairs([(f"s{i}", *rng.standard_normal((2, 3200)).astype(np.float32)) for i in range(6)])


def train(out: Path, save_minutes: float, workers: int) -> None:
    """The command that is killed and repeated: everything on that a run can have."""
    torch.set_num_threads(1)
    data = DataConfig("noise", segment_seconds=0.1, stride_seconds=0.1, tempo_share=0.0, workers=workers)
    optim = OptimConfig(EPOCHS, 2, accumulate=2, clip=1.0, ema=0.9)
    valid = ValidConfig(every=2, metrics=["si_sdr"], select="si_sdr", samples=1)
    config = RunConfig(str(out), ModelConfig(None, MODEL), data, optim, valid, label="run", save_minutes=save_minutes)
    pairs = recordings()
    torch.manual_seed(0)
    Solver(config, Manner(**MODEL), None, segments(pairs, config), pairs, "student").fit()


def start(out: Path, count: int, save_minutes: float = 15.0, workers: int = 0) -> list[int]:
    """`train` in processes of its own, there in no time since they are copies of this one; their ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(count):
        log = out.parent / f"{rank}.log"
        log.write_text("")  # nothing of a former life
        process = os.fork()
        if not process:
            status = 1
            if count > 1:  # as torchrun tells it
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
                place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in place.items()})
            with open(log, "w") as text, contextlib.redirect_stdout(text):
                try:
                    train(out, save_minutes, workers)
                    status = 0
                except BaseException as error:
                    print(f"{type(error).__name__}: {error}")
            os._exit(status)
        started.append(process)
    return started


def finished(processes: list[int]) -> None:
    """Wait for the processes, which must end well."""
    if any([os.waitpid(process, 0)[1] for process in processes]):
        raise SystemExit("the command failed")


def killed(processes: list[int], victim: int, out: Path, delay: float, writing: bool) -> str:
    """Kill one process after a while, if `writing` at the next checkpoint; where it was, "" if all had ended."""
    begin = time.perf_counter()
    part = f".last.{processes[0]}.part.pt"
    while time.perf_counter() < begin + delay or (writing and not (out / part).exists()):
        ended, status = os.waitpid(processes[0], os.WNOHANG)
        if ended:
            if status:
                raise SystemExit(f"the command failed with status {status}")
            finished(processes[1:])
            return ""
        time.sleep(0.0005)
    os.kill(processes[victim], signal.SIGKILL)
    os.waitpid(processes[victim], 0)
    names = {path.name for path in out.glob(".*.part.*")}
    place = "while last.pt was written" if part in names else "while another file was written" if names else "elsewhere"
    for rank, process in enumerate(processes):
        if rank != victim:
            place += f", the other {survived(process, out.parent / f'{rank}.log')}"
    return place


def stopped(processes: list[int], victim: int, out: Path) -> None:
    """Ask one process to stop, as soon as the run goes on: all must save and say so. Or the run had come to its end."""
    logs = [out.parent / f"{rank}.log" for rank in range(len(processes))]
    while True:
        ended = os.waitpid(processes[0], os.WNOHANG)[0]
        if ended or "goes on after" in logs[0].read_text():
            break
        time.sleep(0.0005)
    if not ended:
        os.kill(processes[victim], signal.SIGTERM)
    for process in processes[1:] if ended else processes:
        os.waitpid(process, 0)
    said = [log.read_text() for log in logs]
    if not all("stopped by SIGTERM" in text for text in said) and "is complete" not in said[0]:
        raise SystemExit(f"a run that was asked to stop said: {said}")


def survived(process: int, log: Path) -> str:
    """How a process ended whose neighbour was killed: by itself with a clear word, or told to as torchrun does."""
    begin = time.perf_counter()
    told = False
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            if told or not status:
                return "was told to end" if told else "had ended"
            if "another process of this run ended" not in (said := log.read_text()):
                raise SystemExit(f"a process whose neighbour was killed said: {said}")
            return "ended with a clear word"
        if not told and time.perf_counter() > begin + 5:
            os.kill(process, signal.SIGTERM)
            told = True
        if time.perf_counter() > begin + 30:
            os.kill(process, signal.SIGKILL)
            raise SystemExit("a process whose neighbour was killed did not end within 30 s")
        time.sleep(0.001)


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
    parser.add_argument("--processes", type=int, default=1, help="that train together; one of them is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, help="a folder for the runs (default: a temporary one)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    count_flops(MODEL)  # whatever it imports is then there in every copy of this process
    with tempfile.TemporaryDirectory() as temporary:
        return kill(options.out or Path(temporary), options.kills, options.processes, random.Random(options.seed))


def kill(folder: Path, kills: int, count: int, chance: random.Random) -> int:
    """Kill `kills` times, in as many runs as that takes, and say how it went; 1 if a run came out otherwise."""
    begin = time.perf_counter()
    finished(start(folder / "whole", count))
    whole, seconds = outcome(folder / "whole"), time.perf_counter() - begin
    for name, points in whole["curves"].items():
        steps = [step for step, _ in points]
        if steps != sorted(set(steps)):
            print(f"the curve {name} has steps {steps}")
            return 1
    places: Counter[str] = Counter()
    runs, left = 0, kills
    while left:
        runs += 1
        out = folder / f"killed{runs}"
        while True:
            # Saves often after every step, sometimes only at the end of an epoch; sometimes another process reads.
            minutes = chance.choice((0.0, 0.0, seconds / 60 / EPOCHS / 4, 15.0))
            processes = start(out, count, minutes, workers=chance.choice((0, 0, 0, 1)))
            if not left:
                stopped(processes, chance.randrange(count), out)
                finished(start(out, count))
                break
            writing = left % 2 == 1
            delay = chance.uniform(0, seconds / EPOCHS * (1 if writing else 2))
            place = killed(processes, chance.randrange(count), out, delay, writing)
            if not place:
                break
            places[place] += 1
            left -= 1
        wrong = different(whole, outcome(out))
        if wrong:
            print(f"run {runs} differs from the one never stopped in {len(wrong)} places: {', '.join(wrong[:10])}")
            return 1
    print(
        f"{kills} kills over {runs} runs of {EPOCHS} epochs: weights, optimiser, history and curves as those of a run "
        f"never stopped, bit for bit; {time.perf_counter() - begin:.0f} s. Killed"
    )
    print("\n".join(f"  {number} {place}" for place, number in sorted(places.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
