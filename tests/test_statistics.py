"""Hand-computed cases, and numbers of rliable."""

import numpy as np
import pandas as pd
import pytest

from analysis.statistics import area_under_curve, final_performance, interval, iqm, mean
from analysis.statistics import performance_profile as profile
from analysis.statistics import probability_of_improvement as improvement


def scores(*tasks: list[float]) -> list[np.ndarray]:
    return [np.array(task, float) for task in tasks]


def curve(steps: list[int], returns: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"seed": 1, "directory": "a", "agent_step": steps, "episode_return_mean": returns})


def test_bootstrap_resamples_within_tasks():
    assert interval(mean, scores([0, 0], [10, 10])) == (5, 5)  # over all four runs it would be 0 to 10


def test_an_interval_has_the_width_of_the_standard_error():
    x, y = np.random.default_rng(0).normal(size=(2, 400))
    for confidence, errors in ((0.95, 1.96), (0.6827, 1)):
        low, high = interval(lambda a, b: mean(a) - mean(b), [x], [y], n_resamples=10_000, confidence=confidence)
        # the variances of two independent means add up; the bootstrap's are over n, not n - 1
        assert (high - low) / 2 == pytest.approx(errors * np.sqrt((x.var() + y.var()) / 400), rel=0.03)


@pytest.mark.filterwarnings("error")
def test_a_single_run_has_no_interval_and_no_warning():
    assert np.isnan(interval(iqm, scores([1, 2, 3], [4]))).all()


def test_area_under_a_curve_is_its_mean_over_agent_steps():
    # trapezoids: 10 steps at a mean of 5, 20 steps at 10
    assert area_under_curve(curve([0, 10, 30], [0, 10, 10]))["value"].item() == (10 * 5 + 20 * 10) / 30
    assert area_under_curve(curve([0], [7]))["value"].item() == 7


def test_final_performance_is_the_mean_of_the_last_evaluations_and_says_of_how_many():
    found = final_performance(curve([20, 0, 10], [5, 1, 2]), last=2)
    assert found.to_dict("records") == [
        {"seed": 1, "directory": "a", "agent_step": 20, "n_evaluations": 2, "value": (2 + 5) / 2}
    ]
    full = final_performance(curve(list(range(0, 505_000, 5000)), list(range(101))))  # the evaluations of a full run
    assert full[["n_evaluations", "value"]].values.tolist() == [[10, sum(range(91, 101)) / 10]]
    assert final_performance(curve([0, 10, 20], [1, 2, 6]))["n_evaluations"].item() == 1


def test_values_and_intervals_are_those_of_rliable():
    runs = scores([200, 184, 173, 204, 170, 229, 206, 198], [527, 420, 411, 621, 444, 532, 416, 563])
    others = scores([200, 184, 173, 223, 231, 254, 195, 229], [527, 420, 411, 588, 441, 557, 469, 646])
    # rliable 1.2.0 with pandas 2 (it does not work with 3) said this, its interval from 50,000 resamples
    assert iqm(runs) == 316.25
    assert improvement(runs, others) == 0.39453125
    assert profile(runs, np.array([150, 250, 450])).tolist() == [1, 0.5, 0.25]
    assert interval(iqm, runs, n_resamples=50_000) == pytest.approx((306.5, 355.1), abs=0.5)
