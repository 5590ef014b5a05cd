"""The search behind ``qlinear tune``: which configurations to try, and when to stop. What measures is passed in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from qlinear.format import BLOCK_K, FORMATS, Format
from qlinear.kernels.configs import Config, bucket_of, choose_config, no_empty_part, refusal
from qlinear.kernels.crossover import ENDS, MOST_TOKENS
from qlinear.kernels.runtime import Target
from qlinear.kernels.tile_table import M_BUCKETS, tiles_of
from qlinear.kernels.tuned import Table

#: A candidate must be so many times as fast as the best so far, twice: less is noise.
GAIN = 1.02
#: Rows and warps of a tile.
_SHAPES = ((128, 4), (256, 4), (256, 8), (64, 4), (128, 8), (128, 2))
#: Tokens at which the kernel is compared with the vendor's matmul.
_STEPS = (256, 512, 768, 1024, 1536, 2048, 3072, MOST_TOKENS)


@dataclass(frozen=True)
class Problem:
    """``x [M, k] @ W[n, k].T`` for the M of one bucket (0: the crossover, which is about every M)."""

    scheme: str
    dtype: torch.dtype
    bucket: int
    n: int
    k: int

    @property
    def format(self) -> Format:
        return FORMATS[self.scheme]

    @property
    def tokens(self) -> int:
        """The number of tokens that is timed: one for the first bucket, decoding's most frequent."""
        return 1 if self.bucket == M_BUCKETS[0] else self.bucket

    def __str__(self) -> str:
        what = f"{self.scheme} {self.n} x {self.k}"
        return f"{what}, crossover" if self.bucket == 0 else f"{what}, {self.tokens} tokens"


class Unusable(Exception):
    """A configuration that does not run, or computes something else; the message says what happened."""


class Gauge(Protocol):
    """What measures."""

    def configs(self, problem: Problem, candidate: Config, best: Config) -> tuple[float, float]:
        """Seconds of a candidate, whose numbers are right, and of the best so far, measured in turns.

        Raises:
            Unusable: the candidate.
        """

    def paths(self, problem: Problem, tokens: int, config: Config) -> tuple[float, float]:
        """Seconds of the kernel, and of dequantizing for the vendor's matmul."""


@dataclass
class Found:
    """What a search came to."""

    problem: Problem
    #: Of configurations; for a crossover there is no best.
    chosen: Config | None = None
    best: Config | None = None
    seconds: dict[Config, float] = field(default_factory=dict)
    left_out: dict[Config, str] = field(default_factory=dict)
    #: The most tokens of the kernel; None where that was not asked for or not found in time.
    fused_tokens: int | None = None
    complete: bool = False

    @property
    def gain(self) -> float:
        """How many times as fast the best is as what was chosen without measuring; 1 where that is the best."""
        if self.best is None or self.chosen is None or self.best == self.chosen:
            return 1.0
        return self.seconds[self.chosen] / self.seconds[self.best]


def neighbours(config: Config, problem: Problem, target: Target) -> list[Config]:
    """Usable configurations one or two steps from ``config``: a tile's rows and warps, buffers, parts of K."""
    tiles = tiles_of(problem.bucket, problem.format, problem.dtype, target.capability)
    found = [replace(config, block_m=tile[0], block_n=tile[1], num_warps=tile[2]) for tile in tiles]
    for block_n, warps in _SHAPES:
        # As many programs as before, or parts as long as before.
        for split in (max(1, config.split_k * block_n // config.block_n), config.split_k):
            found.append(replace(config, block_n=block_n, num_warps=warps, split_k=split))
    found += [replace(config, num_stages=config.num_stages + step) for step in (-1, 1)]
    now = config.split_k
    found += [replace(config, split_k=max(1, split)) for split in (now // 2, now - 1, now + 1, now * 2, 1)]
    blocks = -(-problem.k // BLOCK_K)
    found = [replace(c, split_k=no_empty_part(blocks, c.split_k)) for c in found]
    return [c for c in dict.fromkeys(found) if c != config and not _refused(c, problem, target)]


def _refused(config: Config, p: Problem, target: Target) -> str | None:
    return refusal(config, p.bucket, p.n, p.k, p.format, p.dtype, target.capability)


def default_config(problem: Problem, target: Target) -> Config:
    """What is used where nothing was measured."""
    return choose_config(
        problem.tokens, problem.n, problem.k, problem.format, problem.dtype, target.capability, target.num_sms
    )


def search(problem: Problem, target: Target, gauge: Gauge, late: Callable[[], bool]) -> Found:
    """Climbs from the default configuration to faster neighbours until there is none, or it is ``late``.

    What wins is measured against the default a second time before it is believed.
    """
    chosen = best = default_config(problem, target)
    found = Found(problem, chosen, chosen)
    done = {chosen}

    def beaten(candidate: Config, best: Config) -> bool:
        try:
            new, old = gauge.configs(problem, candidate, best)
        except Unusable as reason:
            found.left_out[candidate] = str(reason)
            return False
        found.seconds |= {candidate: new, best: old}
        return new * GAIN < old

    while not found.complete:
        waiting = [c for c in neighbours(best, problem, target) if c not in done]
        found.complete = not waiting
        for candidate in waiting:
            if late():
                break
            done.add(candidate)
            if beaten(candidate, best):
                best = candidate
        else:
            continue
        break
    found.best = best if best == chosen or beaten(best, chosen) else chosen
    return found


def search_crossover(problem: Problem, target: Target, gauge: Gauge, late: Callable[[], bool], table: Table) -> Found:
    """The number of tokens after which the kernel is slower, from few to many; nothing where that came too late."""
    found, most = Found(problem), ENDS[0]
    for tokens in _STEPS:
        if late():
            return found
        one = replace(problem, bucket=bucket_of(tokens))
        config = table.configs.get((one.scheme, one.dtype, one.bucket, one.n, one.k)) or default_config(one, target)
        kernel, vendor = gauge.paths(problem, tokens, config)
        if vendor < kernel:
            break
        most = tokens
    found.fused_tokens, found.complete = most, True
    return found


def record(found: Found, table: Table) -> None:
    """Enters what was found."""
    p = found.problem
    if found.fused_tokens is not None:
        table.crossovers[p.scheme, p.dtype, p.n, p.k] = found.fused_tokens
    # What was cut short before anything was measured says nothing.
    if found.best is not None and (found.seconds or found.complete):
        key = (p.scheme, p.dtype, p.bucket, p.n, p.k)
        table.configs[key] = found.best
        if found.complete:
            table.partial.discard(key)
        else:
            table.partial.add(key)


def is_known(problem: Problem, table: Table) -> bool:
    """Whether a table has the whole answer."""
    p = problem
    if p.bucket == 0:
        return (p.scheme, p.dtype, p.n, p.k) in table.crossovers
    key = (p.scheme, p.dtype, p.bucket, p.n, p.k)
    return key in table.configs and key not in table.partial


def plan(layers: list[tuple[str, int, int]], dtype: torch.dtype, tokens: list[int]) -> list[Problem]:
    """Problems of layers (scheme, n, k): fewest tokens and largest layers first, then the crossovers."""
    ordered = sorted(dict.fromkeys(layers), key=lambda layer: -layer[1] * layer[2])
    buckets = sorted({bucket_of(m) for m in tokens})
    found = [Problem(scheme, dtype, bucket, n, k) for bucket in buckets for scheme, n, k in ordered]
    crossing = [layer for layer in ordered if not FORMATS[layer[0]].quantized_activations and dtype != torch.float32]
    if buckets[-1] > ENDS[0]:
        found += [Problem(scheme, dtype, 0, n, k) for scheme, n, k in crossing]
    return found
