"""A distillation step: s-8.1gf learns the attention maps of base."""

from collections.abc import Iterator

import torch

from benchmarks.bench_model import OPS
from benchmarks.harness import Case, Run, Settings, Variant
from benchmarks.peers import not_fused
from benchmarks.shapes import build, points
from benchmarks.steps import audio, step


def cases(settings: Settings) -> Iterator[Case]:
    student, teacher = ("tiny", "tiny") if settings.quick else ("s-8.1gf", "base")
    ops = (*OPS, "attention_map", "attention_transfer_loss")

    def make() -> Run:
        return step(build(student), build(teacher))

    for point in points(settings.quick):
        if point.preset == student:
            yield Case(
                "distillation_step",
                {"place": f"{student} from {teacher}", "seconds": point.seconds, "B": point.batch},
                inputs=lambda point=point: audio(point.batch, point.samples),
                reference=lambda: step(build(student).double(), build(teacher).double()),
                variants={
                    "eager": Variant(make),
                    "fused": Variant(make, "auto", missing=not_fused(ops, settings.device, torch.float32)),
                },
                passes=("step",),
                bound=10,
                gradient_bound=1000,  # eager's own reach 4e-2, for maxima and ReLUs flip; the ops' are tight
                audio_seconds=point.seconds * point.batch,
            )
