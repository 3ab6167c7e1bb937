"""Reading runs: what counts, what is named, what is left out. Curves of any runs, tables in pages, the notebook."""

import io
import json
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ENVIRONMENT, ROOT
from nbclient import NotebookClient

from analysis import curves, tables
from analysis.claims import outcome
from analysis.runs import declared, final, load, values
from experiments import figures

HEADER = "agent_step,env_step,episode_return_mean,episode_return_std,episodes,wall_seconds\n"
SRANK = "plasticity/critic_srank"
TAGS = [SRANK, *(f"plasticity/{module}_dormant_ratio" for module in ("encoder", "critic", "actor"))]
STEPS = (1, 2, 201, 202, 901, 902)  # two seeds at three steps
PRE, POST = figures.runs("fig17", "toy")[:2]


def write(folder: Path, name="mst", seed=1, *, returns=(0, 10, 20), every=100, env="dog-run", config=(), **args):
    """A run directory as a script leaves it. Its metrics are its returns, too."""
    path = folder / f"{env}__{name}__{seed}"
    path.mkdir(parents=True, exist_ok=True)
    logged = [(every * i, value) for i, value in enumerate(returns)]
    args = {"critic_regime": "dst"} | args | {"env_id": env, "exp_name": name, "seed": seed}
    args = {"total_timesteps": logged[-1][0]} | args
    modules = {"critic": {"parameters": 100, "active_parameters": 40}}
    whole = {"script": "mst_mrq", "args": args, "modules": modules, "command": ["mst_mrq.py"]} | dict(config)
    (path / "config.json").write_text(json.dumps(whole))
    rows = [f"{step},{2 * step},{value},1.5,5,{step / 10}\n" for step, value in logged]
    (path / "eval.csv").write_text(HEADER + "".join(rows))
    rows = [f"{step},{tag},{value}\n" for step, value in logged for tag in TAGS]
    (path / "metrics.csv").write_text("agent_step,tag,value\n" + "".join(rows))
    return path


def draw(*arguments, out: Path) -> int:
    return curves.main([*map(str, arguments), "--out", str(out / "a.svg")])


def test_a_run_counts_once_whatever_leads_to_it(tmp_path):
    runs, link = tmp_path / "runs", tmp_path / "link"
    for seed in (1, 2, 3):
        write(runs, seed=seed, total_timesteps=300)
    link.symlink_to(runs)
    write(tmp_path / "copy", seed=2, returns=(0, 10, 20, 30), total_timesteps=300)  # the same run, further on
    found, problems = load(runs, link, tmp_path / "copy")
    assert (len(found), found["steps"].max()) == (3, 300)
    assert sum("there twice, counted once" in each for each in problems) == 3
    assert any("the same run" in each and "runs/dog-run__mst__2" in each for each in problems)


@pytest.mark.parametrize(
    "how", [{"critic_sparsity": 0.9}, {"action_repeat": 8}, {"config": {"script": "mst_sac"}.items()}]
)
def test_one_name_with_two_settings_becomes_two_lines_and_is_said(tmp_path, how):
    write(tmp_path, seed=1, critic_sparsity=0.5, action_repeat=2)
    write(tmp_path, seed=2, **{"critic_sparsity": 0.5, "action_repeat": 2} | how)
    write(tmp_path, "other", log_interval=10)  # neither what only operates nor a new flag tells runs apart
    write(tmp_path, "other", seed=2, log_interval=50, new_flag=3)
    found, problems = load(tmp_path)
    assert found.groupby("exp_name")["label"].nunique().to_dict() == {"mst": 2, "other": 1}
    assert [each for each in problems if "different" in each and "shown apart" in each]


def test_what_is_foreign_or_damaged_is_named_and_left_out(tmp_path):
    write(tmp_path)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/config.json").write_text('{"model": "x"}')
    (write(tmp_path, seed=2) / "eval.csv").write_text("step,return\n0,1\n")
    (write(tmp_path, seed=3) / "config.json").write_bytes(b"\xff{")
    half = write(tmp_path, seed=4) / "eval.csv"
    half.write_text(half.read_text() + "300,600,30")
    lost = write(tmp_path, seed=6) / "metrics.csv"
    lost.write_bytes(lost.read_bytes().replace(b"100,", b"1\x80,"))
    found, problems = load(tmp_path)
    assert sorted(found["seed"]) == [1, 4, 6]
    assert sum(each.startswith("left out") for each in problems) == 3
    assert any("damaged: 1 of 4 lines" in each and "__4/eval.csv" in each for each in problems)
    logged, problems = values(found, SRANK)
    assert sorted(logged.groupby("seed").size().items()) == [(1, 3), (4, 3), (6, 2)]
    assert any("__6/metrics.csv" in each for each in problems)
    assert draw(tmp_path, out=tmp_path) == 0


def test_runs_of_a_renamed_script_and_without_an_evaluation_are_read(tmp_path):
    write(tmp_path, config={"script": "my_sac"}.items())
    (write(tmp_path, seed=2) / "eval.csv").unlink()
    found = load(tmp_path)[0][["script", "state", "parameters", "active"]]
    assert found.values.tolist() == [["my_sac", "complete", 100, 40], ["mst_mrq", "no evaluation", 100, 40]]


def test_a_picture_is_there_before_anything_is_printed_on_any_terminal(tmp_path, monkeypatch):
    write(tmp_path / "runs", name="größer")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert draw(tmp_path / "runs", out=tmp_path / "one") == 0
    sys.stdout.close()
    with pytest.raises(ValueError, match="closed file"):
        draw(tmp_path / "runs", out=tmp_path / "two")
    assert (tmp_path / "one/a.svg").exists() and (tmp_path / "two/a.svg").exists()


def test_the_final_value_is_that_of_the_last_tenth_or_from_a_step_on(tmp_path):
    write(tmp_path, returns=range(31))
    runs, _ = load(tmp_path)
    assert final(values(runs)[0])["value"].item() == (28 + 29 + 30) / 3
    assert outcome("depth", runs)["value"].item() == 25  # 20 to 30: from agent step 2,000 on


def test_missing_short_and_other_runs_than_declared_are_named(tmp_path):
    how = PRE.settings | {"script": PRE.script}
    write(tmp_path, PRE.exp_name, env=PRE.env, returns=(0, 1), **how | {"batch_size": 32})
    write(tmp_path, POST.exp_name, env=POST.env, returns=range(14), **how | {"residual": "post"})
    table, problems = declared("fig17", load(tmp_path)[0], "toy", seeds=1)
    assert table["state"].tolist() == ["short", "complete", "missing", "missing"]
    assert f"short: {PRE.env}__{PRE.exp_name}, seed 1 (100 of 1,250 steps)" in problems
    assert sum(each.startswith("missing: cartpole-balance__toy-mrq-e6s3dense") for each in problems) == 2
    assert f"not as declared: batch_size 32 instead of 64 in 1 of 4 runs ({PRE.directory})" in problems


def test_published_curves_are_laid_over_the_returns_of_their_task(tmp_path):
    write(tmp_path / "runs")
    rows = [f"{env},mrq,{x % 100},{x // 100 * 100},0,{10 * (x % 100)}" for env in ("dog-run", "ant") for x in STEPS]
    (tmp_path / "p.csv").write_text("\n".join(["env,algo,seed,agent_step,env_step,return", *rows]))
    table, *_ = curves.picture(load(tmp_path / "runs")[0], published=tmp_path / "p.csv")
    own = table[table["series"] == "mrq, published"]
    assert own[["col", "x", "value", "n"]].values.tolist() == [["dog-run", 0, 15, 2], ["dog-run", 200, 15, 2]]


def test_a_page_gets_its_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    page, kinds = tmp_path / "page.md", ("cells", "verdicts", "seeds")
    page.write_text("".join(f"<!-- table: {x} fig14 small results/small/runs -->\nold\n<!-- end -->\n" for x in kinds))
    assert tables.main(["--fill", str(page)]) == 0 and "old" not in (text := page.read_text())
    assert "| MST | 5 | 337 | 325 [287, 392] |" in text
    assert "| MST | cheetah-run | 360 | 288 | 424 | 286 | 326 |" in text
    assert "| A dynamic topology helps the critic: dst > sst | **inconclusive** | return | 5 | -26.5" in text
    assert "| SAC | 25,000 | 849, 824, 837 | 835 [775, 863] | 0.96 |" in tables.table("calibration results/calibration")
    assert "399 [326, 499] | 668 [" in tables.table("cells depth paper results/depth")  # (533 + 587 + 774 + 779) / 4
    with pytest.raises(ValueError, match="no complete run of fig14 at paper size"):
        tables.table("cells fig14 paper results/small/runs")
    assert "missing: humanoid-run__" in capsys.readouterr().err


def test_the_notebook_is_stored_with_what_code_and_results_give_now(monkeypatch):
    path = ROOT / "analysis/notebooks/runs.ipynb"
    notebook = nbformat.read(path, as_version=4)
    assert not any("results" in cell.source and "python -m experiments" in cell.source for cell in notebook.cells)

    def outputs() -> list[str]:
        """What each cell printed, with "picture" for what it drew."""
        found = [cell.get("outputs", []) for cell in notebook.cells]
        return ["".join("picture" if "data" in out else out.get("text", "") for out in cell) for cell in found]

    stored = outputs()
    assert "".join(stored).count("picture") >= 3
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": path.parent}}).execute()
    assert outputs() == stored, "stale: run `make evidence`, look at the outputs and commit them"
