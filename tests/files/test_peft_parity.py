"""The same adapter in lofi and in PEFT: the same tensors, the same logits, whoever wrote the folder."""

from __future__ import annotations

import contextlib
import json
import warnings
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lofi
from files.families import FAMILIES, adapted, family_model, logits
from lofi.adapters.merge import merge_in_memory
from lofi.adapters.registry import adapters_of
from lofi.errors import LofiWarning

peft = pytest.importorskip("peft")
TOLERANCE = 1e-5

# what is adapted -> (family, options of LoraConfig that both libraries take)
VARIETIES: dict[str, tuple[str, dict[str, Any]]] = {
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "tied embedding": ("llama_tied", {"target_modules": ["embed_tokens", "v_proj"]}),
    "tied head": ("llama_tied", {"target_modules": ["lm_head", "v_proj"]}),
    "scaled embedding": ("gemma3", {"target_modules": ["embed_tokens", "down_proj"]}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj"]}),
    "T5 embedding": ("t5", {"target_modules": ["encoder.embed_tokens", "q", "wo"]}),
    "bias of the adapted": ("qwen2", {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"}),
    "every bias": ("opt", {"target_modules": ["q_proj", "fc1"], "bias": "all"}),
    "modules to save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["model.norm", "lm_head"]}),
    "modules to save by suffix": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "rank and alpha patterns": ("llama", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 5},
                                          "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 2}}),
    "rsLoRA": ("qwen3", {"target_modules": ["k_proj", "up_proj"], "use_rslora": True}),
    "regex": ("mistral", {"target_modules": r".*layers\.1\..*(q|gate)_proj"}),
    "layers": ("llama", {"target_modules": ["o_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "excluded": ("llama", {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "token rows": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [7, 3, 50]}}),
    "tied token rows": ("llama_tied", {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3]}),
    "experts": ("mixtral", {"target_modules": ["q_proj"],
                            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    "order of patterns": ("llama", {"target_modules": ["q_proj", "v_proj"],
                                    "rank_pattern": {"v_proj": 5, ".*proj": 2}}),
    "experts alone": ("mixtral", {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]}),
}  # fmt: skip


@contextlib.contextmanager
def quiet(*allowed: str):
    """Every warning is an error, but those of transformers about itself and the allowed ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        for text in allowed:
            warnings.filterwarnings("ignore", message=text)
        yield


def in_peft(family: str, folder, *allowed: str) -> Any:
    with quiet(*allowed):
        return peft.PeftModel.from_pretrained(family_model(family), folder).eval()


def peft_adapter(family: str, folder, **config: Any) -> Any:
    """An adapter made, stirred and saved by PEFT."""
    task = {"bert": "SEQ_CLS", "roberta": "SEQ_CLS", "deberta-v2": "SEQ_CLS", "bert_tags": "TOKEN_CLS",
            "t5": "SEQ_2_SEQ_LM"}.get(family, "CAUSAL_LM")  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(family_model(family), peft.LoraConfig(r=3, lora_alpha=7, task_type=task, **config))
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        made.save_pretrained(folder)
    return made.eval()


def in_lofi(family: str, folder) -> Any:
    model = family_model(family)
    with pytest.warns(LofiWarning, match=r"no lofi\.json"):
        lofi.load_adapter(model, folder)
    return model


def assert_same_tensors(theirs: Any, folder) -> None:
    """What PEFT holds after loading is the file, bit for bit."""
    stored = load_file(folder / "adapter_model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        held = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    for key, tensor in stored.items():
        if key.endswith(".bias"):  # PEFT keeps biases in the base layers
            held = {**held, key: theirs.get_parameter(key)}
        assert torch.equal(held[key], tensor), key


def assert_close(one: torch.Tensor, other: torch.Tensor) -> None:
    assert (one - other).abs().max() <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_our_adapter_of_every_linear(family, tmp_path):
    ours = adapted(family)
    lofi.save_adapter(ours, tmp_path / "a")
    theirs = in_peft(family, tmp_path / "a")
    assert_same_tensors(theirs, tmp_path / "a")
    assert_close(logits(ours), logits(theirs))
    assert (logits(ours) - logits(family_model(family))).abs().max() > 100 * TOLERANCE  # the adapter says something
    assert_close(logits(merge_in_memory(ours)), logits(theirs.merge_and_unload()))


@pytest.mark.parametrize("family", FAMILIES)
def test_we_load_pefts_adapter_of_every_linear(family, tmp_path):
    # PEFT's own all-linear wraps the TOKEN_CLS head twice and fails, and adapts Mixtral's router, which is no linear
    some = {"bert_tags": ["query", "value", "dense"], "mixtral": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    theirs = peft_adapter(family, tmp_path, target_modules=some.get(family, "all-linear"))
    ours = in_lofi(family, tmp_path)
    assert_close(logits(ours), logits(theirs))
    assert_close(logits(merge_in_memory(ours)), logits(theirs.merge_and_unload()))


@pytest.mark.parametrize("variety", VARIETIES)
def test_peft_loads_what_we_write(variety, tmp_path):
    family, config = VARIETIES[variety]
    ours = adapted(family, **config)
    lofi.save_adapter(ours, tmp_path / "a")
    theirs = in_peft(family, tmp_path / "a", "Model has `tie_word_embeddings=True`")
    assert_same_tensors(theirs, tmp_path / "a")
    assert_close(logits(ours), logits(theirs))


def test_a_rank_of_the_experts_reaches_peft_and_comes_back(tmp_path):
    parameters = ["experts.down_proj", "experts.gate_up_proj"]
    patterns = {"rank_pattern": {"experts": 2}, "alpha_pattern": {"mlp.experts": 5}}
    ours = adapted("mixtral", target_modules=["q_proj"], target_parameters=parameters, **patterns)
    lofi.save_adapter(ours, tmp_path / "a")
    theirs = in_peft("mixtral", tmp_path / "a", "The following")  # PEFT looks for the keys among modules alone
    assert_close(logits(ours), logits(theirs))
    back = family_model("mixtral")
    lofi.load_adapter(back, tmp_path / "a")
    assert torch.equal(logits(ours), logits(back))
    assert adapters_of(back)["default"].parts["model.layers.0.mlp.experts"].rank == 2


# PEFT sorts the keys when it writes, so the order of patterns is lost in its own files
@pytest.mark.parametrize("variety", sorted(VARIETIES.keys() - {"order of patterns"}))
def test_we_load_what_peft_writes(variety, tmp_path):
    family, config = VARIETIES[variety]
    theirs = peft_adapter(family, tmp_path, **config)
    ours = in_lofi(family, tmp_path)
    assert_close(logits(ours), logits(theirs))
    assert (logits(ours) - logits(family_model(family))).abs().max() > 100 * TOLERANCE
    assert_close(logits(merge_in_memory(ours)), logits(theirs))


def test_our_folder_comes_back_from_peft_unchanged(tmp_path):
    ours = adapted("llama", target_modules=["q_proj", "up_proj"], bias="lora_only", modules_to_save=["model.norm"])
    lofi.save_adapter(ours, tmp_path / "a")
    in_peft("llama", tmp_path / "a").save_pretrained(tmp_path / "b")
    first, second = (load_file(tmp_path / x / "adapter_model.safetensors") for x in "ab")
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_we_write_the_keys_that_peft_writes(tmp_path):
    peft_adapter("llama", tmp_path / "theirs", target_modules=["q_proj"])
    lofi.save_adapter(adapted("llama", target_modules=["q_proj"]), tmp_path / "ours")
    ours, theirs = (json.loads((tmp_path / x / "adapter_config.json").read_text()) for x in ("ours", "theirs"))
    assert ours == theirs


def test_an_adapter_of_another_name_is_loaded_from_its_subfolder(tmp_path):
    model = peft.get_peft_model(
        family_model("llama"), peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False), "mine"
    )
    model.save_pretrained(tmp_path)
    ours = family_model("llama")
    with pytest.raises(lofi.AdapterFileError, match=r"its subfolders do: give one of mine"):
        lofi.load_adapter(ours, tmp_path)
    with pytest.warns(LofiWarning):
        lofi.load_adapter(ours, tmp_path / "mine", "mine")
    assert list(adapters_of(ours)) == ["mine"]
    assert_close(logits(ours), logits(model))


@pytest.mark.parametrize(
    ("option", "word"),
    [
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"layer_replication": [(0, 2), (0, 2)]}, "repeats layers"),
    ],
)
def test_a_kind_of_lora_that_we_do_not_have_is_refused_by_name(option, word, tmp_path):
    peft_adapter("llama", tmp_path, target_modules=["q_proj"], **option)
    with pytest.raises(lofi.AdapterFileError, match=word):
        lofi.load_adapter(family_model("llama"), tmp_path)


def test_the_tolerance_would_notice_a_wrong_scale(tmp_path):
    ours = adapted("llama")
    lofi.save_adapter(ours, tmp_path / "a")
    record = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**record, "lora_alpha": 7.01}))
    assert (logits(ours) - logits(in_peft("llama", tmp_path / "a"))).abs().max() > TOLERANCE
