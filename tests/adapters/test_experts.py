"""LoRA on fused expert weights: against the dense sum W + s B A, for both storage orders."""

from __future__ import annotations

import copy

import pytest
import torch

import lofi
from adapters.models import stir
from lofi.adapters.config import LoraConfig
from lofi.adapters.merge import merge_in_memory
from lofi.adapters.registry import adapter_tensors

PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=61, num_local_experts=5, pad_token_id=None, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


def gpt_oss():
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=6, vocab_size=61, num_local_experts=5, num_experts_per_tok=2, pad_token_id=None, eos_token_id=2,
        layer_types=["full_attention", "full_attention"],
    )  # fmt: skip
    model = GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def tokens() -> torch.Tensor:
    return torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("build", [mixtral, gpt_oss])
def test_experts_equal_the_dense_sum_and_the_base_stays(build):
    model = build()
    before = model(tokens()).logits
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=PARAMETERS)
    lofi.add_adapter(model, config)
    assert torch.allclose(model(tokens()).logits, before, atol=1e-5)
    stir(model)
    after = model(tokens()).logits
    assert not torch.allclose(after, before, atol=1e-2)
    merged = merge_in_memory(model)
    assert torch.allclose(merged(tokens()).logits, after, atol=2e-4)
    with lofi.adapters_off(model):
        assert torch.equal(model(tokens()).logits, before)


def test_gradients_equal_those_through_the_dense_sum():
    model = mixtral()
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=PARAMETERS)
    lofi.add_adapter(model, config)
    stir(model)
    dense = merge_in_memory(copy.deepcopy(model))
    model(tokens(), labels=tokens()).loss.backward()
    for parameter in dense.parameters():
        parameter.requires_grad_()
    dense(tokens(), labels=tokens()).loss.backward()
    experts = "model.layers.0.mlp.experts"
    pair = model.get_submodule(experts).adapters["default"].pairs["down_proj"]
    g = dense.get_submodule(experts).down_proj.grad  # (E, O, I)
    expected = (5 / 3) * torch.einsum("eoi,eri->eor", g, pair.lora_A)
    assert torch.allclose(pair.lora_B.grad, expected, atol=1e-6)


def test_all_linear_states_which_experts_it_left_out():
    report = lofi.add_adapter(mixtral(), LoraConfig(r=2))
    left = [path for path, reason in report.left_out if "fused experts" in reason]
    assert left == [f"model.layers.{i}.{p}" for i in range(2) for p in PARAMETERS]


def test_unknown_expert_parameters_are_named_with_those_that_exist():
    with pytest.raises(lofi.TargetError, match=r"experts\.gate_up_proj"):
        lofi.add_adapter(mixtral(), LoraConfig(r=2, target_parameters=["experts.up_gate"]))


def test_an_expert_that_no_token_reached_gets_a_zero_gradient():
    model = mixtral()
    lofi.add_adapter(model, LoraConfig(r=2, target_modules=["q_proj"], target_parameters=PARAMETERS))
    stir(model)
    one = tokens()[:1, :1]
    model(one, labels=torch.tensor([[5]])).logits.sum().backward()
    grads = [t.grad for k, t in adapter_tensors(model).items() if "down_proj.lora_B" in k]
    assert all((g.flatten(1) == 0).all(1).sum() == 3 for g in grads)  # 2 of 5 experts a token
