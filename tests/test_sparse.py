"""Sparse formats: which weights are stored, what a weight without the pattern does, and the block-sparse kernel."""

import copy
import pickle

import pytest
import torch
from helpers import DTYPES, dtype_id, error, random_tokens, random_weight
from hypothesis import given, settings
from hypothesis import strategies as st
from models import random_packed, same_bits
from torch import nn

import qlinear
from qlinear import reference, sparse
from qlinear.bits import unpack_bits
from qlinear.format import FORMATS
from qlinear.kernels.blocks import block_linear_tensors, choose_block_config
from qlinear.kernels.configs import Config
from qlinear.packing import pack_codes

SPARSE = [fmt for fmt in FORMATS.values() if fmt.sparsity]
BLOCK = [fmt for fmt in SPARSE if fmt.block]
every_sparse = pytest.mark.parametrize("fmt", SPARSE, ids=str)
every_block = pytest.mark.parametrize("fmt", BLOCK, ids=str)


def same_weight(a, b):
    return all(same_bits(x, y) for x, y in zip(a.tensors, b.tensors, strict=True))


# --- what is stored


@pytest.mark.parametrize(("n", "k"), [(70, 200), (64, 128), (1, 5), (130, 333)])
@every_sparse
def test_codes_and_layouts_come_back(fmt, n, k):
    for dtype in (torch.bfloat16, torch.float32):
        packed = random_packed(fmt, n, k, dtype)
        assert same_weight(pack_codes(packed.codes(), fmt), packed)
        for layout in ("triton", "cpu"):
            assert same_weight(packed.to_layout(layout).to_layout("plain"), packed)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_pattern_comes_back(data):
    """From no zero to only zeros, as far as the format allows it; pruned weights are exactly zero."""
    fmt = data.draw(st.sampled_from(SPARSE))
    n, k = data.draw(st.integers(1, 140)), data.draw(st.integers(1, 140))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    weight = torch.randn(n, k, generator=g)
    weight[torch.rand(n, k, generator=g) < data.draw(st.sampled_from((0.0, 0.5, 0.9, 1.0)))] = 0
    weight = sparse.prune_weight(weight, fmt, "magnitude", data.draw(st.sampled_from((0.0, 0.5, 1.0))))
    packed = pack_codes(qlinear.quantize.quantize(weight, fmt), fmt)
    dense = packed.dequantize(torch.float32)
    assert not dense[weight == 0].any()
    assert same_weight(pack_codes(packed.codes(), fmt), packed)
    for layout in ("triton", "cpu"):
        assert same_weight(packed.to_layout(layout).to_layout("plain"), packed)


def test_only_legal_nibbles_are_stored():
    for name in ("w4a16-2:4", "w4a16-asym-2:4", "w8a16-2:4", "w16a16-2:4"):
        packed = random_packed(FORMATS[name], 64, 256)
        nibbles = unpack_bits(packed.index, 4, 64)
        assert set(nibbles.unique().tolist()) == {4, 8, 9, 12, 13, 14}


def test_the_2_4_index_by_hand():
    weight = torch.tensor([[1.0, 0, 2, 0, 0, 0, 0, 3]])
    packed = qlinear.pack(weight, "w16a16-2:4", layout="plain")
    # Positions 0 and 2: 0 | 2 << 2; positions 0 (a zero) and 3: 0 | 3 << 2.
    assert packed.index.tolist() == [[0xC8]]
    assert packed.weight.view(torch.float16).tolist() == [[1.0, 2.0, 0.0, 3.0]]


def test_blocks_are_those_of_pytorch_s_bsr():
    weight = torch.randn(128, 256).half()
    weight[:64, 64:192] = 0
    weight[64:] = 0
    packed = qlinear.pack(weight, "w16a16-block64", layout="plain")
    with pytest.warns(UserWarning, match="Sparse"):
        bsr = weight.to_sparse_bsr((64, 64))
    assert packed.index.tolist() == [*bsr.crow_indices().tolist(), *bsr.col_indices().tolist()] == [0, 2, 2, 0, 3]
    assert torch.equal(packed.weight.view(torch.float16), bsr.values())


def test_bits_per_weight_are_what_was_promised():
    n, k = 128, 4096
    weight = torch.randn(n, k).bfloat16()
    for name, most in (("w4a16-2:4", 3.2), ("w4a16-asym-2:4", 3.3)):
        packed = qlinear.pack(weight, name, prune="magnitude")
        assert packed.nbytes * 8 / (n * k) <= most
    for fmt in BLOCK:
        dense = n * k * 2 if fmt.dense is None else fmt.dense.weight_bytes(n, k)
        for density in (0.1, 0.5, 0.9):
            pruned = sparse.prune_weight(weight, fmt, "magnitude", 1 - density)
            plain = qlinear.pack(pruned, fmt.name, layout="plain")
            for packed in (plain, plain.to_layout("triton"), plain.to_layout("cpu")):
                assert packed.nbytes <= (packed.density + 0.01) * dense
                assert packed.density == pytest.approx(density, abs=2e-3)


def test_a_smaller_dense_format_is_named():
    # 50 % sparse 16-bit floats take 9 bits and more, int8 takes 8; 2:4 int4 takes 3.1, which no dense format does.
    assert FORMATS["w16a16-2:4"].smaller_dense(4096, 4096, 0.5).bits == 8
    assert FORMATS["w16a16-unstructured"].smaller_dense(4096, 4096, 0.5).bits == 8
    assert FORMATS["w8a16-unstructured"].smaller_dense(4096, 4096, 0.5).bits == 4
    assert FORMATS["w8a16-unstructured"].smaller_dense(4096, 4096, 0.3) is None
    assert FORMATS["w4a16-2:4"].smaller_dense(4096, 4096, 0.5) is None
    layer = qlinear.QLinear.from_float(nn.Linear(256, 256), "w16a16-2:4", prune="magnitude")
    assert "would be no larger" in str(qlinear.inspect(layer))


def test_scales_are_those_of_what_is_kept():
    weight = torch.randn(8, 256)
    weight[0, :128] *= 100
    kept = weight.clone().view(8, -1, 4)
    kept[..., 1::2] = 0
    scale = qlinear.pack(kept.view(8, 256), "w4a16-2:4", layout="plain").scale
    assert (scale[0, 0].abs() > 20 * scale[1:].abs().max()).all()


# --- weights without the pattern


@pytest.mark.parametrize("scheme", ["w4a16-2:4", "w8a16-block64", "w16a16-unstructured"])
def test_a_weight_without_the_pattern_names_its_layer_and_the_share(scheme):
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"layer '0' \({scheme}\).*pattern {scheme.split('-')[1]}: 100.0% of its"):
        qlinear.convert(model, scheme)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with pytest.raises(ValueError, match="prune='none' is not a method; the methods are: magnitude"):
        qlinear.convert(model, scheme, prune="none")
    qlinear.convert(model, scheme, prune="magnitude")
    assert {m.packed.density for m in model} == {0.5}


@pytest.mark.parametrize("scheme", ["w4a16-block64", "w8a16-block64", "w16a16-block64"])
def test_a_layer_of_one_block_is_refused_with_ways_out_that_work(scheme):
    def model():
        torch.manual_seed(0)
        return qlinear.prune(nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 10)), "magnitude", {"0": 0.5}, "block64")

    dense = FORMATS[scheme].dense
    with pytest.raises(ValueError, match=r"layer '1'.*there is one of 64 x 64.*scheme None") as caught:
        qlinear.convert(model(), scheme)
    assert (f"{{NAME: '{dense}', '*': '{scheme}'}}" in str(caught.value)) == (dense is not None)
    assert "prune it first" not in str(caught.value)
    for way in (dense and dense.name, None):
        qlinear.convert(model(), {"1": way, "*": scheme})
    with pytest.raises(ValueError, match=r"'0'.*prune it first, pass prune='magnitude', .*"):
        qlinear.convert(nn.Sequential(nn.Linear(128, 64)), scheme)


@pytest.mark.parametrize("scheme", ["w16a16-block64", "w16a16-unstructured", "w16a16-2:4"])
@pytest.mark.parametrize("compute_dtype", [None, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_convert_selects_what_prune_selects(scheme, dtype, compute_dtype):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(1024, 1024, dtype=dtype))

    pattern = FORMATS[scheme].sparsity
    pruned = qlinear.prune(model(), "magnitude", None if pattern == "2:4" else 0.5, pattern)
    want = qlinear.convert(pruned, scheme, compute_dtype=compute_dtype)[0].dequantize()
    got = qlinear.convert(model(), scheme, compute_dtype=compute_dtype, prune="magnitude")[0].dequantize()
    assert torch.equal(got, want)


def test_the_share_that_violates_is_counted():
    weight = torch.zeros(1, 16)
    weight[0, :3] = 1
    with pytest.raises(ValueError, match=r"25\.0% of its groups of four"):
        qlinear.pack(weight, "w4a16-2:4")


@every_sparse
def test_magnitude_keeps_the_largest(fmt):
    weight = torch.randn(128, 256)
    kept = sparse.prune_weight(weight, fmt, "magnitude") != 0
    if fmt.sparsity == "unstructured":
        assert kept.sum() == weight.numel() // 2
        assert weight[kept].abs().min() >= weight[~kept].abs().max()
    elif fmt.block:
        sums = sparse.blocks_of(weight.abs(), 64).sum((2, 3))
        chosen = sparse.blocks_of(kept, 64).flatten(2).any(2)
        assert chosen.sum() == 4 and sums[chosen].min() >= sums[~chosen].max()
    else:
        fours, chosen = weight.abs().view(128, 64, 4), kept.view(128, 64, 4)
        assert (chosen.sum(-1) == 2).all()
        lost = fours.masked_fill(chosen, 0).amax(-1)
        assert (fours.masked_fill(~chosen, torch.inf).amin(-1) >= lost).all()


# --- the module


@every_sparse
def test_a_checkpoint_of_any_size_loads_strictly(fmt):
    layer = qlinear.QLinear.from_float(nn.Linear(200, 130).bfloat16(), fmt.name, prune="magnitude")
    for other in (
        qlinear.QLinear(200, 130, fmt.name, device="meta", dtype=torch.bfloat16),
        qlinear.QLinear(200, 130, fmt.name, dtype=torch.bfloat16),
    ):
        other.load_state_dict(layer.state_dict(), strict=True, assign=other.weight_packed.is_meta)
        assert same_weight(other.prepare().packed, layer.packed)
    assert same_weight(copy.deepcopy(layer).packed, layer.packed)
    assert same_weight(pickle.loads(pickle.dumps(layer)).packed, layer.packed)


@pytest.mark.parametrize("scheme", ["w8a16-block64", "w8a16-unstructured"])
def test_an_index_that_contradicts_the_weight_is_refused_and_changes_nothing(scheme):
    layer = qlinear.QLinear.from_float(nn.Linear(200, 130), scheme, prune="magnitude")
    model, state = nn.Sequential(layer), {f"0.{name}": t.clone() for name, t in layer.state_dict().items()}
    before = {name: t.clone() for name, t in state.items()}
    state["0.weight_index"].view(-1)[0 if scheme.endswith("64") else 8] += 5
    with pytest.raises(ValueError, match=rf"layer '0': .* of a {scheme} weight \[130, 200\] d"):
        model.load_state_dict(state)
    assert all(same_bits(t, before[name]) for name, t in model.state_dict().items())


# --- the block-sparse kernel


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("n", "k"), [(70, 200), (130, 128)])
@every_block
def test_the_kernel_against_float64(fmt, n, k, dtype, device):
    packed = random_weight(fmt, n, k, dtype, device)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(3)).to(dtype).to(device)
    for m, config in ((0, None), (5, None), (17, Config(16, 64, 2, 3, 2))):
        x = random_tokens(m, k, dtype, device)
        y = block_linear_tensors(x, packed.weight, packed.scale, packed.index, fmt, n, bias, config)
        assert y.shape == (m, n) and y.dtype == dtype
        if m:
            assert error(y, reference.matmul(x, packed, bias)) <= fmt.max_error(dtype)


@every_block
def test_empty_rows_give_the_bias_and_long_rows_start_first(fmt, device, poisoned_empty):
    weight = torch.randn(192, 256).half()
    weight[:64, :192] = 0
    weight[64:128] = 0
    packed = qlinear.pack(weight.to(device), fmt.name, layout="triton")
    assert packed.index[:3].tolist() == [2, 0, 1]
    bias, x = torch.randn(192).half().to(device), random_tokens(3, 256, torch.float16, device)
    for splits in (1, 3):
        config = Config(16, 64, 2, 3, splits)
        y = block_linear_tensors(x, packed.weight, packed.scale, packed.index, fmt, 192, bias, config)
        assert torch.equal(y[:, 64:128], bias[64:128].expand(3, 64))
        assert error(y, reference.matmul(x, packed, bias)) <= fmt.max_error(torch.float16)


def test_absent_blocks_do_not_read_their_tokens(device):
    """What no block multiplies may be anything; what one does shows in its rows alone."""
    weight = torch.randn(128, 192).half()
    weight[:, 64:128] = 0
    weight[64:, 128:] = 0
    packed = qlinear.pack(weight.to(device), "w16a16-block64", layout="triton")
    x = random_tokens(2, 192, torch.float16, device)
    clean = block_linear_tensors(x, packed.weight, packed.scale, packed.index, packed.format, 128)
    x[:, 64:128] = torch.nan
    x[1, 130] = torch.nan
    y = block_linear_tensors(x, packed.weight, packed.scale, packed.index, packed.format, 128)
    assert torch.equal(y[0], clean[0]) and torch.equal(y[1, 64:], clean[1, 64:])
    assert not torch.isfinite(y[1, :64]).any()


def test_tensors_that_do_not_fit_raise(device):
    packed = random_weight(FORMATS["w4a16-block64"], 70, 200, torch.float16, device)
    x = random_tokens(2, 200, torch.float16, device)
    tensors = (packed.weight, packed.scale, packed.index, packed.format, 70)
    with pytest.raises(ValueError, match=r"the weight of w4a16-block64 .* got torch.int16 \(4, 64, 8"):
        block_linear_tensors(x, packed.weight[..., :8], *tensors[1:])
    with pytest.raises(ValueError, match="the index of w4a16-block64"):
        block_linear_tensors(x, *tensors[:2], packed.index[1:], *tensors[3:])
    with pytest.raises(ValueError, match=r"w8a16 has no blocks"):
        block_linear_tensors(x, *tensors[:3], FORMATS["w8a16"], 70)
    with pytest.raises(ValueError, match="x must be"):
        block_linear_tensors(x.long(), *tensors)


@every_block
def test_configurations(fmt):
    for m in (1, 8, 16, 64, 128, 5000):
        for n, blocks in ((64, 1), (4096, 2048), (4096, 0), (28672, 30000)):
            config = choose_block_config(m, n, blocks, fmt, torch.bfloat16, (9, 0), 132)
            assert config.block_n == 64 and 1 <= config.split_k <= max(1, blocks // 4)
    assert choose_block_config(1, 4096, 2048, fmt, torch.bfloat16, (9, 0), 132).split_k > 1
