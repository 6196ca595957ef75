"""Where a transformer's blocks are, and which of their modules end the attention and the MLP.

A table of names covers the families; what a family calls its blocks does not matter, since a stack of blocks is the
outermost `nn.ModuleList` whose entries hold parameters. Rejected: finding outputs by tracing a forward, which needs
inputs, and guessing by shape, which takes a projection for an output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn

from lofi.adapters.linear import product_of
from lofi.adapters.surgery import named_base_modules
from lofi.errors import TargetError

ATTENTION_OUTPUTS = (
    "self_attn.o_proj",  # llama, mistral, mixtral, qwen, gemma, phi-3, olmo, granite, cohere, starcoder2, gpt-oss
    "self_attn.out_proj",  # opt, bart
    "encoder_attn.out_proj",  # bart: the decoder's cross-attention
    "self_attn.dense",  # phi
    "attn.c_proj",  # gpt2
    "crossattention.c_proj",  # gpt2 as the decoder of another encoder
    "attn.attention.out_proj",  # gpt_neo
    "attn.out_proj",  # gptj, mpt
    "self_attention.dense",  # bloom, falcon
    "attention.dense",  # gpt_neox
    "attention.output.dense",  # bert, roberta, electra, deberta
    "crossattention.output.dense",  # bert as a decoder
    "attention.out_lin",  # distilbert
    "attn.Wo",  # modernbert
    "SelfAttention.o",  # t5
    "EncDecAttention.o",  # t5: the decoder's cross-attention
)
MLP_OUTPUTS = (
    "mlp.down_proj",  # llama, mistral, qwen, gemma, phi-3, olmo, granite, cohere
    "mlp.c_proj",  # gpt2, gpt_neo, starcoder2
    "fc2",  # opt, bart, phi
    "mlp.dense_4h_to_h",  # bloom, gpt_neox, falcon
    "mlp.fc_out",  # gptj
    "ffn.down_proj",  # mpt
    "output.dense",  # bert, roberta, electra, deberta
    "ffn.lin2",  # distilbert
    "mlp.Wo",  # modernbert
    "DenseReluDense.wo",  # t5
)
_MIXTURES = ("mlp", "feed_forward", "block_sparse_moe", "ffn")


def stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The model's stacks of blocks by path: lists of modules that lie in no other list."""
    found: dict[str, nn.ModuleList] = {}
    for path, module in named_base_modules(model):
        inner = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and not inner and any(True for _ in module.parameters()):
            found[path] = module
    return found


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Every block of every stack by path."""
    return {f"{path}.{i}": block for path, stack in stacks(model).items() for i, block in enumerate(stack)}


def sublayer_outputs(model: nn.Module) -> Iterator[tuple[str, list[str], list[str]]]:
    """(block, paths that end its attentions, paths that end its MLP), by the table; a mixture of experts ends whole."""
    for path, block in blocks(model).items():
        inside = [(f"{path}.{name}", module) for name, module in named_base_modules(block) if name]
        attention = [p for p, m in inside if _ends(p, ATTENTION_OUTPUTS) and product_of(m) is not None]
        mixtures = [p for p, m in inside if _ends(p, _MIXTURES) and "experts" in m._modules]
        mlp = [p for p, m in inside if p not in attention and _ends(p, MLP_OUTPUTS) and product_of(m) is not None]
        within = tuple(f"{mixture}." for mixture in mixtures)
        yield path, attention, [*mixtures, *(p for p in mlp if not p.startswith(within))]


def width_of(model: nn.Module, path: str) -> int:
    """D, the width of what the module at `path` returns: its own for a linear, else the model's hidden size.

    Raises  TargetError where neither says
    """
    product = product_of(model.get_submodule(path))
    if product is not None:
        return product.shape(model.get_submodule(path))[0]
    config: Any = getattr(model, "config", None)
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    width = getattr(config, "hidden_size", None)
    if not isinstance(width, int):
        raise TargetError(
            f"{path} is a {type(model.get_submodule(path)).__name__} whose width is not known, as this model's config "
            "has no hidden_size; name a linear inside it instead"
        )
    return width


def linears_offered(model: nn.Module) -> str:
    """The linears inside the blocks by the last two words of their paths, with counts, for errors."""
    counts = Counter(
        ".".join(f"{path}.{name}".rsplit(".", 2)[-2:])
        for path, block in blocks(model).items()
        for name, module in named_base_modules(block)
        if product_of(module) is not None
    )
    return ", ".join(f"{name} ({count})" for name, count in sorted(counts.items())[:12]) or "none"


def _ends(path: str, suffixes: tuple[str, ...]) -> bool:
    return path.endswith(tuple(f".{suffix}" for suffix in suffixes))
