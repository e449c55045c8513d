"""Which compiled variant of a kernel a launch would ask Triton for, found without a GPU.

Triton compiles a kernel anew for every combination of argument types, of integers that are 1 or
divisible by 16 (unless ``do_not_specialize`` names them), of pointer alignments, of constexprs and
of options. ``variant`` returns that combination, made by Triton's own code.
"""

from __future__ import annotations

from typing import Any

from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from fastgpt_kernels import static


def variant(kernel: Any, *args: Any, **options: Any) -> str:
    """The key under which the launch ``kernel[grid](*args, **options)`` is compiled and cached."""
    backend = make_backend(static.target_of("sm_90"))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    _, specialization, rest = bind(*args, **options)
    return f"{kernel.__name__} {specialization} {sorted(rest.items())}"
