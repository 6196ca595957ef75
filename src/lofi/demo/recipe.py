"""The training recipe of the demo: what was found to reach its figures in the time the demo has.

Knows numbers, and why each is what it is; runs nothing. Found on two CPU cores, one training row seen once:
- 500 steps of 16 rows, not 250 of 32: the same tokens then teach more;
- a learning rate of 3e-3, far above the usual 2e-4: the model is tiny; 1e-2 was worse again;
- rank 16 does as well as 32, and costs less;
- the row of `<|im_end|>` is trained (`trainable_token_indices`): in lofi-tiny it equals, to 1 %, the rows of 87 tokens
  that pretraining never saw, so with a frozen embedding nothing can tell the end of an answer from `<|pad|>`;
- rows of similar length padded side by side, not packed: attention over long packed rows costs more than the padding
  (`python -m bench attention`).
Rejected: more rows about the same schemas; what carries over to unseen names is another random schema in every row.
"""

from __future__ import annotations

from pathlib import Path

from lofi.recipe import Recipe, make_recipe

TRAIN_ROWS = 8000
TEST_ROWS = 120
ROWS_A_STEP = 16
RANK = 16
ALPHA = 32
LEARNING_RATE = 3e-3
WARMUP_STEPS = 10
MAX_NEW_TOKENS = 64


def demo_recipe(*, model: Path, train: Path, output: Path, seed: int, stop_id: int) -> Recipe:
    """The recipe of the demo's run; `stop_id` is the token that ends an answer, whose embedding row is trained too."""
    return make_recipe(
        {
            "model": str(model),
            "lora": {"r": RANK, "lora_alpha": ALPHA, "trainable_token_indices": [stop_id]},
            "data": {"train": str(train)},
            "train": {
                "epochs": 1.0,
                "micro_batch_size": ROWS_A_STEP,
                "gradient_accumulation_steps": 1,
                "learning_rate": LEARNING_RATE,
                "scheduler": "cosine",
                "warmup_steps": WARMUP_STEPS,
                "seed": seed,
            },
            "output": str(output),
        }
    )
