"""Tests whose work is done by processes of their own, all of it at once: Triton cannot compile where it interprets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.workers import ask


def answers(
    request: pytest.FixtureRequest, file: str, effort: Callable[[int], float] = lambda index: 0.0
) -> dict[int, dict[str, Any]]:
    """What the workers of a test file say of every ``index`` that its selected tests are parametrized with.

    Args:
        file: the test file, which run as a program is the worker: it calls :func:`bench.workers.answer`.
        effort: the largest is asked for first, so that no process ends long after the others.
    """
    calls = [item.callspec for item in request.session.items if item.path == Path(file) and hasattr(item, "callspec")]
    wanted = {call.params["index"] for call in calls if "index" in call.params}
    indices = sorted(wanted, key=lambda index: (-effort(index), index))
    return dict(zip(indices, ask([file], indices), strict=True))
