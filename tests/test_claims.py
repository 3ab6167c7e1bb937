"""Each claim on made-up runs of its figure, where the truth is known: confirmed, refuted, undecided, missing."""

import warnings
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest

from analysis.claims import CLAIMS, Evidence, verdicts
from analysis.runs import Loaded
from analysis.statistics import interval, iqm
from experiments import figures

CONFIRMED, REFUTED, UNDECIDED, TOO_FEW = "confirmed", "refuted", "inconclusive", "not enough runs"
NOISE = np.linspace(-7, 7, 8)  # of the seeds: -7, -5, ..., 7


@dataclass
class Made(Loaded):
    """What loading would give, without files. All TensorBoard tags have the values of the returns."""

    def scalars(self, tags):
        return self.evaluations.rename(columns={"episode_return_mean": "value"})


def made(figure, score=lambda cell: 100, spread=lambda cell: 1, seeds=8, without=()):
    """The runs of a figure: from 100 to score(all flags of the cell) + spread(those) * the noise of the seed."""
    rows = []
    for run in figures.runs(figure, seeds=seeds):
        cell, state = figures.DEFAULTS | run.cell, "missing" if run.directory in without else "complete"
        row = {"env": run.env, "seed": run.seed, **cell, "exp_name": run.exp_name, "directory": run.directory}
        size = np.prod([float(value) ** 2 for flag, value in run.cell.items() if flag.endswith("scale")]) * 1e6
        row |= {f"{module}parameters": size for module in ("", "encoder_", "critic_", "actor_")}
        rows.append(row | {"state": state, "final": score(cell) + spread(cell) * NOISE[run.seed - 1]})
    runs = pd.DataFrame(rows)
    loaded = Made(figure, list(cell.keys() - {"script"}), runs, pd.DataFrame())
    done = runs[runs["state"] == "complete"]
    curves = [
        done[loaded.identity].assign(agent_step=step, episodes=10, episode_return_mean=done["final"] if step else 100)
        for step in (0, 500_000)
    ]
    loaded.evaluations = pd.concat(curves, ignore_index=True)
    return loaded


def by(flag, **scores):
    return lambda cell: scores[str(cell[flag])]


def scaled(cell):
    """Dense critics fall from 100 to 20 at scale 5, the others rise from 100 to 180."""
    scale = cell["critic_scale"] if "critic_scale" in cell else max(cell["width_scale"], cell["depth_scale"])
    return 100 + (scale - 1) * (-20 if cell["critic_regime"] == "dense" else 20)


def opposite(cell):
    return 200 - scaled(cell)


def ladder(mrq, res, mst):
    return lambda cell: mrq if cell["critic_arch"] == 4 else mst if cell["critic_regime"] == "dst" else res


def assignment(critic, actor):
    return lambda cell: 150 if (cell["critic_regime"], cell["actor_regime"]) == (critic, actor) else 100


@pytest.mark.parametrize(
    "figure, score, expected",
    [
        ("fig02", lambda cell: 50 * cell["encoder_arch"], [CONFIRMED]),
        ("fig02", by("encoder_regime", dense=0, sst=50, dst=100, s2d=150, d2s=200), [REFUTED]),
        ("fig03", lambda cell: 20 if cell["encoder_arch"] == 2 else 90, [CONFIRMED, CONFIRMED]),
        ("fig03", lambda cell: 90 if cell["encoder_arch"] == 2 else 20, [REFUTED, REFUTED]),
        ("fig04", lambda cell: 50 * cell["encoder_arch"] * (cell["encoder_scale"] == 5), [CONFIRMED]),
        ("fig06", scaled, [CONFIRMED, CONFIRMED, CONFIRMED]),
        ("fig06", opposite, [REFUTED, REFUTED, REFUTED]),
        ("fig07", by("critic_regime", dense=60, sst=60, dst=10, s2d=60, d2s=60), [CONFIRMED]),
        ("fig07", by("critic_regime", dense=10, sst=10, dst=60, s2d=10, d2s=10), [REFUTED]),
        ("fig09", by("actor_regime", dense=10, sst=90, dst=20, s2d=30, d2s=40), [CONFIRMED, UNDECIDED]),
        ("fig09", by("actor_regime", dense=10, sst=90, dst=20, s2d=30, d2s=140), [REFUTED, UNDECIDED]),
        ("fig11", ladder(mrq=100, res=200, mst=300), [CONFIRMED, CONFIRMED]),
        ("fig11", ladder(mrq=300, res=200, mst=100), [REFUTED, REFUTED]),
        ("fig12", lambda cell: 50 * (cell["growth"] == "rigl"), [CONFIRMED, UNDECIDED]),
        ("fig12", lambda cell: 50 * (cell["growth"] == "set"), [REFUTED, UNDECIDED]),
        ("distribution", lambda cell: 50 * (cell["distribution"] == "er"), [CONFIRMED, CONFIRMED]),
        ("distribution", lambda cell: 50 * (cell["distribution"] == "uniform-dense-output"), [UNDECIDED, REFUTED]),
        ("fig13", scaled, 2 * [CONFIRMED, CONFIRMED, CONFIRMED]),
        ("fig13", opposite, 2 * [REFUTED, REFUTED, REFUTED]),
        ("fig26", scaled, [CONFIRMED, CONFIRMED, CONFIRMED]),
        ("fig14", assignment("dst", "sst"), [CONFIRMED, CONFIRMED, CONFIRMED, UNDECIDED]),
        ("fig14", assignment("sst", "dst"), [REFUTED, REFUTED, REFUTED, UNDECIDED]),
        ("fig17", by("residual", pre=50, post=0), [CONFIRMED, CONFIRMED]),
        ("fig17", by("residual", pre=0, post=50), [REFUTED, REFUTED]),
        ("one-strategy", by("encoder_regime", dense=50, sst=0, dst=90), [UNDECIDED, CONFIRMED, REFUTED]),
    ],
)  # fmt: skip
def test_a_clear_truth_is_found(figure, score, expected):
    assert [verdict.verdict for verdict in verdicts(made(figure, score))] == expected


def test_a_larger_spread_over_seeds_is_found():
    spread = by("actor_regime", dense=1, sst=1, dst=10, s2d=1, d2s=1)
    _, unstable = verdicts(made("fig09", lambda cell: 100, spread=spread))
    *_, in_sac = verdicts(made("fig14", lambda cell: 100, spread=spread))
    # the standard deviation of -7, -5, ..., 7 is sqrt(168 / 7) = 4.899, ten times that for dst
    for verdict in (unstable, in_sac):
        assert (verdict.verdict, verdict.effect) == (CONFIRMED, pytest.approx(9 * np.sqrt(168 / 7)))


def test_effect_and_interval_are_those_of_the_iqm_over_both_tasks():
    loaded = made("fig17", lambda cell: 100 * (cell["residual"] == "pre") + 30 * (cell["critic_scale"] == 3))
    verdict = verdicts(loaded)[1]
    noise = [NOISE, NOISE]  # dog-run and humanoid-run
    assert verdict.effect == iqm(noise) + 130 - (iqm(noise) + 30)
    expected = interval(lambda x, y: iqm(x) - iqm(y), [NOISE + 130] * 2, [NOISE + 30] * 2)
    assert (verdict.low, verdict.high) == expected
    assert str(verdict) == (
        "Pre-layer >= post-layer residuals at scale 3: confirmed. pre - post = 100 return, "
        f"95% interval {expected[0]:.4g} to {expected[1]:.4g}, runs per cell: 16"
    )


@pytest.mark.parametrize("figure", {claims: figure for figure, claims in CLAIMS.items()}.values())  # one for each claim
def test_noise_decides_nothing_and_no_runs_give_no_warning(figure):
    score = {"score": lambda cell: 50 if figure == "fig03" else 100, "spread": lambda cell: 3}
    assert {verdict.verdict for verdict in verdicts(made(figure, **score))} == {UNDECIDED}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = verdicts(made(figure, **score, without=[run.directory for run in figures.runs(figure)]))
    assert {verdict.verdict for verdict in found} == {TOO_FEW}
    assert all(verdict.missing.startswith("missing: ") for verdict in found)


def test_a_tie_confirms_at_least_as_good_but_not_better():
    found = [
        {verdict.verdict for verdict in verdicts(made(figure, spread=lambda cell: 0))} for figure in ("fig17", "fig11")
    ]
    assert found == [{CONFIRMED}, {UNDECIDED}]  # every interval is [0, 0]


def test_a_missing_run_leaves_open_what_all_runs_would_say():
    noise = {"score": lambda cell: 100, "spread": lambda cell: 3}
    lost = figures.runs("fig17")[0].directory
    assert [verdict.verdict for verdict in verdicts(made("fig17", **noise))] == [UNDECIDED, UNDECIDED]
    assert [verdict.verdict for verdict in verdicts(made("fig17", **noise, without=[lost]))] == [TOO_FEW, UNDECIDED]


def test_fewer_than_five_runs_decide_nothing():
    verdict, _ = verdicts(made("fig11", ladder(mrq=100, res=200, mst=300), seeds=4))
    assert (verdict.verdict, verdict.effect) == (TOO_FEW, 100)
    assert verdict.missing == "a verdict needs 5 runs of each cell on each task"


def test_a_missing_run_is_named_and_a_missing_task_decides_nothing():
    names = [
        run.directory for run in figures.runs("fig17") if run.exp_name.startswith("mrq-e6s1") and "post" in run.exp_name
    ]
    dog = [name for name in names if name.startswith("dog-run")]
    score = by("residual", pre=50, post=0)
    one, _ = verdicts(made("fig17", score, without=dog[:1]))
    name = dog[0].removesuffix("__1")
    assert (one.verdict, one.missing) == (CONFIRMED, f"missing: {name} (7 of 8)")
    assert list(one.n.values()) == [16, 15]
    task, other = verdicts(made("fig17", score, without=dog))
    assert (task.verdict, task.missing) == (TOO_FEW, f"missing: {name} (0 of 8)")
    assert np.isnan([task.effect, task.low, task.high]).all()
    assert other.verdict == CONFIRMED  # scale 3 has all its runs


def test_a_short_run_does_not_count_and_a_cell_left_out_of_the_choice_is_named():
    loaded = made("fig17", by("residual", pre=50, post=0))
    loaded.runs.loc[0, "state"] = "short"
    verdict, _ = verdicts(loaded)
    assert verdict.missing == f"missing: dog-run__{loaded.runs['exp_name'][0]} (7 of 8)"
    assert list(verdict.n.values()) == [15, 16]
    loaded.runs = loaded.runs[loaded.runs["residual"] == "pre"]
    assert "residual post (not among the chosen runs)" in verdicts(loaded)[0].missing


def test_the_best_is_compared_with_each_other_at_98_75_percent():
    verdict, *_ = verdicts(made("fig14", assignment("dst", "sst")))
    expected = interval(lambda x, y: iqm(x) - iqm(y), [NOISE + 150], [NOISE + 100], confidence=1 - 0.05 / 4)
    assert (verdict.low, verdict.high) == expected


def test_a_cell_taken_twice_is_refused():
    loaded = made("fig17", lambda cell: 100)
    evidence = Evidence(loaded, pd.DataFrame(columns=[*loaded.identity, "value"]))
    cell = {"critic_scale": 1, "residual": "pre"}
    for cells in ([cell, cell], [{"critic_scale": 1}]):  # the second is both pre and post
        with pytest.raises(ValueError, match="choose each cell of a comparison once"):
            evidence("claim", "what", cells, lambda scores: scores.mean(0))
