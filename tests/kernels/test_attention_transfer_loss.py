import itertools
import math

import pytest
import torch
from torch import Tensor

from mvat.kernels import attention_map, attention_transfer_loss, backend
from mvat.kernels.attention_transfer_loss import attention_transfer_loss_reference
from mvat.models import Views

FORMS = ("paper", "code")
each_backend = pytest.mark.usefixtures("each_backend")


@pytest.fixture(params=["auto", "eager"], name="each_backend")
def run_each_backend(request: pytest.FixtureRequest):
    """The test runs with the fused kernel, where there is one, and with the reference."""
    with backend.use_backend(request.param):
        yield


def formula(student: Tensor, teacher: Tensor, p: float, form: str) -> Tensor:
    """One pair of features [B, C, T] in float64, clip after clip."""
    clips = []
    for s, t in zip(student.double(), teacher.double(), strict=True):
        q_s, q_t = (f.abs() ** p for f in (s, t))
        # The published code takes the mean over channels, the text the sum.
        q_s, q_t = (q.sum(0) if form == "paper" else q.mean(0) for q in (q_s, q_t))
        difference = q_s / torch.sqrt((q_s**2).sum()) - q_t / torch.sqrt((q_t**2).sum())
        clips.append(torch.sqrt((difference**2).sum()) if form == "paper" else (difference**2).mean())
    return sum(clips) / len(clips)


def loss_and_gradient(student: Tensor, teacher: Tensor, **options) -> tuple[Tensor, Tensor]:
    student = student.detach().requires_grad_()
    loss = attention_transfer_loss([student], [teacher], **options)
    return loss.detach(), torch.autograd.grad(loss, student)[0]


@each_backend
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 59), (1, 20, 127), (2, 4, 1023)])
def test_matches_the_formula(shape: tuple[int, int, int], p: float, form: str) -> None:
    batch, channels, length = shape
    s, t = torch.randn(shape, dtype=torch.float64), torch.randn(batch, channels + 3, length, dtype=torch.float64)
    leaf = s.clone().requires_grad_()
    expected = formula(leaf, t, p, form)
    (gradient,) = torch.autograd.grad(expected, leaf) if length > 1 else (torch.zeros_like(s),)  # else the root of 0
    got = loss_and_gradient(s, t, p=p, form=form)
    assert got[0].dtype == torch.float64
    torch.testing.assert_close(got, (expected.detach(), gradient), rtol=1e-11, atol=1e-14)
    single = loss_and_gradient(s.float(), t.float(), p=p, form=form)
    assert single[0].dtype == torch.float32
    torch.testing.assert_close(single[0].double(), expected.detach(), rtol=1e-5, atol=1e-7)
    assert (single[1] - gradient).norm() <= 1e-5 * gradient.norm()


@each_backend
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0])
def test_gradcheck(p: float, form: str) -> None:
    features, maps = torch.randn(2, 3, 4, dtype=torch.float64), torch.rand(2, 5, dtype=torch.float64) + 0.1
    features = (features + 0.2 * features.sign()).requires_grad_()  # away from the kink of |x|
    maps.requires_grad_()
    teacher = [torch.rand(2, 4, dtype=torch.float64), torch.randn(2, 2, 5, dtype=torch.float64)]

    def function(features: Tensor, maps: Tensor) -> Tensor:
        return attention_transfer_loss([features, maps], teacher, p=p, form=form, reduction="none")

    assert torch.autograd.gradcheck(function, (features, maps))


@each_backend
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_silence_and_equal_maps_give_zero(dtype: torch.dtype, p: float, form: str) -> None:
    x, silence = torch.randn(2, 5, 33, dtype=dtype), torch.zeros(2, 5, 33, dtype=dtype)
    q = attention_map(x, p)
    equal = [(x, x), (x, -x), (x, q), (q, q), (silence, silence), (silence[:, 0], silence), (x.flip(1), x.flip(1))]
    for student, teacher in equal:
        loss, gradient = loss_and_gradient(student, teacher, p=p, form=form)
        assert loss == 0 and not gradient.any()
    for student in (silence, silence[:, 0]):  # the student is silent, the teacher is not
        loss, gradient = loss_and_gradient(student, x, p=p, form=form)
        assert loss == pytest.approx(1.0 if form == "paper" else 1 / 33) and not gradient.any()
    # The teacher is silent, the student is not: a map of norm one is one away from zero in every direction.
    loss, gradient = loss_and_gradient(x, silence, p=p, form=form)
    assert loss == pytest.approx(1.0 if form == "paper" else 1 / 33, rel=1e-6)
    assert gradient.abs().max() < 1e-6
    # One silent clip beside one that is not.
    half = torch.stack((x[0], silence[1]))
    loss, gradient = loss_and_gradient(half, x.roll(1, -1), p=p, form=form)
    assert torch.isfinite(loss) and gradient[0].any() and not gradient[1].any() and torch.isfinite(gradient).all()


@each_backend
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize("scale", [1e-15, 1e-8, 1e8, 1e15])
def test_huge_and_tiny_features(scale: float, p: float, form: str) -> None:
    s, t = torch.randn(2, 8, 200), torch.randn(2, 12, 200)
    loss, gradient = loss_and_gradient(s.double(), t.double(), p=p, form=form)
    for student, teacher in ((scale * s, t), (s, scale * t), (scale * s, t / scale)):
        factor = scale if student is not s else 1.0
        got, grad = loss_and_gradient(student, teacher, p=p, form=form)
        torch.testing.assert_close(got.double(), loss, rtol=1e-5, atol=0)
        assert (grad.double() * factor - gradient).norm() <= 1e-5 * gradient.norm()


@each_backend
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [1e-18, 1e-19, 1e-20, 1e-21, 1e-22, 1e-23, 1e-25])
def test_at_the_edge_of_underflow_the_gradient_stays_finite(scale: float, form: str) -> None:
    s, t = scale * torch.randn(2, 8, 200), torch.randn(2, 8, 200)
    for student, teacher in ((s, t), (s, s.flip(2)), (t, s), (attention_map(s), t)):
        loss, gradient = loss_and_gradient(student, teacher, form=form)
        assert torch.isfinite(loss) and torch.isfinite(gradient).all()


@each_backend
@pytest.mark.parametrize("form", FORMS)
def test_maps_whose_squares_would_over_or_underflow(form: str) -> None:
    s, t = torch.rand(2, 200), torch.rand(2, 200)
    loss, gradient = loss_and_gradient(s.double(), t.double(), form=form)
    for scale in (1e-35, 1e35):
        got, grad = loss_and_gradient(scale * s, scale * t, form=form)
        torch.testing.assert_close(got.double(), loss, rtol=1e-5, atol=0)
        assert (grad.double() * scale - gradient).norm() <= 1e-5 * gradient.norm()


@each_backend
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("distance", [1e-3, 1e-5])
def test_a_close_student_is_measured_without_cancellation(distance: float, form: str) -> None:
    t = torch.rand(2, 1000, dtype=torch.float64) + 0.5
    s = (t + distance * torch.randn_like(t)).float()
    t = t.float()
    exact = loss_and_gradient(s.double(), t.double(), form=form)
    loss, gradient = loss_and_gradient(s, t, form=form)
    # Rounding of the maps allows 1e-7 / distance; 2 - 2 <N_S, N_T> would miss by 1e-7 / distance^2.
    assert abs(loss - exact[0]) <= 1e-6 / distance * exact[0]
    assert (gradient - exact[1]).norm() <= 1e-6 / distance * exact[1].norm()


@each_backend
@pytest.mark.parametrize("form", FORMS)
def test_scaling_a_feature_changes_nothing(form: str) -> None:
    s, t = torch.randn(2, 5, 59, dtype=torch.float64), torch.randn(2, 3, 59, dtype=torch.float64)
    expected = attention_transfer_loss([s], [t], form=form)
    for a, b in itertools.product((0.5, -3.0), (1e-3, 7.0)):
        torch.testing.assert_close(attention_transfer_loss([a * s], [b * t], form=form), expected)
    s.requires_grad_()
    (gradient,) = torch.autograd.grad(attention_transfer_loss([s], [t], form=form), s)
    torch.testing.assert_close((gradient * s).sum((1, 2)), torch.zeros(2, dtype=torch.float64), atol=1e-15, rtol=0)


@each_backend
@pytest.mark.parametrize("form", FORMS)
def test_pairs_maps_and_features_mix(form: str) -> None:
    shapes = (4, 59), (1, 127), (9, 33), (2, 1)
    student = [torch.randn(2, c, n, dtype=torch.float64) for c, n in shapes]
    teacher = [torch.randn(2, c + 1, n, dtype=torch.float64) for c, n in shapes]
    each = torch.stack([formula(s, t, 2.0, form) for s, t in zip(student, teacher, strict=True)])
    for kind in itertools.product((False, True), repeat=2):
        maps = [attention_map if as_map else torch.clone for as_map in kind]
        mixed = [student[0], *map(maps[0], student[1:])], [*map(maps[1], teacher[:2]), *teacher[2:]]
        torch.testing.assert_close(attention_transfer_loss(*mixed, form=form, reduction="none"), each)
        torch.testing.assert_close(attention_transfer_loss(*mixed, form=form), each.sum())
    views = Views(*student[:3]), Views(*teacher[:3])  # any sequence will do
    torch.testing.assert_close(attention_transfer_loss(*views, form=form), each[:3].sum())


@each_backend
@pytest.mark.parametrize("form", FORMS)
def test_unreduced_gradients_belong_to_their_pair(form: str) -> None:
    student = [torch.randn(2, 4, n, dtype=torch.float64, requires_grad=True) for n in (9, 5, 7)]
    teacher = [torch.randn(2, 6, n, dtype=torch.float64) for n in (9, 5, 7)]
    weights = torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64)
    losses = attention_transfer_loss(student, teacher, form=form, reduction="none")
    assert losses.shape == (3,)
    (losses * weights).sum().backward()
    for s, t, weight in zip(student, teacher, weights, strict=True):
        torch.testing.assert_close(s.grad, weight * loss_and_gradient(s, t, form=form)[1])


@each_backend
@pytest.mark.parametrize("form", FORMS)
def test_only_the_student_gets_a_gradient(form: str) -> None:
    s, t = torch.randn(2, 4, 9, requires_grad=True), torch.randn(2, 4, 9, requires_grad=True)
    attention_transfer_loss([s, attention_map(s)], [t, attention_map(t)], form=form).backward()
    assert s.grad is not None and t.grad is None
    assert not attention_transfer_loss([s.detach()], [t], form=form).requires_grad


@each_backend
@pytest.mark.parametrize("form", FORMS)
def test_the_same_tensor_on_both_sides_and_in_two_pairs(form: str) -> None:
    s, t = torch.randn(2, 4, 9, dtype=torch.float64, requires_grad=True), torch.randn(2, 4, 9, dtype=torch.float64)
    loss = attention_transfer_loss([s, s, s], [t, t, s], form=form)
    loss.backward()
    expected = loss_and_gradient(s, t, form=form)
    torch.testing.assert_close((loss.detach(), s.grad), (2 * expected[0], 2 * expected[1]))


@each_backend
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_empty_batch(reduction: str, form: str) -> None:
    s = torch.zeros(0, 4, 9, requires_grad=True)
    loss = attention_transfer_loss([s], [torch.zeros(0, 9)], form=form, reduction=reduction)
    loss.sum().backward()
    assert loss.shape == (() if reduction == "sum" else (1,)) and not loss.any() and s.grad.shape == s.shape


@pytest.mark.filterwarnings("ignore:attention_map runs the plain PyTorch reference")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_is_summed_in_float32(form: str, dtype: torch.dtype) -> None:
    s, t = torch.randn(2, 60, 33).to(dtype), torch.randn(2, 60, 33).to(dtype)
    loss, gradient = loss_and_gradient(s, t, form=form)
    exact, exact_gradient = loss_and_gradient(s.double(), t.double(), form=form)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, exact_gradient.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7)
    maps = [attention_map(f).to(dtype) for f in (s, t)]
    loss = attention_transfer_loss(maps[:1], maps[1:], form=form)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=0.05, atol=1e-4)
    with torch.autocast("cpu", dtype):
        assert attention_transfer_loss([s], [t], form=form).dtype == torch.float32


def test_float64_on_one_side_makes_float64() -> None:
    s, t = torch.randn(2, 4, 9), torch.randn(2, 4, 9, dtype=torch.float64)
    loss = attention_transfer_loss([s], [t])
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, formula(s, t, 2.0, "paper"), rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", ["sliced", "transposed", "every second", "expanded"])
@pytest.mark.parametrize("form", FORMS)
def test_views_of_memory(layout: str, form: str) -> None:
    make = {
        "sliced": lambda: torch.randn(4, 5, 62, dtype=torch.float64)[1:3, 1:-1, 3:],
        "transposed": lambda: torch.randn(2, 59, 3, dtype=torch.float64).transpose(1, 2),
        "every second": lambda: torch.randn(2, 3, 118, dtype=torch.float64)[..., ::2],
        "expanded": lambda: torch.randn(2, 1, 59, dtype=torch.float64).expand(2, 3, 59),
    }[layout]
    s, t = make(), make()
    torch.testing.assert_close(attention_transfer_loss([s], [t], form=form), formula(s, t, 2.0, form))
    torch.testing.assert_close(attention_transfer_loss([s[:, 0] ** 2], [t], form=form), formula(s[:, :1], t, 2.0, form))


@pytest.mark.parametrize("form", FORMS)
def test_the_reference_is_the_same_function(form: str) -> None:
    s, t = [torch.randn(2, 4, 9, dtype=torch.float64)], [torch.rand(2, 9, dtype=torch.float64)]
    for reduction in ("sum", "none"):
        options = {"p": 1.5, "form": form, "reduction": reduction}
        torch.testing.assert_close(
            attention_transfer_loss(s, t, **options), attention_transfer_loss_reference(s, t, **options)
        )


@pytest.mark.parametrize("form", FORMS)
def test_compile(form: str) -> None:
    torch._dynamo.reset()
    student = [torch.randn(2, 4, 33, requires_grad=True), torch.rand(2, 9, requires_grad=True)]
    teacher = [torch.randn(2, 6, 33), torch.rand(2, 9)]
    compiled = torch.compile(attention_transfer_loss, fullgraph=True, backend="aot_eager")
    with backend.use_backend("eager"):
        loss, expected = compiled(student, teacher, form=form), attention_transfer_loss(student, teacher, form=form)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, student), torch.autograd.grad(expected, student))


F, Q = torch.zeros(2, 3, 9), torch.zeros(2, 9)


@pytest.mark.parametrize(
    "student, teacher, options, error, message",
    [
        (F, [F], {}, TypeError, "student must be a sequence of tensors, got Tensor"),
        ([F], None, {}, TypeError, "teacher must be a sequence of tensors, got NoneType"),
        ([F], [F, F], {}, ValueError, "equally long, not empty, got 1 and 2 tensors"),
        ([], [], {}, ValueError, "equally long, not empty, got 0 and 0 tensors"),
        ([F, 1], [F, F], {}, TypeError, r"student\[1\] must be a tensor, got int"),
        ([F], [F.long()], {}, TypeError, r"teacher\[0\] must have a floating dtype, got torch.int64"),
        ([F], [F[0, 0]], {}, ValueError, r"teacher\[0\] must have shape \[B, C, T\], got \[9\]"),
        ([F], [Q[:, :8]], {}, ValueError, r"pair 0 must agree in batch and time, got student \[2, 3, 9\] and teacher"),
        ([F, F], [F, F[:1]], {}, ValueError, "pair 1 must agree in batch and time"),
        ([F], [F.to("meta")], {}, ValueError, "all tensors must be on one device, got cpu, and in pair 0 cpu and meta"),
        ([Q[:, :0]], [Q[:, :0]], {}, ValueError, "pair 0 must have at least one time step"),
        ([F], [F], {"p": 0.5}, ValueError, "p must be finite and at least 1, got 0.5"),
        ([F], [F], {"p": -2}, ValueError, "p must be finite and at least 1, got -2"),
        ([F], [F], {"p": math.nan}, ValueError, "p must be finite and at least 1, got nan"),
        ([F], [F], {"p": math.inf}, ValueError, "p must be finite and at least 1, got inf"),
        ([F], [F], {"p": "2"}, TypeError, "p must be a number, got str"),
        ([Q], [Q], {"p": 0.5}, ValueError, "p must be finite and at least 1, got 0.5"),
        ([F], [F], {"form": "text"}, ValueError, "form must be one of paper, code, got 'text'"),
        ([F], [F], {"reduction": "mean"}, ValueError, "reduction must be one of sum, none, got 'mean'"),
    ],
)
def test_bad_input_is_named(student, teacher, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^attention_transfer_loss: .*{message}"):
        attention_transfer_loss(student, teacher, **options)
