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
from qlinear.kernels.estimate import kernel_seconds, machine_for
from qlinear.kernels.runtime import MAX_SPLIT_TILES, Capability
from qlinear.kernels.tile_table import M_BUCKETS, MANY, multiplies_bytes, tiles_of, token_bytes
from qlinear.machines import Machine

#: Shared memory a program can have in KiB, by capability; others have 99 (sm_86, sm_89, sm_120) or, on AMD, 64.
_SHARED_KIB = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}

#: Up to so many tokens tiles are as wide as they can be.
_FEW = 16
#: K is split so that there are programs for so many of the multiprocessors, if that can be ...
_FILLED = 0.75
#: ... and each has no more than this many one after the other; a program keeps so many blocks of 128.
_MOST_PROGRAMS = 8
_MIN_BLOCKS = 4


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
        tokens on sm_90, 20 % for 16 on sm_80 and 60 % for 128. From 64 tokens on what expands 2:4 weights
        gains by that too, but not symmetric int4: its scales are carried along, and all that was expanded would have
        to change threads for their layout. The product of a whole warpgroup reads tokens from shared memory; one has
        one wait, four have three.
        """
        if isinstance(capability, str) or dtype == torch.float32:
            return True
        if capability[0] in (9, 10) and self.num_warps >= 4 and self.block_m >= 16:
            return True
        together = self.block_m <= 16 or capability[0] in (9, 10) or (fmt.bits == 4 and fmt.symmetric)
        return fmt.sparsity == "2:4" and together

    def parts_ahead(self, capability: Capability) -> int:
        """Parts of K that are read at a time when they are added: on sm_90 as many as 64 registers hold.

        Elsewhere ptxas then spills, or waits for loads of the loop in their own iteration.
        """
        return 1 if capability != (9, 0) else max(1, min(8, 64 * 32 * self.num_warps // (self.block_m * self.block_n)))

    def waits_for_operands(self, capability: Capability) -> bool:
        """Whether a program waits for a product before it decodes the next block.

        On sm_90 products read the decoded weight from registers while the program goes on. Triton, which by PTX may
        not, and ptxas decode the next block into them ahead of the wait. Whether numbers come out wrong only a GPU can
        tell: if the stage ``operands`` of ``python -m bench gpu`` says so, this has to be ``capability == (9, 0)``.
        What that costs is in :mod:`bench.waiting`.
        """
        return False

    def options(self, fmt: Format, capability: Capability) -> dict[str, int]:
        """What the kernel is compiled with, beside its constants."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if isinstance(capability, str):
            return options
        # Left to itself ptxas stops at 96, 128 or 168 registers, where one more program would fit a processor, and
        # spills the scales of int8 groups, what decodes e4m3, sums of W4A8, or what adds the parts of K. Told that it
        # may, it takes a few more, and two programs of 4 warps still fit.
        grouped8 = fmt.bits == 8 and fmt.group_size is not None and self.num_warps == 4
        spills = fmt.packing == "planar_e4m3" or grouped8 or (fmt.bits == 4 and fmt.integer_sums)
        told = self.block_m <= 16 if capability[0] == 9 else spills or self.num_warps == 2
        if told:
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
    return _choose(bucket, n, k, fmt, dtype, capability, num_sms)


# Asked before every launch, always for the same few problems.
@functools.cache
def _choose(
    bucket: int, n: int, k: int, fmt: Format, dtype: torch.dtype, capability: Capability, num_sms: int
) -> Config:
    """The configuration that takes the least time by count, over all the bucket's tokens."""
    machine, blocks = machine_for(capability, num_sms), -(-k // BLOCK_K)
    # At one number of tokens alone, tiles that happen to fill the processors there would win.
    below = max(end for end in (0, *M_BUCKETS) if end < bucket)
    tokens = [below + (bucket - below) * quarters // 4 for quarters in (1, 2, 3, 4)]
    every: dict[Config, float] = {}
    filling: dict[Config, float] = {}
    for tile in tiles_of(bucket, fmt, dtype, capability):
        tiles, stages = -(-bucket // tile[0]) * -(-n // tile[1]), _num_stages(*tile, fmt, dtype, capability)
        for split in _parts(bucket, n, tiles, blocks, num_sms, machine.l2_bytes):
            config = Config(*tile, stages, split)
            every[config] = sum(config_seconds(m, n, k, fmt, dtype, machine, config) for m in tokens)
            if tiles * split >= _FILLED * num_sms:
                filling[config] = every[config]
        # Few tokens: every row of tiles reads them again, through an L2 cache whose speed is not well known.
        if bucket <= _FEW and filling:
            break
    found = filling or every
    # The first, which is the widest in the fewest parts, of those that are as good as equal.
    return next(config for config, seconds in found.items() if seconds <= 1.03 * min(found.values()))


def _parts(bucket: int, n: int, tiles: int, blocks: int, num_sms: int, l2_bytes: int) -> Iterator[int]:
    """Parts that K can be cut into: their sums leave half of the L2 cache to all else; an open M is not split."""
    most = min(_MOST_PROGRAMS * num_sms // tiles, blocks // _MIN_BLOCKS, l2_bytes // (8 * bucket * n))
    if bucket == MANY or tiles > MAX_SPLIT_TILES:
        most = 1
    yield from (split for split in range(1, max(1, most) + 1) if no_empty_part(blocks, split) == split)


def config_seconds(m: int, n: int, k: int, fmt: Format, dtype: torch.dtype, machine: Machine, config: Config) -> float:
    """:func:`~qlinear.kernels.estimate.kernel_seconds` of a configuration."""
    tile = config.block_m, config.block_n, config.num_warps
    block = sum(_tile_bytes(config.block_m, config.block_n, fmt, dtype, machine.capability))
    return kernel_seconds(m, n, k, fmt, dtype, machine, tile, config.split_k, (config.num_stages - 1) * block)


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

    A tile has tokens that its bucket's tiles have and rows that divide by :data:`~qlinear.format.TILE_N`; its buffers
    fit the shared memory of a processor; no part of K is empty; many tokens, whose number is open, are not split.
    """
    tokens = {block_m for block_m, _, _ in tiles_of(bucket, fmt, dtype, capability)}
    # Two warps have no registers for more.
    warps = (2, 4, 8) if config.block_m <= 16 else (4, 8)
    if config.block_m not in tokens or config.block_n not in (64, 128, 256) or config.num_warps not in warps:
        return f"no tile of {bucket} tokens is {config.block_m}x{config.block_n} in {config.num_warps} warps"
    shared = shared_bytes(capability)
    buffers = (config.num_stages - 1) * sum(_tile_bytes(config.block_m, config.block_n, fmt, dtype, capability))
    if not 2 <= config.num_stages <= 6 or buffers > shared:
        return f"{config.num_stages} buffers are not 2 to 6, or more than {shared >> 10} KiB"
    split = config.split_k
    reason = _uncut(-(-k // BLOCK_K), split)
    if reason:
        return reason
    tiles = -(-bucket // config.block_m) * -(-n // config.block_n)
    if split > 1 and (bucket == MANY or tiles > MAX_SPLIT_TILES):
        return "K is split for few tokens and few tiles only"
    return None


def check_parts(config: Config, blocks: int, what: str = "blocks") -> None:
    """Raises a ValueError where a program would have none of the blocks along K: kernels load before they ask."""
    reason = _uncut(blocks, config.split_k, what)
    if reason:
        raise ValueError(f"{config} cannot be used: {reason}")


def _uncut(blocks: int, parts: int, what: str = "blocks") -> str | None:
    if parts < 1 or no_empty_part(blocks, parts) != parts:
        return f"{blocks} {what} along K cannot be cut into {parts} parts"
    return None


def shipped_configs(fmt: Format, dtype: torch.dtype, capability: Capability) -> Iterator[Config]:
    """Every configuration :func:`choose_config` can return, up to ``split_k``, which is not compiled in."""
    for tile in dict.fromkeys(tile for bucket in M_BUCKETS for tile in tiles_of(bucket, fmt, dtype, capability)):
        yield Config(*tile, _num_stages(*tile, fmt, dtype, capability))


def bucket_of(m: int) -> int:
    """The bucket of ``m`` tokens: its largest M, or :data:`MANY`."""
    return next((bucket for bucket in M_BUCKETS if m <= bucket), MANY)


def shared_bytes(capability: Capability) -> int:
    """The most shared memory that one program can have."""
    return (64 if isinstance(capability, str) else _SHARED_KIB.get(capability, 99)) << 10


def no_empty_part(blocks: int, split: int) -> int:
    """The smallest split with as many blocks per program."""
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
