"""Strides that 8, 4 or 2 divides and 16 does not, such that the compiler sees it.

It is told which integers of a launch are multiples of 16, and of others nothing: it would read rows
of 1,000 bfloat16 elements, or heads of 72, 2 bytes at a time. The launch therefore takes the
greatest power of two that divides all strides, the kernel has it as a constant ``UNIT`` and rounds
the strides down to a multiple of it, which changes nothing and is seen.
"""

from __future__ import annotations

import math

from fastgpt_kernels._common import RowLayout, tl, triton


def common_unit(*values: int) -> int:
    """Greatest of 8, 4, 2 that divides all values; 1 if none does, or if 16 does."""
    unit = math.gcd(16, *values)
    return unit if unit < 16 else 1


def row_unit(*layouts: RowLayout) -> int:
    """The ``common_unit`` of what separates the rows of the layouts, and of contiguous outputs."""
    steps = [(rows.n_cols, rows.stride_outer, rows.stride_inner) for rows in layouts]
    return common_unit(*(step for three in steps for step in three))


@triton.jit
def multiple(x, UNIT: tl.constexpr):
    """x, of which ``UNIT`` is a divisor."""
    if UNIT == 1:
        return x
    return x // UNIT * UNIT
