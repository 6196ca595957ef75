"""`make results`: which experiment may start when, and what a killed one need not do again."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from conftest import REPOSITORY


@pytest.fixture(autouse=True)
def results_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY))


def order(experiments, lanes: int) -> list[tuple[str, tuple[str, ...]]]:
    """(started, what ran beside it), when of those that run the shortest always ends first."""
    from results.lanes import next_up

    waiting, running, seen = list(experiments), {}, []
    while waiting or running:
        while (chosen := next_up(waiting, running, lanes)) is not None:
            waiting.remove(chosen)
            seen.append((chosen.name, tuple(sorted(running))))
            running[chosen.name] = chosen.minutes
        assert running, f"{waiting} would wait for ever"
        first = min(running, key=running.__getitem__)
        spent = running.pop(first)
        running = {name: left - spent for name, left in running.items()}
    return seen


def test_the_longest_start_first_and_never_more_than_there_are_lanes():
    from results.lanes import Experiment

    found = order([Experiment("a", 1), Experiment("b", 9), Experiment("c", 5), Experiment("d", 3)], lanes=2)
    assert found == [("b", ()), ("c", ("b",)), ("d", ("b",)), ("a", ("b",))]


def test_what_is_timed_runs_at_the_end_with_nothing_beside_it():
    from results.lanes import Experiment

    timed, other = Experiment("timed", 50, alone=True), Experiment("memory", 1, alone=True)
    found = order([timed, Experiment("a", 4), other, Experiment("b", 2)], lanes=3)
    assert found == [("a", ()), ("b", ("a",)), ("timed", ()), ("memory", ())]


def test_an_experiment_waits_for_the_one_whose_runs_it_uses_but_only_if_that_one_is_asked_for():
    from results.lanes import Experiment

    first, second = Experiment("first", 1), Experiment("second", 9, after="first")
    assert order([second, first, Experiment("third", 5)], lanes=3) == [
        ("third", ()), ("first", ("third",)), ("second", ("third",)),
    ]  # fmt: skip
    assert order([second], lanes=2) == [("second", ())]


def test_every_experiment_is_a_module_and_their_stated_budgets_add_up_to_ninety_minutes_on_two_cores():
    from results.__main__ import EXPERIMENTS

    names = [experiment.name for experiment in EXPERIMENTS]
    assert all((REPOSITORY / "results" / f"{name}.py").is_file() for name in names)
    assert all(e.after is None or e.after in names for e in EXPERIMENTS) and len(set(names)) == len(names)
    beside = sum(e.minutes for e in EXPERIMENTS if not e.alone)
    assert beside / 2 + sum(e.minutes for e in EXPERIMENTS if e.alone) <= 90


def test_a_failed_experiment_is_named_with_its_last_lines_and_the_others_go_on(tmp_path, capsys):
    from results.lanes import Experiment, run_in_lanes

    code = (
        "import sys; print('about to fail' if sys.argv[1] == 'bad' else 'fine'); sys.exit(3 * (sys.argv[1] == 'bad'))"
    )
    pages: list[int] = []
    experiments = [Experiment("bad", 2), Experiment("good", 1), Experiment("last", 1, alone=True)]
    failed = run_in_lanes(experiments, 2, tmp_path / "logs", [sys.executable, "-c", code], lambda: pages.append(1))
    said = capsys.readouterr().out
    assert failed == ["bad"] and len(pages) == 3
    assert "bad failed with 3:\n  about to fail" in said and said.count("fine") == 2
    assert (tmp_path / "logs" / "good.log").read_text() == "fine\n"


def test_an_experiment_beside_others_gets_its_share_of_the_cores(monkeypatch):
    from results.lanes import Experiment, environment_of

    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    given = {"PATH": "x"}
    assert environment_of(given, Experiment("a", 1), 2)["OMP_NUM_THREADS"] == "3"
    assert environment_of(given, Experiment("a", 1), 8)["OMP_NUM_THREADS"] == "1"
    assert environment_of(given, Experiment("a", 1, alone=True), 2) == given


def test_an_answer_is_kept_until_the_run_that_it_is_about_is_trained_anew(tmp_path, monkeypatch):
    from results import lab as bench

    calls: list[list[str]] = []

    def answered(command, **_):
        calls.append(command)
        return subprocess.CompletedProcess(command, 0, json.dumps({"results": len(calls)}))

    monkeypatch.setattr(bench.subprocess, "run", answered)
    run = tmp_path / "work" / "one"
    run.mkdir(parents=True)
    (run / "done.json").write_text("{}")
    words = ("evaluate", "--adapter", f"adapter={run / 'adapter'}", "--data", "x")

    def fresh() -> dict:
        lab = bench.Lab(tmp_path, tmp_path / "work", "mine")
        answer = lab.lofi(*words)
        assert lab.seconds and lab.commands
        return answer

    assert fresh() == fresh() == {"results": 1}
    os.utime(run / "done.json", ns=(1, 1))
    assert fresh() == {"results": 2} and len(calls) == 2
    bench.Lab(tmp_path, tmp_path / "work", "mine").lofi("merge", "--adapter", "a")
    bench.Lab(tmp_path, tmp_path / "work", "mine").lofi("merge", "--adapter", "a")
    assert len(calls) == 4


def record(arm: str, curve: list[list[float]], trainable: int = 0) -> dict:
    return {"arm": arm, "method": "lora", "curve": curve, "figures": {"trainable": trainable, "total": 1000}}


def test_initialisations_are_compared_by_the_loss_logged_at_a_tenth_of_the_steps():
    from results.methods import PLAIN, RIVALS, _early, early_losses

    curve = [[5, 4.0], [10, 3.0], [100, 1.0]]
    records = [record(PLAIN, curve), record(RIVALS[0], [[5, 4.0], [10, 2.5], [100, 2.0]])]
    assert early_losses(records, PLAIN) == [3.0]
    assert "ahead of LoRA r=8 (Kaiming): training loss -0.500" in _early(records, RIVALS[0])
    assert "has no finished run" in _early(records, RIVALS[1])


def test_the_goal_of_lora_is_judged_where_it_trains_10_to_20_percent():
    from results.methods import _goal

    records = [record("full", [], 1000), record("LoRA r=8", [], 150), record("LoRA r=64", [], 600)]
    bleu = {"full": 40.0, "LoRA r=8": 38.4, "LoRA r=64": 10.0}
    answer = {"results": [{"who": who, "metric": "bleu", "value": value} for who, value in bleu.items()]}
    assert _goal(answer, records) == [
        "LoRA r=8 trains 15.0% and its BLEU is -4.0% of full's; within 5%: reached",
    ]
    answer["results"][1]["value"] = 37.9
    assert "**not reached**" in _goal(answer, records)[0]
