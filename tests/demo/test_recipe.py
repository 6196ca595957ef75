"""The demo's recipe is one that lofi accepts, and it trains the token that ends an answer."""

from __future__ import annotations

from pathlib import Path

from lofi.demo.recipe import LEARNING_RATE, ROWS_A_STEP, demo_recipe


def test_the_recipe_trains_the_stop_tokens_row_and_says_where_each_value_came_from():
    recipe = demo_recipe(model=Path("m"), train=Path("d/train.jsonl"), output=Path("o"), seed=5, stop_id=3)
    assert recipe.lora.to_config().trainable_token_indices == [3]
    assert (recipe.train.learning_rate, recipe.train.micro_batch_size) == (LEARNING_RATE, ROWS_A_STEP)
    assert (recipe.model, recipe.data.train, recipe.output, recipe.train.seed) == ("m", "d/train.jsonl", "o", 5)
    assert recipe.origins["train.learning_rate"] == "command line"
