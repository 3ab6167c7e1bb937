"""Learning curves of any runs: a panel per environment, a line per experiment name.

    python -m analysis.curves runs                                # every run in a folder
    python -m analysis.curves runs/*__small-sac-* --metric plasticity/critic_dormant_ratio
    python -m analysis.curves runs/cartpole-swingup__* --github --out figures/cartpole

A line is the interquartile mean over the seeds. It prints a table of final values and what is
missing or left out, and writes a PNG, a PDF and a CSV of what is drawn. Exit codes: 0 drawn, 2 no
such runs or wrong usage.
"""

import os
import sys
from pathlib import Path

import pandas as pd

from analysis import draw
from analysis.figure import Form, drawing
from analysis.looks import LOOKS, method
from analysis.runs import RETURN, STATISTICS, estimates, final, load, values


def picture(runs: pd.DataFrame, metric: str = RETURN, statistic="iqm", published=None, labels: dict | None = None):
    """What `drawing` gives, with a line per label. It looks as its regimes do, where that tells the lines apart."""
    names = list(runs["label"].unique())
    series = {row["label"]: method(row) for row in runs.to_dict("records")}
    named = len(set(series.values())) == len(names) and set(series.values()) <= set(LOOKS)
    common = os.path.commonprefix(names).rfind("-") + 1 if len(names) > 1 else 0
    short = {name: f"{LOOKS[series[name]].label}: {name[common:]}" if named else name[common:] for name in names}
    series = series if named else {name: name for name in names}
    texts = {series[name]: (labels or {}).get(name, short[name]) for name in names}
    table = runs.assign(line=runs["label"].map(series))
    return drawing(table, Form("curves", "line", "env", measures=(metric,)), "", statistic, published, texts)


def ends(curves: pd.DataFrame, statistic: str = "iqm") -> pd.DataFrame:
    """A row per environment and label: n, up to which agent steps the runs go, the final value and its interval."""
    each = final(curves)
    table = estimates(each, ["env", "label"], STATISTICS[statistic]).drop(columns="tasks")
    steps = each.groupby(["env", "label"])["agent_step"].agg(["min", "max"]).reset_index()
    return table.merge(steps.rename(columns={"min": "from step", "max": "to step"}), on=["env", "label"])


def main(argv: list[str]) -> int:
    parser = draw.parser("curves", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories, or folders that hold them")
    parser.add_argument("--metric", default=RETURN, metavar="TAG", help="a tag of metrics.csv, instead of the return")
    parser.add_argument("--out", type=Path, default=Path("figures/curves"), help="with or without suffix")
    args = parser.parse_args(argv)
    try:
        runs, problems = load(*args.runs)
        drawn, paint, _, more = picture(runs, args.metric, args.statistic, args.published, dict(args.label))
        files = draw.save(args.out, drawn, args, paint)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    table = ends(values(runs, args.metric)[0], args.statistic)
    draw.tell(*problems, *more, table.round(3).to_string(index=False, na_rep="-"), f"wrote {files}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
