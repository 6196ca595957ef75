"""Tiny random models and rows for the trainer's tests: odd sizes, rank != alpha, dropout on, seeded."""

from __future__ import annotations

import torch


def tiny_llama(seed: int = 0, **changes):
    """A random Llama of 2 layers with tied embeddings (V 61, D 24, I 40)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {
        "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3,
        "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "tie_word_embeddings": True,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "attn_implementation": "sdpa",
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()


def tiny_t5(seed: int = 0, **changes):
    """A random T5 of 2 layers (V 53, D 24)."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=53, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3, decoder_start_token_id=0, pad_token_id=0,
        **changes,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def tiny_bert(kind: str = "SequenceClassification", seed: int = 0, **changes):
    """A random BERT of 2 layers with a head of 3 classes (V 57, D 24)."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=57, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
        max_position_embeddings=48, num_labels=3, **changes,
    )  # fmt: skip
    return getattr(transformers, f"BertFor{kind}")(config).eval()


def language_rows(count: int = 23, vocabulary: int = 53, seed: int = 3, prompt: int = 2) -> list[dict]:
    """Rows of 5 to 13 tokens whose first `prompt` are not trained."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(5, 14, (), generator=generator))
        ids = torch.randint(3, vocabulary, (length,), generator=generator)
        labels = ids.clone()
        labels[:prompt] = -100
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return rows


def with_lora(model, seed: int = 5, **changes):
    """The model with a LoRA adapter of rank 3, alpha 7 on all linears."""
    import lofi

    torch.manual_seed(seed)
    lofi.add_adapter(model, lofi.LoraConfig(**({"r": 3, "lora_alpha": 7, "lora_dropout": 0.1} | changes)))
    return model


def arguments(folder, **changes):
    """TrainingArguments for a quiet CPU run of 12 steps."""
    from transformers import TrainingArguments

    settings = {
        "output_dir": str(folder), "max_steps": 12, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2, "logging_steps": 5, "save_steps": 4, "report_to": "none",
        "use_cpu": True, "disable_tqdm": True, "seed": 11,
        "log_level": "error",
    }  # fmt: skip
    return TrainingArguments(**(settings | changes))


def trained_tensors(model) -> dict:
    """Copies of everything that trains."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
