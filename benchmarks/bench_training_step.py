"""A training step of every preset, without distillation; of s-8.1gf against torch.compile of the model too.

Compiling base forward and backward takes longer than all the rest.
"""

from collections.abc import Iterator

import torch

from benchmarks.bench_model import OPS
from benchmarks.harness import Case, Run, Settings, Variant
from benchmarks.peers import not_fused
from benchmarks.shapes import Point, build, points
from benchmarks.steps import audio, step


def _plain(preset: str) -> Run:
    return step(build(preset), None)


def _compiled(preset: str) -> Run:
    torch.compiler.reset()
    model = build(preset).train()
    return step(model, None, torch.compile(model, dynamic=False))


def cases(settings: Settings) -> Iterator[Case]:
    for point in points(settings.quick):

        def make(point: Point = point) -> Run:
            return _plain(point.preset)

        variants = {
            "eager": Variant(make),
            "fused": Variant(make, "auto", missing=not_fused(OPS, settings.device, torch.float32)),
        }
        if point.named and point.preset == "s-8.1gf" and settings.compile:
            variants["compile"] = Variant(lambda point=point: _compiled(point.preset), algorithm=make)
        yield Case(
            "training_step",
            {"place": point.preset, "seconds": point.seconds, "B": point.batch},
            inputs=lambda point=point: audio(point.batch, point.samples),
            reference=lambda point=point: step(build(point.preset).double(), None),
            variants=variants,
            passes=("step",),
            bound=10,
            gradient_bound=1000,  # eager's own reach 4e-2, for maxima and ReLUs flip; the ops' are tight
            audio_seconds=point.seconds * point.batch,
        )
