"""What the serving claims serve: models with a tokenizer, and many adapters over one of them, as folders.

Adapters are random, and B is not zero: deviation `SPREAD`, so that each answers differently; every other one is trained
for a few steps where a claim asks for answers that end by themselves. Everything is seeded: two runs serve the same.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.checkpoints import Shape

LARGE = Shape(768, 12, 2048, 12, 12, 32000, tied=True)  # 110 million parameters
SPREAD = 0.05
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def shipped() -> Path:
    """The model that ships with lofi: 6.5 million trained parameters, bf16."""
    from lofi.demo.run import MODEL

    return MODEL


def write_model(shape: Shape, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A model of this shape with random weights, beside the shipped model's tokenizer."""
    shape.model(dtype).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(shipped() / name, folder / name)
    return folder


def open_model(folder: Path, dtype: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) as `lofi serve` opens them, on the CPU; in the folder's own dtype unless one is named."""
    from lofi.models.load import load_model, load_tokenizer

    names = {None: "auto", "float32": "fp32", "bfloat16": "bf16"}
    return load_model(folder, dtype=names[dtype], device="cpu").eval(), load_tokenizer(folder)


def config(number: int = 0, *, mixed: bool = False, **chosen: Any) -> Any:
    """The LoRA config of adapter `number`: r = 8 on every linear, or ranks and targets in turn where `mixed`."""
    from lofi.adapters.config import LoraConfig

    if not mixed:
        return LoraConfig(r=8, lora_alpha=16, **chosen)
    rank = (4, 8, 16)[number % 3]
    targets = (None, ATTENTION, ("gate_proj", "up_proj", "down_proj"))[number % 3]
    wanted = {} if targets is None else {"target_modules": list(targets)}
    return LoraConfig(r=rank, lora_alpha=rank * (1 + number % 2), use_dora=number % 4 == 3, **wanted | chosen)


def add_random(model: Any, name: str, number: int, config: Any, spread: float = SPREAD) -> None:
    """Put an adapter on the model whose B is normal with deviation `spread`, seeded by its number."""
    from lofi.adapters.attach import add_adapter
    from lofi.adapters.registry import adapter_of

    torch.manual_seed(1000 + number)
    add_adapter(model, config, name)
    with torch.no_grad():
        for part in adapter_of(model, name).parts.values():
            for key, tensor in part.named_parameters():
                if key == "lora_B":
                    tensor.normal_(std=spread)


def write_adapters(model: Any, folder: Path, configs: Mapping[str, Any], spread: float = SPREAD) -> dict[str, Path]:
    """One folder an adapter, as `lofi train` leaves it, made on the model and taken off again."""
    from lofi.adapters.attach import unload
    from lofi.files.adapter_folder import save_adapter

    made = {}
    for number, (name, chosen) in enumerate(configs.items()):
        add_random(model, name, number, chosen, spread)
        made[name] = save_adapter(model, folder / name, name)
        unload(model, name)
    return made


def names(count: int) -> list[str]:
    return [f"adapter-{number}" for number in range(count)]


def eight(model: Any, folder: Path) -> dict[str, Path]:
    """Eight adapters of rank 8 on every linear."""
    return write_adapters(model, folder, {name: config() for name in names(8)})


def train_adapters(folder: Path, *, count: int, steps: int) -> dict[str, Path]:
    """Adapters of the shipped model trained for some steps on the demo's rows; they answer with SQL and end."""
    from lofi.data.format import TextFormat
    from lofi.demo.dataset import write_rows
    from lofi.demo.recipe import ROWS_A_STEP, demo_recipe
    from lofi.models.load import load_tokenizer
    from lofi.train.run import train

    stop = TextFormat.for_tokenizer(load_tokenizer(shipped())).stop_ids[0]
    made = {}
    for seed in range(count):
        at = folder / f"trained-{seed}"
        files = write_rows(at / "data", train=steps * ROWS_A_STEP, test=1, seed=seed)
        recipe = demo_recipe(model=shipped(), train=files["train"], output=at / "run", seed=seed, stop_id=stop)
        with contextlib.redirect_stdout(io.StringIO()):
            train(recipe)
        made[at.name] = at / "run" / "adapter"
    return made


def questions(count: int, *, seed: int = 7) -> list[tuple[int, ...]]:
    """Prompts of the demo's kind as token ids, in the shipped model's own text format."""
    from lofi.data.format import TextFormat
    from lofi.demo.dataset import make_rows
    from lofi.models.load import load_tokenizer

    rule = TextFormat.for_tokenizer(load_tokenizer(shipped()))
    return [tuple(rule.encode_prompt(row["prompt"])) for row in make_rows(count, seed, "test_unseen")]


def store_of(model: Any, tokenizer: Any, folders: Mapping[str, Path], *, slots: int = 8, **more: Any) -> Any:
    """An AdapterStore with the platform's kernel that holds these adapters."""
    from lofi.adapters.batched import AdapterBank
    from lofi.quant.kernels.dispatch import low_rank_for
    from lofi.serve.store import AdapterStore

    bank = AdapterBank(model, slots=slots, product=low_rank_for(torch.device("cpu")))
    store = AdapterStore(model, tokenizer, bank=bank, **more)
    for name, folder in folders.items():
        store.load(name, folder)
    return store


def random_prompts(count: int, length: int, vocabulary: int, *, seed: int = 0) -> list[tuple[int, ...]]:
    """Token ids drawn evenly, special ones left out."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(16, vocabulary, (count, length), generator=generator)
    return [tuple(row) for row in ids.tolist()]


def in_turn(items: Sequence[Any], count: int) -> list[Any]:
    return [items[number % len(items)] for number in range(count)]
