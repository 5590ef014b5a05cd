"""What the commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from qlinear.tables import write_json

FILE = click.Path(dir_okay=False, path_type=Path)
JSON = click.option("--json", "json_path", type=FILE, help="Also write the result here.")
SCHEME_HELP = (
    "A scheme for every linear layer, or PATTERN=SCHEME (repeatable, first match wins; SCHEME 'none' leaves a layer). "
    "Of a sparse scheme an output head that was not pruned takes the dense one, unless PATTERN is its exact name."
)
DTYPES = ("bfloat16", "float16", "float32")
_Command = TypeVar("_Command", bound=Callable[..., Any])


def device_option(default: str, text: str) -> Callable[[_Command], _Command]:
    """``--device``: its name is checked before anything is loaded."""
    return click.option("--device", default=default, show_default=True, callback=_device_name, help=text)


def _device_name(_: click.Context, __: click.Parameter, name: str) -> str:
    import torch

    try:
        torch.device(name)
    except RuntimeError:
        # torch's own message lists every backend that was ever registered.
        raise ValueError(f"--device {name}: there is no such device; give cpu, cuda or cuda:N") from None
    return name


def load(model: str, dtype: str | None = None, device: str = "cpu") -> tuple[Any, Any]:
    """A model and its tokenizer (None where it has none), converted or float."""
    import torch

    from qlinear.demo.source import load_any

    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: there is no CUDA or ROCm device here")
    return load_any(model, dtype, device)


def maybe_json(path: Path | None, data: dict[str, Any]) -> None:
    if path is not None:
        write_json(path, data)
