"""The layouts of a 2:4 weight that the GPU kernels read: ``triton`` (every GPU) and ``mma.sp`` (sparse tensor cores).

Both hold the two kept codes of every four neighbours along K, and where they belong, padded to whole blocks of 128;
the plain layout they come from is that of :mod:`qlinear.sparse`. A code is 4, 8 or 16 bits wide, ``P = 16 / bits``
codes are in half a word.

``triton`` is for :func:`qlinear.kernels.sparse24.expand24`, in tiles as in :mod:`qlinear.layout`:

- weight: int32 ``[N/64, K/128, 64, 32/P]``, a word for every ``P`` groups of four that have the same place ``t`` in
  their planes (plane ``j`` is ``k = 128*block + (128/P)*j + 4*t + c``): in the lower half the code ``a`` of each, in
  the upper half ``b``. These are the codes in the order of K, but the other way round where both are in the second
  half of the group; each is stored exclusive-or the code of zero, so that 0 is no weight. Even ``t`` come first.
- index: int32 ``[N/64, K/128, 64, 4]``, a bit for every weight, set where it is kept: that of ``c`` is in word ``t %
  4`` (even words first), bit ``16*(c%2) + bits*j + 2*(t//4) + c//2``.
- scales as in :mod:`qlinear.layout`.

``mma.sp`` has for every thread of a warp the registers of ``mma.sp.m16n8k32`` (PTX ISA, sparse matrix fragments): for
128 rows, 8 tiles of 16, and 32*P columns, P products.

- weight: int32 ``[N/128, K/(32*P), 8, 32, 4]``: of a tile and a lane the registers ``i`` of product ``j``, register
  ``4*j + i`` being the field ``(4*j + i) % P`` in both halves of word ``(4*j + i) // P``.
- index: int32 ``[N/128, K/(32*P), P, 32, 4]``: word ``4*i + w`` is the metadata of product ``(4*i + w) % P``, of two
  tiles that follow each other: one is in lanes 0 and 1 of every four, the other in lanes 2 and 3 (selector 0 and 1).
- scale of groups: ``[N/128, K/128, 8, 8, 2]`` for lane / 4, tile and half a tile; zero_point: uint8 ``[N/128, K/128,
  8, 8, 4]`` the zero point of the upper half, that of the lower as it is in a code's upper half byte, and as it is.
- scale of rows: ``[N/128, 128]``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qlinear.bits import pack_bits, unpack_bits
from qlinear.format import BLOCK_K, TILE_N, Format
from qlinear.layout import layout_of, tile_scales, untile_scales

#: Rows of a weight that share the activations in a warp's registers, and those of one product.
FRAGMENT_ROWS, _MMA_ROWS = 128, 16
#: Both codes in the second half of a group.
_LAST_TWO = 2 | 3 << 2

#: weight, scale, zero_point, index
Tensors = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def convert(tensors: Tensors, target: str, fmt: Format, n: int, k: int) -> Tensors:
    """The tensors of a 2:4 weight in another layout, through the plain one, which is also the CPU's."""
    source = layout_of(tensors[0])
    target = "plain" if target == "cpu" else target
    if source == target:
        return tensors
    if source != "plain":
        tensors = (_from_triton if source == "triton" else _from_fragments)(tensors, fmt, n, k)
    if target == "plain":
        return tensors
    return (_to_triton if target == "triton" else _to_fragments)(tensors, fmt, n, k)


def _unpack(tensors: Tensors, fmt: Format, k: int, rows: int) -> tuple[Tensor, Tensor]:
    """Kept codes ``[rows, G, 2]`` and nibbles ``[rows, G]`` as int32, padded to ``rows`` and blocks of 128 along K."""
    weight, _, zero, index = tensors
    assert index is not None
    groups, n = -(-k // 4), len(weight)
    spare = (0, -(-k // BLOCK_K) * (BLOCK_K // 4) - groups, 0, rows - n)
    codes = unpack_bits(weight, fmt.bits, 2 * groups).to(torch.int32).unflatten(1, (-1, 2))
    codes = codes ^ _zero_codes(zero, fmt, n, groups)
    # Without the code of zero: what is padded is zero.
    codes = F.pad(codes, (0, 0, *spare))
    return codes, F.pad(unpack_bits(index, 4, groups).to(torch.int32), spare, value=4)


def _pack(codes: Tensor, nibbles: Tensor, zero: Tensor | None, fmt: Format, n: int, k: int) -> tuple[Tensor, Tensor]:
    """The plain weight and index: the inverse of :func:`_unpack`."""
    groups = -(-k // 4)
    kept = codes[:n, :groups] ^ _zero_codes(zero, fmt, n, groups)
    kept = kept.flatten(1).to(torch.int16 if fmt.bits == 16 else torch.uint8)
    return pack_bits(kept, fmt.bits), pack_bits(nibbles[:n, :groups].to(torch.uint8), 4)


def _zero_codes(zero: Tensor | None, fmt: Format, n: int, groups: int) -> Tensor | int:
    """The code of zero for codes ``[n, groups, 2]``: what no weight is stored as, where it is stored."""
    if zero is None:
        return fmt.offset
    points = unpack_bits(zero.t(), fmt.bits, n).t().to(torch.int32)
    return points.repeat_interleave((fmt.group_size or 4 * groups) // 4, dim=1)[:, :groups, None]


def _to_triton(tensors: Tensors, fmt: Format, n: int, k: int) -> Tensors:
    rows = -(-n // TILE_N) * TILE_N
    codes, nibbles = _unpack(tensors, fmt, k, rows)
    codes = torch.where((nibbles == _LAST_TWO)[..., None], codes.flip(-1), codes)
    codes = (codes & ((1 << fmt.bits) - 1)).view(rows, -1, fmt.planes, 32 // fmt.planes, 2)
    words = torch.bitwise_left_shift(codes, _word_shifts(fmt, codes.device)).sum((2, 4), dtype=torch.int32)
    place = torch.arange(4, device=codes.device)
    kept = ((nibbles & 3)[..., None] == place) | ((nibbles >> 2)[..., None] == place)
    bits = kept.view(rows, -1, fmt.planes, 8 // fmt.planes, 4, 2, 2).to(torch.int32)
    index = torch.bitwise_left_shift(bits, _index_shifts(fmt, codes.device)).sum((2, 3, 5, 6), dtype=torch.int32)
    scale, zero = tile_scales(tensors[1], tensors[2], fmt, n, k)
    return _tiled(words), scale, zero, _tiled(index)


def _from_triton(tensors: Tensors, fmt: Format, n: int, k: int) -> Tensors:
    weight, scale, zero, index = tensors
    assert index is not None
    mask, device = (1 << fmt.bits) - 1, weight.device
    codes = (_untiled(weight)[:, :, None, :, None] >> _word_shifts(fmt, device)) & mask
    bits = (_untiled(index)[:, :, None, None, :, None, None] >> _index_shifts(fmt, device)) & 1
    kept = bits.flatten(-2).flatten(1, 4)
    first, last = kept.argmax(-1), 3 - kept.flip(-1).argmax(-1)
    nibbles = (first | last << 2).to(torch.int32)
    codes = codes.flatten(1, 3)
    codes = torch.where((nibbles == _LAST_TWO)[..., None], codes.flip(-1), codes)
    scale, zero = untile_scales(scale, zero, fmt, n, k)
    words, positions = _pack(codes, nibbles, zero, fmt, n, k)
    return words, scale, zero, positions


def _word_shifts(fmt: Format, device: torch.device) -> Tensor:
    """``[planes, 1, 2]``: where the codes ``a`` and ``b`` of a plane are in their word."""
    plane, half = torch.arange(fmt.planes, device=device), torch.arange(2, device=device)
    return torch.as_tensor(fmt.bits * plane[:, None, None] + 16 * half, dtype=torch.int32)


def _index_shifts(fmt: Format, device: torch.device) -> Tensor:
    """``[planes, t // 4, t % 4, c // 2, c % 2]``: where the bit of a weight is in its word."""
    plane, four, pair = (torch.arange(size, device=device) for size in (fmt.planes, 8 // fmt.planes, 2))
    left = fmt.bits * plane[:, None, None, None, None] + 2 * four[:, None, None, None]
    return torch.as_tensor(left + pair[:, None] + 16 * pair, dtype=torch.int32)


def _tiled(words: Tensor) -> Tensor:
    """``[rows, blocks, T]`` into ``[rows/64, blocks, 64, T]``, even places first."""
    places = words.view(len(words), words.shape[1], -1, 2).transpose(2, 3).flatten(2)
    return places.view(-1, TILE_N, *places.shape[1:]).transpose(1, 2).contiguous()


def _untiled(tiles: Tensor) -> Tensor:
    places = tiles.transpose(1, 2).flatten(0, 1)
    return places.view(*places.shape[:2], 2, -1).transpose(2, 3).flatten(2)


def _to_fragments(tensors: Tensors, fmt: Format, n: int, k: int) -> Tensors:
    rows = -(-n // FRAGMENT_ROWS) * FRAGMENT_ROWS
    codes, nibbles = _unpack(tensors, fmt, k, rows)
    weight = _code_fragments(codes, tensors[2], fmt, n)
    # [rows/128, pair, tile of the pair, half, lane / 4, chunk, product, lane % 2, group]
    fields = nibbles.view(-1, 4, 2, 2, 8, nibbles.shape[1] // (8 * fmt.planes), fmt.planes, 2, 4)
    shifts = torch.arange(2, device=fields.device)[:, None, None, None, None, None] * 16
    shifts = (shifts + 4 * torch.arange(4, device=fields.device)).to(torch.int32)
    index = torch.bitwise_left_shift(fields, shifts).sum((3, 8), dtype=torch.int32)
    # To [rows/128, chunk, pair, product, lane / 4, tile of the pair, lane % 2]
    index = index.permute(0, 4, 1, 5, 3, 2, 6).flatten(4).flatten(2, 3).unflatten(2, (-1, 4)).transpose(3, 4)
    scale, zero = _scale_fragments(tensors[1], tensors[2], fmt, n, rows)
    return weight, scale, zero, index.contiguous()


def _code_fragments(codes: Tensor, zero: Tensor | None, fmt: Format, n: int) -> Tensor:
    # Whoever multiplies subtracts the zero point; of padded rows it is 0.
    rows, groups, _ = codes.shape
    points = _zero_codes(zero, fmt, n, groups)
    if isinstance(points, Tensor):
        points = F.pad(points, (0, 0, 0, groups - points.shape[1], 0, rows - n))
    codes = (codes ^ points) & ((1 << fmt.bits) - 1)
    # [rows/128, tile, half (i % 2), lane / 4, chunk, product, i // 2, lane % 4, code of the pair]
    fields = codes.view(-1, 8, 2, 8, groups // (8 * fmt.planes), fmt.planes, 2, 4, 2)
    # To [rows/128, chunk, tile, lane, word, field, code of the pair]
    fields = fields.permute(0, 4, 1, 3, 7, 5, 6, 2, 8).flatten(5, 7).flatten(3, 4).unflatten(4, (4, fmt.planes))
    places = torch.arange(fmt.planes, device=fields.device), torch.arange(2, device=fields.device)
    shifts: Tensor = fmt.bits * places[0][:, None] + 16 * places[1]
    return torch.bitwise_left_shift(fields, shifts.to(torch.int32)).sum((-2, -1), dtype=torch.int32)


def _scale_fragments(
    scale: Tensor, zero: Tensor | None, fmt: Format, n: int, rows: int
) -> tuple[Tensor, Tensor | None]:
    if fmt.number == "float":
        return scale, None
    scale = F.pad(scale, (0, 0, 0, rows - n))
    if fmt.group_size is None:
        return scale.view(-1, FRAGMENT_ROWS), None
    if zero is None:
        return _by_lane(scale).contiguous(), None
    points = _by_lane(F.pad(unpack_bits(zero.t(), fmt.bits, n).t(), (0, 0, 0, rows - n)))
    upper, lower = points.unbind(-1)
    bytes_ = torch.stack((upper, lower << 4, lower, torch.zeros_like(upper)), dim=-1)
    return _by_lane(scale).contiguous(), bytes_.contiguous()


def _by_lane(per_group: Tensor) -> Tensor:
    """``[rows, G]`` into ``[rows/128, G, 8, 8, 2]``: by lane / 4, tile and half."""
    return per_group.view(-1, 8, 2, 8, per_group.shape[1]).permute(0, 4, 3, 1, 2)


def _from_fragments(tensors: Tensors, fmt: Format, n: int, k: int) -> Tensors:
    weight, scale, zero, index = tensors
    assert index is not None
    device = weight.device
    if scale.dim() == 5:
        scale = scale.permute(0, 3, 4, 2, 1).flatten(0, 3)[:n].contiguous()
    elif fmt.number == "int":
        scale = scale.view(-1, 1)[:n].contiguous()
    if zero is not None:
        points = zero[..., 0::2].permute(0, 3, 4, 2, 1).flatten(0, 3)[:n]
        zero = pack_bits(points.t(), fmt.bits).t().contiguous()
    # The steps of _to_fragments, backwards.
    blocks, chunks, planes = weight.shape[0], weight.shape[1], fmt.planes
    shifts = fmt.bits * torch.arange(planes, device=device)[:, None] + 16 * torch.arange(2, device=device)
    fields = (weight[..., None, None] >> shifts.to(torch.int32)) & ((1 << fmt.bits) - 1)
    fields = fields.view(blocks, chunks, 8, 8, 4, planes, 2, 2, 2).permute(0, 2, 7, 3, 1, 5, 6, 4, 8)
    codes = fields.reshape(blocks * FRAGMENT_ROWS, -1, 2)
    words = index.transpose(3, 4).reshape(blocks, chunks, 4, planes, 8, 2, 2)[..., None, None]
    shifts = 16 * torch.arange(2, device=device)[:, None] + 4 * torch.arange(4, device=device)
    # [rows/128, chunk, pair, product, lane / 4, tile of the pair, lane % 2, half, group]
    nibbles = (words >> shifts.to(torch.int32)) & 15
    nibbles = nibbles.permute(0, 2, 5, 7, 4, 1, 3, 6, 8).reshape(blocks * FRAGMENT_ROWS, -1)
    groups = -(-k // 4)
    codes = codes[:n, :groups] ^ _zero_codes(zero, fmt, n, groups)
    plain, positions = _pack(codes, nibbles, zero, fmt, n, k)
    return plain, scale, zero, positions
