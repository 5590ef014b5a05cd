"""Removes whole neurons and heads: rows of the layers that make them and the columns that consume them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qlinear.float_layers import feature_counts, is_conv1d
from qlinear.masks import lowest
from qlinear.pruning.obstacles import refuse
from qlinear.pruning.sparsegpt import damped, factor
from qlinear.pruning.structure import Slice, Structure, find
from qlinear.pruning.targets import Target, matrix
from qlinear.undo import Undo

#: Widths that are a multiple of this stay one: tiles of the kernels and of tensor cores are.
_MULTIPLE = 128


@dataclass(frozen=True)
class Cut:
    """A structure and the number of its units to remove."""

    structure: Structure
    removed: int
    sparsity: float


def plan(model: nn.Module, layers: Sequence[Target], kind: str, scope: str) -> list[Cut]:
    """What is removed from which structure: the layer that consumes the units says how much.

    Raises:
        ValueError: nothing of the kind, a structure that is not known to work without some of its units (see
            :func:`qlinear.pruning.obstacles.refuse`), a share that removes none or all, or a model whose config could
            not describe the result.
    """
    shares = {id(t.module): t for t in layers}
    found = find(model, kind)
    asked = [s for s in found if id(s.consumer.layer) in shares]
    refuse(model, asked)
    given = [shares[id(s.consumer.layer)].sparsity for s in asked]
    cuts = [Cut(s, _count(s, share), share) for s, share in zip(asked, given, strict=True)]
    if not cuts:
        what = "MLP with hidden neurons" if kind == "neurons" else "attention with heads"
        raise ValueError(f"no {what} among the layers asked for; the families known are in qlinear.pruning.structure")
    _check_config(cuts, found, kind, scope)
    return cuts


def _count(structure: Structure, share: float) -> int:
    step = _MULTIPLE if not structure.heads and structure.units % _MULTIPLE == 0 else 1
    removed = round(structure.units * share / step) * step
    if not 0 < removed < structure.units:
        kind = "heads or key-value groups" if structure.heads else "neurons"
        raise ValueError(
            f"{structure.name!r}: {share:g} of {structure.units} {kind} (in steps of {step}) is {removed}: "
            f"between {step} and {structure.units - step} can be removed"
        )
    return removed


def _check_config(cuts: Sequence[Cut], found: Sequence[Structure], kind: str, scope: str) -> None:
    """A config has one width for all its layers: every one is cut alike, and the heads still divide the hidden size."""
    for first in cuts:
        config = first.structure.config
        if not first.structure.described:
            continue
        alike = {c.removed for c in cuts if c.structure.config is config}
        count = sum(c.structure.config is config for c in cuts)
        if scope == "global" or len(alike) > 1 or count < sum(s.config is config for s in found):
            raise ValueError(
                f"the model's config has one number of {kind} for all layers, so that each must lose as many: "
                "prune all of them by one share, with scope='layer'"
            )
        heads = (first.structure.units - first.removed) * first.structure.heads
        hidden = getattr(config, "hidden_size", None)
        if heads and isinstance(hidden, int) and hidden % heads:
            raise ValueError(f"{heads} heads would be left, and the config takes only divisors of hidden_size {hidden}")


def unit_scores(structure: Structure, score: Callable[[nn.Module], Tensor]) -> Tensor:
    """``[units]``: the scores of all weights that go with each unit, summed; ``score`` gives a layer's ``[N, K]``."""
    total = torch.zeros(structure.units)
    for layer in structure.layers:
        scores = score(layer)
        for part in structure.slices:
            if part.layer is layer:
                total += _of_units(scores.sum(1 - part.axis), part, structure.units).sum(1).cpu()
    return total


def _of_units(entries: Tensor, part: Slice, units: int) -> Tensor:
    """``[units, size]``: the rows or columns of each unit."""
    own: Tensor = entries[part.offset : part.offset + units * part.size].view(units, part.size)
    return own


def removal_errors(weight: Tensor, hessian: Tensor, size: int, damping: float) -> Tensor:
    """``[units]``: what the output loses with ``size`` columns of ``weight`` ``[N, K]`` at best: OBS of whole columns.

    ``tr(W_u ([H^-1]_uu)^-1 W_u^T)``, as in optimal brain surgeon for groups (ZipLM, arXiv:2302.04089).
    """
    upper, dead = factor(hessian, damping)
    inverse = upper.t() @ upper
    units = weight.shape[1] // size
    own = torch.stack([inverse[u * size : (u + 1) * size, u * size : (u + 1) * size] for u in range(units)])
    columns = weight.to(hessian.dtype).masked_fill(dead, 0).unflatten(1, (units, size)).permute(1, 2, 0)
    errors: Tensor = (torch.linalg.solve(own, columns) * columns).sum((1, 2))
    return errors.clamp_(min=0)


def compensated(weight: Tensor, hessian: Tensor, keep: Tensor, damping: float) -> Tensor:
    """The kept columns ``[N, len(keep)]`` that change the output least: least squares on the calibration inputs."""
    ready, _ = damped(hessian, damping)
    target = weight.to(hessian.dtype) @ ready[:, keep]
    kept: Tensor = torch.linalg.solve(ready[keep][:, keep], target.t()).t()
    return kept


def kept_units(cuts: Sequence[Cut], units: Sequence[Tensor], scope: str) -> list[Tensor]:
    """The indices of the units that stay, in order."""
    if scope == "global":
        masks = lowest(units, sum(c.removed for c in cuts))
        for cut, mask in zip(cuts, masks, strict=True):
            if bool(mask.all()):
                raise ValueError(f"{cut.structure.name!r} would lose every unit; prune less, or with scope='layer'")
    else:
        masks = [lowest([u], c.removed)[0] for c, u in zip(cuts, units, strict=True)]
    return [(~mask).nonzero().squeeze(1) for mask in masks]


def remove(cut: Cut, keep: Tensor, undo: Undo, consumer: Tensor | None = None) -> None:
    """Cuts the layers of a structure down to the units in ``keep``, and what counts them.

    ``consumer``: the new weight of the consuming layer's kept columns, where it was compensated.
    """
    structure = cut.structure
    for layer in structure.layers:
        parts = [s for s in structure.slices if s.layer is layer]
        axis = parts[0].axis
        index = torch.cat([columns(part, keep, structure.units) for part in parts])
        new = matrix(layer).index_select(axis, index.to(matrix(layer).device))
        if consumer is not None and layer is structure.consumer.layer:
            new = consumer.to(new.dtype)
        _set_weight(layer, new, index if axis == 0 else None, undo)
    for owner, name in structure.counts:
        undo.set(owner, name, getattr(owner, name) // structure.units * len(keep))


def columns(part: Slice, keep: Tensor, units: int) -> Tensor:
    """The rows or columns of the units in ``keep``."""
    return _of_units(torch.arange(part.offset + units * part.size), part, units)[keep.cpu()].flatten()


def _set_weight(layer: nn.Module, weight: Tensor, rows: Tensor | None, undo: Undo) -> None:
    """Gives a layer a weight ``[N, K]`` of another shape, and the kept entries of its bias where rows went."""
    old = layer.weight
    assert isinstance(old, Tensor)
    stored = weight.t() if is_conv1d(layer) else weight
    n, k = weight.shape
    undo.set(layer, "weight", nn.Parameter(stored.contiguous(), old.requires_grad))
    bias = layer.bias
    if rows is not None and isinstance(bias, Tensor):
        undo.set(layer, "bias", nn.Parameter(bias.detach()[rows.to(bias.device)].clone(), bias.requires_grad))
    for name, size in feature_counts(layer, n, k).items():
        undo.set(layer, name, size)


def update_config(cut: Cut, left: int, undo: Undo) -> None:
    """Writes the new widths into the config, so that ``save_pretrained`` and ``from_pretrained`` agree."""
    for name, value in cut.structure.described.items():
        new = value // cut.structure.units * left
        if getattr(cut.structure.config, name) != new:
            undo.set(cut.structure.config, name, new)
