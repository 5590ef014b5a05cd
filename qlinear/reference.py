"""The truth: a product computed in float64 from the packed tensors. Slow, and used only to check everything else."""

from __future__ import annotations

import torch
from torch import Tensor

from qlinear.format import ROUNDED
from qlinear.packing import PackedWeight


def matmul(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias`` in float64 for x ``[..., K]``; activations are quantized where the format says so."""
    y = activations(x, packed) @ packed.dequantize(torch.float64).t()
    return y if bias is None else y + bias.double()


def activations(x: Tensor, packed: PackedWeight) -> Tensor:
    """The activations as the format multiplies them, in float64: rounded per token in W8A8, W4A8 and fp8."""
    fmt = packed.format
    if not fmt.quantized_activations:
        return x.double()
    dtype, levels = ROUNDED[fmt.number]
    # The scale is float32 by definition of the format; a quotient between two numbers of it is rounded to even.
    largest = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-30)
    # A true division: `levels / largest` would be a rounded reciprocal times levels.
    values = x.float() * torch.div(torch.tensor(levels), largest)
    values = values.clamp(-levels, levels).to(dtype) if fmt.number == "e4m3" else values.round()
    return values.double() * (largest / levels).double()
