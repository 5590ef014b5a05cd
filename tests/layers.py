"""Layers, a small model and what is compared of them, for the tests of QLinear and convert."""

from collections import OrderedDict

import torch
from models import bits, same_bits
from torch import nn

import qlinear
from qlinear import QLinear

SCHEMES = sorted(qlinear.FORMATS)
N, K = 70, 200


def float_layer(bias=True, dtype=torch.bfloat16, n=N, k=K):
    torch.manual_seed(0)
    return nn.Linear(k, n, bias=bias).to(dtype)


def layer(scheme="w4a16", **kwargs):
    return QLinear.from_float(float_layer(**kwargs), scheme, prune="magnitude")


def native(scheme):
    """What the CPU computes with: 2:4 and unstructured weights are plain there."""
    return "plain" if qlinear.FORMATS[scheme].sparsity in ("2:4", "unstructured") else "cpu"


def plain_bits(q):
    """The weight's plain tensors as bytes."""
    plain = q.packed.to_layout("plain")
    return [bits(t) for t in plain.tensors if t is not None]


def assert_same_weight(a, b):
    assert all(torch.equal(x, y) for x, y in zip(plain_bits(a), plain_bits(b), strict=True))


def layers(model):
    """Name and scheme of every converted layer."""
    return {name: m.scheme for name, m in model.named_modules() if isinstance(m, QLinear)}


def floats(model):
    return [name for name, m in model.named_modules() if type(m) is nn.Linear]


def mlp():
    torch.manual_seed(0)
    parts = {"up": nn.Linear(40, 64), "act": nn.GELU(), "down": nn.Linear(64, 40), "head": nn.Linear(40, 7, bias=False)}
    return nn.Sequential(OrderedDict(parts))


class Snapshot:
    """Everything about a model that a failed conversion must not change."""

    def __init__(self, model, x=None):
        self.model, self.x = model, x
        self.types = {name: type(m) for name, m in model.named_modules(remove_duplicate=False)}
        self.state = {name: (t.dtype, bits(t), t.requires_grad) for name, t in self._tensors()}
        self.training = {name: m.training for name, m in model.named_modules()}
        self.output = None if x is None else model(x).detach()

    def _tensors(self):
        yield from self.model.named_parameters(remove_duplicate=False)
        yield from self.model.named_buffers(remove_duplicate=False)

    def assert_unchanged(self):
        model = self.model
        assert {name: type(m) for name, m in model.named_modules(remove_duplicate=False)} == self.types
        now = {name: (t.dtype, bits(t), t.requires_grad) for name, t in self._tensors()}
        assert list(now) == list(self.state)
        for name, (dtype, data, grad) in now.items():
            old = self.state[name]
            assert (dtype, grad) == (old[0], old[2]) and torch.equal(data, old[1]), name
        assert {name: m.training for name, m in model.named_modules()} == self.training
        if self.x is not None:
            assert same_bits(model(self.x).detach(), self.output)


def count_conversions(monkeypatch, hook=lambda count, linear: None):
    """Calls ``hook(k, layer)`` before the k-th layer is converted; returns the list of converted layers' shapes."""
    real, calls = QLinear.from_float.__func__, []

    def counting(cls, linear, *args, **kwargs):
        calls.append(tuple(linear.weight.shape))
        hook(len(calls), linear)
        return real(cls, linear, *args, **kwargs)

    monkeypatch.setattr(QLinear, "from_float", classmethod(counting))
    return calls


def fail_at(k):
    def fail(count, linear):
        if count == k:
            raise RuntimeError("injected")

    return fail
