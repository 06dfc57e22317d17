"""python -m benchmarks.patch_check --manner PATH: mvat.patch on MANNER's own code, from a checkout of its repository.

For each size: the answers before and after the patch, the losses of a training with and without it, the state_dict,
and the time of a forward pass beside the unpatched model's and our own preset's. Ends with status 1 if an answer, a
loss or a key differs by more than the bounds below.
"""

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import mvat
from benchmarks import machine, original, shapes
from benchmarks.steps import audio
from benchmarks.timing import Clock, busy, interleave, quartiles, rounds
from mvat.losses import weighted_mrstft_loss

#: The most that two answers may differ by, as a share of the larger one's largest value, and two losses, in themselves.
ANSWERS, LOSSES = 1e-5, 1e-3
#: Clips of a training step and their samples: a quarter of a second, as MANNER's own code takes its time.
CLIPS, SAMPLES = 2, 4_000
SECONDS_TO_TIME = 15.0


class Comparison(NamedTuple):
    """One size; times in milliseconds, medians of interleaved samples."""

    preset: str
    taken: str
    answers: float
    losses: float
    same_state: bool
    unpatched: float
    patched: float
    ours: float

    @property
    def good(self) -> bool:
        return self.same_state and self.answers <= ANSWERS and self.losses <= LOSSES

    def __str__(self) -> str:
        cells = [self.preset, self.taken, f"{self.answers:.1e}", f"{self.losses:.1e}", str(self.same_state).lower()]
        return " | ".join([*cells, *(f"{t:.4g}" for t in (self.unpatched, self.patched, self.ours))])


HEAD = "size | taken | answers differ by | losses differ by | same state_dict | MANNER, ms | patched, ms | preset, ms"


def compare(manner: Path, preset: str, seconds: float, steps: int, device: str) -> Comparison:
    """Everything about one size.

    Args:
        manner: a checkout of MANNER's repository.
        preset: of `mvat.models.PRESETS`, or "tiny".
        seconds: of the clip that is timed.
        steps: of the training.
        device: "cpu" or "cuda".
    """
    plain = original.build(manner, preset).to(device)
    patched = mvat.patch(copy.deepcopy(plain))
    state, other = plain.state_dict(), patched.state_dict()
    same_state = list(state) == list(other) and all(torch.equal(state[name], other[name]) for name in state)

    x = torch.randn(1, 1, round(16_000 * seconds)).to(device)
    models = {"unpatched": plain, "patched": patched, "ours": shapes.build(preset).to(device)}
    with torch.inference_mode():
        expected, got, _ = (model(x) for model in models.values())
        clock = Clock(device)
        count = rounds(sum(clock(lambda m=model: m(x)) for model in models.values()), SECONDS_TO_TIME)
        samples = interleave({n: lambda m=model: clock(lambda: m(x)) for n, model in models.items()}, count)
    times = {name: 1e3 * quartiles(values)[1] for name, values in samples.items()}
    return Comparison(
        preset,
        ", ".join(part.kind for part in mvat.patch_report(patched).taken),
        float((got - expected).abs().max() / expected.abs().max()),
        max(abs(a - b) for a, b in zip(*(losses(model, steps) for model in (plain, patched)), strict=True)),
        same_state,
        **times,
    )


def losses(model: nn.Module, steps: int) -> list[float]:
    """The losses of a training on one batch of noise, the same at every call."""
    torch.manual_seed(0)
    device = next(model.parameters()).device
    clean, noisy = (clip.to(device) for clip in audio(CLIPS, SAMPLES))
    optimizer = torch.optim.Adam(model.train().parameters(), lr=1e-4)
    values: list[Tensor] = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = weighted_mrstft_loss(model(noisy), clean, noisy)
        loss.backward()
        optimizer.step()
        values.append(loss.detach())
    return torch.stack(values).tolist()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.patch_check", description=__doc__.splitlines()[0])
    parser.add_argument("sizes", nargs="*", default=["s-8.1gf", "small", "base"], help="presets (default: %(default)s)")
    parser.add_argument("--manner", type=original.checkout, required=True, help="a checkout of MANNER's repository")
    parser.add_argument("--seconds", type=float, default=4.0, help="of the clip that is timed (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of the training (default: %(default)s)")
    options = parser.parse_args(arguments)
    device = machine.device()
    if warning := busy():
        print(f"WARNING: {warning}; the times below will not repeat", flush=True)
    print(
        f"{machine.name(device)}, {torch.get_num_threads()} threads, {options.seconds:g} s of audio\n{HEAD}", flush=True
    )
    good = True
    for size in options.sizes:
        comparison = compare(options.manner, size, options.seconds, options.steps, device)
        print(comparison, flush=True)
        good &= comparison.good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
