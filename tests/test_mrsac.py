"""MR.SAC: the encoder update against MR.Q's oracle, its own actor-critic against numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch
from conftest import FixedBatch

from mst_mrsac import Actor, Agent, Args, Batch, Critic


def small_agent(**flags) -> Agent:
    args = Args(width_scale=0.03, critic_regime="dense", actor_regime="dense", **flags)
    return Agent(args, 4, 2, torch.device("cpu"))


def update(agent: Agent, terminated: float = 0.0) -> dict[str, float]:
    """On random windows with rewards of 1. Returns the metrics."""
    torch.manual_seed(0)
    batch = Batch(torch.randn(8, 6, 4), torch.rand(8, 5, 2), torch.ones(8, 5), torch.full((8, 5), terminated), None)
    return {name.split("/")[1]: x.item() for name, x in agent.update_critic_and_actor(FixedBatch(batch)).items()}


@pytest.mark.parametrize(("mean", "raw"), [(0.0, 0.5), (0.7, 0.4), (-2.0, 0.6)])
def test_the_log_density_of_actions_integrates_to_one(mean, raw):
    actor = Actor(1, 1, 1, 1, arch=1).double()
    actor.mlp.forward = lambda zs: torch.tensor([[mean, raw]]).expand(len(zs), 2)
    noise = torch.linspace(-8, 8, 200_001, dtype=torch.float64)[:, None]
    action, log_prob, _ = actor.sample(torch.zeros(len(noise), 1), noise)
    assert np.trapezoid(log_prob.exp().numpy(), action[:, 0].numpy()) == pytest.approx(1, abs=1e-6)


def test_log_standard_deviations_are_squashed_to_minus_10_and_2():
    actor = Actor(1, 1, 1, 1, arch=1)
    actor.mlp.forward = lambda zs: torch.tensor([[0.0, -1e9], [0.0, 0.0], [0.0, 1e9]])
    assert actor(torch.zeros(3, 1))[1].tolist() == [[-10], [-4], [2]]


def test_the_target_has_the_entropy_after_the_n_steps_in_units_of_the_scaled_reward():
    agent = small_agent(initial_temperature=0.5, critic_lr=0.0, actor_lr=0.0)
    agent.target_reward_scale.fill_(3.0)
    agent.reward_scale.fill_(2.0)
    agent.critic_target.forward = lambda zsa: torch.tensor([[7.0, 5.0]]).expand(len(zsa), 2)
    agent.actor_target.sample = lambda zs, noise: (noise, torch.full((len(zs),), -4.0), noise)
    agent.critic.forward = lambda zsa: 0 * Critic.forward(agent.critic, zsa)
    # the smaller of both heads, and minus 0.5 times the log-density -4 of the target policy's action
    expected = (1 + 0.99 + 0.99**2 + 0.99**3 * 5 * 3) / 2 + 0.99**3 * 0.5 * 4
    assert update(agent)["td_error"] == pytest.approx(expected, rel=1e-6)
    assert update(agent, terminated=1.0)["td_error"] == pytest.approx(1 / 2, rel=1e-6)  # the terminal reward alone


def test_the_actor_maximises_entropy_and_the_mean_of_both_heads():
    agent = small_agent(initial_temperature=0.5)
    agent.critic.forward = lambda zsa: torch.tensor([[2.0, 4.0]]) + 0 * Critic.forward(agent.critic, zsa)
    metrics = update(agent)  # the actor's loss has the pre-activation penalty as well, of weight 1e-5
    assert metrics["actor_loss"] == pytest.approx(-0.5 * metrics["entropy"] - 3, abs=1e-3)
    assert abs(metrics["entropy"]) > 0.1


def test_the_temperature_rises_while_the_entropy_is_below_its_target():
    assert small_agent().target_entropy == -1.0  # -0.5 * 2 action dimensions
    for target_entropy, direction in ((100.0, 1), (-100.0, -1)):
        agent = small_agent(target_entropy=target_entropy)
        update(agent)
        # Adam's first step is the learning rate, whatever the gradient
        assert (agent.log_temp - math.log(0.01)).item() == pytest.approx(direction * 1e-4, rel=1e-2)
