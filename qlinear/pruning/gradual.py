"""Pruning while training: zeros that survive the optimizer, and more of them on a cubic schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qlinear.masks import lowest_per_group, masks
from qlinear.patterns import Pattern
from qlinear.pruning.scores import magnitude
from qlinear.pruning.targets import Share, fold, is_masked, linear_layers, matrix, targets


class KeepZeros:
    """Holds the weights that are zero now at zero through training: fine-tunes a pruned model.

    Call :meth:`step` after each ``optimizer.step()``. Momentum and Adam's averages go on pushing pruned weights; each
    is put back to exactly 0 before anybody reads it.

    Args:
        model: its linear layers that hold zeros are kept; others are left alone. Masks of ``torch.nn.utils.prune``
            become permanent.

    Raises:
        ValueError: no linear layer holds a zero.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = linear_layers(model)
        for layer in layers.values():
            fold(layer)
        self._set({name: layer for name, layer in layers.items() if bool((matrix(layer) == 0).any())})
        if not self._layers:
            raise ValueError("no linear layer of the model holds a zero: prune it first")

    def _set(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = dict(layers)
        #: True where a weight ``[N, K]`` stays zero.
        self._masks: dict[str, Tensor] = {name: matrix(layer) == 0 for name, layer in layers.items()}

    def step(self) -> None:
        """After ``optimizer.step()``: puts pruned weights back to zero."""
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Zeroes what is masked."""
        for name, layer in self._layers.items():
            matrix(layer).masked_fill_(self._masks[name], 0)

    def state_dict(self) -> dict[str, Any]:
        """The masks, a bit a weight, for ``torch.save``."""
        return {"masks": {name: (tuple(m.shape), _pack(m)) for name, m in self._masks.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was taken, and zeroes what is masked.

        Raises:
            ValueError: it is of other layers.
        """
        shapes = {name: tuple(matrix(layer).shape) for name, layer in self._layers.items()}
        found = {name: tuple(shape) for name, (shape, _) in state["masks"].items()}
        if found != shapes:
            differing = sorted(set(found.items()) ^ set(shapes.items()))[:3]
            raise ValueError(f"the state is of other layers or shapes, for example {differing}")
        for name, (shape, packed) in state["masks"].items():
            self._masks[name] = _unpack(packed, shape).to(matrix(self._layers[name]).device)
        self.apply()


class Gradual(KeepZeros):
    """Magnitude pruning on the cubic schedule of Zhu & Gupta (arXiv:1710.01878) in a plain training loop.

    ::

        pruner = qlinear.pruning.Gradual(model, 0.8, begin=1000, end=10000, every=100)
        for batch in data:
            loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            pruner.step()

    At step ``t`` from ``begin`` to ``end``, every ``every`` steps, the share of zeros becomes
    ``s + (initial - s) * (1 - (t - begin) / (end - begin)) ** 3``; the smallest weights go, those that are zero first,
    so that no pruned weight comes back. Afterwards the zeros stay.

    Zeros that are there at the start, by a pruner or a mask of ``torch.nn.utils.prune`` (which becomes permanent), stay
    zero throughout: a layer has its present share where the schedule asks for less, at the end too. A layer that holds
    nothing but zeros, and no mask, counts as initialized to zero, not as pruned: it is trained.

    Args:
        model: the model being trained.
        sparsity: the final share, or a mapping of name patterns to shares, as in :func:`qlinear.prune`.
        pattern: ``"unstructured"``, ``n:m`` (each group loses more of its weights as time goes) or blocks.
        begin, end: steps (calls of :meth:`step`, counted from 1) of the first and of the last pruning.
        every: steps between two prunings.
        initial: the share of zeros at ``begin``; a layer that has more keeps them.
        scope: ``"layer"`` or ``"global"``, as in :func:`qlinear.prune`.

    Raises:
        ValueError: an impossible schedule, more than one share with scope ``"global"``, or what :func:`qlinear.prune`
            raises.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: Share = None,
        pattern: str | Pattern = "unstructured",
        *,
        begin: int = 1,
        end: int,
        every: int = 1,
        initial: float = 0.0,
        scope: str = "layer",
    ) -> None:
        self.pattern = Pattern.parse(pattern)
        if self.pattern.structured:
            raise ValueError(f"pattern {self.pattern} changes shapes: use qlinear.prune, an optimizer cannot follow")
        if not 1 <= begin < end or every < 1:
            raise ValueError(f"1 <= begin < end and every >= 1 are wanted, got begin={begin}, end={end}, every={every}")
        if not 0 <= initial < 1 or scope not in ("layer", "global"):
            raise ValueError(f"initial in [0, 1) and scope 'layer' or 'global' are wanted, got {initial!r}, {scope!r}")
        self.begin, self.end, self.every, self.initial, self.scope = begin, end, every, initial, scope
        self.steps = 0
        if scope == "global" and self.pattern.kind == "n:m":
            raise ValueError(f"pattern {self.pattern} does not rank layers together: scope is 'layer'")
        chosen = targets(model, sparsity, self.pattern, scope)
        self._final = {target.name: target.sparsity for target in chosen}
        masked = {target.name for target in chosen if is_masked(target.module)}
        for target in chosen:
            fold(target.module)
        self._set({target.name: target.module for target in chosen})
        for name, mask in self._masks.items():
            if bool(mask.all()) and name not in masked:
                mask.zero_()

    def share(self, final: float, step: int) -> float:
        """The share of zeros that the schedule asks for after ``step`` of a layer with the final share."""
        passed = min(max(step - self.begin, 0) / (self.end - self.begin), 1.0)
        return final + (self.initial - final) * (1 - passed) ** 3

    def step(self) -> None:
        """After ``optimizer.step()``: prunes further where the schedule says so, and puts zeros back."""
        self.steps += 1
        self.apply()
        due = self.begin <= self.steps <= self.end and (self.steps - self.begin) % self.every == 0
        if due or self.steps == self.end:
            self._prune()
            self.apply()

    def _prune(self) -> None:
        found = [magnitude(matrix(layer)) for layer in self._layers.values()]
        shares = [self.share(self._final[name], self.steps) for name in self._layers]
        if self.pattern.kind == "n:m":
            m = self.pattern.m
            new = [lowest_per_group(s, m - round(share * m), m) for s, share in zip(found, shares, strict=True)]
        else:
            new = masks(found, self.pattern, shares, self.scope)
        # What was zero stays zero, also where the schedule is behind it or other weights happen to be zero too.
        self._masks = {name: self._masks[name] | mask for name, mask in zip(self._layers, new, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """The step and the masks, a bit a weight, for ``torch.save``."""
        return {"steps": self.steps, **super().state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was taken; the schedule is the one this object was made with."""
        super().load_state_dict(state)
        self.steps = int(state["steps"])


def _pack(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


def _unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    count = int(np.prod(shape))
    return torch.from_numpy(np.unpackbits(packed.cpu().numpy(), count=count)).view(shape).bool()
