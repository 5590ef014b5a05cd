"""Puts the machine under Triton: a driver whose launches run the compiled PTX on CPU tensors.

The project's launchers run unchanged; Triton specialises, compiles and caches as on a GPU, up to the PTX.
"""

from __future__ import annotations

import ctypes
import importlib
import pkgutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend

import qlinear.kernels
from ptx_machine.machine import IN_ORDER, Machine, Schedule
from ptx_machine.memory import Array, GlobalMemory
from ptx_machine.parse import parse
from qlinear.kernels import runtime
from qlinear.kernels.configs import shared_bytes
from qlinear.kernels.runtime import Target

#: Multiprocessors by architecture: an A100, an RTX 4090, an H100.
_PROCESSORS = {80: 108, 89: 128, 90: 132}


def capability(arch: int) -> tuple[int, int]:
    """(9, 0) for 90."""
    return arch // 10, arch % 10


@dataclass
class Launch:
    """What one launch did."""

    kernel: str
    grid: tuple[int, int, int]
    #: Of strands: an instruction of a program counts once, or once for each warpgroup where these go apart.
    instructions: int
    seconds: float
    #: What is no fault but worth knowing.
    notes: set[str] = field(default_factory=set)


class Driver(DriverBase):
    """Triton's driver for a GPU of architecture ``arch`` (80 for sm_80) that is not there.

    Args:
        edit: changes the text of every kernel, for tests that the machine notices.
    """

    def __init__(self, arch: int, schedule: Schedule, edit: Callable[[str], str] | None = None) -> None:
        self.arch, self.schedule, self.edit = arch, schedule, edit
        self.launches: list[Launch] = []
        #: By what Triton calls machine code, which is PTX here, and the bytes of shared memory.
        self.machines: dict[tuple[bytes, int], Machine] = {}
        #: By address: tensors that torch.empty made, and their version then. Nothing has written to them since.
        self.empty: dict[int, tuple[torch.Tensor, int]] = {}
        # Triton asks the driver, and what it calls its utilities.
        self.utils = self

    # --- what Triton asks a driver -----------------------------------------------------------------------------------

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        """Kernels are kept by device: its number is the architecture, so that several can live in one process."""
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise RuntimeError("nothing is timed on this machine")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": shared_bytes(capability(self.arch))}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, Any, int, int, int]:
        """(module, function, registers, bytes spilled, most threads)."""
        return kernel, (kernel, shared), 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """What launches a kernel: Triton keeps it longer than a driver lives, so it asks for the active one."""
        kinds = list(source.signature.values())
        names = list(source.signature)

        def launch(x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
            # Before the kernel's own arguments: metadata, and hooks at entry and exit.
            arguments = zip(names, kinds, rest[4:], strict=True)
            triton.runtime.driver.active.execute(*function, (x, y, z), list(arguments))

        return launch

    # --- a launch ----------------------------------------------------------------------------------------------------

    def execute(self, text: bytes, shared: int, grid: tuple[int, int, int], arguments: list[Any]) -> None:
        """Runs all programs of ``grid``; ``arguments``: (name, Triton's type, value)."""
        if (text, shared) not in self.machines:
            code = text.decode()
            self.machines[text, shared] = Machine(parse(self.edit(code) if self.edit else code), shared)
        machine = self.machines[text, shared]
        memory, parameters, tensors = GlobalMemory(), [], []
        for name, kind, value in arguments:
            if isinstance(value, torch.Tensor) and kind != "constexpr":
                tensors.append(value)
                parameters.append(memory.add(name, _bytes(value), value.data_ptr() % 256, self._fresh(value)))
            elif kind == "fp32":
                parameters.append(int(np.float32(value).view(np.uint32)))
            elif kind != "constexpr":
                parameters.append(int(value))
        # The scratch buffers that every kernel of Triton has pointers to.
        parameters += [0] * (len(machine.program.parameters) - len(parameters))
        launch = Launch(machine.program.name, grid, 0, 0.0)
        self.launches.append(launch)
        start = time.perf_counter()
        launch.instructions = machine.launch(grid, parameters, memory, self.schedule, launch.notes)
        launch.seconds = time.perf_counter() - start
        for tensor, allocation in zip(tensors, memory.allocations, strict=True):
            if allocation.written is not None and allocation.written.all():
                self.empty.pop(tensor.untyped_storage().data_ptr(), None)

    def _fresh(self, tensor: torch.Tensor) -> bool:
        """Whether nothing has written to it since torch.empty made it: torch counts what it writes itself."""
        made = self.empty.get(tensor.untyped_storage().data_ptr())
        return made is not None and made[0]._version == made[1]

    @property
    def texts(self) -> list[str]:
        """The PTX of the kernels that were launched, as Triton made it."""
        return [text.decode() for text, _ in self.machines]


def _bytes(tensor: torch.Tensor) -> Array:
    """The bytes from a tensor's first to its last, shared with it."""
    if tensor.numel() == 0:
        return np.zeros(0, np.uint8)
    span = (sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1) * tensor.element_size()
    return np.ctypeslib.as_array((ctypes.c_uint8 * span).from_address(tensor.data_ptr()))


@contextmanager
def on_the_machine(
    arch: int,
    schedule: Schedule = IN_ORDER,
    edit: Callable[[str], str] | None = None,
) -> Iterator[Driver]:
    """Lets the project's launchers run on CPU tensors as on a GPU of architecture ``arch``.

    Triton must not interpret: TRITON_INTERPRET=0 before it is imported. It keeps what it compiles in a folder beside
    its own, because what it finds there as machine code is PTX.
    """
    for name in (module.name for module in pkgutil.iter_modules(qlinear.kernels.__path__)):
        importlib.import_module(f"qlinear.kernels.{name}")
    driver = Driver(arch, schedule, edit)
    target = Target(capability(arch), _PROCESSORS.get(arch, 128))
    ours = [module for name, module in list(sys.modules.items()) if name.startswith(("qlinear", "bench"))]
    modules: list[Any] = [module for module in ours if hasattr(module, "target_of")]
    old = {module: module.target_of for module in modules}
    empty: Any = torch.empty
    make_cubin, active = CUDABackend.make_cubin, triton.runtime.driver._active

    def remembered(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor: torch.Tensor = empty(*args, **kwargs)
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
        if not tensor.is_inference() and tensor.device.type == "cpu":
            driver.empty[tensor.untyped_storage().data_ptr()] = tensor, tensor._version
        return tensor

    for module in modules:
        setattr(module, "target_of", lambda device: target)  # noqa: B010 - a module has no such attribute to mypy
    CUDABackend.make_cubin = lambda self, src, metadata, opt, capability: src.encode()
    torch.empty = remembered
    triton.runtime.driver.set_active(driver)
    try:
        with triton.knobs.cache.scope():
            triton.knobs.cache.dir = f"{triton.knobs.cache.dir}-ptx"
            yield driver
    finally:
        # A launch that failed leaves its counters as they were.
        runtime._arenas.clear()
        runtime._rows.clear()
        triton.runtime.driver._active = active
        torch.empty, CUDABackend.make_cubin = empty, make_cubin
        for module, function in old.items():
            setattr(module, "target_of", function)  # noqa: B010 - as above
