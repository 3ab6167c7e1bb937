"""A figure of the paper, or of a study beyond it, from the runs that there are.

    python -m analysis.figure fig06                                    # from the runs in runs/
    python -m analysis.figure fig14 --size small --runs results/small/runs
    python -m analysis.figure all --size toy

Writes fig06.png, .pdf, .csv (exactly what is drawn), .txt (what is missing, verdicts on the paper's claims) and, with
--cost, fig06-cost.csv. Exit codes: 0 drawn, 2 nothing to draw or wrong usage.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from analysis import draw
from analysis.claims import SINCE, outcome, sentences, verdicts
from analysis.looks import TYPES, method
from analysis.runs import RETURN, declared, estimates, load, values
from experiments.figures import FIGURES


class Form(NamedTuple):
    """How a figure is drawn: `series` and so on name columns of `described()`."""

    kind: str  # "curves", or "lines" for final returns
    series: str
    col: str = ""
    row: str = ""
    point: str = ""  # lines: what the points of a line are
    x: str = ""  # and the number that places them; "" for names side by side
    measures: tuple[str, ...] = (RETURN,)  # curves: a row of panels each


def types(module: str, row: str = "") -> Form:
    return Form("lines", f"{module}_regime", row=row, point=f"{module}_arch")


def scales(module: str, row: str = "") -> Form:
    return Form("lines", f"{module}_regime", f"{module}_arch", row, f"{module}_scale", f"{module}_parameters")


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
    "fig11": Form("curves", "method", "critic_scale", measures=(RETURN, *CRITIC)),
    "fig12": Form("lines", "method", "flag", point="setting"),
    "fig13": Form("lines", "method", "env", "algorithm, larger", "size", "parameters"),
    "fig14": Form("curves", "method"),
    "fig17": Form("curves", "residual", "critic_scale"),
    "fig18": types("encoder", "env"),
    "fig19": scales("encoder", "env"),
    "fig20": types("critic", "env"),
    "fig23": types("actor", "env"),
    **dict.fromkeys(("fig21", "fig22"), scales("critic")),
    **dict.fromkeys(("fig24", "fig25"), scales("actor")),
    "fig26": Form("lines", "method", "algorithm, larger", "env", "size", "parameters"),
    "one-strategy": Form("lines", "method", "env", "", "critic_scale", "parameters"),
    "sparsity": Form("lines", "method", "env", "", "critic_sparsity", "critic_sparsity"),
    "rigl": Form("lines", "drop_fraction", "env", "", "topology_update_interval", "topology_update_interval"),
    "depth": Form("curves", "method", "depth_scale", measures=(RETURN, *CRITIC, "plasticity/actor_dormant_ratio")),
    "encoder-types": types("encoder"),
}
WORDS = {
    "parameters": "Parameters", "encoder_parameters": "Encoder parameters", "critic_parameters": "Critic parameters",
    "actor_parameters": "Actor parameters", "encoder_arch": "", "critic_arch": "", "actor_arch": "", "setting": "",
    "critic_sparsity": "Sparsity of critic and actor", "distribution": "Distribution", "growth": "Growth criterion",
    "topology_update_interval": "Updates between topology updates",
}  # fmt: skip
OTHER = Form("curves", "exp_name")  # of a study that is not here


def described(figure: str, table: pd.DataFrame) -> pd.DataFrame:
    """The declared runs with what panels and lines are named by. A run that several panels show has several rows."""
    table = table.assign(method=[method(run) for run in table.to_dict("records")])
    if figure in ("fig13", "fig26"):
        width, depth = table["width_scale"], table["depth_scale"]
        name = table["script"].map({"mst_sac": "SAC", "mst_ddpg": "DDPG", "mst_mrsac": "MR.SAC"})
        table["size"] = table[["width_scale", "depth_scale"]].max(axis=1)
        ways = {"wider": depth == 1, "deeper": width == 1, "both": width == depth}
        parts = [table[own].assign(**{"algorithm, larger": name + ", " + way}) for way, own in ways.items()]
        table = pd.concat(parts).sort_values("script", ascending=False, kind="stable")
    if figure == "fig12":
        usual = {"distribution": "er", "growth": "rigl", "critic_sparsity": 0.6}
        parts = []
        for flag in usual:
            own = table[
                [all(run[x] == value for x, value in usual.items() if x != flag) for _, run in table.iterrows()]
            ]
            parts.append(own.sort_values(flag, kind="stable").assign(flag=flag, setting=own[flag].astype(str)))
        table = pd.concat(parts)
    return table


def numbers(figure: str, table: pd.DataFrame, statistic: str = "iqm", last: int | None = None, measures=()):
    """What a figure draws of its declared runs, the single runs, and problems.

    A row per point: row, col, series, point, x, value, low, high, n, expected, and env where it is of one task. A value
    that lacks a whole task is left out: it would be the mean of other tasks than its neighbours.
    """
    form = FORMS.get(figure, OTHER)
    runs = described(figure, table).assign(point="", x=np.nan)
    runs["series"] = runs[form.series].astype(str)
    runs["col"] = runs[form.col] if form.col else ""
    by, wanted, parts, problems = ["row", "col", "series", "point"], [], [], []
    if form.kind == "lines":
        runs["row"] = runs[form.row] if form.row else "Final return"
        runs["point"] = runs[form.point].map(TYPES) if form.point.endswith("_arch") else runs[form.point]
        parts = wanted = [outcome(figure, runs, last=last)]
        if form.x in runs:
            runs["x"] = runs.groupby(["row", "col", "point"])[form.x].transform("mean")
            parts[0]["x"] = runs["x"]
    for measure in (measures or form.measures) if form.kind == "curves" else ():
        by_task = measure == RETURN and runs["env"].nunique() > 1
        own = runs.assign(row=draw.measure(measure) + (", " + runs["env"] if by_task else ""))
        found, more = values(own[own["path"].notna()], measure)
        parts, wanted, problems = [*parts, found.assign(x=found["agent_step"])], [*wanted, own], problems + more
    each = pd.concat(parts)
    how = {"expected": ("seed", "size"), "wanted": ("env", "nunique"), "env": ("env", "first"), "place": ("x", "mean")}
    counts = pd.concat(wanted).groupby(by, sort=False).agg(**how).reset_index()
    found = counts.merge(estimates(each, [*by, "x"], draw.STATISTICS[statistic][1]), "left", by)
    found["x"], found["n"] = found["x"].fillna(found.pop("place")), found["n"].fillna(0).astype(int)
    wanted = found.pop("wanted")
    found["env"] = found["env"].where(wanted == 1)
    found.loc[found.pop("tasks") < wanted, ["value", "low", "high"]] = np.nan
    return found, each, problems


def costs(table: pd.DataFrame) -> pd.DataFrame:
    """A row per cell: n, hours (mean, least, most), parameters, active ones and theoretical operations, all in millions.

    Operations are those of one forward pass of all modules for one sample, two for each active parameter. The products
    are dense, so a sparse run is not faster. Under s2d and d2s the active parameters are those of the start.
    """
    done = table[table["state"] == "complete"].assign(method=lambda t: [method(run) for run in t.to_dict("records")])
    how = {"n": ("seed", "size"), "hours": ("hours", "mean"), "least": ("hours", "min"), "most": ("hours", "max")}
    how |= {name: (name, "mean") for name in ("parameters", "active") if name in done}
    found = done.groupby(["exp_name", "method"], sort=False).agg(**how).reset_index()
    for name in {"parameters", "active"} & set(found):
        found[name] /= 1e6
    return found.assign(operations=2 * found["active"]) if "active" in found else found


def heading(form: Form, value) -> str:
    """The title of a column of panels."""
    if form.col.endswith("_arch"):
        return TYPES[value]
    return f"{form.col.split('_')[0]} {value}" if form.col.endswith("_scale") else WORDS.get(value, str(value))


def drawing(
    figure: str, runs: pd.DataFrame, size: str = "paper", envs=None, seeds=None, only=None, statistic: str = "iqm",
    last: int | None = None, measures=(), published: str | None = None, labels: dict | None = None,
):  # fmt: skip
    """A figure's numbers, a function `draw(theme, caption)` that draws them, its caption, and problems.

    Raises:
        ValueError: there is nothing to draw.
    """
    form = FORMS.get(figure, OTHER)
    table, problems = declared(figure, runs, size, envs, seeds, only)
    found, each, more = numbers(figure, table, statistic, last, measures)
    if found["value"].isna().all():
        raise ValueError(f"no run of {figure} at {size} size on each of its tasks")
    if published:
        found = pd.concat([found, draw.published(published, found, statistic)])
    tasks, curves = list(table["env"].unique()), form.kind == "curves"
    by_task = found["env"].notna().all()
    since = f"from agent step {SINCE[figure]:,} on" if figure in SINCE else f"of the last {last or 'tenth'}"
    values = (
        "" if curves else f"A run's value: the mean return {since}{'' if figure in SINCE else ' of its evaluations'}."
    )
    told = draw.explain(form.kind, found, statistic, curves, 1 if by_task else len(tasks), values)
    caption = f"{FIGURES[figure].title.format(env=', '.join(tasks))}. {told} Tasks: {', '.join(tasks)}."
    caption += "" if size == "paper" else f" {size.capitalize()} size, not the paper's."
    shown = {
        "xlabel": "Agent steps" if curves else WORDS.get(form.x or form.point, (form.x or form.point).capitalize()),
        "titles": lambda value: heading(form, value), "seeds": each if curves else None, "labels": labels,
        "share": "col" if form.col == "env" and not curves else "row" if found["row"].nunique() > 1 else True,
    }  # fmt: skip

    def picture(theme: str = "white", captioned: bool = True):
        return draw.panels(found, form.kind, theme=theme, caption=caption if captioned else "", **shown)

    return found, picture, caption, problems + more


def pair(text: str) -> tuple[str, tuple[str, ...]]:
    flag, _, of = text.partition("=")
    return flag.replace("-", "_"), tuple(of.split(","))


def main(argv: list[str]) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m analysis.figure", description=__doc__, formatter_class=form)
    parser.add_argument("figure", choices=[*FIGURES, "all"], metavar="FIGURE", help=f"all, {', '.join(FIGURES)}")
    parser.add_argument("--runs", nargs="+", default=["runs"], help="folders of run directories (runs)")
    parser.add_argument("--size", choices=["paper", "small", "toy"], default="paper")
    parser.add_argument("--envs", nargs="+", help="other tasks")
    parser.add_argument("--seeds", type=draw.positive, help="another number of seeds")
    parser.add_argument("--only", type=pair, action="append", default=[], metavar="FLAG=V1,V2", help="cells with these")
    parser.add_argument("--measure", action="append", default=[], metavar="TAG", help="rows of curves, instead of all")
    parser.add_argument("--cost", action="store_true", help="also a table of hours, parameters and operations by cell")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="a folder (figures)")
    draw.add_options(parser)
    args = parser.parse_args(argv)
    try:
        runs, problems = load(*args.runs)
    except ValueError as error:
        parser.error(str(error))
    drawn = 0
    choice = {"size": args.size, "envs": tuple(args.envs) if args.envs else None, "seeds": args.seeds}
    for name in FIGURES if args.figure == "all" else [args.figure]:
        options = {
            "statistic": args.statistic,
            "last": args.last,
            "measures": args.measure,
            "published": args.published,
        }
        try:
            found, picture, caption, more = drawing(
                name, runs, **choice, only=dict(args.only), **options, labels=dict(args.label)
            )
        except (ValueError, OSError) as error:
            if args.figure != "all":
                parser.error("\n".join([str(error), *problems]))
            continue
        out = args.out / (name if args.size == "paper" else f"{name}-{args.size}")
        files = draw.save(out, found, args.github, lambda theme, f=picture: f(theme, not args.no_caption))
        tested = verdicts(name, runs, **choice)
        text = [caption, *problems, *more, sentences(tested)]
        if args.cost:
            spent = costs(declared(name, runs, **choice)[0])
            spent.to_csv(f"{out}-cost.csv", index=False)
            text.append(spent.round(3).to_string(index=False))
        Path(f"{out}.txt").write_text("\n".join(filter(None, text)) + "\n", encoding="utf-8")
        draw.tell(*text, f"wrote {', '.join(map(str, [*files, f'{out}.txt']))}")
        drawn += 1
    if not drawn:
        parser.error(f"no figure has runs at {args.size} size in {', '.join(args.runs)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
