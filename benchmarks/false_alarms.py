"""How often two equal groups of runs seem to differ: why a verdict needs five runs of each cell (`analysis/claims.py`).

    python benchmarks/false_alarms.py --csv benchmarks/false_alarms.csv

Draws two groups of runs from one normal distribution, and prints and writes the share of repetitions in which the 95%
interval of the difference of their interquartile means excludes 0. Nominal is 5%.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from analysis.statistics import interval, iqm


def false_alarm(rng: np.random.Generator, tasks: int, runs: int, seed: int) -> bool:
    x, y = (list(rng.normal(size=(tasks, runs))) for _ in range(2))
    low, high = interval(lambda x, y: iqm(x) - iqm(y), x, y, seed=seed)
    return low > 0 or high < 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", help="file to write")
    parser.add_argument("--repetitions", type=int, default=1000)
    flags = parser.parse_args()
    rng, rows = np.random.default_rng(1), []
    for tasks in (1, 2):
        for runs in (2, 3, 5, 8):
            share = np.mean([false_alarm(rng, tasks, runs, seed) for seed in range(flags.repetitions)])
            rows.append((tasks, runs, flags.repetitions, round(share, 4)))
            print(f"{tasks} tasks, {runs} runs of each group on each: {share:.1%}", flush=True)
    if flags.csv:
        with open(flags.csv, "w", newline="") as file:
            csv.writer(file).writerows([("tasks", "runs", "repetitions", "share"), *rows])
