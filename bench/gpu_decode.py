"""On a GPU: decoding 32 sequences, 8 adapters over the base only, a 7B shape in bf16.

One step of one token a sequence with 256 tokens of keys and values behind each, as the engine's forward does it but
with transformers' own static cache, recorded as a graph, so that launching does not count; LoRA r=16 on every linear.
Times are the device's, by events. Beside it the Triton kernel alone against plain torch on one linear of that shape.
vLLM's published figure for one adapter is 1.5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.checkpoints import SEVEN_B, Shape
from bench.claim import line
from bench.gpu import Calls, graph, timed
from bench.served import SPREAD

NO_GPU = "bench gpu_decode needs a CUDA or ROCm GPU and this machine has none: nothing was measured."
SEQUENCES, ADAPTERS, RANK, PAST = 32, 8, 16, 256


def run(rounds: int = 30, shape: Shape = SEVEN_B) -> list[dict[str, Any]]:
    """Ratios of device times; no rows, and one sentence, where there is no GPU."""
    if not torch.cuda.is_available():
        print(NO_GPU)
        return []
    decode = timed({name: graph(call) for name, call in decoding(shape, "cuda").items()}, rounds)
    kernel = timed({name: graph(call) for name, call in products(shape, "cuda").items()}, rounds)
    return [
        line("decoding 32 sequences, 8 adapters, 7B, over the base", decode.ratio("8 adapters", "base"),
             goal="<= 1.10", times_ms={name: decode.ms(name) for name in decode.seconds}),
        line("32 rows of 8 adapters, one linear: plain torch over the kernel", kernel.ratio("plain torch", "kernel"),
             times_ms={name: kernel.ms(name) for name in kernel.seconds}),
        line("32 rows of 8 adapters, one linear: the kernel over the linear itself", kernel.ratio("kernel", "linear")),
    ]  # fmt: skip


def route(count: int, device: str) -> torch.Tensor:
    """Sequence m has adapter m modulo 8: (M,) int32."""
    return (torch.arange(count, device=device) % ADAPTERS).to(torch.int32)


def decoding(shape: Shape, device: str) -> dict[str, Callable[[], Any]]:
    """One step of the base, and the same step with each sequence's adapter, on one model; both return the logits."""
    from transformers import AutoModelForCausalLM

    from lofi.adapters.batched import AdapterBank
    from lofi.quant.kernels.dispatch import low_rank_for

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape.config(), dtype=torch.bfloat16).eval()
    bank = AdapterBank(model, slots=ADAPTERS, product=low_rank_for(torch.device(device)))
    for slot in range(ADAPTERS):
        bank.place(random_packed(shape, slot), slot)
    step = _step(model, shape, device)
    return {"base": step, "8 adapters": _routed(bank, route(SEQUENCES, device), step)}


def random_packed(shape: Shape, seed: int) -> Any:
    """An adapter as a bank takes it, r=16 on every linear, without going through a model: (R, I) and (R, O)."""
    from lofi.adapters.batched_pack import Packed, PackedLinear

    generator = torch.Generator().manual_seed(seed)

    def drawn(*size: int) -> torch.Tensor:
        return torch.empty(size).normal_(std=SPREAD, generator=generator).bfloat16()

    parts = {
        f"model.layers.{layer}.{name}": PackedLinear(a=drawn(RANK, inner), b=drawn(RANK, out))
        for layer in range(shape.layers)
        for name, (out, inner) in shape.linears().items()
    }
    return Packed(parts=parts, rank=RANK)


def _step(model: Any, shape: Shape, device: str) -> Callable[[], Any]:
    """One token for each sequence behind PAST others, whose keys and values are random; it may be repeated."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=PAST + 1)
    with torch.inference_mode():
        model(torch.randint(3, shape.vocab, (SEQUENCES, PAST), device=device), past_key_values=cache, logits_to_keep=1)
    ids = torch.randint(3, shape.vocab, (SEQUENCES, 1), device=device)  # (N, 1)
    place = torch.full((SEQUENCES, 1), PAST, device=device)
    mask = torch.zeros(SEQUENCES, 1, 1, PAST + 1, dtype=torch.bfloat16, device=device)  # (N, 1, 1, L): all are seen

    @torch.inference_mode()
    def call() -> Any:
        for layer in cache.layers:
            layer.cumulative_length.fill_(PAST)
        return model(ids, attention_mask=mask, position_ids=place, past_key_values=cache).logits

    return call


def _routed(bank: Any, slots: torch.Tensor, step: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> Any:
        with bank.routed(slots):
            return step()

    return call


def products(shape: Shape, device: str, rows: int = SEQUENCES) -> Calls:
    """The low-rank product of one up-projection, by the device's kernel and by plain torch, and the linear itself."""
    from lofi.adapters.batched_product import PLAIN
    from lofi.quant.kernels.dispatch import low_rank_for

    generator = torch.Generator().manual_seed(0)

    def drawn(*size: int) -> torch.Tensor:
        return torch.empty(size).normal_(std=SPREAD, generator=generator).to(device, torch.bfloat16)

    a, b = drawn(ADAPTERS, RANK, shape.dim), drawn(ADAPTERS, RANK, shape.ffn)  # (S, R, I), (S, R, O)
    ranks = torch.full((ADAPTERS,), RANK, dtype=torch.int32, device=device)
    x, weight, out = drawn(rows, shape.dim), drawn(shape.ffn, shape.dim), drawn(rows, shape.ffn)  # (M, I)
    slots, chosen = route(rows, device), low_rank_for(torch.device(device))
    bound = {"kernel": chosen.prepare(a, b, ranks), "plain torch": PLAIN.prepare(a, b, ranks)}
    calls: Calls = {name: _product(each, x, slots, out) for name, each in bound.items()}
    return calls | {"linear": lambda: torch.nn.functional.linear(x, weight)}


def _product(bound: Any, x: torch.Tensor, slots: torch.Tensor, out: torch.Tensor) -> Callable[[], object]:
    return lambda: bound(x, slots, out)
