"""Pruning: zeros in a model's linear layers, or fewer neurons and heads, before or together with quantization."""

from qlinear.patterns import Pattern
from qlinear.pruning.gradual import Gradual, KeepZeros
from qlinear.pruning.one_shot import METHODS, SCOPES, prune
from qlinear.pruning.report import SparsityReport, report
from qlinear.pruning.targets import fold_masks

__all__ = ["METHODS", "SCOPES", "Gradual", "KeepZeros", "Pattern", "SparsityReport", "fold_masks", "prune", "report"]
