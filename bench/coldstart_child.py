"""The fresh process of ``python -m bench coldstart``: imports are part of what it times, so none stands up here."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from typing import Any


class _Watch:
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, step: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = step()
        self.seconds[name] = time.perf_counter() - begin
        return result


def run(scheme: str, device: str, n: int, k: int) -> dict[str, Any]:
    """Times the steps of one call of a layer ``[n, k]``, from the first import on."""
    watch = _Watch()
    torch = watch("import torch", lambda: importlib.import_module("torch"))
    qlinear = watch("import qlinear", lambda: importlib.import_module("qlinear"))

    def layer() -> Any:
        linear = torch.nn.Linear(k, n, dtype=torch.bfloat16, device=device)
        return qlinear.QLinear.from_float(linear, scheme)

    q = watch("make layer", layer)
    x = torch.zeros(1, k, dtype=torch.bfloat16, device=device)
    kernels: dict[str, list[str]] = {"compiled": [], "loaded": []}
    if device == "cuda":
        watch("import triton", lambda: importlib.import_module("triton"))
        listen(kernels)

    def call() -> None:
        with torch.no_grad():
            q(x)
        if device == "cuda":
            torch.cuda.synchronize()

    watch("first call", call)
    watch("second call", call)
    if device == "cpu":
        watch("import triton", lambda: importlib.import_module("qlinear.kernels.compile"))
        listen(kernels)
        watch("compile", lambda: compile_call(scheme, n, k))
    return {"seconds": watch.seconds, **kernels}


def listen(kernels: dict[str, list[str]]) -> None:
    """From now on every kernel's name is put down: as compiled, or as loaded from Triton's cache."""
    import triton

    def heard(src: Any, cache_hit: bool, **_: Any) -> None:
        kernels["loaded" if cache_hit else "compiled"].append(src.name.split(".")[-1])

    # Not a hook of the launcher: Triton 3.6 cannot tell one of kernels that take a function.
    triton.knobs.compilation.listener = heard


def compile_call(scheme: str, n: int, k: int) -> None:
    """Compiles what one call of the layer with one token launches on an H100, or loads it from Triton's cache."""
    import torch

    from qlinear.format import FORMATS
    from qlinear.kernels.compile import compile_matmul, compile_quantize
    from qlinear.kernels.configs import choose_config

    fmt, dtype = FORMATS[scheme], torch.bfloat16
    if fmt.quantized_activations:
        compile_quantize(dtype, k, (9, 0), number=fmt.number)
    config = choose_config(1, n, k, fmt, dtype, (9, 0), 132)
    compile_matmul(fmt, dtype, config, (9, 0), in_features=k)


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
