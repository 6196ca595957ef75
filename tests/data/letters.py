"""Small tokenizers with a chosen habit, for the data room's tests."""

from __future__ import annotations

from typing import Any


def letters(*, metaspace: bool, template: str | None = None, frame: bool = False) -> Any:
    """A tokenizer of single characters, with SentencePiece's leading space or a [CLS] … [SEP] frame when asked."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    signs = [
        "<unk>",
        "<s>",
        "</s>",
        "[CLS]",
        "[SEP]",
        "\n",
        "▁",
        *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:.,!?#[]/",
    ]
    vocab = {sign: place for place, sign in enumerate(signs)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(sign, special=True) for sign in signs[:5]])
    if frame:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 3), ("[SEP]", 4)]
        )
    elif metaspace:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    result = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    result.chat_template = template
    return result
