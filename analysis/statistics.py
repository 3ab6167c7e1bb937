"""Statistics over runs (Agarwal et al. 2021, arXiv 2108.13264), with stratified bootstrap intervals.

`scores` are a list with an array per task, its runs on the last axis; tasks may have different numbers of runs, and
leading axes are carried along (the bootstrap resamples in them).
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from scipy import stats

Scores = Sequence[np.ndarray]


def by_task(frame: pd.DataFrame, column: str = "value") -> list[np.ndarray]:
    """A column as scores: an array (runs,) for each `env` of the frame, in the order of their names."""
    return [group[column].to_numpy(float) for _, group in frame.groupby("env")]


def mean(scores: Scores) -> np.ndarray:
    """Mean over all runs of all tasks."""
    return np.concatenate(scores, axis=-1).mean(-1)


def iqm(scores: Scores) -> np.ndarray:
    """Interquartile mean over all runs of all tasks: floor(n / 4) of the n runs are left out at each end."""
    return stats.trim_mean(np.concatenate(scores, axis=-1), 0.25, axis=-1)


def interval(
    statistic: Callable, *groups: Scores, confidence: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval of `statistic(*groups)` from a bootstrap that resamples the runs within each task.

    Args:
        statistic: of one or more scores, such as `iqm` or `lambda x, y: iqm(x) - iqm(y)`.

    Returns:
        (low, high), of the shape of the statistic; NaN if a task has a single run, which has no spread to resample.
    """
    samples = [np.asarray(task, float) for group in groups for task in group]
    ends = np.cumsum([len(group) for group in groups])

    def resampled(*tasks: np.ndarray, axis: int) -> np.ndarray:
        return statistic(*(tasks[end - len(group) : end] for end, group in zip(ends, groups, strict=True)))

    if min(task.shape[-1] for task in samples) < 2:
        nothing = np.full(np.shape(resampled(*samples, axis=-1)), np.nan)
        return nothing[()], nothing[()]
    found = stats.bootstrap(
        samples, resampled, vectorized=True, axis=-1, method="percentile",
        confidence_level=confidence, n_resamples=n_resamples, rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return found.low, found.high


def probability_of_improvement(x: Scores, y: Scores) -> np.ndarray:
    """P(a run of x scores more than a run of y), ties count 1/2; mean over the tasks, which x and y have in common."""
    return np.mean(
        [((a[..., :, None] > b[..., None, :]) + 0.5 * (a[..., :, None] == b[..., None, :])).mean((-2, -1))
         for a, b in zip(x, y, strict=True)], axis=0,
    )  # fmt: skip


def performance_profile(scores: Scores, thresholds: np.ndarray) -> np.ndarray:
    """Share of all runs that score more than each threshold: (thresholds, ...)."""
    runs = np.concatenate(scores, axis=-1)
    return np.stack([(runs > threshold).mean(-1) for threshold in thresholds])


def area_under_curve(evaluations: pd.DataFrame, column: str = "episode_return_mean") -> pd.DataFrame:
    """A row per run: its identity, agent_step (of the last evaluation), value.

    The value is the trapezoid area under a column over agent steps, divided by the range of the steps: a mean return. A
    run with one evaluation has its return.
    """

    def area(steps: np.ndarray, values: np.ndarray) -> dict:
        return {"value": np.trapezoid(values, steps) / np.ptp(steps) if len(steps) > 1 else values[0]}

    return _per_run(evaluations, column, area, ["value"])


def final_performance(
    evaluations: pd.DataFrame, last: int | None = None, column: str = "episode_return_mean"
) -> pd.DataFrame:
    """A row per run: its identity, agent_step (of the last evaluation), n_evaluations, value.

    The value is the mean of a column over the last `last` evaluations, by default over the last tenth of them and at
    least one (10 of the 101 of a full run); n_evaluations says over how many.
    """

    def final(steps: np.ndarray, values: np.ndarray) -> dict:
        used = values[-(last or max(1, len(values) // 10)) :]
        return {"n_evaluations": len(used), "value": used.mean()}

    return _per_run(evaluations, column, final, ["n_evaluations", "value"])


def _per_run(evaluations: pd.DataFrame, column: str, summarise: Callable, results: list[str]) -> pd.DataFrame:
    """The identity of each run, its last agent step, and what `summarise(agent steps, values)` gives."""
    rows = []
    for directory, run in evaluations.sort_values("agent_step").groupby("directory", sort=False):
        steps = run["agent_step"].to_numpy()
        rows.append({"directory": directory, "agent_step": steps[-1], **summarise(steps, run[column].to_numpy())})
    identity = evaluations.loc[:, :"directory"].drop_duplicates("directory")
    return identity.merge(pd.DataFrame(rows, columns=["directory", "agent_step", *results]), on="directory")
