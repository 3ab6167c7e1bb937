"""Runs as pandas frames, and statistics over their seeds (Agarwal et al. 2021, arXiv 2108.13264).

    runs, problems = load("runs")                   # a row per run: script, env, label, seed, state, path, arguments
    curves, more = values(runs)                     # a row per evaluation: the same columns, agent_step and value
    estimates(final(curves), ["env", "label"])      # value, low, high, n, tasks

`problems` are sentences that name what is left out, repeated, missing or not as declared.
"""

import csv
import functools
import json
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from experiments import figures

RETURN = "return"
EVALUATIONS = ["agent_step", "env_step", "episode_return_mean", "episode_return_std", "episodes", "wall_seconds"]
# Arguments that say where and how a run is done, not what it computes; those of older scripts, too
NOT_SETTINGS = {
    "exp_name", "seed", "env_id", "runs_dir", "cuda", "cuda_graphs", "compile", "track", "dry_run", "log_interval",
    "checkpoint_minutes", "checkpoint_interval", "eval_interval", "eval_episodes", "eval_processes", "eval_only",
    "capture_video", "diagnostics", "wandb_entity", "wandb_project_name", "torch_deterministic", "matmul_precision",
}  # fmt: skip
BINS = 200  # of agent steps, at most: what was logged more often is averaged


def load(*folders: str | Path) -> tuple[pd.DataFrame, list[str]]:
    """A row per run in the folders, or for these run directories themselves, and what there is to say about them.

    `label` is the experiment name and, where runs of one name have different settings, what differs. A run that is
    there several times (a link, a copy) counts once: the longest. `state` is "complete", "short" or "no evaluation".
    """
    paths: dict[Path, list[Path]] = {}
    for folder in map(Path, folders):
        found = {p.parent for form in ("config.json", "*/config.json", "**/config.json") for p in folder.glob(form)}
        for place in sorted(found):
            paths.setdefault(place.resolve(), []).append(place)
    problems = [f"there twice, counted once: {', '.join(map(str, again))}" for again in paths.values() if again[1:]]
    rows = []
    for path in paths:
        try:
            row, said = _run(path)
            rows.append(row)
            problems += said
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            problems.append(f"left out: {path} ({type(error).__name__}: {error})")
    if not rows:
        raise ValueError("\n".join([f"no run in {', '.join(map(str, folders))}: give run directories", *problems]))
    runs = pd.DataFrame(rows)
    runs["label"] = runs["exp_name"]
    for name, group in runs.groupby("exp_name"):
        settings = pd.DataFrame(list(group["settings"]), group.index)
        # a flag that a run does not know, as one of an older script, is no difference
        differs = (settings.groupby(group["env"]).nunique() > 1).any()
        if apart := sorted(differs.index[differs]):
            told = [", ".join(f"{flag} {run.get(flag)}" for flag in apart) for run in group["settings"]]
            runs.loc[group.index, "label"] = [f"{name} ({each})" for each in told]
            problems.append(f"{name} has runs with different {', '.join(apart)}: shown apart")
    runs = runs.sort_values("steps", ascending=False, kind="stable")
    twice = runs.duplicated(["env", "label", "seed"])
    problems += [f"the same run as a longer or equal one, left out: {path}" for path in runs.loc[twice, "path"]]
    return runs[~twice].sort_index().reset_index(drop=True), problems


def _run(path: Path) -> tuple[dict, list[str]]:
    config = json.loads((path / "config.json").read_text())
    args = config["args"]
    script, env = config.get("script") or Path(config["command"][0]).stem, args["env_id"]
    evaluations, problems = _table(path / "eval.csv", EVALUATIONS)
    steps = evaluations["agent_step"].max()
    state = "no evaluation" if evaluations.empty else "complete" if steps >= args["total_timesteps"] else "short"
    settings = {name: value for name, value in (args | {"script": script}).items() if name not in NOT_SETTINGS}
    settings = {name: value if isinstance(value, int | float) else str(value) for name, value in settings.items()}
    row = args | {"script": script, "env": env, "seed": int(args["seed"]), "exp_name": str(args["exp_name"])}
    row |= {"path": path, "steps": steps, "state": state, "hours": evaluations["wall_seconds"].max() / 3600}
    for module, counts in (config.get("modules") or {}).items():
        row |= {f"{module}_parameters": counts["parameters"], f"{module}_active": counts["active_parameters"]}
        row["parameters"] = row.get("parameters", 0) + counts["parameters"]
        row["active"] = row.get("active", 0) + counts["active_parameters"]
    return row | {"settings": settings}, problems


def _table(file: Path, columns: list[str]) -> tuple[pd.DataFrame, list[str]]:
    """A run's CSV, without what is damaged. Of rows with the same agent step (and tag) the last one counts."""
    if not file.exists():
        return pd.DataFrame(columns=columns, dtype=float), []
    form = {"dtype": str, "on_bad_lines": "skip", "quoting": csv.QUOTE_NONE, "encoding_errors": "replace"}
    table = pd.read_csv(file, skip_blank_lines=False, **form)
    if list(table) != columns:
        raise ValueError(f"{file.name} has the columns {','.join(map(str, table))}")
    lines = len(file.read_bytes().splitlines()) - 1
    numbers = [name for name in columns if name != "tag"]
    table[numbers] = table[numbers].apply(pd.to_numeric, errors="coerce")
    table = table[np.isfinite(table[numbers].to_numpy(float)).all(axis=1)]
    lost = max(lines - len(table), 0)
    problems = [f"damaged: {lost} of {lines} lines of {file} (left out)"] if lost else []
    keys = [name for name in columns if name in ("agent_step", "tag")]
    return table.drop_duplicates(keys, keep="last").sort_values("agent_step", kind="stable"), problems


def values(runs: pd.DataFrame, metric: str = RETURN) -> tuple[pd.DataFrame, list[str]]:
    """The columns of `runs`, agent_step and value: the evaluations' returns, or a tag of metrics.csv. And problems."""
    frames, problems, runs = [], [], runs.drop(columns="value", errors="ignore")
    for path in runs["path"]:
        try:
            if metric == RETURN:
                table = _table(path / "eval.csv", EVALUATIONS)[0].rename(columns={"episode_return_mean": "value"})
            else:
                table, said = _table(path / "metrics.csv", ["agent_step", "tag", "value"])
                problems, table = problems + said, table[table["tag"] == metric]
            frames += [table[["agent_step", "value"]].assign(path=path)] if len(table) else []
        except (OSError, ValueError) as error:
            problems.append(f"without metrics: {path} ({error})")
    if not frames:
        return runs.iloc[:0].assign(agent_step=0, value=0.0), problems
    found = pd.concat(frames).astype({"agent_step": int, "value": float})
    lacking = [str(path) for path in runs["path"] if path not in set(found["path"])] if metric != RETURN else []
    problems += [f"no {metric} in {', '.join(lacking)}"] if lacking else []
    if found["agent_step"].nunique() > BINS:
        width = -(-found["agent_step"].max() // BINS)
        found["agent_step"] = -(-found["agent_step"] // width) * width
    return runs.merge(found.groupby(["path", "agent_step"], as_index=False)["value"].mean(), on="path"), problems


def final(curves: pd.DataFrame, since: int | None = None) -> pd.DataFrame:
    """A row per run: the mean over the last tenth of its values, or over those from agent step `since` on."""
    curves = curves.sort_values("agent_step", kind="stable")
    runs = curves.groupby("path", sort=False)
    tenth = runs.cumcount(ascending=False) < (runs["value"].transform("size") // 10).clip(lower=1)
    used = tenth if since is None else curves["agent_step"] >= since
    means = curves[used].groupby("path")["value"].mean()
    return runs.tail(1).assign(value=lambda ends: ends["path"].map(means))


def declared(figure: str, runs: pd.DataFrame, size: figures.Size = "paper", envs=None, seeds: int | None = None):
    """A row per run that a figure declares: its flags at the paper's size, path, state, size of the run. And problems.

    Runs that are missing, short or not as declared are named. Where several have one name, the closest one is taken.
    """
    rows, lost, odd, there = [], {}, {}, {}
    for found in runs.to_dict("records"):
        there.setdefault((found["env"], found["exp_name"], found["seed"]), []).append(found)
    wanted = figures.runs(figure, size, envs, seeds)
    flags = dict.fromkeys(flag for run in wanted for flag in run.cell)
    for run in wanted:
        usual = figures.defaults(run.script)
        asked = {**usual, **run.settings, "script": run.script}
        row = {flag: run.cell.get(flag, usual.get(flag)) for flag in flags}
        row |= {"script": run.script, "env": run.env, "seed": run.seed, "exp_name": run.exp_name}
        differences, best = [], {"state": "missing", "path": None}
        for found in there.get((run.env, run.exp_name, run.seed), []):
            have = found["settings"]
            differs = [f"{x} {have[x]} instead of {y}" for x, y in asked.items() if have.get(x, y) != y]
            if best["path"] is None or len(differs) < len(differences):
                differences, best = differs, found
        for text in differences:
            odd.setdefault(text, []).append(best["path"].name)
        if best["state"] != "complete":
            done = f" ({best['steps']:,.0f} of {best['total_timesteps']:,} steps)" if best["state"] == "short" else ""
            lost.setdefault((best["state"], f"{run.env}__{run.exp_name}"), []).append(f"{run.seed}{done}")
        rows.append(best | row)
    problems = [f"{state}: {name}, seed {', '.join(of)}" for (state, name), of in lost.items()]
    for text, of in odd.items():
        shown = ", ".join(of[:3]) + (", ..." if len(of) > 3 else "")
        problems.append(f"not as declared: {text} in {len(of)} of {len(rows)} runs ({shown})")
    return pd.DataFrame(rows), problems


def iqm(x: np.ndarray) -> np.ndarray:
    """Interquartile mean over the last axis: floor(n / 4) of the n values are left out at each end."""
    return stats.trim_mean(x, 0.25, axis=-1)


mean, spread = functools.partial(np.mean, axis=-1), functools.partial(np.std, axis=-1, ddof=1)
STATISTICS = {"iqm": iqm, "mean": mean, "spread": spread}


def in_words(metric: str) -> str:
    """A metric's tag in words: "Critic dormant ratio"."""
    words = metric.split("/")[-1].replace("_", " ")
    return words[:1].upper() + words[1:]


def resamples(x: np.ndarray, statistic=iqm, seed: int = 0) -> np.ndarray:
    """The statistic of x, then of 2,000 bootstrap resamples of x. NaN for one value, which has no spread."""
    n, x = len(x), np.asarray(x, float)
    again = np.random.default_rng([seed, n]).integers(max(n, 1), size=(2000, n))
    return np.append(statistic(x), statistic(x[again]) if n > 1 else np.full(2000, np.nan))


def estimates(table: pd.DataFrame, by: list[str], statistic=iqm) -> pd.DataFrame:
    """value, low, high, n, tasks by groups: over the seeds of each task, then the mean over tasks; bootstrap 95%.

    n is the number of runs on the task that has fewest.
    """
    rows = []
    for place, group in table.dropna(subset="value").groupby(by, sort=False, dropna=False):
        tasks = [x.to_numpy() for _, x in group.groupby("env")["value"]]
        value, *again = np.mean([resamples(x, statistic, i) for i, x in enumerate(tasks)], axis=0)
        rows.append((*place, value, *np.quantile(again, [0.025, 0.975]), min(map(len, tasks)), len(tasks)))
    return pd.DataFrame(rows, columns=[*by, "value", "low", "high", "n", "tasks"])
