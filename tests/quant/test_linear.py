"""The frozen linears: products, gradients, casting, state dicts, and adapters on top of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lofi
from lofi.adapters.fused import reference
from lofi.adapters.registry import trainable_counts
from lofi.errors import TargetError
from lofi.quant.config import Int8Options, NF4Options
from lofi.quant.linear import Int8Linear, NF4Linear

OPTIONS = {
    "nf4": NF4Options(compute_dtype="float32"),
    "nf4 once": NF4Options(double_quant=False, compute_dtype="float32"),
    "int8": Int8Options(compute_dtype="float32"),
}


def dense(inputs=77, outputs=53, *, bias=True, seed=0):
    torch.manual_seed(seed)
    linear = nn.Linear(inputs, outputs, bias=bias)
    return linear.requires_grad_(False)


def frozen(kind, linear):
    cls = Int8Linear if kind == "int8" else NF4Linear
    return cls.from_dense(linear, OPTIONS[kind])


@pytest.fixture(params=list(OPTIONS))
def kind(request):
    return request.param


@pytest.mark.parametrize("rows", [1, 3, 16, 17])
@pytest.mark.parametrize("bias", [True, False])
def test_the_forward_is_the_product_with_the_dense_weight(kind, rows, bias):
    layer = frozen(kind, dense(bias=bias))
    x = torch.randn(2, rows, 77)
    expected = nn.functional.linear(x, layer.dense_weight(), layer.bias)
    tolerance = 0.02 if kind == "int8" else 1e-5  # int8 also rounds the activations
    torch.testing.assert_close(layer(x), expected, rtol=tolerance, atol=tolerance)


def test_the_input_gradient_is_the_product_with_the_dense_weight(kind):
    layer = frozen(kind, dense())
    x = torch.randn(4, 5, 77, requires_grad=True)
    g = torch.randn(4, 5, 53)
    layer(x).backward(g)
    torch.testing.assert_close(x.grad, g @ layer.dense_weight(), rtol=1e-5, atol=1e-5)


def test_a_bias_that_trains_gets_its_gradient(kind):
    layer = frozen(kind, dense())
    layer.bias.requires_grad_(True)
    layer(torch.randn(6, 77)).sum().backward()
    assert layer.bias.grad.tolist() == [6.0] * 53


def test_quantization_is_close_to_the_dense_weight_and_not_equal(kind):
    linear = dense()
    error = (frozen(kind, linear).dense_weight() - linear.weight).abs().max() / linear.weight.abs().max()
    assert 0 < error < (0.005 if kind == "int8" else 0.2)


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.type(torch.float16)])
def test_casting_leaves_codes_and_scales_alone(kind, cast):
    layer = frozen(kind, dense())
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items() if name != "bias"}
    cast(layer)
    for name, tensor in before.items():
        assert layer.state_dict()[name].dtype == tensor.dtype and torch.equal(layer.state_dict()[name], tensor)
    assert layer.bias.dtype in (torch.bfloat16, torch.float16)
    assert not layer.weight.requires_grad and isinstance(layer.weight, nn.Parameter)


def test_the_state_dict_comes_back_into_an_empty_layer(kind):
    layer = frozen(kind, dense())
    empty = type(layer)(77, 53, options=OPTIONS[kind], dense_dtype=torch.float32)
    empty.load_state_dict(copy.deepcopy(layer.state_dict()), strict=True)
    assert torch.equal(empty.dense_weight(), layer.dense_weight())


def test_the_output_has_the_inputs_dtype_and_autocasts_inside_autocast(kind):
    layer = frozen(kind, dense())
    assert layer(torch.randn(20, 77)).dtype == torch.float32
    assert layer(torch.randn(20, 77).bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(20, 77)).dtype == torch.bfloat16


def test_the_compute_dtype_decides_the_rounding_of_the_weight():
    linear = dense(bias=False)
    narrow = NF4Linear.from_dense(linear, NF4Options(compute_dtype="bfloat16"))
    x = torch.randn(20, 77)
    expected = (x.bfloat16() @ narrow.dense_weight(torch.bfloat16).t()).float()
    assert torch.equal(narrow(x), expected)


def test_a_checkpointed_and_a_plain_pass_give_the_same_gradients(kind):
    model = nn.Sequential(frozen(kind, dense()), nn.Tanh(), frozen(kind, dense(53, 31)))
    lofi.add_adapter(model, lofi.LoraConfig(r=3, lora_alpha=5, init_lora_weights=False))
    x = torch.randn(6, 77)
    gradients = []
    for checkpointed in (False, True):
        model.zero_grad()
        run = torch.utils.checkpoint.checkpoint if checkpointed else lambda f, x, **_: f(x)
        run(model, x, use_reentrant=False).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert gradients[0] and all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_an_adapter_on_top_is_the_low_rank_reference(kind):
    model = nn.Sequential(frozen(kind, dense()))
    lofi.add_adapter(model, lofi.LoraConfig(r=3, lora_alpha=5, init_lora_weights=False))
    layer, part = model[0], model[0].adapters["default"]
    x = torch.randn(40, 77, requires_grad=True)
    if kind == "int8":  # the base product rounds the activations: compare what the adapter adds
        with torch.no_grad(), lofi.adapters_off(model):
            base = model(x)
        expected = base + reference(x, part.lora_A, part.lora_B, None, torch.zeros(53, 77), scale=part.scale)
    else:
        expected = reference(x, part.lora_A, part.lora_B, layer.bias, layer.dense_weight(), scale=part.scale)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    gradients = torch.autograd.grad(model(x).square().sum(), [x, part.lora_A, part.lora_B])
    assert all(g.abs().sum() > 0 for g in gradients)


def test_with_the_adapter_off_the_base_is_bit_equal(kind):
    model = nn.Sequential(frozen(kind, dense()))
    x = torch.randn(40, 77)
    before = model(x)
    lofi.add_adapter(model, lofi.LoraConfig(r=3, lora_alpha=5, init_lora_weights=False))
    assert not torch.equal(model(x), before)
    with lofi.adapters_off(model):
        assert torch.equal(model(x), before)
    lofi.unload(model)
    assert type(model[0]) in (NF4Linear, Int8Linear) and torch.equal(model(x), before)


def test_a_packed_weight_counts_the_elements_it_stands_for(kind):
    model = nn.Sequential(frozen(kind, dense()))
    lofi.add_adapter(model, lofi.LoraConfig(r=3))
    assert trainable_counts(model) == (3 * (77 + 53), 53 * 77 + 53 + 3 * (77 + 53))


def test_merging_gives_dense_linears_and_leaves_the_quantized_model_alone(kind):
    model = nn.Sequential(frozen(kind, dense()), nn.Tanh(), frozen(kind, dense(53, 31)))
    lofi.add_adapter(model, lofi.LoraConfig(r=3, lora_alpha=5, target_modules=["2"], init_lora_weights=False))
    x = torch.randn(4, 77)
    expected = model(x)
    merged = lofi.merge_and_unload(model)
    assert type(merged[2]) is nn.Linear and type(merged[0]) in (NF4Linear, Int8Linear)
    assert torch.equal(model(x), expected)
    tolerance = 0.02 if kind == "int8" else 1e-5
    torch.testing.assert_close(merged(x), expected, rtol=tolerance, atol=tolerance)


def test_training_a_quantized_module_in_full_is_refused(kind):
    model = nn.Sequential(frozen(kind, dense()), frozen(kind, dense(53, 31)))
    with pytest.raises(TargetError, match=r"quantized.*skip_modules"):
        lofi.add_adapter(model, lofi.LoraConfig(target_modules=["0"], modules_to_save=["1"]))
    assert trainable_counts(model)[0] == 0


def test_layers_of_the_meta_device_have_shapes_and_no_memory(kind):
    layer = type(frozen(kind, dense()))(4096, 11008, options=OPTIONS[kind], device="meta")
    assert layer.weight.device.type == "meta" and layer.logical_shape == (11008, 4096)
    assert lofi.add_adapter(nn.Sequential(layer), lofi.LoraConfig(r=2)).trainable == 2 * (4096 + 11008)
