"""The benchmarks measure what they say, and refuse to time a wrong result."""

from __future__ import annotations

import textwrap

import pytest
import torch
from models import tiny_language_model

from bench import linear, rounding
from bench.timing import interleaved, rotating
from bench.workers import ask


def test_sides_take_turns() -> None:
    calls: list[str] = []
    times = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, seconds=0.0)
    assert calls == ["a", "a", "b", "b", *"ab" * 3]
    assert set(times) == {"a", "b"} and all(t >= 0 for t in times.values())


def test_items_rotate() -> None:
    seen: list[int] = []
    call = rotating([1, 2, 3], seen.append)
    for _ in range(4):
        call()
    assert seen == [1, 2, 3, 1]


def test_linear_rows_cover_every_scheme_and_number_of_tokens() -> None:
    rows = linear.measure(torch.bfloat16, [(64, 96)], seconds=0.001, rounds=1)
    assert [row["m"] for row in rows] == list(linear.TOKENS)
    assert all(set(row["us"]) == {"float", *linear.SCHEMES} for row in rows)
    assert "64 x 96" in linear.show(rows)


def test_a_wrong_result_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlinear.cpu._int8_mm", lambda x, w, s: torch.zeros(len(x), len(w), dtype=x.dtype))
    with pytest.raises(RuntimeError, match="w8a16 is wrong here"):
        linear.measure(torch.bfloat16, [(64, 96)], seconds=0.001, rounds=1)


def test_rounding_rows_and_their_ratio() -> None:
    ids = torch.arange(2 * 40).view(2, 40)
    rows = rounding.measure(tiny_language_model, ids, seeds=(0, 1), schemes=("w4a16-g32", "w4a16-channel-asym"))
    assert [(row["scheme"], row["seed"]) for row in rows] == [
        (scheme, seed) for seed in (0, 1) for scheme in ("w4a16-g32", "w4a16-channel-asym")
    ]
    # The twin computes the same function, whatever the seed; rounding changes it, and the search what rounding does.
    assert rows[0]["float"] == pytest.approx(rows[2]["float"], rel=1e-3)
    rounded = {row[side] for row in rows for side in ("absmax", "qlinear")}
    assert len(rounded) == 8 and not rounded & {row["float"] for row in rows}
    made = [{"scheme": "s", "float": 10.0, "absmax": 14.0, "qlinear": 12.0, "seed": 0}] * 2
    assert rounding.excess(made, "s", "absmax") == pytest.approx([0.4, 0.4])
    assert "0.50x" in rounding.show(made)


def test_workers_answer_in_order_and_one_that_crashes_takes_its_question_with_it() -> None:
    code = """
    import sys
    from bench.workers import answer

    def double(n):
        if n == 2:
            raise ValueError("two")
        return sys.exit(3) if n == 4 else {"n": 2 * n}

    answer(double)
    """
    counted: list[int] = []
    answers = ask(["-c", textwrap.dedent(code)], [1, 2, 3, 4, 5], lambda index, _: counted.append(index))
    assert answers[:3] == [{"n": 2}, {"error": "ValueError('two')"}, {"n": 6}]
    assert answers[3:] == [{"error": "the worker crashed"}, {"n": 10}] and len(counted) == 5
