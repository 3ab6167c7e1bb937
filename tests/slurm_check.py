"""A figure through a real Slurm, with preemption, time limit and cancellation: the bits of uninterrupted runs.

`make test-slurm` runs it, plain pytest does not: it needs root, installs Slurm, and takes minutes.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import ROOT, assert_same_run, evaluations, wait_for

from experiments.figures import runs

# 6 runs: dst for all modules, or MST; 3 seeds
FIGURE = ("one-strategy", "--toy", "--seeds", "3", "--only", "critic-scale=1", "--only", "critic-regime=dst")
RUNS = runs("one-strategy", size="toy", seeds=3, only={"critic_scale": ("1",), "critic_regime": ("dst",)})
EXTRA = ("--", "--no-cuda", "--total-timesteps", "800")
CLUSTER = ROOT / "tests" / "slurm_cluster.sh"


@pytest.fixture
def cluster(request, monkeypatch):
    """A cluster with room for two tasks of two runs, where a third task needs a second array, and an empty folder."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # pytest's own temporary folders are closed to the user munge
    settings = {"CPUS": "4", "MAX_ARRAY_SIZE": "2", "SLURM_CONF": str(folder / "slurm.conf"), "PYTHONPATH": str(ROOT)}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(folder)
    started = subprocess.run([CLUSTER, "start", folder], capture_output=True, text=True, check=False)
    if started.returncode == 77:
        shutil.rmtree(folder)
        pytest.skip(started.stdout.strip())
    try:
        assert started.returncode == 0, started.stdout + started.stderr
        yield
    finally:
        subprocess.run([CLUSTER, "stop", folder], check=True)
    if request.session.testsfailed:
        print(f"kept: {folder}")
    else:
        shutil.rmtree(folder)


def experiments(*arguments: str, **environ: str) -> str:
    """The output of `python -m experiments`, which has to end well."""
    line = [sys.executable, "-m", "experiments", *arguments]
    done = subprocess.run(line, env=os.environ | environ, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def submit() -> list[str]:
    """Submit the figure. Returns the ids of the arrays."""
    flags = ("--runs-per-task", "2", "--cpus-per-task", "2", "--max-parallel", "2", "--time", "60")
    out = experiments("submit", *FIGURE, *flags, *EXTRA, SBATCH_SIGNAL="B:USR1@90")
    print(out.strip(), flush=True)
    return [line.split()[2] for line in out.splitlines()]


def slurm(*line: str) -> str:
    return subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True).stdout


def job(task: str) -> dict[str, str]:
    """What Slurm knows of a task, such as {"JobState": "RUNNING", "Restarts": "1"}."""
    words = slurm("scontrol", "show", "job", task).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def wait(what: str, condition) -> None:
    wait_for(condition, seconds=1200)
    print(what, flush=True)


def in_training(task: int) -> bool:
    """Whether both runs of a task have the evaluation at 250 steps, after which they train."""
    steps = []
    for run in RUNS[2 * task : 2 * task + 2]:
        path = Path("runs", run.directory)
        steps.append(int(evaluations(path)[-1][0]) if (path / "eval.csv").exists() else -1)
    assert max(steps) < 800, "it ended before it could be interrupted"
    return min(steps) >= 250


def processes(task: int) -> list[int]:
    """Process ids of the two trainers of a task."""
    found = []
    for run in RUNS[2 * task : 2 * task + 2]:
        found += slurm("pgrep", "-f", "--", f"--seed {run.seed} --exp-name {run.exp_name} .*--runs-dir runs ").split()
    return list(map(int, found))


def test_preempted_warned_and_cancelled_tasks_give_the_bits_of_uninterrupted_runs(cluster, monkeypatch):
    print("a cluster runs; now the uninterrupted runs", flush=True)
    experiments("run", *FIGURE, "--jobs", "2", "--runs-dir", "whole", *EXTRA, OMP_NUM_THREADS="1")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # 2 cores for 2 runs: 1 thread

    begin = time.monotonic()
    first, second = submit()  # tasks 0 and 1, and task 2
    preempted, warned, cancelled = f"{first}_0", f"{first}_1", f"{second}_0"

    wait("task 1 trains; it is held, and has one to two minutes left", lambda: in_training(1))
    held = processes(1)
    assert len(held) == 2
    for pid in held:
        os.kill(pid, signal.SIGSTOP)
    minutes = int((time.monotonic() - begin) / 60) + 2  # since its start; Slurm looks every 30 s and 30 s ahead
    slurm("scontrol", "update", f"JobId={warned}", f"TimeLimit={minutes}")

    wait("task 0 trains; it is preempted", lambda: in_training(0))
    slurm("scontrol", "requeue", preempted)
    wait("task 0 was requeued", lambda: job(preempted)["Restarts"] == "1")

    output = Path("runs", "logs", f"slurm-{warned}.out")
    wait("task 1 was warned", lambda: "SIGUSR1: waiting for 2 runs" in output.read_text())
    for pid in held:
        os.kill(pid, signal.SIGCONT)
    wait("task 1 requeued itself", lambda: job(warned)["Restarts"] == "1")
    slurm("scontrol", "update", f"JobId={warned}", "TimeLimit=60")
    assert "the time limit is near: requeued" in output.read_text()
    assert job(cancelled)["JobState"] == "PENDING"  # --max-parallel 2 holds over both arrays

    wait("task 2 trains; it is cancelled", lambda: job(cancelled)["JobState"] == "RUNNING" and in_training(2))
    slurm("scancel", cancelled)
    wait("the queue is empty", lambda: not slurm("squeue", "--noheader"))
    ended = [(job(task)["JobState"], job(task)["Restarts"]) for task in (preempted, warned, cancelled)]
    assert ended == [("COMPLETED", "1"), ("COMPLETED", "1"), ("CANCELLED", "0")]
    lines = experiments("status", *FIGURE).splitlines()
    assert [line.split()[:2] for line in lines[:-1]] == [["resumable", run.directory] for run in RUNS[4:]]

    (third,) = submit()  # what is finished is not submitted again
    wait("the queue is empty", lambda: not slurm("squeue", "--noheader"))
    assert job(f"{third}_0")["JobState"] == "COMPLETED"
    assert "6 finished, 0 running, 0 resumable, 0 failed, 0 missing" in experiments("status", *FIGURE)

    for run in RUNS:
        assert_same_run(Path("runs", run.directory), Path("whole", run.directory))
        log = Path("runs", "logs", f"{run.directory}.log").read_text()  # from a checkpoint after 250 steps, not anew
        assert int(log.split("at agent step ")[-1].split()[0].replace(",", "")) >= 250, log
    print("all bits are the same", flush=True)


TRAIN = """
import pathlib, signal, sys, time
checkpoint = pathlib.Path(sys.argv[-1])  # named by the seed
stopped = []
signal.signal(signal.SIGUSR1, lambda *_: stopped.append(True))
print("resumed" if checkpoint.exists() else "started")
while not stopped and not checkpoint.exists():
    time.sleep(0.1)
checkpoint.touch()
sys.exit(75 if stopped else 0)
"""


def test_seeds_of_one_command_requeue_themselves_before_the_time_limit(cluster, monkeypatch):
    Path("train.py").write_text(TRAIN)
    for name, value in {"PYTHON": sys.executable, "SBATCH_SIGNAL": "B:USR1@50", "SBATCH_TIMELIMIT": "1"}.items():
        monkeypatch.setenv(name, value)
    seeds = str(ROOT / "experiments" / "seeds.sh")
    array = slurm("sbatch", "--parsable", "--array=0-1", seeds, "train.py", "--env", "a").strip()
    wait("the queue is empty", lambda: not slurm("squeue", "--noheader"))
    for seed in (0, 1):  # the array indices that this cluster allows
        task = job(f"{array}_{seed}")
        assert (task["JobState"], task["Restarts"], task["ExitCode"]) == ("COMPLETED", "1", "0:0")
        assert Path(f"logs/train.py-env-a-seed-{seed}.log").read_text() == "started\nresumed\n"
