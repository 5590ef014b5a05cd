"""2:4 weights in the matmul loop: the layouts back and forth, the expansion and its inline PTX, products in float64."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from helpers import DTYPES, dtype_id, error, random_tokens, random_weight, to_device, weight64
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx import interpret_inline_ptx
from torch import Tensor

from qlinear.format import FORMATS, Format
from qlinear.kernels.configs import Config
from qlinear.kernels.dequantize import dequantize, linear_tensors
from qlinear.kernels.matmul import matmul
from qlinear.kernels.sparse24 import expand24
from qlinear.packing import PackedWeight, pack

FORMATS_24 = [fmt for fmt in FORMATS.values() if fmt.sparsity == "2:4"]
every_format = pytest.mark.parametrize("fmt", FORMATS_24, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
LAYOUTS = ("triton", "mma.sp")


@every_format
@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 140), k=st.integers(1, 300), seed=st.integers(0, 99))
def test_layouts_are_exact_both_ways(fmt: Format, layout: str, n: int, k: int, seed: int) -> None:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).half()
    plain = pack(weight, fmt.name, layout="plain", prune="magnitude")
    there = plain.to_layout(layout)
    assert there.layout == layout
    for wanted, got in zip(plain.tensors, there.to_layout("plain").tensors, strict=True):
        assert (wanted is None) == (got is None)
        assert wanted is None or (wanted.dtype == got.dtype and torch.equal(wanted, got))


@every_format
def test_layouts_hold_few_bits(fmt: Format) -> None:
    """Half the codes and a bit for every weight, and scales: 3.125 for int4, 3.25 with zero points."""
    packed = pack(torch.randn(256, 512).half(), fmt.name, layout="plain", prune="magnitude")
    wanted = {"w4a16-2:4": 3.125, "w4a16-asym-2:4": 3.25, "w8a16-2:4": 5 + 16 / 512, "w16a16-2:4": 9}[fmt.name]
    for layout in LAYOUTS:
        assert packed.to_layout(layout).nbytes * 8 / (256 * 512) == wanted


def test_only_24_has_the_layout_of_sparse_cores() -> None:
    with pytest.raises(ValueError, match=r"'mma\.sp' is for 2:4 weights, got w4a16"):
        pack(torch.randn(8, 8), "w4a16", layout="mma.sp")


@triton.jit
def _expand_kernel(
    w_ptr, i_ptr, z_ptr, y_ptr, ROWS: tl.constexpr, PLANES: tl.constexpr, OFFSET: tl.constexpr, PTX: tl.constexpr
):
    words: tl.constexpr = 32 // PLANES
    row = tl.arange(0, ROWS)[:, None]
    w = tl.load(w_ptr + row * words + tl.arange(0, words)[None, :])
    index = tl.load(i_ptr + row * 4 + tl.arange(0, 4)[None, :])
    zero = tl.load(z_ptr + row).to(tl.float32) if OFFSET is None else OFFSET
    dense = expand24(w, index, zero, PLANES, PTX)
    tl.store(y_ptr + row * (4 * words) + tl.arange(0, 4 * words)[None, :], dense)


def _expanded(packed: PackedWeight, ptx: bool, device: torch.device) -> Tensor:
    """The dense codes ``[64, 128]`` of a weight of that size."""
    fmt, index = packed.format, packed.index
    assert index is not None
    zero = torch.zeros(64, dtype=torch.int32) if fmt.symmetric else packed.scale[..., 1].flatten().int()
    y = torch.empty(64, 128 // fmt.planes, dtype=torch.int16, device=device)
    offset = fmt.offset if fmt.symmetric else None
    _expand_kernel[(1,)](packed.weight, index, zero.to(device), y, 64, fmt.planes, offset, ptx)
    shifts = torch.arange(0, 16, fmt.bits)[:, None]
    return ((y.cpu().int()[:, None] >> shifts) & ((1 << fmt.bits) - 1)).flatten(1)


@every_format
@pytest.mark.parametrize("ptx", [False, True], ids=["plain", "ptx"])
def test_expansion_is_the_dense_code(
    fmt: Format, ptx: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly: both twins, the inline PTX by tests/ptx.py where there is no GPU."""
    if ptx and device.type == "cpu":
        interpret_inline_ptx(monkeypatch)
    packed = random_weight(fmt, 64, 128, torch.float16, device)
    codes = packed.to_layout("plain").codes().codes.cpu()
    wanted = (codes.view(torch.int16) if fmt.bits == 16 else codes).int() & ((1 << fmt.bits) - 1)
    assert torch.equal(_expanded(packed, ptx and torch.version.hip is None, device), wanted)


@every_format
@every_dtype
@pytest.mark.parametrize(("m", "n", "k"), [(3, 70, 200), (17, 130, 70)], ids=str)
def test_product_is_that_of_float64(
    fmt: Format, dtype: torch.dtype, m: int, n: int, k: int, device: torch.device, poisoned_empty: None
) -> None:
    packed, x = random_weight(fmt, n, k, dtype, device), random_tokens(m, k, dtype, device)
    bias = torch.linspace(-1, 1, n, device=device).to(dtype)
    y = matmul(x, packed, bias)
    assert error(y, x.double() @ weight64(packed).t() + bias.double()) <= fmt.max_error(dtype)


@every_format
def test_split_along_k(fmt: Format, device: torch.device) -> None:
    packed, x = random_weight(fmt, 70, 576, torch.float16, device), random_tokens(3, 576, torch.float16, device)
    y = matmul(x, packed, config=Config(16, 64, 4, 2, 3))
    assert error(y, x.double() @ weight64(packed).t()) <= fmt.max_error(torch.float16)


@every_format
@every_dtype
def test_dequantize_has_the_bits_of_the_reference(fmt: Format, dtype: torch.dtype, device: torch.device) -> None:
    packed = random_weight(fmt, 70, 200, torch.float16, device)
    assert torch.equal(dequantize(packed, dtype), packed.dequantize(dtype))


@every_format
def test_many_tokens_some_rows_at_a_time(fmt: Format, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlinear.kernels import dequantize as module

    monkeypatch.setattr(module, "dense_rows", lambda *_: 128)
    packed, x = random_weight(fmt, 200, 136, torch.float16, device), random_tokens(9, 136, torch.float16, device)
    y = linear_tensors(x, packed.weight, packed.scale, fmt, 200, index=packed.index)
    assert error(y, x.double() @ weight64(packed).t()) <= fmt.max_error(torch.float16)


def test_floats_of_the_other_kind_are_rounded(device: torch.device) -> None:
    packed = random_weight(FORMATS["w16a16-2:4"], 70, 200, torch.bfloat16, device)
    x = random_tokens(3, 200, torch.float16, device)
    assert error(matmul(x, packed), x.double() @ weight64(packed).t()) <= 1e-3


def test_a_wrong_index_is_refused(device: torch.device) -> None:
    packed = random_weight(FORMATS["w4a16-2:4"], 70, 200, torch.float16, device)
    x = random_tokens(3, 200, torch.float16, device)
    assert packed.index is not None
    short = PackedWeight(packed.weight, packed.scale, None, packed.format, 70, 200, packed.index[:1])
    with pytest.raises(
        ValueError, match=r"the index of w4a16-2:4 \[70, 200\].* is contiguous torch.int32 \(2, 2, 64, 4\)"
    ):
        matmul(x, short)
    assert to_device(packed, device).layout == "triton"
