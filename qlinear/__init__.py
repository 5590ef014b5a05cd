"""qlinear: small, fast linear layers for PyTorch: ``qlinear.convert(model, "w4a16")`` swaps a model's in place."""

from qlinear.checkpoint import load, save
from qlinear.conversion import convert, prepare, unprepare
from qlinear.format import FORMATS, Format, Scheme
from qlinear.inspection import Inspection, inspect
from qlinear.linear import QLinear
from qlinear.packing import PackedWeight, pack
from qlinear.pruning import prune
from qlinear.tuning import Tuning, tune
from qlinear.validation import Validation, validate

__version__ = "0.1.0"

__all__ = [
    "FORMATS",
    "Format",
    "Inspection",
    "PackedWeight",
    "QLinear",
    "Scheme",
    "Tuning",
    "Validation",
    "convert",
    "inspect",
    "load",
    "pack",
    "prepare",
    "prune",
    "save",
    "tune",
    "unprepare",
    "validate",
]
