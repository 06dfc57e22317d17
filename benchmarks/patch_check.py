"""python -m benchmarks.patch_check --manner PATH: mvat.patch on MANNER's own code, from a checkout of its repository.

For each size: by how much answers and gradients change in float64; the errors of answers, gradients and the losses of a
training in float32, against MANNER's own code in float64; whether the state_dict is the same; the time of a forward
pass beside the unpatched model's and our own preset's. Ends with status 1 where one of the bounds below is passed.
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

#: The most that answers and gradients may change by in float64, as a share of their norm.
CHANGE = 1e-5
#: The most that an error of answers or gradients in float32 may be, in errors of MANNER's own code.
ERRORS = 2.0
#: The most that a loss may differ by from the one in float64.
LOSS = 1e-3
#: Clips of a training step and their samples: a quarter of a second, as MANNER's own code takes its time.
CLIPS, SAMPLES = 2, 4_000
LEARNING_RATE = 1e-4
SECONDS_TO_TIME = 15.0


class Comparison(NamedTuple):
    """One size; pairs are of MANNER's own code and of the patched one; times in milliseconds, medians."""

    preset: str
    taken: str
    change: float
    gradients_change: float
    errors: tuple[float, float]
    gradient_errors: tuple[float, float]
    loss_errors: tuple[float, float]
    same_state: bool
    times: tuple[float, float]
    our_time: float

    @property
    def good(self) -> bool:
        return (
            self.same_state
            and max(self.change, self.gradients_change) <= CHANGE
            and self.errors[1] <= ERRORS * self.errors[0]
            and self.gradient_errors[1] <= ERRORS * self.gradient_errors[0]
            and self.loss_errors[1] <= LOSS
        )

    def __str__(self) -> str:
        cells = [self.preset, self.taken, f"{self.change:.0e}", f"{self.gradients_change:.0e}"]
        cells += [
            f"{mine:.1e}, {patched:.1e}" for mine, patched in (self.errors, self.gradient_errors, self.loss_errors)
        ]
        cells += ["same" if self.same_state else "another"]
        return " | ".join([*cells, f"{self.times[0]:.4g}, {self.times[1]:.4g}", f"{self.our_time:.4g}"])


HEAD = (
    "size | taken | answers change by | gradients change by | errors: MANNER, patched | of gradients | of losses | "
    "state_dict | ms: MANNER, patched | ms: preset"
)


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
    models = (plain, patched, shapes.build(preset).to(device))
    with torch.inference_mode():
        exact, changed = (copy.deepcopy(model).double()(x.double()) for model in models[:2])
        errors = tuple(_distance(model(x), exact) for model in models[:2])
        clock = Clock(device)
        count = rounds(sum(clock(lambda m=model: m(x)) for model in models), SECONDS_TO_TIME)
        samplers = {str(i): lambda m=model: clock(lambda: m(x)) for i, model in enumerate(models)}
        times = [1e3 * quartiles(samples)[1] for samples in interleave(samplers, count).values()]

    exact_losses, exact_gradients = train(copy.deepcopy(plain).double(), steps)
    gradients_change = _distance(train(copy.deepcopy(patched).double(), 1)[1], exact_gradients)
    trainings = [train(copy.deepcopy(model), steps) for model in models[:2]]
    return Comparison(
        preset,
        ", ".join(part.kind for part in mvat.patch_report(patched).taken),
        _distance(changed, exact),
        gradients_change,
        errors,
        tuple(_distance(gradients, exact_gradients) for _, gradients in trainings),
        tuple(float((losses - exact_losses).abs().max()) for losses, _ in trainings),
        same_state,
        (times[0], times[1]),
        times[2],
    )


def train(model: nn.Module, steps: int) -> tuple[Tensor, Tensor]:
    """The losses of a training on one batch of noise, the same at every call, and the first step's gradients.

    The loss is the absolute error of MANNER's recipe. Its STFT part is chaotic on noise: there MANNER's own float32
    losses are thousandths away from its float64 ones after three steps.
    """
    torch.manual_seed(0)
    like = next(model.parameters())
    clean, noisy = (clip.to(like.device, like.dtype) for clip in audio(CLIPS, SAMPLES))
    optimizer = torch.optim.Adam(model.train().parameters(), lr=LEARNING_RATE)
    losses: list[Tensor] = []
    gradients = like.new_empty(0)
    for step in range(steps):
        optimizer.zero_grad()
        loss = (model(noisy) - clean).abs().mean()
        loss.backward()
        if step == 0:
            gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), gradients


def _distance(value: Tensor, expected: Tensor) -> float:
    """The difference's norm as a share of the value's."""
    return float((value - expected).norm() / expected.norm())


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
