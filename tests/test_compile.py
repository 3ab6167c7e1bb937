"""Losses under torch.compile and in bfloat16."""

import importlib
import shutil
from functools import partial

import pytest
import torch
from conftest import FixedBatch
from test_graphs import make
from torch.utils._pytree import tree_leaves

EAGER = {"rtol": 0, "atol": 0}  # the same operations, traced
# inductor fuses operations and so rounds otherwise; an update moves a weight by 1e-4
FUSED = {"rtol": 1e-5, "atol": 1e-6}


@pytest.mark.parametrize(
    ("script", "backend", "tolerance"),
    [
        *((script, "aot_eager", EAGER) for script in ("mst_mrq", "mst_mrsac", "mst_sac", "mst_ddpg")),
        pytest.param(
            "mst_sac", "inductor", FUSED, marks=pytest.mark.skipif(not shutil.which("g++"), reason="needs a compiler")
        ),
    ],
)
def test_compiled_losses_train_as_eager_ones_do(monkeypatch, script, backend, tolerance):
    module, cpu, graphs = importlib.import_module(script), torch.device("cpu"), []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, example_inputs)

    torch._dynamo.reset()
    eager, rb = make(module, cpu, graphs=False)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counting, fullgraph=True))
    compiled, _ = make(module, cpu, graphs=False, compile=True)
    for k in range(3):
        rb_of_one = FixedBatch(rb.sample(16, cpu))
        for agent in (eager, compiled):
            if "encoder" in module.MODULES:  # whose scales must not have become constants of the graphs
                agent.update_targets(torch.tensor(0.5 + k), torch.tensor(1.0))
                agent.updates.run("update_encoder", agent, rb_of_one)
            agent.updates.run("update_critic_and_actor", agent, rb_of_one)
        assert len(graphs) == len(module.MODULES)  # one for each loss, and none anew for later updates
        for name, value in eager.metrics.items():
            torch.testing.assert_close(compiled.metrics[name], value, **tolerance, msg=f"{k} {name}")
        for name in module.MODULES:
            for key, value in getattr(eager, name).state_dict().items():
                ours = getattr(compiled, name).state_dict()[key]
                torch.testing.assert_close(ours, value, **tolerance, msg=f"{k} {name} {key}")


@pytest.mark.parametrize("script", ["mst_mrq", "mst_mrsac", "mst_sac", "mst_ddpg"])
def test_losses_in_bfloat16_are_near_those_in_float32_and_what_networks_return_is_float32(script):
    module, cpu = importlib.import_module(script), torch.device("cpu")
    exact, rb = make(module, cpu, graphs=False)
    rounded, _ = make(module, cpu, graphs=False, bf16=True)
    rb_of_one, dtypes = FixedBatch(rb.sample(16, cpu)), set()
    for network in (rounded.critic, rounded.actor):
        network.register_forward_hook(lambda _, inputs, out: dtypes.update(x.dtype for x in tree_leaves(out)))
    for agent in (exact, rounded):
        for name in ["update_encoder"] * ("encoder" in module.MODULES) + ["update_critic_and_actor"]:
            agent.updates.run(name, agent, rb_of_one)
    assert dtypes | {value.dtype for value in rounded.metrics.values()} == {torch.float32}
    assert all(p.grad.dtype == torch.float32 for name in module.MODULES for p in getattr(rounded, name).parameters())
    for name in [f"losses/{name}_loss" for name in module.MODULES]:
        torch.testing.assert_close(rounded.metrics[name], exact.metrics[name], rtol=0.03, atol=0.003)  # 8 bits
        assert rounded.metrics[name] != exact.metrics[name]
