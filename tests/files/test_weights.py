"""The weights behind updates: turned as B A stands, whatever holds them, and the updates themselves in every layout."""

from __future__ import annotations

import pytest
import torch

import lofi
from files.families import adapted, family_model
from lofi.adapters.merge import merged_weights
from lofi.errors import AdapterFileError
from lofi.files.adapter_folder import read_folder
from lofi.files.updates import low_rank_updates
from lofi.files.weights import BaseWeights

CASES = {
    "linear": ("llama", {}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_fc"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "experts": ("mixtral", {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    "rsLoRA and patterns": ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v": 5}}),
}


@pytest.mark.parametrize("case", CASES)
def test_weight_plus_update_is_the_merged_weight(case, tmp_path):
    family, config = CASES[case]
    if "alpha_pattern" in config:
        config = config | {"alpha_pattern": {"v_proj": 5}}
    model = adapted(family, **config)
    lofi.save_adapter(model, tmp_path)
    folder = read_folder(tmp_path)
    weights = BaseWeights(family_model(family), folder)
    merged = dict(merged_weights(model))
    found = 0
    for update in low_rank_updates(folder):
        held = zip(weights(update), update.pairs, strict=True)
        sums = [w.double() + update.scale * b.double() @ a.double() for w, (a, b) in held]
        wanted = [value for key, value in merged.items() if key.startswith(f"{update.path}.")]
        if update.kind == "experts":
            total = torch.stack(sums)
            wanted = [value if value.shape == total.shape else value.transpose(1, 2) for value in wanted]
            assert any(
                value.shape == total.shape and torch.allclose(value.double(), total, atol=1e-6) for value in wanted
            )
        else:
            value = (
                wanted[0].double() if wanted[0].shape == sums[0].shape and case != "Conv1D" else wanted[0].double().t()
            )
            assert torch.allclose(value, sums[0], atol=1e-6)
        found += 1
    assert found == len(merged)


def test_a_quantized_weight_is_what_its_codes_stand_for(tmp_path):
    model = adapted("llama", target_modules=["q_proj"])
    lofi.save_adapter(model, tmp_path / "adapter")
    family_model("llama").save_pretrained(tmp_path / "base")
    packed = lofi.load_model(tmp_path / "base", quantization="nf4", dtype="fp32")
    folder = read_folder(tmp_path / "adapter")
    update = low_rank_updates(folder)[0]
    (dense,), (codes,) = BaseWeights(family_model("llama"), folder)(update), BaseWeights(packed, folder)(update)
    gap = float((dense - codes).norm() / dense.norm())
    assert 0.01 < gap < 0.2
    assert torch.equal(codes.float(), packed.get_submodule(update.path).dense_weight().float())


def test_another_base_is_refused_by_name(tmp_path):
    lofi.save_adapter(adapted("llama", target_modules=["q_proj"]), tmp_path)
    folder = read_folder(tmp_path)
    update = low_rank_updates(folder)[0]
    with pytest.raises(AdapterFileError, match=r"has no model\.layers\.0\.self_attn\.q_proj"):
        BaseWeights(family_model("gpt2"), folder)(update)
    with pytest.raises(AdapterFileError, match=r"is \(32, 32\) in this base, but the update is \(24, 24\)"):
        BaseWeights(family_model("phi"), folder)(update)


def test_a_factor_without_its_partner_is_named(tmp_path):
    lofi.save_adapter(adapted("llama", target_modules=["q_proj"]), tmp_path)
    folder = read_folder(tmp_path)
    key = next(key for key in folder.tensors if "lora_B" in key)
    del folder.tensors[key]
    with pytest.raises(AdapterFileError, match=r"lora_B\.weight is missing"):
        low_rank_updates(folder)
