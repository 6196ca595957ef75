"""The proof of the first steps: what should learn has moved, or the run stops and names it."""

from __future__ import annotations

import pytest
import torch

import lofi
from lofi.adapters.methods import BitFitConfig, HoulsbyConfig, LinConfig
from lofi.adapters.registry import adapter_tensors
from lofi.errors import ProofError
from lofi.train.proofs import FirstSteps, watched
from lofi.train.trainer import LofiTrainer
from tiny_training import arguments, language_rows, tiny_llama, with_lora


def run(model, folder, **changes) -> LofiTrainer:
    trainer = LofiTrainer(
        model=model, args=arguments(folder, **({"save_strategy": "no"} | changes)), train_dataset=language_rows()
    )
    trainer.train()
    return trainer


def test_every_tensor_of_a_working_adapter_moves_in_two_updates(tmp_path):
    trainer = run(with_lora(tiny_llama()), tmp_path)
    assert trainer.proof.lines == ["first steps: all 28 trained tensors moved"]


def test_an_embedding_is_judged_too_though_there_a_starts_at_zero_and_b_does_not(tmp_path):
    model = with_lora(tiny_llama(tie_word_embeddings=False), target_modules=["embed_tokens", "v_proj"])
    assert run(model, tmp_path).proof.lines == ["first steps: all 6 trained tensors moved"]


def test_an_adapter_that_the_forward_never_calls_is_an_error_that_names_it(tmp_path):
    model = tiny_llama()
    model.model.spare = torch.nn.Linear(24, 24)
    with_lora(model, target_modules=["spare", "q_proj"])
    with pytest.raises(ProofError, match=r"did not move after the first update: model\.spare\S*lora_B"):
        run(model, tmp_path)


def test_a_factor_a_that_stays_is_found_at_the_second_update(tmp_path):
    model = with_lora(tiny_llama())
    stuck = adapter_tensors(model)["model.layers.1.mlp.up_proj.lora_A"]
    stuck.register_hook(torch.zeros_like)
    with pytest.raises(ProofError, match=r"after two updates: model\.layers\.1\.mlp\.up_proj\S*lora_A"):
        run(model, tmp_path)


def test_a_factor_b_that_stays_is_found_at_the_first_update(tmp_path):
    model = with_lora(tiny_llama())
    adapter_tensors(model)["model.layers.0.self_attn.k_proj.lora_B"].register_hook(torch.zeros_like)
    with pytest.raises(ProofError, match=r"1 of 28 trained tensors did not move after the first update"):
        run(model, tmp_path)


BOTTLENECKS = [
    pytest.param(HoulsbyConfig(bottleneck_size=5), 16, id="houlsby"),  # two a block, four tensors each
    pytest.param(LinConfig(bottleneck_size=5, non_linearity="gelu"), 12, id="lin"),  # one a block, six tensors
]


@pytest.mark.parametrize(("config", "tensors"), BOTTLENECKS)
def test_of_a_bottleneck_that_starts_at_zero_what_lies_before_u_waits_for_it(tmp_path, config, tensors):
    model = tiny_llama()
    lofi.add_adapter(model, config)
    first = run(model, tmp_path, max_steps=1)
    still = {n.rpartition(".")[2] for n, t in adapter_tensors(model).items() if n.endswith("_bias") and not t.any()}
    assert first.proof.lines == [] and still >= {"down_bias"}  # after one update only U and u have moved
    model = tiny_llama()
    lofi.add_adapter(model, config)
    assert run(model, tmp_path).proof.lines == [f"first steps: all {tensors} trained tensors moved"]


@pytest.mark.parametrize(("leaf", "update"), [("up", "the first update"), ("down", "two updates")])
def test_a_stuck_matrix_of_a_bottleneck_is_found_when_its_turn_has_come(tmp_path, leaf, update):
    model = tiny_llama()
    lofi.add_adapter(model, LinConfig(bottleneck_size=5, non_linearity="gelu"))
    adapter_tensors(model)[f"model.layers.1.{leaf}"].register_hook(torch.zeros_like)
    with pytest.raises(ProofError, match=rf"1 of 12 trained tensors did not move after {update}: \S*{leaf}"):
        run(model, tmp_path)


def test_started_as_in_the_paper_a_bottleneck_waits_for_nothing(tmp_path):
    model = tiny_llama()
    lofi.add_adapter(model, HoulsbyConfig(bottleneck_size=5, init="normal"))
    adapter_tensors(model)["model.layers.1.mlp.down_proj.down"].register_hook(torch.zeros_like)
    with pytest.raises(ProofError, match="1 of 16 trained tensors did not move after the first update"):
        run(model, tmp_path)


@pytest.mark.parametrize(("projection", "excused"), [("k_proj", True), ("v_proj", False)])
def test_of_biases_only_that_of_a_key_may_stay(tmp_path, projection, excused):
    model = tiny_llama(attention_bias=True)
    lofi.add_adapter(model, BitFitConfig())
    adapter_tensors(model)[f"model.layers.1.self_attn.{projection}.bias"].register_hook(torch.zeros_like)
    if excused:
        moved, idle = run(model, tmp_path).proof.lines
        assert moved == "first steps: all 7 trained tensors moved"
        assert idle.startswith("first steps: the softmax does not feel model.layers.1.self_attn.k_proj.")
    else:
        with pytest.raises(ProofError, match="1 of 8 trained tensors did not move"):
            run(model, tmp_path)


def test_a_warm_up_step_with_rate_zero_is_not_judged(tmp_path):
    trainer = run(with_lora(tiny_llama()), tmp_path, warmup_steps=4)  # the first step's rate is zero
    assert trainer.proof.updates == 2 and trainer.proof.lines


def test_a_run_of_one_step_proves_what_it_can(tmp_path):
    trainer = run(with_lora(tiny_llama()), tmp_path, max_steps=1)
    assert trainer.proof.updates == 1 and trainer.proof.lines == []


def test_full_fine_tuning_fails_only_if_nothing_moved(tmp_path):
    assert run(tiny_llama(), tmp_path).proof.lines[0].startswith("first steps: 20 of 20 tensors moved")
    with pytest.raises(ProofError, match="20 of 20 trained tensors did not move"):
        run(tiny_llama(pad_token_id=None), tmp_path, optim="sgd", learning_rate=1e-30)


def test_the_sample_of_a_tensor_sees_a_tensor_that_moves_everywhere():
    model = tiny_llama()
    before = {name: t.clone() for name, t in watched(model).items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-3)
    assert not any(torch.equal(before[name], t) for name, t in watched(model).items())


class Optimizer:
    param_groups = ({"lr": 0.1},)


class State:
    global_step = 0


def stack_of_experts() -> tuple[torch.nn.Module, torch.nn.Module]:
    """(a model with one stack of three experts' factors where lofi keeps them, the stack)."""
    pair = torch.nn.Module()
    pair.lora_A = torch.nn.Parameter(torch.ones(3, 2, 5))
    pair.lora_B = torch.nn.Parameter(torch.zeros(3, 4, 2))
    model = torch.nn.Module()
    model.experts = torch.nn.Module()
    model.experts.pairs = torch.nn.ModuleDict({"down_proj": pair})
    model.lofi_registry = type("Registry", (), {"adapters": {"default": None}})()
    return model, pair


def judged(model, pair, reached: int) -> FirstSteps:
    """Two updates of which only the first `reached` experts are part."""
    proof = FirstSteps(model)
    proof.on_train_begin(None, State, None)
    for _ in range(2):
        proof.on_pre_optimizer_step(None, State, None, optimizer=Optimizer)
        with torch.no_grad():
            pair.lora_B[:reached] += 0.5
            pair.lora_A[:reached] += 0.5
        proof.on_optimizer_step(None, State, None, optimizer=Optimizer)
    return proof


def test_experts_that_no_token_reached_are_reported_and_not_an_error():
    proof = judged(*stack_of_experts(), reached=2)
    assert "no token was routed to 2 of 6 expert factors" in proof.lines[1]


def test_a_stack_of_which_no_expert_moved_is_an_error():
    with pytest.raises(ProofError, match=r"experts\.pairs\.down_proj\.lora_B\[0\]"):
        judged(*stack_of_experts(), reached=0)
