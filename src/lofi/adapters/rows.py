"""New tokens: only their own rows of the embedding train, as a small copy beside the frozen matrix.

Where the output head shares the embedding's weight, the new rows must speak there too: `HeadRows` replaces those
tokens' logits with products against the same trained rows. Encoder-decoders read tokens through embeddings of encoder
and decoder that share the weight of the one that the model names: there `SharedRows` stands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lofi.adapters.embedding import row_scale
from lofi.adapters.surgery import Part
from lofi.errors import TargetError


class TokenRows(Part):
    """Trained values (n, D) of n rows of one embedding (V, D), started from the frozen rows."""

    kind = "rows"
    index: Tensor
    slots: Tensor

    def __init__(self, module: nn.Embedding, ids: Sequence[int]):
        super().__init__()
        vocabulary = module.weight.shape[0]
        wrong = [i for i in ids if not (isinstance(i, int) and 0 <= i < vocabulary)]
        if wrong or not ids:
            raise TargetError(
                f"trainable_token_indices holds {wrong or 'nothing'}, expected token ids from 0 to {vocabulary - 1}; "
                "resize the embedding first if the tokens are new"
            )
        index = torch.tensor(sorted(set(ids)), device=module.weight.device)
        slots = torch.full((vocabulary,), -1, dtype=torch.long, device=module.weight.device)
        slots[index] = torch.arange(len(index), device=index.device)
        self.register_buffer("index", index, persistent=False)  # (n,) token ids, ascending
        self.register_buffer("slots", slots, persistent=False)  # (V,) row of the copy, -1 where the token is frozen
        self.rows = nn.Parameter(module.weight.detach()[index].float())  # (n, D)

    @staticmethod
    def run(module: Any, parts: list[Any], base: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        (ids,) = (*args, *kwargs.values())
        y = base(ids)  # (N, T, D)
        for part in parts:
            slot = part.slots[ids]  # (N, T)
            rows = row_scale(module, part.rows.to(y.dtype)[slot.clamp(min=0)])
            y = torch.where((slot >= 0).unsqueeze(-1), rows, y)
        return y

    def changes(self) -> list[str]:
        return ["weight"]

    def merged(self, tensor_name: str, base: Tensor) -> Tensor:
        return base.detach().index_copy(0, self.index.to(base.device), self.rows.detach().to(base))


class HeadRows(Part):
    """The same trained rows, speaking in the output head that shares the embedding's weight; holds no tensor itself."""

    kind = "rows"

    def __init__(self, owner: TokenRows):
        super().__init__()
        self.__dict__["owner"] = owner  # not registered: the embedding's part owns, saves and moves the rows

    @staticmethod
    def run(module: Any, parts: list[Any], base: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        (x,) = (*args, *kwargs.values())
        logits = base(x)  # (..., V)
        for part in parts:
            index, rows = part.owner.index, part.owner.rows.to(x.dtype)
            bias = None if module.bias is None else module.bias[index]
            logits = logits.index_copy(-1, index, nn.functional.linear(x, rows, bias))
        return logits

    def changes(self) -> list[str]:
        return ["weight"]

    def merged(self, tensor_name: str, base: Tensor) -> Tensor:
        return self.__dict__["owner"].merged(tensor_name, base)


class SharedRows(HeadRows):
    """The same trained rows in another embedding that shares the weight; holds no tensor itself."""

    @staticmethod
    def run(module: Any, parts: list[Any], base: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        return TokenRows.run(module, [part.owner for part in parts], base, *args, **kwargs)
