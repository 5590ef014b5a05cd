"""What stands against removing units: shapes are cut only where everything that sees the units is known.

Names say where an MLP or an attention is (:mod:`qlinear.pruning.structure`), and not what else its forward does. So
whatever stands beside the layers, and could have the width of what is removed, is a reason to refuse.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain

from torch import Tensor, nn

from qlinear.float_layers import float_shape, is_conv1d
from qlinear.linear import QLinear
from qlinear.pruning.structure import Structure, join, keeps_units_apart
from qlinear.pruning.targets import check, masked_tensors
from qlinear.selection import Candidate, candidates

#: Buffers of attention modules that have no size in common with the heads: causal masks, sines and cosines.
_MASKS = ("bias", "masked_bias", "embed_positions")
#: Numbers that attention modules keep and that stay as they are when heads go.
_CONSTANTS = ("head_dim", "attention_head_size", "num_key_value_groups", "layer_idx")


def refuse(model: nn.Module, structures: Sequence[Structure]) -> None:
    """Raises where a structure is not known to work without some of its units; changes nothing.

    Raises:
        ValueError: a layer that is used in two places, shares a parameter, has parameters that are not plain or
            finite, or stands beside a module or parameter that could depend on the units; it is named.
    """
    layers = {id(c.module): c for c in candidates(model)}
    places, owners = _names(model, "_modules"), _names(model, "_parameters")
    for structure in structures:
        for layer in structure.layers:
            name = layers[id(layer)].name
            if reason := _of_layer(layers[id(layer)], owners):
                raise ValueError(f"{_what(structure)}: layer {name!r} keeps its shape: {reason}")
            check(name, layer)
        for module in [*structure.layers, *structure.holders[1:]]:
            if len(used := places[id(module)]) > 1:
                raise ValueError(f"{_what(structure)}: a module is used in {len(used)} places, as {', '.join(used)}")
        around = _of_mlp(structure, places)
        if structure.head_dim:
            tables = _tables(model, (c.module for c in layers.values()), structure.units * structure.heads)
            around = chain(_of_attention(structure, places), _read(structure), tables)
        if reason := next(around, None):
            raise ValueError(f"{_what(structure)}: {reason}")


def _what(structure: Structure) -> str:
    return f"{'heads' if structure.head_dim else 'neurons'} of {structure.name!r} cannot be removed"


def _names(model: nn.Module, members: str) -> dict[int, list[str]]:
    """Where each module (``_modules``) or parameter (``_parameters``) stands: ``parent.key``.

    All below a module that is used twice stands in one place.
    """
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, member in getattr(module, members).items():
            if member is not None:
                found.setdefault(id(member), []).append(join(name, key))
    return found


def _of_layer(layer: Candidate, owners: Mapping[int, list[str]]) -> str | None:
    if layer.obstacle:
        return layer.obstacle
    module, masked = layer.module, masked_tensors(layer.module)
    known = {"weight", "bias", *(f"{name}_orig" for name in masked), *(f"{name}_mask" for name in masked)}
    extra = sorted({*module._parameters, *module._buffers, *module._modules} - known)
    if extra:
        return f"it has {', '.join(extra)} besides a weight and a bias"
    for key, parameter in module._parameters.items():
        tied = [n for n in owners.get(id(parameter), []) if n != join(layer.name, key)]
        if tied:
            return f"its {key.removesuffix('_orig')} is tied to {tied[0]}"
    return None


def _of_mlp(structure: Structure, places: Mapping[int, list[str]]) -> Iterator[str]:
    """Reasons in and around an MLP: nothing but its layers may have the width of the neurons."""
    if not structure.holders:
        return
    makers, units = structure.slices[:-1], structure.units
    inputs, outputs = float_shape(makers[0].layer)[1], float_shape(structure.consumer.layer)[0]
    if len(makers) == 1 and units in (inputs, outputs):
        yield (
            f"{units} neurons between {inputs} inputs and {outputs} outputs do not show that one layer feeds the other "
            "and nothing else reads them; layers in a plain nn.Sequential are known to"
        )
    for name, thing in _beside(structure, places):
        if isinstance(thing, nn.Module) and all(keeps_units_apart(m) for m in _leaves(thing)):
            continue
        sizes = _sizes(thing)
        if units in sizes:
            yield f"{name} has the width of the neurons, {units}, and is not known to do without some"
        elif sizes <= {0, 1}:
            yield f"{name} is not known to treat each neuron by itself"


def _of_attention(structure: Structure, places: Mapping[int, list[str]]) -> Iterator[str]:
    """Reasons in and around an attention: shapes that do not fit, and all that is not known to go with each head."""
    units, size = structure.units, structure.head_dim
    for layer in structure.layers:
        parts = [s for s in structure.slices if s.layer is layer]
        width, wanted = float_shape(layer)[parts[0].axis], sum(s.size * units for s in parts)
        if len(parts) > 1 and not is_conv1d(layer):
            yield f"{places[id(layer)][0]} makes queries, keys and values, in an order that is known of a Conv1D only"
        if width != wanted:
            yield f"{places[id(layer)][0]} has {width} features, and heads of {size} make {wanted}"
    for name, thing in _beside(structure, places):
        key = name.rpartition(".")[2]
        if isinstance(thing, nn.Parameter):
            yield f"it has a parameter {name}, which is not known to do without some heads"
        elif isinstance(thing, Tensor):
            if key not in _MASKS:
                yield f"it has a buffer {name}, which is not known to do without some heads"
        # BERT's own norms stand before and after the attention.
        elif not (_knows_heads(thing, size) or (len(structure.holders) > 1 and key == "LayerNorm")):
            yield f"{name} ({type(thing).__name__}) is not known to treat each head by itself"


def _read(structure: Structure) -> Iterator[str]:
    """Numbers of heads, or widths of all of them, that a forward reads under names that are not among the counts."""
    heads = structure.units * structure.heads
    counted = {*_CONSTANTS, *(name for _, name in structure.counts)}
    for holder in structure.holders:
        code = getattr(inspect.unwrap(type(holder).forward), "__code__", None)
        for key in sorted({*(code.co_names if code else ())} - counted):
            value = holder.__dict__.get(key)
            if type(value) is int and value in (structure.units, heads, heads * structure.head_dim):
                yield f"the forward of {type(holder).__name__} reads {key}, {value}, which would stay as it is"


def _tables(model: nn.Module, layers: Iterable[nn.Module], heads: int) -> Iterator[str]:
    """Biases of relative positions, ``[distances, heads]``, wherever in the model they stand."""
    projections = {id(p) for layer in layers for p in layer.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and parameter.shape[1] == heads and id(parameter) not in projections:
            yield f"{name} {list(parameter.shape)} seems to have a column for each head"


def _knows_heads(module: nn.Module, size: int) -> bool:
    """Whether a module beside the projections is one that treats every head alike and by itself."""
    kind = type(module).__name__
    if type(module) is nn.Softmax or keeps_units_apart(module) or kind.endswith("RotaryEmbedding"):
        return True
    tensors = [*module.parameters(), *module.buffers()]
    # Norms of queries and keys: those over one head have its size, those over all heads have their whole width.
    leaf = "Norm" in kind and not module._modules
    return leaf and bool(tensors) and all(tuple(t.shape) == (size,) for t in tensors)


def _beside(structure: Structure, places: Mapping[int, list[str]]) -> Iterator[tuple[str, nn.Module | Tensor]]:
    """Modules, parameters and buffers that stand beside the layers of a structure, with their names."""
    own = {id(m) for m in (*structure.layers, *structure.holders)}
    for holder in structure.holders:
        above = places.get(id(holder), [""])[0]
        for key, thing in [*holder._parameters.items(), *holder._buffers.items(), *holder._modules.items()]:
            if thing is not None and id(thing) not in own:
                yield join(above, key), thing


def _leaves(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if not m._modules]


def _sizes(thing: nn.Module | Tensor) -> set[int]:
    """Every size that a tensor, or any tensor within a module, has."""
    if isinstance(thing, Tensor):
        return set(thing.shape)
    found = {size for t in (*thing.parameters(), *thing.buffers()) for size in t.shape}
    # Packed weights have other sizes than the layer.
    return found.union(*((m.out_features, m.in_features) for m in thing.modules() if isinstance(m, QLinear)))
