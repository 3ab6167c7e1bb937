"""SAC and DDPG on SimBa against the numbers of the reference (`tests/oracles/`, float64), and what they leave open.

Scalars and forward values at 1e-8 relative, parameters at 1e-10 absolute: one update moves a parameter by 1e-4.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FixedBatch, default_dtype
from test_graphs import make

import mst_ddpg
import mst_sac

ORACLES = Path(os.environ.get("MST_ORACLES") or Path(__file__).parent / "oracles")
CPU = torch.device("cpu")
HUMANOID, DOG = (67, 21), (223, 38)
SCRIPTS = {"sac": mst_sac, "ddpg": mst_ddpg}
TEMPERATURE = {"initial_temperature": "temp_init", "temperature_lr": "temp_lr"}  # ours and the oracles'


def parameters(*modules: torch.nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def norm(module: torch.nn.Module) -> torch.Tensor:
    return torch.nn.utils.get_total_norm(module.parameters())


class Oracle:
    """One file, and an agent with its initial weights that draws its noise."""

    def __init__(self, name: str):
        self.data = {key: torch.from_numpy(value) for key, value in np.load(ORACLES / f"{name}.npz").items()}
        self.algorithm, self.twin = name.split("_")[0], name.endswith("twin")
        module = SCRIPTS[self.algorithm]
        meta = {name: value.item() for name, value in self.theirs("meta").items()}
        args = module.Args(
            critic_regime="dense", actor_regime="dense", gamma=meta["gamma"], tau=meta["tau"],
            critic_lr=meta["lr"], actor_lr=meta["lr"], weight_decay=meta["weight_decay"],
            **{ours: meta[theirs] for ours, theirs in TEMPERATURE.items() if theirs in meta},
        )  # fmt: skip
        dims = meta["obs_dim"], meta["act_dim"]

        def make_networks(args, obs_dim, action_dim):
            critic = module.Critic(*dims, meta["critic_hidden"], meta["critic_blocks"], self.twin)
            return critic, module.Actor(*dims, meta["actor_hidden"], meta["actor_blocks"])

        with pytest.MonkeyPatch.context() as patch, default_dtype(torch.float64):
            patch.setattr(module, "make_networks", make_networks)
            self.agent = agent = module.Agent(args, *dims, CPU)
        for name, theirs in self.theirs("init").items():
            self.ours()[name].data.copy_(theirs)
        agent.normalizer.mean.fill_(3)
        agent.normalizer.var.fill_(4 - 1e-8)
        if self.algorithm == "sac":
            assert agent.target_entropy == meta["target_entropy"]
        self.noise_std = meta.get("noise_std", 1)

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.data[key]

    def ours(self) -> dict[str, torch.Tensor]:
        """Our parameters by the oracle's names."""
        modules = {"actor": self.agent.actor, "critic": self.agent.critic, "target": self.agent.critic_target}
        named = {f"{part}/{name}": p for part, module in modules.items() for name, p in module.named_parameters()}
        heads = {"q.0.": "q1/", "q.1.": "q2/"} if self.twin else {"q.0.": ""}
        for ours, theirs in {**heads, "trunk.": ""}.items():
            named = {name.replace(ours, theirs): p for name, p in named.items()}
        return named | ({"log_temp": self.agent.log_temp} if self.algorithm == "sac" else {})

    def theirs(self, when: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(f"{when}/"): v for key, v in self.data.items() if key.startswith(f"{when}/")}

    @staticmethod
    def raw(obs: torch.Tensor) -> torch.Tensor:
        """Observations before the normalisation: those of the oracles come after it."""
        return 2 * obs + 3

    def update(self, k: int) -> dict[str, torch.Tensor]:
        """Update number k with the oracle's noise. Returns our values of its infos."""
        agent, batch = self.agent, self.theirs(f"batch{k}")
        noise = iter([self[f"eps{k}/actor"] * self.noise_std, self[f"eps{k}/target"] * self.noise_std])
        agent.noise = lambda action: next(noise)
        obs, action, reward = batch["obs"], batch["action"], batch["reward"]
        with torch.no_grad():
            q = agent.critic(obs, action)
            if self.algorithm == "sac":
                new_action, _ = agent.actor.sample(obs, self[f"eps{k}/actor"])
            else:
                new_action = (agent.actor(obs) + self.noise_std * self[f"eps{k}/actor"]).clamp(-1, 1)
        infos = {
            "actor_pnorm": norm(agent.actor), "critic_pnorm": norm(agent.critic), "rew_mean": reward.mean(),
            "actor_action": new_action.abs().mean(), "q1_mean": q[:, 0].mean(), "q2_mean": q[:, -1].mean(),
        }  # fmt: skip
        columns = self.raw(obs), action, reward, self.raw(batch["next_obs"]), batch["terminated"]
        metrics = agent.update_critic_and_actor(FixedBatch(SCRIPTS[self.algorithm].Batch(*columns)))
        for ours, theirs in {
            "losses/critic_loss": "critic_loss", "losses/actor_loss": "actor_loss", "losses/q_values": "q_mean",
            "losses/entropy": "entropy", "losses/temperature": "temperature",
            "losses/temperature_loss": "temperature_loss",
            "plasticity/critic_grad_norm": "critic_gnorm", "plasticity/actor_grad_norm": "actor_gnorm",
        }.items():  # fmt: skip
            if ours in metrics:
                infos[theirs] = metrics[ours]
        if self.algorithm == "sac":
            infos["temperature_gnorm"] = agent.log_temp.grad.abs()
        return infos


@pytest.fixture(params=["sac_single", "sac_twin", "ddpg_single", "ddpg_twin"])
def oracle(request):
    return Oracle(request.param)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, name: str) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12, msg=lambda text: f"{name}: {text}")


def test_q_values_actions_and_densities_are_those_of_the_reference(oracle):
    for j in range(3):  # ordinary, large and zero observations
        case, agent = oracle.theirs(f"fwd{j}"), oracle.agent
        obs, action = case["obs"], case["action"]
        with torch.no_grad():
            q = agent.critic(obs, action)
            values = {"eval_action": torch.from_numpy(agent.act(oracle.raw(obs).numpy()))}
            values |= {"q1": q[:, 0], "q2": q[:, 1]} if oracle.twin else {"q": q[:, 0]}
            if oracle.algorithm == "sac":
                mean, log_std = agent.actor(obs)
                sample, sample_log_prob = agent.actor.sample(obs, case["eps"])
                of_action = (action.atanh() - mean) / log_std.exp()  # the noise that gives this action
                _, log_prob = agent.actor.sample(obs, of_action)
                values |= {"mean": mean, "log_std": log_std, "log_prob": log_prob}
                values |= {"sample": sample, "sample_log_prob": sample_log_prob}
        assert case.keys() == values.keys() | {"obs", "action"} | ({"eps"} if oracle.algorithm == "sac" else set())
        for name, value in values.items():
            assert_close(value, case[name], f"fwd{j}/{name}")


def test_three_updates_give_the_infos_and_parameters_of_the_reference(oracle):
    for k in range(3):
        infos, theirs = oracle.update(k), oracle.theirs(f"info{k}")
        assert infos.keys() == theirs.keys()
        for name, value in infos.items():
            assert_close(value, theirs[name], f"info{k}/{name}")
        if k in (0, 2):
            after, ours = oracle.theirs(f"after{k + 1}"), oracle.ours()
            assert ours.keys() == after.keys()
            for name, value in ours.items():
                torch.testing.assert_close(value.detach(), after[name], rtol=0, atol=1e-10, msg=f"{k} {name}")


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_observations_are_normalised_as_in_the_reference(script):
    data = {key: torch.from_numpy(value) for key, value in np.load(ORACLES / "obs_norm.npz").items()}
    normalizer = script.RunningNorm(7)
    assert_close(normalizer(data["probe"]), data["after0/probe_normalized"], "probe")
    for n, obs in enumerate(data["obs"], start=1):
        normalizer.update(obs)
        if n in (1, 2, 50):
            for name in ("mean", "var", "count"):
                assert_close(getattr(normalizer, name), data[f"after{n}/{name}"], f"after{n}/{name}")
            assert_close(normalizer(obs), data[f"after{n}/last_obs_normalized"], f"row {n}")
            assert_close(normalizer(data["probe"]), data[f"after{n}/probe_normalized"], f"probe after {n}")
    assert normalizer(obs.float()).dtype == torch.float32  # what the networks take


# Networks
# actor and one critic, exact values of the specification; the paper's "SAC, 207M" is w4d3 (Fig. 14)
@pytest.mark.parametrize(
    ("script", "dims", "width", "depth", "count"),
    [
        (mst_sac, HUMANOID, 1, 1, 4_394_923),
        (mst_sac, DOG, 1, 1, 4_507_853),
        (mst_sac, HUMANOID, 4, 3, 207_960_619),
        (mst_ddpg, HUMANOID, 4, 3, 207_949_846),
    ],
)
def test_networks_have_the_parameter_counts_of_the_specification(script, dims, width, depth, count):
    args = script.Args(width_scale=width, depth_scale=depth)
    with torch.device("meta"):
        assert parameters(*script.make_networks(args, *dims)) == count
    args.clipped_double_q = True
    with torch.device("meta"):
        critic, actor = script.make_networks(args, *dims)
    assert parameters(critic) == 2 * (count - parameters(actor))


# in millions, of the specification
@pytest.mark.parametrize(
    ("width", "depth", "millions"), [(2, 1, 17.441), (1, 4, 17.395), (4, 1, 69.484), (3, 3, 117.042), (5, 5, 541.181)]
)
def test_width_and_depth_scale_both_modules(width, depth, millions):
    with torch.device("meta"):
        networks = mst_sac.make_networks(mst_sac.Args(width_scale=width, depth_scale=depth), *HUMANOID)
    assert round(parameters(*networks) / 1e6, 3) == millions


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_weights_start_orthogonal_outside_the_blocks_and_as_truncated_he_normal_in_them(script):
    torch.manual_seed(0)
    critic, actor = script.make_networks(script.Args(), *HUMANOID)
    for module in (critic, actor):
        for name, layer in module.named_modules():
            if isinstance(layer, torch.nn.LayerNorm):
                assert layer.eps == 1e-6
                assert (layer.weight == 1).all()
            if not isinstance(layer, torch.nn.Linear):
                continue
            assert not layer.bias.any()
            weight = layer.weight.detach()
            if "blocks" in name:
                std = (2 / weight.shape[1]) ** 0.5
                assert weight.std() == pytest.approx(std, rel=0.01)
                assert 0.99 < weight.abs().max() / (2 * std / 0.87962566) <= 1 + 1e-6  # cut at 2 sigma before
            else:
                gram = weight.T @ weight if weight.shape[0] > weight.shape[1] else weight @ weight.T
                torch.testing.assert_close(gram, torch.eye(len(gram)), rtol=0, atol=1e-5)


# Algorithm
@pytest.mark.parametrize(("mean", "log_std"), [(0.0, 0.0), (1.5, -1.0), (-3.0, 2.0), (0.3, -10.0)])
def test_the_density_of_the_squashed_gaussian_agrees_with_numerical_integration(mean, log_std):
    noise = torch.linspace(-9, 9, 200_001, dtype=torch.float64)
    mean, log_std = torch.full_like(noise, mean)[:, None], torch.full_like(noise, log_std)[:, None]
    action, log_prob = mst_sac.Actor.sample(lambda obs: (mean, log_std), None, noise[:, None])
    # Over x = atanh(action), where da = (1 - tanh(x)^2) dx = 4 dx / (e^x + e^-x)^2
    x = (mean + log_std.exp() * noise[:, None])[:, 0]
    density = log_prob + np.log(4) - 2 * torch.logaddexp(x, -x)
    assert torch.trapezoid(density.exp(), x).item() == pytest.approx(1, abs=1e-9)
    if log_std[0] <= -1:  # the action's own integral, where tanh does not saturate
        assert torch.trapezoid(log_prob.exp(), action[:, 0]).item() == pytest.approx(1, abs=1e-6)


def test_the_density_is_finite_where_the_tanh_saturates_in_float32():
    noise = torch.tensor([[40.0], [-40.0]], requires_grad=True)
    action, log_prob = mst_sac.Actor.sample(lambda obs: (torch.zeros(2, 1), torch.zeros(2, 1)), None, noise)
    assert action.abs().tolist() == [[1.0], [1.0]]
    # -x^2 / 2 - log(2 pi) / 2 - 2 (log 2 - |x|) by hand
    assert log_prob.tolist() == pytest.approx([-800 - 0.918939 - 1.386294 + 80] * 2)
    log_prob.sum().backward()
    assert noise.grad.isfinite().all()


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
@pytest.mark.parametrize("twin", [False, True])
def test_a_moving_topology_keeps_the_targets_zeros_exact(script, twin):
    agent, rb = make(script, CPU, graphs=False, topology_update_interval=4, tau=0.1, clipped_double_q=twin)
    sparsifier, target = agent.sparsifiers["critic"], dict(agent.critic_target.named_parameters())
    first = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    for step in range(20):
        agent.train_step(rb)
        assert [s.updates for s in agent.sparsifiers.values()] == [2 * (step + 1)] * 2  # two updates per agent step
        for name, mask in sparsifier.masks.items():
            assert not target[name][~mask].any()
    assert sparsifier.topology_updates == 10  # every 4 of 40
    moved = [name for name, mask in sparsifier.masks.items() if (mask & ~first[name]).any()]
    assert len(moved) >= 2 * (1 + twin)  # the blocks' layers of every critic
    for name in moved:
        grown = sparsifier.masks[name] & ~first[name]
        assert target[name][grown].any()  # follows the critic where a connection grew


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_every_training_action_counts_into_the_statistics_and_no_evaluation_does(script):
    (agent, rb), generator = make(script, CPU, graphs=False), torch.Generator().manual_seed(0)
    observations = np.random.default_rng(0).normal(3, 2, (200, 5)).astype(np.float32)
    actions = np.stack([agent.explore(obs, i < 100, generator) for i, obs in enumerate(observations)])
    mean = torch.from_numpy(observations).double().mean(0)
    torch.testing.assert_close(agent.normalizer.mean, mean, rtol=1e-5, atol=0)
    assert agent.normalizer.count.item() == pytest.approx(200.0001)
    assert np.abs(actions).max() <= 1
    before = agent.normalizer.mean.clone()
    agent.act(observations)
    agent.train_step(rb)
    assert torch.equal(agent.normalizer.mean, before)


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_sac_executes_samples_of_its_policy_and_ddpg_its_action_with_noise_of_standard_deviation_0_1(script):
    (agent, _), generator, obs = make(script, CPU, graphs=False), torch.Generator().manual_seed(0), torch.zeros(1, 5)
    agent.normalizer.update = lambda obs: None
    x = torch.from_numpy(np.stack([agent.explore(obs[0].numpy(), False, generator) for _ in range(2000)]))
    if script is mst_ddpg:
        assert (x - torch.from_numpy(agent.act(obs.numpy()))).std().item() == pytest.approx(0.1, rel=0.05)
        return
    mean, log_std = (value[0].detach() for value in agent.actor(obs))
    torch.testing.assert_close(x.atanh().std(0), log_std.exp(), rtol=0.05, atol=0)
    torch.testing.assert_close(x.atanh().mean(0), mean, rtol=0, atol=0.05)


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_schedules_run_over_the_990_002_updates_of_a_run(script):
    agent = script.Agent(script.Args(width_scale=0.03), 5, 2, CPU)
    assert [s.total_updates for s in agent.sparsifiers.values()] == [990_002] * 2  # of the specification


# (L / 5 - 1) / (L / 5) within 0.95 and 0.995 for L agent steps
@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
@pytest.mark.parametrize(
    ("arguments", "gamma", "twin"),
    [
        ({"env_id": "humanoid-run", "max_episode_steps": 500}, 0.99, False),
        ({"env_id": "humanoid-run", "max_episode_steps": 50}, 0.95, False),
        ({"env_id": "Pendulum-v1", "max_episode_steps": 200}, 0.975, True),
        ({"env_id": "Hopper-v5", "max_episode_steps": 1000}, 0.995, True),
        ({"env_id": "Hopper-v5", "gamma": 0.9, "clipped_double_q": False}, 0.9, False),
    ],
)
def test_discount_and_critics_follow_the_environment_unless_given(script, arguments, gamma, twin):
    agent = script.Agent(script.Args(width_scale=0.03, **arguments), 5, 2, CPU)
    assert agent.args.gamma == pytest.approx(gamma)
    assert len(agent.critic.q) == 1 + twin


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_diagnostics_read_the_inputs_of_the_heads_and_the_hidden_units_of_the_blocks(script):
    agent, rb = make(script, CPU, graphs=False, clipped_double_q=True, critic_regime="dense")
    metrics = script.diagnose(agent, rb, seed=0)
    assert metrics["plasticity/critic_dormant_ratio"] < 0.1
    width = agent.critic.q[0].value.in_features
    # a LayerNorm's output has norm sqrt(width), here of two critics side by side
    assert metrics["plasticity/critic_feature_norm"] == pytest.approx((2 * width) ** 0.5, rel=1e-3)
    for block in agent.critic.q[0].trunk.blocks:
        torch.nn.init.constant_(block.linear1.bias, -100)
    after = script.diagnose(agent, rb, seed=0)
    assert after["plasticity/critic_dormant_ratio"] == pytest.approx(0.5, abs=0.05)  # of one critic in two
    assert {k: v for k, v in after.items() if "actor" in k} == {k: v for k, v in metrics.items() if "actor" in k}
