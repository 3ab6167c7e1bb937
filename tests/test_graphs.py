"""CUDA graphs without a GPU: `RecordedGraph` takes the place of `torch.cuda.CUDAGraph`.

It records what PyTorch runs during a capture, and a replay runs that again on the same tensors. Like a CUDA graph it
runs no line of Python again, draws from registered generators only, and cannot wait for a value. What holds here is all
but the kernels: with a GPU, the same tests run there with real graphs too. Last, losses under torch.compile.
"""

import contextlib
import copy
import functools
import importlib
import shutil

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import SCRIPTS, FixedBatch  # isort: skip

aten = torch.ops.aten
HOST_SYNCS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


class RecordedGraph(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.generators, self.written = [], [], {}
        self.register_generator_state = self.generators.append

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in HOST_SYNCS:
            raise RuntimeError(f"{function} waits for the device")
        generator, states = kwargs.get("generator"), [x.get_state() for x in self.generators]
        if generator and not any(torch.equal(generator.get_state(), state) for state in states):  # another object
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


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    if request.param == "cpu":
        for name, value in (("CUDAGraph", RecordedGraph), ("graph", record), ("current_stream", lambda: None)):
            monkeypatch.setattr(torch.cuda, name, value)
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
    flags = {"topology_update_interval": 5, "actor_regime": "dst", "gamma": 0.99, "learning_starts": 20} | flags
    flags |= {"env_id": "cartpole-swingup", "width_scale": 0.06, "batch_size": 16, "buffer_size": 48}
    args = module.Args(total_timesteps=60, cuda=True, cuda_graphs=graphs, **flags)
    agent, rb = module.Agent(args, 5, 2, device), module.ReplayBuffer(args, 5, 2, device)
    for step in range(40):
        add_random(rb, step, terminated=step == 19, first=step % 20 == 0)
    return agent, rb


def add_random(rb, seed: int, **flags) -> None:
    random = np.random.default_rng(seed)
    obs, next_obs = random.normal(size=(2, 5)).astype(np.float32)
    rb.add(obs, random.uniform(-1, 1, 2), random.random(), next_obs, **flags)


def train(agent, rb, steps: int) -> list[torch.Tensor]:
    """Store a step and train, `steps` times. Returns the metrics of each."""
    metrics = []
    for _ in range(steps):
        add_random(rb, agent.sparsifiers["critic"].updates, terminated=False, first=False)
        metrics.append(torch.stack([*agent.train_step(rb).values()]))
    return metrics


def parts(agent, rb) -> list:
    return [agent, rb, *agent.optimizers.values(), *agent.sparsifiers.values()]


def assert_same(ours: tuple, theirs: tuple, metrics: list, other_metrics: list) -> None:
    """To the bit on a CPU. Clocks and counts of the sparsifiers are in their states."""
    states = [[part.state_dict() for part in parts(*both)] for both in (ours, theirs)]
    tolerance = {"rtol": 0, "atol": 0} if ours[0].device.type == "cpu" else {"rtol": 1e-3, "atol": 1e-4}
    for a, b in zip(tree_leaves([metrics, states[0]]), tree_leaves([other_metrics, states[1]]), strict=True):
        if torch.is_tensor(a):
            torch.testing.assert_close(a, b, **tolerance)
        assert torch.is_tensor(a) or a == b


def test_graphs_train_as_eager_updates_do_across_topology_updates(module, device, monkeypatch):
    graph, captures = torch.cuda.graph, []
    monkeypatch.setattr(torch.cuda, "graph", lambda *args, **how: captures.append(args) or graph(*args, **how))
    graphed, eager = make(module, device, graphs=True), make(module, device, graphs=False)
    assert_same(graphed, eager, train(*graphed, 13), train(*eager, 13))
    for sparsifier in graphed[0].sparsifiers.values():
        assert sparsifier.topology_updates == sparsifier.updates // 5 >= 2
    assert len(captures) == 1 + ("encoder" in module.MODULES)
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        graphed[0].update_critic_and_actor(graphed[1])  # a replay, not due for a topology, waits for nothing
        torch.cuda.set_sync_debug_mode("default")


def test_a_run_with_graphs_resumes_before_it_captures_again(module, device):
    whole, first, second = (make(module, device, graphs=True) for _ in range(3))
    expected, _ = train(*whole, 12), train(*first, 7)
    for ours, saved in zip(parts(*second), parts(*first), strict=True):
        ours.load_state_dict(copy.deepcopy(saved.state_dict()))
    for ours, saved in zip(second, first, strict=True):
        ours.generator.set_state(saved.generator.get_state())
    assert_same(second, whole, train(*second, 5), expected[7:])


COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="needs a compiler")
CASES = [(script, "aot_eager", {"rtol": 0, "atol": 0}) for script in SCRIPTS]  # the same operations, traced
# inductor fuses operations and so rounds otherwise; an update moves a weight by 1e-4
CASES.append(pytest.param("mst_ddpg", "inductor", {"rtol": 1e-5, "atol": 1e-6}, marks=COMPILER))


@pytest.mark.parametrize(("script", "backend", "tolerance"), CASES)
def test_compiled_losses_train_as_eager_ones_do(monkeypatch, script, backend, tolerance):
    module, cpu, graphs = importlib.import_module(script), torch.device("cpu"), []
    small = {"encoder_horizon": 3} if "encoder" in module.MODULES else {"depth_scale": 0.5}  # less to compile

    def counting(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, example_inputs)

    torch._dynamo.reset()
    eager, rb = make(module, cpu, graphs=False, **small)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counting, fullgraph=True))
    compiled, _ = make(module, cpu, graphs=False, compile=True, **small)
    for k in range(3):
        rb_of_one, metrics = FixedBatch(rb.sample(16)), [{}, {}]
        for agent, values in zip((eager, compiled), metrics, strict=True):
            if "encoder" in module.MODULES:
                agent.reward_scale.fill_(0.5 + k)  # must not have become a constant of the graphs
                values |= agent.update_encoder(rb_of_one)
            values |= agent.update_critic_and_actor(rb_of_one)
        assert len(graphs) == len(module.MODULES)  # one for each loss, and none anew for later updates
        torch.testing.assert_close(metrics[1], metrics[0], **tolerance)
    torch.testing.assert_close(compiled.state_dict(), eager.state_dict(), **tolerance)
