"""What can be removed whole: the hidden units of MLPs and the heads of attention, as slices of linear layers.

Found by the names the field gives them: Llama-like models (gate, up and down projections; q, k, v and o), GPT-2
(``c_fc``, ``c_attn``, ``c_proj``), BERT (``intermediate``, ``attention.self``, ``output``), ``fc1``/``fc2`` (ViT, OPT),
and two linear layers in an ``nn.Sequential`` with only elementwise modules between them. Names do not say all that a
forward does: :mod:`qlinear.pruning.obstacles` tells which of these are known to be safe.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from qlinear.float_layers import float_shape, is_linear
from qlinear.reshaped import KEY_HEADS, QUERY_HEADS, WIDTHS

_MLPS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("c_fc",), "c_proj"),
    (("fc1",), "fc2"),
    (("intermediate.dense",), "output.dense"),
)
_ATTENTIONS = (
    (("q_proj", "k_proj", "v_proj"), ("o_proj", "out_proj")),
    (("self.query", "self.key", "self.value"), ("output.dense",)),
)
_ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid,
    nn.Softplus, nn.Hardswish, nn.Hardtanh, nn.Hardsigmoid, nn.Identity, nn.Dropout,
)  # fmt: skip


@dataclass(frozen=True)
class Slice:
    """Unit ``u`` owns ``size`` rows (axis 0 of a weight ``[N, K]``) or columns (axis 1) from ``offset + u * size``."""

    layer: nn.Module
    axis: int
    size: int = 1
    offset: int = 0


@dataclass
class Structure:
    """Units that can be removed together: hidden units of one MLP, or heads (key-value groups) of one attention."""

    name: str
    units: int
    #: Rows of the layers that make the units, and, last, columns of the layer that consumes them.
    slices: list[Slice]
    #: Attributes of modules that count something in proportion to the units: (module, attribute).
    counts: list[tuple[nn.Module, str]] = field(default_factory=list)
    #: Query heads in a unit, and rows in a head; 0 where units are neurons.
    heads: int = 0
    head_dim: int = 0
    #: The modules whose forwards use the layers, outermost first; none of an ``nn.Sequential``, which was walked.
    holders: list[nn.Module] = field(default_factory=list)
    #: The nearest Hugging Face config above it, and the attributes there that count the units, with their value.
    config: object = None
    described: dict[str, int] = field(default_factory=dict)

    @property
    def consumer(self) -> Slice:
        return self.slices[-1]

    @property
    def layers(self) -> list[nn.Module]:
        """The layers, each once."""
        return list({id(s.layer): s.layer for s in self.slices}.values())


def find(model: nn.Module, kind: str) -> list[Structure]:
    """Every structure of a kind (``neurons`` or ``heads``) in a model, in order.

    Raises:
        ValueError: an attention whose heads cannot be told apart.
    """
    found: list[Structure] = []
    for name, module in model.named_modules():
        finder = _attention if kind == "heads" else _sequential if type(module) is nn.Sequential else _mlp
        found += finder(name, module)
    for structure in found:
        _describe(model, structure)
    return found


def _describe(model: nn.Module, structure: Structure) -> None:
    """Finds what the nearest config above a structure says about its units."""
    path = structure.name.split(".")
    above = [model.get_submodule(".".join(path[:i])) for i in range(len(path), -1, -1)]
    config = structure.config = next((m.config for m in above if hasattr(m, "config")), None)
    if structure.heads:
        # A config that has no head_dim of its own divides the hidden size by the number of heads: it cannot say this.
        if not isinstance(getattr(config, "head_dim", None), int):
            return
        wanted = {"num_attention_heads": structure.units * structure.heads, "num_key_value_heads": structure.units}
        structure.described = {key: value for key, value in wanted.items() if getattr(config, key, None) == value}
        return
    for key in ("intermediate_size", "ffn_dim", "n_inner"):
        # GPT-2: None stands for four times the hidden size.
        if getattr(config, key, 0) in (structure.units, None):
            structure.described = {key: structure.units}
            return


def _get(module: nn.Module, path: str) -> nn.Module | None:
    """A linear layer below a module, or None."""
    for part in path.split("."):
        below = getattr(module, part, None)
        if not isinstance(below, nn.Module):
            return None
        module = below
    return module if is_linear(module) else None


def _mlp(name: str, module: nn.Module) -> Iterator[Structure]:
    for producers, consumer in _MLPS:
        rows, columns = [_get(module, p) for p in producers], _get(module, consumer)
        if columns is None or any(r is None for r in rows):
            continue
        width = float_shape(columns)[1]
        makers = [r for r in rows if r is not None]
        if all(float_shape(r)[0] == width for r in makers):
            slices = [*(Slice(r, 0) for r in makers), Slice(columns, 1)]
            yield Structure(join(name, consumer), width, slices, holders=_holders(module, *producers, consumer))
            return


def _sequential(name: str, module: nn.Module) -> Iterator[Structure]:
    maker: nn.Module | None = None
    # named_children() leaves out a module that came before.
    for key, child in module._modules.items():
        if type(child) is nn.Linear:
            if maker is not None:
                yield Structure(join(name, key), float_shape(child)[1], [Slice(maker, 0), Slice(child, 1)])
            maker = child
        elif child is None or not keeps_units_apart(child):
            maker = None


def keeps_units_apart(module: nn.Module) -> bool:
    """Whether a module computes each hidden unit from itself alone, so that others can go."""
    kind = type(module)
    # The activations of Hugging Face, of which some have a parameter, and what drops whole samples.
    return kind in _ELEMENTWISE or kind.__module__ == "transformers.activations" or kind.__name__.endswith("DropPath")


def _attention(name: str, module: nn.Module) -> Iterator[Structure]:
    for makers, consumers in _ATTENTIONS:
        query, key, value = (_get(module, m) for m in makers)
        out = next((c for c in consumers if _get(module, c) is not None), None)
        if query is None or key is None or value is None or out is None:
            continue
        inner = getattr(module, makers[0].split(".")[0]) if "." in makers[0] else module
        size = _head_dim(inner)
        if size is None:
            raise ValueError(f"{name!r} has no head_dim: its heads cannot be told apart")
        heads, units = float_shape(query)[0] // size, float_shape(key)[0] // size
        share = heads // units
        consumer = _get(module, out)
        assert consumer is not None
        slices = [Slice(query, 0, share * size), Slice(key, 0, size), Slice(value, 0, size)]
        slices.append(Slice(consumer, 1, share * size))
        holders = _holders(module, *makers, out)
        structure = Structure(join(name, out), units, slices, heads=share, head_dim=size, holders=holders)
        yield _with_counts(structure, inner)
    joined, out_proj = _get(module, "c_attn"), _get(module, "c_proj")
    size = _head_dim(module)
    if joined is not None and out_proj is not None and size is not None:
        width = float_shape(out_proj)[1]
        if float_shape(joined)[0] == 3 * width:
            slices = [Slice(joined, 0, size, i * width) for i in range(3)] + [Slice(out_proj, 1, size)]
            structure = Structure(join(name, "c_proj"), width // size, slices, heads=1, head_dim=size, holders=[module])
            yield _with_counts(structure, module)


def _head_dim(module: nn.Module) -> int | None:
    size = getattr(module, "head_dim", getattr(module, "attention_head_size", None))
    return size if isinstance(size, int) else None


def _with_counts(structure: Structure, attention: nn.Module) -> Structure:
    """Adds the counters of heads that the attention module holds."""
    heads = structure.units * structure.heads
    wanted = {**dict.fromkeys(QUERY_HEADS, heads), **dict.fromkeys(KEY_HEADS, structure.units)}
    wanted |= dict.fromkeys(WIDTHS, heads * structure.head_dim)
    structure.counts = [(attention, key) for key, value in wanted.items() if getattr(attention, key, None) == value]
    return structure


def _holders(module: nn.Module, *paths: str) -> list[nn.Module]:
    """A module and those between it and the layers below it."""
    inner = [getattr(module, path.split(".")[0]) for path in paths if "." in path]
    return [module, *{id(m): m for m in inner}.values()]


def join(*parts: str) -> str:
    """A dotted name of parts of which some may be empty."""
    return ".".join(part for part in parts if part)
