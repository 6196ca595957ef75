"""Starts that split the weight: the base bit for bit at step 0, the same logits from the saved folder, bf16's share."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lofi
from lofi.adapters.init import from_start
from lofi.adapters.registry import adapters_of
from results.lab import Lab, Section

MODELS = ("lofi-tiny", "stories260k")
BASES = ("dense", "nf4", "int8")
STARTS = ("olora", "pissa", "pissa_niter_4", "orthogonal")
RANK, STEPS, LIMIT = 8, 5, 1e-5


def run(lab: Lab) -> Section:
    rows = [_row(lab.model(name), name, base, start) for name in MODELS for base in BASES for start in STARTS]
    bad = [row[:3] for row in rows if "FAIL" in row]
    if bad:
        raise RuntimeError(f"the start or the folder is wrong for {bad}")
    plain, ours = _cancellation(lab.model(MODELS[0]))
    return Section(
        "OLoRA and PiSSA beside an untouched base",
        f"An adapter of rank {RANK} on every linear, float32. Step 0: whether the logits equal the base's bit for bit. "
        f"Then {STEPS} steps of AdamW at 1e-3 on random tokens, saved (plain LoRA of rank {2 * RANK}) and loaded onto "
        f"a fresh base: largest difference of logits, which must be below {LIMIT:g}. PEFT loads onto dense bases here.",
        ["model", "base", "start", "step 0", "moved by training", "loaded by lofi", "loaded by PEFT", "same"],
        rows,
        commands=["python -m results inits"],
        notes=[
            f"In bf16, with OLoRA's factors of lofi-tiny moved by 1 %: relative error of B A - B0 A0 {plain:.2g}, "
            f"of the shifted form [B, B - B0] [A - A0; A0] {ours:.2g} (means over its linears)."
        ],
    )


def _row(folder: Path, name: str, base: str, start: str) -> list[str]:
    model = _load(folder, base)
    alone = _logits(model)
    torch.manual_seed(0)
    lofi.add_adapter(model, lofi.LoraConfig(r=RANK, lora_alpha=2 * RANK, init_lora_weights=start))
    equal = torch.equal(_logits(model), alone)
    _train(model)
    said = _logits(model)
    with tempfile.TemporaryDirectory() as kept:
        lofi.save_adapter(model, kept)
        fresh = _load(folder, base)
        lofi.load_adapter(fresh, kept)
        gaps = [_gap(_logits(fresh), said)]
        if base == "dense":
            gaps.append(_gap(_logits(_in_peft(folder, kept)), said))
    moved = _gap(said, alone)
    good = equal and max(gaps) <= LIMIT < 100 * LIMIT < moved
    shown = [f"{gap:.1e}" for gap in gaps]
    equals = "bit for bit" if equal else "differs"
    return [name, base, start, equals, f"{moved:.2g}", shown[0], shown[1] if len(shown) > 1 else "-",
            "yes" if good else "FAIL"]  # fmt: skip


def _load(folder: Path, base: str) -> Any:
    return lofi.load_model(folder, quantization=None if base == "dense" else base, dtype="fp32", device="cpu")


def _tokens(model: Any, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.vocab_size, (4, 24), generator=generator)


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    return model.eval()(input_ids=_tokens(model, 1)).logits


def _train(model: Any) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(STEPS):
        tokens = _tokens(model, 2 + step)
        model.train()(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _in_peft(folder: Path, adapter: str) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(_load(folder, "dense"), adapter).eval()


def _gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@torch.no_grad()
def _cancellation(folder: Path) -> tuple[float, float]:
    """Mean relative errors in bf16 of the plain and of the shifted form, factors moved by 1 % of their size."""
    model = _load(folder, "dense")
    lofi.add_adapter(model, lofi.LoraConfig(r=RANK, lora_alpha=2 * RANK, init_lora_weights="olora"))
    generator, errors = torch.Generator().manual_seed(0), []
    for part in adapters_of(model)["default"].parts.values():
        a0, b0 = (t.detach() for t in (part.lora_A, part.lora_B))
        a, b = (t + 0.01 * t.std() * torch.randn(t.shape, generator=generator) for t in (a0, b0))
        exact = b.double() @ a.double() - b0.double() @ a0.double()
        wide, tall = from_start(a, b, a0, b0)
        plain = b.bfloat16().float() @ a.bfloat16().float() - b0.bfloat16().float() @ a0.bfloat16().float()
        ours = tall.bfloat16().float() @ wide.bfloat16().float()
        errors.append([float((form - exact).norm() / exact.norm()) for form in (plain, ours)])
    means = torch.tensor(errors).mean(0).tolist()
    return means[0], means[1]
