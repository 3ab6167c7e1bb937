"""SAC with Module-Specific Training (MST) on DeepMind Control and Gymnasium, in one file beside `sparse_utils.py`.

    python mst_sac.py --env humanoid-run --width-scale 4 --depth-scale 3      # the paper's MST at 207M parameters
    python mst_sac.py --env humanoid-run --critic-regime dense --actor-regime dense    # the original SAC on SimBa
    python mst_sac.py --eval-only runs/humanoid-run__mst_sac__1 --capture-video        # play a trained agent

Implements "Rethinking the Role of Dynamic Sparse Training for Scalable Deep Reinforcement Learning" (arXiv
2510.12096, section 4, Figs. 13 and 14): SAC (arXiv 1812.05905) on the networks of SimBa (arXiv 2410.09754), with one
training regime per module: critic dynamic sparse, actor static sparse. The algorithm comes first; what operates a run
(environment, evaluation, checkpoints) follows below `# OPERATIONS`, the same in all scripts.

Results go to `runs/<env>__<exp_name>__<seed>/`. The same command started again resumes from its last checkpoint.
Exit codes: 0 finished, 75 stopped by a signal with a checkpoint, 2 wrong usage, 1 any other failure.
"""

import copy
import difflib
import fcntl
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch import Tensor, optim
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from sparse_utils import Sparsifier, dormant_ratio, stable_rank

Regime = Literal["dense", "sst", "dst", "s2d", "d2s"]


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]  # name of the experiment, part of the run directory
    seed: int = 1  # seed of networks, masks, exploration, replay and environment
    torch_deterministic: bool = True  # sets `torch.backends.cudnn.deterministic`
    cuda: bool = torch.cuda.is_available()  # train on the GPU
    track: bool = False  # track the run with Weights and Biases, too
    wandb_project_name: str = "mst"  # project there
    wandb_entity: str | None = None  # entity (team) there
    capture_video: bool = False  # record the first episode of each evaluation under `videos/`
    runs_dir: str = "runs"  # folder of the run directories
    dry_run: bool = False  # print the table of networks and memory, then stop
    eval_only: str | None = None  # play the agent of this run directory or `agent.pt`, print its returns, then stop

    # Speed (docs/performance.md)
    cuda_graphs: bool = False  # on a GPU, run each update as one CUDA graph
    compile: bool = False  # fuse the losses with `torch.compile`: a minute or two at the start
    matmul_precision: Literal["highest", "high"] = "high"  # on a GPU: float32 or TF32 products

    # Environment and evaluation. A step is an agent step: one action of the policy
    env_id: Annotated[str, tyro.conf.arg(aliases=("--env",))] = "humanoid-run"  # dm_control task or Gymnasium id
    action_repeat: int | None = None  # environment steps per agent step (None: 2 on DeepMind Control, else 1)
    max_episode_steps: int | None = None  # truncates episodes (None: the limit that the environment declares)
    total_timesteps: int = 500_000  # agent steps of the whole run; the schedules of eqs. 1 and 2 run over them
    eval_interval: int = 5_000  # agent steps between evaluations
    eval_episodes: int = 10  # episodes per evaluation, without noise, in environments of their own
    eval_processes: bool = torch.cuda.is_available()  # a process for each of these environments
    log_interval: int = 100  # agent steps between writes of the losses to TensorBoard
    checkpoint_interval: int = 10_000  # agent steps between checkpoints; a signal writes one, too
    diagnostics: bool = True  # measure srank, dormant ratio and norms at every evaluation (never changes the training)

    # Algorithm
    buffer_size: int = 1_000_000  # capacity of the replay buffer in time steps
    gamma: float | None = None  # discount factor (None: 1 - 5 / max_episode_steps, within 0.95 and 0.995)
    tau: float = 0.005  # share of the critic in every update of its target
    batch_size: int = 256  # batch size of every update
    learning_starts: int = 5_000  # agent steps of uniformly random actions before training starts
    updates_per_step: int = 2  # updates of every module per agent step, each on its own batch
    clipped_double_q: tyro.conf.DisallowNone[bool | None] = None  # two critics, smaller value (None: not on dm_control)
    critic_lr: float = 1e-4  # learning rate of the critic
    actor_lr: float = 1e-4  # learning rate of the actor
    temperature_lr: float = 1e-4  # learning rate of the temperature
    weight_decay: float = 1e-2  # weight decay of critic and actor (AdamW)
    initial_temperature: float = 0.01  # temperature at the start
    target_entropy: float | None = None  # entropy that the temperature is learned for (None: -0.5 per action dimension)

    # Networks (SimBa). Scales multiply `hidden_dim` and the number of blocks: 2 of the critic, 1 of the actor
    hidden_dim: int = 512  # width of the critic at scale 1; the actor has a quarter of it
    scale: float = 1.0  # width and depth of every module
    width_scale: float | None = None  # width of every module, instead of `scale`
    depth_scale: float | None = None  # number of blocks of every module, instead of `scale`
    critic_scale: float | None = None  # width and depth of the critic, instead of the scales above
    actor_scale: float | None = None  # width and depth of the actor, instead of the scales above

    # Training regimes (section 2.1): dense, static sparse, dynamic sparse, sparse to dense, dense to sparse
    critic_regime: Regime = "dst"  # training regime of the critic
    actor_regime: Regime = "sst"  # training regime of the actor
    critic_sparsity: float = 0.8  # share of zeros in the critic's weights (s2d starts from it, d2s ends at it)
    actor_sparsity: float = 0.8  # share of zeros in the actor's weights
    distribution: Literal["er", "uniform", "uniform-dense-output"] = "er"  # of the zeros over the layers of a module
    growth: Literal["rigl", "set"] = "rigl"  # connections grow where the gradient is largest (rigl) or at random (set)
    topology_update_interval: int = 1000  # a module's updates between changes of its topology
    drop_fraction: float = 0.5  # share of the connections replaced at the first change, decays to 0 (eq. 1)
    schedule_start: float | None = None  # of eq. 2, as a share of training (None: 0.2 for d2s, 0 for s2d)
    schedule_end: float | None = None  # of eq. 2, as a share of training (None: 0.8 for d2s, 1 for s2d)


# NETWORKS (SimBa)
def linear(in_dim: int, out_dim: int, he_normal: bool = False) -> nn.Linear:
    """Orthogonal weights, or normal of variance 2 / in_dim after truncation at two standard deviations."""
    layer = nn.Linear(in_dim, out_dim)
    nn.init.zeros_(layer.bias)
    if not he_normal:
        nn.init.orthogonal_(layer.weight)
    else:
        std = math.sqrt(2 / in_dim) / 0.87962566103423978  # of what truncation leaves of a standard deviation
        nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    return layer


class Block(nn.Module):
    def __init__(self, hidden_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_dim, eps=1e-6)
        self.linear1 = linear(hidden_dim, 4 * hidden_dim, he_normal=True)
        self.relu = nn.ReLU()  # a module, for the hooks of diagnose
        self.linear2 = linear(4 * hidden_dim, hidden_dim, he_normal=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear2(self.relu(self.linear1(self.norm(x))))


class SimBa(nn.Module):
    """`embed`, pre-LayerNorm residual blocks, `norm`: the features that the heads are linear in."""

    def __init__(self, in_dim: int, hidden_dim: int, num_blocks: int):
        super().__init__()
        self.embed = linear(in_dim, hidden_dim)
        self.blocks = nn.Sequential(*(Block(hidden_dim) for _ in range(num_blocks)))
        self.norm = nn.LayerNorm(hidden_dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(self.embed(x)))


class Critic(nn.Module):
    """One Q-function, or two for clipped double Q-learning."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_dim: int, num_blocks: int, twin: bool = False):
        super().__init__()
        self.q = nn.ModuleList()
        for _ in range(1 + twin):
            trunk, value = SimBa(obs_dim + action_dim, hidden_dim, num_blocks), linear(hidden_dim, 1)
            self.q.append(nn.Sequential(OrderedDict(trunk=trunk, value=value)))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        return torch.cat([q(torch.cat([obs, action], 1)) for q in self.q], 1)  # (batch, 1 or 2)


class Actor(nn.Module):
    """A tanh-Gaussian policy: its network gives mean and log standard deviation before the tanh."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_dim: int, num_blocks: int):
        super().__init__()
        self.trunk = SimBa(obs_dim, hidden_dim, num_blocks)
        self.mean = linear(hidden_dim, action_dim)
        self.log_std = linear(hidden_dim, action_dim)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(obs)
        return self.mean(features), -10 + 6 * (1 + torch.tanh(self.log_std(features)))  # log std in [-10, 2]

    def sample(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
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

    def update(self, obs: Tensor) -> None:
        """Take in one observation (obs_dim,): Chan et al. 1979 with a batch of one."""
        delta, total = obs - self.mean, self.count + 1
        self.var.copy_((self.var + delta.square() / total) * (self.count / total))
        self.mean += delta / total
        self.count.copy_(total)

    def forward(self, obs: Tensor) -> Tensor:
        return ((obs - self.mean) / torch.sqrt(self.var + 1e-8)).to(obs.dtype)


def make_networks(args: Args, obs_dim: int, action_dim: int) -> tuple[Critic, Actor]:
    critic = Critic(obs_dim, action_dim, *size_of(args, "critic", args.hidden_dim, 2), bool(args.clipped_double_q))
    return critic, Actor(obs_dim, action_dim, *size_of(args, "actor", args.hidden_dim / 4, 1))


# REPLAY BUFFER
class Batch(NamedTuple):
    obs: Tensor  # (batch, obs_dim)
    action: Tensor  # (batch, action_dim)
    reward: Tensor  # (batch,)
    next_obs: Tensor  # (batch, obs_dim), the true last observation where the step ended an episode
    terminated: Tensor  # (batch,), 1 where the step ended in a termination; a truncation is none


class ReplayBuffer:
    """Ring buffer of transitions, drawn uniformly and with replacement."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device):
        self.dims = [obs_dim, action_dim, 1, obs_dim, 1]
        self.storage = torch.zeros(args.buffer_size, sum(self.dims), device=device)
        self.generator = torch.Generator(device).manual_seed(args.seed)
        self.position = 0
        self.size = torch.zeros((), dtype=torch.int64, device=device)  # a tensor: CUDA graphs read it anew

    def start_episode(self, obs: np.ndarray) -> None:
        self.obs = obs

    def add(self, action: np.ndarray, reward: float, next_obs: np.ndarray, terminated: bool) -> None:
        """Store the step taken from the newest observation, and the observation it led to."""
        step = np.concatenate([self.obs, action, [reward], next_obs, [terminated]], dtype=np.float32)
        self.storage[self.position] = torch.from_numpy(step)
        self.obs, self.position = next_obs, (self.position + 1) % len(self.storage)
        self.size.add_(1).clamp_(max=len(self.storage))

    def batch(self, index: Tensor) -> Batch:
        obs, action, reward, next_obs, terminated = self.storage[index].split(self.dims, 1)
        return Batch(obs, action, reward[:, 0], next_obs, terminated[:, 0])

    def sample(self, batch_size: int) -> Batch:
        u = torch.rand(batch_size, dtype=torch.float64, generator=self.generator, device=self.storage.device)
        return self.batch((u * self.size).long())

    def state_dict(self) -> dict:
        storage, obs = self.storage[: self.size].to("cpu", copy=True), torch.from_numpy(self.obs)
        return {"storage": storage, "position": self.position, "obs": obs, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.size.fill_(len(state["storage"]))
        self.storage[: self.size] = state["storage"]
        self.position, self.obs = state["position"], state["obs"].numpy()
        self.generator.set_state(state["generator"])


# ALGORITHM
MODULES = ("critic", "actor")
ALWAYS_DENSE: tuple[str, ...] = ()  # heads that no regime masks, and that the paper does not count


class Agent(nn.Module):
    """Critic with its target, actor, temperature, and the statistics of the observations."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device):
        super().__init__()
        if args.gamma is None:  # SimBa's rule
            args.gamma = min(max(1 - 5 / (args.max_episode_steps or math.inf), 0.95), 0.995)
        if args.clipped_double_q is None:
            args.clipped_double_q = is_gymnasium(args.env_id)
        torch.manual_seed(args.seed)
        self.args, self.device, self.action_dim = args, device, action_dim
        self.generator = torch.Generator(device).manual_seed(args.seed)
        self.critic, self.actor = make_networks(args, obs_dim, action_dim)
        self.normalizer = RunningNorm(obs_dim)
        self.log_temp = nn.Parameter(torch.tensor(args.initial_temperature).log())
        self.target_entropy = -0.5 * action_dim if args.target_entropy is None else args.target_entropy
        self.to(device)

        training_steps = args.total_timesteps - args.learning_starts + 1  # the first follows the last random action
        total_updates = dict.fromkeys(MODULES, args.updates_per_step * training_steps)
        adamw = partial(optim.AdamW, fused=True, capturable=device.type == "cuda")
        self.optimizers: dict[str, optim.Optimizer] = {}
        self.sparsifiers: dict[str, Sparsifier] = {}
        for i, name in enumerate(MODULES):
            module, lr = getattr(self, name), getattr(args, f"{name}_lr")
            self.optimizers[name] = adamw(module.parameters(), lr, weight_decay=args.weight_decay)
            self.sparsifiers[name] = Sparsifier(
                module, self.optimizers[name], getattr(args, f"{name}_regime"), getattr(args, f"{name}_sparsity"),
                distribution=args.distribution, growth=args.growth, update_interval=args.topology_update_interval,
                drop_fraction=args.drop_fraction, schedule_start=args.schedule_start, schedule_end=args.schedule_end,
                total_updates=max(total_updates[name], 1), seed=len(MODULES) * args.seed + i,
            )  # fmt: skip
        self.optimizers["temperature"] = adamw([self.log_temp], args.temperature_lr, weight_decay=0)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        if args.compile:
            self.critic_loss = torch.compile(self.critic_loss, dynamic=False)
            self.actor_loss = torch.compile(self.actor_loss, dynamic=False)
        if args.cuda_graphs and args.cuda:
            self.update_critic_and_actor = graphed(self, self.update_critic_and_actor, "critic", "actor")

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """Actions without noise in [-1, 1], (batch, action_dim), at observations (batch, obs_dim)."""
        obs = self.normalizer(torch.as_tensor(obs, device=self.device))
        return self.actor(obs)[0].tanh().cpu().numpy()

    @torch.no_grad()
    def explore(self, obs: np.ndarray, uniform: bool, generator: torch.Generator) -> np.ndarray:
        """One action (action_dim,) at obs (obs_dim,): uniformly random, or sampled from the policy. Counts obs in."""
        obs = torch.as_tensor(obs, device=self.device)
        self.normalizer.update(obs)
        if uniform:
            return torch.rand(self.action_dim, generator=generator).numpy() * 2 - 1
        noise = torch.randn(1, self.action_dim, generator=generator).to(obs)
        return self.actor.sample(self.normalizer(obs[None]), noise)[0][0].cpu().numpy()

    def train_step(self, rb: ReplayBuffer) -> dict[str, Tensor]:
        """The updates of one agent step. Returns the metrics of the last one."""
        for _ in range(self.args.updates_per_step):
            metrics = self.update_critic_and_actor(rb)
        return metrics

    def optimize(self, name: str, loss: Tensor) -> Tensor:
        """Minimise the module's loss. Returns the norm of its gradient after masking."""
        parameters = list(getattr(self, name).parameters())
        self.optimizers[name].zero_grad()
        loss.backward()
        self.sparsifiers[name].step()  # RigL: changes the topology when that is due, and masks the gradient
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        self.optimizers[name].step()
        return norm

    def update_critic_and_actor(self, rb: ReplayBuffer) -> dict[str, Tensor]:
        """One update of actor, temperature, critic and target, in this order and each with what is new by then."""
        batch = rb.sample(self.args.batch_size)
        obs, next_obs = self.normalizer(batch.obs), self.normalizer(batch.next_obs)

        temperature = self.log_temp.detach().exp()
        self.critic.requires_grad_(False)  # the actor's loss trains the actor alone
        actor_loss, log_prob = self.actor_loss(obs, temperature, self.noise(batch))
        self.critic.requires_grad_(True)
        actor_grad_norm = self.optimize("actor", actor_loss)

        entropy = -log_prob.detach().mean()
        temperature_loss = self.log_temp.exp() * (entropy - self.target_entropy)
        self.optimizers["temperature"].zero_grad()
        temperature_loss.backward()
        self.optimizers["temperature"].step()

        topology_updates = self.sparsifiers["critic"].topology_updates
        critic_loss, q, q_target = self.critic_loss(obs, next_obs, batch, self.noise(batch))
        critic_grad_norm = self.optimize("critic", critic_loss)
        if self.sparsifiers["critic"].topology_updates > topology_updates:
            self.sparsifiers["critic"].apply_to(self.critic_target)  # what the critic drops, its target drops as well
        with torch.no_grad():  # Polyak averaging. What is 0 in critic and target stays exactly 0
            target, online = list(self.critic_target.parameters()), list(self.critic.parameters())
            torch._foreach_lerp_(target, online, self.args.tau)

        return {
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

    def actor_loss(self, obs: Tensor, temperature: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the log-density (batch,) of the sampled actions."""
        action, log_prob = self.actor.sample(obs, noise)
        return (temperature * log_prob - self.critic(obs, action).min(1).values).mean(), log_prob

    def critic_loss(self, obs: Tensor, next_obs: Tensor, batch: Batch, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, Q (batch, 1 or 2) and its target (batch,). Observations are normalised."""
        with torch.no_grad():
            next_action, next_log_prob = self.actor.sample(next_obs, noise)
            next_q = self.critic_target(next_obs, next_action).min(1).values
            next_q -= self.log_temp.exp() * next_log_prob
            q_target = batch.reward + self.args.gamma * (1 - batch.terminated) * next_q
        q = self.critic(obs, batch.action)
        return (q - q_target[:, None]).square().sum(1).mean(), q, q_target

    def noise(self, batch: Batch) -> Tensor:
        """Standard normal, (batch, action_dim)."""
        return torch.empty_like(batch.action).normal_(generator=self.generator)


# DIAGNOSTICS
@torch.no_grad()
def diagnose(agent: Agent, rb: ReplayBuffer, seed: int) -> dict[str, float]:
    """Pathologies of each module on 256 uniformly drawn transitions (section 3, Figs. 3, 7 and 10).

    Features are the input of the heads, hidden units those of all blocks. Moves nothing: its generator is its own.
    """
    if rb.size == 0:
        return {}
    index = torch.randint(int(rb.size), (256,), generator=torch.Generator().manual_seed(seed))
    batch = rb.batch(index.to(agent.device))
    obs = agent.normalizer(batch.obs)
    obs_action = torch.cat([obs, batch.action], 1)

    def features() -> dict[str, Tensor]:
        critics = torch.cat([q.trunk(obs_action) for q in agent.critic.q], 1)
        return {"critic": critics, "actor": agent.actor.trunk(obs)}

    return pathologies(agent, nn.ReLU, features)


# OPERATIONS: the same in all scripts
class DMControl(gym.Env):
    """A dm_control task. Observations: those of its spec in their order, flat float32."""

    render_mode = "rgb_array"
    _max_episode_steps = 1000  # of all tasks of the suite but lqr's, which have no limit

    def __init__(self, env_id: str, seed: int):
        from dm_control import suite  # only now: it reads MUJOCO_GL

        tasks = ["-".join(task) for task in suite.ALL_TASKS]
        if env_id not in tasks:
            near = difflib.get_close_matches(env_id, [*tasks, *gym.registry], n=4) or ["dog-run", "HalfCheetah-v5"]
            raise ValueError(f"it is neither a dm_control task nor a Gymnasium id, such as {', '.join(near)}")
        self.dmc = suite.load(*env_id.split("-", 1), task_kwargs={"random": seed})  # lqr draws its model from the seed
        spec, shapes = self.dmc.action_spec(), [x.shape for x in self.dmc.observation_spec().values()]
        bounded = spec.maximum - spec.minimum < 1e9  # lqr's, which are +-1e10, are taken from [-1, 1] as they are
        low, high = np.where(bounded, spec.minimum, -1), np.where(bounded, spec.maximum, 1)
        self.action_space = gym.spaces.Box(low, high, dtype=np.float64)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (sum(map(math.prod, shapes)),), np.float32)

    def observe(self, step) -> np.ndarray:
        return np.concatenate(list(step.observation.values()), axis=None, dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        if seed is not None:
            self.dmc.task.random.seed(seed)
        return self.observe(self.dmc.reset()), {}

    def step(self, action: np.ndarray):
        step = self.dmc.step(action)
        terminated = step.last() and step.discount == 0  # in the suite only lqr's episodes can terminate
        return self.observe(step), step.reward, terminated, step.last() and not terminated, {}

    def render(self) -> np.ndarray:
        return self.dmc.physics.render(480, 480, camera_id=0)


class AgentEnv(gym.Wrapper):
    """An environment as agents see it: agent steps, actions in [-1, 1], flat float32 observations, a time limit."""

    def __init__(self, env: gym.Env, action_repeat: int, limit: int | None):
        super().__init__(env)
        self.action_repeat, self.limit, self.steps = action_repeat, limit, 0
        shape = gym.spaces.flatten_space(env.observation_space).shape
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, shape, np.float32)
        self.action_space = gym.spaces.Box(-1, 1, env.action_space.shape, np.float32)

    def observe(self, obs) -> np.ndarray:
        obs = gym.spaces.flatten(self.env.observation_space, obs).astype(np.float32)
        if not np.isfinite(obs).all():
            raise gym.error.Error(f"the observation of step {self.steps} of an episode is {obs}")
        return obs

    def reset(self, **kwargs):
        self.steps = 0
        return self.observe(self.env.reset(**kwargs)[0]), {}

    def step(self, action: np.ndarray):
        if not np.isfinite(action).all():
            raise FloatingPointError("an action of the actor is not finite")
        low, high = self.env.action_space.low.astype(np.float64), self.env.action_space.high
        action = (low + (action.astype(np.float64) + 1) * (high - low) / 2).clip(low, high)
        self.steps, total_reward = self.steps + 1, 0.0
        for _ in range(self.action_repeat):
            obs, reward, terminated, truncated, _ = self.env.step(action.astype(self.env.action_space.dtype))
            if np.size(reward) != 1 or not np.isfinite(reward).all():
                raise gym.error.Error(f"the reward of step {self.steps} of an episode is {reward}, not a finite number")
            total_reward += np.asarray(reward).item()
            if terminated or truncated:
                break
        if self.limit is None and self.steps >= 100_000:
            raise gym.error.Error("an episode took 100,000 agent steps; limit it with --max-episode-steps")
        truncated = bool(truncated) or self.steps == self.limit
        return self.observe(obs), float(total_reward), bool(terminated), truncated, {}


def is_gymnasium(env_id: str) -> bool:
    return ":" in env_id or env_id in gym.registry  # `package:Name-v0`: the package registers it when it is imported


def make_env(args: Args) -> AgentEnv:
    """The environment of `args`. ValueError, in one line, if it cannot be made or if no agent can use it."""
    opengl = args.capture_video or args.env_id == "quadruped-escape"  # whose terrain is drawn
    os.environ.setdefault("MUJOCO_GL", "egl" if opengl else "disable")
    try:
        if is_gymnasium(args.env_id):
            render_mode = {"render_mode": "rgb_array"} if args.capture_video else {}
            env, action_repeat = gym.make(args.env_id, disable_env_checker=True, **render_mode), args.action_repeat or 1
        else:
            env, action_repeat = DMControl(args.env_id, args.seed), args.action_repeat or 2
        if args.capture_video:  # notice now what is missing for it
            env.reset(), env.render()
    except Exception as error:  # of whatever library makes it
        raise ValueError(f"{args.env_id} cannot be made: {one_line(error)}") from error
    actions, limit = env.action_space, args.max_episode_steps
    real = isinstance(actions, gym.spaces.Box) and np.issubdtype(actions.dtype, np.floating) and actions.is_bounded()
    if not (real and len(actions.shape) == 1 and actions.shape[0] > 0):
        raise ValueError(f"{args.env_id} has actions {actions}: choose one with a flat, bounded Box of real numbers")
    if not env.observation_space.is_np_flattenable:
        raise ValueError(f"{args.env_id} has observations {env.observation_space}: choose one with a Box of them")
    if limit is None and env.has_wrapper_attr("_max_episode_steps"):  # of Gymnasium's TimeLimit, or its own
        limit = math.ceil(env.get_wrapper_attr("_max_episode_steps") / action_repeat)
    return AgentEnv(env, action_repeat, limit)


def make_eval_envs(args: Args) -> gym.vector.VectorEnv:
    """An environment for each episode of an evaluation, in this process or each in one of its own."""
    makers = [partial(make_env, args)] * args.eval_episodes
    if args.eval_processes and not args.capture_video and args.env_id != "quadruped-escape":  # no OpenGL after a fork
        return gym.vector.AsyncVectorEnv(makers, context="fork")
    return gym.vector.SyncVectorEnv(makers)


def episode_seeds(*key: int, count: int = 1) -> list[int]:
    """Seeds of episodes, from the run's seed and their place in the run."""
    return np.random.SeedSequence(key).generate_state(count).tolist()


def evaluate(agent: Agent, envs: gym.vector.VectorEnv, seeds: list, stop: list, video: Path) -> np.ndarray | None:
    """The returns of an episode with each seed, without noise; None if a signal came meanwhile."""
    returns, running, frames = np.zeros(len(seeds)), np.ones(len(seeds), bool), []
    agent.eval()
    try:
        obs, _ = envs.reset(seed=seeds)
        while running.any() and not stop:
            if agent.args.capture_video and running[0]:
                frames.append(envs.envs[0].render())
            obs, reward, terminated, truncated, _ = envs.step(agent.act(obs))
            returns += np.where(running, reward, 0)  # what has ended goes on with an episode that does not count
            running &= ~(terminated | truncated)
    except (EOFError, ConnectionError):
        time.sleep(1)  # the signal that ended a process of the evaluation may reach this one later
        if not stop:
            sys.exit("error: a process of the evaluation died; go on with --no-eval-processes")
    if frames and not stop:
        import imageio.v2 as imageio

        video.parent.mkdir(exist_ok=True)
        imageio.mimwrite(video, frames, fps=30, macro_block_size=2)  # h264 needs even sizes
    return None if stop else returns


def size_of(args: Args, module: str, width: int, blocks: int) -> tuple[int, int]:
    """Width and number of blocks of a module that has `width` and `blocks` at scale 1."""
    scale = getattr(args, f"{module}_scale")
    width_scale, depth_scale = scale or args.width_scale or args.scale, scale or args.depth_scale or args.scale
    return max(1, round(width * width_scale)), max(1, round(blocks * depth_scale))


def graphed(agent: Agent, update: Callable, *modules: str) -> Callable:
    """An update of these modules as one CUDA graph. Two first calls run eagerly, and those that change a topology."""
    sparsifiers, graph, metrics, eager_calls = [agent.sparsifiers[name] for name in modules], None, {}, 0

    def run(rb: ReplayBuffer) -> dict[str, Tensor]:
        nonlocal graph, metrics, eager_calls
        if eager_calls < 2 or any(sparsifier.topology_update_due for sparsifier in sparsifiers):
            eager_calls, eager_metrics = eager_calls + 1, update(rb)
            for optimizer in agent.optimizers.values():
                optimizer.zero_grad()  # or these gradients would stay in memory beside the graph's
            return eager_metrics
        if graph is None:
            graph, clocks = torch.cuda.CUDAGraph(), [sparsifier.updates for sparsifier in sparsifiers]
            for generator in (agent.generator, rb.generator):
                graph.register_generator_state(generator)
            try:
                with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                    metrics = update(rb)
            except RuntimeError as error:
                error.add_note("an update that cannot be captured can be trained with --no-cuda-graphs")
                raise
            for sparsifier, clock in zip(sparsifiers, clocks, strict=True):  # a capture computes nothing
                sparsifier.updates = clock
        graph.replay()
        for sparsifier in sparsifiers:
            sparsifier.updates += 1
        return metrics

    return run


def pathologies(agent: Agent, kind: type[nn.Module], features: Callable[[], dict[str, Tensor]]) -> dict[str, float]:
    """srank (Kumar et al. 2021), dormant ratio (Sokar et al. 2023) and norms of each module.

    `features` computes the features (batch, units) of each module. Hidden units are what layers of `kind` give then.
    """
    hidden: dict[str, list[Tensor]] = {name: [] for name in MODULES}
    layers = [(name, layer) for name in MODULES for layer in getattr(agent, name).modules() if isinstance(layer, kind)]
    hooks = [layer.register_forward_hook(lambda *io, name=name: hidden[name].append(io[2])) for name, layer in layers]
    metrics, of_modules = {}, features()
    for hook in hooks:
        hook.remove()
    for name, x in of_modules.items():
        if not x.isfinite().all():
            raise FloatingPointError(f"a feature of the {name} is not finite")
        metrics[f"plasticity/{name}_srank"] = stable_rank(x)
        metrics[f"plasticity/{name}_dormant_ratio"] = dormant_ratio(hidden[name], tau=0.1)
        metrics[f"plasticity/{name}_dormant_ratio_0.025"] = dormant_ratio(hidden[name], tau=0.025)
        metrics[f"plasticity/{name}_feature_norm"] = x.norm(dim=1).mean().item()
        metrics[f"plasticity/{name}_weight_norm"] = nn.utils.get_total_norm(getattr(agent, name).parameters()).item()
    return metrics


def print_table(args: Args, agent: Agent, rb: ReplayBuffer) -> None:
    print(f"{'module':<10}{'regime':>8}{'parameters':>14}{'active':>14}{'sparsity':>10}")
    total = total_active = 0
    for name, sparsifier in agent.sparsifiers.items():
        named = getattr(agent, name).named_parameters()
        size = sum(p.numel() for key, p in named if not key.startswith(ALWAYS_DENSE))  # as the paper counts
        active = size - sum(int((~mask).sum()) for mask in sparsifier.masks.values())
        print(f"{name:<10}{sparsifier.regime:>8}{size:>14,}{active:>14,}{sparsifier.sparsity():>10.4f}")
        total, total_active = total + size, total_active + active
    print(f"{'agent':<10}{total:>22,}{total_active:>14,}", *(f"without the {name}" for name in ALWAYS_DENSE))
    limit = f"{args.max_episode_steps:,} agent steps" if args.max_episode_steps else "no declared limit"
    print(f"episodes of {limit}, discount factor {args.gamma:g}; training on {agent.device}")
    print(f"replay buffer {args.buffer_size:,} steps, {rb.storage.nbytes / 2**30:.2f} GiB")


def check(args: Args) -> None:
    """ValueError for the first flag that cannot be. What tyro, torch and the Sparsifier refuse is not in here."""
    for name, value in asdict(args).items():
        low, high = int(type(value) is int and name != "seed"), 1 if name in ("gamma", "tau") else sys.maxsize
        if type(value) in (int, float) and name != "target_entropy" and not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} {value} is out of range: the least is {low}, the most {high}")
    if re.search(r"[^\w.+=-]", args.exp_name):
        raise ValueError(f"--exp-name {args.exp_name} names a folder: write letters, digits and _ . + = - only")
    if args.cuda and not torch.cuda.is_available():
        raise ValueError("--cuda needs a GPU that torch sees: train with --no-cuda")
    if args.compile and not shutil.which(os.environ.get("CXX", "g++")):
        raise ValueError("--compile needs a C++ compiler: install g++, or name another in CXX")
    if args.track and not find_spec("wandb"):
        raise ValueError("--track needs wandb: pip install wandb")
    if args.capture_video and not find_spec("imageio_ffmpeg"):
        raise ValueError("--capture-video needs imageio: pip install 'imageio[ffmpeg]'")


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def save(path: Path, content: dict) -> None:
    """Write to a temporary file, sync and rename: `path` holds the old or the new content, never a part of it."""
    if not all(tensor.isfinite().all() for tensor in content["agent"].values()):
        raise FloatingPointError("a weight is not finite")
    temporary = path.with_name(path.name + ".tmp")
    try:
        torch.save(content, temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch raises a RuntimeError when it cannot write
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path.name}: {one_line(error)}") from error


def load(path: Path) -> dict:
    """Read tensors and plain values; a file can hold nothing else, so opening it runs no code."""
    try:
        if broken := zipfile.ZipFile(path).testzip():  # torch.load does not compare checksums
            raise ValueError(f"the checksum of {broken} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
        return {name: content[name] for name in ("args", "run", "agent")} | content
    except Exception as error:  # zip, pickle and torch have many ways to say that a file is broken
        sys.exit(f"error: {path} is damaged or not ours ({one_line(error)}); restore a copy, or delete it")


RESUME_ME = 75  # EX_TEMPFAIL
MAY_CHANGE = (  # in a resumed run: what never moves its training
    "eval_interval", "eval_episodes", "eval_processes", "log_interval", "checkpoint_interval", "diagnostics", "track",
    "wandb_project_name", "wandb_entity", "capture_video", "runs_dir", "cuda_graphs",
)  # fmt: skip


def open_run(args: Args) -> tuple[Path, dict | None]:
    """The run directory, locked, and its checkpoint if there is one. ValueError if it holds a run with other arguments.

    What was logged after the checkpoint is cut off: the resumed run logs it again, bit for bit the same on a CPU.
    """
    run_dir = Path(args.runs_dir, re.sub(r"[^\w.+=-]", "-", f"{args.env_id}__{args.exp_name}__{args.seed}"))
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = os.open(run_dir / ".lock", os.O_WRONLY | os.O_CREAT, 0o644)  # never closed: held until the process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"error: {run_dir} is being trained by another process; choose another --exp-name or --seed")
    except OSError:  # a file system without locks
        pass
    config = run_dir / "config.json"
    if not config.exists():
        packages = ("torch", "numpy", "gymnasium", "dm_control", "mujoco")
        versions = {"python": platform.python_version()} | {name: version(name) for name in packages if find_spec(name)}
        git = f"git -C '{Path(__file__).resolve().parent}' describe --always --dirty --abbrev=40"
        commit = subprocess.run(git, shell=True, capture_output=True, text=True, check=False).stdout.strip() or None
        origin = {"command": sys.argv, "versions": versions, "git_commit": commit, "machine": platform.platform()}
        config.with_suffix(".tmp").write_text(json.dumps({"args": asdict(args), **origin}, indent=2))
        config.with_suffix(".tmp").replace(config)
    try:
        now, before = asdict(args), asdict(Args()) | json.loads(config.read_text())["args"]
    except (ValueError, KeyError, TypeError):
        sys.exit(f"error: {config} is damaged; restore a copy of it, or delete {run_dir} to start anew")
    changed = [name for name in before if before[name] != now.get(name) and name not in MAY_CHANGE]
    if changed:
        differences = ", ".join(f"{name} {before[name]} -> {now.get(name)}" for name in changed)
        raise ValueError(
            f"{run_dir} holds a run with other arguments ({differences}): choose another --exp-name or --seed"
        )
    if (run_dir / "agent.pt").exists():
        print(f"{run_dir} is finished; to train anew, choose another --exp-name or --seed, or delete it")
        sys.exit(0)
    checkpoint = load(run_dir / "checkpoint.pt") if (run_dir / "checkpoint.pt").exists() else None
    for path in [run_dir / "eval.csv", *run_dir.glob("events.out.tfevents.*")]:
        length = checkpoint["files"].get(path.name) if checkpoint else None
        if length is None:
            path.unlink(missing_ok=True)
        elif path.stat().st_size > length:
            os.truncate(path, length)
    return run_dir, checkpoint


def play(args: Args, device: torch.device) -> int:
    """Print the returns of the agent in a run directory, or in a file of one. Returns the exit code."""
    path = Path(args.eval_only)
    if path.is_dir():
        path = path / ("agent.pt" if (path / "agent.pt").exists() else "checkpoint.pt")
    if not path.exists():
        raise ValueError(f"{path} does not exist: --eval-only takes a run directory or a file in it")
    saved = load(path)
    if unknown := sorted(saved["args"].keys() - asdict(args).keys()):
        raise ValueError(f"{path} is of another script, which has --{unknown[0]}: play it with that one")
    own = ("seed", "eval_episodes", "eval_processes", "capture_video", "cuda", "cuda_graphs")
    trained = replace(Args(**saved["args"]), **{name: getattr(args, name) for name in own})
    envs, seeds = make_eval_envs(trained), episode_seeds(args.seed, 2, count=args.eval_episodes)
    agent = Agent(trained, envs.single_observation_space.shape[0], envs.single_action_space.shape[0], device)
    agent.load_state_dict(saved["agent"], strict=False)  # agent.pt holds no target networks
    returns = evaluate(agent, envs, seeds, [], path.parent / "videos" / "eval_only.mp4")
    print("\n".join(f"episode {i}: return {value:.1f}" for i, value in enumerate(returns, start=1)))
    print(f"{trained.env_id}, agent step {saved['run']['step']:,}: mean {returns.mean():.1f}, std {returns.std():.1f}")
    return 0


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    sys.stdout.reconfigure(line_buffering=True)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.set_float32_matmul_precision(args.matmul_precision if args.cuda else "highest")
    torch.set_flush_denormal(True)  # moments of dead units decay into them: AdamW at a fifteenth of its speed on a CPU
    device, stop = torch.device("cuda" if args.cuda else "cpu"), []  # stop: the signals that came

    def on_signal(number: int, frame) -> None:
        if number == signal.SIGINT and number in stop:
            sys.exit(130)
        stop.append(number)

    signal.signal(signal.SIGINT, on_signal)  # before the fork, so that the processes of the evaluation carry on
    signal.signal(signal.SIGUSR1, on_signal)
    try:
        check(args)
        if args.eval_only:
            return play(args, device)
        envs = None if args.dry_run else make_eval_envs(args)  # forked before there is a lock or a GPU's context
        signal.signal(signal.SIGTERM, on_signal)  # after the fork: it ends those processes
        env = make_env(args)
        args.action_repeat, args.max_episode_steps = env.action_repeat, env.limit
        if args.cuda:
            torch.cuda.set_stream(torch.cuda.Stream())  # CUDA graphs are captured on the stream that warmed up
        dims = env.observation_space.shape[0], env.action_space.shape[0]
        agent, rb = Agent(args, *dims, device), ReplayBuffer(args, *dims, device)
        print_table(args, agent, rb)
        if args.dry_run:
            return 0
        run_dir, checkpoint = open_run(args)
    except (ValueError, RuntimeError, FloatingPointError, gym.error.Error) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        sys.exit(f"error: cannot write to {args.runs_dir} ({error}); choose another folder with --runs-dir")

    run = SimpleNamespace(step=0, episode=0, episode_return=0.0, actions=[], wall_seconds=0.0, metrics={})
    exploration = torch.Generator().manual_seed(args.seed)
    generators = [torch.default_generator, *torch.cuda.default_generators, agent.generator, rb.generator, exploration]
    parts = {"agent": agent, "replay_buffer": rb}
    parts |= {f"{name} optimizer": optimizer for name, optimizer in agent.optimizers.items()}
    parts |= {f"{name} sparsifier": sparsifier for name, sparsifier in agent.sparsifiers.items()}
    try:
        if checkpoint:
            for name, part in parts.items():
                part.load_state_dict(checkpoint[name])
            for generator, state in zip(generators, checkpoint["generators"], strict=True):
                generator.set_state(state)
            vars(run).update(checkpoint["run"])
            print(f"resuming {run_dir} at agent step {run.step:,}")
        obs, _ = env.reset(seed=episode_seeds(args.seed, 0, run.episode)[0])
        for action in run.actions:  # with its seed, they restore the running episode
            obs, *_ = env.step(np.array(action, np.float32))
        restored = checkpoint is not None and obs.tolist() == checkpoint["obs"]
        if checkpoint and not restored:  # of the environments tried, only BipedalWalker-v3
            print(f"warning: {args.env_id} cannot be restored, the interrupted episode ends here", file=sys.stderr)
            run.episode, run.episode_return, run.actions = run.episode + 1, 0.0, []
            obs, _ = env.reset(seed=episode_seeds(args.seed, 0, run.episode)[0])
        if not restored:
            rb.start_episode(obs)

        if args.track:
            import wandb

            wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, id=run_dir.name, name=run_dir.name,
                       config=asdict(args), sync_tensorboard=True, resume="allow", save_code=True)  # fmt: skip
        writer = SummaryWriter(run_dir, purge_step=run.step + 1 if checkpoint else None)
        if not checkpoint:
            rows = "\n".join(f"|{key}|{value}|" for key, value in asdict(args).items())
            writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")
        del checkpoint  # its replay buffer may be large
        start_step, start = run.step, time.time() - run.wall_seconds
        last_step, last_seconds = run.step, run.wall_seconds  # at the last evaluation
        bar = tqdm(total=args.total_timesteps, initial=run.step, unit="step", disable=None)
        while True:
            run.wall_seconds = time.time() - start
            if stop or (run.step % args.checkpoint_interval == 0 and run.step > start_step):
                writer.flush()
                state = {"args": asdict(args), "run": vars(run), "obs": obs.tolist()}
                state |= {name: part.state_dict() for name, part in parts.items()}
                state["generators"] = [generator.get_state() for generator in generators]
                state["files"] = {path.name: path.stat().st_size for path in run_dir.iterdir()}
                save(run_dir / "checkpoint.pt", state)
            if stop:
                print(f"stopped at agent step {run.step:,}; start the same command again to go on")
                return RESUME_ME

            if run.step % args.eval_interval == 0 or run.step == args.total_timesteps:
                agent.eval()
                scalars = diagnose(agent, rb, seed=run.step) if args.diagnostics else {}
                seeds = episode_seeds(args.seed, 1, run.step, count=args.eval_episodes)
                returns = evaluate(agent, envs, seeds, stop, run_dir / "videos" / f"agent_step_{run.step}.mp4")
                if returns is None:  # a signal came
                    continue
                mean, std, steps = returns.mean(), returns.std(), run.step - last_step
                with open(run_dir / "eval.csv", "a") as file:
                    if file.tell() == 0:
                        file.write("agent_step,env_step,episode_return_mean,episode_return_std,episodes,wall_seconds\n")
                    row = (run.step, run.step * args.action_repeat, mean, std, len(returns), round(run.wall_seconds, 1))
                    print(*row, sep=",", file=file, flush=True)
                    os.fsync(file.fileno())
                scalars |= {"eval/episode_return_mean": mean, "eval/episode_return_std": std}
                for name, sparsifier in agent.sparsifiers.items():
                    scalars[f"sparsity/{name}_sparsity"] = sparsifier.sparsity()
                    scalars[f"sparsity/{name}_topology_updates"] = sparsifier.topology_updates
                    scalars[f"sparsity/{name}_replaced"] = sparsifier.replaced
                for name, value in scalars.items():
                    writer.add_scalar(name, value, run.step)
                speed = steps / (run.wall_seconds - last_seconds)
                left = tqdm.format_interval((args.total_timesteps - run.step) / speed) if steps else "?"
                tqdm.write(
                    f"agent step {run.step:>7,}  return {mean:7.1f} +- {std:5.1f}  {speed:6.1f} steps/s  {left} left"
                )
                last_step, last_seconds = run.step, run.wall_seconds
            if run.step == args.total_timesteps:
                break

            agent.eval()
            action = agent.explore(obs, run.step < args.learning_starts, exploration)
            obs, reward, terminated, truncated, _ = env.step(action)
            rb.add(action, reward, obs, terminated)
            run.actions.append(action.tolist())
            run.step, run.episode_return = run.step + 1, run.episode_return + reward
            if terminated or truncated:
                writer.add_scalar("charts/episodic_return", run.episode_return, run.step)
                writer.add_scalar("charts/episodic_length", len(run.actions), run.step)
                run.episode, run.episode_return, run.actions = run.episode + 1, 0.0, []
                obs, _ = env.reset(seed=episode_seeds(args.seed, 0, run.episode)[0])
                rb.start_episode(obs)
            if run.step >= args.learning_starts:
                agent.train()
                metrics = agent.train_step(rb)
                run.metrics |= zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True)
                if broken := [f"{name} is {value}" for name, value in run.metrics.items() if not math.isfinite(value)]:
                    raise FloatingPointError(broken[0])
                if run.step % args.log_interval == 0:
                    sps = (run.step - start_step) / (time.time() - start)
                    for name, value in {**run.metrics, "charts/SPS": sps}.items():
                        writer.add_scalar(name, value, run.step)
            bar.update()

        writer.close()
        weights = {name: value for name, value in agent.state_dict().items() if "_target." not in name}
        masks = {name: sparsifier.masks for name, sparsifier in agent.sparsifiers.items()}
        save(run_dir / "agent.pt", {"args": asdict(args), "run": vars(run), "agent": weights, "masks": masks})
        (run_dir / "checkpoint.pt").unlink(missing_ok=True)
    except FloatingPointError as error:
        sys.exit(f"error: {error} at agent step {run.step:,}; {run_dir} keeps the last good checkpoint. Under another "
                 "--exp-name, a lower learning rate may help, or an architecture with LayerNorm")  # fmt: skip
    except gym.error.Error as error:
        sys.exit(f"error: {args.env_id}: {error} (agent step {run.step:,})")
    except OSError as error:
        sys.exit(f"error: cannot write to {run_dir} ({error}); free some space and start the same command again")
    print(f"finished: results in {run_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
