"""README.md and scripts of what is handed over: the commands of each engine, one machine or several, and how to verify.

Knows command lines, written from the engines' documentation; lofi does not run them.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

_VERIFY = """
## Is it the same?

lofi replays the golden prompts that were recorded when the adapter was trained (tokens, log probabilities, stops, and
what the server's chat template makes of a question), and says what differs:

```sh
{command}
```

Where the server computes more coarsely than the adapter was recorded, say so: `--dtype bf16` for bfloat16 and for q8_0
files, `--dtype fp16` for float16 ones.
"""


def _verify(adapter: str, url: str, name: str) -> str:
    command = f"lofi verify {shlex.quote(adapter)} --endpoint {url} --endpoint-model {shlex.quote(name)}"
    return _VERIFY.format(command=command)


def merged(name: str, adapter: str) -> str:
    """README.md of a merged folder."""
    return f"""# {name}, merged

A model folder like any other: it needs no lofi. `lofi_merge.json` says what it was made of and how close it is.

```sh
lofi serve --model .
vllm serve . --served-model-name {shlex.quote(name)}
```

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(".")
```
{_verify(adapter, "http://127.0.0.1:8000", name)}"""


def vllm_command(name: str, base: str, max_lora_rank: int, template: bool) -> list[str]:
    """The command line that serves base and adapter, run in the folder that was handed over."""
    where = os.path.abspath(base) if Path(base).exists() else base
    words = ["vllm", "serve", where, "--enable-lora", "--max-lora-rank", str(max_lora_rank), "--max-loras", "8"]
    words += ["--lora-modules", f"{name}=./adapter", "--generation-config", "."]
    return [*words, "--chat-template", "./chat_template.jinja"] if template else words


def script(command: Sequence[str]) -> str:
    """serve.sh: the command with whatever flags are given to the script."""
    return f"""#!/bin/sh
# sh serve.sh [more flags of vllm serve]
cd "$(dirname "$0")" || exit 1
exec {shlex.join(command)} "$@"
"""


def vllm(name: str, base: str, command: Sequence[str], max_lora_rank: int) -> str:
    """README.md of an adapter for vLLM."""
    said = shlex.join(command)
    return f"""# {name} for vLLM

`adapter/` is a LoRA folder that keeps vLLM's rules. Its base is {base}; its largest rank needs
`--max-lora-rank {max_lora_rank}` or more. vLLM knows the adapter by the model name `{name}`, and answers with the bare
base to the base's own name.

## One machine

```sh
{said}
```

`serve.sh` is this command. `--generation-config .` makes vLLM end answers where training ended them. `--max-loras` is
how many adapters one batch may mix; every one of them takes memory of the largest rank, so keep the two small.

## Several adapters

Name every folder (`--lora-modules a=./a/adapter b=./b/adapter`), with the largest of their ranks. To load and unload
while it runs, start it with `VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`, behind a proxy that lets nobody else reach:

```sh
curl -X POST http://127.0.0.1:8000/v1/load_lora_adapter -H 'Content-Type: application/json' \\
  -d '{{"lora_name": "{name}", "lora_path": "'"$PWD"'/adapter"}}'
curl -X POST http://127.0.0.1:8000/v1/unload_lora_adapter -H 'Content-Type: application/json' \\
  -d '{{"lora_name": "{name}"}}'
```

vLLM serves the bare base where an adapter's module names match nothing (vllm issue 34186), so verify each once.

## Several GPUs, several machines

```sh
sh serve.sh --tensor-parallel-size 4        # a base too large for one GPU, over those of one machine
sh serve.sh --data-parallel-size 4          # more requests: four copies on one machine behind one address

# four copies over two machines of two GPUs each, one address (the first machine's)
sh serve.sh --data-parallel-size 4 --data-parallel-size-local 2 \\
  --data-parallel-address FIRST --data-parallel-rpc-port 13345
sh serve.sh --headless --data-parallel-size 4 --data-parallel-size-local 2 --data-parallel-start-rank 2 \\
  --data-parallel-address FIRST --data-parallel-rpc-port 13345
```

Or start this folder's `serve.sh` on every machine, behind any HTTP load balancer: copies share nothing. Then load every
adapter on every copy before it takes requests, and let the balancer keep one adapter's requests together.
{_verify("adapter", "http://127.0.0.1:8000", name)}"""


def gguf(name: str, adapter: str, model: bool, alone: bool) -> str:
    """README.md of GGUF files for llama.cpp."""
    parts = []
    if model:
        parts.append(
            "`model.gguf` is base and adapter as one model:\n\n```sh\n"
            f"llama-server -m model.gguf --alias {shlex.quote(name)} --jinja\n```"
        )
    if alone:
        parts.append(
            "`adapter.gguf` is the adapter alone, for a GGUF of its base; several may be loaded, and each request\n"
            'chooses with `"lora": [{"id": 0, "scale": 1.0}]`:\n\n```sh\n'
            f"llama-server -m BASE.gguf --lora adapter.gguf --alias {shlex.quote(name)} --jinja\n```\n\n"
            "The multiplier is folded into its factors, for llama.cpp reads neither rsLoRA nor patterns. It does not\n"
            "batch requests with different adapters together: for many of them use `lofi serve` or vLLM."
        )
    body = "\n\n".join(parts)
    return f"# {name} for llama.cpp\n\n{body}\n{_verify(adapter, 'http://127.0.0.1:8080', name)}"


def ollama(name: str, adapter: str, notes: Sequence[str]) -> str:
    """README.md of an Ollama model."""
    quoted = shlex.quote(name)
    told = "".join(f"- {note}\n" for note in notes)
    known = f"\n## What is otherwise than in training\n\n{told}" if told else ""
    return f"""# {name} for Ollama

```sh
ollama create {quoted} -f Modelfile
ollama run {quoted}
```

`Modelfile` has the chat template in Ollama's own language, compared with the tokenizer's over conversations of several
lengths, the stop texts, and the model's way of drawing: Ollama's defaults (temperature 0.8, a repeat penalty of 1.1)
are not in use.
{known}{_verify(adapter, "http://127.0.0.1:11434", name)}"""
