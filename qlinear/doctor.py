"""``qlinear doctor``: versions, devices, and the path each scheme takes here, checked by computing with it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qlinear import paths, reference
from qlinear.cache import cache_folder
from qlinear.format import FORMATS, Format
from qlinear.layout import native_layout
from qlinear.packing import pack
from qlinear.tables import table

_PACKAGES = ("qlinear", "torch", "triton", "numpy", "safetensors", "transformers", "accelerate", "gguf")


#: in_features and out_features of the layer whose paths are told; ``inspect`` tells them for a model's own.
_LAYER = (4096, 4096)
#: Rows and columns of the weights that are checked, and of those whose layout is for large ones only.
_SMALL, _LARGE = (192, 576), (2048, 2048)


@dataclass(frozen=True)
class Check:
    """One scheme on one device in one dtype: paths by the tokens each begins at, and its error against float64."""

    scheme: str
    device: str
    dtype: str
    paths: dict[int, str]
    reason: str
    relative_error: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.relative_error <= self.bound


@dataclass(frozen=True)
class Diagnosis:
    versions: dict[str, str]
    devices: list[str]
    checks: list[Check]
    #: Of each GPU, and what is kept.
    tuned: list[str]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        checks = [{**asdict(check), "ok": check.ok} for check in self.checks]
        return {
            "ok": self.ok,
            "versions": self.versions,
            "devices": self.devices,
            "tuned": self.tuned,
            "schemes": checks,
        }

    def __str__(self) -> str:
        lines = [f"{name:<14}{version}" for name, version in self.versions.items()]
        lines += [f"device        {device}" for device in self.devices]
        lines += [f"tuned         {line}" for line in self.tuned]
        header = ("scheme", "device", "dtype", "error", f"path of a layer of {_LAYER[1]} x {_LAYER[0]}", "why")
        rows = []
        for check in self.checks:
            error = f"{check.relative_error:.1e} {'ok' if check.ok else f'ABOVE {check.bound:g}'}"
            ways = paths.describe_paths(check.paths)
            rows.append((check.scheme, check.device, check.dtype, error, ways, check.reason))
        return "\n".join([*lines, "", table(header, rows)])


def diagnose() -> Diagnosis:
    """Looks at this machine and computes a small product with every scheme on every device, in bfloat16 and float32."""
    kinds = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    dtypes = (torch.bfloat16, torch.float32)
    checks = [_check(fmt, device, dtype) for device in kinds for dtype in dtypes for fmt in FORMATS.values()]
    return Diagnosis(versions(), devices(), checks, tuned_tables())


def versions() -> dict[str, str]:
    """The versions of what matters here; ``not installed`` where it is not."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    # torch's own version names its build (+cpu, +cu130), the package's metadata may not.
    found["torch"] = str(torch.__version__)
    return found


def devices() -> list[str]:
    """One line for each device: what it is and what computes on it."""
    # Where the name is not known it is empty, or the architecture's.
    what = dict.fromkeys((_cpu_name(), platform.machine(), torch.backends.cpu.get_cpu_capability()))
    found = [f"cpu: {', '.join(filter(None, what))}, {torch.get_num_threads()} threads"]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        triton = "Triton kernels" if importlib.util.find_spec("triton") else "no Triton: dequantize + vendor matmul"
        size = f"{p.total_memory / 1e9:.0f} GB, {p.multi_processor_count} SMs"
        found.append(f"cuda:{i}: {p.name}, sm_{p.major}{p.minor}, {size}, {triton}")
    return found


def _cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The model's name as Linux knows it, or else as Python does."""
    try:
        named = re.search(r"^model name[ \t]*:[ \t]*(\S.*?)\s*$", cpuinfo.read_text(errors="replace"), re.MULTILINE)
    except OSError:
        named = None
    return named[1] if named else platform.processor()


def tuned_tables() -> list[str]:
    """One line for each GPU on its table of measured configurations, and one on all that is kept."""
    found = []
    if importlib.util.find_spec("triton"):
        from qlinear.kernels.tuned import table_of

        for i in range(torch.cuda.device_count()):
            table = table_of(i)
            what = f"{len(table.configs)} configurations and {len(table.crossovers)} crossovers, of {table.path}"
            nothing = "none; configurations and crossovers are by count (`qlinear tune` measures them)"
            found.append(f"cuda:{i}: {what if table.path else nothing}")
    folder = cache_folder() / "tuned"
    count = len(list(folder.glob("*.json")))
    return [*found, f"{count} {'table' if count == 1 else 'tables'} kept in {folder}"]


def _check(fmt: Format, device: str, dtype: torch.dtype) -> Check:
    generator, there = torch.Generator().manual_seed(0), torch.device(device)
    alike = native_layout(there, fmt, *_SMALL) == native_layout(there, fmt, *_LAYER)
    rows, columns = _SMALL if alike else _LARGE
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    x = torch.randn(3, columns, generator=generator).to(dtype)
    packed = pack(weight.to(device), fmt.name, prune="magnitude")
    y = torch.ops.qlinear.linear(
        x.to(device),
        packed.weight,
        packed.scale,
        packed.zero_point,
        None,
        fmt.name,
        packed.in_features,
        packed.out_features,
        index=packed.index,
    )
    wanted = reference.matmul(x, pack(weight, fmt.name, layout="plain", prune="magnitude"))
    error = ((y.cpu().double() - wanted).norm() / wanted.norm()).item()
    where = (packed.device, packed.layout, *_LAYER)
    ways = paths.paths(fmt, dtype, *where)
    reason = paths.path(fmt, dtype, 1, *where)[1]
    return Check(fmt.name, device, str(dtype).removeprefix("torch."), ways, reason, error, fmt.max_error(dtype))


def native_path(device: torch.device) -> str:
    """One line for a program's output: which of the two families computes on this device."""
    if native_layout(device) == "triton":
        return f"Triton kernels on {torch.cuda.get_device_name(device)}"
    return f"PyTorch's packed operators on {device.type} (not the Triton kernels: those need a GPU)"
