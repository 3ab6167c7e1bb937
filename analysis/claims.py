"""The paper's claims as data, and verdicts on them.

The score of a cell on a task is the interquartile mean over its seeds; that of words such as "dst res", the mean over
the cells that they choose and the tasks. A claim is one or several contrasts: sums of scores that have to be above 0.

- confirmed: the 95% interval of each contrast is above 0 (an intersection-union test, which needs no correction).
- refuted: that of one is below 0, at 95% for all of the claim's contrasts together (Bonferroni).
- inconclusive: neither. not enough runs: a cell has fewer than 5 complete runs on a task.
"""

import functools
import itertools
import re
from typing import NamedTuple

import numpy as np
import pandas as pd

from analysis.runs import RETURN, STATISTICS, declared, final, in_words, resamples, values
from experiments import figures

MIN_RUNS, MARGIN = 5, 0.1
SAME_RUNS = {  # a figure with the claims of another one, on its own tasks
    "fig18": "fig02", "fig19": "fig04", "fig20": "fig05", "fig21": "fig06", "fig22": "fig06", "fig23": "fig08",
    "fig24": "fig09", "fig25": "fig09",
}  # fmt: skip
SINCE = {"depth": 2_000, "encoder-types": 2_000}  # agent step from which on evaluations are a run's outcome
Terms = list[tuple[float, str | None]]


class Claim(NamedTuple):
    figure: str
    text: str
    contrasts: list[Terms]
    measure: str = RETURN  # or a tag of metrics.csv
    how: str = "iqm"  # over seeds; or "spread", or "relative": the same of the measure over its first value


def verdicts(figure: str, runs: pd.DataFrame, size: figures.Size = "paper", envs=None, seeds=None) -> pd.DataFrame:
    """A row per claim of a figure: claim, verdict, effect, low and high, contrasts, n (fewest runs of a cell).

    Effect and interval are those of the contrast that decides, the least favourable one. The interval is the one that
    the verdict is read from: where a claim has several contrasts, its upper end is corrected for their number.
    """
    chosen = [claim for claim in CLAIMS if claim.figure == SAME_RUNS.get(figure, figure)]
    table, _ = declared(figure, runs, size, envs, seeds)
    measured = {
        key: outcome(figure, table, *key) for key in {(claim.measure, claim.how == "relative") for claim in chosen}
    }
    return pd.DataFrame([verdict(claim, measured[claim.measure, claim.how == "relative"]) for claim in chosen])


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


# What claims are made of --------------------------------------------------------------------------------------------

# A contrast compares sums of cells, "dst x5 - dense x5 > dst x1 - dense x1". "<" and ">" compare, "~" is within 10%. A
# cell is the words that choose it, perhaps with a factor: "0.5 dense x1"; a number alone is itself. "sd:arch" is the
# standard deviation between types. Words in braces stand for one after the other: all of these contrasts have to hold.
CELLS = {  # {m} is the module that a figure is about
    **{regime: "{m}_regime == '" + regime + "'" for regime in figures.REGIMES},
    "dyn": "{m}_regime in ('dst', 's2d', 'd2s')", "sparse": "{m}_regime != 'dense'",
    "plain": "{m}_arch <= 2", "ln": "{m}_arch >= 3", "nores": "{m}_arch <= 4", "res": "{m}_arch >= 5",
    "elu": "{m}_arch in (2, 4, 6)", "relu": "{m}_arch in (1, 3, 5)", "t3-4": "{m}_arch in (3, 4)",
    **{f"t{x}": "{m}_arch == " + str(x) for x in figures.TYPES},
    **{f"x{x}": "{m}_scale == " + str(x) for x in figures.SCALES},
    **{f"{m[0]}.{r}": f"{m}_regime == '{r}'" for m in figures.MODULES for r in figures.REGIMES},
    "MR.Q": "critic_regime == 'dense' and critic_arch == 4", "Res": "critic_regime == 'dense' and critic_arch == 6",
    "MST": "critic_regime == 'dst' and actor_regime == 'sst'",
    **{f"w{w}d{d}": f"width_scale == {w} and depth_scale == {d}" for w in (1, 5) for d in (1, 5)},
    **{f"deep{x}": f"depth_scale == {x}" for x in (1, 15)},
    "SAC": "script == 'mst_sac'", "DDPG": "script == 'mst_ddpg'", "MR.SAC": "script == 'mst_mrsac'",
    **{x: f"growth == '{x}'" for x in ("rigl", "set")}, **{x: f"distribution == '{x}'" for x in ("er", "uniform")},
    **{f"s{x}": f"critic_sparsity == {x}" for x in (0.2, 0.6, 0.9)}, "s0.5-0.8": "0.45 < critic_sparsity < 0.85",
    **{x: f"residual == '{x}'" for x in ("pre", "post")},
}  # fmt: skip
MODULE = {"fig02": "encoder", "fig03": "encoder", "fig04": "encoder", "encoder-types": "encoder", "fig08": "actor"}
MODULE |= {"fig09": "actor", "fig10": "actor"}  # else the critic


def contrasts(text: str, module: str) -> list[Terms]:
    """A text as sums that all have to be above 0, each a list of weight and query; a query is None for a number."""
    found, braces = [], dict.fromkeys(re.findall(r"{.*?}", text))
    for words in itertools.product(*(brace[1:-1].split(",") for brace in braces)):
        line = functools.reduce(lambda x, pair: x.replace(*pair), zip(braces, words, strict=True), text)
        left, sign, right = re.split(" ([<>~]) ", line)
        a, b = _sum(left, module), _sum(right, module)
        if sign == "~":
            found += [a + _times(-1 + MARGIN, b), _times(1 + MARGIN, b) + _times(-1, a)]
        else:
            found.append(a + _times(-1, b) if sign == ">" else b + _times(-1, a))
    return found


def _sum(text: str, module: str) -> Terms:
    terms: Terms = []
    for sign, term in re.findall(r"(^|[+-] )(.*?)(?= [+-] |$)", text):
        factor, *words = term.split() if re.match(r"[\d.]+( |$)", term) else ["1", *term.split()]
        query = " and ".join(CELLS[word] for word in words if not word.startswith("sd:")).format(m=module)
        between = [f"{module}_{word[3:]}|" for word in words if word.startswith("sd:")]
        terms.append(((-1 if sign == "- " else 1) * float(factor), "".join(between) + query if words else None))
    return terms


def _times(factor: float, terms: Terms) -> Terms:
    return [(factor * weight, query) for weight, query in terms]


ALL, DYNAMIC = "{dense,sst,dst,s2d,d2s}", "{dst,s2d,d2s}"


def encoder_types(regimes: str, dynamic: str) -> dict:
    """Of Fig. 2, and with fewer regimes of our smaller study."""
    return {
        "LayerNorm helps the encoder under every regime": f"{regimes} ln > {regimes} plain",
        "Encoders without LayerNorm fail: below half of types 3 to 6": "plain < 0.5 ln",
        "ELU > ReLU in the encoder": "elu > relu",
        "Dynamic regimes improve weak encoders (types 1, 2)": f"{dynamic} plain > dense plain",
        "Dynamic regimes do not replace LayerNorm: dense type 4 > them": f"{dynamic} plain < dense t4",
        "Dynamic regimes do not help strong encoders (types 3 to 6, within 10%)": f"{dynamic} ln ~ dense ln",
        "Encoder types differ more than regimes at scale 1": "sd:arch > sd:regime",
        "Residuals matter little in the encoder at scale 1 (within 10%)": "res ~ t3-4",
    }


def scaling(name: str) -> dict:
    ways = "{w5d1,w1d5,w5d5}"
    return {
        f"Dense {name} degrades: wider, deeper and both": f"{name} {ways} c.dense < {name} w1d1 c.dense",
        f"{name} with MST gains: wider, deeper and both": f"{name} {ways} MST > {name} w1d1 MST",
        f"{name}: MST > dense: wider, deeper and both": f"{name} {ways} MST > {name} {ways} c.dense",
    }


SRANK, DORMANT = "plasticity/{}_srank".format, "plasticity/{}_dormant_ratio".format
DECLARED = {  # figure: claim: contrast, and what is measured if it is not the return
    # Section 3.1, the encoder
    "fig02": encoder_types(ALL, DYNAMIC),
    "fig03": {
        "Without LayerNorm (type 2) srank falls below half": (f"{ALL} t2 < 0.5", SRANK("encoder"), "relative"),
        "LayerNorm (type 4) prevents it": (f"{ALL} t4 > 0.5", SRANK("encoder"), "relative"),
    },
    "fig04": {
        "Encoder types differ more than regimes at scale 5": "sd:arch x5 > sd:regime x5",
        "Residuals are essential for large dense encoders: type 6 > 4": "dense t6 x5 > dense t4 x5",
        "Dense type 6 keeps its return at scale 5 (margin 10%)": "dense t6 x5 > 0.9 dense t6 x1",
        "Dense is enough: type 6 keeps 90% of each other regime": "dense t6 x5 > 0.9 {sst,dst,s2d,d2s} t6 x5",
        "Type 4: sparse regimes > dense at scale 5": "sparse t4 x5 > dense t4 x5",
        "Type 4 gains mostly by sparsity": "sst t4 x5 - dense t4 x5 > dst t4 x5 - sst t4 x5",
        "Type 2 fails when large, under every regime: below half": f"{ALL} t2 {{x3,x5}} < 0.5 dense t6 {{x3,x5}}",
    },
    # Section 3.2, the critic
    "fig05": {
        "LayerNorm helps the critic under every regime": f"{ALL} ln > {ALL} plain",
        "Critic: each regime is within 10% of dense at scale 1": "{sst,dst,s2d,d2s} ~ dense",
        "Critic types 3, 5 and 6 are within 10% of type 4 at scale 1": "{t3,t5,t6} ~ t4",
    },
    "fig06": {
        "Dense critics degrade with scale (mean over types)": "dense x5 < dense x1",
        "Dense critics without residuals collapse: below half": "dense {t1,t2,t3,t4} x5 < 0.5 dense {t1,t2,t3,t4} x1",
        "Dense critics do not scale with residuals either: less at scale 5": "dense res x5 < dense res x1",
        "Each sparse regime > dense at scale 5": "{sst,dst,s2d,d2s} x5 > dense x5",
        "Each dynamic regime > static sparse at scale 5": f"{DYNAMIC} x5 > sst x5",
        "dst is the best critic regime at scales 3 and 5": "dst {x3,x5} > {dense,sst,s2d,d2s} {x3,x5}",
        "dst with residuals does not degrade (margin 10%)": "dst res x5 > 0.9 dst res x1",
        "dst with residuals gains by scale": "dst res x5 > dst res x1",
        "It takes both: > dst without residuals, > dense with them": "dst res x5 > {dst nores,dense res} x5",
    },
    "fig07": {
        "Each dynamic regime lowers the critic's dormant ratio": (f"{DYNAMIC} < dense", DORMANT("critic")),
        "Sparsity raises srank with residuals": ("sparse res > dense res", SRANK("critic")),
        "Residuals make sparsity add more": ("sparse res - dense res > sparse nores - dense nores", SRANK("critic")),
        "Without residuals srank collapses: below half": (f"{DYNAMIC} nores < 0.5", SRANK("critic"), "relative"),
    },
    # Section 3.3, the actor
    "fig08": {
        "LayerNorm helps the actor under every regime": f"{ALL} ln > {ALL} plain",
        "Actor: each regime is within 10% of dense at scale 1": "{sst,dst,s2d,d2s} ~ dense",
        "ReLU > ELU in the actor": "relu > elu",
        "Dynamic regimes help actors without LayerNorm": "dyn plain > dense plain",
        "Dynamic regimes help them by more than actors with it": "dyn plain - dense plain > dyn ln - dense ln",
    },
    "fig09": {
        "LayerNorm and residuals are essential at scale 5: type 5 > 1 and 3": "t5 x5 > {t1,t3} x5",
        "Types 1 and 3 collapse under every regime: below half": f"{ALL} {{t1,t3}} x5 < 0.5 {ALL} {{t1,t3}} x1",
        "sst is the best actor regime at scale 3": "sst x3 > {dense,dst,s2d,d2s} x3",
        "sst is the best actor regime at scale 5": "sst x5 > {dense,dst,s2d,d2s} x5",
        "The lead of sst over dynamic regimes grows with scale": "sst x5 - dyn x5 > sst x3 - dyn x3",
        "sst with residuals gains by scale": "sst t5 x5 > sst t5 x1",
        "Each dynamic regime spreads more than sst at scale 5": (f"{DYNAMIC} x5 > sst x5", RETURN, "spread"),
    },
    "fig10": {
        "Residuals lower the dense actor's dormant ratio": ("dense t5 < dense t3", DORMANT("actor")),
        "sst lowers it, with residuals and without": ("sst {t3,t5} < dense {t3,t5}", DORMANT("actor")),
        "sst lowers it more than each dynamic regime": (f"sst < {DYNAMIC}", DORMANT("actor")),
    },
    # Section 4, MST
    "fig11": {
        "MR.Q fails at scale 5: below half of scale 1": "MR.Q x5 < 0.5 MR.Q x1",
        "MST > Res at scale 5": "MST x5 > Res x5",
        "Res > MR.Q at scale 5": "Res x5 > MR.Q x5",
        "MST gains by scale": "MST x5 > MST x1",
        "MST has a higher srank than Res at scale 5": ("MST x5 > Res x5", SRANK("critic")),
        "MST has fewer dormant units than Res at scale 5": ("MST x5 < Res x5", DORMANT("critic")),
    },
    "fig12": {
        "RigL > SET": "rigl er s0.6 > set er s0.6",
        "Erdos-Renyi > uniform": "rigl er s0.6 > rigl uniform s0.6",
        "Sparsity helps: 0.5 to 0.8 > 0.2": "rigl er s0.5-0.8 > rigl er s0.2",
        "Too much harms: 0.5 to 0.8 > 0.9": "rigl er s0.5-0.8 > rigl er s0.9",
    },
    "fig13": scaling("SAC") | scaling("DDPG"),
    "fig14": {
        "MST is the best assignment of regimes to critic and actor":
            "MST > {c.dense a.dense,c.sst a.sst,c.dst a.dst,c.sst a.dst}",
        "A dynamic topology helps the critic: dst > sst": "c.dst > c.sst",
        "A dynamic topology harms the actor: sst > dst": "a.sst > a.dst",
        "It destabilises the actor: dst spreads more over seeds than sst": ("a.dst > a.sst", RETURN, "spread"),
    },
    "fig17": {
        "Pre- > post-layer residuals at scale 1": "pre x1 > post x1",
        "Pre- > post-layer residuals at scale 3": "pre x3 > post x3",
        "Their lead grows with scale": "pre x3 - post x3 > pre x1 - post x1",
    },
    "fig26": scaling("MR.SAC"),
    # Beyond the paper
    "one-strategy": {
        f"MST > {r} everywhere at scale 5": f"e.dense MST x5 > e.{r} c.{r} a.{r} x5" for r in ("dense", "sst", "dst")
    },
    "depth": {
        "MR.Q fails at depth 15: below half of depth 1": "MR.Q deep15 < 0.5 MR.Q deep1",
        "Res > MR.Q at depth 15": "Res deep15 > MR.Q deep15",
        "MST > Res at depth 15": "MST deep15 > Res deep15",
        "MST keeps 90% of depth 1 at depth 15": "MST deep15 > 0.9 MST deep1",
    },
    "encoder-types": encoder_types("{dense,dst}", "dst") | {
        "LayerNorm or ELU is needed: type 1 is below half of each other": "t1 < 0.5 {t2,t3,t4,t5,t6}",
    },
}  # fmt: skip
CLAIMS = [
    Claim(figure, text, contrasts(what, MODULE.get(figure, "critic")), *measured)
    for figure, claims in DECLARED.items()
    for text, (what, *measured) in ((text, (x,) if isinstance(x, str) else x) for text, x in claims.items())
]
