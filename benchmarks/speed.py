"""Where the time of a training step goes, beside what its matrix products and memory traffic need by themselves.

    python benchmarks/speed.py --csv benchmarks/speed_cpu.csv                         # everything, on what there is
    python benchmarks/speed.py --scripts mst_mrq --scales 1 --parts updates           # one table, about a minute

Runs the four scripts' own code with MST's regimes at the sizes of dog-run, on the GPU if there is one. What is to be
compared is timed in turns within one process; figures are medians. Parts:

    updates     each update: eager, with torch.compile, as CUDA graphs (on a GPU); the floors beside them; theoretical
                FLOPs of the matrix products, dense and of the active weights alone
    masks       the update of critic and actor with and without masks
    sampling    drawing batches and setting priorities with a full replay buffer of a million steps
    step        choosing an action, stepping the environment, storing the step, an evaluation of 10 episodes
    training    whole runs of the script: agent steps per second and peak memory; for SAC also with an evaluation of 10
                episodes in the time, beside the training and in the trainer's process
    processes   updates per second of 1, 2, 4 and 8 processes that share the device

Floors: "matrix products" runs the mm and addmm calls that an update makes, recorded from it, with the same shapes,
strides and order, and nothing else. "optimizer traffic" is the time to move 7 numbers per parameter (AdamW reads the
parameter, its gradient and two moments, and writes all but the gradient) at the rate of a large copy.
"""

import argparse
import csv
import datetime
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("MUJOCO_GL", "disable")

import numpy as np
import torch
from env_overhead import machine
from torch.utils._python_dispatch import TorchDispatchMode

SCRIPTS = ("mst_mrq", "mst_mrsac", "mst_sac", "mst_ddpg")
PARTS = ("updates", "masks", "sampling", "step", "training", "processes")
OBS_DIM, ACTION_DIM = 223, 38  # dog-run
COLUMNS = "script,scale,part,what,median,min,max,unit,n,device,threads,date,machine,torch"


class MatrixProducts(TorchDispatchMode):
    """Records the shapes, strides and operands of matrix products."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.calls.append((function, args))
        elif function in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default):
            raise NotImplementedError(f"{function} is not counted")
        return function(*args, **(kwargs or {}))

    def flops(self) -> list[int]:
        return [2 * a.shape[0] * a.shape[1] * b.shape[1] for *_, a, b in (args for _, args in self.calls)]

    def alone(self) -> Callable[[], None]:
        """The same calls on random numbers in tensors of the same shapes and strides.

        They lie one after another in 2 GiB, and from the start again where that is full: beyond the reach of caches.
        """
        pool, end = torch.randn(2**29, device=self.calls[0][1][0].device), 0

        def like(x: torch.Tensor) -> torch.Tensor:
            nonlocal end
            size = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
            start = end if end + size <= len(pool) else 0
            end = start + 16 * math.ceil(size / 16)  # whole cache lines
            return pool[start:].as_strided(x.shape, x.stride())

        calls = [(function, [like(x) for x in args]) for function, args in self.calls]

        def run() -> None:
            for function, args in calls:
                function(*args)

        return run


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def in_turns(ways: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of each, `rounds` times in turns, forth and back, after one turn to warm up."""
    times = {way: [] for way in ways}
    for i in range(rounds + 1):
        for way, function in list(ways.items())[:: 1 if i % 2 else -1]:
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if i:
                times[way].append(1000 * (time.perf_counter() - start))
    return times


def graphed(function: Callable[[], object]) -> Callable[[], object]:
    """The function as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def make(script: str, scale: float, device: torch.device, **flags):
    """An agent with MST's regimes in the middle of training, and a buffer of random steps."""
    module = importlib.import_module(script)
    capacity = flags.pop("capacity", 5000)
    args = module.Args(scale=scale, cuda=device.type == "cuda", learning_starts=1000, **flags)
    module.set_up(args)
    agent = module.make_agent(args, OBS_DIM, ACTION_DIM, device)
    rb = module.ReplayBuffer(capacity, OBS_DIM, ACTION_DIM, agent.horizon, seed=1, device=device)
    fill(rb, min(capacity, 3000))
    return agent, rb


def fill(rb, steps: int) -> None:
    random = np.random.default_rng(0)
    obs = random.standard_normal((steps + 1, OBS_DIM), dtype=np.float32)
    actions = random.uniform(-1, 1, (steps, ACTION_DIM)).astype(np.float32)
    for i in range(steps):
        if i % 500 == 0:
            rb.start_episode(obs[i])
        rb.add(actions[i], random.random(), obs[i + 1], False)


def update_names(agent) -> list[str]:
    return ["update_encoder"] * hasattr(agent, "encoder") + ["update_critic_and_actor"]


def sparse_flops(agent, update: str, products: MatrixProducts) -> float:
    """Operations if only active weights were multiplied: inputs by weights, and the gradients of both."""
    share = {}
    for held in vars(agent).values():
        if isinstance(held, torch.nn.Module):
            share |= {p.data_ptr(): float(p.count_nonzero()) / p.numel() for p in held.parameters() if p.ndim == 2}
    modules = ["encoder"] if update == "update_encoder" else ["critic", "actor"]
    masks = [mask for name in modules for mask in agent.sparsifier[name].masks.values()]
    by_shape = {}
    for mask in masks:
        by_shape.setdefault(tuple(mask.shape), []).append(float(mask.count_nonzero()) / mask.numel())
    total = 0.0
    for flops, (_, args) in zip(products.flops(), products.calls, strict=True):
        a, b = args[-2:]
        known = [share[x.data_ptr()] for x in (a, b) if x.data_ptr() in share]
        gradient = by_shape.get((a.shape[0], b.shape[1]), by_shape.get((b.shape[1], a.shape[0]), [1.0]))
        total += flops * (known[0] if known else statistics.mean(gradient))
    return total


class Table:
    def __init__(self, device: torch.device):
        name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        self.where = [name, torch.get_num_threads(), datetime.date.today(), machine(), torch.__version__]
        self.rows = []

    def add(self, script: str, scale: float, part: str, what: str, values: list[float], unit: str) -> float:
        median = statistics.median(values)
        figures = [f"{x:.5g}" for x in (median, min(values), max(values))]
        self.rows.append([script, f"{scale:g}", part, what, *figures, unit, len(values), *self.where])
        spread = f"({figures[1]} to {figures[2]})" if len(values) > 1 else ""
        print(f"{script:<10}{scale:>5g}  {what:<58}{figures[0]:>10} {unit:<8}{spread}", flush=True)
        return median

    def ratio(self, script: str, scale: float, part: str, what: str, a: list[float], b: list[float]) -> None:
        """Of times taken in turns: the median of their ratios."""
        self.add(script, scale, part, what, [x / y for x, y in zip(a, b, strict=True)], "x")


def copy_time(device: torch.device) -> float:
    """Nanoseconds to move one float32, of a copy too large for the caches: half of it reads, half writes."""
    source = torch.empty(2**26, device=device)
    target = torch.empty_like(source)
    times = in_turns({"copy": lambda: target.copy_(source)}, 10, device)["copy"]
    return 1e6 * statistics.median(times) / (2 * source.numel())


def exhaust(update: Iterator[str]) -> None:
    """Run an update without topology updates."""
    for _ in update:
        pass


def replay(agent, name: str, rb) -> Callable[[], None]:
    """The agent's update as CUDA graphs."""
    graphed_update = agent.updates.capture(name, agent, rb)
    return lambda: exhaust(graphed_update())


def updates(table: Table, script: str, scale: float, rounds: int, device: torch.device, compiled: bool) -> None:
    agent, rb = make(script, scale, device)
    agent.updates.off = "eager here"
    add, ratio = partial(table.add, script, scale, "updates"), partial(table.ratio, script, scale, "updates")
    ns_per_number = copy_time(device)

    for name in update_names(agent):
        agent.updates.run(name, agent, rb)  # makes the optimizers' states
    eager_losses = {x: getattr(agent, x) for x in ("encoder_loss", "critic_loss", "actor_loss") if hasattr(agent, x)}
    compiled_losses = {x: torch.compile(loss, dynamic=False) for x, loss in eager_losses.items()} if compiled else {}
    total = {}

    for name in update_names(agent):
        label = name.removeprefix("update_").replace("_", " ")

        def run(losses=eager_losses, name=name) -> None:
            vars(agent).update(losses)
            exhaust(getattr(agent, name)(rb))

        with MatrixProducts() as products:
            run()
        alone = products.alone()
        flops, sparse = sum(products.flops()), sparse_flops(agent, name, products)
        products.calls.clear()
        ways = {"eager": run}
        if compiled:
            ways |= {"torch.compile": partial(run, compiled_losses)}
        if device.type == "cuda":
            vars(agent).update(eager_losses)
            ways |= {"CUDA graphs": replay(agent, name, rb)}
            if compiled:
                vars(agent).update(compiled_losses)
                ways |= {"CUDA graphs and torch.compile": replay(agent, name, rb)}
            alone = graphed(alone)
        times = in_turns({**ways, "matrix products": alone}, rounds, device)
        run()  # leaves the eager losses
        for way, values in times.items():
            add(f"{label} update: {way}", values, "ms")
            total[way] = [a + b for a, b in zip(total[way], values, strict=True)] if way in total else values
        trained = ["encoder"] if name == "update_encoder" else ["critic", "actor"]
        parameters = sum(p.numel() for module in trained for p in getattr(agent, module).parameters())
        add(f"{label} update: optimizer traffic", [7 * parameters * ns_per_number / 1e6], "ms")
        add(f"{label} update: operations of the matrix products", [flops / 1e9], "GFLOP")
        add(f"{label} update: of the active weights alone", [sparse / 1e9], "GFLOP")
        rate = [flops / 1e9 / milliseconds for milliseconds in times["matrix products"]]
        add(f"{label} update: rate of the matrix products", rate, "TFLOP/s")

    for way in [way for way in total if way != "matrix products"]:
        ratio(f"all updates: {way} / matrix products", total[way], total["matrix products"])
    for way in [way for way in total if "CUDA" in way]:
        ratio(f"all updates: eager / {way}", total["eager"], total[way])

    sparsifier = agent.sparsifier["critic"]
    topology = in_turns({"": sparsifier._update_topology}, 2, device)[""]
    add("topology update of the critic, every 1,000 updates", topology, "ms")


def masks(table: Table, script: str, scale: float, rounds: int, device: torch.device) -> None:
    """What masks add to the update of critic and actor, in a process that holds nothing else."""
    agent, rb = make(script, scale, device)
    agent.updates.off = "eager here"
    for name in update_names(agent):
        agent.updates.run(name, agent, rb)
    there, ways, update = {name: s.masks for name, s in agent.sparsifier.items()}, {}, "update_critic_and_actor"
    for way in ("with masks", "without masks"):

        def choose(way=way) -> None:
            for module, sparsifier in agent.sparsifier.items():
                sparsifier.masks = there[module] if way == "with masks" else {}

        if device.type == "cuda":
            choose()
            ways[way] = replay(agent, update, rb)
        else:
            ways[way] = lambda choose=choose: [choose(), exhaust(getattr(agent, update)(rb))]
    times = in_turns(ways, rounds, device)
    for way, values in times.items():
        table.add(script, scale, "masks", f"critic and actor update, {way}", values, "ms")
    table.ratio(script, scale, "masks", "critic and actor update, with masks / without", *times.values())


def memory(table: Table, script: str, scale: float, device: torch.device) -> None:
    """Peak of the GPU's tensors over some updates as the script runs them, beside what has to be held."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    agent, rb = make(script, scale, device)
    for _ in range(3):
        for name in update_names(agent):
            agent.updates.run(name, agent, rb)
    held = [*rb.tensors().values(), *(mask for s in agent.sparsifier.values() for mask in s.masks.values())]
    for x in vars(agent).values():
        held += list(x.parameters()) if isinstance(x, torch.nn.Module) else []
    held += [p.grad for o in agent.optimizer.values() for group in o.param_groups for p in group["params"]]
    held += [x for o in agent.optimizer.values() for state in o.state.values() for x in state.values()]
    held_gib = sum(x.numel() * x.element_size() for x in held) / 2**30
    peak_gib = torch.cuda.max_memory_allocated() / 2**30
    table.add(script, scale, "updates", "parameters, targets, gradients, moments, masks, buffer", [held_gib], "GiB")
    table.add(script, scale, "updates", "peak memory / that", [peak_gib / held_gib], "x")


def sampling(table: Table, script: str, device: torch.device, rounds: int) -> None:
    agent, rb = make(script, 1, device, capacity=1_000_000)
    rb.size = rb.capacity
    rb.obs.normal_()
    index = torch.arange(rb.capacity, device=device)
    for part in index.split(2**16):
        rb.update_priority(part, 1 + torch.rand(len(part), device=device))
    random = np.random.default_rng(0)
    action, obs = random.random(ACTION_DIM, dtype=np.float32), random.random(OBS_DIM, dtype=np.float32)
    batch = rb.sample(256, device)
    priority = torch.rand(256, device=device)
    ways = {
        "sample": lambda: rb.sample(256, device),
        "update_priority": lambda: rb.update_priority(batch.index, priority),
        "add": lambda: rb.add(action, 1.0, obs, False),
        "update": lambda: [agent.updates.run(name, agent, rb) for name in update_names(agent)],
    }
    times = in_turns(ways, rounds, device)
    for what in ("sample", "update_priority", "add"):
        table.add(script, 1, "sampling", f"full buffer of a million steps: {what}", times[what], "ms")
    samples = len(update_names(agent))
    both = [
        samples * s + p + a for s, p, a in zip(times["sample"], times["update_priority"], times["add"], strict=True)
    ]
    table.ratio(
        script, 1, "sampling", "full buffer: sampling, priorities, storing / all updates", both, times["update"]
    )


def step(table: Table, script: str, device: torch.device, rounds: int) -> None:
    module = importlib.import_module(script)
    env = module.make_env("dog-run", seed=1)
    agent, rb = make(script, 1, device)
    obs, _ = env.reset(seed=1)
    exploration = torch.Generator().manual_seed(1)
    action = agent.explore(obs, False, exploration).numpy()

    def ten(function: Callable[[], object]) -> Callable[[], None]:
        return lambda: [function() for _ in range(10)]

    ways = {
        "choosing an action": ten(lambda: agent.explore(obs, False, exploration)),
        "stepping dog-run (two control steps)": ten(lambda: env.step(action)),
        "storing the step": ten(lambda: rb.add(action, 1.0, obs, False)),
    }
    for way, values in in_turns(ways, rounds, device).items():
        table.add(script, 1, "step", way, [x / 10 for x in values], "ms")
    make_one = partial(module.make_env, "dog-run", 1)
    cores = len(os.sched_getaffinity(0))
    ways = {}
    for workers in sorted({0, min(cores, 10)}):
        envs = module.EvaluationEnvs(lambda i: make_one(), 10, workers)
        ways[workers] = lambda envs=envs: list(module.evaluate(agent, envs, list(range(10))))[-1]
    assert len({tuple(function()) for function in ways.values()}) == 1  # the same returns
    times = in_turns(ways, 3, device)
    for workers, values in times.items():
        where = f"in {workers} worker processes" if workers else "in the trainer's process"
        table.add(script, 1, "step", f"evaluation, 10 episodes of dog-run {where}", [x / 1000 for x in values], "s")


def training(table: Table, script: str, scale: float, device: torch.device, steps: int, flags: list[str]) -> None:
    """A whole run on dog-run, timed between the beginnings of two evaluations, one of which is in the time."""
    start = 1000
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / f"{script}.py"), "--env", "dog-run", "--scale", f"{scale:g}"]
        command += ["--learning-starts", f"{start}", "--total-timesteps", f"{start + 2 * steps}", "--runs-dir", folder]
        command += ["--eval-interval", f"{steps}", "--eval-episodes", "1", "--no-diagnostics"]
        command += ["--target-network-frequency", "50"] if "mr" in script else []  # bursts of encoder updates fit in
        command += flags
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise RuntimeError(f"{' '.join(command)} failed")
        with open(next(Path(folder).glob("*/eval.csv")), newline="") as file:
            wall = {int(row["agent_step"]): float(row["wall_seconds"]) for row in csv.DictReader(file)}
        last = start + 2 * steps
        what = " ".join(["training", *flags])
        table.add(script, scale, "training", what, [steps / (wall[last] - wall[last - steps])], "steps/s")
        table.add(script, scale, "training", f"peak resident memory, {what}", [usage.ru_maxrss / 2**20], "GiB")


def processes(table: Table, device: torch.device, seconds: float) -> None:
    """Each process runs MR.Q's updates at scale 1 for a while; their rates are summed."""
    alone = 0.0
    for n in (1, 2, 4, 8):
        command = [sys.executable, __file__, "--loop", f"{seconds}"] + ["--no-cuda"] * (device.type == "cpu")
        environ = os.environ | ({} if device.type == "cuda" else {"OMP_NUM_THREADS": "1"})
        children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ) for _ in range(n)]
        rates = [json.loads(child.communicate()[0].splitlines()[-1]) for child in children]
        table.add("mst_mrq", 1, "processes", f"{n} processes together", [sum(rates)], "steps/s")
        alone = alone or sum(rates)
        table.add("mst_mrq", 1, "processes", f"{n} processes / one", [sum(rates) / alone], "x")


def loop(device: torch.device, seconds: float) -> None:
    agent, rb = make("mst_mrq", 1, device)
    for _ in range(3):
        agent.updates.run("update_encoder", agent, rb)
        agent.updates.run("update_critic_and_actor", agent, rb)
    start, steps = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        agent.updates.run("update_encoder", agent, rb)
        agent.updates.run("update_critic_and_actor", agent, rb)
        synchronize(device)
        steps += 1
    print(json.dumps(steps / (time.perf_counter() - start)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", help="file to write, or to add to if only one thing is measured")
    parser.add_argument("--scripts", nargs="+", default=SCRIPTS, choices=SCRIPTS)
    parser.add_argument("--scales", nargs="+", type=float, default=[1, 3, 5])
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--rounds", type=int, help="repetitions (default: 40 at scale 1, 4 at scale 3 and 5)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-cuda", action="store_true", help="measure the CPU of a machine with a GPU")
    parser.add_argument("--loop", type=float, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not flags.no_cuda else "cpu")
    if flags.loop:
        loop(device, flags.loop)
        sys.exit()
    jobs = [(part, script, scale) for script in flags.scripts for part in flags.parts for scale in flags.scales]
    jobs = [
        job
        for job in jobs
        if job[0] in ("updates", "masks") or job[2] == 1 and (job[0] != "processes" or job[1] == "mst_mrq")
    ]
    if len(jobs) > 1:  # each in a process of its own, whose memory is its own
        if flags.csv:
            Path(flags.csv).unlink(missing_ok=True)
        for part, script, scale in jobs:
            same = ["--no-compile"] * flags.no_compile + ["--no-cuda"] * flags.no_cuda
            same += ["--csv", flags.csv] if flags.csv else []
            same += ["--rounds", str(flags.rounds)] if flags.rounds else []
            command = [sys.executable, __file__, "--parts", part, "--scripts", script, "--scales", f"{scale:g}", *same]
            if code := subprocess.run(command, check=False).returncode:
                print(f"{script} {scale:g} {part}: exit code {code}", file=sys.stderr)
        sys.exit()
    table = Table(device)
    for part, script, scale in jobs:
        rounds = flags.rounds or max(4, round(40 / scale**2))
        if part == "updates":
            if device.type == "cuda":
                memory(table, script, scale, device)
            updates(table, script, scale, rounds, device, not flags.no_compile)
        elif part == "masks":
            masks(table, script, scale, max(rounds, 10), device)
        elif part == "sampling":
            sampling(table, script, device, flags.rounds or 20)
        elif part == "step":
            step(table, script, device, flags.rounds or 20)
        elif part == "training":
            on_gpu = [["--no-overlap"], ["--no-cuda-graphs"], ["--compile"], ["--bf16"]]
            for extra in [[], *(on_gpu if device.type == "cuda" else [])]:
                training(table, script, scale, device, 1000 if device.type == "cuda" else 100, extra)
            for workers in ([], ["--eval-workers", "0"]) if script == "mst_sac" else ():
                evaluations = ["--eval-episodes", "10", *workers]
                training(table, script, scale, device, 1000 if device.type == "cuda" else 500, evaluations)
        elif part == "processes":
            processes(table, device, 10)
    if flags.csv:
        new = not Path(flags.csv).exists()
        with open(flags.csv, "a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS.split(",")] * new + table.rows)
