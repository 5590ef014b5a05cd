"""From how many tokens on it is cheaper to dequantize a weight and let the vendor's library multiply.

The kernel decodes the weight again for every 128 tokens, and its products wait for what is decoded; the other path
writes the dense weight once. Nothing is measured here: the numbers are counts, makers' figures and two assumptions,
each said to be what it is. A table that ``qlinear tune`` measured on this very GPU overrides the result.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate

import torch

from qlinear.format import Format
from qlinear.kernels.configs import choose_config, config_seconds, dense_rows
from qlinear.kernels.estimate import machine_for, vendor_seconds
from qlinear.kernels.runtime import Capability
from qlinear.kernels.tile_table import M_BUCKETS, TILE_TOKENS
from qlinear.machines import Machine

#: Seconds that one more kernel on the stream costs. An assumption.
LAUNCH = 2e-6

#: The most tokens of the kernel that there can be: ends of M buckets, so that no crossover lies within one. More than
#: the last are always the vendor's.
ENDS: tuple[int, ...] = tuple(end for end in M_BUCKETS if end >= TILE_TOKENS)
MOST_TOKENS = ENDS[-1]
#: Of AMD's machine code there is no count: an assumption.
_AMD_TOKENS = 256

#: Measured crossovers by (scheme, dtype, out_features, in_features).
Measured = Mapping[tuple[str, torch.dtype, int, int], int]


def fused_tokens(
    n: int,
    k: int,
    fmt: Format,
    dtype: torch.dtype,
    capability: Capability,
    num_sms: int,
    l2_bytes: int,
    kept: bool = False,
    measured: Measured | None = None,
) -> int | None:
    """The most tokens that the kernel multiplies by a weight ``[n, k]``; None: any number.

    One of :data:`ENDS`; with more tokens the vendor's matmul is used, on a dequantized weight, or on the dense copy
    where one is ``kept``. Rounded activations have no 16-bit product to fall back to; float32 products are three on the
    tensor cores, and still faster than the vendor's.

    Args:
        dtype: of x.
        l2_bytes: the size of the L2 cache: the dense weight is made in slices that stay in it.
        measured: what ``qlinear tune`` found; it wins over the count, but not where a copy is kept.
    """
    if fmt.quantized_activations or dtype == torch.float32:
        return None
    if measured and not kept:
        found = measured.get((fmt.name, dtype, n, k))
        if found is not None:
            return found
    return _counted(n, k, fmt, dtype, capability, num_sms, l2_bytes, kept)


@functools.cache
def _counted(
    n: int, k: int, fmt: Format, dtype: torch.dtype, capability: Capability, num_sms: int, l2_bytes: int, kept: bool
) -> int:
    if isinstance(capability, str):
        return _AMD_TOKENS
    machine = replace(machine_for(capability, num_sms), l2_bytes=l2_bytes)
    kernel = [fused_seconds(m, n, k, fmt, dtype, machine) for m in ENDS]
    other = [vendor_seconds(m, n, k, machine) if kept else dequantize_seconds(m, n, k, fmt, machine) for m in ENDS]
    # The two may cross more than once, as tiles fill the processors or do not: the end that loses least in all. Up to
    # the first the kernel is always taken.
    lost = [(a - b) / min(a, b) for a, b in zip(kernel, other, strict=True)]
    totals = list(accumulate(lost[1:], initial=0.0))
    return ENDS[totals.index(min(totals))]


def dequantize_seconds(m: int, n: int, k: int, fmt: Format, machine: Machine) -> float:
    """The path of many tokens: read the packed weight, write a dense one, and let the vendor multiply.

    Slices of the dense weight stay in the L2 cache, whose speed is not public; they are charged as memory's, which is
    an upper bound. Every slice is two kernels, where the vendor's product alone is one.
    """
    moved = fmt.weight_bytes(n, k) + 2 * n * k
    slices = -(-n // dense_rows(m, n, k, 2, machine.sms, machine.l2_bytes))
    return moved / machine.stream_bytes_per_s + vendor_seconds(m, n, k, machine) + LAUNCH * (2 * slices - 1)


def fused_seconds(m: int, n: int, k: int, fmt: Format, dtype: torch.dtype, machine: Machine) -> float:
    """The kernel, in the configuration that is chosen for it."""
    config = choose_config(m, n, k, fmt, dtype, machine.capability, machine.sms)
    return config_seconds(m, n, k, fmt, dtype, machine, config)
