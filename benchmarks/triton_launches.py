"""What the launchers of mvat.kernels.triton choose, noted without a GPU: every kernel with its constants and types.

The operators' arguments are those of a step of the presets' training, taken on fake tensors; the launchers then run on
tensors without memory, and what they launch is noted instead of run.
"""

import functools
import importlib
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

#: How products are formed, the features' dtype, what torch.set_float32_matmul_precision is given.
_KINDS = (
    ("bf16", torch.bfloat16, "highest"),
    ("tf32", torch.float32, "high"),
    ("tf32", torch.float16, "highest"),
    ("tf32x3", torch.float32, "highest"),
)
_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
#: The arguments of operators that have the features' dtype; all others are float32.
_FEATURES = ("x", "grad", "shortcut", "dz", "mixed")
#: Where every configuration of the stages is compiled, and where the heaviest are.
_FULL, _GENERATIONS = 90, (80, 100, 120)
_CLIPS, _SAMPLES = 8, 64_000
#: Sequences and chunks of global_attention: whole in a tile, several tiles, keys split, and many of them.
_CHUNKS = ((1, 4), (1, 20), (1, 40), (1, 2000), (300, 300))

Call = tuple[str, tuple[Any, ...]]


class Launch(NamedTuple):
    """One compilation: a kernel, the kind of its products, the features' type, its constants, its arguments' types."""

    module: str
    kernel: str
    kind: str
    feature: str
    constants: dict[str, Any]
    signature: dict[str, str]
    warps: int
    stages: int
    architecture: int

    @property
    def name(self) -> str:
        constants = " ".join(f"{n}={v}" for n, v in self.constants.items() if n not in ("PRECISION", "DTYPE"))
        name = self.kernel.removesuffix("_kernel")
        return f"{name} {self.kind} {self.feature} {constants} warps={self.warps} stages={self.stages}"


class _Layout(NamedTuple):
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Calls(TorchDispatchMode):
    """Notes the calls of mvat's operators, a layout in place of each tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[Call] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "mvat":
            plain = (_Layout(tuple(a.shape), a.stride()) if isinstance(a, torch.Tensor) else a for a in args)
            self.found.add((function._opname, tuple(plain)))
        return function(*args, **(kwargs or {}))


@functools.cache
def calls(preset: str) -> list[Call]:
    """The calls of the operators with Triton kernels in a step of training."""
    from mvat.kernels import native, use_backend
    from mvat.models import PRESETS, Manner

    noting = _Calls()
    with FakeTensorMode(), use_backend("fused"):
        model, audio = Manner(**PRESETS[preset]), torch.empty(_CLIPS, 1, _SAMPLES)
        with noting:
            model(audio).sum().backward()
    # Norms in evaluation have a gradient of their own.
    noting.found |= {(op, (*rest, False)) for op, (*rest, _) in noting.found if op == "norm_gradient"}
    # Sizes of all classes of global_attention are given apart.
    wanted = {op for op in native.IN_TRITON if not op.startswith("global_attention")}
    return sorted((call for call in noting.found if call[0] in wanted), key=str)


def attention_calls(segment_len: int) -> Iterator[Call]:
    """Calls of global_attention of every class of sizes."""
    square = _Layout((1, segment_len, segment_len), (segment_len**2, segment_len, 1))
    for n, chunks in _CHUNKS:
        length = (chunks - 3) * segment_len // 2 + 1
        x = _Layout((1, n, length), (n * length, length, 1))
        softmax = _Layout((1, n, 1, chunks, 2), (2 * n * chunks, 2 * chunks, 2 * chunks, 2, 1))
        mixed = _Layout((1, n, 1, chunks, segment_len), tuple(s * segment_len // 2 for s in softmax.strides[:4]) + (1,))
        yield "global_attention", (x, square, square, segment_len, True)
        yield "global_attention_backward", (x, x, square, square, softmax, mixed, segment_len)


def _arguments(call: Call, dtype: torch.dtype) -> list[Any]:
    """A call's arguments, tensors without memory for the layouts."""
    operator, values = call
    found = []
    for argument, value in zip(getattr(torch.ops.mvat, operator).default._schema.arguments, values, strict=True):
        if isinstance(value, _Layout):
            kept = dtype if argument.name in _FEATURES else torch.float32
            value = torch.empty_strided(*value, dtype=kept, device="meta")
        found.append(value)
    return found


def _weight(launch: Launch) -> tuple[int, ...]:
    """What a configuration takes of registers, roughly: its tile, then its activation, then narrow loads."""
    sizes = [v for n, v in launch.constants.items() if n not in ("UNIT", "ACT") and type(v) is int]
    return math.prod(sizes), launch.constants.get("ACT", 0), -launch.constants.get("UNIT", 0)


def launches(architectures: tuple[int, ...], presets: tuple[str, ...], lengths: tuple[int, ...]) -> list[Launch]:
    """The compilations that these presets, and global_attention with a segment_len of `lengths`, take.

    For global_attention all of them, and for the stages on sm_90; of a stage's kernel and kind the heaviest on one
    architecture of each other generation, float16 left out, which but for its loads is tf32.

    Raises:
        ValueError: if a kernel would be compiled anew for another value of a number.
    """
    from triton.runtime.jit import JITFunction

    from mvat.kernels import native
    from mvat.kernels.triton import common

    found: dict[tuple[str, int], Launch] = {}
    kind, dtype, architecture = "", torch.float32, 0

    def note(self, *values, grid, warmup, num_warps, num_stages=3, **constants):
        signature = dict.fromkeys(self.arg_names, "constexpr")
        for parameter, value in zip(self.params, values, strict=False):
            if isinstance(value, torch.Tensor):
                signature[parameter.name] = f"*{_SHORT[value.dtype]}"
            elif parameter.do_not_specialize or value == 1:  # where samples lie side by side
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            else:
                raise ValueError(f"{self.__name__} is compiled anew for every {parameter.name}")
        ordered = {name: constants[name] for name in self.arg_names if name in constants}
        assert len(ordered) + len(values) == len(self.arg_names), self.__name__
        module, name, feature = self.fn.__module__, self.fn.__name__, _SHORT[dtype]
        launch = Launch(module, name, kind, feature, ordered, signature, num_warps, num_stages, architecture)
        found.setdefault((launch.name, architecture), launch)

    before = torch.get_float32_matmul_precision()
    operators = [call for preset in presets for call in calls(preset)]
    operators += [call for length in lengths for call in attention_calls(length)]
    with (
        mock.patch.object(JITFunction, "run", note),
        mock.patch.object(common, "processors", lambda device: 132),
        mock.patch.object(common, "capability", lambda device: divmod(architecture, 10)),
    ):
        for architecture, (kind, dtype, precision) in itertools.product(architectures, _KINDS):  # noqa: B007
            torch.set_float32_matmul_precision(precision)
            for call in operators:
                module, function = native.IN_TRITON[call[0]]
                launcher = getattr(importlib.import_module(f"mvat.kernels.triton.{module}"), function)
                launcher(*_arguments(call, dtype))
    torch.set_float32_matmul_precision(before)
    heaviest: dict[tuple[str, str, int], Launch] = {}
    kept = []
    for launch in sorted(found.values(), key=lambda launch: (_weight(launch), launch.name)):
        if launch.architecture == _FULL or launch.module.endswith("global_attention"):
            kept.append(launch)
        elif launch.architecture in _GENERATIONS and launch.feature != "fp16":
            heaviest[launch.kernel, launch.kind, launch.architecture] = launch
    return sorted([*kept, *heaviest.values()], key=lambda launch: launch.name)
