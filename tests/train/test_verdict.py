"""What the curve says, in words."""

from __future__ import annotations

from lofi.train.verdict import judge


def rows(train: list[float], validation: list[float]) -> list[dict]:
    found = [{"step": 10 * i + 10, "loss": loss} for i, loss in enumerate(train)]
    return found + [{"step": 10 * i + 10, "eval_loss": loss} for i, loss in enumerate(validation)]


def test_a_validation_loss_that_rises_while_training_falls_is_called_overfitting():
    verdict = judge(rows([3.0, 2.0, 1.0, 0.5], [2.5, 2.0, 2.2, 2.6]))
    assert verdict.overfitted and verdict.best_step == 20 and verdict.best_loss == 2.0
    assert "after step 20" in verdict.words and "from 2.0000 to 2.6000" in verdict.words


def test_a_rise_below_one_per_cent_is_noise():
    assert not judge(rows([3.0, 2.0, 1.0], [2.5, 2.0, 2.015])).overfitted


def test_a_rise_without_a_falling_training_loss_is_not_overfitting():
    verdict = judge(rows([3.0, 2.0, 2.5], [2.5, 2.0, 2.6]))
    assert not verdict.overfitted and "rose from 2.0000" in verdict.words


def test_the_best_step_being_the_last_is_said():
    assert "best at the last step (30)" in judge(rows([3.0, 2.0, 1.0], [2.5, 2.2, 2.0])).words


def test_a_run_that_never_fell_below_its_base_is_told_so():
    found = [{"step": 0, "eval_loss": 1.5}, *rows([3.0, 2.0], [1.9, 1.8])]
    verdict = judge(found)
    assert verdict.best_step == 20 and "never fell below the untrained model's 1.5000" in verdict.words


def test_without_validation_nothing_is_claimed():
    verdict = judge(rows([3.0, 1.0], []))
    assert verdict.best_step is None and "nothing says whether it generalises" in verdict.words
    assert "nothing was measured" in judge([]).words
