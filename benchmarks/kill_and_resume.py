"""End a run at random moments, by `kill -9` and other signals, and compare it bit for bit with an undisturbed run.

    OMP_NUM_THREADS=1 python benchmarks/kill_and_resume.py mst_mrq mst_sac --times 10

Each script runs in two temporary folders. Signals go to the process or to its group. Ended runs are started again.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from conftest import SCRIPTS, assert_same_run, evaluations, scalars

FLAGS = """--env cartpole-swingup --no-cuda --width-scale 0.0625 --batch-size 64 --buffer-size 5000
--learning-starts 1000 --total-timesteps 4000 --eval-interval 250 --eval-episodes 2 --checkpoint-minutes 0.02"""
SIGNALS = ("SIGKILL", "SIGKILL", "SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")


def start(script: str, folder: str) -> subprocess.Popen:
    line = [sys.executable, ROOT / f"{script}.py", *FLAGS.split()]
    return subprocess.Popen(line, cwd=folder, stdout=subprocess.PIPE, text=True, start_new_session=True)


def end_and_compare(script: str, times: int, chance: random.Random, whole: str, ended: str) -> None:
    begin, child = time.monotonic(), start(script, whole)
    while "training from" not in child.stdout.readline():
        startup = time.monotonic() - begin
    child.communicate()
    training = time.monotonic() - begin - startup
    print(f"{script} undisturbed: {startup:.0f} s to start and {training:.0f} s", flush=True)
    for i in range(1, times + 1):
        child, alive = start(script, ended), startup + chance.uniform(-0.3, 1) * training / times
        name, kill = chance.choice(SIGNALS), chance.choice((os.kill, os.killpg))
        time.sleep(alive)
        if child.poll() is not None:
            raise SystemExit("the run was finished before: choose fewer --times")
        kill(child.pid, getattr(signal, name))
        out = child.communicate()[0]
        stopped = "training from" in out and name != "SIGKILL"
        assert child.returncode in ((75,) if stopped else (75, 1, -getattr(signal, name))), out
        print(f"{i:2} {name} by {kill.__name__} after {alive:.1f} s: {child.returncode}", flush=True)
    start(script, ended).communicate()
    (a,), (b,) = (list(Path(folder).glob("runs/*")) for folder in (whole, ended))
    assert_same_run(a, b)
    print(f"bit-identical: {len(evaluations(a)) - 1} evaluations, {len(scalars(a))} metrics, agent.pt", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scripts", nargs="*", default=SCRIPTS, help="all, if none is named")
    parser.add_argument("--times", type=int, default=10, help="how often each run is ended")
    flags = parser.parse_args()
    for script in flags.scripts:
        with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as ended:
            end_and_compare(script, flags.times, random.Random(0), whole, ended)
