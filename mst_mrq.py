"""MR.Q with Module-Specific Training (MST) on DeepMind Control and Gymnasium.

    python mst_mrq.py --env dog-run --critic-regime dst --scale 5     # the paper's MST at scale 5
    python mst_mrq.py --env humanoid-run --encoder-arch 4 --critic-arch 4 --actor-arch 3 \\
        --encoder-regime dense --critic-regime dense --actor-regime dense     # MR.Q without MST
    python play.py runs/dog-run__mst_mrq__1 --video                   # play a trained agent

Implements "Rethinking the Role of Dynamic Sparse Training for Scalable Deep Reinforcement
Learning" (arXiv 2510.12096, section 4, App. B.3, C): MR.Q (arXiv 2501.16142) with encoder dense,
critic dynamic sparse, actor static sparse. The same command resumes a stopped run. Exit codes: 0
finished, 75 stopped by a signal, 2 wrong flags, 1 other failure.
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
Arch = Literal[1, 2, 3, 4, 5, 6]


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
    env_id: Annotated[str, tyro.conf.arg(aliases=("--env",))] = "dog-run"  # dm_control task or Gymnasium id
    action_repeat: int | None = None  # environment steps per agent step; None: 2 on DeepMind Control, else 1
    max_episode_steps: int | None = None  # agent steps until an episode is truncated; None: the environment's limit
    total_timesteps: int = 500_000  # agent steps of the whole run, over which drop fraction and sparsity change
    eval_interval: int = 5_000  # agent steps between evaluations
    eval_episodes: int = 10  # episodes per evaluation, without noise, in environments of their own
    log_interval: int = 100  # agent steps between writes of the losses to TensorBoard
    checkpoint_minutes: float = 10.0  # minutes between checkpoints; a signal writes one, too

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
    distribution: Literal["er", "uniform"] = "er"  # how a module's layers share its zeros; er leaves small ones denser
    growth: Literal["rigl", "set"] = "rigl"  # connections grow where the gradient is largest (rigl) or at random (set)
    topology_update_interval: int = 1000  # a module's updates between changes of its topology
    drop_fraction: float = 0.5  # share of the connections replaced at the first change, decays to 0 (eq. 1)
    schedule_start: float | None = None  # share of training after which sparsity changes; None: 0.2 for d2s, 0 for s2d
    schedule_end: float | None = None  # share of training after which it stays as it is; None: 0.8 for d2s, 1 for s2d


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
    def __init__(self, zs_dim: int, action_dim: int, hidden_dim: int, num_blocks: int, arch: int, residual="pre"):
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

    def add(self, obs, action, reward, next_obs, terminated: bool, first: bool) -> None:
        if first:  # of its episode
            self.episode_length = 0
            self._append(obs, [])
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
            fail("--encoder-horizon must be at least --q-horizon, and less than --buffer-size")
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
        for name in MODULES:
            setattr(self, f"{name}_target", copy.deepcopy(getattr(self, name)).requires_grad_(False))
        if args.compile:
            for name in MODULES:
                setattr(self, f"{name}_loss", torch.compile(getattr(self, f"{name}_loss"), dynamic=False))
        if args.cuda_graphs and args.cuda:
            encoder, critic, actor = self.sparsifiers.values()
            self.update_encoder = graphed(self.update_encoder, self, [encoder], self.generator)
            self.update_critic_and_actor = graphed(self.update_critic_and_actor, self, [critic, actor], self.generator)

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
    modules = {name: getattr(agent, name) for name in MODULES}
    with hooked(modules, LNActiv) as hidden:
        zs = agent.encoder.zs(batch.obs[:, 0])
        zsa = agent.encoder.zsa(zs, batch.action[:, 0])
        critic = torch.cat([agent.critic.q1.features(zsa), agent.critic.q2.features(zsa)], 1)
        actor = agent.actor.mlp.features(zs)
    return plasticity(modules, {"encoder": zsa, "critic": critic, "actor": actor}, hidden)


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
