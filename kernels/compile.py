"""Compiles a kernel as it ships for a target that need not be present: for the tests, and for the static audit in ``bench``."""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from qlinear.format import Format
from qlinear.kernels.configs import Config
from qlinear.kernels.matmul import _matmul_kernel, constexprs
from qlinear.kernels.runtime import Capability, Target

_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32"}


def gpu_target(capability: Capability) -> GPUTarget:
    """Triton's name for a capability: (9, 0) is sm_90, "gfx942" is itself."""
    if isinstance(capability, str):
        return GPUTarget("hip", capability, 64)
    return GPUTarget("cuda", capability[0] * 10 + capability[1], 32)


def compile_matmul(
    fmt: Format,
    dtype: torch.dtype,
    config: Config,
    capability: Capability,
    *,
    scale_dtype: torch.dtype | None = None,
    bias: bool = True,
    in_features: int = 4096,
) -> CompiledKernel:
    """The matmul kernel for x and y in ``dtype``, as the launcher would compile it for rows aligned to 16 bytes."""
    x_dtype = torch.int8 if fmt.integer_activations else dtype
    scale_dtype = scale_dtype or fmt.scale_dtype(dtype)
    pointers: dict[str, torch.dtype | None] = {
        "x_ptr": x_dtype,
        "w_ptr": torch.int8 if fmt.packing == "rows8" else torch.int16,
        "scale_ptr": scale_dtype,
        "x_scale_ptr": torch.float32 if fmt.integer_activations else None,
        "bias_ptr": dtype if bias else None,
        "y_ptr": dtype,
        "partial_ptr": None if config.split_k == 1 else torch.int32 if fmt.integer_activations else torch.float32,
        "counter_ptr": None if config.split_k == 1 else torch.int32,
    }
    constants = constexprs(fmt, x_dtype, in_features, config, Target(capability, 132))
    return compile_kernel(_matmul_kernel, pointers, constants, ("N", "K", "stride_xm"), config, capability)


def compile_kernel(
    kernel: Any,
    pointers: dict[str, torch.dtype | None],
    constants: dict[str, Any],
    aligned: tuple[str, ...],
    config: Config,
    capability: Capability,
) -> CompiledKernel:
    """Compiles a ``@triton.jit`` function without a device.

    Args:
        pointers: the dtype behind every pointer; None for an argument that is None.
        aligned: integer arguments that are multiples of 16, as pointers are.
    """
    constants = constants | {name: None for name, dtype in pointers.items() if dtype is None}
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = f"*{_NAMES[pointers[name]]}" if name in pointers else "i32"
        if name in pointers or name in aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=gpu_target(capability), options=options)
