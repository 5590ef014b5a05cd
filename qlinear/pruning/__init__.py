"""Pruning: zeros in a model's linear layers, or fewer neurons and heads, before or together with quantization."""

from qlinear.pruning.one_shot import METHODS, prune
from qlinear.pruning.patterns import Pattern
from qlinear.pruning.targets import fold_masks

__all__ = ["METHODS", "Pattern", "fold_masks", "prune"]
