"""Loading: what is missing, short or damaged is named, nothing counts twice, and sizes are those of the networks."""

import dataclasses
import importlib
import json
from pathlib import Path

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

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
