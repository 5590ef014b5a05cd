"""What the launchers must know of a device, and the counters that split-K needs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

#: (9, 0) for an NVIDIA compute capability, "gfx942" for an AMD architecture.
Capability = tuple[int, int] | str

#: Output tiles one launch may split along K, and streams of one device whose counters are reserved for all at once.
MAX_SPLIT_TILES = 4096
STREAMS = 64


class Target(NamedTuple):
    """What a kernel is compiled and configured for."""

    capability: Capability
    num_sms: int
    interpreted: bool = False
    l2_bytes: int = 50 << 20

    @property
    def nvidia(self) -> bool:
        """Whether inline PTX may be used."""
        return not self.interpreted and not isinstance(self.capability, str)

    @property
    def fp8(self) -> bool:
        """Whether e4m3 is multiplied as it is; where not, it is held in float16, exactly.

        Not in the interpreter: numpy has no float8.
        """
        return not self.interpreted and has_fp8(self.capability)

    def precision(self, dtype: torch.dtype) -> str:
        """How products of ``dtype`` are taken: of float32 as three of TF32 where tensor cores know it."""
        return "tf32x3" if self.nvidia and dtype == torch.float32 else "ieee"


def has_fp8(capability: Capability) -> bool:
    """Whether tensor cores multiply e4m3: NVIDIA's do from capability 8.9 on; AMD's gfx942 has another e4m3."""
    return not isinstance(capability, str) and capability >= (8, 9)


def target_of(device: torch.device) -> Target:
    """The target of tensors on ``device``.

    Raises:
        ValueError: Triton cannot run there.
    """
    # The interpreter computes on any tensor; its configurations are those of an H100.
    if triton.knobs.runtime.interpret:
        return Target((9, 0), 132, interpreted=True)
    if device.type != "cuda":
        raise ValueError(
            f"the Triton kernels need tensors on a CUDA or ROCm device, got {device}; "
            "on a CPU use qlinear.QLinear or torch.ops.qlinear, or set TRITON_INTERPRET=1 before importing triton"
        )
    return gpu_target(torch.cuda.current_device() if device.index is None else device.index)


@cache
def gpu_target(index: int) -> Target:
    """The target of CUDA device ``index``."""
    properties = torch.cuda.get_device_properties(index)
    capability: Capability = (properties.major, properties.minor)
    if torch.version.hip is not None:
        capability = properties.gcnArchName.split(":")[0]
    return Target(capability, properties.multi_processor_count, l2_bytes=properties.L2_cache_size)


def device_guard(device: torch.device) -> AbstractContextManager[object]:
    """Makes ``device`` current: Triton launches on the current device, whatever its tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def aligned(x: Tensor) -> Tensor:
    """x ``[M, K]`` with rows that are loaded many numbers at a time: others are copied, which is cheaper."""
    return x.contiguous() if x.stride(1) != 1 or x.stride(0) % 16 != 0 else x


@cache
def unused(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Stands for a buffer that a launch does not touch, so that the kernel is the same with and without it."""
    return torch.empty(1, dtype=dtype, device=device)


_arenas: dict[torch.device, Tensor] = {}
_rows: dict[tuple[torch.device, int], Tensor] = {}


def reserve(device: torch.device) -> Tensor:
    """Allocates the counters of a device, once: all zero, and every launch leaves them so.

    Call it before CUDA graphs are captured (``prepare`` does): memory that is allocated during a capture belongs to
    the graph.
    """
    if device not in _arenas:
        _arenas[device] = torch.zeros(STREAMS, MAX_SPLIT_TILES, dtype=torch.int32, device=device)
    return _arenas[device]


def counters(device: torch.device) -> Tensor:
    """Zeroed int32 counters ``[MAX_SPLIT_TILES]`` that no other stream of the device uses at the same time.

    The first ``STREAMS`` streams of a device have a row of what is reserved, each later one a row that is allocated
    for it and kept. Launches that are captured on one stream share them, as they share cuBLAS's workspace: graphs
    captured on the same stream must not be replayed at the same time.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    row = _rows.get((device, stream))
    if row is None:
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        taken = sum(known == device for known, _ in _rows)
        if taken < STREAMS and (device in _arenas or not capturing):
            row = reserve(device)[taken]
        else:
            row = torch.zeros(MAX_SPLIT_TILES, dtype=torch.int32, device=device)
            # It belongs to the graph, which zeroes it at every replay: nothing else may use it.
            if capturing:
                return row
        _rows[device, stream] = row
    return row
