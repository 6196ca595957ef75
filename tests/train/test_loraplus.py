"""LoRA+: B learns so many times faster than A; starts that split the weight never train one factor alone."""

from __future__ import annotations

import pytest
import torch

import lofi
from lofi.adapters.registry import adapter_state
from lofi.errors import RecipeError, RequestError
from lofi.train.checkpoint import read_weights
from lofi.train.trainer import LofiTrainer
from tiny_training import arguments, language_rows, tiny_llama, trained_tensors, with_lora

SPLITS = ("olora", "pissa", "pissa_niter_3")


def trainer(model, folder, ratio=None, **changes) -> LofiTrainer:
    return LofiTrainer(
        model=model, args=arguments(folder, **changes), train_dataset=language_rows(), loraplus_lr_ratio=ratio
    )


def is_b(name: str) -> bool:
    return name.endswith(("lora_B", "lora_embedding_B"))


def moved_by_sgd(folder, ratio):
    """name -> change of each tensor by one step of plain SGD, where the change is rate * gradient."""
    model = with_lora(
        tiny_llama(tie_word_embeddings=False), target_modules=["v_proj", "embed_tokens", "q_proj"],
        lora_dropout=0.0, init_lora_weights=False, modules_to_save=["norm"],
    )  # fmt: skip
    before = trained_tensors(model)
    settings = {"max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 1.0, "save_strategy": "no"}
    trainer(model, folder, ratio, **settings).train()
    return {name: now - before[name] for name, now in trained_tensors(model).items()}


def test_b_moves_ratio_times_as_far_and_everything_else_as_before(tmp_path):
    plain, quick = moved_by_sgd(tmp_path / "a", None), moved_by_sgd(tmp_path / "b", 7.0)
    assert any(map(is_b, plain)) and any("embedding_B" in name for name in plain) and any("norm" in n for n in plain)
    for name, change in plain.items():
        expected = 7.0 * change if is_b(name) else change
        assert change.any(), name
        assert torch.allclose(quick[name], expected, rtol=1e-2, atol=2e-6), name


def test_the_groups_keep_their_decay_and_their_tensors(tmp_path):
    model = with_lora(tiny_llama(), bias="none", modules_to_save=["norm"])
    made = trainer(model, tmp_path, 16, weight_decay=0.05).create_optimizer()
    named = {id(p): name for name, p in model.named_parameters()}
    seen = {named[id(p)]: (group["lr"], group["weight_decay"]) for group in made.param_groups for p in group["params"]}
    assert seen.keys() == trained_tensors(model).keys()
    for name, (rate, decay) in seen.items():
        assert rate == pytest.approx(0.16 if is_b(name) else 0.01), name
        assert decay == (0.0 if "norm" in name else 0.05), name
    assert made.param_groups[0]["lr"] == 0.01  # what the log calls the learning rate is A's


def test_a_ratio_of_one_is_plain_lora_bit_for_bit(tmp_path):
    ends = []
    for ratio in (None, 1.0):
        model = with_lora(tiny_llama())
        trainer(model, tmp_path / str(ratio), ratio, max_steps=3, save_strategy="no").train()
        ends.append(trained_tensors(model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize(("init", "dora"), [(True, False), ("pissa", False), ("olora", True)])
def test_a_resumed_run_ends_bit_for_bit_where_the_whole_one_does(init, dora, tmp_path):
    changes = {"init_lora_weights": init, "use_dora": dora, "r": 2}
    whole = with_lora(tiny_llama(), **changes)
    trainer(whole, tmp_path, 4.0, max_steps=6, save_steps=3).train()
    again = with_lora(tiny_llama(), seed=77, **changes)
    trainer(again, tmp_path, 4.0, max_steps=6, save_steps=3).train(str(tmp_path / "checkpoint-3"))
    ends = adapter_state(whole), adapter_state(again)
    assert ends[0].keys() == ends[1].keys()
    assert any("start_A" in name for name in ends[0]) == (init is not True)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_checkpoint_brings_back_what_the_factors_are_counted_from(tmp_path):
    model = with_lora(tiny_llama(), init_lora_weights="pissa_niter_1")  # a randomised start: another seed, another one
    trainer(model, tmp_path, max_steps=2, save_steps=2).train()
    other = with_lora(tiny_llama(), seed=6, init_lora_weights="pissa_niter_1")
    start = "model.layers.0.mlp.up_proj.start_A"
    assert not torch.equal(adapter_state(model)[start], adapter_state(other)[start])
    read_weights(other, tmp_path / "checkpoint-2")
    assert torch.equal(adapter_state(model)[start], adapter_state(other)[start])
    ids = torch.arange(3, 12)[None]
    assert torch.equal(model.eval()(ids).logits, other.eval()(ids).logits)


@pytest.mark.parametrize("init", ["olora", "pissa", "orthogonal"])
@pytest.mark.parametrize("dora", [False, True])
def test_everything_moves_in_the_first_updates_though_both_factors_start_in_use(init, dora, tmp_path):
    model = with_lora(tiny_llama(), r=2, init_lora_weights=init, use_dora=dora)
    run = trainer(model, tmp_path, save_strategy="no", max_steps=2)
    run.train()
    assert run.proof.lines == [f"first steps: all {42 if dora else 28} trained tensors moved"]


def test_a_split_start_whose_a_stands_still_is_found_at_the_first_update(tmp_path):
    model = with_lora(tiny_llama(), init_lora_weights="olora")
    model.model.layers[1].mlp.up_proj.adapters["default"].lora_A.register_hook(torch.zeros_like)
    with pytest.raises(lofi.ProofError, match=r"after the first update: model\.layers\.1\.mlp\.up_proj\S*lora_A"):
        trainer(model, tmp_path, save_strategy="no").train()


@pytest.mark.parametrize("init", SPLITS)
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_frozen_factor_after_a_split_start_is_refused(init, factor, tmp_path):
    model = with_lora(tiny_llama(), init_lora_weights=init)
    getattr(model.model.layers[0].mlp.up_proj.adapters["default"], factor).requires_grad_(False)
    with pytest.raises(
        RequestError, match=rf"layers\.0\.mlp\.up_proj\.{factor} is frozen, but after .*{init}'"
    ) as told:
        trainer(model, tmp_path)
    assert "start from True" in str(told.value)


def test_a_factor_frozen_between_making_the_trainer_and_training_is_refused_too(tmp_path):
    model = with_lora(tiny_llama(), init_lora_weights="olora")
    run = trainer(model, tmp_path)
    model.model.layers[0].mlp.up_proj.adapters["default"].lora_A.requires_grad_(False)
    with pytest.raises(RequestError, match="is frozen"):
        run.train()


def test_a_frozen_a_without_a_split_start_trains_as_lora_fa(tmp_path):
    model = with_lora(tiny_llama())
    for name, parameter in model.named_parameters():
        if name.endswith("lora_A"):
            parameter.requires_grad_(False)
    run = trainer(model, tmp_path, max_steps=2, save_strategy="no")
    run.train()
    assert run.proof.lines == ["first steps: all 14 trained tensors moved"]


def test_what_has_no_factors_is_refused_with_the_reason(tmp_path):
    with pytest.raises(RequestError, match="but full fine-tuning has no LoRA factors; leave it out, or train with"):
        trainer(tiny_llama(), tmp_path, 16)
    model = tiny_llama()
    lofi.add_adapter(model, lofi.HoulsbyConfig(bottleneck_size=3))
    with pytest.raises(RequestError, match="houlsby has no LoRA factors"):
        trainer(model, tmp_path, 16)
    with pytest.raises(RequestError, match=r"loraplus_lr_ratio is 0, expected a finite number above 0"):
        trainer(with_lora(tiny_llama()), tmp_path, 0)


def test_an_optimizer_of_ones_own_is_not_split_in_silence(tmp_path):
    model = with_lora(tiny_llama())
    own = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(RequestError, match="another was given; leave one of them out"):
        LofiTrainer(model=model, args=arguments(tmp_path), optimizers=(own, None), loraplus_lr_ratio=2.0)


@pytest.mark.parametrize(("method", "refused"), [("full", True), ("houlsby", True), ("lora", False), ("qlora", False)])
def test_a_recipe_is_refused_before_anything_is_read(method, refused, tmp_path):
    from lofi.recipe import Recipe
    from lofi.train.loop import refuse_early

    recipe = Recipe.model_validate(
        {"model": "nowhere", "method": method, "data": {"train": "none.jsonl"}, "output": str(tmp_path / "run"),
         "train": {"loraplus_lr_ratio": 16}}
    )  # fmt: skip
    if not refused:
        assert refuse_early(recipe) is None
        return
    with pytest.raises(RecipeError, match=r"train\.loraplus_lr_ratio is set, but .* has no LoRA factors"):
        refuse_early(recipe)
