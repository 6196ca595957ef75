"""Text as it is written, token by token, to stdout.

Knows  transformers' streamer. Rejected  a thread with an iterator: a callback prints as well and is never left running.
"""

from __future__ import annotations

import sys
from typing import Any


def stream(opened: Any, rule: Any, ids: list[int], room: int, sampling: Any) -> str:
    """Generate from prompt ids, printing each piece; the whole answer. One row, so nothing is padded."""
    import torch
    from transformers import TextStreamer

    model, pair = opened.model, rule.kind == "seq2seq"
    printer = TextStreamer(opened.tokenizer, skip_prompt=not pair, skip_special_tokens=True)
    prompt = torch.tensor([ids], device=model.device)  # (1, T)
    given = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "streamer": printer}
    with torch.no_grad():
        written = model.generate(**given, generation_config=_settings(rule, room, sampling))
    sys.stdout.flush()
    return rule.decode(written[0, 1 if pair else len(ids) :].tolist())


def _settings(rule: Any, room: int, sampling: Any) -> Any:
    """Greedy for None, the model's own way for "model", else drawn from torch's random stream; never beams."""
    from transformers import GenerationConfig

    fixed: dict[str, Any] = {"eos_token_id": list(rule.stop_ids), "pad_token_id": rule.stop_ids[0]}
    fixed |= {"max_new_tokens": room, "num_beams": 1}
    if sampling is None:
        return GenerationConfig(**fixed, do_sample=False)
    if sampling == "model":
        return GenerationConfig(**fixed)
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    return GenerationConfig(**fixed, do_sample=True, **drawn)
