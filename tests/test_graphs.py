"""CUDA graphs without a GPU: `RecordedGraph` takes the place of `torch.cuda.CUDAGraph`.

It records the operations that PyTorch runs during a capture, backward passes and optimizers included, and a replay runs
these operations again on the same tensors. Like a CUDA graph it runs no line of Python again, reads and writes the
captured tensors only, draws the next numbers of the registered generators, and cannot wait for a value. What holds here
is all but the kernels: with a GPU, the same tests run there with real graphs too.
"""

import contextlib
import copy
import importlib
import itertools
import re

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


def test_a_run_with_graphs_resumes_before_it_captures_again(module, device):
    whole, first, second = (make(module, device, graphs=True) for _ in range(3))
    train(*whole, 12), train(*first, 7)
    for ours, saved in zip(second, first, strict=True):
        ours.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert second[0].updates.graphed == {}
    train(*second, 5)
    assert second[0].updates.graphed.keys() == whole[0].updates.graphed.keys()
    assert_equal(*second, *whole)


def test_noise_differs_from_replay_to_replay_and_comes_back_with_the_generators(module, device):
    agent, rb = make(module, device, graphs=True)
    train(agent, rb, 3)
    replay = agent.updates.graphed["update_critic_and_actor"]
    held = [*leaves(agent, rb), rb.priority, rb.row_total, rb.row_max]
    before, seeds = [x.clone() for x in held], [g.get_state() for g in (agent.generator, rb.generator)]

    def actor_after_replay() -> torch.Tensor:
        with torch.no_grad():
            for x, old in zip(held, before, strict=True):
                x.copy_(old)
        assert len(list(replay())) == 2  # the points between the graphs: critic and actor
        return torch.cat([p.detach().flatten().clone() for p in agent.actor.parameters()])

    first, second = actor_after_replay(), actor_after_replay()
    assert not torch.equal(first, second)
    for generator, seed in zip((agent.generator, rb.generator), seeds, strict=True):
        generator.set_state(seed)
    torch.testing.assert_close(actor_after_replay(), first, rtol=0, atol=0)


def test_training_moves_no_tensor_to_other_memory(module, device):
    agent, rb = make(module, device, graphs=False)
    train(agent, rb, 1)

    def addresses() -> list[int]:
        networks = [x.state_dict().values() for x in vars(agent).values() if isinstance(x, torch.nn.Module)]
        states = [state.values() for optimizer in agent.optimizer.values() for state in optimizer.state.values()]
        masks = [sparsifier.masks.values() for sparsifier in agent.sparsifier.values()]
        return [
            x.data_ptr() for x in itertools.chain(*networks, *states, *masks, [rb.priority, rb.row_total, rb.slots])
        ]

    before = addresses()
    train(agent, rb, 12)
    assert agent.sparsifier["critic"].topology_updates >= 2
    assert addresses() == before


def skip_adamw(graph: RecordedGraph) -> None:
    graph.calls = [call for call in graph.calls if call[0] != aten._fused_adamw_.default]


def write_nan(graph: RecordedGraph) -> None:
    graph.calls = [
        (
            function,
            (*args[:1], [x * torch.nan for x in args[1]], *args[2:]) if "adamw" in str(function) else args,
            *rest,
        )
        for function, args, *rest in graph.calls
    ]


@pytest.mark.parametrize("fault", [skip_adamw, write_nan])
def test_a_replay_that_differs_from_eager_is_noticed_and_training_goes_on_eagerly(module, monkeypatch, capsys, fault):
    def faulty(graph, pool):
        with record(graph, pool):
            yield
        fault(graph)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", contextlib.contextmanager(faulty))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    graphed, eager = make(module, torch.device("cpu"), graphs=True), make(module, torch.device("cpu"), graphs=False)
    train(*graphed, 12), train(*eager, 12)
    assert graphed[0].updates.graphed == {}
    assert re.fullmatch(
        r"CUDA graphs off: a replay of \w+ differs from an eager update by .*% of the change\n", capsys.readouterr().out
    )
    assert_equal(*graphed, *eager)


def test_an_update_that_waits_for_the_device_is_not_captured(module, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    graphed, eager = make(module, torch.device("cpu"), graphs=True), make(module, torch.device("cpu"), graphs=False)
    update = module.Agent.update_critic_and_actor

    def waits(agent, rb):
        yield from update(agent, rb)
        agent.metrics["losses/critic_loss"].item()

    monkeypatch.setattr(module.Agent, "update_critic_and_actor", waits)
    train(*graphed, 8), train(*eager, 8)
    assert capsys.readouterr().out == "CUDA graphs off: aten._local_scalar_dense.default waits for the device\n"
    assert_equal(*graphed, *eager)
