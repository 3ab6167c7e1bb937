"""Runs from start to end: the same bits every time, resuming after any interruption, files that run no code.

Runs are real processes (see conftest.py). What a run must give is what an uninterrupted run of the same command gives.
"""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ENVIRONMENT,
    ROOT,
    RUN,
    FixedBatch,
    assert_one_error,
    assert_same_agent,
    assert_same_run,
    command,
    evaluations,
    life,
    scalars,
    start,
    tiny,
    unchanged,
)

import mst_mrq

RESUME_ME = 75  # sysexits.h EX_TEMPFAIL, documented in the scripts' docstrings


def checkpoint_step(run_dir):
    path = run_dir / "checkpoint.pt"
    return torch.load(path, weights_only=True)["progress"]["agent_step"] if path.exists() else None


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


@pytest.fixture
def run_dir(script, tmp_path):
    return tmp_path / str(RUN).format(script)


@pytest.fixture
def finished(reference, run_dir):
    """A copy of the finished reference run, at the same path relative to the working directory."""
    return shutil.copytree(reference, run_dir)


@pytest.fixture(scope="session")
def interrupted_once(script, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("interrupted")
    assert life(script, cwd=cwd, at=("torch.save", 2, signal.SIGKILL)).code == -signal.SIGKILL
    return cwd / str(RUN).format(script)


@pytest.fixture
def interrupted(interrupted_once, run_dir):
    """A run killed before its second checkpoint was written: it holds the first, at agent step 30."""
    return shutil.copytree(interrupted_once, run_dir)


# The same bits ------------------------------------------------------------------------------------------------------


def test_two_runs_of_one_command_give_the_same_bits(script, reference, run_dir, tmp_path):
    assert life(script, cwd=tmp_path).code == 0
    assert_same_run(run_dir, reference)


def test_a_run_logs_every_evaluation_and_the_losses_of_every_interval(reference):
    assert [row[:2] for row in evaluations(reference)] == [
        ["agent_step", "env_step"], ["0", "0"], ["50", "500"], ["100", "1000"], ["130", "1300"],
    ]  # fmt: skip
    steps = {}
    for tag, step in scalars(reference):
        steps.setdefault(tag, []).append(step)
    assert steps["eval/episode_return_mean"] == [0, 50, 100, 130]
    assert steps["losses/critic_loss"] == [40, 50, 60, 70, 80, 90, 100, 110, 120, 130]  # training starts at step 40
    assert steps["plasticity/critic_srank"] == [50, 100, 130]  # at 0 there is nothing to measure it on


@pytest.mark.parametrize(
    "flags",
    [["--no-diagnostics"], ["--eval-interval", "70", "--eval-episodes", "1"]],
    ids=["diagnostics", "evaluation"],
)
def test_measuring_never_moves_the_training(script, reference, run_dir, tmp_path, flags):
    assert life(script, *flags, cwd=tmp_path).code == 0
    assert_same_agent(run_dir, reference)

    def losses(folder):
        return {key: value for key, value in scalars(folder).items() if key[0].startswith(("losses/", "charts/"))}

    assert losses(run_dir) == losses(reference)


# Interrupted and started again --------------------------------------------------------------------------------------


def test_a_run_killed_again_and_again_gives_the_same_bits(script, reference, run_dir, tmp_path):
    # Checkpoints at 30, 60, 90 and 120, evaluations at 0, 50, 100 and 130 (100 calls of act each), 20 encoder updates
    # at 40, 60, ..., the episode ends at 100
    deaths = [  # call of a function, then what is on disk: step of the checkpoint, evaluations
        ("Agent.act", 50, None, 0),  # in the first evaluation
        ("Agent.update_encoder", 31, 30, 2),  # in the second burst of encoder updates
        ("os.replace", 2, 60, 2),  # the checkpoint of 90 is written, but not renamed
        ("Agent.act", 90, 90, 2),  # in the evaluation at 100
        ("os.fsync", 1, 90, 3),  # that evaluation is in eval.csv, but not in TensorBoard
        ("os.replace", 2, 120, 4),  # agent.pt is written, but not renamed
    ]
    for name, call, step, rows in deaths:
        assert life(script, cwd=tmp_path, at=(name, call, signal.SIGKILL)).code == -signal.SIGKILL
        assert checkpoint_step(run_dir) == step
        assert len(evaluations(run_dir)) - 1 == rows if rows else not (run_dir / "eval.csv").exists()
    last = command(script, cwd=tmp_path)
    assert (last.code, last.err) == (0, "")
    assert "at agent step 120" in last.out
    assert_same_run(run_dir, reference)


def test_a_run_stopped_by_signals_says_resume_me_and_gives_the_same_bits(script, reference, run_dir, tmp_path):
    stops = [
        ("Agent.update_encoder", 5, signal.SIGTERM),  # in a burst of 20 encoder updates
        ("Agent.act", 60, signal.SIGINT),  # in the evaluation at 50
        ("ReplayBuffer.add", 7, signal.SIGUSR1),  # between two of its steps
    ]
    for stop in stops:
        ended = life(script, cwd=tmp_path, at=stop)
        assert (ended.code, ended.err) == (RESUME_ME, "")
        assert "start the same command again" in ended.out.splitlines()[-1]
    assert life(script, cwd=tmp_path).code == 0
    assert_same_run(run_dir, reference)


def test_an_overlapped_run_makes_the_same_91_updates_and_gives_the_same_bits_after_any_interruption(
    script, reference, tmp_path
):
    update, folders = "Agent.update_critic_and_actor", [tmp_path / "whole", tmp_path / "interrupted"]
    for folder in folders:
        folder.mkdir()
    whole, interrupted = folders
    assert life(script, "--overlap", cwd=whole, at=(update, 92, signal.SIGKILL)).code == 0  # there is none
    stops = [
        ("Agent.update_encoder", 31, signal.SIGTERM, RESUME_ME),  # in a burst, with the next action chosen
        ("ReplayBuffer.add", 3, signal.SIGUSR1, RESUME_ME),  # between its choice and its update
        (update, 45, signal.SIGKILL, -signal.SIGKILL),
        ("Agent.act", 150, signal.SIGTERM, RESUME_ME),  # in an evaluation
    ]
    for name, call, number, code in stops:
        assert life(script, "--overlap", cwd=interrupted, at=(name, call, number)).code == code
    assert life(script, "--overlap", cwd=interrupted).code == 0
    run_dirs = [folder / str(RUN).format(script) for folder in folders]
    assert_same_run(*run_dirs)
    last_update = life(script, "--overlap", "--seed", "2", cwd=whole, at=(update, 91, signal.SIGKILL))
    assert last_update.code == -signal.SIGKILL  # from step 40 to step 130
    ours, plain = scalars(run_dirs[0]), scalars(reference)
    assert ours.keys() == plain.keys()
    first = ("losses/critic_loss", 40)  # of what the random actions led to
    assert ours[first] == plain[first]
    assert ours["losses/critic_loss", 130] != plain["losses/critic_loss", 130]


def test_a_command_at_scale_1_exits_within_ten_seconds_of_sigterm(script, run_dir, tmp_path):
    flags = [*tiny(script), "--width-scale", "1", "--batch-size", "256", "--target-network-frequency", "250"]
    line = [sys.executable, ROOT / f"{script}.py", *flags, "--eval-interval", "1000", "--log-interval", "1"]
    with subprocess.Popen(line, cwd=tmp_path, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, text=True) as child:
        try:
            wait_for((run_dir / "checkpoint.pt").exists)  # at agent step 30; 250 encoder updates follow at 40
            child.send_signal(signal.SIGTERM)
            out, _ = child.communicate(timeout=10)
        finally:
            child.kill()
    assert child.returncode == RESUME_ME
    assert "start the same command again" in out.splitlines()[-1]


@pytest.mark.parametrize("env_id", ["InvertedPendulum-v5", "Hopper-v5", "Pendulum-v1"])
def test_gymnasium_environments_train_and_resume(script, tmp_path, env_id):
    flags = ["--env", env_id, "--total-timesteps", "90", "--eval-interval", "45", "--exp-name", "gym"]
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    assert life(script, *flags, cwd=tmp_path / "whole").code == 0
    killed = life(script, *flags, cwd=tmp_path / "killed", at=("Agent.update_encoder", 43, signal.SIGKILL))
    assert killed.code == -signal.SIGKILL
    resumed = life(script, *flags, cwd=tmp_path / "killed")
    assert (resumed.code, resumed.err) == (0, "")
    assert "at agent step 60" in resumed.out
    name = Path("runs", f"{env_id}__gym__1")
    assert_same_run(tmp_path / "killed" / name, tmp_path / "whole" / name)
    if env_id == "InvertedPendulum-v5":  # falls within a few steps: the encoder learns from terminations
        assert scalars(tmp_path / "whole" / name)["losses/encoder_terminal_loss", 90] > 0


def test_a_run_moves_with_its_folder(script, reference, interrupted, tmp_path):
    moved = (tmp_path / "runs").rename(tmp_path / "elsewhere")
    assert life(script, "--runs-dir", "elsewhere", cwd=tmp_path).code == 0
    assert_same_run(moved / interrupted.name, reference)


# Run directories ----------------------------------------------------------------------------------------------------


def test_a_finished_run_says_so_and_changes_no_file(main, finished):
    with unchanged(finished):
        ended = main()
    assert (ended.code, ended.err) == (0, "")
    assert "is finished" in ended.out


def test_other_arguments_are_refused_by_name(main, interrupted):
    with unchanged(interrupted):
        ended = main("--gamma", "0.9", "--critic-regime", "sst")
    assert_one_error(ended, 2, "gamma 0.99 -> 0.9", "critic_regime dst -> sst")


def test_a_second_process_on_a_run_directory_is_refused(script, main, run_dir, tmp_path):
    first = start(script, cwd=tmp_path, at=("Agent.act", 9, signal.SIGSTOP))
    try:
        wait_for(lambda: list(run_dir.glob("events.*")))
        assert_one_error(main(), 1, "another process")
    finally:
        first.kill()


@pytest.mark.parametrize("name", ["checkpoint.pt", "agent.pt"])
def test_saved_files_hold_tensors_and_plain_values_alone(finished, name):
    assert isinstance(torch.load(finished / name, weights_only=True), dict)


@pytest.mark.parametrize("dump", [pickle.dump, torch.save], ids=["pickle", "torch"])
def test_a_malicious_checkpoint_runs_no_code(main, interrupted, tmp_path, dump):
    class Malicious:
        def __reduce__(self):
            return Path.touch, (tmp_path / "owned",)

    with open(interrupted / "checkpoint.pt", "wb") as file:
        dump(Malicious(), file)
    with unchanged(interrupted):
        assert_one_error(main(), 1, "checkpoint.pt")
        assert_one_error(main("--eval-only", str(interrupted / "checkpoint.pt")), 1, "checkpoint.pt")
    assert not (tmp_path / "owned").exists()


def torn(path):
    return path.read_bytes()[:-1000]


def empty(_path):
    return b""


def flipped(path):
    """One bit in the middle of the largest tensor. torch.load alone would not see it: it ignores the checksums."""
    content = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        largest = max(file.infolist(), key=lambda record: record.file_size * ("/data/" in record.filename))
        at = content.index(file.read(largest)) + largest.file_size // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def of_another_program(_path):
    return Path(ROOT, "pyproject.toml").read_bytes()


@pytest.mark.parametrize("damage", [torn, empty, flipped, of_another_program])
@pytest.mark.parametrize("name", ["checkpoint.pt", "agent.pt"])
def test_a_damaged_file_is_named_and_kept(main, finished, name, damage):
    (finished / name).write_bytes(damage(finished / name))
    with unchanged(finished):
        ended = main() if name == "checkpoint.pt" else main("--eval-only", str(finished))
    assert_one_error(ended, 1, name, "damaged")


@pytest.mark.parametrize("content", [{}, {"progress": 1}, torch.zeros(2), 3], ids=repr)
def test_a_checkpoint_of_something_else_is_named_and_kept(main, interrupted, content):
    torch.save(content, interrupted / "checkpoint.pt")
    with unchanged(interrupted):
        assert_one_error(main(), 1, "checkpoint.pt")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"args": 1}', "\xff"], ids=repr)
def test_a_damaged_config_is_named_and_kept(main, interrupted, content):
    (interrupted / "config.json").write_text(content, encoding="latin-1")
    with unchanged(interrupted):
        assert_one_error(main(), 1, "config.json")


# A full disk and numbers that overflow ------------------------------------------------------------------------------


@pytest.mark.parametrize("largest_file", [1000, 4000, 100_000], ids=["config.json", "TensorBoard", "checkpoint.pt"])
def test_a_disk_full_at_first_is_one_error_and_then_the_run_starts(script, reference, run_dir, tmp_path, largest_file):
    assert_one_error(life(script, cwd=tmp_path, largest_file=largest_file), 1, "cannot write")
    assert life(script, cwd=tmp_path).code == 0
    assert_same_run(run_dir, reference)


def test_a_disk_full_later_keeps_the_checkpoint(script, interrupted, tmp_path):
    before = (interrupted / "checkpoint.pt").read_bytes()
    assert_one_error(life(script, cwd=tmp_path, largest_file=len(before)), 1, "checkpoint.pt", "free some space")
    assert (interrupted / "checkpoint.pt").read_bytes() == before
    assert not (interrupted / "checkpoint.pt.tmp").exists()


@pytest.mark.parametrize(
    ("flags", "culprit"),
    [
        (["--encoder-lr", "1e20"], "losses/encoder_loss is nan"),
        (["--encoder-lr", "1e20", "--eval-workers", "2"], "losses/encoder_loss is nan"),
        (["--critic-lr", "1e20", "--critic-arch", "1"], "losses/actor_loss is nan"),  # a function of the critic
        (["--actor-lr", "1e20", "--actor-arch", "1"], "an action of the actor is not finite"),
        (
            ["--critic-lr", "1e30", "--actor-regime", "dst", "--topology-update-interval", "1"],
            "the gradient of the actor is not finite",
        ),
        (["--encoder-lr", "1e20", "--overlap"], "losses/encoder_loss is nan"),  # known after the next environment step
        (["--encoder-lr", "1e20", "--overlap", "--eval-interval", "40"], "a feature of the encoder is not finite"),
    ],
    ids=[
        "encoder",
        "encoder, beside an evaluation",
        "critic",
        "actor",
        "finite loss with a NaN gradient to rank",
        "overlap",
        "overlap, diagnostics",
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    script, run_dir, tmp_path, flags, culprit
):
    ended = life(script, *flags, cwd=tmp_path)
    assert_one_error(ended, 1, culprit, "at agent step 40", "last good checkpoint")
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert checkpoint["progress"]["agent_step"] == 30
    assert [row[0] for row in evaluations(run_dir)] == ["agent_step", "0"]  # also if it was still under way
    for module in checkpoint["agent"]["modules"].values():
        assert all(weight.isfinite().all() for weight in module.values())


# Playing a trained agent --------------------------------------------------------------------------------------------


def test_eval_only_plays_the_agent_of_a_run_the_same_every_time(main, finished):
    with unchanged(finished):
        by_folder, by_file = main("--eval-only", str(finished)), main("--eval-only", str(finished / "agent.pt"))
    assert (by_folder.code, by_folder.err) == (0, "")
    *episodes, mean = [float(value) for value in re.findall(r"(?:return|mean) ([\d.]+)", by_folder.out)]
    assert len(episodes) == 2  # --eval-episodes
    assert mean == pytest.approx(np.mean(episodes), abs=0.1)  # printed with one digit
    assert by_file.out == by_folder.out


@pytest.mark.parametrize(
    ("path", "code", "part"),
    [
        ("nowhere", 2, "does not exist"),
        ("..", 2, "agent.pt does not exist"),
        ("config.json", 1, "damaged or not ours"),
        ("checkpoint.pt", 1, "damaged or not ours"),
    ],
)
def test_eval_only_names_a_path_that_holds_no_agent(main, finished, path, code, part):
    assert_one_error(main("--eval-only", str(finished / path)), code, path, part)


# Every regime on every module ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["encoder", "critic", "actor"])
@pytest.mark.parametrize("regime", ["dense", "sst", "dst", "s2d", "d2s"])
def test_every_regime_trains_every_module(name, regime):
    updates = 20
    args = mst_mrq.Args(
        width_scale=0.03, topology_update_interval=4, target_network_frequency=updates,
        **{f"{module}_regime": "dense" for module in mst_mrq.MODULES} | {f"{name}_regime": regime},
    )  # fmt: skip
    torch.manual_seed(0)
    networks = mst_mrq.make_networks(args, obs_dim=5, action_dim=2)
    agent = mst_mrq.Agent(args, *networks, updates, torch.Generator().manual_seed(0))
    sparsifier = agent.sparsifier[name]
    initial = {key: weight.detach().clone() for key, weight in sparsifier.weights.items()}
    masks = {key: mask.clone() for key, mask in sparsifier.masks.items()}
    sparsities = [sparsifier.sparsity()]
    for _ in range(updates):
        obs, action = torch.randn(32, 6, 5), torch.rand(32, 5, 2) * 2 - 1
        batch = mst_mrq.Batch(obs, action, torch.rand(32, 5), torch.zeros(32, 5), torch.arange(32))
        agent.updates.run("update_encoder", agent, FixedBatch(batch))
        agent.updates.run("update_critic_and_actor", agent, FixedBatch(batch))
        sparsities.append(sparsifier.sparsity())
        for key, mask in sparsifier.masks.items():
            moments = agent.optimizer[name].state[sparsifier.weights[key]]
            for tensor in (sparsifier.weights[key], moments["exp_avg"], moments["exp_avg_sq"]):
                assert not tensor[~mask].any()

    moved = torch.cat([(weight != initial[key]).flatten() for key, weight in sparsifier.weights.items()])
    active = torch.cat([sparsifier.masks.get(key, torch.ones_like(w) > 0).flatten() for key, w in initial.items()])
    assert moved[active].float().mean() > 0.9  # a weight behind a ReLU that is never active rests
    changed = any(not torch.equal(mask, masks[key]) for key, mask in sparsifier.masks.items())
    assert changed == (regime in ("dst", "s2d", "d2s"))
    assert sparsifier.topology_updates == (5 if changed else 0)  # every 4 of 20
    first, last = {"dense": (0, 0), "sst": (0.6, 0.6), "dst": (0.6, 0.6), "s2d": (0.6, 0), "d2s": (0, 0.6)}[regime]
    assert sparsities[0] == pytest.approx(first, abs=0.01)  # layers hold floor(sparsity * size) zeros
    assert sparsities[-1] == pytest.approx(last, abs=0.01)


def test_config_json_holds_arguments_and_versions(reference):
    config = json.loads((reference / "config.json").read_text())
    assert config["args"]["total_timesteps"] == 130
    assert config["args"]["gamma"] == 0.99  # Table 1
    assert config["versions"]["torch"] == torch.__version__


def test_the_log_tells_the_time_left_once_an_interval_has_trained(script, tmp_path):
    lines = [line for line in life(script, cwd=tmp_path).out.splitlines() if line.startswith("agent step")]
    # at 0, 50, 100 and 130; training starts at 40: the interval before 100 is the first without random steps
    assert [line.endswith(" left") for line in lines] == [False, False, True, True]


def test_peak_memory_is_in_bytes():
    pages_now = int(Path("/proc/self/statm").read_text().split()[1])
    now, machine = (pages * os.sysconf("SC_PAGE_SIZE") for pages in (pages_now, os.sysconf("SC_PHYS_PAGES")))
    assert 0.99 * now <= mst_mrq.peak_memory(torch.device("cpu")) <= machine  # counters of threads lag by some pages
