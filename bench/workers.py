"""Work for processes of its own, a line of JSON each way: Triton cannot compile in a process that interprets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

#: Processes at a time: more than this many take more memory than they save time.
WORKERS = min(8, max(2, os.cpu_count() or 2))
ROOT = Path(__file__).parents[1]


def ask(
    command: Sequence[str],
    questions: Sequence[Any],
    answered: Callable[[int, dict[str, Any]], object] | None = None,
) -> list[dict[str, Any]]:
    """The answers of worker processes to questions, in order; each takes the next that is left.

    Args:
        command: what Python runs in a worker; the program calls :func:`answer`.
        answered: called after every answer, in any order but one at a time, with its index and with it.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    queue = deque(range(len(questions)))
    results: dict[int, dict[str, Any]] = {}
    lock = Lock()

    def serve() -> None:
        # A process that crashed took its question with it; the next one is put to a new process.
        while queue:
            pipe = subprocess.PIPE
            with subprocess.Popen(
                [sys.executable, *command], stdin=pipe, stdout=pipe, text=True, env=environment
            ) as worker:
                assert worker.stdin is not None and worker.stdout is not None
                line = "alive"
                while line:
                    try:
                        index = queue.popleft()
                    except IndexError:  # another thread took the last one
                        break
                    print(json.dumps(questions[index]), file=worker.stdin, flush=True)
                    line = worker.stdout.readline()
                    results[index] = json.loads(line or '{"error": "the worker crashed"}')
                    if answered is not None:
                        with lock:
                            answered(index, results[index])

    with ThreadPoolExecutor(WORKERS) as pool:
        for served in [pool.submit(serve) for _ in range(min(WORKERS, len(questions)))]:
            served.result()
    return [results[index] for index in range(len(questions))]


def answer(work: Callable[[Any], dict[str, Any]], lines: Iterable[str] = sys.stdin) -> None:
    """The loop of a worker: one line of JSON for each; ``{"error": ...}`` where the work raises."""
    for line in lines:
        try:
            result = work(json.loads(line))
        except Exception as error:
            result = {"error": repr(error)}
        print(json.dumps(result), flush=True)
