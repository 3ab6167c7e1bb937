"""Loading: what is missing, short or damaged is named, nothing counts twice, and sizes are those of the networks.

Then curves of any runs, and the notebooks, which run on the runs of results/small.
"""

import dataclasses
import importlib
import json
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
from conftest import ENVIRONMENT, ROOT
from matplotlib import image
from nbclient import NotebookClient
from torch.utils.tensorboard import SummaryWriter

from analysis.curves import BINS, curves, draw, final, main, values
from analysis.runs import load_figure, load_runs, size
from experiments import figures

HEADER = "agent_step,env_step,episode_return_mean,episode_return_std,episodes,wall_seconds\n"
PRE, POST = figures.runs("fig17", size="toy")[:2]
TAG = "plasticity/critic_srank"


def write(runs_dir: Path, run: figures.Run, steps=(0, 1250), scalars=(), **changes) -> Path:
    """A run directory as the script leaves it, with a return of 10 more at each evaluation."""
    path = runs_dir / run.directory
    args = importlib.import_module(run.script).Args(**run.settings, env_id=run.env, seed=run.seed)
    args = dataclasses.asdict(args) | {"exp_name": run.exp_name} | changes
    path.mkdir(parents=True)
    config = {"args": args, "command": [f"/somewhere/{run.script}.py"], "git_commit": "abc"}
    (path / "config.json").write_text(json.dumps(config))
    rows = "".join(f"{step},{8 * step},{10.0 * i},1.5,5,{float(i)}\n" for i, step in enumerate(steps))
    (path / "eval.csv").write_text(HEADER + rows)
    if scalars:
        log(path, scalars)
    return path


def log(path: Path, scalars, suffix="") -> Path:
    with SummaryWriter(path, filename_suffix=suffix) as writer:
        for tag, step, value in scalars:
            writer.add_scalar(tag, value, step)
    return next(path.glob(f"events*{suffix}"))


def load(runs_dir, **options):
    return load_figure("fig17", runs_dir, size="toy", seeds=1, only={"critic_scale": ("1",)}, **options)


def test_missing_and_short_runs_are_named(tmp_path):
    write(tmp_path, PRE, steps=(0, 250, 500))
    loaded = load(tmp_path)
    assert loaded.runs[["residual", "state"]].values.tolist() == [["pre", "short"], ["post", "missing"]]
    assert loaded.report() == (
        f"missing: cartpole-balance__{POST.exp_name}, seed 1\nshort: {PRE.directory}, 500 of 1,250 agent steps"
    )


def test_evaluations_are_tidy(tmp_path):
    path = write(tmp_path, PRE)
    write(tmp_path, POST)
    loaded = load(tmp_path)
    assert (loaded.report(), loaded.runs["state"].tolist()) == ("", ["complete", "complete"])
    found = loaded.evaluations[["residual", "seed", "agent_step", "env_step", "episode_return_mean"]].values.tolist()
    steps = [(0, 0, 0), (1250, 10_000, 10)]
    assert found == [[residual, 1, *step] for residual in ("pre", "post") for step in steps]
    assert set(loaded.identity) < set(loaded.evaluations)
    assert loaded.runs[["directory", "wall_seconds", "git_commit"]].values.tolist()[0] == [str(path), 1.0, "abc"]


@pytest.mark.parametrize("tail", ["1250,10000,20.0,1.5,5", "1250,10000,20.0,1.5,5,2.", "12\n", "x,1,1,1,1,1\n", "\n"])
def test_a_damaged_line_is_left_out_and_named(tmp_path, tail):
    table = write(tmp_path, PRE, steps=(0, 250)) / "eval.csv"
    table.write_text(table.read_text() + tail)
    loaded = load(tmp_path)
    assert loaded.evaluations["agent_step"].tolist() == [0, 250]
    assert f"damaged: eval.csv of {PRE.directory}, line 4 (left out)" in loaded.report()


def test_damaged_files_are_named(tmp_path):
    path = write(tmp_path, PRE)
    (path / "eval.csv").write_text("step,return\n")
    (path / "config.json").write_text("{")
    report = load(tmp_path).report()
    assert f"damaged: eval.csv of {PRE.directory}, line 1" in report
    assert f"damaged: config.json of {PRE.directory}" in report
    write(tmp_path, POST)
    loaded = load_runs(tmp_path)
    assert loaded.runs["exp_name"].tolist() == [POST.exp_name]
    assert loaded.report() == f"damaged: config.json of {PRE.directory} (left out)"


def test_other_arguments_than_declared_are_named(tmp_path):
    write(tmp_path, PRE, total_timesteps=300, steps=(0, 300), log_interval=7)  # the last changes no result
    loaded = load(tmp_path)
    assert loaded.runs["state"][0] == "complete"
    assert f"not as declared: total_timesteps 300 instead of 1250 in 1 of 2 runs ({PRE.directory})" in loaded.report()
    assert "log_interval" not in loaded.report()


def test_a_value_logged_twice_counts_once(tmp_path):
    path = write(tmp_path, PRE, scalars=[(TAG, 50, 1), (TAG, 100, 2), ("losses/critic_loss", 100, 9)])
    log(path, [(TAG, 100, 3), (TAG, 150, 4)], suffix=".resumed")
    found = load(tmp_path).scalars([TAG, "absent"])
    assert found[["residual", "tag", "agent_step", "value"]].values.tolist() == [
        ["pre", TAG, 50, 1], ["pre", TAG, 100, 3], ["pre", TAG, 150, 4]
    ]  # fmt: skip


def test_a_record_cut_off_by_a_crash_ends_its_file(tmp_path):
    path = write(tmp_path, PRE)
    events = log(path, [(TAG, 50, 1), (TAG, 100, 2)])
    whole = events.read_bytes()
    for length in range(len(whole) - 60, len(whole)):  # the last record has 57 bytes
        events.write_bytes(whole[:length])
        assert load(tmp_path).scalars([TAG])["value"].tolist() in ([1], [])
    assert load(tmp_path).scalars(["absent"]).empty


def test_flags_that_a_cell_leaves_out_have_the_scripts_default_at_the_papers_size(tmp_path):
    loaded = load_figure("rigl", tmp_path, size="toy")
    assert sorted(set(loaded.runs["topology_update_interval"])) == [100, 1000, 10_000]  # 10 to 1000 in the toy runs
    assert sorted(set(loaded.runs["drop_fraction"])) == [0.1, 0.3, 0.5]
    assert set(loaded.runs["critic_scale"]) == {5}


def test_runs_of_no_figure_have_the_columns_of_their_arguments(tmp_path):
    write(tmp_path, dataclasses.replace(PRE, env="gone-v9"))
    loaded = load_runs(tmp_path)
    row = loaded.runs[["script", "env", "residual", "batch_size"]].iloc[0]
    assert (row.tolist(), len(loaded.evaluations)) == (["mst_mrq", "gone-v9", "pre", 64], 2)
    assert loaded.runs["parameters"].isna().all()
    assert loaded.report() == "no parameters and FLOPs: gone-v9 cannot be made here"
    with pytest.raises(ValueError, match="give the folder that holds the run directories"):
        load_runs(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="give the one that holds the run directories"):
        load(tmp_path / "nowhere")


ENV = {"env_id": "humanoid-run"}


@pytest.mark.parametrize("distribution", ["er", "uniform", "uniform-dense-output"])
@pytest.mark.parametrize("script", ["mst_mrq", "mst_sac", "mst_ddpg", "mst_mrsac"])
def test_active_parameters_are_those_outside_the_masks(script, distribution):
    args = {"critic_regime": "dst", "actor_regime": "sst", "distribution": distribution, "width_scale": 0.1} | ENV
    module = importlib.import_module(script)
    agent = module.Agent(module.Args(**args), 67, 21, torch.device("cpu"))  # humanoid's observation and action
    counted = size(script, dataclasses.asdict(agent.args))
    for name in ("critic", "actor"):
        parameters = sum(p.numel() for p in getattr(agent, name).parameters())
        zeros = sum(int((~mask).sum()) for mask in agent.sparsifiers[name].masks.values())
        assert counted[f"{name}_parameters"] == parameters
        assert counted[f"{name}_active"] == parameters - zeros


def test_flops_are_two_per_weight_and_sample():
    args = ENV | {"critic_regime": "sst", "critic_sparsity": 0.5, "distribution": "uniform"}
    weights = 2 * (3 * 512 * 512 + 512)  # two heads: projection, a block of two layers, output
    counted = size("mst_mrq", args)
    assert counted["critic_flops"] == 2 * weights
    assert counted["critic_sparse_flops"] == 2 * weights / 2
    assert counted["sparse_flops"] == sum(counted[f"{m}_sparse_flops"] for m in ("encoder", "critic", "actor"))
    # dense, without the predictor: zs (67 observations), za (21 actions), zsa (512 of zs and 256 of za)
    weights = (67 + 3 * 512) * 512 + 21 * 256 + (512 + 256 + 3 * 512) * 512
    assert counted["encoder_sparse_flops"] == counted["encoder_flops"] == 2 * weights


@pytest.mark.parametrize(("regime", "share"), [("s2d", 1 / 3), ("d2s", 0.6 * 2 / 3 + 0.2)])
def test_a_schedule_counts_with_its_mean(regime, share):
    """s2d: the mean of (1 - x)^2; d2s: 0 for a fifth of training, the mean of 1 - (1 - x)^2, then 1 for a fifth."""
    args = ENV | {"critic_regime": regime, "critic_sparsity": 0.5, "distribution": "uniform"}
    counted = size("mst_mrq", args)
    assert counted["critic_sparse_flops"] == pytest.approx(counted["critic_flops"] * (1 - 0.5 * share), rel=1e-5)


@pytest.fixture
def runs_dir(tmp_path):
    """Two experiments on cartpole-balance, one of them on another task too. A run's returns are 0, 10 and 20."""
    cartpole = "cartpole-balance"
    for env, name, seeds in ((cartpole, "mst_sac-dst", 3), (cartpole, "mst_sac", 1), ("b", "mst_sac", 1)):
        for seed in range(1, seeds + 1):
            scalars = [(TAG, step, seed) for step in range(1000)]
            path = write(tmp_path, figures.Run(PRE.cell, env, seed, "toy"), (0, 250, 1250), scalars, exp_name=name)
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


FOLDER = ROOT / "analysis" / "notebooks"
NOTEBOOKS = [path.stem for path in sorted(FOLDER.glob("*.ipynb"))]


def outputs(notebook) -> list[tuple[str, str, int]]:
    """Of each cell of code: its source, what it printed, and how many pictures it drew."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            printed = "".join(output.text for output in cell.outputs if output.get("name") == "stdout")  # in pieces
            drawn = sum("image/png" in output.get("data", {}) for output in cell.outputs)
            found.append((cell.source, printed, drawn))
    return found


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_stored_outputs_of_a_notebook_are_those_of_code_and_results_now(name, monkeypatch):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    stored = outputs(notebook)
    settings = {"RUNS": "../../results/small/runs", "SIZE": "small", "MUJOCO_GL": "disable"}
    for variable, value in {**ENVIRONMENT, **settings}.items():
        monkeypatch.setenv(variable, value)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": FOLDER}}).execute()
    assert outputs(notebook) == stored, "stale: run `make evidence`, look at the outputs and commit them"
    drawing = [output for cell, *output in stored if cell.startswith("show(") or "\ndraw(" in f"\n{cell}"]
    assert drawing
    for printed, drawn in drawing:
        assert (drawn > 0) != ("start with python -m experiments run" in printed)
