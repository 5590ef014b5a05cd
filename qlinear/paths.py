"""How a layer multiplies, by device, dtype and number of tokens: for the operators, ``inspect`` and ``doctor``."""

from __future__ import annotations

import functools

import torch

from qlinear import cpu
from qlinear.format import Format

#: Tokens up to which the crossover between two paths is looked for.
_MOST_TOKENS = 4096
#: Tokens up to which the layout ``mma.sp`` is multiplied as it is; from 17 on the weight is read again for every 16.
FRAGMENT_TOKENS = 128
#: Tokens up to which a tile of an unstructured weight is multiplied where it is expanded, and not written first.
UNSTRUCTURED_TOKENS = 64


def check_copy(fmt: Format, dtype: torch.dtype) -> None:
    """Raises a ValueError where nothing would be won by a 16-bit copy of a weight in ``dtype``."""
    if fmt.quantized_activations:
        raise ValueError(f"{fmt} quantizes activations, a product with a 16-bit copy would not; use w8a16")
    if fmt.block:
        instead = f", or take {fmt.dense}" if fmt.dense else ""
        raise ValueError(
            f"{fmt} skips blocks that are zero for any number of tokens, a product with a 16-bit copy would not; "
            f"leave keep_dense out{instead}"
        )
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"a kept copy is float16 or bfloat16, got {dtype}: see compute_dtype")


def path(
    fmt: Format,
    dtype: torch.dtype,
    tokens: int,
    device: torch.device,
    layout: str,
    in_features: int,
    out_features: int,
    kept: bool = False,
    semi_structured: bool = False,
) -> tuple[str, str]:
    """How a product of ``tokens`` rows is computed on a device, and why: ``(name, reason)``, for ``doctor``.

    Args:
        kept: a 16-bit copy of the weight is there (:meth:`qlinear.QLinear.keep_dense`).
        semi_structured: that copy is one of :mod:`qlinear.semi_structured`.
    """
    few = _few_tokens(fmt, dtype, device, layout, in_features, out_features, kept)
    return _path(fmt, dtype, tokens, device.type, layout, in_features, kept, few, semi_structured)


def _few_tokens(
    fmt: Format, dtype: torch.dtype, device: torch.device, layout: str, k: int, n: int, kept: bool
) -> int | None:
    """The most tokens that are multiplied by the packed weight itself; None: any number."""
    if device.type == "cpu":
        return cpu.few_tokens(fmt, dtype, layout) if kept else None
    if layout != "triton":
        return (FRAGMENT_TOKENS if layout == "mma.sp" else 0) if kept else None
    if fmt.sparsity not in (None, "2:4"):
        return None
    from qlinear.kernels.tuned import fused_tokens_on

    return fused_tokens_on(device, n, k, fmt, dtype, kept)


def _path(
    fmt: Format,
    dtype: torch.dtype,
    tokens: int,
    kind: str,
    layout: str,
    k: int,
    kept: bool,
    few: int | None,
    semi_structured: bool = False,
) -> tuple[str, str]:
    many = few is not None and tokens > few
    if kept and many:
        product = "PyTorch's semi-structured matmul" if semi_structured else "F.linear"
        return f"{product} on the kept copy", f"more than {few} tokens" if few else "no faster way in this dtype"
    if kind == "cpu":
        return cpu.path(fmt, dtype, tokens, layout, k)
    if layout == "mma.sp" and tokens <= FRAGMENT_TOKENS and dtype != torch.float32:
        return "Triton mma.sp (unverified)", "asked for by layout: sparse tensor cores, no GPU has run it yet"
    if fmt.sparsity == "unstructured":
        return _bitmap_path(tokens)
    if layout != "triton":
        return "dequantize + F.linear", f"no kernel reads the {layout} layout on {kind}"
    if fmt.block:
        return "Triton block-sparse matmul", "only stored blocks are read and multiplied"
    if fmt.quantized_activations and fmt.number == "e4m3":
        return _fp8_path()
    if fmt.integer_activations:
        return "Triton int8 x int8", "int32 sums on the tensor cores, activations quantized per token by one kernel"
    if many:
        return "Triton dequantize + vendor matmul", f"more than {few} tokens"
    return "Triton matmul", "packed weights are decoded in registers" + (", split along K" if tokens <= 64 else "")


def _bitmap_path(tokens: int) -> tuple[str, str]:
    if tokens > UNSTRUCTURED_TOKENS:
        return "Triton expand + vendor matmul", f"more than {UNSTRUCTURED_TOKENS} tokens"
    return "Triton expands tiles", "where a weight lies is counted from bits: saves memory, not time"


def _fp8_path() -> tuple[str, str]:
    """What the current GPU makes of fp8."""
    from qlinear.kernels.runtime import target_of

    if not torch.cuda.is_available() or target_of(torch.device("cuda")).fp8:
        return "Triton fp8 x fp8", "float32 sums on the tensor cores, activations rounded to e4m3 per token by a kernel"
    why = "no float8 products here (NVIDIA has them from compute capability 8.9 on): slower, the same numbers"
    return "Triton matmul, e4m3 held in float16", why


def paths(
    fmt: Format,
    dtype: torch.dtype,
    device: torch.device,
    layout: str,
    in_features: int,
    out_features: int,
    kept: bool = False,
    semi_structured: bool = False,
) -> dict[int, str]:
    """Every path a layer takes on a device, by the number of tokens each begins at; arguments as for :func:`path`."""
    few = _few_tokens(fmt, dtype, device, layout, in_features, out_features, kept)
    return dict(_paths(fmt, dtype, device.type, layout, in_features, kept, few, semi_structured))


@functools.cache
def _paths(
    fmt: Format, dtype: torch.dtype, kind: str, layout: str, k: int, kept: bool, few: int | None, semi_structured: bool
) -> tuple[tuple[int, str], ...]:
    found: list[tuple[int, str]] = []
    # A crossover of 4096 tokens is the last there can be.
    for tokens in range(1, _MOST_TOKENS + 2):
        name, _ = _path(fmt, dtype, tokens, kind, layout, k, kept, few, semi_structured)
        if not found or name != found[-1][1]:
            found.append((tokens, name))
    return tuple(found)


def describe_paths(found: dict[int, str]) -> str:
    """The result of :func:`paths` in a line."""
    return "; ".join(name if tokens == 1 else f"from {tokens} tokens {name}" for tokens, name in found.items())
