"""The truth: a product computed in float64 from the packed tensors. Slow, and used only to check everything else."""

from __future__ import annotations

import torch
from torch import Tensor

from qlinear.packing import PackedWeight


def matmul(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias`` in float64 for x ``[..., K]``; activations are quantized where the format says so."""
    y = activations(x, packed) @ packed.dequantize(torch.float64).t()
    return y if bias is None else y + bias.double()


def activations(x: Tensor, packed: PackedWeight) -> Tensor:
    """The activations as the format multiplies them, in float64: rounded to 127 levels per token in W8A8."""
    if not packed.format.integer_activations:
        return x.double()
    # The scale is float32 by definition of the format; a quotient that falls on a half is rounded to even.
    largest = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-30)
    # A true division: `127 / largest` would be a rounded reciprocal times 127.
    values = (x.float() * torch.div(torch.tensor(127.0), largest)).round()
    return values.double() * (largest / 127).double()
