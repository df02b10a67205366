"""Measures against scikit-learn's, and against figures worked out by hand; latency by a clock of the test."""

from __future__ import annotations

import numpy as np
import pytest

from mlmesh_training import latency
from mlmesh_training.evaluate import calibration, evaluate, evaluate_regression, softmax


def test_calibration_of_a_small_case_worked_out_by_hand() -> None:
    # Two at confidence 0.9, one of them right; two at 0.6, both right.
    probabilities = np.array([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4], [0.4, 0.6]])
    found = calibration(probabilities, np.array([0, 0, 0, 1]))
    filled = {index: each for index, each in enumerate(found.bins) if each.examples}
    assert {index: (each.examples, each.accuracy) for index, each in filled.items()} == {5: (2, 1.0), 8: (2, 0.5)}
    assert found.expected_error == pytest.approx((0.4 * 2 + 0.4 * 2) / 4)
    assert found.max_error == pytest.approx(0.4)
    assert found.brier == pytest.approx((0.02 + 1.62 + 0.32 + 0.32) / 4)
    assert sum(each.examples for each in found.bins) == 4


def test_calibration_is_nothing_where_probabilities_are_the_truth() -> None:
    found = calibration(np.eye(3)[[0, 1, 2]], np.array([0, 1, 2]))
    assert (found.expected_error, found.max_error, found.brier) == (0.0, 0.0, 0.0)


def test_the_brier_score_of_two_classes_is_twice_that_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(1)
    probabilities = softmax(random.normal(size=(200, 2)) * 3)
    classes = random.integers(0, 2, 200)
    assert calibration(probabilities, classes).brier == pytest.approx(
        2 * metrics.brier_score_loss(classes, probabilities[:, 1])
    )


def test_a_classifier_has_its_calibration_and_no_errors_of_a_regressor() -> None:
    found = evaluate(np.array([[3.0, 0.0], [0.0, 3.0]], dtype=np.float32), np.array([0, 1]), ("a", "b"))
    assert found.calibration is not None
    assert found.regression is None


def test_errors_of_a_regressor_are_those_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(2)
    targets = random.normal(size=100) * 50 + 100
    values = (targets + random.normal(size=100) * 20).astype(np.float32)
    found = evaluate_regression(values, targets)
    assert found.regression is not None
    assert found.regression.mean_absolute_error == pytest.approx(metrics.mean_absolute_error(targets, values))
    assert found.regression.root_mean_squared_error == pytest.approx(metrics.root_mean_squared_error(targets, values))
    assert found.regression.r2 == pytest.approx(metrics.r2_score(targets, values))
    assert found.loss == pytest.approx(found.regression.root_mean_squared_error**2)
    assert (found.calibration, found.labels, found.confusion) == (None, (), ())


def test_a_target_that_is_always_the_same_is_not_explained() -> None:
    found = evaluate_regression(np.zeros(4, dtype=np.float32), np.ones(4))
    assert found.regression is not None
    assert found.regression.r2 == 0.0


class Clock:
    """A clock that requests move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.requests = 0

    def __call__(self) -> float:
        return self.now

    def answer(self, *taken: float) -> None:
        self.now += taken[self.requests % len(taken)]
        self.requests += 1


def test_latency_is_of_requests_after_the_warm_up() -> None:
    clock = Clock()
    found = latency.measure(lambda: clock.answer(9.0, 9.0, *[0.001] * 300), batch_size=8, clock=clock)
    assert (found.batch_size, found.requests) == (8, latency.REQUESTS_MAX)
    assert (found.median_s, found.p95_s) == (pytest.approx(0.001), pytest.approx(0.001))
    assert clock.requests == latency.REQUESTS_MAX + latency.WARM_UPS


def test_a_slow_model_is_not_measured_for_long() -> None:
    clock = Clock()
    found = latency.measure(lambda: clock.answer(2.0), batch_size=1, clock=clock)
    assert (found.requests, found.median_s) == (latency.REQUESTS_MIN, 2.0)
    clock = Clock()
    assert latency.measure(lambda: clock.answer(0.04), batch_size=1, clock=clock).requests == 8


def test_percentiles_are_of_the_nearest_rank() -> None:
    ordered = [float(value) for value in range(1, 101)]
    assert (latency.percentile(ordered, 0.5), latency.percentile(ordered, 0.95)) == (50.0, 95.0)
    assert latency.percentile([7.0], 0.95) == 7.0
