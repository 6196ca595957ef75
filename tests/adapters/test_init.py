"""Where the factors of LoRA start: the papers' formulas, an untouched base, and the shifted form in low precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lofi
from adapters.models import Toy, ids, toy
from files.families import family_model, logits
from lofi.adapters.init import from_start, olora, orthogonal, pissa
from lofi.adapters.merge import merge_in_memory
from lofi.adapters.registry import adapter_tensors, adapters_of
from lofi.errors import RecipeError, TargetError
from quantized_models import quantized

STARTS = ("olora", "pissa", "pissa_niter_4", "orthogonal")
SHAPES = [(13, 7, 3), (7, 13, 3), (9, 9, 9), (5, 1, 1)]


def weight(out_features, in_features, seed=0):
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed))


def move(model, name="default", share=0.3, seed=3):
    """Move every factor by a share of its own size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in adapter_tensors(model, name).values():
            step = torch.randn(tensor.shape, generator=generator) * tensor.detach().abs().mean().clamp_min(0.1)
            tensor.add_(share * step)


# Formulas


@pytest.mark.parametrize(("o", "i", "r"), SHAPES)
def test_olora_is_the_first_columns_and_rows_of_the_whole_qr(o, i, r):
    w = weight(o, i)
    q, upper = torch.linalg.qr(w.double())
    a, b = olora(w, r)
    assert torch.allclose(b.double(), q[:, :r], rtol=0, atol=1e-5)
    assert torch.allclose(a.double(), upper[:r], rtol=0, atol=1e-5)
    assert not torch.allclose(b.double(), q[:, :r] * 1.01, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("o", "i", "r"), SHAPES)
def test_pissa_is_the_best_approximation_with_the_singular_values_shared_out(o, i, r):
    w, scale = weight(o, i), 1.7
    u, s, v = torch.linalg.svd(w.double(), full_matrices=False)
    a, b = pissa(w, r, scale)
    assert torch.allclose(scale * b @ a, (u[:, :r] * s[:r]) @ v[:r], rtol=0, atol=1e-10)
    for gram in (a @ a.t(), b.t() @ b):  # each factor carries sqrt(S / s) on orthogonal directions
        assert torch.allclose(gram, torch.diag(s[:r] / scale), rtol=0, atol=1e-10)


def test_randomised_pissa_comes_near_the_best_approximation_with_more_iterations():
    w = weight(60, 45)
    a, b = pissa(w, 5, 2.0)
    torch.manual_seed(0)
    errors = [torch.linalg.norm(2.0 * (q @ p - b @ a)) for p, q in (pissa(w, 5, 2.0, iterations=n) for n in (0, 2, 30))]
    assert errors[0] > 10 * errors[2] and errors[1] > errors[2] and errors[2] < 0.01 * torch.linalg.norm(w)


def test_pissa_of_a_weight_of_lower_rank_has_no_nan():
    w = torch.outer(torch.arange(1.0, 6), torch.arange(1.0, 8))  # rank 1
    a, b = pissa(w, 3, 2.0)
    assert a.isfinite().all() and torch.allclose(2.0 * b @ a, w.double(), rtol=0, atol=1e-5)


def test_orthogonal_factors_annihilate_each_other_and_have_pefts_size():
    torch.manual_seed(1)
    a, b = orthogonal(6, 300, 500)
    assert a.shape == (6, 300) and b.shape == (500, 6)
    assert (b @ a).abs().max() < 1e-6 < 1e-3 < (b @ a.roll(1, 0)).abs().max()
    size = 0.1 * 0.5**0.5  # each entry sums r/2 products with an orthonormal row's share
    assert a.std() == pytest.approx(size, rel=0.1) and b.std() == pytest.approx(size, rel=0.1)


def test_the_shifted_form_is_the_difference_of_products():
    a, a0, b, b0 = (torch.randn(n, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
                    for i, n in enumerate([(3, 7), (3, 7), (5, 3), (5, 3)]))  # fmt: skip
    wide, tall = from_start(a, b, a0, b0)
    assert wide.shape == (6, 7) and tall.shape == (5, 6)
    assert torch.allclose(tall @ wide, b @ a - b0 @ a0, rtol=0, atol=1e-13)


def test_in_bf16_the_shifted_form_keeps_what_the_plain_one_cancels():
    w = weight(256, 192)
    a0, b0 = olora(w, 16)
    g = torch.Generator().manual_seed(2)
    a = a0 + 0.01 * torch.randn(a0.shape, generator=g) * a0.std()
    b = b0 + 0.01 * torch.randn(b0.shape, generator=g) * b0.std()
    exact = b.double() @ a.double() - b0.double() @ a0.double()

    def error(product):
        return float((product.double() - exact).norm() / exact.norm())

    plain = error(b.bfloat16() @ a.bfloat16() - b0.bfloat16() @ a0.bfloat16())
    wide, tall = from_start(a, b, a0, b0)
    assert plain > 0.1 > 0.006 > error(tall.bfloat16() @ wide.bfloat16())


# On models


def test_the_factors_on_a_model_are_the_formulas_of_its_weights():
    model = toy()
    lofi.add_adapter(model, lofi.LoraConfig(r=3, lora_alpha=5, target_modules=["up"], init_lora_weights="olora"))
    held = adapter_tensors(model)
    a, b = olora(model.up.weight.detach(), 3)
    assert torch.equal(held["up.lora_A"], a) and torch.equal(held["up.lora_B"], b)


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("base", ["dense", "bf16", "nf4", "int8", "conv1d"])
def test_the_model_starts_as_its_base_bit_for_bit_and_the_base_is_never_touched(init, base):
    model = family_model("gpt2" if base == "conv1d" else "llama")
    model = quantized(model, base) if base in ("nf4", "int8") else model.bfloat16() if base == "bf16" else model
    alone, weights = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    lofi.add_adapter(model, lofi.LoraConfig(r=4, lora_alpha=6, use_rslora=True, init_lora_weights=init))
    assert torch.equal(logits(model), alone)
    move(model)
    assert (logits(model) - alone).abs().max() > 0.01
    lofi.unload(model)
    now = model.state_dict()
    assert now.keys() == weights.keys() and all(torch.equal(now[k], weights[k]) for k in weights)
    assert torch.equal(logits(model), alone)


@pytest.mark.parametrize("init", ["olora", "pissa"])
def test_lofi_tiny_starts_as_itself(init, lofi_tiny):
    model = lofi.load_model(lofi_tiny)
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        alone = model(tokens).logits
        lofi.add_adapter(model, lofi.LoraConfig(r=5, lora_alpha=7, init_lora_weights=init))
        assert torch.equal(model(tokens).logits, alone)


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("target", ["up", "embed"])
def test_gradients_are_those_of_the_difference_of_products(init, target):
    model = toy().double()
    lofi.add_adapter(model, lofi.LoraConfig(r=2, lora_alpha=5, target_modules=[target], init_lora_weights=init))
    part = adapters_of(model)["default"].parts[target].double()
    move_double(part)
    a, b = dict(part.named_parameters()).values()
    a0, b0 = part.start_A, part.start_B
    model(ids()).square().sum().backward()
    got = a.grad.clone(), b.grad.clone()
    model.zero_grad()
    module, w = getattr(model, target), getattr(model, target).weight.detach()
    delta = part.scale * (b @ a - b0 @ a0)
    changed = w + (delta.t() if target == "embed" else delta)
    lofi.set_adapter(model, None)
    del module._parameters["weight"]
    module.weight = changed
    model(ids()).square().sum().backward()
    for mine, exact in zip(got, (a.grad, b.grad), strict=True):
        assert exact.abs().max() > 1e-3 and torch.allclose(mine, exact, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def move_double(part):
    generator = torch.Generator().manual_seed(3)
    for tensor in part.parameters():
        tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("init", ["olora", "orthogonal"])
def test_gradcheck_passes_through_the_layer(init):
    model = toy().double()
    lofi.add_adapter(model, lofi.LoraConfig(r=2, lora_alpha=3, target_modules=["down"], init_lora_weights=init))
    part = adapters_of(model)["default"].parts["down"].double()
    move_double(part)
    x = torch.randn(4, 13, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: model.down(x), (x, part.lora_A, part.lora_B))


def test_dropout_drops_inputs_of_the_update_alone():
    model = toy()
    config = lofi.LoraConfig(r=2, lora_alpha=3, target_modules=["up"], lora_dropout=0.5, init_lora_weights="olora")
    lofi.add_adapter(model, config)
    x, alone = torch.ones(200, 7), nn.functional.linear(torch.ones(200, 7), model.up.weight, model.up.bias)
    assert torch.equal(model.train().up(x), alone)  # nothing to drop from at step 0
    move(model)
    dropped, whole = model.up(x), model.eval().up(x)
    assert len(dropped.detach().unique(dim=0)) > 50 and torch.allclose(whole, whole[:1], rtol=0, atol=1e-5)
    assert torch.allclose(dropped.mean(0), whole[0], atol=0.35 * float((whole[0] - alone[0]).abs().max()) + 0.05)


def test_adapters_of_different_starts_live_on_one_model():
    model = family_model("llama")
    alone, said = logits(model), {}
    for name, init in {"q": "olora", "s": "pissa", "plain": True}.items():
        lofi.add_adapter(model, lofi.LoraConfig(r=2, lora_alpha=3, init_lora_weights=init), name)
    assert torch.equal(logits(model), alone)
    for name in ("q", "s", "plain"):
        move(model, name, share=0.1)
        lofi.set_adapter(model, name)
        said[name] = logits(model)
        single = merge_in_memory(model, name)
        assert torch.allclose(logits(single), said[name], rtol=0, atol=2e-5)
    lofi.set_adapter(model, ["q", "s", "plain"])
    together = logits(model)
    assert all((together - one).abs().max() > 1e-3 for one in said.values())
    lofi.set_adapter(model, None)
    assert torch.equal(logits(model), alone)


@pytest.mark.parametrize("init", STARTS)
def test_experts_and_embeddings_start_so_too(init):
    model = family_model("mixtral")
    alone = logits(model)
    lofi.add_adapter(model, lofi.LoraConfig(
        r=2, lora_alpha=3, target_modules=["embed_tokens"], init_lora_weights=init,
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    ))  # fmt: skip
    assert torch.allclose(logits(model), alone, rtol=0, atol=1e-6)  # experts are summed in another order
    parts = adapters_of(model)["default"].parts
    assert all(part.zero_delta() for part in parts.values())
    assert all(not delta.any() for delta in parts["model.layers.0.mlp.experts"].delta_weights("down_proj"))
    move(model)
    assert not any(part.zero_delta() for part in parts.values())
    assert (logits(model) - alone).abs().max() > 1e-2
    assert torch.allclose(logits(merge_in_memory(model)), logits(model), rtol=0, atol=2e-5)


def test_one_experts_start_is_that_of_its_weight():
    model = family_model("mixtral")
    lofi.add_adapter(model, lofi.LoraConfig(
        r=2, lora_alpha=3, target_modules=[], init_lora_weights="olora", target_parameters=["experts.gate_up_proj"],
    ))  # fmt: skip
    experts = model.model.layers[1].mlp.experts
    pair = adapters_of(model)["default"].parts["model.layers.1.mlp.experts"].pairs["gate_up_proj"]
    a, b = olora(experts.gate_up_proj[2].detach(), 2)
    assert torch.equal(pair.lora_A[2], a) and torch.equal(pair.start_B[2], b)


def test_nothing_is_computed_on_the_meta_device():
    with torch.device("meta"):
        model = Toy()
    report = lofi.add_adapter(model, lofi.LoraConfig(r=3, target_modules=["up", "embed"], init_lora_weights="pissa"))
    assert report.trainable == 3 * (7 + 13) + 3 * (11 + 7)


def test_the_report_says_what_the_saved_folder_will_be():
    report = lofi.add_adapter(toy(), lofi.LoraConfig(r=2, target_modules=["up"], init_lora_weights="pissa"))
    assert any("plain LoRA of rank 4" in note and "vLLM needs a maximum LoRA rank" in note for note in report.notes)
    assert report.matched[0].r == 2


@pytest.mark.parametrize("init", ["olora", "pissa", "pissa_niter_1"])
def test_a_rank_above_the_weights_own_is_refused_and_leaves_the_model_alone(init):
    model = toy()
    with pytest.raises(TargetError, match=rf"^down: init_lora_weights '{init}' takes 6 directions .*\(5, 13\), .* 5;"):
        lofi.add_adapter(model, lofi.LoraConfig(r=6, target_modules=["up", "down"], init_lora_weights=init))
    assert not adapters_of(model) and type(model.up) is nn.Linear


def test_orthogonal_starts_want_even_ranks():
    with pytest.raises(RecipeError, match="'orthogonal' needs an even rank, got 5; take 6"):
        lofi.LoraConfig(r=4, rank_pattern={"q_proj": 5}, init_lora_weights="orthogonal")


@pytest.mark.parametrize("init", ["eva", "pissa_niter_", "pissa_niter_x", "corda", "loftq"])
def test_a_start_that_is_not_known_is_refused_with_those_that_are(init):
    with pytest.raises(RecipeError, match=rf"init_lora_weights is '{init}', expected one of True, False, 'gaussian',"):
        lofi.LoraConfig(init_lora_weights=init)
