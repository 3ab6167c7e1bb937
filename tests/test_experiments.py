"""Figures, their order in Slurm arrays, the state of runs, and the programs that start and watch them.

The training scripts are played by small stand-ins here; tests/slurm_check.py trains on a real Slurm.
"""

import fcntl
import importlib
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from typing import get_args

import pytest
import tyro
from conftest import ROOT, wait_for

from experiments.__main__ import ARRAY_SH, arrays, main, of_task, ranges
from experiments.figures import FIGURES, Size, defaults, runs, small_hours
from experiments.status import exit_path, log_path, status
from experiments.supervise import environment, supervise

SEEDS_SH = ARRAY_SH.with_name("seeds.sh")
EVERY_RUN = [run for name in FIGURES for size in get_args(Size) for run in runs(name, size)]


def test_no_two_runs_share_a_directory():
    by_directory = {run.directory: run for run in EVERY_RUN}
    assert all(by_directory[run.directory] == run for run in EVERY_RUN)
    assert len(by_directory) > 5000


# The matrix of the paper's experiments: types x scales x regimes of its section 3, the methods of section 4 and App. D.
@pytest.mark.parametrize(
    ("figure", "cells", "number"),
    [
        ("fig02", 6 * 5, 6 * 5 * 2 * 8),  # types, regimes; tasks, seeds. Also Figs. 5 and 8
        ("fig04", 3 * 3 * 5, 3 * 3 * 5 * 2 * 8),  # encoder types 2, 4 and 6, scales 1, 3 and 5. Also Fig. 9
        ("fig06", 6 * 3 * 5, 6 * 3 * 5 * 2 * 8),  # all critic types
        ("fig11", 3 * 3, 3 * 3 * 2 * 8),  # MR.Q, + Res, + MST; scales
        ("fig12", 1 + 1 + 1 + 7, 10 * 1 * 8),  # MST; uniform; SET; sparsity 0.2 to 0.9 but 0.6, which is MST; dog-run
        ("fig13", 2 * 2 * (1 + 4 * 3), 52 * 4 * 8),  # algorithms, dense and MST, x1 and 4 larger in 3 ways; 4 tasks
        ("fig14", 5, 5 * 1 * 8),  # humanoid-run
        ("fig17", 2 * 2, 2 * 2 * 2 * 8),  # pre and post, scales 1 and 3
        ("fig26", 2 * (1 + 2 * 3), 14 * 2 * 5),  # dense and MST, x1 and 2 larger in 3 ways; 5 seeds
    ],
)
def test_a_figure_has_the_cells_of_the_papers_matrix(figure, cells, number):
    assert (len(FIGURES[figure].cells), len(runs(figure))) == (cells, number)
    part = {run.directory for run in runs({"fig02": "fig03", "fig06": "fig07"}.get(figure, figure))}
    assert part <= {run.directory for run in runs(figure)}  # pathologies are those of the same runs


@pytest.mark.parametrize("size", get_args(Size))
def test_every_command_line_is_what_its_cell_says(size):
    for run in {run.exp_name: run for run in EVERY_RUN if run.size == size}.values():
        script = importlib.import_module(run.script)
        args = tyro.cli(script.Args, args=run.arguments()[1:])
        script.check(args)
        assert run.directory == f"{args.env_id}__{args.exp_name}__{args.seed}"
        expected = {flag: value for flag, value in (defaults(run.script) | run.cell).items() if hasattr(args, flag)}
        if size == "toy":  # it has a clock of its own
            del expected["topology_update_interval"]
        assert {flag: getattr(args, flag) for flag in expected} == expected
        assert args.hidden_dim == {"paper": 512, "small": 128, "toy": 32}[size]


def test_small_runs_of_figure_14_are_five_seeds_of_cheetah_at_scale_1():
    chosen = runs("fig14", "small")
    assert {(run.env, run.cell["width_scale"], run.cell["depth_scale"]) for run in chosen} == {("cheetah-run", 1, 1)}
    assert [run.seed for run in chosen] == [seed for seed in (1, 2, 3, 4, 5) for _ in range(5)]  # five assignments
    # 24 ms per agent step, measured: 25 runs of 30,000 steps
    assert sum(map(small_hours, chosen)) == pytest.approx(25 * 30_000 * 0.024 / 3600)
    assert {run.directory for run in chosen[:2]} < {run.directory for run in runs("fig13", "small")}


def test_only_finds_a_value_that_cells_leave_out():
    assert len(runs("fig12", only={"growth": ("set",)})) == 8  # seeds
    assert len(runs("fig12", only={"growth": ("rigl",)})) == 9 * 8  # all other cells


@pytest.mark.parametrize("runs_per_task", [1, 4, 7])
def test_every_run_is_in_one_task(runs_per_task):
    chosen = runs("fig06")[:97]
    tasks = [of_task(chosen, index, runs_per_task) for index in range(-(-97 // runs_per_task))]
    assert max(map(len, tasks)) == runs_per_task
    assert list(itertools.chain(*tasks)) == chosen


@pytest.mark.parametrize(
    ("size", "expected"),
    [(10, [(0, "0-2,5-6,9"), (10, "0,3")]), (14, [(0, "0-2,5-6,9-10,13")]), (7, [(0, "0-2,5-6"), (7, "2-3,6")])],
)
def test_tasks_are_in_arrays_with_indices_below_the_size(size, expected):
    tasks = [0, 1, 2, 5, 6, 9, 10, 13]  # the others are finished
    assert [(offset, ranges(indices)) for offset, indices in arrays(tasks, size)] == expected


def test_the_state_of_a_run_follows_from_its_files_and_its_lock(tmp_path):
    run_dir, code = tmp_path / "run", exit_path(tmp_path, "run")
    code.parent.mkdir()

    def states(*codes: str) -> list[str]:
        found = []
        for text in codes:
            code.write_text(text)
            found.append(status(tmp_path, "run").state)
        return found

    assert states("", "0", "75", "1") == ["missing", "missing", "missing", "failed"]
    run_dir.mkdir()
    assert states("", "0", "75", "1") == ["resumable", "resumable", "resumable", "failed"]
    with open(run_dir / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert states("", "1") == ["running", "running"]
    (run_dir / "agent.pt").touch()
    assert states("", "1") == ["finished", "finished"]


def test_status_tells_the_last_whole_evaluation(tmp_path):
    (tmp_path / "config.json").write_text('{"args": {"total_timesteps": 500000}}')
    (tmp_path / "eval.csv").write_text("agent_step,env_step,mean,std\n0,0,1.5,0\n5000,10000,80.25,2\n10000,20")
    assert status(tmp_path.parent, tmp_path.name).evaluation == "return 80.2 at 5,000 of 500,000"
    (tmp_path / "eval.csv").write_text("agent_step,env_step,mean,std\n")
    assert status(tmp_path.parent, tmp_path.name).evaluation == ""


STAND_IN = """
import os, signal, sys, time
signal.alarm(60)
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
task, runs_dir, received = flags["--env"], flags["--runs-dir"], []
if task != "deaf":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, _: received.append(number))
print("exit codes:", [file for file in os.listdir(f"{runs_dir}/logs") if file.endswith(".exit")])
print("threads", os.environ["OMP_NUM_THREADS"], "gpus", os.environ.get("CUDA_VISIBLE_DEVICES"))
open(f"{runs_dir}/{task}.lives", "w").close()
if task == "fails":
    sys.exit("a line before\\nerror: the loss is not finite")
if task == "crashes":
    os.kill(os.getpid(), signal.SIGKILL)
while task in ("waits", "waits-too", "deaf") and not received:
    time.sleep(0.01)
print("received", *received)
sys.exit(75 if received else 0)
"""
CELL = {"residual": ("pre",), "critic_scale": ("1",)}  # one of Fig. 17
name = "{}__mrq-e6s1dense-c6s1dense-a5s1dense__1".format


@pytest.fixture
def watch(tmp_path, monkeypatch):
    """Supervise one run per task name, in this process."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "mst_mrq.py").write_text(STAND_IN)
    (tmp_path / "runs").mkdir()

    def call(*envs: str, side_by_side: int) -> int:
        chosen = runs("fig17", envs=envs, seeds=1, only=CELL)
        return supervise(chosen, call.runs_dir, side_by_side, scripts=tmp_path)

    call.runs_dir = tmp_path / "runs"
    call.codes = lambda *envs: [exit_path(call.runs_dir, name(env)).read_text().strip() for env in envs]
    call.log = lambda env: log_path(call.runs_dir, name(env)).read_text()
    return call


def test_a_failed_run_is_reported_with_the_end_of_its_log_and_stops_no_other(watch, capsys):
    assert watch("ends", "fails", "crashes", "ends-too", side_by_side=1) == 1
    out = capsys.readouterr().out
    assert f"FAILED {name('fails')}: exit code 1" in out
    assert "    a line before\n    error: the loss is not finite\n" in out
    assert f"FAILED {name('crashes')}: killed by signal 9" in out
    assert f"[4/4] finished after 0 s {name('ends-too')}" in out
    assert out.endswith(f"failed: {name('fails')}\nfailed: {name('crashes')}\n")
    assert watch.codes("ends", "fails", "crashes", "ends-too") == ["0", "1", "-9", "0"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_stops_all_runs_and_nothing_is_started_after_it(watch, number):
    living = ("waits", "waits-too", "deaf")

    def send():
        wait_for(lambda: all((watch.runs_dir / f"{env}.lives").exists() for env in living))
        os.kill(os.getpid(), number)

    threading.Thread(target=send).start()
    assert watch(*living, "later", side_by_side=3) == 75
    # the deaf one died by the signal, as a script does that has not yet begun to listen: there is nothing to report
    assert watch.codes(*living) == ["75", "75", "75"]
    assert not log_path(watch.runs_dir, name("later")).exists()
    passed_on = signal.SIGTERM if number == signal.SIGINT else number  # Ctrl-C reaches the runs by itself, too
    assert f"received {int(passed_on)}\n" in watch.log("waits")


def test_the_log_is_appended_and_the_exit_code_forgotten_while_it_runs(watch):
    for _ in range(2):
        watch("fails", side_by_side=1)
    assert watch.log("fails").count("exit codes: []") == 2


def test_threads_depend_on_cores_and_runs_side_by_side_alone_and_gpus_take_turns(watch, monkeypatch):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,7")
    found = [environment(slot, n) for n in (1, 2, 4, 9) for slot in range(n)]  # n side by side
    assert [one["OMP_NUM_THREADS"] for one in found] == ["6", *2 * ["3"], *4 * ["1"], *9 * ["1"]]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in found[3:7]] == ["2", "7", "2", "7"]
    watch("ends", side_by_side=2)  # one run, though there is room for more
    assert "threads 3 gpus 2\n" in watch.log("ends")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert environment(0, 2)["OMP_NUM_THREADS"] == "5"  # the user's


def test_finished_and_running_runs_are_not_started(watch, capsys):
    for env in ("done", "elsewhere"):
        (watch.runs_dir / name(env)).mkdir()
    (watch.runs_dir / name("done") / "agent.pt").touch()
    with open(watch.runs_dir / name("elsewhere") / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert watch("done", "elsewhere", "fails", side_by_side=3) == 75  # one has still to be finished, one failed
    assert [path.stem for path in (watch.runs_dir / "logs").glob("*.log")] == [name("fails")]
    assert f"left alone, another process trains {name('elsewhere')}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("status fig99", "choose one of fig02"),
        ("run fig06 --sedes 3", "unrecognized arguments: --sedes"),
        ("run fig06 --seeds 0", "0 is not a number above 0"),
        ("commands fig06 --only critic-arch=9", "choose from 1, 2, 3, 4, 5, 6"),
        ("commands fig06 --only critic-arc=4", "choose from script, encoder_arch"),
        ("commands fig06 --envs dog-run,dog-run", "twice"),
        ("task fig06 --index 1440", "tasks 0 to 1439"),
        ("run fig06 -- --seed=4", "--seeds"),
        ("plot fig06", "choose from 'list'"),
    ],
)
def test_wrong_usage_is_one_line_that_says_what_to_do(capsys, line, part):
    with pytest.raises(SystemExit) as stop:
        main(line.split())
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.startswith("error: ") and err.count("\n") == 1
    assert part in err


def test_status_counts_all_runs_and_tells_why_one_failed(tmp_path, capsys):
    failed, *others = runs("fig17", size="toy")
    log_path(tmp_path, failed.directory).parent.mkdir()
    log_path(tmp_path, failed.directory).write_text("agent step 0\nerror: the loss is not finite\n\n")
    exit_path(tmp_path, failed.directory).write_text("1")
    assert main(["status", "fig17", "--toy", "--runs-dir", str(tmp_path)]) == 0
    first, why, *lines, counts = capsys.readouterr().out.splitlines()
    assert first == f"failed    {failed.directory}"
    assert why.endswith(f"exit code 1, see {log_path(tmp_path, failed.directory)}: error: the loss is not finite")
    assert lines == [f"missing   {run.directory}" for run in others]
    assert counts == "fig17, 8 runs: 0 finished, 0 running, 0 resumable, 1 failed, 7 missing"


def test_the_documented_flags_exist(capsys):
    page = (ROOT / "docs" / "experiments.md").read_text()
    for command in ("commands", "status", "run", "task", "submit"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
    assert set(re.findall(r"`(--[a-z-]+)", page)) <= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))


def test_commands_prints_a_line_per_run_with_the_extra_flags(capsys):
    assert main(shlex.split("commands fig17 --seeds 1 --only critic-scale=1 --only critic-scale=3 -- --no-cuda")) == 0
    expected = [["python", *run.arguments(), "--no-cuda"] for run in runs("fig17", seeds=1)]  # both scales: all
    assert [shlex.split(line) for line in capsys.readouterr().out.splitlines()] == expected


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """An sbatch and a scontrol that write down how they are called. MaxArraySize is 3."""
    calls = tmp_path / "calls"
    calls.touch()
    for program, output in (("sbatch", f"$(wc -l <{calls})"), ("scontrol", "MaxArraySize = 3")):
        path = tmp_path / "bin" / program
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/bash\necho {program} "$@" >>{calls}\necho "{output}"\n')
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("SBATCH_OUTPUT", raising=False)
    return lambda program: [line for line in calls.read_text().splitlines() if line.startswith(program)]


def test_submit_passes_given_flags_only_and_leaves_finished_tasks_out(slurm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    figure = ["fig17", "--toy", "--only", "residual=pre,post", "--runs-per-task", "2"]  # 8 runs, tasks 0 to 3
    for run in runs("fig17", size="toy")[2:5]:  # the whole of task 1, half of task 2
        (tmp_path / "runs" / run.directory).mkdir(parents=True)
        (tmp_path / "runs" / run.directory / "agent.pt").touch()
    monkeypatch.setenv("SBATCH_JOB_NAME", "mine")
    assert main(["submit", *figure, "--time", "60", "--max-parallel", "1", "--", "--no-cuda"]) == 0
    tail = "fig17 --runs-per-task 2 --runs-dir runs --toy --only residual=pre,post -- --no-cuda"
    flags = "--output=runs/logs/slurm-%A_%a.out --time=60"
    assert slurm("sbatch") == [
        f"sbatch --parsable --array=0,2%1 {flags} {ARRAY_SH} {sys.executable} 0 {tail}",
        # the scontrol call and the first array make this the third call; tasks of both arrays would run at once
        f"sbatch --parsable --array=0%1 --dependency=afterany:2 {flags} {ARRAY_SH} {sys.executable} 3 {tail}",
    ]
    monkeypatch.setenv("PATH", "nowhere")
    with pytest.raises(SystemExit, match="login node"):
        main(["submit", *figure])


@pytest.mark.parametrize(
    ("signals", "code", "requeued"),
    [
        (["USR1"], 75, True),  # the warning of the time limit
        (["USR1"], 1, False),  # a failure
        (["USR1"], 0, False),  # finished in time
        (["TERM"], 75, False),  # scancel must not bring the job back; after a preemption Slurm requeues by itself
        (["USR1", "TERM"], 75, False),  # cancelled while it saves its checkpoint
        ([], 75, False),
    ],
)
@pytest.mark.parametrize("program", [ARRAY_SH, SEEDS_SH], ids=lambda program: program.stem)
def test_a_slurm_task_requeues_itself_after_the_warning_of_the_time_limit_alone(
    slurm, tmp_path, program, signals, code, requeued
):
    python = tmp_path / "python"  # exits with the code after the signals
    python.write_text(
        f'#!/bin/bash\ngot=; trap "got+=USR1" USR1; trap "got+=TERM" TERM; echo "$@" >{tmp_path}/ready\n'
        f'until [ "$got" = "{"".join(signals)}" ] || [ $SECONDS -gt 60 ]; do sleep 0.01; done; exit {code}\n'
    )
    python.chmod(0o755)
    environ = {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "4", "SLURM_JOB_ID": "21", "PYTHON": str(python)}
    line = [program, python, "1000", "fig06", "--toy"] if program == ARRAY_SH else [program, "train.py", "--env", "a"]
    task = subprocess.Popen(line, cwd=tmp_path, env=os.environ | environ, stdout=subprocess.DEVNULL)
    ready = tmp_path / "ready"
    wait_for(lambda: ready.exists() and ready.read_text())
    for number in signals:
        task.send_signal(getattr(signal, f"SIG{number}"))
        time.sleep(0.1 if program == ARRAY_SH else 0.6)  # or bash might run the traps in another order
    assert task.wait(120) == code
    expected = "-m experiments task --index 1004 fig06 --toy" if program == ARRAY_SH else "train.py --env a --seed 4"
    assert ready.read_text() == f"{expected}\n"
    assert slurm("scontrol") == (["scontrol requeue 17_4"] if requeued else [])


def test_seeds_of_one_command_run_side_by_side_and_stop_together(tmp_path):
    by_seed = STAND_IN.replace('flags["--env"]', 'flags["--env"].split(",")[int(flags["--seed"]) - 1]')
    (tmp_path / "train.py").write_text(by_seed)
    environ = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environ |= {"PYTHON": sys.executable, "SLURM_CPUS_PER_TASK": "6"}
    command = ["train.py", "--env", "ends,fails,waits,waits-too,ends", "--runs-dir", "."]

    def start(seeds: str) -> subprocess.Popen:
        line = [SEEDS_SH, "--jobs", "2", "--seeds", seeds, *command]
        return subprocess.Popen(line, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, text=True)

    ended = start("1,2")
    out, _ = ended.communicate()
    log = "logs/train.py-env-ends-fails-waits-waits-too-ends-runs-dir-.-seed-"
    assert out.splitlines()[:2] == [f"seed 1: {log}1.log", f"seed 2: {log}2.log"]
    assert sorted(out.splitlines()[2:]) == ["seed 1 ended with 0", "seed 2 ended with 1"]
    assert ended.returncode == 1
    text = (tmp_path / f"{log}2.log").read_text()
    assert "threads 3 " in text and text.endswith("a line before\nerror: the loss is not finite\n")

    stopped = start("3-5")
    wait_for(lambda: all((tmp_path / f"{task}.lives").exists() for task in ("waits", "waits-too")))
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(60) == 75
    assert not (tmp_path / f"{log}5.log").exists()  # nothing is started after the signal
