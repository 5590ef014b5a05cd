"""What goes with a quarter of the neurons: size and time of a model and of one MLP, and the share expected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
from torch import nn

import qlinear
from qlinear.demo.subjects import Subject
from qlinear.tables import digits, human_bytes, table

#: More outputs than this has the output head only, which is not pruned.
_HEAD = 10_000
#: Each pair is timed at least so many times, and until so many seconds have passed.
_ROUNDS, _SECONDS = 25, 10.0


@dataclass(frozen=True)
class Shrunk:
    """One float model with and without some of its neurons, timed in turns; shares are of the one that has all."""

    what: str
    #: Of the linear layers but the output head, as they are held in memory.
    float_bytes: int
    pruned_bytes: int
    #: What is left of all multiplications of linear layers, the output head's too: what is left of the time, if the
    #: rest (attention, norms) took none.
    expected_share: float
    #: Medians.
    float_ms: float
    pruned_ms: float
    #: Of the quotients of neighbours in time: their median, and the quartiles below and above it.
    time_share: float
    time_quartiles: tuple[float, float]
    rounds: int


def linear_bytes(model: nn.Module) -> int:
    """Bytes of the linear layers but the output head's; floats are counted in 16 bit."""
    total = 0
    for module in model.modules():
        if isinstance(module, qlinear.QLinear):
            total += module.nbytes
        elif isinstance(module, nn.Linear) and module.out_features < _HEAD:
            total += module.weight.numel() * 2
    return total


def neuron_times(subject: Subject, pruned: nn.Module, share: float, seconds: float = _SECONDS) -> list[Shrunk]:
    """An MLP of the model's own widths alone, and the whole model on one calibration batch.

    Args:
        pruned: the subject's model without ``share`` of its neurons.
        seconds: how long each of the two is timed at least; never for less than 25 rounds.
    """
    batch, config = subject.calibration[0], subject.model.config
    hidden, wide = config.hidden_size, config.intermediate_size
    tokens, dtype = batch["input_ids"].numel(), subject.model.dtype
    mlp, less = (nn.Sequential(nn.Linear(hidden, wide), nn.GELU(), nn.Linear(wide, hidden)) for _ in range(2))
    qlinear.prune(less, "magnitude", share, "neurons", progress=False)
    x = torch.randn(tokens, hidden, dtype=dtype)
    name = f"MLP {hidden} -> {wide} -> {hidden} alone, {tokens} tokens"

    def alone(model: Any) -> object:
        return model(x)

    def whole(model: Any) -> object:
        return model(**batch)

    return [
        _shrunk(name, mlp.to(dtype), less.to(dtype), alone, seconds),
        _shrunk(f"whole model, {tokens} tokens", subject.model, pruned, whole, seconds),
    ]


@torch.inference_mode()
def _shrunk(
    what: str, model: nn.Module, pruned: nn.Module, run: Callable[[nn.Module], object], seconds: float
) -> Shrunk:
    sides, times = (model, pruned), (list[float](), list[float]())
    for side in sides * 2:
        run(side)
    end = perf_counter() + seconds
    while len(times[0]) < _ROUNDS or perf_counter() < end:
        # In turns, the other one first every second time: a machine that gets slower favours neither.
        for i in (0, 1) if len(times[0]) % 2 else (1, 0):
            begin = perf_counter()
            run(sides[i])
            times[i].append(perf_counter() - begin)
    shares = [less / more for more, less in zip(*times, strict=True)]
    low, middle, high = quantiles(shares, n=4)
    return Shrunk(
        what,
        linear_bytes(model),
        linear_bytes(pruned),
        _weights(pruned) / _weights(model),
        median(times[0]) * 1e3,
        median(times[1]) * 1e3,
        middle,
        (low, high),
        len(shares),
    )


def _weights(model: nn.Module) -> int:
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))


def times_table(shrunk: Sequence[Shrunk], share: float) -> str:
    """Sizes and times for people."""
    header = (f"without {share:.0%} of the neurons", "linear layers", "left", "time expected", "measured", "ms")
    rows = [
        (
            each.what,
            f"{human_bytes(each.float_bytes)} -> {human_bytes(each.pruned_bytes)}",
            f"{each.pruned_bytes / each.float_bytes:.1%}",
            f"{each.expected_share:.1%}",
            f"{each.time_share:.1%} ({each.time_quartiles[0]:.1%} to {each.time_quartiles[1]:.1%})",
            f"{digits(each.float_ms)} -> {digits(each.pruned_ms)}",
        )
        for each in shrunk
    ]
    rounds = " and ".join(str(each.rounds) for each in shrunk)
    note = (
        "expected: what is left of the multiplications of all linear layers, the output head's too. Measured: median "
        f"(quartiles) of {rounds} rounds in turns."
    )
    return f"{table(header, rows, right=range(1, len(header)))}\n{note}"
