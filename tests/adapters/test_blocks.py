"""Where a model's blocks are, and what ends their attention and their MLP."""

from __future__ import annotations

import pytest
from torch import nn

import lofi
from adapters.models import Toy
from files.families import V, family_model
from lofi.adapters.blocks import blocks, stacks, width_of
from lofi.adapters.methods import HoulsbyConfig
from lofi.errors import TargetError

HOULSBY = HoulsbyConfig(bottleneck_size=5)


OUTPUTS = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "gemma": ("self_attn.o_proj", "mlp.down_proj"),
    "mixtral": ("self_attn.o_proj", "layers.1.mlp"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "opt": ("self_attn.out_proj", "fc2"),
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "phi": ("self_attn.dense", "mlp.fc2"),
    "roberta": ("attention.output.dense", "layer.1.output.dense"),
    "deberta-v2": ("attention.output.dense", "layer.1.output.dense"),
}


@pytest.mark.parametrize(("family", "outputs"), OUTPUTS.items())
def test_houlsby_stands_after_attention_and_mlp_of_each_block(family, outputs):
    report = lofi.add_adapter(family_model(family), HOULSBY)
    places = [m.path for m in report.matched if m.kind == "bottleneck"]
    assert len(places) == 4  # two blocks
    last = [path for path in places if ".1." in path]
    assert len(last) == 2 and last[0].endswith(outputs[0]) and last[1].endswith(outputs[1])


def test_houlsby_knows_gpt_neo_bart_and_neox():
    from transformers import AutoModelForCausalLM, BartConfig, BartForConditionalGeneration, GPTNeoConfig, GPTNeoXConfig

    size = {"hidden_size": 24, "vocab_size": V, "bos_token_id": 1, "eos_token_id": 2}
    neo = GPTNeoConfig(**size, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]])
    found = lofi.add_adapter(AutoModelForCausalLM.from_config(neo), HOULSBY).matched
    assert [m.path for m in found][::2] == ["transformer.h.0.attn.attention.out_proj", "transformer.h.0.mlp.c_proj"]
    neox = GPTNeoXConfig(**size, num_hidden_layers=1, num_attention_heads=4, intermediate_size=44)
    found = lofi.add_adapter(AutoModelForCausalLM.from_config(neox), HOULSBY).matched
    assert [m.path.split("layers.0.")[1] for m in found] == ["attention.dense", "mlp.dense_4h_to_h"]
    bart = BartForConditionalGeneration(
        BartConfig(
            vocab_size=V, d_model=24, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=44, decoder_ffn_dim=44, max_position_embeddings=64,
        )
    )  # fmt: skip
    found = lofi.add_adapter(bart, HOULSBY).matched
    assert sorted(m.path.split("layers.0.")[1] for m in found if "decoder" in m.path) == [
        "encoder_attn.out_proj", "fc2", "self_attn.out_proj",
    ]  # fmt: skip


def test_an_unknown_family_is_offered_the_linears_of_its_blocks():
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Toy() for _ in range(3))

    with pytest.raises(TargetError, match=r"0\.down \(1\), 0\.head \(1\), 0\.up \(1\), 1\.down"):
        lofi.add_adapter(Blocks(), HOULSBY)


@pytest.mark.parametrize(
    ("family", "paths"),
    [
        ("gpt2", ["transformer.h"]),
        ("opt", ["model.decoder.layers"]),
        ("t5", ["encoder.block", "decoder.block"]),  # the lists of sublayers inside are not stacks
        ("deberta-v2", ["deberta.encoder.layer"]),
    ],
)
def test_a_stack_is_an_outermost_list_with_weights(family, paths):
    model = family_model(family)
    assert list(stacks(model)) == paths
    assert list(blocks(model)) == [f"{path}.{i}" for path in paths for i in range(2)]


def test_a_width_is_that_of_a_linears_output_or_the_models():
    model = family_model("opt")  # D 24, embeddings of 16
    assert width_of(model, "model.decoder.layers.0.fc1") == 44
    assert width_of(model, "model.decoder.layers.0") == 24
    assert width_of(family_model("gpt2"), "transformer.h.0.mlp.c_fc") == 44  # stored (I, O)
