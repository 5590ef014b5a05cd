"""Timing on a machine that others share: the sides take turns, and medians are compared."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


def interleaved(sides: Mapping[str, Callable[[], object]], rounds: int, seconds: float) -> dict[str, float]:
    """Median seconds per call of each side; in each round every side runs in turn, ``seconds / rounds`` or so each."""
    calls = {}
    for name, call in sides.items():
        call()
        begin = time.perf_counter()
        call()
        calls[name] = max(1, int(seconds / rounds / max(time.perf_counter() - begin, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            begin = time.perf_counter()
            for _ in range(calls[name]):
                call()
            times[name].append((time.perf_counter() - begin) / calls[name])
    return {name: statistics.median(values) for name, values in times.items()}


def rotating(items: Sequence[T], call: Callable[[T], object]) -> Callable[[], object]:
    """A call that takes the next item each time: weights that rotate do not stay in the cache."""
    cycle = itertools.cycle(items)
    return lambda: call(next(cycle))
