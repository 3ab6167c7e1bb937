"""Shared by the tests of runs and errors: tiny runs as real processes, and the comparison of two run directories.

`command()` starts `python <script>.py`. `life()` is as real a process, but forked from one that has imported torch and
the simulator already, which saves three seconds per run, and it can get a signal at the n-th call of any function.
"""

import contextlib
import csv
import dataclasses
import importlib
import itertools
import multiprocessing
import operator
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # threads that wait for each other on a busy machine made these tests 70 times slower

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["mst_mrq"]
TINY = shlex.split(
    "--env cartpole-swingup --action-repeat 10 --no-cuda --width-scale 0.03 --total-timesteps 130 "
    "--learning-starts 40 --batch-size 16 --buffer-size 100 --eval-interval 50 --eval-episodes 2 "
    "--checkpoint-interval 30 --log-interval 10 --topology-update-interval 20"
)
ENCODER = ["--target-network-frequency", "20"]  # of the scripts with an encoder


def tiny(script: str) -> list[str]:
    """The arguments of a tiny run."""
    return TINY + (ENCODER if script in ("mst_mrq", "mst_mrsac") else [])


RUN = Path("runs", "cartpole-swingup__{}__1")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload([*SCRIPTS, "dm_control.suite", "gymnasium.envs.mujoco", "torch._dynamo"])


@dataclasses.dataclass
class Ended:
    """How a process ended. A negative code is the number of the signal that killed it."""

    code: int
    out: str
    err: str


def command(script: str, *flags: str, cwd: Path) -> Ended:
    """Run `python <script>.py` with the tiny arguments and `flags` to its end."""
    line = [sys.executable, str(ROOT / f"{script}.py"), *tiny(script), *flags]
    environ = os.environ | ENVIRONMENT
    child = subprocess.run(line, cwd=cwd, env=environ, capture_output=True, text=True, timeout=300, check=False)
    return Ended(child.returncode, child.stdout, child.stderr)


def life(script: str, *flags: str, cwd: Path, at: tuple | None = None, largest_file: int | None = None) -> Ended:
    """Run the script's `main()` in a process of its own, up to its end.

    at: ("Agent.update_encoder", 5, signal.SIGKILL) sends the process this signal at the start of the 5th such call.
    largest_file: in bytes, a write beyond it fails as on a full disk.
    """
    return end(start(script, *flags, cwd=cwd, at=at, largest_file=largest_file), cwd)


def end(child, cwd: Path) -> Ended:
    """Wait for the end of a process that `start()` started."""
    child.join(300)
    code = child.exitcode
    child.kill()  # if it hangs: then the code is None
    return Ended(code, Path(cwd, "stdout").read_text(), Path(cwd, "stderr").read_text())


def start(script: str, *flags: str, cwd: Path, at: tuple | None = None, largest_file: int | None = None):
    """`life()` without waiting for its end."""
    child = forkserver.Process(target=_main, args=(script, flags, cwd, at, largest_file))
    with pytest.MonkeyPatch.context() as patch:  # for the server, which the first child starts
        for name, value in {**ENVIRONMENT, "MUJOCO_GL": "disable"}.items():
            patch.setenv(name, value)
        child.start()
    return child


def _main(script: str, flags: tuple[str, ...], cwd: Path, at: tuple | None, largest_file: int | None) -> None:
    os.chdir(cwd)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    module = importlib.import_module(script)
    if at:
        signal_at(module, *at)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv = [f"{script}.py", *tiny(script), *flags]
    sys.exit(module.main())


def signal_at(module, name: str, call: int, number: int) -> None:
    *path, name = name.split(".")
    owner = operator.attrgetter(".".join(path))(module) if path else module
    original, calls = getattr(owner, name), itertools.count(1)

    def counted(*args, **kwargs):
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(owner, name, counted)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    """Parameters and buffers that are made here have this type."""
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(torch.float32)


class FixedBatch:
    """A replay buffer that draws `batch` alone."""

    def __init__(self, batch):
        self.batch, self.priority = batch, None

    def sample(self, batch_size: int):
        return self.batch

    def update_priority(self, index: torch.Tensor, priority: torch.Tensor) -> None:
        self.priority = priority


@pytest.fixture(scope="session", params=SCRIPTS)
def script(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def finished_runs() -> dict[str, Path]:
    return {}


@pytest.fixture
def reference(script, finished_runs, tmp_path_factory) -> Path:
    """The directory of an uninterrupted run with the tiny arguments, made once per script."""
    if script not in finished_runs:
        cwd = tmp_path_factory.mktemp("reference")
        ended = command(script, cwd=cwd)
        assert (ended.code, ended.err) == (0, "")
        finished_runs[script] = cwd / str(RUN).format(script)
    return finished_runs[script]


@pytest.fixture
def main(script, monkeypatch, tmp_path, capsys):
    """Call the script's `main()` in this process and an empty folder, for what ends before training starts."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}

    def call(*flags: str) -> Ended:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *tiny(script), *flags])
        try:
            code = importlib.import_module(script).main()
        except SystemExit as stop:
            code = stop.code
        return Ended(code, *capsys.readouterr())

    yield call
    torch.set_flush_denormal(False)  # main() turned it on for the whole process
    for number, handler in handlers.items():
        signal.signal(number, handler)


def assert_one_error(ended: Ended, code: int, *parts: str) -> None:
    """The process ended with this exit code and one line on stderr that holds all `parts`."""
    assert ended.code == code, ended
    assert re.fullmatch(r"error: [^\n]+\n", ended.err), ended.err
    for part in parts:
        assert part in ended.err


def evaluations(run_dir: Path) -> list[list[str]]:
    """`eval.csv` as text, without wall_seconds."""
    with open(run_dir / "eval.csv", newline="") as file:
        return [row[:-1] for row in csv.reader(file)]


def scalars(run_dir: Path) -> dict[tuple[str, int], float]:
    """All TensorBoard values of all event files by tag and step, without speed and memory. No value is there twice."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    values = {}
    for path in sorted(run_dir.glob("events.out.tfevents.*")):
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.HasField("simple_value") and value.tag not in ("charts/SPS", "charts/peak_memory_gib"):
                    assert (value.tag, event.step) not in values, f"{value.tag} at step {event.step} is there twice"
                    values[value.tag, event.step] = value.simple_value
    return values


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Weights and masks of an `agent.pt` by name."""
    saved = torch.load(path, weights_only=True)
    return {
        f"{part}.{module}.{name}": tensor
        for part in ("modules", "masks")
        for module, state in saved[part].items()
        for name, tensor in state.items()
    }


def assert_same_agent(run_dir: Path, other: Path) -> None:
    ours, theirs = tensors(run_dir / "agent.pt"), tensors(other / "agent.pt")
    assert len(ours) > 0
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def assert_same_run(run_dir: Path, other: Path) -> None:
    """The same bits, wall-clock time aside: every evaluation and TensorBoard value once, weights and masks."""
    assert evaluations(run_dir) == evaluations(other)
    ours, theirs = scalars(run_dir), scalars(other)
    assert ours.keys() == theirs.keys()
    assert {key: (ours[key], theirs[key]) for key in ours if ours[key] != theirs[key]} == {}
    assert_same_agent(run_dir, other)


@contextlib.contextmanager
def unchanged(folder: Path):
    """No file of the folder is created, deleted or written."""

    def contents():
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}

    before = contents()
    assert before
    yield
    assert contents() == before
