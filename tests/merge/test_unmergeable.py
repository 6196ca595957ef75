"""What no weight can hold is refused before anything is opened or changed; what can be merged is, exactly."""

from __future__ import annotations

import pytest
import torch

import lofi
from files.families import family_model, logits, stir
from lofi.adapters.merge import merge_in_memory, merged_weights
from lofi.adapters.methods import (
    BitFitConfig,
    HoulsbyConfig,
    LastLayersConfig,
    LinConfig,
    MixedConfig,
    PrefixConfig,
    PromptConfig,
)
from lofi.adapters.registry import adapter_of, adapters_of
from lofi.errors import RequestError, TargetError
from lofi.merge.disk import merge_folder
from lofi.merge.form import Form
from lofi.models.load import load_model

LORA = lofi.LoraConfig(r=3, lora_alpha=7, target_modules=["c_attn"])
UNMERGEABLE = {
    "houlsby": HoulsbyConfig(bottleneck_size=5),
    "adapter-lin": LinConfig(bottleneck_size=5),
    "prefix": PrefixConfig(num_virtual_tokens=3),
    "prompt": PromptConfig(num_virtual_tokens=3),
    "lora and lin": MixedConfig(configs=[LORA, LinConfig(bottleneck_size=5)]),
    "lora and prefix": MixedConfig(configs=[LORA, PrefixConfig(num_virtual_tokens=3)]),
}
MERGEABLE = {
    "bitfit": BitFitConfig(),
    "last-layers": LastLayersConfig(num_layers=1),
    "lora and bitfit": MixedConfig(configs=[lofi.LoraConfig(r=3, target_modules=["wte"]), BitFitConfig()]),
}
REMEDY = "because .*; serve it unmerged: load_adapter, or --adapter beside the base"


@pytest.mark.parametrize("method", UNMERGEABLE)
def test_in_memory_it_is_one_sentence_with_the_remedy_and_the_model_stays_as_it_is(method):
    model = family_model("gpt2")
    lofi.add_adapter(model, UNMERGEABLE[method])
    stir(model)
    before, classes = logits(model), [type(m) for m in model.modules()]
    for merge in (
        merge_in_memory,
        lambda model: merge_in_memory(model, inplace=True),
        lofi.merge_and_unload,
        lambda model: list(merged_weights(model)),
    ):
        with pytest.raises(TargetError, match=f"adapter 'default' cannot be merged, {REMEDY}") as caught:
            merge(model)
        assert "\n" not in str(caught.value)
    assert [type(m) for m in model.modules()] == classes and torch.equal(logits(model), before)


@pytest.mark.parametrize("method", UNMERGEABLE)
def test_a_folder_is_refused_by_its_config_before_the_base_is_even_looked_for(tmp_path, method):
    model = family_model("gpt2")
    lofi.add_adapter(model, UNMERGEABLE[method])
    stir(model)
    folder = lofi.save_adapter(model, tmp_path / "adapter")
    for form in (Form(), Form(into="nf4"), Form(into="int8")):
        with pytest.raises(RequestError, match=rf"adapter in {folder} cannot be merged, {REMEDY}"):
            merge_folder(tmp_path / "no such base", folder, tmp_path / "merged", form=form)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("config", [*UNMERGEABLE.values(), *MERGEABLE.values(), LORA])
def test_config_and_parts_agree_on_whether_a_merge_can_be(config):
    model = family_model("gpt2")
    lofi.add_adapter(model, config)
    reasons = {part.unmergeable for part in adapter_of(model, "default").parts.values()} - {None}
    assert bool(reasons) == (config.why_unmergeable() is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", MERGEABLE)
def test_on_disk_the_merged_model_says_what_the_adapted_one_said(tmp_path, method, dtype):
    family_model("gpt2", dtype=dtype).save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base")
    lofi.add_adapter(model, MERGEABLE[method])
    stir(model)
    expected = logits(model)
    folder = lofi.save_adapter(model, tmp_path / "adapter")
    report = merge_folder(tmp_path / "base", folder, tmp_path / "merged")
    merged = logits(load_model(tmp_path / "merged"))
    assert merged.dtype == dtype and not adapters_of(load_model(tmp_path / "merged"))
    if "lora" in method:
        assert torch.allclose(merged, expected, atol=1e-4 if dtype == torch.float32 else 0.2)
    else:
        assert torch.equal(merged, expected) and report.verdict.mean_logit_error == 0
    assert report.verdict.adapter_effect > 1e-2


@pytest.mark.parametrize("method", ["bitfit", "last-layers"])
def test_they_merge_into_a_quantized_model_too(tmp_path, method):
    family_model("qwen2").save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base")
    lofi.add_adapter(model, MERGEABLE[method])
    stir(model)
    lofi.save_adapter(model, tmp_path / "adapter")
    report = merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", form=Form(into="int8"))
    verdict = report.verdict
    assert 0 < verdict.mean_logit_error < verdict.adapter_effect
