"""Evaluation in worker processes: the returns of one process, and nothing hangs or stays when one of them dies."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import RUN, assert_one_error, assert_same_run, end, evaluations, life, start

import mst_mrq

WORKERS = ["--eval-workers", "2"]


def make(env_id: str, action_repeat: int, workers: int):
    """Three environments in so many worker processes, an agent for them, and the processes."""
    args = mst_mrq.Args(
        env_id=env_id, action_repeat=action_repeat, eval_workers=workers, eval_episodes=3, width_scale=0.03
    )
    env = mst_mrq.make_env(env_id, 0)
    dims = env.observation_space.shape[0], env.action_space.shape[0]
    agent = mst_mrq.make_agent(args, *dims, torch.device("cpu"))
    before = multiprocessing.active_children()
    envs = mst_mrq.make_evaluation_envs(args, env_id, action_repeat)
    return agent, envs, [child for child in multiprocessing.active_children() if child not in before]


def close(envs, workers) -> list[int]:
    """Close the pipes as the trainer's end does. Returns the workers' exit codes."""
    for pipe in envs.pipes:
        pipe.close()
    for worker in workers:
        worker.join(10)
    return [worker.exitcode for worker in workers]


# the pendulum falls after different numbers of steps, lqr draws its model from the seed of the run
@pytest.mark.parametrize(
    ("env_id", "action_repeat"), [("cartpole-swingup", 10), ("InvertedPendulum-v5", 1), ("lqr-lqr_2_1", 20)]
)
def test_two_workers_give_the_returns_of_one_process(env_id, action_repeat):
    agent, here, none = make(env_id, action_repeat, workers=0)
    _, there, workers = make(env_id, action_repeat, workers=2)
    assert (len(none), len(workers)) == (0, 2)
    for seeds in ([1, 2, 3], [7, 8, 9]):
        *_, returns = mst_mrq.evaluate(agent, here, seeds)
        assert len(set(returns)) > 1
        *steps, others = mst_mrq.evaluate(agent, there, seeds)
        assert others.tolist() == returns.tolist()
        assert set(steps) == {None}
    assert close(there, workers) == [0, 0]


def test_a_worker_that_dies_ends_the_evaluation():
    agent, envs, workers = make("cartpole-swingup", 10, workers=2)
    steps = mst_mrq.evaluate(agent, envs, [1, 2, 3])
    for _ in range(5):
        assert next(steps) is None
    workers[1].kill()
    workers[1].join()
    with pytest.raises(mst_mrq.WorkerDied, match="--eval-workers 0"):
        next(steps)
    assert close(envs, workers) == [0, -signal.SIGKILL]


def test_an_evaluation_plays_the_agent_of_its_beginning():
    agent, envs, _ = make("cartpole-swingup", 10, workers=0)
    *_, before = mst_mrq.Evaluation(agent, envs, 7, 0.0, {}).steps
    evaluation = mst_mrq.Evaluation(agent, envs, 7, 0.0, {})
    for module in (agent.encoder, agent.actor):
        for parameter in module.parameters():
            parameter.data.normal_()
    *_, during = evaluation.steps
    *_, after = mst_mrq.Evaluation(agent, envs, 7, 0.0, {}).steps
    assert during.tolist() == before.tolist() != after.tolist()


# Whole runs ---------------------------------------------------------------------------------------------------------


def state(pid: int) -> str | None:
    """T: stopped, Z: ended but not yet reaped, None: gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


def wait_for(condition) -> None:
    end_time = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end_time, "waited in vain"
        time.sleep(0.01)


def test_a_run_trains_beside_its_evaluations_and_resumes_within_one_to_the_same_bits(script, reference, tmp_path):
    run_dir, train_step = tmp_path / str(RUN).format(script), "Agent.train_step"
    under_way = []
    for calls, number in [(25, signal.SIGTERM), (10, signal.SIGKILL), (30, signal.SIGTERM)]:
        life(script, *WORKERS, cwd=tmp_path, at=(train_step, calls, number))
        checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
        evaluation = checkpoint["evaluation"]
        under_way.append((checkpoint["progress"]["agent_step"], evaluation["agent_step"] if evaluation else None))
    assert under_way == [(64, 50), (64, 50), (94, 50)]  # an episode has 100 steps, of which each agent step plays one
    assert life(script, cwd=tmp_path).code == 0  # without workers
    assert_same_run(run_dir, reference)


def test_each_agent_step_plays_one_step_of_the_evaluation_under_way(script, tmp_path):
    flags = [*WORKERS, "--eval-interval", "130"]  # that at 0: a step resets, 100 play, the next has the returns
    for calls, rows in [(62, 0), (63, 1)]:  # the first is at agent step 40: killed at 101 and at 102
        life(script, *flags, "--exp-name", f"{calls}", cwd=tmp_path, at=("Agent.train_step", calls, signal.SIGKILL))
        path = tmp_path / str(RUN).format(calls) / "eval.csv"
        assert (len(evaluations(path.parent)) - 1 if path.exists() else 0) == rows


def stopped_within_an_evaluation(script: str, cwd: Path):
    """A run that waits for SIGCONT in its second evaluation, and the pids of its workers."""
    child = start(script, *WORKERS, cwd=cwd, at=("Agent.act", 120, signal.SIGSTOP))
    try:
        wait_for(lambda: state(child.pid) == "T")
        workers = [int(pid) for pid in Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()]
        assert len(workers) == 2
    except BaseException:
        child.kill()  # pytest would wait for it
        raise
    return child, workers


def test_a_run_says_when_a_worker_died_and_goes_on_to_the_results_of_one_process(script, reference, tmp_path):
    child, workers = stopped_within_an_evaluation(script, tmp_path)
    os.kill(workers[0], signal.SIGKILL)
    os.kill(child.pid, signal.SIGCONT)
    assert_one_error(end(child, tmp_path), 1, "a worker process of the evaluation died", "--eval-workers 0")
    wait_for(lambda: all(state(pid) in (None, "Z") for pid in workers))
    assert life(script, *WORKERS, cwd=tmp_path).code == 0
    assert_same_run(tmp_path / str(RUN).format(script), reference)


def test_a_signal_to_all_processes_of_a_run_stops_it_with_a_checkpoint(script, reference, tmp_path):
    child, workers = stopped_within_an_evaluation(script, tmp_path)
    for pid in workers:
        os.kill(pid, signal.SIGTERM)
    wait_for(lambda: all(state(pid) in (None, "Z") for pid in workers))  # the run is left with broken pipes
    os.kill(child.pid, signal.SIGCONT)
    time.sleep(0.3)  # it has a second of grace
    os.kill(child.pid, signal.SIGTERM)
    ended = end(child, tmp_path)
    assert (ended.code, ended.err) == (75, "")
    assert life(script, *WORKERS, cwd=tmp_path).code == 0
    assert_same_run(tmp_path / str(RUN).format(script), reference)


def test_workers_of_a_killed_run_hold_no_lock_and_end(script, reference, tmp_path):
    child, workers = stopped_within_an_evaluation(script, tmp_path)
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    try:
        child.kill()
        child.join()
        assert life(script, *WORKERS, cwd=tmp_path).code == 0  # while they are still there
        assert [state(pid) for pid in workers] == ["T", "T"]
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
    wait_for(lambda: all(state(pid) in (None, "Z") for pid in workers))
    assert_same_run(tmp_path / str(RUN).format(script), reference)


@pytest.mark.parametrize("name", ["mst_mrq", "mst_mrsac", "mst_sac", "mst_ddpg"])
def test_a_run_says_which_paths_it_takes(name, tmp_path):
    ended = life(name, *WORKERS, "--overlap", cwd=tmp_path, at=("Agent.act", 1, signal.SIGTERM))
    lines = ended.out.splitlines()
    assert "CUDA graphs off: CPU; torch.compile off; matrix products in float32" in lines
    assert "actions chosen before the update; evaluation in 2 worker processes, beside the training" in lines
    plain = life(name, "--exp-name", "plain", cwd=tmp_path, at=("Agent.act", 1, signal.SIGTERM))
    assert "actions chosen after the update; evaluation in this process" in plain.out.splitlines()
