"""From names to modules, and the errors for names that mean nothing."""

from __future__ import annotations

import pytest
from torch import nn

import lofi
from adapters.models import toy
from lofi.adapters.config import LoraConfig
from lofi.adapters.target import by_pattern, matches


class Stack(nn.Module):
    """Three numbered layers of two linears each, an odd one outside, and a linear that computes in its own way."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    def __init__(self):
        super().__init__()
        layer = lambda: nn.ModuleDict({"q_proj": nn.Linear(6, 6), "v_proj": nn.Linear(6, 4)})  # noqa: E731
        self.layers = nn.ModuleList([layer() for _ in range(3)])
        self.v_proj_extra = nn.Linear(6, 6)
        self.doubled = self.Doubled(6, 6)


def paths(**config) -> list[str]:
    return [m.path for m in lofi.add_adapter(Stack(), LoraConfig(r=2, **config)).matched]


def test_a_list_matches_whole_name_suffixes_and_nothing_less():
    assert paths(target_modules=["v_proj"]) == [f"layers.{i}.v_proj" for i in range(3)]
    assert matches("a.b.v_proj", ["b.v_proj"])
    assert not matches("a.xv_proj", ["v_proj"])


def test_a_string_is_a_regex_over_the_whole_path():
    assert paths(target_modules=r"layers\.[02]\.q_proj") == ["layers.0.q_proj", "layers.2.q_proj"]
    with pytest.raises(lofi.TargetError, match="matches no module"):
        paths(target_modules="q_proj")


def test_all_linear_takes_every_linear_it_can_compute_and_says_what_it_left():
    model = Stack()
    report = lofi.add_adapter(model, LoraConfig(r=2))
    assert len(report.matched) == 7
    assert report.left_out == [("doubled", "Doubled, a linear that computes in its own way")]


def test_exclusion_and_layers_narrow_the_choice():
    assert paths(exclude_modules=["q_proj", "v_proj_extra"]) == [f"layers.{i}.v_proj" for i in range(3)]
    assert paths(layers_to_transform=[1]) == ["layers.1.q_proj", "layers.1.v_proj"]
    assert paths(layers_to_transform=1, layers_pattern="layers") == ["layers.1.q_proj", "layers.1.v_proj"]


def test_one_of_two_patterns_unmatched_is_an_error_with_the_nearest_names_and_counts():
    with pytest.raises(lofi.TargetError) as error:
        paths(target_modules=["v_proj", "q_prj"])
    assert "'q_prj' matches no module" in str(error.value)
    assert "'q_proj' (3)" in str(error.value)


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_for_ranks_or_alphas_that_nothing_reads_is_an_error(key):
    with pytest.raises(lofi.TargetError, match=rf"{key} 'k_proj' matches no module"):
        paths(**{key: {"k_proj": 3}})


def test_an_exclusion_that_excludes_nothing_is_an_error():
    with pytest.raises(lofi.TargetError, match="exclude_modules 'k_proj'"):
        paths(exclude_modules=["k_proj"])


def test_excluding_everything_is_an_error():
    with pytest.raises(lofi.TargetError, match="leaves no module"):
        paths(target_modules=["q_proj"], exclude_modules=["q_proj"])


def test_matching_something_that_is_no_linear_is_an_error_that_names_it():
    with pytest.raises(lofi.TargetError, match="norm \\(LayerNorm\\)"):
        lofi.add_adapter(toy(), LoraConfig(r=2, target_modules=["norm"]))


def test_missing_modules_to_save_are_named_with_the_nearest():
    with pytest.raises(lofi.TargetError, match="modules_to_save 'haed' matches no module; nearest: 'head'"):
        lofi.add_adapter(toy(), LoraConfig(r=2, modules_to_save=["haed"]))


def test_the_first_matching_pattern_wins_and_keys_may_be_regexes():
    patterns = {r"layers\.\d+\.q_proj": 8, "q_proj": 4}
    assert by_pattern("model.layers.3.q_proj", patterns, 2) == 8
    assert by_pattern("other.q_proj", patterns, 2) == 4
    assert by_pattern("other.v_proj", patterns, 2) == 2


def test_a_head_that_shares_the_embedding_may_be_adapted_and_the_report_says_what_that_means(lofi_tiny):
    model = lofi.load_model(lofi_tiny)
    report = lofi.add_adapter(model, LoraConfig(r=2, target_modules=["lm_head"]))
    assert any("lm_head shares its weight with model.embed_tokens" in note for note in report.notes)


def test_all_linear_says_that_it_leaves_the_head(lofi_tiny):
    report = lofi.add_adapter(lofi.load_model(lofi_tiny), LoraConfig(r=2))
    assert len(report.matched) == 6 * 7
    assert [path for path, _ in report.left_out] == ["lm_head"]
    assert report.trainable == 6 * 2 * (256 * 2 + 128 * 2 + 256 * 4 + 704 * 3 + 256 * 3)
