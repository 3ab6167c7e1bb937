"""How fast the scripts learn on this machine, on its GPU if there is one.

    python benchmarks/speed.py --csv speed.csv                                    # all scripts at scales 1, 3 and 5
    python benchmarks/speed.py --scripts mst_sac --scales 1 --modes eager --against ../another-checkout
    python benchmarks/speed.py --scripts mst_mrq --scales 1 --modes eager --processes 1 2 4 8
    python benchmarks/speed.py --show speed.csv                                   # the table of an earlier measurement

Every mode of a script is a process of its own, with MST's regimes on dog-run. They all start together and then work in
turns, so that a busy machine slows all of them. Measured are the milliseconds of each update, the agent steps per
second of the training loop (acting, the environment, storing, all updates; no evaluations), and the memory. Modes:
`eager`, `compile`, `graphs` (only on a GPU), `compile+graphs`, and `products`: the matrix products of the updates and
nothing else, in the same shapes, strides and order. A table shows medians; the CSV holds every value.
"""

import argparse
import csv
import datetime
import importlib
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("mst_mrq", "mst_mrsac", "mst_sac", "mst_ddpg")
CUDA = torch.cuda.is_available()
MODES = ("eager", "compile", "graphs", "compile+graphs", "products")


# IN A PROCESS OF ITS OWN
class MatrixProducts(TorchDispatchMode):
    """Records the matrix products that run within it."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))

    def alone(self) -> Callable[[], object]:
        """The same calls on random numbers, which lie one after another in 2 GiB: beyond the reach of caches."""
        pool, end = torch.randn(2**29, device=self.calls[0][1][0].device), 0

        def like(x: torch.Tensor) -> torch.Tensor:
            nonlocal end
            size = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
            start = end if end + size <= len(pool) else 0
            end = start + 16 * math.ceil(size / 16)  # whole cache lines
            return pool[start:].as_strided(x.shape, x.stride())

        calls = [(function, [like(x) for x in args]) for function, args in self.calls]
        self.calls.clear()

        def run() -> None:
            for function, args in calls:
                function(*args)

        if not CUDA:
            return run
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            run()
        return graph.replay


def work(root: str, script: str, scale: str, mode: str, period: str) -> None:
    """Answers each line `<what> <times>` with the seconds that it took."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the script prints
    os.environ.setdefault("MUJOCO_GL", "disable")
    sys.path.insert(0, root)
    module = importlib.import_module(script)
    args = module.Args(env_id="dog-run", scale=float(scale), compile="compile" in mode, cuda_graphs="graphs" in mode)
    if hasattr(args, "target_network_frequency"):
        args.target_network_frequency = int(period)
    torch.set_float32_matmul_precision(args.matmul_precision if CUDA else "highest")  # as in main()
    torch.set_flush_denormal(True)
    if CUDA:
        torch.cuda.set_stream(torch.cuda.Stream())
    env, exploration = module.AgentEnv(args), torch.Generator().manual_seed(1)
    args.action_repeat, args.max_episode_steps = env.action_repeat, env.limit
    dims = env.observation_space.shape[0], env.action_space.shape[0]
    device = torch.device("cuda" if CUDA else "cpu")
    agent, rb = module.Agent(args, *dims, device), module.ReplayBuffer(args, *dims, device)
    obs = None

    def agent_step(train: bool = True) -> None:  # as in main()
        nonlocal obs
        if obs is None:
            obs, _ = env.reset(seed=1)
            rb.start_episode(obs)
        agent.eval()
        action = agent.explore(obs, not train, exploration)
        obs, reward, terminated, truncated, _ = env.step(action)
        rb.add(action, reward, obs, terminated)
        obs = None if terminated or truncated else obs
        if train:
            agent.train()
            torch.stack(list(agent.train_step(rb).values())).tolist()

    for _ in range(600):
        agent_step(train=False)
    updates = {"critic and actor update": agent.update_critic_and_actor}
    if hasattr(agent, "encoder"):
        updates = {"encoder update": agent.update_encoder} | updates
        agent.update_targets(rb)
    agent.train()
    for update in updates.values():
        for _ in range(4):  # compiles; as a graph, two eager calls come first, then the capture
            update(rb)
    ways = {name: lambda update=update: update(rb) for name, update in updates.items()}
    if mode == "products":
        for name, update in updates.items():
            with MatrixProducts() as products:
                update(rb)
            ways[name] = products.alone()

    def memory() -> tuple[float, float]:
        """GiB at most so far, and of what training has to hold: weights, targets, gradients, moments, masks, buffer."""
        peak = torch.cuda.max_memory_allocated() if CUDA else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        held = [*agent.state_dict().values(), *(p.grad for p in agent.parameters() if p.grad is not None)]
        held += [x for optimizer in agent.optimizers.values() for s in optimizer.state.values() for x in s.values()]
        held += [mask for sparsifier in agent.sparsifiers.values() for mask in sparsifier.masks.values()]
        return peak / 2**30, (sum(x.nbytes for x in held) + rb.storage.nbytes) / 2**30

    print(json.dumps(list(ways)), file=answers, flush=True)
    for line in sys.stdin:
        what, times = line.rsplit(maxsplit=1)
        way = memory if what == "memory" else agent_step if what == "agent step" else ways[what]
        if CUDA:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(int(times)):
            result = way()
        if CUDA:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        print(json.dumps(result if what == "memory" else seconds), file=answers, flush=True)


# THE MEASUREMENT
class Worker:
    """A script in one mode, in a process of its own."""

    def __init__(self, root: Path, script: str, scale: float, mode: str, period: int):
        line = [sys.executable, __file__, "--work", root, script, scale, mode, period]
        self.child = subprocess.Popen(list(map(str, line)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, what: str, times: int = 1) -> None:
        print(what, times, file=self.child.stdin, flush=True)

    def answer(self):
        return json.loads(self.child.stdout.readline() or "null")  # null: it has died

    def end(self) -> None:
        self.child.kill()
        self.child.communicate()


def in_turns(flags, script: str, scale: float, report: Callable) -> None:
    roots = {"": ROOT} | ({" there": flags.against.resolve()} if flags.against else {})
    workers = {
        mode + x: Worker(root, script, scale, mode, flags.period) for mode in flags.modes for x, root in roots.items()
    }
    answers = {mode: worker.answer() for mode, worker in workers.items()}
    for mode in [mode for mode, names in answers.items() if not names]:
        print(f"{script} {scale:g}: {mode} did not start, see above", file=sys.stderr)
        workers.pop(mode).end()
    names = next(filter(None, answers.values()), [])
    values = {}
    for turn in range(flags.rounds + 1):
        for mode in list(workers)[:: 1 if turn % 2 else -1]:
            whats = dict.fromkeys(names, flags.repeat)
            if mode.split()[0] != "products" and turn < 3:
                whats["agent step"] = flags.period
            for what, times in whats.items():
                workers[mode].ask(what, times)
                values.setdefault((what, mode), []).append(workers[mode].answer() / times)
    for mode, worker in workers.items():
        for name in names:
            report(script, scale, mode, name, "ms", [1000 * x for x in values[name, mode][1:]])  # the first warms up
        if mode.split()[0] != "products":
            report(script, scale, mode, "training loop", "steps/s", [1 / x for x in values["agent step", mode]])
            worker.ask("memory")
            for what, gib in zip(("peak memory", "what must be held"), worker.answer(), strict=True):
                report(script, scale, mode, what, "GiB", [gib])
        worker.end()
    for mode in flags.modes if flags.against else ():
        here, there = (np.sum([values[name, mode + x][1:] for name in names], 0) for x in roots)
        low, median, high = np.quantile(here / there, [0.25, 0.5, 0.75])
        print(f"{script} {scale:g} {mode}: all updates take {median:.3f} of their time there [{low:.3f}, {high:.3f}]")


def together(flags, script: str, scale: float, report: Callable) -> None:
    """Agent steps per second of several processes at once, all in all."""
    for mode in flags.modes:
        workers = [Worker(ROOT, script, scale, mode, flags.period) for _ in range(max(flags.processes))]
        for worker in workers:
            worker.answer()
        for n in flags.processes:
            for worker in workers[:n]:
                worker.ask("agent step", 2 * flags.period)
            rates = [2 * flags.period / worker.answer() for worker in workers[:n]]
            report(script, scale, mode, f"training loop, {n} processes", "steps/s", [sum(rates)])
        for worker in workers:
            worker.end()


def show(rows: list[dict]) -> None:
    """One line for what was measured, one column for each mode."""
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    table: dict[tuple, dict] = {}
    for row in rows:
        table.setdefault((row["script"], row["scale"], row["what"], row["unit"]), {})[row["mode"]] = row["median"]
    print(*(f"{row['device']} with {row['cpu']}, torch {row['torch']}, {row['date']}" for row in rows[-1:]))
    print(f"{'script':<10}{'scale':>6}  {'':<32}{'':<8}", *(f"{mode:>15}" for mode in modes), sep="")
    for (script, scale, what, unit), medians in table.items():
        print(
            f"{script:<10}{scale:>6}  {what:<32}{unit:<8}", *(f"{medians.get(mode, ''):>15}" for mode in modes), sep=""
        )


def machine() -> dict:
    """What goes with every value."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[-1].strip() for line in lines if line.startswith("model name")), platform.machine())
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return {
        "device": torch.cuda.get_device_name() if CUDA else "cpu", "cpu": f"{os.cpu_count()} cores of {cpu}",
        "threads": torch.get_num_threads(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "python": platform.python_version(), "date": datetime.date.today(),
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip(),
    }  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        sys.exit(work(*sys.argv[2:]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scripts", nargs="+", default=SCRIPTS, choices=SCRIPTS)
    parser.add_argument("--scales", nargs="+", type=float, default=[1, 3, 5])
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--rounds", type=int, default=10, help="turns of every mode")
    parser.add_argument("--repeat", type=int, default=10 if CUDA else 1, help="updates in a turn")
    parser.add_argument("--period", type=int, default=250 if CUDA else 10, help="MR.Q's --target-network-frequency")
    parser.add_argument("--processes", nargs="+", type=int, help="instead: how many run at once")
    parser.add_argument("--against", type=Path, help="another checkout, measured in turns with this one")
    parser.add_argument("--csv", type=Path, help="file to write, or to add to")
    parser.add_argument("--show", type=Path, help="print the table of this file, and stop")
    flags = parser.parse_args()
    if flags.show:
        sys.exit(show(list(csv.DictReader(flags.show.open(newline="")))))
    flags.modes = [mode for mode in flags.modes if CUDA or "graphs" not in mode]
    rows = []

    def report(script: str, scale: float, mode: str, what: str, unit: str, values: list[float]) -> None:
        median, values = f"{statistics.median(values):.4g}", " ".join(f"{x:.5g}" for x in values)
        row = {"script": script, "scale": f"{scale:g}", "mode": mode, "what": what, "unit": unit, "median": median}
        rows.append(row | {"values": values} | machine())

    for scale in flags.scales:
        for script in flags.scripts:
            before = len(rows)
            (together if flags.processes else in_turns)(flags, script, scale, report)
            if flags.csv:
                new = not flags.csv.exists()
                with flags.csv.open("a", newline="") as file:
                    writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
                    writer.writeheader() if new else None
                    writer.writerows(rows[before:])
    show(rows)
