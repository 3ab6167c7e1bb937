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


def runs_of(value, cells=({"critic_scale": 1}, {"critic_scale": 5}), tasks=2, seeds=8) -> pd.DataFrame:
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

    types = [{"critic_arch": t, "critic_scale": s, "critic_regime": "dst"} for t in (5, 6) for s in (1, 5)]
    keeps, gains = (
        CLAIM["fig06", f"dst with residuals {x}"] for x in ("does not degrade (margin 10%)", "gains by scale")
    )
    assert shares(keeps, flat, 60, cells=types)[CONFIRMED] >= 0.85
    assert shares(gains, flat, 60, cells=types)[CONFIRMED] <= 0.05


def test_collapsing_types_without_residuals_do_not_refute_those_with_them():
    cells = [{"critic_arch": t, "critic_scale": s, "critic_regime": "dst"} for t in figures.TYPES for s in (1, 5)]
    collapse = runs_of(
        lambda cell, _: np.arange(8) + 500 * (cell["critic_arch"] > 4 or cell["critic_scale"] == 1), cells
    )
    assert verdict(CLAIM["fig06", "dst with residuals does not degrade (margin 10%)"], collapse)["verdict"] == CONFIRMED


@pytest.mark.parametrize(
    ("scale_5", "expected"), [(140, CONFIRMED), (60, REFUTED), (100, UNDECIDED), (None, TOO_FEW)], ids=str
)
def test_verdicts_by_where_the_interval_lies(scale_5, expected):
    def value(cell, task):
        return np.linspace(-7, 7, 8) + (100 if cell["critic_scale"] == 1 else scale_5 or 140)

    found = verdict(claim("x5 > x1"), runs_of(value, seeds=4 if scale_5 is None else 8))
    assert (found["verdict"], found["effect"]) == (expected, (scale_5 or 140) - 100)
    assert found["low"] <= found["effect"] <= found["high"]


def test_all_contrasts_of_a_claim_have_to_hold_and_the_deciding_one_is_shown():
    cells = [{"critic_regime": regime} for regime in ("dst", "sst", "dense")]
    levels = {"dst": 100, "sst": 60, "dense": 140}
    found = verdict(claim("dst > {sst,dense}"), runs_of(lambda c, _: levels[c["critic_regime"]] + np.arange(8), cells))
    assert (found["verdict"], found["effect"], found["contrasts"]) == (REFUTED, -40, 2)


def test_a_cell_with_few_runs_on_one_task_decides_nothing():
    table = runs_of(lambda cell, _: np.arange(8) + 100 * cell["critic_scale"])
    table.loc[table.query("critic_scale == 5 and env == 'task 1'").index[:4], "value"] = np.nan
    assert verdict(claim("x5 > x1"), table)["verdict"] == TOO_FEW
    assert verdict(claim("t3 > x1"), table.assign(critic_arch=1))["verdict"] == TOO_FEW  # no such cell


def test_words_of_a_contrast_become_weighted_queries():
    assert contrasts("sst x5 - dense x5 > 0.5 dst t2", "actor") == [
        [(1, "actor_regime == 'sst' and actor_scale == 5"), (-1, "actor_regime == 'dense' and actor_scale == 5"),
         (-0.5, "actor_regime == 'dst' and actor_arch == 2")]
    ]  # fmt: skip
    assert contrasts("{t1,t3} x5 < {t1,t3} x1", "actor")[1] == [
        (1, "actor_arch == 3 and actor_scale == 1"), (-1, "actor_arch == 3 and actor_scale == 5")
    ]  # fmt: skip
    assert contrasts("x5 ~ x1", "critic") == [
        [(1, "critic_scale == 5"), (-0.9, "critic_scale == 1")], [(1.1, "critic_scale == 1"), (-1, "critic_scale == 5")]
    ]  # fmt: skip


def test_types_that_differ_more_than_regimes_are_told_by_standard_deviations():
    cells = [{"critic_arch": t, "critic_regime": r} for t in (1, 2, 3) for r in ("sst", "dst")]
    table = runs_of(
        lambda cell, _: 100.0 * cell["critic_arch"] + 10 * (cell["critic_regime"] == "dst") + np.zeros(8), cells
    )
    found = verdict(claim("sd:arch > sd:regime"), table)
    assert (found["verdict"], found["effect"]) == (CONFIRMED, pytest.approx(100 - 10 / np.sqrt(2)))


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
    assert found["low"].tolist() == pytest.approx([-155, -79, -82, -35], abs=15)
    assert found["high"].tolist() == pytest.approx([51, 26, 26, 18], abs=15)
