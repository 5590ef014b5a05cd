"""Weights, inputs and the float64 truth that kernel tests compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from models import finite
from torch import Tensor

from qlinear.format import Format
from qlinear.packing import PackedWeight, dequantize_codes, pack, pack_codes
from qlinear.quantize import Codes

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def dtype_id(dtype: Any) -> str:
    return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}.get(dtype, str(dtype))


def to_device(packed: PackedWeight, device: torch.device) -> PackedWeight:
    weight, scale, zero, index = (None if t is None else t.to(device) for t in packed.tensors)
    return replace(packed, weight=weight, scale=scale, zero_point=zero, index=index)


def random_weight(fmt: Format, n: int, k: int, dtype: torch.dtype, device: torch.device) -> PackedWeight:
    """A weight ``[n, k]`` in the layout of the kernels, quantized from random numbers of ``dtype``."""
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0)).to(dtype)
    return to_device(pack(weight, fmt.name, layout="triton", prune="magnitude"), device)


def coded_weight(fmt: Format, n: int, k: int, scale: Tensor, device: torch.device) -> PackedWeight:
    """A weight with every code in every group's reach, and the scale that is given (broadcast to ``[n, groups]``)."""
    codes = finite((torch.arange(n * k) * 7 % (fmt.max_code + 1)).view(n, k).to(torch.uint8), fmt)
    groups = fmt.groups(k)
    zero = None if fmt.symmetric else (torch.arange(n * groups) % (fmt.max_code + 1)).view(n, groups).to(torch.uint8)
    packed = pack_codes(Codes(codes, scale.expand(n, groups).contiguous(), zero), fmt)
    return to_device(packed.to_layout("triton"), device)


def rows_of_blocks(counts: Sequence[int], size: int = 64, columns: int = 11) -> Tensor:
    """A weight whose rows of blocks have so many blocks, the last row and column of blocks cut short."""
    weight = torch.randn(len(counts) * size - 20, columns * size - 30, generator=torch.Generator().manual_seed(4))
    kept = torch.zeros(len(counts), columns, dtype=torch.bool)
    for row, count in zip(kept, counts, strict=True):
        row[torch.randperm(columns, generator=torch.Generator().manual_seed(count))[:count]] = True
    return weight * kept.repeat_interleave(size, 0).repeat_interleave(size, 1)[: len(weight), : weight.shape[1]]


def random_tokens(m: int, k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)


def weight64(packed: PackedWeight) -> Tensor:
    """The weight the packed tensors stand for, in float64."""
    codes, scale, zero = packed.codes()
    return dequantize_codes(codes, scale, zero, packed.format, torch.float64)


def error(y: Tensor, reference: Tensor) -> float:
    """``norm(y - reference) / norm(reference)``."""
    return float((y.double() - reference).norm() / reference.norm())
