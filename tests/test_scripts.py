"""The scripts whose run loop is MR.Q's to the letter: what tests/test_runs.py shows of it holds with their agents."""

import dataclasses
import importlib
import re
import signal

import pytest
import torch
from conftest import RUN, assert_one_error, assert_same_run, life, scalars


@pytest.fixture(params=["mst_mrsac", "mst_sac", "mst_ddpg"])
def script(request):
    return request.param


def test_a_run_killed_and_stopped_by_a_signal_beside_its_evaluations_gives_the_same_bits(script, reference, tmp_path):
    run_dir = tmp_path / str(RUN).format(script)
    update = "Agent.update_critic_and_actor"
    workers = ["--eval-workers", "2"]  # the reference has none
    assert life(script, *workers, cwd=tmp_path, at=(update, 45, signal.SIGKILL)).code == -signal.SIGKILL
    assert life(script, *workers, cwd=tmp_path, at=(update, 20, signal.SIGTERM)).code == 75
    assert life(script, *workers, cwd=tmp_path).code == 0
    assert_same_run(run_dir, reference)
    assert scalars(run_dir)["sparsity/critic_topology_updates", 130] >= 4  # every 20 of at least 91 updates


def test_an_overlapped_run_gives_the_same_bits_after_a_stop_within_an_update(script, reference, tmp_path):
    update, folders = "Agent.update_critic_and_actor", [tmp_path / "whole", tmp_path / "stopped"]
    for folder in folders:
        folder.mkdir()
    assert life(script, "--overlap", cwd=folders[0]).code == 0
    assert life(script, "--overlap", cwd=folders[1], at=(update, 42, signal.SIGTERM)).code == 75
    assert life(script, "--overlap", cwd=folders[1]).code == 0
    run_dirs = [folder / str(RUN).format(script) for folder in folders]
    assert_same_run(*run_dirs)
    ours, plain = scalars(run_dirs[0]), scalars(reference)
    assert ours["sparsity/critic_topology_updates", 130] == plain["sparsity/critic_topology_updates", 130]
    assert ours["losses/critic_loss", 130] != plain["losses/critic_loss", 130]


def test_diagnostics_never_move_the_training(script, reference, tmp_path):
    assert life(script, "--no-diagnostics", cwd=tmp_path).code == 0
    ours, whole = scalars(tmp_path / str(RUN).format(script)), scalars(reference)
    assert ours == {key: value for key, value in whole.items() if key in ours}
    assert whole.keys() - ours.keys()


@pytest.mark.parametrize("regime", ["dense", "sst", "dst", "s2d", "d2s"])
def test_every_regime_trains_critic_and_actor(script, tmp_path, regime):
    flags = ["--critic-regime", regime, "--actor-regime", regime, "--critic-sparsity", "0.6", "--actor-sparsity", "0.6"]
    assert life(script, *flags, "--topology-update-interval", "7", cwd=tmp_path).code == 0
    run_dir = tmp_path / str(RUN).format(script)
    saved, values = torch.load(run_dir / "agent.pt", weights_only=True), scalars(run_dir)
    first, last = {"dense": (0, 0), "sst": (0.6, 0.6), "dst": (0.6, 0.6), "s2d": (0.6, 0), "d2s": (0, 0.6)}[regime]
    for module in ("critic", "actor"):
        assert values[f"sparsity/{module}_sparsity", 0] == pytest.approx(first, abs=0.03)  # few weights, rounded down
        assert values[f"sparsity/{module}_sparsity", 130] == pytest.approx(last, abs=0.03)
        assert (values[f"sparsity/{module}_topology_updates", 130] > 0) == (regime in ("dst", "s2d", "d2s"))
        for name, mask in saved["masks"][module].items():
            assert not saved["modules"][module][name][~mask].any()


def test_eval_only_plays_the_agent(main, reference):
    ended = main("--eval-only", str(reference))
    assert (ended.code, ended.err) == (0, "")
    assert len(re.findall(r"episode \d: return [\d.]+", ended.out)) == 2


def test_the_agent_of_another_script_is_refused(main, script, tmp_path):
    other = "mst_ddpg" if script == "mst_mrsac" else "mst_mrq"
    arguments = dataclasses.asdict(importlib.import_module(other).Args())
    torch.save({"args": arguments, "modules": {}}, tmp_path / "agent.pt")
    assert_one_error(main("--eval-only", str(tmp_path / "agent.pt")), 2, "another script")


@pytest.mark.parametrize(("flag", "value"), [("--gamma", "1.1"), ("--critic-sparsity", "1"), ("--actor-lr", "0")])
def test_a_value_out_of_range_is_refused_by_name(main, flag, value):
    assert_one_error(main(flag, value), 2, flag)
