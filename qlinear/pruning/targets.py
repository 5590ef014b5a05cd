"""Which layers are pruned, and by how much."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.prune import remove as make_permanent

from qlinear.float_layers import float_parameter, is_conv1d
from qlinear.masks import removed
from qlinear.patterns import Pattern
from qlinear.selection import candidates, choose
from qlinear.undo import Undo

#: The share of zeros for every linear layer, or an ordered mapping of name patterns to shares (None leaves a layer).
Share = float | None | Mapping[str, float | None]


@dataclass(frozen=True)
class Target:
    """One layer to prune, by the first of its names, and its share of zeros."""

    name: str
    module: nn.Module
    sparsity: float

    @property
    def matrix(self) -> Tensor:
        """The weight ``[N, K]`` (out_features, in_features): a view, so that writing to it changes the layer."""
        return matrix(self.module)


def matrix(module: nn.Module) -> Tensor:
    """The weight of a linear layer as ``[N, K]``: a view, also of the transposed weight of a ``Conv1D``."""
    weight = float_parameter(module).detach()
    return weight.t() if is_conv1d(module) else weight


def targets(model: nn.Module, sparsity: Share, pattern: Pattern, scope: str = "layer") -> list[Target]:
    """The layers to prune, as ``convert`` would choose them.

    Warns:
        UserWarning: layers of so few blocks (or weights) that the share is none or all of them. Nothing, or all but the
            one that always stays, is removed of these.

    Raises:
        ValueError: a share that is none, a name pattern that matches nothing, a weight that cannot be pruned, or more
            than one share with scope ``"global"``.
    """
    if isinstance(sparsity, Mapping):
        if not sparsity:
            raise ValueError("the mapping of patterns to sparsities is empty")
        rules: list[tuple[str | None, float | None]] = [
            (name, None if share is None else pattern.sparsity(share)) for name, share in sparsity.items()
        ]
    else:
        rules = [(None, pattern.sparsity(sparsity))]
    chosen = [c for c in choose(model, rules, "prune") if not c.head_in_passing]
    found = [Target(c.layer.name, c.layer.module, c.asked) for c in chosen if c.asked is not None]
    if not found:
        raise ValueError("nothing to prune but the output head, which has to be asked for by its exact name")
    for target in found:
        check(target.name, target.module)
    if not pattern.structured and scope == "global":
        _check_one_share(found)
    elif not pattern.structured and not pattern.m:
        _warn_of_few_units(found, pattern)
    return found


def _check_one_share(layers: Sequence[Target]) -> None:
    for a, b in pairwise(layers):
        if a.sparsity != b.sparsity:
            raise ValueError(
                f"scope 'global' takes one sparsity for all layers, got {a.sparsity:g} for {a.name!r} and "
                f"{b.sparsity:g} for {b.name!r}: give them one, or take scope 'layer'"
            )


def _warn_of_few_units(layers: Sequence[Target], pattern: Pattern) -> None:
    """Says which layers cannot have the share they were asked for."""
    what = "blocks" if pattern.kind == "block" else "weights"
    lines = []
    for target in layers:
        n, k = target.matrix.shape
        units = pattern.units(n, k)
        count = removed(target.sparsity, units)
        if not 0 < round(target.sparsity * units) < units:
            asked = f"{target.sparsity:g} of them"
            lines.append(f"layer {target.name!r} [{n}, {k}] loses {count} of {units} {what}, not {asked}")
    if lines:
        more = f"; and {len(lines) - 6} layers more" if len(lines) > 6 else ""
        warnings.warn(
            f"pattern {pattern} leaves at least one of a layer's {what}: {'; '.join(lines[:6])}{more}. Leave such "
            "layers out with a mapping of names to shares, None for them, or take another pattern",
            stacklevel=4,
        )


def check(name: str, layer: nn.Module) -> None:
    """Raises ValueError, with the layer's name, where its weight cannot be ranked."""
    weight = float_parameter(layer)
    if weight.is_meta:
        raise ValueError(f"layer {name!r}: its weight is on the meta device: load the model first")
    if not weight.is_floating_point():
        raise ValueError(f"layer {name!r}: its weight is {weight.dtype}, a float dtype is wanted")
    if not bool(torch.isfinite(weight.detach()).all()):
        raise ValueError(f"layer {name!r}: its weight holds NaN or infinity; it cannot be ranked")


def masked_tensors(module: nn.Module) -> list[str]:
    """The names (``weight``, ``bias``) of what ``torch.nn.utils.prune`` keeps a mask on."""
    hooks = module._forward_pre_hooks.values()
    return [hook._tensor_name for hook in hooks if isinstance(hook, BasePruningMethod)]


def is_masked(module: nn.Module) -> bool:
    """Whether ``torch.nn.utils.prune`` keeps a mask on this layer."""
    return bool(masked_tensors(module))


def fold_masks(model: nn.Module) -> nn.Module:
    """Makes the masks of ``torch.nn.utils.prune`` permanent, in place: weights become plain parameters with zeros.

    Every module is looked at, linear or not. ``convert`` and ``prune`` take such layers as they are and do this for
    those they change; call it to save or to go on training without the hooks. Returns the root.
    """
    for module in model.modules():
        fold(module)
    return model


def fold(module: nn.Module) -> None:
    """:func:`fold_masks` for one module."""
    for name in masked_tensors(module):
        make_permanent(module, name)


def fold_layers(layers: Iterable[nn.Module], undo: Undo) -> None:
    """Makes the masks on the layers permanent, unless the work fails later."""
    for layer in layers:
        if is_masked(layer):
            undo.keep_members(layer)
            # `remove` writes the product into the original parameter.
            for name, parameter in list(layer.named_parameters(recurse=False)):
                if name.endswith("_orig"):
                    undo.keep(parameter)
            fold(layer)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer of a model by its first name, whether or not it is pruned."""
    return {c.name: c.module for c in candidates(model)}
