"""Starts and DoRA in folders: plain LoRA of rank 2r for everyone, PEFT's own folders here, gradients alike."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch

import lofi
from files.families import family_model, logits
from lofi.adapters.registry import adapter_tensors, adapters_of
from lofi.errors import LofiWarning, TargetError
from lofi.files.adapter_folder import read_folder
from quantized_models import quantized

peft = pytest.importorskip("peft")
TOLERANCE = 1e-5
STARTS = ("olora", "pissa", "pissa_niter_4", "orthogonal")

# what is adapted -> (family, options of LoraConfig)
VARIETIES: dict[str, tuple[str, dict[str, Any]]] = {
    "every linear": ("llama", {}),
    "rsLoRA": ("llama", {"use_rslora": True}),
    "patterns": ("llama", {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 2},
                           "alpha_pattern": {r"layers\.1\.mlp\.down_proj": 3}, "use_rslora": True}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj"]}),
    "embedding": ("llama_tied", {"target_modules": ["embed_tokens", "v_proj"], "use_rslora": True}),
    "experts": ("mixtral", {"target_modules": ["q_proj"], "use_rslora": True,
                            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    "bias and head": ("qwen2", {"target_modules": ["q_proj"], "bias": "lora_only", "modules_to_save": ["lm_head"]}),
}  # fmt: skip


def trained(model: Any, **config: Any) -> Any:
    """The model with an adapter whose tensors have moved as training moves them."""
    lofi.add_adapter(model, lofi.LoraConfig(**({"r": 4, "lora_alpha": 7} | config)))
    move(adapter_tensors(model).values())
    return model


@torch.no_grad()
def move(tensors: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    for tensor in tensors:
        step = torch.randn(tensor.shape, generator=generator) * tensor.detach().abs().mean().clamp_min(0.2)
        tensor.add_(0.2 * step)


def in_peft(family: str, folder: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(family_model(family), folder, is_trainable=True).eval()


def from_peft(family: str, **config: Any) -> Any:
    """The family's model with PEFT's adapter, moved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(
            family_model(family), peft.LoraConfig(**({"r": 4, "lora_alpha": 7, "task_type": "CAUSAL_LM"} | config))
        ).eval()


def loaded(model: Any, folder: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LofiWarning)
        lofi.load_adapter(model, folder)
    return model


def apart(one: Any, other: Any) -> float:
    return float((logits(one) - logits(other)).abs().max())


@pytest.mark.parametrize("variety", VARIETIES)
@pytest.mark.parametrize("init", STARTS)
def test_the_folder_is_plain_lora_of_twice_the_rank_for_us_and_for_peft(variety, init, tmp_path):
    family, config = VARIETIES[variety]
    ours = trained(family_model(family), init_lora_weights=init, **config)
    lofi.save_adapter(ours, tmp_path / "a")
    record = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (record["r"], record["lora_alpha"], record["init_lora_weights"], record["use_rslora"]) == (
        8,
        14,
        True,
        False,
    )
    assert list(record["rank_pattern"].values()) == [2 * r for r in config.get("rank_pattern", {}).values()]
    assert list(record["alpha_pattern"].values()) == [2 * a for a in config.get("alpha_pattern", {}).values()]
    assert apart(ours, family_model(family)) > 1000 * TOLERANCE
    assert apart(ours, loaded(family_model(family), tmp_path / "a")) <= TOLERANCE
    assert apart(ours, in_peft(family, tmp_path / "a")) <= TOLERANCE


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("dora", [False, True])
def test_trained_on_a_quantized_base_it_loads_there_as_it_was(kind, dora, tmp_path):
    ours = trained(quantized(family_model("llama"), kind), init_lora_weights="olora", use_dora=dora)
    lofi.save_adapter(ours, tmp_path / "a")
    assert apart(ours, loaded(quantized(family_model("llama"), kind), tmp_path / "a")) <= TOLERANCE


def test_the_record_and_the_card_say_what_it_was_in_training(tmp_path):
    ours = trained(family_model("llama"), init_lora_weights="pissa", use_rslora=True, rank_pattern={"q_proj": 2})
    lofi.save_adapter(ours, tmp_path / "a")
    read = read_folder(tmp_path / "a")
    said = {"init_lora_weights": "pissa", "r": 4, "lora_alpha": 7, "use_rslora": True, "rank_pattern": {"q_proj": 2}}
    assert read.record["trained_as"] == said
    assert any("vLLM needs a maximum LoRA rank of at least 8" in note for note in read.record["notes"])
    assert "plain LoRA of rank 8, twice what trains" in (tmp_path / "a" / "README.md").read_text()
    assert read.record["scale"]["model.layers.0.mlp.up_proj"] == pytest.approx(7 / 4)
    assert read.record["scale"]["model.layers.0.self_attn.q_proj"] == pytest.approx(7 / 2)


def test_a_plain_adapter_says_nothing_of_it_and_keeps_its_rank(tmp_path):
    ours = trained(family_model("llama"), use_rslora=True)
    lofi.save_adapter(ours, tmp_path / "a")
    read = read_folder(tmp_path / "a")
    assert "trained_as" not in read.record and read.config.r == 4 and read.config.use_rslora is True


@pytest.mark.parametrize("init", ["olora", "pissa"])
def test_pefts_converted_folders_load(init, tmp_path):
    theirs = from_peft("llama", init_lora_weights=init, target_modules=["q_proj", "down_proj"])
    theirs.peft_config["default"].init_lora_weights = True  # as PEFT's guide has it: the start, saved as it is
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = init
    move(p for p in theirs.parameters() if p.requires_grad)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
        theirs.save_pretrained(tmp_path / "raw")
    ours = loaded(family_model("llama"), tmp_path / "a")
    assert adapters_of(ours)["default"].config.r == 8
    assert apart(ours, theirs) <= TOLERANCE < 1e-2 < apart(ours, family_model("llama"))
    with pytest.raises(lofi.AdapterFileError, match=rf"init_lora_weights is '{init}' \(its training rewrote the base"):
        lofi.load_adapter(family_model("llama"), tmp_path / "raw")


def test_our_start_is_pefts(tmp_path):
    for init in ("olora", "pissa"):
        theirs = from_peft("llama", init_lora_weights=init, target_modules=["q_proj", "down_proj"], use_rslora=True)
        ours = family_model("llama")
        config = lofi.LoraConfig(
            r=4, lora_alpha=7, init_lora_weights=init, target_modules=["q_proj", "down_proj"], use_rslora=True
        )
        lofi.add_adapter(ours, config)
        for path, part in adapters_of(ours)["default"].parts.items():
            held = theirs.base_model.model.get_submodule(path)
            product = held.lora_B["default"].weight @ held.lora_A["default"].weight
            assert torch.allclose(part.lora_B @ part.lora_A, product, rtol=0, atol=1e-5), (init, path)
            assert product.abs().max() > 0.05


@pytest.mark.parametrize(("family", "targets"), [("llama", ["q_proj", "down_proj"]), ("gpt2", ["c_attn", "c_proj"])])
def test_dora_says_and_learns_what_pefts_does(family, targets, tmp_path):
    theirs = from_peft(family, use_dora=True, target_modules=targets)
    move(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path)
    ours = loaded(family_model(family), tmp_path)
    assert apart(ours, theirs) <= TOLERANCE < 1e-2 < apart(ours, family_model(family))
    ids = torch.arange(3, 21).view(2, 9)
    for model in (ours, theirs):
        model(input_ids=ids).logits.square().sum().backward()
    compared = 0
    for path, part in adapters_of(ours)["default"].parts.items():
        held = theirs.base_model.model.get_submodule(path)
        pairs = {
            "lora_A": held.lora_A["default"].weight, "lora_B": held.lora_B["default"].weight,
            "lora_magnitude_vector": held.lora_magnitude_vector["default"].weight,
        }  # fmt: skip
        for name, other in pairs.items():
            mine = part.get_parameter(name).grad
            assert other.grad.abs().max() > 1e-2
            assert torch.allclose(mine, other.grad, rtol=1e-3, atol=1e-4 * float(other.grad.abs().max())), (path, name)
            compared += 1
    assert compared >= 12


@pytest.mark.parametrize("init", [True, "gaussian", "olora", "pissa"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_our_dora_folder_loads_in_peft_and_here(family, init, tmp_path):
    ours = trained(family_model(family), init_lora_weights=init, use_dora=True, use_rslora=True)
    lofi.save_adapter(ours, tmp_path / "a")
    read = read_folder(tmp_path / "a")
    assert read.peft["use_dora"] is True and read.config.r == (8 if init in ("olora", "pissa") else 4)
    magnitudes = [key for key in read.tensors if "magnitude" in key]
    assert magnitudes and all(key.endswith(".lora_magnitude_vector") for key in magnitudes)
    assert any("vLLM and llama.cpp cannot" in note for note in read.record["notes"])
    assert apart(ours, loaded(family_model(family), tmp_path / "a")) <= TOLERANCE
    assert apart(ours, in_peft(family, tmp_path / "a")) <= TOLERANCE
    assert apart(ours, family_model(family)) > 1000 * TOLERANCE


def test_pefts_dora_of_an_embedding_is_refused_by_its_path(tmp_path):
    theirs = from_peft("llama", use_dora=True, target_modules=["q_proj", "embed_tokens"])
    theirs.save_pretrained(tmp_path)
    model = family_model("llama")
    with pytest.warns(LofiWarning), pytest.raises(TargetError, match=r"not reach embeddings \(model\.embed_tokens\)"):
        lofi.load_adapter(model, tmp_path)
    assert not adapters_of(model)


def test_the_tolerance_would_notice_a_start_that_was_not_subtracted(tmp_path):
    ours = trained(family_model("llama"), init_lora_weights="olora")
    lofi.save_adapter(ours, tmp_path / "a")
    back = loaded(family_model("llama"), tmp_path / "a")
    with torch.no_grad():
        adapter_tensors(back)["model.layers.0.mlp.up_proj.lora_A"][4:] *= 0  # A0
    assert apart(ours, back) > 100 * TOLERANCE
