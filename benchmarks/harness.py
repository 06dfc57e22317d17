"""The harness: a case is an op on a shape, its variants are checked against float64 first and then timed in turn.

A wrong variant is reported, makes the run fail and is not timed. What cannot run here ("absent"), does not fit into
memory or would take too long is a row as well, and so is a variant that loses.
"""

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import memory
from benchmarks.floors import Rates
from benchmarks.results import Row
from benchmarks.timing import Clock, interleave, rounds
from mvat.kernels import use_backend

Run = Callable[..., Tensor | Sequence[Tensor]]

#: Relative error that outputs may have against float64.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Variant:
    """One way of computing a case.

    Args:
        make: makes the function that is timed, after the random state was set; called with the case's inputs.
        backend: the mode of `mvat.kernels.use_backend` that it runs under.
        algorithm: as make, for the run on fake tensors that counts FLOPs and memory, where make's result cannot be
            traced (a compiled one): the same algorithm in plain PyTorch.
        missing: why it cannot run here, else "".
    """

    make: Callable[[], Run]
    backend: str = "eager"
    algorithm: Callable[[], Run] | None = None
    missing: str = ""


@dataclass(frozen=True)
class Case:
    """An op on one shape.

    Args:
        op, shape: its names in the results.
        inputs: makes the float32 inputs; those that require a gradient are differentiated.
        reference: makes the function that gives the float64 answer from float64 inputs; runs on the eager back end.
        variants: by name, the first is what the others are compared with.
        passes: "forward" (no gradient), "forward+backward", or "step" (the variant does its own backward pass).
        dtype: what the inputs are cast to.
        bound, gradient_bound: factors of BOUNDS for outputs and for gradients. Beyond 10 they hold for the first
            variant; the others must then not be more than four times as far off.
        weight_bytes: bytes of weights that every call reads besides its inputs.
        audio_seconds: of audio in one call, for a model.
    """

    op: str
    shape: Mapping[str, Any]
    inputs: Callable[[], list[Tensor]]
    reference: Callable[[], Run]
    variants: Mapping[str, Variant]
    passes: Sequence[str] = ("forward", "forward+backward")
    dtype: torch.dtype = torch.float32
    bound: float = 1.0
    gradient_bound: float = 10.0
    weight_bytes: int = 0
    audio_seconds: float = 0.0


@dataclass(frozen=True)
class Settings:
    """How a run goes.

    Args:
        device: "cpu" or "cuda".
        quick: only check the answers.
        manner: a checkout of MANNER's original repository, or None.
        compile: whether torch.compile is measured too.
        budget: seconds of samples a case and pass.
        call_limit: a case whose single call would take more seconds, by its products at a quarter of the peak, is left
            out.
    """

    device: str = "cpu"
    quick: bool = False
    manner: Path | None = None
    compile: bool = True
    budget: float = 1.0
    call_limit: float = 6.0


def measure(case: Case, settings: Settings, rates: Rates | None) -> Iterator[Row]:
    """The rows of one case; rates are needed unless the run is quick."""
    for pass_name in case.passes:
        if not settings.quick:
            gc.collect()  # what the last case left behind is not taken
        rows, ready = {}, {}
        for name, variant in case.variants.items():
            rows[name] = row = Row(
                case.op, dict(case.shape), pass_name, name, str(case.dtype).removeprefix("torch."),
                audio_seconds=case.audio_seconds,
            )  # fmt: skip
            if variant.missing:
                row.status, row.detail = "absent", variant.missing
            elif _affordable(case, variant, row, settings, rates):
                ready[name] = variant
        if ready:
            _Pass(case, pass_name, settings, rates).run(ready, rows)
        yield from rows.values()


def _affordable(case: Case, variant: Variant, row: Row, settings: Settings, rates: Rates | None) -> bool:
    """Whether the variant fits into memory, together with its check in float64, and into time; noted in its row."""

    def body() -> object:
        inputs = _inputs(case, settings.device, case.dtype)
        row.moved, row.working_set = 0, 0
        with torch.device(settings.device):
            run = (variant.algorithm or variant.make)()
        results, gradients = call(run, inputs, row.pass_name)
        row.moved, row.working_set = traffic(inputs, results, gradients)
        return results, gradients

    with use_backend(variant.backend):
        need = memory.foresee(body)
    row.flops = need.flops
    row.moved += case.weight_bytes
    row.working_set += case.weight_bytes
    double = 0 if case.dtype == torch.float64 else 8 // case.dtype.itemsize
    needed, there = (1 + double) * need.peak_bytes, memory.available(settings.device)
    if needed > 0.9 * there:
        row.status = "does not fit"
        row.detail = f"needs {need.peak_bytes / 1e9:.1f} GB, with its float64 check {needed / 1e9:.1f} GB; " + (
            f"{there / 1e9:.1f} GB are available"
        )
        return False
    if rates is not None:
        expected = 4 * need.flops / max(rates.peaks(case.dtype).values())
        if expected > settings.call_limit:
            row.status = "left out"
            row.detail = f"about {expected:.0f} s a call, the limit is {settings.call_limit:g} s"
            return False
    return True


class _Pass:
    """One pass of one case: inputs, the float64 answer, checks, samples."""

    def __init__(self, case: Case, pass_name: str, settings: Settings, rates: Rates | None) -> None:
        self.case, self.pass_name, self.settings, self.rates = case, pass_name, settings, rates
        self.inputs = _inputs(case, settings.device, case.dtype)
        with use_backend("eager"), torch.device(settings.device):
            torch.manual_seed(0)
            run = case.reference()
        # The same values as the variants get, rounding included.
        inputs = [_cast(x, torch.float64) for x in self.inputs]
        with use_backend("eager"):
            self.expected = call(run, inputs, pass_name)

    def run(self, variants: Mapping[str, Variant], rows: Mapping[str, Row]) -> None:
        bodies: dict[str, Callable[[], Any]] = {}
        self.first = next(iter(variants.values()))
        self.limits = [BOUNDS[self.case.dtype] * factor for factor in (self.case.bound, self.case.gradient_bound)]
        for name, variant in variants.items():
            body = self._check(variant, rows[name])
            if rows[name].status == "checked":
                bodies[name] = body
        del self.expected
        if not self.settings.quick and bodies and self.rates is not None:
            self._time(variants, bodies, rows, self.rates)

    def _check(self, variant: Variant, row: Row) -> Callable[[], Any]:
        seeds: list[Tensor] | None = None

        def body() -> Any:
            return call(run, self.inputs, self.pass_name, seeds)

        try:
            with use_backend(variant.backend):
                with torch.device(self.settings.device):
                    torch.manual_seed(0)
                    run = variant.make()
                outputs, gradients = body()
            seeds = seeds_of(outputs)  # made once: their making is not to be timed
        except torch.OutOfMemoryError as error:
            row.status, row.detail = "does not fit", str(error).splitlines()[0]
            return body
        except Exception as error:  # whatever a peer raises: the other rows go on, the run fails in the end
            row.status, row.detail = "failed", f"{type(error).__name__}: {error}".splitlines()[0]
            return body
        errors = [distance(outputs, self.expected[0]), distance(gradients, self.expected[1])]
        row.error = max(errors)
        for what, error, limit in zip(("outputs", "gradients"), errors, self.limits, strict=True):
            if not error <= limit:
                row.status, row.detail = "wrong", f"relative error of the {what} {error:.1e}, the bound is {limit:.0e}"
        if variant is self.first:
            # Where the bound has to be wide, the others may not be much further off than the first, which is eager.
            # Four times: the worst of a step's hundreds of gradients hangs on a ReLU that rounding turns over.
            least = 10 * BOUNDS[self.case.dtype]
            self.limits = [min(limit, max(4 * error, least)) for limit, error in zip(self.limits, errors, strict=True)]
        return body

    def _time(
        self,
        variants: Mapping[str, Variant],
        bodies: Mapping[str, Callable[[], Any]],
        rows: Mapping[str, Row],
        rates: Rates,
    ) -> None:
        clock = Clock(self.settings.device)
        samplers, seconds = {}, 0.0
        for name, body in bodies.items():
            backend = variants[name].backend
            with use_backend(backend):
                rows[name].peak_extra = memory.peak_extra(body, self.settings.device)
                once = clock(body)
            calls = clock.calls(once)

            def sampler(body: Callable[[], Any] = body, backend: str = backend, calls: int = calls) -> float:
                with use_backend(backend):
                    return clock(body, calls)

            samplers[name] = sampler
            seconds += once * calls
        for name, samples in interleave(samplers, rounds(seconds, self.settings.budget)).items():
            row = rows[name]
            row.samples, row.status = samples, "timed"
            row.floor = rates.floor(row.flops, row.moved, row.working_set, self.case.dtype)


def call(
    run: Run, inputs: Sequence[Tensor], pass_name: str, seeds: Sequence[Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """One pass: outputs and gradients. A step gives its loss first, then its gradients.

    `seeds` are the outputs' own gradients, by default those of `seeds_of`.
    """
    if pass_name == "step":
        loss, *gradients = run(*inputs)
        return [loss], gradients
    if pass_name == "forward":
        with torch.no_grad():
            return _as_list(run(*inputs)), []
    outputs = _as_list(run(*inputs))
    wanted = [x for x in inputs if x.requires_grad]
    return outputs, list(torch.autograd.grad(outputs, wanted, seeds_of(outputs) if seeds is None else seeds))


def traffic(inputs: Sequence[Tensor], outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> tuple[int, int]:
    """Bytes that must be moved, and bytes that are touched.

    Forward reads the inputs and writes the outputs. Backward reads the outputs' gradients and, once more, the inputs
    that have a gradient, and writes those.
    """
    read, written, grads = (sum(x.numel() * x.itemsize for x in tensors) for tensors in (inputs, outputs, gradients))
    touched = read + written + grads
    return (touched + written + grads if gradients else touched), touched


def distance(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative distance, in the 2-norm, of corresponding tensors; NaN counts as infinite.

    A tensor that is nearly zero beside the others (such as the gradient of a bias in front of a batch norm) is measured
    against a hundredth of their root mean square.
    """
    if len(actual) != len(expected) or any(a.shape != e.shape for a, e in zip(actual, expected, strict=True)):
        return math.inf
    count = sum(e.numel() for e in expected)
    if not count:
        return 0.0
    typical = math.sqrt(sum(e.double().square().sum().item() for e in expected) / count)
    worst = 0.0
    for a, e in zip(actual, expected, strict=True):
        scale = max(e.double().norm().item(), 0.01 * typical * math.sqrt(e.numel()))
        difference = (a.double() - e.double()).norm().item()
        error = difference / scale if scale else difference
        worst = max(worst, math.inf if math.isnan(error) else error)
    return worst


def seeds_of(outputs: Sequence[Tensor]) -> list[Tensor]:
    """A cosine in each output's shape, so that no two places count alike in the gradients; one for a scalar."""
    return [torch.arange(y.numel(), device=y.device).double().cos().to(y.dtype).view(y.shape) for y in outputs]


def _inputs(case: Case, device: str, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    with torch.device(device):
        return [_cast(x, dtype) for x in case.inputs()]


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.detach().to(dtype, copy=True).requires_grad_(x.requires_grad)


def _as_list(result: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)
