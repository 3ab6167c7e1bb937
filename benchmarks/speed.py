"""How fast the scripts learn on this machine, on its GPU if there is one.

    python benchmarks/speed.py --csv speed.csv                                    # all scripts at scales 1, 3 and 5
    python benchmarks/speed.py --scripts mst_sac --scales 1 w4d3 --modes eager    # w4d3: width scale 4, depth scale 3
    python benchmarks/speed.py --scripts mst_mrq --scales 1 --modes eager --processes 1 2 4 8
    python benchmarks/speed.py --scales 1 --modes eager --against ../another-checkout
    python benchmarks/speed.py --show speed.csv                                   # the table of an earlier measurement

Every mode of a script is a process of its own, with MST's regimes on dog-run. They all start together and then work in
turns, so that a busy machine slows all of them. Measured are the milliseconds of each update, the agent steps per
second of the training loop (acting, the environment, storing, all updates; no evaluations), and the memory. Modes:
`eager`, `compile`, and on a GPU `graphs` and `compile+graphs`. A table shows medians; the CSV holds every value.
"""

import argparse
import csv
import datetime
import importlib
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("mst_mrq", "mst_sac", "mst_ddpg", "mst_mrsac")
CUDA = torch.cuda.is_available()
MODES = ("eager", "graphs", "compile", "compile+graphs") if CUDA else ("eager", "compile")


# IN A PROCESS OF ITS OWN
def work(pipe: Connection, root: Path, script: str, scale: str, mode: str, period: int, clock: Callable) -> None:
    """Sends the names of the updates, then answers each (what, times) with the mean seconds that it took."""
    os.environ.setdefault("MUJOCO_GL", "disable")
    sys.path.insert(0, str(root))
    module = importlib.import_module(script)
    width, _, depth = scale.lstrip("w").partition("d")
    args = module.Args(env_id="dog-run", width_scale=float(width), depth_scale=float(depth or width))
    args.compile, args.cuda_graphs, args.max_episode_steps = "compile" in mode, "graphs" in mode, 500
    if hasattr(args, "target_network_frequency"):
        args.target_network_frequency = period
    torch.set_flush_denormal(True)  # this and the next as in main()
    if CUDA:
        torch.set_float32_matmul_precision("high")
        torch.cuda.set_stream(torch.cuda.Stream())
    older = hasattr(module, "AgentEnv")  # a checkout of before `make_env`
    env = module.AgentEnv(args) if older else module.make_env(args)
    dims = env.observation_space.shape[0], env.action_space.shape[0]
    device = torch.device("cuda" if CUDA else "cpu")
    agent, rb = module.Agent(args, *dims, device).eval(), module.ReplayBuffer(args, *dims, device)
    exploration, obs = torch.Generator().manual_seed(1), None

    def agent_step(train: bool = True) -> None:  # as in main()
        nonlocal obs
        first = obs is None
        if first:
            obs, _ = env.reset(seed=1)
        action = agent.explore(obs, not train, exploration)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        if not older:
            rb.add(obs, action, reward, next_obs, terminated, first=first)
        else:
            rb.start_episode(obs) if first else None
            rb.add(action, reward, next_obs, terminated)
        obs = None if terminated or truncated else next_obs
        if train:
            agent.train()
            agent.train_step(rb)
            agent.eval()

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

    def memory() -> tuple[float, float]:
        """GiB at most so far, and of what training has to hold: weights, targets, gradients, moments, masks, buffer."""
        peak = torch.cuda.max_memory_reserved() if CUDA else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        held = [
            *agent.state_dict().values(),
            *(p for p in agent.parameters() if p.requires_grad),
        ]  # for their gradients
        held += [x for optimizer in agent.optimizers.values() for s in optimizer.state.values() for x in s.values()]
        held += [mask for sparsifier in agent.sparsifiers.values() for mask in sparsifier.masks.values()]
        return peak / 2**30, (sum(x.nbytes for x in held) + rb.storage.nbytes) / 2**30

    def timed(what: str, times: int) -> float:
        if CUDA:
            torch.cuda.synchronize()
        start = clock()
        for _ in range(times):
            agent_step() if what == "agent step" else updates[what](rb)
        if CUDA:
            torch.cuda.synchronize()
        return (clock() - start) / times

    pipe.send([*updates])
    while True:
        what, times = pipe.recv()
        pipe.send(memory() if what == "memory" else timed(what, times))


# THE MEASUREMENT
class Worker:
    """A script in one mode, in a process of its own."""

    def __init__(self, flags, script: str, scale: str, mode: str, root: Path = ROOT):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        # A busy machine adds to the time on the wall, and less to that of the processor
        clock = time.process_time if flags.against and not CUDA else time.perf_counter
        how = (theirs, root, script, scale, mode, flags.period, clock)
        self.process = context.Process(target=work, args=how, daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, what: str, times: int = 1) -> None:
        self.pipe.send((what, times))

    def answer(self):
        return self.pipe.recv()  # EOFError: it has died

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def in_turns(flags, script: str, scale: str, report: Callable) -> None:
    """The updates of every mode and of both checkouts; of this one alone also the training loop and the memory."""
    roots = {"": ROOT} | ({" there": flags.against.resolve()} if flags.against else {})
    workers = {mode + x: Worker(flags, script, scale, mode, root) for mode in flags.modes for x, root in roots.items()}
    names = []
    for mode, worker in list(workers.items()):
        try:
            names = worker.answer()
        except EOFError:
            print(f"{script} {scale}: {mode} did not start, see above", file=sys.stderr)
            workers.pop(mode)
    values = {}
    for turn in range(flags.rounds + 1):
        for mode in list(workers)[:: 1 if turn % 2 else -1]:
            whats = dict.fromkeys(names, flags.repeat)
            if turn < 3 and not flags.against:
                whats["agent step"] = flags.period
            for what, times in whats.items():
                workers[mode].ask(what, times)
                values.setdefault((what, mode), []).append(workers[mode].answer())
    for mode, worker in workers.items():
        for name in names:  # the first turn warms up
            report(script, scale, mode, name, "ms", [1000 * x for x in values[name, mode][1:]])
        if not flags.against:
            report(script, scale, mode, "training loop", "steps/s", [1 / x for x in values["agent step", mode]])
            worker.ask("memory")
            for what, gib in zip(("peak memory", "what must be held"), worker.answer(), strict=True):
                report(script, scale, mode, what, "GiB", [gib])
        worker.end()
    for mode in flags.modes if flags.against else ():
        here, there = (np.sum([values[name, mode + x][1:] for name in names], 0) for x in roots)
        report(script, scale, mode, "all updates, by those there", "ratio", list(here / there))


def together(flags, script: str, scale: str, report: Callable) -> None:
    """Agent steps per second of several processes at once, all in all."""
    for mode in flags.modes:
        workers = [Worker(flags, script, scale, mode) for _ in range(max(flags.processes))]
        for worker in workers:
            worker.answer()
        for n in flags.processes:
            for worker in workers[:n]:
                worker.ask("agent step", 2 * flags.period)
            rate = sum(1 / worker.answer() for worker in workers[:n])
            report(script, scale, mode, f"training loop, {n} processes", "steps/s", [rate])
        for worker in workers:
            worker.end()


def show(rows: list[dict]) -> None:
    """A markdown table: a line for what was measured, a column for each mode."""
    modes, table = list(dict.fromkeys(row["mode"] for row in rows)), {}
    for row in rows:
        table.setdefault((row["script"], row["scale"], row["what"], row["unit"]), {})[row["mode"]] = row["median"]
    print(*(f"{row['device']} with {row['cpu']}, torch {row['torch']}, {row['date']}\n" for row in rows[-1:]))
    print("", "script", "scale", "medians", "unit", *modes, "", sep=" | ")
    print("|---" * (4 + len(modes)) + "|")
    for what, medians in table.items():
        print("", *what, *(medians.get(mode, "") for mode in modes), "", sep=" | ")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scripts", nargs="+", default=SCRIPTS, choices=SCRIPTS)
    parser.add_argument("--scales", nargs="+", default=["1", "3", "5"], help="such as 5, or w4d3 for width and depth")
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--rounds", type=int, default=10, help="turns of every mode")
    parser.add_argument("--repeat", type=int, default=10 if CUDA else 1, help="updates in a turn")
    parser.add_argument("--period", type=int, default=50 if CUDA else 10, help="MR.Q's --target-network-frequency")
    parser.add_argument("--processes", nargs="+", type=int, help="instead: how many run at once")
    parser.add_argument(
        "--against", type=Path, help="another checkout, whose updates take turns with those of this one"
    )
    parser.add_argument("--csv", type=Path, help="file to write, or to add to")
    parser.add_argument("--show", type=Path, help="print the table of this file, and stop")
    flags = parser.parse_args()
    if flags.show:
        return show(list(csv.DictReader(flags.show.open(newline=""))))
    rows = []

    def report(script: str, scale: str, mode: str, what: str, unit: str, values: list[float]) -> None:
        median, values = f"{statistics.median(values):.4g}", " ".join(f"{x:.5g}" for x in values)
        row = {"script": script, "scale": scale, "mode": mode, "what": what, "unit": unit, "median": median}
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
    return show(rows)


if __name__ == "__main__":
    main()
