"""An adapter that has learned something, for the tests that measure what a merge keeps of it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

import lofi
from lofi.models.load import load_model
from merge.test_disk import data_file


@pytest.fixture(scope="session")
def trained(tmp_path_factory, lofi_tiny):
    """lofi-tiny with an adapter that was trained for a few steps on the rows of `data_file`."""
    tmp_path = tmp_path_factory.mktemp("trained")
    model = load_model(lofi_tiny, dtype="fp32")
    lofi.add_adapter(model, lofi.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"]))
    data = data_file(tmp_path)
    from lofi.data.prepare import prepare
    from lofi.data.records import load_records

    examples = prepare(load_records(data), AutoTokenizer.from_pretrained(lofi_tiny)).examples
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(3):
        for example in examples[:8]:
            ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step(), optimizer.zero_grad()
    lofi.save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter", data
