"""Windows: where they start, and that their results make one signal without a seam."""

from collections.abc import Iterator

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mvat.windows import OVERLAP, around, starts, through_windows


def chopped(x: Tensor, sizes: list[int]) -> Iterator[Tensor]:
    """x [channels, T] in blocks of these sizes, over and over."""
    while x.shape[1]:
        yield x[:, : sizes[0]]
        x, sizes = x[:, sizes[0] :], [*sizes[1:], sizes[0]]


@settings(max_examples=50)
@given(length=st.integers(1, 10**6), size=st.integers(1000, 10**6))
def test_windows_cover_all_and_overlap_enough(length: int, size: int) -> None:
    first = starts(length, size)
    overlap = min(OVERLAP, size // 2)
    if size >= length:
        assert first == [0]
        return
    assert first[0] == 0 and first[-1] + size == length
    steps = [b - a for a, b in zip(first, first[1:], strict=False)]
    assert max(steps) - min(steps) <= 1 and max(steps) <= size - overlap
    assert (len(first) - 1) * (size - overlap) + overlap < length, "one window fewer would do"


@settings(max_examples=30)
@given(length=st.integers(1000, 10**5), size=st.integers(600, 10**4), more=st.integers(0, 3000))
def test_stretches_lie_around_their_windows(length: int, size: int, more: int) -> None:
    size = min(size, length)
    span = min(size + more, length)
    for start, stretch in zip(starts(length, size), around(starts(length, size), size, length, span), strict=True):
        assert 0 <= stretch <= start and start + size <= stretch + span <= length
        if 0 < stretch < length - span:
            assert abs((start - stretch) - (stretch + span - start - size)) <= 1


@settings(max_examples=30)
@given(
    length=st.integers(1, 4000), size=st.integers(6, 700), group=st.integers(1, 3), blocks=st.lists(st.integers(1, 900))
)
def test_what_looks_no_further_than_a_third_of_the_overlap_sees_no_seam(
    length: int, size: int, group: int, blocks: list[int]
) -> None:
    torch.manual_seed(length)
    x = torch.randn(2, length, dtype=torch.float64)
    reach = min(OVERLAP, min(size, length) // 2) // 3
    seen = []

    def filtered(rows: Tensor) -> Tensor:
        """Each sample with those that are `reach` before and after it."""
        padded = torch.nn.functional.pad(rows, (reach, reach))
        n = rows.shape[-1]
        return padded[..., :n] - 2 * rows + 3 * padded[..., 2 * reach :]

    def run(windows: Tensor) -> Tensor:
        seen.append(windows.shape)
        return filtered(windows)

    pieces = list(through_windows(chopped(x, [*blocks, 7]), length, size, run, group))
    torch.testing.assert_close(torch.cat(pieces, 1), filtered(x), rtol=0, atol=1e-10)
    assert max(shape[0] for shape in seen) <= group and {shape[1:] for shape in seen} == {(2, min(size, length))}


def test_results_that_differ_change_over_without_a_step() -> None:
    """Every window of silence gives its own level: the fade rises as slowly as its length allows."""
    size, levels = 3000, iter(torch.arange(1.0, 100))

    def run(windows: Tensor) -> Tensor:
        return windows + torch.stack([next(levels) for _ in windows])[:, None, None]

    y = torch.cat(list(through_windows([torch.zeros(1, 20000)], 20000, size, run, 2)), 1)[0]
    assert y[0] == 1 and y[-1] == len(starts(20000, size))
    steps = y.diff()
    fade = size // 2 // 3
    assert steps.min() >= 0 and steps.max() <= 1.01 * torch.pi / 2 / fade


def test_memory_is_that_of_a_few_windows() -> None:
    """The audio is read as it is needed: never more than a window and a block ahead of what was given."""
    size, block, length = 1000, 100, 50000
    read = 0

    def blocks() -> Iterator[Tensor]:
        nonlocal read
        for _ in range(0, length, block):
            read += block
            yield torch.zeros(1, block)

    given_out = 0
    for piece in through_windows(blocks(), length, size, lambda windows: windows):
        given_out += piece.shape[1]
        assert read - given_out <= size + block
    assert given_out == read == length
