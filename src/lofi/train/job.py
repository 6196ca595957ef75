"""From a recipe to everything a trainer needs: tokenizer, rows, model with its adapter, examples, micro-batches.

Order matters: rows before the model (they say the task and the labels), the seed before the model (its head may be
new), the adapter before the choices (memory). Everything that can be refused is refused before a folder is made.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lofi.adapters.methods import virtual_length
from lofi.errors import ModelError, RecipeError
from lofi.recipe import Recipe
from lofi.train import quantized
from lofi.train.seeds import seed_everything, stream
from lofi.train.settings import CPU_FORWARD_TOKENS, Chosen, Facts, activation_bytes, choose, count_steps, free_bytes

PACKED_TASKS = ("sft", "text")
TASK_OF_KIND = {"messages": "sft"}
MODEL_TASK = {"text": "CAUSAL_LM", "classification": "SEQ_CLS", "token_classification": "TOKEN_CLS"}


@dataclass
class Rows:
    """The data of a run: records with their places, their digests, and what task they are for."""

    train: Any
    validation: Any
    task: str

    def digests(self) -> dict[str, str]:
        return {r.source: r.sha256 for r in (self.train, self.validation) if r is not None}


@dataclass
class Job:
    """Everything that is needed to train, built and checked."""

    rows: Rows
    tokenizer: Any
    model: Any
    prepared: Any
    judged: Any
    batches: Any
    validation_batches: Any
    chosen: Chosen
    report: Any
    """What the adapter matched (lofi.adapters' AttachReport); None in full fine-tuning."""

    def row_names(self, indices: list[int]) -> list[str]:
        """What the rows of some micro-batches are called: "train.jsonl:17"."""
        return [self.prepared.where(example) for index in indices for example in self.batches.members(index)]


def read_rows(recipe: Recipe) -> Rows:
    """Load the training and validation rows and settle the task.

    Raises  DataError for files that cannot be read, RecipeError for a task that the rows are not for
    """
    from lofi.data.records import load_records

    columns = recipe.data.columns
    train = load_records(recipe.data.train, columns=columns, split="train")
    validation = None
    if recipe.data.validation is not None:
        validation = load_records(recipe.data.validation, columns=columns, split="validation")
        if validation.kind != train.kind:
            raise RecipeError(
                f"{validation.source} holds {validation.kind} rows but {train.source} {train.kind} rows; "
                "give both files the same columns"
            )
    return Rows(train, validation, _task(recipe, train))


def _task(recipe: Recipe, records: Any) -> str:
    found = TASK_OF_KIND.get(records.kind, records.kind)
    if found == "preference":
        raise RecipeError(
            f"{records.source} holds preference pairs (prompt, chosen, rejected), which this version does not train; "
            "map data.columns to prompt and completion to train on the chosen ones"
        )
    if recipe.task == "text" and "text" in records.rows[0]:
        return "text"  # text + label may be read as text alone
    if recipe.task is not None and recipe.task != found:
        raise RecipeError(
            f"task {recipe.task} was asked for, but the columns of {records.source} are for {found}; "
            "leave task out or map data.columns"
        )
    return found


def build(recipe: Recipe, rows: Rows, stored: Chosen | None) -> Job:
    """Build the model and the batches; `stored` are the choices of the run that is resumed, else they are made here.

    Raises  ModelError, DataError, TargetError, RecipeError: the request cannot be met as it stands
    """
    import torch

    from lofi.models.dtypes import choose_dtype, resolve_device
    from lofi.models.load import load_tokenizer

    device = str(resolve_device(stored.device if stored else "auto"))
    dtype = choose_dtype(device, stored.dtype if stored else recipe.train.dtype)
    if stored is not None:
        torch.set_num_threads(stored.threads)
    tokenizer = load_tokenizer(recipe.model)
    config = model_config(recipe.model)
    wanted = quantized.wanted(recipe, config)
    prepared, judged = _prepare(recipe, rows, tokenizer, config)
    task = model_task(rows.task, config)
    model = _model(recipe, task, prepared, wanted, device=device, dtype=dtype, padding=pad_id(tokenizer))
    report = _adapt(recipe, model, prepared)
    attention = _attend(model, dtype, stored, longest=_row_tokens(recipe, rows, model, prepared))
    facts = {"dtype": dtype, "attention": attention, "wanted": wanted}
    chosen = stored or choose(recipe, _facts(recipe, rows, model, prepared, **facts))
    batches = _group(chosen, prepared, tokenizer)
    validation = _group(chosen, judged, tokenizer) if judged is not None else None
    chosen = stored or count_steps(chosen, recipe, len(batches), judged is not None)
    prepared.report.note_batches(packed=batches.packed, padding=batches.waste)
    return Job(rows, tokenizer, model, prepared, judged, batches, validation, chosen, report)


def model_config(path: str) -> Any:
    """The model's config, read before the model: rows are cut to its context and labelled for its task."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, local_files_only=Path(path).is_dir())
    except (OSError, ValueError, KeyError) as error:
        told = str(error).strip().splitlines()[0]
        raise ModelError(f"the config of {path} cannot be read ({told}); check the model folder") from error


def context_length(config: Any, tokenizer: Any) -> int | None:
    """Tokens that a model reads at most, as its config and its tokenizer say it; None where neither does."""
    told = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    told.append(getattr(tokenizer, "model_max_length", None))
    return min((int(n) for n in told if n and 0 < n < 10**7), default=None)


def _room(recipe: Recipe, config: Any, tokenizer: Any) -> int | None:
    """The context that is left to rows: virtual tokens take their positions first."""
    stated = context_length(config, tokenizer)
    return None if stated is None else stated - virtual_length(recipe.adapter_config())


def _prepare(recipe: Recipe, rows: Rows, tokenizer: Any, config: Any) -> tuple[Any, Any]:
    """(training examples, validation examples or None), labelled alike."""
    from lofi.data.prepare import prepare

    task = "SEQ_2_SEQ_LM" if model_task(rows.task, config) == "SEQ_2_SEQ_LM" else rows.task
    length = recipe.train.max_length or _room(recipe, config, tokenizer)
    first = prepare(rows.train, tokenizer, task=task, max_length=length, labels=recipe.data.labels)
    if rows.validation is None:
        return first, None
    same = {"labels": first.labels, "text_format": first.text_format}
    return first, prepare(rows.validation, tokenizer, task=task, max_length=length, **same)


def model_task(task: str, config: Any) -> str:
    """The head that a recipe's task needs on this model: CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS or TOKEN_CLS."""
    if task == "sft":
        return "SEQ_2_SEQ_LM" if getattr(config, "is_encoder_decoder", False) else "CAUSAL_LM"
    return MODEL_TASK[task]


def _model(
    recipe: Recipe, task: str, prepared: Any, wanted: quantized.Wanted, *, device: str, dtype: Any, padding: int
) -> Any:
    """The model as it stands before the adapter: in the compute dtype, or in float32 masters to train in full."""
    import torch

    from lofi.models.load import load_model, mark_multi_label

    seed_everything(stream(recipe.train.seed, "init"))
    held = dtype.dtype if recipe.trains_adapter else torch.float32
    model = load_model(
        recipe.model, wanted.to_load, dtype=held, device=device, task=task, labels=prepared.labels
    )
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = padding  # classifiers over a decoder find a row's last token by it
    if prepared.multi_label:
        mark_multi_label(model)
    return model


def _adapt(recipe: Recipe, model: Any, prepared: Any) -> Any:
    """Put the adapter on (its report is given back), or let every weight train; then what the recipe asks of both."""
    from lofi.adapters.attach import add_adapter
    from lofi.models.checkpointing import enable

    report = None
    asked = recipe.adapter_config()
    if asked is not None:
        config, note = with_stop_row(model, asked, prepared.text_format)
        report = add_adapter(model, config)
        report.notes += [note] if note else []
    else:
        model.requires_grad_(True)
    if recipe.train.gradient_checkpointing:
        enable(model)
    return report


def with_stop_row(model: Any, config: Any, text_format: Any) -> tuple[Any, str | None]:
    """The config, with the stop token's own row trained where the frozen head could not tell that token from others.

    Without that row every answer would be trained to end and none would: the loss falls, generation never stops.
    """
    from lofi.models.facts import twin_tokens

    stops = text_format.stop_ids[:1] if text_format is not None else []
    twins = twin_tokens(model, stops[0]) if stops else 0
    lora = _lora_in(config)
    if not twins or (lora and (lora.trainable_token_indices is not None or _adapts_embedding(model, lora))):
        return config, None
    fact = f"the stop token (id {stops[0]}) has nearly the same row in the output head as {twins} others"
    if lora is None:
        return config, f"{fact}, and {config.method} does not train it: answers may not end; lora trains that row too"
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding.weight is head.weight:
        with_row = _with_lora(config, replace(lora, trainable_token_indices=list(stops)))
        return with_row, f"{fact}, so its own row trains too"
    return config, f"{fact}: add the output head to lora.target_modules, or answers will not end"


def _lora_in(config: Any) -> Any:
    """The LoRA config that a config is or holds; None where there is none."""
    held = getattr(config, "configs", (config,))
    return next((one for one in held if one.method == "lora"), None)


def _with_lora(config: Any, lora: Any) -> Any:
    """The config with its LoRA part replaced."""
    if config.method == "lora":
        return lora
    return replace(config, configs=[lora if one.method == "lora" else one for one in config.configs])


def _adapts_embedding(model: Any, config: Any) -> bool:
    """Whether the config moves the embedding's rows anyway."""
    from lofi.adapters.target import matches

    paths = [path for path, module in model.named_modules() if module is model.get_input_embeddings()]
    return any(matches(path, config.target_modules) for path in paths)


def _attend(model: Any, dtype: Any, stored: Chosen | None, *, longest: int) -> Any:
    """Choose the attention (or take the resumed run's) and have the model use it: what is proved later runs on it."""
    from lofi.models.attention import Attention, choose_attention, set_attention

    if stored is not None:
        attention = Attention(stored.attention, "")
    else:
        attention = choose_attention(
            model,
            compute=dtype.dtype,
            row_tokens=longest,
            forward_tokens=CPU_FORWARD_TOKENS,
            free_bytes=free_bytes(str(model.device)),
        )
    set_attention(model, attention.name)
    return attention


def _row_tokens(recipe: Recipe, rows: Rows, model: Any, prepared: Any) -> int:
    """The longest row that a forward pass may hold: an example, or a packed row (see `Chosen.row_tokens`)."""
    longest = max(example.size for example in prepared.examples)
    may_pack = recipe.train.micro_batch_size is None and rows.task in PACKED_TASKS
    return max(longest, _width(model)) if may_pack else longest


def _width(model: Any) -> int:
    return int(getattr(model.config, "hidden_size", 0) or 0)


def _facts(
    recipe: Recipe, rows: Rows, model: Any, prepared: Any, *, dtype: Any, attention: Any, wanted: quantized.Wanted
) -> Facts:
    import torch

    device = str(model.device)
    packs, why = _packs(recipe, rows, model)
    return Facts(
        device=device,
        dtype=dtype,
        packs=packs,
        packs_why=why,
        longest=max(example.size for example in prepared.examples),
        width=_width(model),
        attention=attention,
        quantization=wanted.kind,
        quantization_why=wanted.why,
        workspace_bytes=quantized.workspace_bytes(model, dtype.dtype.itemsize),
        free_bytes=free_bytes(device, base=quantized.held_bytes(model)),
        activation_bytes=activation_bytes(model.config, dtype.dtype.itemsize),
        threads=torch.get_num_threads(),
    )


def _packs(recipe: Recipe, rows: Rows, model: Any) -> tuple[bool, str]:
    from lofi.models.packing import packing_verdict

    if recipe.train.micro_batch_size is not None:
        return False, "micro_batch_size counts rows, so each row holds one example"
    if rows.task not in PACKED_TASKS:
        return False, "a label belongs to a row of its own"
    verdict = packing_verdict(model)
    return verdict.ok, verdict.reason


def pad_id(tokenizer: Any) -> int:
    """The id that fills rows; any will do, since padding is masked and never trained."""
    for name in ("pad_token_id", "eos_token_id"):
        if getattr(tokenizer, name, None) is not None:
            return int(getattr(tokenizer, name))
    return 0


def _group(chosen: Chosen, prepared: Any, tokenizer: Any) -> Any:
    """The micro-batches of the examples, as chosen: by tokens, or `micro_rows` rows at a time."""
    from lofi.data.batches import MicroBatches, group

    seed, pad = stream(chosen.seed, "data"), pad_id(tokenizer)
    if chosen.micro_rows is None:
        size = {"micro_tokens": chosen.micro_tokens, "max_length": chosen.row_tokens}
        return group(prepared.examples, pack=chosen.packing, pad_id=pad, seed=seed, **size)
    groups = rows_at_a_time([example.size for example in prepared.examples], chosen.micro_rows, seed)
    trained = [sum(prepared.examples[i].n_trained for i in one) for one in groups]
    batches = MicroBatches(prepared.examples, [[[i] for i in one] for one in groups], pad, False, 0.0, trained)
    batches.waste = 1 - sum(example.size for example in prepared.examples) / sum(batches.sizes())
    return batches


def rows_at_a_time(lengths: list[int], count: int, seed: int) -> list[list[int]]:
    """Rows of similar length, `count` together: shuffled, then sorted by length (equal lengths stay shuffled)."""
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda i: lengths[i])
    return [order[start : start + count] for start in range(0, len(order), count)]
