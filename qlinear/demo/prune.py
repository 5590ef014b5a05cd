"""``qlinear prune``: a language model from one folder to another, calibrated on text."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import qlinear
from qlinear.checkpoint import save_float
from qlinear.demo.corpus import wikipedia
from qlinear.demo.source import load_model
from qlinear.demo.subjects import next_token_loss
from qlinear.demo.text import calibration_windows
from qlinear.pruning import SparsityReport, report
from qlinear.tables import by_pattern


def prune_folder(
    source: str,
    target: Path,
    *,
    method: str,
    shares: tuple[str, ...],
    pattern: str,
    scope: str,
    scheme: str | None,
    text: Path | None,
    samples: int,
    length: int,
    no_download: bool,
    dtype: str | None,
    device: str,
    overwrite: bool,
) -> SparsityReport:
    """Loads, prunes and writes a model; returns what came of it. The options are those of :func:`qlinear.prune`.

    Args:
        source: what :func:`~qlinear.demo.source.load_model` takes.
        target: the folder to write.
        shares: ``("0.5",)``, or rules ``("lm_head=none", "*=0.5")``; empty where the pattern fixes the share.
        text: a file to calibrate on; None is Wikipedia.
        samples, length: windows of text, and tokens in each.

    Raises:
        FileExistsError: the folder exists and is not empty.
        ValueError: what :func:`qlinear.prune` raises, or a model without a tokenizer.
    """
    if target.exists() and not overwrite and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not empty; pass --overwrite to replace it")
    sparsity = _sparsity(shares)
    model, tokenizer = load_model(source, dtype, device)
    batches = None
    if method != "magnitude":
        if tokenizer is None:
            raise ValueError(f"{source} has no tokenizer: method {method!r} needs one to make tokens of text")
        words = text.read_text() if text else "\n\n".join(wikipedia(no_download))
        windows = calibration_windows(tokenizer, words, samples, length)
        batches = [{"input_ids": ids.to(device)} for ids in windows]
    loss = next_token_loss if method == "gradient" else None
    qlinear.prune(model, method, sparsity, pattern, batches, scope, loss=loss, scheme=scheme)
    with tempfile.TemporaryDirectory() as companions:
        if tokenizer is not None:
            tokenizer.save_pretrained(companions)
        folder = source if os.path.isdir(source) else companions
        save_float(model, target, companions=folder, overwrite=overwrite)
    return report(model)


def _sparsity(shares: tuple[str, ...]) -> float | dict[str, float | None] | None:
    try:
        rules = {name: None if share is None else float(share) for name, share in by_pattern(shares).items()}
    except ValueError as error:
        raise ValueError(f"a share is a number or PATTERN=NUMBER, for example 0.5; got {', '.join(shares)}") from error
    return rules["*"] if len(shares) == 1 and "=" not in shares[0] else rules or None
