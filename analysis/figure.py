"""Draws a figure of the paper, or of the studies beyond it, from the runs that there are.

    python -m analysis.figure fig06 --runs runs --out figures
    python -m analysis.figure fig14 --published curves.csv    # beside published learning curves
    python -m analysis.figure fig06 --cost                    # wall-clock time and FLOPs of its cells
    python -m analysis.figure all --toy                       # every figure that has runs

For each figure it writes a PNG, a PDF, a CSV of exactly the numbers drawn and a text with what is missing and what the
runs say about the claims: `fig06.png`, or `fig06-small.png` and `fig06-toy.png` at those sizes. `FORMS` says how
each figure is drawn. Exit codes: 0 drawn, 2 nothing to draw or wrong usage.
"""

import shlex
import sys
import textwrap
from argparse import RawDescriptionHelpFormatter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator

from analysis import claims, statistics
from analysis.runs import PUBLISHED_COLUMNS, Loaded, load_figure, load_published
from experiments.__main__ import Parser, add_choice_of_runs, merged, positive
from experiments.figures import FIGURES, MODULES, Size
from experiments.figures import runs as declared_runs

COLUMN, PAGE = 3.3, 6.9  # inches: the widths of a column and of a page of a two-column paper
STYLE = {
    "font.size": 8, "axes.labelsize": 8, "axes.titlesize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "xtick.major.width": 0.6,
    "ytick.major.width": 0.6, "lines.linewidth": 1.2, "lines.markersize": 4, "legend.fontsize": 7.5,
    "legend.frameon": False, "legend.handlelength": 1.8, "legend.columnspacing": 1.1, "legend.handletextpad": 0.5,
    "pdf.fonttype": 42, "figure.dpi": 150,
}  # fmt: skip
SMALL = 7  # points, the smallest text
UNCLIPPED = {"clip_on": False, "in_layout": False}  # for markers, which no axis cuts off
LEVEL = 3  # labels of sizes that fit side by side; more are slanted


class Look(NamedTuple):
    label: str
    color: str
    marker: str
    dash: str = "-"


# The same everywhere. The colours are Okabe and Ito's, with the paper's grey for dense, dark
# enough to differ from the green for the colour-blind. The markers are the paper's.
LOOKS = {
    "dense": Look("Dense", "#595959", "o"),
    "sst": Look("SST", "#0072B2", "s"),
    "dst": Look("DST", "#009E73", "D"),
    "s2d": Look("S2D", "#E69F00", "<"),
    "d2s": Look("D2S", "#CC79A7", ">"),
    "MR.Q": Look("MR.Q", "#56B4E9", "v"),
    "Res": Look("MR.Q + Res", "#595959", "o"),
    "reverse": Look("MST reversed", "#56B4E9", "v"),
    "MST": Look("MST", "#D55E00", "^"),
    "pre": Look("pre-layer residual", "#595959", "o"),
    "post": Look("post-layer residual", "#56B4E9", "v", "--"),
    "0.1": Look("0.1", "#56B4E9", "o"),
    "0.3": Look("0.3", "#000000", "s"),
    "0.5": Look("0.5", "#D55E00", "^"),
    "mrq, published": Look("MR.Q, published", "#000000", "", ":"),
    "sac, published": Look("SAC, published", "#000000", "", ":"),
    "sac_simba, published": Look("SimBa, published", "#000000", "", "--"),
}
TYPES = {
    1: "Type 1\nReLU", 2: "Type 2\nELU", 3: "Type 3\nLN, ReLU", 4: "Type 4\nLN, ELU",
    5: "Type 5\nLN, ReLU, res.", 6: "Type 6\nLN, ELU, res.",
}  # fmt: skip
RETURN = "return"
MEASURES = {
    RETURN: "Return",
    "plasticity/encoder_srank": "Encoder srank",
    "plasticity/critic_srank": "Critic srank",
    "plasticity/critic_dormant_ratio": "Critic dormant ratio",
    "plasticity/actor_dormant_ratio": "Actor dormant ratio",
}


@dataclass(frozen=True)
class Form:
    """How a figure is drawn. All but `kind` and `measures` name columns of `described()`.

    Bars and lines show the final return: over categories `x`, or over the numbers in the column `x`, a point for each
    value of `point`. Curves show `measures` over agent steps, a row for each; the return has a row per task.
    """

    kind: Literal["bars", "lines", "curves"]
    series: str
    column: str | None = None
    row: str | None = None
    x: str = ""
    point: str = ""
    measures: tuple[str, ...] = ()
    dashed: tuple[str, ...] = ()  # series
    legend: str | None = None  # its title
    wrap: int = 6  # panels side by side


def types(module: str, row: str | None = None) -> Form:
    return Form("bars", f"{module}_regime", x=f"{module}_arch", point=f"{module}_arch", row=row)


def scales(module: str, row: str | None = None) -> Form:
    column, point = f"{module}_arch", f"{module}_scale"
    return Form("lines", f"{module}_regime", column, row, f"{module}_parameters", point, wrap=3)


def pathologies(module: str, *metrics: str) -> Form:
    measures = tuple(f"plasticity/{module}_{metric}" for metric in metrics)
    return Form("curves", f"{module}_regime", f"{module}_arch", measures=measures)


CRITIC = ("plasticity/critic_srank", "plasticity/critic_dormant_ratio")
FORMS = {
    "fig02": types("encoder"),
    "fig03": pathologies("encoder", "srank"),
    "fig04": scales("encoder"),
    "fig05": types("critic"),
    "fig06": scales("critic"),
    "fig07": pathologies("critic", "srank", "dormant_ratio"),
    "fig08": types("actor"),
    "fig09": scales("actor"),
    "fig10": pathologies("actor", "dormant_ratio"),
    "fig11": Form("curves", "variant", "scale", measures=(RETURN, *CRITIC)),
    "fig12": Form("bars", "strategy", "flag", x="setting", point="setting"),
    "fig13": Form("lines", "strategy", "env", "algorithm and dimension", "parameters", "size", dashed=("dense",)),
    "fig14": Form("curves", "strategy", measures=(RETURN,)),
    "fig17": Form("curves", "residual", "scale", measures=(RETURN,)),
    "fig18": types("encoder", "env"),
    "fig19": scales("encoder", "env"),
    "fig20": types("critic", "env"),
    "fig21": scales("critic"),
    "fig22": scales("critic"),
    "fig23": types("actor", "env"),
    "fig24": scales("actor"),
    "fig25": scales("actor"),
    "fig26": Form("lines", "strategy", "dimension", "env", "parameters", "size", dashed=("dense",)),
    "one-strategy": Form("lines", "strategy", "env", x="parameters", point="scale"),
    "sparsity": Form("lines", "strategy", "env", x="critic_sparsity", point="critic_sparsity"),
    "rigl": Form(
        "lines", "drop_fraction", "env", x="topology_update_interval", point="topology_update_interval",
        legend="Drop fraction",
    ),
    "distribution": Form("bars", "strategy", row="env", x="distribution", point="distribution"),
}  # fmt: skip
FLAGS = {
    "distribution": "Distribution",
    "growth": "Growth criterion",
    "critic_sparsity": "Sparsity of critic and actor",
}
VALUES = {
    "er": "ER", "uniform": "uniform", "uniform-dense-output": "uniform, dense\noutput layer",
    "rigl": "RigL", "set": "SET",
}  # fmt: skip
AXES = {
    "parameters": "Parameters of the agent",
    **{f"{module}_parameters": f"{module.capitalize()} parameters" for module in MODULES},
    "critic_sparsity": "Sparsity of critic and actor",
    "topology_update_interval": "Updates between topology updates",
}


def strategy(run: pd.Series) -> str:
    """What a run's regimes are together: "MST", the one regime of all modules, or "reverse"."""
    critic, actor = run["critic_regime"], run["actor_regime"]
    encoder = run.get("encoder_regime", critic if critic == actor else "dense")  # SAC and DDPG have none
    known = {("dense", "dst", "sst"): "MST", ("dense", "sst", "dst"): "reverse", (critic,) * 3: critic}
    return known.get((encoder, critic, actor), f"{encoder}/{critic}/{actor}")


def described(figure: str, runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with what panels and lines are named by. A run that several panels show has several rows.

    The new columns are `strategy`, `variant`, `algorithm` and `scale`; in Figs. 13 and 26 `size`, `dimension` and
    `algorithm and dimension`; in Fig. 12 `flag` and its `setting`, where the other flags have the paper's values.
    """
    runs = runs.copy()
    runs["algorithm"] = runs["script"].map(
        {"mst_mrq": "MR.Q", "mst_sac": "SAC", "mst_ddpg": "DDPG", "mst_mrsac": "MR.SAC"}
    )
    runs["strategy"] = runs.apply(strategy, axis=1)
    if "actor_scale" in runs:
        runs["scale"] = runs["actor_scale"]
        runs["variant"] = runs["strategy"].where(runs["strategy"] != "dense", "Res")
        runs.loc[runs["critic_arch"] == 4, "variant"] = "MR.Q"
    if figure in ("fig13", "fig26"):
        width, depth = runs["width_scale"], runs["depth_scale"]
        runs["size"] = np.maximum(width, depth)
        views = {"width": depth == 1, "depth": width == 1, "both": width == depth}
        runs = pd.concat(runs[chosen].assign(dimension=name) for name, chosen in views.items())
        runs["algorithm and dimension"] = runs["algorithm"] + ", " + runs["dimension"]
        runs = runs.sort_values("algorithm", kind="stable", key=lambda names: names == "DDPG")
    if figure == "fig12":
        paper = {"distribution": "er", "growth": "rigl", "critic_sparsity": 0.6}
        views = {
            flag: np.logical_and.reduce([runs[other] == value for other, value in paper.items() if other != flag])
            for flag in paper
        }
        runs = pd.concat(
            runs[chosen].sort_values(flag, kind="stable").assign(flag=flag, setting=runs[flag].astype(str))
            for flag, chosen in views.items()
        )
    return runs


def numbers(loaded: Loaded, figure: str, statistic: str = "iqm", last: int | None = None) -> pd.DataFrame:
    """The numbers that a figure draws, a row per point.

    Args:
        statistic: "iqm" (interquartile mean) or "mean", over the runs of all tasks of a panel.
        last: a final return is the mean of so many last evaluations, by default the last tenth, of a complete run.
            Curves take short runs in as far as they go.

    Returns:
        row and column (of the panel), series, point, x, value, low and high (stratified bootstrap 95% interval, NaN
        where a task has a single run), n (runs in the value), expected (runs that the figure asks for).
    """
    form, runs = FORMS[figure], described(figure, loaded.runs)
    runs["column"] = runs[form.column] if form.column else ""
    runs["series"] = runs[form.series].astype(str)
    if form.kind == "curves":
        found = pd.concat([curves(loaded, runs, measure, statistic) for measure in form.measures])
    else:
        final = statistics.final_performance(loaded.evaluations, last).set_index("directory")["value"]
        runs["value"] = runs["directory"].map(final).where(runs["state"] == "complete")
        runs["row"] = runs[form.row] if form.row else ""
        runs["point"] = runs[form.point]
        found = []
        for place, group in runs.groupby(["row", "column", "series", "point"], sort=False):
            x = np.nan if form.kind == "bars" else group.groupby("env")[form.x].mean().mean()
            scores = statistics.by_task(group.dropna(subset="value"))
            found.append((*place, x, *estimate(scores, statistic), sum(map(len, scores)), len(group)))
        found = pd.DataFrame(found, columns=NUMBERS)
    return in_series_order(found)


def in_series_order(table: pd.DataFrame) -> pd.DataFrame:
    """Sorted as `LOOKS` are, which is the order of legends; what has no look comes last."""
    return table.sort_values("series", kind="stable", key=lambda names: names.map([*LOOKS, *names].index))


NUMBERS = ["row", "column", "series", "point", "x", "value", "low", "high", "n", "expected"]


def estimate(scores: statistics.Scores, statistic: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Value, low, high over runs on the last axis; NaN without runs."""
    if not scores:
        return np.nan, np.nan, np.nan
    function = {"iqm": statistics.iqm, "mean": statistics.mean}[statistic]
    return function(scores), *statistics.interval(function, scores)


def curves(loaded: Loaded, runs: pd.DataFrame, measure: str, statistic: str) -> pd.DataFrame:
    """`numbers` of one measure over agent steps. The return has a row of panels per task, as published curves have."""
    if measure == RETURN:
        values = loaded.evaluations.rename(columns={"episode_return_mean": "value"})
        runs["row"] = f"{MEASURES[measure]}, " + runs["env"]
    else:
        values = loaded.scalars([measure])
        runs["row"] = MEASURES[measure]
    values = runs[["row", "column", "series", "env", "directory"]].merge(
        values[["directory", "agent_step", "value"]], on="directory"
    )
    found = []
    for place, group in runs.groupby(["row", "column", "series"], sort=False):
        there = values[(values[["row", "column", "series"]] == list(place)).all(axis=1)]
        table = over_steps(there, statistic)
        if table.empty:
            table.loc[0] = {"n": 0}
        found.append(table.assign(**dict(zip(("row", "column", "series"), place, strict=True)), expected=len(group)))
    return pd.concat(found).assign(point="")[NUMBERS]


def over_steps(values: pd.DataFrame, statistic: str) -> pd.DataFrame:
    """x (agent step), value, low, high, n from a frame with env, directory, agent_step, value."""
    table = values.pivot(index="agent_step", columns=["env", "directory"], values="value")
    there = table.notna()
    parts = [pd.DataFrame(columns=["x", "value", "low", "high", "n"], dtype=float)]
    for _, part in table.groupby([there[name] for name in there]):  # steps that the same runs have reached
        part = part.dropna(axis=1)
        scores = [part.loc[:, [env]].to_numpy() for env in part.columns.unique("env")]
        value, low, high = estimate(scores, statistic)
        columns = {"x": part.index, "value": value, "low": low, "high": high, "n": part.shape[1]}
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts).sort_values("x")


def published_curves(path: str | Path, loaded: Loaded, figure: str, statistic: str) -> pd.DataFrame:
    """`numbers`, without column, of a CSV's curves of the same algorithm and tasks: for SAC those of sac and sac_simba.

    Raises:
        ValueError: there are none, or the figure has no learning curves.
    """
    if RETURN not in FORMS[figure].measures:
        curved = ", ".join(name for name, form in FORMS.items() if RETURN in form.measures)
        raise ValueError(f"{figure} has no learning curves of the return to lay published ones over: {curved} have")
    frame = load_published(path).rename(columns={"return": "value"})
    algorithm, envs = loaded.runs["script"].iloc[0].removeprefix("mst_"), loaded.runs["env"].unique()
    frame = frame[frame["env"].isin(envs) & (frame["algo"].str.split("_").str[0] == algorithm)]
    if frame.empty:
        raise ValueError(f"{path} has no curves of {algorithm} on {', '.join(envs)}: leave --published out")
    found = []
    for (env, algo), curve in frame.groupby(["env", "algo"], sort=False):
        table = over_steps(curve.assign(directory=curve["seed"]), statistic)
        table = table.assign(series=f"{algo}, published", point="", expected=table["n"])
        found.append(table.assign(row=f"{MEASURES[RETURN]}, {env}"))
    return pd.concat(found)


def costs(loaded: Loaded, figure: str) -> pd.DataFrame:
    """What every cell costs, a row per cell, with the series as in the figure.

    Returns:
        cell, series, parameters, active, flops and sparse_flops (of one forward pass of all modules for one sample,
        mean over the tasks), and, over the complete runs, hours (wall-clock): mean, hours_low and hours_high (smallest
        and largest); n, expected.
    """
    form, runs = FORMS[figure], described(figure, loaded.runs)
    apart = dict.fromkeys(name for name in (form.row, form.column, form.point) if name and name != "env")
    runs["series"] = runs[form.series].astype(str)
    runs["hours"] = (runs["wall_seconds"] / 3600).where(runs["state"] == "complete")
    found = []
    for place, group in runs.groupby([*apart, "series"], sort=False):
        cell = ", ".join(cell_name(name, value) for name, value in zip(apart, place, strict=False))
        sizes = group.groupby("env")[["parameters", "active", "flops", "sparse_flops"]].mean().mean()
        hours = group["hours"]
        spent = {"hours": hours.mean(), "hours_low": hours.min(), "hours_high": hours.max()}
        n = {"n": int((group["state"] == "complete").sum()), "expected": len(group)}
        found.append({"cell": cell or "all", "series": place[-1], **sizes, **spent, **n})
    return in_series_order(pd.DataFrame(found))


def cell_name(flag: str, value) -> str:
    """A value of a flag, in words."""
    if flag.endswith("_arch"):
        return TYPES[value].split("\n")[0]
    if flag.endswith(("scale", "size")):
        return f"{value}x"
    return {**FLAGS, **VALUES}.get(value, f"{AXES[flag].lower()} {value}" if flag in AXES else str(value)).replace(
        "\n", " "
    )


# Drawing ------------------------------------------------------------------------------------------------------------


def draw(figure: str, table: pd.DataFrame, caption: str, statistic: str = "iqm") -> Figure:
    """Draw what `numbers` gives, at the size that it has in print. The caption, if any, goes below the panels."""
    form = FORMS[figure]
    rows, columns = list(table["row"].unique()), in_order(table["column"])
    places = [(row, column) for row in rows for column in columns]
    across = min(len(columns), form.wrap)
    down = len(places) // across
    bars, lines = form.kind == "bars", form.kind == "lines"
    many = len(table[table["row"] == rows[0]]) > 10 if bars else len(columns) > 2
    width = PAGE if many else COLUMN
    ratios = [table[table["column"] == column]["point"].nunique() + 0.5 for column in columns] if bars else None
    keys = [key(look(name, form), bars) for name in table["series"].unique()]
    legend_lines = -(-len(keys) // legend_columns([key.get_label() for key in keys], width)) + bool(form.legend)
    slanted = 0.12 if lines and table["point"].nunique() > LEVEL else 0
    height = 0.6 + 0.15 * legend_lines + (1.5 if down == 1 else 1.4 if bars else 1.15 + slanted) * down
    # returns on a task have one scale
    sharey = "col" if form.column == "env" else True if lines and form.row != "env" else "row"
    with rc_context(STYLE):
        fig = Figure(figsize=(width, height), layout="constrained")
        body = add_caption(fig, caption) if caption else fig
        axes = body.subplots(
            down, across, squeeze=False, width_ratios=ratios, sharey=sharey, sharex=form.kind == "curves"
        )
        for ax, (row, column) in zip(axes.flat, places, strict=True):
            panel = table[(table["row"] == row) & (table["column"] == column)]
            {"bars": draw_bars, "lines": draw_lines, "curves": draw_curves}[form.kind](ax, panel, form)
            title = panel_title(form, column) if row == rows[0] else ""
            ax.set_title("\n".join(filter(None, [title, incomplete(panel)])))
        for ax in axes.flat:
            ax.set_ylim(bottom=min(0, ax.get_ylim()[0]) if table["value"].min() < 0 else 0)
            ax.yaxis.set_major_locator(ticks(5))
        if len(rows) > 1 or form.kind == "curves":
            for ax, row in zip(axes[:, 0], rows, strict=True):
                ax.set_ylabel(textwrap.fill(row, 14, break_on_hyphens=False, break_long_words=False))
        labels = {"fontsize": STYLE["axes.labelsize"]}
        if form.kind != "curves":
            body.supylabel(f"Final return ({statistic.replace('iqm', 'IQM')})", **labels)
        body.supxlabel("Agent steps" if form.kind == "curves" else AXES.get(form.x, form.x if lines else ""), **labels)
        add_legend(body, keys, form.legend)
    return fig


def ticks(most: int) -> MaxNLocator:
    """At round numbers, three at least."""
    return MaxNLocator(most, steps=[1, 2, 2.5, 5, 10], min_n_ticks=3)


def published(table: pd.DataFrame) -> pd.Series:
    """Which points are of published curves."""
    return table["series"].str.endswith(", published")


def in_order(values: pd.Series) -> list:
    """The different values, numbers by size, names as they come."""
    found = list(values.unique())
    return sorted(found) if pd.api.types.is_numeric_dtype(values) else found


def panel_title(form: Form, column) -> str:
    if form.column and form.column.endswith("_arch"):
        return TYPES[column]
    if form.column == "scale":
        return f"scale {column}"
    return FLAGS.get(column, str(column))


def incomplete(panel: pd.DataFrame) -> str:
    """Says how many runs a panel's points have, if some are missing: "n = 0–7 of 8"."""
    panel = panel[~published(panel)]
    if (panel["n"] == panel["expected"]).all():
        return ""
    few, most = panel["n"].min(), panel["n"].max()
    return f"n = {few:.0f}{f'–{most:.0f}' if most > few else ''} of {panel['expected'].max():.0f}"


def look(series: str, form: Form) -> Look:
    found = LOOKS.get(series, Look(series, "#000000", "", "-."))
    return found._replace(dash="--") if series in form.dashed else found


def draw_bars(ax: Axes, panel: pd.DataFrame, form: Form) -> None:
    """A bar that lacks runs is hollow, with the number of those that it has above it, or "no run" in its place."""
    points, series = in_order(panel["point"]), list(panel["series"].unique())
    width = 0.84 / len(series) if len(series) > 1 else 0.6
    for bar in panel.itertuples():
        x = points.index(bar.point) + width * (series.index(bar.series) - (len(series) - 1) / 2)
        color, whole = look(bar.series, form).color, bar.n == bar.expected
        face, edge = (color, "white") if whole else ("white", color)
        ax.bar(x, bar.value, width, color=face, edgecolor=edge, linewidth=0.6)
        ax.vlines(x, bar.low, bar.high, color="black", linewidth=0.8)
        if not whole:
            text, angle = (f"{bar.n}", 0) if bar.n else ("no run", 90)
            at = {"xytext": (0, 2), "textcoords": "offset points", "ha": "center", "rotation": angle}
            ax.annotate(text, (x, np.nanmax([0, bar.value, bar.high])), fontsize=SMALL, **at)
    ax.set_xticks(range(len(points)), [TYPES.get(point, VALUES.get(point, point)) for point in points])
    ax.tick_params(axis="x", length=0)
    ax.set_xlim(-0.6, len(points) - 0.4)
    if (panel["n"] < panel["expected"]).any():
        ax.margins(y=0.2)  # room for the numbers


def draw_line(ax: Axes, line: pd.DataFrame, style: Look, every: int = 1, start: int = 0) -> None:
    """A line with its band. Markers of points that lack runs are hollow; a point without neighbours gets a bar."""
    x, value = line["x"], line["value"]
    ax.plot(x, value, linestyle=style.dash, color=style.color)
    ax.fill_between(x, line["low"], line["high"], color=style.color, alpha=0.18, linewidth=0)
    there = value.notna().to_numpy()
    alone = there & ~np.append(there[1:], False) & ~np.append(False, there[:-1])
    ax.vlines(x[alone], line["low"][alone], line["high"][alone], color=style.color, linewidth=0.8)
    marked = line.iloc[start::every]
    whole = marked["n"] == marked["expected"]
    for part, face in ((marked[whole], style.color), (marked[~whole], "white")):
        markers = {"marker": style.marker, "linestyle": "", "color": style.color, "markerfacecolor": face, "zorder": 3}
        ax.plot(part["x"], part["value"], **markers, **UNCLIPPED)


def draw_lines(ax: Axes, panel: pd.DataFrame, form: Form) -> None:
    for series, line in panel.groupby("series", sort=False):
        draw_line(ax, line.sort_values("x"), look(series, form))
    sizes, linear = panel.groupby("point")["x"].mean(), form.x == "critic_sparsity"
    ax.set_xscale("linear" if linear else "log")
    slant = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if len(sizes) > LEVEL else {}
    ax.set_xticks(sizes, [f"{x:g}" if linear else short_number(x) for x in sizes], **slant)
    ax.xaxis.set_minor_locator(NullLocator())
    if not linear:
        room = max(sizes.max() / sizes.min(), 2) ** 0.08  # explicit, for panels without runs
        ax.set_xlim(sizes.min() / room, sizes.max() * room)


def short_number(number: float) -> str:
    """With a prefix, one decimal below ten: 2.6M, 139M, 100."""
    digits = 3 if np.log10(number) % 3 >= 2 else 2
    return EngFormatter(sep="")(float(f"{number:.{digits}g}"))


def draw_curves(ax: Axes, panel: pd.DataFrame, form: Form) -> None:
    lines = list(panel.groupby("series", sort=False))
    for i, (series, line) in enumerate(lines):
        every = max(1, len(line) // 4)  # few markers, at other steps than those of the other lines
        start = min(int((i + 0.5) * every / len(lines)), len(line) - 1)
        draw_line(ax, line.sort_values("x"), look(series, form), every, start)
    ax.xaxis.set_major_locator(ticks(3))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))


def key(look: Look, patch: bool = False, line: str | None = None) -> Patch | Line2D:
    """A legend's key: a patch for bars, else a line with a marker, or the marker alone if `line` is ""."""
    if patch:
        return Patch(color=look.color, label=look.label)
    dash = look.dash if line is None else line
    return Line2D([], [], color=look.color, marker=look.marker, linestyle=dash, label=look.label)


def add_legend(body: Figure | SubFigure, keys: list, title: str | None = None) -> None:
    """Above everything, row by row."""
    if len(keys) > 1:
        n = legend_columns([key.get_label() for key in keys], body.get_figure(root=True).get_figwidth())
        by_row = [key for column in range(n) for key in keys[column::n]]  # matplotlib fills column by column
        body.legend(handles=by_row, loc="outside upper center", ncols=n, title=title)


def legend_columns(labels: list[str], width: float) -> int:
    """As many as fit into a width in inches and leave no entry alone in the last row."""
    wide = [0.058 * len(label) + 0.45 for label in labels]
    fitting = [n for n in range(1, len(wide) + 1) if sum(max(wide[column::n]) for column in range(n)) < width]
    return max((n for n in fitting if len(wide) % n != 1), default=1)


def add_caption(fig: Figure, caption: str) -> SubFigure:
    """Make the figure higher by the caption's lines, wrapped to its width. Returns the part above them."""
    width, height = fig.get_size_inches()
    text = textwrap.fill(caption, int(width * 72 / (0.545 * SMALL)))
    inches = (text.count("\n") + 1) * SMALL * 1.3 / 72 + 0.05
    fig.set_size_inches(width, height + inches)
    body, foot = fig.subfigures(2, 1, height_ratios=(height, inches))
    foot.text(0.01, 0.98, text, fontsize=SMALL, va="top", color="0.25", linespacing=1.15)
    return body


def draw_costs(figure: str, table: pd.DataFrame, caption: str) -> Figure:
    """Draw what `costs` gives: a line of text per cell, a marker per series."""
    cells, series = list(table["cell"].unique()), list(table["series"].unique())
    heights = 0.08 + 0.06 * len(series)
    unit, per_hour = ("h", 1) if table["hours"].max() >= 1 else ("min", 60)
    with rc_context(STYLE):
        fig = Figure(figsize=(PAGE, 0.9 + heights * len(cells)), layout="constrained")
        body = add_caption(fig, caption) if caption else fig
        axes = body.subplots(1, 2, sharey=True)
        for point in table.itertuples():
            style = look(point.series, FORMS[figure])
            y = cells.index(point.cell) + 0.7 * ((series.index(point.series) + 0.5) / len(series) - 0.5)
            drawn = {"color": style.color, "marker": style.marker, "linestyle": "", "markersize": 3.5} | UNCLIPPED
            whole = style.color if point.n == point.expected else "white"
            axes[0].hlines(y, per_hour * point.hours_low, per_hour * point.hours_high, color=style.color, linewidth=0.8)
            axes[0].plot(per_hour * point.hours, y, markerfacecolor=whole, **drawn)
            axes[1].plot([point.sparse_flops / 1e6, point.flops / 1e6], [y, y], color=style.color, linewidth=0.6)
            axes[1].plot(point.flops / 1e6, y, **drawn | {"marker": "|"})
            axes[1].plot(point.sparse_flops / 1e6, y, **drawn)
        for ax, label in zip(axes, (f"Wall-clock time ({unit})", "MFLOPs per sample"), strict=True):
            ax.set_xlabel(label)
            ax.set_xlim(0, 1.06 * ax.get_xlim()[1])
            ax.xaxis.set_major_locator(ticks(4))
            ax.grid(axis="y", color="0.9", linewidth=0.5)
            ax.set_axisbelow(True)
        axes[0].set_yticks(range(len(cells)), cells)
        axes[0].set_ylim(len(cells) - 0.4, -0.6)
        add_legend(body, [key(look(name, FORMS[figure]), line="") for name in series])
    return fig


# From runs to files -------------------------------------------------------------------------------------------------


class NothingToDraw(ValueError):
    """No run has come far enough. The message says which command to use."""


SIZES = {
    "paper": "",
    "small": "Small size (a quarter of the paper's widths,{} 30,000 agent steps), no evidence about larger networks. ",
    "toy": "Toy networks and runs, no evidence about anything. ",
}


@dataclass(frozen=True)
class Options:
    """What to load and how to draw it. The choice of runs is that of `experiments.figures.runs`."""

    runs_dir: str | Path = "runs"
    size: Size = "paper"
    envs: tuple[str, ...] | None = None
    seeds: int | None = None
    only: dict[str, tuple[str, ...]] | None = None
    published: str | Path | None = None
    statistic: str = "iqm"
    last: int | None = None
    cost: bool = False
    caption: bool = True  # in the drawing; the text has one in any case

    def command(self, name: str, figure: str) -> str:
        """The `python -m experiments` command for the same runs."""
        words = ["python", "-m", "experiments", name, figure]
        words += [] if self.size == "paper" else [f"--{self.size}"]
        words += ["--envs", ",".join(self.envs)] if self.envs else []
        words += ["--seeds", str(self.seeds)] if self.seeds else []
        for flag, values in (self.only or {}).items():
            words += ["--only", f"{flag.replace('_', '-')}={','.join(values)}"]
        return shlex.join([*words, "--runs-dir", str(self.runs_dir)])


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)


def prepare(figure: str, options: Options) -> tuple[Figure, pd.DataFrame, str]:
    """The drawing, the numbers in it, and the text with caption, missing runs and verdicts.

    Raises:
        NothingToDraw: no run has come far enough.
        ValueError: no such cell or folder, or no published curves that can be read.
    """
    chosen = options.size, options.envs, options.seeds, options.only
    count = len(declared_runs(figure, *chosen))
    _progress(f"{figure}: loading {count:,} runs from {options.runs_dir}")
    loaded = load_figure(figure, options.runs_dir, *chosen)
    there = int((loaded.runs["state"] != "missing").sum())
    if not there:
        raise NothingToDraw(f"no run of {figure} in {options.runs_dir}: start with {options.command('run', figure)}")
    _progress(f"{figure}: drawing {there:,} runs")
    changes = FIGURES[figure].small if options.size == "small" else {}
    size = SIZES[options.size].format("".join(f" {flag.replace('_', ' ')} {x}," for flag, x in changes.items()))
    if options.cost:
        table = costs(loaded, figure)
        caption, verdicts = size + cost_caption(loaded, table), []
        drawn = draw_costs(figure, table, caption if options.caption else "")
    else:
        table = numbers(loaded, figure, options.statistic, options.last)
        if table["value"].isna().all():
            raise NothingToDraw(f"nothing to draw in the runs of {figure} yet: see {options.command('status', figure)}")
        if options.published:
            others = published_curves(options.published, loaded, figure, options.statistic)
            others = others[others["x"] <= table["x"].max()]
            table = pd.concat([table, others.merge(table[["row", "column"]].drop_duplicates(), on="row")])
        caption = size + figure_caption(loaded, figure, table, options)
        drawn = draw(figure, table, caption if options.caption else "", options.statistic)
        verdicts = claims.verdicts(loaded)
    title = f"{FIGURES[figure].title.format(env=task_names(loaded.runs))}. {caption}"
    return drawn, table, "\n\n".join(filter(None, [title, loaded.report(), "\n".join(map(str, verdicts))]))


def figure_caption(loaded: Loaded, figure: str, table: pd.DataFrame, options: Options) -> str:
    """States runs, statistic, interval and evaluations."""
    form, runs = FORMS[figure], loaded.runs
    tasks, seeds = task_names(runs), runs["seed"].nunique()
    pathologies_pooled = RETURN in form.measures and len(form.measures) > 1 and runs["env"].nunique() > 1
    by_task = "env" in (form.row, form.column) or RETURN in form.measures or runs["env"].nunique() == 1
    caption = {"iqm": "Interquartile mean", "mean": "Mean"}[options.statistic]
    caption += f" over {seeds} seeds on {tasks}" if by_task else f" over {tasks}, {seeds} seeds each"
    caption += " (pathologies: over all tasks)" if pathologies_pooled else ""
    caption += f"; {'strokes' if form.kind == 'bars' else 'bands'}: stratified bootstrap 95% intervals."
    if form.kind != "curves":
        complete = runs.loc[runs["state"] == "complete", "directory"]
        evaluations = loaded.evaluations[loaded.evaluations["directory"].isin(complete)]
        last = statistics.final_performance(evaluations, options.last)["n_evaluations"]
        episodes = evaluations["episodes"]
        caption += (
            f" Final return: mean of the last {f'{span(last)} evaluations' if last.max() > 1 else 'evaluation'}, "
        )
        caption += f"{span(episodes)} episodes each."
    if (table["n"] < table["expected"]).any():
        caption += " Hollow: runs are missing" + ("; numbers: those there." if form.kind == "bars" else ".")
    if published(table).any():
        caption += f" Published: {span(table.loc[published(table), 'n'])} seeds."
    return caption


def cost_caption(loaded: Loaded, table: pd.DataFrame) -> str:
    hollow = " Hollow: runs are missing." if (table["n"] < table["expected"]).any() else ""
    return (
        f"Mean and range over {loaded.runs['seed'].nunique()} seeds on {task_names(loaded.runs)}; time depends on "
        "the machine. FLOPs of one forward pass of all modules: strokes of all weights, markers of the "
        f"active ones (theoretical: the code multiplies dense matrices).{hollow}"
    )


def task_names(runs: pd.DataFrame) -> str:
    *first, last = runs["env"].unique()
    return f"{', '.join(first)} and {last}" if first else last


def span(values: pd.Series) -> str:
    """ "10", or "8–10" where they differ."""
    return "–".join(f"{value:g}" for value in sorted({values.min(), values.max()}))


def show(figure: str, runs_dir: str | Path = "runs", **options) -> Figure | None:
    """For notebooks: print what is missing and the verdicts, and return the drawing, None if there are no runs."""
    try:
        drawn, _, text = prepare(figure, Options(runs_dir, **options))
    except NothingToDraw as nothing:
        print(nothing)
        return None
    print(text)
    return drawn


def save(drawn: Figure, table: pd.DataFrame, text: str, path: Path) -> list[Path]:
    """Write PNG, PDF, CSV and text, the same bytes for the same runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    paths = [path.with_name(path.name + suffix) for suffix in (".png", ".pdf", ".csv", ".txt")]
    with rc_context(STYLE):
        drawn.savefig(paths[0], dpi=300)
        drawn.savefig(paths[1], metadata={"CreationDate": None})
    table.to_csv(paths[2], index=False)
    paths[3].write_text(f"{text}\n")
    return paths


def main(argv: list[str]) -> int:
    """Returns the exit code: 0, 2 if there is nothing to draw."""
    parser = Parser("python -m analysis.figure", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=[*FORMS, "all"], metavar="FIGURE", help=f"all, or {', '.join(FORMS)}")
    parser.add_argument("--runs", dest="runs_dir", default="runs", metavar="DIR", help="run directories (runs)")
    parser.add_argument("--out", type=Path, default=Path("figures"), metavar="DIR", help="for the files (figures)")
    add_choice_of_runs(parser)
    parser.add_argument(
        "--published", metavar="CSV", help=f"learning curves to lay over: {','.join(PUBLISHED_COLUMNS)}"
    )
    parser.add_argument("--statistic", choices=["iqm", "mean"], default="iqm", help="over the runs (iqm)")
    parser.add_argument("--last", type=positive, metavar="K", help="evaluations in a final return (the last tenth)")
    parser.add_argument("--no-caption", dest="caption", action="store_false", help="none below the panels")
    parser.add_argument("--cost", action="store_true", help="wall-clock time and FLOPs of the cells instead")
    args = vars(parser.parse_args(argv))
    asked, out = args.pop("figure"), args.pop("out")
    options = Options(**args | {"only": merged(args["only"])})
    if not Path(options.runs_dir).is_dir():
        parser.error(f"{options.runs_dir} is no folder: give --runs the one that holds the run directories")
    chosen, skipped = list(FORMS) if asked == "all" else [asked], []
    for figure in chosen:
        try:
            drawn, table, text = prepare(figure, options)
        except (ValueError, OSError) as error:
            skipped.append(str(error))
            continue
        size = "" if options.size == "paper" else f"-{options.size}"
        paths = save(drawn, table, text, out / f"{figure}{size}{'-cost' if options.cost else ''}")
        print(f"{figure}: {text}\n\nwrote {', '.join(map(str, paths))}\n", flush=True)
    for reason in skipped:
        print(f"{'skipped' if asked == 'all' else 'error'}: {reason}", file=sys.stderr)
    return 2 if len(skipped) == len(chosen) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
