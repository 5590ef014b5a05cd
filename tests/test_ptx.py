"""The inline PTX that ships, run by tests/ptx.py over every 16-bit word, against the codes and the plain twin."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import ROOT
from ptx import InlinePtx, evaluate, inline_ptx, interpret_inline_ptx, packed_ptx, treats_elements_alike

from bench.gpu_ptx import decode
from qlinear.kernels.decode import DECODERS
from qlinear.layout import unpack_planes

ALL_PTX = [(name, ptx) for name, decoder in DECODERS.items() for ptx in inline_ptx(decoder.function)]
CASES = [(name, ptx) for name, ptx in ALL_PTX if name in ("planar4", "planar8")]
E4M3 = [(name, ptx) for name, ptx in ALL_PTX if name.endswith("e4m3")]
#: All that takes several elements at a time, in whichever kernel.
PACKED = {place: ptx for path in sorted((ROOT / "kernels").glob("*.py")) for place, ptx in packed_ptx(path).items()}

WORDS = torch.arange(65536, dtype=torch.int32).to(torch.int16)


def registers(words: torch.Tensor) -> np.ndarray:
    """Pairs of 16-bit words as the compiler packs them: the first in the lower half."""
    return words.numpy().view(np.uint16).copy().view(np.uint32)


def numbers(register: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.from_numpy(register.copy().view(np.int16)).view(getattr(torch, dtype)).float()


@pytest.mark.parametrize("reverse", [False, True], ids=["low", "high"])
@pytest.mark.parametrize(("packing", "ptx"), CASES, ids=[f"{name}-{ptx.dtype}" for name, ptx in CASES])
def test_inline_ptx_holds_the_code(packing, ptx, reverse):
    """Every output, less what the decoder subtracts afterwards, is the code: in both halves of a register."""
    words = WORDS.flip(0) if reverse else WORDS
    outputs = [numbers(r, ptx.dtype) for r in evaluate(ptx.text, ptx.constraints, registers(words))]
    codes = unpack_planes(words.unsqueeze(-1), 16 // DECODERS[packing].planes).squeeze(-1).t().float()
    if (packing, ptx.dtype) == ("planar4", "float16"):
        planes = [outputs[0] - 1024, outputs[1] / 16 - 64, outputs[2] - 1024, outputs[3] / 16 - 64]
    elif (packing, ptx.dtype) == ("planar4", "bfloat16"):
        planes = [output - 128 for output in outputs]
    elif (packing, ptx.dtype) == ("planar8", "float16"):
        planes = [output - 1024 for output in outputs]
    else:
        # Two terms of bfloat16 whose sum is the code less 128, exact as a bfloat16 too.
        sums = [outputs[0] + outputs[1], outputs[2] + outputs[3]]
        assert all(torch.equal(s, s.bfloat16().float()) for s in sums)
        planes = [s + 128 for s in sums]
    assert torch.equal(torch.stack(planes), codes)


def test_every_packing_with_ptx_has_both_dtypes():
    assert {(name, ptx.dtype) for name, ptx in ALL_PTX} == {
        (packing, dtype) for packing in ("planar4", "planar8", "planar_e4m3") for dtype in ("float16", "bfloat16")
    } | {("nibbles8", "int8"), ("rows_e4m3", "float16")}


@pytest.mark.parametrize(("place", "ptx"), PACKED.items(), ids=list(PACKED))
def test_inline_ptx_treats_elements_that_share_a_register_alike(place, ptx):
    """Which elements share one is the choice of the compiler's layout: neighbours along K, or two rows."""
    assert treats_elements_alike(ptx)


def test_what_treats_elements_unlike_is_seen():
    upper = InlinePtx("int16", "prmt.b32 $0, $1, 0, 0x3232;", "=r,r", 2, 1, (16,))
    assert not treats_elements_alike(upper)
    # The same for both halves, but each has the other's.
    assert not treats_elements_alike(upper._replace(text="prmt.b32 $0, $1, 0, 0x1032;"))
    assert treats_elements_alike(upper._replace(text="prmt.b32 $0, $1, 0, 0x3210;"))
    # The lower half of an element of 32 bits, and the upper half of the next one.
    wide = InlinePtx("int16", "prmt.b32 $0, $1, $2, 0x7610;", "=r,r,r", 2, 1, (16,))
    assert not treats_elements_alike(wide)
    assert treats_elements_alike(wide._replace(text="prmt.b32 $0, $1, $2, 0x5410;"))
    # The bits of one byte come into the next.
    assert not treats_elements_alike(InlinePtx("int8", "shr.u32 $0, $1, 4;", "=r,r", 4, 1, (8,)))


def test_inline_ptx_of_every_kernel_is_found():
    """The files are read whole, so that what is new in them is tested: the decoders' is all there."""
    assert {ptx for _, ptx in ALL_PTX} <= set(PACKED.values())


def test_inline_ptx_of_signed_nibbles():
    """Every byte in each place of a register: 16 times the value of its lower, then of its upper nibble."""
    (ptx,) = inline_ptx(DECODERS["nibbles8"].function)
    around = (0x5A, 0xC3, 0x0F)
    words = np.array([np.roll([byte, *around], place) for byte in range(256) for place in range(4)], np.uint8)
    low, high = (r.view(np.int8) for r in evaluate(ptx.text, ptx.constraints, words.view(np.uint32).reshape(-1)))
    signed = words.reshape(-1).view(np.int8)
    np.testing.assert_array_equal(low / 16, (signed << 4) >> 4)
    np.testing.assert_array_equal(high / 16, signed >> 4)


def e4m3_numbers(words: torch.Tensor) -> torch.Tensor:
    """What the bytes of 16-bit words are, ``[2, W]``: lower bytes, then upper ones; 480 in the place of NaN."""
    value = words.view(torch.float8_e4m3fn).float()
    return value.where(~value.isnan(), torch.where(words.view(torch.int8) < 0, -480.0, 480.0)).view(-1, 2).t()


@pytest.mark.parametrize("reverse", [False, True], ids=["low", "high"])
@pytest.mark.parametrize(("packing", "ptx"), E4M3, ids=[f"{name}-{ptx.dtype}" for name, ptx in E4M3])
def test_inline_ptx_of_e4m3(packing, ptx, reverse):
    """Every word in both halves of a register: the numbers of its bytes times what the decoder counts in, signs too."""
    words = WORDS.flip(0) if reverse else WORDS
    made = torch.stack([numbers(r, ptx.dtype) for r in evaluate(ptx.text, ptx.constraints, registers(words))])
    if packing == "rows_e4m3":
        # The first register has the bytes of the first word of each pair, the second those of the other.
        made = made.view(2, -1, 2).transpose(0, 1).reshape(-1, 2).t()
    made = made * DECODERS[packing].units.get(getattr(torch, ptx.dtype), 1.0)
    assert torch.equal(made, e4m3_numbers(words))
    assert torch.equal(torch.signbit(made), torch.signbit(e4m3_numbers(words)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_plain_twin_decodes_every_e4m3_word(dtype, device):
    made = _decode("planar_e4m3", device, dtype, 0, ptx=False).float()
    assert torch.equal(made * DECODERS["planar_e4m3"].units.get(dtype, 1.0), e4m3_numbers(WORDS))


def _decode(packing: str, device: torch.device, dtype: torch.dtype, offset: int, ptx: bool) -> torch.Tensor:
    return decode(packing, WORDS.to(device), dtype, offset, ptx).cpu()


@pytest.mark.parametrize(("packing", "offset"), [("planar4", 8), ("planar4", 0), ("planar4", 15), ("planar8", 128)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_plain_twin_decodes_every_word(packing, offset, dtype, device):
    codes = unpack_planes(WORDS.unsqueeze(-1), 16 // DECODERS[packing].planes).squeeze(-1).t()
    assert torch.equal(_decode(packing, device, dtype, offset, ptx=False), codes.to(dtype) - offset)


@pytest.mark.parametrize(
    ("packing", "offset"), [*((("planar4", zero)) for zero in (8, 0, 15)), ("planar8", 128), ("planar_e4m3", 0)]
)
def test_ptx_decoder_equals_its_twin(packing, offset, device, monkeypatch):
    """The whole decoder in fp16: inline PTX is evaluated by tests/ptx.py, or by the GPU where there is one."""
    if device.type == "cpu":
        interpret_inline_ptx(monkeypatch)
    twin = _decode(packing, device, torch.float16, offset, ptx=False)
    assert torch.equal(_decode(packing, device, torch.float16, offset, ptx=torch.version.hip is None), twin)


@pytest.mark.gpu
@pytest.mark.parametrize(("packing", "offset"), [("planar4", 8), ("planar4", 0), ("planar8", 128), ("planar_e4m3", 0)])
def test_ptx_decoder_equals_its_twin_in_bf16(packing, offset, device):
    twin = _decode(packing, device, torch.bfloat16, offset, ptx=False)
    assert torch.equal(_decode(packing, device, torch.bfloat16, offset, ptx=torch.version.hip is None), twin)
