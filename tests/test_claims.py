"""Each claim on made-up runs of its figure, where the truth is known: confirmed, refuted, undecided, missing."""

import numpy as np
import pandas as pd
import pytest

from analysis.claims import CLAIMS, verdicts
from analysis.runs import Loaded
from analysis.statistics import interval, iqm
from experiments import figures

CONFIRMED, REFUTED, UNDECIDED, TOO_FEW = "confirmed", "refuted", "inconclusive", "not enough runs"
NOISE = np.linspace(-7, 7, 8)  # of the seeds: -7, -5, ..., 7


class Made(Loaded):
    def scalars(self, tags):  # all TensorBoard tags have the values of the returns
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
    runs, steps = pd.DataFrame(rows), pd.DataFrame({"agent_step": [0, 500_000], "episodes": 10})
    evaluations = runs[runs["state"] == "complete"].merge(steps, how="cross")
    evaluations["episode_return_mean"] = evaluations["final"].where(evaluations["agent_step"] > 0, 100)
    return Made(figure, list(cell.keys() - {"script"}), runs, evaluations)


def by(flag, others=0, **scores):
    return lambda cell: scores.get(cell[flag], others)


def scaled(cell):
    """Dense critics fall from 100 to 20 at scale 5, the others rise from 100 to 180."""
    scale = cell["critic_scale"] if "critic_scale" in cell else max(cell["width_scale"], cell["depth_scale"])
    return 100 + (scale - 1) * (-20 if cell["critic_regime"] == "dense" else 20)


@pytest.mark.parametrize(
    ("figure", "score", "expected", "of_opposite"),
    [
        ("fig02", lambda cell: 50 * cell["encoder_arch"], [CONFIRMED], [CONFIRMED]),  # types differ as much
        ("fig02", by("encoder_regime", dense=0, sst=50, dst=100, s2d=150, d2s=200), [REFUTED], [REFUTED]),
        ("fig03", lambda cell: 20 if cell["encoder_arch"] == 2 else 90, 2 * [CONFIRMED], 2 * [REFUTED]),
        ("fig04", lambda cell: 50 * cell["encoder_arch"] * (cell["encoder_scale"] == 5), [CONFIRMED], [CONFIRMED]),
        ("fig06", scaled, 3 * [CONFIRMED], 3 * [REFUTED]),
        ("fig07", by("critic_regime", 60, dst=10), [CONFIRMED], [REFUTED]),
        ("fig09", by("actor_regime", sst=90), [CONFIRMED, UNDECIDED], [REFUTED, UNDECIDED]),
        ("fig09", by("actor_regime", sst=90, d2s=140), [REFUTED, UNDECIDED], [REFUTED, UNDECIDED]),
        ("fig11", lambda cell: 25 * cell["critic_arch"] - 25 * (cell["critic_regime"] == "dst"),
         [REFUTED, CONFIRMED], [CONFIRMED, REFUTED]),  # MR.Q 100, Res 150, MST 125
        ("fig12", by("growth", rigl=50), [CONFIRMED, UNDECIDED], [REFUTED, UNDECIDED]),
        ("distribution", by("distribution", er=50, uniform=90), [REFUTED, CONFIRMED], [CONFIRMED, REFUTED]),
        ("fig13", scaled, 6 * [CONFIRMED], 6 * [REFUTED]),
        ("fig14", lambda cell: 50 * (figures.MST.items() <= cell.items()),
         [*3 * [CONFIRMED], UNDECIDED], [*3 * [REFUTED], UNDECIDED]),
        ("fig17", by("residual", pre=50), 2 * [CONFIRMED], 2 * [REFUTED]),
        ("one-strategy", by("encoder_regime", dense=50, dst=90),
         [UNDECIDED, CONFIRMED, REFUTED], [UNDECIDED, REFUTED, CONFIRMED]),
    ],
)  # fmt: skip
def test_a_clear_truth_and_its_opposite_are_found(figure, score, expected, of_opposite):
    assert [verdict.verdict for verdict in verdicts(made(figure, score))] == expected
    opposite = made(figure, lambda cell: 110 - score(cell))  # fig03: 90 and 20 of a first 100
    assert [verdict.verdict for verdict in verdicts(opposite)] == of_opposite


def test_a_larger_spread_over_seeds_is_found():
    for figure in ("fig09", "fig14"):
        *_, verdict = verdicts(made(figure, spread=by("actor_regime", 1, dst=10)))
        # the standard deviation of -7, -5, ..., 7 is sqrt(168 / 7) = 4.899, ten times that for dst
        assert (verdict.verdict, verdict.effect) == (CONFIRMED, pytest.approx(9 * np.sqrt(168 / 7)))


def test_effect_and_interval_are_those_of_the_iqm_over_both_tasks():
    loaded = made("fig17", lambda cell: 100 * (cell["residual"] == "pre") + 30 * (cell["critic_scale"] == 3))
    low, high = interval(lambda x, y: iqm(x) - iqm(y), [NOISE + 130] * 2, [NOISE + 30] * 2)  # two tasks
    assert str(verdicts(loaded)[1]) == (
        "Pre-layer >= post-layer residuals at scale 3: confirmed. pre - post = 100 return, "
        f"95% interval {low:.4g} to {high:.4g}, runs per cell: 16"
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("figure", {claims: figure for figure, claims in CLAIMS.items()}.values())  # one for each claim
def test_noise_decides_nothing_and_no_runs_give_no_warning(figure):
    noise = made(figure, lambda cell: 50 if figure == "fig03" else 100, spread=lambda cell: 3)
    assert {verdict.verdict for verdict in verdicts(noise)} == {UNDECIDED}
    nothing = verdicts(made(figure, without=[run.directory for run in figures.runs(figure)]))
    assert {(verdict.verdict, verdict.missing[:9]) for verdict in nothing} == {(TOO_FEW, "missing: ")}


@pytest.mark.parametrize(("figure", "verdict"), [("fig17", CONFIRMED), ("fig11", UNDECIDED)])
def test_a_tie_confirms_at_least_as_good_but_not_better(figure, verdict):
    found = verdicts(made(figure, spread=lambda cell: 0))  # every interval is [0, 0]
    assert {each.verdict for each in found} == {verdict}


@pytest.mark.parametrize(
    ("better", "seeds", "short", "verdict", "missing"),
    [
        (50, 8, 1, CONFIRMED, "missing: {} (7 of 8)"),
        (0, 8, 1, TOO_FEW, "missing: {} (7 of 8)"),  # with all runs it would be undecided
        (50, 8, 8, TOO_FEW, "missing: {} (0 of 8)"),  # the other task has all
        (50, 4, 0, TOO_FEW, "a verdict needs 5 runs of each cell on each task"),
    ],
)
def test_short_runs_are_missing_and_too_few_decide_nothing(better, seeds, short, verdict, missing):
    loaded = made("fig17", by("residual", pre=better), seeds=seeds)
    post = loaded.runs.query("env == 'dog-run' and critic_scale == 1 and residual == 'post'")
    loaded.runs.loc[post.index[:short], "state"] = "short"
    found, _ = verdicts(loaded)
    assert (found.verdict, found.missing) == (verdict, missing.format(f"dog-run__{post['exp_name'].iloc[0]}"))
    assert list(found.n.values()) == [2 * seeds, 2 * seeds - short]  # of both tasks
    assert np.isfinite([found.effect, found.low, found.high]).tolist() == 3 * [short < 8]


def test_a_cell_left_out_of_the_choice_is_named():
    loaded = made("fig17")
    loaded.runs = loaded.runs[loaded.runs["residual"] == "pre"]
    assert "residual post (not among the chosen runs)" in verdicts(loaded)[0].missing


def test_the_best_is_compared_with_each_other_at_98_75_percent():
    verdict, *_ = verdicts(made("fig14", lambda cell: 50 * (figures.MST.items() <= cell.items())))
    expected = interval(lambda x, y: iqm(x) - iqm(y), [NOISE + 50], [NOISE], confidence=1 - 0.05 / 4)
    assert (verdict.low, verdict.high) == expected


def test_a_cell_taken_twice_is_refused():
    loaded = made("fig17")
    for names in ("pre-and-post", loaded.runs["directory"]):  # two cells are one, and each cell is several
        loaded.runs["exp_name"] = names
        with pytest.raises(ValueError, match="choose each cell of a comparison once"):
            verdicts(loaded)
