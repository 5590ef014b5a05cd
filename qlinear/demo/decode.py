"""Greedy decoding at batch 1 on the model's own forward and key-value cache: the model is timed, nothing else."""

from __future__ import annotations

import inspect
import statistics
import time
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm


@torch.inference_mode()
def generate_ids(model: Any, ids: Tensor, tokens: int, stop: frozenset[int] = frozenset()) -> list[int]:
    """The ``tokens`` likeliest tokens after the prompt ``[1, length]``, fewer where one of ``stop`` comes."""
    cache, token = _prefill(model, ids)
    made: list[int] = []
    while len(made) < tokens:
        made.append(int(token))
        if made[-1] in stop or len(made) == tokens:
            break
        cache, token = _step(model, cache, token)
    return made


def generate_text(model: Any, tokenizer: Any, prompt: str, tokens: int = 40) -> str:
    """Greedy continuation of ``prompt`` (in the chat template where there is one), at most ``tokens`` tokens."""
    if getattr(tokenizer, "chat_template", None):
        message = [{"role": "user", "content": prompt}]
        options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        ids = tokenizer.apply_chat_template(message, **options)["input_ids"]
    else:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    made = generate_ids(model, ids.to(_device(model)), tokens, _stop_ids(model, tokenizer))
    text: str = tokenizer.decode(made, skip_special_tokens=True)
    return text.strip()


@torch.inference_mode()
def decode_rate(
    models: dict[str, Any], rounds: int = 5, tokens: int = 24, progress: str | None = None
) -> dict[str, float]:
    """Tokens per second of greedy decoding at batch 1: the median of ``rounds`` interleaved rounds.

    In a round each model in turn reads the same 16-token prompt (not timed) and then decodes ``tokens``
    tokens (timed), so that a slow moment of the machine falls on all of them. One untimed round goes first.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with tqdm(total=(rounds + 1) * len(models), desc=progress, disable=progress is None, leave=False) as bar:
        for turn in range(rounds + 1):
            for name, model in models.items():
                elapsed = _time_decoding(model, tokens)
                if turn:
                    seconds[name].append(elapsed)
                bar.update()
    return {name: tokens / statistics.median(times) for name, times in seconds.items()}


def _time_decoding(model: Any, tokens: int) -> float:
    ids = torch.arange(100, 116, device=_device(model)) % model.get_input_embeddings().num_embeddings
    cache, token = _prefill(model, ids.unsqueeze(0))
    int(token)  # waits for a GPU
    start = time.perf_counter()
    for _ in range(tokens):
        cache, token = _step(model, cache, token)
    int(token)
    return time.perf_counter() - start


def _prefill(model: Any, ids: Tensor) -> tuple[Any, Tensor]:
    """Reads the prompt; the cache, and the next token ``[1, 1]``."""
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    out = model(input_ids=ids, use_cache=True, **last)
    return out.past_key_values, out.logits[:, -1:].argmax(-1)


def _step(model: Any, cache: Any, token: Tensor) -> tuple[Any, Tensor]:
    out = model(input_ids=token, past_key_values=cache, use_cache=True)
    return out.past_key_values, out.logits[:, -1:].argmax(-1)


def _device(model: Any) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device


def _stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text, as the generation config and the tokenizer name them."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in [*ids, getattr(tokenizer, "eos_token_id", None)] if i is not None)
