"""How the rows of a block-sparse weight are cut, so that no program of the kernel has much more to do than others."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from helpers import DTYPES, dtype_id, error, random_tokens, rows_of_blocks
from hypothesis import given, settings
from hypothesis import strategies as st

import qlinear
from bench.gpu_checks import bucket_ends
from qlinear import reference
from qlinear.format import FORMATS
from qlinear.kernels.blocks import block_linear_tensors, choose_block_config, longest_part, part_of
from qlinear.kernels.configs import Config
from qlinear.sparse_layout import longest_first

BLOCK = [fmt for fmt in FORMATS.values() if fmt.block]
every_block = pytest.mark.parametrize("fmt", BLOCK, ids=str)
#: One row has all blocks, or all but a few; none has any; rows differ, rows are alike.
COUNTS = ((0, 0, 11, 0), (11, 1, 0, 0, 1), (0, 0), (3, 0, 4, 11, 1), (8, 8))
every_counts = pytest.mark.parametrize("counts", COUNTS, ids=str)


@triton.jit
def _parts_kernel(out_ptr, index_ptr, rows, per, places, PLACES: tl.constexpr):
    place = tl.arange(0, PLACES)
    there = place < places
    # Those past the end repeat the last one.
    found = part_of(tl.minimum(place, places - 1), index_ptr, rows, per)
    for i in tl.static_range(6):
        tl.store(out_ptr + place * 6 + i, found[i], mask=there)


def parts_of(counts, per, device):
    """What :func:`part_of` says of every place, by name, for rows with so many blocks; and the plain row starts."""
    starts = torch.tensor([0, *counts]).cumsum(0)
    blocks = int(starts[-1])
    index = longest_first(torch.cat((starts, torch.zeros(blocks))).int(), len(counts)).to(device)
    places = len(counts) + blocks // per
    out = torch.full((places, 6), -1, dtype=torch.int32, device=device)
    _parts_kernel[(1,)](out, index, len(counts), per, places, PLACES=triton.next_power_of_2(places))
    rows = index[: len(counts)].tolist()
    names = ("row", "part", "parts", "first_sum", "first", "last")
    found = [dict(zip(names, (rows[rank], *rest), strict=True)) for rank, *rest in out.tolist()]
    return [one for one in found if one["part"] < one["parts"]], starts.tolist()


def check_parts(counts, per, device):
    found, starts = parts_of(counts, per, device)
    sums, ranks = [], sorted(counts, reverse=True)
    for row, count in enumerate(counts):
        mine = sorted((one for one in found if one["row"] == row), key=lambda one: one["part"])
        parts = max(1, -(-count // per))
        assert [(one["part"], one["parts"]) for one in mine] == [(part, parts) for part in range(parts)]
        blocks = [block for one in mine for block in range(one["first"], one["last"])]
        assert blocks == list(range(starts[row], starts[row + 1]))
        assert all(one["last"] - one["first"] <= per for one in mine)
        if parts > 1:
            assert all(one["first"] < one["last"] for one in mine) and len({one["first_sum"] for one in mine}) == 1
            sums += range(mine[0]["first_sum"], mine[0]["first_sum"] + parts)
    # Nobody else's sums, and in the buffer that the launcher makes.
    cut, more = sum(count > per for count in ranks), sum(counts) // per
    assert len(sums) == len(set(sums)) and all(0 <= s < min(len(counts) + more, 2 * more) for s in sums)
    assert cut <= min(len(counts), more)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_every_block_belongs_to_one_program(data, device):
    counts = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=30))
    check_parts(counts, data.draw(st.integers(1, sum(counts) + 1)), device)


@pytest.mark.parametrize("per", [1, 4, 7, 64, 100000])
def test_so_it_does_where_there_are_many_rows(per, device):
    counts = [row * row % 65 * (row % 3 > 0) for row in range(1100)]
    check_parts(counts, per, device)


@pytest.mark.parametrize("counts", [(64,) * 16 + (0,) * 48, (64,) * 4 + (0,) * 60, (64,) + (2,) * 63], ids=str)
def test_no_program_has_much_more_to_do_than_others(counts, device):
    """Cut in as many parts as the average row, the longest one would have parts of four times as many blocks."""
    fmt, blocks, n = FORMATS["w4a16-block64"], sum(counts), 64 * len(counts)
    config = choose_block_config(1, n, blocks, fmt, torch.float16, (9, 0), 132)
    per = longest_part(1, n, blocks, fmt, config)
    most = max(one["last"] - one["first"] for one in parts_of(counts, per, device)[0])
    assert most <= per and 4 * most <= max(counts) / config.split_k


@every_block
def test_rows_of_the_same_length_have_the_parts_of_the_configuration(fmt):
    for n, k, m in ((4096, 4096, 1), (4096, 14336, 16), (28672, 8192, 1), (576, 576, 64), (4096, 4096, 128)):
        blocks = fmt.stored(n, k, 0.5)
        config, rows = choose_block_config(m, n, blocks, fmt, torch.bfloat16, (9, 0), 132), -(-n // 64)
        per = longest_part(m, n, blocks, fmt, config)
        assert -(-(blocks // rows) // per) == config.split_k


@every_block
def test_many_tokens_have_whole_rows(fmt):
    for m in (129, 4096):
        config = choose_block_config(m, 4096, 1000, fmt, torch.float16, (9, 0), 132)
        assert config.split_k == 1 and longest_part(m, 4096, 1000, fmt, config) > 1000


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@every_block
def test_a_bucket_cuts_rows_in_one_way(fmt, dtype):
    for n, blocks in ((2560, 2000), (4096, 100), (128256, 64000)):
        for few, many in [*bucket_ends(), (5000, 9000)]:
            configs = [choose_block_config(m, n, blocks, fmt, dtype, (9, 0), 132) for m in (few, many)]
            lengths = {longest_part(m, n, blocks, fmt, config) for m, config in zip((few, many), configs, strict=True)}
            assert configs[0] == configs[1] and len(lengths) == 1


# --- the product


def product(x, packed, bias=None, config=None):
    return block_linear_tensors(
        x, packed.weight, packed.scale, packed.index, packed.format, packed.out_features, bias, config
    )


@every_counts
@every_block
def test_products_of_rows_that_differ(fmt, counts, device, poisoned_empty):
    """Whatever is cut: in two parts, in three, in as many as there are blocks; two tiles of tokens."""
    weight = rows_of_blocks(counts).half()
    packed = qlinear.pack(weight.to(device), fmt.name, layout="triton")
    n, k = weight.shape
    bias = torch.randn(n, generator=torch.Generator().manual_seed(3)).half().to(device)
    for m, splits in ((1, None), (5, 1), (17, 2), (3, 3), (17, 20)):
        x = random_tokens(m, k, torch.float16, device)
        y = product(x, packed, bias, splits and Config(16, 64, 2, 3, splits))
        assert error(y, reference.matmul(x, packed, bias)) <= fmt.max_error(torch.float16)
        for row, count in enumerate(counts):
            rows = slice(64 * row, 64 * row + 64)
            assert count or torch.equal(y[:, rows], bias[rows].expand(m, -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@every_block
def test_the_bits_of_rows_that_are_cut_stay(fmt, dtype, device):
    """Run to run, and whatever else is in the batch; the counters are left as they were found."""
    packed = qlinear.pack(rows_of_blocks((11, 0, 2, 0)).to(dtype).to(device), fmt.name, layout="triton")
    assert longest_part(8, packed.out_features, len(packed.weight), fmt, Config(8, 64, 1, 6)) < 11
    x = random_tokens(8, packed.in_features, dtype, device)
    for config in (None, Config(16, 64, 2, 3, 3)):
        y = product(x, packed, None, config)
        assert torch.equal(product(x, packed, None, config), y)
        assert torch.equal(product(x[:2].clone(), packed, None, config), y[:2])


@pytest.mark.gpu
@every_block
def test_graphs_replay_the_bits_of_rows_that_are_cut(fmt, device):
    from qlinear.kernels.graphs import capture

    packed = qlinear.pack(rows_of_blocks((64, 0, 2, 64), columns=64).half().to(device), fmt.name, layout="triton")
    x = random_tokens(8, packed.in_features, torch.float16, device)
    wanted, results = product(x, packed), []
    graph = capture([lambda: results.append(product(x, packed))], device)
    for _ in range(10):
        graph.replay()
        assert torch.equal(results[-1], wanted)
