"""Runs side by side on this machine, each a process of its own: used by `run` and by each task of a Slurm array."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from experiments.figures import Run
from experiments.status import RESUME_ME, exit_path, log_end, log_path, status

ROOT = Path(__file__).resolve().parents[1]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LOG_LINES = 12  # of a failed run, shown


def command(run: Run, runs_dir: Path, extra: tuple[str, ...] = (), scripts: Path = ROOT) -> list[str]:
    """The command line of a run, as this Python starts it."""
    script, *flags = run.arguments()
    return [sys.executable, str(scripts / script), *flags, "--runs-dir", str(runs_dir), *extra]


def cores() -> int:
    """Cores that this process may use: those that Slurm gave the job, else those that the system allows."""
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        if name in os.environ:
            return int(os.environ[name])
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(slot: int, side_by_side: int) -> dict[str, str]:
    """The environment of the process in a slot, 0 <= slot < side_by_side.

    OMP_NUM_THREADS, unless set, depends on the number of slots alone and not on how many of them are in use: on a CPU,
    a resumed run gives the same bits only with the same number of threads. Several visible GPUs take turns.
    """
    threads = {"OMP_NUM_THREADS": str(max(1, cores() // side_by_side)), "PYTHONUNBUFFERED": "1"}
    gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    one = {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}
    return threads | os.environ | one


def supervise(
    runs: list[Run], runs_dir: Path, side_by_side: int, extra: tuple[str, ...] = (), scripts: Path = ROOT
) -> int:
    """Start the runs in their order, `side_by_side` at a time, and wait until all have ended.

    A run that fails does not stop the others. SIGTERM and SIGUSR1 are passed on to all that live, SIGINT as SIGTERM,
    and nothing is started after them. Finished runs are not started, nor those that another process trains.

    Args:
        extra: flags added to each command line.
        scripts: the folder of the scripts.

    Returns:
        75 if a run has still to be started or resumed, else 1 if one failed, else 0.
    """
    received: list[int] = []
    previous = {number: signal.signal(number, lambda number, _: received.append(number)) for number in SIGNALS}
    stopping = False
    waiting, ended, left, failed = list(runs), 0, [], []
    living: dict[int, tuple[Run, subprocess.Popen, float]] = {}  # by slot

    def say(message: str) -> None:
        print(f"[{ended}/{len(runs)}] {message}", flush=True)

    def fail(run: Run, reason: str) -> None:
        failed.append(run)
        say(f"FAILED {run.directory}: {reason}")
        for line in log_end(log_path(runs_dir, run.directory), LOG_LINES):
            print(f"    {line}", flush=True)

    try:
        while living or (waiting and not stopping):
            while received:
                number = received.pop(0)
                stopping = True
                say(f"{signal.Signals(number).name}: waiting for {len(living)} runs to save their checkpoints")
                for _, child, _ in living.values():  # Ctrl-C reaches them by itself, and a second SIGINT would end them
                    child.send_signal(signal.SIGTERM if number == signal.SIGINT else number)

            while waiting and len(living) < side_by_side and not received and not stopping:
                run = waiting.pop(0)
                state = status(runs_dir, run.directory).state
                if state == "finished":
                    ended += 1
                elif state == "running":
                    left.append(run)
                    say(f"left alone, another process trains {run.directory}")
                else:
                    slot = min(set(range(side_by_side)) - living.keys())
                    line = command(run, runs_dir, extra, scripts)
                    try:
                        child = start(line, runs_dir, run.directory, environment(slot, side_by_side))
                    except OSError as error:
                        ended += 1
                        fail(run, f"cannot be started ({error})")
                        continue
                    living[slot] = run, child, time.monotonic()
                    say(f"{'start' if state == 'missing' else 'again'} {run.directory}")

            for slot, (run, child, begin) in list(living.items()):
                code = child.poll()
                if code is None:
                    continue
                del living[slot]
                if -code in SIGNALS:  # before the script could listen: it is asked to stop, and has nothing to save
                    code = RESUME_ME
                lost = "" if write_exit(runs_dir, run.directory, code) else " (its exit code could not be written)"
                took = f"after {time.monotonic() - begin:.0f} s"
                if code == RESUME_ME:
                    left.append(run)
                    say(f"stopped {took} {run.directory}{lost}")
                    continue
                ended += 1
                if code == 0:
                    say(f"finished {took} {run.directory} {status(runs_dir, run.directory).evaluation}{lost}")
                else:
                    how = f"exit code {code}" if code > 0 else f"killed by signal {-code}"
                    fail(run, f"{how} {took}, see {log_path(runs_dir, run.directory)}{lost}")
            time.sleep(0.1)
    finally:  # only an error of this program leaves any alive
        for _, child, _ in living.values():
            child.terminate()
        for _, child, _ in living.values():
            child.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)

    left += waiting
    for run in failed:
        print(f"failed: {run.directory}")
    if left:
        print(f"{len(left)} of {len(runs)} runs are not finished: start the same command again to go on")
    elif not failed:
        print(f"all {len(runs)} runs are finished")
    sys.stdout.flush()
    return RESUME_ME if left else 1 if failed else 0


def start(line: list[str], runs_dir: Path, name: str, environ: dict[str, str]) -> subprocess.Popen:
    """Start a run's process, which appends to its log. The exit code of the process before is forgotten."""
    log_path(runs_dir, name).parent.mkdir(parents=True, exist_ok=True)
    exit_path(runs_dir, name).unlink(missing_ok=True)
    with open(log_path(runs_dir, name), "a") as log:
        print(f"# {time.strftime('%F %T')} on {socket.gethostname()}: {shlex.join(line)}", file=log, flush=True)
        return subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environ)


def write_exit(runs_dir: Path, name: str, code: int) -> bool:
    """Keep the exit code of a run's process; False if that is impossible, for example on a full disk."""
    try:
        exit_path(runs_dir, name).write_text(f"{code}\n")
    except OSError:
        return False
    return True
