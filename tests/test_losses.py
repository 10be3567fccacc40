"""Losses against formulas written with `math`, their shapes, and the metrics made from them."""

import importlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import install_import_hook

from una_train import evaluate
from una_train.evaluate import Judged

with install_import_hook(["una_train.losses", "una_train.logps"], "beartype.beartype"):
    losses = importlib.reload(importlib.import_module("una_train.losses"))
    logps = importlib.reload(importlib.import_module("una_train.logps"))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


FORMULAS = {
    "logistic": lambda r, p: -p * math.log(sigmoid(r)) - (1 - p) * math.log(sigmoid(-r)),
    "mse": lambda r, s: (sigmoid(r) - s) ** 2,
    "bce": lambda r, s: -s * math.log(sigmoid(r)) - (1 - s) * math.log(1 - sigmoid(r)),
}


@pytest.mark.parametrize("name", FORMULAS)
@given(st.lists(st.tuples(st.floats(-15, 15), st.floats(0, 1)), min_size=1, max_size=5))
def test_losses_equal_the_formulas(name, cases):
    logit, target = (torch.tensor(values, dtype=torch.float64) for values in zip(*cases, strict=True))
    expected = [FORMULAS[name](r, s) for r, s in cases]
    assert losses.LOSSES[name](logit, target).tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", FORMULAS)
def test_losses_and_gradients_stay_finite_far_out(name):
    logit = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = losses.LOSSES[name](logit, torch.tensor([1.0, 0.0]))
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(logit.grad).all()


def test_swapping_a_comparison_changes_nothing():
    margin, p = torch.tensor([0.7, -2.0]), torch.tensor([1.0, 0.3])
    assert torch.allclose(losses.logistic(margin, p), losses.logistic(-margin, 1 - p))


@pytest.mark.parametrize("name", FORMULAS)
def test_shapes_are_checked(name):
    with pytest.raises(Exception, match=r"did not match|[Tt]ype-check"):
        losses.LOSSES[name](torch.zeros(3, 1), torch.zeros(3))


def test_row_sums_are_of_stretches_and_in_float64():
    sums = logps.row_sums(torch.tensor([1.0, 2, 3, 4]), [1, 3])
    assert sums.tolist() == [1.0, 9.0]
    assert sums.dtype == torch.float64
    with pytest.raises(Exception, match=r"did not match|[Tt]ype-check"):
        logps.row_sums(torch.zeros(2, 2), [2])


# --- metrics -----------------------------------------------------------------------------------


def pair(first, second, p, loss=1.0):
    return Judged((0, 1), "pairwise", loss, (first, second), (p, 1 - p), 4)


def single(h, s, kind="scalar"):
    return Judged((0,), kind, 0.5, (h,), (s,), 2)


def test_accuracy_of_comparisons():
    judged = [pair(1, 0, 1.0), pair(0, 1, 1.0), pair(0, 0, 1.0), pair(3, 0, 0.5), pair(0, 2, 0.2)]
    found = evaluate.by_type(judged, {"pairwise": 0.1})["pairwise"]
    assert found["accuracy"] == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert evaluate.by_type([pair(1, 0, 0.5)], {"pairwise": 0.1})["pairwise"]["accuracy"] is None


def test_calibration_error_by_hand():
    scores, targets = np.array([0.05, 0.07, 0.95, 1.0]), np.array([0.0, 0.1, 1.0, 0.0])
    expected = 0.5 * abs(0.06 - 0.05) + 0.5 * abs(0.975 - 0.5)
    assert evaluate.calibration_error(scores, targets) == pytest.approx(expected)
    assert evaluate.calibration_error(np.array([0.3]), np.array([0.3])) == 0


def test_metrics_do_not_depend_on_which_row_comes_first():
    one = evaluate.by_type([pair(2, 0, 0.9)], {"pairwise": 0.5})
    other = evaluate.by_type([pair(0, 2, 0.1)], {"pairwise": 0.5})
    assert one["pairwise"] == pytest.approx(other["pairwise"])


def test_metrics_by_type():
    found = evaluate.by_type(
        [single(2.0, 0.75), single(-4.0, 0.25), single(1, 1, "binary")], {"scalar": 0.1, "binary": 1}
    )
    assert list(found) == ["binary", "scalar"]
    assert found["scalar"]["count"] == 2
    assert found["scalar"]["implicit_reward"] == pytest.approx(-0.1)
    assert found["scalar"]["kl"] == pytest.approx(-2 / 4)
    assert found["scalar"]["accuracy"] is None
    weights = {"scalar": 1.0, "binary": 3.0}
    judged = [single(0, 0), single(0, 0, "binary")]
    assert evaluate.weighted_loss(judged, weights) == pytest.approx((0.5 + 1.5) / 2)


def test_json_and_tracker_forms():
    assert evaluate.finite({"a": math.nan, "b": {"c": math.inf, "d": 1}}) == {"a": None, "b": {"c": None, "d": 1}}
    assert evaluate.flat({"a": {"b": 1, "c": {"d": 2.0}}, "e": None}) == {"a/b": 1, "a/c/d": 2.0}
