"""The problems that are audited and measured: linear layers of real models, few tokens to many."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

#: (out_features, in_features) by model and layer; q, k and v are separate, as are gate and up.
LAYERS: dict[str, dict[str, tuple[int, int]]] = {
    "SmolLM2-135M": {"q,o": (576, 576), "k,v": (192, 576), "gate,up": (1536, 576), "down": (576, 1536)},
    "Qwen2.5-7B": {"q,o": (3584, 3584), "k,v": (512, 3584), "gate,up": (18944, 3584), "down": (3584, 18944)},
    "Llama-3-8B": {"q,o": (4096, 4096), "k,v": (1024, 4096), "gate,up": (14336, 4096), "down": (4096, 14336)},
    "Llama-3-70B": {"q,o": (8192, 8192), "k,v": (1024, 8192), "gate,up": (28672, 8192), "down": (8192, 28672)},
}
#: (model, layer, out_features, in_features)
Layer = tuple[str, str, int, int]

TOKENS = (1, 4, 16, 64, 256, 1024, 4096)


class Problem(NamedTuple):
    """``x [m, k] @ W[n, k].T``."""

    model: str
    layer: str
    m: int
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.model} {self.layer} {self.m} x {self.n} x {self.k}"


def layers_of(models: Iterable[str]) -> list[Layer]:
    """(model, layer, n, k) of the models' layers.

    Raises:
        ValueError: there is no such model.
    """
    found = []
    for model in models:
        if model not in LAYERS:
            raise ValueError(f"there is no model {model!r}; the models are: {', '.join(LAYERS)}")
        found += [(model, layer, n, k) for layer, (n, k) in LAYERS[model].items()]
    return found


def problems(models: Iterable[str] = LAYERS, tokens: Iterable[int] = TOKENS) -> list[Problem]:
    """Every layer of the models with every number of tokens.

    Raises:
        ValueError: there is no such model.
    """
    return [Problem(model, layer, m, n, k) for model, layer, n, k in layers_of(models) for m in tokens]
