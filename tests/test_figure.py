"""Drawing: the numbers are those of the runs, what is missing is named and marked, and the files suit a paper."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import image
from matplotlib.colors import to_hex
from matplotlib.text import Text
from test_claims import made

from analysis import figure
from analysis.figure import COLUMN, FORMS, PAGE, SMALL, Options, draw, main, numbers, over_steps, prepare, save
from analysis.runs import PUBLISHED_COLUMNS, load_published
from experiments import figures

RETURNS = (1, 2, 3, 4, 5, 6, 7, 100)  # of seeds 1 to 8: mean 16, interquartile mean (3 + 4 + 5 + 6) / 4 = 4.5


def write(folder: Path, run: figures.Run, *rows: str) -> None:
    (folder / run.directory).mkdir()
    header = "agent_step,env_step,episode_return_mean,episode_return_std,episodes,wall_seconds"
    (folder / run.directory / "eval.csv").write_text("\n".join([header, *rows, ""]))


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory) -> Path:
    """Runs of Fig. 12 with the final returns of RETURNS, but for seed 8 with SET. Seed s took s hours."""
    folder = tmp_path_factory.mktemp("runs")
    for run in figures.runs("fig12"):
        if run.cell.get("growth") != "set" or run.seed < 8:
            write(folder, run, "0,0,0,0,10,0", f"500000,1000000,{RETURNS[run.seed - 1]},0,10,{3600 * run.seed}")
    return folder


def texts(drawn) -> list[str]:
    return [text.get_text() for text in drawn.findobj(Text) if text.get_text()]


@pytest.mark.parametrize(
    ("statistic", "last", "value", "in_words", "evaluations"),
    [("iqm", None, 4.5, "Interquartile mean", "evaluation"), ("mean", 2, (0 + 16) / 2, "Mean", "2 evaluations")],
)
def test_a_bar_is_what_the_caption_says(runs_dir, statistic, last, value, in_words, evaluations):
    _, table, text = prepare("fig12", Options(runs_dir, statistic=statistic, last=last))
    bar = table.set_index(["column", "point"]).loc["distribution", "uniform"]
    assert (bar["value"], bar["n"], bar["expected"]) == (value, 8, 8)
    assert 0.5 <= bar["low"] < value < bar["high"] <= 100
    assert text.startswith(
        f"MST at scale 5: distribution, growth, sparsity. {in_words} over 8 seeds on dog-run; strokes: stratified "
        f"bootstrap 95% intervals. Final return: mean of the last {evaluations}, 10 episodes each. Hollow: runs are"
    )


def test_a_missing_seed_is_named_and_marked(runs_dir):
    drawn, table, text = prepare("fig12", Options(runs_dir))
    bar = table.set_index(["column", "point"]).loc["growth", "set"]
    assert (bar["value"], bar["n"], bar["expected"]) == (4, 7, 8)  # (2 + 3 + 4 + 5 + 6) / 5 of 1 to 7
    assert "missing: dog-run__mrq-e6s5dense-c6s5dst-a5s5sst-growth_set, seed 8" in text
    assert "Growth criterion\nn = 7–8 of 8" in texts(drawn)
    assert texts(drawn).count("7") == 1  # above its bar
    assert "Distribution" in texts(drawn)  # whole, so without a mark


def test_curves_take_short_runs_in_as_far_as_they_go():
    steps = {"directory": ["a", "a", "b"], "agent_step": [0, 5000, 0], "value": [10.0, 30.0, 20.0]}
    found = over_steps(pd.DataFrame(steps).assign(env="dog-run"), "iqm")
    assert found[["x", "value", "n"]].values.tolist() == [[0, 15, 2], [5000, 30, 1]]
    assert found["low"].notna().tolist() == [True, False]  # a single run has no interval


def test_tasks_are_pooled_the_return_has_a_row_for_each_and_a_run_is_in_all_panels_it_belongs_to():
    counts = numbers(made("fig11", seeds=1), "fig11").groupby("row")["n"].unique().map(list).to_dict()
    returns = {"Return, dog-run": [1], "Return, humanoid-run": [1]}
    assert counts == returns | {"Critic srank": [2], "Critic dormant ratio": [2]}
    table = numbers(made("fig13", seeds=1), "fig13")
    smallest = table[(table["point"] == 1) & (table["column"] == "dog-run") & (table["series"] == "MST")]
    assert sorted(smallest["row"]) == sorted(f"{a}, {d}" for a in ("SAC", "DDPG") for d in ("width", "depth", "both"))
    assert (table["n"] == 1).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", figures.FIGURES)
def test_every_figure_is_drawn_for_print(name):
    *_, last = figures.runs(name, seeds=1)
    loaded, form = made(name, seeds=1, without=[last.directory]), FORMS[name]
    table = numbers(loaded, name)
    drawn = draw(name, table, figure.figure_caption(loaded, name, table, Options()))
    drawn.draw_without_rendering()  # places everything
    width, height = drawn.get_size_inches()
    assert width in (COLUMN, PAGE)
    assert height < 9  # of a page
    box = drawn.get_tightbbox()
    assert (box.min >= 0).all() and (box.max <= (width, height)).all()
    assert min(text.get_fontsize() for text in drawn.findobj(Text) if text.get_text()) >= SMALL
    assert len(drawn.get_axes()) == len(table[["row", "column"]].drop_duplicates())
    assert any(re.search(r"n = [01]", text) for text in texts(drawn))  # runs are lost
    assert ("Agent steps" in texts(drawn)) == (form.kind == "curves")
    assert texts(drawn).count("no run") == (table["n"] == 0).sum() * (form.kind == "bars")
    for ax in drawn.get_axes():
        for axis in [ax.yaxis] if form.kind == "bars" else [ax.xaxis, ax.yaxis]:
            low, high = axis.get_view_interval()
            assert ((axis.get_ticklocs() >= low) & (axis.get_ticklocs() <= high)).sum() >= 3
        if form.kind == "lines":  # all sizes are labelled
            assert sum(bool(text.get_text()) for text in ax.get_xticklabels()) == table["point"].nunique()
        assert not any(line.get_clip_on() for line in ax.lines if line.get_marker() != "None")


def test_a_panel_without_runs_has_the_axis_of_the_others():
    table = numbers(made("fig06", seeds=1), "fig06")
    table.loc[table["column"] == 1, ["value", "low", "high"]] = np.nan
    type1, *_, type6 = draw("fig06", table, "").get_axes()
    assert type1.get_xlim() == type6.get_xlim()


def test_a_regime_has_one_colour_in_all_figures_patches_for_bars_and_the_papers_markers_for_lines():
    def legend(name: str) -> dict:
        drawn = draw(name, numbers(made(name, seeds=1), name), "")
        return {handle.get_label(): handle for entry in drawn.legends for handle in entry.legend_handles}

    lines, bars = legend("fig04"), legend("fig05")
    markers = {"Dense": "o", "SST": "s", "DST": "D", "S2D": "<", "D2S": ">"}  # the paper's
    assert [(name, line.get_marker()) for name, line in lines.items()] == list(markers.items())
    assert [to_hex(patch.get_facecolor()) for patch in bars.values()] == [to_hex(x.get_color()) for x in lines.values()]
    scaled = legend("fig26")
    assert legend("fig14")["MST"].get_color() == scaled["MST"].get_color()
    assert [line.get_linestyle() for line in scaled.values()] == ["--", "-"]  # dense dashed against MST


def test_a_legend_fills_row_by_row_and_leaves_no_entry_alone():
    keys = [figure.key(look) for look in list(figure.LOOKS.values())[:5]]
    drawn = figure.Figure(figsize=(3.2, 2), layout="constrained")
    figure.add_legend(drawn, keys)  # four would fit side by side
    # Dense SST DST / S2D D2S, column by column
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["Dense", "S2D", "SST", "D2S", "DST"]


def test_the_documented_study_has_runs_and_a_drawing(monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", dict(figures.FIGURES))
    monkeypatch.setattr(figure, "FORMS", dict(FORMS))
    page = (Path(__file__).parents[1] / "docs" / "experiments.md").read_text()
    (study,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(study, {**vars(figure), **vars(figures)})
    assert len(figures.runs("first-steps", "small")) == 3 * 2 * 5
    drawn = draw("first-steps", numbers(made("first-steps", seeds=2), "first-steps"), "")
    assert [text.get_text() for text in drawn.axes[0].get_xticklabels()] == ["1k", "5k", "20k"]


def test_files_suit_a_paper_and_repeat(runs_dir, tmp_path):
    first, second = (save(*prepare("fig12", Options(runs_dir)), tmp_path / folder / "fig12") for folder in "ab")
    png, pdf, csv, text = (path.read_bytes() for path in first)
    assert image.imread(first[0]).shape[1] == int(PAGE * 300)  # dpi
    assert b"/FontFile2" in pdf  # TrueType (type 42), which journals ask for
    assert b"/Type3" not in pdf
    table = pd.read_csv(first[2], dtype={"point": str})
    assert table.columns.tolist() == figure.NUMBERS
    assert table.set_index(["column", "point"]).loc[("growth", "rigl"), "value"] == 4.5
    assert b"seed 8" in text
    assert [path.read_bytes() for path in second] == [png, pdf, csv, text]


def test_costs_are_hours_or_minutes_and_flops_of_each_cell(runs_dir):
    drawn, table, _ = prepare("fig12", Options(runs_dir, cost=True))
    assert "Wall-clock time (h)" in texts(drawn)
    cell = table.set_index("cell").loc["Growth criterion, SET"]
    hours = ["hours", "hours_low", "hours_high"]
    assert cell[[*hours, "n"]].tolist() == [4, 1, 7, 7]  # seeds 1 to 7 took as many hours
    assert cell["parameters"] == 371_147_560  # the paper's 362M, with the encoder's predictor left out
    saved = (1 - table["sparse_flops"] / table["flops"]).set_axis(table["cell"])
    few, many = (saved[f"Sparsity of critic and actor, {sparsity}"] for sparsity in (0.2, 0.8))
    assert many == pytest.approx(4 * few, rel=1e-4)
    table[hours] /= 60 * 8
    minutes = figure.draw_costs("fig12", table, "")
    assert "Wall-clock time (min)" in texts(minutes)
    assert 1 <= minutes.axes[0].get_xlim()[1] < 1.2  # seed 8 now took a minute


def test_another_size_has_its_own_files_task_and_note_and_a_caption_can_be_left_out(tmp_path, capsys):
    write(tmp_path, figures.runs("fig21", "small")[0], "30000,30000,7,0,10,3600")
    flags = ["--small", "--only", "critic-scale=1", "--no-caption", "--cost"]
    assert main(["fig21", *flags, "--runs", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert {path.stem for path in (tmp_path / "out").iterdir()} == {"fig21-small-cost"}
    note = "Small size (a quarter of the paper's widths, 30,000 agent steps), no evidence about larger networks. "
    assert (tmp_path / "out" / "fig21-small-cost.txt").read_text().startswith(f"Fig. 6 on cheetah-run. {note}")
    options = Options(tmp_path, size="small", only={"critic_scale": ("1",)})
    without, with_caption = (prepare("fig21", replace(options, caption=caption))[0] for caption in (False, True))
    assert without.get_figheight() < with_caption.get_figheight()
    assert ["Small size" in " ".join(texts(drawn)) for drawn in (without, with_caption)] == [False, True]


def test_published_curves_are_laid_over(tmp_path):
    path = tmp_path / "published.csv"
    rows = [("dog-run", "mrq", seed, step, 2 * step, 10.0 * seed) for seed in (1, 2) for step in (0, 100_000, 900_000)]
    others = [("dog-run", "sac", 1, 0, 0, 1.0), ("walker-walk", "mrq", 1, 0, 0, 1.0)]
    pd.DataFrame(rows + others, columns=PUBLISHED_COLUMNS).to_csv(path, index=False)
    found = figure.published_curves(path, made("fig17", seeds=1), "fig17", "iqm")
    expected = [["Return, dog-run", "mrq, published", step, 15, 2] for step in (0, 100_000, 900_000)]
    assert found[["row", "series", "x", "value", "n"]].values.tolist() == expected
    path.write_text("env,algo,seed,agent_step,env_step\n")
    with pytest.raises(ValueError, match="lacks return: write a CSV with columns env,algo,seed"):
        load_published(path)


def test_all_draws_what_has_runs_and_names_the_rest(runs_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figure, "FORMS", {name: FORMS[name] for name in ("fig12", "fig14")})
    assert main(["all", "--runs", str(runs_dir), "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert {path.stem for path in tmp_path.iterdir()} == {"fig12"}
    assert "RigL >= SET: not enough runs" in out  # a seed is missing
    assert "skipped: no run of fig14" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("fig99", "error: argument FIGURE: invalid choice: 'fig99'"),
        ("fig12 --only growth", "growth is not of the form FLAG=V1,V2"),
        ("fig12 --published x.csv", "fig12 has no learning curves of the return"),
        ("fig12 --only growth=sgd", "no cell of fig12 has growth sgd"),
        ("fig06 --toy --only critic-arch=4", "start with python -m experiments run fig06 --toy --only critic-arch=4"),
    ],
)
def test_errors_say_what_to_do(arguments, message, runs_dir, capsys):
    with pytest.raises(SystemExit, match="2"):
        sys.exit(main(["--runs", str(runs_dir), *arguments.split()]))
    assert message in capsys.readouterr().err.splitlines()[-1]
