"""Fused Triton kernels for transformers with a ``torch.nn.functional``-like interface."""
