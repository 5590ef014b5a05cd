"""w8a8 on a CPU: the layout in oneDNN's order, and what takes its place on machines that have none."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from models import random_packed, relative_error, same_bits
from torch import nn

import qlinear
from qlinear import cpu, cpu_layout, doctor, ops, reference
from qlinear.layout import native_layout

W8A8 = qlinear.FORMATS["w8a8"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")
needs_vnni = pytest.mark.skipif(not cpu_layout.VNNI, reason="a CPU without VNNI")


@pytest.fixture(autouse=True)
def small_weights_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small layers stay in the ``cpu`` layout, because they are faster there."""
    monkeypatch.setattr(cpu_layout, "_ONEDNN_WEIGHTS", 0)


def layer(n: int = 64, k: int = 96) -> qlinear.QLinear:
    torch.manual_seed(0)
    return qlinear.QLinear.from_float(nn.Linear(k, n).bfloat16(), "w8a8")


@needs_vnni
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 31, 200, 576])
@pytest.mark.parametrize("n", [1, 70])
def test_there_and_back_and_the_product(n: int, k: int, dtype: torch.dtype) -> None:
    plain = random_packed(W8A8, n, k, dtype)
    there = plain.to_layout("onednn")
    assert there.layout == "onednn" and there.weight.nbytes == n * k
    for back in (there, there.to_layout("cpu"), there.to_layout("triton").to_layout("onednn")):
        again = back.to_layout("plain")
        assert same_bits(again.weight, plain.weight) and same_bits(again.scale, plain.scale)
    for m in (0, 1, 2, 5, 33):
        x = torch.randn(m, k).to(dtype)
        y = cpu.matmul(x, there)
        assert y.dtype == dtype and y.shape == (m, n)
        assert m == 0 or relative_error(y, reference.matmul(x, plain)) <= W8A8.max_error(dtype)
        # Integer sums are the same in any order; what they are multiplied by is not.
        assert m == 0 or relative_error(y, cpu.matmul(x, there.to_layout("cpu")).double()) <= torch.finfo(dtype).eps


@needs_vnni
def test_sums_at_the_end_of_what_fits() -> None:
    """All products at their largest, in as many columns as the layout takes."""
    columns = 1 << 16
    weight = torch.ones(2, columns)
    weight[1] = -1
    packed = qlinear.pack(weight, "w8a8", layout="plain")
    y = cpu.matmul(torch.ones(3, columns), packed.to_layout("onednn"))
    assert torch.allclose(y, torch.tensor([columns, -columns]).float().expand(3, 2), rtol=1e-2)
    assert native_layout(CPU, W8A8, 2, columns) == "onednn" and native_layout(CPU, W8A8, 2, columns + 1) == "cpu"


@needs_vnni
def test_a_row_does_not_depend_on_the_others() -> None:
    packed = random_packed(W8A8, 70, 200).to_layout("onednn")
    x = torch.randn(33, 200).bfloat16()
    whole = cpu.matmul(x, packed)
    for m in (1, 2, 5):
        assert same_bits(cpu.matmul(x[:m], packed), whole[:m])
    x[1, 3] = torch.nan
    x[2, 3] = torch.inf
    spoiled = cpu.matmul(x, packed)
    assert not spoiled[1:3].isfinite().any()
    assert same_bits(spoiled[3:], whole[3:]) and same_bits(spoiled[:1], whole[:1])


@needs_vnni
@pytest.mark.parametrize("tokens", [1, 40])
def test_the_named_operator_is_the_one_that_runs(tokens: int) -> None:
    q = layer()
    assert q.layout == "onednn"
    name, _ = cpu.path(W8A8, torch.bfloat16, tokens, q.layout, q.in_features)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        q(torch.randn(tokens, q.in_features).bfloat16())
    ran = {event.name for event in profile.events()}
    assert name in ran and "aten::_int_mm" not in ran
    assert name in str(qlinear.inspect(nn.Sequential(q)))


@needs_vnni
def test_doctor_checks_and_tells_what_a_large_layer_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        check = doctor._check(W8A8, "cpu", torch.bfloat16)
    assert check.paths == {1: cpu.PREPACKED} and check.ok
    assert cpu.PREPACKED in {event.name for event in profile.events()}


@needs_vnni
def test_gradients_go_through_it() -> None:
    q, x = layer(), torch.randn(3, 96, dtype=torch.bfloat16, requires_grad=True)
    q(x).sum().backward()
    assert relative_error(x.grad, q.dequantize(torch.float64).sum(0).expand(3, -1)) <= 6e-3


@needs_vnni
def test_what_copies_a_layer_keeps_its_layout() -> None:
    q, x = layer(), torch.randn(3, 96).bfloat16()
    wanted = q(x)
    again = layer()
    again.load_state_dict(q.state_dict())
    stream = io.BytesIO()
    torch.save(q, stream)
    stream.seek(0)
    for other in (copy.deepcopy(q), again, torch.load(stream, weights_only=False), copy.deepcopy(q).to("cpu")):
        assert other.layout == "onednn" and same_bits(other(x), wanted)
    assert q.state_dict()["weight_packed"].dtype == torch.int32


@needs_vnni
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jit's own
def test_as_it_is_it_cannot_be_exported() -> None:
    q, x = layer(), torch.randn(3, 96).bfloat16()
    for export in (torch.export.export, torch.jit.trace):
        with torch.no_grad(), pytest.raises(ValueError, match=r"call qlinear.prepare\(model, layout='cpu'\) first"):
            export(q, (x,))


@needs_vnni
def test_nothing_that_others_may_write_to_is_opaque() -> None:
    """``zero_`` of an opaque int8 tensor writes four times its bytes."""
    q, x = layer(), torch.randn(3, 96).bfloat16()
    wanted = q(x)
    assert not any(tensor.is_mkldnn for tensor in (*q.buffers(), *q.parameters(), *q.state_dict().values()))
    q.weight_packed.zero_()
    assert same_bits(q(x), wanted) and q.nbytes == q.packed.weight.nbytes + q.weight_scale.nbytes
    q.prepare(layout="cpu")
    assert q.weight_opaque is None and q.weight_packed.shape == (64, 96) and q.layout == "cpu"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jit's own
def test_in_the_cpu_layout_it_can_be_exported_traced_and_shared(tmp_path: Path) -> None:
    model, x = nn.Sequential(layer()), torch.randn(3, 96).bfloat16()
    assert qlinear.prepare(model, layout="cpu") is model and model[0].layout == "cpu"
    with torch.no_grad():
        wanted = model(x)
        torch.export.save(torch.export.export(model, (x,), strict=True), tmp_path / "model.pt2")
        assert same_bits(torch.export.load(tmp_path / "model.pt2").module()(x), wanted)
        torch.jit.save(torch.jit.trace(model, x), tmp_path / "model.pt")
        assert same_bits(torch.jit.load(tmp_path / "model.pt")(x), wanted)
    model.share_memory()
    assert model[0].weight_packed.is_shared() and model[0].layout == "cpu"


def test_other_weights_have_no_such_layout() -> None:
    for scheme in ("w8a16", "w4a8", "fp8", "w4a16-2:4", "w8a16-block64"):
        packed = random_packed(qlinear.FORMATS[scheme], 64, 128)
        with pytest.raises(ValueError, match=f"'onednn' is for w8a8 .* got {scheme} 64 x 128"):
            packed.to_layout("onednn")
        assert packed.to_layout().layout != "onednn"


@needs_vnni
def test_it_is_for_large_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert native_layout(CPU, W8A8, 2048, 2048) == "onednn" and native_layout(CPU, W8A8, 2048, 2047) == "cpu"
    assert layer().layout == "cpu"


def test_a_machine_without_it_has_the_cpu_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_layout, "VNNI", False)
    assert layer().layout == "cpu"
    with pytest.raises(ValueError, match="'onednn' is for w8a8"):
        random_packed(W8A8, 64, 128).to_layout("onednn")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["cpu", "plain"])
def test_where_sums_of_int8_saturate_they_are_made_in_float32(
    layout: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_SATURATES", True)
    packed = random_packed(W8A8, 70, 576).to_layout(layout)
    for m in (1, 16, 17, 70):
        x = torch.randn(m, 576).to(dtype)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            y = ops.linear(x, packed)
        assert relative_error(y, reference.matmul(x, packed)) <= W8A8.max_error(dtype)
        ran = {event.name for event in profile.events()}
        assert "aten::_int_mm" not in ran
        name, _ = cpu.path(W8A8, dtype, m, layout, 576)
        few = layout == "cpu" and dtype == torch.bfloat16 and m <= cpu.INT8_TOKENS
        assert name == ("aten::_weight_int8pack_mm" if few else "dequantize + F.linear")
        assert ("aten::_weight_int8pack_mm" in ran) == few
