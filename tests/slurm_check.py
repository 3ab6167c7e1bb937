"""`experiments/run.sh` on a real Slurm of one node: its tasks requeue themselves, come back, or stay away.

`make test-slurm` runs it, plain pytest does not: it needs root on Debian, and installs Slurm.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "tests" / "slurm_cluster.sh"
# Waits for a signal when it is started first, and ends by itself when it goes on
STAND_IN = """
import pathlib, signal, sys, time
checkpoint, stopped = pathlib.Path(sys.argv[1]), []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, _: stopped.append(signal.Signals(number).name))
print("goes on" if checkpoint.exists() else "starts", flush=True)
while not stopped and not checkpoint.exists():
    time.sleep(0.1)
checkpoint.touch()
print("stopped by", stopped[0]) if stopped else None
sys.exit(75 if stopped else 0)
"""


@pytest.fixture(scope="module")
def cluster():
    """A cluster with room for two tasks of two commands."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # pytest's own temporary folders are closed to the user munge
    settings = {"CPUS": "4", "SLURM_CONF": str(folder / "slurm.conf")}
    started = subprocess.run([CLUSTER, "start", folder], env=os.environ | settings, capture_output=True, text=True)
    if started.returncode == 77:
        shutil.rmtree(folder)
        pytest.skip(started.stdout.strip())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", settings["SLURM_CONF"])
        assert started.returncode == 0, started.stdout + started.stderr
        yield
    subprocess.run([CLUSTER, "stop", folder], check=True)
    shutil.rmtree(folder)


def slurm(*line: object) -> str:
    return subprocess.run(list(map(str, line)), stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def submit(*flags: str) -> str:
    """Submit an array of two tasks with two commands each. Returns its id."""
    Path("t.py").write_text(STAND_IN)
    Path("four.txt").write_text("".join(f"{sys.executable} t.py checkpoint-{i} # run-{i}\n" for i in range(4)))
    flags = ("--parsable", "--array=1-2", "--cpus-per-task=2", *flags)
    return slurm("sbatch", *flags, ROOT / "experiments" / "run.sh", "--jobs", 2, "four.txt")


def log(i: int) -> list[str]:
    """Of a command, without the lines on when and how it was started."""
    path = Path(f"logs/run-{i}.log")
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in lines if not line.startswith("# 2")]


def job(task: str) -> tuple[str, ...]:
    """What Slurm says of a task, such as ("COMPLETED", "1", "0:0")."""
    words = dict(word.split("=", 1) for word in slurm("scontrol", "show", "job", task).split() if "=" in word)
    return tuple(words[key] for key in ("JobState", "Restarts", "ExitCode"))


def wait_for(condition) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < deadline, slurm("squeue")
        time.sleep(0.2)


def test_tasks_near_their_time_limit_requeue_themselves_and_end(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    array = submit("--time=1", "--signal=B:USR1@50")
    wait_for(lambda: not slurm("squeue", "--noheader"))
    assert [job(f"{array}_{task}") for task in (1, 2)] == [("COMPLETED", "1", "0:0")] * 2
    assert [log(i) for i in range(4)] == [
        ["starts", "stopped by SIGUSR1", "# exit code 75", "goes on", "# exit code 0"]
    ] * 4


def test_a_preempted_task_comes_back_and_a_cancelled_one_does_not(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    array = submit("--time=10")
    wait_for(lambda: [log(i) for i in range(4)] == [["starts"]] * 4)
    slurm("scancel", f"{array}_1")
    slurm("scontrol", "requeue", f"{array}_2")  # what a preemption does
    wait_for(lambda: not slurm("squeue", "--noheader"))
    assert [job(f"{array}_{task}")[:2] for task in (1, 2)] == [("CANCELLED", "0"), ("COMPLETED", "1")]
    stopped, back = ["starts", "stopped by SIGTERM", "# exit code 75"], ["goes on", "# exit code 0"]
    assert [log(i) for i in range(4)] == [stopped, stopped, stopped + back, stopped + back]
    submit()  # the same again, to go on
    wait_for(lambda: not slurm("squeue", "--noheader"))
    assert [log(i)[-2:] for i in range(4)] == [back] * 4
