"""``save`` and ``load``: a converted model as a Hugging Face folder.

``model.safetensors`` holds every tensor in the plain, hardware-independent layout; ``config.json`` is the model's own,
with the schemes under ``quantization_config``; tokenizer files are carried along. The folder is written beside its
place and moved in.

A model whose quantized layers all have 8-bit floats (``fp8``, ``w8a16-fp8``) is stored as compressed-tensors stores it:
``quantization_config`` is that library's, ours stands under ``qlinear`` (see :mod:`qlinear.compressed`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qlinear.compressed import from_disk, quantization_config, to_disk
from qlinear.conversion import prepare
from qlinear.float_layers import float_shape, is_conv1d
from qlinear.folders import beside, copy_companions, free, source_folder
from qlinear.linear import QLinear
from qlinear.reshaped import differences, reshape
from qlinear.selection import candidates
from qlinear.undo import Undo

#: Of ``quantization_config``; a loader refuses a newer one.
FORMAT_VERSION = 1
WEIGHTS = "model.safetensors"
#: Where our part of ``config.json`` stands when ``quantization_config`` is another library's.
_OURS = "qlinear"

#: What our part of ``config.json`` holds beside the version.
_REQUIRED = ("float_dtype", "compute_dtype", "modules", "tied", "computed_buffers")


def save(
    model: nn.Module, folder: str | Path, *, companions: str | Path | None = None, overwrite: bool = False
) -> Path:
    """Writes a converted model to ``folder``.

    Args:
        model: a model that :func:`qlinear.convert` converted; a Hugging Face model or any ``nn.Module``.
        folder: must not exist or be empty, unless ``overwrite``; then it is replaced as a whole, where a link points.
        companions: a folder whose tokenizer and similar files are copied; None is the folder the model came from.

    Raises:
        ValueError: the model has no quantized layer, or a parameter has no data (``meta``).
        FileExistsError: the folder exists and is not empty.
    """
    target = free(folder, overwrite)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QLinear)}
    if not layers:
        raise ValueError("the model has no quantized layer: convert it first, or use the model's own save method")
    tensors, tied = _tensors(model)
    config = _config(model, layers, tied)
    tensors = to_disk(tensors, layers)
    with beside(target) as temporary:
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        copy_companions(source_folder(model) if companions is None else Path(companions), temporary)
        generation = getattr(model, "generation_config", None)
        if generation is not None and not (temporary / "generation_config.json").exists():
            generation.save_pretrained(temporary)
    return target


def save_float(
    model: Any, folder: str | Path, *, companions: str | Path | None = None, overwrite: bool = False
) -> Path:
    """Writes a Hugging Face model in float (pruned, say) with its own ``save_pretrained``, as :func:`save` does.

    Args:
        model: has ``save_pretrained``; ``from_pretrained`` reads the result.
        folder, companions, overwrite: as in :func:`save`.

    Raises:
        TypeError: the model has no ``save_pretrained``.
        ValueError: its config cannot say what shapes it has: what is written could not be read.
        FileExistsError: the folder exists and is not empty.
    """
    if not hasattr(model, "save_pretrained"):
        raise TypeError(f"{type(model).__name__} has no save_pretrained: save its state_dict")
    if layers := differences(model).get("layers"):
        name, (n, k) = next(iter(layers.items()))
        raise ValueError(
            f"{name!r} is {n} x {k} (out_features x in_features), which the config of {type(model).__name__} cannot "
            f"say, nor {len(layers) - 1} others: from_pretrained could not read it. Convert it: qlinear.save can"
        )
    target = free(folder, overwrite)
    with beside(target) as temporary:
        model.save_pretrained(temporary)
        copy_companions(source_folder(model) if companions is None else Path(companions), temporary)
    return target


def load(folder: str | Path, *, model: nn.Module | None = None, device: str | torch.device | None = None) -> nn.Module:
    """Loads what :func:`save` wrote: the same tensors, bit for bit, prepared for the device.

    Args:
        folder: a folder that :func:`save` wrote.
        model: the float model's structure (its weights are not read, and may be on ``meta``); None builds the
            Hugging Face class that ``config.json`` names.
        device: where to put the model; None is the CPU.

    A load that fails leaves ``model`` as it was.

    Raises:
        FileNotFoundError: no such folder, or no checkpoint in it.
        ValueError: a file is damaged, not written by qlinear or by a newer version, or it does not fit the model, by
            the tensors' names.
    """
    folder = Path(folder)
    for name in ("config.json", WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not a checkpoint: it has no {name}")
    config, state = _read(folder)
    quantization = _quantization(config, folder)
    if model is None:
        model = _build(config, folder)
    with Undo(model) as undo:
        for module in model.modules():
            undo.keep_members(module)
        _fill(model, state, quantization, folder)
    if device is not None:
        model.to(device)
    return prepare(model).eval()


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of a folder, before anything is made of them."""
    try:
        config = json.loads((folder / "config.json").read_text())
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__}, not an object")
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} cannot be read: {error}") from error
    try:
        return config, load_file(folder / WEIGHTS, device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} cannot be read: {error}") from error


def _fill(model: nn.Module, state: dict[str, Tensor], quantization: dict[str, Any], folder: Path) -> None:
    """Gives a float model the layers and the tensors of a checkpoint."""
    reshape(model, quantization.get("reshaped", {}))
    _swap(model, quantization)
    state = from_disk(state, quantization["modules"])
    for name, source in quantization["tied"].items():
        if source not in state:
            raise ValueError(f"{folder} has no tensor {source!r}, which {name!r} shares")
        state[name] = state[source]
    result = model.load_state_dict(state, strict=False, assign=True)
    missing = [name for name in result.missing_keys if name not in quantization["tied"]]
    if missing or result.unexpected_keys:
        unexpected = result.unexpected_keys[:5]
        raise ValueError(f"{folder} does not fit the model: missing {missing[:5]}, unexpected {unexpected}")
    _share(model, quantization["tied"])
    for name, buffer in _computed_buffers(model):
        buffer.data = buffer.to(getattr(torch, quantization["computed_buffers"].get(name, _dtype_name(buffer.dtype))))
    tie = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()


def _share(model: nn.Module, tied: dict[str, str]) -> None:
    """Makes names of one parameter one parameter again: they were filled with the same tensor, each by itself."""
    for name, source in tied.items():
        owner, _, key = name.rpartition(".")
        first, _, first_key = source.rpartition(".")
        found = model.get_submodule(first)._parameters.get(first_key)
        members = model.get_submodule(owner)._parameters
        if found is not None and key in members:
            members[key] = found


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The plain tensors of a model, shared ones once, and the names that share them: ``{alias: name}``."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    owner: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device: it has no data to save")
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in owner:
            tied[name] = owner[key]
            continue
        owner[key] = name
        tensors[name] = tensor.detach().cpu().contiguous()
    return tensors, tied


def _config(model: nn.Module, layers: dict[str, QLinear], tied: dict[str, str]) -> dict[str, Any]:
    config: dict[str, Any] = {}
    own: Any = getattr(model, "config", None)
    if hasattr(own, "to_json_string"):
        config = json.loads(own.to_json_string(use_diff=False)) | {"architectures": [type(model).__name__]}
    dtypes = {name: _dtypes(layer) for name, layer in layers.items()}
    first = next(iter(dtypes.values()))
    ours = {
        "quant_method": "qlinear",
        "version": FORMAT_VERSION,
        **first,
        "other_dtypes": {name: own for name, own in dtypes.items() if own != first},
        "modules": {name: layer.scheme for name, layer in layers.items()},
        "tied": tied,
        # Buffers a model computes for itself (rotary frequencies) come back in the dtype the model had cast them to.
        "computed_buffers": {name: _dtype_name(b.dtype) for name, b in _computed_buffers(model)},
        "reshaped": differences(model),
    }
    theirs = quantization_config(model, layers) if config else None
    return config | ({"quantization_config": theirs, _OURS: ours} if theirs else {"quantization_config": ours})


def _computed_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The float buffers that a state dict does not hold."""
    for prefix, module in model.named_modules():
        for key in sorted(module._non_persistent_buffers_set):
            buffer = module._buffers.get(key)
            if buffer is not None and buffer.is_floating_point():
                yield f"{prefix}.{key}" if prefix else key, buffer


def _dtypes(layer: QLinear) -> dict[str, str | None]:
    """The dtypes a layer has beside those of its tensors."""
    compute = None if layer.compute_dtype is None else _dtype_name(layer.compute_dtype)
    return {"float_dtype": _dtype_name(layer.float_dtype), "compute_dtype": compute}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _quantization(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    found = config.get(_OURS) or config.get("quantization_config") or {}
    if found.get("quant_method") != "qlinear":
        raise ValueError(f"{folder} was not written by qlinear: its quant_method is {found.get('quant_method')!r}")
    if not isinstance(found.get("version"), int) or any(key not in found for key in _REQUIRED):
        raise ValueError(f"{folder}: its quantization_config has not all of: version, {', '.join(_REQUIRED)}")
    if found["version"] > FORMAT_VERSION:
        raise ValueError(
            f"{folder} has checkpoint version {found['version']}, this qlinear reads up to {FORMAT_VERSION}: upgrade it"
        )
    return dict(found)


def _build(config: dict[str, Any], folder: Path) -> nn.Module:
    """The Hugging Face model class of a config, without allocating its parameters; buffers are real."""
    architectures = config.get("architectures") or [None]
    try:
        import transformers
        from accelerate import init_empty_weights
    except ImportError as error:
        raise ImportError(f"building the model takes pip install 'qlinear[demo]' ({error})") from error
    cls = getattr(transformers, architectures[0] or "", None)
    if cls is None:
        wanted = architectures[0]
        raise ValueError(f"{folder}: transformers has no class {wanted!r}; pass the model's structure as model=")
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", _OURS)}
    with init_empty_weights(include_buffers=False):
        # transformers' classes are found by name, so that no type is known.
        return cls(cls.config_class.from_dict(plain))  # type: ignore[no-any-return]  # a class by name


def _swap(model: nn.Module, quantization: dict[str, Any]) -> None:
    """Replaces the linear layers named in a checkpoint by empty quantized ones."""
    layers = {name: c for c in candidates(model) for name in c.names}
    made: dict[int, QLinear] = {}
    for name, scheme in quantization["modules"].items():
        if name not in layers:
            raise ValueError(f"the checkpoint quantizes {name!r}, which is no linear layer of the model")
        old = layers[name].module
        dtypes = quantization.get("other_dtypes", {}).get(name, quantization)
        dtype = getattr(torch, dtypes["float_dtype"])
        compute = dtypes["compute_dtype"] and getattr(torch, dtypes["compute_dtype"])
        n, k = float_shape(old)
        if id(old) not in made:
            made[id(old)] = QLinear(k, n, scheme, old.bias is not None, "meta", dtype, compute)
            made[id(old)].from_conv1d = is_conv1d(old)
        for alias in layers[name].names:
            model.set_submodule(alias, made[id(old)])
