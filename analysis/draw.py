"""Panels of curves or lines from one kind of table, and what both programs that draw share."""

import argparse
import sys
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator

from analysis.looks import COLUMN, LOOKS, PAGE, SMALL, look, style
from analysis.runs import RETURN, estimates, iqm, mean

BANDS = 3  # at most so many bands in a panel; else strokes
STATISTICS = {"iqm": ("Interquartile mean", iqm), "mean": ("Mean", mean)}


def panels(
    table: pd.DataFrame, kind: str, *, xlabel: str = "Agent steps", titles=str, seeds: pd.DataFrame | None = None,
    share: str | bool = True, labels: dict | None = None, caption: str = "", theme: str = "white",
) -> Figure:  # fmt: skip
    """Draw a table with row, col, series, x, point, value, low, high, n, expected; published lines have no n.

    Args:
        kind: "curves" over x; "lines" over numbers x, or where there is no x, points over the names `point`.
        seeds: row, col, series, path, x, value of single runs, drawn thin where there are few lines.
        share: y axes, as matplotlib's `sharey`.
        labels: what the legend calls a series.
    """
    drawn = table.dropna(subset="value")
    rows, cols = drawn["row"].unique(), drawn["col"].unique()  # no row or column of empty panels
    cols = sorted(cols) if pd.api.types.is_numeric_dtype(table["col"]) else cols
    names = sorted(table["series"].unique(), key=[*LOOKS, *table["series"]].index)
    looks = {name: look(name, names, theme) for name in names}
    places = [(row, col) for row in rows for col in cols]
    across = min(3, len(cols)) if len(rows) == 1 else len(cols)
    down = -(-len(places) // across)
    width = PAGE if across > 1 or (kind == "lines" and len(drawn) > 12) else COLUMN + 0.7
    keys = [key(name, table, looks, labels or {}) for name in names]
    ncols = max(1, int(width / max(0.066 * len(each.get_label()) + 0.4 for each in keys)))
    text = textwrap.fill(caption, int(width * 20.5))
    lines = [-(-len(keys) // ncols), text.count("\n") + 1 if text else 0]
    with style(theme):
        size = (width, 0.4 + (1.35 if down > 1 else 1.75) * down + 0.17 * lines[0] + 0.13 * lines[1])
        fig = Figure(figsize=size, layout="constrained")
        axes = fig.subplots(down, across, squeeze=False, sharey=share)
        for k, (ax, (row, col)) in enumerate(zip(axes.flat, places, strict=False)):
            panel = table[(table["row"] == row) & (table["col"] == col)]
            thin = seeds[(seeds["row"] == row) & (seeds["col"] == col)] if seeds is not None else None
            PAINT[kind](ax, panel, names, looks, thin)
            title = [titles(col)] if k < across or len(rows) == 1 else []
            ax.set_title("\n".join(filter(None, [*title, "" if panel["value"].notna().any() else "no run"])))
            ax.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10], min_n_ticks=3))
            if k % across == 0:
                ax.set_ylabel(textwrap.fill(str(row), 16 if down > 1 else 30, break_on_hyphens=False))
            if k >= len(places) - across:
                ax.set_xlabel(xlabel)
        for ax in axes.flat[: len(places)]:  # not before: it ends the scaling to the data
            low, high = ax.get_ylim()
            ax.set_ylim(min(0, low), high)
        for ax in axes.flat[len(places) :]:
            ax.remove()
        fig.legend(handles=keys, loc="outside upper center", ncols=ncols)
        fig.supxlabel(text, x=0.01, ha="left", fontsize=SMALL, linespacing=1.2)
    return fig


def key(name: str, table: pd.DataFrame, looks: dict, labels: dict) -> Line2D:
    """What the legend shows of a series, with its number of runs: "MST (n = 5 to 8 of 8)"."""
    shown = looks[name]
    own = table[(table["series"] == name) & table["value"].notna()]
    n = own.groupby(["row", "col", "point"])["n"].max()  # a curve's n is that of its fullest step
    count = "no run" if n.empty else f"n = {n.min():.0f}" + (f" to {n.max():.0f}" if n.max() > n.min() else "")
    if len(n) and n.min() < own["expected"].max():
        count += f" of {own['expected'].max():.0f}"
    label = f"{labels.get(name, shown.label)} ({count})"
    return Line2D([], [], color=shown.color, marker=shown.marker, linestyle=shown.dash, label=label)


def paint_curves(ax, panel, names, looks, seeds) -> None:
    lines = [name for name in names if panel.loc[panel["series"] == name, "value"].notna().any()]
    bands = sum(not name.endswith("published") for name in lines) <= BANDS
    for k, name in enumerate(lines):
        line, shown = panel[panel["series"] == name].sort_values("x"), looks[name]
        color = {"color": shown.color}
        ax.plot(line["x"], line["value"], shown.dash, **color)
        if bands:
            ax.fill_between(line["x"], line["low"], line["high"], alpha=0.2, linewidth=0, **color)
        if bands and seeds is not None:
            for _, run in seeds[seeds["series"] == name].groupby("path"):
                ax.plot(run["x"], run["value"], linewidth=0.4, alpha=0.6, **color)
        # few markers, at other steps than those of the other lines
        every = max(1, len(line) // 5)
        points(ax, line.iloc[min(int((k + 0.5) * every / len(lines)), len(line) - 1) :: every], shown, not bands)
    ax.xaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 2.5, 5, 10], min_n_ticks=3))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))


def points(ax, line: pd.DataFrame, shown, strokes: bool = True) -> None:
    """Markers, hollow where runs are missing, with their intervals."""
    if strokes:
        ax.vlines(line["x"], line["low"], line["high"], color=shown.color, linewidth=0.9)
    for part, face in (
        (line[line["n"] >= line["expected"]], shown.color),
        (line[line["n"] < line["expected"]], "none"),
    ):
        ax.plot(part["x"], part["value"], shown.marker, color=shown.color, markerfacecolor=face, linestyle="")


def paint_lines(ax, panel, names, looks, _) -> None:
    """Over numbers, whose sizes are labelled, or over names side by side."""
    categories = panel["x"].isna().all()
    places = panel.groupby("point", sort=False)["x"].mean() if not categories else None
    if categories:
        places = pd.Series({point: float(i) for i, point in enumerate(dict.fromkeys(panel["point"]))})
    log = not categories and places.max() / max(places.min(), 1e-9) > 3
    ax.set_xscale("log" if log else "linear")
    for k, name in enumerate(names):
        line, aside = panel[panel["series"] == name], k - (len(names) - 1) / 2  # side by side, so that all are seen
        at = line["point"].map(places) if categories else line["x"]
        step = 0.8 / len(names) if categories else 0.012 * np.ptp(places)
        line = line.assign(x=at * 1.03**aside if log else at + step * aside).sort_values("x")
        ax.plot(line["x"], line["value"], "" if categories else looks[name].dash, color=looks[name].color)
        points(ax, line, looks[name])
    words = [str(x) if categories else EngFormatter(sep="")(float(f"{x:.2g}")) if x >= 10 else f"{x:g}" for x in places]
    words = [str(point) for point in places.index] if categories else words
    crowded = not categories and len(places) > 3
    ax.set_xticks(places, words, **({"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if crowded else {}))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.margins(x=0.12 / len(places) if categories else 0.12)


PAINT = {"curves": paint_curves, "lines": paint_lines}


def explain(kind: str, table: pd.DataFrame, statistic: str, seeds: bool, tasks: int = 1, values: str = "") -> str:
    """The sentences of a caption: what is drawn, what bands, strokes and thin lines are."""
    few = table.groupby(["row", "col"])["series"].agg(lambda s: sum(not x.endswith("published") for x in s.unique()))
    over = "over the seeds" if tasks == 1 else f"over the seeds of a task, then mean over {tasks} tasks"
    text = f"{STATISTICS[statistic][0]} {over}"
    if table["low"].notna().any():
        bands = kind == "curves" and few.max() <= BANDS
        text += f"; {'bands' if bands else 'strokes'}: its 95% interval (bootstrap)"
        text += "; thin lines: single runs" if bands and seeds else ""
    text += f". {values}" if values else "."
    return text + (" Hollow: runs are missing." if (table["n"] < table["expected"]).any() else "")


def published(path: str, table: pd.DataFrame, statistic: str) -> pd.DataFrame:
    """Rows for a table of curves of returns: those of a CSV on the same tasks, as far as ours go.

    The file has the columns env, algo, seed, agent_step, env_step, return. In `table`, `env` says a panel's task.
    """
    frame = pd.read_csv(path)
    if missing := [name for name in ("env", "algo", "seed", "agent_step", "return") if name not in frame]:
        raise ValueError(f"{path} lacks {', '.join(missing)}: write env,algo,seed,agent_step,env_step,return")
    frame = frame[frame["env"].isin(table["env"].dropna())]
    if frame.empty:
        raise ValueError(f"{path} has no curves on {', '.join(table['env'].dropna().unique())}")
    frame = frame.rename(columns={"return": "value", "agent_step": "x"})
    found = estimates(frame, ["env", "algo", "x"], STATISTICS[statistic][1])
    found["series"] = found.pop("algo") + ", published"
    places = table.dropna(subset="env").groupby(["row", "col", "env"], as_index=False)["x"].max()
    found = places.merge(found, on="env", suffixes=("_end", ""))
    return found[found["x"] <= found.pop("x_end")].assign(point="", expected=found["n"])


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--statistic", choices=STATISTICS, default="iqm", help="over the seeds (iqm)")
    parser.add_argument("--last", type=positive, metavar="K", help="values in a final one (the last tenth)")
    parser.add_argument(
        "--published", metavar="CSV", help="curves to lay over returns: env,algo,seed,agent_step,return"
    )
    parser.add_argument("--label", type=label, action="append", default=[], metavar="NAME=TEXT", help="in the legend")
    parser.add_argument("--github", action="store_true", help="NAME_light.svg and NAME_dark.svg instead of PNG and PDF")
    parser.add_argument("--no-caption", action="store_true", help="leave the caption out of the picture")


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def label(text: str) -> tuple[str, str]:
    name, _, words = text.partition("=")
    return name, words or name


def save(out: Path, table: pd.DataFrame, github: bool, draw) -> list[Path]:
    """Write what `draw(theme)` gives as PNG and PDF, as the one file that `out` names, or for GitHub; and a CSV."""
    stem = out.with_suffix("") if out.suffix in (".svg", ".png", ".pdf") else out
    files = {out: "white"} if stem != out else {Path(f"{stem}.png"): "white", Path(f"{stem}.pdf"): "white"}
    if github:
        files = {Path(f"{stem}_{theme}.svg"): theme for theme in ("light", "dark")}
    out.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "mst"}):
        for file, theme in files.items():
            metadata = {"Date": None} if file.suffix == ".svg" else {}
            draw(theme).savefig(file, dpi=200, transparent=theme != "white", metadata=metadata)
    csv = Path(f"{stem}.csv")
    table.to_csv(csv, index=False)
    return [*files, csv]


def tell(*texts: str, file=None) -> None:
    """Print on any terminal: what its encoding lacks is escaped."""
    file = file or sys.stdout
    for text in filter(None, texts):
        print(text.encode(file.encoding or "ascii", "backslashreplace").decode(file.encoding or "ascii"), file=file)


def measure(name: str) -> str:
    """A tag in words: "Critic dormant ratio"."""
    return "Return" if name == RETURN else name.split("/")[-1].replace("_", " ").capitalize().replace("Srank", "srank")
