"""Rounding to a format's codes inside a SparseGPT sweep (GPTQ's part of it), so that ``convert`` finds those codes.

The sweep leaves weights that are exactly ``(code - zero_point) * scale``; the codes need no other carrier, because
:func:`qlinear.quantize.quantize` recognizes a weight on a grid of its format and keeps its values
(:mod:`qlinear.grid`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlinear.format import Format, Scheme
from qlinear.grid import exact
from qlinear.quantize import quantize


class Rounding:
    """The grid of the columns a sweep visits; scales are searched as ``convert`` would, a group at a time.

    Args:
        scheme: an integer scheme such as ``"w4a16"``.
        dtype: of the float weight, which decides that of the scales.

    Raises:
        ValueError: unknown scheme, or one whose weights are not integers.
    """

    def __init__(self, scheme: str | Scheme, dtype: torch.dtype) -> None:
        self.format: Format = Scheme.parse(scheme).format
        if self.format.number != "int":
            raise ValueError(f"{scheme} does not store integers: a sweep cannot round to it")
        self._dtype = dtype
        self._scale = self._zero = torch.empty(0)

    @property
    def group(self) -> int:
        """Columns that blocks of a sweep must not cut; 1 where a scale belongs to a whole row."""
        return self.format.group_size or 1

    def begins(self, column: int) -> bool:
        """Whether a group of columns with scales of its own begins here."""
        return self.format.group_size is not None and column % self.format.group_size == 0

    def begin(self, weights: Tensor) -> None:
        """Chooses scales for ``weights`` ``[N, columns]``, the first columns of which are a group (or a whole row)."""
        some = weights[:, : self.format.group_size] if self.format.group_size else weights
        codes = quantize(some.to(self._dtype), self.format)
        scale = codes.scale.float()
        # A product with a code must fit the weight's dtype exactly where that is float32.
        self._scale = (exact(scale) if codes.scale.dtype == torch.float32 else scale).to(weights.dtype).squeeze(1)
        zero = torch.full_like(self._scale, self.format.offset)
        self._zero = zero if codes.zero_point is None else codes.zero_point.to(weights.dtype).squeeze(1)

    def round(self, column: Tensor) -> Tensor:
        """The values ``[N]`` on the grid; 0 stays 0."""
        codes = (column / self._scale).round().add_(self._zero).clamp_(0, self.format.max_code)
        # Adding 0 turns -0 into 0.
        return (codes - self._zero) * self._scale + 0.0
