"""Module forms with the parameter names and ``state_dict`` of ``torch.nn``, and no other state.

The norms and GELU subclass their counterparts, so ``isinstance`` checks, initialisation and
checkpoints keep working. ``Attention`` has the parameters of ``torch.nn.MultiheadAttention``; the
gated feed-forward blocks, which ``torch.nn`` lacks, those of LLaMA and Gemma in ``transformers``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgpt_kernels.activations import geglu, gelu, relu_squared, swiglu
from fastgpt_kernels.attention import attention
from fastgpt_kernels.cross_entropy import cross_entropy
from fastgpt_kernels.linear_cross_entropy import linear_cross_entropy
from fastgpt_kernels.normalization import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from fastgpt_kernels.rotary import rotary


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` computed by ``fastgpt_kernels.layer_norm``."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last dims of ``input``."""
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm`` computed by ``fastgpt_kernels.rms_norm``."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dims of ``x``."""
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)


class AddLayerNorm(nn.LayerNorm):
    """``LayerNorm`` of a sum that is returned too: ``fastgpt_kernels.add_layer_norm``."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Normalised ``input + residual``, and the sum."""
        return add_layer_norm(
            input, residual, self.normalized_shape, self.weight, self.bias, self.eps
        )


class AddRMSNorm(nn.RMSNorm):
    """``RMSNorm`` of a sum that is returned too: ``fastgpt_kernels.add_rms_norm``."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Normalised ``x + residual``, and the sum."""
        return add_rms_norm(x, residual, self.normalized_shape, self.weight, self.eps)


class GELU(nn.GELU):
    """``torch.nn.GELU`` computed by ``fastgpt_kernels.gelu``."""

    def forward(self, input: Tensor) -> Tensor:
        """GELU of each element."""
        return gelu(input, approximate=self.approximate)


class ReLUSquared(nn.Module):
    """``fastgpt_kernels.relu_squared``; no parameters."""

    def forward(self, input: Tensor) -> Tensor:
        """``relu(input)^2`` of each element."""
        return relu_squared(input)


class SwiGLU(nn.Module):
    """Feed-forward block ``down_proj(silu(gate_proj(x)) * up_proj(x))`` (arXiv:2002.05202).

    Args:
        dim: width of input and output.
        hidden: width of gate and up.
        bias: whether the three projections have one.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(self, dim: int, hidden: int, *, bias=False, device=None, dtype=None):
        super().__init__()
        options = {"bias": bias, "device": device, "dtype": dtype}
        self.gate_proj = nn.Linear(dim, hidden, **options)
        self.up_proj = nn.Linear(dim, hidden, **options)
        self.down_proj = nn.Linear(hidden, dim, **options)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class GEGLU(SwiGLU):
    """``SwiGLU`` with GELU for SiLU, by its tanh form unless ``approximate`` is "none"."""

    def __init__(self, dim: int, hidden: int, *, approximate: str = "tanh", **options):
        super().__init__(dim, hidden, **options)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x), self.approximate))

    def extra_repr(self) -> str:
        """The form of GELU."""
        return f"approximate={self.approximate!r}"


class Rotary(nn.Module):
    """Rotary embedding of heads; angles are made from the positions, so there is no state.

    Args:
        rotary_dim: elements of a head that turn, even; the rest is copied.
        base: wavelengths go from 2 pi to 2 pi base.
        interleaved: see ``fastgpt_kernels.rotary``.
    """

    def __init__(self, rotary_dim: int, *, base: float = 10000.0, interleaved: bool = False):
        super().__init__()
        self.rotary_dim, self.base, self.interleaved = rotary_dim, base, interleaved

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Float32 cosines and sines (..., rotary_dim / 2) of ``positions`` (...)."""
        half = self.rotary_dim // 2
        exponent = torch.arange(half, device=positions.device, dtype=torch.float32) / half
        angles = positions[..., None].float() * self.base**-exponent
        return angles.cos(), angles.sin()

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Heads (..., D) at integer ``positions`` that broadcast to x.shape[:-1]."""
        return rotary(x, *self.angles(positions), interleaved=self.interleaved)

    def extra_repr(self) -> str:
        """The angles."""
        return f"{self.rotary_dim}, base={self.base}, interleaved={self.interleaved}"


class Attention(nn.Module):
    """Self-attention with the parameters of ``torch.nn.MultiheadAttention(batch_first=True)``.

    ``in_proj_weight`` (embed_dim + 2 kv_heads D, embed_dim) holds q, k and v in this order, heads
    in order within each; ``in_proj_bias`` and ``out_proj`` follow. Without ``kv_heads`` these are
    exactly the names and shapes of ``torch.nn.MultiheadAttention``.

    Args:
        embed_dim: width of input and output; D = embed_dim / num_heads.
        num_heads: query heads.
        kv_heads: key and value heads, a divisor of ``num_heads``; as many if None.
        bias: of both projections.
        causal: see ``fastgpt_kernels.attention``, as the rest.
        window: keys a query sees.
        softcap: bound of the scores.
        rotary: module that turns q and k, with the positions of the tokens.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        kv_heads: int | None = None,
        bias: bool = True,
        causal: bool = True,
        window: int | None = None,
        softcap: float | None = None,
        rotary: Rotary | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        kv_heads = num_heads if kv_heads is None else kv_heads
        if embed_dim % num_heads or num_heads % kv_heads:
            raise ValueError(
                f"Attention: num_heads {num_heads} must divide embed_dim {embed_dim}, and kv_heads "
                f"{kv_heads} must divide num_heads"
            )
        self.head_dim, self.heads = embed_dim // num_heads, (num_heads, kv_heads, kv_heads)
        self.causal, self.window, self.softcap, self.rotary = causal, window, softcap, rotary
        factory = {"device": device, "dtype": dtype}
        width = self.head_dim * sum(self.heads)
        self.in_proj_weight = nn.Parameter(torch.empty(width, embed_dim, **factory))
        self.in_proj_bias = nn.Parameter(torch.empty(width, **factory)) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ``torch.nn.MultiheadAttention``: Xavier uniform, biases 0."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, x_BTC: Tensor, positions: Tensor | None = None, doc_start: Tensor | None = None
    ) -> Tensor:
        """(B, T, C) -> (B, T, C).

        Args:
            x_BTC: tokens.
            positions: integers (T) or (B, T) for ``rotary``; 0 to T - 1 if None.
            doc_start: see ``fastgpt_kernels.attention``.
        """
        projected = nn.functional.linear(x_BTC, self.in_proj_weight, self.in_proj_bias)
        heads_BTHD = projected.unflatten(-1, (-1, self.head_dim))
        q, k, v = heads_BTHD.transpose(1, 2).split(self.heads, dim=1)
        if self.rotary is not None:
            if positions is None:
                positions = torch.arange(x_BTC.shape[1], device=x_BTC.device)
            positions = positions if positions.dim() == 1 else positions[:, None]
            q, k = self.rotary(q, positions), self.rotary(k, positions)
        out_BHTD = attention(
            q, k, v,
            causal=self.causal, window=self.window, softcap=self.softcap, doc_start=doc_start,
        )  # fmt: skip
        return self.out_proj(out_BHTD.transpose(1, 2).flatten(2))


class CrossEntropyLoss(nn.Module):
    """``torch.nn.CrossEntropyLoss`` on class indices, by ``fastgpt_kernels.cross_entropy``.

    Args:
        ignore_index: see ``fastgpt_kernels.cross_entropy``, as the rest.
        reduction: "mean", "sum" or "none".
        label_smoothing: weight of the uniform distribution in the target.
        z_loss: coefficient of the squared log-partition.
        softcap: logits are replaced by ``softcap * tanh(logits / softcap)``.
    """

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
    ):
        super().__init__()
        self.ignore_index, self.reduction = ignore_index, reduction
        self.label_smoothing, self.z_loss, self.softcap = label_smoothing, z_loss, softcap

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Loss of logits (N, V) against class indices (N,)."""
        return cross_entropy(
            input,
            target,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
        )

    def extra_repr(self) -> str:
        """Options that differ between instances."""
        return f"reduction={self.reduction!r}, ignore_index={self.ignore_index}"


class LinearCrossEntropy(CrossEntropyLoss):
    """Output layer and loss in one, with the parameters of ``torch.nn.LinearCrossEntropyLoss``.

    ``linear.weight`` (num_classes, in_features) may be tied like that of any ``nn.Linear``.

    Args:
        in_features: width of the hidden states.
        num_classes: size of the vocabulary.
        bias: whether ``linear`` has a bias.
        device: of the parameters.
        dtype: of the parameters.
        options: see ``CrossEntropyLoss``.
    """

    def __init__(
        self, in_features: int, num_classes: int, *, bias=False, device=None, dtype=None, **options
    ):
        super().__init__(**options)
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Loss of hidden states (N, in_features) against class indices (N,)."""
        return linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
        )
