"""Tiny models, random packed weights and subprocesses for the tests."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlinear.format import Format
from qlinear.packing import PackedWeight, pack_codes
from qlinear.quantize import Codes
from qlinear.sparse import fill, prune_weight

ROOT = Path(__file__).resolve().parents[1]

#: The instruction sets this CPU can run PyTorch's operators with: each has its own order of packed int4 bytes.
CPU_LEVELS = [
    *(["avx512"] if torch.cpu._is_avx512_supported() else []),
    *(["avx2"] if torch.cpu._is_avx2_supported() else []),
    "default",
]


def random_packed(fmt: Format, n: int, k: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> PackedWeight:
    """A plain packed weight with every code and zero point equally likely; ``dtype`` is that of the float weight.

    Where the format is sparse, about half of it is kept.
    """
    g = torch.Generator().manual_seed(seed)
    if fmt.number == "float":
        codes = torch.randn(n, k, generator=g).to(fmt.scale_dtype(dtype))
    else:
        codes = finite(torch.randint(0, fmt.max_code + 1, (n, k), generator=g, dtype=torch.uint8), fmt)
    scale = (0.01 + 0.02 * torch.rand(n, fmt.groups(k), generator=g)).to(fmt.scale_dtype(dtype))
    zero = None
    if not fmt.symmetric:
        zero = torch.randint(0, fmt.max_code + 1, (fmt.groups(k), n), generator=g, dtype=torch.uint8).t()
    if fmt.sparsity:
        kept = prune_weight(torch.rand(n, k, generator=g) + 0.1, fmt, "magnitude") != 0
        codes = torch.where(kept, codes, fill(zero, fmt, codes, k))
    return pack_codes(Codes(codes, scale, zero), fmt)


def finite(codes: Tensor, fmt: Format) -> Tensor:
    """The codes, 448 in the place of the two NaN that e4m3 has."""
    return torch.where(codes & 127 == 127, codes - 1, codes) if fmt.number == "e4m3" else codes


def relative_error(y: Tensor, reference: Tensor) -> float:
    """``norm(y - reference) / norm(reference)`` in float64."""
    return float((y.detach().double() - reference.detach()).norm() / reference.detach().norm())


def bits(t: Tensor) -> Tensor:
    """A tensor's bytes, so that equality means the same bits (also for NaN and -0)."""
    return torch.empty(t.shape, dtype=t.dtype).copy_(t.detach()).view(-1).view(torch.uint8)


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def run_python(code: str, *arguments: str, **environment: str) -> str:
    """Runs code in a fresh interpreter that can import qlinear; returns its output, fails with its errors."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), **environment}
    command = [sys.executable, "-W", "error::UserWarning:qlinear", "-c", textwrap.dedent(code), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def tiny_llama(tied: bool = False, **config: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 72, "intermediate_size": 130, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied, **config)).eval()


def tiny_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=64, n_layer=2, n_head=4, n_positions=32)).eval()


def tiny_bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 130, "num_hidden_layers": 2}
    return BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=4)).eval()


def tiny_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 130, "num_hidden_layers": 2, "num_attention_heads": 4}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4)).eval()


def tiny_language_model(**changes: Any) -> Any:
    """A tied Llama with a token for every byte, long enough to read text."""
    import transformers

    torch.manual_seed(0)
    options: dict[str, Any] = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024,
        "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    config = transformers.LlamaConfig(**{**options, **changes})
    return transformers.LlamaForCausalLM(config).eval()


def byte_tokenizer() -> Any:
    """One token a byte; enough to be saved and loaded with the model."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i + 8 for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def logits(model: Any) -> Tensor:
    """The model's output for one fixed input, whichever kind it takes."""
    g = torch.Generator().manual_seed(1)
    if model.config.model_type == "vit":
        return model(pixel_values=torch.randn(2, 3, 16, 16, generator=g)).logits
    return model(input_ids=torch.randint(0, 99, (2, 9), generator=g)).logits


TINY_MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "bert": tiny_bert, "vit": tiny_vit}


def needs_cpp_compiler() -> None:
    """Skips a test that compiles with inductor where it cannot."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("there is no C++ compiler, which inductor needs on a CPU")


def exit_code(command: Callable[[list[str]], object], *arguments: object) -> int:
    """What a command line ends with."""
    try:
        command([str(a) for a in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0
