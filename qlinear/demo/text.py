"""The text quality is measured on, and perplexity."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

TEXT_NAME = "CPython's pydoc_data.topics"


class Perplexity(NamedTuple):
    """Perplexity, and how many tokens it was scored on."""

    value: float
    tokens: int


def sample_ids(tokenizer: Any, windows: int = 8, length: int = 512) -> Tensor:
    """Token ids ``[windows, length]`` spread evenly over CPython's own documentation (``pydoc_data.topics``).

    The defaults score 8 x 511 = 4088 tokens. The text differs a little between Python versions.

    Raises:
        ValueError: the text is too short for so many tokens.
    """
    ids = torch.tensor(tokenizer(_topics(), verbose=False)["input_ids"])
    if len(ids) < windows * length:
        raise ValueError(f"{TEXT_NAME} has only {len(ids)} tokens, {windows * length} are needed")
    step = (len(ids) - length) // max(windows - 1, 1)
    return torch.stack([ids[i * step : i * step + length] for i in range(windows)])


def token_windows(tokenizer: Any, text: str | None = None, tokens: int = 1024, length: int = 512) -> list[Tensor]:
    """The first ``tokens`` tokens of ``text`` (None: CPython's documentation) as batches ``[1, <= length]``.

    Raises:
        ValueError: the text has no tokens.
    """
    ids = torch.tensor(tokenizer(_topics() if text is None else text, verbose=False)["input_ids"][:tokens])
    if not len(ids):
        raise ValueError("the text has no tokens")
    return [window.unsqueeze(0) for window in ids.split(length)]


def calibration_windows(tokenizer: Any, text: str, windows: int = 128, length: int = 512) -> list[Tensor]:
    """At most so many batches ``[1, length]`` of token ids, spread evenly over a text, none overlapping.

    Raises:
        ValueError: the text is shorter than one window.
    """
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    windows = min(windows, len(ids) // length)
    if windows < 1:
        raise ValueError(f"the calibration text has {len(ids)} tokens, at least one window of {length} is needed")
    starts = [i * (len(ids) - length) // max(windows - 1, 1) for i in range(windows)]
    return [ids[start : start + length].unsqueeze(0) for start in starts]


def _topics() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


@torch.inference_mode()
def perplexity(model: Any, ids: Tensor, batch_size: int = 4, progress: str | None = None) -> Perplexity:
    """Perplexity of a causal language model on windows of token ids ``[windows, length]``.

    Every token but the first of each window is scored; log-softmax in float32, summed in float64.

    Args:
        model: called as ``model(input_ids=..., use_cache=False).logits``.
        ids: the windows; each is read on its own.
        batch_size: windows per forward pass.
        progress: the label of a progress bar on stderr; None for none.
    """
    device = next(model.parameters()).device
    total = 0.0
    with tqdm(total=len(ids), desc=progress, disable=progress is None, leave=False) as bar:
        for batch in ids.to(device).split(batch_size):
            logits = model(input_ids=batch, use_cache=False).logits
            for row, target in zip(logits, batch, strict=True):
                total += float(torch.nn.functional.cross_entropy(row[:-1].float(), target[1:], reduction="sum"))
            bar.update(len(batch))
    tokens = ids.shape[0] * (ids.shape[1] - 1)
    return Perplexity(float(torch.tensor(total / tokens, dtype=torch.float64).exp()), tokens)
