"""MR.Q with Module-Specific Training (MST) on DeepMind Control and Gymnasium, in one file beside `sparse_utils.py`.

    python mst_mrq.py --env dog-run --critic-regime dst --scale 5         # the paper's MST at 5x width and depth
    python mst_mrq.py --env humanoid-run --encoder-arch 4 --critic-arch 4 --actor-arch 3 \\
        --encoder-regime dense --critic-regime dense --actor-regime dense     # MR.Q without MST
    python mst_mrq.py --eval-only runs/dog-run__mst_mrq__1 --capture-video    # play a trained agent

Implements "Rethinking the Role of Dynamic Sparse Training for Scalable Deep Reinforcement Learning" (arXiv
2510.12096): the networks of Appendix C, the algorithm MR.Q of Appendix B.3 (arXiv 2501.16142) and one training regime
per module (section 4): encoder dense, critic dynamic sparse, actor static sparse. Flags in order: run, environment
(from --env), algorithm (--buffer-size), networks (--encoder-arch), regimes (--encoder-regime). Exit codes: 0 finished,
75 stopped, 2 wrong usage, 1 other failure.
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
import torch.nn.functional as F
import tyro
from torch import Tensor, nn, optim
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from sparse_utils import Sparsifier, dormant_ratio, stable_rank

Regime = Literal["dense", "sst", "dst", "s2d", "d2s"]
Arch = Literal[1, 2, 3, 4, 5, 6]


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
    env_id: Annotated[str, tyro.conf.arg(aliases=("--env",))] = "dog-run"  # dm_control task or Gymnasium id
    action_repeat: int | None = None  # environment steps per agent step; None: 2 on DeepMind Control, else 1
    max_episode_steps: int | None = None  # truncates episodes; None: the limit that the environment declares
    total_timesteps: int = 500_000  # agent steps of the whole run; the schedules of eqs. 1 and 2 run over them
    eval_interval: int = 5_000  # agent steps between evaluations
    eval_episodes: int = 10  # episodes per evaluation, without noise, in environments of their own
    eval_processes: bool = torch.cuda.is_available()  # a process for each of these environments
    log_interval: int = 100  # agent steps between writes of the losses to TensorBoard
    checkpoint_interval: int = 10_000  # agent steps between checkpoints; a signal writes one, too
    diagnostics: bool = True  # measure srank, dormant ratio and norms at every evaluation (never changes the training)

    # Algorithm (Tables 1 and 2 of the paper)
    buffer_size: int = 1_000_000  # capacity of the replay buffer in time steps
    gamma: float = 0.99  # discount factor
    batch_size: int = 256  # batch size of every update
    learning_starts: int = 10_000  # agent steps of uniformly random actions before training starts
    target_network_frequency: int = 250  # training steps between target copies, with as many encoder updates each
    encoder_lr: float = 1e-4  # learning rate of the encoder
    critic_lr: float = 3e-4  # learning rate of the critic
    actor_lr: float = 3e-4  # learning rate of the actor
    weight_decay: float = 1e-4  # weight decay of all three (AdamW)
    max_grad_norm: float = 20.0  # largest norm of the critic's gradient (clipped after masking)
    exploration_noise: float = 0.2  # standard deviation of the noise on executed actions
    policy_noise: float = 0.2  # standard deviation of the noise on target actions
    noise_clip: float = 0.3  # largest absolute noise on target actions
    encoder_horizon: int = 5  # steps that the encoder is unrolled for
    q_horizon: int = 3  # steps of the n-step return

    # Networks (Appendix C). Types: 1 ReLU, 2 ELU, 3 and 4 with LayerNorm before it, 5 and 6 with residuals, too
    encoder_arch: Arch = 6  # type of the encoder
    critic_arch: Arch = 6  # type of the critic
    actor_arch: Arch = 5  # type of the actor
    residual: Literal["pre", "post"] = "pre"  # residuals start before or after LayerNorm and activation (Fig. 16)
    hidden_dim: int = 512  # width of every module at scale 1, with one block
    scale: float = 1.0  # width and depth of every module
    width_scale: float | None = None  # width of every module, instead of `scale`
    depth_scale: float | None = None  # number of blocks of every module, instead of `scale`
    encoder_scale: float | None = None  # width and depth of the encoder, instead of the scales above
    critic_scale: float | None = None  # width and depth of the critic, instead of the scales above
    actor_scale: float | None = None  # width and depth of the actor, instead of the scales above

    # Training regimes (section 2.1): dense, static sparse, dynamic sparse, sparse to dense, dense to sparse
    encoder_regime: Regime = "dense"  # training regime of the encoder
    critic_regime: Regime = "dst"  # training regime of the critic
    actor_regime: Regime = "sst"  # training regime of the actor
    encoder_sparsity: float = 0.6  # share of zeros in the encoder's weights (s2d starts from it, d2s ends at it)
    critic_sparsity: float = 0.6  # share of zeros in the critic's weights
    actor_sparsity: float = 0.6  # share of zeros in the actor's weights
    distribution: Literal["er", "uniform", "uniform-dense-output"] = "er"  # of the zeros over the layers of a module
    growth: Literal["rigl", "set"] = "rigl"  # connections grow where the gradient is largest (rigl) or at random (set)
    topology_update_interval: int = 1000  # a module's updates between changes of its topology
    drop_fraction: float = 0.5  # share of the connections replaced at the first change, decays to 0 (eq. 1)
    schedule_start: float | None = None  # of eq. 2, as a share of training; None: 0.2 for d2s, 0 for s2d
    schedule_end: float | None = None  # of eq. 2, as a share of training; None: 0.8 for d2s, 1 for s2d


# NETWORKS (Appendix C)
def weight_init(layer: nn.Module) -> None:
    if isinstance(layer, nn.Linear):
        nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(2))
        nn.init.zeros_(layer.bias)


class LNActiv(nn.Module):
    """The activation of a type, after a LayerNorm without parameters in types 3 to 6. Diagnostics hook its output."""

    def __init__(self, arch: int):
        super().__init__()
        self.layer_norm = arch >= 3
        self.activ = F.relu if arch % 2 else F.elu

    def forward(self, x: Tensor) -> Tensor:
        return self.activ(F.layer_norm(x, x.shape[-1:]) if self.layer_norm else x)


class Block(nn.Module):
    def __init__(self, hidden_dim: int):
        super().__init__()
        self.linear1 = nn.Linear(hidden_dim, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, hidden_dim)


class BlockMLP(nn.Module):
    """`projection`, then blocks of two linear layers, then `output`; residual in types 5 and 6 (Figs. 1 and 16)."""

    def __init__(self, in_dim: int, out_dim: int, hidden_dim: int, num_blocks: int, arch: int, residual: str = "pre"):
        super().__init__()
        self.residual = residual if arch >= 5 else None
        self.ln_activ = LNActiv(arch)
        self.projection = nn.Linear(in_dim, hidden_dim)
        self.blocks = nn.ModuleList(Block(hidden_dim) for _ in range(num_blocks))
        self.output = nn.Linear(hidden_dim, out_dim)

    def features(self, x: Tensor) -> Tensor:
        x = self.projection(x)
        for block in self.blocks:
            u = self.ln_activ(x)
            y = block.linear2(self.ln_activ(block.linear1(u)))
            if self.residual == "pre":
                y = x + y  # eq. 5
            elif self.residual == "post":
                y = u + y  # eq. 6
            x = y
        return self.ln_activ(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.features(x))


class Encoder(nn.Module):
    """State encoder `zs`, state-action encoder `zsa` and the linear predictor of [done, next zs, reward logits]."""

    def __init__(
        self, obs_dim: int, action_dim: int, hidden_dim: int, zs_dim: int, za_dim: int, zsa_dim: int,
        num_blocks: int, arch: int, residual: str = "pre", num_bins: int = 65,
    ):  # fmt: skip
        super().__init__()
        self.prediction_dims = (1, zs_dim, num_bins)
        self.ln_activ = LNActiv(arch)
        self.za_activ = LNActiv(2 - arch % 2)  # the type's activation without LayerNorm
        self.zs_mlp = BlockMLP(obs_dim, zs_dim, hidden_dim, num_blocks, arch, residual)
        self.za = nn.Linear(action_dim, za_dim)
        self.zsa_mlp = BlockMLP(zs_dim + za_dim, zsa_dim, hidden_dim, num_blocks, arch, residual)
        self.predictor = nn.Linear(zsa_dim, sum(self.prediction_dims))
        self.apply(weight_init)

    def zs(self, obs: Tensor) -> Tensor:
        return self.ln_activ(self.zs_mlp(obs))

    def zsa(self, zs: Tensor, action: Tensor) -> Tensor:
        return self.zsa_mlp(torch.cat([zs, self.za_activ(self.za(action))], 1))

    def predict(self, zs: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latent dynamics (eq. 7): done (batch, 1), next zs (batch, zs_dim), reward logits (batch, bins)."""
        return self.predictor(self.zsa(zs, action)).split(self.prediction_dims, 1)


class Critic(nn.Module):
    def __init__(self, zsa_dim: int, hidden_dim: int, num_blocks: int, arch: int, residual: str = "pre"):
        super().__init__()
        self.q1 = BlockMLP(zsa_dim, 1, hidden_dim, num_blocks, arch, residual)
        self.q2 = BlockMLP(zsa_dim, 1, hidden_dim, num_blocks, arch, residual)
        self.apply(weight_init)

    def forward(self, zsa: Tensor) -> Tensor:
        return torch.cat([self.q1(zsa), self.q2(zsa)], 1)  # (batch, 2)


class Actor(nn.Module):
    def __init__(
        self, zs_dim: int, action_dim: int, hidden_dim: int, num_blocks: int, arch: int, residual: str = "pre"
    ):
        super().__init__()
        self.mlp = BlockMLP(zs_dim, action_dim, hidden_dim, num_blocks, arch, residual)
        self.apply(weight_init)

    def forward(self, zs: Tensor) -> tuple[Tensor, Tensor]:
        pre_activation = self.mlp(zs)
        return torch.tanh(pre_activation), pre_activation


def make_networks(args: Args, obs_dim: int, action_dim: int) -> tuple[Encoder, Critic, Actor]:
    hidden_dim, num_blocks = size_of(args, "encoder", args.hidden_dim, 1)
    zs_dim, za_dim, zsa_dim = hidden_dim, size_of(args, "encoder", args.hidden_dim / 2, 1)[0], hidden_dim
    dims = (obs_dim, action_dim, hidden_dim, zs_dim, za_dim, zsa_dim, num_blocks)
    critic_size, actor_size = size_of(args, "critic", args.hidden_dim, 1), size_of(args, "actor", args.hidden_dim, 1)
    return (
        Encoder(*dims, args.encoder_arch, args.residual),
        Critic(zsa_dim, *critic_size, args.critic_arch, args.residual),
        Actor(zs_dim, action_dim, *actor_size, args.actor_arch, args.residual),
    )


class TwoHot(nn.Module):
    """Rewards as distributions over 65 bins at symexp(linspace(-10, 10, 65)), which reach +-22,025 (Table 2)."""

    def __init__(self):
        super().__init__()
        x = torch.linspace(-10, 10, 65, dtype=torch.float64)
        bins = (x.sign() * x.abs().expm1()).to(torch.get_default_dtype())
        self.register_buffer("bins", bins, persistent=False)

    def encode(self, x: Tensor) -> Tensor:
        """(...) to (..., 65): a value between two bins is shared linearly between them, one outside clamps."""
        x = x.clamp(self.bins[0], self.bins[-1])
        upper = torch.searchsorted(self.bins, x).clamp(min=1)  # bins[upper - 1] <= x <= bins[upper]
        low, high = self.bins[upper - 1], self.bins[upper]
        weight = (x - low) / (high - low)
        two_hot = x.new_zeros(*x.shape, len(self.bins)).scatter_(-1, upper[..., None] - 1, 1 - weight[..., None])
        return two_hot.scatter_(-1, upper[..., None], weight[..., None])

    def cross_entropy(self, x: Tensor, logits: Tensor) -> Tensor:
        """(...) and (..., 65) to (...), eq. 9."""
        return -(self.encode(x) * logits.log_softmax(-1)).sum(-1)


# REPLAY BUFFER
class Batch(NamedTuple):
    """Windows of `encoder_horizon` steps. After a termination the window stays on the terminal observation."""

    obs: Tensor  # (batch, horizon + 1, obs_dim)
    action: Tensor  # (batch, horizon, action_dim)
    reward: Tensor  # (batch, horizon), 0 after a termination
    terminated: Tensor  # (batch, horizon), 1 where the step ended in a termination
    index: Tensor  # (batch,) slots where the windows start


class ReplayBuffer:
    """Ring buffer of time steps with LAP sampling (Fujimoto et al. 2020): P(start) is proportional to its priority.

    An episode of T steps fills T + 1 slots: each holds an observation and the action, reward and termination that
    followed it; the last one holds the final observation alone. A start has priority 0, and is never sampled, until its
    window is stored or has ended in a termination. The last starts of a truncated episode stay at 0.
    """

    ROW = 128  # priorities are summed row by row in float64, so that sampling stays exact and fast at any size

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device):
        self.capacity, self.horizon, self.dims = args.buffer_size, args.encoder_horizon, [obs_dim, action_dim, 3]
        self.storage = torch.zeros(self.capacity, sum(self.dims), device=device)
        _, _, rest = self.storage.split(self.dims, 1)
        self.reward, self.terminated, self.is_transition = rest.unbind(1)
        n_rows = math.ceil(self.capacity / self.ROW)
        self.priority = torch.zeros(n_rows * self.ROW, device=device)
        self.row_total = torch.zeros(n_rows, dtype=torch.float64, device=device)
        self.max_priority = torch.ones((), device=device)  # of all priorities that were ever given
        self.any_terminated = torch.zeros((), device=device)  # 1 once a termination was ever stored
        self.generator = torch.Generator(device).manual_seed(args.seed)
        self.position = -1  # slot of the newest observation
        self.size = 0  # slots in use
        self.episode_length = 0

    def start_episode(self, obs: np.ndarray) -> None:
        """Store the first observation of an episode."""
        self._append(obs, [])
        self.episode_length = 0

    def add(self, action: np.ndarray, reward: float, next_obs: np.ndarray, terminated: bool) -> None:
        """Store the step taken from the newest observation, and the observation it led to."""
        step = np.concatenate([action, [reward, terminated, 1]], dtype=np.float32)
        self.storage[self.position, -len(step) :] = torch.from_numpy(step)
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
        self.storage[self.position] = F.pad(torch.from_numpy(obs), (0, sum(self.dims) - len(obs)))
        starts = [(self.position - back) % self.capacity for back in new_starts]
        index = torch.tensor([self.position, *starts], device=self.storage.device)
        self._set_priority(index, (index != self.position) * self.max_priority)

    def _set_priority(self, index: Tensor, priority: Tensor) -> None:
        self.priority.scatter_reduce_(0, index, priority, "amax", include_self=False)  # of several for one, the largest
        row = index // self.ROW
        self.row_total[row] = self.priority.view(-1, self.ROW)[row].sum(1, dtype=torch.float64)

    def update_priority(self, index: Tensor, priority: Tensor) -> None:
        """Set priorities (batch,) at `index` (batch,)."""
        self._set_priority(index, priority)
        self.max_priority.copy_(torch.maximum(self.max_priority, priority.max()))

    def sample(self, batch_size: int) -> Batch:
        """Draw starts with replacement, first the row, then the slot within it.

        `u < 1` in float64 keeps `u * total < total`, so no index is past the end and none has priority 0.
        """
        row_total = self.row_total.cumsum(0)
        u = torch.rand(2, batch_size, 1, dtype=torch.float64, generator=self.generator, device=row_total.device)
        row = torch.searchsorted(row_total, u[0, :, 0] * row_total[-1], right=True)
        total = self.priority.view(-1, self.ROW)[row].double().cumsum(1)  # (batch, ROW)
        column = torch.searchsorted(total, u[1] * total[:, -1:], right=True)
        return self.windows(row * self.ROW + column[:, 0])

    def windows(self, index: Tensor) -> Batch:
        """The windows that start at `index` (batch,)."""
        step = torch.arange(self.horizon, device=index.device)
        alive = (1 - self.terminated[(index[:, None] + step) % self.capacity]).cumprod(1)  # after each step
        offset = F.pad(alive, (2, 0), value=1)[:, :-1].cumsum(1).long() - 1  # 0, 1, ... until the terminal observation
        slot = (index[:, None] + offset) % self.capacity  # (batch, horizon + 1)
        slots = self.storage.index_select(0, slot.flatten()).view(*slot.shape, -1)
        obs, action, rest = slots.split(self.dims, 2)
        return Batch(obs, action[:, :-1], rest[:, :-1, 0], rest[:, :-1, 1], index)

    def reward_scale(self) -> Tensor:
        """Mean |reward| of the stored transitions, at least 1e-8."""
        return (self.reward.abs().sum() / self.is_transition.sum()).clamp(min=1e-8)

    def tensors(self) -> dict[str, Tensor]:
        used = {"storage": self.storage[: self.size], "priority": self.priority[: self.size]}
        return used | {name: getattr(self, name) for name in ("row_total", "max_priority", "any_terminated")}

    def state_dict(self) -> dict:
        counters = {"position": self.position, "size": self.size, "episode_length": self.episode_length}
        return counters | {name: tensor.to("cpu", copy=True) for name, tensor in self.tensors().items()}

    def load_state_dict(self, state: dict) -> None:
        self.position, self.size, self.episode_length = (state[x] for x in ("position", "size", "episode_length"))
        for name, tensor in self.tensors().items():
            tensor.copy_(state[name])


# ALGORITHM (Appendix B.3)
DYNAMICS_WEIGHT, REWARD_WEIGHT, TERMINAL_WEIGHT, PRE_ACTIVATION_WEIGHT = 1.0, 0.1, 0.1, 1e-5  # Table 1
PRIORITY_EXPONENT, MIN_PRIORITY = 0.4, 1.0
MODULES = ("encoder", "critic", "actor")
ALWAYS_DENSE: tuple[str, ...] = ("predictor",)  # heads that no regime masks, and that the paper does not count


class Agent(nn.Module):
    """The three modules with their targets and the scales of the reward."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device):
        super().__init__()
        if not args.q_horizon <= args.encoder_horizon < args.buffer_size:
            raise ValueError("--encoder-horizon must be at least --q-horizon, and less than --buffer-size")
        torch.manual_seed(args.seed)
        self.args, self.device, self.action_dim = args, device, action_dim
        self.generator = torch.Generator(device).manual_seed(args.seed)
        self.encoder, self.critic, self.actor = make_networks(args, obs_dim, action_dim)
        self.two_hot = TwoHot()
        self.register_buffer("reward_scale", torch.ones(()))
        self.register_buffer("target_reward_scale", torch.zeros(()))
        self.register_buffer("termination_seen", torch.zeros(()))
        self.to(device)

        training_steps = args.total_timesteps - args.learning_starts + 1  # the first follows the last random action
        total_updates = dict.fromkeys(MODULES, training_steps)
        frequency = args.target_network_frequency
        total_updates["encoder"] = math.ceil(training_steps / frequency) * frequency
        fast = {"fused": True, "capturable": device.type == "cuda"}
        self.optimizers, self.sparsifiers = {}, {}
        for i, name in enumerate(MODULES):
            module, lr = getattr(self, name), getattr(args, f"{name}_lr")
            self.optimizers[name] = optim.AdamW(module.parameters(), lr, weight_decay=args.weight_decay, **fast)
            self.sparsifiers[name] = Sparsifier(
                module, self.optimizers[name], getattr(args, f"{name}_regime"), getattr(args, f"{name}_sparsity"),
                distribution=args.distribution, growth=args.growth, update_interval=args.topology_update_interval,
                drop_fraction=args.drop_fraction, schedule_start=args.schedule_start, schedule_end=args.schedule_end,
                total_updates=max(total_updates[name], 1), seed=len(MODULES) * args.seed + i,
                exclude=ALWAYS_DENSE if name == "encoder" else (),
            )  # fmt: skip
        self.encoder_target, self.critic_target, self.actor_target = (
            copy.deepcopy(module).requires_grad_(False) for module in (self.encoder, self.critic, self.actor)
        )
        if args.compile:
            self.encoder_loss = torch.compile(self.encoder_loss, dynamic=False)
            self.critic_loss = torch.compile(self.critic_loss, dynamic=False)
            self.actor_loss = torch.compile(self.actor_loss, dynamic=False)
        if args.cuda_graphs and args.cuda:
            self.update_encoder = graphed(self, self.update_encoder, "encoder")
            self.update_critic_and_actor = graphed(self, self.update_critic_and_actor, "critic", "actor")

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """Actions without noise in [-1, 1], (batch, action_dim), at observations (batch, obs_dim)."""
        return self.actor(self.encoder.zs(torch.as_tensor(obs, device=self.device)))[0].cpu().numpy()

    def explore(self, obs: np.ndarray, uniform: bool, generator: torch.Generator) -> np.ndarray:
        """One action (action_dim,) at obs (obs_dim,): uniformly random, or the policy's with Gaussian noise."""
        if uniform:
            return torch.rand(self.action_dim, generator=generator).numpy() * 2 - 1
        noise = self.args.exploration_noise * torch.randn(self.action_dim, generator=generator).numpy()
        return (self.act(obs[None])[0] + noise).clip(-1, 1)

    def train_step(self, rb: ReplayBuffer) -> dict[str, Tensor]:
        """One update of critic and actor. Every 250 of them, first the target copies and as many encoder updates."""
        if not rb.row_total.any():
            sys.exit("error: no stored episode has the steps of --encoder-horizon: choose a smaller one")
        metrics = {}
        if self.sparsifiers["critic"].updates % self.args.target_network_frequency == 0:
            self.update_targets(rb)
            for _ in range(self.args.target_network_frequency):
                metrics = self.update_encoder(rb)
        return metrics | self.update_critic_and_actor(rb)

    @torch.no_grad()
    def update_targets(self, rb: ReplayBuffer) -> None:
        """Copy the networks and the reward scale to their targets, and take the scale of the rewards stored by now."""
        for name in MODULES:
            target, online = getattr(self, f"{name}_target"), getattr(self, name)
            torch._foreach_copy_(list(target.parameters()), list(online.parameters()))
        self.target_reward_scale.copy_(self.reward_scale)
        self.reward_scale.copy_(rb.reward_scale())
        self.termination_seen.copy_(rb.any_terminated)

    def optimize(self, name: str, loss: Tensor, max_norm: float = math.inf) -> Tensor:
        """Minimise the module's loss. Returns the norm of its gradient after masking, before clipping."""
        parameters = list(getattr(self, name).parameters())
        self.optimizers[name].zero_grad()
        loss.backward()
        self.sparsifiers[name].step()  # RigL: changes the topology when that is due, and masks the gradient
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        if max_norm < math.inf:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        self.optimizers[name].step()
        return norm

    def update_encoder(self, rb: ReplayBuffer) -> dict[str, Tensor]:
        losses = self.encoder_loss(rb.sample(self.args.batch_size))
        grad_norm = self.optimize("encoder", losses["encoder_loss"])
        return {f"losses/{k}": v.detach() for k, v in losses.items()} | {"plasticity/encoder_grad_norm": grad_norm}

    def encoder_loss(self, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            target_zs = self.encoder_target.zs(batch.obs[:, 1:].flatten(0, 1)).view(*batch.action.shape[:2], -1)
            alive = F.pad((1 - batch.terminated).cumprod(1)[:, :-1], (1, 0), value=1)  # (batch, horizon)
        zs, predictions = self.encoder.zs(batch.obs[:, 0]), []
        for action in batch.action.unbind(1):
            predictions.append(self.encoder.predict(zs, action))
            zs = predictions[-1][1]
        done, zs, reward_logits = (torch.stack(steps, 1) for steps in zip(*predictions, strict=True))
        # Eq. 8: means over the batch, summed over the horizon up to a termination
        reward_loss = (alive * self.two_hot.cross_entropy(batch.reward, reward_logits)).mean(0).sum()  # eq. 9
        dynamics_loss = (alive * (zs - target_zs).square().mean(2)).mean(0).sum()  # eq. 10
        terminal_loss = (alive * (done.squeeze(2) - batch.terminated).square()).mean(0).sum()  # eq. 10
        terminal_loss = self.termination_seen * terminal_loss  # without terminations there is nothing to learn
        loss = DYNAMICS_WEIGHT * dynamics_loss + REWARD_WEIGHT * reward_loss + TERMINAL_WEIGHT * terminal_loss
        return {
            "encoder_loss": loss,
            "encoder_dynamics_loss": dynamics_loss,
            "encoder_reward_loss": reward_loss,
            "encoder_terminal_loss": terminal_loss,
        }

    def update_critic_and_actor(self, rb: ReplayBuffer) -> dict[str, Tensor]:
        """One update of each, on the first step of the windows and their n-step return, and of the priorities."""
        batch = rb.sample(self.args.batch_size)
        critic_loss, q, q_target, zs = self.critic_loss(batch, self.noise(batch))
        critic_grad_norm = self.optimize("critic", critic_loss, self.args.max_grad_norm)

        self.encoder.requires_grad_(False)  # the actor's loss trains the actor alone
        self.critic.requires_grad_(False)
        actor_loss = self.actor_loss(zs)
        self.encoder.requires_grad_(True)
        self.critic.requires_grad_(True)
        actor_grad_norm = self.optimize("actor", actor_loss)

        td_error = (q.detach() - q_target[:, None]).abs().max(1).values  # of the replayed actions
        rb.update_priority(batch.index, td_error.clamp(min=MIN_PRIORITY) ** PRIORITY_EXPONENT)
        return {
            "losses/critic_loss": critic_loss.detach(),
            "losses/actor_loss": actor_loss.detach(),
            "losses/q_values": q.detach().mean(),
            "losses/td_error": td_error.mean(),
            "losses/reward_scale": self.reward_scale.clone(),
            "plasticity/critic_grad_norm": critic_grad_norm,
            "plasticity/actor_grad_norm": actor_grad_norm,
        }

    def critic_loss(self, batch: Batch, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The loss, Q (batch, 2) and its target (batch,), and zs (batch, zs_dim) for the actor."""
        args = self.args
        obs, action, next_obs = batch.obs[:, 0], batch.action[:, 0], batch.obs[:, args.q_horizon]
        with torch.no_grad():
            reward, not_done = n_step_return(batch.reward, batch.terminated, args.q_horizon, args.gamma)
            next_zs = self.encoder_target.zs(next_obs)
            noise = (noise * args.policy_noise).clamp(-args.noise_clip, args.noise_clip)
            next_action = (self.actor_target(next_zs)[0] + noise).clamp(-1, 1)
            next_q = self.critic_target(self.encoder_target.zsa(next_zs, next_action)).min(1).values
            discount = not_done * args.gamma**args.q_horizon
            q_target = (reward + discount * next_q * self.target_reward_scale) / self.reward_scale  # eq. 11
            zs = self.encoder.zs(obs)
            zsa = self.encoder.zsa(zs, action)
        q = self.critic(zsa)
        return F.smooth_l1_loss(q, q_target[:, None].expand_as(q)), q, q_target, zs  # eq. 11

    def actor_loss(self, zs: Tensor) -> Tensor:
        action, pre_activation = self.actor(zs)
        q = self.critic(self.encoder.zsa(zs, action))
        return -q.mean() + PRE_ACTIVATION_WEIGHT * pre_activation.square().mean()  # eq. 12

    def noise(self, batch: Batch) -> Tensor:
        """Standard normal, (batch, action_dim)."""
        return torch.empty_like(batch.action[:, 0]).normal_(generator=self.generator)


def n_step_return(reward: Tensor, terminated: Tensor, steps: int, gamma: float) -> tuple[Tensor, Tensor]:
    """Discounted return of the first `steps` of (batch, horizon) and 1 where none of them terminated, both (batch,).

    A reward counts if no earlier step terminated: the terminal reward counts, nothing after it does.
    """
    alive = F.pad((1 - terminated[:, :steps]).cumprod(1), (1, 0), value=1)  # (batch, steps + 1), before each step
    discount = gamma ** torch.arange(steps, device=reward.device, dtype=reward.dtype)
    return (discount * alive[:, :-1] * reward[:, :steps]).sum(1), alive[:, -1]


# DIAGNOSTICS
@torch.no_grad()
def diagnose(agent: Agent, rb: ReplayBuffer, seed: int) -> dict[str, float]:
    """Pathologies of each module on 256 uniformly drawn transitions (section 3, Figs. 3, 7 and 10).

    Features are `zsa` of the encoder and the input of `output` of critic and actor, hidden units all after activations.
    """
    starts = rb.priority.nonzero()[:, 0]
    if len(starts) == 0:
        return {}
    index = torch.randint(len(starts), (256,), generator=torch.Generator().manual_seed(seed))
    batch = rb.windows(starts[index.to(starts.device)])

    def features() -> dict[str, Tensor]:
        zs = agent.encoder.zs(batch.obs[:, 0])
        zsa = agent.encoder.zsa(zs, batch.action[:, 0])
        critic = torch.cat([agent.critic.q1.features(zsa), agent.critic.q2.features(zsa)], 1)
        return {"encoder": zsa, "critic": critic, "actor": agent.actor.mlp.features(zs)}

    return pathologies(agent, LNActiv, features)


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
