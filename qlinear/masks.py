"""Which entries go: the lowest scores, in exact numbers, the same ones every time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qlinear.patterns import Pattern

_HALF = 1 << 16


def lowest(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Masks (True) of exactly ``count`` lowest entries of all ``scores`` together; of equal ones the first.

    Scores are not negative. The threshold is found bit by bit from two histograms, so that the scores of a whole model
    are never put into one tensor: the bits of a float32 that is not negative are ordered as its value is.
    """
    keys = [s.float().contiguous().view(torch.int32) for s in scores]
    high, before = _bin([k >> 16 for k in keys], count)
    low, before = _bin([k[(k >> 16) == high] & (_HALF - 1) for k in keys], count - before)
    threshold, ties = (high << 16) | low, count - sum(int((k < ((high << 16) | low)).sum()) for k in keys)
    masks = []
    for key in keys:
        equal = (key == threshold).flatten()
        chosen = equal & (equal.cumsum(0) <= ties)
        ties -= int(chosen.sum())
        masks.append((key < threshold) | chosen.view(key.shape))
    return masks


def _bin(keys: Sequence[Tensor], count: int) -> tuple[int, int]:
    """The histogram bin in which the ``count``-th lowest key lies, and how many keys lie before that bin."""
    counts = torch.zeros(_HALF, dtype=torch.int64)
    for key in keys:
        counts += torch.bincount(key.flatten(), minlength=_HALF).cpu()
    ends = counts.cumsum(0)
    index = int(torch.searchsorted(ends, count))
    index = min(index, _HALF - 1)
    return index, int(ends[index] - counts[index])


def lowest_per_row(scores: Tensor, count: int) -> Tensor:
    """A mask (True) of exactly ``count`` lowest entries of each row of ``[R, C]``; of equal ones the first."""
    order = scores.sort(dim=1, stable=True).indices[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def lowest_per_group(scores: Tensor, n: int, m: int) -> Tensor:
    """A mask that leaves the ``n`` highest of each ``m`` neighbours along a row; of a short last group as many."""
    rows, columns = scores.shape
    whole = columns // m * m
    mask = torch.zeros_like(scores, dtype=torch.bool)
    if whole:
        mask[:, :whole] = lowest_per_row(scores[:, :whole].reshape(-1, m), m - n).view(rows, whole)
    if columns - whole > n:
        mask[:, whole:] = lowest_per_row(scores[:, whole:], columns - whole - n)
    return mask


def block_sums(scores: Tensor, pattern: Pattern) -> Tensor:
    """``[ceil(N/rows), ceil(K/columns)]``: sums over blocks.

    A short block at an edge sums fewer weights and so goes earlier: stored, it costs as much as a whole one.
    """
    n, k = scores.shape
    padded = torch.nn.functional.pad(scores, (0, -k % pattern.columns, 0, -n % pattern.rows))
    sums: Tensor = padded.unflatten(1, (-1, pattern.columns)).sum(2).unflatten(0, (-1, pattern.rows)).sum(1)
    return sums


def spread_blocks(blocks: Tensor, pattern: Pattern, n: int, k: int) -> Tensor:
    """A mask of blocks as a mask of the weights ``[n, k]``."""
    rows = blocks.repeat_interleave(pattern.rows, 0)[:n]
    return rows.repeat_interleave(pattern.columns, 1)[:, :k]


def masks(scores: Sequence[Tensor], pattern: Pattern, sparsities: Sequence[float], scope: str) -> list[Tensor]:
    """A mask (True: prune) for each score matrix ``[N, K]``.

    ``scope`` is what ranks together: ``"row"`` (of an unstructured pattern; else as ``"layer"``), ``"layer"`` or
    ``"global"``, which takes the one sparsity of all its layers. ``n:m`` ranks within its groups. Of a sparsity below 1
    something is left of each layer, the highest weight (of each row with ``"row"``) or block.
    """
    if pattern.kind == "n:m":
        return [lowest_per_group(s, pattern.n, pattern.m) for s in scores]
    if pattern.kind == "unstructured" and scope == "row":
        rows = zip(scores, sparsities, strict=True)
        return [lowest_per_row(s, removed(share, s.shape[1])) for s, share in rows]
    units = [block_sums(s, pattern) if pattern.kind == "block" else s for s in scores]
    chosen = lowest_units(units, sparsities, scope)
    if pattern.kind == "block":
        return [spread_blocks(c, pattern, *s.shape) for c, s in zip(chosen, scores, strict=True)]
    return chosen


def removed(share: float, units: int) -> int:
    """How many of a layer's units a share is: below 1 never all, so that no layer is emptied."""
    return min(round(share * units), _most(share, units))


def _most(share: float, units: int) -> int:
    return max(units - 1, 0) if share < 1 else units


def lowest_units(units: Sequence[Tensor], sparsities: Sequence[float], scope: str) -> list[Tensor]:
    """The lowest share of each tensor, or with ``scope="global"`` of all of them together.

    Of a share below 1 at least one unit of each tensor is left: the highest.
    """
    if scope != "global":
        return [lowest([u], removed(share, u.numel()))[0] for u, share in zip(units, sparsities, strict=True)]
    (share,) = set(sparsities)
    count = min(round(share * sum(u.numel() for u in units)), sum(_most(share, u.numel()) for u in units))
    chosen = lowest(units, count)
    if share < 1 and any(bool(c.all()) for c in chosen):
        chosen = lowest([_spare_highest(u) for u in units], count)
    return chosen


def _spare_highest(scores: Tensor) -> Tensor:
    """The scores with the one that would go last put out of reach."""
    (others,) = lowest([scores], _most(0, scores.numel()))
    return scores.masked_fill(~others, float("inf"))
