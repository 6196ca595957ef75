"""Choosing adapters: the model's default, one thread's choice, and recomputed activations."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import lofi
from adapters.models import adapted, ids, stir, toy
from lofi.adapters.config import LoraConfig
from lofi.adapters.registry import adapter_tensors
from lofi.adapters.switch import active_adapters, checkpoint_contexts


def three() -> tuple[torch.nn.Module, dict[str | None, torch.Tensor]]:
    model = adapted(LoraConfig(r=3), name="a")
    lofi.add_adapter(model, LoraConfig(r=2, lora_alpha=7, target_modules=["up", "embed"]), "b")
    stir(model, "b", seed=9)
    lofi.add_adapter(model, LoraConfig(r=1, target_modules=["down"], modules_to_save=["head"]), "c")
    stir(model, "c", seed=11)
    expected = {}
    for name in ("a", "b", "c", None):
        lofi.set_adapter(model, name)
        expected[name] = model(ids()).detach()
    lofi.set_adapter(model, "a")
    return model, expected


def test_the_first_adapter_is_active_and_later_ones_are_not():
    model = adapted(name="a")
    lofi.add_adapter(model, LoraConfig(r=2), "b")
    assert active_adapters(model) == ("a",)


def test_switching_off_gives_exactly_the_base():
    model, expected = three()
    assert torch.equal(expected[None], toy()(ids()))
    with lofi.adapters_off(model):
        assert torch.equal(model(ids()), expected[None])
    assert torch.equal(model(ids()), expected["a"])


def test_several_active_adapters_add_up():
    model = adapted(LoraConfig(r=3, target_modules=["up"]), name="a")
    lofi.add_adapter(model, LoraConfig(r=2, lora_alpha=7, target_modules=["up"]), "b")
    stir(model, "b", seed=9)
    x = torch.randn(4, 7)
    outputs = {}
    for choice in (None, "a", "b", ("a", "b")):
        with lofi.using(model, choice):
            outputs[choice] = model.up(x)
    total = outputs["a"] + outputs["b"] - outputs[None]
    assert torch.allclose(outputs["a", "b"], total, atol=1e-5)


def test_two_whole_copies_of_one_module_cannot_be_active_together():
    model = adapted(LoraConfig(r=3, target_modules=["up"], modules_to_save=["head"]), name="a")
    lofi.add_adapter(model, LoraConfig(r=3, target_modules=["up"], modules_to_save=["head"]), "b")
    lofi.set_adapter(model, ["a", "b"])
    with pytest.raises(lofi.TargetError, match="do not add up"):
        model(ids())


def test_using_reaches_this_thread_and_no_other():
    model, expected = three()
    inside, seen = threading.Event(), []

    def other():
        inside.wait()
        seen.append(model(ids()))

    thread = threading.Thread(target=other)
    thread.start()
    with lofi.using(model, "b"):
        inside.set()
        thread.join()
        assert torch.equal(model(ids()), expected["b"])
    assert torch.equal(seen[0], expected["a"])


def test_many_threads_with_different_adapters_get_what_each_gets_alone():
    model, expected = three()
    names = ["a", "b", "c", None] * 50

    def run(name):
        with lofi.using(model, name):
            return torch.equal(model(ids()), expected[name])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, names))


def test_blocks_nest_and_an_exception_inside_restores_the_choice():
    model, expected = three()
    with lofi.using(model, "b"):
        with pytest.raises(ZeroDivisionError), lofi.using(model, "c"):
            raise ZeroDivisionError
        assert torch.equal(model(ids()), expected["b"])
    assert torch.equal(model(ids()), expected["a"])


def test_recomputed_activations_use_the_adapter_of_their_forward_after_the_block_ended():
    def gradients(checkpointed: bool) -> dict[str, torch.Tensor]:
        model, _ = three()
        with lofi.using(model, "b"):
            if checkpointed:
                y = checkpoint(model, ids(), use_reentrant=False, context_fn=checkpoint_contexts(model))
            else:
                y = model(ids())
        lofi.set_adapter(model, "c")
        y.square().sum().backward()
        return {k: t.grad for k, t in adapter_tensors(model, "b").items()}

    plain, recomputed = gradients(False), gradients(True)
    assert all(torch.equal(plain[k], recomputed[k]) for k in plain)


def test_using_follows_the_checkpointing_that_transformers_set_up(lofi_tiny):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(lofi_tiny, dtype=torch.float32)
    for name, seed in (("a", 1), ("b", 2)):
        lofi.add_adapter(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]), name)
        stir(model, name, seed)
    tokens = torch.randint(4, 900, (1, 9), generator=torch.Generator().manual_seed(0))

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        with lofi.using(model, "b"):
            loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        return {k: t.grad.clone() for k, t in adapter_tensors(model, "b").items()}

    model.train()
    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    recomputed = gradients()
    assert all(torch.allclose(plain[k], recomputed[k], atol=1e-6) for k in plain)


def test_unknown_names_are_refused_with_the_nearest():
    model, _ = three()
    lofi.unload(model, "c")
    lofi.add_adapter(model, LoraConfig(r=1), "summary")
    with pytest.raises(lofi.TargetError, match="did you mean 'summary'"):
        lofi.set_adapter(model, "sumary")
    with pytest.raises(lofi.TargetError, match="has no adapter"):
        lofi.set_adapter(toy(), "a")


def test_unloading_the_active_adapter_leaves_none_active_and_the_others_intact():
    model, expected = three()
    lofi.unload(model, "a")
    assert active_adapters(model) == ()
    assert torch.equal(model(ids()), expected[None])
    lofi.set_adapter(model, "b")
    assert torch.equal(model(ids()), expected["b"])
