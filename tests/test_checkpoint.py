"""Saving and loading a converted model: the same bits, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import TINY_MODELS, logits, run_python, same_bits, tiny_llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import qlinear
from qlinear.format import FORMATS


def _equal(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(same_bits(left[k], right[k]) for k in left)


@pytest.mark.parametrize("scheme", FORMATS)
def test_every_scheme_comes_back_with_the_same_bits(scheme: str, tmp_path: Path) -> None:
    prune = "magnitude" if FORMATS[scheme].sparsity else None
    model = qlinear.convert(tiny_llama().bfloat16(), scheme, prune=prune)
    back = qlinear.load(qlinear.save(model, tmp_path / "out"))
    assert type(back) is type(model)
    assert _equal(model, back)
    with torch.no_grad():
        assert same_bits(logits(model), logits(back))


@pytest.mark.parametrize("kind", TINY_MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_hugging_face_models_come_back(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = TINY_MODELS[kind]().to(dtype)
    if dtype == torch.bfloat16 and kind == "vit":
        pytest.skip("the fixed input is float32 pixels")
    qlinear.convert(model, {"re:.*(query|c_attn|q_proj).*": "w8a8", "*": "w4a16-g32-asym"})
    back = qlinear.load(qlinear.save(model, tmp_path / "out"))
    with torch.no_grad():
        assert same_bits(logits(model), logits(back))
    assert [p.dtype for p in back.parameters()] == [p.dtype for p in model.parameters()]


def test_the_file_holds_the_plain_layout_and_the_config_the_schemes(tmp_path: Path) -> None:
    model = qlinear.convert(tiny_llama().bfloat16(), {"*.mlp.*": "w4a16-g32", "*": "w8a16"})
    qlinear.save(model, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"out"}
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        gate = file.get_tensor("model.layers.0.mlp.gate_proj.weight_packed")
        assert gate.dtype == torch.int32 and gate.shape == (130, 72 * 4 // 32)
        assert file.get_tensor("model.layers.0.mlp.gate_proj.weight_scale").shape == (130, 3)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["quantization_config"]["quant_method"] == "qlinear"
    assert config["quantization_config"]["modules"]["model.layers.0.mlp.gate_proj"] == "w4a16-g32"
    assert config["quantization_config"]["modules"]["lm_head"] == "w8a16"


@pytest.mark.parametrize("scheme", ["fp8", "w8a16-fp8"])
def test_float8_is_stored_as_compressed_tensors_stores_it(scheme: str, tmp_path: Path) -> None:
    """The names, dtypes and shapes of its ``float-quantized``; the float that is read there is the one here."""
    model = qlinear.convert(tiny_llama().bfloat16(), {"*.mlp.*": scheme})
    qlinear.save(model, tmp_path / "out")
    down, name = model.model.layers[0].mlp.down_proj, "model.layers.0.mlp.down_proj"
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert not any(key.endswith("_packed") for key in list(file.keys()))
        weight, scale = file.get_tensor(f"{name}.weight"), file.get_tensor(f"{name}.weight_scale")
    assert weight.dtype == torch.float8_e4m3fn and weight.shape == (72, 130)
    assert scale.dtype == torch.bfloat16 and scale.shape == (72, 1)
    assert torch.equal(weight.double() * scale.double(), down.dequantize(torch.float64))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["qlinear"]["modules"][name] == scheme
    theirs = config["quantization_config"]
    assert (theirs["quant_method"], theirs["format"]) == ("compressed-tensors", "float-quantized")
    assert "lm_head" in theirs["ignore"] and name not in theirs["ignore"]
    group = theirs["config_groups"]["group_0"]
    number = {"num_bits": 8, "type": "float", "symmetric": True}
    assert group["targets"] == ["Linear"]
    assert group["weights"] == {**number, "strategy": "channel", "dynamic": False}
    token = {**number, "strategy": "token", "dynamic": True}
    assert group["input_activations"] == (token if scheme == "fp8" else None)


@pytest.mark.parametrize("scheme", ["fp8", "w8a16-fp8"])
def test_compressed_tensors_reads_float8(scheme: str, tmp_path: Path) -> None:
    """Where that library is installed, transformers loads the folder with it and computes what we compute."""
    pytest.importorskip("compressed_tensors")
    model = qlinear.convert(tiny_llama().bfloat16(), {"*.mlp.*": scheme, "*.q_proj": scheme})
    qlinear.save(model, tmp_path / "out")
    code = """
    import sys, torch, transformers
    from safetensors.torch import save_file
    theirs = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
    y = theirs(torch.arange(20)[None] % 99).logits
    save_file({"logits": y.detach().float().contiguous()}, sys.argv[2])
    """
    run_python(code, str(tmp_path / "out"), str(tmp_path / "theirs"))
    with safe_open(tmp_path / "theirs", "pt") as file:
        wanted = file.get_tensor("logits")
    with torch.no_grad():
        ours = model(torch.arange(20)[None] % 99).logits.float()
    assert float((ours - wanted).norm() / wanted.norm()) < 0.03


def test_several_float8_schemes_name_their_layers_and_others_keep_our_config(tmp_path: Path) -> None:
    def config(what: dict[str, str], kind: str = "llama") -> dict[str, object]:
        folder = qlinear.save(qlinear.convert(TINY_MODELS[kind](), what), tmp_path / "out", overwrite=True)
        return json.loads((folder / "config.json").read_text())["quantization_config"]

    groups = config({"*.q_proj": "fp8", "*.k_proj": "w8a16-fp8"})["config_groups"]
    assert [len(group["targets"]) for group in groups.values()] == [2, 2]
    assert groups["group_0"]["targets"][0] == "model.layers.0.self_attn.q_proj"
    assert config({"*.q_proj": "fp8", "*.k_proj": "w8a16"})["quant_method"] == "qlinear"
    assert config({"*": "fp8"}, "gpt2")["quant_method"] == "qlinear"  # its layers are Conv1D


def test_a_float8_weight_of_another_dtype_is_refused(tmp_path: Path) -> None:
    folder = qlinear.save(qlinear.convert(tiny_llama(), {"*.mlp.*": "fp8"}), tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    key = "model.layers.0.mlp.down_proj.weight"
    save_file(tensors | {key: tensors[key].view(torch.int8)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{key}: fp8 stores a float8_e4m3fn matrix, got torch.int8"):
        qlinear.load(folder)


def test_tied_weights_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    model = qlinear.convert(tiny_llama(tied=True), "w8a16")
    qlinear.save(model, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert len({"lm_head.weight", "model.embed_tokens.weight"}.intersection(file.keys())) == 1
    back = qlinear.load(tmp_path / "out")
    assert back.lm_head.weight is back.model.embed_tokens.weight


def test_a_converted_tied_head_stays_converted(tmp_path: Path) -> None:
    model = qlinear.convert(tiny_llama(tied=True), {"lm_head": "w8a16"})
    back = qlinear.load(qlinear.save(model, tmp_path / "out"))
    assert isinstance(back.lm_head, qlinear.QLinear)
    with torch.no_grad():
        assert same_bits(logits(model), logits(back))


def test_any_module_comes_back_into_its_structure(tmp_path: Path) -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(nn.Linear(40, 70), nn.ReLU(), nn.Linear(70, 5))

    model = qlinear.convert(build(), {"0": "w4a16-g32"})
    qlinear.save(model, tmp_path / "out")
    with torch.device("meta"):
        structure = build()
    back = qlinear.load(tmp_path / "out", model=structure)
    x = torch.randn(3, 40)
    assert same_bits(model(x), back(x))
    with pytest.raises(ValueError, match="pass the model's structure"):
        qlinear.load(tmp_path / "out")


def test_companion_files_are_carried_along(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny_llama().save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "chat_template.jinja"):
        (source / name).write_text(name)
    from transformers import LlamaForCausalLM

    model = qlinear.convert(LlamaForCausalLM.from_pretrained(source), "w8a16")
    qlinear.save(model, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_text() == name
    assert (tmp_path / "out" / "generation_config.json").is_file()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1


def test_an_existing_folder_is_replaced_only_on_request(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious").write_text("x")
    model = qlinear.convert(tiny_llama(), "w8a16")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        qlinear.save(model, target)
    assert [p.name for p in target.iterdir()] == ["precious"]
    qlinear.save(model, target, overwrite=True)
    assert not (target / "precious").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = qlinear.convert(tiny_llama(), "w8a16")
    target = qlinear.save(model, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in target.iterdir()}

    def broken(*args: object, **kwargs: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("qlinear.checkpoint.save_file", broken)
    with pytest.raises(OSError, match="no space"):
        qlinear.save(model, target, overwrite=True)
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no quantized layer"):
        qlinear.save(tiny_llama(), tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        qlinear.load(tmp_path / "nowhere")
    tiny_llama().save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match="not written by qlinear"):
        qlinear.load(tmp_path / "float")
    folder = qlinear.save(qlinear.convert(tiny_llama(), "w8a16"), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["version"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="version 99"):
        qlinear.load(folder)
    config["quantization_config"]["version"] = 1
    config["quantization_config"]["modules"]["nonsense"] = "w8a16"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="nonsense"):
        qlinear.load(folder)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = qlinear.save(qlinear.convert(tiny_llama(), "w8a16"), tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_scale"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight_scale"):
        qlinear.load(folder)


def test_compute_dtype_comes_back(tmp_path: Path) -> None:
    model = qlinear.convert(tiny_llama(), "w4a16-g32", compute_dtype=torch.bfloat16)
    back = qlinear.load(qlinear.save(model, tmp_path / "out"))
    layer = back.model.layers[0].mlp.gate_proj
    assert layer.compute_dtype == torch.bfloat16 and layer.float_dtype == torch.float32
    with torch.no_grad():
        assert same_bits(logits(model), logits(back))


def test_another_instruction_set_reads_the_same_weights(tmp_path: Path) -> None:
    model = qlinear.convert(tiny_llama().bfloat16(), "w4a16-g32")
    folder = qlinear.save(model, tmp_path / "out")
    torch.save(model.model.layers[0].mlp.gate_proj.dequantize(), tmp_path / "wanted")
    code = """
    import sys, torch, qlinear
    layer = qlinear.load(sys.argv[1]).model.layers[0].mlp.gate_proj
    assert layer.layout == "cpu" and torch.equal(layer.dequantize(), torch.load(sys.argv[2]))
    """
    run_python(code, str(folder), str(tmp_path / "wanted"), ATEN_CPU_CAPABILITY="default")
