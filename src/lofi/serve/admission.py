"""Which adapters may speak: a folder is read, put on a twin of the model, and has to prove itself before it serves.

    1. it is whole, finite, and fits this base (files/adapter_folder.py), whose fingerprint is that on record;
    2. it is alive: with it the model says something else than the base;
    3. it computes in a batch with others what it computes alone, and rows beside it stay the base's;
    4. its golden prompts, where it was trained on this quantization, still get the logits on record.

An adapter that was proved is known by its content from then on (`content_key`): reading the same content again only
compares the hash. Knows no names, slots or requests, and never touches the model that serves: twins share its weights.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lofi.adapters.attach import unload
from lofi.adapters.batched import AdapterBank, Packed, pack
from lofi.adapters.batched_pack import PackedRows
from lofi.adapters.batched_product import LowRankProduct
from lofi.adapters.switch import using
from lofi.adapters.twin import twin
from lofi.errors import AdapterFileError, ProofError
from lofi.files.adapter_folder import AdapterFolder, base_notes, fit_adapter, read_folder
from lofi.files.fingerprint import base_fingerprint
from lofi.files.golden import random_prompts, replay_forced, tolerance_of
from lofi.files.quantized import quantization_of

_NAME = "admitted"
_ROWS, _LENGTH = 4, 12
"""Prompts of a proof, and their tokens."""
_ROOM = 3
"""Golden tolerances that a batch may be off by: bf16 rounds in every layer; what is lost altogether shows anyway."""


@dataclass(frozen=True)
class Admitted:
    """An adapter that proved itself."""

    read: AdapterFolder
    key: str
    packed: Packed
    notes: tuple[str, ...]
    """What to know of it, such as that no record says which base it belongs to."""


def content_key(read: AdapterFolder) -> str:
    """What an adapter's tensors and config hash to; what was computed with it may be kept under this."""
    digest = hashlib.sha256(json.dumps(read.peft).encode())
    for name, tensor in sorted(read.tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Admission:
    """Proves adapters on twins of one model; one proof at a time, from any thread."""

    def __init__(self, model: Any, *, product: LowRankProduct) -> None:
        self._alone, mixed, self._reader = (twin(model).eval() for _ in range(3))
        self._mixed = mixed
        self._bank = AdapterBank(mixed, slots=2, product=product)
        self._fingerprint, self._quantization = base_fingerprint(model), quantization_of(model)
        self._proved: dict[str, tuple[str, ...]] = {}
        self._proving, self._reading = threading.Lock(), threading.Lock()
        self._pins = self._bank.device.type == "cuda"

    def admit(self, folder: str | Path) -> Admitted:
        """Read a folder and prove it.

        Raises  AdapterFileError, ProofError or TargetError with the reason; nothing is kept of it then
        """
        read = read_folder(folder)
        key = content_key(read)
        notes = [*read.notes, *base_notes(read, self._fingerprint, self._quantization)]
        with self._proving:
            notes += fit_adapter(self._alone, read, _NAME)
            try:
                packed = pack(self._alone, _NAME, called=f"the adapter in {read.path}")
                if key not in self._proved:
                    self._proved[key] = tuple(self._prove(read, packed))
            finally:
                unload(self._alone, _NAME)
        return Admitted(read, key, self._held(packed), (*notes, *self._proved[key]))

    def reread(self, folder: Path, key: str) -> Packed:
        """An adapter that was admitted, from its folder once more.

        Raises  AdapterFileError: the folder is gone, or holds another adapter now
        """
        read = read_folder(folder)
        if content_key(read) != key:
            raise AdapterFileError(f"{folder} holds another adapter than the one that was admitted; load it again")
        with self._reading:
            fit_adapter(self._reader, read, _NAME)
            try:
                return self._held(pack(self._reader, _NAME))
            finally:
                unload(self._reader, _NAME)

    def _held(self, packed: Packed) -> Packed:
        return packed.pinned() if self._pins else packed

    @torch.no_grad()
    def _prove(self, read: AdapterFolder, packed: Packed) -> list[str]:
        """Proofs 2 to 4; what to know."""
        ids = self._prompts(read, packed)
        with using(self._alone, None):
            base = self._alone(input_ids=ids).logits.float()  # (N, T, V)
        with using(self._alone, _NAME):
            alone = self._alone(input_ids=ids).logits.float()
        _alive(read.path, base, alone)
        rounding = _ROOM * tolerance_of(self._alone, float(alone.abs().max()))
        notes = _equal_in_batch(read.path, base, alone, self._batched(packed, ids), rounding)
        return notes + self._golden(read)

    def _prompts(self, read: AdapterFolder, packed: Packed) -> Tensor:
        """Ids (N, T): recorded prompts, then seeded random ones, behind tokens that have rows of their own."""
        vocabulary = int(self._alone.config.get_text_config().vocab_size)
        recorded = [record["ids"] for record in (read.record.get("golden") or {}).get("prompts", ())]
        rows = [[*ids, *ids][:_LENGTH] for ids in recorded if 2 * len(ids) >= _LENGTH][: _ROWS - 2]
        rows += random_prompts(vocabulary, count=_ROWS - len(rows))
        own = sorted({int(i) for part in packed.parts.values() if isinstance(part, PackedRows) for i in part.ids[:4]})
        return torch.tensor([[*own[:4], *row][:_LENGTH] for row in rows], device=self._bank.device)

    def _batched(self, packed: Packed, ids: Tensor) -> Tensor:
        """Logits (N, T, V) of a batch whose even rows use the adapter, from two slots, and whose odd rows none."""
        slots = torch.tensor([0, -1, 1, -1], dtype=torch.int32).repeat_interleave(ids.shape[1])
        try:
            for slot in range(self._bank.slots):
                self._bank.place(packed, slot)
            with self._bank.routed(slots):
                return self._mixed(input_ids=ids).logits.float()
        finally:
            for slot in range(self._bank.slots):
                self._bank.clear(slot)

    def _golden(self, read: AdapterFolder) -> list[str]:
        golden = read.record.get("golden")
        if not golden:
            return [f"{read.path} has no golden prompts, so whether it says what it was trained to say is not proved"]
        if (read.record.get("base") or {}).get("quantization") != self._quantization:
            return []  # loading said already that its figures are another base's
        with using(self._alone, _NAME):
            found = replay_forced(self._alone, golden)
        if found:
            raise ProofError(f"{read.path} does not say what is on record: {found[0]}; use the base it was trained on")
        return []


def _alive(folder: Path, base: Tensor, alone: Tensor) -> None:
    if not bool(alone.isfinite().all()):
        raise ProofError(f"{folder} makes the model's logits infinite or NaN; train it again with a lower rate")
    if torch.equal(base, alone):
        raise ProofError(
            f"{folder} changes nothing: with it the model gives the base's logits, bit for bit; train it for longer, "
            "or serve in float32 if its changes are lost in rounding"
        )


def _equal_in_batch(folder: Path, base: Tensor, alone: Tensor, batch: Tensor, rounding: float) -> list[str]:
    """Compare a batch whose even rows use the adapter with the base's logits and the adapter's alone, all (N, T, V)."""
    wanted = torch.where((torch.arange(len(base)) % 2 == 0).to(base.device)[:, None, None], alone, base)
    error, effect = batch - wanted, (alone - base)[::2]
    worst, most = float(error.abs().max()), float(effect.abs().max())
    lost = float(error[::2].norm()) > 0.5 * float(effect.norm())
    if not worst <= rounding or (lost and most > rounding):
        raise ProofError(
            f"{folder} gives other logits in a batch with others than alone (off by {worst:.3g}, tolerance "
            f"{rounding:.3g}, its whole effect {most:.3g}); merge it into the base and serve that"
        )
    return [f"the effect of {folder} ({most:.3g} in a logit) is within this base's rounding"] if lost else []
