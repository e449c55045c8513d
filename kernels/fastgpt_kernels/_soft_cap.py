"""The tanh of soft caps, on scores of attention and on logits alike."""

from __future__ import annotations

from fastgpt_kernels._common import tl, triton


@triton.jit
def tanh(x, scale, EXACT: tl.constexpr):
    """tanh(x * scale), to a few float32 ulp with ``EXACT``: an odd polynomial where 1 cancels.

    Else to 2^-20 of 1, nothing beside the rounding of 16-bit operands, in half the instructions: a
    reciprocal square root costs two where a division costs seven.
    """
    if EXACT:
        x *= scale
        z = x * x
        small = -0.00570404 * z + 0.02063786
        small = (small * z - 0.05373916) * z + 0.13331432
        small = x + x * z * (small * z - 0.33333281)
        large = 1.0 - 2.0 / (1.0 + tl.exp2(x * 2.8853900817779268))
        return tl.where(tl.abs(x) < 0.625, small, large)
    half = tl.exp2(x * (scale * -2.8853900817779268) - 1.0)
    root = tl.rsqrt(0.5 + half)
    return root * root - 1.0
