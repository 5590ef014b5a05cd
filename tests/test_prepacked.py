"""w8a8 on a CPU: the layouts in FBGEMM's and oneDNN's own order, and what takes their place where there is neither."""

from __future__ import annotations

import copy
import gc
import io
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import random_packed, relative_error, same_bits
from torch import nn

import qlinear
from qlinear import cpu, doctor, ops, prepacked, reference
from qlinear.layout import native_layout

W8A8 = qlinear.FORMATS["w8a8"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")


@pytest.fixture(params=prepacked.OPERATORS)
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each layout in turn as the one of this machine, for small weights too."""
    if not prepacked.supports(request.param, W8A8, 64):
        pytest.skip("a CPU without VNNI")
    monkeypatch.setattr(prepacked, "native", lambda fmt, n, k: request.param if fmt is W8A8 else None)
    return str(request.param)


def layer(n: int = 64, k: int = 96) -> qlinear.QLinear:
    torch.manual_seed(0)
    return qlinear.QLinear.from_float(nn.Linear(k, n).bfloat16(), "w8a8")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 31, 200, 576])
@pytest.mark.parametrize("n", [1, 70])
def test_there_and_back_and_the_product(layout: str, n: int, k: int, dtype: torch.dtype) -> None:
    plain = random_packed(W8A8, n, k, dtype)
    there = plain.to_layout(layout)
    assert there.layout == layout and there.nbytes == n * k + plain.scale.nbytes
    for back in (there, there.to_layout("cpu"), there.to_layout("triton").to_layout(layout), copy.deepcopy(there)):
        again = back.to_layout("plain")
        assert same_bits(again.weight, plain.weight) and same_bits(again.scale, plain.scale)
    for m in (0, 1, 2, 5, 33):
        x = torch.randn(m, k).to(dtype)
        y = cpu.matmul(x, there)
        assert y.dtype == dtype and y.shape == (m, n)
        assert m == 0 or relative_error(y, reference.matmul(x, plain)) <= W8A8.max_error(dtype)
        # Integer sums are the same in any order; what they are multiplied by is not.
        assert m == 0 or relative_error(y, cpu.matmul(x, there.to_layout("cpu")).double()) <= 2 * torch.finfo(dtype).eps


def test_sums_at_the_end_of_what_fits(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All products at their largest, in as many columns as the layout takes."""
    columns = 1 << 16
    weight = torch.ones(2, columns)
    weight[1] = -1
    packed = qlinear.pack(weight, "w8a8", layout="plain")
    for tokens in (1, 3):
        y = cpu.matmul(torch.ones(tokens, columns), packed.to_layout(layout))
        assert torch.allclose(y, torch.tensor([columns, -columns]).float().expand(tokens, 2), rtol=1e-2)
    monkeypatch.undo()
    assert native_layout(CPU, W8A8, 128, columns) in prepacked.OPERATORS
    assert native_layout(CPU, W8A8, 128, columns + 1) == "cpu"


def test_a_row_does_not_depend_on_the_others(layout: str) -> None:
    there = random_packed(W8A8, 70, 200).to_layout(layout)
    x = torch.randn(33, 200).bfloat16()
    whole = cpu.matmul(x, there)
    for m in (1, 2, 5):
        assert same_bits(cpu.matmul(x[:m], there), whole[:m])
    x[1, 3] = torch.nan
    x[2, 3] = torch.inf
    spoiled = cpu.matmul(x, there)
    assert not spoiled[1:3].isfinite().any()
    assert same_bits(spoiled[3:], whole[3:]) and same_bits(spoiled[:1], whole[:1])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0, 1e-40, 1.0, 1e30], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_token_has_the_bits_that_it_has_among_others(layout: str, dtype: torch.dtype, value: float) -> None:
    """Its scale is a Python number."""
    there = random_packed(W8A8, 70, 200, dtype).to_layout(layout)
    # Halves of the largest magnitude end at 63.5 or next to it, and are rounded to either side.
    x = torch.randint(-8, 9, (20, 200)) / 8 * value
    x[:, 3] = value
    x = x.to(dtype)
    whole = cpu.matmul(x, there)
    for i in range(20):
        one = cpu.matmul(x[i : i + 1], there)
        finite = math.isfinite(x[0, 3])
        assert (one.isfinite() == finite).all() and (not finite or same_bits(one, whole[i : i + 1]))


@pytest.mark.parametrize("tokens", [1, 40])
def test_the_named_operator_is_the_one_that_runs(layout: str, tokens: int) -> None:
    q = layer()
    assert q.layout == layout
    name, _ = cpu.path(W8A8, torch.bfloat16, tokens, q.layout, q.in_features)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        q(torch.randn(tokens, q.in_features).bfloat16())
    ran = {event.name for event in profile.events()}
    assert name in ran and "aten::_int_mm" not in ran
    assert name in str(qlinear.inspect(nn.Sequential(q)))


def test_doctor_checks_and_tells_what_a_large_layer_takes() -> None:
    name, _ = cpu.path(W8A8, torch.bfloat16, 1, native_layout(CPU, W8A8, 4096, 4096))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        check = doctor._check(W8A8, "cpu", torch.bfloat16)
    assert check.paths == {1: name} and check.ok
    assert name in {event.name for event in profile.events()}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gradients_go_through_it(layout: str, compiled: bool) -> None:
    q, x = layer(), torch.randn(3, 96, dtype=torch.bfloat16, requires_grad=True)
    (torch.compile(q, backend="aot_eager", fullgraph=True) if compiled else q)(x).sum().backward()
    assert relative_error(x.grad, q.dequantize(torch.float64).sum(0).expand(3, -1)) <= 6e-3


def test_what_copies_a_layer_keeps_its_layout(layout: str) -> None:
    q, x = layer(), torch.randn(3, 96).bfloat16()
    wanted = q(x)
    again = layer()
    again.load_state_dict(q.state_dict())
    stream = io.BytesIO()
    torch.save(q, stream)
    stream.seek(0)
    for other in (copy.deepcopy(q), again, torch.load(stream, weights_only=False), copy.deepcopy(q).to("cpu")):
        assert other.layout == layout and same_bits(other(x), wanted)
    assert q.state_dict()["weight_packed"].dtype == torch.int32


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jit's own
def test_as_it_is_it_cannot_be_exported(layout: str) -> None:
    q, x = layer(), torch.randn(3, 96).bfloat16()
    for export in (torch.export.export, torch.jit.trace):
        with torch.no_grad(), pytest.raises(ValueError, match=r"call qlinear.prepare\(model, layout='cpu'\) first"):
            export(q, (x,))


def test_nothing_that_others_may_write_to_stands_for_it(layout: str) -> None:
    q, x = layer(), torch.randn(3, 96).bfloat16()
    wanted = q(x)
    assert not any(prepacked.is_made(tensor) for tensor in (*q.buffers(), *q.parameters(), *q.state_dict().values()))
    q.weight_packed.zero_()
    assert same_bits(q(x), wanted) and q.nbytes == 64 * 96 + q.weight_scale.nbytes
    q.prepare(layout="cpu")
    assert q.weight_opaque is None and q.weight_packed.shape == (64, 96) and q.layout == "cpu"


def test_a_weight_lives_as_long_as_its_layer(layout: str) -> None:
    gc.collect()
    before = len(prepacked._made)
    q = layer()
    weight = q.packed.weight.detach()
    assert len(prepacked._made) == before + 1 and prepacked.layout_of(weight) == layout
    q.prepare("cpu")
    assert len(prepacked._made) == before
    with pytest.raises(RuntimeError, match="no longer holds"):
        cpu.matmul(torch.randn(1, 96), qlinear.PackedWeight(weight, q.weight_scale, None, W8A8, 64, 96))


@pytest.mark.parametrize("tokens", [1, 3])
def test_layers_compiled_one_by_one_share_their_code(layout: str, tokens: int) -> None:
    layers = [layer(), qlinear.QLinear.from_float(nn.Linear(96, 64).bfloat16(), "w8a8")]
    x = torch.randn(tokens, 96).bfloat16()
    wanted = [q(x) for q in layers]
    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(lambda q, x: q(x), backend="aot_eager", fullgraph=True)
        for q, y in zip(layers, wanted, strict=True):
            assert same_bits(compiled(q, x), y)


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_the_operator_of_compiled_code(layout: str, tokens: int) -> None:
    packed = layer().packed
    args = (torch.randint(-127, 128, (tokens, 96)).float(), packed.weight, packed.scale)
    torch.library.opcheck(torch.ops.qlinear.prepacked_product.default, args)
    wanted = args[0].double() @ packed.dequantize(torch.float64).t()
    torch.testing.assert_close(torch.ops.qlinear.prepacked_product(*args).double(), wanted, rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("name", prepacked.OPERATORS)
def test_other_weights_have_no_such_layout(name: str) -> None:
    for scheme in ("w8a16", "w4a8", "fp8", "w4a16-2:4", "w8a16-block64"):
        packed = random_packed(qlinear.FORMATS[scheme], 64, 128)
        with pytest.raises(ValueError, match=f"{name!r} is for w8a8 .* got {scheme} 64 x 128"):
            packed.to_layout(name)
        assert packed.to_layout().layout not in prepacked.OPERATORS


@pytest.mark.parametrize(
    ("amx", "fbgemm", "side", "wanted"),
    [(True, True, 2048, "onednn"), (True, True, 2047, "cpu"), (False, True, 725, "fbgemm"), (False, True, 724, "cpu"),
     (False, False, 2048, "onednn"), (False, False, 2047, "cpu")],
)  # fmt: skip
def test_which_is_for_which_machine(
    amx: bool, fbgemm: bool, side: int, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepacked, "VNNI", True)
    monkeypatch.setattr(prepacked, "AMX", amx)
    monkeypatch.setattr(prepacked, "_fbgemm_is_exact", lambda: fbgemm)
    assert native_layout(CPU, W8A8, side, side) == wanted


def test_a_machine_without_either_has_the_cpu_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepacked, "VNNI", False)
    monkeypatch.setattr(prepacked, "_fbgemm_is_exact", lambda: False)
    assert layer(1024, 512).layout == "cpu"
    for name in prepacked.OPERATORS:
        with pytest.raises(ValueError, match=f"{name!r} is for w8a8"):
            random_packed(W8A8, 64, 128).to_layout(name)


def test_the_engine_that_a_user_chose_stays(layout: str) -> None:
    before = torch.backends.quantized.engine
    try:
        for name in torch.backends.quantized.supported_engines:
            torch.backends.quantized.engine = name
            assert layer().layout == layout and torch.backends.quantized.engine == name
    finally:
        torch.backends.quantized.engine = before


@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512_vnni"])
def test_fbgemm_without_vnni_is_not_taken(isa: str) -> None:
    """Its sums of two products saturate in int16 there. The variable is FBGEMM's own."""
    code = "from qlinear import prepacked; import sys; sys.exit(10 + prepacked._fbgemm_is_exact())"
    environment = {**os.environ, "FBGEMM_ENABLE_INSTRUCTIONS": isa.upper()}
    there = isa == "avx512_vnni" and prepacked._fbgemm_is_exact()
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 10 + there


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
