"""The counters of split-K by device and stream, on devices and streams that are made up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qlinear.kernels import runtime

DEVICES = [torch.device("cuda", index) for index in range(2)]


class Streams:
    """What torch knows of the current stream."""

    number, capturing = 0, False

    def counters(self, device: torch.device, number: int, capturing: bool = False) -> Tensor:
        self.number, self.capturing = number, capturing
        return runtime.counters(device)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    """Streams of GPUs that are not there; what is allocated on them is on the CPU."""
    zeros, found = torch.zeros, Streams()

    def on_cpu(*size: int, dtype: torch.dtype, device: Any) -> Tensor:
        return zeros(*size, dtype=dtype)

    monkeypatch.setattr(runtime, "_arenas", {})
    monkeypatch.setattr(runtime, "_rows", {})
    monkeypatch.setattr(torch, "zeros", on_cpu)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=found.number))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: found.capturing)
    return found


def places(rows: list[Tensor]) -> int:
    """How many of them are memory of their own."""
    assert all(row.shape == (runtime.MAX_SPLIT_TILES,) and not row.any() for row in rows)
    return len({row.data_ptr() for row in rows})


def reserved(row: Tensor, device: torch.device) -> bool:
    return row.untyped_storage().data_ptr() == runtime.reserve(device).untyped_storage().data_ptr()


@pytest.mark.parametrize("count", [40, runtime.STREAMS, runtime.STREAMS + 9], ids="{}-streams".format)
def test_no_two_streams_share_counters(count: int, streams: Streams) -> None:
    """By turns on two devices: each has its own rows, and those that are reserved come first."""
    asked = [(device, number) for number in range(count) for device in DEVICES]
    rows = [streams.counters(*each) for each in asked]
    assert places(rows) == len(rows)
    assert [reserved(row, device) for row, (device, _) in zip(rows, asked, strict=True)] == [
        number < runtime.STREAMS for _, number in asked
    ]
    # Kept: the same stream finds the same row, captured or not.
    for captured in (False, True):
        assert all(streams.counters(*each, captured) is row for row, each in zip(rows, asked, strict=True))


def test_what_is_allocated_during_a_capture_is_not_kept(streams: Streams) -> None:
    device = DEVICES[0]
    nothing_reserved = [streams.counters(device, 0, capturing=True) for _ in range(2)]
    assert places(nothing_reserved) == 2 and not runtime._rows and not runtime._arenas
    runtime.reserve(device)
    assert reserved(streams.counters(device, 0, capturing=True), device)
    taken = [streams.counters(device, number) for number in range(runtime.STREAMS)]
    none_left = [streams.counters(device, runtime.STREAMS, capturing=True) for _ in range(2)]
    assert places([*taken, *none_left]) == runtime.STREAMS + 2
    assert (device, runtime.STREAMS) not in runtime._rows
