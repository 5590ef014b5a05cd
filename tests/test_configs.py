"""The configurations, as the pure function they are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlinear.format import DENSE
from qlinear.kernels.configs import choose_config, config_seconds, dense_rows, shipped_configs
from qlinear.kernels.estimate import machine_for
from qlinear.kernels.runtime import MAX_SPLIT_TILES
from qlinear.kernels.tile_table import M_BUCKETS, token_bytes

CAPABILITIES = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), "gfx942", "gfx1100"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
NUM_SMS = {(8, 0): 108, (9, 0): 132, (10, 0): 148, "gfx942": 304}

problems = {
    "m": st.integers(1, 1_000_000),
    "n": st.integers(1, 300_000),
    "k": st.integers(1, 60_000),
    "fmt": st.sampled_from(list(DENSE.values())),
    "dtype": st.sampled_from(DTYPES),
    "capability": st.sampled_from(CAPABILITIES),
}


@settings(deadline=None, max_examples=300)
@given(**problems)
def test_every_problem_has_a_configuration_that_fits(m, n, k, fmt, dtype, capability):
    sms = NUM_SMS.get(capability, 64)
    config = choose_config(m, n, k, fmt, dtype, capability, sms)
    assert config.block_n % 64 == 0
    blocks = -(-k // 128)
    per_program = -(-blocks // config.split_k)
    assert (config.split_k - 1) * per_program < blocks, "a program without work"
    tiles = -(-m // config.block_m) * -(-n // config.block_n)
    assert tiles * config.split_k < 2**31, "the grid's first axis"
    if config.split_k > 1:
        assert per_program >= 4
        assert tiles <= MAX_SPLIT_TILES
        assert m <= M_BUCKETS[-1]


@settings(deadline=None, max_examples=200)
@given(**problems)
def test_what_is_chosen_is_what_ships(m, n, k, fmt, dtype, capability):
    config = choose_config(m, n, k, fmt, dtype, capability, NUM_SMS.get(capability, 64))
    shipped = list(shipped_configs(fmt, dtype, capability))
    assert len(set(shipped)) == len(shipped)
    assert replace(config, split_k=1) in shipped


@pytest.mark.parametrize("bucket", M_BUCKETS)
def test_the_configuration_depends_on_the_bucket_of_m_alone(bucket):
    below = max((b for b in M_BUCKETS if b < bucket), default=0)
    configs = {
        choose_config(m, 4096, 4096, DENSE["w4a16"], torch.float16, (9, 0), 132) for m in range(below + 1, bucket + 1)
    }
    assert len(configs) == 1


@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (8192, 8192)])
def test_a_few_tokens_fill_an_h100(m, n, k):
    config = choose_config(m, n, k, DENSE["w4a16"], torch.bfloat16, (9, 0), 132)
    # A tile of 256 rows for three quarters of the multiprocessors, or every tile of 128 in parts of 4 blocks.
    rows = n * config.split_k
    assert rows >= min(0.75 * 132 * 256, n * (k // 128 // 4))
    assert config.split_k == 1 or rows <= 2 * 132 * 256


@pytest.mark.parametrize(("n", "k", "parts"), [(4096, 14336, 7), (8192, 8192, 4), (28672, 8192, 1)])
def test_no_more_parts_than_fill_it(n, k, parts):
    """One program adds the parts of a tile, and that takes longer the more there are."""
    chosen = choose_config(16, n, k, DENSE["w4a16"], torch.bfloat16, (9, 0), 132)
    assert (chosen.block_n, chosen.split_k) == (256, parts)
    twice = replace(chosen, split_k=2 * parts)
    machine = machine_for((9, 0), 132)
    times = [config_seconds(16, n, k, DENSE["w4a16"], torch.bfloat16, machine, c) for c in (chosen, twice)]
    assert times[0] < times[1]


def test_scales_go_where_the_tile_is_smaller():
    config = {m: choose_config(m, 4096, 4096, DENSE["w4a16"], torch.float16, (9, 0), 132) for m in (1, 16, 64, 128)}
    assert [config[m].scales_weight(DENSE["w4a16"]) for m in (1, 16, 64, 128)] == [
        False, False, True, True
    ]  # fmt: skip
    assert [config[m].scales_weight(DENSE["w4a16-g32"]) for m in (1, 16, 64)] == [False, True, True]
    assert not config[128].scales_weight(DENSE["w4a16-channel"])


@pytest.mark.parametrize(
    ("m", "n", "k", "rows"),
    [
        (4096, 576, 576, 576),  # fits the cache whole
        (4096, 28672, 8192, 1536),  # 1600 rows of 16 KiB are half of 50 MiB
        (256, 8192, 8192, 8192),  # two tiles along M: 66 along N fill the processors
        (1 << 20, 4096, 14336, 896),
    ],
)
def test_rows_dequantized_at_a_time(m, n, k, rows):
    assert dense_rows(m, n, k, 2, 132, 50 << 20) == rows


@pytest.mark.parametrize(
    ("capability", "limit"), [((8, 0), 163), ((8, 6), 99), ((9, 0), 227), ((10, 0), 227), ("gfx942", 64)], ids=str
)
@pytest.mark.parametrize("fmt", DENSE.values(), ids=str)
def test_buffers_fit_shared_memory(fmt, capability, limit):
    for dtype in DTYPES:
        for config in shipped_configs(fmt, dtype, capability):
            weight = config.block_n * 128 * fmt.bits // 8
            tokens = config.block_m * 128 * token_bytes(fmt, dtype, capability)
            assert (config.num_stages - 1) * (weight + tokens) <= limit << 10
