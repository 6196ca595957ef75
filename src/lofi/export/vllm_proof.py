"""Whether an exported adapter folder says what the original says: both on their base, asked the same prompts.

The golden prompts where the adapter has them, else seeded random ids. Knows not  what was converted.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from lofi.adapters.attach import unload
from lofi.errors import LofiWarning, ProofError
from lofi.files.adapter_folder import AdapterFolder, load_adapter
from lofi.files.golden import make_golden, replay
from lofi.merge.live import golden_again
from lofi.merge.source import NAME, Source


def proved_same(read: AdapterFolder, base: Path, exported: Path) -> str:
    """Compare the folder `exported` with the adapter it was made from; one sentence on what was compared.

    Raises  ProofError with the first differences; ModelError and AdapterFileError where either does not load
    """
    from lofi.models.folder import read_config
    from lofi.models.quantization import held_kind

    source = Source(base, read, held_kind(read_config(base).get("quantization_config"), str(base)))
    model = source.open("dequantized" if source.has_both else "auto")
    golden = golden_again(model, read.record.get("golden")) or make_golden(model)
    unload(model, NAME)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LofiWarning)  # said of the original already
        load_adapter(model, exported, NAME)
    differences = replay(model, golden)
    if differences:
        said = "; ".join(str(one) for one in differences[:3])
        raise ProofError(f"the exported adapter does not say what {read.path} says: {said}; please report this")
    count, what = len(golden["prompts"]), "golden prompts" if read.record.get("golden") else "prompts of random tokens"
    return f"loaded again, it gives the original's tokens and logits on {count} {what}"
