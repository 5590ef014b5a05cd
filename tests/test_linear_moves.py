"""QLinear: conversions of dtype and device, autocast, compute_dtype, threads."""

import copy

import pytest
import torch
from layers import (
    SCHEMES,
    K,
    N,
    assert_same_weight,
    float_layer,
    layer,
    native,
    plain_bits,
)
from models import bits, relative_error, same_bits
from torch import nn

from qlinear import QLinear, reference

CASTS = {
    "half": lambda m: m.half(),
    "float": lambda m: m.float(),
    "to(cpu, float32)": lambda m: m.to("cpu", torch.float32),
    "to(tensor)": lambda m: m.to(torch.zeros(1, dtype=torch.float16)),
    "half and back": lambda m: m.half().bfloat16(),
}


@pytest.mark.parametrize("prepared", [True, False], ids=["prepared", "plain"])
@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_to_dtype_never_changes_codes_or_scales(scheme, cast, prepared):
    for dtype in (torch.bfloat16, torch.float32):
        q = layer(scheme, dtype=dtype)
        if not prepared:
            q.unprepare()
        before, layout, buffers = plain_bits(q), q.layout, [(b.dtype, bits(b)) for b in q.buffers()]
        model = CASTS[cast](nn.Sequential(q))
        assert model[0] is q and q.layout == layout
        assert all(torch.equal(a, b) for a, b in zip(plain_bits(q), before, strict=True))
        assert all(a.dtype == d and torch.equal(bits(a), b) for a, (d, b) in zip(q.buffers(), buffers, strict=True))


def test_to_dtype_changes_the_bias_and_the_result():
    q = layer("w8a16")
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        q.to(dtype)
        assert q.bias.dtype == dtype and q(torch.randn(2, K, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("prepared", [True, False], ids=["prepared", "plain"])
def test_type_is_refused_and_changes_nothing(prepared):
    q = layer("w4a16-asym")
    if not prepared:
        q.unprepare()
    before = plain_bits(q)
    with pytest.raises(ValueError, match=r"packed weights cannot become torch.float16; use .to\(dtype\)"):
        q.type(torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(plain_bits(q), before, strict=True))
    assert q.bias.dtype == torch.bfloat16 and q.weight_scale.dtype == torch.bfloat16


def test_to_meta_and_to_empty():
    q = layer("w4a16-g32-asym")
    state = q.state_dict()
    meta = copy.deepcopy(q).to("meta")
    assert meta.layout == "plain" and meta.prepare().layout == "plain"
    assert {n: t.shape for n, t in meta.state_dict().items()} == {n: t.shape for n, t in state.items()}
    assert meta(torch.empty(2, 3, K, device="meta", dtype=torch.bfloat16)).shape == (2, 3, N)
    meta.to_empty(device="cpu").load_state_dict(state)
    meta.prepare()
    assert_same_weight(meta, q)


def test_share_memory_keeps_the_layout_and_the_result():
    q = layer("w4a16")
    x = torch.randn(4, K).bfloat16()
    y = q(x)
    q.share_memory()
    assert all(t.is_shared() for t in (q.weight_packed, q.weight_scale, q.bias))
    assert q.layout == "cpu" and same_bits(q(x), y)


def test_requires_grad_is_about_the_bias_only():
    q = layer("w8a16").requires_grad_(False)
    assert not q.bias.requires_grad and not q(torch.randn(2, K).bfloat16()).requires_grad
    q.zero_grad()
    assert q.train().training and not q.eval().training


# --- autocast and compute_dtype


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g64", "w8a8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype(scheme, dtype):
    linear = float_layer(dtype=torch.float32)
    q = QLinear.from_float(linear, scheme, prune="magnitude")
    x = torch.randn(4, K)
    with torch.autocast("cpu", dtype):
        y, expected = q(x), linear(x)
    assert y.dtype == expected.dtype == dtype
    assert same_bits(y, q(x.to(dtype)))
    with torch.autocast("cpu", enabled=False):
        assert q(x).dtype == torch.float32


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compute_dtype_is_inside_only(scheme):
    linear = float_layer(dtype=torch.float32)
    q = QLinear.from_float(linear, scheme, compute_dtype=torch.bfloat16, prune="magnitude")
    assert q.layout == native(scheme) and q.weight_scale.dtype == torch.bfloat16
    assert q.dequantize().dtype == torch.float32
    x = torch.randn(4, K)
    y = q(x)
    assert y.dtype == torch.float32 and q.bias.dtype == torch.float32
    assert relative_error(y, reference.matmul(x.bfloat16(), q.packed, linear.bias)) <= 6e-3
    fresh = QLinear(K, N, scheme, device="meta", dtype=torch.float32, compute_dtype=torch.bfloat16)
    fresh.load_state_dict(q.state_dict(), assign=True)
    assert same_bits(fresh.prepare()(x), y)
    assert copy.deepcopy(q).compute_dtype == torch.bfloat16


def test_compute_dtype_passes_gradients():
    q = QLinear.from_float(float_layer(dtype=torch.float32), "w8a16", compute_dtype=torch.bfloat16)
    x = torch.randn(4, K, requires_grad=True)
    q(x).sum().backward()
    expected = torch.ones(4, N).double() @ q.dequantize(torch.float64)
    assert x.grad.dtype == torch.float32 and relative_error(x.grad, expected) < 6e-3


def test_threads_share_one_layer():
    from concurrent.futures import ThreadPoolExecutor

    q = layer("w4a16-g32")
    inputs = [torch.randn(3, K).bfloat16() for _ in range(16)]
    alone = [q(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(q, inputs))
    assert all(same_bits(a, b) for a, b in zip(alone, together, strict=True))
