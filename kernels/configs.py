"""Block sizes for a problem: one plain function, computed from the shape, the format and the device, never measured at run time.

M only counts by its bucket, so that the bits of a token do not depend on how many others share its batch (within a bucket).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch

from qlinear.format import BLOCK_K, TILE_N, Format
from qlinear.kernels.runtime import MAX_SPLIT_TILES, Capability

#: Tokens are rounded up to the next of these; above the last, M is covered by tiles of it.
M_BUCKETS = (16, 64, 128)

#: Shared memory one program may use, in bytes; the smallest is assumed of a device that is not listed.
_SHARED_MEMORY = {
    (8, 0): 163 << 10,
    (8, 7): 163 << 10,
    (9, 0): 227 << 10,
    (10, 0): 227 << 10,
    (10, 3): 227 << 10,
}
_SHARED_MEMORY_SMALL = {"nvidia": 99 << 10, "amd": 64 << 10}

#: A split along K is worth its partial sums only above this many blocks of 128 per program.
_MIN_BLOCKS = 4
#: Bytes of partial sums over bytes of weights.
_MAX_PARTIALS = 0.15


@dataclass(frozen=True)
class Config:
    """How a matmul is cut: BLOCK_M tokens by BLOCK_N rows of the weight per program, K in ``split_k`` parts."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    split_k: int = 1

    def scales_weight(self, fmt: Format) -> bool:
        """Whether a group's scale multiplies the decoded weight: where the sum over the group is the larger tile."""
        return fmt.group_size is not None and 2 * self.block_m > fmt.group_size

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n}-w{self.num_warps}-s{self.num_stages}-k{self.split_k}"


def choose_config(m: int, n: int, k: int, fmt: Format, dtype: torch.dtype, capability: Capability, num_sms: int) -> Config:
    """The configuration for ``[m, k] @ [n, k]^T``."""
    bucket = next((b for b in M_BUCKETS if m <= b), M_BUCKETS[-1])
    tile = tile_config(bucket, fmt, dtype, capability)
    if m > M_BUCKETS[-1]:
        return tile
    return Config(tile.block_m, tile.block_n, tile.num_warps, tile.num_stages, _split_k(tile, bucket, n, k, fmt, num_sms))
def tile_config(bucket, fmt, dtype, capability):
    return Config(16, 128, 4, 4)
