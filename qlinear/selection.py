"""Which linear layers of a model a request is for, and what stands against changing them."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import nn

from qlinear.float_layers import float_parameter, is_linear
from qlinear.linear import QLinear

_T = TypeVar("_T")

_FUSED = "its weight is read directly by the fast path of nn.TransformerEncoderLayer, past its forward"


@dataclass
class Candidate:
    """One distinct module of a model, under all its names, and what stands against converting it."""

    module: nn.Module
    names: list[str] = field(default_factory=list)
    #: Why it cannot be converted at all; None where it can.
    obstacle: str | None = None
    #: The parameter its weight is shared with; such a layer is converted only when asked for by its exact name.
    tied_to: str | None = None
    #: Whether it is the model's output head: see :func:`output_head`.
    head: bool = False

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass(frozen=True)
class Choice(Generic[_T]):
    """What the first matching rule says of one linear layer."""

    layer: Candidate
    #: None leaves the layer alone.
    asked: _T | None
    #: Whether the rule is the layer's exact name.
    by_name: bool

    @property
    def head_in_passing(self) -> bool:
        """The output head, by a rule for more than it. The papers' pruned models keep theirs dense, and so do we."""
        return self.layer.head and not self.by_name


def output_head(model: nn.Module) -> object:
    """What a Hugging Face model says it makes its logits with (``lm_head``): any module; None where it has none."""
    get = getattr(model, "get_output_embeddings", None)
    try:
        return None if get is None else get()
    except (AttributeError, NotImplementedError):
        # Written for another of its architectures.
        return None


def head_names(model: nn.Module) -> list[str]:
    """The first name of the output head where it is a linear layer: what leaves it out of a mapping."""
    return [layer.name for layer in candidates(model) if layer.head]


def candidates(model: nn.Module) -> list[Candidate]:
    """The linear layers of a model, each once, in order, with what stands against converting it."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    found: dict[int, Candidate] = {}
    fused: set[int] = set()
    head = output_head(model)
    for name, module in model.named_modules(remove_duplicate=False):
        first = id(module) not in found
        if isinstance(module, nn.TransformerEncoderLayer):
            fused.update((id(module.linear1), id(module.linear2)))
        if is_linear(module):
            obstacle = _FUSED if id(module) in fused else _obstacle(module)
            entry = found.setdefault(id(module), Candidate(module, obstacle=obstacle, head=module is head))
            entry.names.append(name)
        for key, parameter in module._parameters.items():
            if parameter is not None and first and all(m is not module for m, _ in owners.get(id(parameter), [])):
                owners.setdefault(id(parameter), []).append((module, f"{name}.{key}" if name else key))
    for entry in found.values():
        shared = [n for m, n in owners.get(id(float_parameter(entry.module)), []) if m is not entry.module]
        entry.tied_to = shared[0] if shared else None
    return list(found.values())


def _obstacle(module: nn.Module) -> str | None:
    """Why this linear layer cannot be swapped, or None."""
    kind = type(module)
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "its weight is read directly by nn.MultiheadAttention, past its forward"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance (offloading or a wrapper)"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "its weight is parametrized"
    if "weight" not in module._parameters and "weight_mask" not in module._buffers:
        return "its weight is computed before every forward (weight_norm, spectral_norm: remove that first)"
    if isinstance(module, nn.Linear) and kind.forward is not nn.Linear.forward:
        return f"{kind.__name__} has a forward of its own"
    if isinstance(float_parameter(module), nn.parameter.UninitializedParameter):
        return "its weight is not initialized yet"
    return None


def matches(pattern: str | None, names: list[str]) -> bool:
    """Whether one of a layer's names matches a glob, a regular expression after ``re:``, or None (which always does).

    Raises:
        ValueError: no regular expression.
    """
    if pattern is None:
        return True
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern[3:])
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from error
        return any(expression.fullmatch(name) for name in names)
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def choose(model: nn.Module, rules: list[tuple[str | None, _T | None]], verb: str) -> list[Choice[_T]]:
    """What the first matching rule says of each linear layer.

    Args:
        model: any module.
        rules: pairs of a pattern (see :func:`matches`) and what it asks for.
        verb: what is going to be done ("convert", "prune"), for messages.

    Raises:
        ValueError: a pattern matches no linear layer, a layer asked for by its exact name has an obstacle, or every
            layer is left alone.
    """
    layers = candidates(model)
    for pattern, _ in rules:
        if not any(matches(pattern, c.names) for c in layers):
            names = ", ".join(c.name for c in layers[:6]) + (", ..." if len(layers) > 6 else "")
            wanted = "" if pattern is None else f"pattern {pattern!r} matches no linear layer; "
            done = sum(isinstance(module, QLinear) for module in model.modules())
            names = (names or "none") + (f" ({done} are quantized already)" if done else "")
            raise ValueError(f"{wanted}the model's linear layers are: {names}")
    chosen: list[Choice[_T]] = []
    for layer in layers:
        rule = next((rule for rule in rules if matches(rule[0], layer.names)), (None, None))
        by_name = rule[0] in layer.names
        if by_name and rule[1] is not None and layer.obstacle:
            raise ValueError(f"layer {layer.name!r} cannot be {verb.rstrip('e')}ed: {layer.obstacle}")
        left = layer.obstacle is not None or (layer.tied_to is not None and not by_name)
        chosen.append(Choice(layer, None if left else rule[1], by_name))
    if all(choice.asked is None for choice in chosen):
        reasons = {
            layer.name: layer.obstacle or (f"tied to {layer.tied_to}" if layer.tied_to else "None") for layer in layers
        }
        raise ValueError(f"nothing to {verb}: {reasons}")
    return chosen
