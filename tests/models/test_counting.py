"""The published parameter counts, computed without a single weight."""

from __future__ import annotations

import pytest

from lofi.adapters.config import LoraConfig
from lofi.errors import ModelError
from lofi.models.counting import Count, count_adapter, lora_parameters, meta_model, parameter_count


@pytest.fixture(scope="module")
def opt_6_7b():
    from transformers import OPTConfig

    return OPTConfig(
        hidden_size=4096, num_hidden_layers=32, ffn_dim=16384, num_attention_heads=32, word_embed_proj_dim=4096,
        vocab_size=50272, max_position_embeddings=2048,
    )  # fmt: skip


def test_opt_6_7b_at_rank_16_on_q_and_v_counts_as_published(opt_6_7b):
    count = count_adapter(opt_6_7b, LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"]))
    assert count == Count(trainable=8_388_608, all=6_666_862_592)
    assert count.percent == 0.12582542214183376
    assert str(count) == "trainable params: 8388608 || all params: 6666862592 || trainable%: 0.12582542214183376"


def test_gpt_3_at_rank_4_on_q_and_v_is_a_36_mebibyte_file_in_16_bit():
    trainable = lora_parameters([(12288, 12288)] * 2 * 96, r=4)
    assert trainable == 18_874_368
    assert 2 * trainable == 36 * 2**20
    assert round(175e9 / trainable, -1) == 9270


def test_a_512_by_64_weight_at_rank_8():
    assert lora_parameters([(512, 64)], r=8) == 4_608
    assert 512 * 64 == 32_768


def test_a_meta_model_holds_no_weights_and_counts_tied_ones_once(tiny):
    meta, real = meta_model(tiny.config("llama_tied")), tiny.model("llama_tied")
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert parameter_count(meta) == parameter_count(real) == parameter_count(tiny.model("llama")) - 97 * 24
    assert parameter_count(meta_model(tiny.config("t5"), "SEQ_2_SEQ_LM")) == parameter_count(tiny.model("t5"))
    with pytest.raises(ModelError, match="task 'LM' is not known"):
        meta_model(tiny.config("llama"), "LM")


def test_the_count_of_an_adapter_is_that_of_the_real_model(tiny):
    config = LoraConfig(r=3, lora_alpha=7)
    shapes = [(24, 24), (12, 24), (12, 24), (24, 24), (44, 24), (44, 24), (24, 44)] * 2
    count = count_adapter(tiny.config("llama"), config)
    assert count.trainable == lora_parameters(shapes, r=3)
    assert count.all == parameter_count(tiny.model("llama")) + count.trainable


def test_flan_t5_base_has_the_published_counts_on_the_meta_device():
    from transformers import T5Config

    config = T5Config(
        vocab_size=32128, d_model=768, d_kv=64, d_ff=2048, num_layers=12, num_heads=12, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )  # fmt: skip
    assert parameter_count(meta_model(config, "SEQ_2_SEQ_LM")) == 247_577_856
    adapter = LoraConfig(r=32, lora_alpha=32, lora_dropout=0.05, target_modules=["q", "v"])
    counted = count_adapter(config, adapter, "SEQ_2_SEQ_LM")
    assert (counted.trainable, counted.all) == (3_538_944, 251_116_800)
    assert round(counted.percent, 2) == 1.41
