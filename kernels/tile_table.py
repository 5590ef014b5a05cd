"""Which tiles of tokens and rows the matmul kernel has, by format, dtype and GPU."""

from __future__ import annotations

import torch

from qlinear.format import Format
from qlinear.kernels.runtime import Capability, has_fp8

#: Tokens are rounded up to the next of these: from 128 on, how a matmul is best cut changes with every tile or two.
M_BUCKETS = (8, 16, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
#: Stands for the bucket of more tokens than that.
MANY = 2 * M_BUCKETS[-1]
#: Most tokens of one tile.
TILE_TOKENS = 128

#: (BLOCK_M, BLOCK_N, warps).
Tile = tuple[int, int, int]
_Tiles = dict[int, tuple[Tile, ...]]

#: Tiles by bucket, widest first: every program reads its tokens again, so a wide BLOCK_N saves
#: traffic where there are programs enough. A tile is as large as its sums fit into registers: a test compiles them
#: all and finds no spill.
_AMPERE_TILES: _Tiles = {
    8: ((8, 128, 4),),
    16: ((16, 128, 4),),
    64: ((64, 64, 4),),
    128: ((128, 128, 8),),
}
_HOPPER_TILES: _Tiles = _AMPERE_TILES | {
    8: ((8, 256, 4), (8, 128, 4)),
    16: ((16, 256, 4), (16, 128, 4)),
    64: ((64, 256, 8), (64, 128, 4)),
}
#: Two warpgroups that each have all 128 tokens keep the decoded weight in registers (w4a16: 3.3 instructions a weight);
#: in a tile of 128x128 they share it through shared memory (5.7). Only the sums of int4 leave registers enough.
_HOPPER_TILES_INT4: _Tiles = _HOPPER_TILES | {128: ((128, 256, 8), (128, 128, 8))}
#: W4A8: the sums of many tokens leave no registers for what decodes; two narrow tiles fit a multiprocessor.
_HOPPER_TILES_W4A8: _Tiles = _HOPPER_TILES | {128: ((64, 128, 4),)}
#: 2:4 on mma.sync: the warps along the tokens each expand the weight, which takes registers too.
_AMPERE_TILES_24: _Tiles = _AMPERE_TILES | {128: ((64, 128, 8),)}
_BLACKWELL_TILES: _Tiles = _AMPERE_TILES | {16: ((16, 256, 8),), 64: ((64, 128, 4),)}
#: 16-bit floats of a 2:4 weight: a wide tile of them does not fit into the registers of 4 warps.
_HOPPER_TILES_16: _Tiles = _AMPERE_TILES | {64: ((64, 256, 8), (64, 128, 8))}
#: int8 in groups: their scales do not fit into registers beside a wide tile.
_HOPPER_TILES_INT8_GROUPS: _Tiles = _HOPPER_TILES | {16: ((16, 128, 4),)}
#: int8 and 16 bits of a 2:4 weight, expanded, do not fit into registers beside a wide tile.
_BLACKWELL_TILES_24: _Tiles = _BLACKWELL_TILES | {16: ((16, 128, 4),), 64: ((64, 128, 8),)}
#: Groups of 32: a warpgroup's product per group takes 4.6 instructions a weight, mma.sync of two warps half as many.
_BLACKWELL_TILES_32: _Tiles = _BLACKWELL_TILES | {16: ((16, 128, 2),)}
#: float8 as a whole warpgroup multiplies it: a tile of 8 tokens would be converted to float16 first.
_FP8_TILES: dict[int, _Tiles] = {
    9: _HOPPER_TILES | {8: _HOPPER_TILES[16]},
    10: _BLACKWELL_TILES | {8: _BLACKWELL_TILES[16]},
}
_AMD_TILES: _Tiles = {8: ((16, 128, 4),), 16: ((16, 128, 4),), 64: ((64, 128, 4),), 128: ((128, 128, 8),)}
#: 2:4 in bfloat16 spills in a tile of 128 tokens.
_AMD_TILES_24: _Tiles = _AMD_TILES | {128: ((64, 128, 4),)}
#: float32 is there to be right: three products for one leave no registers for more.
_FLOAT32_TILES: _Tiles = dict.fromkeys(M_BUCKETS, ((8, 64, 4),))
#: ptxas spills a few registers of 4 warps in groups of 64.
_BLACKWELL_FLOAT32_TILES: _Tiles = dict.fromkeys(M_BUCKETS, ((8, 128, 8),))
_AMD_FLOAT32_TILES: _Tiles = dict.fromkeys(M_BUCKETS, ((16, 64, 4),))


def tiles_of(bucket: int, fmt: Format, dtype: torch.dtype, capability: Capability) -> tuple[Tile, ...]:
    """The tiles a bucket can have, widest first; 128 tokens and more can have narrow ones, to fill a device."""
    tiles = _tiles(fmt, dtype, capability)
    if bucket < TILE_TOKENS:
        return tiles[bucket]
    return tuple(dict.fromkeys((*tiles[TILE_TOKENS], tiles[64][-1])))


def _tiles(fmt: Format, dtype: torch.dtype, capability: Capability) -> _Tiles:
    if isinstance(capability, str):
        tiles = _AMD_TILES_24 if fmt.sparsity == "2:4" else _AMD_TILES
        return _AMD_FLOAT32_TILES if dtype == torch.float32 else tiles
    if dtype == torch.float32:
        return _BLACKWELL_FLOAT32_TILES if capability[0] == 10 else _FLOAT32_TILES
    if fmt.group_size == 32 and capability[0] == 10:
        return _BLACKWELL_TILES_32
    if fmt.group_size is not None and fmt.bits == 8 and capability[0] == 9:
        return _HOPPER_TILES_INT8_GROUPS
    if fmt.sparsity == "2:4" and capability[0] not in (9, 10):
        return _AMPERE_TILES_24
    if fmt.sparsity == "2:4" and capability[0] == 10 and fmt.bits != 4:
        return _BLACKWELL_TILES_24
    if fmt.bits == 16 and capability[0] == 9:
        return _HOPPER_TILES_16
    if fmt.bits == 4 and fmt.integer_activations and capability[0] == 9:
        return _HOPPER_TILES_W4A8
    if fmt.packing == "planar4" and capability[0] == 9:
        return _HOPPER_TILES_INT4
    if fmt.packing == "rows_e4m3" and capability[0] in _FP8_TILES:
        return _FP8_TILES[capability[0]]
    return {9: _HOPPER_TILES, 10: _BLACKWELL_TILES}.get(capability[0], _AMPERE_TILES)


def multiplies_bytes(fmt: Format, capability: Capability) -> bool:
    """Whether tensor cores multiply 8-bit numbers: int8, or e4m3 where they know it."""
    return fmt.integer_activations or (fmt.quantized_activations and has_fp8(capability))


def token_bytes(fmt: Format, dtype: torch.dtype, capability: Capability) -> int:
    """Bytes of one number of a token as it is multiplied; e4m3 that is not multiplied as it is takes 2 (float16)."""
    if multiplies_bytes(fmt, capability):
        return 1
    return 2 if fmt.quantized_activations else dtype.itemsize
