"""What distillation adds to the enhancement loss: attention transfer, and what it is compared with."""

from collections.abc import Sequence

from torch import Tensor, nn

from mvat.kernels import attention_transfer_loss
from mvat.kernels.attention_transfer_loss import FORMS, REDUCTIONS
from mvat.kernels.checks import check_choice, check_power
from mvat.losses.mrstft import mrstft_distance
from mvat.models import Views

VIEW_NAMES = Views._fields


class AttentionTransferLoss(nn.Module):
    """`mvat.kernels.attention_transfer_loss` as a module, for any two networks whose features agree in batch and time.

    It has no parameters. Called with two equally long sequences of tensors, the student's and the teacher's, each a
    feature [B, C, T] or a map [B, T], in any floating dtype; gives a float32 or float64 scalar, or one value a pair
    with reduction="none". Only the student gets a gradient. Every feature is read once: a pair costs one pass over both
    sides forward, one reading of the student's and one write backward.

    Args:
        p: the power in the map, finite and at least 1.
        form: "paper" or "code", see `attention_transfer_loss`.
        reduction: "sum" over the pairs, or "none".

    Raises:
        TypeError, ValueError: for a wrong power, or an unknown form or reduction.

    Examples:
        >>> student, teacher = torch.randn(2, 8, 100, requires_grad=True), torch.randn(2, 60, 100)
        >>> AttentionTransferLoss()([student], [teacher]).backward()

    Source: Zagoruyko & Komodakis, "Paying more attention to attention", ICLR 2017; Shin et al., "Multi-View Attention
    Transfer for Efficient Speech Enhancement", Interspeech 2022.
    """

    def __init__(self, p: float = 2.0, form: str = "paper", reduction: str = "sum") -> None:
        super().__init__()
        op = "AttentionTransferLoss"
        check_power(op, p)
        check_choice(op, "form", form, FORMS)
        check_choice(op, "reduction", reduction, REDUCTIONS)
        self.p, self.form, self.reduction = p, form, reduction

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        return attention_transfer_loss(student, teacher, p=self.p, form=self.form, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"p={self.p}, form={self.form!r}, reduction={self.reduction!r}"


def multi_view_transfer_loss(
    student: Sequence[Views],
    teacher: Sequence[Views],
    *,
    pairs: Sequence[tuple[int, int]] | None = None,
    views: Sequence[str] = VIEW_NAMES,
    p: float = 2.0,
    form: str = "paper",
) -> Tensor:
    """MV-AT: `mvat.kernels.attention_transfer_loss` summed over pairs of blocks and over views.

    Args:
        student, teacher: one Views per multi-view block in execution order, of features or of maps
            (`Manner(..., return_views=True)` and `return_maps=True`).
        pairs: (student block, teacher block) indices; None pairs all blocks in order.
        views: which of "channel", "global_", "local" are transferred.
        p, form: see `attention_transfer_loss`.

    Raises:
        ValueError: for pairs or views that do not exist.
    """
    check_views(views)
    chosen = block_pairs(len(student), len(teacher), pairs)
    return attention_transfer_loss(
        [getattr(student[s], view) for s, _ in chosen for view in views],
        [getattr(teacher[t], view) for _, t in chosen for view in views],
        p=p,
        form=form,
    )


def check_views(views: Sequence[str]) -> None:
    """ValueError unless `views` is a sequence of names of views, at least one."""
    if isinstance(views, str) or not isinstance(views, Sequence) or not views or set(views) - set(VIEW_NAMES):
        raise ValueError(f"views must be a sequence of some of {', '.join(VIEW_NAMES)}, got {views!r}")


def block_pairs(students: int, teachers: int, pairs: Sequence[tuple[int, int]] | None) -> list[tuple[int, int]]:
    """The pairs of block indices to transfer; ValueError if None and the numbers differ, or if one does not exist."""
    if pairs is None:
        if students != teachers:
            raise ValueError(
                f"the student has {students} multi-view blocks and the teacher {teachers}: "
                "name the pairs of blocks, such as pairs = [[0, 0], [1, 1]]"
            )
        return [(i, i) for i in range(students)]
    for pair in pairs:
        if isinstance(pair, str) or not isinstance(pair, Sequence) or [type(index) for index in pair] != [int, int]:
            raise ValueError(f"pairs must be of two indices, [student block, teacher block], got {pair!r}")
        s, t = pair
        if not (0 <= s < students and 0 <= t < teachers):
            raise ValueError(f"pair ({s}, {t}) does not exist: {students} student and {teachers} teacher blocks")
    return [(s, t) for s, t in pairs]


def block_transfer_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    pairs: Sequence[tuple[int, int]] | None = None,
    p: float = 2.0,
    form: str = "paper",
) -> Tensor:
    """Plain attention transfer, for comparison: the same loss on the blocks' outputs (or their maps)."""
    chosen = block_pairs(len(student), len(teacher), pairs)
    return attention_transfer_loss([student[s] for s, _ in chosen], [teacher[t] for _, t in chosen], p=p, form=form)


def output_distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Output distillation, for comparison (ours): the clips' mean `mrstft_distance` to the teacher's estimate."""
    return mrstft_distance(student, teacher.detach() if isinstance(teacher, Tensor) else teacher).mean()
