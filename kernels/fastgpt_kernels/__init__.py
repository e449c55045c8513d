"""Fused Triton kernels for transformers with a ``torch.nn.functional``-like interface.

Every function runs Triton on CUDA and ROCm tensors, and plain PyTorch arranged for speed on CPU
tensors; inputs are never written to. ``fastgpt_kernels.modules`` holds ``torch.nn``-like modules,
``fastgpt_kernels.reference`` the mathematics.
"""

from fastgpt_kernels.activations import geglu, gelu, relu_squared, swiglu
from fastgpt_kernels.attention import attention, attention_with_lse
from fastgpt_kernels.attention_decode import attention_decode
from fastgpt_kernels.attention_varlen import attention_varlen
from fastgpt_kernels.cross_entropy import cross_entropy
from fastgpt_kernels.gae import gae
from fastgpt_kernels.linear_cross_entropy import linear_cross_entropy
from fastgpt_kernels.linear_log_probs import linear_log_probs
from fastgpt_kernels.normalization import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from fastgpt_kernels.rotary import rotary

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_decode",
    "attention_varlen",
    "attention_with_lse",
    "cross_entropy",
    "gae",
    "geglu",
    "gelu",
    "layer_norm",
    "linear_cross_entropy",
    "linear_log_probs",
    "relu_squared",
    "rms_norm",
    "rotary",
    "swiglu",
]
