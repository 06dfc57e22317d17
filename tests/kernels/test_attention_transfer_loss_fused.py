"""The fused kernel of attention_transfer_loss: what is its own beside test_attention_transfer_loss.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mvat.kernels import attention_map, attention_transfer_loss, backend, native
from mvat.kernels.attention_transfer_loss import attention_transfer_loss_reference

FORMS = ("paper", "code")
POWERS = (1.0, 1.5, 2.0, 3.0)
FORWARD, BACKWARD = "attention_transfer_loss", "attention_transfer_loss_backward"
pytestmark = pytest.mark.skipif(native.missing(FORWARD) is not None, reason=f"no kernel: {native.missing(FORWARD)}")


def fused(student: list[Tensor], teacher: list[Tensor], **options) -> Tensor:
    with backend.use_backend("fused"):
        return attention_transfer_loss(student, teacher, **options)


def losses_and_gradients(function, student: list[Tensor], teacher: list[Tensor], **options) -> tuple[Tensor, ...]:
    student = [x.detach().requires_grad_() for x in student]
    losses = function(student, teacher, reduction="none", **options)
    weights = torch.linspace(1, 2, len(student), dtype=losses.dtype)
    return losses.detach(), *torch.autograd.grad((losses * weights).sum(), student)


def assert_as_exact_as_eager(student: list[Tensor], teacher: list[Tensor], **options) -> None:
    """Losses and gradients: error against float64 at most twice the reference's, beside a rounding of the result."""
    wide = [x.double() for x in student], [x.double() for x in teacher]
    results = zip(
        losses_and_gradients(fused, student, teacher, **options),
        losses_and_gradients(attention_transfer_loss_reference, student, teacher, **options),
        losses_and_gradients(attention_transfer_loss_reference, *wide, **options),
        strict=True,
    )
    for got, eager, exact in results:
        assert got.shape == exact.shape and got.dtype == student[0].dtype and torch.isfinite(got).all()
        rounding = 4 * torch.finfo(got.dtype).eps * exact.norm()
        assert (got - exact).norm() <= 2 * (eager - exact).norm() + rounding


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("form", FORMS)
def test_errors_are_at_most_twice_eagers(p: float, form: str) -> None:
    shapes = (1, 7, 59), (4, 20, 1023), (2, 4, 20_001), (4, 320, 249), (1, 1, 3)
    student = [torch.randn(shape) for shape in shapes]
    teacher = [torch.randn(b, c + 3, n) for b, c, n in shapes]
    assert_as_exact_as_eager(student, teacher, p=p, form=form)
    maps = [attention_map(x, p) for x in teacher]
    assert_as_exact_as_eager([*student[:3], *maps[3:]], [*maps[:3], *teacher[3:]], p=p, form=form)
    # Near students: what is left of the difference is the maps' rounding, so that a few samples would tell of chance.
    near = [x + 1e-3 * torch.randn_like(x) for x in student[1:4]]
    assert_as_exact_as_eager(near, student[1:4], p=p, form=form)


LAYOUTS = {
    "dense": lambda b, c, n: torch.randn(b, c, n),
    "sliced": lambda b, c, n: torch.randn(b + 1, c + 2, n + 5)[1:, 1:-1, 3:-2],
    "transposed": lambda b, c, n: torch.randn(b, n, c).transpose(1, 2),
    "every second sample": lambda b, c, n: torch.randn(b, c, 2 * n)[..., ::2],
    "flipped batch": lambda b, c, n: torch.randn(c, b, n).flip(1).transpose(0, 1),
    "negative bit": lambda b, c, n: torch.view_as_complex(torch.randn(b, c, n, 2)).conj().imag,
    "one map for all clips": lambda b, c, n: torch.rand(1, n).expand(b, n),
    "a slice of a map": lambda b, c, n: torch.rand(b, n + 3)[:, 2:-1],
    "a map, every second sample": lambda b, c, n: torch.rand(b, 2 * n)[:, ::2],
}
layouts = st.sampled_from(sorted(LAYOUTS))


pairs_of_any_kind = st.tuples(st.integers(1, 3), st.integers(1, 21), st.integers(2, 300), layouts, layouts)


@settings(max_examples=40)
@given(
    st.lists(pairs_of_any_kind, min_size=1, max_size=4),
    st.sampled_from(POWERS),
    st.sampled_from(FORMS),
)
def test_any_shapes_and_layouts(pairs: list[tuple], p: float, form: str) -> None:
    student = [LAYOUTS[layout](b, c, n) for b, c, n, layout, _ in pairs]
    teacher = [LAYOUTS[layout](b, c, n) for b, c, n, _, layout in pairs]
    assert_as_exact_as_eager(student, teacher, p=p, form=form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_sample_stays_visible_and_in_its_clip(bad: float, form: str) -> None:
    s, t = torch.randn(3, 4, 99), torch.randn(3, 6, 99)
    s[1, 2, 50] = bad
    for student, teacher in ((s, t), (s.square().sum(1), t), (t, s)):
        got = losses_and_gradients(fused, [student], [teacher], form=form)
        expected = losses_and_gradients(attention_transfer_loss_reference, [student], [teacher], form=form)
        torch.testing.assert_close(got, expected, equal_nan=True)
        assert got[0].isnan().all() and got[1][1].isnan().any() and got[1][[0, 2]].isfinite().all()


def test_no_channels_and_silence_beside_sound() -> None:
    student = [torch.zeros(2, 0, 9), torch.randn(2, 3, 9), torch.randn(2, 3, 9)]
    teacher = [torch.randn(2, 5, 9), torch.zeros(2, 0, 9), torch.zeros(2, 9)]
    losses, *gradients = losses_and_gradients(fused, student, teacher)
    torch.testing.assert_close(losses, torch.ones(3))
    assert all(g.abs().max() < 1e-6 for g in gradients[1:])


def test_float64_at_its_limits() -> None:
    s, t = torch.rand(2, 500, dtype=torch.float64), torch.rand(2, 500, dtype=torch.float64)
    expected = losses_and_gradients(fused, [s], [t])
    for scale in (1e-300, 1e-160, 1e160, 1e300):
        got = losses_and_gradients(fused, [s * scale], [t])
        torch.testing.assert_close((got[0], got[1] * scale), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("p", POWERS)
def test_the_thread_count_changes_nothing(p: float) -> None:
    shapes = (4, 5, 20_000), (4, 160, 999), (3, 320, 249), (1, 2, 7)
    student = [torch.randn(shape) for shape in shapes]
    teacher = [torch.randn(b, c + 3, n) for b, c, n in shapes]
    results = []
    for threads in (1, 2, 1, 2):
        torch.set_num_threads(threads)
        results.append(losses_and_gradients(fused, student, teacher, p=p))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


class Outputs(TorchDispatchMode):
    """Elements that each of mvat's operators gives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace == "mvat":
            self.elements.append((function._schema.name.split("::")[1], sum(x.numel() for x in result)))
        return result


def test_one_call_for_all_pairs_and_nothing_more_than_maps_and_gradients() -> None:
    student = [torch.randn(2, 4, 50), torch.randn(2, 3, 60, requires_grad=True), torch.rand(2, 70), torch.rand(2, 80)]
    student[3].requires_grad_()
    teacher = [torch.randn(2, 9, x.shape[-1]) for x in student]
    everything = [x.detach().requires_grad_() for x in student]
    with Outputs() as outputs:
        loss = fused(student, teacher)
        gradients = torch.autograd.grad(loss, [student[1], student[3]])
    # Maps and differences, four scalars a clip, one loss a pair; then the gradients that are wanted.
    samples = 2 * (50 + 60 + 70 + 80)
    assert outputs.elements == [(FORWARD, 2 * samples + 4 * 8 + 4), (BACKWARD, 2 * 3 * 60 + 2 * 80)]
    expected = torch.autograd.grad(attention_transfer_loss_reference(everything, teacher), everything)
    torch.testing.assert_close(gradients, (expected[1], expected[3]))
    assert not fused([x.detach() for x in student], teacher).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [2, 0])
def test_opcheck(batch: int, dtype: torch.dtype) -> None:
    student = [torch.randn(batch, 3, 33, dtype=dtype), torch.rand(batch, 9, dtype=dtype)]
    teacher = [torch.randn(batch, 33, 5, dtype=dtype).transpose(1, 2), torch.randn(batch, 2, 9, dtype=dtype)]
    wanting = [x.clone().requires_grad_() for x in student]
    torch.library.opcheck(torch.ops.mvat.attention_transfer_loss, (wanting, teacher, 2.0, True))
    torch.library.opcheck(torch.ops.mvat.attention_transfer_loss, (student, teacher, 1.5, False))
    losses, maps, scalars = torch.ops.mvat.attention_transfer_loss(student, teacher, 2.0, True)
    arguments = torch.ones_like(losses), student, maps, scalars, 2.0, True
    torch.library.opcheck(torch.ops.mvat.attention_transfer_loss_backward, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_with_inductor_calls_the_kernel(dynamic: bool) -> None:
    torch._dynamo.reset()
    student = [torch.randn(2, 4, 33, requires_grad=True), torch.rand(2, 9), torch.randn(2, 2, 21, requires_grad=True)]
    teacher = [torch.randn(2, 6, 33), torch.rand(2, 9), torch.randn(2, 5, 21)]
    compiled = torch.compile(attention_transfer_loss, fullgraph=True, dynamic=dynamic)
    wanted = [student[0], student[2]]
    with torch.profiler.profile() as profile:
        loss = compiled(student, teacher)
        got = torch.autograd.grad(loss, wanted)
    expected = attention_transfer_loss(student, teacher)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(got, torch.autograd.grad(expected, wanted))
    assert {f"mvat::{FORWARD}", f"mvat::{BACKWARD}"} <= {event.key for event in profile.key_averages()}


def test_a_second_derivative_is_refused() -> None:
    s, t = torch.randn(1, 3, 5, requires_grad=True), torch.randn(1, 3, 5)
    (ds,) = torch.autograd.grad(fused([s], [t]), s, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative is not supported by the fused kernel"):
        ds.sum().backward()
    with backend.use_backend("eager"):
        (ds,) = torch.autograd.grad(attention_transfer_loss([s], [t]), s, create_graph=True)
    ds.sum().backward()
    assert s.grad.isfinite().all()


def test_inference_mode_autocast_and_deterministic_algorithms() -> None:
    s, t = torch.randn(2, 3, 50), torch.randn(2, 5, 50)
    expected = attention_transfer_loss_reference([s], [t])
    torch.use_deterministic_algorithms(True)
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(fused([s], [t]), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_several_dtypes_and_half_precision_take_no_fused_kernel() -> None:
    x = torch.randn(2, 3, 5)
    for student, teacher, message in (
        ([x], [x.double()], "no fused kernel for tensors of several dtypes"),
        ([x, x.bfloat16()], [x, x], "no fused kernel for tensors of several dtypes"),
        ([x.half()], [x.half()], "for torch.float16 on cpu no fused kernel is written yet"),
    ):
        with pytest.raises(RuntimeError, match=message):
            fused(student, teacher)


def test_the_operators_themselves_check_their_input() -> None:
    forward, backward = torch.ops.mvat.attention_transfer_loss, torch.ops.mvat.attention_transfer_loss_backward
    x, q = torch.randn(2, 3, 5), torch.rand(2, 5)
    for student, teacher, p, message in (
        ([], [x], 2.0, "expected at least one pair"),
        ([x], [x, x], 2.0, "expected as many teachers as students"),
        ([x], [x[0, 0]], 2.0, r"expected features \[B, C, T\] or maps \[B, T\]"),
        ([q[:, :0]], [q[:, :0]], 2.0, "at least one sample"),
        ([x], [q[:, 1:]], 2.0, "pair 0 must agree in batch and time"),
        ([x], [x.double()], 2.0, "expected tensors of one dtype"),
        ([x.half()], [x.half()], 2.0, "expected tensors of one dtype, float32 or float64"),
        ([x], [x], 0.5, "finite p >= 1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            forward(student, teacher, p, True)
    losses, maps, scalars = forward([x], [x], 2.0, True)
    for wrong in ((losses[:0], maps, scalars), (losses, maps[1:], scalars), (losses, maps, scalars[:1])):
        with pytest.raises(RuntimeError, match="as the forward pass gives them"):
            backward(wrong[0], [x], *wrong[1:], 2.0, True)
    with pytest.raises(RuntimeError, match="in the students' dtype"):
        backward(losses.double(), [x], maps, scalars, 2.0, True)
