"""Adding and removing adapters: what changes, and what must not."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import lofi
from adapters.models import adapted, ids, stir, toy
from lofi.adapters.config import LoraConfig
from lofi.adapters.registry import adapter_tensors, adapters_of, base_state, load_adapter_tensors, trainable_line


def test_a_fresh_adapter_changes_nothing():
    model = toy()
    before = model(ids())
    lofi.add_adapter(model, LoraConfig(r=3, lora_alpha=5))
    assert torch.equal(model(ids()), before)


def test_forward_is_the_formula_when_the_scale_is_not_one():
    model = toy()
    x = torch.randn(4, 7)
    base = model.up(x)
    lofi.add_adapter(model, LoraConfig(r=3, lora_alpha=5, target_modules=["up"]))
    stir(model)
    part = model.up.adapters["default"]
    expected = base + (5 / 3) * (x @ part.lora_A.t() @ part.lora_B.t())
    assert torch.allclose(model.up(x), expected, atol=1e-6)
    assert not torch.allclose(model.up(x), base + x @ part.lora_A.t() @ part.lora_B.t(), atol=1e-3)


def test_rslora_divides_alpha_by_the_root_of_the_rank():
    model = toy()
    report = lofi.add_adapter(model, LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["up"]))
    assert report.matched[0].scale == 3.0


def test_names_keys_and_bits_of_the_base_survive_attaching_and_unloading():
    model = toy()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    lofi.add_adapter(model, LoraConfig(bias="all", r=3))
    stir(model)
    assert set(before) <= set(model.state_dict())
    assert {k: v.shape for k, v in base_state(model).items()} == {k: v.shape for k, v in before.items()}
    lofi.unload(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert [type(m) for m in model.modules()] == classes
    assert all(p.requires_grad for p in model.parameters())
    assert "lofi_registry" not in model.__dict__


def test_only_adapter_tensors_train_and_a_step_leaves_the_base_alone():
    model = adapted()
    before = {k: v.clone() for k, v in base_state(model).items()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(trainable) == len(adapter_tensors(model))
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    model(ids()).square().sum().backward()
    old = {k: v.clone() for k, v in adapter_tensors(model).items()}
    optimizer.step()
    assert all(torch.equal(base_state(model)[k], before[k]) for k in before)
    assert all(not torch.equal(v, old[k]) for k, v in adapter_tensors(model).items())


def test_adapters_are_float32_masters_over_a_bf16_base():
    model = toy(dtype=torch.bfloat16)
    lofi.add_adapter(model, LoraConfig(r=3, target_modules=["up", "embed"], bias="all", modules_to_save=["head"]))
    assert {t.dtype for t in adapter_tensors(model).values()} == {torch.float32}
    assert model(ids()).dtype == torch.bfloat16
    model(ids()).float().sum().backward()


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_bias_trains_copies_of_exactly_the_biases_asked_for(bias):
    model = toy()
    lofi.add_adapter(model, LoraConfig(r=3, target_modules=["up"], bias=bias))
    biases = [k for k in adapter_tensors(model) if k.endswith("bias")]
    expected = {"none": [], "lora_only": ["up.bias"], "all": ["down.bias", "head.bias", "norm.bias", "up.bias"]}
    assert biases == expected[bias]


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_act_and_the_frozen_ones_stay(bias):
    model = adapted(LoraConfig(r=3, target_modules=["up"], bias=bias))
    base = {k: v.clone() for k, v in base_state(model).items()}
    plain = toy()
    with torch.no_grad():
        for key, tensor in adapter_tensors(model).items():
            if key.endswith("bias"):
                plain.get_parameter(key).copy_(tensor)
        part = model.up.adapters["default"]
        plain.up.weight.add_(part.delta_weight())
    assert torch.allclose(model(ids()), plain(ids()), atol=1e-5)
    assert torch.equal(model.up.bias, base["up.bias"])


def test_modules_to_save_train_as_copies_and_the_original_keeps_its_bits():
    model = adapted(LoraConfig(r=3, target_modules=["up"], modules_to_save=["head"]))
    assert "head.copy.weight" in adapter_tensors(model)
    plain = toy()
    assert torch.equal(model.head.weight, plain.head.weight)
    with lofi.adapters_off(model):
        assert torch.equal(model(ids()), plain(ids()))
    assert not torch.allclose(model(ids()), plain(ids()), atol=1e-3)


def test_all_linear_leaves_a_module_to_save_out_of_the_low_rank_targets():
    report = lofi.add_adapter(toy(), LoraConfig(r=3, modules_to_save=["head"]))
    assert {m.path: m.kind for m in report.matched}["head"] == "copy"


def test_ranks_and_alphas_by_pattern_reach_their_modules():
    config = LoraConfig(r=3, lora_alpha=5, rank_pattern={"up": 2}, alpha_pattern={"d.wn": 7})
    report = lofi.add_adapter(toy(), config)
    found = {m.path: (m.r, m.scale) for m in report.matched}
    assert found == {"up": (2, 5 / 2), "down": (3, 7 / 3), "head": (3, 5 / 3)}


def test_token_rows_train_only_themselves():
    model = adapted(LoraConfig(r=3, target_modules=["up"], trainable_token_indices={"embed": [2, 9]}))
    plain = toy()
    rows = model.embed(torch.arange(11))
    changed = (rows != plain.embed.weight).any(1).nonzero().flatten().tolist()
    assert changed == [2, 9]
    model(torch.arange(11)).sum().backward()
    assert model.embed.weight.grad is None
    assert model.embed.adapters["default"].rows.grad.abs().sum() > 0


def test_deepcopy_and_pickle_keep_the_adapter_and_stand_alone():
    model = adapted(LoraConfig(r=3, target_modules=["up", "embed"], modules_to_save=["norm"], bias="all"))
    expected = model(ids())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids()), expected)
        lofi.set_adapter(other, None)
        assert torch.equal(model(ids()), expected)
        assert torch.equal(other(ids()), toy()(ids()))


def test_a_compiled_model_gives_the_same_numbers():
    model = adapted()
    expected = model(ids())
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(compiled(ids()), expected, atol=1e-6)
    lofi.set_adapter(model, None)
    assert torch.allclose(compiled(ids()), toy()(ids()), atol=1e-6)


def test_tensors_load_strictly_and_every_fault_is_named():
    model, other = adapted(LoraConfig(r=3, target_modules=["up"])), adapted(LoraConfig(r=2, target_modules=["up"]))
    tensors = dict(adapter_tensors(other))
    tensors["ghost.lora_A"] = tensors.pop("up.lora_B")
    with pytest.raises(lofi.AdapterFileError) as error:
        load_adapter_tensors(model, "default", tensors)
    for word in ("missing up.lora_B", "unexpected ghost.lora_A", "up.lora_A has shape (2, 7), expected (3, 7)"):
        assert word in str(error.value)


def test_printed_counts_are_peft_s(capsys):
    model = toy()
    lofi.add_adapter(model, LoraConfig(r=3, target_modules=["up"]))
    total = sum(p.numel() for p in model.parameters())
    assert trainable_line(model) == f"trainable params: 60 || all params: {total} || trainable%: {100 * 60 / total}"
    lofi.print_trainable_parameters(model)
    assert "trainable params: 60" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["", "a.b", "keys", "training"])
def test_names_that_torch_could_not_hold_are_refused(name):
    with pytest.raises(lofi.TargetError, match="not usable"):
        lofi.add_adapter(toy(), LoraConfig(r=3), name)


def test_a_failed_attach_leaves_the_model_as_it_was():
    model = toy()
    with pytest.raises(lofi.TargetError):
        lofi.add_adapter(model, LoraConfig(r=3, target_modules=["up", "nothing"]))
    assert adapters_of(model) == {}
    assert all(p.requires_grad for p in model.parameters())
    assert type(model.up) is nn.Linear


def test_a_name_is_taken_once():
    model = adapted()
    with pytest.raises(lofi.TargetError, match="already has an adapter 'default'"):
        lofi.add_adapter(model, LoraConfig(r=3))


def test_works_on_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(512, 64, bias=False))
    report = lofi.add_adapter(model, LoraConfig(r=8))
    assert report.trainable == 4608
    assert report.total == 4608 + 32768
