"""From how many tokens on it is cheaper to dequantize a weight and let the vendor's library multiply.

The kernel decodes the weight again for every 128 tokens, and its products wait for what is decoded; the other path
writes the dense weight once. Nothing is measured here: the numbers are counts, makers' figures and two assumptions,
each said to be what it is. A table that ``qlinear tune`` measured on this very GPU overrides the result.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace

import torch

from qlinear.format import BLOCK_K, Format
from qlinear.kernels.configs import M_BUCKETS, choose_config, dense_rows
from qlinear.kernels.runtime import Capability
from qlinear.machines import MACHINES, Machine

#: Share of the data sheet's tensor rate that a large product of the vendor's library reaches: bfloat16 8192^3 ran at
#: 769 to 798 of 989 TFLOP/s on an H200.
VENDOR = 0.8
#: The same of a product whose weight is decoded on the way. An assumption: that it does as well as Marlin, which has
#: 0.65 times the speed of 16 bit at 1024 tokens on an H100 (8192 x 8192).
FUSED = 0.65 * VENDOR
#: Seconds that one more kernel on the stream costs. An assumption.
LAUNCH = 2e-6

#: Issue slots per weight of the loop that has 128 tokens, by capability's major number and BLOCK_N, for a scale per
#: channel and for groups: the most of any format and 16-bit dtype that ``python -m bench audit --arch all`` counts
#: (Triton 3.7.1). A test compiles some of them and compares.
SLOTS: dict[tuple[int, int], tuple[float, float]] = {
    (8, 128): (6.4, 7.4),
    (9, 128): (4.4, 6.4),
    (9, 256): (2.7, 3.5),
    (10, 128): (4.8, 6.3),
}

#: Whose figures stand for a capability; all others are taken for an L40S (no high-bandwidth memory, mma.sync).
_STANDS_FOR = {(8, 0): "A100", (9, 0): "H200", (10, 0): "B200", (10, 3): "B200"}

#: Tokens up to which the crossover is looked for; more are always the vendor's.
MOST_TOKENS = 4096
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

    A multiple of 128 from 128 to 4096, so that it lies between tiles of tokens and never within an M bucket; with more
    tokens the vendor's matmul is used, on a dequantized weight, or on the dense copy where one is ``kept``. Rounded
    activations have no 16-bit product to fall back to; float32 products are three on the tensor cores, and still
    faster than the vendor's.

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
    machine = machine_for(capability, num_sms)
    step = M_BUCKETS[-1]
    for m in range(2 * step, MOST_TOKENS + 1, step):
        other = vendor_seconds(m, n, k, machine)
        if not kept:
            slices = -(-n // dense_rows(m, n, k, dtype.itemsize, num_sms, l2_bytes))
            other = dequantize_seconds(m, n, k, fmt, machine) + LAUNCH * (2 * slices - 1)
        if other < fused_seconds(m, n, k, fmt, dtype, machine):
            return m - step
    return MOST_TOKENS


def machine_for(capability: tuple[int, int], num_sms: int) -> Machine:
    """The figures of a capability's best known chip, in proportion to the multiprocessors there are."""
    machine = MACHINES[_STANDS_FOR.get(capability, "L40S")]
    share = num_sms / machine.sms
    return replace(
        machine,
        capability=capability,
        sms=num_sms,
        memory_bytes_per_s=machine.memory_bytes_per_s * share,
        fp16_flops=machine.fp16_flops * share,
        int8_ops=machine.int8_ops * share,
    )


def vendor_seconds(m: int, n: int, k: int, machine: Machine) -> float:
    """The vendor's 16-bit product of x ``[m, k]`` and a weight ``[n, k]``."""
    return max(2 * m * n * k / (machine.fp16_flops * VENDOR), 2 * (n * k + m * k + m * n) / machine.stream_bytes_per_s)


def dequantize_seconds(m: int, n: int, k: int, fmt: Format, machine: Machine) -> float:
    """The path of many tokens: read the packed weight, write a dense one, and let the vendor multiply.

    Slices of the dense weight stay in the L2 cache, whose speed is not public; they are charged as memory's, which is
    an upper bound.
    """
    moved = fmt.weight_bytes(n, k) + 2 * n * k
    return moved / machine.stream_bytes_per_s + vendor_seconds(m, n, k, machine)


def fused_seconds(m: int, n: int, k: int, fmt: Format, dtype: torch.dtype, machine: Machine) -> float:
    """The kernel for more than 128 tokens: the most that memory, L2 cache, issue slots and tensor cores need.

    Every program has a tile of tokens and BLOCK_N rows of the weight, and the busiest multiprocessor one after the
    other.
    """
    config = choose_config(m, n, k, fmt, dtype, machine.capability, machine.sms)
    tiles_m, tiles_n = -(-m // config.block_m), -(-n // config.block_n)
    weight, x, y = fmt.weight_bytes(n, k), m * k * dtype.itemsize, m * n * dtype.itemsize
    weights = -(-tiles_m * tiles_n // machine.sms) * -(-k // BLOCK_K) * BLOCK_K * config.block_n
    # Of one multiprocessor, whose schedulers issue for 128 threads a clock.
    issue = weights * _slots(machine.capability, config.block_n, fmt) / (machine.slots_per_s / machine.sms)
    tensor = 2 * weights * config.block_m / (machine.fp16_flops * FUSED / machine.sms)
    memory = (weight + x + y) / machine.stream_bytes_per_s
    return max(issue, tensor, memory, (weight * tiles_m + x * tiles_n + y) / machine.l2_bytes_per_s)


def _slots(capability: tuple[int, int], block_n: int, fmt: Format) -> float:
    per_channel, grouped = SLOTS.get((capability[0], block_n), SLOTS[8, 128])
    return per_channel if fmt.group_size is None else grouped
