"""Evaluation in processes: the returns of one process, and nothing is lost, hangs or stays when one of them dies."""

import os
import signal
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import assert_same_run, end, life, start, wait_for

import mst_mrq

# lqr has its model from the run's seed; two of three humanoids fall before step 45, and contacts magnify rounding
EPISODES = [("cartpole-swingup", 50, 1e-5), ("lqr-lqr_2_1", 9, 1e-5), ("Humanoid-v5", 45, 1e-3)]


@pytest.mark.parametrize(("env_id", "limit", "rel"), EPISODES)
def test_returns_are_those_of_each_episode_alone_also_in_processes(env_id, limit, rel):
    args, seeds = mst_mrq.Args(env_id=env_id, max_episode_steps=limit, width_scale=0.03, buffer_size=9), [7, 8, 9]
    env = mst_mrq.AgentEnv(args)
    agent = mst_mrq.Agent(args, env.observation_space.shape[0], env.action_space.shape[0], torch.device("cpu"))
    alone = np.zeros(len(seeds))
    for i, seed in enumerate(seeds):
        obs, over = env.reset(seed=seed)[0], False
        while not over:
            obs, reward, terminated, truncated, _ = env.step(agent.act(obs[None])[0])
            alone[i], over = alone[i] + reward, terminated or truncated
    assert len(set(alone)) > 1
    makers = [lambda: mst_mrq.AgentEnv(args)] * 3
    for envs in (gym.vector.SyncVectorEnv(makers), gym.vector.AsyncVectorEnv(makers, context="fork")):
        for _ in range(2):  # what goes on after an episode does not count, nor does it matter for the next evaluation
            assert mst_mrq.evaluate(agent, envs, seeds, [], Path()) == pytest.approx(alone, rel=rel)  # batches of 3
        envs.close()


def state(pid: int) -> str:
    """T: stopped, Z: ended but not yet reaped, or gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "gone"


def ended(pids: list[int]) -> bool:
    return all(state(pid) in ("Z", "gone") for pid in pids)


@pytest.fixture
def evaluating(script, tmp_path):
    """A run that waits for SIGCONT in its evaluation at 50, and the pids of the processes there."""
    at = ("Agent.act", 60, signal.SIGSTOP)  # 40 calls in the first evaluation, 10 that explore, 10 in this one
    child = start(script, "--eval-processes", cwd=tmp_path, at=at)
    try:
        wait_for(lambda: state(child.pid) == "T")
        pids = [int(pid) for pid in Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()]
        assert len(pids) == 2
        yield child, pids
    finally:
        child.kill()


PENDULUM = ["--env", "InvertedPendulum-v5", "--eval-episodes", "1"]  # its processes are spawned, without handlers
SIGNALS = [(signal.SIGINT, [], 60), (signal.SIGUSR1, [], 60), (signal.SIGTERM, [], 60), (signal.SIGINT, PENDULUM, 2)]


@pytest.mark.parametrize(("number", "flags", "call"), SIGNALS)
def test_a_signal_to_all_processes_of_an_evaluation_stops_the_run(script, tmp_path, number, flags, call):
    result = life(script, "--eval-processes", *flags, cwd=tmp_path, at=("Agent.act", call, number, "group"))
    assert (result.code, result.err) == (75, "")
    assert f"stopped at agent step {0 if flags else 50}" in result.out


DIED = "error: a process of the evaluation died; go on with --no-eval-processes\n"


@pytest.mark.parametrize(("later", "code", "err"), [(None, 1, DIED), (signal.SIGTERM, 75, "")])
def test_processes_that_die_end_the_run_unless_a_signal_follows(
    script, reference, run_dir, evaluating, tmp_path, later, code, err
):
    child, pids = evaluating
    os.kill(pids[0], signal.SIGKILL)
    wait_for(lambda: ended(pids[:1]))
    os.kill(child.pid, signal.SIGCONT)
    if later:
        time.sleep(0.3)  # it has a second of grace
        os.kill(child.pid, later)
    result = end(child, tmp_path)
    assert (result.code, result.err) == (code, err)
    wait_for(lambda: ended(pids))
    assert life(script, "--no-eval-processes", cwd=tmp_path).code == 0
    assert_same_run(run_dir, reference)


def test_processes_of_a_killed_run_hold_no_lock_and_end(script, evaluating, tmp_path):
    child, pids = evaluating
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    child.kill()
    child.join()
    assert life(script, cwd=tmp_path, at=("Agent.act", 1, signal.SIGTERM)).code == 75
    assert [state(pid) for pid in pids] == ["T", "T"]  # they were still there
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: ended(pids))
