"""compressed-tensors' view of a converted model, so that other libraries read the checkpoint where they can.

Its format ``float-quantized`` stores a layer as ``weight`` float8_e4m3fn ``[N, K]`` and ``weight_scale`` ``[N, 1]``:
the same numbers as our plain layout, which keeps them in int32 words under the name ``weight_packed``. A model whose
quantized layers all are of that kind gets its ``quantization_config``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qlinear.bits import pack_bits, unpack_bits
from qlinear.format import Format, Scheme
from qlinear.linear import QLinear

_SYMMETRIC = {"num_bits": 8, "type": "float", "symmetric": True}


def to_disk(tensors: dict[str, Tensor], layers: dict[str, QLinear]) -> dict[str, Tensor]:
    """The plain tensors of a model under the names and in the dtypes a checkpoint has."""
    stored = dict(tensors)
    for name, layer in layers.items():
        key = f"{name}.weight_packed".removeprefix(".")
        if layer.format.number == "e4m3" and key in stored:
            codes = unpack_bits(stored.pop(key), 8, layer.in_features)
            stored[_weight(key)] = codes.contiguous().view(torch.float8_e4m3fn)
    return stored


def from_disk(stored: dict[str, Tensor], modules: dict[str, str]) -> dict[str, Tensor]:
    """The inverse of :func:`to_disk`, for the schemes of the layers by name.

    Raises:
        ValueError: a weight is not what its scheme stores, by its name.
    """
    tensors = dict(stored)
    for name, scheme in modules.items():
        key = f"{name}.weight_packed".removeprefix(".")
        if Scheme.parse(scheme).number == "e4m3" and _weight(key) in tensors:
            weight = tensors.pop(_weight(key))
            if weight.dtype != torch.float8_e4m3fn or weight.dim() != 2:
                got = f"{weight.dtype} {tuple(weight.shape)}"
                raise ValueError(f"{_weight(key)}: {scheme} stores a float8_e4m3fn matrix, got {got}")
            tensors[key] = pack_bits(weight.view(torch.uint8), 8)
    return tensors


def _weight(key: str) -> str:
    return key.removesuffix("_packed")


def quantization_config(model: nn.Module, layers: dict[str, QLinear]) -> dict[str, Any] | None:
    """What compressed-tensors calls the schemes of a model; None where it has no word for one of them.

    Layers that were Hugging Face's ``Conv1D`` are unknown to it.
    """
    if any(layer.format.number != "e4m3" or layer.from_conv1d for layer in layers.values()):
        return None
    by_scheme: dict[str, list[str]] = {}
    for name, layer in layers.items():
        by_scheme.setdefault(layer.scheme, []).append(name)
    # One group covers every layer but those left alone, as its own writer has it; several name their layers.
    groups = {
        f"group_{i}": _group(Scheme.parse(scheme).format, ["Linear"] if len(by_scheme) == 1 else names)
        for i, (scheme, names) in enumerate(by_scheme.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name, module in model.named_modules() if isinstance(module, nn.Linear)],
    }


def _group(fmt: Format, targets: list[str]) -> dict[str, Any]:
    token = {**_SYMMETRIC, "strategy": "token", "dynamic": True}
    return {
        "targets": targets,
        "weights": {**_SYMMETRIC, "strategy": "channel", "dynamic": False},
        "input_activations": token if fmt.quantized_activations else None,
        "output_activations": None,
    }
