"""States come back equal in types, bits and order, without pickle."""

from __future__ import annotations

import math
import random
from collections import OrderedDict, defaultdict

import numpy
import pytest
import torch

from lofi.errors import AdapterFileError, LofiError
from lofi.files.tensors import load_state, save_state


def round_trip(tmp_path, value):
    save_state(tmp_path / "s", value)
    return load_state(tmp_path / "s")


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -3,
        2**64 + 1,
        -(2**9999),
        0.1,
        -0.0,
        5e-324,
        1.7976931348623157e308,
        math.inf,
        -math.inf,
        "tiếng Việt \u2028 \x00 \ud800",
        b"\x00\xff",
        [],
        (),
        {},
        [1, (2, [3.5, None]), {"a": (1,)}],
        {0: "a", 1: {"b": 2}},
        {"$tuple": 1},
        {"$x": [1]},
        {None: 1, (1, "a"): 2, 2.5: 3, True: 4},
        torch.float32,
    ],
    ids=lambda value: type(value).__name__,
)
def test_plain_values_come_back_equal_and_of_the_same_type(tmp_path, value):
    back = round_trip(tmp_path, value)
    assert back == value and type(back) is type(value)
    assert isinstance(value, int) or repr(back) == repr(value)


def test_nan_keeps_its_bits(tmp_path):
    assert math.isnan(round_trip(tmp_path, {"a": math.nan})["a"])


def test_key_order_and_kinds_of_containers_are_kept(tmp_path):
    value = {"z": 1, "a": OrderedDict(b=1), "d": defaultdict(list, {3: [1]}), "s": torch.Size([2, 3])}
    back = round_trip(tmp_path, value)
    assert list(back) == ["z", "a", "d", "s"] and back == value
    assert type(back["s"]) is torch.Size


def test_tensors_and_arrays_come_back_bit_for_bit(tmp_path):
    value = {
        "t": torch.randn(3, 5).bfloat16(),
        "nan": torch.tensor([math.nan, -0.0]),
        "turned": torch.randn(3, 5).t(),
        "array": numpy.arange(6, dtype=numpy.uint32).reshape(2, 3),
        "scalar": numpy.float32(0.1),
        "empty": torch.empty(0),
    }
    back = round_trip(tmp_path, value)
    assert torch.equal(back["t"], value["t"]) and back["t"].dtype == torch.bfloat16
    assert torch.equal(back["nan"].view(torch.int32), value["nan"].view(torch.int32))
    assert torch.equal(back["turned"], value["turned"])
    assert back["array"].dtype == numpy.uint32 and (back["array"] == value["array"]).all()
    assert back["scalar"] == value["scalar"] and type(back["scalar"]) is numpy.float32
    assert back["empty"].shape == (0,)


def test_random_generators_go_on_where_they_were(tmp_path):
    random.seed(5), numpy.random.seed(5), torch.manual_seed(5)
    state = {"python": random.getstate(), "numpy": numpy.random.get_state(), "torch": torch.get_rng_state()}
    back = round_trip(tmp_path, state)
    expected = (random.random(), numpy.random.rand(), torch.rand(3))
    random.setstate(back["python"]), numpy.random.set_state(back["numpy"]), torch.set_rng_state(back["torch"])
    assert random.random() == expected[0] and numpy.random.rand() == expected[1]
    assert torch.equal(torch.rand(3), expected[2])


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adafactor, torch.optim.SGD])
def test_an_optimizer_goes_on_bit_identically(tmp_path, kind):
    def new():
        torch.manual_seed(1)
        layer = torch.nn.Linear(5, 3)
        optimizer = kind(layer.parameters(), lr=0.1)
        return layer, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    def step(layer, optimizer, scheduler):
        layer(torch.ones(2, 5)).square().sum().backward()
        optimizer.step(), scheduler.step(), optimizer.zero_grad()

    one, two = new(), new()
    step(*one), step(*two)
    back = round_trip(tmp_path, {"optimizer": one[1].state_dict(), "scheduler": one[2].state_dict()})
    fresh = new()
    fresh[0].load_state_dict(one[0].state_dict())
    fresh[1].load_state_dict(back["optimizer"]), fresh[2].load_state_dict(back["scheduler"])
    step(*two), step(*fresh)
    assert all(torch.equal(a, b) for a, b in zip(two[0].parameters(), fresh[0].parameters(), strict=True))


def test_a_value_that_needs_pickle_is_refused_by_its_place(tmp_path):
    with pytest.raises(LofiError, match=r"state\.a\[1\]\.b is a builtins\.set"):
        save_state(tmp_path / "s", {"a": [0, {"b": {1, 2}}]})
    with pytest.raises(LofiError, match=r"state is a builtins\.function"):
        save_state(tmp_path / "s", round_trip)


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    save_state(tmp_path / "a", {"x": torch.ones(3)})
    save_state(tmp_path / "b", {"x": torch.zeros(3)})
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "b.safetensors").read_bytes())
    with pytest.raises(AdapterFileError, match="do not belong together"):
        load_state(tmp_path / "a")


@pytest.mark.parametrize("broken", ["s.json", "s.safetensors"])
def test_missing_and_truncated_files_are_named(tmp_path, broken):
    save_state(tmp_path / "s", {"x": torch.ones(30)})
    text = (tmp_path / broken).read_bytes()
    (tmp_path / broken).write_bytes(text[:-20])
    with pytest.raises(AdapterFileError, match=broken):
        load_state(tmp_path / "s")
    (tmp_path / broken).unlink()
    with pytest.raises(AdapterFileError, match=broken):
        load_state(tmp_path / "s")
