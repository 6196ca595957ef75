"""Models with random weights of real shapes; as folders they are written for one measurement and removed after it.

Both sides of a claim open the same folder, as users would: lofi by `load_model`, a peer by `from_pretrained`. The 4-bit
folder is written directly in bitsandbytes' format (random codes, absmax as a normal weight of deviation 0.02 has): a
shape too large to quantize here can still be trained. One file a layer, so at most one layer is ever in memory.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DEVIATION = 0.02
BLOCK, NESTED = 64, 256


@dataclass(frozen=True)
class Shape:
    """A Llama shape: width D, layers, feed-forward width, heads, key-value heads, vocabulary V."""

    dim: int
    layers: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False

    def linears(self) -> dict[str, tuple[int, int]]:
        """(O, I) of every linear of one layer."""
        keys = self.dim // self.heads * self.kv_heads
        attention = {"q_proj": self.dim, "k_proj": keys, "v_proj": keys, "o_proj": self.dim}
        wide = {f"self_attn.{name}": (out, self.dim) for name, out in attention.items()}
        up = {f"mlp.{name}": (self.ffn, self.dim) for name in ("gate_proj", "up_proj")}
        return wide | up | {"mlp.down_proj": (self.dim, self.ffn)}

    def linear_parameters(self) -> int:
        """Weights in all linears of all layers (embeddings and head not counted)."""
        return self.layers * sum(out * inner for out, inner in self.linears().values())

    def lora_parameters(self, rank: int) -> int:
        return self.layers * sum(rank * (out + inner) for out, inner in self.linears().values())

    def config(self) -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.dim, intermediate_size=self.ffn, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads, vocab_size=self.vocab,
            tie_word_embeddings=self.tied, architectures=["LlamaForCausalLM"], dtype="bfloat16",
        )  # fmt: skip

    def model(self, dtype: torch.dtype) -> Any:
        """A model of this shape in memory, as transformers initialises it, seed 0."""
        from transformers import LlamaForCausalLM

        torch.manual_seed(0)
        return LlamaForCausalLM(self.config()).to(dtype)


TINY = Shape(64, 1, 192, 4, 4, 128)  # opened first, so that imports are not counted as a model's memory
SMALL = Shape(512, 6, 1408, 8, 4, 8192)
STEP = Shape(1024, 6, 2816, 16, 16, 8192)
GIGABYTE = Shape(2048, 9, 5632, 16, 16, 32000, tied=True)
ONE_B = Shape(2048, 22, 5632, 32, 4, 32000)  # TinyLlama-1.1B's
SEVEN_B = Shape(4096, 32, 11008, 32, 32, 32000)  # Llama-2-7B's


@contextmanager
def checkpoint(shape: Shape, *, nf4: bool = False) -> Iterator[Path]:
    """A folder with random weights of this shape, dense bf16 or NF4 with double quantization, while the block runs."""
    with tempfile.TemporaryDirectory(prefix="lofi-bench-") as name:
        write(shape, Path(name), nf4=nf4)
        yield Path(name)


def write(shape: Shape, folder: Path, *, nf4: bool = False) -> None:
    """Write config.json, one safetensors file a layer, and the index that names them."""
    config = shape.config()
    if nf4:
        config.quantization_config = _quantization_config()
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}
    for number in range(shape.layers):
        _save(folder, f"layer-{number:03d}.safetensors", _layer(shape, number, generator, nf4), index)
    _save(folder, "embeddings.safetensors", _embeddings(shape, generator), index)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _save(folder: Path, name: str, tensors: dict[str, Tensor], index: dict[str, str]) -> None:
    from safetensors.torch import save_file

    save_file(tensors, folder / name, metadata={"format": "pt"})
    index |= dict.fromkeys(tensors, name)


def _layer(shape: Shape, number: int, generator: torch.Generator, nf4: bool) -> dict[str, Tensor]:
    at = f"model.layers.{number}."
    made = {f"{at}{norm}.weight": _ones(shape.dim) for norm in ("input_layernorm", "post_attention_layernorm")}
    for name, (out, inner) in shape.linears().items():
        whole = f"{at}{name}.weight"
        made |= _packed(whole, (out, inner), generator) if nf4 else {whole: _normal((out, inner), generator)}
    return made


def _embeddings(shape: Shape, generator: torch.Generator) -> dict[str, Tensor]:
    made = {"model.embed_tokens.weight": _normal((shape.vocab, shape.dim), generator)}
    made["model.norm.weight"] = _ones(shape.dim)
    return made if shape.tied else made | {"lm_head.weight": _normal((shape.vocab, shape.dim), generator)}


def _ones(width: int) -> Tensor:
    return torch.ones(width, dtype=torch.bfloat16)


def _normal(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.empty(shape).normal_(std=DEVIATION, generator=generator).bfloat16()


def _packed(name: str, shape: tuple[int, int], generator: torch.Generator) -> dict[str, Tensor]:
    """A random NF4 weight with double quantization, under the names that bitsandbytes gives its parts."""
    from lofi.quant.codes import dynamic_code, nf4_code

    blocks = shape[0] * shape[1] // BLOCK
    nested = -(-blocks // NESTED)
    offset = 2.2 * DEVIATION  # about the mean of the largest of 64 normal values
    state = {
        "quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": list(shape),
        "nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": offset,
    }  # fmt: skip
    return {
        name: _bytes(shape[0] * shape[1] // 2, generator).unsqueeze(1),
        f"{name}.absmax": _bytes(blocks, generator),
        f"{name}.quant_map": nf4_code(),
        f"{name}.nested_absmax": torch.full((nested,), offset / 2),
        f"{name}.nested_quant_map": dynamic_code(),
        f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def _bytes(count: int, generator: torch.Generator) -> Tensor:
    words = torch.empty(-(-count // 8), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return words.view(torch.uint8)[:count].clone()


def _quantization_config() -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": 6.0, "llm_int8_skip_modules": None, "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }  # fmt: skip
