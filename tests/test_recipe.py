"""A recipe is checked before anything starts: every fault at once, with its line, the nearest name and a remedy."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from lofi.adapters.config import LoraConfig
from lofi.errors import RecipeError
from lofi.recipe import load_recipe, make_recipe

NEEDED = {"model": "m", "data": {"train": "train.jsonl"}, "output": "runs/x"}


def written(folder: Path, text: str) -> Path:
    path = folder / "first.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def fault_of(*overrides: str, **more) -> str:
    with pytest.raises(RecipeError) as caught:
        make_recipe(NEEDED | more, overrides)
    return str(caught.value)


GOOD = """\
model: Qwen/Qwen3-0.6B
lora: {r: 8, lora_alpha: 24, target_modules: [q_proj, v_proj], rank_pattern: {down_proj: 4}}
data: {train: train.jsonl, validation: validation.jsonl}
train:
  epochs: 2
  learning_rate: 2e-4
output: runs/first
"""


def test_a_good_recipe_gives_its_values_and_the_owners_defaults(tmp_path):
    recipe = load_recipe(written(tmp_path, GOOD))
    assert (recipe.model, recipe.method, recipe.train.epochs, recipe.train.learning_rate) == (
        "Qwen/Qwen3-0.6B",
        "lora",
        2,
        2e-4,
    )
    assert recipe.lora.to_config() == LoraConfig(
        r=8, lora_alpha=24, target_modules=["q_proj", "v_proj"], rank_pattern={"down_proj": 4}
    )


def test_every_field_of_lora_config_is_a_key_with_the_same_default():
    section = make_recipe(NEEDED).lora
    assert {field.name for field in dataclasses.fields(LoraConfig)} == set(type(section).model_fields)
    assert section.to_config() == LoraConfig()


def test_a_misspelt_key_names_its_line_and_the_nearest_known_key(tmp_path):
    path = written(tmp_path, GOOD.replace("learning_rate", "learning_rat"))
    with pytest.raises(RecipeError, match=r"did you mean train\.learning_rate\?") as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}:6: unknown key train.learning_rat")
    assert caught.value.exit_code == 2


def test_a_key_in_the_wrong_section_is_sent_to_the_right_one():
    assert "did you mean train.learning_rate?" in fault_of("learning_rate=1")
    assert "did you mean lora.r?" in fault_of("train.r=4")


def test_all_faults_of_a_file_are_reported_at_once(tmp_path):
    path = written(
        tmp_path, "methd: lora\nlora: {r: 0}\ndata: {train: t}\ntrain: {learning_rate: -1, dtype: bf61}\noutput: o\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    text = str(caught.value)
    assert "5 faults" in text
    for part in ("did you mean method?", "r is 0", "learning_rate is -1", "did you mean bf16?", "model is missing"):
        assert part in text
    assert "line 4: train.learning_rate" in text


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lora.r=0", "r is 0, expected a whole number of at least 1"),
        ("lora.r=true", "lora.r is true, expected a whole number"),
        ("lora.r=4.5", "lora.r is 4.5, expected a whole number"),
        ("lora.lora_dropout=1", "lora_dropout is 1"),
        ("lora.target_modules=3", "lora.target_modules is 3, expected text or a list"),
        ("lora.bias=sometimes", "bias is 'sometimes'"),
        ("train.learning_rate=-1", "train.learning_rate is -1, expected a number above 0"),
        ("train.learning_rate=.nan", "train.learning_rate is nan, expected a finite number"),
        ("train.learning_rate=fast", "train.learning_rate is 'fast', expected a number"),
        ("train.max_length=1", "expected a number at least 2"),
        ("train.epochs=0", "train.epochs is 0, expected a number above 0"),
        ("train=3", "train is 3, expected a section"),
        ("data.train=", "data.train is empty"),
        ("method=lorra", "did you mean lora?"),
        ("method=houlsbi", "did you mean houlsby?"),
        ("houlsby.bottleneck_size=0", "bottleneck_size is 0, expected a whole number of at least 1"),
        ("method=qlroa", "did you mean qlora?"),
        ("quantization=nf5", "did you mean nf4?"),
        ("task=preference", "known to lofi but not in this version"),
        ("train.scheduler=cosin", "did you mean cosine?"),
    ],
)
def test_an_impossible_value_says_what_was_given_and_what_is_expected(override, words):
    assert words in fault_of(override)


def test_qlora_and_int8_lora_say_which_quantization_the_base_has():
    for method, quantization in (("qlora", "nf4"), ("int8-lora", "int8")):
        recipe = make_recipe(NEEDED, [f"method={method}"])
        assert recipe.quantization == quantization and recipe.trains_adapter
        assert recipe.origins["quantization"] == "default"
        assert f"quantization: {quantization}  # default" in recipe.resolved_yaml()
        assert make_recipe(NEEDED, ["method=lora", f"quantization={quantization}"]).quantization == quantization
        assert make_recipe(NEEDED, [f"method={method}", f"quantization={quantization}"]).method == method
    assert make_recipe(NEEDED).quantization is None
    assert not make_recipe(NEEDED, ["method=full"]).trains_adapter


@pytest.mark.parametrize(
    ("method", "quantization", "words"),
    [
        ("qlora", "int8", "method qlora is LoRA over an nf4 base, but quantization is int8; use method int8-lora"),
        ("int8-lora", "nf4", "method int8-lora is LoRA over an int8 base, but quantization is nf4; use method qlora"),
        ("full", "nf4", "method is full and quantization nf4, but quantized weights cannot train; use method qlora"),
        ("full", "int8", "use method int8-lora, or leave quantization out"),
    ],
)
def test_a_method_that_contradicts_the_quantization_is_one_sentence(method, quantization, words):
    said = fault_of(f"method={method}", f"quantization={quantization}")
    assert words in said and said.startswith("the request: ")


def test_epochs_and_max_steps_exclude_each_other():
    assert "a run has one length" in fault_of(train={"epochs": 1, "max_steps": 5})
    assert "a run has one length" in fault_of(train={"epochs": None})
    assert make_recipe(NEEDED, ["train.max_steps=5"]).train.epochs is None


def test_a_length_on_the_command_line_sets_the_files_other_length_aside(tmp_path):
    recipe = load_recipe(written(tmp_path, GOOD), ["train.max_steps=5"])
    assert (recipe.train.epochs, recipe.train.max_steps) == (None, 5)
    assert recipe.origins["train.epochs"] == "command line"


def test_the_size_of_a_step_is_fixed_once():
    both = {"micro_batch_size": 2, "gradient_accumulation_steps": 3}
    assert make_recipe(NEEDED | {"train": both}).train.batch_tokens is None
    assert "leave one of the three out" in fault_of(train=both | {"batch_tokens": 64})
    assert "train.batch_tokens is empty" in fault_of(train={"batch_tokens": None})


def test_every_value_knows_where_it_came_from(tmp_path):
    origins = load_recipe(written(tmp_path, GOOD), ["train.seed=7", "lora={lora_dropout: 0.1}"]).origins
    assert origins["train.learning_rate"] == "file"
    assert origins["train.seed"] == origins["lora.lora_dropout"] == "command line"
    assert origins["lora.bias"] == origins["train.dtype"] == "default"
    assert origins["lora.r"] == "file"


@pytest.mark.parametrize("overrides", [[], ["train.max_steps=3", "lora.target_modules='.*(q|v)_proj'"]])
def test_the_resolved_recipe_reads_back_as_itself(tmp_path, overrides):
    recipe = load_recipe(written(tmp_path, GOOD), overrides)
    text = recipe.resolved_yaml()
    again = load_recipe(written(tmp_path, text))
    assert again.model_dump() == recipe.model_dump()
    assert "  learning_rate: 0.0002  # file" in text
    assert "  seed: 0  # default" in text


def test_a_resolved_recipe_keeps_odd_text(tmp_path):
    odd = {"model": "thư mục/# a: b", "data": {"train": "yes", "columns": {"prompt": "câu hỏi: {x}"}}, "output": "1e5"}
    recipe = make_recipe(odd)
    assert load_recipe(written(tmp_path, recipe.resolved_yaml())).model_dump() == recipe.model_dump()


def test_a_key_given_twice_is_an_error_with_both_lines(tmp_path):
    with pytest.raises(RecipeError, match=r"first\.yaml:8: model is given twice \(first on line 1\)"):
        load_recipe(written(tmp_path, GOOD + "model: other\n"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [\n", r"first\.yaml:2: this is no YAML"),
        ("", "holds no recipe"),
        ("- a\n- b\n", "holds no recipe"),
        ("model: !!python/object/apply:os.system [ls]\n", "this is no YAML"),
    ],
)
def test_a_file_that_is_no_recipe_says_so(tmp_path, text, words):
    with pytest.raises(RecipeError, match=words):
        load_recipe(written(tmp_path, text))


def test_a_missing_or_binary_file_says_so(tmp_path):
    with pytest.raises(RecipeError, match="there is no recipe"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "first.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read as UTF-8"):
        load_recipe(tmp_path / "first.yaml")


@pytest.mark.parametrize("text", ["train.epochs", "=3", "a b=3", "train.epochs=[1"])
def test_an_override_that_cannot_be_read_says_how_to_write_one(text):
    with pytest.raises(RecipeError):
        make_recipe(NEEDED, [text])


def test_a_recipe_cannot_be_changed():
    recipe = make_recipe(NEEDED)
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.seed = 3


EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "recipes"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_is_a_recipe(path):
    recipe = load_recipe(path)
    assert recipe.method in path.stem or path.stem == "qlora-7b"
