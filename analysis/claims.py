"""The paper's claims as data, and verdicts on them.

The score of a cell on a task is the interquartile mean over its seeds; that of a query, such as "critic_regime ==
'dst'", the mean over its cells and tasks. A claim is one or several contrasts: sums of weighted scores that all have to
be above 0.

- confirmed: the 95% interval of each contrast is above 0 (an intersection-union test, which needs no correction).
- refuted: that of one is below 0, at 95% for all of the claim's contrasts together (Bonferroni).
- inconclusive: neither. not enough runs: a cell has fewer than 5 complete runs on a task.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd

from analysis.runs import RETURN, declared, final, iqm, resamples, spread, values
from experiments import figures

MIN_RUNS, MARGIN = 5, 0.1
ONE = "1"  # the number, as a query
SPARSE, DYNAMIC = ("sst", "dst", "s2d", "d2s"), ("dst", "s2d", "d2s")
SAME_RUNS = {  # a figure with the claims of another one, on its own tasks
    "fig18": "fig02", "fig19": "fig04", "fig20": "fig05", "fig21": "fig06", "fig22": "fig06", "fig23": "fig08",
    "fig24": "fig09", "fig25": "fig09",
}  # fmt: skip
SINCE = {"depth": 2_000, "encoder-types": 2_000}  # agent step from which on evaluations are a run's outcome
Terms = dict[str, float]  # query: weight


class Measured(NamedTuple):
    contrasts: tuple[Terms, ...]
    measure: str = RETURN  # or a tag of metrics.csv
    relative: bool = False  # to its first value
    statistic: str = "iqm"  # over seeds; or "spread"


class Claim(NamedTuple):
    figure: str
    text: str
    contrasts: tuple[Terms, ...]
    measure: str
    relative: bool
    statistic: str


def verdicts(figure: str, runs: pd.DataFrame, size: figures.Size = "paper", envs=None, seeds=None) -> pd.DataFrame:
    """A row per claim of a figure: claim, verdict, effect, low and high, contrasts, n (fewest runs of a cell).

    Effect and interval are those of the contrast that decides, the least favourable one. The interval is the one that
    the verdict is read from: where a claim has several contrasts, its upper end is corrected for their number.
    """
    chosen = [claim for claim in CLAIMS if claim.figure == SAME_RUNS.get(figure, figure)]
    table, _ = declared(figure, runs, size, envs, seeds)
    outcomes = {key: outcome(figure, table, *key) for key in {(claim.measure, claim.relative) for claim in chosen}}
    return pd.DataFrame([verdict(claim, outcomes[claim.measure, claim.relative]) for claim in chosen])


def outcome(
    figure: str, table: pd.DataFrame, measure: str = RETURN, relative: bool = False, last: int | None = None
) -> pd.DataFrame:
    """`table`, a row per declared run, with what each run ended with as `value`; NaN unless it is complete."""
    found, _ = values(table[table["state"] == "complete"].drop_duplicates("path"), measure)
    ends = final(found, last, SINCE.get(figure) if measure == RETURN else None).set_index("path")["value"]
    if relative:
        ends = ends / found.sort_values("agent_step").drop_duplicates("path").set_index("path")["value"]
    return table.assign(value=table["path"].map(ends).astype(float))


def verdict(claim: Claim, table: pd.DataFrame) -> dict:
    """`table`: a row per declared run with its flags, exp_name, env and value, NaN if there is none."""
    groups = [group for _, group in table.groupby(["exp_name", "env"])]
    cells = pd.concat([group.iloc[:1] for group in groups], ignore_index=True)
    kept = [group["value"].dropna().to_numpy() for group in groups]
    function = {"iqm": iqm, "spread": spread}[claim.statistic]
    drawn = np.array([resamples(x, function, i) if len(x) > 1 else np.full(2001, np.nan) for i, x in enumerate(kept)])
    n, used = np.array([len(x) for x in kept]), []
    effects = np.zeros((len(claim.contrasts), drawn.shape[1]))
    for effect, terms in zip(effects, claim.contrasts, strict=True):
        for query, weight in terms.items():
            if query == ONE:
                effect += weight
                continue
            between, _, query = query.rpartition("|")  # "critic_arch|query": standard deviation between its values
            chosen = cells.query(query) if query else cells
            used.append(n[chosen.index].min(initial=len(table)) if len(chosen) else 0)
            if between:
                parts = [drawn[part.index].mean(0) for _, part in chosen.groupby(between)]
                effect += weight * (np.std(parts, axis=0, ddof=1) if len(parts) > 1 else np.nan)
            else:
                effect += weight * (drawn[chosen.index].mean(0) if len(chosen) else np.nan)
    fewest, all_of_them = int(min(used)), len(effects)
    low, high = np.quantile(effects[:, 1:], 0.025, axis=1), np.quantile(effects[:, 1:], 1 - 0.025 / all_of_them, axis=1)
    word = "confirmed" if (low > 0).all() else "refuted" if (high < 0).any() else "inconclusive"
    worst = int(np.argmin(high if word == "refuted" else low))
    word = word if fewest >= MIN_RUNS else "not enough runs"
    return {
        "figure": claim.figure, "claim": claim.text, "verdict": word, "effect": effects[worst, 0], "low": low[worst],
        "high": high[worst], "contrasts": all_of_them, "n": fewest, "measure": measure_of(claim),
    }  # fmt: skip


def sentences(tested: pd.DataFrame) -> str:
    """Verdicts, one a line."""
    lines = [
        f"{row.verdict}: {row.claim} ({row.measure}: {row.effect:.4g} [{row.low:.4g}, {row.high:.4g}], "
        f"{'least favourable of ' * (row.contrasts > 1)}{row.contrasts} contrasts, n = {row.n})"
        for row in tested.itertuples()
    ]
    return "\n".join(lines).replace(", 1 contrasts", "")


def measure_of(claim: Claim) -> str:
    name = claim.measure.removeprefix("plasticity/").replace("_", " ")
    return name + " / its first value" * claim.relative + ", spread over seeds" * (claim.statistic == "spread")


# What claims are made of --------------------------------------------------------------------------------------------


def more(a: str, *others: str) -> tuple[Terms, ...]:
    """a scores more than each of the others."""
    return tuple({a: 1, b: -1} for b in others)


def less(a: str, *others: str) -> tuple[Terms, ...]:
    return tuple({b: 1, a: -1} for b in others)


def keeps(a: str, b: str, share: float = 1 - MARGIN) -> tuple[Terms, ...]:
    """a has more than this share of b: it is not inferior by more than the margin."""
    return ({a: 1, b: -share},)


def loses(a: str, b: str, share: float = 0.5) -> tuple[Terms, ...]:
    """a has less than this share of b."""
    return ({b: share, a: -1},)


def alike(a: str, b: str) -> tuple[Terms, ...]:
    """a is within the margin of b (two one-sided tests)."""
    return keeps(a, b) + ({b: 1 + MARGIN, a: -1},)


def grows(a: str, b: str, at: str, than: str) -> tuple[Terms, ...]:
    """a - b is larger at one place than at another."""
    return ({both(a, at): 1, both(b, at): -1, both(a, than): -1, both(b, than): 1},)


def every(names: Iterable, contrasts: Callable) -> tuple[Terms, ...]:
    """The contrasts for each of the names."""
    return tuple(contrast for name in names for contrast in contrasts(name))


def both(*queries: str) -> str:
    return " and ".join(queries)


class Module:
    """Queries on a module's regime, type and scale."""

    plain, ln, res, nores, elu, relu = (1, 2), (3, 4, 5, 6), (5, 6), (1, 2, 3, 4), (2, 4, 6), (1, 3, 5)

    def __init__(self, name: str):
        self.name = name

    def __call__(self, regime: str | tuple = "", types: int | tuple = (), scale: int = 0) -> str:
        """The cells with this regime, type and scale, or one of these; left out: whatever there is."""
        asked = (("regime", regime), ("arch", types), ("scale", scale))
        return " and ".join(
            f"{self.name}_{key} {'in' if isinstance(x, tuple) else '=='} {x!r}" for key, x in asked if x
        )

    def others(self, *without: str, regimes=figures.REGIMES, **rest) -> tuple[str, ...]:
        return tuple(self(regime, **rest) for regime in regimes if regime not in without)


E, C, A = Module("encoder"), Module("critic"), Module("actor")


def more_than(regime: str, others: tuple[str, ...], m: Module) -> tuple[Terms, ...]:
    """Each of the others has more than this regime at scale 5."""
    return every(others, lambda r: more(m(r, scale=5), m(regime, scale=5)))


BIG, R = (3, 5), figures.REGIMES
SRANK, DORMANT = "plasticity/{}_srank".format, "plasticity/{}_dormant_ratio".format
MRQ, RES = C("dense", 4), both(C("dense", 6), A("dense", 5))
MST, DENSE = both(C("dst"), A("sst")), both(C("dense"), A("dense"))
OTHER_PAIRS = [both(C(critic), A(actor)) for critic, actor in figures.PAIRS if (critic, actor) != ("dst", "sst")]
DENSER = both("growth == 'rigl' and distribution == 'er'", "critic_sparsity >= 0.5 and critic_sparsity <= 0.8")
DEEP = "depth_scale == 15"
PRE, POST = "residual == 'pre'", "residual == 'post'"


def setting(**changed) -> str:
    """The cell of Fig. 12 with the paper's values but for these."""
    usual = {"growth": "rigl", "distribution": "er", "critic_sparsity": 0.6}
    return " and ".join(f"{flag} == {value!r}" for flag, value in (usual | changed).items())


def layer_norm(m: Module, regimes=R) -> dict[str, tuple[Terms, ...]]:
    contrasts = every(regimes, lambda r: more(m(r, m.ln), m(r, m.plain)))
    return {f"LayerNorm helps the {m.name} under every regime": contrasts}


def regimes_alike(m: Module) -> dict[str, tuple[Terms, ...]]:
    contrasts = every(m.others("dense"), lambda regime: alike(regime, m("dense")))
    return {f"{m.name.capitalize()}: each regime is within 10% of dense at scale 1": contrasts}


def encoder_types(dynamic=DYNAMIC, regimes=R) -> dict[str, tuple[Terms, ...]]:
    """Of Fig. 2, and with fewer regimes of our smaller study."""
    dense = E("dense", E.plain)
    return layer_norm(E, regimes) | {
        "Encoders without LayerNorm fail: below half of types 3 to 6": loses(E("", E.plain), E("", E.ln)),
        "ELU > ReLU in the encoder": more(E("", E.elu), E("", E.relu)),
        "Dynamic regimes improve weak encoders (types 1, 2)": every(dynamic, lambda r: more(E(r, E.plain), dense)),
        "Dynamic regimes do not replace LayerNorm: dense type 4 > them":
            every(dynamic, lambda r: more(E("dense", 4), E(r, E.plain))),
        "Dynamic regimes do not help strong encoders (types 3 to 6, within 10%)":
            every(dynamic, lambda r: alike(E(r, E.ln), E("dense", E.ln))),
        "Encoder types differ more than regimes at scale 1": ({"encoder_arch|": 1, "encoder_regime|": -1},),
        "Residuals matter little in the encoder at scale 1 (within 10%)": alike(E("", E.res), E("", (3, 4))),
    }  # fmt: skip


def scaling(script: str, name: str) -> dict[str, tuple[Terms, ...]]:
    """Each way to scale to 5 times, mean over the tasks."""
    sizes = ((1, 1), (5, 1), (1, 5), (5, 5))
    one, *ways = (f"script == {script!r} and width_scale == {w} and depth_scale == {d}" for w, d in sizes)
    return {
        f"Dense {name} degrades, wider, deeper and both": every(ways, lambda w: less(both(w, DENSE), both(one, DENSE))),
        f"{name} with MST gains, wider, deeper and both": every(ways, lambda w: more(both(w, MST), both(one, MST))),
        f"{name}: MST > dense, wider, deeper and both": every(ways, lambda w: more(both(w, MST), both(w, DENSE))),
    }


DECLARED: dict[str, dict[str, tuple[Terms, ...] | Measured]] = {
    # Section 3.1, the encoder
    "fig02": encoder_types(),
    "fig03": {
        "Without LayerNorm (type 2) srank falls below half":
            Measured(every(R, lambda r: ({ONE: 0.5, E(r, 2): -1},)), SRANK("encoder"), relative=True),
        "LayerNorm (type 4) prevents it":
            Measured(every(R, lambda r: ({ONE: -0.5, E(r, 4): 1},)), SRANK("encoder"), relative=True),
    },
    "fig04": {
        "Encoder types differ more than regimes at scale 5":
            ({f"encoder_arch|{E(scale=5)}": 1, f"encoder_regime|{E(scale=5)}": -1},),
        "Residuals are essential for large dense encoders: type 6 > 4": more(E("dense", 6, 5), E("dense", 4, 5)),
        "Dense type 6 keeps its return at scale 5 (margin 10%)": keeps(E("dense", 6, 5), E("dense", 6, 1)),
        "Dense is enough: type 6 at scale 5 keeps 90% of each other regime":
            every(E.others("dense", types=6, scale=5), lambda regime: keeps(E("dense", 6, 5), regime)),
        "Type 4: sparse regimes > dense at scale 5": more(E(SPARSE, 4, 5), E("dense", 4, 5)),
        "Type 4 gains mostly by sparsity: sst - dense > dst - sst":
            ({E("sst", 4, 5): 2, E("dense", 4, 5): -1, E("dst", 4, 5): -1},),
        "Type 2 fails at scales 3 and 5 under every regime: below half of dense type 6":
            every(BIG, lambda s: every(R, lambda r: loses(E(r, 2, s), E("dense", 6, s)))),
    },
    # Section 3.2, the critic
    "fig05": layer_norm(C) | regimes_alike(C) | {
        "Critic types 3, 5 and 6 are within 10% of type 4 at scale 1":
            every((3, 5, 6), lambda t: alike(C("", t), C("", 4))),
    },
    "fig06": {
        "Dense critics degrade with scale (mean over types)": less(C("dense", scale=5), C("dense", scale=1)),
        "Dense critics without residuals collapse: below half, each of types 1 to 4":
            every(C.nores, lambda t: loses(C("dense", t, 5), C("dense", t, 1))),
        "Dense critics do not scale with residuals either: less at 5": less(C("dense", C.res, 5), C("dense", C.res, 1)),
        "Each sparse regime > dense at scale 5": more_than("dense", SPARSE, C),
        "Each dynamic regime > static sparse at scale 5": more_than("sst", DYNAMIC, C),
        "dst is the best critic regime at scales 3 and 5":
            every(BIG, lambda s: more(C("dst", scale=s), *C.others("dst", scale=s))),
        "dst with residuals does not degrade (margin 10%)": keeps(C("dst", C.res, 5), C("dst", C.res, 1)),
        "dst with residuals gains by scale": more(C("dst", C.res, 5), C("dst", C.res, 1)),
        "It takes both: dst with residuals > dst without, > dense with them":
            more(C("dst", C.res, 5), C("dst", C.nores, 5), C("dense", C.res, 5)),
    },
    "fig07": {
        "Each dynamic regime lowers the critic's dormant ratio":
            Measured(every(DYNAMIC, lambda r: less(C(r), C("dense"))), DORMANT("critic")),
        "Sparsity raises srank with residuals": Measured(more(C(SPARSE, C.res), C("dense", C.res)), SRANK("critic")),
        "Sparsity raises it by more with residuals than without":
            Measured(grows(C(SPARSE), C("dense"), C("", C.res), C("", C.nores)), SRANK("critic")),
        "Without residuals srank collapses even under dynamic regimes: below half":
            Measured(every(DYNAMIC, lambda r: ({ONE: 0.5, C(r, C.nores): -1},)), SRANK("critic"), relative=True),
    },
    # Section 3.3, the actor
    "fig08": layer_norm(A) | regimes_alike(A) | {
        "ReLU > ELU in the actor": more(A("", A.relu), A("", A.elu)),
        "Dynamic regimes help actors without LayerNorm": more(A(DYNAMIC, A.plain), A("dense", A.plain)),
        "Dynamic regimes help them by more than actors with it":
            grows(A(DYNAMIC), A("dense"), A("", A.plain), A("", A.ln)),
    },
    "fig09": {
        "LayerNorm and residuals are essential at scale 5: type 5 > 1 and 3": more(A("", 5, 5), A("", 1, 5), A("", 3, 5)),
        "Types 1 and 3 collapse at scale 5 under every regime: below half":
            every((1, 3), lambda t: every(R, lambda r: loses(A(r, t, 5), A(r, t, 1)))),
        "sst is the best actor regime at scale 3": more(A("sst", scale=3), *A.others("sst", scale=3)),
        "sst is the best actor regime at scale 5": more(A("sst", scale=5), *A.others("sst", scale=5)),
        "The lead of sst over dynamic regimes grows with scale": grows(A("sst"), A(DYNAMIC), A(scale=5), A(scale=3)),
        "sst with residuals gains by scale": more(A("sst", 5, 5), A("sst", 5, 1)),
        "Each dynamic regime destabilises the actor: spreads more than sst at scale 5":
            Measured(more_than("sst", DYNAMIC, A), statistic="spread"),
    },
    "fig10": {
        "Residuals lower the dense actor's dormant ratio": Measured(less(A("dense", 5), A("dense", 3)), DORMANT("actor")),
        "sst lowers it, with residuals and without":
            Measured(every((3, 5), lambda t: less(A("sst", t), A("dense", t))), DORMANT("actor")),
        "sst lowers it more than each dynamic regime":
            Measured(less(A("sst"), *(A(r) for r in DYNAMIC)), DORMANT("actor")),
    },
    # Section 4, MST
    "fig11": {
        "MR.Q fails at scale 5: below half of scale 1": loses(both(MRQ, C(scale=5)), both(MRQ, C(scale=1))),
        "MST > Res at scale 5": more(both(MST, C(scale=5)), both(RES, C(scale=5))),
        "Res > MR.Q at scale 5": more(both(RES, C(scale=5)), both(MRQ, C(scale=5))),
        "MST gains by scale": more(both(MST, C(scale=5)), both(MST, C(scale=1))),
        "MST has a higher srank than Res at scale 5":
            Measured(more(both(MST, C(scale=5)), both(RES, C(scale=5))), SRANK("critic")),
        "MST has fewer dormant units than Res at scale 5":
            Measured(less(both(MST, C(scale=5)), both(RES, C(scale=5))), DORMANT("critic")),
    },
    "fig12": {
        "RigL > SET": more(setting(), setting(growth="set")),
        "Erdos-Renyi > uniform": more(setting(), setting(distribution="uniform")),
        "Sparsity helps: 0.5 to 0.8 > 0.2": more(DENSER, setting(critic_sparsity=0.2)),
        "Too much harms: 0.5 to 0.8 > 0.9": more(DENSER, setting(critic_sparsity=0.9)),
    },
    "fig13": scaling("mst_sac", "SAC") | scaling("mst_ddpg", "DDPG"),
    "fig14": {
        "MST is the best assignment of regimes to critic and actor": more(MST, *OTHER_PAIRS),
        "A dynamic topology helps the critic: dst > sst": more(C("dst"), C("sst")),
        "A dynamic topology harms the actor: sst > dst": more(A("sst"), A("dst")),
        "It destabilises the actor: dst spreads more than sst": Measured(more(A("dst"), A("sst")), statistic="spread"),
    },
    "fig17": {
        "Pre- > post-layer residuals at scale 1": more(both(PRE, C(scale=1)), both(POST, C(scale=1))),
        "Pre- > post-layer residuals at scale 3": more(both(PRE, C(scale=3)), both(POST, C(scale=3))),
        "Their lead grows with scale": grows(PRE, POST, C(scale=3), C(scale=1)),
    },
    "fig26": scaling("mst_mrsac", "MR.SAC"),
    # Beyond the paper
    "one-strategy": {
        f"MST > {r} everywhere at scale 5": more(both(E("dense", scale=5), MST), both(E(r, scale=5), C(r), A(r)))
        for r in ("dense", "sst", "dst")
    },
    "depth": {
        "MR.Q fails at depth 15: below half of depth 1": loses(both(MRQ, DEEP), both(MRQ, "depth_scale == 1")),
        "Res > MR.Q at depth 15": more(both(RES, DEEP), both(MRQ, DEEP)),
        "MST > Res at depth 15": more(both(MST, DEEP), both(RES, DEEP)),
        "MST keeps 90% of depth 1 at depth 15": keeps(both(MST, DEEP), both(MST, "depth_scale == 1")),
    },
    "encoder-types": encoder_types(("dst",), ("dense", "dst")) | {
        "LayerNorm or ELU is needed: type 1 is below half of each other type":
            every((2, 3, 4, 5, 6), lambda t: loses(E("", 1), E("", t))),
    },
}  # fmt: skip
CLAIMS = [
    Claim(figure, text, *(how if isinstance(how, Measured) else Measured(how)))
    for figure, of in DECLARED.items() for text, how in of.items()
]  # fmt: skip
