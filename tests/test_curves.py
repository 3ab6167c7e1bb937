"""Curves of any runs: seeds together by environment and experiment, any metric, files for papers and web pages."""

import pandas as pd
import pytest
from matplotlib import image
from test_analysis_runs import PRE, write

from analysis.curves import BINS, curves, draw, final, main, values
from analysis.runs import load_runs
from experiments.figures import Run

TAG = "plasticity/critic_srank"


@pytest.fixture
def runs_dir(tmp_path):
    """Two experiments on cartpole-balance, one of them on another task too. A run's returns are 0, 10 and 20."""
    cartpole = "cartpole-balance"
    for env, name, seeds in ((cartpole, "mst_sac-dst", 3), (cartpole, "mst_sac", 1), ("b", "mst_sac", 1)):
        for seed in range(1, seeds + 1):
            scalars = [(TAG, step, seed) for step in range(1000)]
            path = write(tmp_path, Run(PRE.cell, env, seed, "toy"), (0, 250, 1250), scalars, exp_name=name)
            path.rename(tmp_path / f"{env}__{name}__{seed}")
    table = tmp_path / "cartpole-balance__mst_sac-dst__3" / "eval.csv"
    table.write_text(table.read_text().replace("20.0,", "50.0,"))  # its last return
    return tmp_path


def test_seeds_are_together_by_environment_and_experiment(runs_dir):
    table = curves(values(load_runs(runs_dir, sizes=False)), "mean")
    together = table[table["seed"] == "all"].set_index(["env", "exp_name", "agent_step"])
    assert len(together) == 3 * 3
    last = together.loc["cartpole-balance", "mst_sac-dst", 1250]
    assert (last["value"], last["n"]) == (30, 3)  # 20, 20 and 50
    assert 20 <= last["low"] < 30 < last["high"] <= 50
    assert len(table) == 3 * 3 + 5 * 3  # five runs of three evaluations
    (three,) = final(values(load_runs(*runs_dir.glob("*dst*"), sizes=False)), "mean", last=2).to_dict("records")
    assert (three["n"], three["agent_steps"], three["value"]) == (3, "1,250", (10 + 10 + 10 + 20 + 20 + 50) / 6)
    logged = values(load_runs(runs_dir, sizes=False), TAG)  # often, so it is averaged
    assert logged.groupby("directory").size().max() <= BINS + 1
    assert set(logged["value"]) == {1, 2, 3}


def test_a_panel_per_environment_and_a_line_per_experiment_and_seed(runs_dir):
    table = curves(values(load_runs(runs_dir, sizes=False)))
    drawn = draw(table, labels={"mst_sac-dst": "MST"}, theme="dark")
    panels = {ax.get_title(): len(ax.lines) for ax in drawn.axes}
    assert panels == {"b": 1 + 1, "cartpole-balance": (3 + 1) + (1 + 1)}
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["MST", "mst_sac"]
    assert drawn.axes[0].xaxis.label.get_color() == "#E6EDF3"


def test_files_are_written_and_the_final_returns_printed(runs_dir, tmp_path, capsys):
    assert main([str(runs_dir), "--out", str(tmp_path / "out" / "v1.0"), "--theme", "light"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["v1.0.csv", "v1.0.pdf", "v1.0.png"]
    assert image.imread(tmp_path / "out" / "v1.0.png")[0, 0, 3] == 0  # transparent
    assert pd.read_csv(tmp_path / "out" / "v1.0.csv").columns.tolist()[:4] == ["env", "exp_name", "seed", "agent_step"]
    assert "cartpole-balance mst_sac-dst  3       1,250" in capsys.readouterr().out
    assert main([str(runs_dir), "--metric", TAG, "--out", str(tmp_path / "web" / "a.svg")]) == 0
    assert sorted(path.name for path in (tmp_path / "web").iterdir()) == ["a.csv", "a.svg"]


def test_without_runs_or_values_it_says_so(runs_dir, capsys):
    for line, part in (([str(runs_dir / "no")], "give the folder"), ([str(runs_dir), "--metric", "a/b"], "has a a/b")):
        with pytest.raises(SystemExit, match="2"):
            main(line)
        assert part in capsys.readouterr().err


def test_a_real_run_is_loaded_whole(reference):
    loaded = load_runs(reference)
    assert loaded.report() == ""
    assert loaded.runs["state"].tolist() == ["complete"]
    assert loaded.runs["parameters"].item() > 0
    assert len(values(loaded)) == len(values(loaded, TAG)) + 1  # diagnostics come with each evaluation but the first
