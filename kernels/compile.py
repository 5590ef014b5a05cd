"""Compiles a kernel as it ships, for a target that need not be present: for the tests and the audit in ``bench``."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from qlinear.format import Format
from qlinear.kernels.configs import Config
from qlinear.kernels.matmul import _matmul_kernel, constexprs
from qlinear.kernels.runtime import Capability, Target

_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
}


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
        dtype = pointers.get(name)
        signature[name] = "i32" if dtype is None else f"*{_NAMES[dtype]}"
        if name in pointers or name in aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=gpu_target(capability), options=options)


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes and does, read from its machine code."""

    registers: int
    #: Bytes of local memory: registers that did not fit.
    spilled: int
    shared: int
    tensor_core_instructions: int
    #: Copies from global to shared memory that do not pass through registers.
    asynchronous_copies: int


def usage(compiled: CompiledKernel) -> Usage:
    """Reads a kernel's resources and instructions with the tools inside the Triton package; no device is needed."""
    shared = compiled.metadata.shared
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        fields = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
        return Usage(fields["vgpr_count"], fields["private_segment_fixed_size"], shared, text.count("v_mfma"), 0)
    text = _cuobjdump(compiled.asm["cubin"], "-res-usage", "-sass")
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\w+)", text, re.MULTILINE)
    matrix = sum(name in _TENSOR_CORE for name in instructions)
    return Usage(int(found[1]), int(found[2]), shared, matrix, sum(name in _ASYNCHRONOUS for name in instructions))


_TENSOR_CORE = {"HMMA", "IMMA", "HGMMA", "IGMMA", "UTCHMMA", "UTCIMMA", "UTCQMMA"}
_ASYNCHRONOUS = {"LDGSTS", "UTMALDG", "UBLKCP"}


def _cuobjdump(cubin: bytes, *options: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True).stdout
