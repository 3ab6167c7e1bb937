"""Learning curves of any runs: a panel per environment, a line per experiment name.

    python -m analysis.curves runs                                            # every run in a folder
    python -m analysis.curves runs/*__small-sac-* --metric plasticity/critic_dormant_ratio --out figures/dormant
    python -m analysis.curves runs/cartpole-swingup__* --github --out figures/cartpole

A line is the interquartile mean over the seeds. It prints a table of final values and what is missing or left out, and
writes a PNG, a PDF and a CSV of what is drawn. Exit codes: 0 drawn, 2 no such runs or wrong usage.
"""

import argparse
import os
import sys
from pathlib import Path

import pandas as pd

from analysis import draw
from analysis.looks import LOOKS, method
from analysis.runs import RETURN, estimates, final, load, values


def names(runs: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """For each label, the series that gives it its look, and its text in the legend.

    A series is what the regimes are together, where that tells the labels apart, else the label itself. What all
    labels begin with is left out of the texts.
    """
    labels = list(runs["label"].unique())
    common = os.path.commonprefix(labels).rfind("-") + 1 if len(labels) > 1 else 0
    methods = {row["label"]: method(row) for row in runs.to_dict("records")}
    if len(set(methods.values())) < len(labels) or not set(methods.values()) <= set(LOOKS):
        return {name: (name, name[common:]) for name in labels}
    return {name: (of, f"{LOOKS[of].label}: {name[common:]}") for name, of in methods.items()}


def picture(curves: pd.DataFrame, metric: str = RETURN, statistic: str = "iqm", published: str = "", texts=None):
    """The table of curves, and a function that draws it: `draw(theme, caption)`."""
    known = names(curves)
    seeds = curves.assign(row=draw.measure(metric), col=curves["env"], x=curves["agent_step"])
    seeds["series"] = seeds["label"].map({name: series for name, (series, _) in known.items()})
    table = estimates(seeds, ["row", "col", "series", "x"], draw.STATISTICS[statistic][1]).assign(point="")
    n = seeds.groupby(["col", "series"])["path"].nunique().rename("expected").reset_index()
    table = table.merge(n, on=["col", "series"]).assign(env=lambda t: t["col"])
    table["expected"] = table["n"]  # curves of any runs lack none
    if published:
        table = pd.concat([table, draw.published(published, table, statistic)])
    few = len(seeds["path"].unique()) > len(known)
    words = {series: (texts or {}).get(name, text) for name, (series, text) in known.items()}
    shown = {"seeds": seeds, "share": False, "labels": words}
    told = draw.explain("curves", table, statistic, few)
    return table, lambda theme="white", caption=True: draw.panels(
        table, "curves", theme=theme, caption=told if caption else "", **shown
    )


def ends(curves: pd.DataFrame, statistic: str = "iqm", last: int | None = None) -> pd.DataFrame:
    """A row per environment and label: n, up to which agent steps the runs go, and the final value with its interval."""
    each = final(curves, last)
    table = estimates(each, ["env", "label"], draw.STATISTICS[statistic][1]).drop(columns="tasks")
    steps = each.groupby(["env", "label"])["agent_step"].agg(
        lambda s: " to ".join(f"{x:,}" for x in sorted({min(s), max(s)}))
    )
    return table.merge(steps.rename("agent steps").reset_index(), on=["env", "label"])


def main(argv: list[str]) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m analysis.curves", description=__doc__, formatter_class=form)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories, or folders that hold them")
    parser.add_argument("--metric", default=RETURN, metavar="TAG", help="a tag of metrics.csv, instead of the return")
    parser.add_argument("--out", type=Path, default=Path("figures/curves"), help="with or without suffix")
    draw.add_options(parser)
    args = parser.parse_args(argv)
    try:
        runs, problems = load(*args.runs)
        curves, more = values(runs, args.metric)
        if curves.empty:
            raise ValueError("\n".join([f"none of these {len(runs)} runs has a {args.metric}", *problems, *more]))
        table, drawn = picture(curves, args.metric, args.statistic, args.published, dict(args.label))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    files = draw.save(args.out, table, args.github, lambda theme: drawn(theme, not args.no_caption))
    draw.tell(*problems, *more, ends(curves, args.statistic, args.last).round(3).to_string(index=False))
    draw.tell(f"wrote {', '.join(map(str, files))}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
