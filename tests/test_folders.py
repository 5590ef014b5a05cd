"""Folders that save writes and load reads: links, mounts, damaged files; a load that fails changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import same_bits
from safetensors.torch import load_file, save_file
from torch import nn

import qlinear
from qlinear.checkpoint import WEIGHTS


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.middle = nn.Embedding(50, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.embedding.weight


@pytest.fixture
def model() -> nn.Module:
    return qlinear.convert(Tied(), "w8a16")


@pytest.fixture
def saved(model: nn.Module, tmp_path: Path) -> Path:
    return qlinear.save(model, tmp_path / "saved")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_parameter_of_two_names_is_one_again(model: nn.Module, saved: Path) -> None:
    other = qlinear.load(saved, model=Tied())
    assert other.head.weight is other.embedding.weight
    assert len(list(other.parameters())) == len(list(model.parameters()))
    assert qlinear.inspect(other).bytes_after == qlinear.inspect(model).bytes_after


def test_layers_keep_their_own_dtypes(tmp_path: Path) -> None:
    def layers() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64).bfloat16())

    model = qlinear.convert(layers(), {"0": "w8a16"}, compute_dtype=torch.bfloat16)
    qlinear.convert(model, {"*": "w8a16"})
    other = qlinear.load(qlinear.save(model, tmp_path / "saved"), model=layers())
    for mine, its in zip(model, other, strict=True):
        assert (mine.compute_dtype, mine.float_dtype) == (its.compute_dtype, its.float_dtype)
        assert mine.weight.dtype == its.weight.dtype and same_bits(mine.weight, its.weight)


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_a_link_points_at_is_written(model: nn.Module, tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    if overwrite:
        (tmp_path / "real" / "old").write_text("old")
    qlinear.save(model, tmp_path / "link", overwrite=overwrite)
    assert (tmp_path / "link").is_symlink() and names(tmp_path) == {"real", "link"}
    assert names(tmp_path / "real") == {WEIGHTS, "config.json"}


def test_an_empty_folder_that_is_there_is_filled(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a mount, whose parent cannot be written, or the current folder."""
    (tmp_path / "mount").mkdir()
    before = (tmp_path / "mount").stat().st_ino
    monkeypatch.chdir(tmp_path / "mount")
    qlinear.save(model, ".")
    assert names(Path()) == {WEIGHTS, "config.json"} and Path().stat().st_ino == before
    assert names(tmp_path) == {"mount"}


def test_a_file_is_not_replaced_by_a_folder(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"):
        qlinear.save(model, tmp_path / "file", overwrite=True)
    assert (tmp_path / "file").read_text() == "mine" and names(tmp_path) == {"file"}


@pytest.mark.parametrize("damage", ["cut", "empty", "pointer", "tensor", "json", "list", "keys"])
def test_a_load_that_fails_leaves_the_model_as_it_was(saved: Path, damage: str) -> None:
    weights, config = saved / WEIGHTS, saved / "config.json"
    whole, text = weights.read_bytes(), config.read_text()
    if damage == "tensor":
        tensors = load_file(weights)
        del tensors["middle.weight_scale"]
        save_file(tensors, weights)
    elif damage in ("json", "list", "keys"):
        config.write_text({"json": text[:90], "list": "[]", "keys": text.replace('"tied"', '"tide"')}[damage])
    else:
        weights.write_bytes({"cut": whole[:100], "empty": b"", "pointer": b"version https://git-lfs"}[damage])
    model = Tied()
    before, members = dict(model.named_modules()), {name: id(p) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=str(saved)):
        qlinear.load(saved, model=model)
    assert dict(model.named_modules()) == before
    assert {name: id(p) for name, p in model.named_parameters()} == members
    weights.write_bytes(whole)
    config.write_text(text)
    assert isinstance(qlinear.load(saved, model=model).middle, qlinear.QLinear)
