"""The CPU's products against float64 computed from the same packed weights."""

import pytest
import torch
from models import CPU_LEVELS, bits, random_packed, relative_error, run_python

import qlinear
from qlinear import cpu, cpu_sparse, reference

FORMATS = qlinear.FORMATS.values()
INT4 = [f for f in FORMATS if f.bits == 4]
N = 70
#: More tokens than the packed operators are given.
MANY = max(cpu.INT4_TOKENS, cpu.INT8_TOKENS) + 1
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
#: What runs on a CPU: the prepared layout and the plain one.
LAYOUTS = ["cpu", "plain"]


def check(x, packed):
    y = cpu.matmul(x, packed)
    assert y.dtype == x.dtype and y.shape == (x.shape[0], packed.out_features)
    if x.shape[0]:
        assert relative_error(y, reference.matmul(x, packed)) <= packed.format.max_error(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_products_are_close_to_float64(fmt, layout, dtype):
    for k in (fmt.group_size or 32, 200, 576):
        packed = random_packed(fmt, N, k).to_layout(layout)  # bfloat16 scales: the packed operators are reached
        for m in (0, 1, 5, 16, 33, MANY):
            check(torch.randn(m, k).to(dtype), packed)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_products_with_scales_of_the_input_s_dtype(fmt, dtype):
    packed = random_packed(fmt, N, 200, dtype).to_layout("cpu")
    for m in (1, 33, MANY):
        check(torch.randn(m, 200).to(dtype), packed)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_real_weights_and_one_sided_activations(fmt, layout, dtype):
    """What follows a SiLU or ReLU is not zero on average: an error in a zero point would add up over the row."""
    torch.manual_seed(0)
    weight = torch.randn(N, 576).mul_(0.03).add_(torch.randn(N, 1) * 0.02).bfloat16()
    packed = qlinear.pack(weight, fmt.name, layout=layout, prune="magnitude")
    for m in (1, 33, MANY):
        check(torch.nn.functional.silu(torch.randn(m, 576) * 2).to(dtype), packed)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_small_weights_keep_their_scales(fmt, layout, dtype):
    """Scales of 1e-6 are subnormal in float16; they must not be rounded to it on the way to a float16 product."""
    torch.manual_seed(0)
    packed = qlinear.pack(torch.randn(N, 200, dtype=torch.bfloat16) * 1e-4, fmt.name, layout, prune="magnitude")
    for m in (1, 33, MANY):
        check((torch.randn(m, 200) * 100).to(dtype), packed)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_the_named_operator_is_the_one_that_runs(fmt):
    """``path`` is what ``doctor`` prints: it must tell the truth."""
    packed = random_packed(fmt, 32, 128).to_layout("cpu")
    for dtype in (torch.bfloat16, torch.float32):
        for tokens in (1, MANY):
            name, reason = cpu.path(fmt, dtype, tokens)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                cpu.matmul(torch.randn(tokens, 128).to(dtype), packed)
            ran = {event.name for event in profile.events()}
            packed_operators = {"aten::_weight_int4pack_mm_for_cpu", "aten::_weight_int8pack_mm", "aten::_int_mm"}
            assert ran & packed_operators == ({name} if name.startswith("aten") else set())
            assert reason


@pytest.mark.parametrize("level", [level for level in CPU_LEVELS if level != "default"])
def test_int8_operator_is_memory_safe(level):
    """``_weight_int8pack_mm`` in bfloat16 reads past the end of a row unless K is padded: crashes, rubbish."""
    code = """
    import torch, qlinear
    from models import random_packed, relative_error
    from qlinear import cpu, reference
    fmt = qlinear.FORMATS["w8a16"]
    for k in (24, 33, 40, 100):
        for n in (1, 3, 33, 70, 257):
            plain = random_packed(fmt, n, k)
            for m in (1, 5, 8):
                x = torch.randn(m, k, dtype=torch.bfloat16)
                expected = reference.matmul(x, plain)
                first = None
                for _ in range(8):
                    packed = plain.to_layout("cpu")  # a new allocation: whatever lies behind it changes
                    poison = torch.full((n * 32,), torch.nan)
                    y = cpu.matmul(x, packed)
                    del poison
                    assert relative_error(y, expected) <= 6e-3, (k, n, m)
                    first = y if first is None else first
                    assert torch.equal(y, first), (k, n, m)
    print(torch.backends.cpu.get_cpu_capability(), "done")
    """
    assert run_python(code, ATEN_CPU_CAPABILITY=level, OMP_NUM_THREADS="1").split() == [level.upper(), "done"]


@pytest.mark.parametrize("level", CPU_LEVELS)
def test_int4_products_at_every_instruction_set(level):
    code = """
    import torch, qlinear
    from models import random_packed, relative_error
    from qlinear import cpu, reference
    for fmt in qlinear.format.DENSE.values():
        for n, k in ((1, 24), (16, 100), (70, 200), (144, 33)):
            packed = random_packed(fmt, n, k).to_layout("cpu")
            x = torch.randn(34, k, dtype=torch.bfloat16)
            for m in (1, 5, 17):
                y = torch.cat([cpu.matmul(rows, packed) for rows in x.split(m)])
                assert relative_error(y, reference.matmul(x, packed)) <= 6e-3, (fmt, n, k, m)
    print("done")
    """
    assert run_python(code, ATEN_CPU_CAPABILITY=level, OMP_NUM_THREADS="1").strip() == "done"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_strided_inputs(fmt, layout):
    packed = random_packed(fmt, N, 200).to_layout(layout)
    for dtype in DTYPES:
        for m in (1, 33, MANY):
            wide = torch.randn(m, 400).to(dtype)
            for x in (wide[:, ::2], torch.randn(200, m).to(dtype).t(), wide[:, 100:300], wide[:1, :200].expand(m, 200)):
                check(x, packed)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_every_element_of_the_output_is_written(fmt, layout, monkeypatch):
    """Uninitialized memory is NaN here: an element that nobody wrote would show."""
    packed = random_packed(fmt, N, 200).to_layout(layout)
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def poison(t):
        return t.fill_(torch.nan) if t.is_floating_point() else t.fill_(77)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))
    for dtype in DTYPES:
        for m in (1, 33, MANY):
            check(torch.randn(m, 200).to(dtype), packed)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_the_inputs_are_not_written(fmt, layout):
    packed = random_packed(fmt, N, 200).to_layout(layout)
    tensors = [t for t in packed.tensors if t is not None]
    for m in (1, 33, MANY):
        x = torch.randn(m, 200, dtype=torch.bfloat16)
        before = [bits(t).clone() for t in (x, *tensors)]
        cpu.matmul(x, packed)
        assert all(torch.equal(bits(t), b) for t, b in zip((x, *tensors), before, strict=True))


@pytest.mark.parametrize("m", [5, 33])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_row_does_not_depend_on_its_neighbours(fmt, dtype, m):
    packed = random_packed(fmt, N, 200).to_layout("cpu")
    x = torch.randn(m, 200).to(dtype)
    for row in (0, m - 1):
        other = (torch.randn(m, 200) * 50).to(dtype)
        other[row] = x[row]
        assert torch.equal(bits(cpu.matmul(x, packed)[row]), bits(cpu.matmul(other, packed)[row]))


@pytest.mark.parametrize("bad", [float("nan"), -float("inf")], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_non_finite_token_gives_a_non_finite_row_and_touches_no_other(fmt, layout, bad):
    # PyTorch's own bfloat16 F.linear leaks NaN into the row above on AMX where K % 32 != 0 (K = 200, M = 33).
    k = 200 if fmt.name == "w8a8" else 192
    packed = random_packed(fmt, N, k).to_layout(layout)
    for dtype in DTYPES:
        for m in (5, 33):
            x = torch.randn(m, k).to(dtype)
            clean = cpu.matmul(x, packed)
            x[m // 2, 7] = bad
            y = cpu.matmul(x, packed)
            others = torch.arange(m) != m // 2
            assert torch.equal(bits(y[others]), bits(clean[others]))
            row, weight = y[m // 2], packed.dequantize(torch.float32)[:, 7]
            assert not torch.isfinite(row[weight != 0]).any()  # 0 * inf is NaN too, but a rounded 0 may be skipped


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_zero_rows_give_zero(fmt):
    packed = random_packed(fmt, N, 200).to_layout("cpu")
    for dtype in DTYPES:
        x = torch.randn(5, 200).to(dtype)
        x[2] = 0
        y = cpu.matmul(x, packed)
        assert not y[2].any() and torch.isfinite(y).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_activations_are_rounded_to_127_levels(dtype):
    x = torch.randn(9, 100).to(dtype)
    x[4] = 0
    values, scale = cpu.quantize_activations(x)
    assert values.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (9, 1)
    assert values.int().abs().amax(1).tolist() == [127] * 4 + [0] + [127] * 4
    assert ((values.double() * scale.double() - x.double()).abs() <= scale.double() * 0.5001).all()
    assert torch.isfinite(scale).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_activations_are_rounded_to_e4m3(dtype):
    x = torch.randn(9, 100).to(dtype)
    x[4] = 0
    values, scale = cpu.quantize_activations(x, "e4m3")
    assert values.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and scale.shape == (9, 1)
    assert values.float().abs().amax(1).tolist() == [448] * 4 + [0] + [448] * 4
    # Half of an eighth of a number, or of the even grid below 2**-6.
    step = (values.double().abs() * scale).clamp(min=2**-6 * scale.double()) / 8
    assert ((values.double() * scale.double() - x.double()).abs() <= step * 0.5001).all()


@pytest.mark.parametrize("largest", [1e-45, 1e-38, 1e-29, 1.0, 1e30])
def test_activations_at_the_ends_of_float32(largest):
    """No overflow on the way to a result that float32 can hold."""
    x = torch.linspace(-1, 1, 65)[None] * largest
    values, scale = cpu.quantize_activations(x)
    assert torch.isfinite(scale).all() and values.abs().max() <= 127
    packed = random_packed(qlinear.FORMATS["w8a8"], N, 65).to_layout("cpu")
    expected = x.double() @ packed.dequantize(torch.float64).t()
    # What is smaller than 1e-30 counts as zero.
    assert (cpu.matmul(x, packed).double() - expected).abs().max() <= max(0.02 * float(expected.abs().max()), 2e-30)


def test_more_rows_than_a_tile(monkeypatch):
    """The tiled product in steps of one, three and all rows is the same product."""
    for fmt in FORMATS:
        packed = random_packed(fmt, N, 200)
        x = torch.randn(33, 200)
        whole = reference.matmul(x, packed)
        for weights in (1, 600):
            monkeypatch.setattr(cpu, "_TILE_WEIGHTS", weights)
            monkeypatch.setattr(cpu_sparse, "_TILE_WEIGHTS", weights)
            assert relative_error(cpu.matmul(x, packed), whole) <= fmt.max_error(torch.float32)
            assert relative_error(cpu.matmul(x, packed.to_layout("cpu")), whole) <= fmt.max_error(torch.float32)


def test_reference_is_the_product_of_the_dequantized_weight():
    torch.manual_seed(0)
    for fmt in FORMATS:
        packed, x, bias = random_packed(fmt, 9, 40), torch.randn(2, 3, 40), torch.randn(9)
        y = reference.matmul(x, packed, bias)
        assert y.dtype == torch.float64 and y.shape == (2, 3, 9)
        expected = x.double() @ packed.dequantize(torch.float64).t() + bias.double()
        if fmt.quantized_activations:
            assert 0 < relative_error(y, expected) < (0.05 if fmt.number == "e4m3" else 0.02)
        else:
            torch.testing.assert_close(y, expected)


@pytest.mark.parametrize(("n", "k"), [(4, 1), (1, 1), (300, 1), (4, 2), (3, cpu._INT32_COLUMNS + 5000)])
def test_int8_products_of_very_few_and_very_many_columns(n, k):
    """One column, which _int_mm misreads; and all numbers the largest there are, whose sums do not fit int32."""
    weight = torch.randn(n, k) if k < 9 else torch.ones(n, k)
    packed = qlinear.pack(weight, "w8a8", layout="cpu")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = (torch.randn(3, k) if k < 9 else torch.full((3, k), 1 / 8)).to(dtype)
        assert relative_error(cpu.matmul(x, packed), reference.matmul(x, packed)) <= packed.format.max_error(dtype)
