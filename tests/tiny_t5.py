"""A tiny T5 that can summarise: built from a config, with a tokenizer of whole words, taught in seconds on one core.

Dialogues come from a small seeded grammar, each with two summaries: a plain one, which `teach` trains with torch alone,
and a second style, which an adapter then learns through lofi; ROUGE against the second style tells whether it did.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

NAMES = ("ann", "bob", "cid", "dora", "eve", "finn")
THINGS = ("key", "bag", "coat", "lamp", "book", "cup")
PLACES = ("car", "hall", "shed", "attic", "park", "shop")
OTHERS = "where", "is", "my", "the", "it", "in", "asks", "lost", "found", "by", "at", "and", "thanks"
WORDS = (*NAMES, *THINGS, *PLACES, ":", "?", ".", ";", *OTHERS)


def dialogue(draw: random.Random) -> dict[str, str]:
    """One dialogue with its plain summary ("plain") and the one in the second style ("second")."""
    one, other = draw.sample(NAMES, 2)
    thing, place = draw.choice(THINGS), draw.choice(PLACES)
    ending = draw.choice((f" {one} : thanks .", ""))
    return {
        "dialogue": f"{one} : where is my {thing} ? {other} : the {thing} is in the {place} .{ending}",
        "plain": f"{one} asks {other} where the {thing} is ; it is in the {place} .",
        "second": f"{thing} lost by {one} and found by {other} at the {place} .",
    }


def rows(count: int, seed: int, style: str = "second") -> list[dict[str, str]]:
    """prompt + completion rows of one style."""
    draw = random.Random(seed)
    made = [dialogue(draw) for _ in range(count)]
    return [{"prompt": one["dialogue"], "completion": one[style]} for one in made]


def write_rows(path: Path, given: list[dict[str, str]]) -> str:
    """The rows as a jsonl file; its path as text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
    return str(path)


def tokenizer() -> Any:
    """Whole words; <pad> 0, </s> 1, <unk> 2; </s> behind every text, as T5's own."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: place for place, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    made = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    made.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )


def t5(*, gated: bool = False, tied: bool = True, seed: int = 0, **changes: Any) -> Any:
    """A random T5 of two layers a side (V 38, D 40), with relative attention."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(WORDS) + 3, "d_model": 40, "d_kv": 12, "d_ff": 56, "num_layers": 2, "num_decoder_layers": 2,
        "num_heads": 3, "relative_attention_num_buckets": 16, "relative_attention_max_distance": 48,
        "feed_forward_proj": "gated-gelu" if gated else "relu", "tie_word_embeddings": tied, "dropout_rate": 0.0,
        "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
    }  # fmt: skip
    model = T5ForConditionalGeneration(T5Config(**(settings | changes))).eval()
    if not tied:  # as in the files of T5 1.1 and FLAN-T5; transformers ties every T5 that is not read from files
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.1)
    return model


def bart(seed: int = 0, **changes: Any) -> Any:
    """A random BART of one encoder and two decoder layers (V 38, D 40): biases, learned positions."""
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(WORDS) + 3, "d_model": 40, "encoder_layers": 1, "decoder_layers": 2, "dropout": 0.0,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 56, "decoder_ffn_dim": 56,
        "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
        "decoder_start_token_id": 1, "forced_eos_token_id": None, "scale_embedding": True, "init_std": 0.05,
    }  # fmt: skip
    return BartForConditionalGeneration(BartConfig(**(settings | changes))).eval()


def teach(model: Any, *, steps: int, style: str = "plain", seed: int = 1, rate: float = 5e-3) -> float:
    """Train all weights with torch alone on batches of 32 fresh dialogues; the last loss."""
    words, threads = tokenizer(), torch.get_num_threads()
    torch.set_num_threads(1)
    draw, loss = random.Random(seed), torch.zeros(())
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        made = [dialogue(draw) for _ in range(32)]
        read = words([one["dialogue"] for one in made], return_tensors="pt", padding=True)
        said = words([one[style] for one in made], return_tensors="pt", padding=True)
        labels = said.input_ids.masked_fill(said.attention_mask == 0, -100)
        loss = model(input_ids=read.input_ids, attention_mask=read.attention_mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    torch.set_num_threads(threads)
    return float(loss.detach())


def saved(model: Any, folder: Path) -> Path:
    """The model with its tokenizer, as a folder that lofi opens."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
