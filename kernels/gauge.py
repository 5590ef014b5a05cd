"""What ``qlinear tune`` measures with: the kernels on a device, on weights that do not stay in its cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from qlinear.format import TILE_N, Format
from qlinear.kernels.configs import Config
from qlinear.kernels.dequantize import linear_tensors
from qlinear.kernels.graphs import replayed
from qlinear.kernels.matmul import matmul
from qlinear.kernels.runtime import target_of
from qlinear.kernels.search import Problem, Unusable, default_config
from qlinear.packing import PackedWeight, pack

#: Copies of the weight cover so many times the L2 cache, but are never more than so many.
_CACHES, _MOST_COPIES = 3, 256
_ROUNDS = 5


def blank(fmt: Format, n: int, k: int, dtype: torch.dtype, device: torch.device) -> PackedWeight:
    """A weight ``[n, k]`` of one tile of random rows, repeated: made quickly, and multiplied as any other."""
    generator = torch.Generator(device).manual_seed(0)
    one = pack(torch.randn(TILE_N, k, device=device, generator=generator).to(dtype), fmt.name, layout="triton")

    def repeated(t: Tensor) -> Tensor:
        return t.repeat(-(-n // TILE_N), *[1] * (t.dim() - 1))

    return replace(one, weight=repeated(one.weight), scale=repeated(one.scale), out_features=n)


class DeviceGauge:
    """Measures on ``device``: CUDA graphs of calls that go through copies of the weight.

    Args:
        seconds: of replays for each pair of sides.
    """

    def __init__(self, device: torch.device, seconds: float = 0.03) -> None:
        self._device, self._seconds = device, seconds
        self._layer: tuple[str, torch.dtype, int, int] | None = None
        self._copies: list[PackedWeight] = []
        self._wanted: tuple[Problem, Tensor] | None = None

    def configs(self, problem: Problem, candidate: Config, best: Config) -> tuple[float, float]:
        """Seconds of a candidate and of the best so far; see :class:`qlinear.kernels.search.Gauge`."""
        copies = self._weights(problem)
        x = self._tokens(max(problem.bucket, problem.tokens), problem)
        try:
            y = matmul(x, copies[0], None, candidate).double()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise Unusable(f"{type(error).__name__}: {error}".splitlines()[0][:150]) from error
        wanted = self._reference(problem, x, copies[0])
        error_now = float((y - wanted).norm() / wanted.norm())
        # Sums in another order: both are within the bound of the truth.
        if not error_now <= 2 * problem.format.max_error(problem.dtype):
            raise Unusable(f"wrong: differs from the default by {error_now:.1e}")
        few = self._tokens(problem.tokens, problem)
        sides = {
            name: [partial(matmul, few, p, None, config) for p in copies]
            for name, config in (("candidate", candidate), ("best", best))
        }
        times = self._time(sides)
        if len(times) < 2:
            raise Unusable("cannot be captured into a CUDA graph")
        return times["candidate"], times["best"]

    def paths(self, problem: Problem, tokens: int, config: Config) -> tuple[float, float]:
        """Seconds of the kernel, and of dequantizing for the vendor's matmul."""
        copies, x, fmt = self._weights(problem), self._tokens(tokens, problem), problem.format
        kernel = [partial(matmul, x, p, None, config) for p in copies]
        vendor = [partial(linear_tensors, x, p.weight, p.scale, fmt, p.out_features) for p in copies]
        times = self._time({"kernel": kernel, "vendor": vendor})
        # Without a time there is no reason to leave the kernel.
        return times.get("kernel", 0.0), times.get("vendor", float("inf"))

    def _time(self, sides: dict[str, list[partial[Tensor]]]) -> dict[str, float]:
        if self._device.type == "cuda":
            return replayed(sides, _ROUNDS, self._seconds, self._device)
        return {name: _once(calls[0]) for name, calls in sides.items()}

    def _weights(self, p: Problem) -> list[PackedWeight]:
        layer = (p.scheme, p.dtype, p.n, p.k)
        if layer != self._layer:
            self._copies = []
            one = blank(p.format, p.n, p.k, p.dtype, self._device)
            cache = target_of(self._device).l2_bytes if self._device.type == "cuda" else one.nbytes
            count = max(2, min(_MOST_COPIES, -(-_CACHES * cache // one.nbytes)))
            self._copies = [one, *(replace(one, weight=one.weight.clone()) for _ in range(count - 1))]
            self._layer = layer
        return self._copies

    def _reference(self, problem: Problem, x: Tensor, packed: PackedWeight) -> Tensor:
        """What the default configuration computes."""
        if self._wanted is None or self._wanted[0] != problem:
            y = matmul(x, packed, None, default_config(problem, target_of(self._device)))
            self._wanted = problem, y.double()
        return self._wanted[1]

    def _tokens(self, count: int, p: Problem) -> Tensor:
        generator = torch.Generator(self._device).manual_seed(count)
        return torch.randn(count, p.k, device=self._device, generator=generator).to(p.dtype)


def _once(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
