"""inspect: every parameter, its bytes before and after, or why it was left."""

from __future__ import annotations

import pytest
import torch
from models import tiny_gpt2, tiny_llama
from torch import nn

import qlinear
from qlinear import cpu
from qlinear.format import FORMATS


def test_every_parameter_is_listed_once_with_scheme_or_reason() -> None:
    model = tiny_llama(tied=True)
    names = [name for name, _ in model.named_parameters()]
    before = sum(p.nbytes for p in model.parameters())
    qlinear.convert(model, {"*.self_attn.*": "w8a16", "*.gate_proj": "w4a16", "lm_head": None})
    report = qlinear.inspect(model)
    assert [row.name for row in report.rows] == names
    assert report.bytes_before == before
    by_name = {row.name: row for row in report.rows}
    assert by_name["model.layers.0.self_attn.q_proj.weight"].scheme == "w8a16"
    assert by_name["model.layers.0.mlp.up_proj.weight"].reason == "not asked for"
    assert "Embedding is not a linear layer" in str(by_name["model.embed_tokens.weight"].reason)
    assert "LlamaRMSNorm" in str(by_name["model.norm.weight"].reason)
    assert all((row.scheme is None) != (row.reason is None) for row in report.rows)


def test_a_tied_head_says_so() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 16, bias=False)
            self.other = nn.Linear(8, 16, bias=False)
            self.embed = nn.Embedding(16, 8)
            self.embed.weight = self.head.weight

    model = qlinear.convert(Head(), "w8a16")
    (row,) = [row for row in qlinear.inspect(model).rows if row.name == "head.weight"]
    assert row.scheme is None and row.reason == "tied to embed.weight"


@pytest.mark.parametrize("scheme", FORMATS)
def test_bytes_are_what_the_buffers_hold(scheme: str) -> None:
    layer = qlinear.QLinear.from_float(nn.Linear(100, 70, bias=False), scheme, prune="magnitude")
    (row,) = qlinear.inspect(layer).rows
    assert row.bytes_before == 100 * 70 * 4
    assert row.bytes_after == sum(b.nbytes for b in layer.buffers())
    # Blocks are whole: two of 64 x 64 are half of 70 x 100.
    assert row.bytes_after < row.bytes_before / (1.5 if layer.format.block else 2.5)


def test_biases_and_conv1d() -> None:
    report = qlinear.inspect(qlinear.convert(tiny_gpt2(), "w8a16"))
    by_name = {row.name: row for row in report.rows}
    assert by_name["transformer.h.0.attn.c_attn.weight"].shape == (192, 64)
    assert by_name["transformer.h.0.attn.c_attn.bias"].reason == "a bias stays in float"


def test_table_and_data() -> None:
    report = qlinear.inspect(qlinear.convert(tiny_llama(), "w4a16"))
    lines = str(report).splitlines()
    assert lines[0].split() == ["parameter", "shape", "scheme", "before", "after", "note"]
    assert lines[-2].startswith("total") and "15 of 21 quantized" in lines[-2]
    assert lines[-1] == "15 x w4a16: dequantize + F.linear"  # float32 has no packed operator on a CPU
    on_cpu = qlinear.inspect(qlinear.convert(tiny_llama().bfloat16(), {"lm_head": None, "*": "w4a16"}))
    few = f"aten::_weight_int4pack_mm_for_cpu; from {cpu.INT4_TOKENS + 1} tokens dequantize + F.linear"
    assert str(on_cpu).splitlines()[-1] == f"14 x w4a16: {few}"
    data = report.to_dict()
    assert data["bytes_after"] == sum(row["bytes_after"] for row in data["parameters"]) < data["bytes_before"]


@pytest.mark.parametrize("scheme", FORMATS)
def test_a_model_without_data_is_listed(scheme: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(qlinear.QLinear(128, 256, scheme))
    assert qlinear.inspect(model).rows[0].scheme == scheme
