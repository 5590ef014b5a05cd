"""Timing on a machine that others share: the sides take turns, and medians are compared.

On a GPU see :mod:`qlinear.kernels.graphs`.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

#: Seconds of one turn on a CPU.
_TURN = 5e-4


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


def in_turns(sides: Mapping[str, Callable[[], object]], seconds: float, least: int = 7) -> dict[str, float]:
    """Median seconds per call of each side over many short turns, until each has had ``seconds`` and ``least`` turns.

    Turns of half a millisecond: where other programs stall some of them, most are undisturbed, and so is the median.
    A turn begins with a call that is not timed, for threads that sleep and code that the other sides drove out of the
    cache: a model's layers run one after another. (4096 x 4096 in w8a8, eleven operators: 1260 us without it.)
    """
    calls, times = {}, {name: list[float]() for name in sides}
    for name, call in sides.items():
        call()
        calls[name] = max(1, int(_TURN / max(_clock(call, 1), 1e-7)))
    spent = dict.fromkeys(sides, 0.0)
    while waiting := [name for name in sides if spent[name] < seconds or len(times[name]) < least]:
        for name in waiting:
            sides[name]()
            took = _clock(sides[name], calls[name])
            spent[name] += took
            times[name].append(took / calls[name])
    return {name: statistics.median(values) for name, values in times.items()}


def _clock(call: Callable[[], object], count: int) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - begin


def on(x: Any) -> Callable[[Callable[[Any], Any]], Any]:
    """What calls its argument with ``x``, for :func:`rotating`."""
    return lambda call: call(x)


def rotating(items: Sequence[T], call: Callable[[T], object]) -> Callable[[], object]:
    """A call that takes the next item each time: weights that rotate do not stay in the cache."""
    cycle = itertools.cycle(items)
    return lambda: call(next(cycle))
