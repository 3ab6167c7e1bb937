"""Runs from start to end: the same bits every time, resuming after any interruption, files that run no code."""

import functools
import importlib
import json
import os
import re
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

from conftest import ENVIRONMENT, ROOT, SCRIPTS, all_scripts, arguments, assert_one_error  # isort: skip
from conftest import assert_same_agent, assert_same_run, evaluations, life, scalars, start, unchanged, wait_for  # isort: skip

RESUME_ME = 75  # sysexits.h EX_TEMPFAIL, documented in the scripts' docstrings


def checkpoint_step(run_dir: Path) -> int | None:
    path = run_dir / "checkpoint.pt"
    return torch.load(path, weights_only=True)["run"]["step"] if path.exists() else None


def steps(values) -> dict[str, list[int]]:
    """At which steps there is a value of each tag."""
    return {tag: [step for other, step in values if other == tag] for tag, _ in values}


def test_a_command_gives_the_same_bits_and_is_silent_on_stderr(script, reference, run_dir, tmp_path):
    line, environ = [sys.executable, ROOT / f"{script}.py", *arguments(script, ())], os.environ | ENVIRONMENT
    child = subprocess.run(line, cwd=tmp_path, env=environ, stderr=subprocess.PIPE, timeout=300, check=True)
    assert child.stderr == b""
    assert_same_run(run_dir, reference)


@all_scripts
def test_a_run_leaves_logs_arguments_versions_weights_and_masks_but_no_checkpoint(reference):
    names = {path.name.split(".tfevents")[0] for path in reference.iterdir()}
    assert names == {".lock", "config.json", "eval.csv", "events.out", "agent.pt"}
    rows = [",".join(row[:2]) for row in evaluations(reference)]
    assert rows == ["agent_step,env_step", "0,0", "50,100", "100,200", "130,260"]
    logged = steps(scalars(reference))
    assert logged["eval/episode_return_mean"] == [0, 50, 100, 130]
    assert logged["losses/critic_loss"] == [40, 50, 60, 70, 80, 90, 100, 110, 120, 130]  # training starts at step 40
    assert set(logged["plasticity/critic_srank"]) >= {50, 100, 130}  # at 0 MR.Q has nothing to measure it on
    assert logged["charts/episodic_return"] == [40, 80, 120]
    config, saved = json.loads((reference / "config.json").read_text()), torch.load(reference / "agent.pt")
    assert config["versions"]["torch"] == torch.__version__
    assert saved.keys() == {"args", "run", "agent", "masks"}
    assert (saved["args"], saved["run"]["step"]) == (config["args"], 130)


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


@all_scripts
def test_a_run_killed_again_and_again_gives_the_same_bits(script, reference, run_dir, tmp_path):
    # One evaluation makes 80 calls of AgentEnv.step. A resumed run plays its episode again, then writes its checkpoint
    deaths = [  # call of a function, then what is on disk: step of the checkpoint, evaluations
        ("Path.replace", 1, None, 0),  # config.json is written, but not renamed
        ("AgentEnv.step", 50, None, 0),  # in the first evaluation
        ("Agent.optimize", 31, 30, 1),  # in an update
        ("Path.replace", 3, 60, 2),  # the checkpoint of 90 is written, but not renamed
        ("AgentEnv.step", 100, 90, 2),  # after 20 again and 40 new ones in the evaluation at 100
        ("os.fsync", 2, 90, 3),  # that evaluation is in eval.csv, but not in TensorBoard
        ("Path.replace", 3, 120, 4),  # agent.pt is written, but not renamed
        ("Path.unlink", 1, 120, 4),  # agent.pt is there, and so is the checkpoint still
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


def test_a_run_stopped_by_signals_says_resume_me_and_gives_the_same_bits(script, reference, run_dir, tmp_path):
    burst = "Agent.update_encoder"  # 20 of them follow each other: a run stops after this agent step, 40
    stops = [  # and the step of the checkpoint
        ([(burst, 5, signal.SIGUSR1), (burst, 7, signal.SIGTERM), (burst, 9, signal.SIGTERM)], 40),  # as Slurm does
        ([("AgentEnv.step", 40, signal.SIGINT)], 50),  # in the evaluation at 50
        ([("ReplayBuffer.add", 7, signal.SIGUSR1)], 57),  # between an environment's step and its update
    ]
    for at, step in stops:
        ended = life(script, cwd=tmp_path, at=at)
        assert (ended.code, ended.err) == (RESUME_ME, "")
        assert ended.out.splitlines()[-1] == f"stopped at agent step {step}; start the same command again to go on"
        assert checkpoint_step(run_dir) == step
    assert "at agent step 57" in life(script, cwd=tmp_path).out
    assert_same_run(run_dir, reference)


def test_a_second_sigint_ends_a_run_at_once(script, run_dir, tmp_path):
    twice = [("Agent.update_encoder", call, signal.SIGINT) for call in (5, 7)]
    assert life(script, cwd=tmp_path, at=twice).code == -signal.SIGINT
    assert checkpoint_step(run_dir) == 30


def with_dropout(module):
    make_networks = module.make_networks

    def add_dropout(*args):
        networks = make_networks(*args)
        for network in networks[-2:]:  # critic and actor
            network.register_forward_pre_hook(lambda net, x: (F.dropout(x[0], 0.2, net.training), *x[1:]))
        return networks

    module.make_networks = add_dropout


def check_mode(training, agent, _):
    assert {part.training for part in agent.modules()} == {training}


MODES = [(f"Agent.{name}", 0, functools.partial(check_mode, name == "train_step")) for name in ("act", "train_step")]


@pytest.mark.parametrize("script", ["mst_sac", "mst_mrq"])
def test_a_run_with_terminations_and_with_dropouts_that_someone_adds_resumes_exactly(script, tmp_path):
    flags, killed, whole = ["--env", "InvertedPendulum-v5", "--total-timesteps", "70"], tmp_path / "a", tmp_path / "b"
    death = ("ReplayBuffer.add", 68, signal.SIGKILL)
    assert life(script, *flags, cwd=killed, hook=with_dropout, at=death).code == -signal.SIGKILL
    for folder in (killed, whole):
        ended = life(script, *flags, cwd=folder, hook=with_dropout, at=MODES)
        assert (ended.code, ended.err) == (0, "")
        assert ("at agent step 60" in ended.out) == (folder == killed)
    (run_dir,), (other,) = killed.glob("runs/*"), whole.glob("runs/*")
    assert_same_run(run_dir, other)
    assert scalars(run_dir).get(("losses/encoder_terminal_loss", 70), 1) > 0  # of MR.Q, which has seen a termination


def test_a_run_of_an_environment_that_cannot_be_restored_goes_on_with_a_new_episode(script, interrupted, tmp_path):
    saved = torch.load(interrupted / "checkpoint.pt")
    saved["obs"][0] += 1  # as if the same seed and actions led elsewhere now
    torch.save(saved, interrupted / "checkpoint.pt")
    resumed = life(script, cwd=tmp_path)
    assert (resumed.code, resumed.err.count("\n")) == (0, 1)
    assert "cartpole-swingup cannot be restored" in resumed.err
    assert steps(scalars(interrupted))["charts/episodic_return"] == [70, 110]  # 40 steps each from 30 on


def flush_at_once(module):
    module.SummaryWriter = functools.partial(module.SummaryWriter, flush_secs=0.05)  # at 0 its thread would never rest


def test_tensorboard_that_watches_a_run_resume_shows_no_point_twice(script, reference, run_dir, tmp_path):
    death, flags = ("ReplayBuffer.add", 115, signal.SIGKILL), ["--checkpoint-interval", "50"]  # as the evaluations'
    assert life(script, *flags, cwd=tmp_path, at=death, hook=flush_at_once).code == -signal.SIGKILL
    live = EventAccumulator(str(run_dir), {"scalars": 0}).Reload()
    assert life(script, *flags, cwd=tmp_path).code == 0
    logged = steps(scalars(reference))
    for events in (EventAccumulator(str(run_dir), {"scalars": 0}), live):
        events.Reload()
        assert {tag: [x.step for x in events.Scalars(tag)] for tag in logged} == logged


@all_scripts
def test_what_never_moves_the_training_may_change_and_the_folder_may_move(script, reference, tmp_path):
    assert life(script, cwd=tmp_path, at=("Agent.act", 1, signal.SIGTERM)).code == RESUME_ME  # before all training
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    flags = "--runs-dir elsewhere --eval-interval 70 --eval-episodes 1 --eval-processes --log-interval 5"
    flags += " --no-diagnostics --checkpoint-interval 40 --cuda-graphs --wandb-project-name else"
    ended = life(script, *flags.split(), cwd=tmp_path)
    assert (ended.code, ended.err) == (0, "")
    moved = tmp_path / "elsewhere" / reference.name
    assert [row[0] for row in evaluations(moved)] == ["agent_step", "0", "70", "130"]
    assert_same_agent(moved, reference)
    ours, theirs = scalars(moved), scalars(reference)
    trained = {key: value for key, value in theirs.items() if key[0].startswith(("losses/", "charts/"))}
    assert trained == {key: ours[key] for key in trained}


@all_scripts
def test_a_finished_run_says_so_and_changes_no_file_and_other_arguments_are_refused_by_name(main, finished):
    with unchanged(finished):
        ended, other = main("--eval-interval", "60"), main("--critic-regime", "sst", "--batch-size", "17")
    assert (ended.code, ended.err) == (0, "")
    assert "is finished" in ended.out
    assert_one_error(other, 2, "batch_size 16 -> 17", "critic_regime dst -> sst", "--exp-name")
    config = json.loads((finished / "config.json").read_text())
    del config["args"]["drop_fraction"]  # a flag that the old run did not know is no difference at its default
    for unknown in ({}, {"eval_workers": 2}):
        (finished / "config.json").write_text(json.dumps({"args": config["args"] | unknown}))
        assert main().code == (2 if unknown else 0)
    assert_one_error(main("--drop-fraction", "0.3"), 2, "drop_fraction 0.5 -> 0.3, eval_workers 2 -> None")


def test_a_second_process_on_a_run_directory_is_refused_and_can_play_its_checkpoint(script, main, run_dir, tmp_path):
    first = start(script, cwd=tmp_path, at=("ReplayBuffer.add", 65, signal.SIGSTOP))
    try:
        wait_for(lambda: checkpoint_step(run_dir) == 60)
        with unchanged(run_dir):
            second = life(script, "--runs-dir", str(run_dir.parent), cwd=tmp_path / "second")
            assert_one_error(second, 1, "another process")
            played = main("--eval-only", str(run_dir), "--eval-episodes", "1")
        assert (played.code, played.err) == (0, "")
        assert "agent step 60: " in played.out
    finally:
        first.kill()


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("owned"),)


def flipped(path: Path) -> None:
    """One bit of a tensor. torch.load alone would not see it: it ignores the checksums."""
    tensor = max(torch.load(path)["agent"].values(), key=torch.numel).numpy().tobytes()
    path.write_bytes(path.read_bytes().replace(tensor, bytes([tensor[0] ^ 1]) + tensor[1:]))


DAMAGES = {
    "torn": lambda path: os.truncate(path, path.stat().st_size - 1000),
    "empty": lambda path: path.write_bytes(b""),
    "flipped": flipped,
    "of another program": lambda path: torch.save({"progress": 1}, path),
    "malicious": lambda path: torch.save(Malicious(), path),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_file_is_named_and_kept_and_runs_no_code(main, interrupted, reference, damage):
    damage(interrupted / "checkpoint.pt")
    with unchanged(interrupted):
        assert_one_error(main(), 1, "checkpoint.pt", "damaged")
    damage(Path(shutil.copy(reference / "agent.pt", interrupted)))
    with unchanged(interrupted):
        assert_one_error(main("--eval-only", str(interrupted)), 1, "agent.pt", "damaged")
    assert not Path("owned").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"args": 1}', "\xff"], ids=repr)
def test_a_damaged_config_is_named_and_kept(main, interrupted, content):
    (interrupted / "config.json").write_text(content, encoding="latin-1")
    with unchanged(interrupted):
        assert_one_error(main(), 1, "config.json")


# The largest file, the first that is larger, and the step of the checkpoint then
FULL = [(1000, "config.json", None), (8000, "TensorBoard", None), (20_000, "checkpoint", None), (160_000, "second", 30)]


@pytest.mark.parametrize(("largest", "file", "step"), FULL)
def test_a_full_disk_is_one_error_and_then_the_run_goes_on(script, reference, run_dir, tmp_path, largest, file, step):
    flags = ["--checkpoint-interval", "1000"] if file == "TensorBoard" else []
    assert_one_error(life(script, *flags, cwd=tmp_path, largest_file=largest), 1, "cannot write")
    assert (checkpoint_step(run_dir), list(run_dir.glob("checkpoint.tmp"))) == (step, [])
    assert life(script, cwd=tmp_path).code == 0
    assert_same_run(run_dir, reference)


def poison(path, content):
    next(iter(content["agent"].values())).view(-1)[0] = torch.nan


NOT_FINITE = [
    ("mst_mrq", "--encoder-lr 1e20", (), "losses/encoder_loss is nan"),
    ("mst_mrq", "--critic-lr 1e20 --critic-arch 1", (), "losses/actor_loss is nan"),  # a function of the critic
    ("mst_mrq", "--actor-lr 1e20 --actor-arch 1", (), "an action of the actor is not finite"),
    *((script, "", ("save", 2, poison), "a weight is not finite") for script in SCRIPTS),
]


@pytest.mark.parametrize(("script", "flags", "at", "culprit"), NOT_FINITE)
def test_what_is_not_finite_never_replaces_a_good_checkpoint(script, run_dir, tmp_path, flags, at, culprit):
    ended = life(script, *flags.split(), cwd=tmp_path, at=at)
    assert_one_error(ended, 1, culprit, f"agent step {60 if at else 40}", "last good checkpoint")
    assert checkpoint_step(run_dir) == 30


@all_scripts
def test_eval_only_plays_the_agent_of_a_run_the_same_every_time(main, finished):
    with unchanged(finished):
        first, again = (main("--eval-only", str(finished), "--no-cuda") for _ in range(2))
    assert (first.code, first.err) == (0, "")
    step, mean, returns = re.search(r"agent step (\d+): ([\d.]+) .*\[(.*)\]", first.out).groups()
    returns = [float(x) for x in returns.split()]
    assert (step, len(returns)) == ("130", 10)
    assert float(mean) == pytest.approx(np.mean(returns), abs=0.1)  # printed with one digit
    assert again.out == first.out


@all_scripts
def test_eval_only_refuses_what_it_cannot_play_and_flags_of_the_training(main, script):
    others = [vars(importlib.import_module(other).Args()) for other in SCRIPTS if other != script]
    for args in (*others, {"added": 1}):
        torch.save({"args": args, "run": {}, "agent": {}}, "agent.pt")
        assert_one_error(main("--eval-only", "."), 2, "another script's, with --")
    torch.save({"args": {}, "run": {}, "agent": {}}, "agent.pt")
    assert_one_error(main("--eval-only", ".", "--gamma", "0.5"), 2, "leave out --gamma")
    assert_one_error(main("--eval-only", "nowhere"), 1, "nowhere", "missing")


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
