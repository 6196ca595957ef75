"""Which attention trains faster, and that either gives the same numbers."""

from __future__ import annotations

import pytest
import torch

from lofi.models.attention import choose_attention, set_attention
from lofi.models.load import load_model

ROOM = {"compute": torch.bfloat16, "row_tokens": 100, "forward_tokens": 2048, "free_bytes": 8 * 2**30}


@pytest.fixture
def model(lofi_tiny):
    return load_model(lofi_tiny, dtype="fp32")


def test_short_rows_in_bf16_on_a_cpu_get_plain_products(model):
    assert choose_attention(model, **ROOM).name == "eager"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"row_tokens": 513}, "the fused kernel wins"),
        ({"compute": torch.float32}, "the fused kernel wins"),
        ({"free_bytes": 2**20}, "GiB of scores"),
    ],
)
def test_long_rows_float32_and_little_memory_keep_the_fused_kernel(model, change, word):
    chosen = choose_attention(model, **(ROOM | change))
    assert chosen.name == "sdpa"
    assert word in chosen.reason


def test_what_the_user_chose_stays(model):
    model.set_attn_implementation("eager")
    assert choose_attention(model, **(ROOM | {"row_tokens": 2048})) == ("eager", "the model's own")


def test_either_attention_gives_the_same_logits(model):
    ids = torch.randint(4, 900, (2, 9), generator=torch.Generator().manual_seed(0))
    fused = model(ids).logits
    set_attention(model, "eager")
    assert model.config._attn_implementation == "eager"
    assert torch.allclose(model(ids).logits, fused, atol=1e-4)
