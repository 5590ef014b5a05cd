"""Options that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qlinear.tables import write_json

FILE = click.Path(dir_okay=False, path_type=Path)
JSON = click.option("--json", "json_path", type=FILE, help="Also write the result here.")
DTYPES = ("bfloat16", "float16", "float32")


def maybe_json(path: Path | None, data: dict[str, Any]) -> None:
    """Writes a command's result where ``--json`` said."""
    if path is not None:
        write_json(path, data)
