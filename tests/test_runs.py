"""Runs from start to end: the same bits every time, resuming after any interruption, and nothing erased in silence."""

import errno
import functools
import importlib
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mst_mrq
import play

from conftest import ENVIRONMENT, ROOT, all_scripts, arguments, assert_one_error, assert_same_agent  # isort: skip
from conftest import assert_same_run, evaluations, life, scalars, start, unchanged, wait_for  # isort: skip

RESUME_ME = 75  # sysexits.h EX_TEMPFAIL, documented in the scripts' docstrings


def checkpoint_step(run_dir: Path) -> int | None:
    path = run_dir / "checkpoint.pt"
    return torch.load(path, weights_only=True)["run"]["step"] if path.exists() else None


def steps(values) -> dict[str, list[int]]:
    """At which steps there is a value of each tag."""
    return {tag: [step for other, step in values if other == tag] for tag, _ in values}


def process(script: str, *flags: str, cwd: Path, **how) -> subprocess.Popen:
    line = [sys.executable, ROOT / f"{script}.py", *arguments(script, flags)]
    return subprocess.Popen(line, cwd=cwd, env=os.environ | ENVIRONMENT, **how)


def test_a_command_gives_the_same_bits_and_is_silent_on_stderr(script, reference, run_dir, tmp_path):
    child = process(script, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = child.communicate(timeout=300)
    assert (child.returncode, err) == (0, "")
    assert "training from agent step 0: runs/cartpole-swingup__mst_mrq__1\n" in out
    assert_same_run(run_dir, reference)


@all_scripts
def test_a_run_leaves_logs_arguments_versions_weights_and_masks_but_no_checkpoint(reference, script):
    names = {path.name.split(".tfevents")[0] for path in reference.iterdir()}
    assert names == {".lock", "config.json", "eval.csv", "metrics.csv", "events.out", "agent.pt"}
    rows = [",".join(row[:2]) for row in evaluations(reference)]
    assert rows == ["agent_step,env_step", "0,0", "50,100", "100,200", "130,260"]
    logged = steps(scalars(reference))
    assert logged["eval/episode_return_mean"] == [0, 50, 100, 130]
    assert logged["losses/critic_loss"] == [40, 50, 60, 70, 80, 90, 100, 110, 120, 130]  # training starts at step 40
    assert logged["plasticity/critic_srank"] == [50, 100, 130]
    assert logged["charts/episodic_return"] == [40, 80, 120]
    board = EventAccumulator(str(reference), {"scalars": 0}).Reload()
    tags = set(board.Tags()["scalars"]) - {"charts/SPS"}
    assert logged == {tag: [x.step for x in board.Scalars(tag)] for tag in tags}
    config, saved = json.loads((reference / "config.json").read_text()), torch.load(reference / "agent.pt")
    assert (config["script"], config["versions"]["torch"][:4]) == (script, torch.__version__[:4])  # "2.13"
    zeros = sum(int((~mask).sum()) for mask in saved["masks"]["critic"].values())
    size = sum(x.numel() for name, x in saved["agent"].items() if name.startswith("critic."))
    assert config["modules"]["critic"] == {"parameters": size, "active_parameters": size - zeros}
    assert (saved["args"], saved["step"]) == (config["args"], 130)


# Without AVX these move by 3e-6 of their size; with learning rates of MR.Q that are 1% larger, by 1e-3 or more. If an
# algorithm changes on purpose, record anew and say in CHANGELOG.md why results of before no longer compare
RETURNS_AND_CRITIC_LOSS = {  # at agent steps 0, 50, 100 and 130, and at 130; commit ebd789d, torch 2.13.0, 2026-11-25
    "mst_sac": ([6.116825, 1.298344, 1.318380, 1.862466], 0.003171046),
    "mst_ddpg": ([6.527475, 1.573465, 2.097785, 2.912232], 0.004156706),
    "mst_mrq": ([5.075032, 5.018826, 2.324601, 0.932619], 2.034600),
    "mst_mrsac": ([2.887878, 3.510269, 5.422519, 5.920511], 2.209712),
}


@all_scripts
def test_a_short_run_gives_the_returns_and_the_loss_recorded(script, reference):
    returns, critic_loss = RETURNS_AND_CRITIC_LOSS[script]
    assert [float(mean) for _, _, mean, *_ in evaluations(reference)[1:]] == pytest.approx(returns, rel=1e-4)
    assert scalars(reference)["losses/critic_loss", 130] == pytest.approx(critic_loss, rel=1e-4)


@pytest.mark.parametrize(("env_id", "limit"), [("cartpole-swingup", 50), ("InvertedPendulum-v5", 45)])
def test_returns_of_an_evaluation_are_those_of_each_episode_alone(env_id, limit):
    args, seeds = mst_mrq.Args(env_id=env_id, max_episode_steps=limit, width_scale=0.03, buffer_size=9), [7, 8, 9]
    env, alone = mst_mrq.make_env(args), np.zeros(len(seeds))
    agent = mst_mrq.Agent(args, env.observation_space.shape[0], env.action_space.shape[0], torch.device("cpu"))
    for i, seed in enumerate(seeds):
        obs, over = env.reset(seed=seed)[0], False
        while not over:
            obs, reward, terminated, truncated, _ = env.step(agent.act(obs[None])[0])
            alone[i], over = alone[i] + reward, terminated or truncated
    envs = [mst_mrq.make_env(args) for _ in range(3)]
    for _ in range(2):  # nothing of an evaluation matters for the next one
        assert mst_mrq.evaluate(agent, envs, seeds) == pytest.approx(alone, rel=1e-5)  # batches of 3
    assert len(set(alone)) > 1


@all_scripts
def test_a_run_killed_again_and_again_gives_the_same_bits(script, reference, run_dir, tmp_path):
    # One evaluation makes 160 steps of DMControl. A resumed run plays its episode again
    deaths = [  # call of a function, then what is on disk: step of the checkpoint, evaluations
        ("Path.replace", 1, None, 0),  # config.json is written, but not renamed
        ("Path.replace", 2, None, 0),  # so is the first checkpoint
        ("DMControl.step", 50, 0, 0),  # in the first evaluation
        ("Path.replace", 3, 0, 0),  # the evaluation at 0 is in metrics.csv, but not in eval.csv
        ("Agent.optimize", 31, 30, 1),  # in an update
        ("os.fsync", 4, 56, 2),  # eval.csv has the evaluation at 50, a checkpoint after it is half written
        ("torch.save", 3, 109, 3),  # agent.pt is not there yet, so neither is the last evaluation
        ("Path.unlink", 1, 109, 4),  # agent.pt and all of eval.csv are there, and so is the checkpoint still
    ]
    for death, (name, call, step, rows) in enumerate(deaths):
        assert life(script, cwd=tmp_path, at=(name, call, signal.SIGKILL)).code == -signal.SIGKILL
        assert (checkpoint_step(run_dir), len(evaluations(run_dir))) == (step, rows and 1 + rows)
        assert (run_dir / "config.json").exists() == (death > 0)
    with unchanged(run_dir):
        last = life(script, cwd=tmp_path)
    assert (last.code, last.err) == (0, "")
    assert "is finished" in last.out
    assert_same_run(run_dir, reference)


@pytest.mark.parametrize("to", [(), ("group",)], ids=["process", "group"])
def test_a_run_stopped_by_signals_says_resume_me_and_gives_the_same_bits(script, reference, run_dir, tmp_path, to):
    burst = "Agent.update_encoder"  # 20 of them follow each other: a run stops after this agent step, 40
    stops = [  # and the step of the checkpoint
        ([(burst, 5, signal.SIGUSR1, *to), *((burst, call, signal.SIGTERM) for call in (7, 9))], 40),  # as Slurm does
        ([("DMControl.step", 40, signal.SIGINT, *to)], 50),  # in the evaluation at 50
        ([("ReplayBuffer.add", 7, signal.SIGHUP, *to)], 57),  # between an environment's step and its update
        ([("torch.save", 1, signal.SIGTERM, *to)], 82),  # in a checkpoint
    ]
    for at, step in stops:
        ended = life(script, cwd=tmp_path, at=at)
        assert (ended.code, ended.err) == (RESUME_ME, "")
        assert ended.out.splitlines()[-1] == f"stopped at agent step {step}; start the same command again to go on"
        assert checkpoint_step(run_dir) == step
    assert "training from agent step 82" in life(script, cwd=tmp_path).out
    assert_same_run(run_dir, reference)


def test_a_second_sigint_ends_a_run_at_once(script, run_dir, tmp_path):
    twice = [("Agent.update_encoder", call, signal.SIGINT) for call in (5, 7)]
    assert life(script, cwd=tmp_path, at=twice).code == -signal.SIGINT
    assert checkpoint_step(run_dir) == 30


def ignoring_sighup(module):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does


def test_under_nohup_a_run_goes_on_when_its_terminal_closes(script, reference, run_dir, tmp_path):
    at = ("ReplayBuffer.add", 50, signal.SIGHUP)
    assert life(script, cwd=tmp_path, at=at, hook=ignoring_sighup).code == 0
    assert_same_run(run_dir, reference)


@pytest.mark.parametrize("trial", range(4))
def test_a_terminal_that_closes_leaves_a_checkpoint(script, run_dir, tmp_path, trial):
    ours, terminal = pty.openpty()
    flags = ("--total-timesteps", "1000000", "--eval-interval", "3")  # it prints all the time
    child = process(script, *flags, cwd=tmp_path, stdout=terminal, stderr=terminal, start_new_session=True)
    os.close(terminal)
    wait_for(lambda: b"agent step        12" in os.read(ours, 10_000))
    os.close(ours)
    child.send_signal(signal.SIGHUP)  # as the kernel does for the terminal that controls a process
    assert child.wait(60) == RESUME_ME
    assert checkpoint_step(run_dir) >= 12


@pytest.mark.parametrize("how", ["pipe", "closed"])
def test_where_nobody_reads_the_output_a_run_trains_to_its_end(script, reference, run_dir, tmp_path, how):
    line = " ".join([sys.executable, str(ROOT / f"{script}.py"), *arguments(script, ())])
    line = f"{line} | head -n 1; exit ${{PIPESTATUS[0]}}" if how == "pipe" else f"{line} >&- 2>&-"
    assert subprocess.run(["bash", "-c", line], cwd=tmp_path, env=os.environ | ENVIRONMENT, timeout=300).returncode == 0
    assert_same_run(run_dir, reference)


def test_lines_of_a_run_are_in_a_file_at_once(script, tmp_path):
    with open(tmp_path / "log", "w") as log:
        child = process(script, "--total-timesteps", "1000000", cwd=tmp_path, stdout=log, stderr=log)
    try:
        wait_for(lambda: "agent step        50  return" in (tmp_path / "log").read_text())
    finally:
        child.kill()


def with_dropout_and_batch_norm(module):
    make_networks = module.make_networks

    def add(*args):
        networks = make_networks(*args)
        for network in networks[-2:]:  # critic and actor
            network.register_forward_pre_hook(lambda net, x: (F.dropout(x[0], 0.2, net.training), *x[1:]))
        network.extra = torch.nn.BatchNorm1d(next(network.parameters()).shape[1])
        network.register_forward_pre_hook(lambda net, x: (net.extra(x[0]), *x[1:]))
        return networks

    module.make_networks = add


def check_mode(training, agent, _):
    assert {part.training for part in agent.modules()} == {training}


MODES = [(f"Agent.{name}", 0, functools.partial(check_mode, name == "train_step")) for name in ("act", "train_step")]


@pytest.mark.parametrize("script", ["mst_sac", "mst_mrq"])
def test_a_run_with_terminations_and_with_dropout_and_batch_norm_that_someone_adds_resumes_exactly(script, tmp_path):
    flags, killed, whole = ["--env", "InvertedPendulum-v5", "--total-timesteps", "70"], tmp_path / "a", tmp_path / "b"
    death, hook = ("ReplayBuffer.add", 68, signal.SIGKILL), with_dropout_and_batch_norm
    assert life(script, *flags, cwd=killed, hook=hook, at=death).code == -signal.SIGKILL
    for folder in (killed, whole):
        ended = life(script, *flags, cwd=folder, hook=hook, at=MODES)
        assert (ended.code, ended.err) == (0, "")
        assert ("from agent step 5" in ended.out) == (folder == killed)
    (run_dir,), (other,) = killed.glob("runs/*"), whole.glob("runs/*")
    assert_same_run(run_dir, other)
    assert scalars(run_dir).get(("losses/encoder_terminal_loss", 70), 1) > 0  # of MR.Q, which has seen a termination


def test_a_run_of_an_environment_that_cannot_be_restored_goes_on_with_a_new_episode(script, interrupted, tmp_path):
    saved = torch.load(interrupted / "checkpoint.pt")
    saved["run"]["obs"][0] += 1  # as if the same seed and actions led elsewhere now
    torch.save(saved, interrupted / "checkpoint.pt")
    resumed = life(script, cwd=tmp_path)
    assert (resumed.code, resumed.err.count("\n")) == (0, 1)
    assert "cartpole-swingup cannot be restored exactly" in resumed.err
    assert steps(scalars(interrupted))["charts/episodic_return"] == [70, 110]  # 40 steps each from 30 on


def flush_at_once(module):
    module.SummaryWriter = functools.partial(module.SummaryWriter, flush_secs=0.05)  # at 0 its thread would never rest


def test_tensorboard_that_watches_a_run_resume_shows_no_point_twice(script, reference, run_dir, tmp_path):
    assert life(script, cwd=tmp_path, at=("ReplayBuffer.add", 80, signal.SIGKILL), hook=flush_at_once).code == -9
    live = EventAccumulator(str(run_dir), {"scalars": 0}).Reload()
    assert life(script, cwd=tmp_path).code == 0
    for events in (EventAccumulator(str(run_dir), {"scalars": 0}), live):
        events.Reload()
        for tag, logged in steps(scalars(reference)).items():
            assert [x.step for x in events.Scalars(tag)] == logged


@all_scripts
def test_what_never_moves_the_training_may_change_and_the_folder_may_move(script, reference, tmp_path):
    assert life(script, cwd=tmp_path, at=("Agent.act", 1, signal.SIGTERM)).code == RESUME_ME  # before all training
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    flags = "--runs-dir elsewhere --eval-interval 70 --eval-episodes 1 --log-interval 5 --checkpoint-minutes 1"
    ended = life(script, *flags.split(), cwd=tmp_path)
    assert (ended.code, ended.err) == (0, "")
    moved = tmp_path / "elsewhere" / reference.name
    assert [row[0] for row in evaluations(moved)] == ["agent_step", "0", "70", "130"]
    assert_same_agent(moved, reference)
    trained = {k: value for k, value in scalars(reference).items() if k[0].startswith(("losses/", "charts/"))}
    assert trained == {key: scalars(moved)[key] for key in trained}


@pytest.mark.parametrize("left", [("agent.pt", "eval.csv", "config.json"), ("eval.csv", "config.json")])
def test_a_finished_run_stays_as_it_is_whatever_of_it_was_deleted(main, finished, left):
    for path in finished.iterdir():
        if path.name not in left:
            path.unlink()
    with unchanged(finished):
        ended, other = main("--eval-interval", "60"), main("--critic-regime", "sst", "--batch-size", "17")
    assert (ended.code, ended.err) == (0, "")
    assert "is finished" in ended.out
    assert_one_error(other, 2, "batch_size 16 -> 17", "critic_regime dst -> sst", "--exp-name")
    assert {path.name for path in finished.iterdir()} == set(left)


GONE = ["checkpoint.pt", "config.json", "checkpoint.pt eval.csv", "checkpoint.pt eval.csv metrics.csv"]


@pytest.mark.parametrize("gone", GONE)
def test_results_without_a_checkpoint_or_its_config_are_kept_and_named(main, interrupted, gone):
    if "metrics.csv" in gone:  # agent.pt alone is left
        shutil.copy(interrupted / "checkpoint.pt", interrupted / "agent.pt")
    for name in gone.split():
        (interrupted / name).unlink()
    with unchanged(interrupted):
        assert_one_error(main(), 2, interrupted.name, "results, but no checkpoint.pt", "--exp-name")


def test_a_run_with_a_flag_that_is_unknown_or_missing_today_is_compared_by_defaults(main, finished):
    config = json.loads((finished / "config.json").read_text())
    del config["args"]["drop_fraction"]  # a flag that the old run did not know is no difference at its default
    for unknown in ({}, {"eval_workers": 2}):
        (finished / "config.json").write_text(json.dumps({"args": config["args"] | unknown}))
        assert main().code == (2 if unknown else 0)
    assert_one_error(main("--drop-fraction", "0.3"), 2, "drop_fraction 0.5 -> 0.3, eval_workers 2 -> None")


def test_a_second_process_on_a_run_directory_is_sent_away_and_its_checkpoint_plays(script, run_dir, tmp_path, capsys):
    first = start(script, cwd=tmp_path, at=("ReplayBuffer.add", 65, signal.SIGSTOP))
    try:
        wait_for(lambda: (checkpoint_step(run_dir) or 0) > 50)
        second = life(script, "--runs-dir", str(run_dir.parent), cwd=tmp_path / "second")
        assert_one_error(second, 75, "another process")
        play.main(run_dir, episodes=2)
        assert "checkpoint.pt: " in capsys.readouterr().out
    finally:
        first.kill()


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("owned"),)


def test_a_damaged_or_malicious_checkpoint_is_named_and_kept_and_runs_no_code(main, interrupted):
    path = interrupted / "checkpoint.pt"
    for damage, *how in ((os.truncate, path, 1000), (os.truncate, path, 0), (torch.save, Malicious(), path)):
        damage(*how)
        with unchanged(interrupted):
            assert_one_error(main(), 2, "checkpoint.pt cannot be read")
    assert not Path("owned").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"args": 1}', "\xff"], ids=repr)
def test_a_damaged_config_is_named_and_kept(main, interrupted, content):
    (interrupted / "config.json").write_text(content, encoding="latin-1")
    with unchanged(interrupted):
        assert_one_error(main(), 2, interrupted.name)


def test_after_a_full_disk_a_run_goes_on(script, reference, run_dir, tmp_path):
    ended = life(script, cwd=tmp_path, largest_file=20_000)
    assert ended.code == 1
    assert f"OSError: [Errno {errno.EFBIG}] File too large" in ended.err
    assert life(script, cwd=tmp_path).code == 0
    assert_same_run(run_dir, reference)


def opens_a_missing_file(module):
    module.Agent.train_step = lambda agent, rb: open("weights of mine")


def has_a_wrong_size(module):
    block = module.Block.__init__
    module.Block.__init__ = lambda self, hidden_dim: (
        block(self, hidden_dim), setattr(self, "linear2", torch.nn.Linear(1, 1)))[0]  # fmt: skip


@pytest.mark.parametrize(("mistake", "words"), [(opens_a_missing_file, "weights of mine"), (has_a_wrong_size, "mat1")])
def test_a_mistake_in_a_copied_script_keeps_its_traceback(script, tmp_path, mistake, words):
    ended = life(script, cwd=tmp_path, hook=mistake)
    assert ended.code == 1
    assert "Traceback" in ended.err and words in ended.err


def other_activation(module):
    block = module.Block.__init__
    module.Block.__init__ = lambda self, dim: (block(self, dim), setattr(self, "relu", torch.nn.SiLU()))[0]


def test_another_activation_ends_with_the_place_to_change(tmp_path):
    last = life("mst_sac", cwd=tmp_path, hook=other_activation).err.splitlines()[-1]
    assert "ReLU" in last and "diagnose()" in last


@pytest.mark.parametrize("flags", ["--encoder-lr 1e20", "--critic-lr 1e20 --critic-arch 1"])
def test_losses_that_are_not_finite_end_the_run_in_a_line_that_names_them(script, run_dir, tmp_path, flags):
    assert_one_error(life(script, *flags.split(), cwd=tmp_path), 1, "losses/", "nan", "agent step 40", "learning rate")
    assert checkpoint_step(run_dir) == 30


def test_the_speed_is_that_of_the_training_and_a_clock_that_stands_still_is_no_error(script, tmp_path, run_dir):
    assert life(script, cwd=tmp_path).code == 0
    speed = [line.split(",") for line in (run_dir / "metrics.csv").read_text().splitlines() if "charts/SPS" in line]
    assert [int(step) for step, *_ in speed] == [40, 50, 60, 70, 80, 90, 100, 110, 120, 130]
    # a second each for the step, and for each of the lines before: (130 - 39) steps in 91 + 9 seconds
    assert float(speed[-1][2]) == pytest.approx(91 / 101, rel=0.05)


@all_scripts
@pytest.mark.parametrize(("regime", "first", "last"), [("s2d", 0.6, 0), ("d2s", 0, 0.6)])
def test_every_module_follows_its_regime(script, run_dir, tmp_path, regime, first, last):
    modules = importlib.import_module(script).MODULES
    flags = [word for name in modules for word in (f"--{name}-regime", regime, f"--{name}-sparsity", "0.6")]
    flags += ["--topology-update-interval", "7", "--total-timesteps", "70"]
    assert life(script, *flags, cwd=tmp_path).code == 0
    saved, values = torch.load(run_dir / "agent.pt"), scalars(run_dir)
    for name in modules:
        sparsities = values[f"sparsity/{name}_sparsity", 0], values[f"sparsity/{name}_sparsity", 70]
        assert sparsities == pytest.approx((first, last), abs=0.03)  # few weights, rounded down
        assert values[f"sparsity/{name}_topology_updates", 70] >= 31 // 7  # updates from step 40 on
        for key, mask in saved["masks"][name].items():
            assert not saved["agent"][f"{name}.{key}"][~mask].any()


@all_scripts
def test_play_plays_the_agent_of_a_run_the_same_every_time(finished, monkeypatch, capsys):
    outs = []
    with unchanged(finished):
        for _ in range(2):
            play.main(finished, episodes=3)
            outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1]
    mean, returns = outs[0].split(": ")[1].split(" +-")[0], outs[0].split("[")[1].rstrip("]\n").split()
    assert float(mean) == pytest.approx(np.mean([float(x) for x in returns]), abs=0.1)  # printed with one digit


def test_play_films_an_episode_or_says_that_there_is_no_run(finished, tmp_path):
    line = [sys.executable, ROOT / "play.py", finished, "--episodes", "1", "--video"]
    environ = {key: value for key, value in os.environ.items() if key != "MUJOCO_GL"}
    child = subprocess.run(line, env=environ | ENVIRONMENT, capture_output=True, text=True, timeout=120)
    if "EGL" in child.stderr and child.returncode:
        pytest.skip("this machine has no EGL")
    assert (finished / "video.mp4").stat().st_size > 1000
    child = subprocess.run([sys.executable, ROOT / "play.py", tmp_path], capture_output=True, text=True, timeout=120)
    assert (child.returncode, child.stderr.count("\n")) == (1, 1)
    assert "name the folder of a run" in child.stderr


def test_the_commit_is_found_in_a_folder_whose_name_is_shell_code_and_git_may_be_missing(script, tmp_path):
    copy = tmp_path / "$(touch owned)'; touch owned; '"
    copy.mkdir()
    for name in (f"{script}.py", "sparse_utils.py"):
        shutil.copy(ROOT / name, copy)
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "first"]):
        subprocess.run(["git", *words], cwd=copy, check=True)
    for path, length in ((os.environ["PATH"], 40), ("/nowhere", 0)):
        flags = arguments(script, ("--total-timesteps", "1", "--exp-name", f"{length}"))
        environ = {**os.environ, **ENVIRONMENT, "PYTHONPATH": "", "PATH": path}
        line, how = [sys.executable, copy / f"{script}.py", *flags], {"capture_output": True, "text": True}
        child = subprocess.run(line, cwd=tmp_path, env=environ, timeout=120, **how)
        assert (child.returncode, child.stderr.count("\n")) == (0, 1)  # the warning that nothing is trained
        config = json.loads((tmp_path / f"runs/cartpole-swingup__{length}__1/config.json").read_text())
        assert len(config["git_commit"] or "") == length
    assert not list(tmp_path.rglob("owned"))
