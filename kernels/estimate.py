"""How long the matmul kernel takes at least, by count: what tiles and parts of K are chosen by.

Nothing is measured here: the numbers are counts, makers' figures and assumptions, each said to be what it is.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import NamedTuple

import torch

from qlinear.format import BLOCK_K, Format
from qlinear.kernels.runtime import Capability
from qlinear.kernels.tile_table import Tile, multiplies_bytes, token_bytes
from qlinear.machines import MACHINES, MULTIPLIED, Machine

#: Share of the vendor's tensor rate that a product reaches whose weight is decoded on the way. An assumption: that it
#: does as well as Marlin, which has 0.65 times the speed of 16 bit at 1024 tokens on an H100 (8192 x 8192), by an
#: instruction that reaches 0.75 of the peak there (vllm#7174), and 0.72 to 0.93 times on an A100, where it reaches all.
FUSED = 0.87
#: Bytes a clock of an L2 cache of which nothing is published: the A100's.
_L2_BYTES_PER_CLOCK = 5120
#: Of those, what one multiprocessor can have. An assumption.
_SM_BYTES_PER_CLOCK = 64
#: Seconds from asking memory for a block to having it: an assumption, for all machines. An H200 has to have 40 KB on
#: their way to each of its processors for so long.
LATENCY = 1.1e-6
#: (BLOCK_M, BLOCK_N) of the vendor's 16-bit products, usual tiles of CUTLASS; lower ones for fewer tokens.
_VENDOR_TILES = ((256, 128), (128, 256), (128, 128), (64, 256), (64, 128), (128, 64), (64, 64))


class Slots(NamedTuple):
    """Issue slots per weight of a loop: of 16-bit and of 8-bit products, a scale per channel or per group."""

    channel: float
    grouped: float
    channel8: float
    grouped8: float


#: By capability's major number, BLOCK_M and BLOCK_N: the most of any format and 16-bit dtype that ``python -m bench
#: audit --arch all`` counts (Triton 3.7.1). A test compiles some of them and compares. Not in it: e4m3 that sm_80
#: converts (12.1 and 7.7), which is bound by its products as well.
SLOTS: dict[tuple[int, int, int], Slots] = {
    (8, 128, 128): Slots(6.4, 7.4, 2.7, 5.0),
    (8, 64, 64): Slots(4.8, 5.9, 1.9, 3.2),
    # Only int4 of 16-bit tokens has this tile.
    (9, 128, 256): Slots(2.7, 3.5, 2.7, 3.5),
    (9, 128, 128): Slots(4.4, 6.4, 2.6, 4.1),
    (9, 64, 256): Slots(3.3, 3.7, 1.4, 2.3),
    (9, 64, 128): Slots(3.4, 4.0, 1.5, 2.4),
    (10, 128, 128): Slots(4.8, 6.3, 5.2, 8.3),
    (10, 64, 128): Slots(3.5, 4.3, 2.7, 4.0),
}

#: Issue slots per weight where 2:4 is expanded for up to 16 tokens, by bits of a weight: sm_90's, in bfloat16.
_EXPANDED = {4: 3.2, 8: 4.6, 16: 5.2}

#: Whose figures stand for a capability; all others are taken for an L40S (no high-bandwidth memory, mma.sync).
_STANDS_FOR: dict[Capability, str] = {
    (8, 0): "A100",
    (9, 0): "H200",
    (10, 0): "B200",
    (10, 3): "B200",
    # 304 times what each of an A100's processors can read is near to an MI300X's 5.3 TB/s.
    "gfx942": "A100",
}


def machine_for(capability: Capability, num_sms: int) -> Machine:
    """The figures of a capability's best known chip, in proportion to the multiprocessors there are."""
    machine = MACHINES[_STANDS_FOR.get(capability, "L40S")]
    share = num_sms / machine.sms
    return replace(
        machine,
        capability=machine.capability if isinstance(capability, str) else capability,
        sms=num_sms,
        memory_bytes_per_s=machine.memory_bytes_per_s * share,
        fp16_flops=machine.fp16_flops * share,
        int8_ops=machine.int8_ops * share,
    )


def kernel_seconds(
    m: int, n: int, k: int, fmt: Format, dtype: torch.dtype, machine: Machine, tile: Tile, split_k: int, ahead: int
) -> float:
    """The most that memory, L2 cache, issue slots and tensor cores need, and then the sum of the parts of K.

    Every program has a tile of tokens, BLOCK_N rows of the weight and a part of K, and the busiest multiprocessor one
    after the other; those of 4 warps two at a time. Programs that start when others have ended wait for their first
    block; what all wait for at the beginning, and a launch, are not counted.

    Args:
        ahead: bytes that a program has on their way: where they are few, or programs are, memory is not read at its
            full speed.
    """
    block_m, block_n, num_warps = tile
    tiles_m, tiles_n = -(-m // block_m), -(-n // block_n)
    weight, y = fmt.weight_bytes(n, k), m * n * dtype.itemsize
    x = m * k * token_bytes(fmt, dtype, machine.capability)
    partials = 8 * m * n * split_k if split_k > 1 else 0
    programs, resident = tiles_m * tiles_n * split_k, 8 / num_warps
    busiest = -(-programs // machine.sms)
    weights = busiest * _part(k, split_k) * block_n
    in_flight = min(programs, machine.sms * resident) * ahead
    reading = min(1.0, in_flight / (machine.memory_bytes_per_s * LATENCY))
    # Its schedulers issue for 128 threads a clock.
    issue = weights * _slots(machine, block_m, block_n, fmt) / 128 / machine.clock_hz
    tensor = weights * block_m / macs_per_s(fmt, machine)
    # A warpgroup alone decodes and multiplies in turns.
    alone = min(busiest, resident) * num_warps < 8
    times = (
        issue + tensor if alone else max(issue, tensor),
        (weight + x + y) / machine.stream_bytes_per_s / reading,
        (weight * tiles_m + x * tiles_n + partials + y) / _l2_bytes_per_s(machine),
    )
    waves = max(1, ceil(busiest / resident))
    return max(times) + (waves - 1) * LATENCY + adding_seconds(m, n, block_m, block_n, split_k, machine)


def vendor_seconds(m: int, n: int, k: int, machine: Machine) -> float:
    """The vendor's 16-bit product of x ``[m, k]`` and a weight ``[n, k]``: memory or tensor cores, in its best tile.

    Its tiles, too, leave processors idle at the end, and parts of K have to be added. Nothing else is charged: neither
    its way through the L2 cache nor the start of a program.
    """
    memory = 2 * (n * k + m * k + m * n) / machine.stream_bytes_per_s
    macs_per_s = machine.fp16_flops * MULTIPLIED / 2 / machine.sms
    found = []
    for block_m, block_n in _VENDOR_TILES:
        tiles = -(-m // block_m) * -(-n // block_n)
        for split_k in range(1, max(1, min(2 * machine.sms // tiles, k // BLOCK_K)) + 1):
            weights = -(-tiles * split_k // machine.sms) * _part(k, split_k) * block_n
            adding = adding_seconds(m, n, block_m, block_n, split_k, machine)
            found.append(max(memory, weights * min(block_m, -(-m // 16) * 16) / macs_per_s) + adding)
    return min(found)


def _part(k: int, split_k: int) -> int:
    """Columns of the longest of so many parts of K."""
    return -(-k // (BLOCK_K * split_k)) * BLOCK_K


def adding_seconds(m: int, n: int, block_m: int, block_n: int, split_k: int, machine: Machine) -> float:
    """One program adds all parts of a tile's sums, those of tokens that there are, while the tile's others are done."""
    tiles = -(-m // block_m) * -(-n // block_n)
    added = 4 * min(m, block_m) * block_n * split_k if split_k > 1 else 0
    rate = min(_SM_BYTES_PER_CLOCK * machine.clock_hz, _l2_bytes_per_s(machine) / min(tiles, machine.sms))
    return added / rate


def _l2_bytes_per_s(machine: Machine) -> float:
    return (machine.l2_bytes_per_clock or _L2_BYTES_PER_CLOCK) * machine.clock_hz


def macs_per_s(fmt: Format, machine: Machine) -> float:
    """Multiply-adds of one multiprocessor, at the rate that is assumed of this kernel."""
    # float8 runs at twice the rate of 16 bit.
    twice = 2 if multiplies_bytes(fmt, machine.capability) else 1
    operations = machine.int8_ops if fmt.integer_activations else machine.fp16_flops * twice
    return operations * MULTIPLIED * FUSED / 2 / machine.sms


def _slots(machine: Machine, block_m: int, block_n: int, fmt: Format) -> float:
    # Few tokens: about the same in every tile, and less than the way from memory, but for what expands 2:4.
    if block_m <= 16:
        return _EXPANDED[fmt.bits] if fmt.sparsity == "2:4" else 0.0
    slots = SLOTS.get((machine.capability[0], block_m, block_n), SLOTS[8, 128, 128])
    if multiplies_bytes(fmt, machine.capability):
        return slots.channel8 if fmt.group_size is None else slots.grouped8
    return slots.channel if fmt.group_size is None else slots.grouped
