"""Block sizes for a problem: one plain function of shape, format and device; nothing is measured at run time.

M counts only by its bucket, so that the bits of a token do not depend on how many others share its batch (within a
bucket).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from qlinear.format import BLOCK_K, Format
from qlinear.kernels.runtime import MAX_SPLIT_TILES, Capability, has_fp8

#: Tokens are rounded up to the next of these; more than the last are covered by tiles of the last.
M_BUCKETS = (8, 16, 64, 128)
#: Stands for the bucket of more tokens than that.
MANY = 2 * M_BUCKETS[-1]

_Tiles = dict[int, tuple[tuple[int, int, int], ...]]

#: (BLOCK_M, BLOCK_N, warps) by bucket, widest first: every program reads its tokens again, so a wide BLOCK_N saves
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

#: Shared memory a program can have in KiB, by capability; others have 99 (sm_86, sm_89, sm_120) or, on AMD, 64.
_SHARED_KIB = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}

#: K is split so that the device is full, but a program keeps this many blocks of 128 ...
_MIN_BLOCKS = 4
#: ... and partial sums, which stay in the L2 cache, this share of the bytes of the weight.
_MAX_PARTIALS = 0.5


@dataclass(frozen=True)
class Config:
    """How a matmul is cut: BLOCK_M tokens by BLOCK_N rows of the weight per program, K in ``split_k`` parts."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    split_k: int = 1

    def scales_weight(self, fmt: Format) -> bool:
        """Whether scales multiply the decoded weight, two numbers an instruction, rather than a group's sum.

        Where both cost the same, one product a block needs fewer registers and waits than one a group.
        """
        return fmt.group_size is not None and not fmt.quantized_activations and 2 * self.block_m >= fmt.group_size

    def joins_planes(self, fmt: Format, dtype: torch.dtype, capability: Capability) -> bool:
        """Whether one product takes all the planes of a block, or of a group, rather than each plane one of its own.

        Joined, Triton lays tokens out as for numbers of 8 bits: of the two registers that ``mma.sync`` takes of them
        each has to be moved beside the other, for every product. Apart, w4a16 takes 10 % fewer instructions for 8
        tokens on sm_90, 20 % for 16 on sm_80 and 60 % for 128. What expands 2:4 weights gains from it from 64 tokens
        on. The product of a whole warpgroup reads tokens from shared memory; one has one wait, four have three.
        """
        if isinstance(capability, str) or dtype == torch.float32:
            return True
        if capability[0] in (9, 10) and self.num_warps >= 4 and self.block_m >= 16:
            return True
        return fmt.sparsity == "2:4" and (self.block_m <= 16 or capability[0] in (9, 10))

    def options(self, fmt: Format, capability: Capability) -> dict[str, int]:
        """What the kernel is compiled with, beside its constants."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        # Left to itself ptxas stops at 96, 128 or 168 registers, where one more program would fit a processor, and
        # spills the scales of int8 groups, what decodes e4m3, or sums of W4A8. Told that it may, it takes a few more,
        # or 140 or 230, and two programs still fit.
        grouped8 = fmt.bits == 8 and fmt.group_size is not None and self.num_warps == 4
        spills = fmt.packing == "planar_e4m3" or grouped8 or (fmt.bits == 4 and fmt.integer_sums)
        if (spills or self.num_warps == 2) and not isinstance(capability, str) and capability[0] != 9:
            options["maxnreg"] = 255
        return options

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n}-w{self.num_warps}-s{self.num_stages}-k{self.split_k}"


#: Measured configurations by (scheme, dtype, M bucket, out_features, in_features).
Measured = Mapping[tuple[str, torch.dtype, int, int, int], Config]


def choose_config(
    m: int,
    n: int,
    k: int,
    fmt: Format,
    dtype: torch.dtype,
    capability: Capability,
    num_sms: int,
    measured: Measured | None = None,
) -> Config:
    """The configuration for x ``[m, k]`` of ``dtype`` and a weight ``[n, k]``.

    Args:
        measured: what ``qlinear tune`` found on this GPU; it wins over what is computed.
    """
    bucket = bucket_of(m)
    if measured:
        found = measured.get((fmt.name, dtype, bucket, n, k))
        if found is not None:
            return found
    return _choose(min(bucket, M_BUCKETS[-1]), bucket == MANY, n, k, fmt, dtype, capability, num_sms)


# Asked before every launch, always for the same few problems.
@functools.cache
def _choose(
    bucket: int, more: bool, n: int, k: int, fmt: Format, dtype: torch.dtype, capability: Capability, num_sms: int
) -> Config:
    for tile in _tiles(bucket, fmt, dtype, capability):
        _, block_n, num_warps = tile
        tiles = -(-n // block_n)
        # Programs of 4 warps run two to a multiprocessor.
        wanted = num_sms * 8 // num_warps // tiles
        split = 1 if more else _split_k(wanted, tiles, bucket, k, fmt)
        if tiles * split >= 0.75 * num_sms:
            break
    return Config(*tile, _num_stages(*tile, fmt, dtype, capability), split)


def dense_rows(m: int, n: int, k: int, itemsize: int, num_sms: int, l2_bytes: int) -> int:
    """Rows of the weight to dequantize at a time for the vendor's matmul of x ``[m, k]``: a multiple of 128, or n.

    As many as leave half of the L2 cache to everything else, so that what was dequantized is multiplied before it
    leaves the cache and no large layer is ever held dense; but never so few that products of 128x128 leave
    processors idle. By count, not yet by measurement.
    """
    cached = l2_bytes // 2 // (k * itemsize) // 128 * 128
    filling = 128 * -(-num_sms // -(-m // 128))
    slices = -(-n // max(cached, filling))
    return n if slices == 1 else -(-n // slices // 128) * 128


def refusal(
    config: Config, bucket: int, n: int, k: int, fmt: Format, dtype: torch.dtype, capability: Capability
) -> str | None:
    """Why a configuration cannot be used for a problem, None where it can: what is tuned is held to this.

    A tile has the tokens of its bucket and rows that divide by :data:`~qlinear.format.TILE_N`; its buffers fit the
    shared memory of a processor; no part of K is empty; many tokens, whose number is open, are not split.
    """
    block_m = _tiles(min(bucket, M_BUCKETS[-1]), fmt, dtype, capability)[0][0]
    # Two warps have no registers for more.
    warps = (2, 4, 8) if block_m <= 16 else (4, 8)
    if config.block_m != block_m or config.block_n not in (64, 128, 256) or config.num_warps not in warps:
        return f"no tile of {bucket} tokens is {config.block_m}x{config.block_n} in {config.num_warps} warps"
    shared = shared_bytes(capability)
    buffers = (config.num_stages - 1) * sum(_tile_bytes(block_m, config.block_n, fmt, dtype, capability))
    if not 2 <= config.num_stages <= 6 or buffers > shared:
        return f"{config.num_stages} buffers are not 2 to 6, or more than {shared >> 10} KiB"
    blocks, split = -(-k // BLOCK_K), config.split_k
    if split < 1 or split > blocks or -(-blocks // -(-blocks // split)) != split:
        return f"{blocks} blocks along K cannot be cut into {split} parts"
    if split > 1 and (bucket == MANY or -(-n // config.block_n) > MAX_SPLIT_TILES):
        return "K is split for few tokens and few tiles only"
    return None


def shipped_configs(fmt: Format, dtype: torch.dtype, capability: Capability) -> Iterator[Config]:
    """Every configuration :func:`choose_config` can return, up to ``split_k``, which is not compiled in."""
    for tile in dict.fromkeys(tile for bucket in M_BUCKETS for tile in _tiles(bucket, fmt, dtype, capability)):
        yield Config(*tile, _num_stages(*tile, fmt, dtype, capability))


def bucket_of(m: int) -> int:
    """The bucket of ``m`` tokens: its largest M, or :data:`MANY`."""
    return next((bucket for bucket in M_BUCKETS if m <= bucket), MANY)


def multiplies_bytes(fmt: Format, capability: Capability) -> bool:
    """Whether tensor cores multiply 8-bit numbers: int8, or e4m3 where they know it."""
    return fmt.integer_activations or (fmt.quantized_activations and has_fp8(capability))


def shared_bytes(capability: Capability) -> int:
    """The most shared memory that one program can have."""
    return (64 if isinstance(capability, str) else _SHARED_KIB.get(capability, 99)) << 10


def token_bytes(fmt: Format, dtype: torch.dtype, capability: Capability) -> int:
    """Bytes of one number of a token as it is multiplied; e4m3 that is not multiplied as it is takes 2 (float16)."""
    if multiplies_bytes(fmt, capability):
        return 1
    return 2 if fmt.quantized_activations else dtype.itemsize


def _tiles(bucket: int, fmt: Format, dtype: torch.dtype, capability: Capability) -> tuple[tuple[int, int, int], ...]:
    if isinstance(capability, str):
        tiles = _AMD_TILES_24 if fmt.sparsity == "2:4" else _AMD_TILES
        return (_AMD_FLOAT32_TILES if dtype == torch.float32 else tiles)[bucket]
    if dtype == torch.float32:
        return (_BLACKWELL_FLOAT32_TILES if capability[0] == 10 else _FLOAT32_TILES)[bucket]
    if fmt.group_size == 32 and capability[0] == 10:
        return _BLACKWELL_TILES_32[bucket]
    if fmt.group_size is not None and fmt.bits == 8 and capability[0] == 9:
        return _HOPPER_TILES_INT8_GROUPS[bucket]
    if fmt.sparsity == "2:4" and capability[0] not in (9, 10):
        return _AMPERE_TILES_24[bucket]
    if fmt.sparsity == "2:4" and capability[0] == 10 and fmt.bits != 4:
        return _BLACKWELL_TILES_24[bucket]
    if fmt.bits == 16 and capability[0] == 9:
        return _HOPPER_TILES_16[bucket]
    if fmt.packing == "planar4" and capability[0] == 9:
        return _HOPPER_TILES_INT4[bucket]
    if fmt.packing == "rows_e4m3" and capability[0] in _FP8_TILES:
        return _FP8_TILES[capability[0]][bucket]
    return {9: _HOPPER_TILES, 10: _BLACKWELL_TILES}.get(capability[0], _AMPERE_TILES)[bucket]


def _split_k(wanted: int, tiles: int, bucket: int, k: int, fmt: Format) -> int:
    blocks = -(-k // BLOCK_K)
    # Of one row of the weight: its codes, and 4 bytes of each partial sum for each token.
    affordable = int(_MAX_PARTIALS * fmt.block_bytes * k / BLOCK_K / (4 * bucket))
    split = max(1, min(wanted, blocks // _MIN_BLOCKS, affordable))
    if tiles > MAX_SPLIT_TILES:
        return 1
    # The smallest split with as many blocks per program, so that none is empty.
    return -(-blocks // -(-blocks // split))


def _num_stages(
    block_m: int, block_n: int, num_warps: int, fmt: Format, dtype: torch.dtype, capability: Capability
) -> int:
    """As many buffers as fit, at most 4, two programs of 4 warps to a multiprocessor."""
    # float32 is bound by its products, and has no registers to spare.
    if isinstance(capability, str) or dtype == torch.float32:
        return 2
    budget = shared_bytes(capability) * num_warps // 8
    weight, tokens = _tile_bytes(block_m, block_n, fmt, dtype, capability)
    # The rest is for scales and changes of layout; 16-bit floats of a large tile are expanded through shared memory.
    # Tokens are consumed in place, as 8-bit weights are where tokens have 8 bits; a weight that is decoded has left its
    # buffer.
    rest = 2 * block_n * BLOCK_K if fmt.bits == 16 and block_m > 16 else 6 << 10
    spare = 0 if multiplies_bytes(fmt, capability) and fmt.bits == 8 else 1
    return next((s for s in (4, 3) if (s - spare) * weight + s * tokens + rest <= budget), 2)


def _tile_bytes(block_m: int, block_n: int, fmt: Format, dtype: torch.dtype, capability: Capability) -> tuple[int, int]:
    """Bytes of the weight and of the tokens in one block of 128 along K."""
    tokens = block_m * BLOCK_K * token_bytes(fmt, dtype, capability)
    return block_n * fmt.block_bytes, tokens
