"""Timing on a GPU: a side is a CUDA graph of its calls, timed by the device's own clock.

What Python and the launches cost is not in it. The sides take turns, and medians are compared.
"""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch

#: Calls in one CUDA graph: few enough to capture quickly, many enough that a replay outlasts its launch.
_FEWEST_CALLS, _MOST_CALLS = 32, 512
#: Seconds that a replay takes at least, where that needs no more than the fewest calls.
_REPLAY = 4e-3


@cache
def _capture_stream(index: int) -> torch.cuda.Stream:
    """One stream for every capture: the kernels keep counters for each stream they see."""
    return torch.cuda.Stream(index)


def capture(calls: Sequence[Callable[[], object]], device: torch.device) -> torch.cuda.CUDAGraph:
    """A CUDA graph of the calls, in order; the first of them runs before, so that nothing is compiled meanwhile."""
    stream = _capture_stream(torch.cuda.current_device() if device.index is None else device.index)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            calls[0]()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    # As torch.cuda.graph does it, but without emptying torch's memory pool each time, which thousands of graphs cannot
    # afford. Nothing may be collected meanwhile: what frees memory breaks a capture.
    collecting = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin()
            try:
                for call in calls:
                    call()
            finally:
                graph.capture_end()
    finally:
        if collecting:
            gc.enable()
    return graph


def replayed(
    sides: Mapping[str, Sequence[Callable[[], object]]], rounds: int, seconds: float, device: torch.device
) -> dict[str, float]:
    """Median seconds per call of each side on a GPU; a side is the calls its graph goes through in order.

    A side that cannot be captured has no time.
    """
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int, int]] = {}
    for name, side in sides.items():
        whole = side[:_MOST_CALLS]
        try:
            calls = list(whole) * -(-_nodes(whole[0], device) // len(whole))
            graph = capture(calls, device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            warnings.warn(f"{name} cannot be captured into a CUDA graph: {error}", stacklevel=2)
            continue
        _elapsed(graph, 1, device)
        once = _elapsed(graph, 1, device)
        graphs[name] = graph, len(calls), max(1, int(seconds / rounds / max(once, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, (graph, calls_in_graph, replays) in graphs.items():
            times[name].append(_elapsed(graph, replays, device) / replays / calls_in_graph)
    return {name: statistics.median(values) for name, values in times.items()}


def _nodes(call: Callable[[], object], device: torch.device) -> int:
    """Calls that a graph should have at least, so that its replay takes long enough to be timed."""
    call()
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize(device)
    return max(1, min(_FEWEST_CALLS, int(_REPLAY / (time.perf_counter() - begin))))


def _elapsed(graph: torch.cuda.CUDAGraph, replays: int, device: torch.device) -> float:
    """Seconds that the device spends on that many replays."""
    with torch.cuda.device(device):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
