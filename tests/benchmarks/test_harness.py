import pytest
import torch
from torch import Tensor

from benchmarks import memory
from benchmarks.floors import Rates
from benchmarks.harness import Case, Settings, Variant, call, distance, measure, traffic
from benchmarks.results import Row
from mvat import kernels
from mvat.kernels import native


class KnownRates(Rates):
    """Rates that need no measurement."""

    def __init__(self, flops: float = 1e12, bandwidth: float = 1e12) -> None:
        self.known, self.known_bandwidth = flops, bandwidth

    def peaks(self, dtype: torch.dtype) -> dict[str, float]:
        return {"product": self.known}

    def bandwidth(self, working_set: int) -> float:
        return self.known_bandwidth


def product(x: Tensor, w: Tensor) -> Tensor:
    return x @ w


def product_case(**others: Variant) -> Case:
    return Case(
        "product",
        {"n": 16},
        inputs=lambda: [torch.randn(16, 16, requires_grad=True), torch.randn(16, 16)],
        reference=lambda: product,
        variants={"eager": Variant(lambda: product)} | others,
    )


def rows_of(case: Case, settings: Settings, rates: Rates | None = None) -> dict[tuple[str, str], Row]:
    return {(row.pass_name, row.variant): row for row in measure(case, settings, rates)}


QUICK = Settings(quick=True)
BRIEF = Settings(budget=0.0)


def test_a_wrong_answer_is_reported_fails_and_is_not_timed() -> None:
    rows = rows_of(product_case(wrong=Variant(lambda: lambda x, w: x @ w + 1e-2)), BRIEF, KnownRates())
    wrong, right = rows["forward", "wrong"], rows["forward", "eager"]
    assert wrong.status == "wrong" and wrong.samples == [] and "relative error of the outputs" in wrong.problem
    assert right.status == "timed" and len(right.samples) >= 8 and right.error < 1e-6 and not right.problem


def test_a_wrong_gradient_is_found_under_a_right_output() -> None:
    rows = rows_of(product_case(cut=Variant(lambda: lambda x, w: (2 * x).detach() @ w - x @ w)), QUICK)
    assert rows["forward", "cut"].status == "checked"
    assert rows["forward+backward", "cut"].status == "wrong"
    assert "gradients" in rows["forward+backward", "cut"].detail


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_wrong(bad: float) -> None:
    rows = rows_of(product_case(bad=Variant(lambda: lambda x, w: x @ w * bad)), QUICK)
    assert rows["forward", "bad"].status == "wrong"


def test_a_variant_that_raises_fails_and_the_others_go_on() -> None:
    def broken(x: Tensor, w: Tensor) -> Tensor:
        raise RuntimeError("no such kernel")

    case = product_case(broken=Variant(lambda: broken, algorithm=lambda: product), last=Variant(lambda: product))
    rows = rows_of(case, QUICK)
    assert rows["forward", "broken"].status == "failed" and "no such kernel" in rows["forward", "broken"].problem
    assert rows["forward", "last"].status == "checked"


def test_what_is_missing_is_a_row_and_no_problem() -> None:
    rows = rows_of(product_case(peer=Variant(lambda: product, missing="not installed: peer")), QUICK)
    assert (rows["forward", "peer"].status, rows["forward", "peer"].detail) == ("absent", "not installed: peer")
    assert not rows["forward", "peer"].problem


def test_what_does_not_fit_is_a_row_with_its_need() -> None:
    def huge(x: Tensor) -> Tensor:
        return x.expand(10**6, 10**7).contiguous()  # 40 TB

    case = Case("huge", {}, lambda: [torch.zeros(1, 1)], lambda: huge, {"eager": Variant(lambda: huge)}, ("forward",))
    row = rows_of(case, BRIEF, KnownRates())["forward", "eager"]
    assert row.status == "does not fit" and row.detail.startswith("needs 40000.0 GB") and not row.problem


def test_what_takes_too_long_is_left_out() -> None:
    row = rows_of(product_case(), Settings(call_limit=1.0), KnownRates(flops=4 * 2 * 16**3 / 3))["forward", "eager"]
    assert row.status == "left out" and row.detail == "about 3 s a call, the limit is 1 s"


def test_a_share_of_the_floor_above_the_limit_fails() -> None:
    row = rows_of(product_case(), BRIEF, KnownRates(flops=1e13, bandwidth=1.0))["forward", "eager"]
    assert row.status == "timed" and row.share > 1.1
    assert "the count or the rate is wrong" in row.problem


def test_flops_and_bytes_of_the_floor() -> None:
    rows = rows_of(product_case(), QUICK)
    assert rows["forward", "eager"].flops == 2 * 16**3
    assert rows["forward+backward", "eager"].flops == 2 * 2 * 16**3
    tensor = 16 * 16 * 4
    assert rows["forward", "eager"].moved == rows["forward", "eager"].working_set == 3 * tensor
    # Backward: reads the output's gradient and x again, writes x's gradient.
    x = torch.randn(16, 16, requires_grad=True)
    outputs, gradients = call(product, [x, torch.randn(16, 16)], "forward+backward")
    assert traffic([x, x], outputs, gradients) == (6 * tensor, 4 * tensor)


def test_a_step_gives_its_loss_and_its_gradients() -> None:
    case = Case(
        "step", {}, lambda: [torch.ones(2)], lambda: lambda x: [x.sum(), x, x],
        {"eager": Variant(lambda: lambda x: [x.sum(), x, 2 * x])}, ("step",),
    )  # fmt: skip
    row = rows_of(case, QUICK)["step", "eager"]
    assert row.status == "wrong" and row.detail.startswith("relative error of the gradients 1.0")


def test_every_variant_starts_from_the_same_random_state() -> None:
    def make():
        shift = torch.randn(16)
        return lambda x, w: x @ w + shift.to(x.dtype)

    case = product_case()
    variants = {name: Variant(make) for name in ("eager", "other")}
    rows = rows_of(Case("shifted", {}, case.inputs, make, variants), QUICK)
    assert {row.status for row in rows.values()} == {"checked"}


def test_distance() -> None:
    x = torch.tensor([3.0, 4.0])
    assert distance([x], [x]) == 0 and distance([], []) == 0
    assert distance([x + torch.tensor([0.0, 0.5])], [x.double()]) == pytest.approx(0.1)
    assert distance([x], [x, x]) == torch.inf and distance([x], [x[:1]]) == torch.inf
    assert distance([x * torch.nan], [x]) == torch.inf
    # Beside a large tensor, noise in one that should be zero is measured against a hundredth of the large one.
    assert distance([x, torch.full((2,), 1e-9)], [x, torch.zeros(2)]) < 1e-7


def test_memory_is_foreseen_without_being_taken() -> None:
    def body() -> Tensor:
        x = torch.zeros(1000, 1000)
        y = x + 1
        del x
        z = y + 1
        return z

    need = memory.foresee(body)
    assert need.peak_bytes == 2 * 4_000_000 and need.flops == 0


def test_attention_on_a_cpu_counts() -> None:
    def body() -> Tensor:
        x = torch.zeros(3, 1, 50, 8, requires_grad=True)
        y = torch.nn.functional.scaled_dot_product_attention(x, x, x)
        y.sum().backward()
        return x.grad

    assert memory.foresee(body).flops == 3 * 50 * 50 * 8 * (4 + 10)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_grouped_convolution_counts_its_groups_backward_too(transposed: bool) -> None:
    def body() -> Tensor:
        x = torch.zeros(2, 6, 50, requires_grad=True)
        weight = torch.zeros(6, 1, 5, requires_grad=True)
        conv = torch.nn.functional.conv_transpose1d if transposed else torch.nn.functional.conv1d
        y = conv(x, weight, groups=6)
        y.sum().backward()
        return x.grad

    positions = 50 if transposed else 46
    assert memory.foresee(body).flops == 3 * 2 * 2 * 6 * 5 * positions


@pytest.mark.skipif(native.missing("global_attention") is not None, reason="no kernel")
def test_products_of_fused_operators_count() -> None:
    def attend() -> Tensor:
        x = torch.zeros(2, 3, 640, requires_grad=True)
        kernels.global_attention(x, *(torch.zeros(64, 64) for _ in range(4))).sum().backward()
        return x.grad

    absorbed = 2 * 2 * 64**3  # A and M, outside the operator
    assert memory.foresee(attend).flops == absorbed + 7 * (2 * 3 * 2 * 23**2 * 64 * 2 // 3)

    def mask(training: bool) -> Tensor:
        x = torch.zeros(2, 3, 640, requires_grad=True)
        norms = [kernels.Norm(*(torch.zeros(channels) for _ in range(4))) for channels in (3, 1)]
        y = kernels.local_attention(x, torch.zeros(3, 1, 31), norms[0], torch.zeros(1, 2, 7), norms[1], 64, training)
        y.sum().backward()
        return x.grad

    assert memory.foresee(lambda: mask(False)).flops == (1 + 2) * 2 * 2 * 3 * 640 * 31
    assert memory.foresee(lambda: mask(True)).flops == (2 + 2) * 2 * 2 * 3 * 640 * 31


def test_peak_memory_sees_what_a_call_held_and_gave_back() -> None:
    def body() -> None:
        torch.ones(8_000_000).add_(1)

    assert 30e6 < memory.peak_extra(body, "cpu") < 60e6
