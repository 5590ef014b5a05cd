"""What sparsity there is in a model, and what it would be worth in each format that could hold it: a prediction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from qlinear.conversion import candidates
from qlinear.float_layers import float_tensor, is_conv1d
from qlinear.format import FORMATS, Format
from qlinear.machines import MACHINES, STREAMED
from qlinear.pruning.patterns import Pattern
from qlinear.pruning.select import block_sums
from qlinear.tables import human_bytes, table


def holds(fmt: Format, weight: Tensor) -> bool:
    """Whether a weight ``[N, K]`` has a format's pattern, as ``convert`` asks: no non-zero lost, something left out."""
    pattern = _pattern(fmt)
    return pattern is None or (pattern.holds(weight) and stored_share(fmt, weight) < 1)


def stored_share(fmt: Format, weight: Tensor) -> float:
    """The share of weights (of blocks, in a block format) that a format stores of ``weight`` ``[N, K]``."""
    pattern = _pattern(fmt)
    if pattern is None:
        return 1.0
    if pattern.kind == "n:m":
        return pattern.n / pattern.m
    units = block_sums((weight != 0).float(), pattern) if pattern.kind == "block" else weight
    return float((units != 0).float().mean())


def _pattern(fmt: Format) -> Pattern | None:
    return None if fmt.sparsity is None else Pattern.parse(fmt.sparsity)


def _bytes(fmt: Format, weight: Tensor) -> int:
    n, k = weight.shape
    scale_bytes = fmt.scale_dtype(weight.dtype).itemsize
    return fmt.weight_bytes(n, k, scale_bytes, density=stored_share(fmt, weight))


@dataclass(frozen=True)
class LayerSparsity:
    """One linear layer: its share of zeros, its bytes now, and predicted bytes in each format that could hold it."""

    name: str
    shape: tuple[int, int]
    sparsity: float
    bytes_now: int
    #: Predicted bytes by the name of the scheme, over every format whose pattern the weight has.
    predicted: dict[str, int]

    @property
    def smallest(self) -> str:
        """The scheme of the fewest bytes."""
        return min(self.predicted, key=lambda name: self.predicted[name])

    def smallest_of(self, bits: int) -> str | None:
        """The scheme of the fewest bytes among those of so many bits a stored weight."""
        own = {name: size for name, size in self.predicted.items() if FORMATS[name].bits == bits}
        return min(own, key=lambda name: own[name]) if own else None


@dataclass(frozen=True)
class SparsityReport:
    """Sparsity by layer and predictions; ``print`` shows a table, :meth:`to_dict` gives plain data.

    Times are predictions, not measurements: bytes over the bandwidth of ``machine``, which is what a layer costs that
    multiplies few tokens with a kernel bound by memory.
    """

    layers: list[LayerSparsity]
    machine: str

    @property
    def sparsity(self) -> float:
        """The share of zeros over all linear layers."""
        sizes = [layer.shape[0] * layer.shape[1] for layer in self.layers]
        zeros = sum(layer.sparsity * size for layer, size in zip(self.layers, sizes, strict=True))
        return zeros / sum(sizes)

    def totals(self) -> dict[str, int]:
        """Predicted bytes of all layers together, for each format that could hold every one of them."""
        names = [name for name in FORMATS if all(name in layer.predicted for layer in self.layers)]
        return {name: sum(layer.predicted[name] for layer in self.layers) for name in names}

    def microseconds(self, size: float) -> float:
        """The predicted time to read so many bytes once on the machine."""
        return size / MACHINES[self.machine].stream_bytes_per_s * 1e6

    def to_dict(self) -> dict[str, Any]:
        """``{"machine", "sparsity", "predicted_bytes", "predicted_microseconds", "layers": [one dict a layer]}``."""
        totals = self.totals()
        times = {name: self.microseconds(size) for name, size in totals.items()}
        layers = [
            asdict(layer) | {"predicted_microseconds": {n: self.microseconds(b) for n, b in layer.predicted.items()}}
            for layer in self.layers
        ]
        head = {"machine": self.machine, "sparsity": self.sparsity}
        return {**head, "predicted_bytes": totals, "predicted_microseconds": times, "layers": layers}

    def __str__(self) -> str:
        bits = sorted({fmt.bits for fmt in FORMATS.values()}, reverse=True)
        header = ("layer", "shape", "zeros", "float", *(f"best of {b} bits" for b in bits))
        rows = [
            (e.name, "x".join(map(str, e.shape)), f"{e.sparsity:.1%}", human_bytes(e.bytes_now),
             *(self._cell(e, e.smallest_of(b)) for b in bits))
            for e in self.layers
        ]  # fmt: skip
        lines = [table(header, rows, right=(2, 3))]
        lines.append(
            f"zeros over all: {self.sparsity:.1%}. Predicted for all layers together, one read of the weights:"
        )
        now = sum(layer.bytes_now for layer in self.layers)
        totals = sorted(self.totals().items(), key=lambda item: item[1])
        summary = [("float, as it is", human_bytes(now), f"{self.microseconds(now):.1f}", "1.00")]
        for name, size in totals:
            summary.append((name, human_bytes(size), f"{self.microseconds(size):.1f}", f"{now / size:.2f}"))
        lines.append(table(("scheme", "bytes", f"us on {self.machine}", "times smaller"), summary, right=(1, 2, 3)))
        lines.append(f"predictions: bytes over {STREAMED:.0%} of the data sheet's bandwidth; nothing was measured")
        return "\n".join(lines)

    @staticmethod
    def _cell(layer: LayerSparsity, name: str | None) -> str:
        return "-" if name is None else f"{name} {human_bytes(layer.predicted[name])}"


def report(model: nn.Module, machine: str = "H200", formats: Mapping[str, Format] = FORMATS) -> SparsityReport:
    """The sparsity of a float model's linear layers and what each format would make of it, before converting.

    Works on any model: zeros in the weights are all it looks at, whoever made them. Nothing is run.

    Args:
        model: a float model; layers that are converted already are not listed.
        machine: the GPU whose memory bandwidth turns bytes into a time: one of
            :data:`qlinear.machines.MACHINES`.
        formats: the formats to predict; all that exist.

    Raises:
        ValueError: an unknown machine, or no linear layer in float.
    """
    if machine not in MACHINES:
        raise ValueError(f"machine {machine!r} is not known; the machines are: {', '.join(MACHINES)}")
    layers = [_layer(c.name, c.module, formats) for c in candidates(model) if c.tied_to is None]
    if not layers:
        raise ValueError("the model has no linear layer in float")
    return SparsityReport(layers, machine)


def _layer(name: str, module: nn.Module, formats: Mapping[str, Format]) -> LayerSparsity:
    weight = float_tensor(module)
    assert weight is not None
    weight = weight.detach().t() if is_conv1d(module) else weight.detach()
    predicted = {key: _bytes(fmt, weight) for key, fmt in formats.items() if holds(fmt, weight)}
    n, k = weight.shape
    zeros = float((weight == 0).double().mean())
    return LayerSparsity(name, (n, k), zeros, weight.numel() * weight.element_size(), predicted)
