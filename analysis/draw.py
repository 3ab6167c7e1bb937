"""Panels of curves or points from one kind of table, and what the programs that draw share."""

import argparse
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FixedLocator, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from analysis.looks import COLUMN, LOOKS, PAGE, SMALL, look, style
from analysis.runs import STATISTICS, estimates

BANDS = 3  # at most so many bands in a panel; else strokes
STEPS = {"steps": [1, 2, 2.5, 5, 10], "min_n_ticks": 3}


def panels(
    table: pd.DataFrame, kind: str, seeds: pd.DataFrame, *, xlabel: str, heading: Callable, share: str | bool,
    labels: dict[str, str], bands: bool, caption: str, theme: str,
) -> Figure:  # fmt: skip
    """Draw a table with row, col, series, x, point, value, low, high, n, expected.

    `kind` is "curves" over x, or "lines": points over few numbers x, or over the names `point` where there is no x.
    `seeds` are the single runs of curves, drawn thin where there are few lines. `labels` is what the legend calls them.
    """
    there = table.dropna(subset="value")
    rows, cols = there["row"].unique(), there["col"].unique()  # no row or column of empty panels
    cols = sorted(cols) if pd.api.types.is_numeric_dtype(table["col"]) else cols
    places = [(row, col) for row in rows for col in cols]
    across = min(3, len(cols)) if len(rows) == 1 else len(cols)
    down = -(-len(places) // across)
    names = sorted(table["series"].unique(), key=[*LOOKS, *table["series"]].index)
    looks, keys = {name: look(name, names, theme) for name in names}, []
    for name, shown in looks.items():
        own = there[there["series"] == name]
        n = own.groupby(["row", "col", "point"])["n"].max()  # of a curve: at its fullest step
        count = f"n = {n.min():.0f}" + (f" to {n.max():.0f}" if n.max() > n.min() else "") if len(n) else "no run"
        count += f" of {own['expected'].max():.0f}" if len(n) and n.min() < own["expected"].max() else ""
        text = f"{labels.get(name, shown.label)} ({count})"
        keys.append(Line2D([], [], color=shown.color, marker=shown.marker, linestyle=shown.dash, label=text))
    width = PAGE if across > 1 or (kind == "lines" and len(there) > 12) else COLUMN + 0.7
    ncols = max(1, int(width / max(0.066 * len(key.get_label()) + 0.4 for key in keys)))
    caption = textwrap.fill(caption, int(width * 20.5), break_on_hyphens=False)
    around = 0.4 + 0.17 * -(-len(keys) // ncols) + 0.13 * len(caption.splitlines())
    with style(theme):
        fig = Figure(figsize=(width, around + (1.35 if down > 1 else 1.75) * down), layout="constrained")
        axes = fig.subplots(down, across, squeeze=False, sharey=share)
        for k, (ax, (row, col)) in enumerate(zip(axes.flat, places, strict=False)):
            panel, own = (frame[(frame["row"] == row) & (frame["col"] == col)] for frame in (table, seeds))
            paint_curves(ax, panel, own, looks, bands) if kind == "curves" else paint_lines(ax, panel, looks)
            nothing = "no run" if panel["value"].isna().all() else ""
            ax.set_title(f"{heading(col) if k < across or len(rows) == 1 else ''}\n{nothing}".strip())
            ax.set_xlabel(xlabel if k >= len(places) - across else "")
            ax.set_ylabel(textwrap.fill(row, 16 if down > 1 else 30, break_on_hyphens=False) if k % across == 0 else "")
            ax.yaxis.set_major_locator(MaxNLocator(4, **STEPS))
        for ax in axes.flat[: len(places)]:  # not before: it ends the scaling to the data
            ax.set_ylim(min(0, ax.get_ylim()[0]), ax.get_ylim()[1])
        for ax in axes.flat[len(places) :]:
            ax.remove()
        fig.legend(handles=keys, loc="outside upper center", ncols=ncols)
        fig.supxlabel(caption, x=0.01, ha="left", fontsize=SMALL, linespacing=1.2)
    return fig


def paint_curves(ax, panel: pd.DataFrame, seeds: pd.DataFrame, looks: dict, bands: bool) -> None:
    drawn = panel.dropna(subset="value")["series"].unique()
    for k, (name, shown) in enumerate((name, shown) for name, shown in looks.items() if name in drawn):
        line, color = panel[panel["series"] == name].sort_values("x"), {"color": shown.color}
        ax.plot(line["x"], line["value"], shown.dash, **color)
        if bands and not name.endswith(", published"):
            ax.fill_between(line["x"], line["low"], line["high"], alpha=0.2, linewidth=0, **color)
            for _, run in seeds[seeds["series"] == name].groupby("path"):
                ax.plot(run["x"], run["value"], linewidth=0.4, alpha=0.6, **color)
        every = max(1, len(line) // 5)  # few markers, at other steps than those of the other lines
        points(ax, line[min(int((k + 0.5) * every / len(drawn)), len(line) - 1) :: every], shown, strokes=not bands)
    steps = panel["x"].dropna().unique()
    ax.xaxis.set_major_locator(MaxNLocator(3, **STEPS) if len(steps) > 1 else FixedLocator(steps))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))


def points(ax, line: pd.DataFrame, shown, strokes: bool = True) -> None:
    """Markers, hollow where runs are missing, with their intervals."""
    if strokes:
        ax.vlines(line["x"], line["low"], line["high"], color=shown.color, linewidth=0.9)
    whole = line["n"] >= line["expected"]
    for part, face in ((line[whole], shown.color), (line[~whole], "none")):
        marker = {"marker": shown.marker, "markerfacecolor": face, "linestyle": ""}
        ax.plot(part["x"], part["value"], color=shown.color, **marker)


def paint_lines(ax, panel: pd.DataFrame, looks: dict) -> None:
    """Over numbers on a logarithmic axis if they are far apart, or over names side by side."""
    numbers = panel["x"].notna().any()
    places = panel.groupby("point", sort=False)["x"].mean().dropna()
    if not numbers:
        places = pd.Series({point: float(i) for i, point in enumerate(panel["point"].unique())})
    log = numbers and places.max() > max(3 * places.min(), 10)
    ax.set_xscale("log" if log else "linear")
    for k, (name, shown) in enumerate(looks.items()):
        line, aside = panel[panel["series"] == name], k - (len(looks) - 1) / 2  # side by side, so that all are seen
        at = line["x"] if numbers else line["point"].map(places)
        step = 0.012 * np.ptp(places) if numbers else 0.8 / len(looks)
        line = line.assign(x=at * 1.03**aside if log else at + step * aside).sort_values("x")
        ax.plot(line["x"], line["value"], linestyle=shown.dash if numbers else "", color=shown.color)
        points(ax, line, shown)
        for x in [] if numbers else line.loc[line["value"].isna(), "x"]:
            ax.text(x, 0, "missing", rotation=90, fontsize=SMALL, ha="center", va="bottom")
    ax.set_xticks(places, places.index.map(str))
    if numbers:
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)) if log else MaxNLocator(3, **STEPS))
        ax.xaxis.set_minor_locator(FixedLocator(places))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.xaxis.set_major_formatter(EngFormatter(sep="") if places.max() >= 10 else StrMethodFormatter("{x:g}"))
    ax.margins(x=0.12 if numbers else 0.25 / len(places))


def published(path: str, table: pd.DataFrame, statistic: str) -> pd.DataFrame:
    """Rows for a table of returns, where `env` is a panel's task: a CSV's curves on these tasks, as far as ours go."""
    frame = pd.read_csv(path, usecols=["env", "algo", "seed", "agent_step", "return"])
    places = table.dropna(subset="env").groupby(["row", "col", "env"], as_index=False)["x"].max()
    places = places[places["row"].str.startswith("Return")].rename(columns={"x": "end"})
    frame = frame[frame["env"].isin(places["env"])].rename(columns={"return": "value", "agent_step": "x"})
    if frame.empty:
        raise ValueError(f"{path} has no curves of returns on {', '.join(table['env'].dropna().unique())}")
    found = places.merge(estimates(frame, ["env", "algo", "x"], STATISTICS[statistic]), on="env")
    found = found.assign(series=found["algo"] + ", published", point="", expected=found["n"])
    return found[found["x"] <= found["end"]]


def parser(program: str, description: str) -> argparse.ArgumentParser:
    """With the options of all programs that draw."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(f"python -m analysis.{program}", description=description, formatter_class=form)
    parser.add_argument("--statistic", choices=["iqm", "mean"], default="iqm", help="over the seeds (iqm)")
    parser.add_argument("--published", metavar="CSV", help="curves over returns: env,algo,seed,agent_step,return")
    split = lambda text: (text.partition("=")[0], text.partition("=")[2])  # noqa: E731
    parser.add_argument("--label", type=split, action="append", default=[], metavar="NAME=TEXT", help="in legends")
    parser.add_argument("--github", action="store_true", help="NAME_light.svg and NAME_dark.svg")
    parser.add_argument("--no-caption", action="store_true", help="leave the caption out of the picture")
    return parser


def save(out: Path, table: pd.DataFrame, args, picture: Callable) -> str:
    """Write what `picture(theme, captioned)` gives as PNG and PDF, as the one file `out`, or for GitHub; and a CSV."""
    one = out.suffix in (".svg", ".png", ".pdf")
    stem = out.with_suffix("") if one else out
    files = {str(out): "white"} if one else {f"{stem}.png": "white", f"{stem}.pdf": "white"}
    if args.github:
        files = {f"{stem}_{theme}.svg": theme for theme in ("light", "dark")}
    out.parent.mkdir(parents=True, exist_ok=True)
    for file, theme in files.items():
        undated = {"metadata": {"Date": None}} if file.endswith(".svg") else {}
        with style(theme):
            picture(theme, not args.no_caption).savefig(file, dpi=200, transparent=theme != "white", **undated)
    table.to_csv(f"{stem}.csv", index=False)
    return ", ".join([*files, f"{stem}.csv"])


def tell(*texts: str) -> None:
    """Print on any terminal: what its encoding lacks is escaped."""
    for text in filter(None, texts):
        print(text.encode(sys.stdout.encoding or "ascii", "backslashreplace").decode(sys.stdout.encoding or "ascii"))
