"""The watch for numbers that are no longer numbers: tensor, step and rows are named, the batch is kept."""

from __future__ import annotations

import functools
import json
import operator

import pytest
import torch

from lofi.errors import NonFiniteError
from lofi.train.finite import bad_activation, bad_gradient
from lofi.train.trainer import LofiTrainer
from tiny_training import arguments, language_rows, tiny_llama, with_lora


def trainer_of(model, folder, **changes) -> LofiTrainer:
    return LofiTrainer(model=model, args=arguments(folder, **changes), train_dataset=language_rows())


def test_a_weight_that_is_nan_is_named_at_the_first_loss(tmp_path):
    model = with_lora(tiny_llama())
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[0, 0] = float("nan")
    with pytest.raises(
        NonFiniteError, match=r"the weight model\.layers\.1\.mlp\.gate_proj\.weight .* at step 1 on row"
    ):
        trainer_of(model, tmp_path).train()


def test_an_output_that_overflows_is_named_where_it_begins():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e30)
        model.model.layers[0].mlp.gate_proj.weight.mul_(1e30)
    named = bad_activation(model, {"input_ids": torch.tensor([[3, 4, 5]]), "labels": torch.tensor([[3, 4, 5]])})
    assert named == "the output of model.layers.0.mlp.down_proj"


def test_a_gradient_that_is_infinite_stops_the_step_before_it_is_taken(tmp_path):
    model = with_lora(tiny_llama())
    guilty = dict(model.named_parameters())
    name = next(n for n in guilty if "layers.1.self_attn.v_proj" in n and n.endswith("lora_B"))
    guilty[name].register_hook(lambda g: g * float("inf"))
    before = guilty[name].detach().clone()
    trainer = trainer_of(model, tmp_path)
    with pytest.raises(NonFiniteError, match=r"the gradient of model\.layers\.1\.self_attn\.v_proj\S* .* at step 1"):
        trainer.train()
    assert torch.equal(guilty[name], before)


def test_the_rows_named_are_the_rows_of_the_batch(tmp_path):
    rows = language_rows()
    bad = 17
    model = with_lora(tiny_llama(tie_word_embeddings=False))
    rows[bad]["input_ids"][0] = 60  # the one row that holds the poisoned token
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = float("inf")
    trainer = LofiTrainer(model=model, args=arguments(tmp_path), train_dataset=rows)
    trainer.row_names = lambda indices: [f"data.jsonl:{i + 1}" for i in indices]
    with pytest.raises(NonFiniteError, match=r"data\.jsonl:18"):
        trainer.train()
    dumped = json.loads((tmp_path / "nonfinite.json").read_text())
    assert "data.jsonl:18" in dumped["rows"] and len(dumped["rows"]) == 2
    assert 60 in functools.reduce(operator.iadd, dumped["inputs"]["input_ids"], [])


def test_a_finite_gradient_is_not_accused():
    assert bad_gradient([("a", torch.ones(3)), ("b", None)]) is None
    assert bad_gradient([("a", torch.ones(3)), ("b", torch.tensor([1.0, float("nan")]))]) == "b"
