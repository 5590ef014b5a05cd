"""The same bits every time: run to run, under CUDA graphs, and whatever else is in the batch."""

from __future__ import annotations

import pytest
import torch
from helpers import random_tokens, random_weight

from bench.gpu_checks import bucket_ends, differing_replays, differing_runs, rows_that_change
from qlinear.format import DENSE, Format
from qlinear.kernels.activations import quantize_activations
from qlinear.kernels.configs import choose_config
from qlinear.kernels.tile_table import M_BUCKETS

every_format = pytest.mark.parametrize("fmt", DENSE.values(), ids=str)
#: One of every kind, for what takes long: ``python -m bench gpu`` goes through all of them.
some_formats = pytest.mark.parametrize(
    "fmt", [DENSE[name] for name in ("w4a16", "w4a16-g32-asym", "w8a16", "w8a8", "fp8")], ids=str
)

#: Nine blocks of 128 along K, the last one short: enough for two programs to share them.
N, K = 40, 1056


def test_the_shape_is_split_where_tokens_are_few() -> None:
    for fmt in DENSE.values():
        for few, many in ((1, 8), (9, 16)):
            configs = {choose_config(m, N, K, fmt, torch.float16, (9, 0), 132) for m in (few, many)}
            assert len(configs) == 1 and configs.pop().split_k > 1


def test_a_bucket_has_one_configuration() -> None:
    assert M_BUCKETS == (8, 16, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
    assert bucket_ends()[:7] == [(1, 8), (9, 16), (17, 64), (65, 128), (129, 192), (193, 256), (257, 384)]
    assert [end for _, end in bucket_ends()] == list(M_BUCKETS)
    for fmt in DENSE.values():
        for few, many in [*bucket_ends(), (4097, 9000)]:
            made = {choose_config(m, 4096, 4096, fmt, torch.bfloat16, (9, 0), 132) for m in (few, few + 1, many)}
            assert len(made) == 1


@some_formats
def test_runs_have_the_same_bits(fmt: Format, device: torch.device) -> None:
    packed = random_weight(fmt, N, K, torch.float16, device)
    assert differing_runs(packed, random_tokens(5, K, torch.float16, device), repeats=1) == 0


@every_format
def test_a_row_does_not_depend_on_the_other_rows_of_its_batch(fmt: Format, device: torch.device) -> None:
    packed = random_weight(fmt, N, K, torch.float16, device)
    assert rows_that_change(packed, 2, 8, torch.float16) == []


@pytest.mark.parametrize(
    ("few", "many", "k"), [(9, 16, K), (17, 40, 128), (65, 80, 128), (129, 140, 128), (129, 140, 1024), (513, 515, 128)]
)
@some_formats
def test_nor_does_it_in_a_larger_batch(fmt: Format, few: int, many: int, k: int, device: torch.device) -> None:
    packed = random_weight(fmt, N, k, torch.float16, device)
    assert rows_that_change(packed, few, many, torch.float16) == []


def test_a_row_that_does_depend_is_found(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """The check itself: one scale for the whole batch, a common mistake, is seen."""
    from qlinear.kernels import matmul as kernels

    def spoiled(x: torch.Tensor, packed: object, *rest: object) -> torch.Tensor:
        return x / x.abs().amax()

    monkeypatch.setattr(kernels, "matmul", spoiled)
    packed = random_weight(DENSE["w4a16"], N, 256, torch.float16, device)
    assert rows_that_change(packed, 3, 8, torch.float16) != []


def test_a_token_is_rounded_by_itself(device: torch.device) -> None:
    x = random_tokens(9, 200, torch.float16, device)
    values, scale = quantize_activations(x)
    for i in range(9):
        alone, alone_scale = quantize_activations(x[i : i + 1])
        assert torch.equal(alone[0], values[i]) and torch.equal(alone_scale[0], scale[i])


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 64, 200])
@some_formats
def test_graphs_replay_the_same_bits(fmt: Format, m: int, device: torch.device) -> None:
    packed = random_weight(fmt, 331, 4096, torch.float16, device)
    assert differing_replays(packed, random_tokens(m, 4096, torch.float16, device), repeats=10) == 0


@pytest.mark.gpu
@pytest.mark.parametrize(("few", "many"), [*bucket_ends(), (4097, 4200)])
@some_formats
def test_rows_are_independent_where_the_device_is_full(fmt: Format, few: int, many: int, device: torch.device) -> None:
    packed = random_weight(fmt, 4096, 4096, torch.float16, device)
    assert differing_runs(packed, random_tokens(many, 4096, torch.float16, device), repeats=50) == 0
    assert rows_that_change(packed, few, many, torch.float16) == []
