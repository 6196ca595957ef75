"""`LofiTrainer`: a transformers.Trainer whose checkpoints hold only what trains, whose resume is exact, whose loss is.

What it changes of the Trainer (5.20 to 5.23; every override is a method named there):
  checkpoints   `_save_checkpoint` writes aside and renames; adapter tensors, optimizer, scheduler, scaler, generators
                and arguments as safetensors + JSON (`checkpoint.py`); the sums behind the next log line too
  loss          the sum over labelled items / the items of the whole optimizer step (`objectives.py`), in evaluation too
  safety        stops at the first loss or gradient that is not finite, and unless the first steps moved what they train
What it leaves alone: the loop, the optimizer, the schedule, callbacks, data loading, evaluation metrics.
Rejected: own training loop (trackers, accelerate and user callbacks would each need their own bridge).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from lofi.adapters.registry import adapter_tensors, adapters_of
from lofi.errors import DataError, RequestError
from lofi.files.atomic import atomic_folder, write_json
from lofi.files.tensors import load_state, save_state
from lofi.train import checkpoint, finite, loraplus
from lofi.train.bookkeeping import Bookkeeping
from lofi.train.collate import PadRows
from lofi.train.hub import push_checkpoint
from lofi.train.objectives import objective_for
from lofi.train.proofs import FirstSteps


class LofiTrainer(Trainer):
    """Train a model's adapters (or, without adapters, the model) with exact loss, exact resume and proofs.

    Takes the Trainer's arguments. `data_collator` None pads rows of input_ids and labels.
    `loraplus_lr_ratio` gives LoRA's B so many times the learning rate (LoRA+; `loraplus.py`).
    `trainer.row_names`, where set, maps indices of the training set to what a user calls those rows ("file.jsonl:17").
    Raises  RequestError for FSDP, DeepSpeed, base weights that would train beside an adapter, a factor that is frozen
            after OLoRA's or PiSSA's start, LoRA+ without LoRA
            NonFiniteError, ProofError while training
    Exact   resuming a checkpoint gives bit-identical weights (same machine, same number of threads)
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        loraplus_lr_ratio: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, args=args, **kwargs)
        self._refuse_what_cannot_be_exact()
        self.loraplus_lr_ratio = loraplus_lr_ratio
        self._refuse_what_cannot_learn()
        if self.args.n_gpu > 1:
            self.args._n_gpu = 1  # one process, one device: DataParallel would average the losses of unequal parts
        if kwargs.get("data_collator") is None:
            self.data_collator = PadRows(self._pad_id())
        own_loss = self.compute_loss_func is not None or self.label_smoother is not None
        self.objective = None if own_loss else objective_for(self.model)
        if self.objective is not None:
            self.loss_is_scaled_for_ga = True
        if self.args.fp16 and adapters_of(self.model):
            self._keep_the_scaler_without_autocast()
        self.row_names: Any = None
        self.books = Bookkeeping()
        self.proof = FirstSteps(self.model)
        self._evaluated: list[float] | None = None
        self._wants_logits = False
        self.add_callback(self.books)
        self.add_callback(self.proof)

    def _refuse_what_cannot_be_exact(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or self.args.world_size > 1:
            raise RequestError(
                "LofiTrainer trains in one process on one device in this version, but DeepSpeed, FSDP or several "
                "processes were asked for; start it with plain python"
            )
        held = {id(t) for name in adapters_of(self.model) for t in adapter_tensors(self.model, name).values()}
        beside = [n for n, p in self.model.named_parameters() if p.requires_grad and id(p) not in held]
        if held and beside:
            raise RequestError(
                f"{len(beside)} weights of the base would train beside the adapter but not be saved with it "
                f"({', '.join(beside[:3])}); freeze them, or name them in modules_to_save"
            )

    def _refuse_what_cannot_learn(self) -> None:
        loraplus.refuse_frozen_factor(self.model)
        configs = [adapter.config for adapter in adapters_of(self.model).values()]
        fault = None if self.loraplus_lr_ratio is None else loraplus.ratio_fault(self.loraplus_lr_ratio, configs)
        if fault is None and self.loraplus_lr_ratio is not None and self.optimizer is not None:
            fault = "loraplus_lr_ratio splits the trainer's own optimizer, but another was given; leave one of them out"
        if fault:
            raise RequestError(fault)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own; with LoRA+ its groups are split."""
        loraplus.refuse_frozen_factor(self.model)
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if fresh and self.loraplus_lr_ratio is not None:
            loraplus.split_rates(optimizer, self.model, self.loraplus_lr_ratio)
        return optimizer

    def _pad_id(self) -> int:
        tokenizer, config = self.processing_class, getattr(self.model, "config", None)
        found = getattr(tokenizer, "pad_token_id", None)
        return int(found if found is not None else getattr(config, "pad_token_id", None) or 0)

    def _keep_the_scaler_without_autocast(self) -> None:
        """fp16 with adapters: the base already is fp16, float32 masters cast themselves; only the scaler is wanted."""
        from accelerate.utils import AutocastKwargs

        self.accelerator.autocast_handler = AutocastKwargs(enabled=False)

    # Loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        if self.objective is None:
            return super()._get_num_items_in_batch(batch_samples, device)
        return sum(self.objective.items(batch["labels"]) for batch in batch_samples) if batch_samples else None

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.objective is not None and samples and not int(items):
            rows = ", ".join(self._rows(range(len(samples))))
            raise DataError(f"step {self.state.global_step + 1} holds no trained item ({rows}); label its rows")
        self.books.begin_step(samples, items)
        return samples, items

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ):
        if self.objective is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        total, logits = self.objective(model, inputs)
        items = self.objective.items(inputs["labels"]) if num_items_in_batch is None else num_items_in_batch
        loss = total / items
        if not return_outputs:
            return loss
        if logits is None and self._wants_logits:
            logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
        return loss, {"loss": loss, "logits": logits}

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        stack = super().compute_loss_context_manager()
        stack.enter_context(
            self.accelerator.autocast()
        )  # the objective may go past the forward that accelerate wrapped
        return stack

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not finite.finite(loss):
            prepared = self._prepare_inputs(inputs)
            raise self._stop(finite.bad_activation(self.model, prepared), [self.books.micro], prepared)
        self.books.micro += 1
        return loss

    # Gradients

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        norm = self._norm()
        gradients = [p for p in model.parameters() if p.grad is not None]
        torch.nn.utils.clip_grads_with_norm_(gradients, self.args.max_grad_norm, norm)
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return self._norm() if grad_norm is None else grad_norm

    def _norm(self) -> Tensor:
        """The global norm before clipping; not finite is an error, but under a scaler, whose business it is, a skip."""
        self.accelerator.unscale_gradients()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        if finite.finite(norm):
            self.books.skipped = 0
        elif self.accelerator.scaler is None or self.books.skip() > _PATIENCE:
            name = finite.bad_gradient((n, p.grad) for n, p in self.model.named_parameters())
            raise self._stop(f"the gradient of {name}", list(range(self.books.micro)), None)
        return norm

    def _stop(self, what: str, micros: list[int], inputs: dict | None) -> Exception:
        step = self.state.global_step + 1
        inputs = self.books.samples[0] if inputs is None and self.books.samples else inputs
        return finite.stop(what, step=step, rows=self._rows(micros), folder=self.args.output_dir, inputs=inputs)

    def _rows(self, micros: Any) -> list[str]:
        """What the rows of some micro-batches of the current step are called."""
        loader = self.callback_handler.train_dataloader
        return self.books.rows(
            loader, self.state.global_step, self.args.gradient_accumulation_steps, micros, self.row_names
        )

    # Evaluation: the mean over all items, not a mean of batch means

    def prediction_step(
        self, model: nn.Module, inputs: dict, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple:
        self._wants_logits = not prediction_loss_only
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if self._evaluated is not None and loss is not None:
            items = int(self.objective.items(inputs["labels"]))
            if items:
                self._evaluated[0] += float(loss) * items
                self._evaluated[1] += items
            else:
                loss = torch.zeros_like(loss)
        return loss, logits, labels

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._evaluated = [0.0, 0.0] if self.objective is not None else None
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._evaluated and self._evaluated[1]:
            output.metrics[f"{metric_key_prefix}_loss"] = self._evaluated[0] / self._evaluated[1]
        return output

    # Checkpoints

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = checkpoint.last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise RequestError(f"{self.args.output_dir} holds no complete checkpoint; train without resuming")
        elif resume_from_checkpoint and not checkpoint.is_complete(Path(resume_from_checkpoint)):
            raise RequestError(f"{resume_from_checkpoint} is not a complete checkpoint of LofiTrainer; give another")
        return super().train(str(resume_from_checkpoint) if resume_from_checkpoint else None, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.store_flos()
        run = Path(self._get_output_dir(trial))
        final = run / f"checkpoint-{self.state.global_step}"
        with atomic_folder(final) as folder:
            self._note_best(run, final)
            checkpoint.write_weights(self.model, folder)
            if not self.args.save_only_model:
                self._save_everything_else(folder)
            self._keep_callbacks()
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
            checkpoint.seal(folder, self.state.global_step)
        if self.args.push_to_hub:
            push_checkpoint(self, final)
        rotate_checkpoints(str(run), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True)

    def _save_everything_else(self, folder: Path) -> None:
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        self._save_arguments(folder)
        save_state(folder / "progress", self.books.state(self))

    def _note_best(self, run: Path, final: Path) -> None:
        if self.state.best_global_step:
            best = run / f"checkpoint-{self.state.best_global_step}"
            if best == final or best.is_dir():
                self.state.best_model_checkpoint = str(best)

    def _keep_callbacks(self) -> None:
        from transformers.trainer_callback import ExportableState

        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """What `save_model` writes: the adapters as PEFT folders, or the model as `save_pretrained` does."""
        folder = Path(output_dir or self.args.output_dir)
        names = list(adapters_of(self.model))
        for name in names:
            save_adapter_into(self.model, folder if name == names[0] else folder / name, name)
        if not names:
            self.accelerator.unwrap_model(self.model, keep_torch_compile=False).save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        self._save_arguments(folder)

    def _save_arguments(self, folder: Path) -> None:
        write_json(folder / "training_args.json", self.args.to_dict())

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_state(Path(output_dir) / "optimizer", self.optimizer.state_dict())
        save_state(Path(output_dir) / "scheduler", self.lr_scheduler.state_dict())

    def _save_scaler(self, output_dir: str) -> None:
        if self.accelerator.scaler is not None:
            save_state(Path(output_dir) / "scaler", self.accelerator.scaler.state_dict())

    def _save_rng_state(self, output_dir: str) -> None:
        save_state(Path(output_dir) / "rng", checkpoint.rng_state())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoint.read_weights(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        checkpoint.read_weights(self.model, Path(self.state.best_model_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not (Path(checkpoint) / "optimizer.json").is_file():
            return  # saved with save_only_model
        self.optimizer.load_state_dict(load_state(Path(checkpoint) / "optimizer"))
        self.lr_scheduler.load_state_dict(load_state(Path(checkpoint) / "scheduler"))
        self.books.resume(load_state(Path(checkpoint) / "progress"), self)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and (Path(checkpoint) / "scaler.json").is_file():
            self.accelerator.scaler.load_state_dict(load_state(Path(checkpoint) / "scaler"))

    def _load_rng_state(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is not None and (Path(checkpoint_folder) / "rng.json").is_file():
            checkpoint.set_rng_state(load_state(Path(checkpoint_folder) / "rng"))


def save_adapter_into(model: nn.Module, folder: Path, name: str) -> None:
    """`save_adapter` into a folder that holds other files too (checkpoints): file by file, each old or new."""
    from lofi.files.adapter_folder import save_adapter

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".lofi-") as aside:
        for file in save_adapter(model, Path(aside) / "adapter", name).iterdir():
            os.replace(file, folder / file.name)


_PATIENCE = 20  # steps in a row that a gradient scaler may skip before the numbers are called broken
