"""Kill a run with `kill -9` at random moments, and compare it bit for bit with an uninterrupted run.

    OMP_NUM_THREADS=1 python benchmarks/kill_and_resume.py mst_mrq mst_sac --kills 10

Starts each script with the same arguments in two temporary folders: once uninterrupted, once killed after a random time
and started again, until it was killed often enough, and then to its end. Prints every death and the verdict.
"""

import argparse
import contextlib
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from conftest import SCRIPTS, assert_same_run, evaluations, scalars

FLAGS = """
    --env cartpole-swingup --no-cuda --width-scale 0.0625 --batch-size 64 --total-timesteps 4000 --learning-starts 1000
    --eval-interval 500 --eval-episodes 2 --checkpoint-interval 100 --buffer-size 5000 --topology-update-interval 100
"""


def start(script: str, folder: Path) -> subprocess.Popen:
    line = [sys.executable, ROOT / f"{script}.py", *FLAGS.split()]
    return subprocess.Popen(line, cwd=folder, stdout=subprocess.PIPE, text=True)


def kill_and_compare(script: str, kills: int, moments: random.Random, whole: str, killed: str) -> None:
    begin, child = time.time(), start(script, whole)
    child.stdout.readline()  # the table of networks
    startup = time.time() - begin
    child.communicate()
    training = time.time() - begin - startup
    print(f"{script} uninterrupted: {startup:.0f} s to start and {training:.0f} s", flush=True)
    for kill in range(1, kills + 1):
        child, alive = start(script, killed), moments.uniform(0, startup + training / kills)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.communicate(timeout=alive)
            raise SystemExit(f"the run ended before kill {kill}: choose fewer --kills")
        child.kill()
        resumed = [line for line in child.communicate()[0].splitlines() if line.startswith("resuming")]
        print(f"kill {kill:2} after {alive:5.1f} s, {resumed[0] if resumed else 'not resumed'}", flush=True)
    start(script, killed).communicate()
    (a,), (b,) = (list(Path(folder).glob("runs/*")) for folder in (whole, killed))
    assert_same_run(a, b)
    print(f"bit-identical: {len(evaluations(a)) - 1} evaluations, {len(scalars(a))} TensorBoard values, agent.pt")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scripts", nargs="*", default=SCRIPTS, help="all, if none is named")
    parser.add_argument("--kills", type=int, default=10, help="how often each run is killed")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    flags = parser.parse_args()
    for script in flags.scripts:
        with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as killed:
            kill_and_compare(script, flags.kills, random.Random(flags.seed), whole, killed)
