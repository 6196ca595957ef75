"""Opening models strictly: every fault one sentence, every new tensor named."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lofi.errors import ModelError, RecipeError
from lofi.models.facts import head_names
from lofi.models.load import load_model, load_tokenizer, mark_multi_label

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


@pytest.fixture
def saved(tiny, tmp_path):
    """`saved("llama")` writes a random model folder and returns (folder, model)."""

    def write(family, name=None, **options):
        model = tiny.model(family, **options)
        folder = tmp_path / (name or family)
        model.save_pretrained(folder)
        return folder, model

    return write


def edit(folder, change):
    """Rewrite the one safetensors file of a folder with `change(tensors)`."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "mixtral", "t5", "bart"])
def test_a_saved_model_comes_back_tensor_for_tensor_in_evaluation_mode(saved, family):
    folder, model = saved(family)
    loaded = load_model(folder, device="cpu")
    assert type(loaded) is type(model) and not loaded.training
    assert loaded.lofi_new_tensors == []
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_dtype_auto_is_the_checkpoints_own_and_words_convert(saved, tiny):
    folder = saved("llama")[0]
    tiny.model("llama").bfloat16().save_pretrained(folder)
    assert load_model(folder, device="cpu").dtype == torch.bfloat16
    for given, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16, "float16": torch.float16}.items():
        assert load_model(str(folder), dtype=given, device="cpu").dtype == dtype
    assert load_model(folder, dtype=torch.float32, device="cpu").dtype == torch.float32
    with pytest.raises(RecipeError, match="dtype 'fp8' is not known; use auto, bf16"):
        load_model(folder, dtype="fp8")


def test_a_misspelt_folder_names_its_nearest_sibling(saved, tmp_path):
    folder = saved("llama", "my-llama")[0]
    with pytest.raises(ModelError, match=f"no model folder .*my-lama; did you mean {folder}"):
        load_model(tmp_path / "my-lama")
    with pytest.raises(ModelError, match=r"give the folder that holds config\.json, or a hub id"):
        load_model(tmp_path / "nothing" / "like" / "it")
    with pytest.raises(ModelError, match=r"is a file, but a model is a folder"):
        load_model(folder / "config.json")


def test_a_misspelt_relative_folder_is_not_taken_for_a_hub_id(saved, tmp_path, monkeypatch):
    saved("llama", "my-llama")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="did you mean my-llama"):
        load_model("my-lama")
    (tmp_path / "models").mkdir()
    with pytest.raises(ModelError, match="no model folder models/absent"):
        load_model("models/absent")


def test_a_hub_id_without_a_network_is_one_sentence():
    with pytest.raises(
        ModelError, match="some-org/some-model is no folder, and as a hub id its config cannot be fetched"
    ):
        load_model("some-org/some-model")


def test_folders_that_are_no_models_say_what_is_missing(saved, tmp_path):
    folder = saved("llama")[0]
    with pytest.raises(ModelError, match=f"{tmp_path} has no config.json.*did you mean {folder}"):
        load_model(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no model\.safetensors and no .*\.index\.json; it holds config\.json"):
        load_model(folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match=r"pickled weights \(pytorch_model\.bin\).*save_pretrained"):
        load_model(folder)
    (folder / "config.json").write_text("{broken")
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        load_model(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="holds list, but a JSON object was expected"):
        load_model(folder)


def test_an_adapter_folder_is_sent_to_the_adapter_flag(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    with pytest.raises(ModelError, match=r"is an adapter, not a model; give .* \(org/base\).*--adapter"):
        load_model(tmp_path)


def test_cut_padded_and_foreign_weight_files_are_named(saved):
    folder = saved("llama")[0]
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    faults = {
        whole[:-10]: r"cut short: [\d,]+ of [\d,]+ bytes",
        whole[:100]: "cut short inside its header",
        b"": "cut short inside its header",
        whole + b"more": "has 4 bytes more than its header lists",
        (20).to_bytes(8, "little") + b"x" * 40: "not a safetensors file",
        b"version https://git-lfs.github.com/spec/v1\n": "git-lfs pointer",
    }
    for content, words in faults.items():
        file.write_bytes(content)
        with pytest.raises(ModelError, match=words):
            load_model(folder)


def test_a_missing_shard_and_a_broken_index_are_named(saved, tiny):
    folder = saved("llama")[0]
    shutil.rmtree(folder)
    tiny.model("llama").save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1 and load_model(folder, device="cpu").lofi_new_tensors == []
    shards[1].unlink()
    with pytest.raises(ModelError, match=f"lacks 1 of {len(shards)} shards \\({shards[1].name}\\)"):
        load_model(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be read as a shard index"):
        load_model(folder)


def test_missing_unexpected_and_misshapen_tensors_are_all_reported_at_once(saved):
    folder = saved("llama")[0]

    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(3, 5)
        tensors["model.norm.weight"] = torch.zeros(7)

    edit(folder, change)
    with pytest.raises(ModelError) as caught:
        load_model(folder)
    for words in (
        "missing model.layers.1.mlp.up_proj.weight",
        "unexpected model.layers.7.mlp.up_proj.weight",
        "model.norm.weight is (7,), expected (24,)",
    ):
        assert words in str(caught.value)


def test_buffers_that_nothing_learns_may_be_left_behind(saved):
    folder = saved("llama")[0]
    edit(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}))
    assert load_model(folder, device="cpu").lofi_new_tensors == []


def test_a_classifier_over_a_language_model_is_new_named_and_seeded(saved):
    folder = saved("llama")[0]
    loaded = []
    for _ in range(2):
        torch.manual_seed(3)
        loaded.append(load_model(folder, task="SEQ_CLS", num_labels=5, device="cpu"))
    assert loaded[0].lofi_new_tensors == ["score.weight"]
    assert loaded[0].score.weight.shape == (5, 24)
    assert torch.equal(loaded[0].score.weight, loaded[1].score.weight)


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_an_encoder_takes_named_labels_and_only_its_head_is_new(saved, family, task):
    folder, model = saved(family)
    loaded = load_model(folder, task=task, labels=["O", "B-x", "I-x"], device="cpu")
    assert loaded.config.id2label == {0: "O", 1: "B-x", 2: "I-x"} and loaded.config.label2id["I-x"] == 2
    assert loaded.classifier.weight.shape[0] == 3
    assert {name.partition(".")[0] for name in loaded.lofi_new_tensors} <= {"classifier", "pre_classifier", "bert"}
    assert all("pooler" in name for name in loaded.lofi_new_tensors if name.startswith("bert."))
    name = next(n for n in model.state_dict() if n.endswith(("query.weight", "q_lin.weight")))
    assert torch.equal(loaded.state_dict()[name], model.state_dict()[name])


def test_a_base_without_a_head_needs_a_task_and_other_label_counts_make_a_new_classifier(saved):
    folder = saved("bert", head="AutoModel")[0]
    with pytest.raises(ModelError, match="says it is a BertModel, which has no task head; say what for"):
        load_model(folder)
    head = ["classifier.bias", "classifier.weight"]
    assert load_model(folder, task="SEQ_CLS", device="cpu").lofi_new_tensors == head
    tuned = load_model(folder, task="SEQ_CLS", labels=["neg", "pos"], device="cpu")
    tuned.save_pretrained(folder)
    again = load_model(folder, device="cpu")
    assert again.lofi_new_tensors == [] and again.config.id2label == {0: "neg", 1: "pos"}
    assert load_model(folder, num_labels=4, device="cpu").lofi_new_tensors == head


def test_a_missing_body_tensor_is_no_new_head(saved):
    folder = saved("bert")[0]
    edit(folder, lambda tensors: tensors.pop("bert.encoder.layer.1.output.dense.weight"))
    with pytest.raises(ModelError, match=r"missing bert\.encoder\.layer\.1\.output\.dense\.weight"):
        load_model(folder, task="SEQ_CLS")


@pytest.mark.parametrize(
    ("family", "task", "words"),
    [
        ("bert", "CAUSAL_LM", "an encoder that reads in both directions"),
        ("t5", "CAUSAL_LM", "has no CAUSAL_LM head"),
        ("bart", "CAUSAL_LM", "whose task is SEQ_2_SEQ_LM"),
        ("llama", "SEQ_2_SEQ_LM", "has no SEQ_2_SEQ_LM head"),
        ("llama", "SEQ_CLASS", r"task 'SEQ_CLASS' is not known; did you mean SEQ_CLS\?"),
    ],
)
def test_a_task_that_the_architecture_has_not_is_refused(saved, family, task, words):
    with pytest.raises(ModelError, match=words):
        load_model(saved(family)[0], task=task)


def test_labels_that_cannot_be_are_refused(saved):
    llama, bert = saved("llama")[0], saved("bert")[0]
    with pytest.raises(ModelError, match="labels were given, but the task CAUSAL_LM has none"):
        load_model(llama, labels=["a", "b"])
    with pytest.raises(ModelError, match="num_labels is 3, but 2 labels were named"):
        load_model(bert, task="SEQ_CLS", num_labels=3, labels=["a", "b"])
    with pytest.raises(ModelError, match="empty or repeat"):
        load_model(bert, task="SEQ_CLS", labels=["a", "a"])
    with pytest.raises(ModelError, match="num_labels is 0"):
        load_model(bert, task="SEQ_CLS", num_labels=0)


def test_a_text_may_carry_several_labels_once_the_model_is_told(saved, tiny):
    model = load_model(saved("bert")[0], task="SEQ_CLS", labels=["a", "b", "c"], device="cpu")
    mark_multi_label(model)
    ids, targets = torch.tensor([[5, 6, 7], [8, 9, 3]]), torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    with torch.no_grad():
        found = model(input_ids=ids, labels=targets)
    expected = torch.nn.functional.binary_cross_entropy(found.logits.sigmoid(), targets)
    torch.testing.assert_close(found.loss, expected)
    with pytest.raises(ModelError, match="LlamaForCausalLM cannot take several labels"):
        mark_multi_label(tiny.model("llama"))


@pytest.mark.parametrize("family", ["gpt2", "opt", "t5", "bart", "qwen2", "mixtral"])
def test_every_family_can_be_loaded_as_a_classifier_with_only_its_head_new(saved, family):
    folder = saved(family)[0]
    loaded = load_model(folder, task="SEQ_CLS", num_labels=3, device="cpu")
    assert loaded.lofi_new_tensors
    assert all(name.partition(".")[0] in head_names(loaded) for name in loaded.lofi_new_tensors)


def test_what_cannot_be_is_said(saved):
    folder = saved("llama")[0]
    with pytest.raises(ModelError, match=r"quantization 'nf5' is not known; did you mean nf4\?"):
        load_model(folder, quantization="nf5")
    with pytest.raises(ModelError, match="a folder, which has no revision 'v2'"):
        load_model(folder, revision="v2")
    with pytest.raises(ModelError, match="device 'gpu' is not known"):
        load_model(folder, device="gpu")
    with pytest.raises(ModelError, match="both device 'cpu' and device_map were given"):
        load_model(folder, device="cpu", device_map="auto")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelError, match="gptq-quantized weights"):
        load_model(folder)
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llamma9"}))
    with pytest.raises(ModelError, match="architecture that this transformers does not know"):
        load_model(folder)


def test_a_tokenizer_is_loaded_or_its_absence_named(saved, lofi_tiny, tmp_path):
    tokenizer = load_tokenizer(lofi_tiny)
    assert tokenizer.decode(tokenizer("Xin chào")["input_ids"]) == "Xin chào"
    with pytest.raises(ModelError, match=r"has no tokenizer .*copy it from the base model"):
        load_tokenizer(saved("llama")[0])
    broken = tmp_path / "broken"
    shutil.copytree(lofi_tiny, broken)
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"the tokenizer in .* cannot be opened"):
        load_tokenizer(broken)


def test_the_shipped_model_loads_in_its_own_bfloat16_with_its_head_tied(lofi_tiny):
    model = load_model(lofi_tiny, device="cpu")
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
