"""The code books: derived from what defines them, and equal to the peer's."""

from __future__ import annotations

import pytest
import torch

from lofi.quant.codes import _constant, code_of, dynamic_code, fp4_code, nf4_code, normal_quantiles


def test_the_normal_float_values_are_the_quantiles_to_seven_digits():
    assert nf4_code().tolist() == pytest.approx(normal_quantiles(), abs=1.3e-7)


def test_the_paper_read_literally_would_give_other_numbers():
    assert max(abs(a - b) for a, b in zip(nf4_code().tolist(), normal_quantiles(1 - 1 / 32), strict=True)) > 1e-3


def test_every_code_book_is_the_peers_to_the_bit():
    functional = pytest.importorskip("bitsandbytes.functional")
    for kind in ("nf4", "fp4"):
        assert torch.equal(code_of(kind), functional.get_4bit_type(kind, device="cpu"))
    assert torch.equal(dynamic_code(), functional.create_dynamic_map())


def test_the_dynamic_code_is_ascending_and_reaches_from_minus_one_to_one():
    code = dynamic_code()
    assert code.shape == (256,) and bool((code[1:] > code[:-1]).all())
    assert code[-1] == 1 and code[0] > -1 and 0.0 in code


def test_the_code_books_are_on_the_cpu_whatever_the_default_device():
    _constant.cache_clear()
    with torch.device("meta"):
        assert all(code.device.type == "cpu" for code in (nf4_code(), fp4_code(), dynamic_code()))


def test_a_code_book_given_out_is_the_callers_own():
    nf4_code().fill_(3.0)
    fp4_code().fill_(3.0)
    assert nf4_code()[7] == 0 and fp4_code()[3] == 1
