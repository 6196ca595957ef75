"""vLLM's rules: every fault is named with what to do; what is converted has the same effect, in lofi and in PEFT."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import lofi
from lofi.adapters.registry import adapter_tensors, load_adapter_tensors
from lofi.errors import ProofError, RequestError
from lofi.export.vllm import RANKS, fitness, refuse, write_adapter
from lofi.export.vllm_proof import proved_same
from lofi.files.adapter_folder import read_folder, save_adapter

PLAIN = {"r": 3, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Llama of odd sizes with biases and an untied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=67,
        hidden_size=24,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def made(base, tmp_path):
    """A function that saves a random adapter of a config and reads its folder."""

    def make(**config):
        model = lofi.load_model(base, dtype="fp32", device="cpu")
        torch.manual_seed(7)
        lofi.add_adapter(model, lofi.LoraConfig(**(PLAIN | config)))
        values = {
            key: 0.3 * torch.randn_like(t) + (t if "magnitude" in key else 0)
            for key, t in adapter_tensors(model).items()
        }
        load_adapter_tensors(model, "default", values)
        return read_folder(save_adapter(model, tmp_path / "adapter"))

    return make


def config_of(base, **changes):
    return json.loads((base / "config.json").read_text()) | changes


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "trained biases (bias='all')"),
        ({"trainable_token_indices": [3, 8]}, "rows of its own for some tokens"),
        ({"modules_to_save": ["norm"]}, "modules trained in full (model.norm)"),
    ],
)
def test_what_vllm_refuses_is_named_with_what_to_do(made, base, config, words):
    read = made(**config)
    fit = fitness(read, config_of(base))
    assert len(fit.refusals) == 1 and words in fit.refusals[0] and "--to merged" in fit.refusals[0]
    with pytest.raises(RequestError, match=r"vLLM would not serve .*adapter: "):
        refuse(read, fit)


def test_several_faults_are_told_at_once(made, base):
    read = made(bias="lora_only", trainable_token_indices=[3], modules_to_save=["norm"])
    assert len(fitness(read, config_of(base)).refusals) == 3


def test_another_method_is_refused(base, tmp_path):
    model = lofi.load_model(base, dtype="fp32", device="cpu")
    torch.manual_seed(2)
    lofi.add_adapter(model, lofi.HoulsbyConfig(bottleneck_size=3))
    load_adapter_tensors(model, "default", {k: torch.randn_like(t) for k, t in adapter_tensors(model).items()})
    read = read_folder(save_adapter(model, tmp_path / "houlsby"))
    (told,) = fitness(read).refusals
    assert "houlsby" in told and "serves LoRA alone" in told and "serve it with lofi" in told


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "no LoRA on GPT2LMHeadModel"),
        ({"vocab_size": 262_144}, "vocabulary of 262,144"),
        ({"text_config": {"vocab_size": 262_144}}, "vocabulary of 262,144"),
    ],
)
def test_a_base_that_vllm_serves_no_lora_on_is_named(made, base, changes, words):
    (told,) = fitness(made(), config_of(base, **changes)).refusals
    assert words in told and "--to merged" in told


def test_a_tied_head_is_refused_and_an_untied_one_is_not(made, base):
    read = made(target_modules=["q_proj", "lm_head"])
    assert fitness(read, config_of(base)).refusals == []
    (told,) = fitness(read, config_of(base, tie_word_embeddings=True)).refusals
    assert "tied to the embedding" in told


def test_the_rank_asked_of_vllm_is_the_next_that_it_has(made, base):
    read = made(r=9, rank_pattern={"down_proj": 17})
    assert (fitness(read).rank, fitness(read).max_lora_rank) == (17, 32)
    assert fitness(read, max_rank=32).refusals == []
    (told,) = fitness(read, max_rank=16).refusals
    assert "rank 17 is above the server's --max-lora-rank of 16" in told and "lofi resize --rank 16" in told
    with pytest.raises(RequestError, match="--max-rank is 24, expected one that vLLM can be started with: 1, 8, 16"):
        fitness(read, max_rank=24)
    assert RANKS[-1] == 512


def test_a_plain_adapter_goes_over_bit_for_bit(made, base, tmp_path):
    read = made()
    fit = fitness(read, config_of(base))
    assert fit.refusals == fit.conversions == []
    (tmp_path / "out").mkdir()
    write_adapter(read, fit, tmp_path / "out")
    before, after = (load_file(p / "adapter_model.safetensors") for p in (read.path, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert json.loads((tmp_path / "out" / "lofi.json").read_text())["exported"]["to"] == "vllm"


FOLDED = {
    "rsLoRA": {"use_rslora": True},
    "patterns": {"rank_pattern": {"layers.0.mlp.down_proj": 5}, "alpha_pattern": {"q_proj": 7}},
    "both, with embedding and head": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2},
        "target_modules": ["q_proj", "embed_tokens", "lm_head"],
    },
}


@pytest.mark.parametrize("name", FOLDED)
def test_multipliers_are_folded_and_every_version_reads_the_same_update(made, base, tmp_path, name):
    read = made(**FOLDED[name])
    fit = fitness(read, config_of(base))
    assert any("folded into B" in one for one in fit.conversions)
    (tmp_path / "out").mkdir()
    write_adapter(read, fit, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["use_rslora"] is False and written["lora_alpha"] == written["r"]
    assert all(written["rank_pattern"][key] == alpha for key, alpha in written["alpha_pattern"].items())
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(".lora_" in key for key in tensors)
    assert "the original's tokens and logits on 3 prompts of random tokens" in proved_same(read, base, tmp_path / "out")


def test_peft_reads_the_folded_folder_as_the_original(made, base, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    read = made(**FOLDED["patterns"])
    (tmp_path / "out").mkdir()
    write_adapter(read, fitness(read), tmp_path / "out")
    ids = torch.arange(12)[None]
    said = []
    for folder in (read.path, tmp_path / "out"):
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
        with torch.no_grad():
            said.append(model.eval()(input_ids=ids).logits)
    with torch.no_grad():
        alone = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(input_ids=ids).logits
    torch.testing.assert_close(said[0], said[1], rtol=0, atol=2e-5)
    assert (said[0] - alone).abs().max() > 0.1


def test_an_export_that_says_something_else_is_not_let_through(made, base, tmp_path):
    read = made()
    wrong = shutil.copytree(read.path, tmp_path / "wrong")
    tensors = load_file(wrong / "adapter_model.safetensors")
    key = next(key for key in tensors if "lora_B" in key)
    save_file(tensors | {key: tensors[key] * 1.5}, wrong / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ProofError, match=r"does not say what .* says: prompt 1"):
        proved_same(read, base, wrong)


def test_copies_of_base_weights_and_names_of_starts_are_left_out(made, base, tmp_path):
    read = made(target_modules=["q_proj", "embed_tokens"], init_lora_weights="gaussian")
    copied = "base_model.model.model.embed_tokens.base_layer.weight"
    tensors = load_file(read.path / "adapter_model.safetensors")
    weight = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    save_file(tensors | {copied: weight}, read.path / "adapter_model.safetensors", metadata={"format": "pt"})
    read = read_folder(read.path)
    fit = fitness(read, config_of(base))
    assert len(fit.conversions) == 2 and "gaussian" in fit.conversions[0] and "left out" in fit.conversions[1]
    (tmp_path / "out").mkdir()
    write_adapter(read, fit, tmp_path / "out")
    assert copied not in load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["init_lora_weights"] is True
