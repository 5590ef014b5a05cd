"""Schemes (the grammar) and formats (the data everything else reads)."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import random_packed

import qlinear
from qlinear.format import Format

SCHEMES = sorted(qlinear.FORMATS)


def spellings(name: str) -> list[str]:
    """Other ways to write a scheme: its default group size spelled out."""
    bits, *rest = name.split("-")
    written = [name]
    if name == "fp8":
        return ["fp8", "w8a8-fp8", "fp8-channel", "w8a8-fp8-channel"]
    if not rest or rest == ["asym"]:
        written.append("-".join([bits, "g128" if bits.startswith("w4") else "channel", *rest]))
    return written


@settings(deadline=None)
@given(st.sampled_from(SCHEMES), st.data())
def test_parse_and_print_round_trip(name, data):
    text = data.draw(st.sampled_from(spellings(name)))
    text = "".join(data.draw(st.sampled_from([c.lower(), c.upper()])) for c in text)
    text = data.draw(st.sampled_from(["", " ", "\t"])) + text + data.draw(st.sampled_from(["", " ", "\n"]))
    scheme = qlinear.Scheme.parse(text)
    assert str(scheme) == name
    assert qlinear.Scheme.parse(str(scheme)) == scheme
    assert scheme.format is qlinear.FORMATS[name]


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_says_what_its_format_does(name):
    scheme, fmt = qlinear.Scheme.parse(name), qlinear.FORMATS[name]
    assert fmt.name == name == str(fmt)
    assert (scheme.weight_bits, scheme.activation_bits) == (fmt.bits, fmt.activation_bits)
    assert (scheme.group_size, scheme.symmetric, scheme.sparsity) == (fmt.group_size, fmt.symmetric, fmt.sparsity)
    assert scheme.number == fmt.number
    assert qlinear.Scheme.parse(scheme) is scheme
    assert {scheme: 1}[qlinear.Scheme(*dataclasses.astuple(scheme))] == 1


@pytest.mark.parametrize(
    ("text", "group", "symmetric"),
    [
        ("w4a16", 128, True),
        ("w4a16-asym", 128, False),
        ("W4A16", 128, True),
        ("w4a16-g128", 128, True),
        ("w4a16-g64", 64, True),
        ("w4a16-g32-asym", 32, False),
        ("w4a16-channel", None, True),
        ("w4a16-channel-asym", None, False),
        ("w8a16", None, True),
        ("w8a16-channel", None, True),
        ("w8a16-g32", 32, True),
        ("w8a8", None, True),
        ("fp8", None, True),
        ("w8a16-fp8", None, True),
    ],
)
def test_meaning_of_a_name(text, group, symmetric):
    scheme = qlinear.Scheme.parse(text)
    assert (scheme.group_size, scheme.symmetric) == (group, symmetric)


@pytest.mark.parametrize("text", ["w4a16-g128", "w4a16-g128-asym", "w8a16-channel", "w8a8-channel"])
def test_the_default_granularity_is_not_printed(text):
    printed = str(qlinear.Scheme.parse(text))
    assert "g128" not in printed and "channel" not in printed


UNKNOWN = [
    *("", "int4", "w4", "a16", "w4a16g64", "w4a16-", "w4a16-64", "w4a16-asym-g64", "w4a16-sym", "w4a16 -g64", "fp16"),
    *("fp8-fp8", "fp8-w8a8", "w8-fp8", "w8a16fp8", "w8a16-g64-fp8", "e4m3"),
    *("w4a16-g64-g32", "w4a16-channel-g64", "xw4a16", "w4a16x", "w4a16\nw8a16", "nf4", "w-4a16", "w4.0a16"),
]
IMPOSSIBLE = [
    *("w3a16", "w4a8-asym", "w4a4", "w16a16", "w8a4", "w8a16-asym", "w8a8-g128", "w8a8-asym", "w4a16-g48", "w4a16-g0"),
    *("w4a16-fp8", "w4a8-fp8", "w8a16-fp8-g64", "fp8-asym", "fp8-g128", "fp8-2:4"),
    *("w4a16-g256", "w4a8-2:4", "w8a16-block48", "w4a16-unstructured", "w8a16-g64-asym"),
]


@pytest.mark.parametrize("text", [*UNKNOWN, *IMPOSSIBLE])
def test_what_does_not_exist_raises_with_the_list(text):
    with pytest.raises(ValueError) as error:
        qlinear.Scheme.parse(text)
    assert repr(text) in str(error.value) or repr(text.lower()) in str(error.value)
    for name in SCHEMES:
        assert name in str(error.value)


@pytest.mark.parametrize("value", [None, 4, b"w4a16", torch.int8, ["w4a16"]], ids=str)
def test_what_is_no_string_raises(value):
    with pytest.raises(ValueError, match="a scheme is a string"):
        qlinear.Scheme.parse(value)


def test_an_impossible_scheme_cannot_be_built():
    with pytest.raises(ValueError, match=r"'w8a16-asym' does not exist.*w4a16-g64"):
        qlinear.Scheme(8, symmetric=False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        qlinear.Scheme(4).weight_bits = 8


@settings(deadline=None)
@given(st.text("wfpa4816gchnelsym-:2 \n", max_size=16))
def test_any_text_is_a_scheme_or_a_value_error(text):
    try:
        scheme = qlinear.Scheme.parse(text)
    except ValueError:
        return
    assert str(scheme) in qlinear.FORMATS


def test_the_registry_holds_what_is_promised():
    int4 = {f"w4a16{g}{a}" for g in ("", "-g64", "-g32", "-channel") for a in ("", "-asym")}
    int8 = {"w8a16", "w8a16-g32", "w8a16-g64", "w8a16-g128", "w8a8"}
    assert int4 | int8 | {"w4a8", "w4a8-channel", "fp8", "w8a16-fp8"} <= set(qlinear.FORMATS)


@pytest.mark.parametrize("fmt", qlinear.FORMATS.values(), ids=str)
def test_properties(fmt: Format):
    offset = 0 if fmt.number != "int" else {4: 8, 8: 128}[fmt.bits]
    assert (fmt.offset, fmt.max_code, fmt.planes) == (offset, *{4: (15, 4), 8: (255, 2), 16: (65535, 1)}[fmt.bits])
    if fmt.number != "float":
        assert fmt.largest == {("int", 4): 7, ("int", 8): 127, ("e4m3", 8): 448}[fmt.number, fmt.bits]
    assert fmt.integer_activations == fmt.name.startswith(("w8a8", "w4a8"))
    assert fmt.quantized_activations == (fmt.integer_activations or fmt.name == "fp8")
    twin = fmt.weight_only
    assert (twin.activation_bits, twin.bits, twin.number, twin.group_size) == (16, fmt.bits, fmt.number, fmt.group_size)
    with pytest.raises(dataclasses.FrozenInstanceError):
        fmt.bits = 3


@pytest.mark.parametrize(("k", "groups"), [(1, 1), (128, 1), (129, 2), (576, 5)])
def test_the_last_group_may_be_short(k, groups):
    assert qlinear.FORMATS["w4a16"].groups(k) == groups
    assert qlinear.FORMATS["w4a16-channel"].groups(k) == 1


@pytest.mark.parametrize("n", [1, 7, 8, 70])
@pytest.mark.parametrize("k", [1, 5, 8, 33, 200, 576])
@pytest.mark.parametrize("fmt", qlinear.FORMATS.values(), ids=str)
def test_weight_bytes_are_those_of_the_tensors(fmt, n, k):
    for dtype in (torch.bfloat16, torch.float32):
        packed = random_packed(fmt, n, k, dtype)
        assert fmt.weight_bytes(n, k, packed.scale.element_size(), packed.density) == packed.nbytes
    packed = random_packed(fmt, n, k, torch.float16)
    assert fmt.weight_bytes(n, k, density=packed.density) == packed.nbytes


def test_weight_bytes_by_hand():
    # 128 x 256 weights: half a byte each, 2 groups of 128, 2-byte scales, zero points half a byte each.
    assert qlinear.FORMATS["w4a16"].weight_bytes(128, 256) == 128 * 128 + 128 * 2 * 2
    assert qlinear.FORMATS["w4a16-asym"].weight_bytes(128, 256) == 128 * 128 + 128 * 2 * 2 + 128 * 2 // 2
    assert qlinear.FORMATS["w8a8"].weight_bytes(128, 256, scale_bytes=4) == 128 * 256 + 128 * 4


@pytest.mark.parametrize("fmt", qlinear.FORMATS.values(), ids=str)
def test_scale_dtype(fmt):
    assert fmt.scale_dtype(torch.float16) == torch.float16
    assert fmt.scale_dtype(torch.bfloat16) == torch.bfloat16
    per_channel = fmt.group_size is None and fmt.symmetric and fmt.number != "float"
    assert fmt.scale_dtype(torch.float32) == (torch.float32 if per_channel else torch.float16)


@pytest.mark.parametrize("fmt", qlinear.FORMATS.values(), ids=str)
def test_the_error_bound_is_no_looser_than_the_design(fmt):
    assert fmt.max_error(torch.float16) <= 1e-3
    assert fmt.max_error(torch.bfloat16) <= 6e-3
    assert fmt.max_error(torch.float32) <= 1e-4
