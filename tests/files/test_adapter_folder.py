"""Adapter folders: saved with proof, loaded strictly, and the model as it was when anything is wrong."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lofi
from files.families import adapted, family_model, logits, stir
from lofi.adapters.merge import merge_in_memory
from lofi.adapters.registry import adapter_tensors, adapters_of, base_state
from lofi.adapters.switch import active_adapters
from lofi.errors import AdapterFileError, LofiError, LofiWarning, ProofError, TargetError
from lofi.files.adapter_folder import load_adapter, read_folder, save_adapter
from quantized_models import quantized

Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


@pytest.fixture
def saved(tmp_path) -> Path:
    return save_adapter(adapted("llama", target_modules=["q_proj", "down_proj"]), tmp_path / "a")


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors = {k: v.clone() for k, v in tensors.items()}
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def edit_json(folder: Path, file: str, **changes) -> None:
    record = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**record, **changes}))


def assert_untouched(model) -> None:
    fresh = family_model("llama")
    assert adapters_of(model) == {} and type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("gpt2", {"bias": "all"}),
        ("llama_tied", {"target_modules": ["embed_tokens", "q_proj"]}),
        ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
        ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [9, 2]}),
        ("bert", {"target_modules": ["query"], "modules_to_save": ["pooler"], "use_rslora": True}),
    ],
)
def test_what_is_saved_comes_back_bit_for_bit(family, config, tmp_path):
    model = adapted(family, **config)
    save_adapter(model, tmp_path / "a")
    back = family_model(family)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LofiWarning)
        load_adapter(back, tmp_path / "a")
    one, two = adapter_tensors(model), adapter_tensors(back)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert torch.equal(logits(model), logits(back))
    assert active_adapters(back) == ("default",)


def test_the_record_says_what_the_adapter_belongs_to(saved):
    record = json.loads((saved / "lofi.json").read_text())
    assert record["format"] == 1 and record["lofi"] == lofi.__version__ and len(record["code"]) == 64
    assert record["scale"]["model.layers.1.mlp.down_proj"] == pytest.approx(7 / 3)
    assert record["base"]["architecture"]["model_type"] == "llama"
    assert sorted(p.name for p in saved.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "lofi.json",
    ]


def test_what_the_caller_knows_is_kept_in_the_record(tmp_path):
    save_adapter(adapted("llama"), tmp_path / "a", record={"labels": ["a", "ệ"], "tokenizer": "abc"})
    assert read_folder(tmp_path / "a").record["labels"] == ["a", "ệ"]


def test_a_second_adapter_does_not_take_over(saved):
    model = adapted("llama", "first")
    load_adapter(model, saved, "second")
    assert active_adapters(model) == ("first",) and list(adapters_of(model)) == ["first", "second"]


def test_loading_does_not_move_the_callers_random_generator(saved):
    model = family_model("llama")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    load_adapter(model, saved)
    assert torch.equal(torch.rand(4), expected)


def test_dropout_is_off_after_loading_even_on_a_training_model(tmp_path):
    save_adapter(adapted("llama", lora_dropout=0.5), tmp_path / "a")
    model = family_model("llama").train()
    load_adapter(model, tmp_path / "a")
    assert torch.equal(logits(model), logits(model)) and model.training
    model.train()
    assert not torch.equal(logits(model), logits(model))


# ---- saving refuses


def test_a_fresh_adapter_is_refused_because_it_changes_nothing(tmp_path):
    model = family_model("llama")
    lofi.add_adapter(model, lofi.LoraConfig(r=3))
    with pytest.raises(ProofError, match="changes nothing: B A is zero in all 14 adapted modules"):
        save_adapter(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_one_dead_b_is_a_warning_that_names_it(tmp_path):
    model = adapted("llama")
    adapter_tensors(model)["model.layers.1.mlp.up_proj.lora_B"].data.zero_()
    with pytest.warns(LofiWarning, match=r"changes nothing at model\.layers\.1\.mlp\.up_proj, where"):
        save_adapter(model, tmp_path / "a")
    with pytest.warns(LofiWarning, match=r"up_proj"):
        load_adapter(family_model("llama"), tmp_path / "a")


def test_heads_and_biases_may_stay_as_they_were(tmp_path):
    model = family_model("bert")
    lofi.add_adapter(model, lofi.LoraConfig(r=3, target_modules=["query"], bias="all"))
    for key, tensor in adapter_tensors(model).items():
        if key.endswith("lora_B"):
            torch.nn.init.normal_(tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LofiWarning)
        save_adapter(model, tmp_path / "a")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_non_finite_adapter_is_not_written_and_the_old_one_stays(saved, value):
    before = (saved / "adapter_model.safetensors").read_bytes()
    model = adapted("llama", target_modules=["q_proj", "down_proj"])
    adapter_tensors(model)["model.layers.1.mlp.down_proj.lora_A"].data[1, 2] = value
    with pytest.raises(AdapterFileError, match=r"NaN or infinity in model\.layers\.1\.mlp\.down_proj\.lora_A;"):
        save_adapter(model, saved)
    assert (saved / "adapter_model.safetensors").read_bytes() == before


def test_a_disk_that_changes_bytes_is_noticed_before_the_old_folder_goes(saved, monkeypatch):
    from lofi.files import adapter_folder

    before = (saved / "adapter_model.safetensors").read_bytes()

    def flipped(path, tensors, **more):
        save_file({k: -v if k == Q else v for k, v in tensors.items()}, path)

    monkeypatch.setattr(adapter_folder, "save_safetensors", flipped)
    with pytest.raises(ProofError, match=r"q_proj\.lora_A\.weight does not read back"):
        save_adapter(adapted("llama", target_modules=["q_proj", "down_proj"]), saved)
    assert (saved / "adapter_model.safetensors").read_bytes() == before


def test_a_folder_that_holds_something_else_is_not_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("mine")
    with pytest.raises(LofiError, match=r"holds thesis\.tex, which is no part of an adapter folder"):
        save_adapter(adapted("llama"), tmp_path / "home")
    assert (tmp_path / "home" / "thesis.tex").read_text() == "mine"


def test_an_unknown_adapter_name_is_refused(tmp_path):
    with pytest.raises(TargetError, match="no adapter 'defualt'"):
        save_adapter(adapted("llama"), tmp_path / "a", "defualt")


SAVER = """
import sys, warnings
warnings.simplefilter("ignore")
from files.families import adapted, stir
from lofi.files.adapter_folder import save_adapter
model = adapted("llama")
print("ready", flush=True)
while True:
    stir(model)
    save_adapter(model, sys.argv[1])
"""


def test_killed_while_saving_the_adapter_stays_readable(tmp_path):
    folder = save_adapter(adapted("llama"), tmp_path / "a")
    draw = random.Random(1)
    for _ in range(2):
        saver = subprocess.Popen([sys.executable, "-c", SAVER, str(folder)], stdout=subprocess.PIPE, env=env())
        assert saver.stdout is not None and saver.stdout.readline() == b"ready\n"
        time.sleep(0.1 + draw.random() * 0.2)
        saver.send_signal(signal.SIGKILL)
        saver.wait()
        load_adapter(family_model("llama"), folder)
    assert not torch.equal(read_folder(folder).tensors[Q], adapter_tensors(adapted("llama"))[
        "model.layers.0.self_attn.q_proj.lora_A"
    ])  # it did save in between


FULL = """
import resource, sys
from files.families import adapted
from lofi.errors import LofiError
from lofi.files.adapter_folder import save_adapter
model = adapted("llama")
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
try:
    save_adapter(model, sys.argv[1])
except LofiError as error:
    print(error)
"""


def test_a_full_disk_is_one_sentence_and_the_old_adapter_stays(saved):
    before = (saved / "adapter_model.safetensors").read_bytes()
    said = subprocess.run([sys.executable, "-c", FULL, str(saved)], capture_output=True, text=True, env=env())
    assert said.stdout.startswith("the disk is full: ") and said.stdout.count("\n") == 1, said.stderr
    assert (saved / "adapter_model.safetensors").read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["a"]


def env() -> dict[str, str]:
    tests = Path(__file__).resolve().parents[1]
    return {**os.environ, "PYTHONPATH": f"{tests}:{tests.parent / 'src'}", "OMP_NUM_THREADS": "1"}


# ---- loading refuses, and leaves the model as it was


def test_a_missing_tensor_is_named(saved):
    edit_tensors(saved, lambda t: t.pop(Q))
    model = family_model("llama")
    with pytest.raises(AdapterFileError, match=r"q_proj\.lora_A\.weight is missing"):
        load_adapter(model, saved)
    assert_untouched(model)


def test_an_extra_tensor_is_named(saved):
    edit_tensors(saved, lambda t: t.update({"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": t[Q].clone()}))
    model = family_model("llama")
    with pytest.raises(AdapterFileError, match=r"up_proj\.lora_A\.weight is unexpected"):
        load_adapter(model, saved)
    assert_untouched(model)


def test_a_misshaped_tensor_is_named_with_both_shapes(saved):
    edit_tensors(saved, lambda t: t.update({Q: t[Q][:, :-1].contiguous()}))
    model = family_model("llama")
    with pytest.raises(AdapterFileError, match=r"lora_A\.weight has shape \(3, 23\).*say \(3, 24\)"):
        load_adapter(model, saved)
    assert_untouched(model)


def test_a_rank_that_contradicts_the_file_is_named(saved):
    edit_json(saved, "adapter_config.json", r=4)
    model = family_model("llama")
    with pytest.raises(AdapterFileError, match=r"has shape \(\d+, \d+\), adapter_config\.json \(r=4\)"):
        load_adapter(model, saved)
    assert_untouched(model)


def test_a_nan_in_the_file_is_named(saved):
    edit_tensors(saved, lambda t: t[B].fill_(float("nan")))
    model = family_model("llama")
    with pytest.raises(AdapterFileError, match=r"NaN or infinity in base_model\..*q_proj\.lora_B\.weight;"):
        load_adapter(model, saved)
    assert_untouched(model)


def test_an_adapter_of_zeros_is_refused(saved):
    edit_tensors(saved, lambda t: [v.zero_() for k, v in t.items() if "lora_B" in k])
    model = family_model("llama")
    with pytest.raises(ProofError, match="changes nothing"):
        load_adapter(model, saved)
    assert_untouched(model)


def test_an_edited_scale_is_refused(saved):
    edit_json(saved, "adapter_config.json", lora_alpha=14)
    model = family_model("llama")
    with pytest.raises(AdapterFileError, match=r"says the multiplier of model\.layers.* is 2\.33.*gives 4\.66"):
        load_adapter(model, saved)
    assert_untouched(model)


@pytest.mark.parametrize("keep", [0, 7, 200, -1])
def test_a_truncated_file_is_refused(saved, keep):
    data = (saved / "adapter_model.safetensors").read_bytes()
    (saved / "adapter_model.safetensors").write_bytes(data[:keep])
    model = family_model("llama")
    with pytest.raises(AdapterFileError, match="truncated"):
        load_adapter(model, saved)
    assert_untouched(model)


def test_another_base_is_refused_with_its_reasons_unless_told_otherwise(saved):
    model = family_model("llama", seed=1)
    with pytest.raises(ProofError, match=r"another base \(no path\): same shapes, other weights: \d+ of \d+ tensors"):
        load_adapter(model, saved)
    assert adapters_of(model) == {}
    with pytest.warns(LofiWarning, match="other weights"):
        load_adapter(model, saved, check_base=False)
    assert "default" in adapters_of(model)


def test_a_base_of_other_size_is_told_by_its_numbers(saved):
    with pytest.raises(ProofError, match="hidden_size 48 against 24"):
        load_adapter(family_model("llama", hidden_size=48), saved)


def test_a_base_in_another_dtype_is_the_same_base(saved):
    model = family_model("llama", dtype=torch.bfloat16)
    load_adapter(model, saved)
    assert all(t.dtype == torch.float32 for t in adapter_tensors(model).values())


def test_a_merged_model_is_another_base(saved):
    merged = merge_in_memory(adapted("llama", target_modules=["q_proj", "down_proj"]))
    with pytest.raises(ProofError, match="other weights: 4 of"):
        load_adapter(merged, saved)


def test_a_missing_folder_and_one_of_another_kind_are_one_sentence(tmp_path):
    with pytest.raises(AdapterFileError, match="nowhere does not exist"):
        load_adapter(family_model("llama"), tmp_path / "nowhere")
    with pytest.raises(AdapterFileError, match="is not an adapter folder"):
        load_adapter(family_model("llama"), tmp_path)


def test_a_folder_without_its_tensors_is_named(saved):
    (saved / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterFileError, match=r"adapter_model\.safetensors does not exist"):
        load_adapter(family_model("llama"), saved)


def test_a_pickle_is_not_opened(saved):
    (saved / "adapter_model.safetensors").rename(saved / "adapter_model.bin")
    with pytest.raises(AdapterFileError, match="is a pickle"):
        load_adapter(family_model("llama"), saved)


@pytest.mark.parametrize("file", ["adapter_config.json", "lofi.json"])
@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_broken_json_is_named(saved, file, text):
    (saved / file).write_text(text)
    with pytest.raises(AdapterFileError, match=file.replace(".", r"\.")):
        load_adapter(family_model("llama"), saved)


def test_an_unknown_key_in_use_is_refused_and_one_not_in_use_is_noted(saved):
    edit_json(saved, "adapter_config.json", from_the_future=None)
    assert "from_the_future" in read_folder(saved).notes[0]
    edit_json(saved, "adapter_config.json", from_the_future=3)
    with pytest.raises(AdapterFileError, match=r"from_the_future is 3 \(lofi does not know it\)"):
        read_folder(saved)


@pytest.mark.parametrize(("key", "value"), [("r", 0), ("lora_alpha", -1), ("bias", "some"), ("lora_dropout", 1.5)])
def test_an_impossible_value_in_the_config_is_named(saved, key, value):
    edit_json(saved, "adapter_config.json", **{key: value})
    with pytest.raises(AdapterFileError, match=key):
        read_folder(saved)


def test_another_kind_of_adapter_is_refused(saved):
    edit_json(saved, "adapter_config.json", peft_type="IA3")
    with pytest.raises(AdapterFileError, match="peft_type is 'IA3', expected one of LORA, LOFI_HOULSBY"):
        read_folder(saved)


def test_a_record_of_a_later_format_is_refused(saved):
    edit_json(saved, "lofi.json", format=2)
    with pytest.raises(AdapterFileError, match="has format 2, this lofi reads 1"):
        read_folder(saved)


def test_a_record_whose_fingerprint_was_cut_is_named(saved):
    edit_json(saved, "lofi.json", base={"path": "x"})
    with pytest.raises(AdapterFileError, match=r"lofi\.json holds no usable base fingerprint"):
        read_folder(saved)


def test_a_name_that_is_taken_is_refused_and_the_first_stays(saved):
    model = family_model("llama")
    load_adapter(model, saved)
    before = logits(model)
    with pytest.raises(TargetError, match="already has an adapter"):
        load_adapter(model, saved)
    assert torch.equal(logits(model), before)


def test_a_failed_load_beside_another_adapter_leaves_that_one_active(saved):
    model = adapted("llama", "first")
    before = logits(model)
    edit_tensors(saved, lambda t: t.pop(Q))
    with pytest.raises(AdapterFileError):
        load_adapter(model, saved, "second")
    assert list(adapters_of(model)) == ["first"] and torch.equal(logits(model), before)


def test_the_old_folder_is_read_where_a_writer_died_between_two_renames(saved):
    saved.rename(saved.with_name(".a.lofi-old-0badcafe"))
    load_adapter(family_model("llama"), saved)


def test_unloading_gives_the_base_back_bit_for_bit(saved):
    model = family_model("llama")
    before = {k: v.clone() for k, v in base_state(model).items()}
    load_adapter(model, saved)
    stir(model)
    lofi.unload(model)
    assert_untouched(model)
    assert all(torch.equal(before[k], v) for k, v in base_state(model).items())


def test_a_copied_folder_loads_anywhere(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "elsewhere" / "b")
    load_adapter(family_model("llama"), tmp_path / "elsewhere" / "b")


@pytest.mark.parametrize(("trained_on", "loaded_on"), [("nf4", None), (None, "nf4"), ("int8", "nf4"), ("nf4", "int8")])
def test_an_adapter_moves_between_the_quantizations_of_its_base_with_one_warning(trained_on, loaded_on, tmp_path):
    def base(kind, seed=0):
        model = family_model("llama", seed=seed)
        return quantized(model, kind) if kind else model

    model = base(trained_on)
    lofi.add_adapter(model, lofi.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"]))
    stir(model)
    save_adapter(model, tmp_path / "a")
    assert read_folder(tmp_path / "a").record["base"]["quantization"] == trained_on
    other = base(loaded_on)
    with pytest.warns(LofiWarning) as told:
        load_adapter(other, tmp_path / "a", check_base=True)
    words = {None: "a dense base", "nf4": "an nf4 base", "int8": "an int8 base"}
    assert len(told) == 1
    assert f"was trained on {words[trained_on]} and is loaded on {words[loaded_on]}" in str(told[0].message)
    assert all(torch.equal(a, b) for a, b in zip(*(adapter_tensors(m).values() for m in (model, other)), strict=True))
    with pytest.raises(ProofError, match="same shapes, other weights"):
        load_adapter(base(loaded_on, seed=1), tmp_path / "a")


def test_an_adapter_on_its_own_quantization_comes_back_without_a_word(tmp_path):
    def base():
        return quantized(family_model("llama"), "nf4")

    model = base()
    lofi.add_adapter(model, lofi.LoraConfig(r=3, lora_alpha=7))
    stir(model)
    save_adapter(model, tmp_path / "a")
    back = base()
    with warnings.catch_warnings():
        warnings.simplefilter("error", LofiWarning)
        load_adapter(back, tmp_path / "a")
    assert torch.equal(logits(model), logits(back))
