"""Time of masking a gradient and of a topology update.

    OMP_NUM_THREADS=1 python benchmarks/masking.py --csv benchmarks/masking.csv

Prints and writes the median milliseconds of: three ways to mask the gradient of one weight, interleaved (`sparse_utils`
uses the first); `Sparsifier.step()` between and at topology updates, and the AdamW step beside them, for a module of 21
layers of 2560 x 2560 (137.6M weights, about the critic at scale 5).
"""

import argparse
import csv
import statistics
import sys
import time
from pathlib import Path

import torch
from speed import machine
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sparse_utils import Sparsifier


def milliseconds(function) -> float:
    start = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - start)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", help="file to write")
    parser.add_argument("--layers", type=int, default=21, help="layers of the large module")
    flags, rows = parser.parse_args(), []

    def report(what: str, size: str, times: list[float]) -> None:
        median, least, most = (f"{x:.3f}" for x in (statistics.median(times), min(times), max(times)))
        rows.append({"what": what, "size": size, "median_ms": median, "min_ms": least, "max_ms": most} | machine())
        print(f"{what:<24} {size:<22} median {median:>10} ms, min {least}, max {most}", flush=True)

    for n in (512, 1536, 2560):
        grad, mask = torch.randn(n, n), torch.rand(n, n) < 0.4
        ways = {
            "product with bytes": lambda g=grad, m=mask: g.mul_(m.view(torch.uint8)),
            "product with booleans": lambda g=grad, m=mask: g.mul_(m),
            "masked_fill_": lambda g=grad, m=mask: g.masked_fill_(~m, 0),
        }
        turns = [{way: milliseconds(function) for way, function in ways.items()} for _ in range(30)]
        for way in ways:
            report(way, f"{n} x {n}", [turn[way] for turn in turns[5:]])

    module = nn.Sequential(*(nn.Linear(2560, 2560) for _ in range(flags.layers)))
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    sparsifier = Sparsifier(module, optimizer, update_interval=3, total_updates=1000)
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    step, adam = zip(*((milliseconds(sparsifier.step), milliseconds(optimizer.step)) for _ in range(6)), strict=True)
    size = f"{flags.layers} x 2560 x 2560"
    report("step(), mask", size, [step[i] for i in (1, 3, 4)])  # the first one checks the weights
    report("step(), topology update", size, [step[i] for i in (2, 5)])
    report("AdamW", size, adam[1:])
    if flags.csv:
        with open(flags.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
