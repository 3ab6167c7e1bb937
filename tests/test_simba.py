"""SAC and DDPG on SimBa against the numbers of the reference (`tests/oracles/`, float64), and what they leave open."""

import functools

import numpy as np
import pytest
import torch
from conftest import ORACLES, FixedBatch, default_dtype
from test_graphs import make

import mst_ddpg
import mst_sac

CPU = torch.device("cpu")
HUMANOID = (67, 21)
SCRIPTS = {"sac": mst_sac, "ddpg": mst_ddpg}
FLAGS = {name: name for name in ("gamma", "tau", "weight_decay")}  # ours and the oracles'
FLAGS |= {"initial_temperature": "temp_init", "temperature_lr": "temp_lr"}
assert_close = functools.partial(torch.testing.assert_close, rtol=1e-8, atol=1e-12)
both_scripts = pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)


class Oracle:
    """One file, and an agent with its initial weights that draws its noise."""

    def __init__(self, name: str):
        self.data = {key: torch.from_numpy(value) for key, value in np.load(ORACLES / f"{name}.npz").items()}
        self.algorithm, self.twin = name.split("_")[0], name.endswith("twin")
        self.module = module = SCRIPTS[self.algorithm]
        meta = {name: value.item() for name, value in self.theirs("meta").items()}
        args = module.Args(
            critic_regime="dense", actor_regime="dense", critic_lr=meta["lr"], actor_lr=meta["lr"],
            **{ours: meta[theirs] for ours, theirs in FLAGS.items() if theirs in meta},
        )  # fmt: skip
        dims = meta["obs_dim"], meta["act_dim"]
        with pytest.MonkeyPatch.context() as patch, default_dtype(torch.float64):
            critic = module.Critic(*dims, meta["critic_hidden"], meta["critic_blocks"], self.twin)
            networks = critic, module.Actor(*dims, meta["actor_hidden"], meta["actor_blocks"])
            patch.setattr(module, "make_networks", lambda *_: networks)
            self.agent = agent = module.Agent(args, *dims, CPU)
        for name, theirs in self.theirs("init").items():
            self.ours()[name].data.copy_(theirs)
        agent.normalizer.mean.fill_(3)  # observations of the oracles are normalised: 2 * obs + 3 before
        agent.normalizer.var.fill_(4 - 1e-8)
        self.noise_std = meta.get("noise_std", 1)

    def ours(self) -> dict[str, torch.Tensor]:
        """Our parameters by the oracle's names."""
        modules = {"actor": self.agent.actor, "critic": self.agent.critic, "target": self.agent.critic_target}
        named = {f"{part}/{name}": p for part, module in modules.items() for name, p in module.named_parameters()}
        for ours, theirs in (("q.0.", "q1/" * self.twin), ("q.1.", "q2/"), ("trunk.", "")):
            named = {name.replace(ours, theirs): p for name, p in named.items()}
        return named | ({"log_temp": self.agent.log_temp} if self.algorithm == "sac" else {})

    def theirs(self, when: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(f"{when}/"): v for key, v in self.data.items() if key.startswith(f"{when}/")}

    def update(self, k: int) -> dict[str, torch.Tensor]:
        """Update number k with the oracle's noise. Returns the metrics."""
        batch, eps = self.theirs(f"batch{k}"), self.theirs(f"eps{k}")
        noise = iter([eps["actor"] * self.noise_std, eps["target"] * self.noise_std])
        self.agent.noise = lambda action: next(noise)
        batch |= {name: 2 * batch[name] + 3 for name in ("obs", "next_obs")}
        return self.agent.update_critic_and_actor(FixedBatch(self.module.Batch(**batch)))


@pytest.fixture(params=["sac_single", "sac_twin", "ddpg_single", "ddpg_twin"])
def oracle(request):
    return Oracle(request.param)


def test_q_values_actions_and_densities_are_those_of_the_reference(oracle):
    for j in range(3):  # ordinary, large and zero observations
        case, agent = oracle.theirs(f"fwd{j}"), oracle.agent
        obs, action = case["obs"], case["action"]
        with torch.no_grad():
            q = agent.critic(obs, action)
            values = {"eval_action": torch.from_numpy(agent.act((2 * obs + 3).numpy()))}
            values |= {"q1": q[:, 0], "q2": q[:, 1]} if oracle.twin else {"q": q[:, 0]}
            if oracle.algorithm == "sac":
                values["mean"], values["log_std"] = agent.actor(obs)
                values["sample"], values["sample_log_prob"] = agent.actor.sample(obs, case["eps"])
        assert_close(values, {name: case[name] for name in values})


def test_three_updates_give_the_infos_and_parameters_of_the_reference(oracle):
    for k in range(3):
        infos = {name.split("/")[1]: value for name, value in oracle.update(k).items()}
        infos = {name.replace("grad_norm", "gnorm").replace("q_values", "q_mean"): x for name, x in infos.items()}
        del infos["td_error"]  # which the reference does not give
        assert_close(infos, {name: oracle.theirs(f"info{k}")[name] for name in infos})
        if k in (0, 2):
            # one update moves a parameter by 1e-4
            assert_close(oracle.ours(), oracle.theirs(f"after{k + 1}"), rtol=0, atol=1e-10)


@both_scripts
def test_observations_are_normalised_as_in_the_reference(script):
    data = {key: torch.from_numpy(value) for key, value in np.load(ORACLES / "obs_norm.npz").items()}
    normalizer = script.RunningNorm(7)
    for n, obs in enumerate(data["obs"], start=1):
        normalizer.update(obs)
        if n in (1, 2, 50):
            ours = normalizer.state_dict() | {"probe_normalized": normalizer(data["probe"])}
            assert_close(ours, {name: data[f"after{n}/{name}"] for name in ours})
    assert normalizer(obs.float()).dtype == torch.float32  # what the networks take


# actor and one critic, exact values of the specification; the paper's "SAC, 207M" is w4d3 (Fig. 14)
@pytest.mark.parametrize(
    ("script", "width", "depth", "count"),
    [(mst_sac, 1, 1, 4_394_923), (mst_sac, 4, 3, 207_960_619), (mst_ddpg, 4, 3, 207_949_846)],
)
def test_networks_have_the_parameter_counts_of_the_specification(script, width, depth, count):
    with torch.device("meta"):
        networks = script.make_networks(script.Args(width_scale=width, depth_scale=depth), *HUMANOID)
    assert sum(p.numel() for network in networks for p in network.parameters()) == count


@both_scripts
def test_weights_start_orthogonal_outside_the_blocks_and_as_truncated_he_normal_in_them(script):
    torch.manual_seed(0)
    modules = torch.nn.ModuleList(script.make_networks(script.Args(), *HUMANOID)).named_modules()
    linear = {name: layer for name, layer in modules if isinstance(layer, torch.nn.Linear)}
    assert not any(layer.bias.any() for layer in linear.values())
    for name, layer in linear.items():
        weight = layer.weight.detach()
        if "blocks" in name:
            std = (2 / weight.shape[1]) ** 0.5
            assert weight.std() == pytest.approx(std, rel=0.01)
            assert 0.99 < weight.abs().max() / (2 * std / 0.87962566) <= 1 + 1e-6  # cut at 2 sigma before
        else:
            gram = weight.T @ weight if weight.shape[0] > weight.shape[1] else weight @ weight.T
            assert_close(gram, torch.eye(len(gram)), rtol=0, atol=1e-5)


def test_the_density_is_finite_where_the_tanh_saturates_in_float32():
    noise = torch.tensor([[50.0], [-50.0]], requires_grad=True)  # exp(100) is inf
    action, log_prob = mst_sac.Actor.sample(lambda obs: (torch.zeros(2, 1), torch.zeros(2, 1)), None, noise)
    assert action.abs().tolist() == [[1.0], [1.0]]
    # -x^2 / 2 - log(2 pi) / 2 - 2 (log 2 - |x|) by hand
    assert log_prob.tolist() == pytest.approx([-1250 - 0.918939 - 1.386294 + 100] * 2)
    log_prob.sum().backward()
    assert noise.grad.isfinite().all()


@both_scripts
@pytest.mark.parametrize("twin", [False, True])
def test_a_moving_topology_keeps_the_targets_zeros_exact(script, twin):
    agent, rb = make(script, CPU, graphs=False, topology_update_interval=4, tau=0.1, clipped_double_q=twin)
    sparsifier, target = agent.sparsifiers["critic"], dict(agent.critic_target.named_parameters())
    first = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    for step in range(20):
        agent.train_step(rb)
        assert [s.updates for s in agent.sparsifiers.values()] == [2 * (step + 1)] * 2  # two updates per agent step
        assert not any(target[name][~mask].any() for name, mask in sparsifier.masks.items())
    assert sparsifier.topology_updates == 10  # every 4 of 40
    grown = {name: mask & ~first[name] for name, mask in sparsifier.masks.items() if (mask & ~first[name]).any()}
    assert len(grown) >= 2 * (1 + twin)  # the blocks' layers of every critic
    assert all(target[name][new].any() for name, new in grown.items())  # follows the critic where a connection grew


@both_scripts
def test_every_training_action_counts_into_the_statistics_and_no_evaluation_does(script):
    (agent, rb), generator = make(script, CPU, graphs=False), torch.Generator().manual_seed(0)
    observations = np.random.default_rng(0).normal(3, 2, (200, 5)).astype(np.float32)
    actions = np.stack([agent.explore(obs, i < 100, generator) for i, obs in enumerate(observations)])
    assert np.abs(actions).max() <= 1
    agent.act(observations)
    agent.train_step(rb)
    assert agent.normalizer.count.item() == pytest.approx(200.0001)
    assert agent.normalizer.mean.numpy() == pytest.approx(observations.mean(0), rel=1e-5)


@both_scripts
def test_sac_executes_samples_of_its_policy_and_ddpg_its_action_with_noise_of_standard_deviation_0_1(script):
    (agent, _), generator, obs = make(script, CPU, graphs=False), torch.Generator().manual_seed(0), torch.zeros(1, 5)
    agent.normalizer.update = lambda obs: None
    x = torch.from_numpy(np.stack([agent.explore(obs[0].numpy(), False, generator) for _ in range(2000)]))
    if script is mst_ddpg:
        assert (x - torch.from_numpy(agent.act(obs.numpy()))).std().item() == pytest.approx(0.1, rel=0.05)
        return
    mean, log_std = (value[0].detach() for value in agent.actor(obs))
    assert_close(x.atanh().std(0), log_std.exp(), rtol=0.05, atol=0)
    assert_close(x.atanh().mean(0), mean, rtol=0, atol=0.05)


# (L / 5 - 1) / (L / 5) within 0.95 and 0.995 for L agent steps
@both_scripts
def test_schedules_discount_and_critics_follow_the_run_unless_given(script):
    for flags, gamma, critics in (
        ({"env_id": "humanoid-run", "max_episode_steps": 500}, 0.99, 1),
        ({"env_id": "humanoid-run", "max_episode_steps": 50}, 0.95, 1),
        ({"env_id": "Hopper-v5", "max_episode_steps": 2000}, 0.995, 2),
        ({"env_id": "Hopper-v5", "gamma": 0.9, "clipped_double_q": False}, 0.9, 1),
    ):
        agent = script.Agent(script.Args(width_scale=0.03, **flags), 5, 2, CPU)
        assert (agent.args.gamma, len(agent.critic.q)) == (pytest.approx(gamma), critics)
        assert [s.total_updates for s in agent.sparsifiers.values()] == [990_002] * 2  # of the specification


@both_scripts
def test_diagnostics_read_the_inputs_of_the_heads_and_the_hidden_units_of_the_blocks(script):
    agent, rb = make(script, CPU, graphs=False, clipped_double_q=True, critic_regime="dense")
    metrics = script.diagnose(agent, rb, seed=0)
    assert metrics["plasticity/critic_dormant_ratio"] < 0.1
    # a LayerNorm's output has norm sqrt(width), here of two critics side by side
    width = agent.critic.q[0].value.in_features
    assert metrics["plasticity/critic_feature_norm"] == pytest.approx((2 * width) ** 0.5, rel=1e-3)
    for block in agent.critic.q[0].trunk.blocks:
        block.linear1.bias.data.fill_(-100)
    after = script.diagnose(agent, rb, seed=0)
    assert after["plasticity/critic_dormant_ratio"] == pytest.approx(0.5, abs=0.05)  # of one critic in two
    assert {k: v for k, v in after.items() if "actor" in k} == {k: v for k, v in metrics.items() if "actor" in k}
