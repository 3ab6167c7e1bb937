"""SAC with Module-Specific Training (MST) on DeepMind Control and Gymnasium, in one file beside `sparse_utils.py`.

    python mst_sac.py --env humanoid-run --width-scale 4 --depth-scale 3      # the paper's MST at 207M parameters
    python mst_sac.py --env humanoid-run --critic-regime dense --actor-regime dense    # the original SAC on SimBa
    python mst_sac.py --eval-only runs/humanoid-run__mst_sac__1 --capture-video        # play a trained agent

Implements "Rethinking the Role of Dynamic Sparse Training for Scalable Deep Reinforcement Learning" (arXiv
2510.12096, section 4, Figs. 13 and 14): SAC (arXiv 1812.05905) on the networks of SimBa (arXiv 2410.09754), with one
training regime per module: critic dynamic sparse, actor static sparse. One agent step is one action of the policy,
which DeepMind Control repeats for two environment steps; flags and plots count agent steps.

Results go to `runs/<env>__<exp_name>__<seed>/`. The same command started again resumes from the last checkpoint.
Exit codes: 0 finished, 75 stopped by SIGTERM, SIGINT or SIGUSR1 with a checkpoint (start the same command to go on),
2 wrong usage, 1 any other failure.
"""

import copy
import ctypes
import difflib
import fcntl
import json
import math
import multiprocessing
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from sparse_utils import Sparsifier, dormant_ratio, stable_rank

Regime = Literal["dense", "sst", "dst", "s2d", "d2s"]


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """the name of this experiment, part of the run directory"""
    seed: int = 1
    """seed of networks, masks, exploration, replay and environment"""
    torch_deterministic: bool = True
    """if toggled, `torch.backends.cudnn.deterministic=True`"""
    cuda: bool = torch.cuda.is_available()
    """train on the GPU (the default where there is one); `--no-cuda` trains on the CPU"""
    track: bool = False
    """if toggled, this experiment is also tracked with Weights and Biases"""
    wandb_project_name: str = "mst"
    """the wandb project"""
    wandb_entity: str | None = None
    """the entity (team) of the wandb project"""
    capture_video: bool = False
    """record the first episode of each evaluation as an mp4 under `videos/` in the run directory"""
    runs_dir: str = "runs"
    """the folder that holds the run directories"""
    dry_run: bool = False
    """print the table of networks and memory, then stop"""
    eval_only: str | None = None
    """play the agent of this run directory or `agent.pt` for `eval_episodes` episodes, print the returns, then stop"""

    # Speed (docs/performance.md)
    cuda_graphs: bool = True
    """on a GPU, run the updates as CUDA graphs (after one of them was compared with an eager update)"""
    compile: bool = False
    """fuse the losses with `torch.compile`, a minute or two at the start; docs/performance.md says where it pays"""
    matmul_precision: Literal["highest", "high"] = "high"
    """float32 matrix products on a GPU: in float32 (highest) or TF32 (high)"""
    bf16: bool = False
    """compute the losses in bfloat16 (`torch.autocast`); parameters, outputs and optimizers stay in float32"""
    overlap: bool = torch.cuda.is_available()
    """choose each action before the update that is due, which then runs while the environment steps (the default where
    there is a GPU): the action is by one update older"""

    # Environment and evaluation
    env_id: Annotated[str, tyro.conf.arg(aliases=("--env",))] = "humanoid-run"
    """`domain-task` of DeepMind Control, or a Gymnasium id with a bounded Box action space"""
    action_repeat: int | None = None
    """environment steps per agent step (default: 2 on DeepMind Control, 1 elsewhere)"""
    total_timesteps: int = 500_000
    """agent steps of the whole run"""
    eval_interval: int = 5_000
    """agent steps between evaluations"""
    eval_episodes: int = 10
    """episodes per evaluation, played without noise in environments of their own"""
    log_interval: int = 100
    """agent steps between writes of the losses to TensorBoard"""
    checkpoint_interval: int = 10_000
    """agent steps between checkpoints; one is also written when the run is stopped by a signal"""
    eval_workers: int | None = None
    """processes that step the evaluation's environments while training goes on (default: one per core, or
    OMP_NUM_THREADS of them; none where that is one)"""
    diagnostics: bool = True
    """measure srank, dormant ratio and norms of each module at every evaluation (never changes the training)"""

    # Algorithm
    buffer_size: int = 1_000_000
    """replay buffer capacity in time steps"""
    gamma: float | None = None
    """discount factor (default: 1 - 5 / the agent steps of an episode, within 0.95 and 0.995; 0.99 on dm_control)"""
    tau: float = 0.005
    """share of the critic in every update of its target network"""
    batch_size: int = 256
    """batch size of every update"""
    learning_starts: int = 5_000
    """agent steps of uniformly random actions before training starts"""
    updates_per_step: int = 2
    """updates of every module per agent step, each on a batch of its own"""
    clipped_double_q: tyro.conf.DisallowNone[bool | None] = None
    """train two critics and use the smaller value (default: on Gymnasium ids, where tasks can terminate)"""
    critic_lr: float = 1e-4
    """learning rate of the critic"""
    actor_lr: float = 1e-4
    """learning rate of the actor"""
    temperature_lr: float = 1e-4
    """learning rate of the temperature, without weight decay"""
    weight_decay: float = 1e-2
    """weight decay of the AdamW optimizers of critic and actor"""
    initial_temperature: float = 0.01
    """temperature at the start"""
    target_entropy: float | None = None
    """entropy that the temperature is learned for (default: -0.5 per action dimension)"""

    # Networks (SimBa): the critic has width 512 and 2 blocks at scale 1, the actor width 128 and 1 block
    scale: float = 1.0
    """multiplies width and depth of every module"""
    width_scale: float | None = None
    """multiplies the widths of every module, instead of `scale`"""
    depth_scale: float | None = None
    """multiplies the number of blocks of every module, instead of `scale`"""
    critic_scale: float | None = None
    """width and depth of the critic, instead of the scales of every module"""
    critic_width_scale: float | None = None
    """width of the critic, instead of `critic_scale`"""
    critic_depth_scale: float | None = None
    """number of blocks of the critic, instead of `critic_scale`"""
    actor_scale: float | None = None
    """width and depth of the actor, instead of the scales of every module"""
    actor_width_scale: float | None = None
    """width of the actor, instead of `actor_scale`"""
    actor_depth_scale: float | None = None
    """number of blocks of the actor, instead of `actor_scale`"""

    # Training regimes (section 2.1): dense, static sparse, dynamic sparse, sparse to dense, dense to sparse
    critic_regime: Regime = "dst"
    """training regime of the critic"""
    actor_regime: Regime = "sst"
    """training regime of the actor"""
    critic_sparsity: float = 0.8
    """share of the critic's weights that is zero (s2d starts from it, d2s ends at it)"""
    actor_sparsity: float = 0.8
    """share of the actor's weights that is zero"""
    distribution: Literal["er", "uniform", "uniform-dense-output"] = "er"
    """how the sparsity is distributed over the layers of a module"""
    growth: Literal["rigl", "set"] = "rigl"
    """connections grow where the gradient is largest (rigl) or at random (set)"""
    topology_update_interval: int = 1000
    """a module's updates between changes of its topology"""
    drop_fraction: float = 0.5
    """share of the connections replaced at the first topology update, decays to 0 (eq. 1)"""
    schedule_start: float | None = None
    """start of the sparsity schedule (eq. 2) as a share of training (default: 0.2 for d2s, 0 for s2d)"""
    schedule_end: float | None = None
    """end of the sparsity schedule as a share of training (default: 0.8 for d2s, 1 for s2d)"""


# COMMON TO ALL SCRIPTS: environment. dm_control tasks and Gymnasium ids, actions in [-1, 1], flat float32 observations
def choose_mujoco_gl(env_id: str, render: bool) -> None:
    """Set MUJOCO_GL, unless it is set. MuJoCo reads it at its first import, so one choice holds for the whole process.

    Without rendering: `disable`, which is silent on a headless machine. With it: the first of egl (GPU or Mesa), osmesa
    (CPU) and glfw (a desktop) that draws a picture in a child process, for a backend that imports need not work.
    """
    render = render or env_id == "quadruped-escape"  # the task's terrain needs an OpenGL context even to reset
    chosen = os.environ.get("MUJOCO_GL")
    if chosen is None and not render:
        os.environ["MUJOCO_GL"] = "disable"
    if not render or chosen not in (None, "disable", "disabled", "off", "false", "0"):
        return
    if chosen is not None:
        raise ValueError(f"{env_id} has to render, but MUJOCO_GL={chosen}: unset it, or render from the first make_env")
    draw = "import mujoco as m; m.Renderer(m.MjModel.from_xml_string('<mujoco/>'), 8, 8).render()"
    for backend in ("egl", "osmesa", "glfw"):
        environ = {**os.environ, "MUJOCO_GL": backend}
        child = subprocess.run([sys.executable, "-c", draw], env=environ, capture_output=True, check=False)
        if child.returncode == 0:
            os.environ["MUJOCO_GL"] = backend
            return
    raise RuntimeError("no OpenGL to render with: apt-get install libegl1 libgl1-mesa-dri (or libosmesa6) on Debian")


class DMControl(gym.Env):
    """A dm_control task; one `step` is one agent step, `action_repeat` steps of the task with their rewards summed.

    Observation: float32, shape (S,), the task's observations in the order of its spec. Action: shape (A,), in [-1, 1].
    """

    def __init__(self, domain: str, task: str, seed: int, action_repeat: int):
        from dm_control import suite  # only now, see choose_mujoco_gl

        self.dmc = suite.load(domain, task, task_kwargs={"random": seed})  # lqr draws its model from the seed
        self.action_repeat = action_repeat
        self.render_mode = "rgb_array"
        size = sum(int(np.prod(spec.shape)) for spec in self.dmc.observation_spec().values())
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        spec = self.dmc.action_spec()
        self.action_space = gym.spaces.Box(-1, 1, spec.shape, np.float32)
        self.low, self.scale = spec.minimum, (spec.maximum - spec.minimum) / 2
        # lqr's actions have no limits (+-1e10 in its spec): they are taken as they are, like those already in [-1, 1]
        self.rescale = not np.all((self.low == -1) & (self.scale == 1) | (self.scale > 1e9))
        # dm_control would observe after every repeated step: instead, we do after the last. This changes no bit.
        self.get_observation = self.dmc.task.get_observation
        self.dmc.task.get_observation = lambda physics: None

    def observe(self):
        values = self.get_observation(self.dmc.physics).values()
        return np.concatenate(list(values), axis=None, dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Start an episode that is a function of its seed alone (and of the seed at loading), whatever came before."""
        super().reset(seed=seed)
        if seed is not None:
            self.dmc.task.random.seed(seed)
        self.dmc.reset()
        return self.observe(), {}

    def step(self, action: np.ndarray):
        if self.rescale:
            action = self.low + (action + 1.0) * self.scale
        total_reward = 0.0
        for _ in range(self.action_repeat):
            step = self.dmc.step(action)
            total_reward += step.reward
            if step.last():
                break
        terminated = step.last() and step.discount == 0.0  # the suite's episodes are cut off, only lqr's can terminate
        return self.observe(), total_reward, terminated, step.last() and not terminated, {}

    def render(self) -> np.ndarray:
        """Return the picture of the task's first camera: (480, 480, 3), uint8."""
        return self.dmc.physics.render(480, 480, camera_id=0)

    def close(self):
        self.dmc.physics.free()


class ActionRepeat(gym.Wrapper):
    """Repeat every action, up to the end of the episode, and sum the rewards."""

    def __init__(self, env: gym.Env, action_repeat: int):
        super().__init__(env)
        self.action_repeat = action_repeat

    def step(self, action: np.ndarray):
        total_reward = 0.0
        for _ in range(self.action_repeat):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total_reward += reward
            if terminated or truncated:
                break
        return obs, total_reward, terminated, truncated, info


def make_env(env_id: str, seed: int, action_repeat: int | None = None, render: bool = False) -> gym.Env:
    """Make a dm_control task (`dog-run`; action repeat 2) or Gymnasium environment (`HalfCheetah-v5`; action repeat 1).

    Observations are float32, shape (S,); actions shape (A,), in [-1, 1]. `render` allows `env.render()`.
    ValueError for an unknown environment, and for spaces that these algorithms cannot handle.
    """
    choose_mujoco_gl(env_id, render)
    if ":" in env_id or env_id in gym.registry:  # "package:Name-v0" imports the package, which registers the name
        try:
            env = gym.make(env_id, disable_env_checker=True, **({"render_mode": "rgb_array"} if render else {}))
            if render:  # what it renders with may not be installed: notice it now
                env.reset()
                env.render()
        except (gym.error.Error, ImportError) as error:
            raise ValueError(f"{env_id} cannot be made: {str(error).splitlines()[0]}") from error
        actions = env.action_space
        if not (isinstance(actions, gym.spaces.Box) and actions.is_bounded() and len(actions.shape) == 1):
            raise ValueError(f"{env_id} has actions {actions}: choose one with a bounded, flat Box of actions")
        if not env.observation_space.is_np_flattenable:
            raise ValueError(f"{env_id} has observations {env.observation_space}: choose one with a Box of them")
        raw, flatten = env.observation_space, gym.spaces.flatten
        space = gym.spaces.Box(-np.inf, np.inf, gym.spaces.flatten_space(raw).shape, np.float32)
        env = ActionRepeat(env, action_repeat or 1)
        env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
        env = gym.wrappers.TransformObservation(env, lambda obs: flatten(raw, obs).astype(np.float32), space)
    else:
        from dm_control import suite

        tasks = ["-".join(task) for task in suite.ALL_TASKS]
        if env_id not in tasks:
            near = difflib.get_close_matches(env_id, [*tasks, *gym.registry], n=4)
            hint = f"did you mean {', '.join(near)}?" if near else "try dog-run or HalfCheetah-v5"
            raise ValueError(f"{env_id} is neither a dm_control task nor a Gymnasium environment: {hint}")
        domain, task = env_id.split("-", 1)
        env = DMControl(domain, task, seed, action_repeat or 2)
        if domain == "lqr":  # the only tasks without a time limit
            env = gym.wrappers.TimeLimit(env, 1000 // env.action_repeat)
    env.action_space.seed(seed)
    return env


def replay_episode(env: gym.Env, seed: int, actions) -> np.ndarray:
    """Return to the state after `actions` (T, A) in the episode of `seed`; give its observation (S,), the same bits.

    So a checkpoint needs no simulator state. An environment that keeps something across resets (of those tried, only
    BipedalWalker-v3 does) comes back slightly different: compare the observation with the one that was saved.
    """
    obs, _ = env.reset(seed=seed)
    for action in actions:
        obs, _, _, _, _ = env.step(action)
    return obs


class Batch(NamedTuple):
    """Windows of `horizon` steps. After a termination the window stays on the terminal observation."""

    obs: torch.Tensor  # (batch, horizon + 1, obs_dim)
    action: torch.Tensor  # (batch, horizon, action_dim)
    reward: torch.Tensor  # (batch, horizon), 0 after a termination
    terminated: torch.Tensor  # (batch, horizon), 1 where the step ended in a termination
    index: torch.Tensor  # (batch,) slots where the windows start


class ReplayBuffer:
    """Ring buffer of time steps with LAP sampling (Fujimoto et al. 2020): P(start) is proportional to its priority.

    An episode of T steps fills T + 1 slots: each holds an observation and the action, reward and termination that
    followed it; the last one holds the final observation alone. A start has priority 0, and is never sampled, until its
    `horizon` steps are stored or have ended in a termination. The last starts of a truncated episode stay at 0.
    """

    ROW = 128  # priorities are summed row by row in float64, so that sampling stays exact and fast at any size

    def __init__(
        self, capacity: int, obs_dim: int, action_dim: int, horizon: int, seed: int, device: torch.device | str = "cpu"
    ):
        self.capacity, self.horizon, self.device = capacity, horizon, torch.device(device)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.slots = torch.zeros(capacity, obs_dim + action_dim + 3, device=device)
        self.obs, self.action, rest = self.slots.split([obs_dim, action_dim, 3], 1)
        self.reward, self.terminated, self.is_transition = rest.unbind(1)
        n_rows = math.ceil(capacity / self.ROW)
        self.priority = torch.zeros(n_rows * self.ROW, device=device)
        self.row_total = torch.zeros(n_rows, dtype=torch.float64, device=device)
        self.row_max = torch.zeros(n_rows, device=device)
        self.any_terminated = torch.zeros((), device=device)  # 1 once a termination was ever stored
        self.position = -1  # slot of the newest observation
        self.size = 0  # slots in use
        self.episode_length = 0

    @staticmethod
    def nbytes(capacity: int, obs_dim: int, action_dim: int) -> int:
        """Memory of a buffer in bytes."""
        return capacity * 4 * (obs_dim + action_dim + 4)

    def start_episode(self, obs: np.ndarray) -> None:
        """Store the first observation of an episode."""
        self._append(obs, [])
        self.episode_length = 0

    def add(self, action: np.ndarray, reward: float, next_obs: np.ndarray, terminated: bool) -> None:
        """Store the step taken from the newest observation, and the observation it led to."""
        step = np.concatenate([action, [reward, terminated, 1]], dtype=np.float32)
        self.slots[self.position, -len(step) :] = torch.from_numpy(step)
        self.episode_length += 1
        new_starts = [self.horizon] if self.episode_length >= self.horizon else []  # as steps back from next_obs
        if terminated:
            self.any_terminated.fill_(1)
            new_starts = range(1, min(self.episode_length, self.horizon) + 1)
        self._append(next_obs, new_starts)

    def _append(self, obs: np.ndarray, new_starts: list[int] | range) -> None:
        """Store an observation in the next slot and forget what that held; new starts get the largest priority."""
        self.position = (self.position + 1) % self.capacity
        self.size = min(self.size + 1, self.capacity)
        self.slots[self.position] = F.pad(torch.from_numpy(obs), (0, self.slots.shape[1] - len(obs)))
        starts = [(self.position - back) % self.capacity for back in new_starts]
        index = torch.tensor([self.position, *starts], device=self.device)
        self.update_priority(index, (index != self.position) * self.row_max.max().clamp(min=1))

    def sample_index(self, batch_size: int) -> torch.Tensor:
        """Draw starts with replacement, (batch,). Row first, then slot within the row.

        `u < 1` in float64 keeps `u * total < total`, so no index is past the end and none has priority 0.
        """
        row_total = self.row_total.cumsum(0)
        u = torch.rand(2, batch_size, 1, dtype=torch.float64, generator=self.generator, device=self.device)
        row = torch.searchsorted(row_total, u[0, :, 0] * row_total[-1], right=True)
        total = self.priority.view(-1, self.ROW)[row].double().cumsum(1)  # (batch, ROW)
        column = torch.searchsorted(total, u[1] * total[:, -1:], right=True)
        return row * self.ROW + column[:, 0]

    def windows(self, index: torch.Tensor) -> Batch:
        """The windows that start at `index` (batch,)."""
        step = torch.arange(self.horizon, device=self.device)
        alive = (1 - self.terminated[(index[:, None] + step) % self.capacity]).cumprod(1)  # after each step
        offset = F.pad(alive, (2, 0), value=1)[:, :-1].cumsum(1).long() - 1  # 0, 1, ... until the terminal observation
        slot = (index[:, None] + offset) % self.capacity  # (batch, horizon + 1)
        slots = self.slots.index_select(0, slot.flatten()).view(*slot.shape, -1)
        obs, action, rest = slots.split([self.obs.shape[1], self.action.shape[1], 3], 2)
        return Batch(obs, action[:, :-1], rest[:, :-1, 0], rest[:, :-1, 1], index)

    def sample(self, batch_size: int, device: torch.device | str) -> Batch:
        return Batch(*(x.to(device) for x in self.windows(self.sample_index(batch_size))))

    def update_priority(self, index: torch.Tensor, priority: torch.Tensor) -> None:
        """Set priorities (batch,) at `index` (batch,). Of several for one slot, the largest."""
        index, priority = index.to(self.device), priority.to(self.device)
        self.priority.scatter_reduce_(0, index, priority, "amax", include_self=False)
        row = index // self.ROW
        rows = self.priority.view(-1, self.ROW)[row]  # (batch, ROW)
        self.row_total[row] = rows.sum(1, dtype=torch.float64)
        self.row_max[row] = rows.amax(1)

    def reward_scale(self) -> torch.Tensor:
        """Mean |reward| of the stored transitions, at least 1e-8."""
        return (self.reward.abs().sum() / self.is_transition.sum()).clamp(min=1e-8)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that a checkpoint holds."""
        used = {"slots": self.slots[: self.size], "priority": self.priority[: self.size]}
        return {**used, **{name: getattr(self, name) for name in ("row_total", "row_max", "any_terminated")}}

    def state_dict(self) -> dict:
        # a view would be saved with its whole storage
        tensors = {name: x.clone() if x.shape != getattr(self, name).shape else x for name, x in self.tensors().items()}
        counters = {name: getattr(self, name) for name in ("position", "size", "episode_length")}
        return {**tensors, **counters, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        for name in ("position", "size", "episode_length"):
            setattr(self, name, state[name])
        for name, tensor in self.tensors().items():
            tensor.copy_(state[name])
        self.generator.set_state(state["generator"])


# Updates, eager or as CUDA graphs. An update is a generator function: between a module's gradient and its optimizer
# step it yields the module's name, and there the topology may change. All else stays on the device, in static tensors.
class GraphedUpdate:
    """An update as CUDA graphs, one for each stretch between its yields. A call replays them: the same kernels on the
    same memory, with the next numbers of the random generators."""

    def __init__(self, update: Callable[[], Iterator[str]], generators: list[torch.Generator]):
        self.stretches = []
        pool, steps, name = torch.cuda.graph_pool_handle(), update(), ""
        while name is not None:
            graph = torch.cuda.CUDAGraph()
            for generator in generators:
                graph.register_generator_state(generator)
            with torch.cuda.graph(graph, pool=pool):
                name = next(steps, None)
            self.stretches.append((graph, name))

    def __call__(self) -> Iterator[str]:
        for graph, name in self.stretches:
            graph.replay()
            if name is not None:
                yield name


class Updates:
    """Runs the updates of an agent: eagerly, or as CUDA graphs once every optimizer has its state.

    `off` says why there are no CUDA graphs; it is empty where there are.
    """

    def __init__(self, device: torch.device, cuda_graphs: bool):
        self.off = "CPU" if device.type != "cuda" else "" if cuda_graphs else "--no-cuda-graphs"
        self.graphed: dict[str, GraphedUpdate] = {}

    def run(self, name: str, agent: "Agent", rb: ReplayBuffer) -> None:
        """Run the agent's update of this name, with the topology updates that are due."""
        update = partial(getattr(agent, name), rb)
        if not self.off and name not in self.graphed and all(o.state for o in agent.optimizer.values()):
            try:
                if rb.device.type != agent.device.type:
                    raise RuntimeError("the replay buffer is in main memory")
                self.graphed[name] = self.capture(name, agent, rb)
            except RuntimeError as error:
                cause = error.__context__ or error  # a failed capture has an error of its own at its end
                self.off, self.graphed = f"{cause}".partition("\n")[0], {}
                if torch.cuda.is_available():
                    torch.cuda.set_stream(torch.cuda.default_stream())  # it leaves another one
                print(f"CUDA graphs off: {self.off}", flush=True)
        for module in self.graphed.get(name, update)():
            sparsifier = agent.sparsifier[module]
            gradients = [weight.grad for weight in sparsifier.weights.values()]
            if sparsifier.topology_update_due and not all(gradient.isfinite().all() for gradient in gradients):
                raise FloatingPointError(f"the gradient of the {module} is not finite")
            sparsifier.advance()

    @staticmethod
    def capture(name: str, agent: "Agent", rb: ReplayBuffer) -> GraphedUpdate:
        """Capture an update, and compare a replay with an eager update from the same state, which is then restored.

        RuntimeError if it cannot be captured, or if any tensor differs by more than 1% of its change.
        """
        update, generators = partial(getattr(agent, name), rb), [agent.generator, rb.generator]
        tensors = [rb.priority, rb.row_total, rb.row_max]
        for held in [*vars(agent).values(), *(s for o in agent.optimizer.values() for s in o.state.values())]:
            values = held.state_dict() if isinstance(held, nn.Module) else held
            tensors += [x for x in (values.values() if isinstance(values, dict) else [values]) if torch.is_tensor(x)]
        before, seeds = [x.detach().to("cpu", copy=True) for x in tensors], [g.get_state() for g in generators]

        @torch.no_grad()
        def restore() -> None:
            for x, old in zip(tensors, before, strict=True):
                x.copy_(old)
            for generator, seed in zip(generators, seeds, strict=True):
                generator.set_state(seed)

        try:
            for _ in update():  # leaves the topology and its clock alone
                pass
            eager = [x.detach().to("cpu", copy=True) for x in tensors]
            restore()
            graphed = GraphedUpdate(update, generators)
            for _ in graphed():
                pass
            triples = zip(before, eager, tensors, strict=True)
            errors = [float((x.detach().cpu() - e).norm() / (e - b).norm().clamp(min=1e-30)) for b, e, x in triples]
        finally:
            restore()
        if not all(error <= 0.01 for error in errors):  # NaN is an error too
            raise RuntimeError(f"a replay of {name} differs from an eager update by {max(errors):.2%} of the change")
        print(
            f"CUDA graphs: {name} is captured (a replay differs from an eager update by {max(errors):.4%})", flush=True
        )
        return graphed


def accelerate(agent: "Agent", *losses: str) -> None:
    """Wrap the agent's losses as the flags ask: computed in bfloat16, their operations fused by `torch.compile`."""
    for name in losses:
        if agent.args.bf16:
            setattr(agent, name, torch.autocast(agent.device.type, torch.bfloat16)(getattr(agent, name)))
        if agent.args.compile:
            setattr(agent, name, torch.compile(getattr(agent, name), dynamic=False))


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Compute no gradients of these modules' parameters."""
    for module in modules:
        module.requires_grad_(False)
    try:
        yield
    finally:
        for module in modules:
            module.requires_grad_(True)


# END OF COMMON


# ALGO LOGIC: networks (SimBa)
def he_normal_(weight: torch.Tensor) -> None:
    """Normal of variance 2 / fan_in after truncation, which at two standard deviations leaves 0.8796 of one."""
    std = math.sqrt(2 / weight.shape[1]) / 0.87962566103423978
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def linear(in_dim: int, out_dim: int, weight_init: Callable[[torch.Tensor], object]) -> nn.Linear:
    layer = nn.Linear(in_dim, out_dim)
    weight_init(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Block(nn.Module):
    def __init__(self, hidden_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_dim, eps=1e-6)
        self.linear1 = linear(hidden_dim, 4 * hidden_dim, he_normal_)
        self.relu = nn.ReLU()  # a module, for the hooks of diagnose
        self.linear2 = linear(4 * hidden_dim, hidden_dim, he_normal_)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear2(self.relu(self.linear1(self.norm(x))))


class SimBa(nn.Module):
    """`embed`, pre-LayerNorm residual blocks, `norm`: the features that the heads are linear in."""

    def __init__(self, in_dim: int, hidden_dim: int, num_blocks: int):
        super().__init__()
        self.embed = linear(in_dim, hidden_dim, nn.init.orthogonal_)
        self.blocks = nn.Sequential(*(Block(hidden_dim) for _ in range(num_blocks)))
        self.norm = nn.LayerNorm(hidden_dim, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.blocks(self.embed(x)))


class QNetwork(nn.Module):
    def __init__(self, obs_dim: int, action_dim: int, hidden_dim: int, num_blocks: int):
        super().__init__()
        self.trunk = SimBa(obs_dim + action_dim, hidden_dim, num_blocks)
        self.value = linear(hidden_dim, 1, nn.init.orthogonal_)

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return self.value(self.trunk(torch.cat([obs, action], 1))).to(obs.dtype)  # not in bfloat16 under --bf16


class Critic(nn.Module):
    """One Q-function, or two for clipped double Q-learning."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_dim: int, num_blocks: int, twin: bool = False):
        super().__init__()
        self.q = nn.ModuleList(QNetwork(obs_dim, action_dim, hidden_dim, num_blocks) for _ in range(1 + twin))

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return torch.cat([q(obs, action) for q in self.q], 1)  # (batch, 1 or 2)


class Actor(nn.Module):
    """A tanh-Gaussian policy: its network gives mean and log standard deviation before the tanh."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_dim: int, num_blocks: int):
        super().__init__()
        self.action_dim = action_dim
        self.trunk = SimBa(obs_dim, hidden_dim, num_blocks)
        self.mean = linear(hidden_dim, action_dim, nn.init.orthogonal_)
        self.log_std = linear(hidden_dim, action_dim, nn.init.orthogonal_)

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.trunk(obs)
        mean, raw = self.mean(features).to(obs.dtype), self.log_std(features).to(obs.dtype)
        return mean, -10 + 6 * (1 + torch.tanh(raw))  # log standard deviation in [-10, 2]

    def sample(self, obs: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Actions (batch, action_dim) from standard normal noise, and their log-density (batch,)."""
        mean, log_std = self(obs)
        x = mean + log_std.exp() * noise
        gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        log_prob = gaussian - 2 * (math.log(2) - x - F.softplus(-2 * x))  # minus log of tanh's derivative
        return torch.tanh(x), log_prob.sum(1)


class RunningNorm(nn.Module):
    """Normalise observations by the mean and variance of those seen so far, which are kept in float64."""

    def __init__(self, obs_dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(obs_dim, dtype=torch.float64))
        self.register_buffer("var", torch.ones(obs_dim, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(1e-4, dtype=torch.float64))

    def update(self, obs: torch.Tensor) -> None:
        """Take in one observation (obs_dim,): Chan et al. 1979 with a batch of one."""
        delta, total = obs - self.mean, self.count + 1
        self.var.copy_((self.var + delta.square() / total) * (self.count / total))
        self.mean += delta / total
        self.count.copy_(total)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return ((obs - self.mean) / torch.sqrt(self.var + 1e-8)).to(obs.dtype)


def make_networks(args: Args, obs_dim: int, action_dim: int) -> tuple[Critic, Actor]:
    def width(module: str, base: int) -> int:
        return max(1, round(base * module_scale(args, module, "width")))

    def depth(module: str, base: int) -> int:
        return max(1, round(base * module_scale(args, module, "depth")))

    return (
        Critic(obs_dim, action_dim, width("critic", 512), depth("critic", 2), bool(args.clipped_double_q)),
        Actor(obs_dim, action_dim, width("actor", 128), depth("actor", 1)),
    )


def module_scale(args: Args, module: str, kind: str) -> float:
    """`kind` is "width" or "depth": the most specific scale that was given."""
    for name in (f"{module}_{kind}_scale", f"{module}_scale", f"{kind}_scale"):
        if getattr(args, name) is not None:
            return getattr(args, name)
    return args.scale


MODULES = ("critic", "actor")
ACTING = ("actor", "normalizer")  # what Agent.act depends on


# ALGO LOGIC: one update of each module
class Agent:
    """Critic with its target, actor, their optimizers and sparsifiers, temperature, and the observations' statistics.

    Updates change tensors in place, and wait for the device at topology updates only.
    `training_updates` is the planned number of updates of each module, which the schedules of eqs. 1 and 2 run over.
    """

    def __init__(self, args: Args, critic: Critic, actor: Actor, training_updates: int, generator: torch.Generator):
        self.args, self.generator, self.device = args, generator, generator.device
        self.updates = Updates(self.device, args.cuda_graphs)
        self.horizon = 1  # of the replay buffer's windows
        self.critic, self.actor = critic, actor
        like = next(actor.parameters())
        self.normalizer = RunningNorm(actor.trunk.embed.in_features).to(self.device)
        self.log_temp = nn.Parameter(like.new_tensor(args.initial_temperature).log())
        self.target_entropy = -0.5 * actor.action_dim if args.target_entropy is None else args.target_entropy
        self.metrics: dict[str, torch.Tensor] = {}  # of the last updates

        self.optimizer: dict[str, optim.Optimizer] = {}
        self.sparsifier: dict[str, Sparsifier] = {}
        for i, name in enumerate(MODULES):
            module, lr = getattr(self, name), getattr(args, f"{name}_lr")
            self.optimizer[name] = optim.AdamW(
                module.parameters(),
                lr,
                weight_decay=args.weight_decay,
                fused=True,
                capturable=self.device.type == "cuda",
            )
            self.sparsifier[name] = Sparsifier(
                module,
                self.optimizer[name],
                getattr(args, f"{name}_regime"),
                getattr(args, f"{name}_sparsity"),
                distribution=args.distribution,
                growth=args.growth,
                update_interval=args.topology_update_interval,
                drop_fraction=args.drop_fraction,
                total_updates=max(training_updates, 1),
                schedule_start=args.schedule_start,
                schedule_end=args.schedule_end,
                seed=2 * args.seed + i,
            )
        self.optimizer["temperature"] = optim.AdamW(
            [self.log_temp], args.temperature_lr, weight_decay=0, fused=True, capturable=self.device.type == "cuda"
        )
        self.critic_target = copy.deepcopy(critic).requires_grad_(False)
        accelerate(self, "critic_loss", "actor_loss")

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """Actions without noise in [-1, 1], (batch, action_dim), at observations (batch, obs_dim)."""
        obs = self.normalizer(torch.as_tensor(obs, device=self.device))
        action = self.actor(obs)[0].tanh().cpu().numpy()
        if not np.isfinite(action).all():
            raise FloatingPointError("an action of the actor is not finite")
        return action

    @torch.no_grad()
    def explore(self, obs: np.ndarray, uniform: bool, generator: torch.Generator) -> torch.Tensor:
        """One action (action_dim,) at obs (obs_dim,): uniformly random, or sampled from the policy. Counts obs in."""
        obs = torch.as_tensor(obs, device=self.device)
        self.normalizer.update(obs)
        if uniform:
            return torch.rand(self.actor.action_dim, generator=generator) * 2 - 1
        noise = torch.randn(1, self.actor.action_dim, generator=generator).to(obs)
        action = self.actor.sample(self.normalizer(obs[None]), noise)[0][0].cpu()
        if not action.isfinite().all():
            raise FloatingPointError("an action of the actor is not finite")
        return action

    def train_step(self, rb: ReplayBuffer, stopped: Callable[[], bool]) -> bool:
        """The updates of one agent step.

        Returns False if it was stopped between them; the next call goes on with them.
        """
        sparsifier = self.sparsifier["critic"]
        while True:
            topology_updates = sparsifier.topology_updates
            self.updates.run("update_critic_and_actor", self, rb)
            if sparsifier.topology_updates > topology_updates:  # what the critic drops, its target drops as well
                sparsifier.apply_to(self.critic_target)
            if sparsifier.updates % self.args.updates_per_step == 0:
                return True
            if stopped():
                return False

    @torch.no_grad()
    def update_target(self) -> None:
        """Polyak averaging. A weight that is 0 in the critic and was 0 in its target stays exactly 0."""
        target, online = list(self.critic_target.parameters()), list(self.critic.parameters())
        torch._foreach_lerp_(target, online, self.args.tau)

    def optimize(self, name: str, loss: torch.Tensor) -> Generator[str, None, torch.Tensor]:
        """Minimise the module's loss: gradient, topology update if due, masking, step.

        Returns the norm of the gradient after masking.
        """
        parameters = list(getattr(self, name).parameters())
        self.optimizer[name].zero_grad()
        loss.backward()
        yield name  # to Updates.run, for the topology update
        self.sparsifier[name].mask_gradients()
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        self.optimizer[name].step()
        return norm

    def update_critic_and_actor(self, rb: ReplayBuffer) -> Iterator[str]:
        """One update of actor, temperature, critic and target, in this order and each with what is new by then."""
        batch = rb.sample(self.args.batch_size, self.device)
        obs, next_obs = self.normalizer(batch.obs).unbind(1)

        temperature = self.log_temp.detach().exp()
        with frozen(self.critic):
            actor_loss, log_prob = self.actor_loss(obs, temperature, self.noise(batch))
        actor_grad_norm = yield from self.optimize("actor", actor_loss)

        entropy = -log_prob.detach().mean()
        temperature_loss = self.log_temp.exp() * (entropy - self.target_entropy)
        self.optimizer["temperature"].zero_grad()
        temperature_loss.backward()
        self.optimizer["temperature"].step()

        critic_loss, q, q_target = self.critic_loss(obs, next_obs, batch, self.noise(batch))
        critic_grad_norm = yield from self.optimize("critic", critic_loss)
        self.update_target()

        self.metrics |= {
            "losses/critic_loss": critic_loss.detach(),
            "losses/actor_loss": actor_loss.detach(),
            "losses/q_values": q.detach().mean(),
            "losses/td_error": (q.detach() - q_target[:, None]).abs().max(1).values.mean(),
            "losses/entropy": entropy,
            "losses/temperature": temperature,
            "losses/temperature_loss": temperature_loss.detach(),
            "plasticity/critic_grad_norm": critic_grad_norm,
            "plasticity/actor_grad_norm": actor_grad_norm,
        }

    def actor_loss(self, obs: torch.Tensor, temperature: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The loss, and the log-density (batch,) of the sampled actions."""
        action, log_prob = self.actor.sample(obs, noise)
        return (temperature * log_prob - self.critic(obs, action).min(1).values).mean(), log_prob

    def critic_loss(
        self, obs: torch.Tensor, next_obs: torch.Tensor, batch: Batch, noise: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """The loss, Q (batch, 1 or 2) and its target (batch,). Observations are normalised."""
        action, reward, not_done = batch.action[:, 0], batch.reward[:, 0], 1 - batch.terminated[:, 0]
        with torch.no_grad():
            next_action, next_log_prob = self.actor.sample(next_obs, noise)
            next_q = self.critic_target(next_obs, next_action).min(1).values
            next_q -= self.log_temp.exp() * next_log_prob
            q_target = reward + self.args.gamma * not_done * next_q
        q = self.critic(obs, action)
        return (q - q_target[:, None]).square().sum(1).mean(), q, q_target

    def noise(self, batch: Batch) -> torch.Tensor:
        """Standard normal, (batch, action_dim)."""
        return torch.empty_like(batch.action[:, 0]).normal_(generator=self.generator)

    def state_dict(self) -> dict:
        """Everything that training goes on from, as tensors and plain values."""
        modules = [*MODULES, "critic_target", "normalizer"]
        return {
            "modules": {name: getattr(self, name).state_dict() for name in modules},
            "log_temp": self.log_temp.detach(),
            "optimizer": {name: optimizer.state_dict() for name, optimizer in self.optimizer.items()},
            "sparsifier": {name: sparsifier.state_dict() for name, sparsifier in self.sparsifier.items()},
            "generator": self.generator.get_state(),
            "metrics": self.metrics,
        }

    def policy_state_dict(self) -> dict:
        """Weights and masks of the trained modules, and the observations' statistics."""
        return {
            "modules": {name: getattr(self, name).state_dict() for name in (*MODULES, "normalizer")},
            "masks": {name: sparsifier.masks for name, sparsifier in self.sparsifier.items()},
        }

    def load_policy_state_dict(self, state: dict) -> None:
        for name in (*MODULES, "normalizer"):
            getattr(self, name).load_state_dict(state["modules"][name])

    def load_state_dict(self, state: dict) -> None:
        for name, module_state in state["modules"].items():
            getattr(self, name).load_state_dict(module_state)
        self.log_temp.data.copy_(state["log_temp"])
        for name, optimizer in self.optimizer.items():
            optimizer.load_state_dict(state["optimizer"][name])
        for name, sparsifier in self.sparsifier.items():
            sparsifier.load_state_dict(state["sparsifier"][name])
        self.metrics = {name: value.to(self.device) for name, value in state["metrics"].items()}
        self.generator.set_state(state["generator"])


def make_agent(args: Args, obs_dim: int, action_dim: int, device: torch.device) -> Agent:
    fill_in(args)
    torch.manual_seed(args.seed)
    networks = (module.to(device) for module in make_networks(args, obs_dim, action_dim))
    training_steps = max(args.total_timesteps - args.learning_starts + 1, 0)  # the first follows the last random one
    training_updates = args.updates_per_step * training_steps
    return Agent(args, *networks, training_updates, torch.Generator(device).manual_seed(args.seed))


def fill_in(args: Args) -> None:
    """Replace each None by what it stands for in this environment, so that `config.json` records it."""
    on_gymnasium = ":" in args.env_id or args.env_id in gym.registry  # as in make_env
    time_limit, action_repeat = 1000, args.action_repeat or 2  # of every task of dm_control
    if on_gymnasium:
        spec = gym.registry.get(args.env_id.split(":")[-1])
        time_limit, action_repeat = spec and spec.max_episode_steps or math.inf, args.action_repeat or 1
    if args.gamma is None:
        args.gamma = min(max(1 - 5 * action_repeat / time_limit, 0.95), 0.995)
    if args.clipped_double_q is None:
        args.clipped_double_q = on_gymnasium


@torch.no_grad()
def diagnose(agent: Agent, rb: ReplayBuffer, seed: int) -> dict[str, float]:
    """Pathologies of each module on 256 uniformly drawn transitions (section 3, Figs. 3, 7 and 10).

    srank (Kumar et al. 2021) of the features, the input of the heads (of two critics side by side). Dormant ratio
    (Sokar et al. 2023) of the hidden units of all blocks.
    """
    starts = rb.priority.nonzero()[:, 0]
    if len(starts) == 0:
        return {}
    generator = torch.Generator().manual_seed(seed)
    batch = rb.windows(starts[torch.randint(len(starts), (256,), generator=generator).to(starts.device)])
    obs, action = (x[:, 0].to(agent.device) for x in (batch.obs, batch.action))
    outputs = {(name, kind): [] for name in MODULES for kind in (nn.ReLU, SimBa)}
    hooks = [
        layer.register_forward_hook(lambda layer, inputs, output, name=name: outputs[name, type(layer)].append(output))
        for name in MODULES
        for layer in getattr(agent, name).modules()
        if isinstance(layer, (nn.ReLU, SimBa))
    ]
    obs = agent.normalizer(obs)
    agent.critic(obs, action), agent.actor(obs)
    for hook in hooks:
        hook.remove()

    metrics = {}
    for name in MODULES:
        hidden, features = outputs[name, nn.ReLU], torch.cat(outputs[name, SimBa], 1)
        if not features.isfinite().all():
            raise FloatingPointError(f"a feature of the {name} is not finite")
        metrics |= {
            f"plasticity/{name}_srank": stable_rank(features),
            f"plasticity/{name}_dormant_ratio": dormant_ratio(hidden, tau=0.1),
            f"plasticity/{name}_dormant_ratio_0.025": dormant_ratio(hidden, tau=0.025),
            f"plasticity/{name}_weight_norm": nn.utils.get_total_norm(getattr(agent, name).parameters()).item(),
            f"plasticity/{name}_feature_norm": features.norm(dim=1).mean().item(),
        }
    return metrics


def print_table(args: Args, agent: Agent, rb: ReplayBuffer) -> None:
    print(f"{'module':<10}{'width':>7}{'blocks':>7}{'regime':>8}{'parameters':>14}{'active':>14}{'sparsity':>10}")
    total = total_active = 0
    for name in MODULES:
        module, sparsifier = getattr(agent, name), agent.sparsifier[name]
        trunk = next(layer for layer in module.modules() if isinstance(layer, SimBa))
        parameters = sum(p.numel() for p in module.parameters())
        active = parameters - sum(int((~mask).sum()) for mask in sparsifier.masks.values())
        width, blocks, regime = trunk.embed.out_features, len(trunk.blocks), getattr(args, f"{name}_regime")
        print(f"{name:<10}{width:>7}{blocks:>7}{regime:>8}{parameters:>14,}{active:>14,}{sparsifier.sparsity():>10.4f}")
        total, total_active = total + parameters, total_active + active
    print(f"{'agent':<10}{'':>22}{total:>14,}{total_active:>14,}")
    print(f"{'two critics' if args.clipped_double_q else 'one critic'}, discount factor {args.gamma:g}")
    gib = ReplayBuffer.nbytes(rb.capacity, rb.obs.shape[1], rb.action.shape[1]) / 2**30
    print(f"replay buffer {rb.capacity:,} steps, {gib:.2f} GiB on {rb.device}; training on {agent.device}")


def validate(args: Args) -> None:
    """Stop with exit code 2 at the first argument out of range."""
    positive = (
        "total_timesteps", "eval_interval", "eval_episodes", "log_interval", "checkpoint_interval", "batch_size",
        "updates_per_step", "topology_update_interval", "learning_starts",
    )  # fmt: skip
    not_negative = ("seed", "eval_workers", "weight_decay", "temperature_lr")
    ranges = dict.fromkeys(positive, (1, math.inf)) | dict.fromkeys(not_negative, (0, math.inf))
    ranges |= dict.fromkeys(("gamma", "tau", "drop_fraction", "schedule_start", "schedule_end"), (0, 1))
    ranges |= {f"{name}_lr": (1e-12, math.inf) for name in MODULES}
    ranges |= {f"{name}_sparsity": (0, 1 - 1e-9) for name in MODULES}
    ranges |= {name: (1e-3, 1e3) for name in asdict(args) if name.endswith("scale")}
    ranges |= {"action_repeat": (1, math.inf), "buffer_size": (args.learning_starts + 1, math.inf)}
    ranges |= {"initial_temperature": (1e-12, math.inf), "target_entropy": (-math.inf, math.inf)}
    for name, (low, high) in ranges.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            fail(f"--{name.replace('_', '-')} {value} is out of range: choose a value from {low:g} to {high:g}", 2)
    if args.cuda and not torch.cuda.is_available():
        fail("--cuda was given but torch sees no GPU: install a CUDA build of torch, or train with --no-cuda", 2)
    if args.compile and not shutil.which(os.environ.get("CXX", "g++")):
        fail("--compile needs a C++ compiler: install g++, or name another in CXX", 2)
    if args.track:
        try:
            import wandb  # noqa: F401
        except ImportError:
            fail("--track needs wandb: pip install wandb", 2)
    if args.capture_video:
        try:
            import imageio_ffmpeg  # noqa: F401
        except ImportError:
            fail("--capture-video needs imageio: pip install 'imageio[ffmpeg]'", 2)


# COMMON TO ALL SCRIPTS: evaluation, with episode seeds and environments of its own so that it never moves the training
def episode_seed(*key: int) -> int:
    """The seed of an episode, from the run's seed and the episode's place in the run."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def step_environments(pipe, inherited: list, make: Callable[[int], gym.Env], indices: list[int]) -> None:
    """A worker process: calls methods of its environments for the trainer, until that closes the pipe or dies."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # also sent to the trainer, which decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for trainers_end in inherited:
        trainers_end.close()
    envs = {i: make(i) for i in indices}
    with suppress(EOFError, ConnectionError):
        while True:
            method, arguments = pipe.recv()
            pipe.send({i: getattr(envs[i], method)(**keywords) for i, keywords in arguments.items()})


class EvaluationEnvs:
    """`count` environments that are stepped side by side, in worker processes or (`workers=0`) in this one."""

    def __init__(self, make: Callable[[int], gym.Env], count: int, workers: int):
        self.count, self.pipes = count, []
        self.groups = np.array_split(range(count), workers) if workers else []
        self.envs = {} if workers else {i: make(i) for i in range(count)}
        for group in self.groups:
            here, there = multiprocessing.Pipe()
            self.pipes.append(here)
            context = multiprocessing.get_context("fork")  # shares this process's memory, and starts at once
            context.Process(target=step_environments, args=(there, self.pipes, make, group), daemon=True).start()
            there.close()

    def call(self, method: str, arguments: dict[int, dict]) -> None:
        """Call a method of the environments that have keyword arguments here. `results()` has to follow."""
        self.here = {i: getattr(env, method)(**arguments[i]) for i, env in self.envs.items() if i in arguments}
        for pipe, group in zip(self.pipes, self.groups, strict=True):
            pipe.send((method, {i: arguments[i] for i in group if i in arguments}))

    def results(self) -> dict:
        """What the last call returned, by environment. Waits for the workers."""
        return self.here | {i: value for pipe in self.pipes for i, value in pipe.recv().items()}


class WorkerDied(Exception):
    """A worker process of the evaluation ended before its environments were done; it printed why, if it could."""


def evaluate(
    agent: Agent, envs: EvaluationEnvs, seeds: list[int], frames: list | None = None
) -> Iterator[np.ndarray | None]:
    """Play one episode per environment, side by side and without noise. Yields None while they step, at last the
    returns, (count,). The pictures of the first episode are appended to `frames`, if given.
    """
    try:
        envs.call("reset", {i: {"seed": seed} for i, seed in enumerate(seeds)})
        yield None
        resets = envs.results()
        obs = np.stack([resets[i][0] for i in range(envs.count)])
        returns, running = np.zeros(envs.count), np.ones(envs.count, bool)
        while running.any():
            if frames is not None and running[0]:
                frames.append(envs.envs[0].render())
            actions = agent.act(obs)
            envs.call("step", {i: {"action": actions[i]} for i in np.flatnonzero(running)})
            yield None
            for i, (next_obs, reward, terminated, truncated, _) in envs.results().items():
                obs[i] = next_obs
                returns[i] += reward
                running[i] = not (terminated or truncated)
        yield returns
    except (EOFError, ConnectionError) as error:
        raise WorkerDied("a worker process of the evaluation died; --eval-workers 0 does without them") from error


class Evaluation:
    """An evaluation of a copy of the agent as it was at `agent_step`. Each `next(steps)` plays a step of all episodes.

    So training can go on meanwhile. A resumed run starts the evaluation anew, with the same returns.
    """

    def __init__(
        self, agent: Agent, envs: EvaluationEnvs, agent_step: int, wall_seconds: float, scalars: dict[str, float]
    ):
        self.agent_step, self.wall_seconds, self.scalars = agent_step, wall_seconds, scalars
        self.agent = copy.copy(agent)
        for name in ACTING:
            setattr(self.agent, name, copy.deepcopy(getattr(agent, name)))
        self.frames = [] if agent.args.capture_video else None
        seeds = [episode_seed(agent.args.seed, 1, agent_step, i) for i in range(envs.count)]
        self.steps = evaluate(self.agent, envs, seeds, self.frames)

    def state_dict(self) -> dict:
        values = {name: getattr(self, name) for name in ("agent_step", "wall_seconds", "scalars")}
        return {**values, "modules": {name: getattr(self.agent, name).state_dict() for name in ACTING}}


# Checkpoints and run directory
RESUME_ME = 75  # EX_TEMPFAIL: stopped by a signal with a checkpoint, start the same command again


def fail(message: str, code: int = 1) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def save(path: Path, content: dict) -> None:
    """Write to a temporary file, sync and rename: `path` holds the old or the new content, never a part of it."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        torch.save(content, temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch raises a RuntimeError when it cannot write
        temporary.unlink(missing_ok=True)
        fail(f"cannot write {path} ({error}); free some space and start the same command again to go on")


def load(path: Path, *keys: str) -> dict:
    """Read tensors and plain values; a file can hold nothing else, so opening it runs no code."""
    try:
        with zipfile.ZipFile(path) as file:  # torch.load does not compare the checksums that torch.save wrote
            if broken := file.testzip():
                raise ValueError(f"the checksum of {broken} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or not content.keys() >= set(keys):
            raise ValueError(f"it lacks {', '.join(keys)}")
        return content
    except Exception as error:  # zip, pickle and torch have many ways to say that a file is broken
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        fail(f"cannot load {path}, it is damaged or not ours ({reason}); restore a copy, or delete it to start anew")


def open_run(args: Args) -> tuple[Path, dict | None]:
    """Create the run directory, or return it with its last checkpoint. Refuses a run with other arguments.

    What was logged after the checkpoint is cut off: the resumed run logs it again, bit for bit the same on CPU.
    """
    run_dir = Path(args.runs_dir) / f"{args.env_id.replace('/', '-')}__{args.exp_name}__{args.seed}"
    config_path, checkpoint_path = run_dir / "config.json", run_dir / "checkpoint.pt"
    arguments = asdict(args)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = os.open(run_dir / ".lock", os.O_WRONLY | os.O_CREAT, 0o644)  # never closed: held until the process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"{run_dir} is being trained by another process; wait for it, or choose another --exp-name or --seed")
        except OSError:  # a file system without locks
            pass
        if config_path.exists():
            previous = json.loads(config_path.read_text())["args"]
            names = [name for name in previous | arguments if previous.get(name) != arguments.get(name)]
            free = ("runs_dir", "eval_workers", "cuda_graphs")  # where a run lies, and how fast it goes
            names = [name for name in names if name not in free]
            if names:
                differences = ", ".join(f"{name} {previous.get(name)} -> {arguments.get(name)}" for name in names)
                fail(f"{run_dir} holds a run with other arguments ({differences}); use its arguments to resume it, "
                     "or another --exp-name or --seed for a new run", 2)  # fmt: skip
        else:
            temporary = config_path.with_suffix(".tmp")
            temporary.write_text(json.dumps({"args": arguments, **provenance()}, indent=2))
            os.replace(temporary, config_path)
    except OSError as error:
        fail(f"cannot write to {run_dir} ({error.strerror}); choose another folder with --runs-dir")
    except (ValueError, KeyError, TypeError):
        fail(f"{config_path} is damaged; restore a copy of it, or delete {run_dir} to start anew")
    checkpoint = load(checkpoint_path, "finished", "progress", "files") if checkpoint_path.exists() else None
    length = checkpoint["files"] if checkpoint else {}
    for path in [run_dir / "eval.csv", *run_dir.glob("events.out.tfevents.*")]:
        if path.name not in length:
            path.unlink(missing_ok=True)
        elif path.stat().st_size > length[path.name]:
            os.truncate(path, length[path.name])
    return run_dir, checkpoint


def provenance() -> dict:
    """What a result depends on beside the arguments."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "numpy", "gymnasium", "dm_control", "mujoco"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    git = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:  # no git here
        commit = None
    return {"command": sys.argv, "versions": versions, "git_commit": commit, "machine": platform.platform()}


def memory_size(device: torch.device) -> int:
    """Free bytes of a GPU, or bytes of the machine or of the control group that a cluster's job runs in."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        group = Path("/proc/self/cgroup").read_text().split("::")[1].strip()
        for folder in [Path(f"/sys/fs/cgroup{group}"), *Path(f"/sys/fs/cgroup{group}").parents]:
            limit = folder / "memory.max"
            if limit.exists() and limit.read_text().strip() != "max":
                size = min(size, int(limit.read_text()))
    except (OSError, IndexError):  # no control groups here
        pass
    return size


def make_replay_buffer(args: Args, obs_dim: int, action_dim: int, horizon: int, device: torch.device) -> ReplayBuffer:
    """On the training device where it fits beside the networks, else in main memory."""
    nbytes = ReplayBuffer.nbytes(args.buffer_size, obs_dim, action_dim)
    if device.type == "cuda" and nbytes > 0.7 * memory_size(device):
        device = torch.device("cpu")
    if nbytes > memory_size(device):
        fail(f"a replay buffer of {args.buffer_size:,} steps needs {nbytes / 2**30:.1f} GiB, and there are "
             f"{memory_size(device) / 2**30:.1f} GiB of memory: choose a smaller --buffer-size", 2)  # fmt: skip
    return ReplayBuffer(args.buffer_size, obs_dim, action_dim, horizon, args.seed, device)


def write_video(path: Path, frames: list[np.ndarray]) -> None:
    import imageio.v2 as imageio

    path.parent.mkdir(exist_ok=True)
    imageio.mimwrite(path, frames, fps=30, macro_block_size=2)  # h264 needs even sizes


def tensorboard_layout() -> dict:
    """Charts of TensorBoard's "Custom Scalars": returns, then a row per pathology with a chart per module."""

    def chart(tag: str) -> list:
        return ["Multiline", [f"{tag}$"]]  # a regular expression, matched from the start

    pathologies = ("srank", "dormant_ratio", "weight_norm", "grad_norm")
    return {
        "return": {"evaluation": chart("eval/episode_return_mean"), "training": chart("charts/episodic_return")},
        **{what: {name: chart(f"plasticity/{name}_{what}") for name in MODULES} for what in pathologies},
        "replaced connections": {name: chart(f"sparsity/{name}_replaced") for name in MODULES},
        "losses": {name: chart(f"losses/{name}") for name in ("critic_loss", "actor_loss", "q_values")},
    }


def make_evaluation_envs(args: Args, env_id: str, action_repeat: int | None) -> EvaluationEnvs:
    """The environments of the evaluation: one worker process per core, if there are several and nothing is rendered."""
    cores = torch.get_num_threads()  # OMP_NUM_THREADS, where several runs share a machine
    workers = (cores if cores > 1 else 0) if args.eval_workers is None else args.eval_workers

    def make(i: int) -> gym.Env:
        return make_env(env_id, args.seed, action_repeat, render=args.capture_video and i == 0)

    if args.capture_video or env_id == "quadruped-escape":  # OpenGL does not survive a fork
        workers = 0
    return EvaluationEnvs(make, args.eval_episodes, min(workers, args.eval_episodes))


def set_up(args: Args) -> torch.device:
    """The device, with what decides how fast it is. None of this is part of the algorithm."""
    torch.backends.cudnn.deterministic = args.torch_deterministic
    if args.cuda:
        torch.set_float32_matmul_precision(args.matmul_precision)
    torch.set_flush_denormal(True)  # moments of dead units decay into them: AdamW at a fifteenth of its speed on a CPU
    with suppress(OSError, AttributeError):  # glibc: keep large blocks, or a gradient of 38 MB faults in anew each time
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(option, 2**30)
    return torch.device("cuda" if args.cuda else "cpu")


def print_speed(args: Args, agent: Agent, eval_envs: EvaluationEnvs) -> None:
    """Say which path the updates, the matrix products and the evaluation take, and why."""
    graphs = f"off: {agent.updates.off}" if agent.updates.off else "on, once one was compared with an eager update"
    products = "bfloat16" if args.bf16 else "TF32" if args.cuda and args.matmul_precision == "high" else "float32"
    workers = f"{len(eval_envs.pipes)} worker processes, beside the training" if eval_envs.pipes else "this process"
    print(f"CUDA graphs {graphs}; torch.compile {'on' if args.compile else 'off'}; matrix products in {products}")
    print(f"actions chosen {'before' if args.overlap else 'after'} the update; evaluation in {workers}", flush=True)


def peak_memory(device: torch.device) -> int:
    """Bytes that tensors on a GPU held, or that the process held in main memory, at most since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass
class Progress:
    """Where a run is. An agent step has up to four phases, and a checkpoint can be taken between and within them."""

    agent_step: int = 0
    phase: Literal["act", "train", "evaluate", "wait"] = "evaluate"  # wait: for the evaluation to end
    episode: int = 0
    episode_return: float = 0.0
    wall_seconds: float = 0.0


def train(args: Args) -> int:
    """Train, from the last checkpoint if there is one. Returns the exit code."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda *_: stop.set())
    device = set_up(args)
    try:
        choose_mujoco_gl(args.env_id, args.capture_video)
        env = make_env(args.env_id, args.seed, args.action_repeat)
        if args.capture_video:
            make_env(args.env_id, args.seed, args.action_repeat, render=True).close()
    except (ValueError, RuntimeError) as error:
        fail(str(error), 2)
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    action_repeat = env.get_wrapper_attr("action_repeat")

    try:
        agent = make_agent(args, obs_dim, action_dim, device)
    except ValueError as error:
        fail(str(error), 2)
    rb = make_replay_buffer(args, obs_dim, action_dim, agent.horizon, device)
    print_table(args, agent, rb)
    if args.dry_run:
        return 0
    eval_envs = make_evaluation_envs(args, args.env_id, args.action_repeat)  # its processes must not hold the lock
    print_speed(args, agent, eval_envs)
    run_dir, checkpoint = open_run(args)
    if checkpoint and checkpoint["finished"]:
        print(f"{run_dir} is finished; to train anew, choose another --exp-name or --seed, or delete it")
        return 0
    progress = Progress(**checkpoint["progress"]) if checkpoint else Progress()

    # TRY NOT TO MODIFY: seeding, or restoring from the checkpoint
    exploration = torch.Generator().manual_seed(args.seed)
    actions: list[torch.Tensor] = []  # of the running episode: with its seed, they restore the environment
    action: torch.Tensor | None = None  # the next one, where it is chosen before an update
    evaluation: Evaluation | None = None  # the one under way
    if checkpoint:
        agent.load_state_dict(checkpoint["agent"])
        rb.load_state_dict(checkpoint["replay_buffer"])
        exploration.set_state(checkpoint["exploration"])
        actions, action = list(checkpoint["actions"]), checkpoint["action"]
        if saved := checkpoint.get("evaluation"):  # checkpoints of earlier versions have no such entry
            modules = saved.pop("modules")
            evaluation = Evaluation(agent, eval_envs, **saved)
            for name in ACTING:
                getattr(evaluation.agent, name).load_state_dict(modules[name])
        print(f"resuming {run_dir} at agent step {progress.agent_step:,}")
    obs = replay_episode(env, episode_seed(args.seed, 0, progress.episode), [action.numpy() for action in actions])
    if not checkpoint:
        rb.start_episode(obs)
    elif not np.array_equal(obs, rb.obs[rb.position].cpu().numpy()):
        print(f"warning: {args.env_id} cannot be restored, the interrupted episode ends here", file=sys.stderr)
        progress.episode, progress.episode_return, actions, action = progress.episode + 1, 0.0, [], None
        obs, _ = env.reset(seed=episode_seed(args.seed, 0, progress.episode))
        rb.start_episode(obs)

    if args.track:
        import wandb

        wandb.init(
            project=args.wandb_project_name, entity=args.wandb_entity, id=run_dir.name, name=run_dir.name,
            config=asdict(args), sync_tensorboard=True, resume="allow", save_code=True,
        )  # fmt: skip
    writer = SummaryWriter(run_dir)
    if not checkpoint:
        rows = "\n".join(f"|{key}|{value}|" for key, value in asdict(args).items())
        writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")
        writer.add_custom_scalars(tensorboard_layout())
    del checkpoint  # its replay buffer may be large
    start_time, start_step, earlier_seconds = time.time(), progress.agent_step, progress.wall_seconds
    last_seconds, last_step = earlier_seconds, start_step  # at the last evaluation
    bar = tqdm(
        total=args.total_timesteps, initial=start_step, unit="step", miniters=0, mininterval=0.5,
        disable=not sys.stderr.isatty(),
    )  # fmt: skip

    def stopped() -> bool:
        """Whether a signal came. Asked often, so it also keeps the bar's clock running."""
        bar.update(0)
        return stop.is_set()

    def wall_seconds() -> float:
        return earlier_seconds + time.time() - start_time

    def save_checkpoint(finished: bool = False) -> None:
        for name in MODULES:
            if not all(parameter.isfinite().all() for parameter in getattr(agent, name).parameters()):
                raise FloatingPointError(f"a weight of the {name} is not finite")
        writer.flush()
        progress.wall_seconds = wall_seconds()
        files = {path.name: path.stat().st_size for path in run_dir.iterdir() if path.is_file()}
        state = {"finished": finished, "progress": asdict(progress), "files": files}
        if finished:  # it needs no more, and hundreds of replay buffers would fill a disk
            save(run_dir / "agent.pt", {"args": asdict(args), **agent.policy_state_dict()})
        else:
            state |= {
                "agent": agent.state_dict(),
                "replay_buffer": rb.state_dict(),
                "exploration": exploration.get_state(),
                "actions": torch.stack(actions) if actions else torch.zeros(0, action_dim),
                "action": action,
                "evaluation": evaluation.state_dict() if evaluation else None,
            }
        save(run_dir / "checkpoint.pt", state)

    def begin_evaluation() -> Evaluation:
        """Measure the agent as it is now; its episodes are played step by step from here on."""
        scalars = {"charts/peak_memory_gib": peak_memory(device) / 2**30}
        for name, sparsifier in agent.sparsifier.items():
            scalars[f"sparsity/{name}_sparsity"] = sparsifier.sparsity()
            scalars[f"sparsity/{name}_topology_updates"] = sparsifier.topology_updates
            scalars[f"sparsity/{name}_replaced"] = sparsifier.replaced
        if args.diagnostics:
            scalars |= diagnose(agent, rb, seed=progress.agent_step)
        return Evaluation(agent, eval_envs, progress.agent_step, wall_seconds(), scalars)

    def step_evaluation() -> None:
        """One step of the evaluation under way. The last one logs it."""
        nonlocal evaluation
        try:
            returns = next(evaluation.steps)
        except WorkerDied:
            time.sleep(1)  # what ended a worker may be a signal to all processes of the job, and reach this one too
            if not stop.is_set():
                raise
            return
        if returns is not None:
            log_evaluation(returns)
            evaluation = None

    def finish_evaluation() -> bool:
        """Whether no evaluation is under way any more; one still is if a signal came."""
        bar.set_description("evaluating")
        while evaluation and not stopped():
            step_evaluation()
        bar.set_description("")
        return evaluation is None

    def log_evaluation(returns: np.ndarray) -> None:
        """One line to `eval.csv` (durable at once), TensorBoard and the log."""
        nonlocal last_seconds, last_step
        mean, std, step, seconds = returns.mean(), returns.std(), evaluation.agent_step, evaluation.wall_seconds
        path = run_dir / "eval.csv"
        columns = "agent_step,env_step,episode_return_mean,episode_return_std,episodes,wall_seconds"
        with open(path, "a") as file:
            if file.tell() == 0:
                print(columns, file=file)
            print(step, step * action_repeat, mean, std, len(returns), round(seconds, 1), sep=",", file=file)
            file.flush()
            os.fsync(file.fileno())
        scalars = {"eval/episode_return_mean": mean, "eval/episode_return_std": std, **evaluation.scalars}
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)
        if evaluation.frames:
            write_video(run_dir / "videos" / f"agent_step_{step}.mp4", evaluation.frames)
        sps = (step - last_step) / (seconds - last_seconds) if step > last_step else 0.0
        trained = sps and last_step >= args.learning_starts  # random steps are too fast to tell the time left
        left = f"{tqdm.format_interval((args.total_timesteps - progress.agent_step) / sps)} left" if trained else ""
        last_seconds, last_step = seconds, step
        tqdm.write(f"agent step {step:>7,}  return {mean:7.1f} +- {std:5.1f}  {sps:6.1f} steps/s  {left}")
        sys.stdout.flush()
        bar.set_postfix_str(f"return {mean:.1f}")

    def log_training() -> None:
        for name, value in agent.metrics.items():
            writer.add_scalar(name, value.item(), progress.agent_step)
        sps = (progress.agent_step - start_step) / (time.time() - start_time)
        writer.add_scalar("charts/SPS", sps, progress.agent_step)

    def check_finite() -> None:
        """Waits for the update to end."""
        values = torch.stack(list(agent.metrics.values())).tolist() if agent.metrics else []
        for name, value in zip(agent.metrics, values, strict=True):
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} is {value}")

    try:
        while progress.agent_step < args.total_timesteps or progress.phase != "act":
            if progress.phase == "act":
                # ALGO LOGIC: put action logic here
                if action is None:
                    action = agent.explore(obs, progress.agent_step < args.learning_starts, exploration)

                # TRY NOT TO MODIFY: execute the game and store the transition
                obs, reward, terminated, truncated, _ = env.step(action.numpy())
                if args.overlap:  # the last update ran meanwhile
                    check_finite()
                rb.add(action.numpy(), reward, obs, terminated)
                actions.append(action)
                action = None
                progress.agent_step += 1
                progress.episode_return += float(reward)
                if terminated or truncated:
                    writer.add_scalar("charts/episodic_return", progress.episode_return, progress.agent_step)
                    writer.add_scalar("charts/episodic_length", len(actions), progress.agent_step)
                    progress.episode, progress.episode_return, actions = progress.episode + 1, 0.0, []
                    obs, _ = env.reset(seed=episode_seed(args.seed, 0, progress.episode))
                    rb.start_episode(obs)
                progress.phase = "train"

            if progress.phase == "train":
                if evaluation:  # its workers step while the update runs
                    step_evaluation()
                # ALGO LOGIC: training
                if progress.agent_step < args.learning_starts:
                    progress.phase = "evaluate"
                else:
                    if args.overlap and action is None and progress.agent_step < args.total_timesteps:
                        action = agent.explore(obs, False, exploration)
                    if agent.train_step(rb, stopped):
                        if not args.overlap:
                            check_finite()
                        if progress.agent_step % args.log_interval == 0:
                            log_training()
                        progress.phase = "evaluate"

            if progress.phase == "evaluate" and not stop.is_set():
                last = progress.agent_step == args.total_timesteps
                if not last and progress.agent_step % args.eval_interval:
                    progress.phase = "act"
                elif finish_evaluation():  # of the one before
                    evaluation = begin_evaluation()
                    progress.phase = "act" if eval_envs.pipes and not last else "wait"
            if progress.phase == "wait" and finish_evaluation():
                progress.phase = "act"

            bar.update(progress.agent_step - bar.n)
            if stop.is_set() or (progress.phase == "act" and progress.agent_step % args.checkpoint_interval == 0):
                save_checkpoint()
            if stop.is_set():
                bar.close()
                print(f"stopped at agent step {progress.agent_step:,}; start the same command again to go on")
                return RESUME_ME
        save_checkpoint(finished=True)
        writer.close()
    except FloatingPointError as error:
        with suppress(FloatingPointError, WorkerDied, OSError, StopIteration):  # the last: it is what failed
            finish_evaluation()  # of the weights from before
        writer.flush()
        fail(
            f"{error} at agent step {progress.agent_step:,}; {run_dir} keeps the last good checkpoint. A lower "
            "learning rate may help, or an architecture with LayerNorm, under another --exp-name"
        )
    except WorkerDied as error:
        fail(f"{error} (see above; start the same command again to go on)")
    except OSError as error:
        fail(f"cannot write to {run_dir} ({error}); free some space and start the same command again")
    bar.close()
    print(f"finished: results in {run_dir}")
    return 0


def play(args: Args) -> int:
    """Play a saved agent and print its returns. Returns the exit code."""
    path = Path(args.eval_only)
    path = path / "agent.pt" if path.is_dir() else path
    if not path.exists():
        fail(f"{path} does not exist: --eval-only takes a run directory or the agent.pt of a finished run", 2)
    saved = load(path, "args", "modules")
    if saved["args"].keys() != asdict(args).keys():
        fail(f"{path} is of another script, or of another version of this one: play it with that one", 2)
    trained = Args(**saved["args"])
    device = set_up(args)
    try:
        choose_mujoco_gl(trained.env_id, args.capture_video)
        env = make_env(trained.env_id, args.seed, trained.action_repeat)
        envs = make_evaluation_envs(args, trained.env_id, trained.action_repeat)
    except (ValueError, RuntimeError) as error:
        fail(str(error), 2)
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    agent = make_agent(trained, obs_dim, action_dim, device)
    agent.load_policy_state_dict(saved)
    frames = [] if args.capture_video else None
    seeds = [episode_seed(args.seed, 2, i) for i in range(args.eval_episodes)]
    try:
        *_, returns = evaluate(agent, envs, seeds, frames)
    except (FloatingPointError, WorkerDied) as error:
        fail(f"{error}")
    for i, value in enumerate(returns):
        print(f"episode {i + 1}: return {value:.1f}")
    print(f"{trained.env_id}: mean {returns.mean():.1f}, standard deviation {returns.std():.1f}")
    if frames:
        write_video(path.parent / "videos" / "eval_only.mp4", frames)
    return 0


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    validate(args)
    return play(args) if args.eval_only else train(args)


if __name__ == "__main__":
    sys.exit(main())
