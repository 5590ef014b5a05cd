"""Sparse weights: the patterns, how a weight is brought into one, and which of its values are stored.

A sparse format stores the codes of the kept weights and an index that says where they belong; every other weight is
exactly zero (in an asymmetric format: the zero point of its group). In the plain layout, all int32, little end first:

- ``2:4`` (at most two of four neighbours along K): weight ``[N, ceil(K/4)*2*bits/32]`` holds two codes of every four,
  index ``[N, ceil(K/32)]`` a nibble of every four: the two positions ``i0 | i1 << 2``, ``i0 < i1``, as NVIDIA's sparse
  tensor cores want them (PTX ISA, ``mma.sp``), so 4, 8, 9, 12, 13 and 14 exist. compressed-tensors'
  ``sparse-24-bitmask`` has a bit for every weight in its place: as many bits, and the one follows from the other.
- ``block64``: weight ``[B, 64, 64*bits/32]`` holds the B blocks that are not all zero, row of blocks by row of blocks;
  index is the block row pointers and the block columns of PyTorch's BSR layout (``crow_indices``, ``col_indices``), one
  after the other. A group of scales is a row of a block, and is stored where the block is.
- ``unstructured``: weight ``[ceil(nnz*bits/32)]`` holds the non-zero codes, row by row; index ``[N, 1 + ceil(K/32)]``
  the place of each row's first code, then a bit for every weight of the row: the ``row_offsets`` and the ``bitmask``
  of compressed-tensors' ``sparse-bitmask``.

16-bit floats are stored as they are, two in a word; their dtype is that of ``weight_scale``, which is empty.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from qlinear.bits import pack_bits, unpack_bits
from qlinear.format import Format, PlainShapes
from qlinear.masks import masks
from qlinear.patterns import Pattern
from qlinear.quantize import Codes

#: The nibble of every set of non-zeros in a group of four (bit i: position i); 0 where there are more than two.
_NIBBLES = torch.tensor([4, 4, 4, 4, 8, 8, 9, 0, 12, 12, 13, 0, 14, 0, 0, 0], dtype=torch.uint8)


def compress(codes: Codes, fmt: Format) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps what is not zero: ``(weight, scale, index)`` of the plain layout.

    Raises:
        ValueError: more than two of four are not zero in a 2:4 format.
    """
    dense, scale = codes.codes, codes.scale.contiguous()
    kept = dense != fill(codes.zero_point, fmt, dense, dense.shape[1])
    if fmt.sparsity == "2:4":
        weight, index = _compress_24(dense, kept, fmt)
        return weight, scale, index
    if fmt.block:
        return _compress_blocks(dense, scale, kept, fmt, fmt.block)
    offsets = F.pad(kept.sum(1).cumsum(0)[:-1], (1, 0)).to(torch.int32)
    return pack_bits(dense[kept], fmt.bits), scale, torch.cat((offsets[:, None], pack_bits(kept, 1)), dim=1)


def _compress_24(dense: Tensor, kept: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    spare = -dense.shape[1] % 4
    groups = F.pad(kept, (0, spare)).to(torch.uint8).unflatten(1, (-1, 4))
    if groups.numel() and int(groups.sum(-1).max()) > 2:
        raise ValueError("more than two of four neighbours are not zero: this is no 2:4 pattern")
    sets = groups[..., 0] | groups[..., 1] << 1 | groups[..., 2] << 2 | groups[..., 3] << 3
    nibbles = _NIBBLES.to(dense.device)[sets.int()]
    first, second = (
        F.pad(dense, (0, spare)).unflatten(1, (-1, 4)).gather(2, i.long().unsqueeze(-1))
        for i in (nibbles & 3, nibbles >> 2)
    )
    return pack_bits(torch.cat((first, second), dim=2).flatten(1), fmt.bits), pack_bits(nibbles, 4)


def _compress_blocks(
    dense: Tensor, scale: Tensor, kept: Tensor, fmt: Format, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    present = blocks_of(kept, size).flatten(2).any(2)
    values = blocks_of(dense, size, fmt.offset)[present]
    if fmt.group_size:
        # [N, G] -> [rows of blocks, G, size], a scale for every row of a block
        scale = F.pad(scale, (0, 0, 0, -len(scale) % size)).unflatten(0, (-1, size)).transpose(1, 2)[present]
    starts = F.pad(present.sum(1).cumsum(0), (1, 0))
    index = torch.cat((starts, present.nonzero()[:, 1])).to(torch.int32)
    return pack_bits(values, fmt.bits), scale.contiguous(), index


def blocks_of(t: Tensor, size: int, value: int = 0) -> Tensor:
    """``[N, K]`` as ``[N/size, K/size, size, size]``, padded with ``value``."""
    t = F.pad(t, (0, -t.shape[1] % size, 0, -t.shape[0] % size), value=value)
    return t.view(t.shape[0] // size, size, t.shape[1] // size, size).transpose(1, 2)


def block_places(index: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The block row and the block column of every stored block, int64 ``[B]``; ``rows`` is the number of block rows."""
    columns = index[rows + 1 :].long()
    counts = index[: rows + 1].diff()
    return torch.repeat_interleave(torch.arange(rows, device=index.device), counts, output_size=len(columns)), columns


def expand(weight: Tensor, scale: Tensor, zero: Tensor | None, index: Tensor, fmt: Format, n: int, k: int) -> Codes:
    """The codes ``[N, K]`` and scales ``[N, G]`` behind plain tensors; ``zero`` is uint8 ``[N, G]``.

    Groups of absent blocks get the scale 0.
    """
    if not fmt.block:
        return Codes(expand_rows(weight, scale, zero, index, fmt, k), scale, zero)
    rows, columns = -(-n // fmt.block), -(-k // fmt.block)
    places = block_places(index, rows)
    values = unpack_values(weight, scale, fmt, fmt.block)
    dense = fill(None, fmt, values, k).expand(rows, columns, fmt.block, fmt.block).contiguous()
    dense[places] = values
    if fmt.group_size:
        scales = scale.new_zeros(rows, columns, fmt.block)
        scales[places] = scale
        scale = scales.transpose(1, 2).flatten(0, 1)[:n].contiguous()
    return Codes(dense.transpose(1, 2).flatten(2).flatten(0, 1)[:n, :k].contiguous(), scale, None)


def expand_rows(
    weight: Tensor, scale: Tensor, zero: Tensor | None, index: Tensor, fmt: Format, k: int, rows: slice = slice(None)
) -> Tensor:
    """The codes of some rows of a 2:4 or an unstructured weight."""
    index, zero = index[rows], None if zero is None else zero[rows]
    if fmt.sparsity == "2:4":
        values = unpack_values(weight[rows], scale, fmt, -(-k // 4) * 2)
        return _expand_24(values, fill(zero, fmt, values, k).expand(len(index), k), index)
    values = unpack_values(weight, scale, fmt, weight.shape[0] * 32 // fmt.bits)
    # Only a part asks for its place: on a GPU that waits for everything before it.
    values = values[int(index[0, 0]) :] if rows.start else values
    dense = fill(zero, fmt, values, k).expand(len(index), k)
    return dense.masked_scatter(unpack_bits(index[:, 1:], 1, k).bool(), values)


def _expand_24(values: Tensor, dense: Tensor, index: Tensor) -> Tensor:
    k = dense.shape[1]
    groups = -(-k // 4)
    fours = F.pad(dense, (0, groups * 4 - k)).unflatten(1, (groups, 4)).unbind(-1)
    first, second = values.unflatten(1, (groups, 2)).unbind(-1)
    nibbles = unpack_bits(index, 4, groups)
    low, high = nibbles & 3, nibbles >> 2
    planes = [torch.where(low == i, first, torch.where(high == i, second, t)) for i, t in enumerate(fours)]
    return torch.stack(planes, dim=-1).flatten(1)[:, :k].contiguous()


def unpack_values(weight: Tensor, scale: Tensor, fmt: Format, length: int) -> Tensor:
    """Stored words as codes, or as floats in the dtype that the (empty) scale has."""
    values = unpack_bits(weight, fmt.bits, length)
    return values.view(scale.dtype) if fmt.number == "float" else values


def fill(zero: Tensor | None, fmt: Format, like: Tensor, k: int) -> Tensor:
    """What stands for zero: zero points ``[N, G]`` along K, or a number ``[]`` in the dtype of the codes ``like``."""
    if zero is None:
        return like.new_full((), fmt.offset)
    return zero.repeat_interleave(fmt.group_size or k, dim=1)[:, :k]


def stored(weight: Tensor, index: Tensor, fmt: Format, n: int, k: int) -> int:
    """How many blocks (or weights, where unstructured) plain tensors hold; 0 where the format says how many.

    Raises:
        ValueError: the index does not fit the format, the shape or the weight.
    """
    if index.is_meta:
        return len(weight) if fmt.block else len(weight) * 32 // fmt.bits
    if fmt.block:
        rows, count = -(-n // fmt.block), len(weight)
        starts, columns = index[: rows + 1], index[rows + 1 :]
        good = index.shape == (rows + 1 + count,) and int(starts[0]) == 0 and int(starts[-1]) == count
        good = good and bool((starts.diff() >= 0).all())
        if not good or not bool(((columns >= 0) & (columns < -(-k // fmt.block))).all()):
            raise ValueError(f"the index of a {fmt} weight [{n}, {k}] does not fit its {count} blocks")
        return count
    if fmt.sparsity != "unstructured":
        return 0
    width = 1 + -(-k // 32)
    if index.shape != (n, width):
        raise ValueError(f"the index of a {fmt} weight [{n}, {k}] is [{n}, {width}], got {list(index.shape)}")
    counts = unpack_bits(index[:, 1:], 1, k).sum(1)
    if not torch.equal(index[:, 0].long(), counts.cumsum(0) - counts):
        raise ValueError(f"the row offsets of a {fmt} weight [{n}, {k}] do not fit its bits")
    return int(counts.sum())


def shapes_of(tensors: Sequence[object], fmt: Format, n: int, k: int) -> PlainShapes | None:
    """The shapes of plain tensors (weight, scale, zero_point, index) from a checkpoint; None where they do not fit.

    Raises:
        ValueError: the index contradicts itself or the weight.
    """
    weight, index = tensors[0], tensors[3]
    if not isinstance(weight, Tensor) or not isinstance(index, Tensor) or weight.dtype != torch.int32:
        return None
    count = 0 if weight.is_meta or index.is_meta else stored(weight, index, fmt, n, k)
    shapes = fmt.plain_shapes(n, k, count)
    fits = (s is None or (isinstance(t, Tensor) and t.shape == s) for t, s in zip(tensors, shapes, strict=True))
    return shapes if all(fits) else None


def holds(weight: Tensor, fmt: Format) -> bool:
    """Whether a weight ``[N, K]`` has a format's pattern, as ``convert`` asks: no non-zero lost, something left out."""
    if fmt.sparsity is None:
        return True
    return Pattern.parse(fmt.sparsity).holds(weight) and stored_share(weight, fmt) < 1


def stored_share(weight: Tensor, fmt: Format) -> float:
    """The share of weights (of blocks, in a block format) that a format stores of ``weight`` ``[N, K]``."""
    if fmt.sparsity in (None, "2:4"):
        return 1.0 if fmt.sparsity is None else 0.5
    units = blocks_of(weight != 0, fmt.block).flatten(2).any(2) if fmt.block else weight
    return int(units.count_nonzero()) / units.numel()


def pays(weight: Tensor, fmt: Format) -> bool:
    """Whether a weight ``[N, K]`` has a format's pattern, and what is left out is no less than the bits that say where.

    A few zeros that nobody pruned (numbers too small for float16, rows of tokens that do not occur) make every weight
    an unstructured one; they do not pay for a bit of each.
    """
    price = 1 if fmt.sparsity == "unstructured" else 0
    return holds(weight, fmt) and (1 - stored_share(weight, fmt)) * fmt.bits >= price


def check_pattern(weight: Tensor, fmt: Format) -> None:
    """Raises a ValueError that says how much of a float weight ``[N, K]`` violates the pattern of the format."""
    kept = weight != 0
    ways = ["prune it first", "pass prune='magnitude'"]
    if fmt.sparsity == "2:4":
        groups = F.pad(kept, (0, -kept.shape[1] % 4)).unflatten(1, (-1, 4))
        broken = float((groups.sum(-1) > 2).float().mean())
        what = "its groups of four have more than two weights that are not zero"
    elif fmt.block:
        blocks = blocks_of(kept, fmt.block).flatten(2).any(2)
        broken = float(blocks.all())
        size = f"{fmt.block} x {fmt.block}"
        what = f"its blocks of {size} have a weight that is not zero, so that none can be left out"
        if blocks.numel() == 1:
            # No pruner takes the only block that there is.
            what, ways = f"its blocks, of which there is one of {size}, cannot be left out", []
    else:
        broken = float(kept.all())
        what = "its weights are not zero, so that none can be left out"
    if broken:
        if fmt.dense:
            mapping = f"{{NAME: '{fmt.dense}', '*': '{fmt}'}}"
            ways.append(f"give it a dense scheme by its name, {mapping} (--scheme NAME={fmt.dense})")
        ways.append("leave it in float by giving it the scheme None (--scheme NAME=none)")
        raise ValueError(
            f"the weight does not have the pattern {fmt.sparsity}: {broken:.1%} of {what}; "
            f"{', '.join(ways[:-1])}{', or ' if ways[:-1] else ''}{ways[-1]}"
        )


def prune_weight(weight: Tensor, fmt: Format, method: str, sparsity: float = 0.5) -> Tensor:
    """A copy of a float weight ``[N, K]`` that has the pattern of the format.

    ``magnitude``: of every four the two largest are kept (2:4), or the share ``1 - sparsity`` of the blocks with the
    largest sums of magnitudes, or of the weights (:func:`qlinear.masks.masks`).

    Raises:
        ValueError: unknown method.
    """
    if method != "magnitude":
        raise ValueError(f"prune={method!r} is not a method; the methods are: magnitude (qlinear.prune has others)")
    assert fmt.sparsity is not None
    weight = weight.detach()
    # In float32, as qlinear.prune ranks: sums of 4096 magnitudes in bfloat16 have three digits.
    (mask,) = masks([weight.float().abs()], Pattern.parse(fmt.sparsity), [sparsity], "layer")
    return weight.masked_fill(mask, 0)
