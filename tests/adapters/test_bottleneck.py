"""Adapter layers: the papers' formulas written out, where they go in each family, and what they leave alone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lofi
from adapters.models import stir, toy
from files import families
from files.families import V, family_model
from lofi.adapters.bottleneck import Bottleneck
from lofi.adapters.methods import HoulsbyConfig, LinConfig
from lofi.adapters.registry import adapter_tensors
from lofi.errors import RecipeError, TargetError
from quantized_models import quantized

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh}
HOULSBY = HoulsbyConfig(bottleneck_size=5)
LIN = LinConfig(bottleneck_size=5)
METHODS = [pytest.param(HOULSBY, id="houlsby"), pytest.param(LIN, id="lin")]


def named(**changes) -> HoulsbyConfig:
    """For Toy, whose modules no table knows: bottlenecks on `up` (O 13) and on `down` (O 5)."""
    return HoulsbyConfig(**{"bottleneck_size": 3, "attention_modules": ["up"], "mlp_modules": ["down"], **changes})


def paper(y, t, activation, prefix=""):
    """y + U f(D norm(y) + d) + u, the norm only where it has parameters."""
    normed = y
    if f"{prefix}norm_weight" in t:
        centred = y - y.mean(-1, keepdim=True)
        normed = centred / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        normed = normed * t[f"{prefix}norm_weight"] + t[f"{prefix}norm_bias"]
    z = ACTIVATIONS[activation](normed @ t[f"{prefix}down"].T + t[f"{prefix}down_bias"])
    return y + z @ t[f"{prefix}up"].T + t[f"{prefix}up_bias"]


def says(model, length=9):
    tokens = torch.randint(3, V, (2, length), generator=torch.Generator().manual_seed(9))
    more = {"decoder_input_ids": tokens[:, :5]} if model.config.is_encoder_decoder else {}
    return model(input_ids=tokens, **more).logits


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_houlsby_is_the_papers_formula_on_the_modules_output(activation):
    model, x = toy(), torch.randn(4, 6, 7)
    base = model.up(x)
    lofi.add_adapter(model, named(non_linearity=activation))
    stir(model)
    expected = paper(base, adapter_tensors(model), activation, "up.")
    assert torch.allclose(model.up(x), expected, atol=1e-6)
    assert not torch.allclose(expected, base, atol=1e-2)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_lin_is_the_papers_formula_with_its_own_layer_norm(activation):
    model, x = toy(), torch.randn(4, 6, 13)
    base = model.down(x)
    lofi.add_adapter(model, LinConfig(bottleneck_size=3, mlp_modules=["down"], non_linearity=activation))
    stir(model)
    tensors = adapter_tensors(model)
    assert torch.allclose(model.down(x), paper(base, tensors, activation, "down."), atol=1e-6)
    without_norm = {key: t for key, t in tensors.items() if "norm" not in key}
    assert not torch.allclose(model.down(x), paper(base, without_norm, activation, "down."), atol=1e-2)


@pytest.mark.parametrize("config", [named(), LinConfig(bottleneck_size=3, mlp_modules=["up"])], ids=["houlsby", "lin"])
def test_gradients_are_those_of_the_formula(config):
    model, x = toy(), torch.randn(4, 7, requires_grad=True)
    lofi.add_adapter(model, config)
    stir(model)
    mine = {key.removeprefix("up."): t for key, t in adapter_tensors(model).items() if key.startswith("up.")}
    model.up(x).pow(2).sum().backward()
    got, got_x = {key: t.grad.clone() for key, t in mine.items()}, x.grad.clone()
    wanted = {key: t.detach().clone().requires_grad_() for key, t in mine.items()}
    x.grad = None
    y = F.linear(x, model.up.weight, model.up.bias)
    paper(y, wanted, config.non_linearity).pow(2).sum().backward()
    assert len(got) == {"houlsby": 4, "adapter-lin": 6}[config.method]
    for key, grad in got.items():
        assert torch.allclose(grad, wanted[key].grad, rtol=1e-4, atol=1e-5), key
        assert grad.abs().max() > 1e-3
    assert torch.allclose(got_x, x.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", METHODS)
@pytest.mark.parametrize("family", [f for f in families.FAMILIES if f not in ("llama_tied", "qwen3", "mistral")])
def test_a_fresh_adapter_is_the_base_bit_for_bit_in_every_family_and_unloading_restores_it(family, config):
    model = family_model(family)
    bits = {key: t.clone() for key, t in model.state_dict().items()}
    base = families.logits(model)  # without gradients: torch takes another kernel where a mask needs one
    lofi.add_adapter(model, config)
    assert torch.equal(families.logits(model), base)
    families.stir(model)
    assert (families.logits(model) - base).abs().max() > 1e-2
    lofi.unload(model)
    assert torch.equal(families.logits(model), base)
    after = model.state_dict()
    assert list(after) == list(bits) and all(torch.equal(after[key], bits[key]) for key in bits)
    assert not any("Adapted" in type(m).__name__ for m in model.modules())


@pytest.mark.parametrize("config", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_a_bf16_base_keeps_float32_masters_and_its_own_bits(family, config):
    model = family_model(family, dtype=torch.bfloat16)
    base = families.logits(model)
    lofi.add_adapter(model, config)
    assert base.dtype == torch.bfloat16 and torch.equal(families.logits(model), base)
    assert all(t.dtype == torch.float32 for t in adapter_tensors(model).values())
    says(model).float().pow(2).mean().backward()
    grads = {key: t.grad for key, t in adapter_tensors(model).items() if key.endswith(".up")}
    assert grads and all(g is not None and g.dtype == torch.float32 and g.any() for g in grads.values())


@pytest.mark.parametrize("config", METHODS)
def test_under_autocast_a_fresh_adapter_is_the_base_bit_for_bit(config):
    model = family_model("llama")
    with torch.autocast("cpu", torch.bfloat16):
        base = says(model)
    lofi.add_adapter(model, config)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(says(model), base)
    families.stir(model)
    with torch.autocast("cpu", torch.bfloat16):
        stirred = says(model)
    assert stirred.dtype == base.dtype
    full = says(model)
    assert (stirred.float() - full).abs().max() < 0.1 < (full - base.float()).abs().max()


def test_a_cross_attention_takes_a_third_one_and_the_report_says_so():
    model = family_model("t5")
    report = lofi.add_adapter(model, HOULSBY)
    first = [m.path for m in report.matched if m.path.startswith("decoder.block.0.")]
    assert [path.rsplit(".", 2)[-2:] for path in first] == [
        ["SelfAttention", "o"], ["EncDecAttention", "o"], ["DenseReluDense", "wo"],
    ]  # fmt: skip
    assert report.notes == ["2 blocks have a cross-attention, which takes a bottleneck too: three a block"]
    assert report.trainable == 10 * (2 * 24 * 5 + 5 + 24)


@pytest.mark.parametrize(("family", "block"), [("llama", "model.layers.1"), ("bert_tags", "bert.encoder.layer.1"),
                                                ("t5", "decoder.block.1")])  # fmt: skip
def test_lin_acts_on_the_output_of_the_whole_block(family, block, monkeypatch):
    model = family_model(family)
    lofi.add_adapter(model, LIN)
    families.stir(model)
    module = model.get_submodule(block)
    part, run, plain = module.adapters["default"], Bottleneck.run, []
    seen: list[torch.Tensor] = []

    def watching(module, parts, base, *args, **kwargs):
        output = base(*args, **kwargs)
        plain.append((parts[0], hidden(output)))
        return run(module, parts, lambda: output)

    monkeypatch.setattr(Bottleneck, "run", staticmethod(watching))
    hook = module.register_forward_hook(lambda _, args, output: seen.append(hidden(output)))
    says(model)
    hook.remove()
    (before,) = [h for owner, h in plain if owner is part]
    assert torch.allclose(seen[0], paper(before, dict(part.named_parameters()), "relu"), atol=1e-5)
    assert not torch.allclose(seen[0], before, atol=1e-2)


def hidden(output):
    return output[0] if isinstance(output, tuple) else output


class Pair(nn.Module):
    """A module that returns its output in a tuple, as attentions do."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(7, 5)

    def forward(self, x):
        return self.inner(x), "weights", None


class Pairs(nn.Module):
    class config:
        hidden_size = 5

    def __init__(self):
        super().__init__()
        self.attention, self.mlp = Pair(), nn.Linear(5, 4)

    def forward(self, x):
        return self.mlp(self.attention(x)[0])


def test_of_a_tuple_the_first_is_adapted_and_the_rest_handed_on():
    torch.manual_seed(0)
    model, x = Pairs(), torch.randn(3, 7)
    base = model.attention(x)[0]
    lofi.add_adapter(model, HoulsbyConfig(bottleneck_size=3, attention_modules=["attention"], mlp_modules=["mlp"]))
    stir(model)
    y, *rest = model.attention(x)
    assert rest == ["weights", None]
    assert torch.allclose(y, paper(base, adapter_tensors(model), "gelu", "attention."), atol=1e-6)


def test_the_papers_start_is_a_small_truncated_normal_in_both_matrices():
    torch.manual_seed(0)
    model = toy()
    lofi.add_adapter(model, named(bottleneck_size=400, init="normal"))
    for key in ("up.down", "up.up"):
        weight = adapter_tensors(model)[key].detach()
        assert weight.abs().max() <= 0.02
        assert weight.std() == pytest.approx(0.01 * 0.8796, rel=0.05)  # of a normal cut at two deviations
    assert not adapter_tensors(model)["up.up_bias"].any() and not adapter_tensors(model)["up.down_bias"].any()
    fresh = toy()
    lofi.add_adapter(fresh, named())
    assert adapter_tensors(fresh)["up.down"].any() and not adapter_tensors(fresh)["up.up"].any()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("config", METHODS)
def test_a_quantized_base_takes_them_too(kind, config):
    model = quantized(family_model("llama"), kind)
    base = says(model)
    lofi.add_adapter(model, config)
    assert torch.equal(says(model), base)
    families.stir(model)
    says(model).pow(2).mean().backward()
    assert all(t.grad is not None and t.grad.any() for t in adapter_tensors(model).values())
    lofi.set_adapter(model, None)
    assert torch.equal(says(model), base)


@pytest.mark.parametrize("config", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_checkpointed_activations_give_the_same_gradients(family, config):
    model = family_model(family)
    lofi.add_adapter(model, config)
    families.stir(model)
    model.train()

    def gradients():
        model.zero_grad()
        torch.manual_seed(4)  # dropout is on: recomputation must draw again what the forward drew
        says(model).pow(2).mean().backward()
        return {key: t.grad.clone() for key, t in adapter_tensors(model).items()}

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    recomputed = gradients()
    assert all(plain[key].any() and torch.allclose(plain[key], recomputed[key], atol=1e-7) for key in plain)


@pytest.mark.parametrize("config", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_generation_with_a_cache_writes_what_it_writes_without(family, config):
    model = family_model(family)
    lofi.add_adapter(model, config)
    families.stir(model)
    tokens = torch.randint(3, V, (2, 6), generator=torch.Generator().manual_seed(2))
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached, plain = (model.generate(tokens, use_cache=cache, **settings) for cache in (True, False))
    assert torch.equal(cached, plain)
    lofi.set_adapter(model, None)
    assert not torch.equal(cached, model.generate(tokens, **settings))


def test_two_active_adapters_add_up_and_using_picks_one():
    model, x = toy(), torch.randn(4, 7)
    base = model.up(x)
    for name, seed in (("a", 3), ("b", 4)):
        lofi.add_adapter(model, named(bottleneck_size=2 + seed), name)
        stir(model, name, seed)
    alone = {}
    for name in ("a", "b"):
        with lofi.using(model, name):
            alone[name] = model.up(x)
    lofi.set_adapter(model, ["a", "b"])
    assert torch.allclose(model.up(x), alone["a"] + alone["b"] - base, atol=1e-5)
    assert not torch.allclose(alone["a"], alone["b"], atol=1e-2)


def test_with_lora_on_the_same_linear_the_bottleneck_sees_what_lora_makes_of_it_in_either_order():
    model, x = toy(), torch.randn(4, 7)
    lofi.add_adapter(model, lofi.LoraConfig(r=3, lora_alpha=5, target_modules=["up", "down"]), "lora")
    lofi.add_adapter(model, named(), "houlsby")
    stir(model, "lora"), stir(model, "houlsby", 4)
    with lofi.using(model, "lora"):
        updated = model.up(x)
    expected = paper(updated, adapter_tensors(model, "houlsby"), "gelu", "up.")
    for order in (["lora", "houlsby"], ["houlsby", "lora"]):
        with lofi.using(model, order):
            assert torch.allclose(model.up(x), expected, atol=1e-6)


def test_a_step_leaves_the_base_alone_and_a_copied_model_says_the_same():
    model = family_model("llama")
    before = {key: t.clone() for key, t in model.state_dict().items()}
    lofi.add_adapter(model, HOULSBY)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    says(model).pow(2).mean().backward()
    optimizer.step()
    assert all(torch.equal(model.state_dict()[key], t) for key, t in before.items())
    assert torch.equal(says(copy.deepcopy(model)), says(model))


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (LinConfig(bottleneck_size=224), 11_089_152),  # 11.09M
        (LinConfig(bottleneck_size=6), 368_784),  # 0.37M
        (HoulsbyConfig(bottleneck_size=112), 11_064_576),  # 11.09M in the paper, which lists one figure for both
    ],
)
def test_gpt2_medium_trains_the_numbers_of_parameters_of_the_papers_table_3(config, parameters):
    from transformers import GPT2Config, GPT2LMHeadModel

    blocks, width, size = 24, 1024, config.bottleneck_size
    each = 2 * width * size + size + width
    layers = {"houlsby": 2 * blocks, "adapter-lin": blocks}[config.method]
    norms = 0 if config.method == "houlsby" else blocks
    assert layers * each + norms * 2 * width == parameters  # LoRA, sec. 5.1
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=blocks, n_head=16))
        assert lofi.add_adapter(model, config).trainable == parameters


def test_modules_that_train_in_full_take_no_bottleneck():
    model = family_model("llama")
    report = lofi.add_adapter(model, HoulsbyConfig(bottleneck_size=3, modules_to_save=["layers.0.mlp.down_proj"]))
    kinds = {m.path: m.kind for m in report.matched}
    assert kinds["model.layers.0.mlp.down_proj"] == "copy" and kinds["model.layers.1.mlp.down_proj"] == "bottleneck"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (HOULSBY, r"Toy end a sublayer is not known by name; say it with attention_modules and mlp_modules"),
        (LIN, r"say it with mlp_modules \(linears in the blocks: none\)"),
        (named(mlp_modules=["fc9"]), r"mlp_modules 'fc9' matches no module"),
        (named(mlp_modules=["up"]), r"up is in attention_modules and in mlp_modules; name it in one"),
        (named(attention_modules=["norm"]), r"norm is a LayerNorm whose width is not known"),
    ],
)
def test_places_that_cannot_be_known_are_refused_in_one_sentence_and_nothing_is_touched(config, words):
    model = toy()
    with pytest.raises(TargetError, match=words) as caught:
        lofi.add_adapter(model, config)
    assert "\n" not in str(caught.value)
    assert type(model.up) is nn.Linear and "lofi_registry" not in model.__dict__


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"bottleneck_size": 0}, "bottleneck_size is 0, expected a whole number of at least 1"),
        ({"non_linearity": "swish"}, "non_linearity is 'swish', expected one of 'gelu', 'relu'"),
        ({"init": "xavier"}, "init is 'xavier', expected one of 'zero', 'normal'"),
    ],
)
@pytest.mark.parametrize("cls", [HoulsbyConfig, LinConfig])
def test_impossible_configs_are_refused(cls, values, words):
    with pytest.raises(RecipeError, match=words):
        cls(**values)
