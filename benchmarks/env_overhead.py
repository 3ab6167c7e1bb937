"""Time that the environment block adds to dm_control's own step, interleaved in one process.

    OMP_NUM_THREADS=1 python benchmarks/env_overhead.py --csv benchmarks/env_overhead.csv

Prints and writes, per task: the median microseconds of one agent step (two environment steps) through dm_control alone
and through `make_env`, and the median of their paired differences, each over blocks of 10 agent steps.
"""

import argparse
import csv
import datetime
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from mst_mrq import make_env

TASKS = ("dog-run", "humanoid-run", "cartpole-swingup", "ball_in_cup-catch")
COLUMNS = "task,dm_control_us,make_env_us,difference_us,difference_percent,blocks,date,machine,dm_control,mujoco"


def measure(task: str, episodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Microseconds per agent step, one entry per block of 10: dm_control's two steps, and ours."""
    ours = make_env(task, seed=1)
    from dm_control import suite

    raw = suite.load(*task.split("-", 1), task_kwargs={"random": 1})
    actions = np.random.default_rng(0).uniform(-1, 1, (490, *ours.action_space.shape)).astype(np.float32)

    def step_raw(action):
        raw.step(action)
        raw.step(action)

    seconds = {step_raw: [], ours.step: []}
    for seed in range(episodes):
        ours.reset(seed=seed)
        raw.task.random.seed(seed)
        raw.reset()
        for i, block in enumerate(np.split(actions, 49)):
            for step in list(seconds)[:: 1 if i % 2 else -1]:  # who goes first alternates
                start = time.perf_counter()
                for action in block:
                    step(action)
                seconds[step].append((time.perf_counter() - start) / len(block))
    return tuple(1e6 * np.array(values) for values in seconds.values())


def machine() -> str:
    try:
        model = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.machine()
    return f"{model.split(':')[-1].strip()}; {os.cpu_count()} cores"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", help="file to write")
    parser.add_argument("--episodes", type=int, default=5, help="episodes per task")
    flags = parser.parse_args()
    rows = []
    for task in TASKS:
        raw, ours = measure(task, flags.episodes)
        difference = np.median(ours - raw)
        numbers = [f"{x:.1f}" for x in (np.median(raw), np.median(ours), difference, 100 * difference / np.median(raw))]
        where = [datetime.date.today(), machine(), version("dm_control")]
        rows.append([task, *numbers, len(raw), *where, version("mujoco")])
        print(f"{task:<20} dm_control {numbers[0]:>8} us, ours {numbers[1]:>8} us: {numbers[2]} us, {numbers[3]}%")
    if flags.csv:
        with open(flags.csv, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS.split(","), *rows])
