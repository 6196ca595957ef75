"""`lofi inspect ADAPTER`: beside its base, beside another adapter, as a page and as a picture, and other methods."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import lofi
from lofi.cli.main import main
from lofi.models.load import load_model


def asked(capsys, *words) -> dict:
    capsys.readouterr()
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def weight_of(small_model, path: str) -> torch.Tensor:
    return load_model(small_model).get_submodule(path).weight.detach().double()


def test_each_update_stands_beside_its_weight_as_in_table_7(capsys, finished, small_model):
    found = asked(capsys, "inspect", finished)  # the base is where lofi.json says
    assert found["base_found"] is True and found["method"] == "lora"
    tensors = load_file(finished / "adapter" / "adapter_model.safetensors")
    module = next(m for m in found["modules"] if m["module"].endswith("1.mlp.down_proj"))
    a, b = (tensors[f"base_model.model.{module['module']}.lora_{x}.weight"].double() for x in "AB")
    update, weight = 4.0 * b @ a, weight_of(small_model, module["module"])
    u, s, vh = torch.linalg.svd(update, full_matrices=False)
    inside = float((u[:, :3].t() @ weight @ vh[:3].t()).norm())
    assert module["relative_norm"] == pytest.approx(float(update.norm() / weight.norm()), rel=1e-6)
    assert module["amplification"]["weight"] == pytest.approx(inside, rel=1e-6)
    assert module["amplification"]["factor"] == pytest.approx(float(update.norm()) / inside, rel=1e-6)
    assert module["stable_rank"] == pytest.approx(float(s.square().sum() / s[0] ** 2), rel=1e-6)
    assert module["intruder_dimensions"] is None  # counted only when every module is asked for
    closer = asked(capsys, "inspect", finished, "--all")
    assert all(0 <= each["intruder_dimensions"] <= 10 for each in closer["modules"])
    assert main(["inspect", str(finished)]) == 0
    said = capsys.readouterr().out
    assert "beside the base's weights" in said and "amplification" in said


def test_without_its_base_the_rest_is_shown_and_the_reason_said(capsys, adapter, small_model, lofi_tiny):
    record = json.loads((adapter / "lofi.json").read_text())
    record["base"]["path"] = str(adapter / "gone")
    (adapter / "lofi.json").write_text(json.dumps(record))
    found = asked(capsys, "inspect", adapter)
    assert found["base_found"] is False and found["modules"][0]["amplification"] is None
    assert any("there is no model folder" in note for note in found["notes"])
    assert asked(capsys, "inspect", adapter, "--model", small_model)["base_found"] is True
    assert main(["inspect", str(adapter), "--model", str(lofi_tiny)]) == 1
    assert "was trained on another base" in capsys.readouterr().err


def test_dead_directions_are_counted_and_said(capsys, adapter):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "q_proj.lora_B" in key)
    tensors[key][:, 1] = 0
    save_file(tensors, path, {"format": "pt"})
    found = asked(capsys, "inspect", adapter)
    assert sum(module["dead_directions"] for module in found["modules"]) == 1
    assert any("1 dead directions in 1 modules" in note for note in found["notes"])


def test_an_adapter_against_itself_is_alike_and_against_chance_is_not(capsys, adapter, tmp_path):
    other = shutil.copytree(adapter, tmp_path / "other")
    tensors = load_file(other / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(1)
    drawn = {key: torch.randn(tensor.shape, generator=generator) for key, tensor in tensors.items()}
    save_file(drawn, other / "adapter_model.safetensors", {"format": "pt"})
    same, chance = (asked(capsys, "inspect", adapter, "--against", folder) for folder in (adapter, other))
    assert all(view["full"] == pytest.approx(1.0) for view in same["mean"].values())
    for view in chance["mean"].values():
        assert abs(view["full"] - view["null_full"]) < 0.05 and view["k"] == 3
    assert main(["inspect", str(adapter), "--against", str(other), "--all"]) == 0
    assert "by chance" in capsys.readouterr().out


@pytest.mark.parametrize("against", [False, True])
def test_a_page_holds_everything_itself_and_a_picture_is_a_png(capsys, finished, tmp_path, against):
    more = ["--against", finished] if against else []
    page, picture = tmp_path / "page.html", tmp_path / "picture.png"
    assert asked(capsys, "inspect", finished, *more, "--output", page)["output"] == str(page)
    text = page.read_text()
    assert text.count("<svg") >= 3 and "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert "http" not in text and "<script" not in text and ">nan<" not in text
    assert "model.layers.1.mlp.down_proj" in text
    asked(capsys, "inspect", finished, *more, "--output", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--output", "page.pdf"], "expected a file that ends in .html or .png"),
        (["--against", "nowhere"], "does not exist"),
    ],
)
def test_a_wrong_request_about_an_adapter_is_one_sentence(capsys, finished, words, sentence):
    assert main(["inspect", str(finished), *words]) in (1, 2)
    assert sentence in capsys.readouterr().err


def test_figures_of_what_is_no_adapter_are_refused(capsys, small_model, data):
    assert main(["inspect", str(small_model), "--output", "page.html"]) == 2
    assert "--output is for adapters" in capsys.readouterr().err
    assert main(["inspect", str(data), "--model", str(small_model), "--against", "x"]) == 2
    assert "--against is for adapters" in capsys.readouterr().err


METHODS = {
    "houlsby": (lofi.HoulsbyConfig, {"bottleneck_size": 5}, "a nonlinearity stands between"),
    "adapter-lin": (lofi.LinConfig, {"bottleneck_size": 5}, "a nonlinearity stands between"),
    "prefix": (lofi.PrefixConfig, {"num_virtual_tokens": 3}, "keys and values of virtual tokens"),
    "prompt": (lofi.PromptConfig, {"num_virtual_tokens": 3, "prompt_tuning_init": "RANDOM"}, "embeddings of virtual"),
    "last-layers": (lofi.LastLayersConfig, {"num_layers": 1}, "trained in full"),
    "mixed": (lofi.MixedConfig, {}, "keys and values of virtual tokens"),
}


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_show_their_tensors_and_say_why_there_is_no_spectrum(capsys, method, small_model, tmp_path):
    config, options, sentence = METHODS[method]
    model = load_model(small_model)
    lofi.add_adapter(model, config(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    lofi.save_adapter(model, tmp_path / "adapter")
    found = asked(capsys, "inspect", tmp_path / "adapter")
    assert found["method"] == method and any(sentence in note for note in found["notes"])
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert found["parameters"] == sum(tensor.numel() for tensor in held.values())
    assert found["tensors"] and all(row["norm"] > 0 for row in found["tensors"])
    assert bool(found["modules"]) == (method == "mixed")
    if method == "last-layers":
        assert all(row["moved"] > 0 for row in found["tensors"])
    assert main(["inspect", str(tmp_path / "adapter"), "--output", str(tmp_path / "page.html")]) == 0
    assert main(["inspect", str(tmp_path / "adapter"), "--against", str(tmp_path / "adapter")]) == (
        0 if method == "mixed" else 2
    )
