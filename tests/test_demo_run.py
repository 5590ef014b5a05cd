"""``qlinear demo`` from end to end, on a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from models import TINY_MODELS

import qlinear
from qlinear.demo import run
from qlinear.demo.text import token_windows
from qlinear.demo.wheels import SourceError

KEYS = {"scheme", "linear_bytes", "model_bytes", "perplexity", "tokens_per_second", "text"}


@pytest.mark.parametrize("large", [False, True], ids=["all-at-once", "one-at-a-time"])
def test_demo(large: bool, language_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    # Reading the whole text byte by byte takes longer than the rest.
    monkeypatch.setattr(run, "sample_ids", lambda tokenizer: token_windows(tokenizer, tokens=256, length=256)[0])
    if large:
        monkeypatch.setattr(run, "_LARGE", 0)
    data = run.run_demo(str(language_model), tmp_path / "demo.json", say=said.append)
    assert json.loads((tmp_path / "demo.json").read_text()) == data
    assert {"model", "device", "versions", "schemes"} <= set(data) and data["model"] == str(language_model)
    rows = {row["scheme"]: row for row in data["schemes"]}
    assert list(rows) == ["float", *run.SCHEMES] and all(set(row) == KEYS for row in rows.values())
    model = run.load_model(language_model)[0]
    layers = [p for name, p in model.named_parameters() if "proj.weight" in name]
    assert rows["float"]["linear_bytes"] == sum(p.nbytes for p in layers)
    assert rows["float"]["model_bytes"] == sum(p.nbytes for p in model.parameters())
    for scheme in run.SCHEMES:
        report = qlinear.inspect(qlinear.convert(run.load_model(language_model)[0], {"lm_head": None, "*": scheme}))
        assert rows[scheme]["linear_bytes"] == sum(row.bytes_after for row in report.quantized)
        assert rows[scheme]["model_bytes"] == report.bytes_after
    for row in rows.values():
        # Random weights guess among 320 tokens.
        assert 1 < row["perplexity"] < math.inf and row["tokens_per_second"] > 0
    printed = "\n".join(said)
    assert all(scheme in printed for scheme in rows) and "computed by" in printed


def test_the_demo_needs_a_model_that_writes(tmp_path: Path) -> None:
    TINY_MODELS["bert"]().save_pretrained(tmp_path)
    with pytest.raises(SourceError, match="BertForSequenceClassification; the demo needs"):
        run.run_demo(str(tmp_path), say=lambda _: None)
