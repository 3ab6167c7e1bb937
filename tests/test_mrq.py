"""MR.Q's networks, replay buffer, losses and diagnostics, each against numbers worked out by hand or by brute force."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FixedBatch

from mst_mrq import Actor, Agent, Args, Batch, BlockMLP, ReplayBuffer, diagnose, make_networks, n_step_return

CPU = torch.device("cpu")
HUMANOID, DOG = (67, 21), (223, 38)


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# the paper's "2/37/154M, 3/33/139M, 1.3/16/69M" (Figs. 4, 6 and 9), exact values of the specification
@pytest.mark.parametrize(
    ("scale", "encoder", "predictor", "critic", "actor", "agent"),
    [
        (1, (2_010_112, 2_094_336), 296_514, 1_576_962, (798_741, 807_462), (4_385_815, 4_478_760)),
        (3, (36_713_472, 36_966_144), 2_462_274, 33_054_722, (16_558_101, 16_584_230), (86_326_295, 86_605_096)),
        (5, (154_270_720, 154_691_840), 6_725_186, 144_240_642, (72_171_541, 72_215_078), (370_682_903, 371_147_560)),
    ],
)
def test_networks_have_the_papers_parameter_counts(scale, encoder, predictor, critic, actor, agent):
    for i, (obs_dim, action_dim) in enumerate((HUMANOID, DOG)):
        with torch.device("meta"):
            networks = make_networks(Args(scale=scale), obs_dim, action_dim)
        head = parameters(networks[0].predictor)
        assert head == predictor
        assert [parameters(network) for network in networks] == [encoder[i] + head, critic, actor[i]]
        assert sum(parameters(network) for network in networks) - head == agent[i]


def test_the_most_specific_scale_of_a_module_counts():
    with torch.device("meta"):
        encoder, critic, actor = make_networks(Args(scale=2, width_scale=3, critic_scale=5), *HUMANOID)
        on_scale_3 = make_networks(Args(encoder_scale=3), *HUMANOID)
    width_and_depth = [(mlp.projection.out_features, len(mlp.blocks)) for mlp in (encoder.zs_mlp, critic.q1, actor.mlp)]
    assert width_and_depth == [(3 * 512, 2), (5 * 512, 5), (3 * 512, 2)]
    assert [parameters(module) for module in on_scale_3[1:]] == [2_625_538, 1_323_029]  # "3M" and "1.3M", Figs. 6 and 9


@pytest.mark.parametrize("residual", ["pre", "post"])
def test_residual_types_follow_equations_5_and_6(residual):
    torch.manual_seed(0)
    mlp, x = BlockMLP(3, 2, 8, 1, arch=6, residual=residual), torch.randn(4, 3)
    h = mlp.projection(x)
    u = F.elu(F.layer_norm(h, (8,), eps=1e-5))
    y = mlp.blocks[0].linear2(F.elu(F.layer_norm(mlp.blocks[0].linear1(u), (8,), eps=1e-5)))
    h = y + (h if residual == "pre" else u)
    torch.testing.assert_close(mlp(x), mlp.output(F.elu(F.layer_norm(h, (8,), eps=1e-5))))


def test_weights_start_as_xavier_uniform_with_gain_sqrt_2_and_biases_at_0():
    actor = Actor(300, 2, 200, 1, arch=5)
    weight = actor.mlp.projection.weight
    bound = (2 * 6 / (300 + 200)) ** 0.5
    assert bound * 0.99 < weight.abs().max() <= bound
    assert abs(weight.std() / (bound / 3**0.5) - 1) < 0.02  # standard deviation of a uniform distribution
    assert all((p == 0).all() for name, p in actor.named_parameters() if name.endswith("bias"))


# REPLAY BUFFER
ZERO = np.zeros(1, np.float32)


def empty(capacity: int, horizon: int, obs_dim: int = 1, action_dim: int = 1) -> ReplayBuffer:
    return ReplayBuffer(Args(buffer_size=capacity, encoder_horizon=horizon), obs_dim, action_dim, CPU)


def fill(capacity: int, horizon: int, episodes: int, seed: int = 0, terminating: float = 0.5) -> ReplayBuffer:
    """Random episodes; observations are (episode, step), actions step + 0.5, rewards step + 1."""
    random, rb = np.random.default_rng(seed), empty(capacity, horizon, obs_dim=2)
    for episode in range(episodes):
        length, terminates = random.integers(1, 3 * horizon), random.random() < terminating
        rb.start_episode(np.array([episode, 0], np.float32))
        for step in range(length):
            next_obs = np.array([episode, step + 1], np.float32)
            rb.add(np.array([step + 0.5], np.float32), step + 1, next_obs, terminates and step == length - 1)
    return rb


@pytest.mark.parametrize("horizon", [1, 5])
@pytest.mark.parametrize("capacity", [23, 50, 3000])  # the first two wrap around, the last spans 24 rows of sums
def test_windows_stay_in_one_episode_and_on_its_terminal_observation(capacity, horizon):
    for episodes in range(1, 60, 3):
        rb = fill(capacity, horizon, episodes, seed=episodes)
        if not rb.priority.any():
            continue  # only truncated episodes shorter than the horizon so far
        batch = rb.sample(64)
        steps = batch.obs[..., 1]
        assert (batch.obs[..., 0] == batch.obs[:, :1, 0]).all()  # one episode
        alive = F.pad((1 - batch.terminated).cumprod(1), (1, 0), value=1)[:, :-1]  # before each step
        torch.testing.assert_close(steps[:, 1:], steps[:, :-1] + alive)  # goes on, or stays once terminated
        torch.testing.assert_close(batch.reward, alive * (steps[:, :-1] + 1))
        torch.testing.assert_close(batch.action[..., 0], alive * (steps[:, :-1] + 0.5))
        assert (batch.terminated * (1 - alive) == 0).all()


def test_the_last_starts_are_sampled_after_a_termination_and_never_after_a_truncation():
    for terminates, expected in ((True, [0, 1, 2, 3, 4, 5, 6]), (False, [0, 1, 2])):  # 7 steps, horizon 5
        rb = empty(100, 5)
        rb.start_episode(ZERO)
        for step in range(7):
            rb.add(ZERO, 0.0, ZERO, terminates and step == 6)
        assert rb.priority.nonzero()[:, 0].tolist() == expected
        rb.start_episode(ZERO)  # the next episode changes none of them
        assert rb.priority.nonzero()[:, 0].tolist() == expected


def test_overwriting_a_slot_takes_its_start_and_termination_away():
    rb = empty(8, 2)
    rb.start_episode(ZERO)
    for step in range(5):
        rb.add(ZERO, 1.0, ZERO, step == 4)  # slots 0..5, terminates in slot 4
    rb.start_episode(ZERO)  # slot 6
    for _ in range(3):
        rb.add(ZERO, 1.0, ZERO, False)  # slots 7, 0, 1
    assert rb.priority.nonzero()[:, 0].tolist() == [2, 3, 4, 6, 7]
    assert rb.is_transition.nonzero()[:, 0].tolist() == [0, 2, 3, 4, 6, 7]


def test_sampling_frequencies_are_proportional_to_the_priorities():
    rb = empty(2500, 1)  # twenty rows of 128
    rb.update_priority(torch.tensor([3, 127, 128, 2499]), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    index = torch.cat([rb.sample(200).index for _ in range(500)])
    counts = torch.bincount(index, minlength=2500)
    assert counts.nonzero()[:, 0].tolist() == [3, 127, 128, 2499]
    # 100,000 draws: the standard deviation of a frequency is at most 0.0016
    torch.testing.assert_close(counts[counts > 0] / 1e5, torch.tensor([0.1, 0.2, 0.3, 0.4]), rtol=0, atol=0.006)


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
    expected = row * 128 + 64
    expected[-1] = 7812 * 128 + 32
    assert rb.sample(7812).index.tolist() == expected.tolist()
    draws = torch.tensor([[[0.0]], [[(2.0**36 + 63.5) / (2.0**36 + 127)]]], dtype=torch.float64)
    assert rb.sample(1).index.tolist() == [64]  # in the row of the large one
    draws = torch.full((2, 1, 1), 1 - 2.0**-53, dtype=torch.float64)  # the largest number below 1
    assert rb.sample(1).index.tolist() == [999_999]


def test_a_new_start_gets_the_largest_priority_ever_given_and_at_least_1():
    rb = empty(100, 1)
    rb.start_episode(ZERO)
    for given in (0.5, 7.0, 3.0, 2.0):  # to slot 0
        rb.add(ZERO, 0.0, ZERO, False)
        rb.update_priority(torch.tensor([0]), torch.tensor([given]))
    rb.add(ZERO, 0.0, ZERO, False)
    assert rb.priority[:6].tolist() == [2, 1, 7, 7, 7, 0]  # 7 stays the largest that was ever given


def test_of_two_priorities_for_one_slot_the_larger_is_kept():
    rb = empty(300, 1)
    rb.update_priority(torch.tensor([7, 200, 7, 200, 200]), torch.tensor([2.0, 3.0, 5.0, 9.0, 4.0]))
    assert rb.priority[[7, 200]].tolist() == [5, 9]
    rb.update_priority(torch.tensor([200]), torch.tensor([1.0]))  # the old one does not count
    assert rb.priority[[7, 200]].tolist() == [5, 1]
    assert rb.row_total.tolist() == [5, 1, 0]  # of slots 0..127, 128..255, 256..299


def wrapped_around() -> tuple[ReplayBuffer, np.random.Generator]:
    """A buffer of three rows, the last one not full, after 1,500 slots with terminations and updates of priorities."""
    random, rb = np.random.default_rng(0), empty(300, 5)
    while len(rb.priority.nonzero()) < 200:  # the newest episodes may be all truncated
        for _ in range(100):
            length, terminates = random.integers(1, 30), random.random() < 0.5
            rb.start_episode(ZERO)
            for step in range(length):
                rb.add(ZERO, 0.0, ZERO, terminates and step == length - 1)
                if rb.priority.any():
                    rb.update_priority(rb.sample(16).index, torch.from_numpy(random.exponential(3, 16)).float())
    return rb, random


def test_row_totals_follow_the_priorities_around_the_ring():
    rb, _ = wrapped_around()
    rows = rb.priority.view(3, 128)
    assert len(rb.priority.unique()) > 100
    torch.testing.assert_close(rb.row_total, rows.double().sum(1), rtol=1e-12, atol=0)


def test_a_loaded_buffer_draws_as_the_saved_one():
    rb, random = wrapped_around()
    loaded = empty(300, 5)
    loaded.load_state_dict(rb.state_dict())
    loaded.generator.set_state(rb.generator.get_state())
    for _ in range(5):
        for buffer in (rb, loaded):  # whose new starts get the largest priority
            for terminated in (False, True):
                buffer.add(ZERO, 0.0, ZERO, terminated)
            buffer.start_episode(ZERO)
        index = rb.sample(100).index
        assert loaded.sample(100).index.tolist() == index.tolist()
        priority = torch.from_numpy(random.exponential(3, 100)).float()
        for buffer in (rb, loaded):
            buffer.update_priority(index, priority)


# LOSSES
def test_the_terminal_reward_counts_and_nothing_after_it():
    reward = torch.tensor([[1.0, 2.0, 4.0, 8.0], [1.0, 2.0, 4.0, 8.0]])
    terminated = torch.tensor([[0.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]])
    n_step, not_done = n_step_return(reward, terminated, steps=3, gamma=0.5)
    assert n_step.tolist() == [1 + 2 / 2 + 4 / 4, 1 + 2 / 2]
    assert not_done.tolist() == [1, 0]


def small_agent(**flags) -> Agent:
    return Agent(Args(width_scale=0.03, topology_update_interval=2, **flags), 4, 2, CPU)


def small_batch(seed: int = 0) -> Batch:
    torch.manual_seed(seed)
    return Batch(torch.randn(8, 6, 4), torch.rand(8, 5, 2), torch.rand(8, 5), torch.zeros(8, 5), torch.arange(8))


def test_each_loss_trains_its_own_module_alone():
    agent = small_agent()

    def changed(update):
        before = {name: p.clone() for name, p in agent.named_parameters()}
        metrics = update(FixedBatch(small_batch()))
        moved = {name.split(".")[0] for name, p in agent.named_parameters() if not torch.equal(p, before[name])}
        return moved, metrics

    assert changed(agent.update_encoder)[0] == {"encoder"}
    moved, metrics = changed(agent.update_critic_and_actor)
    assert moved == {"critic", "actor"}
    # the actor's loss left no trace in the critic's gradient: it is still that of the TD loss
    gradient = [p.grad for p in agent.critic.parameters()]
    assert metrics["plasticity/critic_grad_norm"] == torch.nn.utils.get_total_norm(gradient)


def test_target_noise_differs_from_update_to_update_and_is_clipped():
    agent, seen = small_agent(policy_noise=100.0, noise_clip=0.3), []
    agent.encoder_target.zsa = lambda zs, action: seen.append(action) or agent.encoder.zsa(zs, action)
    for _ in range(2):
        agent.update_critic_and_actor(FixedBatch(small_batch()))
    with torch.no_grad():
        clean = agent.actor_target(agent.encoder_target.zs(small_batch().obs[:, 3]))[0]
    assert (seen[0] != seen[1]).any()
    for action in seen:
        assert ((action - clean).abs() <= 0.3 + 1e-6).all() and (action.abs() <= 1).all()


def with_rewards(*rewards: float) -> ReplayBuffer:
    rb = empty(100, 5, 4, 2)
    rb.start_episode(np.ones(4, np.float32))
    for reward in rewards:
        rb.add(np.zeros(2, np.float32), reward, np.ones(4, np.float32), False)
    return rb


def test_targets_and_reward_scales_are_copied_together():
    agent = small_agent()

    def pairs():
        targets = [(name, p) for name, p in agent.named_parameters() if "_target." in name]
        return [torch.equal(p, agent.get_parameter(name.replace("_target.", "."))) for name, p in targets]

    agent.update_critic_and_actor(FixedBatch(small_batch()))
    assert not all(pairs())
    agent.update_targets(with_rewards(1, -2, 3, 0, 4))
    assert all(pairs())
    assert (agent.target_reward_scale, agent.reward_scale) == (1, 2)  # 1 was the scale before; |rewards| have mean 2
    agent.update_targets(with_rewards(0, 0, 0, 0, 1))
    assert (agent.target_reward_scale, agent.reward_scale) == (2, pytest.approx(0.2))


def test_every_250_training_steps_start_with_the_target_copies_and_as_many_encoder_updates():
    agent, rb, calls = small_agent(target_network_frequency=3), with_rewards(*range(9)), []
    for name in ("update_targets", "update_encoder", "update_critic_and_actor"):
        update = getattr(agent, name)
        setattr(agent, name, lambda rb, name=name, update=update: calls.append(name[7]) or update(rb) or {})
    for _ in range(4):
        agent.train_step(rb)
    assert "".join(calls) == "teeeccc" + "teeec"  # targets, encoder, critic and actor
    full = Agent(Args(width_scale=0.03), 4, 2, CPU)
    assert [s.total_updates for s in full.sparsifiers.values()] == [490_250, 490_001, 490_001]  # of 500,000 agent steps


def test_diagnostics_read_the_features_of_each_module():
    agent, rb = small_agent(), empty(500, 5, 4, 2)
    random = np.random.default_rng(0)
    rb.start_episode(random.normal(size=4).astype(np.float32))
    for _ in range(400):
        rb.add(random.uniform(-1, 1, 2).astype(np.float32), 0.0, random.normal(size=4).astype(np.float32), False)
    metrics = diagnose(agent, rb, seed=0)
    assert metrics["plasticity/critic_dormant_ratio"] < 0.5
    for parameter in [*agent.critic.q1.projection.parameters(), *agent.critic.q1.blocks.parameters()]:
        parameter.data.zero_()  # q1 then sees nothing but zeros
    after = diagnose(agent, rb, seed=0)
    assert after["plasticity/critic_dormant_ratio"] == pytest.approx(0.5, abs=0.1)  # one of two heads is dead
    assert after["plasticity/critic_srank"] < metrics["plasticity/critic_srank"]
    assert {k for k in metrics if after[k] != metrics[k]} == {k for k in metrics if "critic" in k}
    assert 1 <= metrics["plasticity/encoder_srank"] <= 15  # zsa has round(0.03 * 512) = 15 dimensions
