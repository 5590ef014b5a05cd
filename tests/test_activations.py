"""W8A8, W4A8 and fp8: quantized tokens, exact integer products, and what the two make together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import DTYPES, dtype_id, error, random_tokens, random_weight, weight64
from models import run_python

import qlinear  # noqa: F401 - registers torch.ops.qlinear
from qlinear.format import DENSE, ROUNDED
from qlinear.kernels import activations
from qlinear.kernels.activations import quantize_activations, quantized_linear_tensors, rms_norm_quantize
from qlinear.kernels.configs import Config
from qlinear.kernels.matmul import matmul

pytestmark = pytest.mark.usefixtures("poisoned_empty")

W8A8 = DENSE["w8a8"]
INTEGER = [fmt for fmt in DENSE.values() if fmt.integer_activations]
every_integer_format = pytest.mark.parametrize("fmt", INTEGER, ids=str)
every_format = pytest.mark.parametrize("fmt", [*INTEGER, DENSE["fp8"]], ids=str)
every_number = pytest.mark.parametrize("number", ROUNDED)
TILE = Config(block_m=16, block_n=64, num_warps=4, num_stages=2)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


@every_dtype
@pytest.mark.parametrize(("m", "k"), [(1, 128), (5, 200), (3, 1)])
def test_tokens_are_rounded_to_the_nearest_of_127_levels(m, k, dtype, device):
    x = random_tokens(m, k, dtype, device)
    q, scale = quantize_activations(x)
    largest = x.float().abs().amax(1, keepdim=True)
    assert q.dtype == torch.int8
    assert torch.equal(scale, (largest / 127).squeeze(1))
    assert torch.equal(q, (x.float() * (127 / largest)).round().to(torch.int8))


@every_dtype
@pytest.mark.parametrize(("m", "k"), [(1, 128), (5, 200), (3, 1)])
def test_tokens_are_rounded_to_the_nearest_e4m3(m, k, dtype, device):
    # Magnitudes from 1 down to 1e-5: below 2**-6 of 448 the grid of e4m3 is even.
    x = random_tokens(m, k, dtype, device) * torch.logspace(0, -5, k, device=device).to(dtype)
    q, scale = quantize_activations(x, "e4m3")
    largest = x.float().abs().amax(1, keepdim=True)
    assert q.dtype == torch.float8_e4m3fn
    assert torch.equal(scale, (largest / 448).squeeze(1))
    assert torch.equal(q.float(), (x.float() * (448 / largest)).to(torch.float8_e4m3fn).float())


def test_ties_of_e4m3_round_to_even(device):
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    x = torch.cat((grid, (grid[1:] + grid[:-1]) / 2))
    x = torch.cat((x, -x))[None].to(device)
    assert torch.equal(quantize_activations(x, "e4m3")[0].float(), x.to(torch.float8_e4m3fn).float())


@every_number
def test_rows_longer_than_a_block(number, device, monkeypatch):
    x = random_tokens(3, 300, torch.float16, device)
    whole = quantize_activations(x, number)
    monkeypatch.setattr(activations, "_MAX_BLOCK", 128)
    parts = quantize_activations(x, number)
    assert torch.equal(whole[0].float(), parts[0].float())
    assert torch.equal(whole[1], parts[1])


@every_number
@every_dtype
@pytest.mark.parametrize("block", [None, 128], ids=["one-block", "blocks"])
def test_rms_norm_joins_the_scale(block, dtype, number, device, monkeypatch):
    if block:
        monkeypatch.setattr(activations, "_MAX_BLOCK", block)
    x, gain = random_tokens(5, 300, dtype, device), random_tokens(1, 300, dtype, device)[0]
    x[3] = 0
    q, scale = rms_norm_quantize(x, gain, 1e-5, number)
    values, largest = quantize_activations(x.float() * gain.float(), number)
    assert q.dtype == ROUNDED[number].dtype and torch.equal(q.float(), values.float())
    rms = (x.double().square().mean(1) + 1e-5).sqrt()
    assert error(scale, largest.double() / rms) <= 1e-6
    on_cpu = torch.ops.qlinear.rms_norm_quantize(x.cpu(), gain.cpu(), 1e-5, number)
    assert torch.equal(on_cpu[0].float(), q.cpu().float()) and error(on_cpu[1].view(-1), scale.double().cpu()) <= 1e-6


def test_ties_round_to_even(device):
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127.0]], device=device)
    assert quantize_activations(x)[0].tolist() == [[127, 0, 2, 2, 0, -2, -2, -127]]


@pytest.mark.parametrize(
    "view", [lambda x: x.t().contiguous().t(), lambda x: x[::2]], ids=["transposed", "every-other-row"]
)
def test_strides_of_x(view, device):
    x = view(random_tokens(4, 200, torch.float16, device))
    assert torch.equal(quantize_activations(x)[0], quantize_activations(x.contiguous())[0])


@every_integer_format
@pytest.mark.parametrize("config", [TILE, replace(TILE, split_k=3), None], ids=["whole", "split", "chosen"])
@pytest.mark.parametrize(("m", "k"), [(1, 576), (16, 384), (33, 328)])
def test_integer_products_are_exact(fmt, m, k, config, device):
    """float32 in, so that only the two scales are rounded: the int32 sums come back to the last unit."""
    packed = random_weight(fmt, 70, k, torch.float32, device)
    packed = replace(packed, scale=torch.ones_like(packed.scale))
    x = torch.randint(-127, 128, (m, k), generator=torch.Generator().manual_seed(3)).float()
    x[:, 0] = 127
    y = matmul(x.to(device), packed, config=config)
    assert torch.equal(y.double().cpu(), x.double() @ weight64(packed).t().cpu())


@every_format
@every_dtype
def test_against_float64_on_the_quantized_tokens(fmt, dtype, device):
    packed = random_weight(fmt, 70, 200, torch.float16, device)
    x = random_tokens(5, 200, dtype, device)
    bias = torch.linspace(-3, 3, 70, device=device).to(dtype)
    q, scale = quantize_activations(x, fmt.number)
    reference = (q.double() @ weight64(packed).t()) * scale.double()[:, None] + bias.double()
    assert error(matmul(x, packed, bias), reference) <= fmt.max_error(dtype)


def test_split_k_is_deterministic(device):
    packed = random_weight(W8A8, 70, 576, torch.float16, device)
    x = random_tokens(5, 576, torch.float16, device)
    assert torch.equal(matmul(x, packed, config=replace(TILE, split_k=5)), matmul(x, packed, config=TILE))


@every_format
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@every_dtype
def test_zero_and_non_finite_tokens_touch_no_other(fmt, dtype, device):
    packed = random_weight(fmt, 70, 200, torch.float16, device)
    x = random_tokens(5, 200, dtype, device)
    clean = matmul(x, packed)
    x[1], x[2, 7], x[3, 9] = 0, float("nan"), -float("inf")
    y = matmul(x, packed)
    assert torch.equal(y[[0, 4]], clean[[0, 4]])
    assert not y[1].any()
    assert not torch.isfinite(y[2:4]).any()


def test_no_tokens(device):
    packed = random_weight(W8A8, 70, 200, torch.float16, device)
    assert matmul(torch.zeros(0, 200, device=device), packed).shape == (0, 70)


def test_too_many_in_features_for_int32(device):
    k = activations.MAX_IN_FEATURES + 128
    weight = torch.zeros(1, k // 128, 64, 128, dtype=torch.int8, device=device)
    scale = torch.ones(1, 1, 64, device=device)
    with pytest.raises(ValueError, match=f"in_features is {k}"):
        quantized_linear_tensors(torch.zeros(1, k, device=device), weight, scale, W8A8, 64)


def test_a_gpu_rounds_the_quotient_before_it_rounds_to_an_integer() -> None:
    """In one multiply-add it would not, and tokens next to a tie would differ from every other implementation's."""
    code = """
    import re, torch
    from qlinear.kernels.compile import compile_quantize
    for norm in (False, True):
        ptx = compile_quantize(torch.bfloat16, 576, (9, 0), norm=norm).asm["ptx"]
        added = re.findall(r"(add|fma)[.\\w]*\\s[^;]*0f4B400000;", ptx)
        assert added and set(added) == {"add"}, added
    print("done")
    """
    assert run_python(code, TRITON_INTERPRET="0").strip() == "done"
