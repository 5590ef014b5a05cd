"""The kernels of unstructured weights: a tile is expanded from its bits."""

import pytest
import torch
from helpers import DTYPES, dtype_id, error, random_tokens, to_device, weight64
from models import random_packed

from qlinear import ops, paths
from qlinear.format import FORMATS
from qlinear.kernels import bitmap, dequantize
from qlinear.kernels.bitmap import bitmap_linear_tensors, expand_tensors
from qlinear.kernels.runtime import Target
from qlinear.packing import pack

UNSTRUCTURED = [fmt for fmt in FORMATS.values() if fmt.sparsity == "unstructured"]
every = pytest.mark.parametrize("fmt", UNSTRUCTURED, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


def product(x, packed, bias=None):
    weight, scale, _, index = packed.tensors
    return bitmap_linear_tensors(x, weight, scale, index, packed.format, packed.out_features, bias)


@every
@every_dtype
@pytest.mark.parametrize(("m", "n", "k"), [(1, 64, 128), (3, 70, 200), (17, 1, 5), (40, 130, 999), (70, 200, 333)])
def test_product(fmt, dtype, m, n, k, device):
    packed = to_device(random_packed(fmt, n, k, dtype), device)
    x, bias = random_tokens(m, k, dtype, device), torch.linspace(-1, 1, n, device=device)
    wanted = x.double() @ weight64(packed).t() + bias.double()
    assert error(product(x, packed, bias), wanted) <= fmt.max_error(dtype)


@every
def test_any_share_of_zeros_and_empty_rows(fmt, device):
    for share in (0.0, 0.1, 0.97, 1.0):
        weight = torch.randn(70, 300) * (torch.rand(70, 300) < share)
        weight[3:9] = 0
        packed = to_device(pack(weight, fmt.name, layout="plain", prune="magnitude"), device)
        x = random_tokens(5, 300, torch.float16, device)
        y, wanted = product(x, packed), x.double() @ weight64(packed).t()
        assert not y[:, 3:9].any()
        assert (y.double() - wanted).norm() <= fmt.max_error(torch.float16) * wanted.norm()


def test_parts_of_k_begin_where_their_values_do(device, monkeypatch):
    """What is split along K counts the bits that stand before its part."""
    packed = to_device(random_packed(FORMATS["w8a16-unstructured"], 64, 2100, torch.float16), device)
    x = random_tokens(2, 2100, torch.float16, device)
    wanted = x.double() @ weight64(packed).t()
    splits = set()
    real = bitmap.bitmap_config
    monkeypatch.setattr(bitmap, "bitmap_config", lambda *a: splits.add((c := real(*a)).split_k) or c)
    assert error(product(x, packed), wanted) <= 1e-3
    assert torch.equal(product(x, packed), product(x, packed))
    assert splits == {4}


@every
@every_dtype
def test_expanded_is_the_plain_weight(fmt, dtype, device):
    packed = to_device(random_packed(fmt, 70, 333, torch.bfloat16), device)
    weight, scale, _, index = packed.tensors
    dense = expand_tensors(weight, scale, index, fmt, 333, dtype)
    assert torch.equal(dense, packed.dequantize(dtype))


@every
def test_many_tokens_are_multiplied_by_slices(fmt, device, monkeypatch):
    packed = to_device(random_packed(fmt, 300, 200, torch.float16), device)
    rows = []
    real = bitmap.expand_tensors
    monkeypatch.setattr(dequantize, "dense_rows", lambda *_: 128)
    monkeypatch.setattr(bitmap, "expand_tensors", lambda *a: rows.append(len(a[2])) or real(*a))
    x = random_tokens(paths.UNSTRUCTURED_TOKENS + 1, 200, torch.float16, device)
    y = ops._linear_cuda(x, packed, torch.ones(300, device=device), None)
    assert error(y, x.double() @ weight64(packed).t() + 1) <= fmt.max_error(torch.float16)
    assert rows == [128, 128, 44]


@every
@pytest.mark.parametrize("tokens", [0, 3, 65])
def test_the_operators_take_them(fmt, tokens, device):
    packed = to_device(random_packed(fmt, 70, 200, torch.float16).to_layout("triton"), device)
    x = random_tokens(tokens, 200, torch.float16, device).view(1, tokens, 200)
    y = ops._linear_cuda(x, packed, None, None)
    assert y.shape == (1, tokens, 70) and y.dtype == torch.float16
    wanted = x[0].double() @ weight64(packed).t()
    assert (y[0].double() - wanted).norm() <= fmt.max_error(torch.float16) * wanted.norm()
    assert torch.equal(ops._dequantize_cuda(packed, torch.bfloat16), packed.dequantize(torch.bfloat16))


def test_a_kept_copy_is_faster_for_any_number_of_tokens(device, monkeypatch):
    fmt, n, k = FORMATS["w8a16-unstructured"], 70, 200
    packed = to_device(random_packed(fmt, n, k, torch.float16), device)
    monkeypatch.setattr(bitmap, "bitmap_linear_tensors", None)
    x = random_tokens(1, k, torch.float16, device)
    y = ops._linear_cuda(x, packed, None, packed.dequantize(torch.float16))
    assert error(y, x.double() @ weight64(packed).t()) <= 1e-3
    cuda = torch.device("cuda")
    assert paths.paths(fmt, torch.float16, cuda, "plain", k, n, kept=True) == {1: "F.linear on the kept copy"}
    few, many = paths.paths(fmt, torch.float16, cuda, "plain", k, n).items()
    assert few == (1, "Triton expands tiles") and many == (65, "Triton expand + vendor matmul")


def test_the_way_is_said():
    fmt = FORMATS["w8a16-unstructured"]
    few, _ = paths._path(fmt, torch.float16, 1, "cuda", "plain", 128, False, None)
    many, why = paths._path(fmt, torch.float16, 65, "cuda", "plain", 128, False, None)
    assert few == "Triton expands tiles" and many == "Triton expand + vendor matmul" and "64 tokens" in why


@pytest.mark.parametrize("capability", [(9, 0), "gfx942"], ids=str)
def test_no_part_of_k_is_without_tiles_of_its_own(capability):
    for n in (64, 4096, 100_000):
        # 43 tiles in 10 parts of 5 would leave the last without any.
        for k in (32, 43 * 128, 4096, 14336):
            split, tiles = bitmap.bitmap_config(1, n, k, torch.float16, Target(capability, 132)).split_k, -(-k // 128)
            assert split == 1 or tiles // split >= 4
            assert (split - 1) * -(-tiles // split) < tiles


def test_what_does_not_fit_is_named(device):
    packed = to_device(random_packed(FORMATS["w8a16-unstructured"], 70, 200, torch.float16), device)
    weight, scale, _, index = packed.tensors
    x = random_tokens(3, 200, torch.float16, device)
    with pytest.raises(ValueError, match=r"the index of w8a16-unstructured \[70, 200\] in the layout 'plain' is"):
        bitmap_linear_tensors(x, weight, scale, index[:, 1:], packed.format, 70)
    with pytest.raises(ValueError, match="w4a16 has no bits"):
        bitmap_linear_tensors(x, weight, scale, index, FORMATS["w4a16"], 70)
    with pytest.raises(ValueError, match="x must be a float16"):
        bitmap_linear_tensors(x.double(), weight, scale, index, packed.format, 70)
