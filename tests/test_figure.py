"""Drawing: what is drawn is what the runs say, what is missing is seen and named, and everybody can read it."""

import functools
import itertools
import re

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from test_analysis import write

from analysis import curves, figure
from analysis.figure import FORMS, costs, described, drawing
from analysis.looks import GREY, LOOKS, OTHERS, look, method
from analysis.runs import declared, load
from experiments import figures

DRAWN = ["fig02", "fig06", "fig07", "fig11", "fig12", "fig13", "fig14", "fig17", "sparsity", "depth"]
ENVS = {"fig06": ("dog-run",), "fig07": ("dog-run",)}


def train(folder, run: figures.Run, returns) -> None:
    scales = [value for flag, value in run.cell.items() if flag.endswith("_scale")]
    size = {"parameters": int(1e6 * np.prod(scales)), "active_parameters": int(4e5 * np.prod(scales))}
    config = {"script": run.script, "modules": dict.fromkeys(("encoder", "critic", "actor"), size)}
    args = figures.defaults(run.script) | run.settings | {"total_timesteps": 1000 * (len(returns) - 1)}
    write(folder, run.exp_name, run.seed, returns=returns, every=1000, env=run.env, config=config, **args)


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> pd.DataFrame:
    """Two seeds of these figures, that end at 100 and 300. Of dst in Fig. 2, none of type 3 and one of type 5."""
    folder = tmp_path_factory.mktemp("runs")
    for name in DRAWN:
        for run in figures.runs(name, seeds=2, envs=ENVS.get(name)):
            if not ("-e3s1dst" in run.exp_name or ("-e5s1dst" in run.exp_name and run.seed == 2)):
                train(folder, run, np.array([0, 0.2, 1]) * (200 * run.seed - 100))
    return load(folder)[0]


def drawn(name: str, runs: pd.DataFrame):
    table, problems = described(name, runs, envs=ENVS.get(name), seeds=2)
    found, picture, caption, more = drawing(table, FORMS[name], "A title. ")
    return found, picture, caption, problems + more


@pytest.fixture(scope="session")
def once(runs):
    """The figure from all runs, drawn once: numbers, picture, caption, problems."""

    @functools.cache
    def get(name: str):
        found, picture, caption, problems = drawn(name, runs)
        return found, picture(), caption, problems

    return get


def texts(fig) -> str:
    return "\n".join(text.get_text() for text in fig.findobj(lambda x: hasattr(x, "get_text")))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", DRAWN)
def test_in_every_kind_of_figure_no_labels_collide_and_nothing_leaves_the_page(name, once):
    _, fig, caption, _ = once(name)
    fig.draw_without_rendering()
    box, size = fig.get_tightbbox(), fig.get_size_inches()
    assert (box.min >= -0.01).all() and (box.max <= size + 0.01).all() and size[0] <= 6.9 and size[1] <= 9.5
    renderer = FigureCanvasAgg(fig).get_renderer()
    for axis in (axis for ax in fig.axes for axis in (ax.xaxis, ax.yaxis)):
        low, high = sorted(axis.get_view_interval())
        ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high and tick.label1.get_text()]
        boxes = [tick.label1.get_window_extent(renderer) for tick in ticks if tick.label1.get_visible()]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(ax.lines or ax.collections for ax in fig.axes)  # no empty panels
    assert "Interquartile mean over the seeds" in caption and "n = " in texts(fig)


def test_what_is_missing_is_hollow_named_and_counted(once):
    found, fig, caption, problems = once("fig02")
    own = found[found["series"] == "dst"].set_index("point")["n"]
    assert own.tolist() == [2, 2, 0, 2, 1, 2]
    assert "missing: dog-run__mrq-e5s1dst-c4s1dense-a3s1dense, seed 2" in problems
    assert "Hollow: runs are missing." in caption
    text = texts(fig)
    assert "DST (n = 1 to 2 of 2)" in text and "SST (n = 2)" in text
    hollow = [line.get_xdata() for line in fig.axes[0].lines if line.get_markerfacecolor() == "none"]
    assert sum(map(len, hollow)) == 2  # types 3 and 5, the first of them nowhere
    assert text.count("missing") == 2  # in the place of type 3, and in the caption


def test_what_lacks_runs_is_no_panel_and_what_lacks_a_task_no_value(runs):
    _, picture, *_ = drawn("fig17", runs[(runs["critic_scale"] == 1) & (runs["env"] == "dog-run")])
    assert len(picture().axes) == 1  # of two scales and two tasks
    with pytest.raises(ValueError, match="no run with values on all of the tasks"):
        drawn("fig02", runs[runs["env"] == "dog-run"])


def test_at_most_three_bands_overlap_and_more_lines_have_strokes(once):
    for name, lines in (("fig17", 2), ("fig11", 3), ("fig14", 5)):
        _, fig, caption, _ = once(name)
        bands = [len([c for c in ax.collections if "FillBetween" in type(c).__name__]) for ax in fig.axes]
        assert set(bands) == {lines if lines <= 3 else 0}
        assert ("bands: its 95% interval; thin lines: single runs" in caption) == (lines <= 3)
        assert ("strokes" in caption) == (lines > 3)


def lab(color) -> np.ndarray:
    """CIELAB as a deuteranope sees it: the matrix of Machado et al. 2009 at full severity."""
    x = np.array(to_rgb(color))
    x = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    seen = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(seen @ x, 0, 1) / [0.9505, 1, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize(("theme", "background"), [("light", "white"), ("dark", "#0D1117")])
def test_lines_of_a_figure_are_told_apart_by_the_colour_blind(theme, background):
    """A difference of 10 in CIELAB is seen at once. Markers differ beside that, and each means one thing."""
    for names in (figures.REGIMES, ("mr.q", "res", "mst"), ("dense", "sst", "dst", "mst", "reverse"), ("pre", "post")):
        colors = [look(name, [], theme).color for name in names]
        assert min(np.linalg.norm(lab(a) - lab(b)) for a, b in itertools.combinations(colors, 2)) > 15
    assert min(abs(lab(look(name, [], theme).color) - lab(background))[0] for name in LOOKS) > 25  # lightness
    markers = [each.marker for each in LOOKS.values() if each.marker] + [each.marker for each in OTHERS[:5]]
    assert len(set(markers)) == len(markers)


def test_a_regime_looks_the_same_in_curves_and_figures(runs, once):
    chosen = runs[runs["path"].isin(declared("fig14", runs, seeds=2)[0]["path"])]
    looks = []
    for fig in (curves.picture(chosen)[1](), once("fig14")[1]):
        keys = {re.split(" ?[:(]", key.get_label())[0]: key for key in fig.legends[0].legend_handles}
        looks.append({name: (key.get_color(), key.get_marker()) for name, key in keys.items()})
    assert looks[0] == looks[1]
    assert looks[0]["MST"] == (LOOKS["mst"].color, "^") and looks[0]["Dense"] == (GREY["white"], "o")
    assert method({"critic_regime": "dst", "actor_regime": "sst", "encoder_regime": np.nan}) == "mst"  # no encoder


def test_a_table_of_cost_has_hours_parameters_and_operations(runs):
    row = costs(declared("fig14", runs, seeds=2)[0]).iloc[0, 1:]
    expected = {"hours": 1 / 18, "parameters": 36, "active": 14.4, "n": 2, "operations": 28.8}
    assert row.to_dict() == pytest.approx(expected)


def test_files_are_written_for_print_and_for_both_themes_of_github(tmp_path, capsys):
    stored = ["--runs", str(ROOT / "results/small/runs"), "--size", "small", "--out", str(tmp_path)]
    assert figure.main(["fig14", *stored]) == 0
    assert "inconclusive: MST is the best assignment" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "fig14-small-cost.csv", "fig14-small.csv", "fig14-small.pdf", "fig14-small.png", "fig14-small.txt"
    ]  # fmt: skip
    assert figure.main(["all", *stored, "--github", "--no-caption", "--label", "mst=Ours"]) == 0
    light, dark = ((tmp_path / f"fig14-small_{theme}.svg").read_text() for theme in ("light", "dark"))
    assert "#1f2328" in light and "#e6edf3" in dark
