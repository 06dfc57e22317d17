"""Makes Triton's interpreter round as a GPU does: bfloat16 to nearest even, the operands of tf32 products to 10 bits.

As it comes, the interpreter computes bfloat16 on its bits as if they were integers and tf32 in full float32. `install`
mends both, for kernels that run afterwards. It still sees neither races nor reads out of bounds.
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

#: Operations that work on float32 alone and are written as create_<name>; those called create_f... come on top.
_FLOAT = "minimumf maximumf minnumf maxnumf clampf precise_divf exp exp2 log log2 sqrt rsqrt".split()


def widen(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bits (uint16)."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """bfloat16 bits of float32 values, rounded to nearest even; every NaN becomes the quiet one."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def tf32(values: np.ndarray, rounded: bool) -> np.ndarray:
    """float32 values with 10 bits of mantissa: to nearest, ties away from zero, or cut off."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    kept = ((bits + np.uint32(0x1000 if rounded else 0)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(values), kept, values)


def _is_bf16(value: object) -> bool:
    return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16


def _up(value: object) -> object:
    return TensorHandle(widen(value.data), tl.float32) if _is_bf16(value) else value


def _down(value: object) -> object:
    if isinstance(value, TensorHandle) and value.dtype.scalar == tl.float32:
        return TensorHandle(narrow(value.data), tl.bfloat16)
    return value


def _through_float32(function):
    def call(self, *arguments, **options):
        if not any(map(_is_bf16, arguments)):
            return function(self, *arguments, **options)
        return _down(function(self, *map(_up, arguments), **options))

    return call


def _cast(function):
    def cast_impl(self, source, target):
        before, after = source.dtype.scalar, target.scalar
        if before == tl.bfloat16 and after != tl.bfloat16:
            wide = TensorHandle(widen(source.data), tl.float32)
            return wide if after == tl.float32 else function(self, wide, target)
        if after == tl.bfloat16 and before != tl.bfloat16:
            return TensorHandle(narrow(source.data.astype(np.float32)), tl.bfloat16)
        return function(self, source, target)

    return cast_impl


def _dot(function):
    def create_dot(self, a, b, d, precision, limit):
        half, name = _is_bf16(a) or _is_bf16(b), str(precision).lower()
        a, b = _up(a), _up(b)
        if half or "ieee" in name:
            return function(self, a, b, d, precision, limit)
        three = "x3" in name
        # Only tf32x3 converts (cvt.rna); a plain product hands float32 to the tensor core, which ignores the low bits.
        a_high, b_high = (TensorHandle(tf32(x.data, three), tl.float32) for x in (a, b))
        if three:  # small terms first; the product of two rests is left out
            a_low, b_low = (
                TensorHandle(tf32(x.data - y.data, three), tl.float32) for x, y in ((a, a_high), (b, b_high))
            )
            d = function(self, a_low, b_high, d, precision, limit)
            d = function(self, a_high, b_low, d, precision, limit)
        return function(self, a_high, b_high, d, precision, limit)

    return create_dot


def install() -> None:
    """Patch the interpreter, once."""
    builder = InterpreterBuilder
    if getattr(builder, "rounds_like_a_gpu", False):
        return
    builder.rounds_like_a_gpu = True
    builder.cast_impl = _cast(builder.cast_impl)
    builder.create_dot = _dot(builder.create_dot)
    names = {name for name in dir(builder) if name.startswith("create_f") and not name.startswith("create_fp_")}
    for name in names | {f"create_{name}" for name in _FLOAT if hasattr(builder, f"create_{name}")}:
        setattr(builder, name, _through_float32(getattr(builder, name)))
