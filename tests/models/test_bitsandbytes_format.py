"""bitsandbytes' folders, both ways: read to the last bit by memory map, damaged ones refused, written to be read."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lofi.errors import ModelError
from lofi.models.bitsandbytes_format import ORIGIN, read_checkpoint
from lofi.models.load import load_model
from lofi.quant.linear import FrozenLinear
from lofi.quant.origin import sample

bnb = pytest.importorskip("bitsandbytes")
WIDE = {"hidden_size": 64, "intermediate_size": 192}  # rows of whole blocks: on CPUs bitsandbytes misreads most others
IDS = torch.tensor([[5, 6, 7, 8, 9], [11, 12, 13, 14, 15]])
KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4_double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
    "bf16_storage": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16},
    "fp32_storage": {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": torch.float32,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def dense(tiny, tmp_path_factory):
    """A dense bf16 llama folder with rows of whole blocks."""
    folder = tmp_path_factory.mktemp("dense")
    tiny.model("llama", **WIDE).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(dense, tmp_path_factory):
    """`theirs(kind)` -> (folder that transformers and bitsandbytes wrote, the model it was written from)."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    made = {}

    def write(kind):
        if kind not in made:
            config = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.bfloat16, **KINDS[kind])
            model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
            folder = tmp_path_factory.mktemp(kind)
            model.save_pretrained(folder)
            made[kind] = folder, model
        return made[kind]

    return write


def their_weight(module):
    """What bitsandbytes makes of one of its linears."""
    if hasattr(module, "threshold") or type(module).__name__ == "Linear8bitLt":
        return module.weight.data.float() * (module.weight.SCB * (1 / 127))[:, None]
    return bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)


def frozen(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, FrozenLinear)}


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def damage(folder, target, change, *, metadata=None):
    """A copy of a folder at `target` with `change(tensors)`."""
    target.mkdir(exist_ok=True)
    tensors = tensors_of(folder)
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt", **(metadata or {})})
    (target / "config.json").write_text((folder / "config.json").read_text())
    return target


@pytest.mark.parametrize("kind", KINDS)
def test_what_bitsandbytes_wrote_is_read_to_the_last_bit(theirs, kind):
    folder, their_model = theirs(kind)
    model = load_model(folder, device="cpu")
    assert model.lofi_quantization == ("int8" if kind == "int8" else "fp4" if kind == "fp4" else "nf4")
    read = frozen(model)
    assert len(read) == 14 and not any("lm_head" in path for path in read)
    for path, module in read.items():
        expected = their_weight(their_model.get_submodule(path))
        assert torch.equal(module.dense_weight(expected.dtype), expected), path
        assert not module.weight.requires_grad and module.dense_sample is None
    assert torch.equal(model.lm_head.weight, their_model.lm_head.weight)
    with torch.no_grad():
        ours = model(IDS).logits
    their_model.train()  # their path for training: the one for inference packs the weights anew
    torch.testing.assert_close(ours, their_model(IDS).logits, atol=0.05 * float(ours.abs().max()), rtol=0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
@pytest.mark.parametrize("kind", ["nf4_double", "int8", "bf16_storage"])
def test_packed_weights_stay_in_the_mapped_file(theirs, kind):
    folder, _ = theirs(kind)
    model = load_model(folder, device="cpu")
    with open("/proc/self/maps", encoding="utf-8") as maps:
        spans = [line.split()[0].split("-") for line in maps if str(folder) in line]
    mapped = [(int(first, 16), int(last, 16)) for first, last in spans]
    for path, module in frozen(model).items():
        place = module.weight.data_ptr()
        assert any(first <= place < last for first, last in mapped), path


def test_reading_needs_no_bitsandbytes(theirs, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert load_model(theirs("nf4")[0], device="cpu").lofi_quantization == "nf4"


Q = "model.layers.1.self_attn.q_proj.weight"
STATE = f"{Q}.quant_state.bitsandbytes__nf4"


def said(**changes):
    """Change the JSON state of one weight."""

    def change(tensors):
        state = {**json.loads(bytes(tensors[STATE].tolist())), **changes}
        tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def renamed(old, new):
    def change(tensors):
        tensors[new] = tensors.pop(old)

    return change


DAMAGES = {
    "absmax": (lambda t: t.pop(f"{Q}.absmax"), "lacks absmax, the block scales"),
    "map": (lambda t: t.pop(f"{Q}.quant_map"), "lacks quant_map, the code book"),
    "nested": (lambda t: t.pop(f"{Q}.nested_absmax"), "lacks nested_absmax"),
    "nested_map": (lambda t: t.pop(f"{Q}.nested_quant_map"), "lacks nested_quant_map"),
    "state": (lambda t: t.pop(STATE), "has 0 quantization states, expected one"),
    "codes": (lambda t: t.pop(Q), "has scales but no codes"),
    "cut": (lambda t: t.update({Q: t[Q][:-1].clone()}), r"has 2,047 bytes of codes, expected 2,048 for 64 x 64"),
    "scales": (lambda t: t.update({f"{Q}.absmax": t[f"{Q}.absmax"][1:].clone()}), r"block scales as U8 \(63,\)"),
    "float_scales": (lambda t: t.update({f"{Q}.absmax": t[f"{Q}.absmax"].float()}), r"as F32 \(64,\), expected U8"),
    "type": (renamed(STATE, f"{Q}.quant_state.bitsandbytes__nf3"), "codes of the type 'nf3', expected nf4 or fp4"),
    "contradiction": (renamed(STATE, f"{Q}.quant_state.bitsandbytes__fp4"), "not of the type 'fp4'"),
    "no_json": (lambda t: t.update({STATE: torch.zeros(9, dtype=torch.uint8)}), "a quantization state that is no JSON"),
    "shape": (said(shape=[64]), r"says that its shape is \[64\]"),
    "block": (said(blocksize=0), "has the blocksize 0"),
    "dtype": (said(dtype="int3"), "was int3 before"),
    "nested_block": (said(nested_blocksize=128), "has 128 scales to a block, expected 256"),
    "offset": (said(nested_offset="x"), "has the offset x"),
}


@pytest.mark.parametrize("fault", DAMAGES)
def test_a_damaged_four_bit_folder_is_one_sentence_that_names_the_weight(theirs, tmp_path, fault):
    change, words = DAMAGES[fault]
    broken = damage(theirs("nf4_double")[0], tmp_path / fault, change)
    with pytest.raises(ModelError, match=words) as caught:
        load_model(broken, device="cpu")
    assert Q in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(Q.removesuffix("weight") + "SCB"), "lacks SCB, the row scales"),
        (lambda t: t.update({Q.removesuffix("weight") + "SCB": torch.ones(63)}), r"row scales as F32 \(63,\)"),
        (lambda t: t[Q.removesuffix("weight") + "weight_format"].fill_(2), "laid out for one GPU's tensor cores"),
        (lambda t: t.update({Q: t[Q][:-1].clone()}), r"row scales as F32 \(64,\), expected F32 \(63,\)"),
    ],
)
def test_a_damaged_int8_folder_is_one_sentence_that_names_the_weight(theirs, tmp_path, change, words):
    broken = damage(theirs("int8")[0], tmp_path / "broken", change)
    with pytest.raises(ModelError, match=words):
        load_model(broken, device="cpu")


def test_a_packed_weight_of_another_model_is_refused(theirs, tmp_path):
    def swap(tensors):
        other = Q.replace("q_proj", "k_proj")
        for key in [key for key in tensors if key.startswith(other)]:
            tensors[Q + key.removeprefix(other)] = tensors[key].clone()

    broken = damage(theirs("nf4_double")[0], tmp_path / "swapped", swap)
    with pytest.raises(ModelError, match=r"q_proj\.weight is \(32, 64\), expected \(64, 64\)"):
        load_model(broken, device="cpu")


def test_a_config_and_weights_that_contradict_each_other_are_refused(theirs, dense, tmp_path):
    nf4, int8 = theirs("nf4")[0], theirs("int8")[0]
    mixed = damage(nf4, tmp_path / "mixed", lambda tensors: None)
    (mixed / "config.json").write_text((int8 / "config.json").read_text())
    with pytest.raises(ModelError, match="says int8, but its weights are nf4"):
        load_model(mixed, device="cpu")
    claimed = damage(dense, tmp_path / "claimed", lambda tensors: None)
    (claimed / "config.json").write_text((nf4 / "config.json").read_text())
    with pytest.raises(ModelError, match="but none is packed; take quantization_config out"):
        load_model(claimed, device="cpu")


def test_kinds_are_not_mixed_in_one_folder(theirs, tmp_path):
    fp4 = tensors_of(theirs("fp4")[0])

    def mix(tensors):
        for key in [key for key in tensors if key.startswith(Q)]:
            tensors.pop(key)
        tensors.update({key: value for key, value in fp4.items() if key.startswith(Q)})

    broken = damage(theirs("nf4")[0], tmp_path / "mixed", mix)
    with pytest.raises(ModelError, match="weights of the kinds fp4 and nf4 are mixed"):
        load_model(broken, device="cpu")


def test_a_cut_shard_is_refused_before_anything_is_loaded(theirs, tmp_path):
    folder = damage(theirs("nf4")[0], tmp_path / "cut", lambda tensors: None)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ModelError, match="is cut short"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_what_lofi_writes_bitsandbytes_loads_with_the_same_weights(dense, tmp_path, kind):
    from transformers import AutoModelForCausalLM

    model = load_model(dense, quantization=kind, device="cpu")
    model.save_pretrained(tmp_path)
    their_model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(their_model.model.layers[0].mlp.up_proj).__name__ == {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[kind]
    for path, module in frozen(model).items():
        expected = their_weight(their_model.get_submodule(path))
        assert torch.equal(module.dense_weight(expected.dtype), expected), path
    with torch.no_grad():
        ours = model(IDS).logits
    their_model.train()
    torch.testing.assert_close(ours, their_model(IDS).logits, atol=0.05 * float(ours.abs().max()), rtol=0)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "fp32_storage"])
def test_a_folder_that_is_read_and_written_again_holds_the_same_bytes(theirs, tmp_path, kind):
    folder, _ = theirs(kind)
    load_model(folder, device="cpu").save_pretrained(tmp_path)
    before, after = tensors_of(folder), tensors_of(tmp_path)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        if ".quant_state." in key:
            assert json.loads(bytes(tensor.tolist())) == json.loads(bytes(after[key].tolist())), key
        else:
            assert tensor.contiguous().view(-1).view(torch.uint8).equal(after[key].view(-1).view(torch.uint8)), key
    told = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert told["quant_method"] == "bitsandbytes" and told["llm_int8_skip_modules"] == ["lm_head"]
    assert told["bnb_4bit_quant_type"] == ("fp4" if kind in ("fp4", "int8") else "nf4")


def test_shards_are_written_and_read(dense, tmp_path):
    model = load_model(dense, quantization="nf4", device="cpu")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again = load_model(tmp_path, device="cpu")
    for path, module in frozen(model).items():
        same = again.get_submodule(path)
        assert torch.equal(module.dense_weight(), same.dense_weight())
        assert module.dense_sample == same.dense_sample
    (shard,) = [file for file in tmp_path.glob("model-*.safetensors") if Q in safe_open(file, "pt").keys()]  # noqa: SIM118
    shard.unlink()
    with pytest.raises(ModelError, match="lacks 1 of"):
        load_model(tmp_path, device="cpu")


def test_samples_of_the_dense_origin_travel_in_the_metadata(dense, tmp_path):
    origin = tensors_of(dense)
    model = load_model(dense, quantization="nf4", device="cpu")
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        told = json.loads(file.metadata()[ORIGIN])
    assert told[Q] == sample(origin[Q]) and len(told) == 14
    again = load_model(tmp_path, device="cpu")
    assert {f"{path}.weight": module.dense_sample for path, module in frozen(again).items()} == told
    broken = damage(tmp_path, tmp_path / "broken", lambda tensors: None, metadata={ORIGIN: "[1"})
    with pytest.raises(ModelError, match=f"has metadata {ORIGIN} that is no JSON object"):
        load_model(broken, device="cpu")


def test_parametrized_weights_are_not_mistaken_for_packed_ones(tmp_path):
    save_file({"conv.parametrizations.weight.original0": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="none is packed"):
        read_checkpoint([tmp_path / "model.safetensors"], "here")
