"""Load runs as tidy pandas frames, by figure of the paper or by folder, and name what is missing, short or damaged.

    loaded = load_figure("fig06", "runs")
    print(loaded.report())  # what is missing or short; "" if nothing is
    loaded.runs  # a row per run that the figure needs
    loaded.evaluations  # a row per evaluation
    loaded.scalars(["plasticity/critic_dormant_ratio"])  # a row per value in TensorBoard

Parameters and FLOPs come from the networks that a run's script builds from its arguments, on torch's meta device, which
holds no data.
"""

import functools
import importlib
import json
import logging
import os
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import floor, nan, prod
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tensorboard.compat.proto.event_pb2 import Event
from torch import nn

from experiments import figures
from sparse_utils import erdos_renyi_sparsities, scheduled_sparsity, uniform_dense_output, uniform_sparsities

EVALUATION_COLUMNS = {
    "agent_step": int, "env_step": int, "episode_return_mean": float, "episode_return_std": float, "episodes": int,
    "wall_seconds": float,
}  # fmt: skip
PUBLISHED_COLUMNS = ["env", "algo", "seed", "agent_step", "env_step", "return"]
# Arguments that say where and how a run is done, not what it computes
NOT_SETTINGS = (
    "exp_name", "seed", "torch_deterministic", "cuda", "track", "wandb_project_name", "wandb_entity", "capture_video",
    "runs_dir", "dry_run", "eval_only", "env_id", "log_interval", "checkpoint_interval", "diagnostics",
    "eval_processes", "cuda_graphs", "compile",
)  # fmt: skip


@dataclass
class Loaded:
    """Runs in tidy frames. Each frame has the columns of `identity`, of which `directory` alone tells runs apart.

    Attributes:
        figure: name of the figure; None for runs of no figure.
        flags: the columns that set cells apart, at the paper's size also for toy runs. A flag that a cell leaves out
            has the default of its script; None where the script has no such flag.
        runs: a row per run that is needed, the columns of `identity` and
            state: "complete", "short" (last evaluation before total_timesteps) or "missing" (no evaluation),
            agent_step: of the last evaluation, NaN if missing; total_timesteps: agent steps of the whole run,
            parameters, active, flops, sparse_flops and those of each module: see `size`,
            wall_seconds: of the run until its last evaluation began,
            git_commit.
        evaluations: a row per evaluation, the columns of `identity` and of `eval.csv`.
        problems: what `report` says beside missing and short runs.
    """

    figure: str | None
    flags: list[str]
    runs: pd.DataFrame
    evaluations: pd.DataFrame
    problems: list[str] = field(default_factory=list)

    @property
    def identity(self) -> list[str]:
        return ["script", "env", "seed", *self.flags, "exp_name", "directory"]

    def scalars(self, tags: Sequence[str]) -> pd.DataFrame:
        """What runs logged to TensorBoard: the columns of `identity`, tag, agent_step, value.

        Every step of a tag once per run. No rows for what a run did not log.
        """
        rows = []
        for path in self.runs["directory"]:
            rows += [(path, *key, value) for key, value in _scalars(path, tuple(tags)).items()]
        found = pd.DataFrame(rows, columns=["directory", "tag", "agent_step", "value"])
        return self.runs[self.identity].merge(found.astype({"agent_step": int, "value": float}), on="directory")

    def report(self) -> str:
        """What is missing, short, damaged or not as declared, by name; "" if nothing is."""
        lines = []
        missing = self.runs[self.runs["state"] == "missing"]
        for (env, name), group in missing.groupby(["env", "exp_name"], sort=False):
            lines.append(f"missing: {env}__{name}, seed {', '.join(map(str, group['seed']))}")
        for run in self.runs[self.runs["state"] == "short"].itertuples():
            lines.append(
                f"short: {Path(run.directory).name}, {run.agent_step:,.0f} of {run.total_timesteps:,} agent steps"
            )
        return "\n".join(lines + self.problems)


def load_figure(
    figure: str,
    runs_dir: str | Path,
    size: figures.Size = "paper",
    envs: tuple[str, ...] | None = None,
    seeds: int | None = None,
    only: dict[str, tuple[str, ...]] | None = None,
) -> Loaded:
    """Load the runs of a figure, there or not; the choice of runs is that of `experiments.figures.runs`.

    Raises:
        ValueError: unknown figure, no such cell, or `runs_dir` is no folder; the message says what to write instead.
    """
    chosen = figures.runs(figure, size, envs, seeds, only)
    flags = list(dict.fromkeys(flag for run in chosen for flag in run.cell if flag != "script"))
    rows = []
    for run in chosen:
        declared = _arguments(run.script, {**run.settings, "env_id": run.env})
        at_paper_size = _arguments(run.script, {**replace(run, size="paper").settings, "env_id": run.env})
        row = {"script": run.script, "env": run.env, "seed": run.seed}
        row |= {flag: at_paper_size.get(flag) for flag in flags}
        rows.append(row | {"exp_name": run.exp_name, "directory": run.directory, "declared": declared})
    return _load(figure, flags, rows, Path(runs_dir))


def load_runs(*folders: str | Path, sizes: bool = True) -> Loaded:
    """Load any run directories, given by name or as the folders that hold them. `flags` are their arguments.

    Args:
        sizes: with parameters and FLOPs, which takes a second per task.

    Raises:
        ValueError: there is no run.
    """
    found = [
        [folder] if (folder / "config.json").exists() else sorted(folder.glob("*/")) for folder in map(Path, folders)
    ]
    configs = {path: _config(path) for paths in found for path in paths if (path / "config.json").exists()}
    if not any(configs.values()):
        raise ValueError(f"no run in {', '.join(map(str, folders))}: give the folder that holds the run directories")
    arguments = {path: config["args"] for path, config in configs.items() if config}
    flags = list(dict.fromkeys(name for args in arguments.values() for name in args if name not in NOT_SETTINGS))
    rows = []
    for path, args in arguments.items():
        row = {"script": Path(configs[path]["command"][0]).stem, "env": args["env_id"], "seed": args["seed"]}
        row |= {flag: args.get(flag) for flag in flags}
        rows.append(row | {"exp_name": args["exp_name"], "directory": path, "declared": args})
    loaded = _load(None, flags, rows, Path(), sizes)
    loaded.problems += [f"damaged: config.json of {path.name} (left out)" for path in configs if not configs[path]]
    return loaded


def load_published(path: str | Path) -> pd.DataFrame:
    """Published curves to lay over one's own: env, algo, seed, agent_step, env_step, return.

    Raises:
        ValueError: a column is missing.
    """
    frame = pd.read_csv(path)
    if missing := [name for name in PUBLISHED_COLUMNS if name not in frame]:
        raise ValueError(f"{path} lacks {', '.join(missing)}: write a CSV with columns {','.join(PUBLISHED_COLUMNS)}")
    return frame[PUBLISHED_COLUMNS]


def _load(figure: str | None, flags: list[str], rows: list[dict], runs_dir: Path, sizes: bool = True) -> Loaded:
    if not runs_dir.is_dir():
        raise ValueError(f"{runs_dir} is no folder: give the one that holds the run directories")
    evaluations, problems, deviations = [], [], {}
    for row in rows:
        path, declared = runs_dir / row["directory"], row.pop("declared")
        config = _config(path)
        if config is None and (path / "config.json").exists():
            problems.append(f"damaged: config.json of {path.name} (taken as declared)")
        args = config["args"] if config else declared
        for name, value in declared.items():
            if (
                value is not None and args.get(name) != value and name not in NOT_SETTINGS
            ):  # None: for the script to say
                deviations.setdefault(f"{name} {args.get(name)} instead of {value}", []).append(path.name)
        own, broken = _evaluations(path / "eval.csv")
        evaluations += [(str(path), *values) for values in own]
        problems += [f"damaged: eval.csv of {path.name}, line {number} (left out)" for number in broken]
        last = dict(zip(EVALUATION_COLUMNS, own[-1], strict=True)) if own else {"agent_step": nan, "wall_seconds": nan}
        row |= {
            "directory": str(path),
            "state": "missing" if not own else "complete" if last["agent_step"] >= args["total_timesteps"] else "short",
            "agent_step": last["agent_step"],
            "total_timesteps": args["total_timesteps"],
            "wall_seconds": last["wall_seconds"],
            "git_commit": config.get("git_commit") if config else None,
        }
        if sizes:
            row |= size(row["script"], args)
    for text, names in deviations.items():
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        problems.append(f"not as declared: {text} in {len(names)} of {len(rows)} runs ({shown})")
    runs = pd.DataFrame(rows)
    for env in runs.loc[runs["parameters"].isna(), "env"].unique() if sizes else ():
        problems.append(f"no parameters and FLOPs: {env} cannot be made here")
    loaded = Loaded(figure, flags, runs, pd.DataFrame(), problems)
    found = pd.DataFrame(evaluations, columns=["directory", *EVALUATION_COLUMNS]).astype(EVALUATION_COLUMNS)
    loaded.evaluations = runs[loaded.identity].merge(found, on="directory")
    return loaded


def _config(directory: Path) -> dict | None:
    """The run's `config.json`, None if it is not there or damaged."""
    try:
        config = json.loads((directory / "config.json").read_text())
        return config if isinstance(config["args"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _evaluations(path: Path) -> tuple[list[list], list[int]]:
    """The rows of an `eval.csv` by agent step and the numbers of its damaged lines, from 1. Nothing without the file.

    A crash of the machine can leave a part of a line.
    """
    rows, broken = {}, []
    text = path.read_text(errors="replace") if path.exists() else ""
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        try:
            if not line.endswith("\n") or (number == 1 and line.strip() != ",".join(EVALUATION_COLUMNS)):
                raise ValueError
            if number > 1:
                row = [kind(x) for kind, x in zip(EVALUATION_COLUMNS.values(), line.split(","), strict=True)]
                rows[row[0]] = row
        except ValueError:
            broken.append(number)
    return [rows[step] for step in sorted(rows)], broken


# TensorBoard --------------------------------------------------------------------------------------------------------


def _scalars(directory: str, tags: tuple[str, ...]) -> dict[tuple[str, int], float]:
    """The value of each tag and step of a run, over all its event files. A step logged twice has the later value."""
    found = {}
    for path in sorted(Path(directory).glob("events.out.tfevents.*")):
        for record in _records(path.read_bytes(), tags):
            event = Event.FromString(record)
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value if value.tag in tags}
    return found


def _records(data: bytes, tags: tuple[str, ...]) -> Iterator[bytes]:
    """The records of an event file that hold one of the tags. A record that a crash cut off ends the file.

    A record is its length in 8 bytes, 4 of a checksum, its content, 4 of a checksum. TensorBoard's own reader computes
    the checksums in Python and parses every record, which takes 40 times as long and more.
    """
    length, find = struct.Struct("<Q"), re.compile(b"|".join(re.escape(tag.encode()) for tag in tags)).search
    end = 0  # of the record before
    while match := find(data, end):
        while end <= match.start():
            start, end = end + 12, end + 16 + length.unpack_from(data, end)[0]
        if end > len(data):
            return
        yield data[start : end - 4]


# Parameters and FLOPs -----------------------------------------------------------------------------------------------


def size(script: str, args: dict) -> dict[str, float]:
    """Parameters and FLOPs of a run's networks, NaN if its environment cannot be made here.

    Of the agent, and of each module under `<module>_...`:
        parameters: all of them, without targets and without the encoder's predictor, as the paper counts.
        active: those outside the masks; under s2d and d2s the mean over training.
        flops: of one forward pass through every module for one sample, two (a multiplication and an addition) per
            weight of a linear layer. Biases, norms, activations and the predictor are not counted. An update costs a
            multiple of it that depends on the algorithm, about three times a module's forward pass for its own loss.
        sparse_flops: the same of the active weights alone. Theoretical: the code multiplies dense matrices, so that
            wall-clock time does not follow it.

    Args:
        script: "mst_mrq".
        args: arguments of the run by name; those left out have the script's default.
    """
    module = importlib.import_module(script)
    settings = {name: value for name, value in args.items() if name not in NOT_SETTINGS}
    counted = _size(script, tuple(settings.items()), _dimensions(script, args["env_id"]))
    total = {what: sum(counts[what] for counts in counted.values()) for what in next(iter(counted.values()))}
    return total | {f"{name}_{what}": count for name in module.MODULES for what, count in counted[name].items()}


@functools.cache
def _dimensions(script: str, env_id: str) -> tuple[int, int] | None:
    """Sizes of observation and action, None if the environment cannot be made."""
    module = importlib.import_module(script)
    os.environ.setdefault("MUJOCO_GL", "disable")  # nothing is drawn
    logging.getLogger("absl").setLevel(logging.ERROR)  # MuJoCo's warnings of attributes in the suite's models
    try:
        env = module.AgentEnv(module.Args(env_id=env_id))
    except ValueError:
        return None
    env.close()
    return env.observation_space.shape[0], env.action_space.shape[0]


@functools.cache
def _size(script: str, settings: tuple, dimensions: tuple[int, int] | None) -> dict[str, dict[str, float]]:
    module = importlib.import_module(script)
    if dimensions is None:
        return {name: dict.fromkeys(("parameters", "active", "flops", "sparse_flops"), nan) for name in module.MODULES}
    known = asdict(module.Args())
    args = module.Args(**{name: value for name, value in settings if name in known})
    with torch.device("meta"):
        networks = module.make_networks(args, *dimensions)
    solve = {"er": erdos_renyi_sparsities, "uniform": uniform_sparsities, "uniform-dense-output": uniform_dense_output}
    counted = {}
    for name, network in zip(module.MODULES, networks, strict=True):
        parameters = sum(p.numel() for key, p in network.named_parameters() if not key.startswith("predictor."))
        linear = {key: layer for key, layer in network.named_modules() if isinstance(layer, nn.Linear)}
        shapes = {key: tuple(layer.weight.shape) for key, layer in linear.items() if key != "predictor"}
        weights = sum(map(prod, shapes.values()))
        zeros = 0.0
        if (regime := getattr(args, f"{name}_regime")) != "dense":
            sparsities = solve[args.distribution](shapes, getattr(args, f"{name}_sparsity"))
            zeros = sum(floor(sparsities[key] * prod(shape)) for key, shape in shapes.items())
            zeros *= _mean_schedule(regime, args.schedule_start, args.schedule_end)
        counted[name] = {
            "parameters": parameters,
            "active": round(parameters - zeros),
            "flops": 2 * weights,
            "sparse_flops": 2 * round(weights - zeros),
        }
    return counted


def _mean_schedule(regime: str, start: float | None, end: float | None) -> float:
    """Mean of eq. 2 over training, as a share of the sparsity that it starts from or ends at."""
    if regime not in ("s2d", "d2s"):
        return 1.0
    default_start, default_end = (0.2, 0.8) if regime == "d2s" else (0.0, 1.0)
    start, end = default_start if start is None else start, default_end if end is None else end
    initial, final = (0.0, 1.0) if regime == "d2s" else (1.0, 0.0)
    steps = (np.arange(1000) + 0.5) / 1000
    return float(np.mean([scheduled_sparsity(step, initial, final, start, end) for step in steps]))


def _arguments(script: str, flags: dict) -> dict:
    """All arguments of a script that is given these flags, as `config.json` would record them."""
    return asdict(importlib.import_module(script).Args(**flags))
