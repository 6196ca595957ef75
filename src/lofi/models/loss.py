"""The language-model loss as a sum over trained tokens, without the logits that nobody reads.

The model's own forward runs whole, body, adapters, encoder and all; only at its output head the hidden states are
taken aside and the head sees a single position. The head and the cross-entropy are then worked out at the labelled
positions only, in chunks (`chunked.py`). What lies between head and loss (`logits.py`) is not believed but proved:
on first use the sum and its gradient are compared with the model's own loss on a few tokens. Where they differ the
model's own loss is used, and `reason` says why.

Does not know batches, optimizers or devices. Rejected: calling the backbone by name (each family scales, projects or
packs differently before its head) and replacing `forward` (TRL's way: an adapter on the head got no gradient).
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lofi.errors import ModelError
from lofi.models.chunked import chunk_length, chunked_cross_entropy
from lofi.models.logits import LogitTransform, candidates
from lofi.models.probe import random_ids, undisturbed

IGNORED = -100  # transformers' label of a position that is not trained
_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 3e-2}  # else 1e-4: transformers takes the softmax in float32


class LossSum(NamedTuple):
    """The summed loss of one micro-batch (differentiable) and the number of tokens it sums over."""

    loss_sum: Tensor
    tokens: int


class LanguageModelLoss:
    """Sum of -log p(label) over labelled positions: `LanguageModelLoss(model)(model, inputs)`.

    `mode` is "chunked" (head and cross-entropy at labelled positions, in chunks, softmax in float32) or "own" (the
    model's loss times its token count); `reason` says why. Both are settled by a probe on the first call.
    An auxiliary loss that the model reports (routers of mixture-of-experts models with `output_router_logits`) is
    added as the model does, weighted by tokens, so that micro-batches average as one batch would.
    `chunk_tokens` None chooses by vocabulary. The model passed to the call may be wrapped (DDP); it is the one run.
    Exact    chunked equals own up to the order of summation (proved: 1e-4 of the gradient's norm in float32)
    """

    def __init__(self, model: nn.Module, chunk_tokens: int | None = None) -> None:
        if chunk_tokens is not None and chunk_tokens < 1:
            raise ModelError(f"chunk_tokens is {chunk_tokens}, but a chunk holds at least one token; leave it out")
        self.inner = model
        self.chunk_tokens = chunk_tokens
        self.seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))
        self.mode: str | None = None  # settled on first use
        self.reason = "not used yet"
        self.transform = LogitTransform("plain logits")
        self._accepted = inspect.signature(model.forward).parameters

    def __call__(self, model: nn.Module, inputs: dict[str, Any]) -> LossSum:
        """One forward pass of `model` on `inputs` (labels as in transformers: unshifted, -100 = not trained).

        Shapes   input_ids, labels (N, T)
        Raises   ModelError without labels
        """
        if inputs.get("labels") is None:
            raise ModelError("the inputs hold no 'labels', which a loss needs; give labels, -100 where not trained")
        if self.mode is None:
            self.settle()
        run = self._chunked if self.mode == "chunked" else self._own
        return run(model, dict(inputs))

    def settle(self) -> None:
        """Decide `mode` now, by a probe of a few tokens that leaves the model and the random state as they were."""
        failures = []
        for transform in candidates(self.inner):
            self.transform = transform
            fault = self._fault()
            if fault is None:
                self.mode = "chunked"
                self.reason = f"equal to {type(self.inner).__name__}'s own loss ({transform.words})"
                return
            failures.append(f"{transform.words}: {fault}")
        self.mode, self.reason = "own", "; ".join(failures)

    # The two ways

    def _own(self, model: nn.Module, inputs: dict[str, Any]) -> LossSum:
        tokens = int((self._targets(inputs["labels"]) != IGNORED).sum())
        outputs = model(**self._fit(inputs))
        if tokens == 0:  # the mean of nothing is NaN; the graph is kept for wrappers that expect one
            return LossSum(outputs.logits.float().sum() * 0, 0)
        return LossSum(outputs.loss.float() * tokens, tokens)

    def _chunked(self, model: nn.Module, inputs: dict[str, Any]) -> LossSum:
        labels = inputs.pop("labels")
        if self.seq2seq and "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = self.inner.prepare_decoder_input_ids_from_labels(labels=labels)
        head = self.inner.get_output_embeddings()
        with _head_input(head, keep=1) as seen:
            outputs = model(**self._fit(inputs))
        return self._finish(_only(seen), labels, outputs)

    def _finish(self, hidden: Tensor, labels: Tensor, outputs: Any) -> LossSum:
        targets = self._targets(labels).reshape(-1).to(hidden.device)  # (N*T,)
        flat = hidden.reshape(-1, hidden.shape[-1])  # (N*T, D)
        if len(flat) != len(targets):
            raise ModelError(f"the head saw {len(flat)} positions but there are {len(targets)} labels; pad them alike")
        chosen = (targets != IGNORED).nonzero().squeeze(1)
        head = self.inner.get_output_embeddings()
        total = chunked_cross_entropy(
            flat[chosen],
            targets[chosen],
            lambda h: self.transform(head(h)),
            head.parameters(),
            self.chunk_tokens or self._chunk(head, hidden),
        )
        return LossSum(total + self._auxiliary(outputs) * len(chosen), len(chosen))

    def _auxiliary(self, outputs: Any) -> Tensor | float:
        value = getattr(outputs, "aux_loss", None)
        if not isinstance(value, Tensor):
            return 0.0
        return value * float(getattr(self.inner.config, "router_aux_loss_coef", 0.0))

    def _chunk(self, head: nn.Module, hidden: Tensor) -> int:
        vocabulary = getattr(head, "out_features", 0) or getattr(self.inner.config, "vocab_size", 0) or 32768
        trained = any(p.requires_grad for p in head.parameters())
        return chunk_length(int(vocabulary), on_cpu=hidden.device.type == "cpu", trained=trained)

    def _targets(self, labels: Tensor) -> Tensor:
        """What each position predicts: its own label (decoder of a pair) or the next one (N, T) -> (N, T)."""
        if self.seq2seq:
            return labels
        return torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), IGNORED)], dim=1)

    def _fit(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if "use_cache" in self._accepted:
            inputs.setdefault("use_cache", False)  # a cache silently undoes packing (and nobody reads it here)
        return inputs

    # The proof

    def _fault(self) -> str | None:
        """Why the chunked loss is not this model's own on a probe, or None where it is."""
        head = self.inner.get_output_embeddings()
        if head is None:
            return f"{type(self.inner).__name__} names no output head"
        try:
            with torch.inference_mode(False), torch.enable_grad(), undisturbed(self.inner):
                own, own_slope = self._probe(self._own, head)
                ours, our_slope = self._probe(self._chunked, head)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, ModelError) as error:
            return f"the probe failed with {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        tolerance = _TOLERANCE.get(own_slope.dtype, 1e-4)
        gap = float((our_slope - own_slope).float().norm() / own_slope.float().norm().clamp_min(1e-30))
        value_gap = float((ours - own).abs() / own.abs().clamp_min(1e-30))
        if gap <= tolerance and value_gap <= tolerance:
            return None
        return f"loss differs by {value_gap:.1e} and its gradient by {gap:.1e} of the model's own"

    def _probe(self, run: Any, head: nn.Module) -> tuple[Tensor, Tensor]:
        """Sum and gradient with respect to what the head reads, over magnitudes 1 to 32 of it."""
        inputs = self._probe_inputs()
        with _loud_head(head) as leaf:
            loss = run(self.inner, inputs).loss_sum
            (slope,) = torch.autograd.grad(loss, _only(leaf))
        return loss.detach(), slope

    def _probe_inputs(self) -> dict[str, Tensor]:
        ids = random_ids(self.inner, rows=2, length=9, seed=1)
        labels = random_ids(self.inner, rows=2, length=7 if self.seq2seq else 9, seed=2)
        labels[0, :4] = IGNORED
        labels[1, 5] = IGNORED
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@contextmanager
def _head_input(head: nn.Module, keep: int) -> Iterator[list[Tensor]]:
    """Take aside what the head is given by this thread, and let it work on the last `keep` positions only."""
    seen: list[Tensor] = []
    thread = threading.get_ident()

    def take(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if threading.get_ident() != thread:
            return None
        seen.append(args[0])
        return (args[0][..., -keep:, :], *args[1:])

    handle = head.register_forward_pre_hook(take)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def _loud_head(head: nn.Module) -> Iterator[list[Tensor]]:
    """Give the head a leaf with growing magnitudes along the tokens, so that a soft cap or scale cannot hide."""
    leaves: list[Tensor] = []

    def amplify(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if leaves:
            return None  # the chunks of the chunked loss read slices of the first leaf
        hidden = args[0].detach()
        gain = torch.logspace(0, 5, hidden.shape[-2], base=2.0, device=hidden.device, dtype=hidden.dtype)
        leaves.append((hidden * gain[:, None]).requires_grad_())
        return (leaves[0], *args[1:])

    handle = head.register_forward_pre_hook(amplify)
    try:
        yield leaves
    finally:
        handle.remove()


def _only(seen: list[Tensor]) -> Tensor:
    if len(seen) != 1:
        raise ModelError(f"the model calls its output head {len(seen)} times a forward, but once was expected")
    return seen[0]
