"""The whole road of a study: every run once, what was stopped goes on, what fails fails alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lofi.errors import Interrupted, RecipeError
from lofi.study import worker
from lofi.study.folder import alone_in
from lofi.study.processes import in_children, in_process
from lofi.study.record import load_records, read_record
from lofi.study.run import compare

REPOSITORY = Path(__file__).resolve().parents[2]


def do(study, folder, runner=in_process, **more):
    """A study done in this process; the result with the lines that it said."""
    said: list[str] = []
    return compare(study, folder, on_event=said.append, runner=runner, **more), said


def test_a_study_of_two_methods_and_two_seeds_is_done_once(study, tmp_path, quick, rows):
    asked = study({"method": ["full", "lora"], "train.seed": [0, 1]}, general=rows["general"])
    result, said = do(asked, tmp_path)
    names = [record.name for record in result.records]
    assert names == ["base", "full-s0", "lora-s0", "full-s1", "lora-s1"] and not result.failed
    assert "4 runs, 4 to do" in said[0] and not result.notes
    base, full, lora = result.records[:3]
    for record in result.records:
        assert record.measures["rouge1"].rows.shape == (4, 2) and record.value("perplexity") > 1
        assert record.figures["latency_ms"] > 0 and record.figures["general_ppl_base"] == base.figures["general_ppl"]
    assert full.figures["tokens"] == lora.figures["tokens"] > 0
    assert full.figures["trainable"] == full.figures["total"] == base.figures["total"]
    assert lora.figures["trainable"] == lora.figures["total"] - base.figures["total"] > 0
    assert 0 < lora.figures["adapter_mb"] < 1 and lora.figures["peak_mb"] > 0
    assert lora.figures["latency_merged_ms"] > 0 and full.figures["latency_merged_ms"] is None
    assert [step for step, _ in lora.curve] == [1, 2] and lora.figures["general_ppl"] != base.figures["general_ppl"]
    assert {p.name for p in tmp_path.iterdir()} == {"study.json", "results.jsonl", "results.csv", "report.html", "runs"}
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == names and lines[2]["metrics"]["rouge1"]["n"] == 4

    kept = {p.name for p in (tmp_path / "runs/lora-s0/training").iterdir()}
    assert "adapter" in kept and "checkpoints" not in kept
    assert not (tmp_path / "runs/full-s0/training/model").exists()

    again, said = do(asked, tmp_path, quick)
    assert quick.calls == [] and "4 finished before, 0 to do" in said[0]
    assert [record.name for record in again.records] == names == [record.name for record in load_records(tmp_path)]


def test_full_models_and_checkpoints_are_kept_where_asked(study, tmp_path):
    result, _ = do(study({"method": ["full"], "train.max_steps": [3]}, keep="all"), tmp_path)
    assert {"model", "checkpoints"} <= {p.name for p in (tmp_path / "runs/full-max_steps3-s0/training").iterdir()}
    assert result.records[1].figures["adapter_mb"] == pytest.approx(_bytes(tmp_path) / 1e6)


def _bytes(folder: Path) -> int:
    return (folder / "runs/full-max_steps3-s0/training/model/model.safetensors").stat().st_size


def test_a_larger_grid_goes_on_and_another_study_is_refused(study, tmp_path, quick, rows):
    do(study({"lora.r": [3]}), tmp_path, quick)
    result, _ = do(study({"lora.r": [5, 3]}), tmp_path, quick)
    assert quick.calls == ["lora-r3-s0", "lora-r5-s0"]
    assert [record.arm for record in result.records] == ["base", "lora r=5", "lora r=3"]
    others = {
        "it has the run lora-r5-s0, which this one has not": study({"lora.r": [3]}),
        r"the recipe of lora-r\d-s0 was another": study({"lora.r": [5, 3]}, base={"lora.lora_alpha": 9}),
        r"metrics was \['rouge1', 'perplexity'\], is now \['bleu'\]": study({"lora.r": [5, 3]}, metrics=["bleu"]),
        "evaluate was": study({"lora.r": [5, 3]}, evaluate={"rows": 3}),
    }
    for sentence, other in others.items():
        with pytest.raises(RecipeError, match=f"holds another study \\({sentence}"):
            do(other, tmp_path, quick)
    assert len(quick.calls) == 2


def test_rows_that_changed_since_are_refused(study, tmp_path, rows, quick):
    own = tmp_path / "own.jsonl"
    own.write_text(Path(rows["test"]).read_text())
    asked = study({"method": ["lora"]}, base={"data.test": str(own)})
    do(asked, tmp_path / "out", quick)
    own.write_text("\n".join(own.read_text().splitlines()[1:]) + "\n")
    with pytest.raises(RecipeError, match=r"own.jsonl has changed since"):
        do(asked, tmp_path / "out", quick)


def test_two_studies_at_once_in_one_folder_are_refused(study, tmp_path, quick):
    with alone_in(tmp_path), pytest.raises(RecipeError, match="another lofi compare is at work in"):
        do(study(), tmp_path, quick)
    assert quick.calls == []


@pytest.mark.parametrize("place", ["a file", "files of others"])
def test_an_output_that_is_no_study_is_refused(study, tmp_path, place):
    folder = tmp_path / "out"
    folder.write_text("x") if place == "a file" else (folder.mkdir(), (folder / "letter.txt").write_text("x"))
    with pytest.raises(RecipeError, match="is a file, expected" if place == "a file" else "no study of lofi"):
        do(study(), folder)


def test_a_failed_run_does_not_lose_the_others_and_is_tried_again(study, tmp_path, quick):
    quick.fail["full-s0"] = "the roof leaks"
    result, said = do(study(), tmp_path, quick)
    assert [record.name for record in result.failed] == ["full-s0"]
    assert result.failed[0].error == "the roof leaks"
    assert result.records[2].done and (tmp_path / "report.html").is_file()
    assert any(line == "full-s0: failed: the roof leaks" for line in said)
    again, _ = do(study(), tmp_path, quick)
    assert not again.failed and quick.calls == ["full-s0", "lora-s0", "full-s0"]


def test_a_run_that_cannot_be_done_is_told_before_and_the_rest_goes_on(study, tmp_path, quick):
    result, said = do(study({"method": ["bitfit", "lora"]}), tmp_path, quick)
    assert said[0].startswith("bitfit-s0 cannot be done: BitFit trains biases") and quick.calls == ["lora-s0"]
    assert [record.name for record in result.failed] == ["bitfit-s0"] and result.failed[0].error in said[0]
    assert not (tmp_path / "runs" / "bitfit-s0").exists()


def test_a_study_of_which_nothing_can_be_done_writes_nothing(study, tmp_path):
    with pytest.raises(RecipeError, match="no run of this study can be done: BitFit trains biases"):
        do(study({"method": ["bitfit"], "train.seed": [0, 1]}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unreadable_run_is_one_sentence_and_the_others_go_on(study, tmp_path, quick):
    do(study(), tmp_path, quick)
    (tmp_path / "runs/lora-s0/record.json").write_text("{")
    result, said = do(study({"method": ["full", "lora", "houlsby"]}), tmp_path, quick)
    assert "lora-s0 holds an unreadable run" in said[0] and "remove that folder and run the study again" in said[0]
    assert [record.name for record in result.failed] == ["lora-s0"] and quick.calls[-1] == "houlsby-s0"
    assert (tmp_path / "runs/lora-s0/record.json").read_text() == "{"  # what is there is left to its owner


def test_an_interrupted_study_says_how_to_go_on_and_goes_on(study, tmp_path, quick):
    quick.fail["lora-s0"] = Interrupted("stopped at step 1")
    with pytest.raises(Interrupted, match=r"the finished runs in .* stay.*run the same lofi compare") as told:
        do(study(), tmp_path, quick)
    assert told.value.exit_code == 130
    result, said = do(study(), tmp_path, quick)
    assert "1 finished before, 1 to do" in said[0] and not result.failed
    assert quick.calls == ["full-s0", "lora-s0", "lora-s0"]


def test_a_run_that_was_stopped_while_it_trained_goes_on_bit_for_bit_and_says_so(study, tmp_path, monkeypatch):
    from transformers import TrainerCallback

    from lofi.train import loop

    whole, _ = do(study({"method": ["lora"]}), tmp_path / "whole")
    real = loop.make_trainer

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **more):
            if state.global_step == 1:  # the checkpoint of the first step is written
                raise MemoryError

    def stopping(*given, **more):
        trainer = real(*given, **more)
        trainer.add_callback(Stop())
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_trainer", stopping)
        failed, _ = do(study({"method": ["lora"]}), tmp_path / "parts")
    assert failed.failed[0].error.startswith("memory ran out")
    parts, _ = do(study({"method": ["lora"]}), tmp_path / "parts")
    ours, theirs = parts.records[1], whole.records[1]
    assert ours.notes[0].startswith("it was stopped and went on") and not any("stopped" in n for n in theirs.notes)
    assert np.array_equal(ours.measures["perplexity"].rows, theirs.measures["perplexity"].rows)


def test_unequal_budgets_are_told(study, tmp_path, quick):
    result, _ = do(study({"train.max_steps": [2, 4]}), tmp_path, quick)
    assert len(result.notes) == 1 and "did not train on equally many tokens as the study asks" in result.notes[0]


def test_a_classifier_is_compared_too_and_under_several_jobs_its_times_are_left_out_or_told(study, tmp_path, rows):
    data = {"data.train": rows["labelled"], "data.test": rows["labelled"]}
    result, _ = do(study({"method": ["lora"]}, base=data, metrics=["accuracy", "macro_f1"]), tmp_path, jobs=2)
    base, lora = result.records
    assert base.measures["accuracy"].n == lora.measures["accuracy"].n == 4 and not result.failed
    assert any("random one" in note for note in base.notes)
    assert lora.figures["latency_ms"] is None and lora.figures["tokens_per_second"] > 0
    assert any("under load" in note for note in lora.notes)
    assert base.figures["latency_ms"] > 0  # the base is measured alone


def test_children_measure_their_own_memory_survive_each_other_and_print_nothing_here(study, tmp_path, capfd):
    """One process is killed from outside while it trains; the other run is done; the next call goes on."""
    asked = study({"method": ["lora", "full"]}, base={"train.max_steps": 4})
    killed = []

    def said(line: str) -> None:
        if line.endswith("lora-s0: training") and not killed:
            killed.append(_kill_child())

    result = compare(asked, tmp_path, on_event=said, runner=in_children(1))
    assert killed and [record.name for record in result.failed] == ["lora-s0"]
    assert "its process was killed by SIGKILL" in result.failed[0].error
    full = next(record for record in result.records if record.name == "full-s0")
    assert full.done and full.figures["peak_mb"] > 100
    assert capfd.readouterr().out == "" and (tmp_path / "runs/full-s0/log.txt").is_file()
    again = compare(asked, tmp_path, runner=in_process)
    assert not again.failed and read_record(tmp_path / "runs" / "lora-s0").done


def _kill_child() -> int:
    """Kill -9 the one child that works now; its process id."""
    import multiprocessing

    (child,) = multiprocessing.active_children()
    os.kill(child.pid, signal.SIGKILL)
    return child.pid


def test_a_killed_study_leaves_no_process_behind(study, tmp_path):
    """The study's own process dies at once; its child ends by itself, and the folder is free for the next call."""
    asked = study({"method": ["lora"]}, base={"train.max_steps": 400})
    (tmp_path / "study.json").write_text(asked.model_dump_json())
    code = (
        "import sys\nfrom pathlib import Path\nfrom lofi.study.run import compare\nfrom lofi.study.spec import Study\n"
        "if __name__ == '__main__':\n"
        "    asked = Study.model_validate_json(Path(sys.argv[1]).read_text())\n"
        "    compare(asked, sys.argv[2], on_event=lambda line: print(line, flush=True))\n"
    )
    out = tmp_path / "out"
    words = [sys.executable, "-c", code, str(tmp_path / "study.json"), str(out)]
    parent = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert parent.stdout is not None
    assert any(line.endswith("lora-s0: training\n") for line in parent.stdout)
    checkpoints = out / "runs/lora-s0/training/checkpoints"
    _wait(lambda: any(checkpoints.glob("checkpoint-*/checkpoint.json")))
    parent.kill()
    parent.communicate()
    _wait(lambda: not _at_work(checkpoints))
    assert not (out / "runs/lora-s0/record.json").exists()
    assert read_record(out / "runs/base").done


def _wait(until, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def _at_work(folder: Path) -> bool:
    """Whether a process still writes checkpoints."""
    before = sorted(p.name for p in folder.iterdir())
    time.sleep(1.0)
    return before != sorted(p.name for p in folder.iterdir())


def test_why_a_run_failed_is_one_line():
    assert worker.sentence(RecipeError("a\n  b")) == "a b"
    assert worker.sentence(KeyError("x")) == "unexpected KeyError: 'x' (this is lofi's fault)"
    assert worker.sentence(RuntimeError()) == "unexpected RuntimeError:  (this is lofi's fault)"
