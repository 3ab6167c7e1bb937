"""Single operations on a CPU that decided how the scripts are written (docs/performance.md).

    OMP_NUM_THREADS=1 python benchmarks/operations.py --csv benchmarks/operations.csv

Prints and writes medians of 100 calls, or of 10 for environment steps.
"""

import argparse
import csv
import datetime
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("MUJOCO_GL", "disable")

import numpy as np
import torch
import torch.nn.functional as F
from env_overhead import machine

from mst_mrq import make_env


def adamw(moment: float):
    """A step of AdamW on 512 x 512 weights whose gradient is 0 and whose first moments are `moment`."""
    weight = torch.nn.Parameter(torch.randn(512, 512))
    weight.grad = torch.zeros_like(weight)
    optimizer = torch.optim.AdamW([weight], fused=True)
    optimizer.step()

    def step() -> None:
        optimizer.state[weight]["exp_avg"].fill_(moment)
        optimizer.step()

    return step


def relu_and_mask(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a compiled loss stores for the backward pass through a ReLU between frozen weights."""
    y = x.relu()
    return y, y <= 0


def ten_environments(threads: int):
    """One step of ten dog-run environments, one after another or by a pool of threads."""
    envs = [make_env("dog-run", seed=1) for _ in range(10)]
    actions = np.random.default_rng(0).uniform(-1, 1, (10, *envs[0].action_space.shape)).astype(np.float32)
    for env in envs:
        env.reset(seed=1)
    if not threads:
        return lambda: [env.step(action) for env, action in zip(envs, actions, strict=True)]
    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(lambda env, action: env.step(action), envs, actions))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", help="file to write")
    flags = parser.parse_args()
    x, weight, bias = torch.randn(256, 512), torch.randn(512, 512), torch.randn(512)
    rounded = [x.bfloat16(), weight.bfloat16(), bias.bfloat16()]
    slots, index = torch.randn(1_000_000, 264), torch.randint(1_000_000, (100, 256, 6))
    draw, compiled = iter(range(10**6)), torch.compile(relu_and_mask)
    operations = {
        "linear layer, 256 x 512 by 512 x 512": lambda: F.linear(x, weight, bias),
        "the same in bfloat16": lambda: F.linear(*rounded),
        "layer_norm of 256 x 512": lambda: F.layer_norm(x, (512,)),
        "elu of 256 x 512": lambda: F.elu(x),
        "exp of 256 x 512": lambda: x.exp(),
        "relu of 256 x 512 and its mask": lambda: relu_and_mask(x),
        "relu of 256 x 512 and its mask, torch.compile": lambda: compiled(x),
        "gather 1,536 rows by indexing": lambda: slots[index[next(draw) % 100]],
        "gather 1,536 rows by index_select": lambda: slots.index_select(0, index[next(draw) % 100].flatten()),
        "AdamW on 512 x 512": adamw(1e-8),
        "AdamW on 512 x 512, denormal moments": adamw(1e-40),
        "step of ten dog-run environments": ten_environments(0),
        "step of ten dog-run environments, 2 threads": ten_environments(2),
    }
    rows = []
    for flush in (False, True):
        torch.set_flush_denormal(flush)
        for what, function in operations.items():
            if flush and "AdamW" not in what:
                continue
            times = []
            for _ in range(15 if "environments" in what else 105):
                start = time.perf_counter()
                function()
                times.append(1000 * (time.perf_counter() - start))
            times = times[5:]
            what += ", flushed to 0" if flush else ""
            rows.append([what, *(f"{y:.4f}" for y in (statistics.median(times), min(times), max(times))), len(times)])
            print(f"{what:<52} median {rows[-1][1]:>10} ms, min {rows[-1][2]}, max {rows[-1][3]}", flush=True)
    if flags.csv:
        with open(flags.csv, "w", newline="") as file:
            columns = ["what", "median_ms", "min_ms", "max_ms", "runs", "threads", "date", "machine", "torch"]
            where = [torch.get_num_threads(), datetime.date.today(), machine(), torch.__version__]
            csv.writer(file, lineterminator="\n").writerows([columns, *(row + where for row in rows)])
