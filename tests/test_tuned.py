"""Tuned tables: keys, files, what is refused, and that the kernels' choices follow them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlinear import doctor, paths
from qlinear.format import DENSE
from qlinear.kernels import tuned
from qlinear.kernels.configs import Config, bucket_of, choose_config, refusal
from qlinear.kernels.crossover import fused_tokens
from qlinear.kernels.runtime import Target
from qlinear.kernels.tile_table import MANY
from qlinear.kernels.tuned import Key, Table

TARGET = Target((9, 0), 132)
BF16 = torch.bfloat16
W4 = ("w4a16", BF16)


def key(**changes: object) -> Key:
    return replace(Key("NVIDIA H200", (9, 0), 132, tuned.triton.__version__, tuned.kernels_hash()), **changes)


def table(path: Path | None = None) -> Table:
    made = Table(key(), path)
    made.configs[(*W4, 8, 4096, 4096)] = Config(8, 64, 4, 3, 4)
    made.configs[(*W4, MANY, 4096, 4096)] = Config(128, 128, 8, 3)
    made.crossovers[(*W4, 4096, 4096)] = 1024
    made.partial.add((*W4, MANY, 4096, 4096))
    return made


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> torch.device:
    """A device that is an H200 as far as keys and targets go."""
    monkeypatch.setenv("QLINEAR_CACHE", str(tmp_path))
    monkeypatch.setattr(tuned, "key_of", lambda index: key())
    monkeypatch.setattr(tuned, "target_of", lambda device: TARGET)
    tuned.forget()
    yield torch.device("cuda", 0)
    tuned.forget()


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    table().write(tmp_path / "t.json")
    found = tuned.read(tmp_path / "t.json", key())
    assert found == replace(table(), path=tmp_path / "t.json") and len(found) == 3
    # Written beside its place and moved: nothing else is left.
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]


def test_every_part_of_the_key_has_its_own_file() -> None:
    changes = {"gpu": "NVIDIA H100", "capability": (8, 0), "num_sms": 114, "triton": "3.6.0", "kernels": "0" * 12}
    names = {key().file_name, *(key(**{name: value}).file_name for name, value in changes.items())}
    assert len(names) == 6 and all("/" not in name and " " not in name for name in names)
    assert key(gpu="A/B c", capability="gfx942").file_name.startswith("A-B-c-gfx942-132-triton-")


def test_the_hash_is_of_kernels_and_configurations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = Path(tuned.__file__).parent
    for path in folder.glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(tuned, "__file__", str(tmp_path / "tuned.py"))

    def digest() -> str:
        tuned.kernels_hash.cache_clear()
        return tuned.kernels_hash()

    before = digest()
    files = {"tiles": True, "configs": True, "estimate": True, "tile_table": True, "search": False, "crossover": False}
    for name, counts in files.items():
        (tmp_path / f"{name}.py").write_text((folder / f"{name}.py").read_text() + "\n")
        assert (digest() != before) == counts, name
        before = digest()
    monkeypatch.undo()
    assert digest() == tuned.kernels_hash()


def test_choices_follow_the_table(h200: torch.device) -> None:
    fmt = DENSE["w4a16"]
    computed = choose_config(1, 4096, 4096, fmt, BF16, (9, 0), 132)
    assert tuned.config_on(h200, TARGET, 1, 4096, 4096, fmt, BF16) == computed
    table().write(tuned.folder() / key().file_name)
    # Read once in a process, and again when told.
    assert tuned.config_on(h200, TARGET, 1, 4096, 4096, fmt, BF16) == computed
    tuned.forget()
    assert all(tuned.config_on(h200, TARGET, m, 4096, 4096, fmt, BF16) == Config(8, 64, 4, 3, 4) for m in (1, 8))
    assert tuned.config_on(h200, TARGET, 5000, 4096, 4096, fmt, BF16) == Config(128, 128, 8, 3)
    for m, n, k, dtype in ((9, 4096, 4096, BF16), (1, 4096, 4224, BF16), (1, 4096, 4096, torch.float16)):
        assert tuned.config_on(h200, TARGET, m, n, k, fmt, dtype) == choose_config(m, n, k, fmt, dtype, (9, 0), 132)
    assert tuned.fused_tokens_on(h200, 4096, 4096, fmt, BF16) == 1024
    assert tuned.fused_tokens_on(h200, 8192, 8192, fmt, BF16) == fused_tokens(
        8192, 8192, fmt, BF16, (9, 0), 132, TARGET.l2_bytes
    )
    ways = paths.paths(fmt, BF16, h200, "triton", 4096, 4096)
    assert ways == {1: "Triton matmul", 1025: "Triton dequantize + vendor matmul"}


def test_the_launcher_asks_for_the_tuned_configuration(h200: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the interpreter: the configuration reaches the grid of the launch."""
    from helpers import random_tokens, random_weight

    from qlinear.kernels import matmul

    one = Table(key())
    one.configs["w4a16", torch.float16, 8, 128, 512] = Config(8, 64, 4, 2, 4)
    monkeypatch.setattr(tuned, "measured", lambda device: one)
    grids = []
    launch = matmul._matmul_kernel.__class__.__getitem__
    monkeypatch.setattr(
        matmul._matmul_kernel.__class__, "__getitem__", lambda self, grid: grids.append(grid) or launch(self, grid)
    )
    cpu = torch.device("cpu")
    matmul.matmul(
        random_tokens(3, 512, torch.float16, cpu), random_weight(DENSE["w4a16"], 128, 512, torch.float16, cpu)
    )
    assert grids == [(2 * 4,)]


def test_cpu_tensors_have_no_table() -> None:
    assert tuned.measured(torch.device("cpu")) is tuned.NOTHING and len(tuned.NOTHING) == 0


def entry(**changes: object) -> dict[str, object]:
    return {**table().to_dict()["configs"][0], **changes}


WRONG = {
    "empty": "",
    "half a file": json.dumps(table().to_dict())[:100],
    "a list": [],
    "another version": {**table().to_dict(), "version": 2},
    "another GPU": {**table().to_dict(), "key": {**table().to_dict()["key"], "gpu": "NVIDIA A100"}},
    "no key": {name: value for name, value in table().to_dict().items() if name != "key"},
    "no such scheme": {**table().to_dict(), "configs": [entry(scheme="w3a16")]},
    "no such dtype": {**table().to_dict(), "configs": [entry(dtype="int8")]},
    "no such bucket": {**table().to_dict(), "configs": [entry(tokens=9)]},
    "another tile of tokens": {**table().to_dict(), "configs": [entry(block_m=16)]},
    "no such tile": {**table().to_dict(), "configs": [entry(block_n=96)]},
    "too many buffers": {**table().to_dict(), "configs": [entry(num_stages=7)]},
    "an empty part of K": {**table().to_dict(), "configs": [entry(split_k=20)]},
    "a number that is text": {**table().to_dict(), "configs": [entry(split_k="4")]},
    "a field too many": {**table().to_dict(), "configs": [entry(more=1)]},
    "many tokens split": {**table().to_dict(), "configs": [entry(tokens=MANY, block_m=128, num_warps=8, split_k=2)]},
    "crossover in a bucket": {
        **table().to_dict(),
        "crossovers": [{"scheme": "w4a16", "dtype": "bfloat16", "n": 64, "k": 64, "fused_tokens": 100}],
    },
    "crossover of integers": {
        **table().to_dict(),
        "crossovers": [{"scheme": "w8a8", "dtype": "bfloat16", "n": 64, "k": 64, "fused_tokens": 256}],
    },
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_ignored_with_one_warning(name: str, h200: torch.device) -> None:
    path = tuned.folder() / key().file_name
    path.parent.mkdir(parents=True)
    text = WRONG[name]
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    with pytest.warns(UserWarning, match="is no tuned table that can be used here") as caught:
        assert tuned.measured(h200) is tuned.NOTHING
    assert len(caught) == 1 and str(path) in str(caught[0].message) and "\n" not in str(caught[0].message)
    # And once only; what is written anew takes its place.
    fmt = DENSE["w4a16"]
    assert tuned.config_on(h200, TARGET, 1, 4096, 4096, fmt, BF16) == choose_config(
        1, 4096, 4096, fmt, BF16, (9, 0), 132
    )
    assert tuned.writable(key()).path == path and len(tuned.writable(key())) == 0


def test_tables_are_installed_where_their_gpu_finds_them(h200: torch.device, tmp_path: Path) -> None:
    table().write(tmp_path / "run.json")
    assert len(tuned.measured(h200)) == 0
    assert tuned.install(tmp_path / "run.json").path == tuned.folder() / key().file_name
    assert len(tuned.measured(h200)) == 3
    for name, value in (("triton", "3.0.0"), ("kernels", "f" * 12)):
        Table(key(**{name: value})).write(tmp_path / "old.json")
        with pytest.raises(ValueError, match=f"{value}, here is"):
            tuned.install(tmp_path / "old.json")
    assert tuned.clear() == 1 and len(tuned.measured(h200)) == 0 and tuned.tables() == []


def test_doctor_names_the_table(h200: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert doctor.tuned_tables()[0].startswith("cuda:0: none; configurations and crossovers are by count")
    path = tuned.folder() / key().file_name
    table().write(path)
    tuned.forget()
    first, last = doctor.tuned_tables()
    assert first == f"cuda:0: 2 configurations and 1 crossovers, of {path}"
    assert last == f"1 table kept in {tuned.folder()}"


@settings(deadline=None, max_examples=200)
@given(
    m=st.integers(1, 5000),
    n=st.integers(1, 200_000),
    k=st.integers(1, 60_000),
    fmt=st.sampled_from(list(DENSE.values())),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    capability=st.sampled_from([(8, 0), (8, 9), (9, 0), (10, 0), "gfx942"]),
)
def test_nothing_that_is_chosen_would_be_refused(m, n, k, fmt, dtype, capability):
    config = choose_config(m, n, k, fmt, dtype, capability, 100)
    assert refusal(config, bucket_of(m), n, k, fmt, dtype, capability) is None
