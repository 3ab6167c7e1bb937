"""Shared by the tests of runs: tiny runs as real processes, and the comparison of two run directories."""

import collections
import contextlib
import functools
import importlib
import itertools
import multiprocessing
import os
import resource
import shlex
import shutil
import signal
import sys
import time
import types
from pathlib import Path
from unittest import mock

import pytest
import torch

torch.set_num_threads(1)  # threads that wait for each other on a busy machine made these tests 70 times slower

ROOT = Path(__file__).resolve().parents[1]
ORACLES = Path(os.environ.get("MST_ORACLES") or ROOT / "tests" / "oracles")
SCRIPTS = ["mst_sac", "mst_ddpg", "mst_mrq", "mst_mrsac"]
all_scripts = pytest.mark.parametrize("script", SCRIPTS)  # a test without it runs mst_mrq: `main` is the same in all
# Evaluations at 0, 50, 100 and 130, training from 40 on; an episode has 40 steps
TINY = shlex.split(
    "--env cartpole-swingup --max-episode-steps 40 --no-cuda --width-scale 0.03 --total-timesteps 130 "
    "--learning-starts 40 --batch-size 16 --buffer-size 100 --eval-interval 50 --eval-episodes 2 "
    "--checkpoint-minutes 0.5 --log-interval 10 --topology-update-interval 20"
)
RUN = "runs/cartpole-swingup__{}__1"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}

forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload([*SCRIPTS, "dm_control.suite", "gymnasium.envs.mujoco", "torch._dynamo"])
Ended = collections.namedtuple("Ended", "code out err")  # a negative code is the number of the signal that killed it


def arguments(script: str, flags: tuple[str, ...]) -> list[str]:
    """Those of a tiny run and `flags`."""
    encoder = ["--target-network-frequency", "20"] if script in ("mst_mrq", "mst_mrsac") else []
    return [*TINY, *encoder, *flags]


def life(script: str, *flags: str, cwd: Path, **how) -> Ended:
    """Run the script's `main()` to its end, in a process forked from one that has imported torch already.

    A loop of the training takes a second of its clock, an update to TensorBoard another: 30 make a checkpoint.

    at: ("Agent.update_encoder", 5, signal.SIGKILL), or several of them, sends the process (with a fourth entry "group":
        all of the run) this signal at the start of the 5th such call, or calls a function as it was called; 0: at each.
    largest_file: in bytes, a write beyond it fails as on a full disk.
    hook: a function of a test module, called with the script as module before its `main()`.
    """
    child = start(script, *flags, cwd=cwd, **how)
    child.join(300)
    if child.exitcode is None:
        child.kill()
    return Ended(child.exitcode, (cwd / "stdout").read_text(), (cwd / "stderr").read_text())


def start(script: str, *flags: str, cwd: Path, **how):
    """`life()` without waiting for its end."""
    cwd.mkdir(exist_ok=True)
    child = forkserver.Process(target=_main, args=(script, flags, cwd), kwargs=how)
    with mock.patch.dict(os.environ, ENVIRONMENT, MUJOCO_GL="disable"):  # for the server, which the first child starts
        child.start()
    return child


def _main(script: str, flags: tuple[str, ...], cwd: Path, at=(), largest_file=None, hook=None) -> None:
    os.chdir(cwd)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    module, seconds = importlib.import_module(script), itertools.count()
    module.time = types.SimpleNamespace(monotonic=lambda: float(next(seconds)))
    if hook:
        hook(module)
    for each in [at] if at and isinstance(at[0], str) else at:
        signal_at(module, *each)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv = [f"{script}.py", *arguments(script, flags)]
    sys.exit(module.main())


def signal_at(module, name: str, call: int, action, to: str = "") -> None:
    *path, name = name.split(".")
    owner = functools.reduce(getattr, path, module)
    original, calls = getattr(owner, name), itertools.count(1)
    if to == "group":
        os.setpgrp()

    def counted(*args, **kwargs):
        if next(calls) == call or not call:
            action(*args) if callable(action) else os.kill(0 if to == "group" else os.getpid(), action)
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def wait_for(condition, seconds: int = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(seconds / 24_000)


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


@pytest.fixture
def script() -> str:
    return "mst_mrq"


@pytest.fixture
def run_dir(script, tmp_path) -> Path:
    """Where a run with the tiny arguments is, if it starts in `tmp_path`."""
    return tmp_path / RUN.format(script)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """The directory of a run with the tiny arguments, uninterrupted or killed there, made once in a session."""

    @functools.cache
    def make(script: str, at: tuple = ()) -> Path:
        cwd = tmp_path_factory.mktemp("once")
        assert life(script, cwd=cwd, at=at).code == (-signal.SIGKILL if at else 0)
        return cwd / RUN.format(script)

    return make


@pytest.fixture
def reference(script, made_once) -> Path:
    return made_once(script)


@pytest.fixture
def finished(reference, run_dir) -> Path:
    """A copy of the reference, at the same path relative to the working directory."""
    return shutil.copytree(reference, run_dir)


@pytest.fixture
def interrupted(script, made_once, run_dir) -> Path:
    """A copy of a run killed when its third checkpoint was written but not renamed: it holds that of agent step 30."""
    return shutil.copytree(made_once(script, ("Agent.optimize", 31, signal.SIGKILL)), run_dir)


@pytest.fixture
def main(script, monkeypatch, tmp_path, capsys):
    """Call the script's `main()` in this process and an empty folder, for what ends before training starts."""
    monkeypatch.chdir(tmp_path)
    for name in ("signal.signal", "fcntl.flock"):  # their effects would outlast the call
        monkeypatch.setattr(name, lambda *_: None)

    def call(*flags: str) -> Ended:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments(script, flags)])
        try:
            code = importlib.import_module(script).main()
        except SystemExit as stop:
            code, message = (stop.code, "") if isinstance(stop.code, int) else (1, f"{stop.code}\n")
            sys.stderr.write(message)  # as the interpreter does
        return Ended(code, *capsys.readouterr())

    yield call
    torch.set_flush_denormal(False)


def assert_one_error(ended: Ended, code: int, *parts: str) -> None:
    """The process ended with this exit code, and stderr is one line that holds all `parts`."""
    assert ended.code == code, ended
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended.err
    for part in parts:
        assert part in ended.err


def evaluations(run_dir: Path) -> list[list[str]]:
    """`eval.csv` as text, without wall_seconds."""
    path = run_dir / "eval.csv"
    return [line.split(",")[:-1] for line in path.read_text().splitlines()] if path.exists() else []


def scalars(run_dir: Path) -> dict[tuple[str, int], float]:
    """`metrics.csv` by tag and step, without the speed. No value is there twice."""
    rows = [line.split(",") for line in (run_dir / "metrics.csv").read_text().splitlines()]
    assert rows[0] == ["agent_step", "tag", "value"]
    values = {(tag, int(step)): float(value) for step, tag, value in rows[1:]}
    assert len(values) == len(rows) - 1
    return {key: value for key, value in values.items() if key[0] != "charts/SPS"}


def assert_same_agent(run_dir: Path, other: Path) -> None:
    """Weights and masks are the same to the bit."""
    ours, theirs = (torch.load(path / "agent.pt", weights_only=True) for path in (run_dir, other))
    for part in ("agent", "masks"):
        torch.testing.assert_close(ours[part], theirs[part], rtol=0, atol=0)
    assert len(ours["agent"]) > 10


def assert_same_run(run_dir: Path, other: Path) -> None:
    """The same bits, wall-clock time aside: every evaluation and metric once, weights and masks."""
    assert evaluations(run_dir) == evaluations(other)
    assert scalars(run_dir) == scalars(other)
    assert_same_agent(run_dir, other)


@contextlib.contextmanager
def unchanged(folder: Path):
    """No file of the folder is created, deleted or written."""

    def contents() -> dict:
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}

    before = contents()
    assert before
    yield
    assert contents() == before
