"""What the launchers refuse: tensors that are not what the kernels take them for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qlinear.format import BLOCK_K, TILE_N, Format
from qlinear.kernels.decode import DECODERS
from qlinear.layout24 import FRAGMENT_ROWS

if TYPE_CHECKING:
    from qlinear.packing import PackedWeight


def check_layout(packed: PackedWeight) -> None:
    """Raises a ValueError unless the weight is in the layout that the kernels read."""
    if packed.layout != "triton":
        raise ValueError(f"the kernels read the layout 'triton', got {packed.layout!r}; use to_layout('triton')")


def check(
    x: Tensor, weight: Tensor, scale: Tensor, fmt: Format, n: int, bias: Tensor | None, index: Tensor | None = None
) -> None:
    """Raises a ValueError that names what was got and what was wanted, where the tensors do not fit."""
    _check_product(x, weight, bias, n)
    check_weight(weight, scale, fmt, n, x.shape[1], index)


def _check_product(x: Tensor, weight: Tensor, bias: Tensor | None, n: int) -> None:
    if x.dim() != 2 or x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"x must be a float16, bfloat16 or float32 matrix [M, K], got {x.dtype} {tuple(x.shape)}")
    if bias is not None and (tuple(bias.shape) != (n,) or not bias.is_floating_point()):
        raise ValueError(f"bias must be floats ({n},), got {bias.dtype} {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"x is on {x.device} but {name} is on {tensor.device}")


def _check_tensor(name: str, t: Tensor | None, what: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if t is None or tuple(t.shape) != shape or t.dtype != dtype or not t.is_contiguous():
        got = None if t is None else f"{t.dtype} {tuple(t.shape)}"
        raise ValueError(f"the {name} {what} is contiguous {dtype} {shape}, got {got}")


def check_weight(weight: Tensor, scale: Tensor, fmt: Format, n: int, k: int, index: Tensor | None = None) -> None:
    """As :func:`check`, for the weight ``[n, k]`` alone."""
    tiles, blocks = -(-n // TILE_N), -(-k // BLOCK_K)
    groups = fmt.groups(blocks * BLOCK_K)
    what = f"of {fmt} [{n}, {k}] in the layout 'triton'"
    decoder = DECODERS[fmt.packing]
    dtype, shape = decoder.dtype, (tiles, blocks, TILE_N, decoder.words)
    if fmt.sparsity == "2:4":
        dtype, shape = torch.int32, (tiles, blocks, TILE_N, decoder.words // 4)
        _check_tensor("index", index, what, dtype, (tiles, blocks, TILE_N, 4))
    _check_tensor("weight", weight, what, dtype, shape)
    if fmt.number == "float":
        if scale.numel() or scale.dtype.itemsize != 2:
            raise ValueError(f"the scale {what} is empty and has the dtype of the weights, 16 bits; got {scale.dtype}")
        return
    pairs = fmt.groups_per_block
    scales = (tiles, groups, TILE_N) if fmt.symmetric else (tiles, groups // pairs, TILE_N, 2 * pairs)
    if tuple(scale.shape) != scales or not scale.is_floating_point() or not scale.is_contiguous():
        raise ValueError(f"the scale {what} is contiguous floats {scales}, got {scale.dtype} {tuple(scale.shape)}")
    if not fmt.symmetric and scale.dtype.itemsize != 2:
        raise ValueError(f"the scale {what} shares a 32-bit word with its zero point: 16 bits, got {scale.dtype}")
    if scale.device != weight.device:
        raise ValueError(f"the weight is on {weight.device} but its scale is on {scale.device}")


def check_blocks(
    x: Tensor, weight: Tensor, scale: Tensor, index: Tensor, fmt: Format, n: int, bias: Tensor | None
) -> None:
    """As :func:`check`, for a block-sparse weight."""
    if fmt.block is None:
        raise ValueError(f"{fmt} has no blocks; the formats that have are block-sparse")
    _check_product(x, weight, bias, n)
    what = f"of {fmt} [{n}, {x.shape[1]}] in the layout 'triton'"
    rows, count = -(-n // fmt.block), len(weight)
    shape = (count, fmt.block, fmt.block // DECODERS[fmt.packing].planes)
    scales = {"float": (n, 0), "int": (count if fmt.group_size else rows, fmt.block)}[fmt.number]
    _check_tensor("weight", weight, what, torch.int16, shape)
    _check_tensor("scale", scale, what, scale.dtype, scales)
    _check_tensor("index", index, what, torch.int32, (3 * rows + 1 + 2 * count,))
    for name, tensor in (("scale", scale), ("index", index)):
        if tensor.device != x.device:
            raise ValueError(f"x is on {x.device} but {name} is on {tensor.device}")


def check_bitmap(
    x: Tensor, weight: Tensor, scale: Tensor, index: Tensor, fmt: Format, n: int, bias: Tensor | None
) -> None:
    """As :func:`check`, for an unstructured weight, which is in the plain layout."""
    if fmt.sparsity != "unstructured":
        raise ValueError(f"{fmt} has no bits that say which weights are kept; the unstructured formats have")
    _check_product(x, weight, bias, n)
    k = x.shape[1]
    what = f"of {fmt} [{n}, {k}] in the layout 'plain'"
    _check_tensor("weight", weight, what, torch.int32, (weight.numel(),))
    _check_tensor("scale", scale, what, scale.dtype, (n, fmt.groups(k)))
    _check_tensor("index", index, what, torch.int32, (n, 1 + -(-k // 32)))
    for name, tensor in (("scale", scale), ("index", index)):
        if tensor.device != x.device:
            raise ValueError(f"x is on {x.device} but {name} is on {tensor.device}")


def check_fragments(
    x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, index: Tensor | None, fmt: Format, n: int,
    bias: Tensor | None,
) -> None:  # fmt: skip
    """As :func:`check`, for a 2:4 weight in the layout ``mma.sp``."""
    if fmt.sparsity != "2:4":
        raise ValueError(f"mma.sp multiplies 2:4 weights, got {fmt}")
    k = x.shape[-1]
    _check_product(x, weight, bias, n)
    what = f"of {fmt} [{n}, {k}] in the layout 'mma.sp'"
    rows, blocks = -(-n // FRAGMENT_ROWS), -(-k // BLOCK_K)
    chunks = blocks * 4 // fmt.planes
    _check_tensor("weight", weight, what, torch.int32, (rows, chunks, 8, 32, 4))
    _check_tensor("index", index, what, torch.int32, (rows, chunks, fmt.planes, 32, 4))
    if fmt.number == "int":
        grouped = fmt.group_size is not None
        _check_tensor("scale", scale, what, scale.dtype, (rows, blocks, 8, 8, 2) if grouped else (rows, FRAGMENT_ROWS))
    if not fmt.symmetric:
        _check_tensor("zero_point", zero, what, torch.uint8, (rows, blocks, 8, 8, 4))
