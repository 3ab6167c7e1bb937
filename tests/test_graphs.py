"""CUDA graphs without a GPU: `RecordedGraph` takes the place of `torch.cuda.CUDAGraph`.

It records the operations that PyTorch runs during a capture, backward passes and optimizers included, and a replay runs
these operations again on the same tensors. Like a CUDA graph it runs no line of Python again, reads and writes the
captured tensors only, draws the next numbers of the registered generators, and cannot wait for a value. What holds here
is all but the kernels: with a GPU, the same tests run there with real graphs too.
"""

import contextlib
import importlib

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
HOST_SYNCS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default)
SCRIPTS = ["mst_mrq", "mst_mrsac", "mst_sac", "mst_ddpg"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


class RecordedGraph(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.generators, self.written = [], [], {}

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.generators.append(generator)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in HOST_SYNCS:
            raise RuntimeError(f"{function} waits for the device")
        if (generator := kwargs.get("generator")) is not None:
            states = [known.get_state() for known in self.generators]  # `generator` is another object of equal state
            if not any(torch.equal(generator.get_state(), state) for state in states):
                raise RuntimeError(f"{function} draws from a generator that was not registered")
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info and argument.alias_info.is_write:
                for x in tree_leaves(value):
                    self.written.setdefault(x.untyped_storage().data_ptr(), (x, x.clone()))
        result = function(*args, **kwargs)
        if function.namespace != "profiler":  # the optimizers' annotations
            self.calls.append((function, args, kwargs, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, result in self.calls:
            if any(value.alias_info and not value.alias_info.is_write for value in function._schema.returns):
                continue  # a view, which is still there
            again = function(*args, **kwargs)
            if not function._schema.is_mutable:
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if torch.is_tensor(old):
                        old.copy_(new)


@contextlib.contextmanager
def record(graph: RecordedGraph, pool: None):
    states = [generator.get_state() for generator in graph.generators]
    with graph:
        yield
    with torch.no_grad():  # a capture runs nothing
        for x, old in reversed(graph.written.values()):
            x.copy_(old)
    for generator, state in zip(graph.generators, states, strict=True):
        generator.set_state(state)


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch) -> torch.device:
    if request.param == "cpu":
        monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
        monkeypatch.setattr(torch.cuda, "graph", record)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return torch.device(request.param)


@pytest.fixture(params=SCRIPTS)
def module(request):
    return importlib.import_module(request.param)


def make(module, device: torch.device, graphs: bool, **flags):
    """An agent whose topologies change at every fifth update, and a buffer with two episodes, one terminated."""
    flags |= {"target_network_frequency": 3} if "encoder" in module.MODULES else {}
    args = module.Args(
        env_id="cartpole-swingup", width_scale=0.06, topology_update_interval=5, batch_size=16, buffer_size=64,
        total_timesteps=60, learning_starts=20, **flags,
    )  # fmt: skip
    agent, random = module.make_agent(args, 5, 2, device), np.random.default_rng(0)
    agent.updates.off = "" if graphs else "not here"
    rb = module.ReplayBuffer(64, 5, 2, agent.horizon, seed=0, device=device)
    for terminated in (True, False):
        rb.start_episode(random.normal(size=5).astype(np.float32))
        for step in range(20):
            action, obs = random.uniform(-1, 1, 2).astype(np.float32), random.normal(size=5).astype(np.float32)
            rb.add(action, random.random(), obs, terminated and step == 19)
    return agent, rb


def train(agent, rb, steps: int) -> None:
    for _ in range(steps):
        assert agent.train_step(rb, lambda: False)


def leaves(agent, rb) -> list[torch.Tensor]:
    return [x for x in tree_leaves([agent.state_dict(), rb.state_dict()]) if torch.is_tensor(x)]


def assert_equal(agent, rb, other_agent, other_rb) -> None:
    pairs = list(zip(leaves(agent, rb), leaves(other_agent, other_rb), strict=True))
    assert len(pairs) > 60
    tolerance = {"rtol": 0, "atol": 0} if agent.device.type == "cpu" else {"rtol": 1e-3, "atol": 1e-4}
    for a, b in pairs:
        torch.testing.assert_close(a, b, **tolerance)


def test_graphs_train_as_eager_updates_do_across_topology_updates(module, device, capsys):
    graphed, eager = make(module, device, graphs=True), make(module, device, graphs=False)
    train(*graphed, 12), train(*eager, 12)
    updates = ["update_encoder"] * ("encoder" in module.MODULES) + ["update_critic_and_actor"]
    assert sorted(graphed[0].updates.graphed) == sorted(updates)
    printed = [line.partition(" is captured (a replay differs") for line in capsys.readouterr().out.splitlines()]
    assert sorted(line[0] for line in printed) == sorted(f"CUDA graphs: {name}" for name in updates)
    assert graphed[0].sparsifier["critic"].topology_updates >= 2
    assert_equal(*graphed, *eager)
