"""The trainer of a recipe's run: its callbacks, Ctrl-C, the best step at the end."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from transformers import PrinterCallback

from lofi.errors import Interrupted, RecipeError
from lofi.recipe import Recipe
from lofi.train import checkpoint as checkpoints
from lofi.train.collate import whole_batch
from lofi.train.folder import RunFolder
from lofi.train.interrupt import StopSwitch, listening
from lofi.train.job import Job
from lofi.train.journal import Journal
from lofi.train.loraplus import ratio_fault
from lofi.train.progress import ProgressBar
from lofi.train.settings import training_arguments
from lofi.train.stopping import EarlyStop, SaveJudged
from lofi.train.trainer import LofiTrainer


def run_trainer(recipe: Recipe, job: Job, folder: RunFolder, checkpoint: Path | None, *, progress: bool) -> LofiTrainer:
    """Train to the end, from `checkpoint` where there is one; the model then holds the best step's weights.

    Raises  Interrupted after Ctrl-C, with the command that goes on
    """
    trainer = make_trainer(recipe, job, folder, fresh=checkpoint is None)
    bar = ProgressBar(trainer.books) if progress else None
    if bar is not None:
        trainer.add_callback(bar)
    switch = StopSwitch()
    trainer.add_callback(switch)
    try:
        with listening(switch):
            trainer.train(str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        raise Interrupted(_stopped(recipe, folder, trainer, at_once=True)) from None
    finally:
        if bar is not None:
            bar.close()
    if switch.asked and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(_stopped(recipe, folder, trainer, at_once=False))
    if trainer.state.best_global_step:
        checkpoints.read_weights(job.model, folder.checkpoints / f"checkpoint-{trainer.state.best_global_step}")
    return trainer


def make_trainer(recipe: Recipe, job: Job, folder: RunFolder, *, fresh: bool) -> LofiTrainer:
    """The LofiTrainer of a job, with its journal and what the recipe asked for."""
    trainer = LofiTrainer(
        model=job.model,
        args=training_arguments(job.chosen, recipe, folder.checkpoints, fresh=fresh),
        data_collator=whole_batch,
        train_dataset=job.batches,
        eval_dataset=job.validation_batches,
        loraplus_lr_ratio=recipe.train.loraplus_lr_ratio,
    )
    trainer.row_names = job.row_names
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Journal(folder.journal, trainer.books))
    if job.validation_batches is not None:
        trainer.add_callback(SaveJudged())
    if recipe.train.early_stopping is not None:
        trainer.add_callback(EarlyStop(recipe.train.early_stopping))
    if recipe.train.report_to == "tensorboard":
        trainer.add_callback(_tensorboard(folder))
    return trainer


def refuse_early(recipe: Recipe) -> None:
    """Refuse, before anything is read, what the recipe asks of this run in vain.

    Raises  RecipeError: early stopping without validation rows, TensorBoard where it is not installed, LoRA+
            without LoRA
    """
    ratio, config = recipe.train.loraplus_lr_ratio, recipe.adapter_config()
    fault = None if ratio is None else ratio_fault(ratio, [config] if config is not None else [])
    if fault:
        raise RecipeError(f"train.{fault}")
    if recipe.train.early_stopping is not None and recipe.data.validation is None:
        raise RecipeError("train.early_stopping needs validation rows; give data.validation or leave it out")
    if recipe.train.report_to == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise RecipeError(
            "train.report_to is tensorboard, which is not installed; pip install 'lofi[tensorboard]', or leave it out"
        )


def _tensorboard(folder: RunFolder) -> Any:
    """Events beside the journal; what an interrupted run wrote after its last checkpoint is purged."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    last = checkpoints.last_checkpoint(folder.checkpoints)
    purge = checkpoints.step_of(last) + 1 if last is not None else None
    return TensorBoardCallback(SummaryWriter(str(folder.path / "tensorboard"), purge_step=purge))


def _stopped(recipe: Recipe, folder: RunFolder, trainer: LofiTrainer, *, at_once: bool) -> str:
    safe = checkpoints.last_checkpoint(folder.checkpoints)
    where = f"the checkpoint of step {checkpoints.step_of(safe)} is safe" if safe else "there is no checkpoint yet"
    how = "stopped at once" if at_once else "stopped"
    return (
        f"{how} at step {trainer.state.global_step} of {trainer.state.max_steps}; {where}; "
        f"go on with: lofi train {folder.recipe} --resume"
    )
