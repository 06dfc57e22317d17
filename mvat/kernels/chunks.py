"""Overlapped chunks of a signal, the geometry that the global and the local view share.

With C = segment_len and h = C / 2, the signal of T samples is padded by C zeros on both sides and seen as
P = floor((T + C) / h) + 1 windows of C samples, hop h. Every sample lies in exactly two of them.
"""

import torch.nn.functional as F
from torch import Tensor


def chunk_count(length: int, segment_len: int) -> int:
    """P, the chunks of a signal of this length."""
    return (length + segment_len) // (segment_len // 2) + 1


def chunk(x: Tensor, segment_len: int) -> Tensor:
    """[..., T] to [..., P, C]: windows of the padded signal, a strided view that copies nothing but the padding."""
    return F.pad(x, (segment_len, segment_len)).unfold(-1, segment_len, segment_len // 2)


def overlap_add(chunks: Tensor, length: int) -> Tensor:
    """[..., P, C] to [..., length], the inverse geometry of `chunk`: the sum of the two chunks a sample lies in.

    Block j of h samples takes the first half of chunk j and the second half of chunk j - 1. The padded signal's
    first block with two chunks is block 1; the signal itself starts one block later.
    """
    half = chunks.shape[-1] // 2
    halves = chunks.unflatten(-1, (2, half))
    blocks = halves[..., 1:, 0, :] + halves[..., :-1, 1, :]
    return blocks.flatten(-2)[..., half : half + length]
