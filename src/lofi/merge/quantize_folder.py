"""Quantizing on disk: a dense model folder becomes a pre-quantized one, proved before it takes its place.

The dense model is opened (its files mapped) and asked the probes; the quantized one is read from the same files a
tensor at a time and written in bitsandbytes' format; what was written is opened again, compared tensor by tensor with
what is in memory, and asked the same probes. Does not know how weights are packed (quant/, models/) and never changes
the folder it was given. Rejected: rewriting the files without a model, which is faster by the opening alone and would
have to know by itself which tensors are linears, heads, tied or renamed.
"""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lofi.errors import ModelError, ProofError, RequestError
from lofi.evaluate.intervals import Interval, bootstrap, ratio
from lofi.files.atomic import atomic_folder, refuse_foreign, write_json
from lofi.files.quantized import Packed, PackedWeight, packed_of, packed_weights, refuse_packed
from lofi.merge.probes import Probes, data_probes, random_probes
from lofi.merge.quantize_report import FILE, Cost, QuantizeReport
from lofi.merge.shards import weight_files
from lofi.merge.source import base_folder
from lofi.merge.verdict import Measured, measure
from lofi.merge.writing import copy_rest
from lofi.models.load import quiet


def quantize_folder(
    base_path: str | Path,
    output: str | Path,
    quantization: Any,
    *,
    data: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
) -> QuantizeReport:
    """Write a dense model folder as a pre-quantized one, then open it and compare it with what it came from.

    `quantization` is "nf4", "int8", an NF4Config or an Int8Config. Tokenizer, chat template and generation config are
    the base's. `data` gives held-out rows on which the loss of both models is measured too.
    Memory  the quantized model twice (the second mapped) and one dense tensor; the dense files are mapped
    Raises  RequestError, ModelError (quantized already, no linear layer, a dtype that cannot be); ProofError where what
            was written does not read back, or answers with NaN; LofiError when the disk refuses. What was at `output`
            is then unchanged
    """
    _check(base_path, output)
    folder = base_folder(base_path)
    dense = _open(folder)
    probes = random_probes(dense) if data is None else data_probes(data, folder, task=None, record={}, columns=columns)
    said = measure(dense, probes)
    began = time.perf_counter()
    model = _quantized(folder, quantization)
    with atomic_folder(output) as aside:
        _save(model, aside)
        copy_rest(folder, aside, keep=("config.json",))
        seconds = time.perf_counter() - began
        errors = weight_errors(dense, model)
        del dense
        gc.collect()  # modules are cycles: the dense model's pages go before the written one's come
        written = _open(aside)
        _prove_same(model, written, output)
        cost = _cost(said, measure(written, probes), probes, quantized=str(written.lofi_quantization))
        report = QuantizeReport(
            output=str(output),
            base=str(base_path),
            packed=_packed(written),
            bytes_before=_bytes(folder),
            bytes_after=_bytes(aside),
            seconds=seconds,
            errors=errors,
            cost=cost,
        )
        write_json(aside / FILE, report.to_dict())
    return report


def _check(base: str | Path, output: str | Path) -> None:
    target, source = Path(output).resolve(), Path(base).resolve()
    if target == source or source in target.parents or (source.exists() and target in source.parents):
        raise RequestError(
            f"output {output} is, holds or lies in the model's folder {base}, which quantizing never changes; "
            "choose another output"
        )
    if FILE not in (path.name for path in Path(output).glob("*")):
        refuse_foreign(output, (), f"a quantized model (it has no {FILE})")


def _open(folder: Path) -> Any:
    """The model of a folder on the CPU, in the dtype and with the packing that its files have."""
    from lofi.models.load import load_model

    model = load_model(folder, device="cpu")
    if model.lofi_new_tensors:
        raise ModelError(
            f"{folder} lacks {', '.join(model.lofi_new_tensors)}, which would be written at random; "
            "train it first, or quantize it while loading with --quantization"
        )
    return model


def _quantized(folder: Path, quantization: Any) -> Any:
    """The dense folder's model, packed while it is read."""
    from transformers import AutoConfig

    from lofi.models.load import load_model

    refuse_packed(AutoConfig.from_pretrained(folder, local_files_only=True), str(folder))
    return load_model(folder, quantization=quantization, device="cpu")


def _save(model: Any, aside: Path) -> None:
    """Write the model as transformers does, without its bar, and readable as the folder's other files are."""
    with quiet():
        model.save_pretrained(aside)
    for file in weight_files(aside):
        shutil.copymode(aside / "config.json", file)  # the writer of safetensors lets nobody but the owner read


@torch.no_grad()
def weight_errors(dense: nn.Module, packed: nn.Module) -> dict[str, float]:
    """Name of each packed weight -> |W - Q(W)| / |W| (Frobenius, float32), largest first."""
    found = {}
    for one in packed_weights(packed):
        stored = dense.get_parameter(one.full_name).float()
        weight = stored.t() if _turned(dense, one.path) else stored  # (O, I) or (E, O, I)
        size = float(weight.norm())
        found[one.full_name] = float((one.dense(torch.float32) - weight).norm()) / size if size else 0.0
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _turned(dense: nn.Module, path: str) -> bool:
    """Whether the dense weight is stored (I, O)."""
    from lofi.adapters.linear import product_of

    product = product_of(dense.get_submodule(path))
    return product is not None and product.transposed


def _prove_same(model: nn.Module, written: nn.Module, output: str | Path) -> None:
    """Every tensor of the written model has the bits of the one in memory, and every packed weight its values."""
    ours, theirs = model.state_dict(), written.state_dict()
    wrong = [name for name in ours if name not in theirs or not _same_bits(ours[name], theirs[name])]
    if not wrong and len(ours) == len(theirs):
        pairs = zip(packed_weights(model), packed_weights(written), strict=True)
        wrong = [one.full_name for one, back in pairs if not _same_values(one, back)]
    if wrong or len(ours) != len(theirs):
        named = wrong[0] if wrong else next(iter(theirs.keys() - ours.keys()))
        raise ProofError(
            f"{output}: {named} does not read back as it was written; check the disk and quantize again "
            "(what was there before is unchanged)"
        )


def _same_values(one: PackedWeight, other: PackedWeight) -> bool:
    return one.full_name == other.full_name and torch.equal(one.dense(torch.float32), other.dense(torch.float32))


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).contiguous().view(torch.uint8), other.reshape(-1).contiguous().view(torch.uint8))


def _cost(dense: Measured, packed: Measured, probes: Probes, *, quantized: str) -> Cost:
    """What the probes say.  ProofError where the quantized model says NaN or infinity."""
    if not bool(torch.isfinite(packed.logits).all()):
        raise ProofError("the quantized model's logits are not finite; check the dense model's own answers")
    error = (packed.logits - dense.logits).abs()
    log_p, log_q = (torch.log_softmax(logits.double(), -1) for logits in (dense.logits, packed.logits))
    losses: dict[str, Interval] = {}
    if dense.losses is not None and packed.losses is not None:
        losses = {"dense": bootstrap(dense.losses, ratio), quantized: bootstrap(packed.losses, ratio)}
    return Cost(
        mean_logit_error=float(error.mean()),
        max_logit_error=float(error.max()),
        logit_size=float(dense.logits.abs().mean()),
        kl=max(0.0, float((log_p.exp() * (log_p - log_q)).sum(-1).mean())),
        top1_agreement=float((packed.logits.argmax(-1) == dense.logits.argmax(-1)).float().mean()),
        positions=len(packed.logits),
        source=probes.source,
        losses=losses,
        examples=0 if dense.losses is None else len(dense.losses),
    )


def _packed(model: nn.Module) -> Packed:
    packed = packed_of(model)
    assert packed is not None
    return packed


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in weight_files(folder))
