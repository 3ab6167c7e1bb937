"""Learning curves of any runs, the seeds of an experiment together.

    python -m analysis.curves runs                                                # every run in a folder
    python -m analysis.curves runs/*__small-sac-* --metric plasticity/critic_dormant_ratio --out figures/dormant
    python -m analysis.curves runs/cartpole-swingup__* --theme dark --out curves-dark.svg

A panel per environment, a line per experiment name: the interquartile mean over its seeds, a bootstrap 95% interval and
each seed thin. It prints a table of the final values, and writes a PNG, a PDF and a CSV of what is drawn, or, where
`--out` ends with `.svg`, `.png` or `.pdf`, this file and the CSV. Exit codes: 0 drawn, 2 no such runs or wrong usage.
"""

import os
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from analysis.figure import (
    COLUMN,
    MEASURES,
    PAGE,
    RETURN,
    STYLE,
    add_legend,
    estimate,
    legend_columns,
    over_steps,
    ticks,
)
from analysis.runs import Loaded, load_runs
from analysis.statistics import final_performance
from experiments.__main__ import Parser, positive

COLORS = ("#D55E00", "#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#0072B2", "#8C8C8C")  # seen on white and on black
THEMES = {"white": "black", "light": "#1F2328", "dark": "#E6EDF3"}  # text, in GitHub's colours; background if white
BINS = 200  # of agent steps, at most: what was logged more often is averaged


def values(loaded: Loaded, metric: str = RETURN) -> pd.DataFrame:
    """The identity of each run, agent_step and value: the evaluations' returns, or what a TensorBoard tag holds."""
    if metric == RETURN:
        return loaded.evaluations.rename(columns={"episode_return_mean": "value"})
    found = loaded.scalars([metric])
    if found["agent_step"].nunique() > BINS:
        width = -(-found["agent_step"].max() // BINS)
        found["agent_step"] = -(-found["agent_step"] // width) * width
        found = found.groupby([*loaded.identity, "agent_step"], dropna=False, sort=False)["value"].mean().reset_index()
    return found


def curves(found: pd.DataFrame, statistic: str = "iqm") -> pd.DataFrame:
    """env, exp_name, seed, agent_step, value, low, high, n: each run (n is 1), and the seeds together ("all")."""
    tables = [found.assign(low=np.nan, high=np.nan, n=1)]
    for (env, name), group in found.groupby(["env", "exp_name"], sort=False):
        together = over_steps(group, statistic).rename(columns={"x": "agent_step"})
        tables.append(together.assign(env=env, exp_name=name, seed="all"))
    columns = ["env", "exp_name", "seed", "agent_step", "value", "low", "high", "n"]
    return pd.concat(tables, ignore_index=True)[[*columns, "directory"]].astype({"agent_step": int, "n": int})


def final(found: pd.DataFrame, statistic: str = "iqm", last: int | None = None) -> pd.DataFrame:
    """A row per environment and experiment name: n, up to which agent steps the runs go, value, low and high.

    A run's value is the mean of its last `last` ones, by default of the last tenth.
    """
    rows = []
    for place, group in final_performance(found, last, "value").groupby(["env", "exp_name"], sort=False):
        steps = "–".join(f"{step:,}" for step in sorted({group["agent_step"].min(), group["agent_step"].max()}))
        rows.append((*place, len(group), steps, *estimate([group["value"].to_numpy()], statistic)))
    return pd.DataFrame(rows, columns=["env", "exp_name", "n", "agent_steps", "value", "low", "high"])


def draw(table: pd.DataFrame, metric: str = RETURN, labels: dict[str, str] | None = None, theme: str = "white"):
    """Draw what `curves` gives, as a matplotlib figure. Experiments without a label lose what all names begin with."""
    labels, envs, names = labels or {}, list(table["env"].unique()), list(table["exp_name"].unique())
    common = os.path.commonprefix(names).rfind("-") + 1 if len(names) > 1 else 0
    names.sort(key=[*labels, *names].index)
    keys = [
        Line2D([], [], color=COLORS[i % len(COLORS)], linestyle=("-", "--", ":")[i // len(COLORS) % 3],
               label=labels.get(name, name[common:])) for i, name in enumerate(names)
    ]  # fmt: skip
    across = min(3, len(envs))
    down, width = -(-len(envs) // across), PAGE if across > 1 else COLUMN + 1
    legend_lines = -(-len(keys) // legend_columns([key.get_label() for key in keys], width))
    text = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), THEMES[theme]
    )
    with rc_context(STYLE | text):
        fig = Figure(figsize=(width, 0.5 + 0.16 * legend_lines + 1.9 * down), layout="constrained")
        axes = fig.subplots(down, across, squeeze=False)
        for ax, env in zip(axes.flat, envs, strict=False):
            for name, key in zip(names, keys, strict=True):
                group = table[(table["env"] == env) & (table["exp_name"] == name)]
                if group.empty:
                    continue
                look = {"color": key.get_color(), "linestyle": key.get_linestyle()}
                for _, run in group[group["seed"] != "all"].groupby("directory"):
                    ax.plot(run["agent_step"], run["value"], **look, linewidth=0.5, alpha=0.5)
                together = group[group["seed"] == "all"]
                ax.plot(together["agent_step"], together["value"], **look, linewidth=1.6)
                band = {"color": look["color"], "alpha": 0.2, "linewidth": 0}
                ax.fill_between(together["agent_step"], together["low"], together["high"], **band)
            ax.set_title(env)
            ax.xaxis.set_major_locator(ticks(4))
            ax.yaxis.set_major_locator(ticks(5))
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        for ax in axes.flat[len(envs) :]:
            ax.set_visible(False)
        fig.supxlabel("Agent steps", fontsize=STYLE["axes.labelsize"])
        for ax in axes[:, 0]:
            ax.set_ylabel(MEASURES.get(metric, metric))
        add_legend(fig, keys)
    return fig


def label(text: str) -> tuple[str, str]:
    name, _, words = text.partition("=")
    return name, words or name


def main(argv: list[str]) -> int:
    """Returns the exit code: 0, 2 if there is nothing to draw."""
    parser = Parser("python -m analysis.curves", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories, or folders that hold them")
    parser.add_argument("--metric", default=RETURN, metavar="TAG", help="a TensorBoard tag, instead of the return")
    parser.add_argument("--statistic", choices=["iqm", "mean"], default="iqm", help="over the seeds (iqm)")
    parser.add_argument("--last", type=positive, metavar="K", help="values in a final one (the last tenth)")
    parser.add_argument(
        "--label", type=label, action="append", metavar="NAME=TEXT", help="what the legend calls a name"
    )
    parser.add_argument("--theme", choices=THEMES, default="white", help="light or dark: on a transparent background")
    parser.add_argument(
        "--out", type=Path, default=Path("figures/curves"), help="without or with suffix (figures/curves)"
    )
    args = parser.parse_args(argv)
    try:
        loaded = load_runs(*args.runs, sizes=False)
        found = values(loaded, args.metric)
        if found.empty:
            raise ValueError(f"none of these runs has a {args.metric}: give a tag that TensorBoard shows")
    except ValueError as error:
        parser.error(str(error))
    table = curves(found, args.statistic)
    drawn = draw(table, args.metric, dict(args.label or ()), args.theme)
    print("\n\n".join(filter(None, [loaded.report(), final(found, args.statistic, args.last).to_string(index=False)])))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    pictures = (
        [args.out]
        if args.out.suffix in (".svg", ".png", ".pdf")
        else [Path(f"{args.out}{end}") for end in (".png", ".pdf")]
    )
    for path in pictures:
        drawn.savefig(path, dpi=200, transparent=args.theme != "white")
    csv = Path(f"{args.out.with_suffix('') if pictures == [args.out] else args.out}.csv")
    table.drop(columns="directory").to_csv(csv, index=False)
    print(f"\nwrote {', '.join(map(str, [*pictures, csv]))}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
