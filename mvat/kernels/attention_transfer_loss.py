"""The multi-view attention transfer loss: how far a student's attention maps are from its teacher's.

For a pair of features or maps with Q(F)[b, t] = sum_c |F[b, c, t]|^p and N(Q) = Q / ||Q||_2 (over time):

    form="paper":  mean over b of  || N(Q_S) - N(Q_T) ||_2
    form="code":   mean over (b, t) of  (N(Q_S) - N(Q_T))^2

Zagoruyko & Komodakis ("Paying more attention to attention", ICLR 2017) state the first and published the second (whose
mean over channels instead of the sum falls out of the normalisation). Source of the use on the three views: Shin et
al., "Multi-View Attention Transfer for Efficient Speech Enhancement", Interspeech 2022.

The distance is always taken between normalised maps, never as `2 - 2 <N_S, N_T>`, which cancels when both are close.

The CPU kernel (csrc/cpu/attention_transfer_loss.cpp) takes all pairs in one call: one reading of every feature leaves
the maps, one reading of the maps the distances; backward reads the student's features once and writes their gradients
once. Kept in between are the student's maps, the differences of the normalised maps and four scalars a clip. Sums run
in float64 and in one order for any number of threads; maps nearer than 4 roundings of float64 are equal. The 24 pairs
of base and s-8.1gf, 4 s of audio, p = 2, "paper", float32, 2 cores without AVX-512; median milliseconds in one run:

                                         forward                      forward and backward
    B  teacher's side   read   reference compiled fused      reference compiled fused
    4  173 MB features  5.4       51       13.0    7.3          64       18.8   11.1
    4    5 MB maps                 7.6      3.8    2.7          22        7.9    6.3
    1   43 MB features  1.7       11        4.8    2.5          24        6.3    3.9
    1  1.3 MB maps                 4.0      1.3    0.9          11        2.8    2.1

"read" is torch.sum over as many bytes as the teacher's features have. Beside it the forward pass, which reads the
student's 35 MB too, moves 88 %, and both passes 77 %, of the bytes a second. In the kernels go 83 % of the time (given
maps: 49 %), in page faults 4 % (31 %: the gradients' 35 MB are fresh pages), in Python and dispatch 0.6 ms. Much of the
reference's time are fresh pages for its temporaries: where the C library keeps them (MALLOC_TRIM_THRESHOLD_), it takes
36 ms, not 64. Other powers, features, B = 4, both passes: p = 1 61 and 11, p = 3 102 and 12, p = 1.5 250 and 105.
Tried on the teacher's maps alone: tiles of 2048 samples (15 to 25 % slower; 4096 to 65536 differ by 10 %), 16 channels
at a time (equal), four (5 to 10 % slower), a fixed share of the tiles for each thread (equal), software prefetch (no
faster).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mvat.kernels import native
from mvat.kernels.attention_map import attention_map, attention_map_reference
from mvat.kernels.backend import current_backend, register, use_fused
from mvat.kernels.checks import check_choice, check_features, check_power

FORMS = ("paper", "code")
REDUCTIONS = ("sum", "none")


def _normalised(q: Tensor) -> Tensor:
    """q [B, T] over its 2-norm. The norm is taken on q / max q, so that no square over- or underflows.

    Silence is divided by infinity: it becomes zero and gets a zero gradient. A map without one normal number counts as
    silence, for its reciprocal overflows.
    """
    largest = q.detach().abs().amax(1, keepdim=True)
    q = q / largest.masked_fill(largest < torch.finfo(q.dtype).tiny, torch.inf)
    norm = torch.linalg.vector_norm(q, dim=1, keepdim=True)
    return q / norm.masked_fill(norm == 0, torch.inf)


def _pair_distance(q_student: Tensor, q_teacher: Tensor, form: str) -> Tensor:
    """The distance of two maps [B, T] as a scalar; zero for an empty batch."""
    if q_student.dtype != q_teacher.dtype:
        dtype = torch.promote_types(q_student.dtype, q_teacher.dtype)
        q_student, q_teacher = q_student.to(dtype), q_teacher.to(dtype)
    difference = _normalised(q_student) - _normalised(q_teacher)
    if form == "paper":
        each = torch.linalg.vector_norm(difference, dim=1)
    else:
        each = difference.square().mean(1)
    return each.sum() / max(each.numel(), 1)


def _maps_distance(student: Sequence[Tensor], teacher: Sequence[Tensor], form: str, reduction: str) -> Tensor:
    losses = [_pair_distance(s, t, form) for s, t in zip(student, teacher, strict=True)]
    return torch.stack(losses).sum() if reduction == "sum" else torch.stack(losses)


def _as_float_map(x: Tensor) -> Tensor:
    """A map given by the caller, in float32 at least."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def attention_transfer_loss_reference(
    student: Sequence[Tensor], teacher: Sequence[Tensor], *, p: float = 2.0, form: str = "paper", reduction: str = "sum"
) -> Tensor:
    """`attention_transfer_loss` in plain PyTorch."""
    student_maps = [attention_map_reference(f, p) if f.dim() == 3 else _as_float_map(f) for f in student]
    teacher_maps = [
        attention_map_reference(f.detach(), p) if f.dim() == 3 else _as_float_map(f.detach()) for f in teacher
    ]
    return _maps_distance(student_maps, teacher_maps, form, reduction)


def _check_pairs(op: str, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    for name, side in (("student", student), ("teacher", teacher)):
        if isinstance(side, Tensor) or not isinstance(side, Sequence):
            raise TypeError(f"{op}: {name} must be a sequence of tensors, got {type(side).__name__}")
    if len(student) != len(teacher) or not len(student):
        raise ValueError(
            f"{op}: student and teacher must be equally long, not empty, got {len(student)} and {len(teacher)} tensors"
        )
    for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
        for name, f in (("student", s), ("teacher", t)):
            if not (isinstance(f, Tensor) and f.is_floating_point() and f.dim() in (2, 3)):
                check_features(op, f"{name}[{i}]", f)  # says what is wrong; a name for every tensor would cost time
        if s.shape[0] != t.shape[0] or s.shape[-1] != t.shape[-1]:
            raise ValueError(
                f"{op}: pair {i} must agree in batch and time, got student {list(s.shape)} and teacher {list(t.shape)}"
            )
        if not s.device == t.device == student[0].device:
            raise ValueError(
                f"{op}: all tensors must be on one device, "
                f"got {student[0].device}, and in pair {i} {s.device} and {t.device}"
            )
        if s.shape[-1] == 0:
            raise ValueError(f"{op}: pair {i} must have at least one time step, got student {list(s.shape)}")


def attention_transfer_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], *, p: float = 2.0, form: str = "paper", reduction: str = "sum"
) -> Tensor:
    """The attention transfer loss over pairs of features or maps.

    Args:
        student, teacher: equally long sequences of tensors. A tensor [B, C, T] is a feature, a tensor [B, T] a map
            already; both kinds may be mixed. A pair may differ in channels, never in batch or time. Half precision is
            summed in float32.
        p: the power in the map, finite and at least 1.
        form: "paper" or "code", see the module's formula.
        reduction: "sum" over the pairs gives a scalar, "none" one value a pair, [len(student)].

    Returns:
        The loss, float32 or float64. Only the student gets a gradient; silence (Q = 0) and equal maps give zero.

    Raises:
        TypeError, ValueError: for a wrong type, dtype, shape, device or power, or an unknown form or reduction.
    """
    op = "attention_transfer_loss"
    check_choice(op, "form", form, FORMS)
    check_choice(op, "reduction", reduction, REDUCTIONS)
    check_power(op, p)
    _check_pairs(op, student, teacher)
    one_dtype = all(x.dtype == student[0].dtype for side in (student, teacher) for x in side)
    if not one_dtype and current_backend() == "fused":
        raise RuntimeError(f'{op}: the back end is "fused", but there is no fused kernel for tensors of several dtypes')
    if one_dtype and use_fused(op, student[0]):
        teacher = [x.detach() if x.requires_grad else x for x in teacher]
        losses = torch.ops.mvat.attention_transfer_loss(list(student), teacher, float(p), form == "paper")[0]
        return losses.sum() if reduction == "sum" else losses
    student_maps = [attention_map(f, p) if f.dim() == 3 else _as_float_map(f) for f in student]
    teacher_maps = [attention_map(f.detach(), p) if f.dim() == 3 else _as_float_map(f.detach()) for f in teacher]
    return _maps_distance(student_maps, teacher_maps, form, reduction)


register("attention_transfer_loss", native.supports("attention_transfer_loss", ("cpu", "cuda")))


def _fake(student, teacher, p, paper):
    wide = native.wide(student[0].dtype)
    clips = sum(x.shape[0] for x in student)
    samples = sum(x.shape[0] * x.shape[-1] for x in student)
    return tuple(student[0].new_empty(shape, dtype=wide) for shape in ((len(student),), (2 * samples,), (clips, 4)))


def _setup_context(ctx, inputs, output) -> None:
    student, _, ctx.p, ctx.paper = inputs
    _, maps, scalars = output
    ctx.mark_non_differentiable(maps, scalars)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*student, maps, scalars)


def _backward(ctx, grad, *_):
    if grad is None:  # nobody asked for the loss: its gradient is not made up from zeros
        return [None] * len(ctx.needs_input_grad[0]), [None] * len(ctx.needs_input_grad[1]), None, None
    *student, maps, scalars = ctx.saved_tensors
    needed = ctx.needs_input_grad[0]
    # A feature of no channels in the place of a tensor that wants no gradient costs nothing and keeps the maps' order.
    student = [
        x if wanted else (x if x.dim() == 3 else x[:, None])[:, :0] for x, wanted in zip(student, needed, strict=True)
    ]
    gradients = torch.ops.mvat.attention_transfer_loss_backward(grad, student, maps, scalars, ctx.p, ctx.paper)
    gradients = [g if wanted else None for g, wanted in zip(gradients, needed, strict=True)]
    return gradients, [None] * len(gradients), None, None


native.complete(
    "attention_transfer_loss",
    _fake,
    lambda grad, student, maps, scalars, p, paper: [x.new_empty(x.shape) for x in student],
    _setup_context,
    _backward,
)
