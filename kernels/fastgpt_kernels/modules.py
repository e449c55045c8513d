"""Module forms with the parameter names and ``state_dict`` of ``torch.nn``, and no other state.

The norms subclass their counterparts, so ``isinstance`` checks, initialisation and checkpoints keep
working.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastgpt_kernels.cross_entropy import cross_entropy
from fastgpt_kernels.linear_cross_entropy import linear_cross_entropy
from fastgpt_kernels.normalization import layer_norm, rms_norm


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
