"""DDPG with Module-Specific Training (MST) on DeepMind Control and Gymnasium, in one file beside `sparse_utils.py`.

    python mst_ddpg.py --env humanoid-run --width-scale 4 --depth-scale 3     # MST at 4x width and 3x depth
    python mst_ddpg.py --env humanoid-run --critic-regime dense --actor-regime dense   # the original DDPG on SimBa
    python mst_ddpg.py --eval-only runs/humanoid-run__mst_ddpg__1 --capture-video      # play a trained agent

Implements "Rethinking the Role of Dynamic Sparse Training for Scalable Deep Reinforcement Learning" (arXiv
2510.12096, section 4, Fig. 13): DDPG (arXiv 1509.02971) on the networks of SimBa (arXiv 2410.09754), with a dynamic
sparse critic and a static sparse actor. Flags in order: run, environment (from --env), algorithm (--buffer-size),
networks (--hidden-dim), regimes (--critic-regime). Exit codes: 0 finished, 75 stopped, 2 wrong usage, 1 other failure.
"""

import copy
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from importlib.metadata import distributions
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor, nn, optim
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
    cuda_graphs: bool = False  # on a GPU, run each update as one CUDA graph
    compile: bool = False  # fuse the losses with `torch.compile`: a minute or two at the start
    matmul_precision: Literal["highest", "high"] = "high"  # on a GPU: float32 or TF32 products

    # Environment and evaluation. A step is an agent step: one action of the policy
    env_id: Annotated[str, tyro.conf.arg(aliases=("--env",))] = "humanoid-run"  # dm_control task or Gymnasium id
    action_repeat: int | None = None  # environment steps per agent step; None: 2 on DeepMind Control, else 1
    max_episode_steps: int | None = None  # truncates episodes; None: the limit that the environment declares
    total_timesteps: int = 500_000  # agent steps of the whole run; the schedules of eqs. 1 and 2 run over them
    eval_interval: int = 5_000  # agent steps between evaluations
    eval_episodes: int = 10  # episodes per evaluation, without noise, in environments of their own
    eval_processes: bool = torch.cuda.is_available()  # a process for each of these environments
    log_interval: int = 100  # agent steps between writes of the losses to TensorBoard
    checkpoint_interval: int = 10_000  # agent steps between checkpoints; a signal writes one, too
    diagnostics: bool = True  # measure srank, dormant ratio and norms at every evaluation (never changes the training)

    # Algorithm
    buffer_size: int = 1_000_000  # capacity of the replay buffer in time steps
    gamma: float | None = None  # discount factor; None: 1 - 5 / max_episode_steps, within 0.95 and 0.995
    tau: float = 0.005  # share of the critic in every update of its target
    batch_size: int = 256  # batch size of every update
    learning_starts: int = 5_000  # agent steps of uniformly random actions before training starts
    updates_per_step: int = 2  # updates of every module per agent step, each on its own batch
    clipped_double_q: tyro.conf.DisallowNone[bool | None] = None  # two critics, smaller value; None: not on dm_control
    critic_lr: float = 1e-4  # learning rate of the critic
    actor_lr: float = 1e-4  # learning rate of the actor
    weight_decay: float = 1e-2  # weight decay of critic and actor (AdamW)
    exploration_noise: float = 0.1  # standard deviation on executed actions and on those of both losses

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
    schedule_start: float | None = None  # of eq. 2, as a share of training; None: 0.2 for d2s, 0 for s2d
    schedule_end: float | None = None  # of eq. 2, as a share of training; None: 0.8 for d2s, 1 for s2d


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
    def __init__(self, obs_dim: int, action_dim: int, hidden_dim: int, num_blocks: int):
        super().__init__()
        self.trunk = SimBa(obs_dim, hidden_dim, num_blocks)
        self.action = linear(hidden_dim, action_dim)

    def forward(self, obs: Tensor) -> Tensor:
        return torch.tanh(self.action(self.trunk(obs)))


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
        self.position, self.obs = 0, np.zeros(obs_dim, np.float32)
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
        storage = self.storage[: self.size].to("cpu", copy=True)
        return {"storage": storage, "position": self.position, "obs": torch.from_numpy(self.obs)}

    def load_state_dict(self, state: dict) -> None:
        self.size.fill_(len(state["storage"]))
        self.storage[: self.size] = state["storage"]
        self.position, self.obs = state["position"], state["obs"].numpy()


# ALGORITHM
MODULES = ("critic", "actor")
ALWAYS_DENSE: tuple[str, ...] = ()  # heads that no regime masks, and that the paper does not count


class Agent(nn.Module):
    """Critic with its target, actor, and the statistics of the observations."""

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
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        if args.compile:
            self.critic_loss = torch.compile(self.critic_loss, dynamic=False)
            self.actor_loss = torch.compile(self.actor_loss, dynamic=False)
        if args.cuda_graphs and args.cuda:
            self.update_critic_and_actor = graphed(self, self.update_critic_and_actor, "critic", "actor")

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """Actions without noise in [-1, 1], (batch, action_dim), at observations (batch, obs_dim)."""
        return self.actor(self.normalizer(torch.as_tensor(obs, device=self.device))).cpu().numpy()

    def explore(self, obs: np.ndarray, uniform: bool, generator: torch.Generator) -> np.ndarray:
        """One action (action_dim,) at obs (obs_dim,): uniformly random, or the policy's with noise. Counts obs in."""
        self.normalizer.update(torch.as_tensor(obs, device=self.device))
        if uniform:
            return torch.rand(self.action_dim, generator=generator).numpy() * 2 - 1
        noise = self.args.exploration_noise * torch.randn(self.action_dim, generator=generator).numpy()
        return (self.act(obs[None])[0] + noise).clip(-1, 1)

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
        """One update of actor, critic and target, in this order and each with what is new by then."""
        batch = rb.sample(self.args.batch_size)
        obs, next_obs = self.normalizer(batch.obs), self.normalizer(batch.next_obs)
        self.critic.requires_grad_(False)  # the actor's loss trains the actor alone
        actor_loss = self.actor_loss(obs, self.noise(batch))
        self.critic.requires_grad_(True)
        actor_grad_norm = self.optimize("actor", actor_loss)

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
            "plasticity/critic_grad_norm": critic_grad_norm,
            "plasticity/actor_grad_norm": actor_grad_norm,
        }

    def actor_loss(self, obs: Tensor, noise: Tensor) -> Tensor:
        return -self.critic(obs, (self.actor(obs) + noise).clamp(-1, 1)).min(1).values.mean()

    def critic_loss(self, obs: Tensor, next_obs: Tensor, batch: Batch, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, Q (batch, 1 or 2) and its target (batch,). Observations are normalised."""
        with torch.no_grad():
            next_action = (self.actor(next_obs) + noise).clamp(-1, 1)
            next_q = self.critic_target(next_obs, next_action).min(1).values
            q_target = batch.reward + self.args.gamma * (1 - batch.terminated) * next_q
        q = self.critic(obs, batch.action)
        return (q - q_target[:, None]).square().sum(1).mean(), q, q_target

    def noise(self, batch: Batch) -> Tensor:
        return torch.empty_like(batch.action).normal_(generator=self.generator) * self.args.exploration_noise


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
    critic_input = torch.cat([obs, batch.action], 1)
    return pathologies(agent, nn.ReLU, lambda: {
        "critic": torch.cat([q.trunk(critic_input) for q in agent.critic.q], 1), "actor": agent.actor.trunk(obs),
    })  # fmt: skip


# OPERATIONS: the same in all scripts
class DMControl(gym.Env):  # a task of the suite
    _max_episode_steps = 1000  # of all tasks but lqr's, which have no limit

    def __init__(self, env_id: str, seed: int, render_mode: str | None = None):
        suite = import_module("dm_control.suite")  # only now: it reads MUJOCO_GL
        self.dmc = suite.load(*env_id.partition("-")[::2], task_kwargs={"random": seed})  # of lqr's model, too
        spaces = {k: gym.spaces.Box(-np.inf, np.inf, x.shape, x.dtype) for k, x in self.dmc.observation_spec().items()}
        self.observation_space = gym.spaces.Dict(list(spaces.items()))  # a list keeps the order of the spec
        spec = self.dmc.action_spec()  # lqr's limits of +-1e10 stand for none: its actions are in [-1, 1], too
        low, high = (np.where(np.abs(x) < 1e9, x, np.sign(x)) for x in (spec.minimum, spec.maximum))
        self.action_space = gym.spaces.Box(low, high, dtype=np.float64)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        if seed is not None:
            self.dmc.task.random.seed(seed)
        return self.dmc.reset().observation, {}

    def step(self, action: np.ndarray):
        step = self.dmc.step(action)
        terminated = step.last() and step.discount == 0  # in the suite only lqr's episodes can terminate
        return step.observation, step.reward, terminated, step.last() and not terminated, {}

    def render(self) -> np.ndarray:
        return self.dmc.physics.render(480, 480, camera_id=0)


class AgentEnv(gym.Wrapper):
    """An environment as agents see it: agent steps, actions in [-1, 1], flat float32 observations, a time limit."""

    def __init__(self, args: Args):
        gymnasium = ":" in args.env_id or args.env_id in gym.registry  # "package:Name-v0" imports its package
        kwargs = {"disable_env_checker": True} if gymnasium else {"seed": args.seed}
        kwargs |= {"render_mode": "rgb_array"} if args.capture_video else {}
        try:
            import_module("mujoco").set_mju_user_warning(lambda text: None)  # the same for every environment's model
            super().__init__((gym.make if gymnasium else DMControl)(args.env_id, **kwargs))
            if args.capture_video:  # notice now what is missing for it
                self.env.reset(), self.env.render()
        except Exception as error:  # of whatever library makes it
            raise ValueError(f"no {args.env_id}: {error!r:.300} (tested: dm_control 1.0.50, mujoco 3.17.0)") from error
        raw, actions = self.env.observation_space, self.env.action_space
        real = isinstance(actions, gym.spaces.Box) and np.issubdtype(actions.dtype, np.floating)
        if not (real and actions.is_bounded() and len(actions.shape) == 1 and actions.shape[0]):
            raise ValueError(f"{args.env_id} has actions {actions}: agents need a flat, bounded Box of real numbers")
        if not raw.is_np_flattenable:
            raise ValueError(f"{args.env_id} has observations {raw}: agents need a Box, or several of them")
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, gym.spaces.flatten_space(raw).shape, np.float32)
        self.action_space = gym.spaces.Box(-1, 1, actions.shape, np.float32)
        self.action_repeat = args.action_repeat or (1 if gymnasium else 2)
        limits, layer = [args.max_episode_steps or math.inf], self.env
        while layer is not None:  # of every TimeLimit, or the environment's own
            limits.append((getattr(layer, "_max_episode_steps", None) or math.inf) / self.action_repeat)
            layer = getattr(layer, "env", None)
        self.limit = math.ceil(min(limits)) if min(limits) < math.inf else None

    def flat(self, obs) -> np.ndarray:
        flat = gym.spaces.flatten(self.env.observation_space, obs).astype(np.float32)
        if flat.shape != self.observation_space.shape or not np.isfinite(flat).all():
            raise gym.error.Error(f"at step {self.steps} of an episode, the observation is not usable: {obs!r:.60}")
        return flat

    def reset(self, **kwargs):
        self.steps = 0
        return self.flat(self.env.reset(**kwargs)[0]), {}

    def step(self, action: np.ndarray):
        if not np.isfinite(action).all():
            raise FloatingPointError("an action of the actor is not finite")
        low, high = self.env.action_space.low.astype(np.float64), self.env.action_space.high
        action = (low + (action.astype(np.float64) + 1) * (high - low) / 2).clip(low, high)
        self.steps, total_reward = self.steps + 1, 0.0
        for _ in range(self.action_repeat):
            obs, reward, terminated, truncated, _ = self.env.step(action.astype(self.env.action_space.dtype))
            number = np.asarray(reward)
            if number.size != 1 or number.dtype.kind not in "biuf" or not abs(number.item()) < 3e38:  # in float32
                raise gym.error.Error(f"at step {self.steps} of an episode, the reward is no finite number: {reward}")
            total_reward += float(number.item())
            if terminated or truncated:
                break
        if self.limit is None and self.steps >= 100_000:
            raise gym.error.Error("an episode took 100,000 agent steps; limit it with --max-episode-steps")
        return self.flat(obs), total_reward, bool(terminated), bool(truncated) or self.steps == self.limit, {}


def episode_seeds(*key: int, count: int = 1) -> list[int]:
    """Seeds of episodes, from the run's seed and their place in the run."""
    return np.random.SeedSequence(key).generate_state(count).tolist()


def evaluate(agent: Agent, envs: gym.vector.VectorEnv, seeds: list, stop: list, video: Path) -> np.ndarray | None:
    """The returns of an episode with each seed, without noise; None if a signal came meanwhile."""
    returns, running, frames = np.zeros(len(seeds)), np.ones(len(seeds), bool), []
    try:
        obs, _ = envs.reset(seed=seeds)
        while running.any() and not stop:
            if agent.args.capture_video and running[0]:
                frames.append(envs.envs[0].render())
            obs, reward, terminated, truncated, _ = envs.step(agent.act(obs))
            returns += np.where(running, reward, 0)  # what has ended goes on with an episode that does not count
            running &= ~(terminated | truncated)
    except (EOFError, ConnectionError, KeyboardInterrupt):
        for process in envs.processes:  # quietly
            process.kill()
        envs.closed = True
        time.sleep(1)  # the signal that ended one of them may reach this one later
        if not stop:
            sys.exit("error: a process of the evaluation died; go on with --no-eval-processes")
    if frames and not stop:
        video.parent.mkdir(exist_ok=True)
        import_module("imageio.v2").mimwrite(video, frames, fps=30, macro_block_size=2)  # h264 needs even sizes
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
            print("capturing an update as CUDA graph: if that fails, train with --no-cuda-graphs")
            graph = torch.cuda.CUDAGraph()
            for generator in (agent.generator, rb.generator):
                graph.register_generator_state(generator)
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                metrics = update(rb)  # computes nothing yet, but advances the clocks of the sparsifiers
        else:
            for sparsifier in sparsifiers:
                sparsifier.updates += 1
        graph.replay()
        return metrics

    return run


def pathologies(agent: Agent, kind: type[nn.Module], features: Callable[[], dict[str, Tensor]]) -> dict[str, float]:
    """srank (Kumar et al. 2021) of `features()`, dormant ratio (Sokar et al. 2023) of `kind` of layers, and norms."""
    hidden: dict[str, list[Tensor]] = {name: [] for name in MODULES}
    layers = [(name, layer) for name in MODULES for layer in getattr(agent, name).modules() if isinstance(layer, kind)]
    hooks = [layer.register_forward_hook(lambda *io, name=name: hidden[name].append(io[2])) for name, layer in layers]
    metrics, features_of = {}, features()
    for hook in hooks:
        hook.remove()
    for name, x in features_of.items():
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
    total = np.zeros(2, int)
    for name, sparsifier in agent.sparsifiers.items():
        named = getattr(agent, name).named_parameters()
        size = sum(p.numel() for key, p in named if not key.startswith(ALWAYS_DENSE))  # as the paper counts
        active = size - sum(int((~mask).sum()) for mask in sparsifier.masks.values())
        print(f"{name:<10}{sparsifier.regime:>8}{size:>14,}{active:>14,}{sparsifier.sparsity():>10.4f}")
        total += size, active
    print(f"{'agent':<10}{total[0]:>22,}{total[1]:>14,}", *(f"without the {name}" for name in ALWAYS_DENSE))
    limit = f"at most {args.max_episode_steps:,} agent steps" if args.max_episode_steps else "no declared limit"
    print(f"episodes of {limit}, discount factor {args.gamma:g}, replay buffer of {rb.storage.nbytes / 2**30:.2f} GiB")


def check(args: Args) -> None:
    """ValueError for the first flag that cannot be. What tyro, torch and the Sparsifier refuse is not in here."""
    if os.name != "posix":
        raise ValueError("runs are locked and stopped as on Linux, macOS and WSL: use one of these")
    for name, value in asdict(args).items():
        low = 0.001 if name.endswith(("scale", "temperature")) else int(type(value) is int and name != "seed")
        high = 1 if name in ("gamma", "tau") else math.inf
        if type(value) in (int, float) and name != "target_entropy" and not (low <= value <= high and value < math.inf):
            raise ValueError(f"--{name.replace('_', '-')} {value}: write a number from {low} to {high}")
    if re.search(r"[^\w.+=-]", args.exp_name):
        raise ValueError(f"--exp-name {args.exp_name} names a folder: write letters, digits and _ . + = - only")
    if args.cuda and not torch.cuda.is_available():
        raise ValueError("--cuda needs a GPU that torch sees: train with --no-cuda")


def save(path: Path, content: dict) -> None:
    """Write to a temporary file, sync and rename: `path` holds the old or the new content, never a part of it."""
    if not all(tensor.isfinite().all() for tensor in content["agent"].values()):
        raise FloatingPointError("a weight is not finite")
    temporary = path.with_suffix(".tmp")
    try:
        torch.save(content, temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch raises a RuntimeError when it cannot write
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path.name}: {error!r}") from error


def load(path: Path) -> dict:
    """Read tensors and plain values; a file can hold nothing else, so opening it runs no code."""
    try:
        if broken := zipfile.ZipFile(path).testzip():  # torch.load does not compare checksums
            raise ValueError(f"the checksum of {broken} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
        return {name: content[name] for name in ("args", "run", "agent")} | content
    except Exception as error:  # zip, pickle and torch have many ways to say that a file is broken
        sys.exit(f"error: {path} is missing, damaged or not ours ({error!r:.200}); restore a copy, or delete it")


def load_agent(args: Args) -> tuple[Args, dict]:
    """What the run directory of --eval-only holds, and the arguments to play it with: its own, but for how to play."""
    path, now, default = Path(args.eval_only, "agent.pt"), asdict(args), asdict(Args())
    saved = load(path if path.exists() else path.with_name("checkpoint.pt"))
    own = ("seed", "eval_episodes", "eval_processes", "capture_video", "cuda", "eval_only")
    if foreign := sorted(saved["args"].keys() - now.keys()):
        raise ValueError(f"{args.eval_only} is another script's, with --{foreign[0].replace('_', '-')}: play it there")
    if ignored := [name for name in now if now[name] != default[name] and name not in own]:
        raise ValueError(f"--eval-only plays with the flags of the run: leave out --{ignored[0].replace('_', '-')}")
    return replace(Args(**saved["args"]), buffer_size=1_000, **{name: now[name] for name in own}), saved


def open_run(args: Args) -> tuple[Path, dict | None]:
    """The run directory, locked, and its checkpoint; logs are cut back to it. ValueError for a run with other flags."""
    may_change = (  # what never moves the training
        "eval_interval", "eval_episodes", "eval_processes", "log_interval", "checkpoint_interval", "diagnostics",
        "track", "wandb_project_name", "wandb_entity", "capture_video", "runs_dir", "cuda_graphs",
    )  # fmt: skip
    run_dir = Path(args.runs_dir, re.sub(r"[^\w.+=-]", "-", f"{args.env_id}__{args.exp_name}__{args.seed}"))
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = os.open(run_dir / ".lock", os.O_WRONLY | os.O_CREAT, 0o644)  # never closed: held until the process ends
    fcntl = import_module("fcntl")  # not on Windows
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"error: {run_dir} is being trained by another process; choose another --exp-name or --seed")
    except OSError:  # a file system without locks
        pass
    config, temporary = run_dir / "config.json", run_dir / "config.tmp"
    if not config.exists():
        versions = {x.name: x.version for x in distributions()} | {"python": platform.python_version()}
        git = f"git -C '{Path(__file__).resolve().parent}' describe --always --dirty --abbrev=40"
        commit = subprocess.run(git, shell=True, capture_output=True, text=True, check=False).stdout.strip() or None
        origin = {"command": sys.argv, "versions": versions, "git_commit": commit, "machine": platform.platform()}
        temporary.write_text(json.dumps({"args": asdict(args), **origin}, indent=2))
        temporary.replace(config)
    try:
        now, before = asdict(args), asdict(Args()) | json.loads(config.read_text())["args"]
    except (ValueError, KeyError, TypeError):
        sys.exit(f"error: {config} is damaged; restore a copy of it, or delete {run_dir} to start anew")
    changes = [f"{x} {before[x]} -> {now.get(x)}" for x in before if before[x] != now.get(x) and x not in may_change]
    if changes:
        raise ValueError(f"{run_dir} holds a run with other flags ({', '.join(changes)}): choose another --exp-name")
    if (run_dir / "agent.pt").exists():
        print(f"{run_dir} is finished; to train anew, choose another --exp-name or --seed, or delete it")
        sys.exit(0)
    checkpoint = load(run_dir / "checkpoint.pt") if (run_dir / "checkpoint.pt").exists() else None
    files = checkpoint["files"] if checkpoint else {}
    for path in [run_dir / "eval.csv", *run_dir.glob("events.out.tfevents.*")]:
        if path.name not in files:
            path.unlink(missing_ok=True)
        elif path.stat().st_size > files[path.name]:
            os.truncate(path, files[path.name])
    return run_dir, checkpoint


def main() -> int:
    args, saved, stop = tyro.cli(Args, description=__doc__), None, []  # stop: the signals that came

    def on_signal(number: int, frame) -> None:
        stop.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second ctrl-C ends the process at once

    try:
        check(args)
        if args.eval_only:
            args, saved = load_agent(args)
        sys.stdout.reconfigure(line_buffering=True)
        import_module("threading").excepthook = lambda error: None  # TensorBoard raises its thread's error here as well
        gym.logger.min_level = 50  # an error in a process of the evaluation is said once, below
        torch.backends.cudnn.deterministic = args.torch_deterministic
        torch.set_float32_matmul_precision(args.matmul_precision if args.cuda else "highest")
        torch.set_flush_denormal(True)  # AdamW is 15 times as slow on a CPU where moments of dead units decay to them
        opengl = args.capture_video or args.env_id == "quadruped-escape"  # whose terrain is drawn
        os.environ.setdefault("MUJOCO_GL", "egl" if opengl else "disable")
        for number in (signal.SIGINT, signal.SIGUSR1):  # before the fork: the evaluation's processes carry on
            signal.signal(number, on_signal)
        env, device = AgentEnv(args), torch.device("cuda" if args.cuda else "cpu")
        makers = [lambda: AgentEnv(args)] * (1 if args.dry_run else args.eval_episodes)
        if args.eval_processes and not opengl:  # before lock and GPU. Another package's threads would survive no fork
            envs = gym.vector.AsyncVectorEnv(makers, context="fork" if type(env.unwrapped) is DMControl else "spawn")
        else:
            envs = gym.vector.SyncVectorEnv(makers)
        signal.signal(signal.SIGTERM, on_signal)  # after the fork: it ends those processes
        args.action_repeat, args.max_episode_steps = env.action_repeat, env.limit
        if args.cuda:
            torch.cuda.set_stream(torch.cuda.Stream())  # CUDA graphs are captured on the stream that warmed up
        dims = env.observation_space.shape[0], env.action_space.shape[0]
        agent, rb = Agent(args, *dims, device).eval(), ReplayBuffer(args, *dims, device)
        print_table(args, agent, rb)
        if args.dry_run:
            return 0
        if saved:
            agent.load_state_dict(agent.state_dict() | saved["agent"])  # agent.pt holds no target networks
            seeds = episode_seeds(args.seed, 2, count=args.eval_episodes)
            returns = evaluate(agent, envs, seeds, [], Path(args.eval_only, "videos", "eval_only.mp4"))
            print(f"agent step {saved['run']['step']:,}: {returns.mean():.1f} +- {returns.std():.1f}", returns.round(1))
            return 0
        run_dir, checkpoint = open_run(args)
    except (ValueError, RuntimeError, FloatingPointError, gym.error.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        sys.exit(f"error: cannot write to {args.runs_dir} ({error}); choose another folder with --runs-dir")
    run = SimpleNamespace(step=0, episode=0, episode_return=0.0, actions=[], wall_seconds=0.0, metrics={}, scalars={})
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
        if run.actions:  # with its seed, they restore the running episode
            obs, _ = env.reset(seed=episode_seeds(args.seed, 0, run.episode)[0])
            for action in run.actions:
                obs, *_ = env.step(np.array(action, np.float32))
            if obs.tolist() != checkpoint["obs"]:  # of the environments tried, only BipedalWalker-v3
                print(f"warning: {args.env_id} cannot be restored, the interrupted episode ends here", file=sys.stderr)
                run.episode, run.episode_return, run.actions = run.episode + 1, 0.0, []
        if args.track:
            import_module("wandb").init(
                project=args.wandb_project_name, entity=args.wandb_entity, id=run_dir.name, name=run_dir.name,
                config=asdict(args), sync_tensorboard=True, resume="allow", save_code=True,
            )  # fmt: skip
        writer = SummaryWriter(run_dir, purge_step=run.step if checkpoint else None)
        if not checkpoint:
            rows = (f"|{name}|{value}|" for name, value in asdict(args).items())
            writer.add_text("hyperparameters", "\n".join(("|param|value|", "|-|-|", *rows)))
        del checkpoint  # its replay buffer may be large
        start = time.time() - run.wall_seconds
        bar = tqdm(total=args.total_timesteps, initial=run.step, unit="step", disable=None)
        while True:
            run.wall_seconds = time.time() - start
            if stop or (run.step and run.step % args.checkpoint_interval == 0):
                writer.flush()
                state = {"args": asdict(args), "run": vars(run), "obs": obs.tolist() if run.actions else None}
                state |= {name: part.state_dict() for name, part in parts.items()}
                state["generators"] = [generator.get_state() for generator in generators]
                state["files"] = {path.name: path.stat().st_size for path in run_dir.iterdir()}
                save(run_dir / "checkpoint.pt", state)
            if stop:
                print(f"stopped at agent step {run.step:,}; start the same command again to go on")
                return 75  # EX_TEMPFAIL
            if run.step % args.eval_interval == 0 or run.step == args.total_timesteps:
                seeds = episode_seeds(args.seed, 1, run.step, count=args.eval_episodes)
                returns = evaluate(agent, envs, seeds, stop, run_dir / "videos" / f"agent_step_{run.step}.mp4")
                if returns is None:  # a signal came
                    continue
                mean, std, seconds = float(returns.mean()), float(returns.std()), round(run.wall_seconds, 1)
                with open(run_dir / "eval.csv", "a") as file:
                    if file.tell() == 0:
                        file.write("agent_step,env_step,episode_return_mean,episode_return_std,episodes,wall_seconds\n")
                    file.write(f"{run.step},{run.step * args.action_repeat},{mean},{std},{len(returns)},{seconds}\n")
                    file.flush()
                    os.fsync(file.fileno())
                run.scalars |= {"eval/episode_return_mean": mean, "eval/episode_return_std": std}
                for name, sparsifier in agent.sparsifiers.items():
                    run.scalars |= {f"sparsity/{name}_{key}": value for key, value in sparsifier.statistics().items()}
                run.scalars |= diagnose(agent, rb, seed=run.step) if args.diagnostics else {}
                speed = run.step / run.wall_seconds
                left = f"{tqdm.format_interval((args.total_timesteps - run.step) / speed)} left" if run.step else ""
                tqdm.write(f"agent step {run.step:>7,}  return {mean:7.1f} +- {std:5.1f}  {speed:6.1f} steps/s  {left}")
            for name, value in run.scalars.items():  # of this step, all after its checkpoint
                writer.add_scalar(name, value, run.step)
            if run.step == args.total_timesteps:
                break

            if not run.actions:
                obs, _ = env.reset(seed=episode_seeds(args.seed, 0, run.episode)[0])
                rb.start_episode(obs)
            action = agent.explore(obs, run.step < args.learning_starts, exploration)
            obs, reward, terminated, truncated, _ = env.step(action)
            rb.add(action, reward, obs, terminated)
            run.actions.append(action.tolist())
            run.step, run.episode_return, run.scalars = run.step + 1, run.episode_return + reward, {}
            if terminated or truncated:
                run.scalars = {"charts/episodic_return": run.episode_return, "charts/episodic_length": len(run.actions)}
                run.episode, run.episode_return, run.actions = run.episode + 1, 0.0, []
            if run.step >= args.learning_starts:
                agent.train()
                metrics = agent.train_step(rb)
                agent.eval()
                run.metrics |= zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True)
                if broken := [f"{name} is {value}" for name, value in run.metrics.items() if not math.isfinite(value)]:
                    raise FloatingPointError(f"{broken[0]}; a lower learning rate or LayerNorm may help")
                if run.step % args.log_interval == 0:
                    run.scalars |= {**run.metrics, "charts/SPS": run.step / (time.time() - start)}
            bar.update()
        writer.close()
        weights = {name: value for name, value in agent.state_dict().items() if "_target." not in name}
        masks = {name: sparsifier.masks for name, sparsifier in agent.sparsifiers.items()}
        save(run_dir / "agent.pt", {"args": asdict(args), "run": vars(run), "agent": weights, "masks": masks})
        (run_dir / "checkpoint.pt").unlink(missing_ok=True)
    except (FloatingPointError, gym.error.Error, ImportError) as error:
        sys.exit(f"error: {error} ({args.env_id}, agent step {run.step:,}); {run_dir} keeps its last good checkpoint")
    except OSError as error:
        sys.exit(f"error: cannot write to {run_dir} ({error}); free some space and start the same command again")
    print(f"finished: results in {run_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
