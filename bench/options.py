"""What ``python -m bench`` reads from its command line: everything is checked before anything is measured."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import torch

from bench.problems import LAYERS
from qlinear.format import DENSE, FORMATS, Scheme

#: The most tokens and threads that are asked for: beyond, it is a slip of the hand, and memory ends first.
_MOST_TOKENS, _MOST_THREADS = 1 << 20, 1024
_DTYPES = ("float16", "bfloat16", "float32")


class Listed(click.ParamType):  # type: ignore[type-arg]  # generic in newer click only
    """Values separated by commas, spaces around them or not, each kept once; an empty list is an error.

    ``read`` turns the text of one value into it, and raises a ValueError that says what is wanted.
    """

    name = "list"

    def __init__(self, read: Callable[[str], Any]) -> None:
        self._read = read

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        parts = [part.strip() for part in str(value).split(",")]
        if not all(parts):
            self.fail(f"got {value!r}, wanted values separated by commas, none of them empty", param, ctx)
        try:
            return tuple(dict.fromkeys(self._read(part) for part in parts))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Number(click.FloatRange):
    """A finite float from ``min`` on: what is no number compares as neither too small nor too large."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"got {value!r}, wanted a finite number", param, ctx)
        return number


class Device(click.ParamType):  # type: ignore[type-arg]  # generic in newer click only
    """A device that is here to measure on."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> torch.device:
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        here = ["cpu", *["cuda"][:gpus], *(f"cuda:{index}" for index in range(gpus))]
        if str(value) not in here:
            self.fail(f"there is no device {value!r} to measure on here, but: {', '.join(here)}", param, ctx)
        return torch.device(str(value))


class Output(click.Path):
    """A file or a folder that can be written: tried at once, and not when minutes of measuring are over."""

    def __init__(self, folder: bool = False) -> None:
        super().__init__(file_okay=not folder, dir_okay=folder, path_type=Path)
        self._folder = folder

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(str(super().convert(value, param, ctx)))
        try:
            make_writable(path if self._folder else path.parent)
        except OSError as error:
            self.fail(f"cannot write {str(path)!r}: {error.strerror or error}", param, ctx)
        return path


def make_writable(folder: Path) -> None:
    """Makes a folder where there is none; raises an OSError where nothing can be written into it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def scheme_of(text: str, known: Mapping[str, object] = FORMATS) -> str:
    """The name of a scheme in any spelling that :meth:`qlinear.Scheme.parse` takes.

    Raises:
        ValueError: there is no such scheme, or it is none of ``known``.
    """
    name = str(Scheme.parse(text))
    if name not in known:
        raise ValueError(f"{name} is not measured here; the schemes that are: {', '.join(known)}")
    return name


def _dense_scheme(text: str) -> str:
    return scheme_of(text, DENSE)


def _one_of(what: str, known: Mapping[str, object]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in known:
            raise ValueError(f"there is no {what} {text!r} here, but: {', '.join(known)}")
        return text

    return read


def _whole(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
            raise ValueError(f"got {text!r}, wanted a whole number from {low} to {high}")
        return int(text)

    return read


SCHEMES, DENSE_SCHEMES = Listed(scheme_of), Listed(_dense_scheme)
MODELS, DTYPES = Listed(_one_of("model", LAYERS)), Listed(_one_of("dtype", dict.fromkeys(_DTYPES)))
COUNTS, SEEDS = Listed(_whole(1, _MOST_TOKENS)), Listed(_whole(0, 2**63 - 1))
COUNT, THREADS = click.IntRange(1), click.IntRange(1, _MOST_THREADS)
SECONDS, MINUTES = Number(0), Number(1)
FILE, FOLDER, DEVICE = Output(), Output(folder=True), Device()
JSON = click.option("--json", "path", type=FILE, help="Also write the rows here.")
