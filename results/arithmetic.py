"""The papers' parameter counts, on the meta device: no weights, the real attaching code."""

from __future__ import annotations

import lofi
from lofi.models.counting import count_adapter, lora_parameters, meta_model, parameter_count
from results.lab import Lab, Section


def run(lab: Lab) -> Section:
    opt = _opt()
    gpt3 = lora_parameters([(12288, 12288)] * 2 * 96, 4)
    full = 175_000_000_000  # GPT-3 175B
    dense, low = 512 * 64, lora_parameters([(512, 64)], 8)
    fewer = f"{low:,} against {dense:,} ({100 * (1 - low / dense):.0f} % fewer)"
    rows = [
        ["OPT-6.7B, r=16 on q_proj, v_proj", str(opt), "8388608 of 6666862592 = 0.12582542214183376 %"],
        [
            "a 512 x 64 weight, r=8",
            fewer,
            "4,608 / 32,768",
        ],
        [
            "GPT-3 175B, r=4 on q, v (96 layers of 12,288)",
            f"{gpt3:,} parameters, {full / gpt3:,.0f}x fewer, {gpt3 * 2 / 2**20:.0f} MiB in 16 bit",
            "18,874,368; about 10,000x; 35 MB",
        ],
        ["GPT-2 medium, r=4 on q, v (24 layers of 1,024)", f"{lora_parameters([(1024, 1024)] * 48, 4):,}", "0.35M"],
        ["lofi-tiny, r=16, all-linear", str(_tiny(lab)), ""],
    ]
    return Section(
        "Parameter arithmetic",
        "What an adapter trains, counted by attaching it to the model on torch's meta device.",
        ["adapter", "counted", "published"],
        rows,
        commands=["python -m results arithmetic"],
    )


def _opt() -> object:
    from transformers import OPTConfig

    config = OPTConfig(
        vocab_size=50272, hidden_size=4096, num_hidden_layers=32, ffn_dim=16384, num_attention_heads=32,
        max_position_embeddings=2048, word_embed_proj_dim=4096,
    )  # fmt: skip
    return count_adapter(config, lofi.LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))


def _tiny(lab: Lab) -> object:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(lab.model("lofi-tiny"))
    assert parameter_count(meta_model(config)) < 7_000_000
    return count_adapter(config, lofi.LoraConfig(r=16))
