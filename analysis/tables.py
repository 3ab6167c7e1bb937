"""Tables in Markdown from runs, so that no number in a page is copied by hand.

    python -m analysis.tables cells fig14 small results/small/runs  # or seeds, verdicts
    python -m analysis.tables calibration results/calibration
    python -m analysis.tables --fill docs/evidence.md               # writes the tables of a page

A page holds a table between <!-- table: cells fig14 small results/small/runs --> and <!-- end -->.
The words are those of the command line, from the repository's folder. Exit codes: 0, 2 wrong usage.
"""

import argparse
import functools
import re
import sys
from pathlib import Path

import pandas as pd

from analysis import claims, figure
from analysis.draw import tell
from analysis.looks import look
from analysis.runs import STATISTICS, estimates, final, in_words, load, values
from experiments.figures import MODULES


def short(x: float) -> str:
    return "-" if pd.isna(x) else f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def interval(row: pd.Series) -> str:
    return f"{short(row['value'])} [{short(row['low'])}, {short(row['high'])}]"


@functools.cache
def of_figure(name: str, size: str, folder: str) -> pd.DataFrame:
    """A row per declared run: its outcome as `value`, and its `cell` in words. Problems go to stderr."""
    form, (runs, problems) = figure.FORMS.get(name, figure.OTHER), load(folder)
    table, more = figure.described(name, runs, size)
    sys.stderr.writelines(f"{problem}\n" for problem in problems + more)
    if table["value"].isna().all():
        raise ValueError(f"no complete run of {name} at {size} size in {folder}")
    words = table[form.series].astype(str).map(lambda x: look(x, [x]).label)
    if form.col not in ("", "env"):
        words += ", " + table[form.col].map(lambda x: figure.heading(form, x).replace("\n", ": "))
    if form.point:
        words += ", " + form.point.replace("_", " ").replace("arch", "type") + " " + table[form.point].astype(str)
    return table.assign(cell=words).drop_duplicates(["env", "exp_name", "seed"])


def cells(name: str, size: str, folder: str) -> pd.DataFrame:
    table = of_figure(name, size, folder)
    found, means = (estimates(table, ["cell"], STATISTICS[x]).set_index("cell") for x in ("iqm", "mean"))
    rows = pd.DataFrame({"n": found["n"].astype(str), "mean": means["value"].map(short)}, table["cell"].unique())
    rows["IQM [95% interval]"] = found.apply(interval, axis=1)
    if name in claims.SINCE:  # where the outcome is not the last return
        last = estimates(claims.outcome("", table.dropna(subset="value")), ["cell"]).set_index("cell")
        rows["IQM of the last return"] = last.apply(interval, axis=1)
    for tag in (f"plasticity/{module}_{what}" for module in MODULES for what in ("srank", "dormant_ratio")):
        ends = estimates(final(values(table[table["state"] == "complete"], tag)[0]), ["cell"]).set_index("cell")
        if len(ends):  # "-" where not all of a cell's runs have logged it
            rows[in_words(tag).lower()] = ends["value"].where(ends["n"].eq(found["n"])).map(short)
    return rows.rename_axis("cell").reset_index().fillna({"n": "0"})


def seeds(name: str, size: str, folder: str) -> pd.DataFrame:
    table = of_figure(name, size, folder).rename(columns={"env": "task"})
    table = table.assign(seed="seed " + table["seed"].astype(str), value=table["value"].map(short))
    return table.pivot_table("value", ["cell", "task"], "seed", "first", sort=False).reset_index()


def verdicts(name: str, size: str, folder: str) -> pd.DataFrame:
    of_figure(name, size, folder)  # tells what is missing
    found = claims.verdicts(name, load(folder)[0], size).assign(value=lambda rows: rows["effect"])
    found["verdict"] = "**" + found["verdict"] + "**"
    found["effect [95% interval]"] = found.apply(interval, axis=1)
    return found[["claim", "verdict", "measure", "n", "effect [95% interval]", "contrasts"]]


def calibration(folder: str) -> pd.DataFrame:
    """The rows of `table.csv`, with the returns of the runs that each names, by seed."""
    rows = pd.read_csv(Path(folder, "table.csv"), dtype=str)
    runs = pd.concat(map(pd.read_csv, Path(folder).glob("cartpole-swingup*.csv")), ignore_index=True)
    runs = runs.sort_values(["agent_step", "seed"]).assign(steps=runs["agent_step"].map("{:,}".format))
    chosen = [runs[(runs["steps"] == row[1]) & runs["algo"].isin(row[2].split())] for row in rows.to_numpy()]
    returns = [", ".join(own["episode_return_mean"].map(short)) for own in chosen]
    return rows.assign(runs=returns).rename(columns={"runs": "this code, by seed"})


KINDS = {"cells": cells, "seeds": seeds, "verdicts": verdicts, "calibration": calibration}


def table(words: str) -> str:
    """The table that these words name, in Markdown."""
    kind, *rest = words.split() or [""]
    if kind not in KINDS or len(rest) != (1 if kind == "calibration" else 3):
        raise ValueError(f"no table {words!r}: write {', '.join(KINDS)}, and what --help says")
    rows = KINDS[kind](*rest).astype(object).fillna("-").astype(str)
    lines = [list(rows), ["---"] * len(rows.columns), *rows.to_numpy()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def filled(page: str) -> str:
    """A page with its tables as the results say now."""
    marked = re.compile(r"<!-- table: ([^\n]*?) -->\n((?!<!-- table:).)*?<!-- end -->", re.DOTALL)
    if len(marked.findall(page)) < page.count("<!-- table: "):
        raise ValueError("a table has no <!-- end -->")
    return marked.sub(lambda found: f"<!-- table: {found[1]} -->\n{table(found[1])}\n<!-- end -->", page)


def main(argv: list[str]) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m analysis.tables", description=__doc__, formatter_class=form)
    parser.add_argument("words", nargs="*", default=["nothing"], help="a table")
    parser.add_argument("--fill", type=Path, nargs="+", default=[], metavar="PAGE", help="write the tables of pages")
    args = parser.parse_args(argv)
    try:
        for path in args.fill:
            path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
        if not args.fill:
            tell(table(" ".join(args.words)))
    except (ValueError, OSError, KeyError) as error:
        parser.error(f"{error}, in the words of a table" if isinstance(error, KeyError) else str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
