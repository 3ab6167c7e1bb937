"""A figure of the paper, or of a study beyond it, from the runs that there are.

    python -m analysis.figure fig06                                    # from the runs in runs/
    python -m analysis.figure fig14 --size small --runs results/small/runs
    python -m analysis.figure all --size toy

Writes fig06.png, .pdf, .csv (exactly what is drawn), .txt (what is missing, verdicts on claims)
and fig06-cost.csv. Exit codes: 0 drawn, 2 nothing to draw or wrong usage.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from analysis import draw
from analysis.claims import outcome, sentences, verdicts
from analysis.looks import TYPES, method
from analysis.runs import RETURN, STATISTICS, declared, estimates, in_words, load, values
from experiments.figures import FIGURES


class Form(NamedTuple):
    """How a figure of forms.csv is drawn: `series` and so on name columns of `described()`."""

    kind: str  # "curves", or "lines" for final returns
    series: str
    col: str = ""
    row: str = ""
    point: str = ""  # lines: what the points of a line are
    x: str = ""  # and the number that places them; "" for names side by side
    measures: tuple[str, ...] = (RETURN,)  # curves: a row of panels each


WORDS = {
    "parameters": "Parameters", "encoder_parameters": "Encoder parameters", "critic_parameters": "Critic parameters",
    "actor_parameters": "Actor parameters", "critic_sparsity": "Sparsity of critic and actor",
    "topology_update_interval": "Updates between topology updates", "drop_fraction": "drop fraction ",
    "er": "ER", "rigl": "RigL", "set": "SET",
    "iqm": "Interquartile mean", "mean": "Mean", "spread": "Standard deviation",
}  # fmt: skip
FORMS = {
    row.pop("figure"): Form(**row | {"measures": tuple(row["measures"].split())})
    for row in pd.read_csv(Path(__file__).with_name("forms.csv"), dtype=str, keep_default_na=False).to_dict("records")
}
OTHER = Form("curves", "exp_name")  # of a study that is not here


def described(figure: str, runs: pd.DataFrame, size: str = "paper", envs=None, seeds=None):
    """The runs that a figure declares with what panels and lines are named by, and their outcome; and problems.

    A run that several panels show has several rows.
    """
    table, problems = declared(figure, runs, size, envs, seeds)
    table = outcome(figure, table.assign(method=[method(run) for run in table.to_dict("records")]))
    if figure in ("fig13", "fig26"):
        width, depth = table["width_scale"], table["depth_scale"]
        name = table["script"].map({"mst_sac": "SAC", "mst_ddpg": "DDPG", "mst_mrsac": "MR.SAC"})
        table["size"] = np.maximum(width, depth)
        ways = {"wider": depth == 1, "deeper": width == 1, "both": width == depth}
        table = pd.concat(table[own].assign(larger=name + ", " + way) for way, own in ways.items())
        table = table.sort_values("script", ascending=False, kind="stable")
    if figure == "fig12":
        table["rule"] = table["growth"].replace(WORDS) + ", " + table["distribution"].replace(WORDS)
    return table, problems


def numbers(table: pd.DataFrame, form: Form, statistic: str = "iqm"):
    """What is drawn of runs, the single runs of curves, and problems.

    A row per point: row, col, series, point, x, value, low, high, n, expected, and env where it is of one task. A value
    that lacks a whole task is left out: it would be the mean of other tasks than its neighbours.
    """
    runs, by, parts, problems = table.assign(point="", x=np.nan), ["row", "col", "series", "point"], [], []
    runs["series"] = WORDS.get(form.series, "") + runs[form.series].astype(str)
    runs["col"] = runs[form.col] if form.col else ""
    runs["row"] = "Final return" + (", " + runs[form.row] if form.row else "")
    if form.kind == "lines":
        runs["point"] = runs[form.point].map(TYPES) if form.point.endswith("_arch") else runs[form.point]
        if form.x in runs:
            runs["x"] = runs.groupby(["row", "col", "point"])[form.x].transform("mean")
        parts = [(runs, runs)]
    for measure in form.measures if form.kind == "curves" else ():
        by_task = measure == RETURN and form.col != "env" and runs["env"].nunique() > 1
        own = runs.assign(row=in_words(measure) + (", " + runs["env"] if by_task else ""))
        found, more = values(own[own["path"].notna()], measure)
        parts, problems = [*parts, (own, found.assign(x=found["agent_step"]))], problems + more
    wanted, each = (pd.concat(frames) for frames in zip(*parts, strict=True))
    how = {"expected": ("seed", "nunique"), "of": ("env", "nunique"), "env": ("env", "first"), "place": ("x", "mean")}
    found = wanted.groupby(by, sort=False).agg(**how).reset_index()
    found = found.merge(estimates(each, [*by, "x"], STATISTICS[statistic]), "left", by)
    found["x"], found["n"] = found["x"].fillna(found.pop("place")), found["n"].fillna(0).astype(int)
    found["env"] = found["env"].where(found["of"] == 1)
    found.loc[found.pop("tasks") < found.pop("of"), ["value", "low", "high"]] = np.nan
    return found, each, problems


def heading(form: Form, value) -> str:
    """The title of a column of panels."""
    name = "depth" if form.col == "depth_scale" else "scale"
    return TYPES[value] if form.col.endswith("_arch") else f"{name} {value}" * form.col.endswith("_scale") or str(value)


def drawing(table: pd.DataFrame, form: Form, title: str = "", statistic="iqm", published=None, labels=None):
    """What is drawn of a table of runs, a function `picture(theme, captioned)`, the caption, and problems."""
    found, each, problems = numbers(table, form, statistic)
    if found["value"].isna().all():
        raise ValueError("\n".join(["no run with values on all of the tasks", *problems]))
    tasks, curves = table["env"].unique(), form.kind == "curves"
    over = "" if found["env"].notna().all() else f" of a task, then mean over {len(tasks)} tasks (n: runs on a task)"
    lines = found.dropna(subset="value").groupby(["row", "col"])["series"].nunique().max()
    bands = curves and lines <= draw.BANDS
    told = f"{title}{WORDS[statistic]} over the seeds{over}"
    if found["low"].notna().any():
        told += "; bands: its 95% interval; thin lines: single runs" if bands else "; strokes: its 95% interval"
    told += "." + " Hollow: runs are missing." * bool((found["n"] < found["expected"]).any())
    told += f" {', '.join(tasks)}."
    if published:
        found = pd.concat([found, draw.published(published, found, statistic)])
    share = "col" if form.col == "env" else "row" if found["row"].nunique() > 1 else True
    share = False if curves and form.col == "env" else share
    how = {"heading": lambda value: heading(form, value), "share": share, "labels": labels or {}, "bands": bands}
    how |= {"xlabel": "Agent steps" if curves else WORDS.get(form.x or form.point, "")}

    def picture(theme: str = "white", captioned: bool = True):
        return draw.panels(found, form.kind, each, theme=theme, caption=told if captioned else "", **how)

    return found, picture, told, problems


def costs(table: pd.DataFrame) -> pd.DataFrame:
    """A row per cell: n, hours, parameters, active ones (at the start) and operations, the last three in millions.

    Operations are theoretical, of a forward pass for one sample: two for each active parameter. Products are dense.
    """
    table = table[table["state"] == "complete"].reindex(columns=["exp_name", "hours", "parameters", "active"])
    table[["parameters", "active"]] /= 1e6
    cells = table.groupby("exp_name", sort=False)
    return cells.mean().assign(n=cells.size(), operations=lambda own: 2 * own["active"]).reset_index()


def main(argv: list[str]) -> int:
    parser = draw.parser("figure", __doc__)
    parser.add_argument("figure", choices=[*FIGURES, "all"], metavar="FIGURE", help=f"all, {', '.join(FIGURES)}")
    parser.add_argument("--runs", nargs="+", default=["runs"], help="folders of run directories (runs)")
    parser.add_argument("--size", choices=["paper", "small", "toy"], default="paper")
    parser.add_argument("--envs", nargs="+", help="other tasks than the figure's")
    parser.add_argument("--seeds", type=int, help="another number of seeds than the figure's")
    parser.add_argument("--measure", nargs="+", default=[], help="rows of curves, instead of all: return, or tags")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="a folder (figures)")
    args = parser.parse_args(argv)
    choice, drawn = (args.size, tuple(args.envs) if args.envs else None, args.seeds), 0
    suffix, of_size = ("", "") if args.size == "paper" else (f"-{args.size}", f" ({args.size} size, not the paper's)")
    try:
        runs, problems = load(*args.runs)
        for name in FIGURES if args.figure == "all" else [args.figure]:
            table, more = described(name, runs, *choice)
            if args.figure == "all" and table["value"].isna().all():
                continue
            form, out = FORMS.get(name, OTHER), args.out / f"{name}{suffix}"
            form = form._replace(measures=tuple(args.measure) or form.measures)
            title = FIGURES[name].title.format(env=", ".join(table["env"].unique())) + of_size + ". "
            found, paint, caption, lacks = drawing(table, form, title, args.statistic, args.published, dict(args.label))
            files = draw.save(out, found, args, paint)
            costs(table.drop_duplicates("path")).to_csv(f"{out}-cost.csv", index=False)
            text = [caption, *problems, *more, *lacks, sentences(verdicts(name, runs, *choice))]
            Path(f"{out}.txt").write_text("\n".join(filter(None, text)) + "\n", encoding="utf-8")
            draw.tell(*text, f"wrote {files}, {out}.txt, {out}-cost.csv")
            drawn += 1
        if not drawn:
            raise ValueError(f"no figure has complete runs at {args.size} size in {', '.join(args.runs)}")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
