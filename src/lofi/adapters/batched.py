"""Many adapters over one base in one forward, each token with its own.

    bank = AdapterBank(model, slots=8)
    bank.place(pack(twin_with_adapter, "law"), 0)
    with bank.routed(slots):  # one slot a token, -1 for the base
        model(input_ids=...)

A bank has a fixed number of slots. An adapter takes one by being written into stacked tensors beside the modules that
it adapts, and leaves it by having its rank there set to 0; a module that no placed adapter needs is untouched. Which
adapters there are, who may leave and what is read from disk is the store's affair (serve/store.py).
Placing, clearing and forwards belong to one thread. Rejected: ordinary adapters switched row by row (the forward loops
over adapters), and one batch an adapter (eight adapters of one request each decode eight times as long).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lofi.adapters.batched_pack import Packed, PackedEmbedding, PackedLinear, PackedPart, PackedRows, pack
from lofi.adapters.batched_parts import BankEmbedding, BankLinear, BankPart, Route, Routing
from lofi.adapters.batched_product import PLAIN, LowRankProduct
from lofi.adapters.batched_rows import BankHeadRows, BankRows
from lofi.adapters.linear import product_of
from lofi.adapters.registry import adapters_of
from lofi.adapters.surgery import attach_part, detach_part, own_tensors
from lofi.adapters.switch import Switch
from lofi.errors import TargetError

__all__ = ["AdapterBank", "Packed", "pack"]

_FACTORS, _ROWS = "bank", "bank_rows"
"""Names of a bank's parts at a module: adapters may share an embedding or a head of which one has factors, one rows."""


class AdapterBank:
    """`slots` adapters of a model at once; a forward outside of `routed` is the base's, bit for bit.

    Raises  TargetError if the model has adapters of its own, or another bank
    """

    def __init__(self, model: nn.Module, *, slots: int, product: LowRankProduct = PLAIN) -> None:
        if slots < 1:
            raise TargetError(f"a bank of {slots} slots holds no adapter; give at least 1")
        if adapters_of(model) or "lofi_bank" in model.__dict__:
            raise TargetError("the model already has adapters or a bank; make the bank on a model without (see twin)")
        self.model, self.slots, self.product = model, slots, product
        self.device = next(tensor.device for _, tensor in own_tensors(model))
        self._switch, self._routing = Switch(), Routing()
        self._parts: dict[tuple[str, str], BankPart] = {}
        self._placed: dict[int, list[BankPart]] = {}
        model.__dict__["lofi_bank"] = self

    @property
    def placed(self) -> frozenset[int]:
        """The slots that hold an adapter."""
        return frozenset(self._placed)

    @property
    def bytes(self) -> int:
        """What the stacked tensors take, empty slots included."""
        return sum(part.bytes for part in self._parts.values())

    @torch.inference_mode(False)
    @torch.no_grad()
    def place(self, packed: Packed, slot: int) -> None:
        """Hold an adapter in `slot`, in place of what is there.

        Raises  TargetError for a slot that there is not, or a module that does not take the tensors; the bank is then
                as it was
        """
        self._check(packed, slot)
        self.clear(slot)
        placed = self._placed[slot] = []
        try:
            for path, held in packed.parts.items():
                part = self._part(path, held)
                placed.append(part)
                part.place(slot, held)
        except BaseException:  # memory ran out: nothing is half there
            self.clear(slot)
            raise

    @torch.inference_mode(False)
    @torch.no_grad()
    def clear(self, slot: int) -> None:
        """Let go of what `slot` holds; modules that no other slot adapts get their own class back."""
        for part in self._placed.pop(slot, ()):
            part.clear(slot)
            if not part.users:
                self._detach(part)

    def close(self) -> None:
        """Give the model back as it was."""
        for slot in list(self._placed):
            self.clear(slot)
        self.model.__dict__.pop("lofi_bank", None)

    @contextlib.contextmanager
    def routed(self, slots: Tensor | None) -> Iterator[None]:
        """Inside the block, token m of a forward uses the adapter in slots[m], or the base where that is -1.

        Shapes  slots (M,) int32, M = rows times positions, row by row; None: every token uses the base
        Raises  TargetError for another dtype, shape or slot; in the forward, where a module with adapters sees another
                number of tokens (a head under `logits_to_keep`, an expert)
        """
        routing, switch = self._routing, self._switch
        before = routing.tokens, switch.default
        routing.tokens = None if slots is None else self._route(slots)
        switch.default = () if slots is None else (_FACTORS, _ROWS)
        try:
            yield
        finally:
            routing.tokens, switch.default = before

    def _route(self, slots: Tensor) -> Route:
        if slots.dtype != torch.int32 or slots.ndim != 1:
            raise TargetError(f"slots are {slots.dtype} {tuple(slots.shape)}; give one int32 a token, -1 for the base")
        if slots.is_cpu and slots.numel():  # elsewhere, looking would wait for the device
            least, most = (int(slot) for slot in slots.aminmax())
            if least < -1 or most >= self.slots:
                raise TargetError(f"slots go from {least} to {most}; this bank has 0 to {self.slots - 1}, and -1")
        return Route(slots.to(self.device, non_blocking=True).contiguous(), self.slots)

    def _check(self, packed: Packed, slot: int) -> None:
        if not 0 <= slot < self.slots:
            raise TargetError(f"there is no slot {slot} in a bank of {self.slots}; give 0 to {self.slots - 1}")
        for path, held in packed.parts.items():
            fault = _misfit(held, self._module(path))
            if fault is not None:
                raise TargetError(f"{path} {fault}; place adapters of this base only")

    def _module(self, path: str) -> Any:
        try:
            return self.model.get_submodule(path)
        except AttributeError:
            raise TargetError(f"the base has no module {path}; place adapters of this base only") from None

    def _part(self, path: str, held: Any) -> BankPart:
        """The bank's part of this kind at this module, put there if there is none."""
        name = _ROWS if isinstance(held, PackedRows) else _FACTORS
        part = self._parts.get((path, name))
        if part is None:
            module = self._module(path)
            told = {"routing": self._routing, "path": path, "slots": self.slots}
            part = self._parts[path, name] = _made_for(held, module, told, self.product)
            attach_part(module, name, part, self._switch)
        return part

    def _detach(self, part: BankPart) -> None:
        name = _ROWS if isinstance(part, BankRows) else _FACTORS
        del self._parts[part.path, name]
        detach_part(self._module(part.path), name)


def _made_for(packed: PackedPart, module: Any, where: dict[str, Any], product: LowRankProduct) -> BankPart:
    """The part that holds adapters of this kind at this module; `where` is what every part is told."""
    if isinstance(packed, PackedLinear):
        part: BankPart = BankLinear(**where, product=product)
    elif isinstance(packed, PackedEmbedding):
        part = BankEmbedding(**where, product=product)
    else:
        part = (BankHeadRows if packed.head else BankRows)(**where)
    part.device, part.vocabulary = module.weight.device, int(module.weight.shape[0])
    return part


def _misfit(packed: PackedPart, module: Any) -> str | None:
    """Why this module cannot take these tensors, in words; None where it can."""
    has: Any
    fits: Any
    if isinstance(packed, PackedLinear):
        product = product_of(module)
        has, fits = product and product.shape(module), (packed.b.shape[1], packed.a.shape[1])
    elif not hasattr(module, "weight"):
        has, fits = None, ()
    elif isinstance(packed, PackedEmbedding):
        has, fits = tuple(module.weight.shape), (packed.a.shape[0], packed.b.shape[1])
    else:
        has = tuple(module.weight.shape)
        fits = (has[0] if int(packed.ids[-1]) < has[0] else int(packed.ids[-1]) + 1, packed.rows.shape[1])
    return None if has == fits else f"is {has}, the adapter's is {fits}"
