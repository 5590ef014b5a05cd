"""The kernel on sparse tensor cores: inline PTX by tests/ptx.py and tests/sparse_mma.py, or on hardware.

Without a GPU the kernel itself runs in Triton's interpreter, element by element what every thread of it does: loads,
decoding, products, sums over warps, split-K. What ``mma.sp`` does with the registers is the PTX ISA's word for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import sparse_mma
import torch
import triton
import triton.language as tl
from helpers import dtype_id, error, random_tokens, random_weight, to_device, weight64
from ptx import evaluate, interpret_inline_ptx
from torch import Tensor

from qlinear import ops, paths
from qlinear.format import FORMATS, Format
from qlinear.kernels import mma_sp
from qlinear.kernels.configs import Config
from qlinear.kernels.fragments import mma_sp as mma_sp_triton
from qlinear.kernels.fragments import mma_text
from qlinear.kernels.runtime import Target
from qlinear.packing import PackedWeight, pack

FORMATS_24 = [fmt for fmt in FORMATS.values() if fmt.sparsity == "2:4"]
every_format = pytest.mark.parametrize("fmt", FORMATS_24, ids=str)
every_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
#: Both tiles, warps beside each other along K and along the rows; K in parts.
CONFIGS = (Config(8, 128, 2, 1), Config(16, 256, 4, 1, 2))


@pytest.fixture(autouse=True)
def instructions(device: torch.device) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if device.type == "cpu":
            interpret_inline_ptx(patch, sparse_mma.run)
        yield


def product(x: Tensor, packed: PackedWeight, bias: Tensor | None = None, config: Config | None = None) -> Tensor:
    p = packed.to_layout("mma.sp")
    return mma_sp.fragment_linear_tensors(
        x, p.weight, p.scale, p.zero_point, p.index, p.format, p.out_features, bias, config
    )


def test_a_part_of_k_without_a_step_is_refused(device: torch.device) -> None:
    packed = random_weight(FORMATS["w8a16-2:4"], 150, 328, torch.float16, device)
    with pytest.raises(ValueError, match="16x256-w4-s1-k4 cannot be used: 3 steps along K cannot be cut into 4 parts"):
        product(random_tokens(3, 328, torch.float16, device), packed, config=replace(CONFIGS[1], split_k=4))


@every_format
@pytest.mark.parametrize(
    ("m", "config", "dtype"), [(3, CONFIGS[0], torch.float16), (13, CONFIGS[1], torch.bfloat16)], ids=str
)
def test_product_is_that_of_float64(
    fmt: Format, m: int, config: Config, dtype: torch.dtype, device: torch.device, poisoned_empty: None
) -> None:
    """Rows and columns that fill neither a tile nor a step of all warps."""
    packed, x = random_weight(fmt, 150, 328, dtype, device), random_tokens(m, 328, dtype, device)
    bias = torch.linspace(-1, 1, 150, device=device).to(dtype)
    y = product(x, packed, bias, config)
    assert y.dtype == dtype
    assert error(y, x.double() @ weight64(packed).t() + bias.double()) <= fmt.max_error(dtype)


def test_the_chosen_configuration_and_more_tokens_than_a_tile(device: torch.device) -> None:
    packed = random_weight(FORMATS["w4a16-asym-2:4"], 20, 640, torch.float16, device)
    x = random_tokens(17, 640, torch.float16, device)
    assert error(product(x, packed), x.double() @ weight64(packed).t()) <= 1e-3


def test_odd_columns_and_strides(device: torch.device) -> None:
    fmt = FORMATS["w4a16-2:4"]
    packed, x = random_weight(fmt, 20, 129, torch.float16, device), random_tokens(2, 130, torch.float16, device)
    for tokens in (x[:, :129], x[:, 1:], x.t().contiguous().t()[:, :129]):
        assert error(product(tokens, packed), tokens.double() @ weight64(packed).t()) <= 1e-3


def test_weights_that_are_not_finite_stay_in_their_row(device: torch.device) -> None:
    """Warps beyond the end of K take no weights: what they would multiply by zero may be infinite."""
    weight = torch.zeros(16, 40)
    weight[:, ::4] = 1
    packed = pack(weight.half(), "w16a16-2:4", layout="plain")
    packed.weight.view(torch.float16)[3, 18] = float("inf")
    packed = to_device(packed, device)
    y = product(torch.ones(1, 40, dtype=torch.float16, device=device), packed)
    assert torch.isinf(y[0, 3]) and torch.equal(y[0, :3].cpu(), torch.full((3,), 10.0).half())


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    packed = random_weight(FORMATS["w16a16-2:4"], 20, 64, torch.bfloat16, device)
    with pytest.raises(ValueError, match=r"mma.sp takes .*those of float weights in torch.bfloat16.*got torch.float16"):
        product(random_tokens(1, 64, torch.float16, device), packed)
    with pytest.raises(ValueError, match="the weight of w16a16-2:4"):
        product(random_tokens(1, 200, torch.bfloat16, device), packed)
    dense = random_weight(FORMATS["w4a16"], 20, 64, torch.float16, device)
    with pytest.raises(ValueError, match=r"mma\.sp multiplies 2:4 weights, got w4a16"):
        mma_sp.fragment_linear_tensors(
            random_tokens(1, 64, torch.float16, device), dense.weight, dense.scale, None, None, dense.format, 20
        )
    for capability, wanted in (
        ((7, 5), False),
        ((8, 0), True),
        ((9, 0), True),
        ((10, 0), False),
        ((12, 0), False),
        ("gfx942", False),
    ):
        assert mma_sp.supports(packed.format, torch.bfloat16, torch.bfloat16, Target(capability, 1)) == wanted


@every_format
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=dtype_id)
def test_the_operator_takes_the_layout(fmt: Format, dtype: torch.dtype, device: torch.device) -> None:
    """float32, which sparse tensor cores do not multiply, is dequantized."""
    p = random_weight(fmt, 40, 136, torch.float16, device).to_layout("mma.sp")
    x = random_tokens(3, 136, dtype, device)
    y = ops._linear_cuda(x, p, None, None)
    assert error(y, x.double() @ weight64(p).t()) <= fmt.max_error(dtype)


def test_nobody_gets_it_unasked() -> None:
    from qlinear import layout

    assert layout.native_layout(torch.device("cuda")) != "mma.sp"
    for layout_name, wanted in (("mma.sp", True), ("plain", False)):
        path, _ = paths.path(FORMATS["w4a16-2:4"], torch.float16, 1, torch.device("cuda"), layout_name, 256, 256)
        assert ("unverified" in path) == wanted


def test_split_fills_a_device_and_leaves_no_program_empty() -> None:
    fmt = FORMATS["w4a16-2:4"]
    for m in (1, 16):
        for n, k in ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (128, 128), (1 << 20, 256)):
            config = mma_sp.choose_fragment_config(m, n, k, fmt, 132)
            tiles = -(-n // config.block_n)
            assert config.split_k == 1 or 66 <= tiles * config.split_k <= 132
            steps = -(-k // 128 // (8 * 128 // config.block_n))
            assert (config.split_k - 1) * -(-steps // config.split_k) < max(1, steps)


@triton.jit
def _one_product_kernel(in_ptr, out_ptr, DT: tl.constexpr, SELECTOR: tl.constexpr):
    lane = tl.arange(0, 32)
    words = ()
    for i in tl.static_range(9):
        words += (tl.load(in_ptr + i * 32 + lane),)
    zero = tl.zeros((32,), tl.float32)
    a, b = (words[0], words[1], words[2], words[3]), (words[4], words[5], words[6], words[7])
    d = mma_sp_triton((zero, zero + 1, zero + 2, zero + 3), a, b, words[8], DT, SELECTOR)
    for i in tl.static_range(4):
        tl.store(out_ptr + i * 32 + lane, d[i])


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("selector", [0, 1])
def test_one_instruction_on_hardware(dtype: torch.dtype, selector: int, device: torch.device) -> None:
    """Registers with random numbers and metadata: the hardware does with them what the emulation does."""
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        pytest.skip("no sparse tensor cores")
    random = np.random.default_rng(selector)
    numbers = torch.from_numpy(random.integers(-8, 8, (8, 32, 2))).to(dtype)
    nibbles = random.choice([4, 8, 9, 12, 13, 14], (32, 8)).astype(np.uint32)
    metadata = (nibbles << (4 * np.arange(8, dtype=np.uint32))).sum(1, dtype=np.uint32)
    registers = [np.ascontiguousarray(r).view(np.uint32).reshape(1, 32) for r in numbers.view(torch.int16).numpy()]
    c = [np.full((1, 32), i, np.float32).view(np.uint32) for i in range(4)]
    wanted = sparse_mma.mma_sp([*c, *registers, metadata.reshape(1, 32)], selector, dtype == torch.bfloat16)
    words = np.concatenate([*registers, metadata.reshape(1, 32)]).view(np.int32)
    y = torch.empty(4, 32, device=device)
    kind = tl.bfloat16 if dtype == torch.bfloat16 else tl.float16
    _one_product_kernel[(1,)](torch.from_numpy(words).to(device), y, kind, selector, num_warps=1)
    assert torch.equal(y.cpu(), torch.from_numpy(np.concatenate(wanted)))


def test_the_emulation_multiplies_matrices() -> None:
    """A matrix with two of four kept, put into registers by the manual's words, comes out as its product."""
    random = np.random.default_rng(0)
    places = np.array([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])[random.integers(0, 6, (16, 8))]
    values, right = random.integers(-4, 5, (16, 8, 2)), random.integers(-4, 5, (32, 8))
    dense = np.zeros((16, 32))
    np.put_along_axis(dense.reshape(16, 8, 4), places, values, 2)
    lane = np.arange(32)
    group, thread = lane // 4, lane % 4

    def register(pairs: np.ndarray) -> np.ndarray:
        return torch.from_numpy(pairs).half().view(torch.int16).numpy().view(np.uint32).reshape(1, 32)

    a = [register(values[group + row, thread + four]) for four in (0, 4) for row in (0, 8)]
    columns = [2 * thread + 8 * i for i in range(4)]
    b = [register(np.stack((right[k, group], right[k + 1, group]), -1)) for k in columns]
    nibbles = places[..., 0] | places[..., 1] << 2
    for selector in (0, 1):
        metadata = np.zeros((1, 32), np.uint32)
        for row in range(16):
            for four in range(8):
                holder = row % 8 * 4 + selector * 2 + four // 4
                metadata[0, holder] |= np.uint32(nibbles[row, four] << (row // 8 * 16 + four % 4 * 4))
        c = [np.zeros((1, 32), np.uint32)] * 4
        d = sparse_mma.mma_sp([*c, *a, *b, metadata], selector, False)
        found = np.stack([x[0] for x in d], -1).reshape(8, 4, 2, 2).transpose(2, 0, 1, 3).reshape(16, 8)
        np.testing.assert_array_equal(found, dense @ right)


def test_the_text_is_the_instruction() -> None:
    for bf16 in (False, True):
        for selector in (0, 1):
            c = [np.zeros(64, np.uint32)] * 12 + [np.full(64, 0x44444444, np.uint32)]
            assert sparse_mma.run(mma_text.fn(bf16, selector), c) is not None
    assert sparse_mma.run("{ mov.b32 $0, $1; }", []) is None
    assert int(evaluate("{ mov.b32 $0, $1; }", "=r,r", np.array([7]))[0][0]) == 7
