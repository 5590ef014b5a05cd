"""``inspect``: what every parameter of a model is stored as, in bytes, and why the rest was left in float."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from qlinear import semi_structured
from qlinear.linear import QLinear
from qlinear.paths import describe_paths, paths
from qlinear.selection import candidates
from qlinear.tables import human_bytes, table


@dataclass(frozen=True)
class Row:
    """One parameter, or one packed weight: the bytes of the float weight it was or is, and those it holds now."""

    name: str
    shape: tuple[int, ...]
    scheme: str | None
    bytes_before: int
    bytes_after: int
    layout: str | None
    #: Why it is in float; None where it is quantized.
    reason: str | None
    #: How the layer multiplies where it is now, by the number of tokens each way begins at; None where it is in float.
    paths: dict[int, str] | None = None
    #: The dtype of a kept 16-bit copy, whose bytes are in ``bytes_after``, and "semi-structured" where it is that; None
    #: where there is none.
    kept_copy: str | None = None
    #: A dense scheme that holds every weight in no more bytes than this sparse one the kept ones; None: there is none.
    smaller_dense: str | None = None

    @property
    def note(self) -> str:
        """Why it is in float, or how it is stored."""
        if self.reason is not None:
            return self.reason
        smaller = f"; dense {self.smaller_dense} would be no larger" if self.smaller_dense else ""
        return f"{self.layout} layout" + (f", {self.kept_copy} copy" if self.kept_copy else "") + smaller


@dataclass(frozen=True)
class Inspection:
    """The rows of a model; ``print`` shows a table, :meth:`to_dict` gives plain data."""

    rows: list[Row]

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.rows)

    @property
    def quantized(self) -> list[Row]:
        return [row for row in self.rows if row.scheme is not None]

    def to_dict(self) -> dict[str, Any]:
        """``{"bytes_before", "bytes_after", "parameters": [one dict a row]}``."""
        rows = [asdict(row) for row in self.rows]
        return {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after, "parameters": rows}

    def __str__(self) -> str:
        lines = [
            (row.name, "x".join(map(str, row.shape)), row.scheme or "float", human_bytes(row.bytes_before),
             human_bytes(row.bytes_after), row.note)
            for row in self.rows
        ]  # fmt: skip
        ratio = self.bytes_before / max(self.bytes_after, 1)
        change = f"{ratio:.2f}x smaller" if ratio >= 1 else f"{1 / ratio:.2f}x larger"
        note = f"{len(self.quantized)} of {len(self.rows)} quantized, {change}"
        lines.append(("total", "", "", human_bytes(self.bytes_before), human_bytes(self.bytes_after), note))
        header = ("parameter", "shape", "scheme", "before", "after", "note")
        return table(header, lines, right=(3, 4), rule_before_last=True) + self._paths()

    def _paths(self) -> str:
        """How the layers multiply, a line for each way."""
        layers: dict[str, int] = {}
        for row in self.quantized:
            way = f"{row.scheme}: {describe_paths(row.paths or {})}"
            layers[way] = layers.get(way, 0) + 1
        return "".join(f"\n{count} x {way}" for way, count in layers.items())


def inspect(model: nn.Module) -> Inspection:
    """Lists every parameter of a model: its scheme and bytes before and after, or the reason it was left in float.

    Parameters shared by several modules are listed once, under their first name. Packed weights count everything
    they hold in memory: codes, scales, zero points, padding and a kept 16-bit copy.
    """
    reasons = {
        id(c.module): c.obstacle or (f"tied to {c.tied_to}" if c.tied_to else "not asked for")
        for c in candidates(model)
    }
    rows, seen = [], set()
    for prefix, module in model.named_modules():
        if isinstance(module, QLinear):
            rows.append(_packed_row(prefix, module))
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                name = f"{prefix}.{key}" if prefix else key
                rows.append(_float_row(name, parameter, _reason(module, key, reasons)))
    return Inspection(rows)


def _packed_row(name: str, layer: QLinear) -> Row:
    shape = (layer.out_features, layer.in_features)
    before = layer.out_features * layer.in_features * layer.float_dtype.itemsize
    dense = layer.weight_dense
    dtype = layer.compute_dtype or (layer.float_dtype if dense is None else dense.dtype)
    kept = dense is not None and dense.dtype == dtype
    made = dense is not None and semi_structured.is_made(dense, layer.in_features)
    ways = paths(
        layer.format, dtype, layer.weight_packed.device, layer.layout, layer.in_features, layer.out_features, kept, made
    )
    name = f"{name}.weight" if name else "weight"
    smaller = layer.format.smaller_dense(*shape, layer.packed.density) if layer.format.sparsity else None
    smaller_name = None if smaller is None else smaller.name
    copy = None if dense is None else str(dense.dtype).removeprefix("torch.") + (" semi-structured" if made else "")
    return Row(name, shape, layer.scheme, before, layer.nbytes, layer.layout, None, ways, copy, smaller_name)


def _float_row(name: str, parameter: Tensor, reason: str) -> Row:
    return Row(name, tuple(parameter.shape), None, parameter.nbytes, parameter.nbytes, None, reason)


def _reason(module: nn.Module, key: str, reasons: dict[int, str]) -> str:
    if key == "bias":
        return "a bias stays in float"
    if id(module) in reasons:
        return reasons[id(module)]
    return f"{type(module).__name__} is not a linear layer"
