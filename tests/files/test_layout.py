"""Tensor files: read back bit for bit, written as safetensors reads them, every fault named."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lofi.errors import AdapterFileError
from lofi.files.layout import read_header, read_safetensors, save_safetensors, write_safetensors


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {
        "z": torch.randn(5, 3),
        "a": torch.randn(7, 2).bfloat16(),
        "half": torch.randn(3).half(),
        "byte": torch.arange(5, dtype=torch.uint8),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "none": torch.empty(0, 4),
        "f8": torch.randn(3, 3).to(torch.float8_e4m3fn),
        "turned": torch.randn(3, 5).t(),
        "flag": torch.tensor([True, False]),
        "u32": torch.tensor([1, 2**32 - 1], dtype=torch.uint32),
    }


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and bits(a[k]) == bits(b[k]) for k in a
    )


def test_what_we_write_safetensors_reads_and_the_other_way_round(tmp_path):
    ours, theirs, tensors = tmp_path / "o.safetensors", tmp_path / "t.safetensors", some_tensors()
    save_safetensors(ours, tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, theirs, metadata={"format": "pt"})
    assert same(load_file(ours), tensors)
    assert same(read_safetensors(theirs), tensors) and same(read_safetensors(ours), tensors)
    with safe_open(ours, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_our_file_is_laid_out_as_safetensors_lays_it_out(tmp_path):
    tensors = {k: v.contiguous() for k, v in some_tensors().items() if k in ("z", "a", "half", "byte", "scalar")}
    save_safetensors(tmp_path / "o", tensors)
    save_file(tensors, tmp_path / "t", metadata={"format": "pt"})
    order = [e.name for e in read_header(tmp_path / "o").entries]
    assert [t.dtype.itemsize for t in map(tensors.get, order)] == [8, 4, 2, 2, 1]
    assert (tmp_path / "o").stat().st_size == (tmp_path / "t").stat().st_size


def test_a_plan_is_written_one_tensor_at_a_time_in_its_own_order(tmp_path):
    tensors, asked = some_tensors(), []

    def produce(name):
        asked.append(name)
        return tensors[name]

    plan = [(k, v.dtype, tuple(v.shape)) for k, v in tensors.items()]
    write_safetensors(tmp_path / "f", plan, produce)
    header = read_header(tmp_path / "f")
    assert asked == list(tensors) and header.metadata is None
    assert same(read_safetensors(tmp_path / "f"), tensors)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(AdapterFileError, match=r"x\.safetensors does not exist"):
        read_safetensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 8, 40, 300, -1])
def test_a_truncated_file_says_how_much_is_there(tmp_path, keep):
    save_safetensors(tmp_path / "f", some_tensors())
    whole = (tmp_path / "f").read_bytes()
    cut = whole[:keep]
    (tmp_path / "f").write_bytes(cut)
    with pytest.raises(AdapterFileError, match=r"truncated: \d+|not a safetensors"):
        read_safetensors(tmp_path / "f")


def test_a_file_of_another_kind_is_not_safetensors(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "f")
    with pytest.raises(AdapterFileError, match="not a safetensors file"):
        read_safetensors(tmp_path / "f")
    (tmp_path / "g").write_bytes((20).to_bytes(8, "little") + b'{"a": [1, 2, 3]}    ' + bytes(9))
    with pytest.raises(AdapterFileError, match="not a safetensors file"):
        read_safetensors(tmp_path / "g")


def test_a_shape_that_contradicts_its_bytes_is_named(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "f").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(AdapterFileError, match=r"tensor a has 8 bytes.*needs 12"):
        read_safetensors(tmp_path / "f")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_named_by_tensor(tmp_path, value):
    tensors = {"good": torch.ones(3), "bad": torch.tensor([1.0, value]), "worse": torch.tensor([value]).bfloat16()}
    save_safetensors(tmp_path / "f", tensors)
    with pytest.raises(AdapterFileError, match=r"NaN or infinity in bad, worse;"):
        read_safetensors(tmp_path / "f")
    assert same(read_safetensors(tmp_path / "f", finite=False), tensors)
