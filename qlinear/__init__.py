"""qlinear: small, fast linear layers for PyTorch models. ``qlinear.convert(model, "w4a16")`` swaps them in place."""

from qlinear.convert import convert, prepare
from qlinear.format import FORMATS, Format, Scheme
from qlinear.linear import QLinear
from qlinear.pack import PackedWeight, pack

__version__ = "0.1.0"

__all__ = ["FORMATS", "Format", "PackedWeight", "QLinear", "Scheme", "convert", "pack", "prepare"]
