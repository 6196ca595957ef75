"""The adapters that can be asked for: by name, proved when they come, on the device while they are used.

    device  in a slot of the bank; where none is free, the least recently used one that nobody leases leaves
    host    a copy in memory, ready to be placed: at most `host_bytes`, the least recently used one is forgotten
    disk    its folder and the hash of what was proved: reading it again compares the hash

Knows no requests: the engine leases an adapter for each, in its own thread and between two steps, and that is the only
place where something is written into the bank. `load` and `unload` come from other threads; they change names and host
copies under a lock that is held for microseconds.
"""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from lofi.adapters.batched import AdapterBank, Packed
from lofi.errors import AdapterFileError, DataError, LofiError, RequestError
from lofi.serve.admission import Admission, Admitted
from lofi.serve.request import UnknownAdapter

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
HOST_BYTES = 2 << 30

State = Literal["device", "host", "disk"]


@dataclass(frozen=True, kw_only=True)
class Held:
    """One adapter that can be asked for."""

    name: str
    key: str
    """What its tensors and config hash to; what was computed with it is kept under this."""
    folder: Path
    rank: int
    """The largest rank, 0 without low-rank parts."""
    bytes: int
    """What its tensors take in the base's dtype."""
    modules: tuple[str, ...]
    """Last names of the modules that it adapts."""
    text_format: Any
    """The TextFormat it was trained with, the tokenizer's where it says none."""
    base_model: str | None
    """The base that its config names."""
    notes: tuple[str, ...]
    """What could not be proved, one sentence each."""
    loaded_at: float
    """Seconds since the epoch."""
    state: State


class Lease:
    """An adapter that stays in its slot until `AdapterStore.release`."""

    __slots__ = ("entry", "key", "slot")

    def __init__(self, entry: _Entry, slot: int) -> None:
        self.entry: _Entry | None = entry
        self.slot, self.key = slot, entry.facts["key"]


@dataclass(eq=False)
class _Entry:
    """An adapter by its name, as long as the name or a lease keeps it."""

    facts: dict[str, Any]  # what `Held` says of it but for its state
    packed: Packed | None = None
    slot: int | None = None
    leases: int = 0
    gone: bool = False

    def held(self) -> Held:
        state: State = "device" if self.slot is not None else "host" if self.packed is not None else "disk"
        return Held(**self.facts, state=state)


@dataclass
class _Slots:
    """Who is in which slot of the bank; only the engine's thread writes into it."""

    free: list[int]
    idle: OrderedDict[_Entry, None] = field(default_factory=OrderedDict)  # leased by nobody, least recently used first
    stale: list[int] = field(default_factory=list)  # of adapters that were unloaded: to be cleared between two steps


class AdapterStore:
    """The adapters of one model and its bank.

    Raises  TargetError if the bank is another model's
    """

    def __init__(self, model: Any, tokenizer: Any, *, bank: AdapterBank, host_bytes: int = HOST_BYTES) -> None:
        if bank.model is not model:
            raise RequestError("the bank belongs to another model; make it with AdapterBank(model)")
        self.bank, self.tokenizer, self.host_bytes = bank, tokenizer, host_bytes
        self._admission = Admission(model, product=bank.product)
        self._entries: dict[str, _Entry] = {}
        self._host: OrderedDict[_Entry, int] = OrderedDict()
        self._host_used = 0
        self._slots = _Slots(list(reversed(range(bank.slots))))
        self._lock = threading.RLock()

    # -- from any thread ----------------------------------------------------------------------------------------------

    def load(self, name: str, folder: str | Path, *, replace: bool = False) -> Held:
        """Prove an adapter and admit it under a name; with `replace` in place of the one that has it.

        Requests that lease the replaced one end with it. Blocks for as long as the proofs take.
        Raises  RequestError for a name that is not usable or taken; AdapterFileError, ProofError or TargetError with
                the reason why this adapter is not served. Nothing has changed then
        """
        self._check_name(name, replace)
        admitted = self._admission.admit(Path(folder).absolute())
        entry = _Entry(self._facts(name, admitted), admitted.packed)
        with self._lock:
            self._check_name(name, replace)
            if name in self._entries:
                self._forget(self._entries[name])
            self._entries[name] = entry
            self._keep(entry, admitted.packed)
            return entry.held()

    def unload(self, name: str) -> None:
        """Take a name away; its slot is freed when the last lease is back.  Raises  UnknownAdapter"""
        with self._lock:
            self._forget(self._entry(name))
            del self._entries[name]

    def held(self) -> list[Held]:
        """All adapters, in the order in which they came."""
        with self._lock:
            return [entry.held() for entry in self._entries.values()]

    def get(self, name: str) -> Held:
        """One adapter.  Raises  UnknownAdapter with the nearest name"""
        with self._lock:
            return self._entry(name).held()

    @property
    def host_used(self) -> int:
        """Bytes of the host copies."""
        return self._host_used

    # -- from the engine's thread -------------------------------------------------------------------------------------

    def lease(self, name: str) -> Lease | None:
        """The adapter in a slot, which it keeps until it is released; None while every slot is leased.

        Raises  UnknownAdapter; AdapterFileError where it must be read again and its folder has changed
        """
        with self._lock:
            self._settle()
            entry = self._entry(name)
            if entry.slot is not None:
                return self._leased(entry, entry.slot)
            if not self._slots.free and not self._slots.idle:
                return None
            packed = entry.packed
        packed = packed or self._read_again(entry)  # not under the lock: reading takes its time
        with self._lock:
            if packed is not None and not entry.gone:
                self._settle()
                slot = self._vacated()
                self._place(entry, packed, slot)
                return self._leased(entry, slot)
        return self.lease(name)  # unloaded or replaced meanwhile

    def release(self, lease: Lease) -> None:
        """Give a lease back.  Raises  RequestError for one that was given back before"""
        with self._lock:
            entry, lease.entry = lease.entry, None
            if entry is None:
                raise RequestError("this lease was released before; release each lease once")
            entry.leases -= 1
            if not entry.leases:
                self._vacate(entry)
            self._settle()

    def _read_again(self, entry: _Entry) -> Packed | None:
        """What the folder holds; None for an adapter that was taken away while it was read."""
        try:
            return self._admission.reread(entry.facts["folder"], entry.facts["key"])
        except (LofiError, OSError):
            if entry.gone:
                return None
            raise

    # -- with the lock held -------------------------------------------------------------------------------------------

    def _entry(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            raise self._unknown(name)
        return entry

    def _unknown(self, name: str) -> UnknownAdapter:
        near = get_close_matches(name, self._entries, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"{len(self._entries)} adapters are loaded."
        return UnknownAdapter(f"there is no adapter {name!r}; {hint}")

    def _leased(self, entry: _Entry, slot: int) -> Lease:
        if not entry.leases:
            self._slots.idle.pop(entry, None)
        entry.leases += 1
        if entry in self._host:
            self._host.move_to_end(entry)
        return Lease(entry, slot)

    def _vacated(self) -> int:
        """A free slot, else that of the adapter that was not used for longest."""
        if not self._slots.free:
            oldest, _ = self._slots.idle.popitem(last=False)
            assert oldest.slot is not None
            self._slots.free.append(oldest.slot)
            oldest.slot = None
        return self._slots.free.pop()

    def _place(self, entry: _Entry, packed: Packed, slot: int) -> None:
        try:
            self.bank.place(packed, slot)
        except BaseException:
            self._slots.free.append(slot)
            raise
        entry.slot = slot
        self._keep(entry, packed)

    def _vacate(self, entry: _Entry) -> None:
        """Nobody leases this adapter: its slot is for others, at once or when the bank can be written to."""
        if entry.slot is None:
            return
        if entry.gone:
            self._slots.idle.pop(entry, None)
            self._slots.stale.append(entry.slot)
            entry.slot = None
        else:
            self._slots.idle[entry] = None

    def _forget(self, entry: _Entry) -> None:
        entry.gone = True
        self._drop(entry)
        if not entry.leases:
            self._vacate(entry)

    def _settle(self) -> None:
        """Clear the slots of adapters that are gone; only from the engine's thread."""
        while self._slots.stale:
            slot = self._slots.stale.pop()
            self.bank.clear(slot)
            self._slots.free.append(slot)

    def _keep(self, entry: _Entry, packed: Packed) -> None:
        """Hold the host copy, and let go of older ones until all fit."""
        if entry not in self._host:
            entry.packed = packed
            self._host[entry] = packed.bytes
            self._host_used += packed.bytes
        while self._host_used > self.host_bytes:
            self._drop(next(iter(self._host)))

    def _drop(self, entry: _Entry) -> None:
        entry.packed = None
        self._host_used -= self._host.pop(entry, 0)

    # -- what an adapter is -------------------------------------------------------------------------------------------

    def _check_name(self, name: str, replace: bool) -> None:
        if not NAME.fullmatch(name):
            raise RequestError(
                f"{name[:120]!r} is no name for an adapter: use up to 100 letters, digits, '.', '_' and '-', and begin "
                "with a letter or digit"
            )
        if name in self._entries and not replace:
            raise RequestError(f"there is an adapter {name!r} already: unload it first, or choose another name")

    def _facts(self, name: str, admitted: Admitted) -> dict[str, Any]:
        read, packed = admitted.read, admitted.packed
        return {
            "name": name,
            "key": admitted.key,
            "folder": read.path,
            "rank": packed.rank,
            "bytes": packed.bytes,
            "modules": tuple(sorted({path.rpartition(".")[2] for path in packed.parts})),
            "text_format": self._text_format(admitted),
            "base_model": read.peft.get("base_model_name_or_path"),
            "notes": admitted.notes,
            "loaded_at": time.time(),
        }

    def _text_format(self, admitted: Admitted) -> Any:
        from lofi.data.format import TextFormat

        stored = admitted.read.record.get("text_format")
        try:
            return TextFormat.from_dict(stored, self.tokenizer) if stored else TextFormat.for_tokenizer(self.tokenizer)
        except DataError as error:
            raise AdapterFileError(f"{admitted.read.path}: {error}") from None
