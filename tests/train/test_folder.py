"""The run folder, the seeds, Ctrl-C and the progress bar: the small rooms."""

from __future__ import annotations

import io
import signal
import threading
from types import SimpleNamespace

import pytest
from rich.console import Console

from lofi.errors import RecipeError
from lofi.recipe import make_recipe
from lofi.train.folder import RunFolder, begin, flat
from lofi.train.interrupt import StopSwitch, listening
from lofi.train.job import context_length, model_task, rows_at_a_time
from lofi.train.progress import ProgressBar
from lofi.train.seeds import PURPOSES, stream
from lofi.train.stopping import EarlyStop


def recipe(folder):
    return make_recipe({"model": "m", "data": {"train": "t.jsonl"}, "output": str(folder)})


def test_a_new_or_empty_folder_is_begun_in_silence(tmp_path):
    assert begin(RunFolder(tmp_path / "new"), recipe(tmp_path / "new"), resume=False).note is None
    assert begin(RunFolder(tmp_path), recipe(tmp_path), resume=False).checkpoint is None


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(RecipeError, match="is a file, expected a folder"):
        begin(RunFolder(tmp_path / "run"), recipe(tmp_path / "run"), resume=False)


def test_a_broken_record_cannot_be_resumed(tmp_path):
    (tmp_path / "chosen.json").write_text("{")
    with pytest.raises(RecipeError, match=r"chosen\.json is broken"):
        begin(RunFolder(tmp_path), recipe(tmp_path), resume=True)


def test_nested_keys_become_dotted_ones():
    assert flat({"a": 1, "b": {"c": [2], "d": {"e": None}}}) == {"a": 1, "b.c": [2], "b.d.e": None}


def test_the_streams_of_one_seed_differ_and_repeat():
    assert len({stream(7, purpose) for purpose in PURPOSES}) == len(PURPOSES)
    assert stream(7, "data") == stream(7, "data") != stream(8, "data")


def test_the_first_ctrl_c_sets_the_switch_and_the_second_stops_at_once():
    switch, before = StopSwitch(), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), listening(switch):
        signal.raise_signal(signal.SIGINT)
        assert switch.asked
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_in_another_thread_ctrl_c_is_left_to_its_owner():
    found = []

    def work():
        with listening(StopSwitch()):
            found.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


def test_early_stopping_counts_evaluations_since_the_best_and_not_the_base():
    def stops(losses: list[float]) -> bool:
        rows = [{"step": 5 * i, "eval_loss": loss} for i, loss in enumerate(losses)]
        control = SimpleNamespace(should_training_stop=False)
        EarlyStop(2).on_evaluate(None, SimpleNamespace(log_history=rows, global_step=9), control)
        return control.should_training_stop

    assert stops([1.0, 3.0, 4.0, 5.0])  # the base's 1.0 is not an evaluation of the run
    assert not stops([9.0, 3.0, 4.0])
    assert not stops([9.0, 3.0, 4.0, 2.0])


def test_without_a_terminal_each_log_is_one_line_with_loss_speed_and_time_left():
    out, counter = io.StringIO(), SimpleNamespace(items=0)
    bar = ProgressBar(counter, Console(file=out, width=200))
    state = SimpleNamespace(global_step=0, max_steps=10)
    bar.on_train_begin(None, state, None)
    counter.items, state.global_step = 500, 4
    bar.on_log(None, state, None, logs={"loss": 2.34567})
    bar.on_log(None, state, None, logs={"eval_loss": 2.5})
    first, second = out.getvalue().splitlines()
    assert first.startswith("step 4/10 · loss 2.3457 ·") and "tokens/s" in first and first.endswith("left")
    assert "validation loss 2.5000" in second


def test_on_a_terminal_there_is_a_bar_and_closing_it_twice_is_harmless():
    out, counter = io.StringIO(), SimpleNamespace(items=0)
    bar = ProgressBar(counter, Console(file=out, force_terminal=True, width=160))
    state = SimpleNamespace(global_step=0, max_steps=10)
    bar.on_train_begin(None, state, None)
    state.global_step = 7
    bar.on_log(None, state, None, logs={"loss": 1.5})
    bar.on_step_end(None, state, None)
    bar.close()
    bar.close()
    assert "7/10" in out.getvalue() and "loss 1.5000" in out.getvalue()


def test_the_context_is_the_shorter_of_what_config_and_tokenizer_say():
    config = SimpleNamespace(max_position_embeddings=514)
    assert context_length(config, SimpleNamespace(model_max_length=512)) == 512
    assert context_length(config, SimpleNamespace(model_max_length=10**30)) == 514
    assert context_length(SimpleNamespace(), SimpleNamespace(model_max_length=10**30)) is None


def test_prompts_and_completions_are_for_the_head_that_the_model_has():
    assert model_task("sft", SimpleNamespace(is_encoder_decoder=True)) == "SEQ_2_SEQ_LM"
    assert model_task("sft", SimpleNamespace(is_encoder_decoder=False)) == "CAUSAL_LM"
    assert model_task("token_classification", SimpleNamespace()) == "TOKEN_CLS"


def test_rows_of_similar_length_are_grouped_and_each_row_once():
    groups = rows_at_a_time([9, 1, 8, 2, 7], 2, seed=1)
    assert [len(one) for one in groups] == [2, 2, 1]
    assert sorted(row for one in groups for row in one) == [0, 1, 2, 3, 4]
    assert set(groups[0]) == {1, 3}
