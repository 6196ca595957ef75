"""Records of runs: what is written is what is read, and what is torn is told."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lofi.errors import AdapterFileError, LofiError
from lofi.evaluate import metrics
from lofi.evaluate.intervals import mean
from lofi.study.record import (
    FIGURES,
    STATISTICS,
    Measured,
    RunRecord,
    load_records,
    measured,
    read_record,
    statistic_name,
    write_record,
)


def record(name: str = "lora-r4-s1", **changes) -> RunRecord:
    rng = np.random.default_rng(3)
    shares = np.stack([rng.random(7), np.ones(7)], 1)
    tables = {"rouge1": Measured(shares, "mean"), "bleu": Measured(rng.random((7, 10)), "bleu")}
    given = {
        "arm": "lora r=4", "method": "lora", "seed": 1, "overrides": {"method": "lora", "lora.r": 4, "train.seed": 1},
        "figures": {"trainable": 24.0, "general_ppl": float("inf")}, "measures": tables,
        "curve": [(1, 2.5), (5, 1.25)], "eval_curve": [(0, 3.0)], "notes": ["resumed"],
    }  # fmt: skip
    return RunRecord(name=name, **(given | changes))


def test_a_record_is_read_as_it_was_written_bit_for_bit(tmp_path):
    ours = record()
    write_record(ours, tmp_path)
    back = read_record(tmp_path)
    for name in ("name", "arm", "method", "seed", "overrides", "status", "error", "curve", "eval_curve", "notes"):
        assert getattr(back, name) == getattr(ours, name), name
    for metric, one in ours.measures.items():
        assert back.measures[metric].statistic == one.statistic
        assert back.measures[metric].rows.dtype == np.float64
        assert (back.measures[metric].rows == one.rows).all()


def test_every_figure_is_there_and_one_that_is_not_finite_is_null(tmp_path):
    write_record(record(), tmp_path)
    figures = read_record(tmp_path).figures
    assert tuple(figures) == tuple(sorted(FIGURES)) and figures["trainable"] == 24
    assert figures["general_ppl"] is None and figures["latency_ms"] is None


def test_the_line_of_results_has_the_values_but_not_the_tables():
    line = record().to_dict()
    assert line["metrics"]["rouge1"]["value"] == pytest.approx(record().measures["rouge1"].rows[:, 0].mean())
    assert line["metrics"]["bleu"]["n"] == 7 and "measures" not in line
    assert len(json.dumps(line)) < 2000


def test_every_statistic_that_the_evaluation_uses_has_a_name():
    answers = [type("Answer", (), {"text": "a b c", "stopped": True})] * 2
    found = metrics.text_measures(metrics.TEXT, answers, [["a b d"]] * 2, language="unicode", stem=False)
    found |= metrics.loss_measures(metrics.LOSS, np.ones((2, 2)))
    found |= metrics.class_measures(metrics.CLASSES, ["x", "y"], ["x", "x"], ["x", "y"])
    found |= {f"tags {k}": v for k, v in metrics.tag_measures(metrics.TAGS, [["O"]], [["B-a"]]).items()}
    for name, one in measured(found).items():
        assert one.value == pytest.approx(float(found[name].statistic(found[name].rows.sum(0)))), name
    assert {name.removeprefix("tags ") for name in found} == set(metrics.METRICS) - {"rouge"}


def test_a_statistic_without_a_name_is_refused():
    assert statistic_name(mean) == "mean" and set(STATISTICS) >= {"bleu", "f1"}
    with pytest.raises(LofiError, match="no statistic with a name"):
        statistic_name(lambda sums: sums)


@pytest.mark.parametrize("damage", ["torn record", "no counts", "torn counts", "other counts", "no format"])
def test_a_damaged_record_is_one_sentence_that_names_the_folder(tmp_path, damage):
    folder = tmp_path / "runs" / "lora-r4-s1"
    write_record(record(), folder)
    text, counts = folder / "record.json", folder / "measures.safetensors"
    if damage == "torn record":
        text.write_text(text.read_text()[:40])
    elif damage == "no counts":
        counts.unlink()
    elif damage == "torn counts":
        counts.write_bytes(counts.read_bytes()[:-9])
    elif damage == "other counts":
        write_record(record(measures={"rouge1": Measured(np.ones((6, 2)), "mean")}), tmp_path / "other")
        counts.write_bytes((tmp_path / "other" / "measures.safetensors").read_bytes())
    else:
        text.write_text("{}")
    with pytest.raises(AdapterFileError, match=r"lora-r4-s1 holds an unreadable run .*; remove that folder") as told:
        read_record(folder)
    assert "\n" not in str(told.value)


def test_records_come_in_the_order_of_the_study_with_the_base_first(tmp_path):
    for name in ("a-s0", "base", "z-s0", "old-s0"):
        write_record(record(name), tmp_path / "runs" / name)
    (tmp_path / "runs" / "half").mkdir()
    (tmp_path / "study.json").write_text(json.dumps({"runs": ["z-s0", "half", "a-s0"]}))
    assert [one.name for one in load_records(tmp_path)] == ["base", "z-s0", "a-s0", "old-s0"]


def test_a_failed_record_has_its_sentence_and_no_counts(tmp_path):
    write_record(record(status="failed", error="prefix tuning needs a cache", measures={}, figures={}), tmp_path)
    back = read_record(tmp_path)
    assert not back.done and back.error == "prefix tuning needs a cache" and back.measures == {}
