import pytest
import torch

from mvat.kernels import current_backend, use_backend
from mvat.models import PRESETS, Manner, count_flops, count_parameters


@pytest.mark.parametrize(
    "preset, millions, gigaflops",
    [
        ("base", 24.07, 76.8),
        ("large", 95.5, 245),
        ("small", 21.25, 27),
        ("s-19.8gf", 4.0, 19.8),
        ("s-8.1gf", 1.119, 8.06),
        ("s-4.1gf", 0.576, 4.1),
    ],
)
def test_presets_cost_what_their_documentation_says(preset: str, millions: float, gigaflops: float) -> None:
    with torch.device("meta"):
        model = Manner(**PRESETS[preset])
    assert count_parameters(model) == pytest.approx(1e6 * millions, rel=0.02)
    assert count_flops(PRESETS[preset]) == pytest.approx(1e9 * gigaflops, rel=0.02)


def test_all_presets_are_tested() -> None:
    assert PRESETS.keys() == {"base", "large", "small", "s-19.8gf", "s-8.1gf", "s-4.1gf"}


def test_from_preset() -> None:
    model = Manner.from_preset("s-4.1gf")
    assert model.config["hidden"] == 8 and model.training
    with pytest.raises(ValueError, match="the preset must be one of base, large, .*, got 's-9gf'"):
        Manner.from_preset("s-9gf")


def test_frozen_parameters_do_not_count() -> None:
    model = Manner(hidden=6, depth=1, segment_len=8)
    everything = count_parameters(model)
    model.manner_block.linear[0].weight.requires_grad_(False)
    assert count_parameters(model) == everything - 12 * 12


def test_flops_by_hand() -> None:
    """A network of one level, two FLOPs a multiply-add, with keys, values and attention of every head."""
    h, kernel, stride, segment, head, padded = 6, 8, 4, 8, 2, 160
    deep = (padded - kernel) // stride + 1

    def block(c: int, t: int) -> int:
        n = c // 3
        tokens, width = (t + segment) // (segment // 2) + 1, segment * head
        chunked = tokens * segment
        channel = 2 * (2 * n * (n // 2))
        project = n * 4 * tokens * segment * head * width
        attend = n * 2 * head * tokens * tokens * width
        local = n * chunked * 31 + chunked * 2 * 7
        convs = t * (3 * c * n + 3 * 3 * n * n + 3 * n * c + c * c + 3 * c * c)
        return channel + project + attend + local + convs

    def residual(a: int, b: int, t: int) -> int:
        return t * (2 * a * a + 31 * a + a * b + b * b + a * b)

    encoder = deep * h * h * kernel + residual(h, 2 * h, deep) + block(2 * h, deep)
    decoder = residual(2 * h, h, deep) + deep * h * h * kernel + block(h, padded)
    ends = padded * (3 * h + 3 * h + 3 * h * h) + deep * 4 * h * h
    config = {"hidden": h, "depth": 1, "segment_len": segment, "head": head}
    assert count_flops(config, seconds=padded / 16_000) == 2 * (encoder + decoder + ends)


def test_counting_leaves_the_back_end_as_it_was() -> None:
    with use_backend("fused"):
        count_flops({"hidden": 6, "depth": 1, "segment_len": 8}, seconds=0.01)
        assert current_backend() == "fused"
