"""How a base is quantized, asked of a model and of a config, and said in words."""

from __future__ import annotations

import pytest
from torch import nn

from files.families import family_model
from lofi.errors import ModelError
from lofi.files.quantized import held_quantization, in_words, quantization_of
from quantized_models import quantized


def test_a_model_says_how_it_is_quantized():
    assert quantization_of(nn.Linear(3, 5)) is None
    assert quantization_of(family_model("llama")) is None
    for kind in ("nf4", "int8"):
        assert quantization_of(quantized(family_model("llama"), kind)) == kind


@pytest.mark.parametrize(
    ("held", "kind"),
    [
        (None, None),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "fp4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, "int8"),
    ],
)
def test_a_config_says_how_its_folder_is_quantized(held, kind):
    config = family_model("llama").config
    if held is not None:
        config.quantization_config = held
    assert held_quantization(config, "here") == kind


def test_what_another_library_packed_is_refused():
    config = family_model("llama").config
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ModelError, match="here holds gptq-quantized weights"):
        held_quantization(config, "here")


def test_the_kinds_of_a_base_in_words():
    told = [in_words(kind) for kind in (None, "nf4", "fp4", "int8")]
    assert told == ["a dense base", "an nf4 base", "an fp4 base", "an int8 base"]
