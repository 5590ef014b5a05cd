"""GPUs by their makers' public figures: what a count is turned into a time with, and a time into a share of the floor.

Sources: NVIDIA's data sheets and architecture white papers of the A100, Ada, H100, H200 and Blackwell; tensor figures
are dense, with float32 sums (int32 for int8). The L2 cache's 5120 bytes a clock are the A100's (its white paper); for
Hopper and Blackwell none is published, and the same is assumed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Share of the data sheet's memory bandwidth that a kernel which only reads reaches; 4.3 of the H200's 4.8 TB/s.
STREAMED = 0.9
#: Share of the data sheet's tensor rate that a large product reaches, the vendor's or another: bfloat16 8192^3 ran at
#: 769 to 798 of 989 TFLOP/s on an H200, whose clock falls under such a load.
MULTIPLIED = 0.8


@dataclass(frozen=True)
class Machine:
    """One GPU. Rates are per second of the whole chip."""

    name: str
    capability: tuple[int, int]
    sms: int
    clock_hz: float
    memory_bytes_per_s: float
    fp16_flops: float
    int8_ops: float
    l2_bytes: int
    #: None where no figure is known.
    l2_bytes_per_clock: int | None
    #: Per multiprocessor.
    shared_bytes: int
    max_threads: int
    max_blocks: int
    registers: int = 65536

    @property
    def arch(self) -> str:
        """As in ``sm_90``."""
        return arch_name(self.capability)

    @property
    def stream_bytes_per_s(self) -> float:
        """Bytes per second that a kernel can hope to read from memory."""
        return self.memory_bytes_per_s * STREAMED

    @property
    def l2_bytes_per_s(self) -> float:
        """Bytes per second from the L2 cache; infinite where that is not known."""
        return math.inf if self.l2_bytes_per_clock is None else self.l2_bytes_per_clock * self.clock_hz

    @property
    def slots_per_s(self) -> float:
        """Thread-instructions per second: four schedulers a multiprocessor, one warp instruction each a clock."""
        return self.sms * 4 * 32 * self.clock_hz


def arch_name(capability: tuple[int, int]) -> str:
    return f"sm_{capability[0] * 10 + capability[1]}"


MACHINES: dict[str, Machine] = {
    machine.name: machine
    for machine in (
        Machine("H200", (9, 0), 132, 1.755e9, 4.8e12, 989e12, 1979e12, 50 << 20, 5120, 228 << 10, 2048, 32),
        Machine("H100", (9, 0), 132, 1.755e9, 3.35e12, 989e12, 1979e12, 50 << 20, 5120, 228 << 10, 2048, 32),
        Machine("A100", (8, 0), 108, 1.41e9, 2.039e12, 312e12, 624e12, 40 << 20, 5120, 164 << 10, 2048, 32),
        Machine("L40S", (8, 9), 142, 2.52e9, 0.864e12, 362e12, 733e12, 96 << 20, None, 100 << 10, 1536, 24),
        Machine("RTX 4090", (8, 9), 128, 2.52e9, 1.008e12, 165e12, 661e12, 72 << 20, None, 100 << 10, 1536, 24),
        Machine("B200", (10, 0), 148, 1.85e9, 8.0e12, 2250e12, 4500e12, 126 << 20, 5120, 228 << 10, 2048, 32),
    )
}
