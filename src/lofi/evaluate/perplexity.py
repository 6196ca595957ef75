"""How surprised a model is: the summed loss of every example over its labelled tokens.

Knows prepared examples (token ids, labels in transformers' unshifted form, -100 = not counted) and a transformers
language model. Per example, so that perplexity can weigh tokens and have an interval. Dropout is off.
The head works at the labelled end of each row only, through transformers' own `logits_to_keep`, so every family's
scaling and capping of logits is its own. Rejected: lofi.models.loss (one sum a batch, and what it saves here is small:
no gradient is kept), and the model's own loss (a mean over the batch, which weighs a row by its neighbours).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lofi.errors import RequestError
from lofi.evaluate.batching import fill_token, grouped, is_pair_model, padded
from lofi.evaluate.intervals import Array

IGNORED = -100

_LOGITS_AT_ONCE = 1 << 27  # 512 MiB of float32: what a batch's logits may take, whatever the vocabulary


def token_losses(
    model: Any,
    examples: Sequence[Any],
    *,
    batch_tokens: int = 8192,
    on_done: Callable[[int], None] | None = None,
) -> Array:
    """Summed loss and number of labelled tokens of every example: (N, 2) float64.

    loss_i = sum over labelled t of -log p(label_t | what stands before t), natural logarithm, softmax in float32.
    An example has `input_ids` and `labels` (lists; for an encoder-decoder the labels are the decoder's text).
    perplexity = exp(sum of losses / sum of tokens) over all examples.
    on_done(n) is called after each batch with the number of examples done so far.
    Raises  RequestError for an example without a labelled token that could be predicted
    Exact   equal to the model's own loss times its token count up to the order of summation (1e-5 relative in float32)
    """
    from lofi.models.probe import undisturbed

    counted = [_counted(model, example.labels) for example in examples]
    if 0 in counted:
        raise RequestError(f"example {counted.index(0)} has no labelled token to predict: leave it out or label it.")
    result = np.empty((len(examples), 2))
    lengths = [max(len(example.input_ids), len(example.labels)) for example in examples]
    done = 0
    with torch.no_grad(), undisturbed(model):
        for group in grouped(lengths, batch_tokens=min(batch_tokens, _budget(model))):
            result[group, 0] = _batch_losses(model, [examples[i] for i in group]).tolist()
            result[group, 1] = [counted[i] for i in group]
            done += len(group)
            if on_done is not None:
                on_done(done)
    return result


def _counted(model: Any, labels: Sequence[int]) -> int:
    """A decoder cannot predict a row's first token: nothing stands before it."""
    return sum(label != IGNORED for label in (labels if is_pair_model(model) else labels[1:]))


def _budget(model: Any) -> int:
    return max(1, _LOGITS_AT_ONCE // int(model.config.get_text_config().vocab_size))


def _batch_losses(model: Any, examples: list[Any]) -> Tensor:
    """(N,) summed losses of one batch."""
    ids, mask = padded([example.input_ids for example in examples], fill=fill_token(model))
    labels, _ = padded([example.labels for example in examples], fill=IGNORED)
    inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    labels = labels.to(model.device)
    if is_pair_model(model):
        return _summed(_pair_logits(model, inputs, labels), labels)
    first = int((labels[:, 1:] != IGNORED).any(0).nonzero()[0])  # the first column that predicts a label in any row
    logits = _causal_logits(model, inputs, keep=ids.shape[1] - first)  # (N, T - first, V)
    return _summed(logits[:, :-1], labels[:, first + 1 :])


def _causal_logits(model: Any, inputs: dict[str, Tensor], *, keep: int) -> Tensor:
    """Logits at the last `keep` positions, whether or not the model can leave out the others: (N, keep, V)."""
    accepted = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
    if "logits_to_keep" in accepted:
        options["logits_to_keep"] = keep
    return model(**inputs, **options).logits[:, -keep:]


def _pair_logits(model: Any, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Logits of the decoder reading the labels shifted by its start token: (N, T, V)."""
    shifted = model.prepare_decoder_input_ids_from_labels(labels=labels)
    return model(**inputs, decoder_input_ids=shifted, use_cache=False).logits


def _summed(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy over each row's labelled positions, float32, summed in float64: (N, T, V), (N, T) -> (N,)."""
    chosen = targets != IGNORED  # (N, T)
    losses = torch.zeros(targets.shape, dtype=torch.float64, device=targets.device)
    losses[chosen] = functional.cross_entropy(logits[chosen].float(), targets[chosen], reduction="none").double()
    return losses.sum(1)
