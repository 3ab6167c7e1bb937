"""The state of a run, read from the files that it left."""

import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path

RESUME_ME = 75  # a script's exit code: stopped by a signal with a checkpoint, start the same command again
STATES = ("finished", "running", "resumable", "failed", "missing")


@dataclass(frozen=True)
class Status:
    """What is known of a run; None where its files do not say."""

    state: str  # one of STATES
    exit_code: int | None = None  # of its last process, None while one lives or if it was killed with its supervisor
    agent_step: int | None = None  # of the last evaluation
    episode_return: float | None = None
    total_timesteps: int | None = None

    @property
    def evaluation(self) -> str:
        """Such as "return 812.3 at 750 of 1,250", empty before the first evaluation."""
        if self.agent_step is None:
            return ""
        total = f" of {self.total_timesteps:,}" if self.total_timesteps else ""
        return f"return {self.episode_return:.1f} at {self.agent_step:,}{total}"


def log_path(runs_dir: Path, name: str) -> Path:
    """The file that all processes of a run append their output to."""
    return runs_dir / "logs" / f"{name}.log"


def exit_path(runs_dir: Path, name: str) -> Path:
    """The file that holds the exit code of a run's last process, absent while one lives."""
    return runs_dir / "logs" / f"{name}.exit"


def status(runs_dir: Path, name: str) -> Status:
    """The status of the run with the directory `name`.

    The state is the first that holds: "finished" if there is an `agent.pt`, which is written last; "running" if a
    process holds the run's lock; "failed" if the last process ended with a code other than 0 and 75; "missing" if
    there is no directory; else "resumable".
    """
    run_dir = runs_dir / name
    try:
        exit_code = int(exit_path(runs_dir, name).read_text())
    except (OSError, ValueError):
        exit_code = None
    if (run_dir / "agent.pt").exists():
        state = "finished"
    elif is_locked(run_dir / ".lock"):
        state = "running"
    elif exit_code not in (None, 0, RESUME_ME):
        state = "failed"
    else:
        state = "resumable" if run_dir.is_dir() else "missing"
    return Status(state, exit_code, *last_evaluation(run_dir / "eval.csv"), total_timesteps(run_dir / "config.json"))


def is_locked(lock: Path) -> bool:
    """Whether a process holds the lock. Always False where the file system has no locks."""
    try:
        with open(lock) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared, as it needs no right to write
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def last_evaluation(path: Path) -> tuple[int, float] | tuple[None, None]:
    """Agent step and mean return of the last whole row of `eval.csv`."""
    try:
        rows = path.read_text().split("\n")[1:-1]  # after the last newline is nothing, or half a row
        step, _, mean, *_ = rows[-1].split(",")
        return int(step), float(mean)
    except (OSError, ValueError, IndexError):
        return None, None


def total_timesteps(config: Path) -> int | None:
    """Agent steps of the whole run, as it was started."""
    try:
        return json.loads(config.read_text())["args"]["total_timesteps"]
    except (OSError, ValueError, KeyError):
        return None


def log_end(path: Path, lines: int) -> list[str]:
    """The last lines of a log that are not blank."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 20_000))
            text = file.read().decode(errors="replace")
    except OSError as error:
        return [f"(no log: {error.strerror})"]
    return [line for line in text.splitlines() if line.strip()][-lines:]
