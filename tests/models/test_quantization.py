"""Asking for a quantized base and loading it: what is packed, what stays dense, how it trains, what is refused."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lofi
from lofi.errors import ModelError, RecipeError
from lofi.models.counting import count_adapter, parameter_count
from lofi.models.facts import linear_counts, tied_groups
from lofi.models.load import load_model
from lofi.quant.config import Int8Options, NF4Options
from lofi.quant.kernels.dispatch import kernels_for
from lofi.quant.linear import FrozenLinear, Int8Linear, NF4Linear
from lofi.quant.origin import sample

IDS = torch.tensor([[5, 6, 7, 8, 2], [11, 12, 13, 14, 2]])


@pytest.fixture
def saved(tiny, tmp_path):
    """`saved("llama")` writes a random bf16 model folder and returns (folder, model)."""

    def write(family, dtype=torch.bfloat16, **options):
        model = tiny.model(family, **options).to(dtype)
        folder = tmp_path / family
        model.save_pretrained(folder)
        return folder, model

    return write


def frozen(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, FrozenLinear)}


def logits(model):
    inputs = {"input_ids": IDS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS
    with torch.no_grad():
        return model(**inputs).logits.float()


def off(a, b):
    """Relative distance of two logits."""
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen3", "gemma3", "gpt2", "opt", "bloom", "t5", "bart"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_every_linear_but_heads_is_packed_and_comes_back_to_the_last_bit(saved, tmp_path, family, kind):
    folder, dense = saved(family)
    model = load_model(folder, quantization=kind, device="cpu")
    packed = frozen(model)
    assert model.lofi_quantization == kind and packed and model.lofi_new_tensors == []
    assert type(model.get_output_embeddings()) is nn.Linear
    rest = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert {path.rpartition(".")[2] for path in rest} <= {"lm_head", "wo"}  # T5 keeps wo, for which fp16 is too narrow
    assert 0 < off(logits(model), logits(dense)) < {"nf4": 0.3, "int8": 0.04}[kind]
    model.save_pretrained(tmp_path / "packed")
    again = load_model(tmp_path / "packed", device="cpu")
    assert again.lofi_quantization == kind and torch.equal(logits(again), logits(model))
    for path, module in packed.items():
        assert torch.equal(module.dense_weight(), again.get_submodule(path).dense_weight()), path


def test_gpt2s_transposed_weights_are_packed_the_usual_way_round(saved):
    folder, dense = saved("gpt2")
    layer = load_model(folder, quantization="nf4", device="cpu").transformer.h[1].mlp.c_fc
    weight = dense.transformer.h[1].mlp.c_fc.weight.t()
    expected = NF4Linear(24, 96, options=NF4Options(), bias=False).quantize_(weight)
    assert layer.logical_shape == (96, 24) and torch.equal(layer.weight, expected.weight)
    assert layer.dense_sample == sample(weight) and torch.equal(layer.bias, dense.transformer.h[1].mlp.c_fc.bias)


def test_from_pretrained_takes_lofis_config(saved):
    from transformers import AutoModelForCausalLM

    folder, _ = saved("llama")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=lofi.NF4Config(double_quant=False))
    packed = frozen(model)
    assert len(packed) == 14 and not any(module.double_quant for module in packed.values())
    assert model.lofi_quantization == "nf4" and model.is_quantized
    assert not hasattr(model, "is_loaded_in_4bit") and not hasattr(model, "is_loaded_in_8bit")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=lofi.Int8Config(threshold=2.5))
    assert {module.threshold for module in frozen(model).values()} == {2.5}


@pytest.mark.parametrize(
    ("given", "layer"),
    [(NF4Options(), NF4Linear), (Int8Options(), Int8Linear), ("nf4", NF4Linear), ("int8", Int8Linear)],
)
def test_words_and_plain_options_stand_for_configs(saved, given, layer):
    model = load_model(saved("llama")[0], quantization=given, device="cpu")
    assert {type(module) for module in frozen(model).values()} == {layer}


def test_the_dtype_given_is_computed_in_and_held_by_the_rest(saved):
    folder, _ = saved("llama", dtype=torch.float32)
    auto = load_model(folder, quantization="nf4", device="cpu")
    assert auto.dtype == torch.float32 and {m.compute_dtype for m in frozen(auto).values()} == {torch.bfloat16}
    asked = load_model(folder, quantization="nf4", dtype="fp16", device="cpu")
    assert asked.dtype == torch.float16 and {m.compute_dtype for m in frozen(asked).values()} == {torch.float16}
    wide = load_model(folder, quantization=lofi.NF4Config(compute_dtype="float32"), device="cpu")
    assert {m.compute_dtype for m in frozen(wide).values()} == {torch.float32}
    with pytest.raises(ModelError, match="dtype float64 was asked for over quantized weights"):
        load_model(folder, quantization="nf4", dtype=torch.float64)


def test_the_dtype_given_is_computed_in_over_a_packed_folder(saved, tmp_path):
    load_model(saved("llama")[0], quantization="nf4", device="cpu").save_pretrained(tmp_path / "packed")
    auto = load_model(tmp_path / "packed", device="cpu")
    assert auto.dtype == torch.bfloat16 and {m.compute_dtype for m in frozen(auto).values()} == {torch.bfloat16}
    wide = load_model(tmp_path / "packed", dtype="fp32", device="cpu")
    assert wide.dtype == torch.float32 and {m.compute_dtype for m in frozen(wide).values()} == {torch.float32}
    assert wide.model.norm.weight.dtype == wide.model.embed_tokens.weight.dtype == torch.float32
    for path, module in frozen(auto).items():
        assert torch.equal(module.absmax, wide.get_submodule(path).absmax)


def test_modules_can_be_kept_dense_and_are_so_after_saving(saved, tmp_path):
    folder, _ = saved("llama")
    config = lofi.NF4Config(skip_modules=["down_proj", "model.layers.0.self_attn.q_proj"])
    model = load_model(folder, quantization=config, device="cpu")
    dense = ["model.layers.0.self_attn.q_proj", *(f"model.layers.{i}.mlp.down_proj" for i in (0, 1)), "lm_head"]
    assert sorted(p for p, m in model.named_modules() if type(m) is nn.Linear) == sorted(dense)
    model.save_pretrained(tmp_path / "packed")
    told = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert sorted(told["llm_int8_skip_modules"]) == sorted(dense)
    assert frozen(load_model(tmp_path / "packed", device="cpu")).keys() == frozen(model).keys()
    with pytest.raises(ModelError, match=r"skip_modules names 'up_porj', which no linear.*did you mean up_proj\?"):
        load_model(folder, quantization=lofi.NF4Config(skip_modules=["up_porj"]))


@pytest.mark.parametrize(
    ("family", "head"), [("bert", "classifier"), ("llama", "score"), ("bart", "classification_head")]
)
def test_a_new_classification_head_is_dense_and_its_folder_loads_again(saved, tmp_path, family, head):
    folder, _ = saved(family)
    model = load_model(folder, quantization="nf4", task="SEQ_CLS", num_labels=3, device="cpu")
    assert model.lofi_new_tensors and not any(head in path or "pooler" in path for path in frozen(model))
    assert all(name.startswith(head) or "pooler" in name for name in model.lofi_new_tensors)
    model.save_pretrained(tmp_path / "packed")
    again = load_model(tmp_path / "packed", device="cpu")
    assert again.lofi_new_tensors == [] and torch.equal(logits(again), logits(model))


def test_a_packed_language_model_becomes_a_classifier(saved, tmp_path):
    load_model(saved("llama")[0], quantization="nf4", device="cpu").save_pretrained(tmp_path / "packed")
    model = load_model(tmp_path / "packed", task="SEQ_CLS", num_labels=3, device="cpu")
    assert model.lofi_new_tensors == ["score.weight"] and len(frozen(model)) == 14
    assert type(model.score) is nn.Linear and bool(model.score.weight.any())


def test_a_packed_backbone_loads_into_a_model_with_a_head(saved, tmp_path):
    from transformers import AutoModel

    folder, _ = saved("bert")
    AutoModel.from_pretrained(folder, quantization_config=lofi.NF4Config()).save_pretrained(tmp_path / "packed")
    model = load_model(tmp_path / "packed", task="TOKEN_CLS", num_labels=3, device="cpu")
    assert len(frozen(model)) == 12 and model.lofi_new_tensors == ["classifier.bias", "classifier.weight"]


def test_a_model_with_no_linear_layer_to_quantize_is_refused(saved):
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    with pytest.raises(ModelError, match="LlamaForCausalLM has no linear layer to quantize beside its heads"):
        load_model(saved("llama")[0], quantization=lofi.NF4Config(skip_modules=names))


def test_what_cannot_be_asked_for_is_one_sentence(saved, tmp_path):
    folder, _ = saved("llama")
    with pytest.raises(ModelError, match=r"quantization 'int4' is not known; did you mean int8\?"):
        load_model(folder, quantization="int4")
    with pytest.raises(ModelError, match="quantization 'fp4' is only read"):
        load_model(folder, quantization="fp4")
    with pytest.raises(RecipeError, match=r"threshold is -1\.0"):
        lofi.Int8Config(threshold=-1.0)
    load_model(folder, quantization="nf4", device="cpu").save_pretrained(tmp_path / "packed")
    assert load_model(tmp_path / "packed", quantization="nf4", device="cpu").lofi_quantization == "nf4"
    with pytest.raises(
        ModelError, match=r"int8 was asked for, but .* holds nf4 weights already; leave quantization out"
    ):
        load_model(tmp_path / "packed", quantization="int8")


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "lofi_nf5"])
def test_another_librarys_folder_is_refused(saved, method):
    folder, _ = saved("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": method, "bits": 4}})
    )
    for asked in (None, "nf4"):
        with pytest.raises(ModelError, match=f"holds {method}-quantized weights, but lofi reads dense weights"):
            load_model(folder, quantization=asked)


def test_a_dense_weight_of_another_shape_or_with_nan_is_refused(saved):
    folder, _ = saved("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: tensors[name][:-1].clone()}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj\.weight is \(43, 24\), expected \(44, 24\)"):
        load_model(folder, quantization="nf4")
    tensors[name][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for kind in ("nf4", "int8"):
        with pytest.raises(ModelError, match=r"up_proj\.weight has entries that are not finite"):
            load_model(folder, quantization=kind)


def test_a_missing_weight_is_named_as_in_a_dense_model(saved):
    folder, _ = saved("llama")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"missing model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(folder, quantization="nf4")


def test_norms_can_be_held_in_float32_and_hand_on_the_models_dtype(saved):
    folder, _ = saved("llama")
    plain = load_model(folder, quantization="nf4", device="cpu")
    model = load_model(folder, quantization=lofi.NF4Config(norms_in_float32=True), device="cpu")
    norms = [m for m in model.modules() if type(m).__name__ == "LlamaRMSNorm"]
    assert len(norms) == 5 and {m.weight.dtype for m in norms} == {torch.float32}
    assert model.dtype == torch.bfloat16
    seen = []
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0].dtype))
    assert 0 <= off(logits(model), logits(plain)) < 0.02 and seen == [torch.bfloat16]
    wide = load_model(saved("gpt2")[0], quantization=lofi.Int8Config(norms_in_float32=True), device="cpu")
    assert wide.transformer.ln_f.weight.dtype == torch.float32 and logits(wide).isfinite().all()


def test_counts_are_logical(saved, tiny):
    folder, dense = saved("llama_tied")
    model = load_model(folder, quantization="nf4", device="cpu")
    assert parameter_count(model) == parameter_count(dense)
    assert tied_groups(model) == tied_groups(dense) != []
    counts = linear_counts(model)
    assert counts["k_proj", "12 x 24 NF4Linear"] == 2 and counts["lm_head", "97 x 24 Linear"] == 1
    expected = count_adapter(tiny.config("llama_tied"), lofi.LoraConfig(r=3))
    assert count_adapter(model.config, lofi.LoraConfig(r=3)) == expected
    lofi.add_adapter(model, lofi.LoraConfig(r=3))
    from lofi.adapters.registry import trainable_counts

    assert trainable_counts(model) == (expected.trainable, expected.all)


def test_casting_moving_and_copying_leave_the_codes_alone(saved):
    model = load_model(saved("llama")[0], quantization="nf4", device="cpu")
    before = {path: module.dense_weight() for path, module in frozen(model).items()}
    twin = copy.deepcopy(model)
    model.to(torch.float32)
    for other in (model, twin):
        for path, weight in before.items():
            assert torch.equal(other.get_submodule(path).dense_weight(), weight)
    assert model.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_trainer_trains_an_adapter_over_it_and_saving_it_keeps_the_base(saved, tmp_path, kind):
    from transformers import Trainer, TrainingArguments

    model = load_model(saved("llama")[0], quantization=kind, device="cpu")
    codes = {path: module.weight.clone() for path, module in frozen(model).items()}
    lofi.add_adapter(model, lofi.LoraConfig(r=3, lora_alpha=7))
    args = TrainingArguments(
        tmp_path / "run", max_steps=3, learning_rate=0.02, use_cpu=True, report_to=[], save_strategy="no"
    )
    data = [{"input_ids": row, "labels": row} for row in IDS]
    Trainer(model=model, args=args, train_dataset=data).train()
    factors = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert factors and all(bool(p.any()) for p in factors)
    assert all(torch.equal(module.weight, codes[path]) for path, module in frozen(model).items())


def test_a_model_whose_adapter_was_merged_saves_what_is_dense_now_as_dense(saved, tmp_path):
    model = load_model(saved("llama")[0], quantization="nf4", device="cpu")
    lofi.add_adapter(model, lofi.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    merged = lofi.merge_and_unload(model)
    merged.save_pretrained(tmp_path / "merged")
    again = load_model(tmp_path / "merged", device="cpu")
    assert torch.equal(logits(again), logits(merged)) and len(frozen(again)) == 12
    lofi.add_adapter(model, lofi.LoraConfig(r=3, init_lora_weights=False), name="all")
    whole = lofi.merge_and_unload(model, name="all")
    whole.save_pretrained(tmp_path / "whole")
    assert "quantization_config" not in json.loads((tmp_path / "whole" / "config.json").read_text())
    assert load_model(tmp_path / "whole", device="cpu").lofi_quantization is None


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_stacked_experts_are_packed_and_their_folder_does_not_call_itself_bitsandbytes(saved, tmp_path, kind):
    from transformers import AutoModelForCausalLM

    folder, dense = saved("mixtral")
    model = load_model(folder, quantization=kind, device="cpu")
    experts = model.model.layers[1].mlp.experts
    assert experts.packed_shapes == {"gate_up_proj": (3, 80, 24), "down_proj": (3, 24, 40)}
    assert 0 < off(logits(model), logits(dense)) < {"nf4": 0.3, "int8": 0.04}[kind]
    assert parameter_count(model) == parameter_count(dense)
    model.save_pretrained(tmp_path / "packed", max_shard_size="30KB")
    told = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert told["quant_method"] == f"lofi_{kind}" and "load_in_4bit" not in told and "load_in_8bit" not in told
    again = load_model(tmp_path / "packed", device="cpu")
    assert again.lofi_quantization == kind and torch.equal(logits(again), logits(model))
    assert again.model.layers[1].mlp.experts.dense_samples == experts.dense_samples != {}
    wide = load_model(tmp_path / "packed", quantization=kind, dtype="fp32", device="cpu")
    assert wide.model.layers[1].mlp.experts.compute_dtype == torch.float32
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "packed")), logits(model))


def test_experts_can_be_kept_dense_and_their_folder_is_bitsandbytes_own(saved, tmp_path):
    folder, dense = saved("mixtral")
    model = load_model(folder, quantization=lofi.NF4Config(skip_modules=["experts"]), device="cpu")
    weight = model.model.layers[1].mlp.experts.down_proj
    assert torch.equal(weight, dense.model.layers[1].mlp.experts.down_proj) and len(frozen(model)) == 8
    model.save_pretrained(tmp_path / "packed")
    told = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert told["quant_method"] == "bitsandbytes"
    assert torch.equal(logits(load_model(tmp_path / "packed", device="cpu")), logits(model))


def test_a_damaged_stack_of_experts_is_named(saved, tmp_path):
    load_model(saved("mixtral")[0], quantization="int8", device="cpu").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (scales, *_) = [name for name in tensors if name.endswith("down_proj_SCB")]
    del tensors[scales]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.0\..*experts\.down_proj lacks down_proj_SCB, the row scales"):
        load_model(tmp_path, device="cpu")


MEASURE = """
import gc, sys, threading, time
import torch
from lofi.models.load import load_model

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def growth(folder, kind):
    gc.collect()
    start, peak, done = anonymous(), [0], threading.Event()
    def watch():
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous())
    thread = threading.Thread(target=watch)
    thread.start()
    model = load_model(folder, quantization=kind, device="cpu")
    done.set()
    thread.join()
    return max(peak[0], anonymous()) - start, model.get_memory_footprint(), model

torch.set_num_threads(1)
large, small, target = sys.argv[1:]
for kind in ("nf4", "int8"):
    growth(small, kind)  # what the first load costs
    peak, size, model = growth(large, kind)
    model.save_pretrained(f"{target}/{kind}")
    del model
    print(peak, size, growth(f"{target}/{kind}", None)[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads RssAnon")
@pytest.mark.skipif(kernels_for(torch.device("cpu")).name == "plain torch", reason="of the native kernels")
def test_loading_holds_the_packed_model_and_little_more_and_a_packed_folder_next_to_nothing(tiny, tmp_path):
    wide = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8}
    tiny.model("llama", **wide).to(torch.bfloat16).save_pretrained(tmp_path / "large")
    tiny.model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "small")
    arguments = [tmp_path / "large", tmp_path / "small", tmp_path]
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    largest, slack = 512 * 1024 * 2, 3 << 20  # slack: modules, and what the allocator keeps
    dense = sum(p.numel() * 2 for p in load_model(tmp_path / "large", device="cpu").parameters())
    for line in run.stdout.splitlines():
        peak, size, mapped = map(int, line.split())
        assert size < 0.6 * dense
        assert peak <= size + 3 * largest + slack
        assert mapped <= slack
