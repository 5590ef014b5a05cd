"""``QLinear``: the drop-in module for a quantized ``nn.Linear``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qlinear import ops, paths, prepacked, semi_structured, sparse
from qlinear.float_layers import float_matrix, float_tensor, is_conv1d, is_linear
from qlinear.format import FORMATS, Format, Scheme
from qlinear.packing import PackedWeight, pack_codes, patterned
from qlinear.quantize import quantize

_BUFFERS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_index")


class QLinear(nn.Module):
    """A linear layer with packed weights: ``y = x @ W.T + bias`` for x ``[..., in_features]``, 16-bit float or float32.

    Buffers carry the names and the plain layout of a checkpoint: ``weight_packed`` int32, ``weight_scale``,
    ``weight_zero_point`` int32 (asymmetric schemes), ``weight_index`` int32 (sparse schemes). :meth:`prepare` puts them
    into the layout this device computes with, in place; ``state_dict``, pickling and ``deepcopy`` always go through
    plain, so no file holds one machine's private order. ``to(dtype)`` changes the bias and never the codes or the
    stored scales.

    Args:
        in_features, out_features, bias: as in ``nn.Linear``.
        scheme: for example ``"w4a16"``.
        dtype: of the float weight it stands for, and of the bias.
        compute_dtype: the input is cast to it and the output back; None computes in the input's dtype.

    Raises:
        ValueError: the scheme does not exist.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    weight_index: Tensor | None
    #: The 16-bit copy of :meth:`keep_dense`, dense or of :mod:`qlinear.semi_structured`; None where there is none.
    weight_dense: Tensor | None
    #: What stands for a weight of :mod:`qlinear.prepacked`; ``weight_packed`` is empty then.
    weight_opaque: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: str | Scheme,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dtype = dtype or torch.get_default_dtype()
        if compute_dtype not in (None, *ops.FLOATS):
            raise ValueError(f"compute_dtype is one of {ops.FLOATS}, got {compute_dtype!r}")
        self.in_features, self.out_features = in_features, out_features
        self.scheme = str(Scheme.parse(scheme))
        self.float_dtype, self.compute_dtype = dtype, compute_dtype
        #: Whether it stands for a Hugging Face ``Conv1D``, whose own weight is ``[in, out]``.
        self.from_conv1d = False
        fmt = self.format
        # Where the number of stored blocks or weights is up to the weight there are none yet: all of it is zero.
        weight, scale, zero, index = fmt.plain_shapes(out_features, in_features)
        self.register_buffer("weight_packed", _empty(weight, torch.int32, device))
        self.register_buffer("weight_scale", _empty(scale, fmt.scale_dtype(compute_dtype or dtype), device))
        self.register_buffer("weight_zero_point", None if zero is None else _empty(zero, torch.int32, device))
        self.register_buffer("weight_index", None if index is None else _empty(index, torch.int32, device).zero_())
        # No buffers, which may be written to, moved or sent to other processes: made anew wherever the layer goes.
        self.weight_dense = self.weight_opaque = None
        self.dense_dtype: torch.dtype | None = None
        self.bias = nn.Parameter(_empty((out_features,), dtype, device)) if bias else None

    @classmethod
    def from_float(
        cls,
        linear: nn.Module,
        scheme: str | Scheme,
        compute_dtype: torch.dtype | None = None,
        prune: str | None = None,
    ) -> QLinear:
        """Quantizes an ``nn.Linear`` or a Hugging Face ``Conv1D``; the layer itself is left alone, its bias is shared.

        ``prune`` names a method that brings the weight into the pattern of a sparse scheme first.

        Raises:
            TypeError: the layer is neither.
            ValueError: unknown scheme or method, or a weight that is not finite, has no data (``meta``) or not the
                pattern of a sparse scheme.
        """
        if not is_linear(linear):
            raise TypeError(f"QLinear is made from nn.Linear or transformers' Conv1D, got {type(linear).__name__}")
        weight, bias = float_matrix(linear), float_tensor(linear, "bias")
        if weight.is_meta:
            raise ValueError("the weight is on the meta device: it has no data to quantize; load the model first")
        n, k = weight.shape
        self = cls(k, n, scheme, bias=False, device="meta", dtype=weight.dtype, compute_dtype=compute_dtype)
        # Pruned before it is rounded: the selection is that of qlinear.prune.
        source = patterned(weight, self.format, prune).to(compute_dtype or weight.dtype)
        self._set(pack_codes(quantize(source, self.format), self.format))
        self.from_conv1d = is_conv1d(linear)
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        self.prepare()
        return self.train(linear.training)

    @property
    def format(self) -> Format:
        return FORMATS[self.scheme]

    @property
    def packed(self) -> PackedWeight:
        """The weight's tensors as they are now (a view, no copy)."""
        # Not by attributes, which nn.Module looks for in three places: a tenth of a small layer's time on a CPU.
        own: dict[str, Any] = self._buffers
        weight = own["weight_packed"] if self.weight_opaque is None else self.weight_opaque
        scale, zero, index = own["weight_scale"], own["weight_zero_point"], own["weight_index"]
        return PackedWeight(weight, scale, zero, self.format, self.out_features, self.in_features, index)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, computed anew at each use: for code that reads a linear layer's weight (T5 does)."""
        return self.dequantize()

    @property
    def layout(self) -> str:
        """``plain``, ``triton``, ``cpu``, ``fbgemm`` ...: told by the tensor (:class:`PackedWeight`)."""
        return self.packed.layout

    def forward(self, input: Tensor) -> Tensor:
        device, dtype, compute = input.device.type, input.dtype, self.compute_dtype
        if not input.is_meta and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            # What the product is made of has the dtypes it needs.
            with torch.autocast(device, enabled=False):
                return self._product(input, compute or dtype).to(dtype)
        y = self._product(input, compute or dtype)
        return y if y.dtype == dtype else y.to(dtype)

    def _product(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x if x.dtype == dtype else x.to(dtype)
        if self.weight_opaque is not None and (torch.compiler.is_exporting() or torch._C._get_tracing_state()):
            raise ValueError("this layout cannot be exported: call qlinear.prepare(model, layout='cpu') first")
        return ops.linear(x, self.packed, self.bias, self.weight_dense)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The float weight ``[out_features, in_features]`` this layer computes with, in the dtype it was made from."""
        return self.packed.dequantize(dtype or self.float_dtype)

    def prepare(self, layout: str | None = None) -> QLinear:
        """Puts the weight into a layout; None: the one this device is fastest with, unless it left the plain one."""
        if not self.weight_packed.is_meta and (layout or self.layout == "plain"):
            self._set(self.packed.to_layout(layout))
            if self.layout == "triton":
                ops.reserve(self.weight_packed.device)
        if self.dense_dtype is not None and self.weight_dense is None and not self.weight_packed.is_meta:
            dense = self.dequantize(self.dense_dtype).contiguous()
            self.weight_dense = semi_structured.choose(dense, self.format).copy
        return self

    def unprepare(self) -> QLinear:
        """Puts the weight back into the plain layout, bit for bit; a kept 16-bit copy is dropped until ``prepare``."""
        self._set(self.packed.to_layout("plain"))
        self.weight_dense = None
        return self

    def keep_dense(self, dtype: torch.dtype | None = None) -> QLinear:
        """Prepares the layer and keeps a 16-bit copy of its weight, for many tokens: long prompts, large batches.

        Few tokens are multiplied by the packed weight as before, more of them (``inspect`` says from where on) by the
        copy, as fast as in ``nn.Linear``. It costs 2 bytes a weight: more memory than before the conversion. It is
        never saved, copied or pickled; ``unprepare`` drops it, ``prepare`` and moves (device, dtype) make it anew.
        Of a 2:4 weight on an NVIDIA GPU it is PyTorch's semi-structured form, 1.125 bytes a weight, where that was
        right and faster than the dense one when both were tried with 2048 tokens.

        Args:
            dtype: float16 or bfloat16, used for inputs of that dtype; None is the dtype the layer computes in.

        Raises:
            ValueError: another dtype, a scheme that quantizes activations, which a 16-bit product would not, or one of
                blocks, which skips those that are zero for any number of tokens.
        """
        dtype = dtype or self.compute_dtype or self.float_dtype
        paths.check_copy(self.format, dtype)
        if dtype != self.dense_dtype:
            self.dense_dtype, self.weight_dense = dtype, None
        return self.prepare()

    def drop_dense(self) -> QLinear:
        """Drops the copy that :meth:`keep_dense` made."""
        self.dense_dtype = self.weight_dense = None
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of the weight in memory: codes, scales, zero points, padding, and a kept copy."""
        return self.packed.nbytes + (0 if self.weight_dense is None else self.weight_dense.nbytes)

    @property
    def _prepared(self) -> bool:
        """Whether ``prepare`` changed anything here; float16 on a CPU has no other layout than the plain one."""
        return self.layout != "plain" or self.weight_dense is not None

    def _set(self, packed: PackedWeight) -> None:
        weight, self.weight_scale, self.weight_zero_point, self.weight_index = packed.tensors
        self.weight_opaque = weight if prepacked.is_made(weight) else None
        self.weight_packed = weight if self.weight_opaque is None else _empty((0,), torch.int8, packed.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QLinear:
        probe = fn(self.weight_packed.new_empty(0))
        if probe.dtype != self.weight_packed.dtype:
            raise ValueError(f"packed weights cannot become {probe.dtype}; use .to(dtype), which leaves them alone")
        prepared = self._prepared
        # A copy in another dtype is made from the codes, not rounded twice; products in float32 have no use for one.
        dense, self.weight_dense = self.weight_dense, None
        if dense is not None and self.compute_dtype is None:
            moved = fn(dense.new_empty(0)).dtype
            self.dense_dtype = moved if moved.itemsize == 2 else None
        if prepared and probe.device != self.weight_packed.device:
            self.unprepare()
        # Seen as integers, scales pass through casts to another float dtype untouched.
        dtype = self.weight_scale.dtype
        self.weight_scale = self.weight_scale.view(torch.int32 if dtype.itemsize == 4 else torch.int16)
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # PyTorch has no annotation
        finally:
            self.weight_scale = self.weight_scale.view(dtype)
        return self.prepare() if prepared else self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout != "plain":
            plain = self.packed.to_layout("plain")
            for name, tensor in zip(_BUFFERS, plain.tensors, strict=True):
                if tensor is not None:
                    destination[prefix + name] = tensor

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        prepared = self._prepared
        if prepared:
            self.unprepare()
        if self.weight_index is not None:
            self._fit(state_dict, prefix)
        scale = state_dict.get(prefix + "weight_scale")
        if isinstance(scale, Tensor) and scale.is_floating_point() and scale.shape == self.weight_scale.shape:
            # The checkpoint's scales are kept as they are; copying into another dtype would round them.
            self.weight_scale = self.weight_scale.to(scale.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if prepared:
            self.prepare()

    def _fit(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Makes room for as many blocks or weights as a checkpoint has, where it has them in a consistent way.

        Raises:
            ValueError: its index contradicts itself or the weight; the message names the layer.
        """
        given = [state_dict.get(prefix + name) for name in _BUFFERS]
        try:
            shapes = sparse.shapes_of(given, self.format, self.out_features, self.in_features)
        except ValueError as error:
            raise ValueError(f"layer {prefix.removesuffix('.')!r}: {error}") from None
        for name, shape in zip(_BUFFERS, shapes or (), strict=shapes is not None):
            own = getattr(self, name)
            if own is not None and own.shape != shape:
                setattr(self, name, own.new_empty(shape))

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        plain = self.packed.to_layout("plain")
        state["_buffers"] = {**self._buffers, **dict(zip(_BUFFERS, plain.tensors, strict=True))}
        state["weight_dense"] = state["weight_opaque"] = None
        state["_was_prepared"] = self._prepared
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        prepared = state.pop("_was_prepared", False)
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # PyTorch has no annotation
        if prepared:
            self.prepare()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme={self.scheme}, layout={self.layout}, bytes={self.nbytes}"
        )


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)
