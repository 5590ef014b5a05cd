"""One product, measured: every scheme against 16-bit ``F.linear``, the floor of the machine and every peer installed.

Nothing gets a time before its result agrees with :mod:`qlinear.reference`. Weights rotate over several times the cache;
sides take turns; on a GPU they are CUDA graphs timed by the device (:mod:`bench.timing`).
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bench import peers as others
from bench.problems import LAYERS, TOKENS, Layer, layers_of
from bench.sides import Side, Unavailable, float_side, operators, packed_side, quiet
from bench.timing import in_turns, on, rotating
from qlinear import reference
from qlinear.kernels.graphs import replayed
from qlinear.machines import MACHINES, Machine
from qlinear.packing import PackedWeight, pack
from qlinear.paths import path as path_of

SCHEMES = ("w4a16", "w4a16-g32-asym", "w8a16", "w8a8")
CPU_TOKENS = (1, 16, 128)

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    device: torch.device
    dtype: torch.dtype
    tokens: Sequence[int]
    schemes: Sequence[str] = SCHEMES
    peers: Sequence[str] = ()
    #: Per side and row.
    seconds: float = 0.3
    #: Turns of a side on a GPU.
    rounds: int = 9
    #: ``time.monotonic()`` after which no row is begun.
    deadline: float = float("inf")
    note: Callable[[str], None] = print
    #: Is given all rows so far after each number of tokens: what is killed loses little.
    save: Callable[[list[Row]], None] = field(default=lambda rows: None)


@dataclass
class _Entry:
    """A side with what its result must agree with."""

    side: Side
    scheme: str | None
    bound: float
    #: None: the product by the float weight.
    packed: PackedWeight | None = None
    dense: Tensor | None = None


#: SmolLM2's layers, and 4096x4096.
CPU_LAYERS = [*layers_of(["SmolLM2-135M"]), ("Llama-3-8B", "q,o", 4096, 4096)]


def jobs(
    models: Sequence[str] | None,
    schemes: Sequence[str] | None,
    tokens: Sequence[int] | None,
    dtypes: Sequence[str],
    device: torch.device | None,
    seconds: float,
    peers: Sequence[str],
) -> list[tuple[Sequence[Layer], Settings]]:
    """What the command line asks for, by dtype (the names of :mod:`bench.options`); None is the device's default."""
    where = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_cpu = where.type == "cpu"
    default = CPU_LAYERS if on_cpu else layers_of(LAYERS)
    layers = default if models is None else layers_of(models)
    counts = tokens or (CPU_TOKENS if on_cpu else TOKENS)
    return [
        (layers, Settings(where, getattr(torch, name), counts, schemes or SCHEMES, peers, seconds)) for name in dtypes
    ]


def machine_of(device: torch.device) -> Machine | None:
    """The public figures of a GPU, found by its name; None for a CPU or another GPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((m for key, m in MACHINES.items() if re.search(rf"\b{re.escape(key)}\b", name)), None)


def floor_seconds(machine: Machine, packed_bytes: int, m: int, n: int, k: int, itemsize: int, integer: bool) -> float:
    """The least time: every byte moved once, or every product made, whichever takes longer."""
    moved = packed_bytes + (m * k + m * n) * itemsize
    rate = machine.int8_ops if integer else machine.fp16_flops
    return max(moved / machine.stream_bytes_per_s, 2 * m * n * k / rate)


def measure(layers: Sequence[Layer], settings: Settings) -> list[Row]:
    """One row per layer, scheme and number of tokens; rows of what is wrong or impossible say so and hold no time."""
    rows: list[Row] = []
    settings = replace(settings, note=_once(settings.note))
    count = len(layers) * len(settings.tokens)
    with tqdm(total=count, desc=f"products, {_name(settings.dtype)}", unit="product", disable=None) as bar:
        for layer in layers:
            if time.monotonic() > settings.deadline:
                settings.note(f"out of time before {layer[0]} {layer[1]}")
                break
            try:
                with torch.no_grad():
                    for found in _layer(layer, settings, bar):
                        rows += found
                        settings.save(rows)
            except torch.OutOfMemoryError:
                settings.note(f"{layer[0]} {layer[1]}: out of memory")
            if settings.device.type == "cuda":
                # After a capture that failed torch 2.11 takes it for one that goes on, and empties nothing.
                with contextlib.suppress(RuntimeError):
                    torch.cuda.empty_cache()
    return rows


def _once(note: Callable[[str], None]) -> Callable[[str], None]:
    """Notes the same words only once."""
    seen: set[str] = set()

    def first(text: str) -> None:
        if text not in seen:
            seen.add(text)
            note(text)

    return first


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _layer(layer: Layer, settings: Settings, bar: Any) -> Iterator[list[Row]]:
    """The rows of one number of tokens after the other."""
    model, name, n, k = layer
    generator = torch.Generator(settings.device).manual_seed(0)
    weight = torch.randn(n, k, generator=generator, device=settings.device).mul_(k**-0.5).to(settings.dtype)
    entries = _entries(weight, settings)
    for m in settings.tokens:
        bar.set_postfix_str(f"{n} x {k}, M = {m}")
        if time.monotonic() > settings.deadline:
            break
        x = torch.randn(m, k, generator=generator, device=settings.device).to(settings.dtype)
        skipped: dict[str, str] = {}
        checked: dict[str, _Entry] = {}
        for key, entry in entries.items():
            reason = _wrong(x, weight, entry)
            if reason is None:
                checked[key] = entry
            else:
                skipped[key] = reason
        times = _times(x, checked, settings)
        common = {"model": model, "layer": name, "n": n, "k": k, "m": m, "dtype": _name(settings.dtype)}
        for key, reason in skipped.items():
            settings.note(f"{n} x {k}, M = {m}: {key}: {reason}")
        bar.update(1)
        yield [common | _row(scheme, entries[scheme], times, skipped, x, settings) for scheme in settings.schemes]


def _entries(weight: Tensor, settings: Settings) -> dict[str, _Entry]:
    """Every side by its key: baselines by their dtype, schemes by their name, peers as ``scheme peer``."""
    entries: dict[str, _Entry] = {}
    # A CPU is held to float32 as well: 16 bit is not its fastest everywhere.
    for dtype in dict.fromkeys([_baseline(settings.dtype), *([torch.float32] if not weight.is_cuda else [])]):
        entries[_name(dtype)] = _Entry(float_side(weight.to(dtype)), None, 0.02)
    for scheme in settings.schemes:
        packed = pack(weight, scheme)
        dense = packed.dequantize(torch.float64)
        side = packed_side(packed)
        bound = packed.format.max_error(settings.dtype)
        entries[scheme] = _Entry(side, scheme, bound, packed, dense)
        copies = len(side.calls)
        for name in settings.peers:
            try:
                other = others.make(name, weight, packed.format, copies)
            except Unavailable as reason:
                settings.note(f"{scheme} {name}: {reason}")
                continue
            entries[f"{scheme} {name}"] = _Entry(other, scheme, others.bound(packed.format, name))
    return entries


def _baseline(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == torch.float32 else dtype


def _wrong(x: Tensor, weight: Tensor, entry: _Entry) -> str | None:
    """Why a side gets no time: it is not available for this x, is wrong, or ran a slower path than it has."""
    try:
        with quiet():
            y = entry.side.product(x)
    except torch.OutOfMemoryError:
        raise
    except Unavailable as reason:
        return str(reason)
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}".splitlines()[0][:200]
    if entry.packed is not None and entry.dense is not None:
        wanted = reference.activations(x, entry.packed) @ entry.dense.t()
    else:
        wanted = x.double() @ weight.double().t()
    error = float((y.double() - wanted).norm() / wanted.norm())
    if not error <= entry.bound:
        return f"wrong: relative error {error:.2e}, above {entry.bound:g}; a wrong result gets no time"
    operator = entry.side.operator
    if operator is not None:
        prepared = entry.side.prepare(x)
        if operator not in operators(lambda: entry.side.calls[0](prepared)):
            return f"did not run {operator}, its fast path"
    return None


def _times(x: Tensor, entries: dict[str, _Entry], settings: Settings) -> dict[str, float]:
    prepared = {key: entry.side.prepare(x) for key, entry in entries.items()}
    if settings.device.type == "cuda":
        graphs = {key: [_bind(c, prepared[key]) for c in entry.side.calls] for key, entry in entries.items()}
        return replayed(graphs, settings.rounds, settings.seconds, settings.device)
    sides = {key: rotating(entry.side.calls, on(prepared[key])) for key, entry in entries.items()}
    return in_turns(sides, settings.seconds)


def _bind(call: Callable[[Any], Any], x: Any) -> Callable[[], Any]:
    return lambda: call(x)


def _row(
    scheme: str, entry: _Entry, times: dict[str, float], skipped: dict[str, str], x: Tensor, settings: Settings
) -> Row:
    """What was measured of one scheme; its baselines and peers stand beside it."""
    packed = entry.packed
    assert packed is not None
    m, n, k = x.shape[0], packed.out_features, packed.in_features
    floats = {name: t * 1e6 for name, t in times.items() if name in ("float16", "bfloat16", "float32")}
    made = {key.split()[1]: t * 1e6 for key, t in times.items() if key.startswith(f"{scheme} ")}
    reasons = {key.split()[1]: why for key, why in skipped.items() if key.startswith(f"{scheme} ")}
    path, _ = path_of(packed.format, x.dtype, m, x.device, packed.layout, packed.in_features, packed.out_features)
    row: Row = {"scheme": scheme, "path": path, "packed_bytes": packed.nbytes, "copies": len(entry.side.calls)}
    row |= {"float_us": floats, "peers_us": made, "peers_skipped": reasons}
    if scheme not in times:
        return row | {"us": None, "error": skipped.get(scheme, "could not be timed")}
    seconds = times[scheme]
    row |= {"us": seconds * 1e6, "tflops": 2e-12 * m * n * k / seconds, "gbps": packed.nbytes / seconds / 1e9}
    machine = machine_of(settings.device)
    if machine is not None:
        # Triton is imported where there is a GPU.
        from qlinear.kernels.tile_table import multiplies_bytes

        least = floor_seconds(
            machine, packed.nbytes, m, n, k, x.itemsize, multiplies_bytes(packed.format, machine.capability)
        )
        row |= {"floor_us": least * 1e6, "of_floor": least / seconds}
    return row
