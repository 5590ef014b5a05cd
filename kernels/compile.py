"""Compiles the kernels as they ship for a target that need not be present: for the tests and the audit in ``bench``."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from qlinear.format import BLOCK_K, Format
from qlinear.kernels.activations import _quantize_kernel, quantize_options, rounded_dtype
from qlinear.kernels.bitmap import _bitmap_kernel, _expand_kernel, bitmap_constexprs, expand_constexprs
from qlinear.kernels.blocks import _block_kernel, block_constexprs, block_options
from qlinear.kernels.configs import Config
from qlinear.kernels.decode import DECODERS
from qlinear.kernels.dequantize import _dequantize_kernel
from qlinear.kernels.dequantize import constexprs as dequantize_constexprs
from qlinear.kernels.matmul import _matmul_kernel, constexprs
from qlinear.kernels.mma_sp import _mma_sp_kernel, fragment_constexprs
from qlinear.kernels.runtime import Capability, Target

#: Scalar arguments that are no integers.
_FLOATS = ("eps",)
_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8",
    torch.uint8: "u8",
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
    row_stride: int | None = None,
) -> CompiledKernel:
    """The matmul kernel for x and y in ``dtype``, as the launcher would compile it for N = 4096.

    Args:
        row_stride: from one row of x to the next; None where x is contiguous.
    """
    target = Target(capability, 132)
    x_dtype = rounded_dtype(fmt.number, target) if fmt.quantized_activations else dtype
    scale_dtype = scale_dtype or fmt.scale_dtype(dtype)
    pointers: dict[str, torch.dtype | None] = {
        "x_ptr": x_dtype,
        **_weight_pointers(fmt),
        "scale_ptr": scale_dtype,
        "x_scale_ptr": torch.float32 if fmt.quantized_activations else None,
        "bias_ptr": dtype if bias else None,
        "y_ptr": dtype,
        "partial_ptr": torch.int32 if fmt.integer_sums else torch.float32,
        "counter_ptr": torch.int32,
    }
    constants = constexprs(fmt, x_dtype, in_features, config, target)
    integers = {"N": 4096, "K": in_features, "stride_xm": in_features if row_stride is None else row_stride}
    options = config.options(fmt, capability)
    return compile_kernel(_matmul_kernel, pointers, integers, constants, options, capability)


def compile_fragments(
    fmt: Format, dtype: torch.dtype, config: Config, capability: Capability, *, in_features: int = 4096
) -> CompiledKernel:
    """The kernel on sparse tensor cores, for x, scales and y in ``dtype`` and a bias."""
    pointers: dict[str, torch.dtype | None] = {
        "x_ptr": dtype,
        "w_ptr": torch.int32,
        "index_ptr": torch.int32,
        "scale_ptr": dtype,
        "zero_ptr": None if fmt.symmetric else torch.int32,
        "bias_ptr": dtype,
        "y_ptr": dtype,
        "partial_ptr": torch.float32,
        "counter_ptr": torch.int32,
    }
    integers = {"N": 4096, "K": in_features, "stride_xm": in_features}
    constants = fragment_constexprs(fmt, in_features, config)
    options = {"num_warps": config.num_warps}
    return compile_kernel(_mma_sp_kernel, pointers, integers, constants, options, capability)


def matmul_compiler(fmt: Format) -> Callable[[Format, torch.dtype, Config, Capability], CompiledKernel]:
    """The function that compiles the kernel which multiplies by weights of a format, as they are by default."""
    if fmt.block:
        return compile_blocks
    return compile_bitmap if fmt.sparsity == "unstructured" else compile_matmul


def _weight_pointers(fmt: Format) -> dict[str, torch.dtype | None]:
    if fmt.sparsity == "2:4":
        return {"w_ptr": torch.int32, "index_ptr": torch.int32}
    return {"w_ptr": DECODERS[fmt.packing].dtype, "index_ptr": None}


def compile_blocks(
    fmt: Format, dtype: torch.dtype, config: Config, capability: Capability, *, in_features: int = 4096
) -> CompiledKernel:
    """The block-sparse matmul kernel for x, y and scales in ``dtype`` and a bias, for N = 4096."""
    word = dtype if fmt.number == "float" else DECODERS[fmt.packing].dtype
    pointers: dict[str, torch.dtype | None] = dict.fromkeys(("x_ptr", "scale_ptr", "bias_ptr", "y_ptr"), dtype)
    pointers |= {"w_ptr": word, "index_ptr": torch.int32, "partial_ptr": torch.float32, "counter_ptr": torch.int32}
    constants = block_constexprs(fmt, dtype, in_features, config, Target(capability, 132))
    integers = {"N": 4096, "K": in_features, "stride_xm": in_features}
    options = block_options(in_features, config, capability)
    return compile_kernel(_block_kernel, pointers, integers, constants, options, capability)


def compile_bitmap(fmt: Format, dtype: torch.dtype, config: Config, capability: Capability) -> CompiledKernel:
    """The matmul kernel of unstructured weights for x in ``dtype`` and a bias, for N = K = 4096."""
    target = Target(capability, 132)
    pointers = dict.fromkeys(("x_ptr", "bias_ptr", "y_ptr"), dtype) | _bitmap_pointers(fmt, dtype)
    pointers |= {"partial_ptr": torch.float32, "counter_ptr": torch.int32}
    constants = bitmap_constexprs(fmt, dtype, config, target)
    integers = {"N": 4096, "K": 4096, "stride_xm": 4096}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return compile_kernel(_bitmap_kernel, pointers, integers, constants, options, capability)


def compile_expand(fmt: Format, dtype: torch.dtype, capability: Capability) -> CompiledKernel:
    """The kernel that writes an unstructured weight densely, in ``dtype``."""
    pointers = {**_bitmap_pointers(fmt, dtype), "y_ptr": dtype}
    constants = expand_constexprs(fmt, Target(capability, 132))
    return compile_kernel(_expand_kernel, pointers, {"N": 4096, "K": 4096}, constants, {}, capability)


def _bitmap_pointers(fmt: Format, dtype: torch.dtype) -> dict[str, torch.dtype | None]:
    floats = fmt.number == "float"
    values = fmt.scale_dtype(dtype) if floats else torch.uint8
    return {"w_ptr": values, "scale_ptr": None if floats else fmt.scale_dtype(dtype), "index_ptr": torch.int32}


def compile_quantize(
    dtype: torch.dtype, in_features: int, capability: Capability, norm: bool = False, number: str = "int"
) -> CompiledKernel:
    """The kernel that rounds contiguous x in ``dtype`` to int8 or e4m3, after an RMS norm where ``norm``."""
    padded = -(-in_features // BLOCK_K) * BLOCK_K
    pointers: dict[str, torch.dtype | None] = {
        "x_ptr": dtype,
        "gain_ptr": dtype if norm else None,
        "q_ptr": rounded_dtype(number, Target(capability, 132)),
        "scale_ptr": torch.float32,
    }
    integers = {"K": in_features, "stride_xm": in_features, "stride_qm": padded}
    constants, options = quantize_options(padded, number)
    return compile_kernel(_quantize_kernel, pointers, integers, constants, options, capability)


def compile_dequantize(
    fmt: Format, dtype: torch.dtype, capability: Capability, *, scale_dtype: torch.dtype | None = None
) -> CompiledKernel:
    """The kernel that writes the dense weight in ``dtype``."""
    scale_dtype = scale_dtype or fmt.scale_dtype(dtype)
    pointers: dict[str, torch.dtype | None] = {
        **_weight_pointers(fmt),
        "scale_ptr": scale_dtype,
        "y_ptr": dtype,
    }
    integers = {"N": 4096, "K": 4096}
    return compile_kernel(_dequantize_kernel, pointers, integers, dequantize_constexprs(fmt), {}, capability)


def compile_kernel(
    kernel: Any,
    pointers: dict[str, torch.dtype | None],
    integers: dict[str, int],
    constants: dict[str, Any],
    options: dict[str, Any],
    capability: Capability,
) -> CompiledKernel:
    """Compiles a ``@triton.jit`` function without a device.

    Args:
        pointers: the dtype behind every pointer, which is aligned to 16 bytes; None for an argument that is None.
        integers: values of integer arguments: what is compiled knows only which are multiples of 16.
        options: num_warps and such, where they are not Triton's own.
    """
    constants = constants | {name: None for name, dtype in pointers.items() if dtype is None}
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        dtype = pointers.get(name)
        signature[name] = f"*{_NAMES[dtype]}" if dtype is not None else "fp32" if name in _FLOATS else "i32"
        if name in pointers or integers.get(name, 1) % 16 == 0:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=gpu_target(capability), options=options)


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes and does."""

    registers: int
    #: Bytes of local memory: registers that did not fit.
    spilled: int
    shared: int
    tensor_core_instructions: int
    #: Copies from global to shared memory that do not pass through registers.
    asynchronous_copies: int


def usage(compiled: CompiledKernel) -> Usage:
    """Reads a kernel's resources from its machine code; no device is needed.

    NVIDIA's instructions are counted in the PTX: these are assembled one for one, and to disassemble a kernel takes
    as long as to compile it.
    """
    shared = compiled.metadata.shared
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        fields = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
        return Usage(fields["vgpr_count"], fields["private_segment_fixed_size"], shared, text.count("v_mfma"), 0)
    text = cuobjdump(compiled.asm["cubin"], "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    ptx = compiled.asm["ptx"]
    return Usage(int(found[1]), int(found[2]), shared, len(_TENSOR_CORE.findall(ptx)), len(_ASYNCHRONOUS.findall(ptx)))


_TENSOR_CORE = re.compile(r"\b(?:mma\.sync|mma\.sp\S*\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
_ASYNCHRONOUS = re.compile(r"\bcp\.async\.(?:c[ag]\.shared|bulk\S*\.shared)")


def cuobjdump(cubin: bytes, *options: str) -> str:
    """What the tool inside the Triton package prints about a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True).stdout
