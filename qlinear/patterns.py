"""Where zeros may stand: the patterns of pruning, and their one grammar, which schemes share as a suffix."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

_GRAMMAR = re.compile(r"(?P<n>\d+):(?P<m>\d+)|block(?P<rows>\d+)(?:x(?P<columns>\d+))?")
_WHOLE = ("unstructured", "neurons", "heads")
_GRAMMAR_TEXT = "unstructured, <n>:<m>, block<size>, block<rows>x<columns>, neurons, heads"


@dataclass(frozen=True)
class Pattern:
    """Where zeros stand in a weight ``[N, K]``.

    - ``unstructured``: anywhere.
    - ``n:m`` (``2:4``): at most ``n`` non-zeros in each ``m`` neighbours along K (in_features); the last group of a
      row may be short.
    - ``block32``, ``block128x64``: whole blocks of rows (out_features) by columns; those at the edges may be short.
    - ``neurons``: rows of the layers that make an MLP's hidden units and the columns that consume them, removed.
    - ``heads``: attention heads (whole key-value groups where heads share them), removed.

    No pruner empties a layer: of a share below 1 at least one weight, block or unit of each stays, also where all
    layers are ranked together. A layer of so few blocks that the share cannot be met is warned of by name.

    Raises:
        ValueError: no such pattern.
    """

    name: str
    n: int = 0
    m: int = 0
    rows: int = 1
    columns: int = 1

    @classmethod
    def parse(cls, text: str | Pattern) -> Pattern:
        """Reads a pattern's name; a Pattern is returned as it is."""
        if isinstance(text, Pattern):
            return text
        if not isinstance(text, str):
            raise ValueError(f"a pattern is a string such as '2:4' or 'block64', got {text!r}")
        name = text.strip().lower()
        if name in _WHOLE:
            return cls(name)
        match = _GRAMMAR.fullmatch(name)
        if match is None:
            raise ValueError(f"pattern {text!r} does not exist; the patterns are: {_GRAMMAR_TEXT}")
        if match["n"]:
            n, m = int(match["n"]), int(match["m"])
            if not 0 < n < m:
                raise ValueError(f"pattern {text!r} keeps {n} of every {m} weights; 0 < n < m is wanted")
            return cls(f"{n}:{m}", n, m)
        rows = int(match["rows"])
        columns = int(match["columns"] or rows)
        if not (rows and columns):
            raise ValueError(f"pattern {text!r} has an empty block")
        return cls(f"block{rows}" if rows == columns else f"block{rows}x{columns}", rows=rows, columns=columns)

    @property
    def kind(self) -> str:
        """``unstructured``, ``n:m``, ``block``, ``neurons`` or ``heads``."""
        if self.m:
            return "n:m"
        return self.name if self.name in _WHOLE else "block"

    @property
    def structured(self) -> bool:
        """Whether shapes change instead of weights becoming zero."""
        return self.kind in ("neurons", "heads")

    def units(self, n: int, k: int) -> int:
        """Blocks of a weight ``[n, k]``, those at the edges too; its weights where the pattern has no blocks."""
        return -(-n // self.rows) * -(-k // self.columns)

    def holds(self, weight: Tensor) -> bool:
        """Whether no group of ``n:m`` in a weight ``[N, K]`` has more than ``n`` non-zeros; other patterns hold any."""
        if not self.m:
            return True
        padded = torch.nn.functional.pad(weight != 0, (0, -weight.shape[1] % self.m))
        return int(padded.unflatten(1, (-1, self.m)).sum(2).max()) <= self.n

    def sparsity(self, asked: float | None) -> float:
        """The share of zeros to make, once it is known to be possible: ``n:m`` fixes it, and None asks for that.

        Raises:
            ValueError: not in (0, 1), missing, or another than the pattern's own.
        """
        own = 1 - self.n / self.m if self.m else None
        if asked is None and own is not None:
            return own
        if isinstance(asked, bool) or not isinstance(asked, (int, float)) or not 0 < asked < 1:
            raise ValueError(f"sparsity is the share of weights to remove, between 0 and 1, got {asked!r}")
        if own is not None and abs(asked - own) > 1e-9:
            raise ValueError(f"pattern {self.name} makes a sparsity of {own:g} and no other, got {asked:g}")
        return float(asked)

    def __str__(self) -> str:
        return self.name
