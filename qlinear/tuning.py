"""``tune``: measures configurations and crossovers on the GPU that is here, and keeps them on disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from qlinear.float_layers import float_shape, is_linear
from qlinear.format import Scheme
from qlinear.layout import native_layout
from qlinear.linear import QLinear
from qlinear.tables import table as text_table

if TYPE_CHECKING:
    from qlinear.kernels.runtime import Target
    from qlinear.kernels.search import Found, Gauge, Problem
    from qlinear.kernels.tuned import Table

#: Each is the most of its bucket, :data:`qlinear.kernels.tile_table.M_BUCKETS`, or stands for it; there are more.
TOKENS = (1, 16, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Tuning:
    """What ``tune`` measured, and where it is kept; ``print`` shows a table, :meth:`to_dict` gives plain data."""

    found: list[Found]
    #: The file, whose entries every process on this GPU uses from its start.
    path: Path
    #: Problems that were asked for, and those of them that an earlier run had answered.
    asked: int
    known: int
    seconds: float

    @property
    def left(self) -> int:
        """Problems without an answer: the same call goes on with them."""
        return self.asked - self.known - sum(found.complete for found in self.found)

    def to_dict(self) -> dict[str, Any]:
        """``{"path", "asked", "known", "left", "seconds", "rows": [one dict a problem]}``."""
        counts = {"asked": self.asked, "known": self.known, "left": self.left, "seconds": self.seconds}
        return {"path": str(self.path), **counts, "rows": [row(found) for found in self.found]}

    def __str__(self) -> str:
        lines = [_line(found) for found in self.found]
        header = ("scheme", "M x N x K", "computed", "measured best", "us", "gain")
        rest = f"; {self.left} are left: the same command goes on" if self.left else ""
        known = f", {self.known} were known" if self.known else ""
        text = f"{len(self.found)} of {self.asked} problems measured in {self.seconds:.0f} s{known}{rest}\n{self.path}"
        return f"{text_table(header, lines, right=(4, 5))}\n{text}" if lines else text


def row(found: Found) -> dict[str, Any]:
    """One problem as plain data; times in microseconds."""
    p = found.problem
    data: dict[str, Any] = {"scheme": p.scheme, "dtype": str(p.dtype).removeprefix("torch."), "n": p.n, "k": p.k}
    if p.bucket == 0:
        return data | {"fused_tokens": found.fused_tokens, "complete": found.complete}
    us = {str(config): seconds * 1e6 for config, seconds in sorted(found.seconds.items(), key=lambda item: item[1])}
    data |= {"m": p.tokens, "chosen": str(found.chosen), "best": str(found.best), "us": us, "gain": found.gain}
    left_out = {str(config): reason for config, reason in found.left_out.items()}
    return data | {"complete": found.complete, "left_out": left_out}


def _line(found: Found) -> tuple[str, ...]:
    p = found.problem
    if p.bucket == 0:
        most = "not found in time" if found.fused_tokens is None else f"kernel up to {found.fused_tokens} tokens"
        return p.scheme, f"any x {p.n} x {p.k}", "", most, "", ""
    us = "" if found.best not in found.seconds else f"{found.seconds[found.best] * 1e6:.2f}"
    shape, best = f"{p.tokens} x {p.n} x {p.k}", str(found.best) + ("" if found.complete else " (so far)")
    return p.scheme, shape, str(found.chosen), best, us, f"{found.gain:.2f}x"


def tune(
    layers: nn.Module | Iterable[tuple[int, int]],
    schemes: Iterable[str | Scheme] = ("w4a16",),
    *,
    dtype: torch.dtype = torch.bfloat16,
    tokens: Iterable[int] = TOKENS,
    time_limit: float = 300.0,
    again: bool = False,
    device: torch.device | str = "cuda",
    progress: bool | None = None,
) -> Tuning:
    """Measures the kernels' configurations, and from how many tokens the vendor's matmul is faster, on this GPU.

    What is found is kept in one file (``qlinear doctor`` names it) for this GPU, Triton version and these kernels, and
    overrides what would be computed, in this process and later ones. A result that is cut short is the best so far.

    Args:
        layers: a model (its ``QLinear`` layers with their own schemes, its ``nn.Linear`` with ``schemes``), or shapes
            (out_features, in_features).
        schemes: for float layers and for shapes.
        dtype: of the activations.
        tokens: numbers of tokens; each stands for its whole bucket, and more than 128 for the crossover as well.
        time_limit: seconds after which no measurement is begun.
        again: measure what the file has already.
        progress: a progress bar on standard error; None shows it on a terminal.

    Raises:
        RuntimeError: no GPU that the kernels run on is here.
        ValueError: a scheme does not exist, there is nothing to tune, or no time limit of 0 or more.
    """
    device = torch.device(device)
    check_time_limit(time_limit)
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"activations are float16, bfloat16 or float32, got {dtype}")
    names = [str(Scheme.parse(scheme)) for scheme in schemes]
    shapes = _shapes(layers, names)
    wanted = list(tokens)
    if not shapes or not wanted or min(wanted) < 1:
        raise ValueError(f"nothing to tune: layers {shapes}, tokens {wanted}")
    check_device(device)
    from qlinear.kernels import tuned
    from qlinear.kernels.gauge import DeviceGauge
    from qlinear.kernels.runtime import target_of
    from qlinear.kernels.search import plan

    index = torch.cuda.current_device() if device.index is None else device.index
    table = tuned.writable(tuned.key_of(index))
    gauge = DeviceGauge(torch.device("cuda", index))
    try:
        return measure(plan(shapes, dtype, wanted), table, target_of(device), gauge, time_limit, again, progress)
    finally:
        tuned.forget()


def check_time_limit(seconds: float) -> None:
    """Raises a ValueError unless this is a number from 0 on: infinity is one, NaN is none."""
    if not (isinstance(seconds, (int, float)) and seconds >= 0):
        raise ValueError(f"the time limit is a number of seconds from 0 on, got {seconds!r}")


def check_device(device: torch.device) -> None:
    """Raises a RuntimeError unless there is a GPU here that can be measured, and Triton to run on it."""
    if device.type != "cuda" or not torch.cuda.is_available():
        raise RuntimeError(f"tuning measures a CUDA or ROCm device; {device} is none that is here")
    if native_layout(device) != "triton":
        raise RuntimeError("tuning measures Triton kernels; Triton is not installed")


def measure(
    problems: list[Problem],
    table: Table,
    target: Target,
    gauge: Gauge,
    time_limit: float,
    again: bool = False,
    progress: bool | None = None,
    clock: Callable[[], float] = time.monotonic,
    save: Callable[[Found], None] = lambda found: None,
) -> Tuning:
    """Answers problems until the time is up, and writes the table after each: what :func:`tune` does, on any gauge."""
    from qlinear.kernels.search import is_known, record, search, search_crossover

    assert table.path is not None
    begin = clock()
    waiting = [p for p in problems if again or not is_known(p, table)]
    found: list[Found] = []

    def late() -> bool:
        return clock() - begin >= time_limit

    with tqdm(waiting, desc="tuning", unit="problem", disable=None if progress is None else not progress) as bar:
        for problem in bar:
            if late():
                break
            bar.set_postfix_str(str(problem))
            if problem.bucket:
                one = search(problem, target, gauge, late)
            else:
                one = search_crossover(problem, target, gauge, late, table)
            found.append(one)
            record(one, table)
            table.write(table.path)
            save(one)
    return Tuning(found, table.path, len(problems), len(problems) - len(waiting), clock() - begin)


def _shapes(layers: nn.Module | Iterable[tuple[int, int]], schemes: list[str]) -> list[tuple[str, int, int]]:
    """(scheme, out_features, in_features) of every distinct layer."""
    if not isinstance(layers, nn.Module):
        return [(scheme, n, k) for n, k in layers for scheme in schemes]
    found: list[tuple[str, int, int]] = []
    for module in layers.modules():
        if isinstance(module, QLinear):
            found.append((module.scheme, module.out_features, module.in_features))
        elif is_linear(module):
            found += [(scheme, *float_shape(module)) for scheme in schemes]
    return list(dict.fromkeys(found))
