"""The global view on a GPU: `mvat.kernels.global_attention` with one head, forward and backward, in Triton.

Row p of the padded signal xp (C zeros in front) is chunk p, xp[h p : h p + C] with h = C / 2: no chunk is ever copied,
and a window is query, key and value at once. Scores never reach memory:

    q = X A log2(e)          s = q X'          m = max(s), at least 0: there is always a chunk of padding
    l = sum 2^(s - m)          O = 2^(s - m) X / l          Y = O M' / 2
    block j of y = Y[j + 1, h:] + Y[j + 2, :h]

A tile of R rows gives R - 1 blocks: its last row is computed once more by the next tile. Rows past the last chunk are
loaded as zeros and taken out of l at the end, so that no loop has a mask. Kept are m, l (in `softmax`) and O (`mixed`).
Backward, with dY the windows of the padded gradient, e = 2^(s - m), and everything of a query divided by its l once:

    dO = dY M / (2 l)          delta = rowsum(dO O)          dS = e (dO X' - delta)          dQ = dS X
    dX = dQ A' + dS' (X A) + e' dO          dA = X' dQ          dM = dY' O / 2          dx = overlap_add(dX)

in one kernel over queries (q, dO, dQ), one over keys (dx) and one for the weights (partial sums). Nothing is atomic:
the order of every sum depends on the sizes and the device alone. Sequences of few chunks are taken whole, several in a
tile, by one kernel forward and one backward that read x as it is: there the launches are what costs.

Products take bfloat16 as it is, float32 as tf32 or in three tf32 products (tf32x3), whichever
torch.backends.cuda.matmul.fp32_precision asks for, and float16 as tf32, which has its mantissa and float32's range:
neither q nor dO can overflow.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvat.kernels.triton import common
from mvat.kernels.triton.common import TYPES, dense_rows, operand
from mvat.kernels.triton.plans import Kind, Plan, choose

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
PAD_BLOCK = 1024


@triton.jit
def _windows(signal, rows, count, C: tl.constexpr):
    """Rows of C samples, hop C / 2, of a padded signal; zeros past `count`. Masked by row, loads stay 16 bytes wide."""
    return tl.load(signal + rows[:, None] * (C // 2) + tl.arange(0, C)[None, :], mask=rows[:, None] < count, other=0.0)


@triton.jit
def _square(weight, factor, C: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """A or M, times a factor."""
    c = tl.arange(0, C)
    return operand(tl.load(weight + c[:, None] * C + c[None, :]) * factor, DTYPE, PRECISION)


@triton.jit
def _queries(x, a, C: tl.constexpr, PRECISION: tl.constexpr):
    """In base 2, rounded once, as an operand: forward and backward must see the very same scores.

    A is taken in two parts, its rounding and the rest: rounded alone it moved the scores as much as q's rounding does.
    """
    weight = _square(a, 1.0, C, tl.float32, "ieee")
    high = operand(weight, x.dtype, PRECISION)
    q = tl.dot(x, high, input_precision=PRECISION)
    if PRECISION != "tf32x3":
        q = tl.dot(x, operand(weight - high.to(tl.float32), x.dtype, PRECISION), q, input_precision=PRECISION)
    return operand(q * LOG2E, x.dtype, PRECISION)


@triton.jit
def _overlap(y, R: tl.constexpr, H: tl.constexpr):
    """[R, 2 H] to [R, H]: y[r, H:] + y[r + 1, :H]; the last row is not to be used."""
    first, second = tl.split(tl.permute(tl.reshape(y, [R, 2, H]), [0, 2, 1]))
    following = tl.minimum(tl.arange(0, R) + 1, R - 1)
    return second + tl.gather(first, tl.broadcast_to(following[:, None], [R, H]), 0)


@triton.jit
def _store_blocks(target, y, rows, own, T, R: tl.constexpr, C: tl.constexpr):
    """The rows' overlapped blocks into a sequence of T samples; the block of rows p and p + 1 begins at h (p - 1)."""
    H: tl.constexpr = C // 2
    t = (rows - 1)[:, None] * H + tl.arange(0, H)[None, :]
    tl.store(target + t, _overlap(y, R, H), mask=own[:, None] & (t >= 0) & (t < T))


@triton.jit
def _finish(acc, top, total, m, y, softmax, mixed, s, rows, P, T, keep, DTYPE: tl.constexpr, C: tl.constexpr,
            R: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """From a tile's weighted sums to its blocks of y; what the backward pass needs is stored where `keep` is not 0."""
    r = tl.arange(0, R)
    o = acc / total[:, None]
    if keep:  # the last row belongs to the next tile
        at = s * P + rows
        own = (rows < P) & ((r < R - 1) | (rows == P - 1))
        tl.store(mixed + at[:, None] * C + tl.arange(0, C)[None, :], o, mask=own[:, None])
        tl.store(softmax + 2 * at, top, mask=own)
        tl.store(softmax + 2 * at + 1, total, mask=own)
    weight = tl.trans(_square(m, 0.5, C, DTYPE, PRECISION))
    out = tl.dot(operand(o, DTYPE, PRECISION), weight, input_precision=PRECISION)
    _store_blocks(y + s * T, out, rows, r < R - 1, T, R, C)


_LENGTHS = ["P", "T", "S", "splits", "keep", "n", "x_batch", "x_channel", "g_batch", "g_channel"]


@triton.jit(do_not_specialize=_LENGTHS)
def pad_kernel(x_in, padded, P, T, n, x_batch, x_channel, x_sample, DTYPE: tl.constexpr, C: tl.constexpr,
               BLOCK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """[B, n, T] of any strides to [S, h (P + 1)]: C zeros in front, every chunk at 16 bytes, values as operands."""
    width = (P + 1) * (C // 2)
    blocks = tl.cdiv(width, BLOCK)
    s = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    source = x_in + (s // n) * x_batch + (s % n) * x_channel
    t = (at - C).to(tl.int64)
    values = tl.load(source + t * x_sample, mask=(t >= 0) & (t < T), other=0.0)
    tl.store(padded + s * width + at, operand(values, DTYPE, PRECISION), mask=at < width)


@triton.jit(do_not_specialize=_LENGTHS)
def forward_kernel(xp, a, m, y, softmax, mixed, sums, P, T, S, splits, keep, C: tl.constexpr, R: tl.constexpr,
                   STEP: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    """A tile of queries over all keys; with SPLIT over those of one part, whose m, l and l O go to softmax and sums."""
    OWN: tl.constexpr = R if SPLIT else R - 1
    tiles = tl.cdiv(P, OWN) if SPLIT else tl.cdiv(P - 1, OWN)
    s = (tl.program_id(0) // tiles).to(tl.int64)
    rows = (tl.program_id(0) % tiles) * OWN + tl.arange(0, R)
    xp += s * (P + 1) * (C // 2)
    x = _windows(xp, rows, P, C)
    q = _queries(x, a, C, PRECISION)
    begin, end = 0, P
    if SPLIT:
        part = tl.cdiv(tl.cdiv(P, STEP), splits) * STEP
        begin = tl.minimum(tl.program_id(1) * part, P)
        end = tl.minimum(begin + part, P)
    top = tl.zeros([R], tl.float32)
    total = tl.zeros([R], tl.float32)
    acc = tl.zeros([R, C], tl.float32)
    for key in range(begin, end, STEP):
        k = _windows(xp, key + tl.arange(0, STEP), P, C)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        higher = tl.maximum(top, tl.max(scores, 1))
        e = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(e, 1)
        acc = tl.dot(operand(e, k.dtype, PRECISION), k, acc * shrink[:, None], input_precision=PRECISION)
        top = higher
    past = tl.cdiv(end - begin, STEP) * STEP - (end - begin)
    total -= past * tl.exp2(-top)
    if SPLIT:
        at = (tl.program_id(1) * S + s) * P + rows
        tl.store(softmax + 2 * at, top, mask=rows < P)
        tl.store(softmax + 2 * at + 1, total, mask=rows < P)
        tl.store(sums + at[:, None] * C + tl.arange(0, C)[None, :], acc, mask=rows[:, None] < P)
    else:
        _finish(acc, top, total, m, y, softmax, mixed, s, rows, P, T, keep, x.dtype, C, R, PRECISION)


@triton.jit(do_not_specialize=_LENGTHS)
def combine_kernel(parts, sums, m, y, softmax, mixed, P, T, S, splits, keep, DTYPE: tl.constexpr, C: tl.constexpr,
                   R: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The parts of the keys put together, in their order."""
    tiles = tl.cdiv(P - 1, R - 1)
    s = (tl.program_id(0) // tiles).to(tl.int64)
    rows = (tl.program_id(0) % tiles) * (R - 1) + tl.arange(0, R)
    top = tl.zeros([R], tl.float32)
    total = tl.zeros([R], tl.float32)
    acc = tl.zeros([R, C], tl.float32)
    for split in range(0, splits):
        at = (split * S + s) * P + rows
        part_top = tl.load(parts + 2 * at, mask=rows < P, other=0.0)
        part_total = tl.load(parts + 2 * at + 1, mask=rows < P, other=1.0)
        part = tl.load(sums + at[:, None] * C + tl.arange(0, C)[None, :], mask=rows[:, None] < P, other=0.0)
        higher = tl.maximum(top, part_top)
        total = total * tl.exp2(top - higher) + part_total * tl.exp2(part_top - higher)
        acc = acc * tl.exp2(top - higher)[:, None] + part * tl.exp2(part_top - higher)[:, None]
        top = higher
    _finish(acc, top, total, m, y, softmax, mixed, s, rows, P, T, keep, DTYPE, C, R, PRECISION)


@triton.jit(do_not_specialize=_LENGTHS)
def queries_kernel(xp, gp, a, m, softmax, mixed, q_out, do_out, dq_out, stat, P, C: tl.constexpr, R: tl.constexpr,
                   STEP: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Backward over a tile of queries: q, dO and dQ [S, P, C]; stat [S, P, 4] = m, nothing, delta ln 2, nothing."""
    tiles = tl.cdiv(P, R)
    s = (tl.program_id(0) // tiles).to(tl.int64)
    rows = (tl.program_id(0) % tiles) * R + tl.arange(0, R)
    xp += s * (P + 1) * (C // 2)
    gp += s * (P + 1) * (C // 2)
    at, there = s * P + rows, rows < P
    cells = at[:, None] * C + tl.arange(0, C)[None, :]
    x = _windows(xp, rows, P, C)
    q = _queries(x, a, C, PRECISION)
    top = tl.load(softmax + 2 * at, mask=there, other=0.0)
    total = tl.load(softmax + 2 * at + 1, mask=there, other=1.0)
    weight = _square(m, 0.5, C, x.dtype, PRECISION)
    do = tl.dot(_windows(gp, rows, P, C), weight, input_precision=PRECISION)
    do = operand(do / total[:, None], x.dtype, PRECISION)
    o = tl.load(mixed + cells, mask=there[:, None], other=0.0)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(q_out + cells, q, mask=there[:, None])
    tl.store(do_out + cells, do, mask=there[:, None])
    tl.store(stat + 4 * at, top, mask=there)
    tl.store(stat + 4 * at + 2, delta * LN2, mask=there)
    dq = tl.zeros([R, C], tl.float32)
    for key in range(0, P, STEP):  # rows past P are zeros: they add nothing to dQ
        k = _windows(xp, key + tl.arange(0, STEP), P, C)
        e = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) - top[:, None])
        ds = e * (tl.dot(do, tl.trans(k), input_precision=PRECISION) - delta[:, None])
        dq = tl.dot(operand(ds, k.dtype, PRECISION), k, dq, input_precision=PRECISION)
    tl.store(dq_out + cells, operand(dq, x.dtype, PRECISION), mask=there[:, None])


@triton.jit(do_not_specialize=_LENGTHS)
def keys_kernel(xp, a, q_in, do_in, dq_in, stat, dx, P, T, C: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
    """Backward over a tile of keys: their part as key and value, then as query, in one sum; its blocks of dx."""
    tiles = tl.cdiv(P - 1, R - 1)
    s = (tl.program_id(0) // tiles).to(tl.int64)
    r, c = tl.arange(0, R), tl.arange(0, C)
    rows = (tl.program_id(0) % tiles) * (R - 1) + r
    x = _windows(xp + s * (P + 1) * (C // 2), rows, P, C)
    q_in += s * P * C
    do_in += s * P * C
    stat += s * P * 4
    acc = tl.zeros([R, C], tl.float32)
    for query in range(0, P, STEP):  # rows past P: q = dO = delta = 0, nothing is added
        at = query + tl.arange(0, STEP)
        cells, there = at[:, None] * C + c[None, :], at[:, None] < P
        q = tl.load(q_in + cells, mask=there, other=0.0)
        do = tl.load(do_in + cells, mask=there, other=0.0)
        # One load of 4 STEP values, at least a value a thread: Triton repeats a shorter one in every thread.
        packed = tl.load(stat + at[:, None] * 4 + tl.arange(0, 4)[None, :], mask=there, other=0.0)
        top, delta = tl.split(tl.split(tl.reshape(packed, [STEP, 2, 2]))[0])
        e = tl.exp2(tl.dot(x, tl.trans(q), input_precision=PRECISION) - top[None, :])
        ds = e * (tl.dot(x, tl.trans(do), input_precision=PRECISION) * LN2 - delta[None, :])  # q is in base 2
        acc = tl.dot(operand(e, x.dtype, PRECISION), do, acc, input_precision=PRECISION)
        acc = tl.dot(operand(ds, x.dtype, PRECISION), q, acc, input_precision=PRECISION)
    dq = tl.load(dq_in + (s * P + rows[:, None]) * C + c[None, :], mask=rows[:, None] < P, other=0.0)
    weight = tl.trans(_square(a, 1.0, C, x.dtype, PRECISION))
    acc = tl.dot(dq, weight, acc, input_precision=PRECISION)
    _store_blocks(dx + s * T, acc, rows, r < R - 1, T, R, C)


@triton.jit
def _store_partials(partials, da, dm, C: tl.constexpr):
    c = tl.arange(0, C)
    target = partials + tl.program_id(0) * 2 * C * C + c[:, None] * C + c[None, :]
    tl.store(target, da)
    tl.store(target + C * C, dm * 0.5)


@triton.jit(do_not_specialize=_LENGTHS)
def weights_kernel(xp, gp, mixed, dq_in, partials, P, S, C: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr):
    """Partial sums of dA and dM over the tiles of a program's share."""
    c, tiles = tl.arange(0, C), tl.cdiv(P, R)
    da = tl.zeros([C, C], tl.float32)
    dm = tl.zeros([C, C], tl.float32)
    for i in range(tl.program_id(0), S * tiles, tl.num_programs(0)):
        s = (i // tiles).to(tl.int64)
        rows = (i % tiles) * R + tl.arange(0, R)
        cells, there = (s * P + rows[:, None]) * C + c[None, :], rows[:, None] < P
        x = _windows(xp + s * (P + 1) * (C // 2), rows, P, C)
        g = _windows(gp + s * (P + 1) * (C // 2), rows, P, C)
        dq = tl.load(dq_in + cells, mask=there, other=0.0)
        o = operand(tl.load(mixed + cells, mask=there, other=0.0), x.dtype, PRECISION)
        da = tl.dot(tl.trans(x), dq, da, input_precision=PRECISION)
        dm = tl.dot(tl.trans(g), o, dm, input_precision=PRECISION)
    _store_partials(partials, da, dm, C)


@triton.jit
def _whole(signal, s, row, T, n, batch, channel, there, C: tl.constexpr):
    """Chunks of a signal [B, n, T] that is not padded."""
    t = (row - 2)[:, None] * (C // 2) + tl.arange(0, C)[None, :]
    start = (s // n) * batch + (s % n) * channel
    return tl.load(signal + start[:, None] + t, mask=there[:, None] & (t >= 0) & (t < T), other=0.0)


@triton.jit(do_not_specialize=_LENGTHS)
def small_forward_kernel(x_in, a, m, y, softmax, mixed, P, T, S, n, keep, x_batch, x_channel, DTYPE: tl.constexpr,
                         C: tl.constexpr, R: tl.constexpr, PACK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """PACK whole sequences of at most R chunks in one tile."""
    b = tl.arange(0, R * PACK)
    row, s = b % R, (tl.program_id(0) * PACK + b // R).to(tl.int64)
    there = (s < S) & (row < P)
    x = operand(_whole(x_in, s, row, T, n, x_batch, x_channel, there, C), DTYPE, PRECISION)
    q = _queries(x, a, C, PRECISION)
    # A weight of 0 times another sequence's NaN or infinity would be NaN: scores carry those, within a sequence.
    zeros = x.to(tl.float32) * 0.0
    scores = tl.dot(q, tl.trans(x), input_precision=PRECISION) + tl.sum(zeros, 1)[None, :]
    values = tl.where(zeros == 0.0, x, 0.0)
    scores = tl.where((b // R)[:, None] == (b // R)[None, :], scores, float("-inf"))
    top = tl.maximum(tl.max(scores, 1), 0.0)
    e = tl.exp2(scores - top[:, None])
    total = tl.sum(e, 1) - (R - P) * tl.exp2(-top)
    o = tl.dot(operand(e, DTYPE, PRECISION), values, input_precision=PRECISION) / total[:, None]
    if keep:
        at = s * P + row
        tl.store(mixed + at[:, None] * C + tl.arange(0, C)[None, :], o, mask=there[:, None])
        tl.store(softmax + 2 * at, top, mask=there)
        tl.store(softmax + 2 * at + 1, total, mask=there)
    weight = tl.trans(_square(m, 0.5, C, DTYPE, PRECISION))
    out = tl.dot(operand(o, DTYPE, PRECISION), weight, input_precision=PRECISION)
    _store_blocks(y + s[:, None] * T, out, row, there & (row < P - 1), T, R * PACK, C)


@triton.jit(do_not_specialize=_LENGTHS)
def small_backward_kernel(g_in, x_in, a, m, softmax, mixed, dx, partials, P, T, S, n, g_batch, g_channel, x_batch,
                          x_channel, DTYPE: tl.constexpr, C: tl.constexpr, R: tl.constexpr, PACK: tl.constexpr,
                          PRECISION: tl.constexpr):  # fmt: skip
    """The backward pass of PACK sequences at a time; each program walks over its share and leaves partial sums."""
    b, c = tl.arange(0, R * PACK), tl.arange(0, C)
    row = b % R
    da = tl.zeros([C, C], tl.float32)
    dm = tl.zeros([C, C], tl.float32)
    for group in range(tl.program_id(0), tl.cdiv(S, PACK), tl.num_programs(0)):
        s = (group * PACK + b // R).to(tl.int64)
        there = (s < S) & (row < P)
        at = s * P + row
        x = operand(_whole(x_in, s, row, T, n, x_batch, x_channel, there, C), DTYPE, PRECISION)
        g = operand(_whole(g_in, s, row, T, n, g_batch, g_channel, there, C), DTYPE, PRECISION)
        o = tl.load(mixed + at[:, None] * C + c[None, :], mask=there[:, None], other=0.0)
        dm = tl.dot(tl.trans(g), operand(o, DTYPE, PRECISION), dm, input_precision=PRECISION)
        total = tl.load(softmax + 2 * at + 1, mask=there, other=1.0)
        do = tl.dot(g, _square(m, 0.5, C, DTYPE, PRECISION), input_precision=PRECISION)
        do = operand(do / total[:, None], DTYPE, PRECISION)
        delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
        top = tl.load(softmax + 2 * at, mask=there, other=0.0)
        q = _queries(x, a, C, PRECISION)
        scores = tl.dot(q, tl.trans(x), input_precision=PRECISION) - top[:, None]
        e = tl.exp2(tl.where((b // R)[:, None] == (b // R)[None, :], scores, float("-inf")))
        ds = e * (tl.dot(do, tl.trans(x), input_precision=PRECISION) - delta[:, None])
        ds = operand(ds, DTYPE, PRECISION)
        acc = tl.dot(tl.trans(ds), q, input_precision=PRECISION) * LN2
        acc = tl.dot(tl.trans(operand(e, DTYPE, PRECISION)), do, acc, input_precision=PRECISION)
        dq = operand(tl.dot(ds, x, input_precision=PRECISION), DTYPE, PRECISION)
        da = tl.dot(tl.trans(x), dq, da, input_precision=PRECISION)
        acc = tl.dot(dq, tl.trans(_square(a, 1.0, C, DTYPE, PRECISION)), acc, input_precision=PRECISION)
        _store_blocks(dx + s[:, None] * T, acc, row, there & (row < P - 1), T, R * PACK, C)
    _store_partials(partials, da, dm, C)


def forward(
    x: Tensor, a: Tensor, m: Tensor, segment_len: int, keep: bool, plan: Plan | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """torch.ops.mvat.global_attention for one head and segment_len 32 or 64; `plan` is for tests."""
    _check(a, segment_len)
    B, n, T = x.shape
    S, P = B * n, _chunks(T, segment_len)
    y = x.new_empty(x.shape)
    kept = (B if keep else 0, n, 1, P)
    softmax, mixed = x.new_empty((*kept, 2), dtype=torch.float32), x.new_empty((*kept, segment_len))
    if not y.numel():
        return y, softmax.zero_(), mixed.zero_()
    kind = Kind.of(x)
    plan = plan or choose(kind, common.capability(x.device))
    a, m, sizes = a.contiguous(), m.contiguous(), {"C": segment_len, "PRECISION": kind.precision}
    with torch.cuda.device_of(x):
        if plan.small_forward.holds(P):
            small = plan.small_forward.tile(P)
            x = dense_rows(x)
            small_forward_kernel[(triton.cdiv(S, small.pack),)](
                x, a, m, y, softmax, mixed, P, T, S, n, int(keep), x.stride(0), x.stride(1), DTYPE=TYPES[kind.dtype],
                R=small.rows, PACK=small.pack, num_warps=small.warps, num_stages=1, **sizes,
            )  # fmt: skip
            return y, softmax, mixed
        xp, tile = _padded(x, segment_len, kind), plan.forward
        sizes |= {"R": tile.rows}
        launch = {"STEP": tile.step, "num_warps": tile.warps, "num_stages": tile.stages}
        splits = plan.splits(S * triton.cdiv(P, tile.rows), P, common.processors(x.device))
        if splits == 1:
            forward_kernel[(S * triton.cdiv(P - 1, tile.rows - 1),)](
                xp, a, m, y, softmax, mixed, xp, P, T, S, 1, int(keep), SPLIT=False, **sizes, **launch
            )
            return y, softmax, mixed
        parts = x.new_empty(splits, S, P, 2, dtype=torch.float32)
        sums = x.new_empty(splits, S, P, segment_len, dtype=torch.float32)
        forward_kernel[(S * triton.cdiv(P, tile.rows), splits)](
            xp, a, m, y, parts, mixed, sums, P, T, S, splits, 0, SPLIT=True, **sizes, **launch
        )
        sizes |= {"R": plan.combine.rows}
        combine_kernel[(S * triton.cdiv(P - 1, plan.combine.rows - 1),)](
            parts, sums, m, y, softmax, mixed, P, T, S, splits, int(keep), DTYPE=TYPES[kind.dtype],
            num_warps=plan.combine.warps, num_stages=1, **sizes,
        )  # fmt: skip
    return y, softmax, mixed


def backward(
    grad: Tensor, x: Tensor, a: Tensor, m: Tensor, softmax: Tensor, mixed: Tensor, segment_len: int,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """torch.ops.mvat.global_attention_backward, likewise."""
    _check(a, segment_len)
    B, n, T = x.shape
    S, P, C = B * n, _chunks(T, segment_len), segment_len
    dx = x.new_empty(x.shape)
    if not dx.numel():
        return dx, torch.zeros_like(a), torch.zeros_like(m)
    kind = Kind.of(x)
    plan = plan or choose(kind, common.capability(x.device))
    programs = 2 * common.processors(x.device)
    a, m, softmax, mixed = a.contiguous(), m.contiguous(), softmax.contiguous(), mixed.contiguous()
    sizes = {"C": C, "PRECISION": kind.precision}
    with torch.cuda.device_of(x):
        if plan.small_backward.holds(P):
            small = plan.small_backward.tile(P)
            x, grad = dense_rows(x), dense_rows(grad)
            partials = a.new_empty(min(programs, triton.cdiv(S, small.pack)), 2, C, C)
            small_backward_kernel[(len(partials),)](
                grad, x, a, m, softmax, mixed, dx, partials, P, T, S, n, grad.stride(0), grad.stride(1), x.stride(0),
                x.stride(1), DTYPE=TYPES[kind.dtype], R=small.rows, PACK=small.pack, num_warps=small.warps,
                num_stages=1, **sizes,
            )  # fmt: skip
        else:
            xp, gp = _padded(x, C, kind), _padded(grad, C, kind)
            q, do, dq = (xp.new_empty(S, P, C) for _ in range(3))
            stat = x.new_empty(S, P, 4, dtype=torch.float32)
            tile = plan.over_queries
            queries_kernel[(S * triton.cdiv(P, tile.rows),)](
                xp, gp, a, m, softmax, mixed, q, do, dq, stat, P, **sizes, R=tile.rows, STEP=tile.step,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
            tile = plan.over_keys
            keys_kernel[(S * triton.cdiv(P - 1, tile.rows - 1),)](
                xp, a, q, do, dq, stat, dx, P, T, **sizes, R=tile.rows, STEP=tile.step, num_warps=tile.warps,
                num_stages=tile.stages,
            )  # fmt: skip
            tile = plan.weights
            partials = a.new_empty(min(programs, S * triton.cdiv(P, tile.rows)), 2, C, C)
            weights_kernel[(len(partials),)](
                xp, gp, mixed, dq, partials, P, S, **sizes, R=tile.rows, num_warps=tile.warps, num_stages=tile.stages
            )
        da, dm = partials.sum(0)
    return dx, da[None], dm[None]


def _check(a: Tensor, segment_len: int) -> None:
    if len(a) != 1 or segment_len not in (32, 64):
        raise ValueError(
            f"global_attention: on cuda one head and segment_len 32 or 64 are expected, got {len(a)} and {segment_len}"
        )


def _chunks(T: int, segment_len: int) -> int:
    return (T + segment_len) // (segment_len // 2) + 1


def _padded(x: Tensor, segment_len: int, kind: Kind) -> Tensor:
    """[S, h (P + 1)] of pad_kernel."""
    B, n, T = x.shape
    P = _chunks(T, segment_len)
    padded = x.new_empty(B * n, segment_len // 2 * (P + 1), dtype=kind.dtype)
    pad_kernel[(B * n * triton.cdiv(padded.shape[1], PAD_BLOCK),)](
        x, padded, P, T, n, *x.stride(), DTYPE=TYPES[kind.dtype], C=segment_len, BLOCK=PAD_BLOCK,
        PRECISION=kind.precision, num_warps=4,
    )  # fmt: skip
    return padded
