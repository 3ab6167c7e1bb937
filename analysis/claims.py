"""The paper's claims as tests on loaded runs: each gives a verdict with an effect and its 95% interval.

    for verdict in verdicts(load_figure("fig06", "runs")):
        print(verdict)

Scores are final returns (`statistics.final_performance`) of complete runs, a cell's score is their IQM over all runs of
all tasks, and intervals are those of `statistics.interval`. "confirmed" and "refuted" are said only where the interval
excludes "no effect" and every cell has at least `MIN_RUNS` runs on each task. Else it is "not enough runs" while runs
are missing, and "inconclusive" when all are there.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from analysis.runs import Loaded
from analysis.statistics import Scores, by_task, final_performance, interval, iqm
from experiments import figures

MIN_RUNS = 5  # the fewest seeds in the paper (Fig. 26); the interval of fewer is too narrow, see docs/analysis.md


@dataclass(frozen=True)
class Verdict:
    """What the runs say about a claim.

    Attributes:
        claim: the statement.
        figure: the figure whose runs were used.
        verdict: "confirmed", "refuted", "inconclusive" or "not enough runs".
        effect, low, high: estimate and 95% interval; NaN where they cannot be computed.
        what: what the effect is, such as "dst - dense".
        unit: of the effect, such as "return".
        null: the value of the effect that stands for "no effect".
        n: complete runs of each cell, over all tasks.
        missing: what stands in the way of a verdict, or which runs are missing, "" if nothing.
    """

    claim: str
    figure: str
    verdict: str
    effect: float
    low: float
    high: float
    what: str
    unit: str
    null: float = 0.0
    n: dict[str, int] = field(default_factory=dict)
    missing: str = ""

    def __str__(self) -> str:
        """One line: claim, verdict, effect with unit and interval, runs, what is missing."""
        null = f" (no effect: {self.null:g})" if self.null else ""
        text = f"{self.claim}: {self.verdict}. {self.what}{null}"
        if math.isfinite(self.effect):
            text += f" = {self.effect:.4g} {self.unit}"
        if math.isfinite(self.low):
            text += f", 95% interval {self.low:.4g} to {self.high:.4g}"
        numbers = " to ".join(map(str, sorted({min(self.n.values()), max(self.n.values())})))
        return text + f", runs per cell: {numbers}" + (f"; {self.missing}" if self.missing else "")


def verdicts(loaded: Loaded) -> list[Verdict]:
    """The verdicts of all claims about the loaded figure; [] for a figure without claims."""
    return [verdict for claim in CLAIMS.get(loaded.figure, ()) for verdict in claim(loaded)]


# One claim about the scores of cells --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evidence:
    """A number (`value`) for each complete run of a loaded figure, to test claims about the scores of its cells.

    A cell is a choice of values for some columns of the runs.
    """

    loaded: Loaded
    values: pd.DataFrame
    unit: str = "return"
    statistic: Callable[[Scores], np.ndarray] = iqm

    def __call__(
        self, claim: str, what: str, cells: list[dict], contrast: Callable[[np.ndarray], np.ndarray], *,
        less: bool = False, or_equal: bool = False, null: float = 0.0, confidence: float = 0.95,
    ) -> Verdict:  # fmt: skip
        """The claim that `contrast(scores of the cells)`, the effect, is above `null`, or below it (`less`).

        `or_equal`: at `null` or above. Only an interval that lies entirely on the other side refutes it.

        Args:
            contrast: of an array (cells, ...), over its first axis.
        """
        scores, n, missing, fewest = [], {}, [], math.inf
        for cell in cells:
            declared, found = _select(self.loaded.runs, cell), _select(self.values, cell)
            names = declared["exp_name"].unique()
            name = names[0] if len(names) else ", ".join(f"{flag} {value}" for flag, value in cell.items())
            if len(names) > 1 or name in n:  # a cell taken twice would be resampled twice, as if it had other runs
                raise ValueError(f"{cell} is {', '.join(names)}: choose each cell of a comparison once")
            scores.append(by_task(found))
            n[name] = len(found)
            counts = declared["env"].value_counts().to_dict()
            if not counts:
                missing.append(f"{name} (not among the chosen runs)")
                fewest = 0
            for env, number in counts.items():
                complete = int((found["env"] == env).sum())
                fewest = min(fewest, complete)
                if complete < number:
                    missing.append(f"{env}__{name} ({complete} of {number})")

        def effect_of(*groups: Scores) -> np.ndarray:
            return contrast(np.stack([self.statistic(group) for group in groups]))

        effect = low = high = math.nan
        if fewest > 0:
            effect = float(effect_of(*scores))
            low, high = map(float, interval(effect_of, *scores, confidence=confidence))
        verdict = "not enough runs" if missing or fewest < MIN_RUNS else "inconclusive"
        if fewest >= MIN_RUNS:
            below, above = (null - high, null - low) if less else (low - null, high - null)
            if below > 0 or (or_equal and below == 0):
                verdict = "confirmed"
            elif above < 0:
                verdict = "refuted"
        lacks = f"missing: {', '.join(missing[:3])}" if missing else ""
        lacks += f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        if fewest < MIN_RUNS and not missing:
            lacks = f"a verdict needs {MIN_RUNS} runs of each cell on each task"
        return Verdict(claim, self.loaded.figure, verdict, effect, low, high, what, self.unit, null, n, lacks)

    def difference(self, claim: str, what: str, plus: list[dict], minus: list[dict], **options) -> Verdict:
        """The claim that the mean score of the cells `plus` is above that of `minus`."""

        def contrast(scores: np.ndarray) -> np.ndarray:
            return scores[: len(plus)].mean(0) - scores[len(plus) :].mean(0)

        return self(claim, what, plus + minus, contrast, **options)

    def best(self, claim: str, name: str, own: list[dict], others: dict[str, list[dict]]) -> Verdict:
        """The claim that `own` is above each of the others; the least favourable comparison stands for all.

        The intervals hold 95% for all comparisons together (Bonferroni).
        """
        found = [
            self.difference(
                claim, f"{name} - {other} (least favourable of {len(others)}, simultaneous)", own, cells,
                confidence=1 - 0.05 / len(others),
            )
            for other, cells in others.items()
        ]  # fmt: skip
        order = ("refuted", "not enough runs", "inconclusive", "confirmed")
        return min(found, key=lambda verdict: (order.index(verdict.verdict), verdict.effect))


def _select(frame: pd.DataFrame, cell: dict) -> pd.DataFrame:
    return frame[(frame[list(cell)] == pd.Series(cell)).all(axis=1)]


def _returns(loaded: Loaded, statistic: Callable = iqm) -> Evidence:
    """Final returns."""
    return Evidence(loaded, _complete(loaded, final_performance(loaded.evaluations)), "return", statistic)


def _logged(loaded: Loaded, tag: str, unit: str, relative: bool = False) -> Evidence:
    """Values of a TensorBoard tag over the last tenth of a run, relative to its first value if asked for."""
    scalars = loaded.scalars([tag])
    if relative:
        first = scalars.loc[scalars.groupby("directory")["agent_step"].idxmin()].set_index("directory")["value"]
        scalars["value"] /= scalars["directory"].map(first)
    return Evidence(loaded, _complete(loaded, final_performance(scalars, column="value")), unit)


def _complete(loaded: Loaded, values: pd.DataFrame) -> pd.DataFrame:
    complete = loaded.runs.loc[loaded.runs["state"] == "complete", "directory"]
    return values[values["directory"].isin(complete)].dropna(subset="value")


def _spread_over_seeds(scores: Scores) -> np.ndarray:
    """Standard deviation over the runs of a task, mean over tasks."""
    if min(task.shape[-1] for task in scores) < 2:
        return np.array(np.nan)
    return np.mean([task.std(-1, ddof=1) for task in scores], axis=0)


# The claims of each figure ------------------------------------------------------------------------------------------


def _declared(loaded: Loaded, flag: str) -> list:
    """The values that a flag has in the figure's cells, in order."""
    return sorted({cell[flag] for cell in figures.FIGURES[loaded.figure].cells})


def architecture_outweighs_regime(loaded: Loaded) -> list[Verdict]:
    """Sec. 3.1: returns differ more between types (averaged over regimes) than between regimes (over types)."""
    types, scale = _declared(loaded, "encoder_arch"), _declared(loaded, "encoder_scale")[-1]
    cells = figures.grid(encoder_scale=(scale,), encoder_arch=types, encoder_regime=figures.REGIMES)

    def contrast(scores: np.ndarray) -> np.ndarray:
        table = scores.reshape(len(types), len(figures.REGIMES), *scores.shape[1:])
        return table.mean(1).std(0, ddof=1) - table.mean(0).std(0, ddof=1)

    claim = f"Encoder architecture outweighs regime at scale {scale}"
    return [_returns(loaded)(claim, "standard deviation between types - between regimes", cells, contrast)]


def layer_norm_prevents_srank_collapse(loaded: Loaded) -> list[Verdict]:
    """Fig. 3: without LayerNorm (type 2) srank falls below half of its first value, with it (type 4) it does not."""
    evidence = _logged(loaded, "plasticity/encoder_srank", "of the first srank", relative=True)
    what, mean = "srank of zsa at the end, mean over regimes", lambda scores: scores.mean(0)
    without, with_norm = (figures.grid(encoder_arch=(arch,), encoder_regime=figures.REGIMES) for arch in (2, 4))
    return [
        evidence("Without LayerNorm the encoder's srank collapses", what, without, mean, null=0.5, less=True),
        evidence("LayerNorm prevents the collapse", what, with_norm, mean, null=0.5),
    ]


def dense_critic_degrades_with_scale(loaded: Loaded) -> list[Verdict]:
    """Fig. 6: mean over types."""
    evidence, scales = _returns(loaded), _declared(loaded, "critic_scale")
    small, large = (
        {regime: figures.grid(critic_arch=figures.TYPES, critic_scale=(scale,), critic_regime=(regime,))
         for regime in ("dense", "dst")} for scale in (scales[0], scales[-1])
    )  # fmt: skip
    what = f"scale {scales[-1]} - scale {scales[0]}, mean over types"
    return [
        evidence.difference("The dense critic degrades with scale", what, large["dense"], small["dense"], less=True),
        evidence.difference("The dst critic does not", what, large["dst"], small["dst"], or_equal=True),
        evidence.difference(
            f"The dst critic > the dense one at scale {scales[-1]}", "dst - dense, mean over types",
            large["dst"], large["dense"],
        ),
    ]  # fmt: skip


def dst_lowers_critic_dormant_ratio(loaded: Loaded) -> list[Verdict]:
    """Fig. 7, scale 5, mean over types."""
    evidence = _logged(loaded, "plasticity/critic_dormant_ratio", "of the hidden units")
    dst, dense = (figures.grid(critic_arch=figures.TYPES, critic_regime=(regime,)) for regime in ("dst", "dense"))
    return [
        evidence.difference(
            "dst lowers the critic's dormant ratio", "dst - dense, mean over types", dst, dense, less=True
        )
    ]


def sst_is_best_for_actor(loaded: Loaded) -> list[Verdict]:
    """Fig. 9, largest scale, mean over types."""
    scale = _declared(loaded, "actor_scale")[-1]
    cells = {
        regime: figures.grid(actor_arch=_declared(loaded, "actor_arch"), actor_scale=(scale,), actor_regime=(regime,))
        for regime in figures.REGIMES
    }
    sst = cells.pop("sst")
    return [
        _returns(loaded).best(f"sst is the best actor regime at scale {scale}", "mean over types, sst", sst, cells),
        _returns(loaded, _spread_over_seeds).difference(
            f"dst destabilises the actor at scale {scale}",
            "standard deviation over seeds, dst - sst, mean over types",
            cells["dst"],
            sst,
        ),
    ]


def mst_over_residuals_over_mrq(loaded: Loaded) -> list[Verdict]:
    """Fig. 11, largest scale."""
    evidence, scale = _returns(loaded), _declared(loaded, "critic_scale")[-1]
    mrq, res, mst = (
        [base | figures.modules(scale=scale)] for base in (figures.MRQ, figures.RES, figures.RES | figures.MST)
    )
    return [
        evidence.difference(f"MST > Res at scale {scale}", "MST - Res", mst, res),
        evidence.difference(f"Res > MR.Q at scale {scale}", "Res - MR.Q", res, mrq),
    ]


def details_of_mst(loaded: Loaded) -> list[Verdict]:
    """Fig. 12, and the study of distributions on both tasks."""
    evidence, defaults = _returns(loaded), {k: v for k, v in figures.DEFAULTS.items() if k in loaded.flags}
    comparisons = [("RigL", "SET", {"growth": "set"}), ("ER", "uniform", {"distribution": "uniform"})]
    if loaded.figure == "distribution":
        dense_output = {"distribution": "uniform-dense-output"}
        comparisons = [comparisons[1], ("ER", "uniform with a dense output layer", dense_output)]
    return [
        evidence.difference(f"{a} >= {b}", f"{a} - {b}", [defaults], [defaults | change], or_equal=True)
        for a, b, change in comparisons
    ]


def mst_scales_where_dense_degrades(loaded: Loaded) -> list[Verdict]:
    """Figs. 13 and 26: mean over the scaling of width, of depth and of both."""
    evidence, scale = _returns(loaded), _declared(loaded, "width_scale")[-1]
    found = []
    for script in _declared(loaded, "script"):
        name = {"mst_sac": "SAC", "mst_ddpg": "DDPG", "mst_mrsac": "MR.SAC"}[script]
        base = {"script": script, "width_scale": 1, "depth_scale": 1}
        dense, mst = (base | figures.DENSE, base | figures.MST)
        dense_large, mst_large = ([cell | sizes for sizes in figures.dimensions((scale,))] for cell in (dense, mst))
        what = f"scale {scale} - scale 1, mean over width, depth and both"
        found += [
            evidence.difference(f"Dense {name} degrades with scale", what, dense_large, [dense], less=True),
            evidence.difference(f"{name} with MST scales", what, mst_large, [mst]),
            evidence.difference(
                f"{name} with MST > dense at scale {scale}", "MST - dense, mean of the three", mst_large, dense_large
            ),
        ]
    return found


def mst_is_best_assignment(loaded: Loaded) -> list[Verdict]:
    """Fig. 14, section 4: "introducing dynamicity benefits the critic [...] while proving detrimental to the actor"."""
    pairs = {pair: {"critic_regime": pair[0], "actor_regime": pair[1]} for pair in figures.PAIRS}
    others = {f"critic {c} actor {a}": [cell] for (c, a), cell in pairs.items() if cell != figures.MST}

    def of(module: str, regime: str) -> list[dict]:
        return [cell for cell in pairs.values() if cell[f"{module}_regime"] == regime]

    evidence, dst, sst = _returns(loaded), of("actor", "dst"), of("actor", "sst")
    critic, actor = "dst - sst critic, mean over actors", "sst - dst actor, mean over critics"
    spread, by_spread = "standard deviation over seeds, dst - sst actor, mean over critics", _spread_over_seeds
    return [
        evidence.best("MST is the best assignment of regimes to critic and actor", "MST", [figures.MST], others),
        evidence.difference("A dynamic topology helps the critic", critic, of("critic", "dst"), of("critic", "sst")),
        evidence.difference("A static topology is better for the actor", actor, sst, dst),
        _returns(loaded, by_spread).difference("dst destabilises the actor", spread, dst, sst),
    ]


def pre_residual_over_post(loaded: Loaded) -> list[Verdict]:
    """Fig. 17."""
    return [
        _returns(loaded).difference(
            f"Pre-layer >= post-layer residuals at scale {scale}", "pre - post",
            [{"critic_scale": scale, "residual": "pre"}], [{"critic_scale": scale, "residual": "post"}], or_equal=True,
        )
        for scale in _declared(loaded, "critic_scale")
    ]  # fmt: skip


def mst_over_one_strategy(loaded: Loaded) -> list[Verdict]:
    """Beyond the paper: MST against one regime for all modules, at the largest scale."""
    size = figures.modules(scale=_declared(loaded, "critic_scale")[-1])
    mst = [size | {"encoder_regime": "dense"} | figures.MST]
    return [
        _returns(loaded).difference(
            f"MST > {regime} everywhere at scale {size['critic_scale']}", f"MST - {regime}",
            mst, [size | figures.modules(regime=regime)],
        )
        for regime in ("dense", "sst", "dst")
    ]  # fmt: skip


CLAIMS: dict[str, tuple[Callable[[Loaded], list[Verdict]], ...]] = {
    **dict.fromkeys(("fig02", "fig04", "fig18", "fig19"), (architecture_outweighs_regime,)),
    "fig03": (layer_norm_prevents_srank_collapse,),
    **dict.fromkeys(("fig06", "fig21", "fig22"), (dense_critic_degrades_with_scale,)),
    "fig07": (dst_lowers_critic_dormant_ratio,),
    **dict.fromkeys(("fig09", "fig24", "fig25"), (sst_is_best_for_actor,)),
    "fig11": (mst_over_residuals_over_mrq,),
    **dict.fromkeys(("fig12", "distribution"), (details_of_mst,)),
    **dict.fromkeys(("fig13", "fig26"), (mst_scales_where_dense_degrades,)),
    "fig14": (mst_is_best_assignment,),
    "fig17": (pre_residual_over_post,),
    "one-strategy": (mst_over_one_strategy,),
}
