"""w8a8 weights in an order that a library keeps to itself: the layouts ``fbgemm`` and ``onednn`` of a CPU.

``aten::_int_mm`` puts a plain int8 weight into such an order in every call. Both libraries multiply uint8 tokens (the
value + 128) by int8 weights through VNNI, in exact int32 sums, and scale what comes out. FBGEMM is the faster one for
few tokens, oneDNN for many, where the CPU has AMX far more so: it is the choice there.

What they make has no storage to read or share. In a :class:`~qlinear.packing.PackedWeight` an int64 tensor ``[1]``
stands in its place and owns it; the number in it finds it again where PyTorch hands on another tensor that shares its
storage, as compiled code does.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from qlinear.format import Format

#: The operator that multiplies, by layout.
OPERATORS = {
    "fbgemm": "quantized::linear_with_input_q_dq_qweight_dq_output_fp32",
    "onednn": "onednn::qlinear_pointwise",
}
#: Whether oneDNN multiplies int8 by VNNI. On other x86 machines its sums of two products saturate in int16.
VNNI = torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()
#: Whether oneDNN multiplies int8 by AMX, which FBGEMM does not use.
AMX = VNNI and torch.cpu._is_amx_tile_supported()
#: Most columns whose products of uint8 and int8 values (255 * 127) surely fit a sum in int32.
_COLUMNS = 1 << 16
#: Fewest weights whose order saves more than the operator takes to start. On an AMD EPYC, us in the layout and in the
#: one of `cpu`, for 1 and 16 tokens: fbgemm 576 x 576 71 and 61, 119 and 138 (compiled 40 and 24, 92 and 81), 1024 x
#: 768 98 and 110, 142 and 178 (compiled 61 and 67, 103 and 113); onednn 1536 x 576 275 and 209, 289 and 287; 2048 x
#: 2048 423 and 425, 701 and 1155.
_FEWEST = {"fbgemm": 1 << 19, "onednn": 1 << 22}
#: The zero point of the weight, which has none.
_NO_ZERO = torch.zeros(1, dtype=torch.int32)

_numbers = itertools.count(1)
_made: WeakValueDictionary[int, Any] = WeakValueDictionary()


def supports(layout: str, fmt: Format, k: int) -> bool:
    """Whether this machine has the layout for weights of a format with ``k`` columns."""
    if layout not in OPERATORS or fmt.bits != 8 or not fmt.integer_activations or k > _COLUMNS:
        return False
    return VNNI if layout == "onednn" else _fbgemm_is_exact()


def native(fmt: Format, n: int, k: int) -> str | None:
    """The layout here that makes a product with a weight ``[n, k]`` fastest; None where neither does."""
    for layout in ("onednn",) if AMX else ("fbgemm", "onednn"):
        if supports(layout, fmt, k):
            return layout if n * k >= _FEWEST[layout] else None
    return None


def is_made(weight: Tensor) -> bool:
    """Whether the tensor stands for a weight in one of these layouts; also told while a graph is traced."""
    return weight.dtype == torch.int64


def make(layout: str, values: Tensor, scale: Tensor) -> Tensor:
    """What stands for int8 values ``[N, K]`` in a layout; the scales ``[N, 1]`` are in it where that is ``fbgemm``."""
    made = torch.ops.onednn.qlinear_prepack(values, None) if layout == "onednn" else _fbgemm_pack(values, scale)
    number = next(_numbers)
    _made[number] = made
    weight = torch.tensor([number])
    # The tensor's own, so that it lives as long.
    weight.__dict__["made"] = made
    return weight


def _find(weight: Tensor) -> Any:
    try:
        return _made[int(weight)]
    except KeyError:
        raise RuntimeError("a w8a8 weight that this process has not packed, or no longer holds") from None


def layout_of(weight: Tensor) -> str:
    return "fbgemm" if isinstance(_find(weight), torch.ScriptObject) else "onednn"


def values_of(weight: Tensor) -> Tensor:
    """The int8 values ``[N, K]``."""
    made = _find(weight)
    if layout_of(weight) == "fbgemm":
        with _quiet():
            return made.unpack()[0].int_repr()  # type: ignore[no-any-return]  # PyTorch has no annotation
    # `contiguous` leaves the strides of a single row as they are.
    return made.to_dense().t().clone(memory_format=torch.contiguous_format)  # type: ignore[no-any-return]  # PyTorch has no annotation


def product(values: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """int8 values ``[M, K]`` (int8, or held in floats) by a weight and its scales: float32 ``[M, N]``.

    Compiled code sees one operator, and fuses what is done to the tokens and to the product.
    """
    if torch.compiler.is_compiling():
        return torch.ops.qlinear.prepacked_product(values, weight, scale)  # type: ignore[no-any-return]  # PyTorch has no annotation
    return _product(values, weight, scale)


def _product(values: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    made = _find(weight)
    # Operators are looked up here: not every build of PyTorch has both libraries.
    if isinstance(made, torch.ScriptObject):
        return _fbgemm_product(values, made)
    count = len(values)
    # Fast with uint8 of which 128 is taken away: int8 takes 190 ms for a token by 4096 x 4096.
    unsigned = values.to(torch.int8, memory_format=torch.contiguous_format).view(torch.uint8) ^ 128
    # Kernels for few rows are slower than that for four (4096 x 4096 on an AMD EPYC: one 837 us, two 876, four 671).
    if count < 4:
        unsigned = unsigned.expand(4, -1) if count == 1 else F.pad(unsigned, (0, 0, 0, 4 - count))
    multiply = torch.ops.onednn.qlinear_pointwise.default
    scale = scale.view(-1).float()
    y: Tensor = multiply(unsigned, 1.0, 128, made, scale, _NO_ZERO, None, 1.0, 0, torch.float32, "none", [], "")
    return y[:count] if count < 4 else y


def _product_fake(values: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return scale.new_empty(len(values), len(scale), dtype=torch.float32)


_library = torch.library.Library("qlinear", "FRAGMENT")
_library.define("prepacked_product(Tensor values, Tensor weight, Tensor scale) -> Tensor")
_library.impl("prepacked_product", _product, "CPU")
torch.library.register_fake("qlinear::prepacked_product", _product_fake, lib=_library)


def _fbgemm_product(values: Tensor, made: torch.ScriptObject) -> Tensor:
    multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
    y: Tensor = multiply(values.float(), 1.0, 128, made)
    return y


def _fbgemm_pack(values: Tensor, scale: Tensor) -> torch.ScriptObject:
    zeros, engines = torch.zeros(len(values), dtype=torch.int64), torch.backends.quantized
    chosen = engines.engine
    try:
        # The one of these that packs for FBGEMM; a user's choice is put back.
        engines.engine = "fbgemm"
        with _quiet():
            weight = torch._make_per_channel_quantized_tensor(values, scale.view(-1).double(), zeros, 0)
            made: torch.ScriptObject = torch.ops.quantized.linear_prepack(weight, None)
        return made
    finally:
        engines.engine = chosen


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that PyTorch will do without quantized tensors one day (oneDNN's layout is for that day)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*quantized tensor.*", UserWarning)
        yield


@functools.cache
def _fbgemm_is_exact() -> bool:
    """Whether FBGEMM is there, and multiplies the largest values without saturating, as it does with VNNI."""
    largest = torch.full((16, 256), 127, dtype=torch.int8)
    try:
        y = _fbgemm_product(largest[:1], _fbgemm_pack(largest, torch.ones(16)))
    except (AttributeError, RuntimeError):
        return False
    return bool((y == 256 * 127 * 127).all())
