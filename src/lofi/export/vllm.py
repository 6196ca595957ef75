"""An adapter folder as vLLM takes it: every rule that it would break is named, and what can be converted is, exactly.

    refused     what vLLM does not load, or loads and then ignores; each with what to do instead
    converted   rsLoRA and patterns of ranks and alphas into one multiplier folded into B; names of starts; copies of
                base weights that PEFT writes beside adapted embeddings

Converting multiplies B once in float32. Knows the files, not vLLM itself: nothing here runs it.
Source: vLLM 0.33, vllm/lora/peft_helper.py, lora_model.py, layers/logits_processor.py, config/lora.py, and the column
LoRA of its list of supported models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lofi.adapters.config import LoraConfig
from lofi.errors import RequestError
from lofi.files.adapter_folder import CONFIG, RECORD, TENSORS, AdapterFolder
from lofi.files.atomic import write_json, write_text
from lofi.files.layout import save_safetensors
from lofi.files.updates import MAGNITUDE, LowRank, low_rank_updates
from lofi.merge.rebuilt import Rebuilt, other_tensors, write_rebuilt

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank may be; any adapter of at most that rank is served."""
LARGEST_VOCABULARY = 258_048
_HEADS = ("classifier", "score")
_WITHOUT_LORA = frozenset(
    f"{name}ForCausalLM"
    for name in (
        *("Arctic", "Bloom", "Dbrx", "Falcon", "FalconMamba", "Gemma3n", "GPTJ", "GPTNeoX", "Jais2", "Mamba", "Mamba2"),
        *("MPT", "Olmoe", "FlexOlmo", "Orion", "RW", "StableLm", "StableLMEpoch", "Zamba2", "DeepseekV4"),
    )
) | {"GPT2LMHeadModel"}
_MERGE = "hand the merged model over with --to merged"


@dataclass(frozen=True)
class Fitness:
    """What vLLM would make of an adapter folder."""

    refusals: list[str] = field(default_factory=list)
    """What it refuses or would silently leave out, each with what to do."""
    conversions: list[str] = field(default_factory=list)
    """What is written otherwise than it stands, with the same effect."""
    notes: list[str] = field(default_factory=list)
    rank: int = 0
    """The largest rank."""

    @property
    def max_lora_rank(self) -> int:
        """What vLLM is to be started with."""
        return next((rank for rank in RANKS if rank >= self.rank), RANKS[-1])


def fitness(read: AdapterFolder, base: Mapping[str, Any] | None = None, *, max_rank: int | None = None) -> Fitness:
    """Hold an adapter folder, and its base's config.json where it is at hand, against vLLM's rules.

    `max_rank` is the --max-lora-rank of a server that runs already.
    Raises  RequestError where max_rank is none that vLLM knows
    """
    if max_rank is not None and max_rank not in RANKS:
        known = ", ".join(map(str, RANKS))
        raise RequestError(f"--max-rank is {max_rank}, expected one that vLLM can be started with: {known}")
    config = read.config
    if not isinstance(config, LoraConfig):
        return Fitness([_other_method(read)])
    updates = low_rank_updates(read)
    rank = max((update.rank for update in updates), default=0)
    refusals = [*_tensor_refusals(read, updates), *_rank_refusals(rank, max_rank), *_task_refusals(read)]
    refusals += _base_refusals(base or {}, updates)
    return Fitness(refusals, _conversions(read, config), _notes(read, base), rank)


def _other_method(read: AdapterFolder) -> str:
    reason = read.config.why_unmergeable()
    todo = _MERGE if reason is None else "serve it with lofi, or train LoRA"
    return f"it is a {read.config.method} adapter ({read.config.peft_type}) and vLLM serves LoRA alone: {todo}"


def _tensor_refusals(read: AdapterFolder, updates: list[LowRank]) -> list[str]:
    """What stands in the file beside factors of linear and embedding layers."""
    others = [key for key in other_tensors(read, updates) if not key.endswith(".base_layer.weight")]
    found = []
    if any(MAGNITUDE in key for key in others):
        found.append(f"it is a DoRA adapter, which vLLM does not load: {_MERGE}")
    if any("trainable_tokens_delta" in key for key in others):
        found.append(f"it has rows of its own for some tokens (trainable_token_indices), which vLLM refuses: {_MERGE}")
    if any(key.endswith(".bias") and not _of_head(key) for key in others):
        found.append(f"it has trained biases (bias={read.config.to_dict()['bias']!r}), which vLLM refuses: {_MERGE}")
    known = (MAGNITUDE, "trainable_tokens_delta", ".bias")
    copies = sorted({_module(key) for key in others if not _of_head(key) and not any(word in key for word in known)})
    if copies:
        found.append(f"it has modules trained in full ({', '.join(copies[:3])}), which vLLM refuses: {_MERGE}")
    if any(update.kind == "experts" for update in updates):
        found.append(f"it adapts fused experts, whose layout vLLM reads otherwise from version to version: {_MERGE}")
    return found


def _of_head(key: str) -> bool:
    return _module(key).split(".")[-1] in _HEADS


def _module(key: str) -> str:
    return key.removeprefix("base_model.model.").rpartition(".")[0]


def _rank_refusals(rank: int, max_rank: int | None) -> list[str]:
    most = max_rank or RANKS[-1]
    if rank <= most:
        return []
    whose = f"the server's --max-lora-rank of {most}" if max_rank else f"vLLM's largest, {most}"
    return [f"its rank {rank} is above {whose}: cut it first with lofi resize --rank {most}, which says what is lost"]


def _task_refusals(read: AdapterFolder) -> list[str]:
    task = read.config.task_type
    if task in ("SEQ_2_SEQ_LM", "TOKEN_CLS"):
        return [f"its task is {task}, which vLLM does not serve with LoRA: serve it with lofi or transformers"]
    return []


def _base_refusals(base: Mapping[str, Any], updates: list[LowRank]) -> list[str]:
    found = []
    architectures = [str(name) for name in base.get("architectures") or ()]
    without = [name for name in architectures if name in _WITHOUT_LORA]
    if without:
        found.append(f"vLLM serves no LoRA on {without[0]}: {_MERGE}")
    vocabulary = (base.get("text_config") or base).get("vocab_size") or 0
    if vocabulary > LARGEST_VOCABULARY:
        found.append(
            f"the base's vocabulary of {vocabulary:,} is above the {LARGEST_VOCABULARY:,} that vLLM serves LoRA on: "
            f"{_MERGE}"
        )
    if base.get("tie_word_embeddings") and any(update.path.split(".")[-1] == "lm_head" for update in updates):
        found.append(
            "it adapts a head that is tied to the embedding, which vLLM leaves out without a word for some families: "
            f"{_MERGE}"
        )
    return found


def _conversions(read: AdapterFolder, config: LoraConfig) -> list[str]:
    found = []
    if what := _folds(config):
        found.append(f"{' and '.join(what)} folded into B, so that every multiplier is 1 whichever version reads it")
    start = read.peft.get("init_lora_weights", True)
    if start is not True:
        found.append(f"init_lora_weights {start!r} written as true: it says where training started, and nothing else")
    copied = [key for key in read.tensors if key.endswith(".base_layer.weight")]
    if copied:
        first = _module(copied[0]).removesuffix(".base_layer")
        found.append(f"copies of base weights left out ({len(copied)}, first: {first})")
    heads = [name for name in read.peft.get("modules_to_save") or () if name not in _HEADS]
    if heads and not any("modules trained in full" in one for one in _tensor_refusals(read, low_rank_updates(read))):
        found.append("modules_to_save names modules that the file does not hold; left out")
    return found


def _folds(config: Any) -> list[str]:
    """What of a config makes the multipliers differ from alpha / r of all."""
    return [key for key in ("use_rslora", "rank_pattern", "alpha_pattern") if getattr(config, key)]


def _notes(read: AdapterFolder, base: Mapping[str, Any] | None) -> list[str]:
    notes = ["vLLM holds the factors in the model's dtype (--lora-dtype auto): in bfloat16 they are rounded once"]
    trained_on = (read.record.get("base") or {}).get("quantization")
    if trained_on:
        notes.append(f"it was trained on an {trained_on} base; served on other weights its figures differ a little")
    if read.config.task_type == "SEQ_CLS":
        notes.append("it is a classifier, and the command is one for text: start vLLM as it documents for pooling")
    if base is None:
        notes.append("the base's config.json was not at hand, so architecture, vocabulary and head were not checked")
    return notes


def write_adapter(read: AdapterFolder, fit: Fitness, folder: Path) -> None:
    """Write the adapter into an empty folder as vLLM takes it; lofi.json goes along, so the golden prompts do too.

    Raises  RequestError with every refusal; ProofError where a folded factor does not read back
    Exact   bit for bit where nothing is folded; else one rounding of every element of B to float32
    """
    refuse(read, fit)
    updates = low_rank_updates(read)
    others = {key: t for key, t in other_tensors(read, updates).items() if not key.endswith(".base_layer.weight")}
    heads = sorted({_module(key) for key in others}) or None
    peft = dict(read.peft) | {"init_lora_weights": True, "modules_to_save": heads, "inference_mode": True}
    if _folds(read.config):
        folded = [_folded(update) for update in updates]
        done = "The multipliers of an adapter, folded into B for vLLM."
        read_back, _ = write_rebuilt(folder, folded, peft=peft, others=others, record=read.record, scale=1.0, done=done)
        record = read_back.record
    else:
        save_safetensors(folder / TENSORS, {key: t for key, t in read.tensors.items() if key in others or _factor(key)})
        write_text(folder / CONFIG, json.dumps(peft, ensure_ascii=False, indent=2) + "\n")
        record = read.record
    if record:
        write_json(folder / RECORD, {**record, "exported": {"to": "vllm", "from": str(read.path)}})


def refuse(read: AdapterFolder, fit: Fitness) -> None:
    """Raise RequestError with everything that vLLM would refuse, if there is anything."""
    if fit.refusals:
        raise RequestError(f"vLLM would not serve {read.path}: {'; '.join(fit.refusals)}")


def _factor(key: str) -> bool:
    return ".lora_A" in key or ".lora_B" in key or ".lora_embedding_" in key


def _folded(update: LowRank) -> Rebuilt:
    """The update with its multiplier in B."""
    pairs = tuple((a.float(), b.float() * update.scale) for a, b in update.pairs)
    exact = tuple((a.double(), b.double() * update.scale) for a, b in update.pairs)
    return Rebuilt(update, exact, pairs, 0.0)
