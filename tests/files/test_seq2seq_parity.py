"""Adapters of encoder-decoders in PEFT's folder: PEFT says the same to them, and we to PEFT's."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import lofi
import tiny_t5
from lofi.adapters.merge import merge_in_memory
from lofi.errors import LofiWarning

peft = pytest.importorskip("peft")

TOLERANCE = 1e-5
IDS = torch.tensor([[5, 6, 7, 9, 1], [11, 12, 1, 0, 0]])
FAMILIES = {
    "t5": (tiny_t5.t5, ["q", "v"]),
    "t5 with a head of its own": (lambda: tiny_t5.t5(gated=True, tied=False), ["q", "v", "wo"]),
    "bart": (tiny_t5.bart, ["q_proj", "v_proj"]),
}
VARIETIES = {
    "linears": {},
    "new tokens": {"trainable_token_indices": [1, 5]},
    "both embeddings": {"also": ["encoder.embed_tokens", "decoder.embed_tokens"]},
}
# PEFT speaks new tokens' rows in every head that a class may tie, also where the files give it weights of its own
PAIRS = [(f, v) for f in FAMILIES for v in VARIETIES if (f, v) != ("t5 with a head of its own", "new tokens")]


@pytest.fixture
def base(family, tmp_path):
    """The model as read from files: only so does transformers leave a head of its own untied."""
    FAMILIES[family][0]().save_pretrained(tmp_path / "base")
    return lofi.load_model(tmp_path / "base")


def said(model) -> torch.Tensor:
    told = torch.tensor([[0, 5, 9, 1], [0, 8, 4, 4]])
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=(IDS != 0).long(), decoder_input_ids=told).logits


def stirred(model):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def asked(family: str, variety: str) -> dict:
    more = dict(VARIETIES[variety])
    return {"r": 3, "lora_alpha": 7, "target_modules": [*FAMILIES[family][1], *more.pop("also", [])], **more}


@pytest.mark.parametrize(("family", "variety"), PAIRS)
def test_peft_reads_ours(base, family, variety, tmp_path):
    ours = copy.deepcopy(base)
    lofi.add_adapter(ours, lofi.LoraConfig(**asked(family, variety)))
    stirred(ours)
    lofi.save_adapter(ours, tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a").eval()
    assert theirs.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
    assert (said(ours) - said(theirs)).abs().max() <= TOLERANCE
    assert (said(ours) - said(base)).abs().max() > 0.1  # the adapter says something


@pytest.mark.parametrize(("family", "variety"), PAIRS)
def test_we_read_pefts_and_merge_it(base, family, variety, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", **asked(family, variety))
        theirs = stirred(peft.get_peft_model(copy.deepcopy(base), config))
        theirs.save_pretrained(tmp_path / "a")
    ours = copy.deepcopy(base)
    with pytest.warns(LofiWarning, match=r"no lofi\.json"):
        lofi.load_adapter(ours, tmp_path / "a")
    assert (said(ours) - said(theirs)).abs().max() <= TOLERANCE
    merged = merge_in_memory(ours)
    assert (said(merged) - said(ours)).abs().max() <= 1e-4
    merged.save_pretrained(tmp_path / "merged")
    assert (said(lofi.load_model(tmp_path / "merged")) - said(merged)).abs().max() <= TOLERANCE
