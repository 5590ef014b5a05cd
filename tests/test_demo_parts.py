"""The parts of the demo, on a tiny random Llama: no network, no download."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import byte_tokenizer, tiny_language_model

transformers = pytest.importorskip("transformers")

# E402: without transformers the line above leaves this file out, before anything of the demo is imported.
from qlinear.demo.decode import decode_rate, generate_ids, generate_text  # noqa: E402
from qlinear.demo.text import perplexity, sample_ids, token_windows  # noqa: E402
from qlinear.demo.twin import off_grid_twin  # noqa: E402

# --- the twin -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"attention_bias": True, "mlp_bias": True}, {"num_key_value_heads": 4}], ids=str
)
def test_twin_is_the_same_function(changes: dict[str, Any]) -> None:
    model = tiny_language_model(**changes)
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
    one, same, other = (
        off_grid_twin(tiny_language_model(), seed=s).model.layers[0].mlp.up_proj.weight for s in (0, 0, 1)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_twin_rounds_once_to_bfloat16() -> None:
    exact = off_grid_twin(tiny_language_model().bfloat16().float(), seed=5)
    rounded = off_grid_twin(tiny_language_model().bfloat16(), seed=5)
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(rounded.state_dict()[norm], exact.state_dict()[norm].bfloat16())


def test_twin_refuses_other_models_unchanged() -> None:
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50))
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel is not built like Llama"):
        off_grid_twin(gpt2)
    model = tiny_language_model()
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
    model, ids = tiny_language_model(), torch.randint(0, 320, (5, 33), generator=torch.Generator().manual_seed(2))
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
    model = tiny_language_model()
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
    model, tokenizer = tiny_language_model(), byte_tokenizer()
    plain = generate_text(model, tokenizer, "hello", 6)
    assert isinstance(plain, str)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    model.generation_config.eos_token_id = None
    ids = tokenizer("[hello]", return_tensors="pt")["input_ids"]
    assert generate_text(model, tokenizer, "hello", 6) == tokenizer.decode(generate_ids(model, ids, 6)).strip()


def test_decode_rate_takes_turns() -> None:
    calls: list[str] = []
    models = {name: tiny_language_model() for name in ("a", "b")}
    for name, model in models.items():
        model.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    rates = decode_rate(models, rounds=2, tokens=3)
    assert set(rates) == {"a", "b"} and all(rate > 0 for rate in rates.values())
    assert calls == (["a"] * 4 + ["b"] * 4) * 3
