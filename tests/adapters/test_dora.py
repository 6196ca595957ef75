"""DoRA: the paper's formula formed in full, the paper's gradient, the base at step 0 and the merge."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lofi
from adapters.models import ids, stir, toy
from files.families import family_model, logits
from lofi.adapters.dora import row_lengths, row_squares, stretch
from lofi.adapters.init import frozen_weight
from lofi.adapters.merge import merge_in_memory, merged_weights
from lofi.adapters.registry import adapter_state, adapter_tensors, adapters_of
from lofi.errors import RecipeError, TargetError
from quantized_models import quantized

BASES = ("dense", "conv1d", "nf4", "int8")
MORE = {"dense": "down_proj", "conv1d": "mlp.c_proj", "nf4": "down_proj", "int8": "down_proj"}


def config(**changes):
    return lofi.LoraConfig(**({"r": 2, "lora_alpha": 5, "use_dora": True} | changes))


def base_model(kind: str):
    model = family_model("gpt2" if kind == "conv1d" else "llama")
    return quantized(model, kind) if kind in ("nf4", "int8") else model


def one_part(model):
    ((path, part),) = adapters_of(model)["default"].parts.items()
    return model.get_submodule(path), part


def formed(part, weight):
    """m (W0 + s B A) / n by the paper, in float64, n without a gradient; (O, I)."""
    a, b = (t.double() for t in part.factors())
    whole = weight.double() + part.scale * b @ a
    return part.lora_magnitude_vector.double()[:, None] * whole / whole.norm(dim=1, keepdim=True).detach()


@pytest.mark.parametrize("init", [True, "olora", "pissa"])
@pytest.mark.parametrize("kind", BASES)
def test_the_model_starts_as_its_base_bit_for_bit(kind, init):
    model = base_model(kind)
    alone = logits(model)
    lofi.add_adapter(model, config(init_lora_weights=init))
    assert torch.equal(logits(model), alone)
    assert all(part.zero_delta() for part in adapters_of(model)["default"].parts.values())
    stir(model)
    assert (logits(model) - alone).abs().max() > 0.01
    lofi.unload(model)
    assert torch.equal(logits(model), alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lofi_tiny_starts_as_itself(dtype, lofi_tiny):
    model = lofi.load_model(lofi_tiny).to(dtype)
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        alone = model(tokens).logits
        lofi.add_adapter(model, config(lora_dropout=0.2))
        assert torch.equal(model(tokens).logits, alone) and torch.equal(model.train()(tokens).logits, alone)


@pytest.mark.parametrize("init", [True, "olora"])
@pytest.mark.parametrize("kind", BASES)
def test_output_and_gradients_are_the_papers(kind, init):
    model = base_model(kind)
    lofi.add_adapter(model, config(target_modules=rf".*\.0\..*{MORE[kind]}", init_lora_weights=init))
    stir(model)
    module, part = one_part(model)
    weight = frozen_weight(module, transposed=part.transposed)
    x = torch.randn(3, 4, weight.shape[1], generator=torch.Generator().manual_seed(2)) * 0.3
    g = torch.randn(3, 4, weight.shape[0], generator=torch.Generator().manual_seed(4))
    mine, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    y, bias = module(mine), getattr(module, "bias", None)
    exact = theirs @ formed(part, weight).t() + (0 if bias is None else bias.double())
    near = {"nf4": 2e-2, "int8": 4e-2}.get(kind, 2e-5)  # their products round, in bf16 and to 8 bits
    tensors = list(part.parameters())
    assert len(tensors) == 3
    got = torch.autograd.grad(y, [*tensors, mine], g)
    want = torch.autograd.grad(exact, [*tensors, theirs], g.double())
    for one, other in zip((y, *got), (exact, *want), strict=True):
        assert (one - other).norm() <= near * other.norm() and other.norm() > 0.1
    assert (y - exact * 1.1).norm() > near * exact.norm()


def test_the_length_counts_as_a_constant_in_the_gradient():
    model = toy()
    lofi.add_adapter(model, config(target_modules=["up"]))
    stir(model)
    module, part = one_part(model)
    x, g = torch.randn(6, 7), torch.randn(6, 13)
    (mine,) = torch.autograd.grad(module(x), [part.lora_B], g)
    a, b = part.factors()
    whole = module.weight.detach() + part.scale * b @ a
    through = x @ (part.lora_magnitude_vector[:, None] * whole / whole.norm(dim=1, keepdim=True)).t()
    (full,) = torch.autograd.grad(through, [part.lora_B], g)
    assert (mine - full).norm() > 0.05 * full.norm()  # the whole gradient is another one


def test_lengths_come_from_the_factors_without_the_delta():
    g = torch.Generator().manual_seed(0)
    w, a, b = (torch.randn(n, generator=g) for n in [(1500, 9), (4, 9), (1500, 4)])
    exact = (w.double() + 0.7 * b.double() @ a.double()).norm(dim=1)
    got = row_lengths(w, row_squares(w), a, b, 0.7)
    assert got.shape == (1500,) and torch.allclose(got.double(), exact, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(row_lengths(w, row_squares(w), a, b, 0.71).double(), exact, rtol=1e-4, atol=1e-4)


def test_a_row_of_zeros_stays_one_and_gives_no_nan():
    model = toy()
    with torch.no_grad():
        model.up.weight[4] = 0
    alone = model(ids())
    lofi.add_adapter(model, config(target_modules=["up"]))
    assert torch.equal(model(ids()), alone)
    model(ids()).sum().backward()
    assert all(p.grad.isfinite().all() for p in adapter_tensors(model).values())
    assert stretch(torch.tensor([3.0, 2.0]), torch.tensor([0.0, 4.0])).tolist() == [0.0, -0.5]


def test_dropout_reaches_the_update_and_the_rescaled_base_but_not_the_base():
    model = toy()
    lofi.add_adapter(model, config(target_modules=["up"], lora_dropout=0.4))
    stir(model)
    module, part = one_part(model)
    x = torch.randn(5, 7)
    torch.manual_seed(9)
    y = model.train().up(x)
    torch.manual_seed(9)
    d = nn.functional.dropout(x, 0.4)
    new = formed(part, module.weight.detach()).float()
    exact = nn.functional.linear(x, module.weight, module.bias) + d @ (new - module.weight).t()
    assert torch.allclose(y, exact, rtol=0, atol=1e-5) and not torch.equal(d, x)


@pytest.mark.parametrize("init", [True, "pissa"])
@pytest.mark.parametrize("kind", ["dense", "conv1d"])
def test_merged_it_says_the_same(kind, init):
    model = base_model(kind)
    lofi.add_adapter(model, config(init_lora_weights=init))
    stir(model)
    assert torch.allclose(logits(merge_in_memory(model)), logits(model), rtol=0, atol=1e-5)


def test_a_quantized_base_merges_to_the_papers_weight():
    model = base_model("nf4")
    lofi.add_adapter(model, config())
    stir(model)
    module, part = (
        model.model.layers[0].mlp.up_proj,
        adapters_of(model)["default"].parts["model.layers.0.mlp.up_proj"],
    )
    merged = dict(merged_weights(model))["model.layers.0.mlp.up_proj.weight"]
    assert torch.allclose(merged.double(), formed(part, module.dense_weight()), rtol=0, atol=1e-5)


def test_several_active_adapters_add_up_what_each_changes_of_the_weight():
    model = toy()
    lofi.add_adapter(model, config(target_modules=["up"]), "one")
    lofi.add_adapter(model, config(r=3, target_modules=["up"]), "two")
    lofi.add_adapter(model, lofi.LoraConfig(r=1, target_modules=["up"]), "plain")
    names = ("one", "two", "plain")
    for seed, name in enumerate(names):
        stir(model, name, seed)
    x, weight = torch.randn(4, 7), model.up.weight.detach()
    changed = weight.double() + sum(dict(merged_weights(model, n))["up.weight"].double() - weight for n in names)
    for order in (names, names[::-1]):
        lofi.set_adapter(model, order)
        exact = nn.functional.linear(x.double(), changed, model.up.bias.double())
        assert torch.allclose(model.up(x).double(), exact, rtol=0, atol=1e-5)


def test_a_base_that_trains_too_gets_the_gradient_of_both_terms():
    model = toy()
    lofi.add_adapter(model, config(target_modules=["up"]))
    stir(model)
    module, part = one_part(model)
    module.weight.requires_grad_(True)
    x, g = torch.randn(6, 7), torch.randn(6, 13)
    (mine,) = torch.autograd.grad(module(x), [module.weight], g)
    lengths = (module.weight + part.delta_weight()).norm(dim=1).detach()
    exact = (part.lora_magnitude_vector.detach() / lengths)[:, None] * (g.t() @ x)
    assert torch.allclose(mine, exact, rtol=1e-4, atol=1e-4)


def test_only_the_magnitude_moved_is_a_change_too():
    model = toy()
    lofi.add_adapter(model, config(target_modules=["up"]))
    _, part = one_part(model)
    assert part.zero_delta() is True
    with torch.no_grad():
        part.lora_magnitude_vector[2] *= 1.1
    assert part.zero_delta() is False


def test_what_trains_is_the_factors_and_one_number_a_row():
    report = lofi.add_adapter(toy := family_model("llama"), config(target_modules=["down_proj"]))
    assert report.trainable == 2 * (2 * (44 + 24) + 24)
    assert any("vLLM and llama.cpp cannot" in note for note in report.notes)
    assert any("base_squares" in key for key in adapter_state(toy))  # a resumed run starts from the same lengths


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bias": "all"}, "use_dora with bias 'all' is not defined; leave bias at 'none'"),
        ({"target_parameters": ["experts.down_proj"]}, r"use_dora does not reach target_parameters \(fused experts\)"),
    ],
)
def test_what_dora_does_not_reach_is_refused(changes, words):
    with pytest.raises(RecipeError, match=words):
        config(**changes)


def test_embeddings_are_refused_by_their_path():
    model = toy()
    with pytest.raises(TargetError, match=r"use_dora does not reach embeddings \(embed\); leave it out of target_mod"):
        lofi.add_adapter(model, config(target_modules=["embed", "up"]))
    assert not adapters_of(model)


@pytest.mark.parametrize("init", [True, "olora"])
def test_compiled_models_of_several_scales_give_the_same_numbers(init):
    for alpha in (7, 5):  # the second makes a symbol of the scale
        model = toy()
        lofi.add_adapter(model, config(target_modules=["up", "down"], init_lora_weights=init, lora_alpha=alpha))
        stir(model)
        assert torch.allclose(torch.compile(model, backend="eager")(ids()), model(ids()), rtol=0, atol=1e-6)
