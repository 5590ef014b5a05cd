"""Tables of what ``qlinear tune`` measured: one JSON file for each GPU, Triton version and state of the kernels.

A table holds configurations and crossovers that override what :func:`qlinear.kernels.configs.choose_config` and
:func:`qlinear.kernels.crossover.fused_tokens` compute. It is read once for each device, when a kernel is first launched
there; a file that cannot be used is ignored with one warning.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton

from qlinear.cache import cache_folder
from qlinear.format import FORMATS, Format
from qlinear.kernels.configs import Config, choose_config, refusal
from qlinear.kernels.crossover import ENDS, fused_tokens
from qlinear.kernels.runtime import Capability, Target, gpu_target, target_of
from qlinear.kernels.tile_table import M_BUCKETS, MANY
from qlinear.tables import write_json

#: What kernels are configured with, beside the kernels themselves.
_CHOOSING = ("configs.py", "estimate.py", "tile_table.py")
#: Of the file's form.
VERSION = 1
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Key:
    """What a measurement holds for: it says nothing about another GPU, compiler or kernel."""

    gpu: str
    capability: Capability
    num_sms: int
    triton: str
    kernels: str

    @property
    def file_name(self) -> str:
        capability = self.capability if isinstance(self.capability, str) else "sm_{}{}".format(*self.capability)
        text = f"{self.gpu} {capability} {self.num_sms} triton-{self.triton} {self.kernels}"
        return re.sub(r"[^\w.+-]+", "-", text) + ".json"

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return data


@dataclass
class Table:
    """Measured configurations and crossovers, and where they are kept (None: nowhere)."""

    key: Key | None = None
    path: Path | None = None
    #: By (scheme, dtype, M bucket, out_features, in_features).
    configs: dict[tuple[str, torch.dtype, int, int, int], Config] = field(default_factory=dict)
    #: The most tokens of the kernel, by (scheme, dtype, out_features, in_features).
    crossovers: dict[tuple[str, torch.dtype, int, int], int] = field(default_factory=dict)
    #: Configurations whose search was cut short: the best so far.
    partial: set[tuple[str, torch.dtype, int, int, int]] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.configs) + len(self.crossovers)

    def to_dict(self) -> dict[str, Any]:
        assert self.key is not None
        configs = [
            {"scheme": key[0], "dtype": _NAMES[key[1]], **dict(zip(("tokens", "n", "k"), key[2:], strict=True))}
            | asdict(config)
            | {"partial": key in self.partial}
            for key, config in self.configs.items()
        ]
        crossovers = [
            {"scheme": s, "dtype": _NAMES[dtype], "n": n, "k": k, "fused_tokens": most}
            for (s, dtype, n, k), most in self.crossovers.items()
        ]
        return {"version": VERSION, "key": self.key.to_dict(), "configs": configs, "crossovers": crossovers}

    def write(self, path: Path) -> None:
        """Writes beside its place and moves in."""
        write_json(path, self.to_dict())


#: What a device without a table has.
NOTHING = Table()


def folder() -> Path:
    """Where tables are kept."""
    return cache_folder() / "tuned"


def tables() -> list[Path]:
    """Every table that is kept, of this GPU and of others."""
    return sorted(folder().glob("*.json"))


@functools.cache
def kernels_hash() -> str:
    """Twelve digits that change when a kernel does, or what it is configured with."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        text = path.read_bytes()
        if b"@triton.jit" in text or path.name in _CHOOSING:
            digest.update(path.name.encode() + b"\0" + text)
    return digest.hexdigest()[:12]


def key_of(index: int) -> Key:
    """The key of CUDA device ``index``."""
    target = gpu_target(index)
    name = torch.cuda.get_device_name(index)
    return Key(name, target.capability, target.num_sms, triton.__version__, kernels_hash())


@functools.cache
def table_of(index: int) -> Table:
    """The table of CUDA device ``index``, read at the first call; empty where there is none, or none that is right."""
    key = key_of(index)
    path = folder() / key.file_name
    if not path.is_file():
        return NOTHING
    try:
        return read(path, key)
    except (ValueError, OSError) as error:
        warnings.warn(f"{error}; it is ignored: `qlinear tune` writes it anew", stacklevel=2)
        return NOTHING


def writable(key: Key) -> Table:
    """The table of a key to add to, where it is kept; empty where there is none that can be used."""
    path = folder() / key.file_name
    try:
        return read(path, key)
    except (ValueError, OSError):
        return Table(key, path)


def install(path: Path) -> Table:
    """Puts a table that was measured elsewhere, by these kernels and this Triton, where its GPU finds it.

    Raises:
        ValueError: it is no table, or one of other kernels or another Triton.
        OSError: it cannot be read or written.
    """
    table = read(path)
    assert table.key is not None
    for name, own, here in (
        ("Triton", table.key.triton, triton.__version__),
        ("kernels", table.key.kernels, kernels_hash()),
    ):
        if own != here:
            raise ValueError(f"{path} was measured with {name} {own}, here is {here}")
    table.path = folder() / table.key.file_name
    table.write(table.path)
    forget()
    return table


def clear() -> int:
    """Removes every table that is kept; how many there were."""
    found = tables()
    for path in found:
        path.unlink(missing_ok=True)
    forget()
    return len(found)


def forget() -> None:
    """Has the next launch read its table again: after one was written or removed."""
    table_of.cache_clear()


def measured(device: torch.device) -> Table:
    """The table for tensors on ``device``; empty where they are not on a GPU."""
    if device.type != "cuda":
        return NOTHING
    return table_of(torch.cuda.current_device() if device.index is None else device.index)


def config_on(device: torch.device, target: Target, m: int, n: int, k: int, fmt: Format, dtype: torch.dtype) -> Config:
    """:func:`~qlinear.kernels.configs.choose_config` on a device, whose target is known, from its table."""
    return choose_config(m, n, k, fmt, dtype, target.capability, target.num_sms, measured(device).configs)


def fused_tokens_on(
    device: torch.device, n: int, k: int, fmt: Format, dtype: torch.dtype, kept: bool = False
) -> int | None:
    """:func:`~qlinear.kernels.crossover.fused_tokens` for tensors on ``device``, with its table."""
    target, crossovers = target_of(device), measured(device).crossovers
    return fused_tokens(n, k, fmt, dtype, target.capability, target.num_sms, target.l2_bytes, kept, crossovers)


def read(path: Path, key: Key | None = None) -> Table:
    """Reads a table and checks every entry, so that no launch meets a configuration that cannot run.

    Args:
        key: what it must have been measured for; None takes the file's word.

    Raises:
        ValueError: the file is no table, is of another GPU, Triton or kernel, or has an entry that cannot be used.
        OSError: it cannot be read.
    """
    try:
        data = json.loads(path.read_text())
        if data["version"] != VERSION:
            raise ValueError(f"its version is {data['version']}, wanted {VERSION}")
        found = data["key"]
        capability = found["capability"]
        own = Key(**{**found, "capability": capability if isinstance(capability, str) else tuple(capability)})
        if key is not None and own != key:
            raise ValueError(f"it was measured for {own}, here is {key}")
        table = Table(own, path)
        _read_configs(table, data["configs"], own.capability)
        _read_crossovers(table, data["crossovers"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is no tuned table that can be used here ({reason})") from error
    return table


def _read_configs(table: Table, entries: Iterable[dict[str, Any]], capability: Capability) -> None:
    for entry in entries:
        fields = dict(entry)
        scheme, dtype, partial = fields.pop("scheme"), _DTYPES[fields.pop("dtype")], fields.pop("partial")
        bucket, n, k = (_positive(fields.pop(name)) for name in ("tokens", "n", "k"))
        config = Config(**{name: _positive(value) for name, value in fields.items()})
        if bucket not in (*M_BUCKETS, MANY):
            raise ValueError(f"{bucket} is no bucket of tokens")
        reason = refusal(config, bucket, n, k, FORMATS[scheme], dtype, capability)
        if reason is not None:
            raise ValueError(f"{scheme} {bucket} x {n} x {k}: {reason}")
        table.configs[scheme, dtype, bucket, n, k] = config
        if partial:
            table.partial.add((scheme, dtype, bucket, n, k))


def _read_crossovers(table: Table, entries: Iterable[dict[str, Any]]) -> None:
    for entry in entries:
        scheme, dtype, most = entry["scheme"], _DTYPES[entry["dtype"]], _positive(entry["fused_tokens"])
        if FORMATS[scheme].quantized_activations or most not in ENDS:
            raise ValueError(f"{scheme} cannot leave the kernel after {most} tokens")
        table.crossovers[scheme, dtype, _positive(entry["n"]), _positive(entry["k"])] = most


def _positive(value: object) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r} is no positive number")
    return value
