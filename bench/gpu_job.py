"""What a stage of ``python -m bench gpu`` is given, and the sizes it works on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.problems import Layer, layers_of
from qlinear.format import DENSE

Result = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much a stage does: all of it on a GPU, next to nothing in the tests."""

    schemes: Sequence[str] = tuple(DENSE)
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float16, torch.float32)
    #: Numerics: tokens of every tile, and a weight whose sides divide by nothing.
    tokens: Sequence[int] = (1, 5, 16, 33, 64, 129, 300, 1100)
    float32_tokens: Sequence[int] = (1, 33, 300)
    odd: tuple[int, int] = (331, 1352)
    even: tuple[int, int] = (1024, 2048)
    #: Operands of products: a weight of many blocks along K, of an even number; tokens for several programs to a
    #: processor in the largest tile; schemes by how they are scaled and decoded.
    operands: tuple[int, int] = (4096, 14336)
    operand_tokens: int = 4096
    operand_schemes: Sequence[str] = ("w8a16", "w4a16", "w4a16-g32", "w4a16-asym", "w8a16-fp8", "w4a16-2:4")
    #: One column of a 2:4 weight after the other: more blocks along K than a pipeline has stages.
    columns: tuple[int, int] = (203, 768)
    #: Determinism.
    repeats: int = 20
    many_tokens: Sequence[int] = (4097, 4200)
    #: Speed.
    bench_schemes: Sequence[str] = ("w4a16", "w8a16", "w8a8", "w4a16-g32-asym", "w4a8", "fp8")
    bench_tokens: Sequence[int] = (1, 4, 16, 64, 256, 1024, 4096)
    layers: Sequence[Layer] = (
        ("square", "square", 8192, 8192),
        *layers_of(["Llama-3-8B", "SmolLM2-135M"]),
    )
    seconds: float = 0.03
    #: The weight whose launches are measured.
    launch: tuple[int, int] = (4096, 4096)
    #: Tuning.
    tuned_schemes: Sequence[str] = ("w4a16", "w8a16", "w8a8")
    tuned_layers: Sequence[tuple[int, int]] = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192))
    tuned_tokens: Sequence[int] = (1, 16, 64, 256)
    #: One layer of a language model: hidden, intermediate, heads, key and value heads, context.
    model: tuple[int, int, int, int, int] = (4096, 14336, 32, 8, 512)
    model_schemes: Sequence[str] = ("w4a16", "w8a16", "w8a8")
    compile_backend: str = "inductor"


FULL = Sizes()


@dataclass
class Job:
    """One run of a stage."""

    device: torch.device
    sizes: Sizes = FULL
    #: ``time.monotonic()`` to be done by.
    deadline: float = float("inf")
    #: Where pictures go.
    folder: Path = Path()
    #: Keeps what there is so far, in case the process does not live to return it.
    save: Callable[[Result], None] = field(default=lambda result: None)
    #: Processes that compile kernels at the same time; 0: none.
    processes: int = 0

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.deadline - time.monotonic()

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
