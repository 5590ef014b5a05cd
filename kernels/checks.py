"""Whether tensors fit each other, before a kernel is given them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qlinear.format import BLOCK_K, TILE_N, Format
from qlinear.kernels.decode import DECODERS

if TYPE_CHECKING:
    from qlinear.packing import PackedWeight


def check_layout(packed: PackedWeight) -> None:
    """Raises a ValueError unless the weight is in the layout that the kernels read."""
    if packed.layout != "triton":
        raise ValueError(f"the kernels read the layout 'triton', got {packed.layout!r}; use to_layout('triton')")


def check(x: Tensor, weight: Tensor, scale: Tensor, fmt: Format, n: int, bias: Tensor | None) -> None:
    """Raises a ValueError that names what was got and what was wanted, where the tensors do not fit."""
    if x.dim() != 2 or x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"x must be a float16, bfloat16 or float32 matrix [M, K], got {x.dtype} {tuple(x.shape)}")
    check_weight(weight, scale, fmt, n, x.shape[1])
    if bias is not None and (tuple(bias.shape) != (n,) or not bias.is_floating_point()):
        raise ValueError(f"bias must be floats ({n},), got {bias.dtype} {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"x is on {x.device} but {name} is on {tensor.device}")


def check_weight(weight: Tensor, scale: Tensor, fmt: Format, n: int, k: int) -> None:
    """As :func:`check`, for the weight ``[n, k]`` alone."""
    tiles, blocks = -(-n // TILE_N), -(-k // BLOCK_K)
    groups = fmt.groups(blocks * BLOCK_K)
    what = f"of {fmt} [{n}, {k}] in the layout 'triton'"
    decoder = DECODERS[fmt.packing]
    dtype, shape = decoder.dtype, (tiles, blocks, TILE_N, decoder.words)
    if tuple(weight.shape) != shape or weight.dtype != dtype or not weight.is_contiguous():
        raise ValueError(f"the weight {what} is contiguous {dtype} {shape}, got {weight.dtype} {tuple(weight.shape)}")
    pairs = fmt.groups_per_block
    scales = (tiles, groups, TILE_N) if fmt.symmetric else (tiles, groups // pairs, TILE_N, 2 * pairs)
    if tuple(scale.shape) != scales or not scale.is_floating_point() or not scale.is_contiguous():
        raise ValueError(f"the scale {what} is contiguous floats {scales}, got {scale.dtype} {tuple(scale.shape)}")
    if not fmt.symmetric and scale.dtype.itemsize != 2:
        raise ValueError(f"the scale {what} shares a 32-bit word with its zero point: 16 bits, got {scale.dtype}")
    if scale.device != weight.device:
        raise ValueError(f"the weight is on {weight.device} but its scale is on {scale.device}")
