"""Publishing a run while it trains (`push_to_hub=True`): what the Trainer does, without its pickled arguments.

Not here: the push at the end of training, which the Trainer makes from what `save_model` wrote.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.trainer_utils import HubStrategy

from lofi.errors import ProofError


def push_checkpoint(trainer: Any, checkpoint: Path) -> None:
    """Upload the model as it is, and the checkpoint where the hub strategy says so, in the background.

    Does nothing while the last upload runs (unless `hub_always_push`), and for an adapter that has not moved yet.
    """
    from transformers.utils import PushInProgress

    args, running = trainer.args, trainer.push_in_progress
    busy = running is not None and not running.is_done()
    if args.hub_strategy == HubStrategy.END or (busy and not args.hub_always_push):
        return
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    try:
        trainer.save_model(args.output_dir, _internal_call=True)
    except ProofError:  # still zero after the first warm-up steps: nothing to publish yet
        return
    message = f"Training in progress, step {trainer.state.global_step}"
    jobs = [_upload(trainer, args.output_dir, message, ignore_patterns=["_*", ".*", "checkpoint-*"])]
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        name = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
        jobs.append(_upload(trainer, checkpoint, f"{message}, checkpoint", path_in_repo=name))
    if busy:
        running.jobs.extend(jobs)
    else:
        trainer.push_in_progress = PushInProgress(jobs)


def _upload(trainer: Any, folder: str | Path, message: str, **where: Any) -> Any:
    from huggingface_hub import HfApi

    return HfApi().upload_folder(
        repo_id=trainer.hub_model_id,
        folder_path=folder,
        commit_message=message,
        token=trainer.args.hub_token,
        revision=trainer.args.hub_revision,
        run_as_future=True,
        **where,
    )
