"""Verdicts on the claims of claims.csv: the paper's and, below, those of our own studies.

The score of a cell on a task is the interquartile mean over its seeds; that of words such as "dst res", the mean over
the cells that they choose and the tasks. A claim is one or several contrasts: sums of scores that have to be above 0.

- confirmed: the 95% interval of each contrast is above 0 (an intersection-union test, which needs no correction).
- refuted: that of one is below 0, at 95% for all of the claim's contrasts together (Bonferroni).
- inconclusive: neither. not enough runs: a cell has fewer than 5 complete runs on a task.
"""

import functools
import itertools
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from analysis.runs import RETURN, STATISTICS, declared, final, in_words, resamples, values
from experiments import figures

MIN_RUNS, MARGIN = 5, 0.1
SINCE = {"depth": 2_000, "encoder-types": 2_000}  # agent step from which on evaluations are a run's outcome
Terms = list[tuple[float, str | None]]


class Claim(NamedTuple):
    figures: list[str]
    text: str
    contrasts: list[Terms]
    measure: str = RETURN  # or a tag of metrics.csv
    how: str = "iqm"  # over seeds; or "spread", or "relative": the same of the measure over its first value


def verdicts(figure: str, runs: pd.DataFrame, size: figures.Size = "paper", envs=None, seeds=None) -> pd.DataFrame:
    """A row per claim of a figure: claim, verdict, effect, low and high, contrasts, n (fewest runs of a cell).

    Effect and interval are those of the contrast that decides, the least favourable one, as the verdict is read.
    """
    table, _ = declared(figure, runs, size, envs, seeds)
    measured = functools.cache(lambda measure, relative: outcome(figure, table, measure, relative))
    chosen = [claim for claim in CLAIMS if figure in claim.figures]
    return pd.DataFrame([verdict(claim, measured(claim.measure, claim.how == "relative")) for claim in chosen])


def outcome(figure: str, table: pd.DataFrame, measure: str = RETURN, relative: bool = False) -> pd.DataFrame:
    """`table`, a row per declared run, with what each run ended with as `value`; NaN unless it is complete."""
    found, _ = values(table[table["state"] == "complete"].drop_duplicates("path"), measure)
    ends = final(found, SINCE.get(figure) if measure == RETURN else None).set_index("path")["value"]
    if relative:
        ends = ends / found.sort_values("agent_step").drop_duplicates("path").set_index("path")["value"]
    return table.assign(value=table["path"].map(ends).astype(float))


def verdict(claim: Claim, table: pd.DataFrame) -> dict:
    """`table`: a row per declared run with its flags, exp_name, env and value, NaN if there is none."""
    groups = [group for _, group in table.groupby(["exp_name", "env"])]
    cells = pd.concat([group.iloc[:1] for group in groups], ignore_index=True)
    kept = [group["value"].dropna().to_numpy() for group in groups]
    function = STATISTICS["spread" if claim.how == "spread" else "iqm"]
    drawn = np.array([resamples(x, function, i) if len(x) > 1 else np.full(2001, np.nan) for i, x in enumerate(kept)])
    n, used, effects = np.array([len(x) for x in kept]), [], np.zeros((len(claim.contrasts), drawn.shape[1]))
    for effect, terms in zip(effects, claim.contrasts, strict=True):
        for weight, query in terms:
            if query is None:
                effect += weight
                continue
            between, _, query = query.rpartition("|")
            chosen = cells.query(query) if query else cells
            used.append(n[chosen.index].min() if len(chosen) else 0)
            parts = [part.index for _, part in chosen.groupby(between)] if between else [chosen.index]
            parts = np.array([drawn[part].mean(0) if len(part) else effect * np.nan for part in parts])
            effect += weight * (parts.std(0, ddof=1) if between else parts[0])
    k, fewest = len(effects), int(min(used))
    low, high = np.quantile(effects[:, 1:], 0.025, axis=1), np.quantile(effects[:, 1:], 1 - 0.025 / k, axis=1)
    word = "confirmed" if (low > 0).all() else "refuted" if (high < 0).any() else "inconclusive"
    worst = int(np.argmin(high if word == "refuted" else low))
    measure = in_words(claim.measure).lower() + {"iqm": "", "spread": ", spread", "relative": " / first"}[claim.how]
    return {
        "claim": claim.text, "verdict": word if fewest >= MIN_RUNS else "not enough runs", "effect": effects[worst, 0],
        "low": low[worst], "high": high[worst], "contrasts": k, "measure": measure, "n": fewest,
    }  # fmt: skip


def sentences(tested: pd.DataFrame) -> str:
    """Verdicts, one a line."""
    return "\n".join(
        f"{row.verdict}: {row.claim} ({row.measure}: {row.effect:.4g} [{row.low:.4g}, {row.high:.4g}], "
        f"{f'least favourable of {row.contrasts} contrasts, ' if row.contrasts > 1 else ''}n = {row.n})"
        for row in tested.itertuples()
    )


# A contrast of claims.csv compares sums of cells: "dst x5 - dense x5 > dst x1 - dense x1". "~" is "within 10%". A cell
# is the words that choose it, perhaps with a factor: "0.5 dense x1". A number alone is itself, "sd:arch" the standard
# deviation between types. Words in braces stand for one after the other: all of these contrasts have to hold.
# The words and what they choose are in cells.csv, where {m} is the module that a figure is about.
CELLS = pd.read_csv(Path(__file__).with_name("cells.csv")).set_index("word")["query"].to_dict()
BRACES = {"{all}": "{dense,sst,dst,s2d,d2s}", "{sparse}": "{sst,dst,s2d,d2s}", "{dynamic}": "{dst,s2d,d2s}"}


def contrasts(text: str, module: str) -> list[Terms]:
    """A text as sums that all have to be above 0, each a list of weight and query; a query is None for a number."""
    text = functools.reduce(lambda x, pair: x.replace(*pair), BRACES.items(), text)
    found, braces = [], dict.fromkeys(re.findall(r"{.*?}", text))
    for words in itertools.product(*(brace[1:-1].split(",") for brace in braces)):
        line = functools.reduce(lambda x, pair: x.replace(*pair), zip(braces, words, strict=True), text)
        within = [line.replace("~", f"> {1 - MARGIN}"), line.replace("~", f"< {1 + MARGIN}")]
        for each in within if "~" in line else [line]:
            left, sign, right = re.split(" ([<>]) ", each)
            greater, smaller = (left, right) if sign == ">" else (right, left)
            found.append(_sum(greater, module) + _sum(smaller, module, -1))
    return found


def _sum(text: str, module: str, times: int = 1) -> Terms:
    terms: Terms = []
    for sign, term in re.findall(r"(^|[+-] )(.*?)(?= [+-] |$)", text):
        factor, *words = term.split() if re.match(r"[\d.]+( |$)", term) else ["1", *term.split()]
        query = " and ".join(CELLS[word] for word in words if not word.startswith("sd:")).format(m=module)
        between = [f"{module}_{word[3:]}|" for word in words if word.startswith("sd:")]
        weight = (-times if sign == "- " else times) * float(factor)
        terms.append((weight, "".join(between) + query if words else None))
    return terms


CLAIMS = [
    Claim(row.figures.split(), row.claim, contrasts(row.contrast, row.module), row.measure, row.how)
    for row in pd.read_csv(Path(__file__).with_name("claims.csv")).itertuples()
]
