"""Make Triton's interpreter compute bfloat16 as a GPU does.

The interpreter keeps bfloat16 as uint16 bit patterns. As shipped (3.7 and 3.9) it truncates float32
to bfloat16 where hardware rounds to nearest even, and it adds, multiplies, compares and dots the
bit patterns as integers without a word. Here casts round correctly, ``tl.dot`` widens its operands,
and bfloat16 arithmetic, which no kernel of ours may contain, raises. ``tl.fma`` rounds once, as on
a GPU (3.7 rounds the product too).
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def float32_to_bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """Round to nearest even; NaN stays NaN (quiet)."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x0040)
    return np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16)


def bfloat16_bits_to_float32(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _cast(builder, src, dst_type, fallback):
    source, target = src.dtype.scalar, dst_type.scalar
    if tl.bfloat16 not in (source, target) or source == target:
        return fallback()
    data = src.data
    wide = bfloat16_bits_to_float32(data) if source == tl.bfloat16 else data.astype(np.float32)
    wide = wide.reshape(np.shape(data))
    if target == tl.bfloat16:
        return interpreter.TensorHandle(
            float32_to_bfloat16_bits(wide).reshape(np.shape(data)), target
        )
    if target == tl.float32:
        return interpreter.TensorHandle(wide, target)
    return builder.cast_impl(interpreter.TensorHandle(wide, tl.float32), dst_type)


def _refuse_bfloat16(handles, what: str) -> None:
    for handle in handles:
        dtype = getattr(handle, "dtype", None)
        if dtype is not None and getattr(dtype, "scalar", dtype) == tl.bfloat16:
            raise TypeError(f"{what} on bfloat16: cast to float32 first")


def repair_interpreter() -> None:
    """Patch ``InterpreterBuilder`` once per process."""
    builder_class = interpreter.InterpreterBuilder
    if getattr(builder_class, "_bfloat16_repaired", False):
        return
    cast_impl, fp_to_fp, dot = (
        builder_class.cast_impl,
        builder_class.create_fp_to_fp,
        builder_class.create_dot,
    )
    binary_op, unary_op = builder_class.binary_op, builder_class.unary_op
    check_tensor = interpreter.ReduceScanOpInterface.check_tensor

    def repaired_cast(self, src, dst_type):
        return _cast(self, src, dst_type, lambda: cast_impl(self, src, dst_type))

    def repaired_fp_to_fp(self, src, dst_type, rounding_mode):
        return _cast(self, src, dst_type, lambda: fp_to_fp(self, src, dst_type, rounding_mode))

    def repaired_dot(self, a, b, *args):
        a, b = (
            interpreter.TensorHandle(
                bfloat16_bits_to_float32(x.data).reshape(x.data.shape), tl.float32
            )
            if x.dtype.scalar == tl.bfloat16
            else x
            for x in (a, b)
        )
        return dot(self, a, b, *args)

    def fma_rounding_once(self, x, y, z):
        exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    def checked_binary(self, lhs, rhs, op):
        _refuse_bfloat16((lhs, rhs), getattr(op, "__name__", "arithmetic"))
        return binary_op(self, lhs, rhs, op)

    def checked_unary(self, arg, op):
        _refuse_bfloat16((arg,), getattr(op, "__name__", "arithmetic"))
        return unary_op(self, arg, op)

    def checked_reduction(self, tensors):
        _refuse_bfloat16([x.handle for x in tensors], "reduction")
        return check_tensor(self, tensors)

    builder_class.cast_impl = repaired_cast
    builder_class.create_fp_to_fp = repaired_fp_to_fp
    builder_class.create_dot = repaired_dot
    builder_class.create_fma = fma_rounding_once
    builder_class.binary_op = checked_binary
    builder_class.unary_op = checked_unary
    interpreter.ReduceScanOpInterface.check_tensor = checked_reduction
    builder_class._bfloat16_repaired = True
