"""Where there is no GPU the kernels run in Triton's interpreter, which must be chosen before triton is imported.

With ``--on-the-machine`` they are compiled for a GPU instead, and the PTX machine executes them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# The tests' products are tiny: a second thread costs more to wake than it saves, four times as much on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """What the kernels run on: the GPU, or the CPU through the interpreter or the PTX machine."""
    on_gpu = torch.cuda.is_available() and not request.config.getoption("on_the_machine")
    return torch.device("cuda" if on_gpu else "cpu")


@pytest.fixture(autouse=True)
def on_the_machine(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs what a test launches on the PTX machine, where that was asked for."""
    arch = request.config.getoption("on_the_machine")
    if not arch:
        yield
        return
    from ptx_machine.driver import on_the_machine as machine
    from ptx_machine.machine import Schedule

    with machine(arch, Schedule("mixed", "random", seed=1)):
        yield


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny float language model with its tokenizer, as a Hugging Face folder in bfloat16."""
    from models import byte_tokenizer, tiny_language_model

    path = tmp_path_factory.mktemp("language_model")
    tiny_language_model().bfloat16().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """Every test compiles from an empty cache: dynamo gives up after eight versions of one function, whoever made them.

    10 us, where a test before has imported dynamo; its import takes more than a second.
    """
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """torch.empty returns NaN (or a large integer): what a kernel does not write is seen."""
    # The PTX machine knows by itself what nobody has written.
    if request.config.getoption("on_the_machine"):
        return
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 93)

    monkeypatch.setattr(torch, "empty", poisoned)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-kernel", action="store_true", help="Compile all that ships, not a sample: minutes more.")
    parser.addoption(
        "--on-the-machine",
        type=int,
        choices=(80, 89, 90),
        metavar="ARCH",
        help="Run the kernels' tests, and no others, on what is compiled for sm_ARCH (80, 89 or 90): the PTX machine "
        "in tests/ptx_machine executes it. Five minutes or so on two cores, no GPU needed.",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite runs in two processes where pytest-xdist is there and nothing else was asked for.

    Most of it is Python that interprets kernels. A file stays in one process: its tests share what they compiled.
    """
    # Those two processes come here as well.
    worker = "PYTEST_XDIST_WORKER" in os.environ
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if whole and not worker and config.pluginmanager.hasplugin("xdist") and config.option.numprocesses is None:
        config.option.numprocesses, config.option.dist = 2, "loadfile"
    if worker or getattr(config.option, "numprocesses", None):
        # pytest-benchmark would disable itself with a warning, which is an error here.
        config.option.benchmark_disable = True


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("on_the_machine"):
        os.environ["TRITON_INTERPRET"] = "0"
    elif not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    config.addinivalue_line("markers", "every_kernel: runs with --every-kernel only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips what needs a GPU where there is none; leaves out the kernels, or the tests, that were not asked for."""
    if not config.getoption("every_kernel"):
        rest = [item for item in items if item.get_closest_marker("every_kernel")]
        items[:] = [item for item in items if not item.get_closest_marker("every_kernel")]
        config.hook.pytest_deselected(items=rest)
    if config.getoption("on_the_machine"):
        rest = [item for item in items if "device" not in item.fixturenames]
        items[:] = [item for item in items if "device" in item.fixturenames]
        config.hook.pytest_deselected(items=rest)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA or ROCm device"))
