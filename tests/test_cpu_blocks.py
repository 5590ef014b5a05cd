"""The product of a block-sparse weight on a CPU."""

import pytest
import torch
from helpers import DTYPES, error, rows_of_blocks
from models import same_bits

import qlinear
from qlinear import cpu, cpu_blocks, cpu_sparse, reference
from qlinear.cpu_layout import pairs_halves
from qlinear.format import FORMATS

BLOCK = [fmt for fmt in FORMATS.values() if fmt.block]
every_block = pytest.mark.parametrize("fmt", BLOCK, ids=str)
OPERATOR = "aten::_weight_int4pack_mm_for_cpu"


@pytest.fixture(params=["operator", "no-operator"])
def every_way(request, monkeypatch):
    """int4 blocks are multiplied by an operator where PyTorch computes with AVX-512, and without it elsewhere."""
    if request.param == "operator":
        if not pairs_halves():
            pytest.skip("the operator has another order here")
        monkeypatch.setattr(cpu_blocks, "_ROW_THREADS", torch.get_num_threads())
    else:
        monkeypatch.setattr(cpu_blocks, "pairs_halves", lambda: False)


@every_block
@pytest.mark.parametrize("counts", [(0,), (3, 0, 4, 11, 1), (4, 8), (11, 11, 11, 10), (0, 0, 9, 0)], ids=str)
@pytest.mark.parametrize("most", [8, 1024])
@pytest.mark.usefixtures("every_way")
def test_products(fmt, counts, most, monkeypatch):
    """However many blocks a row or a slice has: the layout loses nothing, takes no more, and gives the product."""
    monkeypatch.setattr(cpu_blocks, "_SLICE", most)
    for dtype in DTYPES:
        plain = qlinear.pack(rows_of_blocks(counts).to(dtype), fmt.name, layout="plain")
        packed = plain.to_layout("cpu")
        back = packed.to_layout("plain")
        assert packed.layout == "cpu" and all(map(same_bits, back.tensors, plain.tensors))
        assert packed.nbytes == plain.nbytes and torch.equal(packed.index, plain.index)
        for tokens in (1, 2, 5, 17, 130):
            # Large numbers: float16 holds the products of scaled weights only.
            x = (30 * torch.randn(tokens, plain.in_features)).to(dtype)
            y = cpu_sparse.matmul(x, packed)
            assert y.dtype == dtype and y.shape == (tokens, plain.out_features) and y.is_contiguous()
            assert not any(counts) or error(y, reference.matmul(x, plain)) <= fmt.max_error(dtype)
            for row, count in enumerate(counts):
                assert count or not y[:, 64 * row : 64 * row + 64].any()


@every_block
@pytest.mark.usefixtures("every_way")
def test_blocks_that_take_each_other_back_do_not_overflow(fmt):
    weight = torch.zeros(64, 256).half()
    weight[:, :64], weight[:, 64:128] = 8, -8
    packed = qlinear.pack(weight, fmt.name, layout="cpu")
    for tokens in (1, 2, 4):
        assert not cpu_sparse.matmul(torch.full((tokens, 256), 200.0).half(), packed).any()


@every_block
@pytest.mark.usefixtures("every_way")
def test_a_token_s_bits_do_not_depend_on_its_place(fmt):
    packed = qlinear.pack(rows_of_blocks((3, 0, 11)).bfloat16(), fmt.name, layout="cpu")
    for tokens in (3, 16, 65):
        y = cpu_sparse.matmul(torch.randn(1, packed.in_features).bfloat16().expand(tokens, -1), packed)
        assert (y == y[0]).all()


def test_what_a_row_of_blocks_takes_from_itself_is_summed_in_float32(monkeypatch):
    """Tokens around 10 with a deviation of 1, rows of weights that sum to 0: products of blocks lose what is left."""
    if not pairs_halves():
        pytest.skip("the operator has another order here")
    monkeypatch.setattr(cpu_blocks, "_ROW_THREADS", torch.get_num_threads())
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 1024, generator=g)
    weight = torch.nn.functional.pad(weight - weight.mean(1, keepdim=True), (0, 64))
    packed = qlinear.pack(weight.bfloat16(), "w4a16-block64", layout="cpu")
    for tokens in (1, 16):
        x = (10 + torch.randn(tokens, 1088, generator=g)).bfloat16()
        assert error(cpu_sparse.matmul(x, packed), reference.matmul(x, packed)) <= 2.5e-3


def test_int4_blocks_name_their_operator_where_they_have_it(monkeypatch):
    fmt = FORMATS["w4a16-block64"]
    monkeypatch.setattr(cpu_blocks, "pairs_halves", lambda: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert cpu.path(fmt, torch.bfloat16, 16)[0] == OPERATOR
    others = (torch.bfloat16, 17, "cpu"), (torch.float32, 1, "cpu"), (torch.float16, 1, "cpu")
    assert {cpu.path(fmt, *other)[0] for other in others} == {"stored blocks"}
    assert cpu.path(FORMATS["w8a16-block64"], torch.bfloat16, 1)[0] == "stored blocks"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert cpu.path(fmt, torch.bfloat16, 1)[0] == "stored blocks"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(cpu_blocks, "pairs_halves", lambda: False)
    assert cpu.path(fmt, torch.bfloat16, 1)[0] == "stored blocks"
