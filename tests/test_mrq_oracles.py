"""MR.Q against numbers of the reference losses and optimizers (`tests/oracles/mrq_*.npz`, float64).

Gradients, infos and two-hot at 1e-8 relative, parameters at 1e-10 absolute: one update moves a parameter by 1e-4.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FixedBatch, default_dtype

import mst_mrq

ORACLES = Path(os.environ.get("MST_ORACLES") or Path(__file__).parent / "oracles")
NAMES = {"encoder": "encoder", "critic": "value", "actor": "policy"}  # ours and the oracles'


class Oracle:
    """One file, and an agent with its initial weights."""

    def __init__(self, types: str):
        self.data = {key: torch.from_numpy(value) for key, value in np.load(ORACLES / f"mrq_{types}.npz").items()}
        dims = self["meta/dims"].tolist()
        obs_dim, action_dim, _, _, hidden, zs_dim, za_dim, zsa_dim, critic_hidden, actor_hidden = dims
        encoder_arch, critic_arch, actor_arch = self["meta/archs"].tolist()
        blocks = int(self["meta/num_blocks"])
        args = mst_mrq.Args(
            encoder_regime="dense", critic_regime="dense", actor_regime="dense",
            max_grad_norm=float(self["meta/value_grad_clip"]),
        )  # fmt: skip
        args.policy_noise = 0.0

        def make_networks(args, obs_dim, action_dim):
            return (
                mst_mrq.Encoder(obs_dim, action_dim, hidden, zs_dim, za_dim, zsa_dim, blocks, encoder_arch),
                mst_mrq.Critic(zsa_dim, critic_hidden, blocks, critic_arch),
                mst_mrq.Actor(zs_dim, action_dim, actor_hidden, blocks, actor_arch),
            )

        with pytest.MonkeyPatch.context() as patch, default_dtype(torch.float64):
            patch.setattr(mst_mrq, "make_networks", make_networks)
            self.agent = mst_mrq.Agent(args, obs_dim, action_dim, torch.device("cpu"))
        for ours, theirs in NAMES.items():
            for suffix in ("", "_target"):
                getattr(self.agent, ours + suffix).load_state_dict(self.tensors(f"init/{theirs}{suffix}/"))
        self.agent.reward_scale.copy_(self["meta/reward_scale"])
        self.agent.target_reward_scale.copy_(self["meta/target_reward_scale"])
        self.agent.termination_seen.fill_(1)

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.data[key]

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.data.items() if key.startswith(prefix)}

    def update_encoder(self, k: int) -> None:
        reward, not_done = self[f"batch{k}/reward"][..., 0], self[f"batch{k}/not_done"][..., 0]
        batch = mst_mrq.Batch(self[f"batch{k}/obs"], self[f"batch{k}/action"], reward, 1 - not_done, None)
        self.agent.update_encoder(FixedBatch(batch))

    def round(self, k: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """One update of each module on batch k; returns the priorities and the metrics."""
        self.update_encoder(k)
        # the critic's windows have the oracle's 3-step return as their first reward, and no termination
        obs, action, n_step = self[f"batch{k}/obs"], self[f"batch{k}/action"], self[f"batch{k}/n_step_reward"]
        n_step = torch.cat([n_step, torch.zeros(len(obs), 4)], 1)
        rb = FixedBatch(mst_mrq.Batch(obs, action, n_step, torch.zeros_like(n_step), None))
        metrics = self.agent.update_critic_and_actor(rb)
        return rb.priority, metrics


@pytest.fixture(params=["122", "443", "665"])
def oracle(request):
    return Oracle(request.param)


def test_three_rounds_give_the_gradients_and_parameters_of_the_reference(oracle):
    for k in range(3):
        oracle.round(k)
        for ours, theirs in NAMES.items():
            gradients = {name: p.grad for name, p in getattr(oracle.agent, ours).named_parameters()}
            expected = oracle.tensors(f"grad{k}/{theirs}/")
            torch.testing.assert_close(gradients, expected, rtol=1e-8, atol=1e-12)
            for suffix in ("", "_target") if k in (0, 2) else ():
                after = getattr(oracle.agent, ours + suffix).state_dict()
                expected = oracle.tensors(f"after{k + 1}/{theirs}{suffix}/")
                torch.testing.assert_close(dict(after), expected, rtol=0, atol=1e-10)


def test_priorities_and_the_gradient_norm_before_clipping_are_those_of_the_reference(oracle):
    for k in range(3):
        priority, metrics = oracle.round(k)
        torch.testing.assert_close(priority, oracle[f"info{k}/priority"], rtol=1e-8, atol=0)
        norm = oracle[f"info{k}/value_grad_norm_before_clip"]
        torch.testing.assert_close(metrics["plasticity/critic_grad_norm"], norm, rtol=1e-8, atol=0)
        torch.testing.assert_close(metrics["losses/q_values"], oracle[f"info{k}/q"].mean(), rtol=1e-8, atol=0)


def test_two_hot_rewards_are_those_of_the_reference(oracle):
    two_hot, x = oracle.agent.two_hot, oracle["twohot/x"][:, 0]
    torch.testing.assert_close(two_hot.bins, oracle["twohot/bins"], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(two_hot.encode(x), oracle["twohot/encoded"], rtol=1e-8, atol=1e-12)
    cross_entropy = two_hot.cross_entropy(x, oracle["twohot/logits"])
    torch.testing.assert_close(cross_entropy, oracle["twohot/cross_entropy"][:, 0], rtol=1e-8, atol=0)
