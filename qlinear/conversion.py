"""``convert``: swaps the linear layers of a model for quantized ones, in place, all or nothing."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from tqdm import tqdm

from qlinear.float_layers import float_parameter, is_linear
from qlinear.format import Scheme
from qlinear.linear import QLinear
from qlinear.undo import Undo

#: A scheme for every linear layer, or an ordered mapping of name patterns to schemes (None leaves a layer in float).
What = str | Scheme | Mapping[str, str | Scheme | None]


_T = TypeVar("_T")

#: Weights from which the work is long enough for a progress bar (on a terminal).
_LONG = 50_000_000
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

    @property
    def name(self) -> str:
        return self.names[0]


def convert(
    model: nn.Module,
    what: What,
    *,
    compute_dtype: torch.dtype | None = None,
    keep_dense: bool = False,
    progress: bool | None = None,
    prune: str | None = None,
) -> nn.Module:
    """Swaps ``nn.Linear`` and Hugging Face ``Conv1D`` for :class:`~qlinear.QLinear`, in place; returns the root.

    Args:
        model: any module; when it is itself a linear layer, the new layer is returned.
        what: a scheme, or an ordered mapping from patterns to schemes. A pattern is a glob over the layer's dotted name
            (``"*.mlp.*"``) or a regular expression after ``re:`` that must match the whole name; the first that matches
            wins, and None leaves the layer in float. A layer whose weight is tied to another module (an ``lm_head``
            tied to the embedding) is left alone unless a pattern is its exact name.
        compute_dtype: compute in this dtype, whatever the input's: ``torch.bfloat16`` makes a float32 model fast on
            a CPU.
        keep_dense: keep a 16-bit copy of every converted weight for many tokens (:meth:`QLinear.keep_dense`): long
            prompts are as fast as in 16 bit, and the model takes more memory than it did.
        progress: a progress bar on standard error; None shows it where the work is long.
        prune: how a weight is brought into the pattern of a sparse scheme, for example ``"magnitude"``; None where the
            model is pruned already, or no layer's scheme is sparse. Layers with a dense scheme are not pruned.

    A module used twice is converted once. Peak extra memory is one layer: what is replaced is kept in a temporary
    file until the end. Any failure leaves the model exactly as it was.

    Raises:
        ValueError: unknown scheme, a pattern that matches no linear layer, nothing to convert, a layer that was
            asked for and cannot be converted, or cannot keep a copy, a weight that does not have the pattern of its
            sparse scheme, or ``prune`` where no scheme is sparse; the message names the layer or the schemes.
    """
    rules = _rules(what)
    chosen = [(c, scheme) for c, scheme in choose(model, rules, "convert") if scheme is not None]
    if prune is not None and not any(scheme.format.sparsity for _, scheme in chosen):
        names = ", ".join(sorted({str(scheme) for _, scheme in chosen}))
        raise ValueError(
            f"prune={prune!r} brings weights into the pattern of a sparse scheme (such as w4a16-2:4), and {names} has "
            "none: prune the model with qlinear.prune, or leave the argument out"
        )
    quiet = no_bar([c.module for c, _ in chosen], progress)
    with Undo(model) as undo:
        for candidate, scheme in tqdm(chosen, desc="quantizing", unit="layer", disable=quiet):
            try:
                new = QLinear.from_float(candidate.module, scheme, compute_dtype, prune)
                if keep_dense:
                    new.keep_dense()
            except (ValueError, TypeError, RuntimeError) as error:
                raise type(error)(f"layer {candidate.name!r} ({scheme}): {error}") from error
            _keep_hooks(candidate.module, new)
            if "" in candidate.names:
                return new
            # The undo log takes the layer over, so that its weight is freed before the next one is made.
            undo.replace(candidate.names, candidate.module, new)
            if candidate.tied_to is not None:
                undo.untie(model)
            del candidate.module
    return model


def no_bar(layers: Iterable[nn.Module], progress: bool | None) -> bool | None:
    """What tqdm's ``disable`` takes: None is a bar on a terminal, where the work on these layers is long."""
    weights = sum(float_parameter(layer).numel() for layer in layers)
    return (True if weights < _LONG else None) if progress is None else not progress


def prepare(model: nn.Module, layout: str | None = None) -> nn.Module:
    """Puts every quantized layer into the layout its device computes with: after loading plain weights by hand.

    ``layout="cpu"`` before ``torch.export``, ``torch.jit.trace``, AOTInductor or ``share_memory`` of a model with
    ``w8a8`` layers on a CPU: their fastest layouts, ``fbgemm`` and ``onednn``, have no storage to read or share.

    Raises:
        ValueError: a layer has no such layout; it is named, and all layers are in the layouts they were in.
    """
    done: list[tuple[QLinear, str]] = []
    for name, module in model.named_modules():
        if not isinstance(module, QLinear):
            continue
        done.append((module, module.layout))
        try:
            module.prepare(layout)
        except ValueError as error:
            for changed, before in done:
                changed.prepare(before)
            raise ValueError(f"layer {name!r}: {error}") from None
    return model


def unprepare(model: nn.Module) -> nn.Module:
    """Puts every quantized layer back into the plain layout: before a library moves its buffers by hand."""
    for module in model.modules():
        if isinstance(module, QLinear):
            module.unprepare()
    return model


def candidates(model: nn.Module) -> list[Candidate]:
    """The linear layers of a model, each once, in order, with what stands against converting it."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    found: dict[int, Candidate] = {}
    fused: set[int] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        first = id(module) not in found
        if isinstance(module, nn.TransformerEncoderLayer):
            fused.update((id(module.linear1), id(module.linear2)))
        if is_linear(module):
            obstacle = _FUSED if id(module) in fused else _obstacle(module)
            entry = found.setdefault(id(module), Candidate(module, obstacle=obstacle))
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


def _rules(what: What) -> list[tuple[str | None, Scheme | None]]:
    if isinstance(what, Mapping):
        if not what:
            raise ValueError("the mapping of patterns to schemes is empty")
        return [(pattern, None if scheme is None else Scheme.parse(scheme)) for pattern, scheme in what.items()]
    return [(None, Scheme.parse(what))]


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


def choose(model: nn.Module, rules: list[tuple[str | None, _T | None]], verb: str) -> list[tuple[Candidate, _T | None]]:
    """What the first matching rule says of each linear layer; None leaves it alone.

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
    chosen: list[tuple[Candidate, _T | None]] = []
    for layer in layers:
        rule = next((rule for rule in rules if matches(rule[0], layer.names)), (None, None))
        by_name = rule[0] in layer.names
        if by_name and rule[1] is not None and layer.obstacle:
            raise ValueError(f"layer {layer.name!r} cannot be {verb.rstrip('e')}ed: {layer.obstacle}")
        left = layer.obstacle is not None or (layer.tied_to is not None and not by_name)
        chosen.append((layer, None if left else rule[1]))
    if all(asked is None for _, asked in chosen):
        reasons = {
            layer.name: layer.obstacle or (f"tied to {layer.tied_to}" if layer.tied_to else "None")
            for layer, _ in chosen
        }
        raise ValueError(f"nothing to {verb}: {reasons}")
    return chosen


def _keep_hooks(old: nn.Module, new: nn.Module) -> None:
    """Forward hooks that someone put on the layer go on working; a torch.nn.utils.prune mask is in the weight now."""
    for key, value in old.__dict__.items():
        if key.startswith(("_forward_", "_backward_")) and isinstance(value, dict):
            hooks = {i: hook for i, hook in value.items() if not isinstance(hook, BasePruningMethod)}
            # The very dict otherwise: a hook's handle removes it from there.
            new.__dict__[key] = value if len(hooks) == len(value) else type(value)(hooks)
    new._is_full_backward_hook = old._is_full_backward_hook
