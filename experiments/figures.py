"""The paper's figures (arXiv 2510.12096) and the studies beyond them, as data: which runs each of them needs.

A figure is a list of cells. A cell is the flags that set its runs apart: always types, scales and regimes, and what
else differs from `DEFAULTS`. A run is named by its cell, so figures that share a cell share its runs; only studies with
settings of their own (`depth`, `encoder-types`) choose the names.
"""

import itertools
import re
from dataclasses import dataclass, field
from typing import Literal

REGIMES = ("dense", "sst", "dst", "s2d", "d2s")
TYPES = (1, 2, 3, 4, 5, 6)
SCALES = (1, 3, 5)
TASKS = ("dog-run", "humanoid-run")
BOTH = ("critic_sparsity", "actor_sparsity")
DEFAULTS = {
    "residual": "pre", "distribution": "er", "growth": "rigl", "critic_sparsity": 0.6, "actor_sparsity": 0.6,
    "topology_update_interval": 1000, "drop_fraction": 0.5,
}  # fmt: skip


def defaults(script: str) -> dict:
    """What the cells of a script leave out: the script's own defaults."""
    return DEFAULTS | dict.fromkeys(BOTH, 0.8) if script in ("mst_sac", "mst_ddpg") else DEFAULTS


def grid(**axes: tuple) -> list[dict]:
    """All combinations of the values of the axes, the last axis fastest."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def cells(base: dict, *changes: dict) -> tuple[dict, ...]:
    """The base with each of the changes, without what is a default; equal cells once."""
    default = defaults(base["script"])
    found = [{flag: x for flag, x in (base | change).items() if default.get(flag) != x} for change in changes]
    return tuple(cell for i, cell in enumerate(found) if cell not in found[:i])


Size = Literal["paper", "small", "toy"]
# At other sizes than the paper's: a task, a number of seeds, and arguments. Widths are a quarter, and a sixteenth.
TASK = {"small": "cheetah-run", "toy": "cartpole-balance"}
SEEDS = {"small": 5, "toy": 2}
SETTINGS = {
    "paper": {},
    "small": {"hidden_dim": 128, "total_timesteps": 30_000, "buffer_size": 31_000, "eval_interval": 2500},
    "toy": {
        "hidden_dim": 32, "action_repeat": 8, "batch_size": 64, "buffer_size": 5000, "learning_starts": 250,
        "total_timesteps": 1250, "eval_interval": 250, "eval_episodes": 5, "log_interval": 50,
        "topology_update_interval": 100,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    title: str  # "{env}" stands for the tasks
    cells: tuple[dict, ...]
    envs: tuple[str, ...] = TASKS
    seeds: int = 8
    ours: str = ""  # what we chose, because the paper's text does not say it
    small: dict = field(default_factory=dict)  # what its cells have instead at small size
    names: tuple[str, ...] = ()  # experiment names of the cells, if not by their flags
    settings: dict = field(default_factory=dict)  # of all its runs, but not at small and toy size
    first_seed: int = 1


@dataclass(frozen=True)
class Run:
    """One training run: a cell on a task with a seed."""

    cell: dict
    env: str
    seed: int
    size: Size = "paper"
    name: str = ""  # given by its figure
    base: dict = field(default_factory=dict)  # the settings of its figure

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
        name = self.name or name + "".join(f"-{flag}_{value}" for flag, value in sorted(rest.items()))
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
        """The script's arguments by name: what the figure or the size asks for, then what the cell says."""
        settings = self.base if self.size == "paper" else SETTINGS[self.size]
        settings = settings | {flag: value for flag, value in self.cell.items() if flag != "script"}
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


def dimensions(scales: tuple[int, ...]) -> list[dict]:
    """Width alone, depth alone, both."""
    axes = (("width_scale",), ("depth_scale",), ("width_scale", "depth_scale"))
    return [dict.fromkeys(axis, scale) for scale in scales for axis in axes]


# MR.Q of arXiv 2501.16142; + Res: residual types; + MST: a regime per module
MRQ_TYPES = {"script": "mst_mrq", "encoder_arch": 4, "critic_arch": 4, "actor_arch": 3, **modules(regime="dense")}
RES_TYPES = {"encoder_arch": 6, "critic_arch": 6, "actor_arch": 5}
MRQ = MRQ_TYPES | modules(scale=1)
RES = MRQ | RES_TYPES
DENSE = {"critic_regime": "dense", "actor_regime": "dense"}
MST = {"critic_regime": "dst", "actor_regime": "sst"}
STRONG_ENCODER = MRQ | {"encoder_arch": 6, "encoder_scale": 3}  # of the studies of critic and actor (section 3.2)
MRQ_MST_5X = RES | MST | modules(scale=5)
# SAC and DDPG on SimBa networks, MR.SAC on types 6, 6 and 5
SIMBA = {"width_scale": 1, "depth_scale": 1, **DENSE}
SAC, DDPG = {"script": "mst_sac", **SIMBA}, {"script": "mst_ddpg", **SIMBA}
MRSAC = SIMBA | {"script": "mst_mrsac", **RES_TYPES, "encoder_regime": "dense"}


def scaled(base: dict, *scales: int) -> tuple[dict, ...]:
    """Dense and MST, at each scale of width, of depth, and of both."""
    return tuple(cell for regimes in (DENSE, MST) for cell in cells(base | regimes, *dimensions(scales)))


ENCODER_TYPES = cells(MRQ, *grid(encoder_arch=TYPES, encoder_regime=REGIMES))
ENCODER_NORMS = cells(MRQ, *grid(encoder_arch=(2, 4), encoder_regime=REGIMES))
ENCODER_SCALES = cells(MRQ, *grid(encoder_arch=(2, 4, 6), encoder_scale=SCALES, encoder_regime=REGIMES))
CRITIC_TYPES = cells(STRONG_ENCODER, *grid(critic_arch=TYPES, critic_regime=REGIMES))
CRITIC_SCALES = cells(STRONG_ENCODER, *grid(critic_arch=TYPES, critic_scale=SCALES, critic_regime=REGIMES))
CRITIC_5X = cells(STRONG_ENCODER, *grid(critic_arch=TYPES, critic_scale=(5,), critic_regime=REGIMES))
ACTOR_TYPES = cells(STRONG_ENCODER, *grid(actor_arch=TYPES, actor_regime=REGIMES))
ACTOR_SCALES = cells(STRONG_ENCODER, *grid(actor_arch=(1, 3, 5), actor_scale=SCALES, actor_regime=REGIMES))
ACTOR_5X = cells(STRONG_ENCODER, *grid(actor_arch=(3, 5), actor_scale=(5,), actor_regime=REGIMES))
METHODS = tuple(base | modules(scale=s) for s in SCALES for base in (MRQ, RES, RES | MST))
SPARSITIES = [dict.fromkeys(BOTH, sparsity) for sparsity in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)]
MST_PARTS = cells(MRQ_MST_5X, {}, {"distribution": "uniform"}, {"growth": "set"}, *SPARSITIES[:-1])
MST_SPARSITIES = cells(MRQ_MST_5X, *SPARSITIES[3:])
SIMBA_SCALES = scaled(SAC, 1, 2, 3, 4, 5) + scaled(DDPG, 1, 2, 3, 4, 5)
PAIRS = (("dense", "dense"), ("dst", "sst"), ("sst", "sst"), ("dst", "dst"), ("sst", "dst"))
SAC_207M = SAC | {"width_scale": 4, "depth_scale": 3}
ASSIGNMENTS = cells(SAC_207M, *({"critic_regime": critic, "actor_regime": actor} for critic, actor in PAIRS))
RESIDUALS = cells(RES, *(modules(scale=s) | {"residual": residual} for s in (1, 3) for residual in ("pre", "post")))
STRATEGIES = (*(modules(regime=regime) for regime in ("dense", "sst", "dst")), MST)
ONE_OR_MST = tuple(RES | modules(scale=s) | regimes for s in SCALES for regimes in STRATEGIES)
RIGL = cells(MRQ_MST_5X, *grid(topology_update_interval=(100, 1000, 10_000), drop_fraction=(0.1, 0.3, 0.5)))

# The study of depth, and one of encoders in its setting: minutes a run on one CPU core. Seeds up to 100 were a pilot's
CARTPOLE = {
    "hidden_dim": 128, "action_repeat": 4, "batch_size": 128, "buffer_size": 20_000, "learning_starts": 1000,
    "total_timesteps": 7000, "eval_interval": 1000, "eval_episodes": 5, "topology_update_interval": 250,
}  # fmt: skip
AGENTS = {"mrq": MRQ_TYPES, "res": MRQ_TYPES | RES_TYPES, "mst": MRQ_TYPES | RES_TYPES | MST}
DEPTHS = {f"depth-{name}-d{d}": agent | {"depth_scale": d} for d in (1, 5, 15) for name, agent in AGENTS.items()}
ENCODERS = {
    f"encoder-{cell['encoder_arch']}-{cell['encoder_regime']}": MRQ_TYPES | cell
    for cell in grid(encoder_arch=TYPES, encoder_regime=("dense", "dst"), depth_scale=(1,))
}
STUDY = {"envs": ("cartpole-swingup",), "ours": "all", "settings": CARTPOLE, "first_seed": 101}

FIGURES = {
    "fig02": Figure("Encoder types and regimes at scale 1", ENCODER_TYPES),
    "fig03": Figure("Encoder: srank over time, without and with LayerNorm", ENCODER_NORMS),
    "fig04": Figure("Encoder: return against parameters", ENCODER_SCALES),
    "fig05": Figure("Critic types and regimes at scale 1", CRITIC_TYPES),
    "fig06": Figure("Critic: return against parameters", CRITIC_SCALES),
    "fig07": Figure("Critic at scale 5: srank and dormant ratio", CRITIC_5X),
    "fig08": Figure("Actor types and regimes at scale 1", ACTOR_TYPES),
    "fig09": Figure("Actor: return against parameters", ACTOR_SCALES),
    "fig10": Figure("Actor at scale 5: dormant ratio", ACTOR_5X),
    "fig11": Figure("MR.Q, with residuals, with MST", METHODS),
    "fig12": Figure("MST at scale 5: distribution, growth, sparsity", MST_PARTS, ("dog-run",),
                    ours="the values of sparsity; uniform for what the paper calls random"),
    "fig13": Figure("SAC and DDPG: return against parameters", SIMBA_SCALES, (*TASKS, "dog-trot", "humanoid-walk"),
                    ours="the tasks dog-trot and humanoid-walk; the scales"),
    "fig14": Figure("SAC: regimes of critic and actor", ASSIGNMENTS, ("humanoid-run",), ours="the five assignments",
                    small={"width_scale": 1, "depth_scale": 1}),
    "fig17": Figure("Pre- and post-layer residuals", RESIDUALS, ours="the types 6, 6 and 5"),
    "fig18": Figure("Fig. 2 by task", ENCODER_TYPES),
    "fig19": Figure("Fig. 4 by task", ENCODER_SCALES),
    "fig20": Figure("Fig. 5 by task", CRITIC_TYPES),
    "fig21": Figure("Fig. 6 on {env}", CRITIC_SCALES, envs=("dog-run",)),
    "fig22": Figure("Fig. 6 on {env}", CRITIC_SCALES, envs=("humanoid-run",)),
    "fig23": Figure("Fig. 8 by task", ACTOR_TYPES),
    "fig24": Figure("Fig. 9 on {env}", ACTOR_SCALES, envs=("dog-run",)),
    "fig25": Figure("Fig. 9 on {env}", ACTOR_SCALES, envs=("humanoid-run",)),
    "fig26": Figure("MR.SAC: return against parameters", scaled(MRSAC, *SCALES), seeds=5, ours="the scales"),
    # Beyond the paper
    "one-strategy": Figure("One regime for all modules against MST", ONE_OR_MST, ours="all"),
    "sparsity": Figure("MST at scale 5: sparsity of critic and actor", MST_SPARSITIES, ours="all"),
    "rigl": Figure("MST at scale 5: interval and drop fraction of RigL", RIGL, ours="all"),
    "depth": Figure("Depth 1, 5 and 15 of MR.Q, with residuals, with MST", tuple(DEPTHS.values()),
                    names=tuple(DEPTHS), **STUDY),
    "encoder-types": Figure("Encoder types, dense and dst, at depth 1", tuple(ENCODERS.values()),
                             names=tuple(ENCODERS), **STUDY),
}  # fmt: skip


def runs(
    figure: str, size: Size = "paper", envs: tuple[str, ...] | None = None, seeds: int | None = None,
    only: dict[str, tuple[str, ...]] | None = None,
) -> list[Run]:  # fmt: skip
    """The runs of a figure, seed by seed: wherever a study stops, its cells have the same number of runs, or one less.

    `envs` are other tasks than those of the size, `seeds` is the number of seeds, and `only` the values (as text) that
    flags may have, such as {"critic_arch": ("4", "6")}. Raises ValueError, with what to write instead.
    """
    if figure not in FIGURES:
        raise ValueError(f"no figure {figure}: choose one of {', '.join(FIGURES)}")
    declared = FIGURES[figure]
    changes = declared.small if size == "small" else {}
    names = declared.names or [""] * len(declared.cells)
    named = chosen = [(cell | changes, name) for cell, name in zip(declared.cells, names, strict=True)]

    def value(cell: dict, flag: str) -> str:
        return str((defaults(cell["script"]) | declared.settings | cell).get(flag))

    for flag, values in (only or {}).items():
        known = {value(cell, flag) for cell, _ in named}
        if not known >= set(values):
            choices = ", ".join(sorted(known - {"None"} or declared.cells[0]))
            raise ValueError(f"no cell of {figure} has {flag} {', '.join(values)}: choose from {choices}")
        chosen = [(cell, name) for cell, name in chosen if value(cell, flag) in values]
    if not chosen:
        raise ValueError(f"no cell of {figure} has all of {only}")
    envs = dict.fromkeys(envs or (declared.envs if size == "paper" else (TASK[size],)))
    first, count = declared.first_seed, seeds or SEEDS.get(size, declared.seeds)
    order = itertools.product(range(first, first + count), envs, chosen)
    return [Run(cell, env, seed, size, name, declared.settings) for seed, env, (cell, name) in order]
