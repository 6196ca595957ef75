"""What `lofi doctor` says of lofi's own kernels: which are chosen, or why there are none and what is lost."""

from __future__ import annotations

import pytest
import torch

from lofi.cli.doctor import examine
from lofi.errors import RequestError
from lofi.quant.kernels import dispatch


@pytest.fixture(autouse=True)
def _chosen_afresh():
    dispatch._chosen.cache_clear()
    yield
    dispatch._chosen.cache_clear()


def own() -> str:
    return examine("cpu")["kernels"]["lofi's own"]


def test_the_chosen_kernels_are_named_with_their_instruction_set(monkeypatch):
    monkeypatch.delenv("LOFI_KERNELS", raising=False)
    assert own() == dispatch.kernels_for(torch.device("cpu")).name or own().startswith("plain torch, because")


def test_plain_torch_by_request_is_said_to_be_one(monkeypatch):
    monkeypatch.setenv("LOFI_KERNELS", "plain")
    assert own() == "plain torch, as LOFI_KERNELS asks"


def test_where_there_are_none_the_reason_and_the_loss_are_said(monkeypatch):
    monkeypatch.delenv("LOFI_KERNELS", raising=False)
    monkeypatch.setattr("lofi.quant.kernels.native.load_native", lambda: (None, "no C++ compiler was found"))
    assert own() == "plain torch, because no C++ compiler was found; quantized models work, but much slower"


def test_a_path_that_does_not_exist_is_refused(monkeypatch):
    if dispatch.kernels_for(torch.device("cpu")).name == "plain torch":
        pytest.skip("there is no native library here")
    dispatch._chosen.cache_clear()
    monkeypatch.delenv("LOFI_KERNELS", raising=False)
    monkeypatch.setenv("LOFI_ISA", "mmx")
    with pytest.raises(RequestError, match="LOFI_ISA is 'mmx', expected one of"):
        own()
