"""Folders of the methods that PEFT does not have: written, read back, and refused when they are not whole."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import lofi
from files.families import family_model, logits, stir
from lofi.adapters.methods import BitFitConfig, HoulsbyConfig, LastLayersConfig, LinConfig, MixedConfig
from lofi.adapters.registry import adapter_of, adapter_tensors, adapters_of
from lofi.errors import AdapterFileError, ProofError
from lofi.files.adapter_folder import read_folder

LORA = lofi.LoraConfig(r=3, lora_alpha=7, target_modules=["c_attn"])
CONFIGS = {
    "houlsby": HoulsbyConfig(bottleneck_size=5, non_linearity="silu", attention_modules=["attn.c_proj"]),
    "adapter-lin": LinConfig(bottleneck_size=5, init="normal"),
    "bitfit": BitFitConfig(modules_to_save=["ln_f"]),
    "last-layers": LastLayersConfig(num_layers=1),
    "mixed": MixedConfig(configs=[LORA, LinConfig(bottleneck_size=5)]),
}
METHODS = pytest.mark.parametrize("method", CONFIGS)


def saved(tmp_path, method, family="gpt2"):
    model = family_model(family)
    lofi.add_adapter(model, CONFIGS[method])
    stir(model)
    return model, lofi.save_adapter(model, tmp_path / "adapter")


def rewrite(folder, change):
    """The folder with its tensors changed by hand."""
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


@METHODS
def test_a_folder_loads_on_a_fresh_base_to_the_last_bit(tmp_path, method):
    model, folder = saved(tmp_path, method)
    other = family_model("gpt2")
    read = lofi.load_adapter(other, folder)
    assert torch.equal(logits(other), logits(model))
    mine, theirs = adapter_tensors(model), adapter_tensors(other)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert read.config.method == method and adapter_of(other, "default").config == read.config


@METHODS
def test_a_folder_says_what_it_is_and_reads_without_a_model(tmp_path, method):
    _, folder = saved(tmp_path, method)
    read = read_folder(folder)
    record = json.loads((folder / "adapter_config.json").read_text())
    assert record["peft_type"].startswith("LOFI_") and record["task_type"] == "CAUSAL_LM"
    assert read.config.to_dict() == CONFIGS[method].to_dict() | {"task_type": "CAUSAL_LM"}
    assert all(key.startswith("base_model.model.transformer.") for key in read.tensors)


@METHODS
def test_peft_refuses_the_folder_by_its_type(tmp_path, method):
    import peft

    _, folder = saved(tmp_path, method)
    with pytest.raises((KeyError, ValueError, TypeError), match="LOFI_"):
        peft.PeftModel.from_pretrained(family_model("gpt2"), str(folder))


@METHODS
def test_what_was_never_trained_is_not_saved(tmp_path, method):
    model = family_model("gpt2")
    lofi.add_adapter(model, replace(CONFIGS[method], **({"init": "zero"} if method == "adapter-lin" else {})))
    with pytest.raises(ProofError, match=r"changes nothing: .* in all .* adapted modules; train it first"):
        lofi.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@METHODS
def test_missing_extra_and_misshaped_tensors_are_all_named_and_the_model_stays_as_it_was(tmp_path, method):
    _, folder = saved(tmp_path, method)
    keys = sorted(load_file(folder / "adapter_model.safetensors"))

    def change(tensors):
        tensors["base_model.model.more"] = torch.ones(1)
        tensors[keys[0]] = torch.ones(2, 2, 2)
        del tensors[keys[-1]]

    rewrite(folder, change)
    model = family_model("gpt2")
    before = logits(model)
    with pytest.raises(AdapterFileError) as caught:
        lofi.load_adapter(model, folder)
    said = str(caught.value)
    assert (
        f"{keys[-1]} is missing" in said and f"{keys[0]} has shape (2, 2, 2)" in said and "more is unexpected" in said
    )
    assert not adapters_of(model) and torch.equal(logits(model), before)


@METHODS
def test_a_nan_is_refused_by_name_in_saving_and_in_loading(tmp_path, method):
    model, folder = saved(tmp_path, method)
    key = sorted(load_file(folder / "adapter_model.safetensors"))[0]
    rewrite(folder, lambda tensors: tensors[key].view(-1)[0].fill_(float("nan")))
    with pytest.raises(AdapterFileError, match=rf"NaN.*|{key}"):
        lofi.load_adapter(family_model("gpt2"), folder)
    with torch.no_grad():
        next(iter(adapter_tensors(model).values())).view(-1)[0] = float("nan")
    with pytest.raises(AdapterFileError, match="NaN"):
        lofi.save_adapter(model, tmp_path / "again")


@METHODS
def test_a_truncated_file_and_another_base_are_refused(tmp_path, method):
    _, folder = saved(tmp_path, method)
    with pytest.raises(ProofError, match="was trained on another base"):
        lofi.load_adapter(family_model("gpt2", seed=1), folder)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(AdapterFileError, match=r"adapter_model\.safetensors"):
        read_folder(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "LOFI_HOULSBIE"}, "peft_type is 'LOFI_HOULSBIE', expected one of LORA, LOFI_HOULSBY"),
        ({"bottleneck_width": 3}, "HoulsbyConfig has no bottleneck_width; use the lofi that wrote the folder"),
        ({"bottleneck_size": "3"}, "is not a usable HoulsbyConfig: bottleneck_size is '3', expected a whole number"),
        ({"bottleneck_size": 6}, r"has shape \(5, 24\), adapter_config.json and this model say \(6, 24\)"),
    ],
)
def test_a_config_that_does_not_fit_is_one_sentence(tmp_path, changes, words):
    _, folder = saved(tmp_path, "houlsby")
    record = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(record | changes))
    with pytest.raises(AdapterFileError, match=words) as caught:
        lofi.load_adapter(family_model("gpt2"), folder)
    assert "\n" not in str(caught.value)


def test_a_mixture_names_its_methods_and_one_of_them_unknown_is_refused(tmp_path):
    _, folder = saved(tmp_path, "mixed")
    path = folder / "adapter_config.json"
    record = json.loads(path.read_text())
    assert [one["peft_type"] for one in record["configs"]] == ["LORA", "LOFI_LIN"]
    record["configs"][1]["peft_type"] = "LOFI_NONE"
    path.write_text(json.dumps(record))
    with pytest.raises(AdapterFileError, match="configs holds peft_type 'LOFI_NONE', expected one of"):
        read_folder(folder)
    record["configs"] = 3
    path.write_text(json.dumps(record))
    with pytest.raises(AdapterFileError, match="configs is 3, expected a list"):
        read_folder(folder)


CARDS = {
    "houlsby": "# Adapter layers after attention and MLP (Houlsby et al.)",
    "adapter-lin": "# Adapter layers after each block (Lin et al.)",
    "bitfit": "# Trained biases (BitFit)",
    "last-layers": "# The last blocks, trained in full",
    "mixed": "# A LoRA adapter with Adapter layers after each block (Lin et al.)",
}


@pytest.mark.parametrize(("method", "title"), CARDS.items())
def test_the_card_says_which_method_it_is_and_promises_peft_to_none_of_them(tmp_path, method, title):
    _, folder = saved(tmp_path, method)
    text = (folder / "README.md").read_text()
    assert title in text and "library_name: lofi" in text and "PEFT does not have this method" in text
    assert ("not merged into it: a bottleneck" in text) == (method in ("houlsby", "adapter-lin", "mixed"))


def test_the_card_of_a_lora_adapter_keeps_peft(tmp_path):
    model = family_model("gpt2")
    lofi.add_adapter(model, LORA)
    stir(model)
    text = (lofi.save_adapter(model, tmp_path / "lora") / "README.md").read_text()
    assert "# A LoRA adapter\n" in text and "library_name: peft" in text and "PEFT loads the same folder" in text
    assert "| c_attn | 2 | linear | 3 | 2.33333 | 576 |" in text and "merged" not in text
