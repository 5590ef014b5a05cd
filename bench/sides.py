"""The sides of a comparison: how a product is called, over copies of the weight that do not stay in the cache."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qlinear import ops, reference
from qlinear.packing import PackedWeight

#: Weights of a side rotate over this many times the last cache, but are never more than so many copies.
_CACHES, _MOST_COPIES = 3, {"cpu": 64, "cuda": 512}
#: Last cache of a CPU whose system does not say.
_CPU_CACHE = 32 << 20


class Unavailable(Exception):
    """A peer cannot do this problem here; the message says why."""


def _same(x: Tensor) -> Any:
    return x


@dataclass
class Side:
    """One way of computing the product: a call for each copy of the weight, on what ``prepare`` makes of x."""

    calls: list[Callable[[Any], Any]]
    #: Not timed.
    prepare: Callable[[Tensor], Any] = _same
    #: Not timed: what ``calls`` returned, and what it was given, to the product.
    finish: Callable[[Any, Any], Tensor] = lambda y, _: y
    #: An operator that must have run, where a slower path exists: a path nobody would use is no baseline.
    operator: str | None = None

    def product(self, x: Tensor) -> Tensor:
        """The product by the first copy."""
        prepared = self.prepare(x)
        return self.finish(self.calls[0](prepared), prepared)


def cache_bytes(device: torch.device) -> int:
    """The last cache of a device."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(text.removesuffix("K")) << 10
    except (OSError, ValueError):
        return _CPU_CACHE


def float_side(weight: Tensor) -> Side:
    """``F.linear`` in the weight's dtype, whatever the dtype of x."""
    count = copies(weight.nbytes, weight.device)
    weights = [weight, *(weight.clone() for _ in range(count - 1))]
    return Side([_float_call(w) for w in weights], lambda x: x.to(weight.dtype))


def packed_side(packed: PackedWeight) -> Side:
    """qlinear's operator."""
    count = copies(packed.nbytes, packed.device)
    return Side([_packed_call(p) for p in (packed, *(_clone(packed) for _ in range(count - 1)))])


def check(y: Tensor, x: Tensor, packed: PackedWeight) -> None:
    """Raises a RuntimeError where ``y`` is not the product of x and a weight."""
    wanted = reference.matmul(x, packed)
    error = ((y.double() - wanted).norm() / wanted.norm()).item()
    if not error <= packed.format.max_error(x.dtype):
        name = packed.format.name
        raise RuntimeError(f"{name} is wrong here: relative error {error:.2e}; a wrong result gets no time")


def _clone(p: PackedWeight) -> PackedWeight:
    weight, scale, zero, index = (None if t is None else t.clone() for t in p.tensors)
    assert weight is not None and scale is not None
    return replace(p, weight=weight, scale=scale, zero_point=zero, index=index)


def copies(size: int, device: torch.device) -> int:
    """How many weights of ``size`` bytes have to rotate so that none is in the last cache when its turn comes."""
    return max(2, min(_MOST_COPIES[device.type], -(-_CACHES * cache_bytes(device) // size)))


def _float_call(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(x, weight)


def _packed_call(p: PackedWeight) -> Callable[[Tensor], Tensor]:
    return lambda x: ops.linear(x, p)


def operators(call: Callable[[], object]) -> set[str]:
    """The names of the operators that a call runs on the CPU."""
    # The profiler's library logs its every start and stop, unless it is told not to before its first.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as trace:
        call()
    return {event.key for event in trace.key_averages()}


@contextmanager
def quiet() -> Iterator[None]:
    """What peers warn of, and log while they are imported, is theirs."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
