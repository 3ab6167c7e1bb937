"""Figures as commands, the state of runs, and `run.sh` with stand-ins for the scripts. More: tests/slurm_check.py."""

import fcntl
import importlib
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tyro

from experiments.__main__ import main
from experiments.figures import FIGURES, defaults, runs

RUN_SH = Path(__file__).resolve().parents[1] / "experiments" / "run.sh"
# The paper's matrix as cells, tasks, seeds: types x scales x regimes. Fig. 12: MST, uniform, SET, sparsity 0.2 to 0.9
# but 0.6, which is MST. Fig. 13: two algorithms, dense and MST, x1 and 4 larger in 3 ways. Fig. 26: x1 and 2 larger
MATRIX = {
    "fig02 fig05 fig07 fig08 fig18 fig20 fig23": (6 * 5, 2, 8), "fig04 fig09 fig19": (3 * 3 * 5, 2, 8),
    "fig06": (6 * 3 * 5, 2, 8), "fig03 fig10": (2 * 5, 2, 8), "fig11": (3 * 3, 2, 8), "fig12": (1 + 1 + 1 + 7, 1, 8),
    "fig13": (2 * 2 * (1 + 4 * 3), 4, 8), "fig14": (5, 1, 8), "fig17": (2 * 2, 2, 8), "fig21 fig22": (6 * 3 * 5, 1, 8),
    "fig24 fig25": (3 * 3 * 5, 1, 8), "fig26": (2 * (1 + 2 * 3), 2, 5), "one-strategy": (3 * 4, 2, 8),
    "sparsity": (6, 2, 8), "rigl": (3 * 3, 2, 8), "depth": (3 * 3, 1, 8), "encoder-types": (6 * 2, 1, 8),
}  # fmt: skip


def test_every_figure_has_the_cells_tasks_and_seeds_of_the_papers_matrix():
    expected = {name: numbers for names, numbers in MATRIX.items() for name in names.split()}
    assert expected.keys() == FIGURES.keys()
    for name, numbers in expected.items():
        axes = [{getattr(run, key) for run in runs(name)} for key in ("exp_name", "env", "seed")]
        assert tuple(map(len, axes)) == numbers and len(runs(name)) == numbers[0] * numbers[1] * numbers[2]


@pytest.mark.parametrize("size", ["paper", "small", "toy"])
def test_every_printed_command_is_what_its_cell_says_and_has_a_name_of_its_own(size, capsys):
    every = [run for name in FIGURES for run in runs(name, size, seeds=1)]
    by_directory = {run.directory: run for run in every}
    assert all(by_directory[run.directory] == run for run in every)
    for name in FIGURES:
        main(["commands", name, "--seeds", "1", *([] if size == "paper" else [f"--{size}"])])
    for line in set(capsys.readouterr().out.splitlines()):
        command, name = line.split(" # ")
        run, (python, script, *flags) = by_directory.pop(name), command.split()
        args = vars(tyro.cli(importlib.import_module(script.removesuffix(".py")).Args, args=flags))
        assert (python, name) == ("python", "{env_id}__{exp_name}__{seed}".format(**args))
        expected = {flag: value for flag, value in (defaults(run.script) | run.settings).items() if flag in args}
        assert {flag: args[flag] for flag in expected} == expected
    assert not by_directory


def test_the_study_of_depth_has_its_declared_flags_and_is_balanced_wherever_it_stops():
    dense, mst, expected = ("dense",) * 3, ("dense", "dst", "sst"), []
    agents = {"mrq": (4, 4, 3, *dense), "res": (6, 6, 5, *dense), "mst": (6, 6, 5, *mst)}
    for seed, depth, name in itertools.product(range(101, 109), (1, 5, 15), agents):
        line = f"""mst_mrq.py --env cartpole-swingup --seed {seed} --exp-name depth-{name}-d{depth} --hidden-dim 128
            --action-repeat 4 --batch-size 128 --buffer-size 20000 --learning-starts 1000 --total-timesteps 7000
            --eval-interval 1000 --eval-episodes 5 --topology-update-interval 250 --encoder-arch %s --critic-arch %s
            --actor-arch %s --encoder-regime %s --critic-regime %s --actor-regime %s --depth-scale {depth}"""
        expected.append((line % agents[name]).split())
    assert [run.arguments() for run in runs("depth")] == expected


def test_commands_of_some_values_seeds_and_tasks_get_what_follows_two_dashes(capsys):
    only = [word for x in ("critic-scale=1", "critic-scale=3", "growth=rigl") for word in ("--only", x)]
    main(["commands", "fig17", "--seeds", "1", "--envs", "a", *only, "--", "--no-cuda"])
    assert len(re.findall("mst_mrq.py --env a --seed 1 .* --no-cuda # a__mrq-.*__1\n", capsys.readouterr().out)) == 4


WRONG = {
    "commands fig99": "choose one of fig02", "commands fig06 --sedes 3": "unrecognized arguments: --sedes",
    "commands fig06 --seeds 0": "0 is not a number", "commands fig06 --only critic-arch=9": "choose from 1, 2, 3, 4, 5",
    "commands fig06 --only x=4": "choose from actor_arch", "commands fig06 -- --seed=4": "before --", "status ab": "ab",
}  # fmt: skip


@pytest.mark.parametrize(("line", "part"), WRONG.items())
def test_wrong_usage_is_one_line_that_says_what_to_do(capsys, line, part):
    with pytest.raises(SystemExit, match="2"):
        main(line.split())
    assert re.fullmatch(rf"error: .*{part}.*\n", capsys.readouterr().err)


def test_status_tells_the_state_of_every_run_and_which_commands_are_left(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = [f"python mst_sac.py --env=a --seed {seed}" for seed in range(6)]
    Path("a.txt").write_text("# seeds\n\n" + "\r\n".join(lines))
    for seed, step in enumerate([1000, 500, 500, "a", None]):
        run = Path(f"runs/a__mst_sac__{seed}")
        run.mkdir(parents=True)
        (run / "config.json").write_text('{"args": {"total_timesteps": 1000}}')
        if step:
            (run / "eval.csv").write_text(f"agent_step,wall_seconds\n{step},1000,12.5,1.0,5,7200.0\n")
    with open("runs/a__mst_sac__2/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        main(["status", "a.txt", "runs"])
        *found, counts = capsys.readouterr().out.splitlines()
        main(["status", "--todo", "a.txt"])
    assert ",".join(x[:18].strip() for x in found[:6]) == "finished,trained to 500,running,damaged,stopped,not started"
    assert re.fullmatch("finished +runs/a__mst_sac__0  return 12.5 after 2.00 h", found[0])
    assert counts == "11 runs: 2 finished, 2 trained in part, 2 running, 2 damaged, 2 stopped, 1 not started"
    assert capsys.readouterr().out.splitlines() == [lines[seed] for seed in (1, 3, 4, 5)]


STAND_IN = """
import fcntl, os, pathlib, signal, sys, time
flags, stop = dict(zip(sys.argv[1::2], sys.argv[2::2])), []
fcntl.flock(lock := open(flags["--seed"] + ".lock", "w"), fcntl.LOCK_EX | fcntl.LOCK_NB)
time.sleep(0.3)  # a signal ends it until here, as it ends a script that is being imported
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
    signal.signal(number, lambda number, _: stop.append(number))
print("gpu", os.environ.get("CUDA_VISIBLE_DEVICES"), "threads", os.environ["OMP_NUM_THREADS"], flush=True)
saved = pathlib.Path(flags["--seed"] + ".step")
step = int(saved.read_text()) if saved.exists() else 0
while step < int(flags.get("--steps", 0)) and not stop:
    time.sleep(0.01)
    step += 1
saved.write_text(str(step))
sys.exit(int(flags.get("--code", 75 if stop else 0)))
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start `run.sh` on lines where `t` takes steps, and saves how many. `scontrol` writes down how it is called."""
    monkeypatch.chdir(tmp_path)
    Path("t.py").write_text(STAND_IN)
    Path("bin").mkdir()
    programs = {"scontrol": "echo $* >>requeued", "nvidia-smi": "cat gpus", "t": f'exec {sys.executable} -S t.py "$@"'}
    for name, text in programs.items():
        Path("bin", name).write_text(f"#!/bin/bash\n{text}\n")
        Path("bin", name).chmod(0o755)

    def call(*lines: str, jobs: object = 1, **environ) -> subprocess.Popen:
        Path("a file").write_text("\n".join(lines))
        line, env = [RUN_SH, "--jobs", str(jobs), "a file"], {"PATH": f"bin:{os.environ['PATH']}", **environ}
        return subprocess.Popen(line, env=env, stdout=-1, stderr=-2, text=True, start_new_session=True)

    return call


def end(process: subprocess.Popen) -> tuple[int, str]:
    return process.wait(60), process.stdout.read()


def test_a_failure_stops_no_other_and_status_tells_how_it_ended(start, capsys):
    lines = ["", "# c", "t --env a --seed 1 --code 3 # ä/b\r", " OMP_NUM_THREADS=7 t --seed 2", "t --code 75 --seed 3"]
    lines += [f"t --seed {seed} --env a --code 1 " + 120 * "--x y " for seed in (4, 5)]  # too long for a file name
    code, out = end(start(*lines, jobs=2))
    assert (code, out.count("exit code 0"), out.count("gpu None threads")) == (75, 1, 3)  # the end of each failed log
    assert "threads 7" in Path("logs/OMP_NUM_THREADS=7-t---seed-2.log").read_text()
    main(["status", "a file"])
    logs = re.findall("failed .* (exit code .*): gpu", capsys.readouterr().out)
    assert logs[0] == "exit code 3, see logs/---b.log" and len(set(logs)) == 3


BAD = [{"jobs": jobs} for jobs in ("0", "", "a", "-1", "1.5", "1000", "08", "2 x")]
BAD += [{"line": line} for line in ("", "# a", "t 'a", "t; t", "t && t", "t | t", "t >a", "t $(a", "t \\", "t &")]
BAD += [{"SLURM_ARRAY_TASK_ID": task} for task in ("0", "-1", "2", "a", "08")]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_input_is_one_line_and_nothing_is_started(start, bad):
    code, out = end(start(bad.pop("line", "t --seed 1"), **bad))
    assert (code, out[:7], out.count("\n"), Path("logs").exists()) == (2, "error: ", 1, False)


def test_nothing_is_started_after_a_command_that_ends_with_2(start):
    for line in ("t --seed 1 --code 2", "no-such-program"):
        assert (end(start(line, "t --seed 2"))[0], Path("2.step").exists()) == (2, False)


GPU, MIG = "GPU {0}: A (UUID: GPU-a{0})\n", "  MIG 1g.5gb Device 0: (UUID: MIG-b1)\n"
IN_TURN = [
    ({"CUDA_VISIBLE_DEVICES": "2,GPU-7,MIG-GPU-8/1/0"}, "", ["2", "GPU-7", "MIG-GPU-8/1/0", "2"]),
    ({}, GPU.format(0) + GPU.format(1), ["GPU-a0", "GPU-a1"] * 2), ({}, GPU.format(0) + MIG, ["MIG-b1"] * 4),
    ({"SLURM_JOB_ID": "3"}, GPU.format(0), ["None"] * 4), ({"CUDA_VISIBLE_DEVICES": ""}, GPU.format(0), [""] * 4),
]  # fmt: skip


@pytest.mark.parametrize(("environ", "smi", "gpus"), IN_TURN, ids=str)
def test_commands_get_the_gpus_in_turn_and_their_share_of_the_cores(start, environ, smi, gpus):
    Path("gpus").write_text(smi)
    environ |= {"SLURM_CPUS_PER_TASK": "4(x2)", "SLURM_CPUS_ON_NODE": "9"}
    assert end(start(*(f"t --seed {i} --steps 50" for i in range(4)), jobs=4, **environ))[0] == 0
    logs = "".join(path.read_text() for path in sorted(Path("logs").iterdir()))
    assert re.findall("gpu (.*) threads 2", logs) == gpus


def test_a_task_of_an_array_takes_its_lines_and_the_last_one_says_what_is_left(start):
    array = {"SLURM_ARRAY_TASK_MAX": "2", "SLURM_CPUS_PER_TASK": ""}
    out = [end(start(*map("t --seed {}".format, range(5)), jobs=2, SLURM_ARRAY_TASK_ID=i, **array))[1] for i in "23"]
    assert sorted(path.name for path in Path().glob("*.step")) == ["2.step", "3.step", "4.step"]
    assert ["warning: 1 of 5 commands are in no task" in text for text in out] == [True, False]


@pytest.mark.parametrize("to", [os.kill, os.killpg])
def test_a_signal_at_any_moment_loses_no_step_and_leaves_no_process(start, to):
    done, lines = 0, [f"t --seed {i} --steps 150" for i in range(3)]
    for number in random.sample(["TERM", "INT", "USR1", "HUP", "QUIT"], 5):
        process = start(*lines, jobs=random.choice((2, 3)))
        time.sleep(0.05 + 1.5 * random.random() ** 2)
        to(process.pid, signal.Signals[f"SIG{number}"])
        code, out = end(process)
        for lock in Path().glob("*.lock"):  # nobody lives
            fcntl.flock(open(lock), fcntl.LOCK_EX | fcntl.LOCK_NB)
        before, done = done, sum(int(path.read_text()) for path in Path().glob("*.step"))
        assert code in (75, 0) and done >= before, (number, out)
    assert end(start(*lines, jobs=3))[0] == 0
    assert [Path(f"{i}.step").read_text() for i in range(3)] == ["150"] * 3


# After the warning of the time limit alone: not after a failure, or scancel. What it preempts, Slurm requeues by itself
REQUEUED = {("USR1", 75): True, ("USR1", 1): False, ("USR1", 0): False, ("TERM", 75): False, ("USR1 TERM", 75): False}


@pytest.mark.parametrize(("how", "requeued"), REQUEUED.items(), ids=str)
def test_a_task_requeues_itself_near_its_time_limit_if_a_command_has_to_go_on(start, how, requeued):
    environ = {"SLURM_JOB_ID": "21", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "1"}
    process = start(f"t --seed 1 --steps 6000 --code {how[1]}", **environ)
    while not any("gpu" in path.read_text() for path in Path().glob("logs/*")):
        time.sleep(0.02)
    for name in how[0].split():
        process.send_signal(signal.Signals[f"SIG{name}"])
    assert end(process)[0] == how[1]
    assert list(map(Path.read_text, Path().glob("requeued"))) == ["requeue 17_1\n"] * requeued
