"""CUDA graphs without a GPU: `RecordedGraph` takes the place of `torch.cuda.CUDAGraph`.

It records the operations that PyTorch runs during a capture, backward passes and optimizers included, and a replay runs
these operations again on the same tensors. Like a CUDA graph it runs no line of Python again, reads and writes the
captured tensors only, draws the next numbers of the registered generators, and cannot wait for a value. What holds here
is all but the kernels: with a GPU, the same tests run there with real graphs too, which may not wait for the device.
"""

import contextlib
import copy
import functools
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
def record(graph: RecordedGraph, stream: None):
    states = [generator.get_state() for generator in graph.generators]
    with graph:
        yield
    with torch.no_grad():  # a capture runs nothing
        for x, old in reversed(graph.written.values()):
            x.copy_(old)
    for generator, state in zip(graph.generators, states, strict=True):
        generator.set_state(state)


def stand_in(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    if request.param == "cpu":
        stand_in(monkeypatch)
        yield torch.device("cpu")
        return
    monkeypatch.setattr(torch.cuda, "graph", functools.partial(torch.cuda.graph, check_input_liveness=True))
    with torch.cuda.stream(torch.cuda.Stream()):  # as in main()
        yield torch.device("cuda")


@pytest.fixture(params=SCRIPTS)
def module(request):
    return importlib.import_module(request.param)


def make(module, device: torch.device, graphs: bool, **flags):
    """An agent whose topologies change at every fifth update, and a buffer with two episodes, one terminated."""
    if "encoder" in module.MODULES:
        flags |= {"target_network_frequency": 3, "encoder_regime": "dst"}
    defaults = {"topology_update_interval": 5, "actor_regime": "dst", "gamma": 0.99}
    args = module.Args(
        env_id="cartpole-swingup", width_scale=0.06, batch_size=16, buffer_size=48, total_timesteps=60,
        learning_starts=20, cuda=True, cuda_graphs=graphs, **defaults | flags,
    )  # fmt: skip
    agent, rb = module.Agent(args, 5, 2, device), module.ReplayBuffer(args, 5, 2, device)
    random = np.random.default_rng(0)
    for terminated in (True, False):
        rb.start_episode(random.normal(size=5).astype(np.float32))
        for step in range(20):
            action, obs = random.uniform(-1, 1, 2).astype(np.float32), random.normal(size=5).astype(np.float32)
            rb.add(action, random.random(), obs, terminated and step == 19)
    return agent, rb


def train(agent, rb, steps: int) -> list[torch.Tensor]:
    """Store a step and train, `steps` times. Returns the metrics of each."""
    metrics = []
    for _ in range(steps):
        random = np.random.default_rng(agent.sparsifiers["critic"].updates)
        rb.add(random.uniform(-1, 1, 2).astype(np.float32), 0.5, random.normal(size=5).astype(np.float32), False)
        metrics.append(torch.stack([*agent.train_step(rb).values()]))
    return metrics


def parts(agent, rb) -> list:
    return [agent, rb, *agent.optimizers.values(), *agent.sparsifiers.values()]


def assert_same(ours: tuple, theirs: tuple, metrics: list, other_metrics: list) -> None:
    """To the bit on a CPU. Clocks and counts of the sparsifiers are in their states."""
    states = [{str(k): part.state_dict() for k, part in enumerate(parts(*both))} for both in (ours, theirs)]
    tolerance = {"rtol": 0, "atol": 0} if ours[0].device.type == "cpu" else {"rtol": 1e-3, "atol": 1e-4}
    for a, b in zip(tree_leaves([metrics, states[0]]), tree_leaves([other_metrics, states[1]]), strict=True):
        if torch.is_tensor(a):
            torch.testing.assert_close(a, b, **tolerance)
        assert torch.is_tensor(a) or a == b


def test_graphs_train_as_eager_updates_do_across_topology_updates(module, device, capsys):
    graphed, eager = make(module, device, graphs=True), make(module, device, graphs=False)
    assert_same(graphed, eager, train(*graphed, 12), train(*eager, 12))
    for sparsifier in graphed[0].sparsifiers.values():
        assert sparsifier.topology_updates == sparsifier.updates // 5 >= 2
    assert capsys.readouterr().out.count("capturing an update") == 1 + ("encoder" in module.MODULES)


def test_a_run_with_graphs_resumes_before_it_captures_again(module, device):
    whole, first, second = (make(module, device, graphs=True) for _ in range(3))
    expected, _ = train(*whole, 12), train(*first, 7)
    for ours, saved in zip(parts(*second), parts(*first), strict=True):
        ours.load_state_dict(copy.deepcopy(saved.state_dict()))
    for ours, saved in zip(second, first, strict=True):
        ours.generator.set_state(saved.generator.get_state())
    assert_same(second, whole, train(*second, 5), expected[7:])


def test_noise_differs_from_replay_to_replay_and_comes_back_with_the_generators(module, device):
    agent, rb = make(module, device, graphs=True)
    train(agent, rb, 3 if "encoder" in module.MODULES else 2)  # the third update of critic and actor was captured
    held = [x for part in [agent, *agent.optimizers.values()] for x in tree_leaves(part.state_dict())]
    held = [x for x in [*held, *getattr(rb, "tensors", dict)().values()] if torch.is_tensor(x)]
    on_waiting = torch.cuda.set_sync_debug_mode if device.type == "cuda" else lambda mode: None
    before, seeds = [x.clone() for x in held], [x.generator.get_state() for x in (agent, rb)]

    def actor_after_replay() -> torch.Tensor:
        with torch.no_grad():
            for x, old in zip(held, before, strict=True):
                x.copy_(old)
        for sparsifier in agent.sparsifiers.values():
            sparsifier.updates = 6  # no change of topology is due
        on_waiting("error")
        agent.update_critic_and_actor(rb)
        on_waiting("default")
        return torch.cat([p.detach().flatten().clone() for p in agent.actor.parameters()])

    first, second = actor_after_replay(), actor_after_replay()
    assert not torch.equal(first, second)
    for x, seed in zip((agent, rb), seeds, strict=True):
        x.generator.set_state(seed)
    torch.testing.assert_close(actor_after_replay(), first, rtol=0, atol=0)


def test_training_moves_no_tensor_to_other_memory(module):
    agent, rb = make(module, torch.device("cpu"), graphs=False)

    def addresses() -> list[int]:
        held = [part.state_dict() for part in [agent, *agent.optimizers.values()]]
        held += [vars(rb), *(sparsifier.masks for sparsifier in agent.sparsifiers.values())]
        return [x.data_ptr() for x in tree_leaves(held) if torch.is_tensor(x)]

    train(agent, rb, 1)
    before = addresses()
    train(agent, rb, 12)  # with topology updates
    assert addresses() == before


def test_an_update_that_waits_for_the_device_fails_in_the_capture(module, monkeypatch):
    stand_in(monkeypatch)
    update = module.Agent.update_critic_and_actor

    def waits(agent, rb):
        metrics = update(agent, rb)
        metrics["losses/critic_loss"].item()
        return metrics

    monkeypatch.setattr(module.Agent, "update_critic_and_actor", waits)
    agent, rb = make(module, torch.device("cpu"), graphs=True)
    for _ in range(2):
        agent.update_critic_and_actor(rb)
    with pytest.raises(RuntimeError, match="waits for the device"):
        agent.update_critic_and_actor(rb)
