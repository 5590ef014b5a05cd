"""validate: errors per layer and end to end, and the gate."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from models import tiny_bert, tiny_llama
from torch import nn

import qlinear

IDS = torch.randint(0, 99, (2, 9), generator=torch.Generator().manual_seed(3))


def _pair(scheme: str) -> tuple[nn.Module, nn.Module]:
    reference = tiny_llama()
    return qlinear.convert(copy.deepcopy(reference), scheme), reference


def test_layer_errors_are_those_of_the_float_models_activations() -> None:
    model, reference = _pair("w4a16-g32")
    report = qlinear.validate(model, reference, [{"input_ids": IDS}])
    seen = {}
    layer = reference.model.layers[1].mlp.up_proj
    layer.register_forward_hook(lambda m, x, y: seen.update(x=x[0], y=y))
    with torch.no_grad():
        reference(IDS)
        got = model.model.layers[1].mlp.up_proj(seen["x"])
    error = (got - seen["y"]).double()
    row = next(e for e in report.layers if e.name == "model.layers.1.mlp.up_proj")
    assert row.scheme == "w4a16-g32"
    assert row.relative_error == pytest.approx((error.norm() / seen["y"].double().norm()).item())
    assert row.max_error == pytest.approx(error.abs().max().item())
    assert row.snr_db == pytest.approx(-20 * math.log10(row.relative_error))
    assert len(report.layers) == 15


def test_end_to_end_numbers() -> None:
    model, reference = _pair("w4a16-channel")
    report = qlinear.validate(model, reference, [{"input_ids": IDS[:1]}, {"input_ids": IDS[1:]}])
    with torch.no_grad():
        p, q = reference(IDS).logits.log_softmax(-1), model(IDS).logits.log_softmax(-1)
    assert report.positions == 18
    assert report.kl == pytest.approx(
        nn.functional.kl_div(q, p, log_target=True, reduction="sum").item() / 18, rel=1e-3
    )
    assert report.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).float().mean().item())


def test_a_model_against_itself_is_perfect() -> None:
    model, _ = _pair("w8a16")
    report = qlinear.validate(model, model, [IDS])
    assert report.kl == 0 and report.top1_agreement == 1 and report.output_relative_error == 0
    assert all(e.relative_error == 0 and e.snr_db == math.inf for e in report.layers)


def test_better_schemes_have_smaller_errors() -> None:
    kl = []
    for scheme in ("w8a16", "w4a16-g32", "w4a16-channel"):
        model, reference = _pair(scheme)
        kl.append(qlinear.validate(model, reference, [IDS]).kl)
    assert kl[0] < kl[1] < kl[2]


def test_masked_positions_do_not_count() -> None:
    model, reference = _pair("w4a16")
    mask = torch.ones_like(IDS)
    mask[1, 5:] = 0
    assert qlinear.validate(model, reference, [{"input_ids": IDS, "attention_mask": mask}]).positions == 14


def test_the_gate() -> None:
    model, reference = _pair("w4a16")
    report = qlinear.validate(model, reference, [IDS])
    assert report.passes({"snr_db": 5, "kl": 10, "top1_agreement": 0, "max_error": 100})
    assert not report.passes({"snr_db": 200})
    assert len(report.failures({"snr_db": 200})) == len(report.layers)
    assert report.failures({"kl": 0})[0].startswith("end to end: kl")
    with pytest.raises(ValueError, match="'speed' is not a metric; the metrics are: snr_db"):
        report.passes({"speed": 1})


def test_a_nan_fails_every_gate() -> None:
    model, reference = _pair("w8a16")
    model.model.layers[0].mlp.up_proj.weight_scale.fill_(torch.nan)
    report = qlinear.validate(model, reference, [IDS])
    for bound in (
        {"kl": 1e9},
        {"snr_db": -1e9},
        {"max_error": 1e9},
        {"relative_error": 1e9},
        {"output_relative_error": 1e9},
    ):
        assert not report.passes(bound), bound


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(64, 8), nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.used(x)
        return y


def test_a_layer_that_never_ran_passes_no_gate() -> None:
    float_model = Half()
    model = qlinear.convert(copy.deepcopy(float_model), "w8a16")
    report = qlinear.validate(model, float_model, [torch.randn(4, 64)])
    used, unused = report.layers
    assert used.snr_db > 20 and used.max_error > 0
    assert all(math.isnan(value) for value in (unused.snr_db, unused.relative_error, unused.max_error))
    assert [line.split(":")[0] for line in report.failures({"snr_db": 20, "relative_error": 1})] == ["unused"] * 2


def test_modes_and_hooks_are_restored() -> None:
    model, reference = _pair("w8a16")
    model.train()
    reference.model.train()
    before = [m.training for m in (*model.modules(), *reference.modules())]
    qlinear.validate(model, reference, [IDS])
    assert [m.training for m in (*model.modules(), *reference.modules())] == before
    assert not any(m._forward_hooks for m in reference.modules())


def test_models_without_logits_have_no_kl() -> None:
    reference = tiny_bert().bert
    model = qlinear.convert(copy.deepcopy(reference), "w8a16")
    report = qlinear.validate(model, reference, [IDS])
    assert report.kl is None and 0 < report.output_relative_error < 0.05
    with pytest.raises(ValueError, match="not logits"):
        report.passes({"kl": 1})


def test_prints_and_serializes() -> None:
    model, reference = _pair("w8a8")
    report = qlinear.validate(model, reference, [IDS])
    text = str(report)
    assert "model.layers.0.self_attn.q_proj" in text and "top-1 agreement" in text
    assert report.to_dict()["layers"][0]["scheme"] == "w8a8"


def test_clear_errors() -> None:
    model, reference = _pair("w8a16")
    with pytest.raises(ValueError, match="no quantized layer"):
        qlinear.validate(reference, reference, [IDS])
    with pytest.raises(ValueError, match="not in the reference"):
        qlinear.validate(model, nn.Linear(2, 2), [IDS])
    with pytest.raises(ValueError, match="no batches"):
        qlinear.validate(model, reference, [])
