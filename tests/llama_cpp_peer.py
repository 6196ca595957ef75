"""Run by a Python that has llama-cpp-python: what llama.cpp itself says to a GGUF file, as JSON on stdout.

python llama_cpp_peer.py MODEL.gguf [ADAPTER.gguf] < {"ids": [[..]], "texts": [..], "room": 256, "new": 8}
"""

from __future__ import annotations

import json
import sys

import llama_cpp


def main(model: str, adapter: str | None = None) -> None:
    job = json.load(sys.stdin)
    float32 = 0  # ggml's number of the type of keys and values
    llm = llama_cpp.Llama(
        model, n_ctx=job["room"], lora_path=adapter, logits_all=True, verbose=False, n_threads=1, type_k=float32,
        type_v=float32,
    )  # fmt: skip
    said: dict[str, list] = {"logits": [], "greedy": [], "ids": []}
    for ids in job["ids"]:
        llm.reset()
        llm.eval(ids)
        said["logits"].append(llm.scores[: len(ids)].tolist())
        drawn = []
        for _ in range(job["new"]):
            drawn.append(int(llm.scores[llm.n_tokens - 1].argmax()))
            llm.eval(drawn[-1:])
        said["greedy"].append(drawn)
    for text in job["texts"]:
        said["ids"].append(llm.tokenize(text.encode(), add_bos=True, special=True))
    json.dump(said, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
