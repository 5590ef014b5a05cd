"""Rules of cvt: PTX ISA, 9.7.9 "Data Movement and Conversion Instructions"."""

from __future__ import annotations

from ptx_machine.kinds import TYPES, Rule

_INTEGERS = ("s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64")
_FLOATS = {"f16": "f2", "bf16": "bf", "f32": "f4"}
#: Rounding to a whole number: nearest even, towards zero, down, up.
_WHOLE = {"rni": "np.rint", "rzi": "np.trunc", "rmi": "np.floor", "rpi": "np.ceil"}


def _integers() -> dict[str, Rule]:
    """Of integers to anything, and of floats to integers: a register may be wider than the type."""
    rules: dict[str, Rule] = {}
    for source in _INTEGERS:
        kind = TYPES[source]
        for target in _INTEGERS:
            to = TYPES[target]
            rules[f"cvt.{target}.{source}"] = Rule(f"{{0}}.astype({to})", (kind,), to, extends=True)
            rules[f"cvt.sat.{target}.{source}"] = Rule(f"saturate({{0}}, {to})", (kind,), to, extends=True)
        # C's conversion rounds to nearest. By way of float32 to float16: what that rounds is infinite in float16.
        rules[f"cvt.rn.f32.{source}"] = Rule("{0}.astype(f4)", (kind,), "f4", extends=True)
        rules[f"cvt.rn.f16.{source}"] = Rule("{0}.astype(f4).astype(f2)", (kind,), "f2", extends=True)
        if source[1:] in ("8", "16"):
            rules[f"cvt.rn.bf16.{source}"] = Rule("{0}.astype(f4)", (kind,), "bf", extends=True)
        elif source[1:] == "32":
            rules[f"cvt.rn.bf16.{source}"] = Rule("odd_f4({0}.astype(f8))", (kind,), "bf", extends=True)
    for (source, kind), target in ((pair, target) for pair in _FLOATS.items() for target in _INTEGERS):
        to = TYPES[target]
        for name, function in _WHOLE.items():
            # Clamped with and without .sat.
            rule = Rule(f"to_integer({function}({{0}}), {to})", (kind,), to, extends=True)
            rules[f"cvt.{name}.{target}.{source}"] = rules[f"cvt.{name}.sat.{target}.{source}"] = rule
    return rules


def _floats() -> dict[str, Rule]:
    rules = {
        "cvt.f32.f16": Rule("{0}.astype(f4)", ("f2",), "f4"),
        "cvt.f32.bf16": Rule("{0}", ("bf",), "f4"),
        "cvt.rn.f16.f32": Rule("{0}.astype(f2)", ("f4",), "f2"),
        "cvt.rz.f16.f32": Rule("to_f2_zero({0})", ("f4",), "f2"),
        "cvt.rn.bf16.f32": Rule("{0}", ("f4",), "bf"),
        "cvt.rn.bf16.f16": Rule("{0}.astype(f4)", ("f2",), "bf"),
        "cvt.rn.f16.bf16": Rule("{0}.astype(f2)", ("bf",), "f2"),
        "cvt.rna.tf32.f32": Rule("to_tf32({0})", ("f4",), "u4"),
        # The first operand is the upper half.
        "cvt.rn.f16x2.f32": Rule("pack(bits_f2({1}.astype(f2)), bits_f2({0}.astype(f2)))", ("f4", "f4"), "u4"),
        "cvt.rn.bf16x2.f32": Rule("pack(to_bf16({1}), to_bf16({0}))", ("f4", "f4"), "u4"),
    }
    for name in ("e4m3", "e5m2"):
        rules |= {
            f"cvt.rn.satfinite.{name}x2.f32": Rule(f"pack(to_{name}({{1}}), to_{name}({{0}}))", ("f4", "f4"), "u2"),
            f"cvt.rn.satfinite.{name}x2.f16x2": Rule(f"to_{name}({{0}})", ("2f2",), "2u1"),
            f"cvt.rn.f16x2.{name}x2": Rule(f"from_{name}({{0}})", ("2u1",), "2f2"),
        }
    for name, kind in (("f16", "f2"), ("f32", "f4")):
        for how, function in _WHOLE.items():
            rules[f"cvt.{how}.{name}.{name}"] = Rule(f"{function}({{0}})", (kind,), kind)
        rules[f"cvt.sat.{name}.{name}"] = Rule("unit({0})", (kind,), kind)
    return rules


RULES = _integers() | _floats()
