"""`lofi generate`: one prompt, an answer from each adapter."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from lofi.cli import flags
from lofi.cli.output import speaking
from lofi.errors import RecipeError

Prompt = Annotated[
    str, typer.Option("--prompt", help="What to answer; - reads it from standard input.", show_default=False)
]
Temperature = Annotated[
    float | None, typer.Option("--temperature", help="Draw at this temperature; 0 is greedy.", min=0.0)
]
TopP = Annotated[float | None, typer.Option("--top-p", help="Draw from the likeliest tokens with this mass.")]


def generate(
    model: flags.Model,
    prompt: Prompt,
    adapter: flags.Adapters = None,
    max_new_tokens: flags.MaxNewTokens = 256,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: flags.Seed = 0,
    dtype: flags.Dtype = "auto",
    quantization: flags.Quantization = None,
    device: flags.Device = "auto",
    as_json: flags.Json = False,
) -> None:
    """Answer a prompt, with the base or with each adapter given.

    The text format that an adapter was trained with is used again. Decoding follows the model's generation config
    unless --temperature or --top-p is given.

    \b
    Examples:
      lofi generate --model ./Qwen3-0.6B --adapter runs/first --prompt "Summarize: ..."
      lofi generate --model ./Qwen3-0.6B --prompt - < question.txt
    """
    named = flags.named_adapters(adapter)
    text = read_prompt(prompt)
    with speaking(as_json) as out:
        from lofi.cli.opening import open_model, writers

        opened = open_model(model, named, dtype=dtype, device=device, quantization=quantization, seed=seed)
        sampling = sampling_of(temperature, top_p, seed)
        answers = [answer_of(opened, who, text, max_new_tokens, sampling, seed) for who in writers(opened)]
        out.answer({"prompt": text, "answers": answers})
        for answer in answers:
            if len(answers) > 1:
                out.show(f"{answer['who']}:")
            out.show(answer["text"])
            if not answer["stopped"]:
                out.note(f"{answer['who']}: cut after {max_new_tokens} tokens (--max-new-tokens)")


def read_prompt(prompt: str) -> str:
    """The prompt, from standard input for "-".

    Raises  RecipeError for an empty one
    """
    text = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt
    if not text.strip():
        where = "standard input is" if prompt == "-" else "--prompt is"
        raise RecipeError(f"{where} empty; give some text to answer")
    return text


def sampling_of(temperature: float | None, top_p: float | None, seed: int) -> Any:
    """The Sampling that the flags ask for; None (greedy) at temperature 0, "model" where nothing was asked."""
    if temperature is None and top_p is None:
        return "model"
    if temperature == 0:
        return None
    from lofi.evaluate.sampling import Sampling

    return Sampling(temperature=1.0 if temperature is None else temperature, top_p=top_p or 1.0, seed=seed)


def answer_of(opened: Any, who: str | None, prompt: Any, room: int, sampling: Any, seed: int) -> dict[str, Any]:
    """{"who", "text", "tokens", "stopped"} of one speaker."""
    import torch

    from lofi.adapters.switch import adapters_off, using
    from lofi.evaluate.generation import generate as write

    torch.manual_seed(seed)  # the model's own generation config draws from torch's stream
    with using(opened.model, who) if who else adapters_off(opened.model):
        (said,) = write(
            opened.model,
            opened.tokenizer,
            opened.format_of(who),
            [prompt],
            max_new_tokens=room,
            sampling=sampling,
        )
    return {"who": who or "base", "text": said.text, "tokens": len(said.ids), "stopped": said.stopped}
