"""SAC with Module-Specific Training (MST) on DeepMind Control and Gymnasium.

    python mst_sac.py --env humanoid-run --width-scale 4 --depth-scale 3  # the paper's MST, 207M
    python mst_sac.py --env dog-run --critic-regime dense --actor-regime dense    # without MST
    python play.py runs/humanoid-run__mst_sac__1 --video                  # play a trained agent

Implements "Rethinking the Role of Dynamic Sparse Training for Scalable Deep Reinforcement
Learning" (arXiv 2510.12096, Figs. 13, 14): SAC (arXiv 1812.05905) on the networks of SimBa (arXiv
2410.09754), critic dynamic sparse, actor static sparse. The same command resumes a stopped run.
Exit codes: 0 finished, 75 stopped by a signal, 2 wrong flags, 1 other failure.
"""

import copy
import fcntl
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from dataclasses import asdict, dataclass
from importlib.metadata import distributions
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal, NamedTuple, NoReturn

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn, optim
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from sparse_utils import Sparsifier, graphed, hooked, plasticity

Regime = Literal["dense", "sst", "dst", "s2d", "d2s"]


@dataclass
class Args:
    exp_name: str = Path(__file__).stem  # name of the experiment, part of the run directory
    seed: int = 1  # seed of networks, masks, exploration, replay and environment
    cuda: bool = torch.cuda.is_available()  # train on the GPU
    track: bool = False  # track the run with Weights and Biases, too (WANDB_PROJECT and WANDB_ENTITY say where)
    runs_dir: str = "runs"  # folder of the run directories
    dry_run: bool = False  # print the table of networks and memory, then stop
    cuda_graphs: bool = False  # on a GPU, run each update as one CUDA graph
    compile: bool = False  # fuse the losses with `torch.compile`: a minute or two at the start

    # Environment and evaluation. A step is an agent step: one action of the policy
    env_id: Annotated[str, tyro.conf.arg(aliases=("--env",))] = "humanoid-run"  # dm_control task or Gymnasium id
    action_repeat: int | None = None  # environment steps per agent step; None: 2 on DeepMind Control, else 1
    max_episode_steps: int | None = None  # agent steps until an episode is truncated; None: the environment's limit
    total_timesteps: int = 500_000  # agent steps of the whole run, over which drop fraction and sparsity change
    eval_interval: int = 5_000  # agent steps between evaluations
    eval_episodes: int = 10  # episodes per evaluation, without noise, in environments of their own
    log_interval: int = 100  # agent steps between writes of the losses to TensorBoard
    checkpoint_minutes: float = 10.0  # minutes between checkpoints; a signal writes one, too

    # Algorithm
    buffer_size: int = 1_000_000  # capacity of the replay buffer in time steps
    gamma: float | None = None  # discount factor; None: 1 - 5 / max_episode_steps, within 0.95 and 0.995
    tau: float = 0.005  # how far each update moves the target critic towards the critic (1: all the way)
    batch_size: int = 256  # batch size of every update
    learning_starts: int = 5_000  # agent steps of uniformly random actions before training starts
    updates_per_step: int = 2  # updates of every module per agent step, each on its own batch
    clipped_double_q: tyro.conf.DisallowNone[bool | None] = None  # two critics, smaller value; None: not on dm_control
    critic_lr: float = 1e-4  # learning rate of the critic
    actor_lr: float = 1e-4  # learning rate of the actor
    temperature_lr: float = 1e-4  # learning rate of the temperature
    weight_decay: float = 1e-2  # weight decay of critic and actor (AdamW)
    initial_temperature: float = 0.01  # temperature at the start
    target_entropy: float | None = None  # entropy that the temperature steers to; None: -0.5 per action dimension

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
    distribution: Literal["er", "uniform"] = "er"  # how a module's layers share its zeros; er leaves small ones denser
    growth: Literal["rigl", "set"] = "rigl"  # connections grow where the gradient is largest (rigl) or at random (set)
    topology_update_interval: int = 1000  # a module's updates between changes of its topology
    drop_fraction: float = 0.5  # share of the connections replaced at the first change, decays to 0 (eq. 1)
    schedule_start: float | None = None  # share of training after which sparsity changes; None: 0.2 for d2s, 0 for s2d
    schedule_end: float | None = None  # share of training after which it stays as it is; None: 0.8 for d2s, 1 for s2d


# NETWORKS (SimBa)
def linear(in_dim: int, out_dim: int, he_normal: bool = False) -> nn.Linear:
    """Orthogonal weights, or normal of variance 2 / in_dim after truncation at two standard deviations."""
    layer = nn.Linear(in_dim, out_dim)
    nn.init.zeros_(layer.bias)
    if he_normal:
        std = math.sqrt(2 / in_dim) / 0.87962566103423978  # of what truncation leaves of a standard deviation
        nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    else:
        nn.init.orthogonal_(layer.weight)
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
        for _ in range(2 if twin else 1):
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

    def add(self, obs, action, reward, next_obs, terminated: bool, first: bool) -> None:
        transition = np.concatenate([obs, action, [reward], next_obs, [terminated]], dtype=np.float32)
        self.storage[self.position] = torch.from_numpy(transition)
        self.position = (self.position + 1) % len(self.storage)
        self.size.add_(1).clamp_(max=len(self.storage))

    def sample(self, batch_size: int, generator: torch.Generator | None = None) -> Batch:
        generator, device = generator or self.generator, self.storage.device
        index = (torch.rand(batch_size, dtype=torch.float64, generator=generator, device=device) * self.size).long()
        obs, action, reward, next_obs, terminated = self.storage[index].split(self.dims, 1)
        return Batch(obs, action, reward[:, 0], next_obs, terminated[:, 0])

    def state_dict(self) -> dict:
        return {"storage": self.storage[: self.size].to("cpu", copy=True), "position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.size.fill_(len(state["storage"]))
        self.storage[: self.size] = state["storage"]
        self.position = state["position"]


# ALGORITHM
MODULES = ("critic", "actor")


class Agent(nn.Module):
    """Critic with its target, actor, temperature, and the statistics of the observations."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device):
        super().__init__()
        if args.gamma is None:  # SimBa's rule
            args.gamma = min(max(1 - 5 / (args.max_episode_steps or math.inf), 0.95), 0.995)
        if args.clipped_double_q is None:
            args.clipped_double_q = ":" in args.env_id or args.env_id in gym.registry  # not on dm_control
        torch.manual_seed(args.seed)
        self.args, self.device, self.action_dim = args, device, action_dim
        self.generator = torch.Generator(device).manual_seed(args.seed)
        self.critic, self.actor = make_networks(args, obs_dim, action_dim)
        self.normalizer = RunningNorm(obs_dim)
        self.log_temp = nn.Parameter(torch.tensor(args.initial_temperature).log())
        self.target_entropy = -0.5 * action_dim if args.target_entropy is None else args.target_entropy
        self.to(device)

        training_steps = args.total_timesteps - args.learning_starts + 1  # the first follows the last random action
        fast = {"fused": True, "capturable": device.type == "cuda"}
        self.optimizers, self.sparsifiers = {}, {}
        for i, name in enumerate(MODULES):
            module, lr = getattr(self, name), getattr(args, f"{name}_lr")
            self.optimizers[name] = optim.AdamW(module.parameters(), lr, weight_decay=args.weight_decay, **fast)
            self.sparsifiers[name] = Sparsifier(
                module, self.optimizers[name], getattr(args, f"{name}_regime"), getattr(args, f"{name}_sparsity"),
                distribution=args.distribution, growth=args.growth, update_interval=args.topology_update_interval,
                drop_fraction=args.drop_fraction, schedule_start=args.schedule_start, schedule_end=args.schedule_end,
                total_updates=max(args.updates_per_step * training_steps, 1), seed=len(MODULES) * args.seed + i,
            )  # fmt: skip
        self.optimizers["temperature"] = optim.AdamW([self.log_temp], args.temperature_lr, weight_decay=0, **fast)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        if args.compile:
            for name in MODULES:
                setattr(self, f"{name}_loss", torch.compile(getattr(self, f"{name}_loss"), dynamic=False))
        if args.cuda_graphs and args.cuda:
            sparsifiers = self.sparsifiers.values()
            self.update_critic_and_actor = graphed(self.update_critic_and_actor, self, sparsifiers, self.generator)

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """Actions without noise in [-1, 1], (batch, action_dim), at observations (batch, obs_dim)."""
        return self.actor(self.normalizer(torch.as_tensor(obs, device=self.device)))[0].tanh().cpu().numpy()

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
        self.optimizers[name].zero_grad()
        loss.backward()
        self.sparsifiers[name].step()  # RigL: changes the topology when that is due, and masks the gradient
        norm = nn.utils.get_total_norm([p.grad for p in getattr(self, name).parameters()])
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
            torch._foreach_lerp_([*self.critic_target.parameters()], [*self.critic.parameters()], self.args.tau)
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


@torch.no_grad()
def diagnose(agent: Agent, rb: ReplayBuffer, seed: int) -> dict[str, float]:
    """Pathologies of each module on 256 uniformly drawn transitions (section 3, Figs. 3, 7 and 10).

    Features are the input of the heads, hidden units those of all blocks. Moves nothing: its generator is its own.
    """
    batch = rb.sample(256, torch.Generator(agent.device).manual_seed(seed))
    obs, modules = agent.normalizer(batch.obs), {name: getattr(agent, name) for name in MODULES}
    with hooked(modules, nn.ReLU) as hidden:
        critic = torch.cat([q.trunk(torch.cat([obs, batch.action], 1)) for q in agent.critic.q], 1)
        actor = agent.actor.trunk(obs)
    return plasticity(modules, {"critic": critic, "actor": actor}, hidden)


# OPERATIONS: the same in all scripts
def size_of(args: Args, module: str, width: int, blocks: int) -> tuple[int, int]:
    """Width and number of blocks of a module that has `width` and `blocks` at scale 1."""
    scale = getattr(args, f"{module}_scale")
    width_scale, depth_scale = scale or args.width_scale or args.scale, scale or args.depth_scale or args.scale
    return max(1, round(width * width_scale)), max(1, round(blocks * depth_scale))


def fail(message: str, code: int = 2) -> NoReturn:
    """End with one line: what the user can mend in flags, environment or run directory. Else there is a traceback."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def say(line: str) -> None:
    """Print at once. Where nobody reads any more (a closed terminal, pipe or stdout), the run goes on in silence."""
    for name, text in (("stderr", ""), ("stdout", f"{line}\n")):  # what tqdm left in stderr must not fail at the exit
        try:
            print(text, end="", file=getattr(sys, name), flush=True)
        except (OSError, ValueError):
            setattr(sys, name, open(os.devnull, "w"))


class DMControl(gym.Env):
    """A task of the DeepMind Control suite, such as dog-run. Its episodes do not terminate, they run out of time."""

    def __init__(self, env_id: str, seed: int):
        os.environ.setdefault("MUJOCO_GL", "disable")  # "egl" to render; dm_control reads it when it is imported
        suite = importlib.import_module("dm_control.suite")
        domain, _, task = env_id.partition("-")
        if (domain, task) not in suite.ALL_TASKS:
            fail(f"{env_id} is neither a task of the DeepMind Control suite, such as dog-run, nor a Gymnasium id")
        self.dmc = suite.load(domain, task, {"random": seed}, {"flat_observation": True})
        obs, action = self.dmc.observation_spec()["observations"], self.dmc.action_spec()
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, obs.shape, obs.dtype)
        self.action_space = gym.spaces.Box(action.minimum, action.maximum, dtype=np.float64)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        if seed is not None:
            self.dmc.task.random.seed(seed)
        return self.dmc.reset().observation["observations"], {}

    def step(self, action: np.ndarray):
        step = self.dmc.step(action)
        return step.observation["observations"], step.reward, False, step.last(), {}


def flat(space: gym.Space, obs) -> np.ndarray:
    """An observation as a float32 vector, NaN if it is not of its space. The bounds of Boxes are not looked at."""
    if isinstance(space, gym.spaces.Dict):
        return np.concatenate([flat(part, obs.get(key)) for key, part in space.items()])
    if isinstance(space, gym.spaces.Box):
        return np.float32(obs if np.shape(obs) == space.shape else [np.nan]).ravel()
    return np.float32(gym.spaces.flatten(space, obs) if space.contains(obs) else [np.nan])


def make_env(args: Args, **kwargs) -> gym.Env:
    """Agent steps with actions in [-1, 1] and flat float32 observations. Sets the `args` left to the environment."""
    try:
        if re.search(r":|-v\d+$", args.env_id) or args.env_id in gym.registry:  # "package:Name-v0" imports its package
            env = gym.make(args.env_id, disable_env_checker=True, **kwargs)
            repeat, limit = args.action_repeat or 1, env.spec.max_episode_steps
        else:
            env, repeat, limit = DMControl(args.env_id, args.seed), args.action_repeat or 2, 1_000
    except (gym.error.Error, ModuleNotFoundError) as error:
        fail(f"no {args.env_id}: {error} Install its package (pip install -e) or name its folder in PYTHONPATH")
    box, space = env.action_space, env.observation_space
    flat_box = isinstance(box, gym.spaces.Box) and box.dtype.kind == "f" and len(box.shape) == 1 and box.is_bounded()
    if not (flat_box and (box.low < box.high).all() and space.is_np_flattenable):
        fail(f"{args.env_id} has actions {box}, observations {space}: needed are a bounded Box and a fixed number")
    limits = [x for x in (args.max_episode_steps, limit and math.ceil(limit / repeat)) if x]  # in agent steps
    args.action_repeat, args.max_episode_steps = repeat, min(limits, default=None)
    env = gym.wrappers.TransformAction(env, lambda action: action.clip(box.low, box.high), box)  # rounding may leave it
    env = gym.wrappers.TransformReward(env, lambda reward: np.asarray(reward, float).item())
    env = gym.wrappers.TimeLimit(env, repeat * (args.max_episode_steps or 100_000))
    env = episode = gym.wrappers.RecordEpisodeStatistics(env, stats_key="mst")

    def vector(obs) -> np.ndarray:
        if np.isfinite(flat_obs := flat(space, obs)).all():
            return flat_obs
        given, step = " ".join(f"{obs}".split()), f"{args.env_id}, at step {episode.episode_lengths} of an episode"
        sys.exit(f"error: {step}, gives an observation that is not finite or not of its space: {given:.300}")

    env = gym.wrappers.TransformObservation(env, vector, gym.spaces.Box(-np.inf, np.inf, (gym.spaces.flatdim(space),)))
    return gym.wrappers.RepeatAction(gym.wrappers.RescaleAction(env, -1, 1), repeat)


def episode_seeds(*key: int, count: int = 1) -> list[int]:
    """Seeds of episodes, from the run's seed and their place in the run."""
    return np.random.SeedSequence(key).generate_state(count).tolist()


def evaluate(agent: Agent, envs: list[gym.Env], seeds: list[int], stop: list | tuple = ()) -> np.ndarray:
    """The returns of an episode with each seed, without noise. Ends at once where `stop` is filled."""
    returns, running = np.zeros(len(seeds)), list(range(len(seeds)))
    obs = np.stack([env.reset(seed=seed)[0] for env, seed in zip(envs, seeds, strict=True)])
    while running and not stop:
        actions = agent.act(obs)  # of all: the size of a batch must not change a result
        for i in list(running):
            obs[i], reward, terminated, truncated, _ = envs[i].step(actions[i])
            returns[i] += reward
            if terminated or truncated:
                running.remove(i)
    return returns


def write(path: Path, content: dict | str) -> None:
    """Save aside, sync and rename: `path` holds the old or the new content, never a part of it."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(content, file) if isinstance(content, dict) else file.write(content.encode())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def open_run(args: Args, modules: dict[str, dict[str, int]]) -> Path:
    """The run directory, locked. Ends where it holds a finished or another run, or another process trains it."""
    may_change = ("eval_interval", "eval_episodes", "log_interval", "checkpoint_minutes", "track", "runs_dir")
    name = re.sub(r"[^\w.+=-]", "-", f"{args.env_id}__{args.exp_name}__{args.seed}")
    run_dir, now = Path(args.runs_dir, name).expanduser(), asdict(args)
    config, eval_csv = run_dir / "config.json", run_dir / "eval.csv"
    try:
        was = asdict(Args()) | json.loads(config.read_text())["args"] if config.exists() else now
        changed = [f"{x} {was[x]} -> {now.get(x)}" for x in was if was[x] != now.get(x) and x not in may_change]
        rows = eval_csv.read_text().split() if eval_csv.exists() else []
        run_dir.mkdir(parents=True, exist_ok=True)
        files = {path.name for path in run_dir.iterdir()}
    except (OSError, ValueError, LookupError, TypeError) as error:
        fail(f"{run_dir} cannot be used ({error!r}): mend it, or choose another --runs-dir or --exp-name")
    if changed:
        fail(f"{run_dir} holds a run with other flags ({', '.join(changed)}): choose another --exp-name")
    if rows and rows[-1].startswith(f"{args.total_timesteps},"):
        say(f"{run_dir} is finished; to train anew, choose another --exp-name or --seed, or delete it")
        sys.exit(0)
    if files & {"eval.csv", "metrics.csv", "agent.pt", "checkpoint.pt"} and {"config.json", "checkpoint.pt"} - files:
        fail(f"{run_dir} has results, but no checkpoint.pt with its config.json: move it, or choose another --exp-name")
    lock = os.open(run_dir / ".lock", os.O_WRONLY | os.O_CREAT, 0o644)  # never closed: held until the process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{run_dir} is being trained by another process; choose another --exp-name or --seed", code=75)
    except OSError:  # a file system without locks
        pass
    if not config.exists():
        git, here = "git describe --always --dirty --abbrev=40", Path(__file__).resolve().parent
        commit = subprocess.run(git, cwd=here, shell=True, capture_output=True, text=True, check=False).stdout.strip()
        versions = {x.name: x.version for x in distributions()} | {"python": sys.version}
        content = {"script": Path(__file__).stem, "args": now, "modules": modules, "command": sys.argv}
        write(config, json.dumps(content | {"versions": versions, "git_commit": commit or None}, indent=2))
    return run_dir


def main() -> int:
    args = tyro.cli(Args, description=__doc__.replace("\n", "\n "))  # else tyro joins its lines
    for name, value in vars(args).items():  # whole numbers from 1, others from 0, shares up to 1
        low = 0.001 if name.endswith(("scale", "temperature")) else int(type(value) is int and name != "seed")
        high = 1 if re.search("gamma|tau|fraction|schedule", name) else 0.999 if "sparsity" in name else math.inf
        if type(value) in (int, float) and not low <= value <= high and name != "target_entropy":
            fail(f"--{name.replace('_', '-')} {value}: write a number from {low} to {high}".replace(" to inf", " up"))
    if args.cuda and not torch.cuda.is_available():
        fail("--cuda needs a GPU that torch sees: train with --no-cuda")
    if args.track and not importlib.util.find_spec("wandb"):
        fail("--track needs Weights and Biases: pip install wandb")
    if args.learning_starts > args.total_timesteps:
        print("warning: nothing will be trained: --learning-starts is beyond --total-timesteps", file=sys.stderr)
    torch.set_flush_denormal(True)  # AdamW is 15 times as slow on a CPU where moments of dead units decay to them
    if args.cuda:
        torch.set_float32_matmul_precision("high")  # TF32 products
        torch.cuda.set_stream(torch.cuda.Stream())  # CUDA graphs are captured on the stream that warmed up
    env, device = make_env(args), torch.device("cuda" if args.cuda else "cpu")
    dims = env.observation_space.shape[0], env.action_space.shape[0]
    agent = Agent(args, *dims, device).eval()
    try:
        rb = ReplayBuffer(args, *dims, device)
    except RuntimeError as error:  # torch's allocator
        raise MemoryError(f"is --buffer-size {args.buffer_size} too large for {dims[0]} observations?") from error
    for name, sparsifier in agent.sparsifiers.items():
        say(f"{name:>8}: {sparsifier}")
    gib = sum(p.nbytes * (4 if p.requires_grad else 1) for p in agent.parameters()) / 2**30
    say(f"{gib:.2f} GiB of weights, targets, gradients, moments; {rb.storage.nbytes / 2**30:.2f} GiB of replay buffer")
    limit = args.max_episode_steps or "100,000 (none is declared)"
    say(f"limit of episodes: {limit} agent steps, discount factor {args.gamma:g}")
    if args.dry_run:
        return 0
    run_dir = open_run(args, {name: sparsifier.counts() for name, sparsifier in agent.sparsifiers.items()})
    checkpoint_pt = run_dir / "checkpoint.pt"
    envs = [make_env(args) for _ in range(args.eval_episodes)]
    stop: list[int] = []  # the signals that came: the run stops after the current step, or at once at a second Ctrl-C
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        if (each, signal.getsignal(each)) != (signal.SIGHUP, signal.SIG_IGN):  # ignored under nohup
            signal.signal(each, lambda x, _: (stop.append(x), signal.signal(signal.SIGINT, signal.SIG_DFL)))
    run = SimpleNamespace(step=0, episode=0, actions=[], obs=[], wall_seconds=0.0, losses={}, scalars={})
    run.eval_csv = "agent_step,env_step,episode_return_mean,episode_return_std,episodes,wall_seconds\n"
    run.metrics_csv = ["agent_step,tag,value\n"]
    exploration = torch.Generator().manual_seed(args.seed)
    generators = [torch.default_generator, *torch.cuda.default_generators, agent.generator, rb.generator, exploration]
    parts = [agent, rb, *agent.optimizers.values(), *agent.sparsifiers.values()]
    if checkpoint_pt.exists():
        try:
            checkpoint = torch.load(checkpoint_pt, map_location="cpu", weights_only=True)
        except Exception as error:  # torch, zip and pickle have many ways to say that a file is broken
            fail(f"{checkpoint_pt} cannot be read ({error!r:.100}): restore a copy, or delete {run_dir}")
        for part, state in zip(parts, checkpoint["parts"], strict=True):
            part.load_state_dict(state)
        for generator, state in zip(generators, checkpoint["generators"], strict=True):
            generator.set_state(state)
        vars(run).update(checkpoint["run"])
        del checkpoint, state  # its replay buffer may be large
    say(f"training from agent step {run.step:,}: {run_dir}")
    obs, _ = env.reset(seed=episode_seeds(args.seed, 0, run.episode)[0])
    for action in run.actions:  # with its seed, they restore the running episode
        obs, *_ = env.step(np.array(action, np.float32))
    if run.actions and obs.tolist() != run.obs:  # it depends on more than that, as BipedalWalker-v3 does
        print(f"warning: {args.env_id} cannot be restored exactly: its running episode ends here", file=sys.stderr)
        run.episode, run.actions = run.episode + 1, []
        obs, _ = env.reset(seed=episode_seeds(args.seed, 0, run.episode)[0])
    if args.track:
        wandb = importlib.import_module("wandb")
        wandb.init(id=run_dir.name, name=run_dir.name, resume="allow", config=asdict(args), sync_tensorboard=True)
    writer = SummaryWriter(run_dir, purge_step=run.step)  # hides what a killed process logged after its checkpoint
    start, trained = time.monotonic() - run.wall_seconds, None  # step and time at which this process began to train
    saved = run.wall_seconds if run.step else -math.inf  # a run has a checkpoint before it has results
    bar = tqdm(total=args.total_timesteps, initial=run.step, unit="step", disable=None if sys.stderr else True)
    while True:  # save, evaluate and log the state after `run.step`, then act and train
        run.wall_seconds, finished = time.monotonic() - start, run.step == args.total_timesteps
        if stop or run.wall_seconds - saved >= 60 * args.checkpoint_minutes:  # before what this step logs
            writer.flush()
            state = {"agent": agent.state_dict(), "parts": [part.state_dict() for part in parts]}
            state |= {"run": vars(run) | {"obs": obs.tolist()}, "generators": [x.get_state() for x in generators]}
            write(checkpoint_pt, state)
            saved = run.wall_seconds
        if stop:
            finished = False  # not if a signal comes later
            break
        evaluated = finished or run.step % args.eval_interval == 0
        if evaluated:
            returns = evaluate(agent, envs, episode_seeds(args.seed, 1, run.step, count=args.eval_episodes), stop)
            if stop:
                continue
            mean, std, seconds = returns.mean().item(), returns.std().item(), round(run.wall_seconds, 1)
            run.eval_csv += f"{run.step},{run.step * args.action_repeat},{mean},{std},{len(returns)},{seconds}\n"
            run.scalars |= {"eval/episode_return_mean": mean, "eval/episode_return_std": std}
            for name, sparsifier in agent.sparsifiers.items():
                run.scalars |= {f"sparsity/{name}_{key}": value for key, value in sparsifier.statistics().items()}
            run.scalars |= diagnose(agent, rb, seed=run.step) if run.step > 0 else {}
            bar.clear()
            say(f"agent step {run.step:>9,}  return {mean:7.1f} +- {std:5.1f}  after {seconds:,} s")
        for name, value in run.scalars.items():
            writer.add_scalar(name, value, run.step)
            run.metrics_csv.append(f"{run.step},{name},{value}\n")
        if evaluated:
            write(run_dir / "metrics.csv", "".join(run.metrics_csv))
            if finished:
                break
            write(run_dir / "eval.csv", run.eval_csv)
        action = agent.explore(obs, run.step < args.learning_starts, exploration)
        if not np.isfinite(action).all():
            sys.exit(f"error: the actor's action at agent step {run.step} is {action}; a lower learning rate may help")
        next_obs, reward, terminated, truncated, info = env.step(action)
        if not math.isfinite(reward):
            sys.exit(f"error: {args.env_id} gave the reward {reward} at agent step {run.step}")
        rb.add(obs, action, reward, next_obs, bool(terminated), first=not run.actions)
        run.step, run.scalars, obs = run.step + 1, {}, next_obs
        run.actions.append(action.tolist())
        if terminated or truncated:
            run.scalars |= {"charts/episodic_return": info["mst"]["r"], "charts/episodic_length": len(run.actions)}
            run.episode, run.actions = run.episode + 1, []
            obs, _ = env.reset(seed=episode_seeds(args.seed, 0, run.episode)[0])
        if run.step >= args.learning_starts:
            trained = trained or (run.step - 1, time.monotonic())
            agent.train()
            run.losses |= agent.train_step(rb)
            agent.eval()
            if run.step % args.log_interval == 0:
                run.scalars |= {name: value.item() for name, value in run.losses.items()}
                run.scalars["charts/SPS"] = (run.step - trained[0]) / (time.monotonic() - trained[1])
                if not all(map(math.isfinite, run.scalars.values())):
                    sys.exit(f"error: not finite at agent step {run.step} (lower the learning rate?): {run.scalars}")
        bar.update()
    for each in (writer, bar, env, *envs):
        each.close()
    if not finished:
        say(f"stopped at agent step {run.step:,}; start the same command again to go on")
        return 75  # EX_TEMPFAIL
    weights = {name: value for name, value in agent.state_dict().items() if "_target." not in name}
    masks = {name: sparsifier.masks for name, sparsifier in agent.sparsifiers.items()}
    write(run_dir / "agent.pt", {"args": asdict(args), "step": run.step, "agent": weights, "masks": masks})
    write(run_dir / "eval.csv", run.eval_csv)  # its last row says that the run is finished
    checkpoint_pt.unlink(missing_ok=True)
    say(f"finished: results in {run_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
