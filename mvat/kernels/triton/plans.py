"""Tiles, warps and pipeline stages of the Triton kernels: by the GPU's capability and the products' precision.

They are chosen by these alone and by whether a sequence fits into one tile, never by trying and never by the length
itself: a new length compiles nothing, or once what takes rows of no multiple of four samples.
benchmarks/triton_report.py compiles them, and none may spill: every one of global_attention, and of the convolution
stages every one on sm_90 and the heaviest on a GPU of each other generation.
"""

from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor


class Kind(Enum):
    """How products are formed: the dtype they read, Triton's input_precision."""

    BF16 = "bf16"
    TF32 = "tf32"
    TF32X3 = "tf32x3"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self is Kind.BF16 else torch.float32

    @property
    def precision(self) -> str:
        return "tf32x3" if self is Kind.TF32X3 else "tf32"

    @classmethod
    def of(cls, x: Tensor) -> "Kind":
        """For features x; float16 goes through tf32, which has its mantissa and float32's range.

        Float32 follows torch.backends.cuda.matmul.fp32_precision, which torch.set_float32_matmul_precision sets too;
        torch.get_float32_matmul_precision raises where somebody set only the former.
        """
        if x.dtype == torch.bfloat16:
            return cls.BF16
        if x.dtype == torch.float16 or torch.backends.cuda.matmul.fp32_precision == "tf32":
            return cls.TF32
        return cls.TF32X3


@dataclass(frozen=True)
class Tile:
    """Rows that a program keeps, rows of the other side that it reads at a step (0: none), warps, pipeline stages."""

    rows: int
    step: int
    warps: int
    stages: int


@dataclass(frozen=True)
class SmallTile:
    """`pack` sequences of at most `rows` chunks each."""

    rows: int
    pack: int
    warps: int


@dataclass(frozen=True)
class Small:
    """Whole sequences in tiles of `rows` rows (16 at least): as many as fit."""

    rows: int
    warps: int

    def holds(self, chunks: int) -> bool:
        return chunks <= self.rows

    def tile(self, chunks: int) -> SmallTile:
        rows = max(16, 1 << (chunks - 1).bit_length())
        return SmallTile(rows, self.rows // rows, self.warps)


@dataclass(frozen=True)
class Plan:
    """Everything that the launchers of global_attention choose."""

    forward: Tile
    combine: Tile
    over_queries: Tile
    over_keys: Tile
    weights: Tile
    small_forward: Small
    small_backward: Small

    def splits(self, programs: int, chunks: int, processors: int) -> int:
        """Parts of the keys, of four steps at least: more than one where tiles of queries leave processors idle."""
        if programs >= processors:
            return 1
        return max(1, min(-(-processors // programs), chunks // (4 * self.forward.step)))


_COMBINE = Tile(32, 0, 4, 1)
#: With wgmma (Hopper) an operand may stay in shared memory; elsewhere it takes registers, and tiles are smaller.
_HOPPER = {
    Kind.BF16: Plan(
        forward=Tile(128, 64, 8, 3),
        combine=_COMBINE,
        over_queries=Tile(64, 64, 4, 3),
        over_keys=Tile(128, 64, 8, 2),
        weights=Tile(64, 0, 4, 2),
        small_forward=Small(64, 4),
        small_backward=Small(32, 4),
    ),
    Kind.TF32: Plan(
        forward=Tile(64, 64, 4, 2),
        combine=_COMBINE,
        over_queries=Tile(64, 32, 4, 2),
        over_keys=Tile(64, 32, 4, 2),
        weights=Tile(32, 0, 4, 2),
        small_forward=Small(64, 4),
        small_backward=Small(16, 8),
    ),
    Kind.TF32X3: Plan(
        forward=Tile(128, 16, 8, 2),
        combine=_COMBINE,
        over_queries=Tile(32, 16, 4, 2),
        over_keys=Tile(32, 16, 4, 2),
        weights=Tile(32, 0, 4, 2),
        small_forward=Small(64, 4),
        small_backward=Small(0, 4),
    ),
}
_OTHERS = {
    Kind.BF16: Plan(
        forward=Tile(128, 64, 8, 3),
        combine=_COMBINE,
        over_queries=Tile(64, 64, 4, 3),
        over_keys=Tile(128, 64, 8, 2),
        weights=Tile(64, 0, 4, 2),
        small_forward=Small(32, 4),
        small_backward=Small(16, 4),
    ),
    Kind.TF32: Plan(
        forward=Tile(128, 32, 8, 2),
        combine=_COMBINE,
        over_queries=Tile(32, 32, 4, 2),
        over_keys=Tile(64, 32, 8, 2),
        weights=Tile(32, 0, 8, 2),
        small_forward=Small(32, 4),
        small_backward=Small(0, 4),
    ),
    Kind.TF32X3: Plan(
        forward=Tile(32, 16, 4, 2),
        combine=_COMBINE,
        over_queries=Tile(32, 16, 4, 2),
        over_keys=Tile(32, 16, 8, 2),
        weights=Tile(16, 0, 4, 2),
        small_forward=Small(32, 4),
        small_backward=Small(0, 4),
    ),
}
#: By the major capability where the common tiles would spill a few bytes.
_PLANS = {
    9: _HOPPER,
    10: _OTHERS | {Kind.TF32: replace(_OTHERS[Kind.TF32], weights=Tile(32, 0, 4, 2))},
    12: _OTHERS
    | {
        Kind.BF16: replace(_OTHERS[Kind.BF16], small_backward=Small(16, 8)),
        Kind.TF32X3: replace(_OTHERS[Kind.TF32X3], weights=Tile(16, 0, 8, 2)),
    },
}


@dataclass(frozen=True)
class Block:
    """A product's tile: rows (of time), the most columns, the most of the sum at a step (0: all); warps, stages."""

    rows: int
    cols: int
    inner: int
    warps: int
    stages: int


@dataclass(frozen=True)
class ConvPlan:
    """Everything that the launchers of norm_act_conv choose.

    `weights` has channels in rows and columns, and time in the sum; `pointwise` has the most channels of either side in
    its columns; `depthwise` has blocks of 32 samples in its rows, few of them for short features.
    """

    forward: Block
    data: Block
    weights: Block
    pointwise: Block
    depthwise: Tile
    short: Tile


@dataclass(frozen=True)
class GatePlan:
    """Everything that the launchers of mask_gate choose; their blocks' columns are the most channels that are fused."""

    forward: Block
    backward: Block
    wide: ConvPlan


def check_capability(op: str, capability: tuple[int, int]) -> None:
    """RuntimeError below 8.0, which has neither bfloat16 nor tf32."""
    if capability < (8, 0):
        raise RuntimeError(
            f"{op}: its kernel takes compute capability 8.0 or more, this GPU has {capability[0]}.{capability[1]}; "
            "use mvat.kernels.use_backend('eager')"
        )


def choose(kind: Kind, capability: tuple[int, int]) -> Plan:
    """The plan for a GPU of this compute capability.

    Raises:
        RuntimeError: below 8.0, which has neither bfloat16 nor tf32.
    """
    check_capability("global_attention", capability)
    return _PLANS.get(capability[0], _OTHERS)[kind]


#: The same for every GPU: tiles are small, since memory is the limit. None of MANNER's kernels spills with them; the
#: pointwise gradient behind GLU, which MANNER does not have, does: on sm_90 64 bytes in bfloat16, 208 in tf32.
_DEPTHWISE = {"depthwise": Tile(32, 0, 4, 1), "short": Tile(16, 0, 4, 1)}
_CONV = {
    Kind.BF16: ConvPlan(
        forward=Block(64, 64, 32, 8, 2),
        data=Block(64, 64, 64, 8, 2),
        weights=Block(64, 64, 32, 8, 2),
        pointwise=Block(32, 64, 0, 8, 1),
        **_DEPTHWISE,
    ),
    Kind.TF32: ConvPlan(
        forward=Block(64, 64, 32, 8, 2),
        data=Block(64, 64, 32, 8, 2),
        weights=Block(64, 64, 16, 8, 2),
        pointwise=Block(32, 64, 0, 8, 1),
        **_DEPTHWISE,
    ),
    Kind.TF32X3: ConvPlan(
        forward=Block(32, 64, 16, 4, 2),
        data=Block(32, 64, 16, 8, 2),
        weights=Block(64, 64, 16, 8, 2),
        pointwise=Block(16, 32, 0, 8, 1),
        **_DEPTHWISE,
    ),
}


def choose_conv(kind: Kind, capability: tuple[int, int]) -> ConvPlan:
    """Likewise for the convolution stages."""
    check_capability("norm_act_conv", capability)
    return _CONV[kind]


_GATE = {
    Kind.BF16: (Block(32, 128, 0, 8, 1), Block(32, 64, 0, 8, 1)),
    Kind.TF32: (Block(32, 64, 0, 8, 1), Block(32, 64, 0, 8, 1)),
    Kind.TF32X3: (Block(32, 64, 0, 8, 1), Block(32, 64, 0, 8, 1)),
}


def choose_gate(kind: Kind, capability: tuple[int, int]) -> GatePlan:
    """Likewise for mask_gate."""
    return GatePlan(*_GATE[kind], choose_conv(kind, capability))
