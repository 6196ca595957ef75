"""Writing: a batch equals its singles, stops where it must, and leaves the model as it was."""

from __future__ import annotations

import copy

import pytest
import torch

from lofi.errors import RequestError
from lofi.evaluate.generation import encode, generate
from lofi.evaluate.sampling import Sampling

PROMPTS = ["hello there", "a", "some longer prompt here", "xyz", "b", "the end of it all"]


def test_a_batch_of_six_equals_six_singles(family, letters):
    together = generate(family, None, letters, PROMPTS, max_new_tokens=17)
    alone = [generate(family, None, letters, [prompt], max_new_tokens=17)[0] for prompt in PROMPTS]
    assert together == alone
    assert len({tuple(answer.ids) for answer in together}) >= 4  # the prompts matter


def test_greedy_decoding_takes_the_most_likely_token_each_time(family, letters):
    """Against the naive loop: the whole text through the model again for every token, no cache, no padding."""
    answer = generate(family, None, letters, PROMPTS, max_new_tokens=9)[2]
    prompt = torch.tensor([letters.encode_prompt(PROMPTS[2])])
    pair = family.config.is_encoder_decoder
    written = torch.tensor([[0]]) if pair else prompt
    naive: list[int] = []
    while len(naive) < 9 and not (naive and naive[-1] in letters.stop_ids):
        with torch.no_grad():
            output = family(input_ids=prompt, decoder_input_ids=written) if pair else family(input_ids=written)
        naive.append(int(output.logits[0, -1].argmax()))
        written = torch.cat([written, torch.tensor([[naive[-1]]])], dim=1)
    assert answer.ids == [token for token in naive if token not in letters.stop_ids]


def test_an_answer_ends_at_the_first_of_several_stop_tokens_and_leaves_it_out(family, letters):
    free = generate(family, None, letters, PROMPTS, max_new_tokens=12)
    first, second = free[0].ids[3], free[2].ids[5]
    letters.stop_ids = [5, 9, first, second]
    stopped = generate(family, None, letters, PROMPTS, max_new_tokens=12)
    for before, after in zip(free, stopped, strict=True):
        end = next((i for i, token in enumerate(before.ids) if token in (first, second)), None)
        assert after.ids == before.ids[:end]
        assert after.stopped == (end is not None or before.stopped)
        assert after.text == " ".join(map(str, after.ids))
    assert stopped[0].stopped


def test_the_batch_size_changes_nothing(family, letters):
    small = generate(family, None, letters, PROMPTS, max_new_tokens=8, batch_tokens=1)
    assert small == generate(family, None, letters, PROMPTS, max_new_tokens=8, batch_tokens=60)


def test_the_models_generation_config_does_not_bend_greedy_decoding(family, letters):
    plain = generate(family, None, letters, PROMPTS, max_new_tokens=10)
    config = family.generation_config
    config.repetition_penalty, config.do_sample, config.temperature = 9.0, True, 5.0
    config.num_beams, config.no_repeat_ngram_size, config.max_length, config.min_length = 3, 1, 12, 11
    assert generate(family, None, letters, PROMPTS, max_new_tokens=10) == plain


def test_the_models_own_settings_are_followed_when_asked_for(tiny_llama, letters):
    model = tiny_llama()
    plain = generate(model, None, letters, PROMPTS, max_new_tokens=10)
    model.generation_config.no_repeat_ngram_size = 1
    own = generate(model, None, letters, PROMPTS, max_new_tokens=10, sampling="model")
    assert own != plain
    assert all(len(set(answer.ids)) == len(answer.ids) for answer in own)


def test_modes_configs_and_the_random_state_are_left_as_they_were(family, letters):
    family.train()
    next(family.children()).eval()  # a mixture, which a plain train() afterwards would lose
    family.config.use_cache = False
    modes = [module.training for module in family.modules()]
    configs = copy.deepcopy((family.config.to_dict(), family.generation_config.to_dict()))
    state = torch.random.get_rng_state()
    generate(family, None, letters, PROMPTS, max_new_tokens=5, sampling=Sampling(seed=3))
    assert [module.training for module in family.modules()] == modes
    assert (family.config.to_dict(), family.generation_config.to_dict()) == configs
    assert torch.equal(torch.random.get_rng_state(), state)


def test_dropout_is_off_although_the_model_is_training(tiny_llama, letters):
    model = tiny_llama(attention_dropout=0.5)
    calm = generate(model, None, letters, PROMPTS, max_new_tokens=8)
    assert generate(model.train(), None, letters, PROMPTS, max_new_tokens=8) == calm


def test_draws_depend_on_the_seed_and_the_place_but_not_on_the_batch(family, letters):
    draw = {"max_new_tokens": 10, "sampling": Sampling(temperature=1.5, top_k=40, top_p=0.95, seed=4)}
    together = generate(family, None, letters, PROMPTS, **draw)
    assert generate(family, None, letters, PROMPTS, batch_tokens=1, **draw) == together
    draw["sampling"] = Sampling(temperature=1.5, top_k=40, top_p=0.95, seed=5)
    assert generate(family, None, letters, PROMPTS, **draw) != together


def test_the_same_prompt_twice_is_drawn_twice(tiny_llama, letters):
    draw = Sampling(temperature=3.0)
    one, other = generate(tiny_llama(), None, letters, ["abc", "abc"], max_new_tokens=12, sampling=draw)
    assert one.ids != other.ids


def test_token_ids_are_taken_as_they_are(letters):
    assert encode(letters, [3, 4]) == [3, 4]
    assert encode(letters, "ab") == letters.encode_prompt("ab")


def test_progress_is_told_after_each_batch(tiny_llama, letters):
    seen: list[int] = []
    generate(tiny_llama(), None, letters, PROMPTS, max_new_tokens=3, batch_tokens=40, on_done=seen.append)
    assert seen[-1] == 6
    assert len(seen) > 1


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (["ok", ""], {}, "prompt 1 has no token"),
        (["ok", "x" * 60], {"max_new_tokens": 5}, "1 of 2 prompts are too long .prompt 1 has 60 tokens"),
        (["ok"], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (["ok"], {"sampling": "warm"}, "'warm'"),
    ],
)
def test_impossible_requests_are_refused_in_one_sentence(tiny_llama, letters, prompts, options, message):
    with pytest.raises(RequestError, match=message):
        generate(tiny_llama(), None, letters, prompts, **options)


def test_a_format_without_a_stop_token_is_refused(tiny_llama, letters):
    letters.stop_ids = []
    with pytest.raises(RequestError, match="no stop token"):
        generate(tiny_llama(), None, letters, ["a"])
