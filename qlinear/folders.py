"""Writing a folder as a whole: what was there stays until all of the new one is."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

#: What a Hugging Face folder holds beside weights and config: tokenizer, generation and preprocessing files.
_COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model",
    "chat_template*", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "image_processor*", "LICENSE*", "README.md",
)  # fmt: skip


def free(folder: str | Path, overwrite: bool) -> Path:
    """Where a folder is to be written, which is empty or may be replaced; its parent exists.

    Raises:
        FileExistsError: it may not.
    """
    # What a link points at is replaced, not the link.
    target = Path(folder).resolve()
    if overwrite and target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file, not a folder")
    if not overwrite and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not empty; pass overwrite=True to replace it")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def source_folder(model: nn.Module) -> Path | None:
    """The folder a Hugging Face model came from."""
    path = getattr(getattr(model, "config", None), "_name_or_path", "")
    return Path(path) if path and Path(path).is_dir() else None


def copy_companions(source: Path | None, target: Path) -> None:
    """Copies tokenizer and similar files that are not there yet."""
    if source is not None:
        for pattern in _COMPANIONS:
            for file in sorted(source.glob(pattern)):
                if file.is_file() and not (target / file.name).exists():
                    shutil.copyfile(file, target / file.name)


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A folder whose files take the target's place when the block ends well, and which vanishes when it does not.

    An empty folder that is there stays, and is filled: it may be a mount, or the current folder.
    """
    empty = target.is_dir() and not any(target.iterdir())
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target if empty else target.parent))
    old = None
    try:
        yield temporary
        temporary.chmod(0o755)
        if empty:
            for file in sorted(temporary.iterdir()):
                os.replace(file, target / file.name)
            temporary.rmdir()
            return
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
            os.replace(target, old)
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if old is not None and not target.exists():
            os.replace(old, target)
        elif old is not None:
            old.rmdir()
        raise
    if old is not None:
        shutil.rmtree(old)
