"""The paper's figures (arXiv 2510.12096) and the studies beyond them, as data: which runs each of them needs.

A figure is a list of cells. A cell is the flags that set its runs apart: always types, scales and regimes, and what
else differs from `DEFAULTS`. A run's name follows from its cell alone, so figures that share a cell share its runs.
"""

import itertools
import re
from dataclasses import dataclass, field
from typing import Literal

REGIMES = ("dense", "sst", "dst", "s2d", "d2s")
TYPES = (1, 2, 3, 4, 5, 6)
SCALES = (1, 3, 5)
TASKS = ("dog-run", "humanoid-run")
DEFAULTS = {
    "residual": "pre", "distribution": "er", "growth": "rigl", "critic_sparsity": 0.6, "actor_sparsity": 0.6,
    "topology_update_interval": 1000, "drop_fraction": 0.5,
}  # fmt: skip
SIMBA_DEFAULTS = DEFAULTS | {"critic_sparsity": 0.8, "actor_sparsity": 0.8}


def defaults(script: str) -> dict:
    """What the cells of a script leave out: the script's own defaults."""
    return SIMBA_DEFAULTS if script in ("mst_sac", "mst_ddpg") else DEFAULTS


def grid(**axes: tuple) -> list[dict]:
    """All combinations of the values of the axes, the last axis fastest."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def cells(base: dict, *changes: dict) -> tuple[dict, ...]:
    """The base with each of the changes; equal cells once."""
    found: list[dict] = []
    for change in changes:
        default = defaults(base["script"])
        cell = {flag: value for flag, value in (base | change).items() if default.get(flag) != value}
        if cell not in found:
            found.append(cell)
    return tuple(found)


Size = Literal["paper", "small", "toy"]
# At other sizes than the paper's: a task, a number of seeds, and arguments. Widths are a quarter, and a sixteenth.
TASK = {"small": "cheetah-run", "toy": "cartpole-balance"}
SEEDS = {"small": 5, "toy": 2}
SETTINGS = {
    "paper": {},
    "small": {
        "hidden_dim": 128, "total_timesteps": 30_000, "buffer_size": 31_000, "eval_interval": 2500,
        "checkpoint_interval": 1000,
    },
    "toy": {
        "hidden_dim": 32, "action_repeat": 8, "batch_size": 64, "buffer_size": 5000, "learning_starts": 250,
        "total_timesteps": 1250, "eval_interval": 250, "eval_episodes": 5, "log_interval": 50,
        "checkpoint_interval": 250, "topology_update_interval": 100,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    title: str  # "{env}" stands for the tasks
    cells: tuple[dict, ...]
    envs: tuple[str, ...] = TASKS
    seeds: int = 8
    small: dict = field(default_factory=dict)  # what its cells have instead at small size


@dataclass(frozen=True)
class Run:
    """One training run: a cell on a task with a seed."""

    cell: dict
    env: str
    seed: int
    size: Size = "paper"

    @property
    def exp_name(self) -> str:
        """Says the whole cell: two runs have one name only if they are the same run."""
        rest = dict(self.cell)
        name = rest.pop("script").removeprefix("mst_")
        if "width_scale" in rest:
            name += f"-w{rest.pop('width_scale')}d{rest.pop('depth_scale')}"
        for module in ("encoder", "critic", "actor"):
            parts = [("", "arch"), ("s", "scale"), ("", "regime")]
            code = "".join(f"{c}{rest.pop(f'{module}_{p}')}" for c, p in parts if f"{module}_{p}" in rest)
            name += f"-{module[0]}{code}" if code else ""
        name += "".join(f"-{flag}_{value}" for flag, value in sorted(rest.items()))
        return name if self.size == "paper" else f"{self.size}-{name}"

    @property
    def directory(self) -> str:
        """Name of the run directory that the script makes."""
        return re.sub(r"[^\w.+=-]", "-", f"{self.env}__{self.exp_name}__{self.seed}")

    @property
    def script(self) -> str:
        return self.cell["script"]

    @property
    def settings(self) -> dict:
        """The script's arguments by name: what the size asks for, then what the cell says."""
        settings = SETTINGS[self.size] | {flag: value for flag, value in self.cell.items() if flag != "script"}
        if self.size == "toy":
            if "topology_update_interval" in self.cell:
                settings["topology_update_interval"] //= 10
            if self.script in ("mst_mrq", "mst_mrsac"):
                settings["target_network_frequency"] = 50
        return settings

    def arguments(self) -> list[str]:
        """What follows `python` on the command line."""
        flags = {"env": self.env, "seed": self.seed, "exp_name": self.exp_name, **self.settings}
        return [f"{self.script}.py", *(str(x) for k, v in flags.items() for x in (f"--{k.replace('_', '-')}", v))]


MODULES = ("encoder", "critic", "actor")


def modules(**values) -> dict:
    """`modules(scale=3)` is the scale of every module."""
    return {f"{module}_{what}": value for what, value in values.items() for module in MODULES}


# MR.Q of arXiv 2501.16142; + Res: residual types; + MST: a regime per module
MRQ = {"script": "mst_mrq", "encoder_arch": 4, "critic_arch": 4, "actor_arch": 3, **modules(scale=1, regime="dense")}
RES = MRQ | {"encoder_arch": 6, "critic_arch": 6, "actor_arch": 5}
MST = {"critic_regime": "dst", "actor_regime": "sst"}
STRONG_ENCODER = MRQ | {"encoder_arch": 6, "encoder_scale": 3}  # of the studies of critic and actor (section 3.2)
MRQ_MST_5X = RES | MST | modules(scale=5)

# SAC and DDPG on SimBa networks, MR.SAC on types 6, 6 and 5
SIMBA = {"width_scale": 1, "depth_scale": 1, "critic_regime": "dense", "actor_regime": "dense"}
MRSAC = SIMBA | {"script": "mst_mrsac", "encoder_arch": 6, "critic_arch": 6, "actor_arch": 5, "encoder_regime": "dense"}
DENSE = {"critic_regime": "dense", "actor_regime": "dense"}


def dimensions(scales: tuple[int, ...]) -> list[dict]:
    """Width alone, depth alone, both."""
    return [
        change
        for s in scales
        for change in ({"width_scale": s}, {"depth_scale": s}, {"width_scale": s, "depth_scale": s})
    ]


def sparsities(values: tuple[float, ...]) -> list[dict]:
    """The same sparsity for critic and actor."""
    return [{"critic_sparsity": s, "actor_sparsity": s} for s in values]


ENCODER_TYPES = cells(MRQ, *grid(encoder_arch=TYPES, encoder_regime=REGIMES))
ENCODER_SCALES = cells(MRQ, *grid(encoder_arch=(2, 4, 6), encoder_scale=SCALES, encoder_regime=REGIMES))
CRITIC_TYPES = cells(STRONG_ENCODER, *grid(critic_arch=TYPES, critic_regime=REGIMES))
CRITIC_SCALES = cells(STRONG_ENCODER, *grid(critic_arch=TYPES, critic_scale=SCALES, critic_regime=REGIMES))
CRITIC_5X = cells(STRONG_ENCODER, *grid(critic_arch=TYPES, critic_scale=(5,), critic_regime=REGIMES))
ACTOR_TYPES = cells(STRONG_ENCODER, *grid(actor_arch=TYPES, actor_regime=REGIMES))
ACTOR_SCALES = cells(STRONG_ENCODER, *grid(actor_arch=(1, 3, 5), actor_scale=SCALES, actor_regime=REGIMES))
ACTOR_5X = cells(STRONG_ENCODER, *grid(actor_arch=(3, 5), actor_scale=(5,), actor_regime=REGIMES))
SIMBA_SCALES = tuple(
    cell
    for script in ("mst_sac", "mst_ddpg")
    for regimes in (DENSE, MST)
    for cell in cells({"script": script, **SIMBA, **regimes}, *dimensions((1, 2, 3, 4, 5)))
)
PAIRS = (("dense", "dense"), ("dst", "sst"), ("sst", "sst"), ("dst", "dst"), ("sst", "dst"))
ASSIGNMENTS = [{"critic_regime": critic, "actor_regime": actor} for critic, actor in PAIRS]

FIGURES = {
    "fig02": Figure("Encoder types and regimes at scale 1", ENCODER_TYPES),
    "fig03": Figure(
        "Encoder: srank over time, without and with LayerNorm",
        cells(MRQ, *grid(encoder_arch=(2, 4), encoder_regime=REGIMES)),
    ),
    "fig04": Figure("Encoder: return against parameters", ENCODER_SCALES),
    "fig05": Figure("Critic types and regimes at scale 1", CRITIC_TYPES),
    "fig06": Figure("Critic: return against parameters", CRITIC_SCALES),
    "fig07": Figure("Critic at scale 5: srank and dormant ratio", CRITIC_5X),
    "fig08": Figure("Actor types and regimes at scale 1", ACTOR_TYPES),
    "fig09": Figure("Actor: return against parameters", ACTOR_SCALES),
    "fig10": Figure("Actor at scale 5: dormant ratio", ACTOR_5X),
    "fig11": Figure(
        "MR.Q, with residuals, with MST",
        tuple(base | modules(scale=s) for s in SCALES for base in (MRQ, RES, RES | MST)),
    ),
    "fig12": Figure(
        "MST at scale 5: distribution, growth, sparsity",
        cells(
            MRQ_MST_5X,
            {},
            {"distribution": "uniform"},
            {"growth": "set"},
            *sparsities((0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)),
        ),
        envs=("dog-run",),
    ),
    "fig13": Figure(
        "SAC and DDPG: return against parameters", SIMBA_SCALES, envs=(*TASKS, "dog-trot", "humanoid-walk")
    ),
    "fig14": Figure(
        "SAC: regimes of critic and actor",
        cells({"script": "mst_sac", **SIMBA, "width_scale": 4, "depth_scale": 3}, *ASSIGNMENTS),
        envs=("humanoid-run",),
        small={"width_scale": 1, "depth_scale": 1},
    ),
    "fig17": Figure(
        "Pre- and post-layer residuals",
        cells(RES, *(modules(scale=s) | {"residual": residual} for s in (1, 3) for residual in ("pre", "post"))),
    ),
    "fig18": Figure("Fig. 2 by task", ENCODER_TYPES),
    "fig19": Figure("Fig. 4 by task", ENCODER_SCALES),
    "fig20": Figure("Fig. 5 by task", CRITIC_TYPES),
    "fig21": Figure("Fig. 6 on {env}", CRITIC_SCALES, envs=("dog-run",)),
    "fig22": Figure("Fig. 6 on {env}", CRITIC_SCALES, envs=("humanoid-run",)),
    "fig23": Figure("Fig. 8 by task", ACTOR_TYPES),
    "fig24": Figure("Fig. 9 on {env}", ACTOR_SCALES, envs=("dog-run",)),
    "fig25": Figure("Fig. 9 on {env}", ACTOR_SCALES, envs=("humanoid-run",)),
    "fig26": Figure(
        "MR.SAC: return against parameters",
        tuple(cell for regimes in (DENSE, MST) for cell in cells(MRSAC | regimes, *dimensions(SCALES))),
        seeds=5,
    ),
    # Beyond the paper
    "one-strategy": Figure(
        "One regime for all modules against MST",
        tuple(
            RES | modules(scale=s) | regimes
            for s in SCALES
            for regimes in (modules(regime="dense"), modules(regime="sst"), modules(regime="dst"), MST)
        ),
    ),
    "sparsity": Figure(
        "MST at scale 5: sparsity of critic and actor",
        cells(MRQ_MST_5X, *sparsities((0.5, 0.6, 0.7, 0.8, 0.9, 0.95))),
    ),
    "rigl": Figure(
        "MST at scale 5: interval and drop fraction of RigL",
        cells(
            MRQ_MST_5X,
            *grid(topology_update_interval=(100, 1000, 10_000), drop_fraction=(0.1, 0.3, 0.5)),
        ),
    ),
    "distribution": Figure(
        "MST at scale 5: ER, uniform, uniform with a dense output layer",
        cells(MRQ_MST_5X, {}, {"distribution": "uniform"}, {"distribution": "uniform-dense-output"}),
    ),
}


def runs(
    figure: str,
    size: Size = "paper",
    envs: tuple[str, ...] | None = None,
    seeds: int | None = None,
    only: dict[str, tuple[str, ...]] | None = None,
) -> list[Run]:
    """The runs of a figure, in an order that depends on the arguments alone: a Slurm array index counts them.

    Seeds are the outermost loop, so that the first runs to end give the whole figure with one seed.

    Args:
        size: "small" for a first verdict in hours on a few cores, "toy" for a look at the whole chain in minutes.
        envs: other tasks than those of the size.
        seeds: the number of seeds, which count from 1.
        only: flags with the values (as text) that a cell may have, such as {"critic_arch": ("4", "6")}.

    Raises:
        ValueError: unknown figure, a value that no cell has, or a task twice; the message says what to write instead.
    """
    if figure not in FIGURES:
        raise ValueError(f"no figure {figure}: choose one of {', '.join(FIGURES)}")
    declared = FIGURES[figure]
    known_cells = chosen = [cell | declared.small if size == "small" else cell for cell in declared.cells]
    for flag, values in (only or {}).items():
        known = sorted({str((defaults(cell["script"]) | cell).get(flag)) for cell in known_cells})
        if known == ["None"]:
            raise ValueError(f"no cell of {figure} has {flag}: choose from {', '.join(declared.cells[0])}")
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"no cell of {figure} has {flag} {', '.join(unknown)}: choose from {', '.join(known)}")
        chosen = [cell for cell in chosen if str((defaults(cell["script"]) | cell).get(flag)) in values]
    if not chosen:
        raise ValueError(f"no cell of {figure} has all of {only}")
    if envs and len(set(envs)) < len(envs):
        raise ValueError(f"a task is there twice: {', '.join(envs)}")
    envs = envs or (declared.envs if size == "paper" else (TASK[size],))
    seeds = seeds or SEEDS.get(size, declared.seeds)
    return [Run(cell, env, seed, size) for seed in range(1, seeds + 1) for env in envs for cell in chosen]


def small_hours(run: Run) -> float:
    """What a run of small size takes on one CPU core, roughly.

    Measured in ms per agent step: SAC 24 at scale 1, 65 at depth 3; MR.Q, at half of these widths, 13, 99 and 336 at
    scales 1, 3 and 5, where SAC took 9.5. So about s ** 1.95 at scale s, or at width * depth = s ** 2.
    """
    cell = run.cell
    if "encoder_scale" in cell:
        scales = [cell[f"{module}_scale"] for module in MODULES]
    else:
        scales = [(cell["width_scale"] * cell["depth_scale"]) ** 0.5]
    ms = 24 if run.script in ("mst_sac", "mst_ddpg") else 13 * 24 / 9.5
    return ms * sum(s**1.95 for s in scales) / len(scales) * SETTINGS["small"]["total_timesteps"] / 3.6e6
