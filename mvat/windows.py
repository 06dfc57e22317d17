"""Long audio in overlapped windows: where they start, and how their results become one signal again.

Two neighbours overlap by at least a second and a half. The outer thirds only give their windows something to hear; in
the middle third one result fades into the other, with weights whose sum is 1. So a module that looks no further than
half a second gives what it would give at once, and two results that differ change over without a step. MANNER's two
views of attention look at all of the window, but the error of its edges is gone after a quarter of a second: beyond it
trained networks differ from the whole recording's result as much as in the middle of the window.
"""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

__all__ = ["around", "cut", "starts", "through_windows"]

#: Samples at 16 kHz by which neighbours overlap at least; shorter windows by half their length.
OVERLAP = 24000


def starts(length: int, size: int) -> list[int]:
    """The first samples of windows of `size` samples that cover `length`, spread evenly with the fewest windows.

    All are of one size, also the last. A size of `length` or more means one window, of `length`.
    """
    if size >= length:
        return [0]
    overlap = _overlap(size)
    count = math.ceil((length - overlap) / (size - overlap))
    return [k * (length - size) // (count - 1) for k in range(count)]


def around(first: list[int], size: int, length: int, span: int) -> list[int]:
    """The first samples of stretches of `span` samples, one in the middle of which every window lies.

    At the ends of the audio, `length` samples, the stretch ends with it: the window is then not in its middle.
    """
    return [min(max(start + (size - span) // 2, 0), length - span) for start in first]


def cut(blocks: Iterable[Tensor], first: list[int], size: int) -> Iterator[Tensor]:
    """The windows [channels, size] of audio in blocks that start at `first`, in ascending order.

    Of the audio no more is held than the next window needs.
    """
    source = iter(blocks)
    held, begin = next(source), 0
    for start in first:
        while begin + held.shape[1] < start + size:
            held = torch.cat([held[:, max(start - begin, 0) :], next(source)], 1)
            begin = max(start, begin)
        yield held[:, start - begin : start - begin + size]


def through_windows(
    blocks: Iterable[Tensor], length: int, size: int, run: Callable[[Tensor], Tensor], group: int = 1
) -> Iterator[Tensor]:
    """Audio of any length through a function of windows, with the memory of a few of them.

    Args:
        blocks: The audio, [channels, T_i], `length` samples altogether.
        length: Samples a channel.
        size: Samples of a window, at least 6; `length` or more is a single one, of `length`.
        run: Takes windows [n, channels, size] and gives as many of the same shape.
        group: The most windows, n, to give it at once.

    Yields:
        The results, [channels, T_j], `length` samples altogether.
    """
    size = min(size, length)
    first = starts(length, size)
    fade = _overlap(size) // 3
    # The fade between two windows lies in the middle of their overlap.
    joins = [(a + size + b - fade) // 2 for a, b in zip(first, first[1:], strict=False)]
    begins, ends = [0, *joins], [*joins, length]
    tail: Tensor | None = None
    for k, start, window in _results(cut(blocks, first, size), first, run, group):
        piece = window[:, begins[k] - start : ends[k] - start]
        if tail is not None:
            # Half a period of a cosine, at the middles of the samples.
            phase = (torch.arange(fade, dtype=piece.dtype, device=piece.device) + 0.5) * (math.pi / fade)
            rise = (1 - phase.cos()) / 2
            piece = torch.cat([torch.lerp(tail, piece[:, :fade], rise), piece[:, fade:]], 1)
        tail = window[:, ends[k] - start : ends[k] - start + fade]
        yield piece


def _overlap(size: int) -> int:
    return min(OVERLAP, size // 2)


def _results(
    windows: Iterable[Tensor], first: list[int], run: Callable[[Tensor], Tensor], group: int
) -> Iterator[tuple[int, int, Tensor]]:
    """The number, start and result [channels, size] of every window."""
    source = iter(windows)
    for k in range(0, len(first), group):
        members = range(k, min(k + group, len(first)))
        for i, result in zip(members, run(torch.stack([next(source) for _ in members])), strict=True):
            yield i, first[i], result
