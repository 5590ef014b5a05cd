"""The matmul kernel against float64 on the same packed weights, in Triton's interpreter or on the GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import DTYPES, coded_weight, dtype_id, error, random_tokens, random_weight, weight64

from qlinear.format import DENSE, FORMATS
from qlinear.kernels import matmul as module
from qlinear.kernels import runtime
from qlinear.kernels.configs import Config
from qlinear.kernels.matmul import matmul, matmul_tensors

pytestmark = pytest.mark.usefixtures("poisoned_empty")

FLOAT_FORMATS = [fmt for fmt in DENSE.values() if not fmt.quantized_activations]
every_format = pytest.mark.parametrize("fmt", FLOAT_FORMATS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)

#: Scales on the sum and scales on the weight, whole and split.
SMALL = Config(block_m=16, block_n=64, num_warps=4, num_stages=2)
LARGE = Config(block_m=128, block_n=64, num_warps=4, num_stages=2)
SPLIT = replace(SMALL, split_k=2)
#: Scales on the sum of every group size, and on the weight of groups of 32 and 64: in float32 too these fit the shared
#: memory of every GPU.
FEW, MEDIUM = replace(SMALL, block_m=8), replace(SMALL, block_m=32)
#: Too few warps for a warpgroup: planes are multiplied apart, scales on the weight. A tile of 8 has them on the sum.
APART = Config(block_m=64, block_n=64, num_warps=2, num_stages=2)


def check(x, packed, bias=None, config=None):
    """The kernel's result is within the format's bound of float64."""
    y = matmul(x, packed, bias, config)
    reference = x.double() @ weight64(packed).t() + (0 if bias is None else bias.double())
    assert y.dtype == x.dtype
    assert y.shape == reference.shape
    assert torch.isfinite(y).all()
    assert error(y, reference) <= packed.format.max_error(x.dtype)
    return y


@every_dtype
@every_format
def test_every_format_and_dtype(fmt, dtype, device):
    packed = random_weight(fmt, 70, 200, torch.float16 if dtype == torch.float32 else dtype, device)
    bias = torch.linspace(-3, 3, 70, device=device).to(dtype)
    check(random_tokens(5, 200, dtype, device), packed, bias)


@pytest.mark.parametrize(("m", "k"), [(1, 576), (16, 32), (33, 200), (130, 64)])
@every_format
def test_odd_shapes(fmt, m, k, device):
    check(random_tokens(m, k, torch.float16, device), random_weight(fmt, 70, k, torch.float16, device))


@pytest.mark.parametrize("config", [SMALL, LARGE, SPLIT, APART], ids=str)
@every_format
def test_scale_on_the_sum_or_on_the_weight(fmt, config, device):
    check(
        random_tokens(5, 200, torch.float16, device), random_weight(fmt, 70, 200, torch.float16, device), config=config
    )


@pytest.mark.parametrize("config", [FEW, MEDIUM], ids=["sum", "weight"])
@pytest.mark.parametrize("scale_dtype", DTYPES, ids=lambda dtype: f"scale-{dtype_id(dtype)}")
@every_dtype
@pytest.mark.parametrize("name", ["w4a16-g32", "w8a16", "w4a16-g64-asym"])
def test_scales_keep_their_own_dtype(name, dtype, scale_dtype, config, device):
    """The scale is not rounded to the dtype of x on its way."""
    fmt = DENSE[name]
    if scale_dtype == torch.float32 and not fmt.symmetric:
        pytest.skip("scales that share a word with their zero point are 16 bit wide")
    scale = torch.rand(64, fmt.groups(128), generator=torch.Generator().manual_seed(2)) + 0.5
    check(
        random_tokens(3, 128, dtype, device), coded_weight(fmt, 64, 128, scale.to(scale_dtype), device), config=config
    )


def test_no_tokens(device):
    packed = random_weight(DENSE["w4a16"], 70, 200, torch.float16, device)
    assert matmul(torch.empty(0, 200, dtype=torch.float16, device=device), packed).shape == (0, 70)
    assert matmul(torch.empty(2, 0, 200, dtype=torch.float16, device=device), packed).shape == (2, 0, 70)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t().contiguous().t(),
        lambda x: x.repeat_interleave(2, 0)[::2],
        lambda x: torch.nn.functional.pad(x, (3, 5))[:, 3:-5],
        lambda x: x.repeat_interleave(2, 1)[:, ::2],
        lambda x: x[:1].expand(4, -1),
        lambda x: x.view(2, 2, -1).transpose(0, 1),
    ],
    ids=["transposed", "every-other-row", "unaligned-columns", "every-other-column", "one-row-expanded", "three-axes"],
)
def test_strides_of_x(view, device):
    x = view(random_tokens(4, 200, torch.float16, device))
    check(x, random_weight(DENSE["w4a16"], 70, 200, torch.float16, device))


@pytest.mark.parametrize("split_k", [2, 5])
@pytest.mark.parametrize("name", ["w4a16", "w4a16-channel-asym", "w8a16-g32"])
def test_split_k_is_deterministic_and_leaves_its_counters_at_zero(name, split_k, device):
    packed = random_weight(DENSE[name], 70, 576, torch.float16, device)
    x = random_tokens(17, 576, torch.float16, device)
    first = check(x, packed, config=replace(SMALL, split_k=split_k))
    assert torch.equal(matmul(x, packed, config=replace(SMALL, split_k=split_k)), first)
    assert not runtime.counters(device).any()


@pytest.mark.parametrize(("k", "parts"), [(128, 2), (512, 3), (300, 4), (200, 0)])
@pytest.mark.parametrize("name", ["w4a16", "w8a8", "w4a16-2:4"])
def test_a_part_of_k_without_a_block_is_refused(name, k, parts, device):
    """Its program would read scales past their end."""
    packed = random_weight(FORMATS[name], 70, k, torch.float16, device)
    message = f"16x64-w4-s2-k{parts} cannot be used: {-(-k // 128)} blocks along K cannot be cut into {parts} parts"
    with pytest.raises(ValueError, match=message):
        matmul(random_tokens(3, k, torch.float16, device), packed, config=replace(SMALL, split_k=parts))


@pytest.mark.parametrize("name", ["w4a16", "w4a16-asym", "w8a16-g32", "w4a8"])
def test_where_a_part_of_k_has_no_block_nothing_past_the_scales_is_read(name, device, monkeypatch):
    if not runtime.target_of(device).interpreted:
        pytest.skip("the interpreter tells what addresses are read")
    from triton.runtime.interpreter import InterpreterBuilder

    packed, x = random_weight(DENSE[name], 64, 128, torch.float16, device), random_tokens(1, 128, torch.float16, device)
    whole, size = matmul(x, packed, config=SMALL), packed.scale.numel()
    room = torch.zeros(size + 4096, dtype=packed.scale.dtype)
    packed = replace(packed, scale=room[:size].view_as(packed.scale).copy_(packed.scale))
    load, read, end = InterpreterBuilder.create_masked_load, [], room[size:].data_ptr()

    def seen(builder, pointers, mask, *rest):
        read.extend(pointers.data[mask.data].reshape(-1).tolist())
        return load(builder, pointers, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", seen)
    monkeypatch.setattr(module, "check_parts", lambda *_: None)
    assert torch.equal(matmul(x, packed, config=SPLIT), whole)
    assert any(end - packed.scale.nbytes <= address < end for address in read)
    assert not [address for address in read if end <= address < end + 8192]


def test_what_is_not_split_touches_no_partial_sums(device):
    packed = random_weight(DENSE["w4a16"], 70, 576, torch.float16, device)
    x = random_tokens(17, 576, torch.float16, device)
    whole = check(x, packed, config=SMALL)
    stand_in = runtime.unused(x.device, torch.float32)
    assert stand_in is runtime.unused(x.device, torch.float32)
    before = stand_in.fill_(float("nan")).clone()
    assert torch.equal(matmul(x, packed, config=SMALL), whole)
    assert torch.equal(stand_in.view(torch.int32), before.view(torch.int32))


def test_a_row_does_not_depend_on_its_neighbours(device):
    packed = random_weight(DENSE["w4a16"], 70, 576, torch.float16, device)
    x = random_tokens(8, 576, torch.float16, device)
    y = matmul(x, packed)
    assert torch.equal(matmul(x[:3], packed), y[:3])
    assert torch.equal(matmul(x[7:], packed), y[7:])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("config", [SMALL, LARGE, SPLIT, APART], ids=str)
def test_what_is_not_finite_stays_in_its_row(config, device):
    packed = random_weight(DENSE["w4a16"], 70, 200, torch.float16, device)
    x = random_tokens(5, 200, torch.float16, device)
    clean = matmul(x, packed, config=config)
    x[1, 17], x[3, 199] = float("nan"), float("inf")
    y = matmul(x, packed, config=config)
    assert torch.equal(y[[0, 2, 4]], clean[[0, 2, 4]])
    assert torch.isnan(y[1]).all()
    assert not torch.isfinite(y[3]).any()


@pytest.mark.parametrize("bias_dtype", DTYPES, ids=dtype_id)
def test_bias_of_any_dtype_and_stride(bias_dtype, device):
    bias = torch.linspace(-3, 3, 140, device=device).to(bias_dtype)[::2]
    check(
        random_tokens(2, 200, torch.float16, device),
        random_weight(DENSE["w8a16"], 70, 200, torch.float16, device),
        bias,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 199)}, "last axis must be in_features = 200"),
        ({"x": torch.zeros(2, 200, dtype=torch.float64)}, "got torch.float64"),
        ({"x": torch.zeros(())}, "in_features = 200"),
        ({"bias": torch.zeros(71)}, r"bias must be floats \(70,\)"),
        ({"bias": torch.zeros(70, dtype=torch.int32)}, "got torch.int32"),
        ({"layout": "plain"}, "layout 'triton', got 'plain'"),
        ({"device": "meta"}, "x is on"),
    ],
    ids=["in_features", "dtype", "scalar", "bias-shape", "bias-dtype", "layout", "device"],
)
def test_errors_name_what_was_got_and_what_was_wanted(change, message, device):
    packed = random_weight(DENSE["w4a16"], 70, 200, torch.float16, device)
    x = change.get("x", torch.zeros(2, 200)).to(device)
    bias = change["bias"].to(device) if "bias" in change else None
    if "layout" in change:
        packed = packed.to_layout(change["layout"])
    if "device" in change:
        packed = replace(packed, weight=packed.weight.to("meta"), scale=packed.scale.to("meta"))
    with pytest.raises(ValueError, match=message):
        matmul(x, packed, bias)


def test_errors_of_bare_tensors(device):
    packed = random_weight(DENSE["w4a16"], 70, 200, torch.float16, device)
    x = torch.zeros(2, 200, device=device)
    with pytest.raises(ValueError, match=r"int16 \(1, 2, 64, 32\), got torch.int16 \(2, 2, 64, 32\)"):
        matmul_tensors(x, packed.weight, packed.scale, packed.format, 64)
    with pytest.raises(ValueError, match=r"floats \(2, 2, 64\), got torch.float16 \(2, 1, 64\)"):
        matmul_tensors(x, packed.weight, packed.scale[:, :1].contiguous(), packed.format, 70)
    asymmetric = random_weight(DENSE["w4a16-asym"], 70, 200, torch.float16, device)
    with pytest.raises(ValueError, match=r"its zero point: 16 bits, got torch\.float32"):
        matmul_tensors(x, asymmetric.weight, asymmetric.scale.float(), asymmetric.format, 70)
    with pytest.raises(ValueError, match="quantized_linear_tensors"):
        matmul_tensors(x, packed.weight, packed.scale, DENSE["w8a8"], 70)


@pytest.mark.gpu
def test_a_million_tokens(device):
    packed = random_weight(DENSE["w4a16"], 64, 128, torch.float16, device)
    x = random_tokens(1000, 128, torch.float16, device).repeat(1000, 1)
    y = matmul(x, packed)
    assert torch.equal(y.view(1000, 1000, 64), matmul(x[:1000], packed).expand(1000, -1, -1))


@pytest.mark.gpu
def test_cuda_graph_replays_the_same_bits(device):
    packed = random_weight(DENSE["w4a16"], 256, 4096, torch.float16, device)
    x = random_tokens(1, 4096, torch.float16, device)
    expected = matmul(x, packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = matmul(x, packed)
    for _ in range(3):
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, expected)


@pytest.mark.gpu
def test_streams_do_not_share_counters(device):
    packed = random_weight(DENSE["w4a16"], 256, 8192, torch.float16, device)
    x = random_tokens(1, 8192, torch.float16, device)
    expected = matmul(x, packed)
    streams = [torch.cuda.Stream(device) for _ in range(4)]
    torch.cuda.synchronize(device)
    results = []
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(matmul(x, packed))
    torch.cuda.synchronize(device)
    assert all(torch.equal(y, expected) for y in results)
