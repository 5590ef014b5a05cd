"""Where this package keeps files between runs: the demo's model, tuned tables."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$QLINEAR_CACHE``, else ``$XDG_CACHE_HOME/qlinear``, else ``~/.cache/qlinear``."""
    if own := os.environ.get("QLINEAR_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qlinear"
