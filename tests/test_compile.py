"""Losses under torch.compile."""

import importlib
import shutil
from functools import partial

import pytest
import torch
from conftest import SCRIPTS, FixedBatch
from test_graphs import make

EAGER = {"rtol": 0, "atol": 0}  # the same operations, traced
# inductor fuses operations and so rounds otherwise; an update moves a weight by 1e-4
FUSED = {"rtol": 1e-5, "atol": 1e-6}
COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="needs a compiler")
CASES = [(script, "aot_eager", EAGER) for script in SCRIPTS]


@pytest.mark.parametrize(
    ("script", "backend", "tolerance"), [*CASES, pytest.param("mst_ddpg", "inductor", FUSED, marks=COMPILER)]
)
def test_compiled_losses_train_as_eager_ones_do(monkeypatch, script, backend, tolerance):
    module, cpu, graphs = importlib.import_module(script), torch.device("cpu"), []
    small = {"encoder_horizon": 3} if "encoder" in module.MODULES else {"depth_scale": 0.5}  # less to compile

    def counting(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, example_inputs)

    torch._dynamo.reset()
    eager, rb = make(module, cpu, graphs=False, **small)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counting, fullgraph=True))
    compiled, _ = make(module, cpu, graphs=False, compile=True, **small)
    for k in range(3):
        rb_of_one, metrics = FixedBatch(rb.sample(16)), [{}, {}]
        for agent, values in zip((eager, compiled), metrics, strict=True):
            if "encoder" in module.MODULES:
                agent.reward_scale.fill_(0.5 + k)  # must not have become a constant of the graphs
                values |= agent.update_encoder(rb_of_one)
            values |= agent.update_critic_and_actor(rb_of_one)
        assert len(graphs) == len(module.MODULES)  # one for each loss, and none anew for later updates
        for name, value in metrics[0].items():
            torch.testing.assert_close(metrics[1][name], value, **tolerance, msg=f"{k} {name}")
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, **tolerance, msg=name)
