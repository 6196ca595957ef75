"""Which models may share a row between sequences: found by probe, equal to what was measured by hand."""

from __future__ import annotations

import pytest
import torch

from lofi.adapters.attach import add_adapter
from lofi.adapters.config import LoraConfig
from lofi.adapters.registry import adapter_tensors
from lofi.models.packing import _judge, packing_verdict


@pytest.mark.parametrize(
    "family", ["llama", "llama_tied", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "mistral", "mixtral", "gpt2"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_with_block_diagonal_attention_may_pack(tiny, family, dtype):
    verdict = packing_verdict(tiny.model(family).to(dtype))
    assert verdict.ok, verdict.reason


@pytest.mark.parametrize("family", ["opt", "bloom", "t5", "bart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_would_mix_sequences_may_not(tiny, family, dtype):
    verdict = packing_verdict(tiny.model(family).to(dtype))
    assert not verdict.ok
    assert "padded" in verdict.reason


def test_a_leak_far_below_bfloat16_rounding_is_caught(tiny):
    model = tiny.model("llama").bfloat16()
    assert packing_verdict(model).ok

    def leak(_module, args, output):
        output[0, -1, :] += output[0, 0].abs().mean() * 2**-4  # the last token feels the first sequence
        return output

    model.model.norm.register_forward_hook(leak)
    verdict = packing_verdict(model)
    assert not verdict.ok and "see each other" in verdict.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_that_do_not_start_again_are_caught(tiny, dtype):
    model = tiny.model("gpt2").to(dtype)
    model.register_forward_pre_hook(
        lambda _m, _a, kw: ((), {**kw, "position_ids": kw["position_ids"] + (kw["position_ids"].shape[1] > 13)}),
        with_kwargs=True,
    )
    verdict = packing_verdict(model)
    assert not verdict.ok and "differ" in verdict.reason


def test_non_finite_logits_are_no_proof():
    assert _judge(0.0, 1e-6, 0.0, 1e-4).ok
    assert not _judge(float("nan"), 1e-6, 0.0, 1e-4).ok
    assert not _judge(0.0, 1e-6, float("nan"), 1e-4).ok


def test_the_probe_works_with_adapters_and_leaves_mode_and_random_state_alone(tiny):
    model = tiny.model("qwen3").train()
    add_adapter(model, LoraConfig(r=3, lora_alpha=7, lora_dropout=0.5))
    for tensor in adapter_tensors(model, "default").values():
        torch.nn.init.normal_(tensor, std=0.1)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.model.norm.eval()
    before = torch.random.get_rng_state()
    assert packing_verdict(model).ok
    assert torch.equal(before, torch.random.get_rng_state())
    assert model.training and not model.model.norm.training and model.model.layers[0].training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
