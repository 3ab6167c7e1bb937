"""How fast the scripts learn on this machine, on its GPU if there is one.

    python benchmarks/speed.py --csv speed.csv                                    # all scripts at scales 1, 3 and 5
    python benchmarks/speed.py --scripts mst_sac --scales 1 w4d3 --modes eager    # w4d3: width scale 4, depth scale 3
    python benchmarks/speed.py --scripts mst_mrq --scales 1 --modes eager --processes 1 2 4 8
    python benchmarks/speed.py --scales 1 --modes eager --against ../another-checkout

Every mode of a script is a process of its own, with MST's regimes on dog-run. They all start together and then work in
turns, so that a busy machine slows all of them. Measured are the milliseconds of each update, the agent steps per
second of the training loop (acting, the environment, storing, all updates; no evaluations), and the memory at most.
Modes: `eager`, `compile`, and on a GPU `graphs` and `compile+graphs`. A table has medians, the CSV every value.
"""

import argparse
import csv
import datetime
import importlib
import itertools
import multiprocessing
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("mst_mrq", "mst_sac", "mst_ddpg", "mst_mrsac")
CUDA = torch.cuda.is_available()
UPDATES = ("update_encoder", "update_critic_and_actor")
MODES = ("eager", "graphs", "compile", "compile+graphs") if CUDA else ("eager", "compile")


# IN A PROCESS OF ITS OWN
def work(pipe, flags: argparse.Namespace, root: Path, script: str, scale: str, mode: str) -> None:
    """Sends the names of the updates, then answers each (what, times) with its mean seconds and the peak GiB."""
    os.environ.setdefault("MUJOCO_GL", "disable")
    sys.path.insert(0, str(root.resolve()))
    module = importlib.import_module(script)
    width, _, depth = scale.lstrip("w").partition("d")
    args = module.Args(env_id="dog-run", width_scale=float(width), depth_scale=float(depth or width))
    args.compile, args.cuda_graphs, args.max_episode_steps = "compile" in mode, "graphs" in mode, 500
    args.target_network_frequency = flags.period  # of MR.Q's scripts
    torch.set_flush_denormal(True)  # this and the next as in main()
    if CUDA:
        torch.set_float32_matmul_precision("high")
        torch.cuda.set_stream(torch.cuda.Stream())
    older = hasattr(module, "AgentEnv")  # a checkout from before `make_env`
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

    for step in range(604):  # the last ones train: they compile, and capture graphs
        agent_step(train=step >= 600)
    updates = {name: getattr(agent, name) for name in UPDATES if hasattr(agent, name)}
    pipe.send([*updates])
    # Another process adds to the time on the wall, and less to that of the processor
    clock = time.process_time if flags.against and not CUDA else time.perf_counter
    synchronize = torch.cuda.synchronize if CUDA else lambda: None
    while True:
        what, times = pipe.recv()
        synchronize()
        start = clock()
        for _ in range(times):
            agent_step() if what == "agent step" else updates[what](rb)
        synchronize()
        seconds = (clock() - start) / times
        peak = torch.cuda.max_memory_reserved() if CUDA else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        pipe.send((seconds, peak / 2**30))


# THE MEASUREMENT: as (mode, what, unit, values)
def start(*args) -> tuple:
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, *args), daemon=True)
    process.start()
    theirs.close()
    return process, pipe


def in_turns(flags: argparse.Namespace, script: str, scale: str) -> Iterator[tuple]:
    """The updates of every mode here and there. Without another checkout, also the training loop and the memory."""
    roots = {"": ROOT, " there": flags.against} if flags.against else {"": ROOT}
    workers = {mode + x: start(flags, root, script, scale, mode) for mode in flags.modes for x, root in roots.items()}
    names, gib, values = [], {}, {}
    for mode, (_, pipe) in list(workers.items()):
        try:
            names = pipe.recv()
        except EOFError:
            print(f"{script} {scale}: {mode} did not start, see above", file=sys.stderr)
            del workers[mode]
    for turn in range(flags.rounds + 1):
        for mode in list(workers)[:: 1 if turn % 2 else -1]:
            whats = dict.fromkeys(names, flags.repeat)
            if turn < 3 and not flags.against:
                whats["agent step"] = flags.period
            for what, times in whats.items():
                workers[mode][1].send((what, times))
                seconds, gib[mode] = workers[mode][1].recv()
                values.setdefault((mode, what), []).append(seconds)
    for mode, (process, _) in workers.items():
        process.kill()
        for name in names:  # the first turn warms up
            yield mode, name, "ms", [1000 * x for x in values[mode, name][1:]]
        if not flags.against:
            yield mode, "training loop", "steps/s", [1 / x for x in values[mode, "agent step"]]
            yield mode, "memory at most", "GiB", [gib[mode]]
    for mode in flags.modes if flags.against else ():
        here, there = (np.sum([values[mode + x, name][1:] for name in names], 0) for x in roots)
        yield mode, "all updates, by those there", "ratio", list(here / there)


def together(flags: argparse.Namespace, script: str, scale: str) -> Iterator[tuple]:
    """Agent steps per second of several processes at once, all in all."""
    for mode in flags.modes:
        workers = [start(flags, ROOT, script, scale, mode) for _ in range(max(flags.processes))]
        for _, pipe in workers:
            pipe.recv()
        for n in flags.processes:
            for _, pipe in workers[:n]:
                pipe.send(("agent step", 2 * flags.period))
            yield mode, f"training loops of {n}", "steps/s", [sum(1 / pipe.recv()[0] for _, pipe in workers[:n])]
        for process, _ in workers:
            process.kill()


def show(rows: list[dict]) -> None:
    """A markdown table: a line for what was measured, a column for each mode."""
    modes, table = list(dict.fromkeys(row["mode"] for row in rows)), {}
    for row in rows:
        table.setdefault((row["script"], row["scale"], row["what"], row["unit"]), {})[row["mode"]] = row["median"]
    print(*(f"{row['device']} with {row['cpu']}, torch {row['torch']}, {row['date']}\n" for row in rows[-1:]))
    print("| " + " | ".join(["script", "scale", "median of", "unit", *modes]) + " |")
    print("| " + " | ".join(["---"] * (4 + len(modes))) + " |")
    for what, medians in table.items():
        print("| " + " | ".join([*what, *(medians.get(mode, "") for mode in modes)]) + " |")


def machine() -> dict:
    """What goes with every value."""
    cpuinfo, git = Path("/proc/cpuinfo"), ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else [platform.machine()]
    return {
        "device": torch.cuda.get_device_name() if CUDA else "cpu", "cpu": f"{os.cpu_count()} cores of {names[0]}",
        "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version(),
        "date": datetime.date.today(), "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
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
    parser.add_argument("--against", type=Path, help="another checkout: the updates of both, in turns")
    parser.add_argument("--csv", type=Path, help="file to write, or to add to")
    parser.add_argument("--show", type=Path, help="print the table of this file, and stop")
    flags, rows = parser.parse_args(), []
    if flags.show:
        return show(list(csv.DictReader(flags.show.open(newline=""))))
    measure = together if flags.processes else in_turns
    for scale, script in itertools.product(flags.scales, flags.scripts):
        for mode, what, unit, values in measure(flags, script, scale):
            row = {"script": script, "scale": scale, "mode": mode, "what": what, "unit": unit}
            row |= {"median": f"{statistics.median(values):.4g}", "values": " ".join(f"{x:.5g}" for x in values)}
            rows.append(row | machine())
            if flags.csv:
                with flags.csv.open("a", newline="") as file:
                    writer = csv.DictWriter(file, rows[-1], lineterminator="\n")
                    writer.writeheader() if file.tell() == 0 else None
                    writer.writerow(rows[-1])
    return show(rows)


if __name__ == "__main__":
    main()
