"""The two real models that pruning is shown on: what calibrates them, and what their quality is measured by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qlinear.demo.corpus import background_documents, rated_documents, wikipedia
from qlinear.demo.encoder import batches, embed, load_encoder, pairs, spearman
from qlinear.demo.source import find_model, load_model
from qlinear.demo.text import TEXT_NAME, calibration_windows, perplexity, sample_ids
from qlinear.demo.twin import off_grid_twin


@dataclass(frozen=True)
class Subject:
    """A float model and what pruning it needs."""

    name: str
    model: Any
    calibration: Sequence[dict[str, Tensor]]
    #: What gradient pruning differentiates: ``(model, batch) -> scalar``.
    loss: Callable[[Any, dict[str, Tensor]], Tensor]
    #: The model's quality: numbers by name, the first the one that is plotted.
    measure: Callable[[Any], dict[str, float]]
    #: Whether less is better, and where the float model stands.
    lower_is_better: bool
    #: Said below the table.
    note: str
    #: Linear layers that the measure does not depend on; they are left alone.
    unused: tuple[str, ...] = ()
    #: Which of the numbers says how well the model agrees with people's labels; empty where there are none.
    labels: str = ""


def encoder(no_download: bool, say: Callable[[str], None], documents: int = 30) -> Subject:
    """all-MiniLM-L6-v2 in float32 on 50 documents whose similarity people rated; 30 others of that study calibrate it.

    Raises:
        qlinear.demo.wheels.SourceError: the model or the documents cannot be had.
    """
    model, tokenizer = load_encoder(no_download, say)
    texts, ratings = rated_documents(no_download, say)
    inputs = batches(tokenizer, texts)
    wanted = embed(model, inputs)
    similarity = pairs(wanted @ wanted.t())

    def measure(pruned: Any) -> dict[str, float]:
        found = embed(pruned, inputs)
        own = pairs(found @ found.t())
        return {
            "fidelity": spearman(own, similarity),
            "cosine": float((found * wanted).sum(1).mean()),
            "people": spearman(own, pairs(ratings)),
        }

    note = (
        "fidelity: Spearman correlation of the similarities of 1225 pairs of documents with those of the float model.\n"
        f"People's ratings correlate {spearman(similarity, pairs(ratings)):.3f} with the float model (noise +-0.02). "
        f"Calibrated on {documents} other documents."
    )
    background = background_documents(no_download, say)[:documents]
    return Subject(
        "all-MiniLM-L6-v2",
        model,
        batches(tokenizer, background),
        _halves_match,
        measure,
        False,
        note,
        ("pooler.dense",),
        "people",
    )


def _halves_match(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """How well the two halves of each text are told to belong together: the loss sentence encoders are trained with.

    Of the cosines as they are. Training multiplies them by 20; then the loss of a model that is trained is 0.00 on most
    batches, and so are its gradients: pruned by them, the encoder is worse with half of its weights than with 30 %.
    """
    mask = batch["attention_mask"]
    place = mask.cumsum(1)
    half = (mask.sum(1, keepdim=True) + 1) // 2
    hidden = model(**batch).last_hidden_state
    first, second = (_mean(hidden, mask * (place <= half)), _mean(hidden, mask * (place > half)))
    scores = F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).t()
    return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    return (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def language_model(no_download: bool, say: Callable[[str], None], windows: int = 16, length: int = 256) -> Subject:
    """SmolLM2-135M (its off-grid twin) in bfloat16 on CPython's manual; Wikipedia calibrates it.

    Raises:
        qlinear.demo.wheels.SourceError: the model or the text cannot be had.
    """
    model, tokenizer = load_model(find_model(None, no_download, say), torch.bfloat16)
    off_grid_twin(model, 0)
    ids = sample_ids(tokenizer, windows=4)
    text = calibration_windows(tokenizer, "\n\n".join(wikipedia(no_download, say)), windows, length)

    def measure(pruned: Any) -> dict[str, float]:
        return {"perplexity": perplexity(pruned, ids).value}

    note = (
        f"perplexity: {ids.shape[0] * (ids.shape[1] - 1)} tokens of {TEXT_NAME}. "
        f"Calibrated on {len(text)} x {length} tokens of Wikipedia."
    )
    calibration = [{"input_ids": window} for window in text]
    return Subject("SmolLM2-135M-Instruct", model, calibration, next_token_loss, measure, True, note)


def next_token_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The loss of a causal language model."""
    logits = model(**batch, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten())
