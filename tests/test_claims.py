"""Statistics and verdicts: what they say where the truth is known, and how often they are wrong."""

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from analysis.claims import CLAIMS, Claim, contrasts, verdict, verdicts
from analysis.runs import estimates, iqm, load
from experiments import figures

CONFIRMED, REFUTED, UNDECIDED, TOO_FEW = "confirmed", "refuted", "inconclusive", "not enough runs"
CLAIM = {(figure, claim.text): claim for claim in CLAIMS for figure in claim.figures}
KEEPS = CLAIM["fig06", "dst with residuals does not degrade (margin 10%)"]
SCALES = figures.grid(critic_scale=(1, 5))
TYPES = figures.grid(critic_arch=figures.TYPES, critic_scale=(1, 5), critic_regime=("dst",))


def runs_of(value, cells=SCALES, tasks=2, seeds=8) -> pd.DataFrame:
    """A row per run: `value(cell, task)` gives the values of its seeds."""
    rows = []
    for cell in cells:
        for task in range(tasks):
            name = "-".join(map(str, cell.values()))
            rows += [cell | {"exp_name": name, "env": f"task {task}", "value": x} for x in value(cell, task)[:seeds]]
    return pd.DataFrame(rows)


def claim(text: str, how: str = "iqm") -> Claim:
    return Claim(["fig06"], "a claim", contrasts(text, "critic"), how=how)


def shares(test: Claim, value, number: int, **how) -> dict[str, float]:
    """The share of each verdict in simulations where `value(rng, cell, task)` gives the runs."""
    rng = np.random.default_rng(0)
    found = [verdict(test, runs_of(lambda c, t: value(rng, c, t), **how))["verdict"] for _ in range(number)]
    return {word: found.count(word) / number for word in (CONFIRMED, REFUTED)}


def test_the_fall_of_one_task_counts_for_its_share_of_the_tasks():
    """Levels of SimBa's four tasks, of which the highest falls by 300: 300 / 4 = 75. Pooled, an IQM gives about -16."""
    assert iqm(np.array([200, 184, 173, 204, 170, 229, 206, 198])) == 196.5  # (184 + 198 + 200 + 204) / 4
    noise = np.linspace(-20, 20, 8)
    before, after = np.add.outer([187, 544, 593, 861], noise), np.add.outer([187, 544, 593, 561], noise)
    tables = [pd.DataFrame({"all": 1, "env": np.repeat(range(4), 8), "value": x.ravel()}) for x in (before, after)]
    a, b = (estimates(table, ["all"])["value"].item() for table in tables)
    assert b - a == pytest.approx(-75)
    assert -20 < iqm(after.ravel()) - iqm(before.ravel()) < -10


@pytest.mark.parametrize("how", ["iqm", "spread"])
def test_no_effect_is_seldom_confirmed_or_refuted_though_one_task_spreads_more(how):
    found = shares(claim("x5 > x1", how), lambda rng, _, task: rng.normal((200, 800)[task], (20, 150)[task], 8), 150)
    assert max(found.values()) <= 0.05


def test_the_best_of_five_equals_is_seldom_confirmed_and_seldom_refuted():
    best, cells = claim("dst > {dense,sst,s2d,d2s}"), [{"critic_regime": regime} for regime in figures.REGIMES]
    assert max(shares(best, lambda rng, *_: rng.normal(500, 50, 8), 60, cells=cells).values()) <= 0.07


def test_a_margin_confirms_what_does_not_degrade():
    """A flat critic: with the margin in 92% (at a spread of 10%), without it hardly ever."""

    def flat(rng, cell, task):
        return rng.normal((300, 700)[task], 0.1 * (300, 700)[task], 8)

    residual = [cell for cell in TYPES if cell["critic_arch"] > 4]
    assert shares(KEEPS, flat, 60, cells=residual)[CONFIRMED] >= 0.85
    assert shares(CLAIM["fig06", "dst with residuals gains by scale"], flat, 60, cells=residual)[CONFIRMED] <= 0.05


@pytest.mark.parametrize(
    ("test", "cells", "level", "expected", "effect"),
    [
        (claim("x5 > x1"), SCALES, lambda cell: 10 * cell["critic_scale"], CONFIRMED, 40),
        (claim("x5 > x1"), SCALES, lambda cell: 100 - 10 * cell["critic_scale"], REFUTED, -40),
        (claim("x5 > x1"), SCALES, lambda cell: 100, UNDECIDED, 0),
        (claim("x5 ~ x1"), SCALES, lambda cell: 98 + (cell["critic_scale"] == 1), CONFIRMED, 98 - 0.9 * 99),
        # all contrasts have to hold, and the one that decides is shown
        (claim("x5 > {0 x1,50}"), SCALES, lambda cell: 2 * cell["critic_scale"], REFUTED, -40),
        # types differ more than scales
        (claim("sd:arch > sd:scale"), TYPES, lambda cell: 100 * cell["critic_arch"], CONFIRMED, 100 * 3.5**0.5),
        # types without residuals that collapse say nothing on those with them
        (KEEPS, TYPES, lambda cell: 500 * (cell["critic_arch"] > 4 or cell["critic_scale"] == 1), CONFIRMED, 50),
    ],
)
def test_verdicts_where_the_truth_is_known(test, cells, level, expected, effect):
    found = verdict(test, runs_of(lambda cell, _: level(cell) + np.linspace(-2, 2, 8), cells))
    assert (found["verdict"], found["effect"]) == (expected, pytest.approx(effect))
    assert found["low"] <= found["effect"] <= found["high"]


def test_a_cell_with_few_runs_on_one_task_decides_nothing():
    table = runs_of(lambda cell, _: np.arange(8) + 100 * cell["critic_scale"])
    table.loc[table.query("critic_scale == 5 and env == 'task 1'").index[:4], "value"] = np.nan
    assert verdict(claim("x5 > x1"), table)["verdict"] == TOO_FEW
    assert verdict(claim("t3 > x1"), table.assign(critic_arch=1))["verdict"] == TOO_FEW  # no such cell


def test_the_claims_of_the_spec_are_there_and_choose_cells_of_their_figures():
    assert sum(claim.figures[0].startswith("fig") for claim in CLAIMS) == 74
    for figure in {figure for figure, _ in CLAIM}:
        chosen = figures.runs(figure, seeds=1)
        cells = pd.DataFrame([figures.defaults(run.script) | run.cell | {"script": run.script} for run in chosen])
        for test in (test for test in CLAIMS if figure in test.figures):
            for query in {query.rpartition("|")[2] for terms in test.contrasts for _, query in terms if query}:
                assert not query or len(cells.query(query)), (test.text, query)


def test_the_stored_runs_give_their_effects():
    """Fig. 14 at small size. With one task, they are those of pooled scores."""
    found = verdicts("fig14", load(ROOT / "results/small/runs")[0], "small")
    assert found["effect"].round(1).tolist() == [-59.3, -26.5, -32.9, -10.2]
    assert set(found["verdict"]) == {UNDECIDED}
