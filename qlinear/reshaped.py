"""Linear layers of other shapes than a model's config says: pruned heads of a config that only divides.

A checkpoint lists them, so that the model can be built again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from qlinear.float_layers import feature_counts, float_parameter, float_shape, is_conv1d, is_linear
from qlinear.linear import QLinear

#: Names under which attention modules keep their number of heads, of key-value heads, and a width of all heads.
QUERY_HEADS = ("num_heads", "num_attention_heads", "n_heads")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads")
WIDTHS = ("all_head_size", "split_size")


def differences(model: nn.Module) -> dict[str, Any]:
    """Where a Hugging Face model is not what its config builds; nothing for any other module.

    Returns:
        ``{"layers": {name: [out_features, in_features]}, "attributes": {module: {name: value}}}``, or ``{}``.
    """
    plain = _plain(model)
    if plain is None:
        return {}
    shapes, counts = dict(_shapes(plain)), dict(_counts(plain))
    layers = {name: list(shape) for name, shape in _shapes(model) if shapes.get(name, shape) != shape}
    attributes = {name: count for name, count in _counts(model) if counts.get(name, count) != count}
    return {"layers": layers, "attributes": attributes} if layers or attributes else {}


def reshape(model: nn.Module, found: dict[str, Any]) -> None:
    """Gives a model the shapes that :func:`differences` found, before its weights are loaded: they are lost.

    Raises:
        ValueError: the model has no such layer or module.
    """
    modules = dict(model.named_modules())
    for name, (n, k) in found.get("layers", {}).items():
        layer = modules.get(name)
        if layer is None or not is_linear(layer):
            raise ValueError(f"the checkpoint changes the shape of {name!r}, which is no linear layer of the model")
        _resize(layer, n, k)
    for name, counts in found.get("attributes", {}).items():
        if name not in modules:
            raise ValueError(f"the checkpoint changes the heads of {name!r}, which is no module of the model")
        for attribute, value in counts.items():
            setattr(modules[name], attribute, value)


def _plain(model: nn.Module) -> nn.Module | None:
    """What the config builds, without data."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_json_string"):
        return None
    try:
        with torch.device("meta"):
            return type(model)(copy.deepcopy(config))
    except Exception:
        # A class that is not built from its config alone is not what load() builds either: it is given the model.
        return None


def _shapes(model: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QLinear):
            yield name, (module.out_features, module.in_features)
        elif is_linear(module):
            yield name, float_shape(module)


def _counts(model: nn.Module) -> Iterator[tuple[str, dict[str, int]]]:
    for name, module in model.named_modules():
        found = {key: module.__dict__.get(key) for key in (*QUERY_HEADS, *KEY_HEADS, *WIDTHS)}
        if numbers := {key: value for key, value in found.items() if isinstance(value, int)}:
            yield name, numbers


def _resize(layer: nn.Module, n: int, k: int) -> None:
    weight = float_parameter(layer)
    layer.weight = nn.Parameter(weight.new_empty((k, n) if is_conv1d(layer) else (n, k)), weight.requires_grad)
    if isinstance(layer.bias, nn.Parameter):
        layer.bias = nn.Parameter(layer.bias.new_empty(n), layer.bias.requires_grad)
    for name, size in feature_counts(layer, n, k).items():
        setattr(layer, name, size)
