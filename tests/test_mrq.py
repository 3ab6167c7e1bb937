"""MR.Q's networks, replay buffer, losses and diagnostics, each against numbers worked out by hand or by brute force.

Losses and optimizers against the reference (`tests/oracles/mrq_*.npz`, float64): an update moves a parameter by 1e-4.
"""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ORACLES, FixedBatch, default_dtype
from test_graphs import make

import mst_mrq
from mst_mrq import Actor, Agent, Args, Batch, BlockMLP, ReplayBuffer, diagnose, make_networks, n_step_return

CPU = torch.device("cpu")
assert_close = functools.partial(torch.testing.assert_close, rtol=1e-8, atol=1e-12)
COLUMNS = ("obs", "action", "reward", "not_done", "n_step_reward")
NAMES = {"encoder": "encoder", "critic": "value", "actor": "policy"}  # ours and the oracles'


class Oracle(dict):
    """One file, and an agent with its initial weights."""

    def __init__(self, types: str):
        super().__init__((key, torch.from_numpy(x)) for key, x in np.load(ORACLES / f"mrq_{types}.npz").items())
        obs_dim, action_dim, _, _, hidden, zs_dim, za_dim, zsa_dim, *wide = self["meta/dims"].tolist()
        encoder_arch, critic_arch, actor_arch = self["meta/archs"].tolist()
        blocks, dense = int(self["meta/num_blocks"]), {f"{module}_regime": "dense" for module in NAMES}
        args = Args(**dense, max_grad_norm=float(self["meta/value_grad_clip"]), policy_noise=0.0)
        with pytest.MonkeyPatch.context() as patch, default_dtype(torch.float64):
            networks = (
                mst_mrq.Encoder(obs_dim, action_dim, hidden, zs_dim, za_dim, zsa_dim, blocks, encoder_arch),
                mst_mrq.Critic(zsa_dim, wide[0], blocks, critic_arch),
                Actor(zs_dim, action_dim, wide[1], blocks, actor_arch),
            )
            patch.setattr(mst_mrq, "make_networks", lambda *_: networks)
            self.agent = Agent(args, obs_dim, action_dim, CPU)
        for ours, theirs in NAMES.items():
            for suffix in ("", "_target"):
                getattr(self.agent, ours + suffix).load_state_dict(self.tensors(f"init/{theirs}{suffix}/"))
        for scale in ("reward_scale", "target_reward_scale"):
            getattr(self.agent, scale).copy_(self[f"meta/{scale}"])
        self.agent.termination_seen.fill_(1)

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.items() if key.startswith(prefix)}


@pytest.fixture(params=["122", "443", "665"])
def oracle(request):
    return Oracle(request.param)


def test_three_rounds_give_the_gradients_parameters_priorities_and_norms_of_the_reference(oracle):
    for k in range(3):
        obs, action, reward, not_done, n_step = (oracle[f"batch{k}/{name}"] for name in COLUMNS)
        oracle.agent.update_encoder(FixedBatch(Batch(obs, action, reward[..., 0], 1 - not_done[..., 0], None)))
        # the critic's windows have the oracle's 3-step return as their first reward, and no termination
        n_step = torch.cat([n_step, torch.zeros(len(obs), 4)], 1)
        rb = FixedBatch(Batch(obs, action, n_step, torch.zeros_like(n_step), None))
        metrics = oracle.agent.update_critic_and_actor(rb)
        for ours, theirs in NAMES.items():
            gradients = {name: p.grad for name, p in getattr(oracle.agent, ours).named_parameters()}
            assert_close(gradients, oracle.tensors(f"grad{k}/{theirs}/"))
            for suffix in ("", "_target") if k in (0, 2) else ():
                after = dict(getattr(oracle.agent, ours + suffix).state_dict())
                assert_close(after, oracle.tensors(f"after{k + 1}/{theirs}{suffix}/"), rtol=0, atol=1e-10)
        assert_close(rb.priority, oracle[f"info{k}/priority"], atol=0)
        norm = oracle[f"info{k}/value_grad_norm_before_clip"]
        assert_close(metrics["plasticity/critic_grad_norm"], norm, atol=0)
        assert_close(metrics["losses/q_values"], oracle[f"info{k}/q"].mean(), atol=0)


def test_two_hot_rewards_are_those_of_the_reference(oracle):
    two_hot, x = oracle.agent.two_hot, oracle["twohot/x"][:, 0]
    ours = two_hot.bins, two_hot.encode(x), two_hot.cross_entropy(x, oracle["twohot/logits"])[:, None]
    assert_close(ours, tuple(oracle[f"twohot/{name}"] for name in ("bins", "encoded", "cross_entropy")))


def test_rewards_beyond_the_bins_are_in_the_outermost_one():
    x = torch.tensor([-1e9, -22_000, 22_000, 1e9])  # the last two bins: exp(9.6875) - 1 and exp(10) - 1
    share = (22_000 - 16_113.9) / (22_025.5 - 16_113.9)
    expected = torch.tensor([[1, 0, 0, 0], [share, 1 - share, 0, 0], [0, 0, 1 - share, share], [0, 0, 0, 1]])
    encoded = mst_mrq.TwoHot().encode(x)
    torch.testing.assert_close(encoded[:, [0, 1, -2, -1]], expected, rtol=0, atol=1e-3)
    assert encoded.sum(1).tolist() == pytest.approx([1] * 4)


# the paper's "2/37/154M, 3/33/139M, 1.3/16/69M" (Figs. 4, 6 and 9), exact values of the specification, on humanoid
@pytest.mark.parametrize(
    ("scale", "encoder", "predictor", "critic", "actor"),
    [(1, 2_010_112, 296_514, 1_576_962, 798_741), (5, 154_270_720, 6_725_186, 144_240_642, 72_171_541)],
)
def test_networks_have_the_papers_parameter_counts(scale, encoder, predictor, critic, actor):
    with torch.device("meta"):
        networks = make_networks(Args(scale=scale), 67, 21)
    sizes = [sum(p.numel() for p in module.parameters()) for module in (networks[0].predictor, *networks)]
    assert sizes == [predictor, encoder + predictor, critic, actor]


def test_the_most_specific_scale_of_a_module_counts():
    with torch.device("meta"):
        encoder, critic, actor = make_networks(Args(scale=2, width_scale=3, critic_scale=5), 67, 21)
    width_and_depth = [(mlp.projection.out_features, len(mlp.blocks)) for mlp in (encoder.zs_mlp, critic.q1, actor.mlp)]
    assert width_and_depth == [(3 * 512, 2), (5 * 512, 5), (3 * 512, 2)]


def test_residuals_of_type_post_follow_equation_6():
    torch.manual_seed(0)
    mlp, x = BlockMLP(3, 2, 8, 1, arch=6, residual="post"), torch.randn(4, 3)
    u = F.elu(F.layer_norm(mlp.projection(x), (8,), eps=1e-5))
    h = u + mlp.blocks[0].linear2(F.elu(F.layer_norm(mlp.blocks[0].linear1(u), (8,), eps=1e-5)))
    torch.testing.assert_close(mlp(x), mlp.output(F.elu(F.layer_norm(h, (8,), eps=1e-5))))


def test_weights_start_as_xavier_uniform_with_gain_sqrt_2_and_biases_at_0():
    actor = Actor(300, 2, 200, 1, arch=5)
    weight = actor.mlp.projection.weight
    bound = (2 * 6 / (300 + 200)) ** 0.5
    assert bound * 0.99 < weight.abs().max() <= bound
    assert abs(weight.std() / (bound / 3**0.5) - 1) < 0.02  # standard deviation of a uniform distribution
    assert all((p == 0).all() for name, p in actor.named_parameters() if name.endswith("bias"))


ZERO = np.zeros(1, np.float32)


def empty(capacity: int, horizon: int, obs_dim: int = 1) -> ReplayBuffer:
    return ReplayBuffer(Args(buffer_size=capacity, encoder_horizon=horizon), obs_dim, 1, CPU)


def add_episode(rb: ReplayBuffer, rewards: list, terminates: bool = False) -> None:
    for step, reward in enumerate(rewards):
        rb.add(ZERO, ZERO, reward, ZERO, terminates and step == len(rewards) - 1, first=step == 0)


def fill(capacity: int, horizon: int, episodes: int) -> ReplayBuffer:
    """Random episodes; observations are (episode, step), actions step + 0.5, rewards step + 1."""
    random, rb = np.random.default_rng(episodes), empty(capacity, horizon, obs_dim=2)
    for episode in range(episodes):
        length, terminates = random.integers(1, 3 * horizon), random.random() < 0.5
        for step in range(length):
            obs, next_obs = (np.array([episode, x], np.float32) for x in (step, step + 1))
            rb.add(obs, [step + 0.5], step + 1, next_obs, terminates and step == length - 1, first=step == 0)
    return rb


@pytest.mark.parametrize("horizon", [1, 5])
@pytest.mark.parametrize("capacity", [23, 50, 3000])  # the first two wrap around, the last spans 24 rows of sums
def test_windows_stay_in_one_episode_and_on_its_terminal_observation(capacity, horizon):
    for episodes in range(1, 60, 3):
        rb = fill(capacity, horizon, episodes)
        if not rb.priority.any():
            continue  # only truncated episodes shorter than the horizon so far
        batch = rb.sample(64)
        episode, steps = batch.obs.unbind(2)
        assert (episode == episode[:, :1]).all()
        alive = F.pad((1 - batch.terminated).cumprod(1), (1, 0), value=1)[:, :-1]  # before each step
        torch.testing.assert_close(steps[:, 1:], steps[:, :-1] + alive)  # goes on, or stays once terminated
        torch.testing.assert_close(batch.reward, alive * (steps[:, :-1] + 1))
        torch.testing.assert_close(batch.action[..., 0], alive * (steps[:, :-1] + 0.5))


def test_the_last_starts_are_sampled_after_a_termination_and_never_after_a_truncation():
    for terminates, expected in ((True, [0, 1, 2, 3, 4, 5, 6]), (False, [0, 1, 2])):
        rb = empty(100, 5)
        add_episode(rb, [0] * 7, terminates)
        add_episode(rb, [0])  # changes none of them
        assert rb.priority.nonzero()[:, 0].tolist() == expected
        assert rb.any_terminated == terminates


def test_overwriting_a_slot_takes_its_start_and_termination_away():
    rb = empty(8, 2)
    add_episode(rb, [1] * 5, terminates=True)  # slots 0..5, terminates in slot 4
    add_episode(rb, [1] * 3)  # slots 6, 7, 0, 1
    assert rb.priority.nonzero()[:, 0].tolist() == [2, 3, 4, 6, 7]
    assert rb.is_transition.nonzero()[:, 0].tolist() == [0, 2, 3, 4, 6, 7]


def test_small_priorities_beside_a_large_one_are_told_apart_and_no_index_is_past_the_end(monkeypatch):
    rb = empty(1_000_000, 1)
    rb.priority[:1_000_000] = 1
    rb.row_total.copy_(rb.priority.view(-1, rb.ROW).sum(1))
    # in float32, sums beyond it are multiples of 8192: 64 rows of 128 look like one
    rb.update_priority(torch.tensor([0]), torch.tensor([2.0**36]))
    row = torch.arange(1, 7813)  # the last one has 64 slots
    inside = (2.0**36 + 127 + 128 * (row.double() - 1) + 32) / (2.0**36 + 999_999)
    draws = torch.stack([inside, torch.full((7812,), 0.5, dtype=torch.float64)])[..., None]
    monkeypatch.setattr(torch, "rand", lambda *size, **kwargs: draws)
    assert rb.sample(7812).index.tolist() == [*(row * 128 + 64)[:-1].tolist(), 7812 * 128 + 32]
    draws = torch.tensor([0, (2.0**36 + 63.5) / (2.0**36 + 127)], dtype=torch.float64).view(2, 1, 1)
    assert rb.sample(1).index.tolist() == [64]  # in the row of the large one
    draws = torch.full((2, 1, 1), 1 - 2.0**-53, dtype=torch.float64)  # the largest number below 1
    assert rb.sample(1).index.tolist() == [999_999]


def test_a_new_start_gets_the_largest_priority_ever_given_and_at_least_1():
    rb = empty(100, 1)
    for step, given in enumerate((0.5, 7.0, 3.0, 2.0)):  # to slot 0
        rb.add(ZERO, ZERO, 0.0, ZERO, False, first=step == 0)
        rb.update_priority(torch.tensor([0]), torch.tensor([given]))
    rb.add(ZERO, ZERO, 0.0, ZERO, False, first=False)
    assert rb.priority[:6].tolist() == [2, 1, 7, 7, 7, 0]  # 7 stays the largest that was ever given


def test_of_two_priorities_for_one_slot_the_larger_is_kept():
    rb = empty(300, 1)
    rb.update_priority(torch.tensor([7, 200, 7, 200, 200]), torch.tensor([2.0, 3.0, 5.0, 9.0, 4.0]))
    assert rb.priority[[7, 200]].tolist() == [5, 9]
    rb.update_priority(torch.tensor([200]), torch.tensor([1.0]))  # the old one does not count
    assert rb.priority[[7, 200]].tolist() == [5, 1]
    assert rb.row_total.tolist() == [5, 1, 0]  # of slots 0..127, 128..255, 256..299


def test_a_loaded_buffer_draws_as_the_saved_one_and_both_keep_their_row_totals():
    rb, loaded = fill(300, 5, 102), empty(300, 5, obs_dim=2)  # three rows; the last episode has 2 steps
    rb.update_priority(rb.sample(16).index, torch.arange(16.0))
    loaded.load_state_dict(rb.state_dict())
    loaded.generator.set_state(rb.generator.get_state())
    for _ in range(100):
        index = rb.sample(16).index
        assert loaded.sample(16).index.tolist() == index.tolist()
        for buffer in (rb, loaded):
            buffer.update_priority(index, torch.arange(1, 17) / 3)
            buffer.add(ZERO.repeat(2), ZERO, 0.0, ZERO.repeat(2), True, first=True)
    torch.testing.assert_close(loaded.row_total, loaded.priority.view(3, 128).double().sum(1), rtol=1e-12, atol=0)


def test_the_terminal_reward_counts_and_nothing_after_it():
    reward = torch.tensor([[1.0, 2.0, 4.0, 8.0]]).expand(3, 4)
    terminated = torch.tensor([[0.0, 0, 0, 1], [0.0, 1, 0, 0], [0.0, 0, 1, 0]])
    n_step, not_done = n_step_return(reward, terminated, steps=3, gamma=0.5)
    assert n_step.tolist() == [1 + 2 / 2 + 4 / 4, 1 + 2 / 2, 1 + 2 / 2 + 4 / 4]
    assert not_done.tolist() == [1, 0, 0]


def test_target_noise_differs_from_update_to_update_and_is_clipped():
    (agent, rb), seen = make(mst_mrq, CPU, graphs=False, policy_noise=100.0, noise_clip=0.3), []
    agent.encoder_target.zsa = lambda zs, action: seen.append(action) or agent.encoder.zsa(zs, action)
    rb = FixedBatch(rb.sample(16))
    for _ in range(2):
        agent.update_critic_and_actor(rb)
    with torch.no_grad():
        clean = agent.actor_target(agent.encoder_target.zs(rb.batch.obs[:, 3]))[0]
    actions = torch.stack(seen)
    assert (actions[0] != actions[1]).any()
    assert ((actions - clean).abs() <= 0.3 + 1e-6).all() and (actions.abs() <= 1).all()


def test_targets_and_reward_scales_are_copied_together():
    agent, rb = make(mst_mrq, CPU, graphs=False)

    def copied():
        targets = [(name, p) for name, p in agent.named_parameters() if "_target." in name]
        return [torch.equal(p, agent.get_parameter(name.replace("_target.", "."))) for name, p in targets]

    agent.update_critic_and_actor(rb)
    assert not all(copied())
    for rewards, scales in (((1, -2, 3, 0, 4), (1, 2)), ((0, 0, 0, 0, 1), (2, 0.2))):  # mean |reward|; 1 before
        rb = empty(100, 5)
        add_episode(rb, rewards, terminates=scales[0] == 2)
        agent.update_targets(rb)
        assert all(copied()) and agent.termination_seen == (scales[0] == 2)
        assert (agent.target_reward_scale.item(), agent.reward_scale.item()) == pytest.approx(scales)


def test_every_250_training_steps_start_with_the_target_copies_and_as_many_encoder_updates():
    (agent, rb), calls = make(mst_mrq, CPU, graphs=False), []  # copies every 3
    for name in ("update_targets", "update_encoder", "update_critic_and_actor"):
        update = getattr(agent, name)
        setattr(agent, name, lambda rb, name=name, update=update: calls.append(name[7]) or update(rb) or {})
    for _ in range(4):
        agent.train_step(rb)
    assert "".join(calls) == "teeeccc" + "teeec"  # targets, encoder, critic and actor
    full = Agent(Args(width_scale=0.03), 4, 2, CPU)
    assert [s.total_updates for s in full.sparsifiers.values()] == [490_250, 490_001, 490_001]  # of 500,000 agent steps


def test_diagnostics_read_the_features_of_each_module():
    agent, rb = make(mst_mrq, CPU, graphs=False)
    metrics = diagnose(agent, rb, seed=0)
    for parameter in [*agent.critic.q1.projection.parameters(), *agent.critic.q1.blocks.parameters()]:
        parameter.data.zero_()  # q1 then sees nothing but zeros
    after = diagnose(agent, rb, seed=0)
    assert after["plasticity/critic_dormant_ratio"] == pytest.approx(0.5, abs=0.1)  # one of two heads is dead
    assert after["plasticity/critic_srank"] < metrics["plasticity/critic_srank"]
    assert {k for k in metrics if after[k] != metrics[k]} == {k for k in metrics if "critic" in k}
    assert 1 < metrics["plasticity/encoder_srank"] <= 31  # zsa has round(0.06 * 512) = 31 dimensions
    agent.encoder.zsa_mlp.output.weight.data.zero_()
    assert diagnose(agent, rb, seed=0)["plasticity/encoder_srank"] <= 1  # every zsa is the same
