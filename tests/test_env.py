"""What a step returns, and that an episode is a function of its seed and actions."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mst_mrq


def make(env_id, seed=0, **flags):
    return mst_mrq.AgentEnv(mst_mrq.Args(env_id=env_id, seed=seed, **flags))


def random_actions(env, steps):
    return np.random.default_rng(0).uniform(-1, 1, (steps, *env.action_space.shape)).astype(np.float32)


def play(env, actions):
    """Step through `actions` or to the end of the episode; return the bits of all that `step` returned."""
    bits = []
    for action in actions:
        obs, reward, terminated, truncated, _ = env.step(action)
        bits.append((obs.tobytes(), reward, terminated, truncated))
        if terminated or truncated:
            break
    return bits


# dog: 9 observations, fish: scalars and a target drawn at reset, quadruped: actions outside [-1, 1]
@pytest.mark.parametrize("env_id", ["dog-run", "fish-swim", "ball_in_cup-catch", "quadruped-run"])
def test_a_step_is_two_dm_control_steps_bit_for_bit(env_id):
    env = make(env_id)
    from dm_control import suite

    raw = suite.load(*env_id.split("-"), task_kwargs={"random": 5})
    env.reset(seed=5)
    raw.reset()
    low, high = raw.action_spec().minimum, raw.action_spec().maximum
    for action in random_actions(env, 50):
        in_bounds = action if env_id != "quadruped-run" else low + (action.astype(float) + 1) * (high - low) / 2
        obs, reward, terminated, truncated, _ = env.step(action)
        first, second = raw.step(in_bounds), raw.step(in_bounds)
        plain = np.concatenate([np.ravel(second.observation[name]) for name in raw.observation_spec()])
        assert (obs.tobytes(), reward) == (plain.astype(np.float32).tobytes(), first.reward + second.reward)
        assert (terminated, truncated) == (False, False)


# 1,000 environment steps; lqr has no limit of its own
LIMITS = [("pendulum-swingup", None, 500), ("pendulum-swingup", 1, 1000), ("cartpole-balance", 3, 334)]


@pytest.mark.parametrize(("env_id", "action_repeat", "steps"), [*LIMITS, ("lqr-lqr_2_1", None, 500)])
def test_a_dm_control_episode_truncates_at_its_limit(env_id, action_repeat, steps):
    env = make(env_id, action_repeat=action_repeat)
    env.reset(seed=0)
    ends = [end[2:] for end in play(env, random_actions(env, 1001))]
    assert (len(ends), env.limit, ends[-1]) == (steps, steps, (False, True))


# reacher, finger and fish write into the model at reset, lqr draws its model at loading
REPLAYED = ["dog-run", "reacher-easy", "finger-turn_hard", "fish-swim", "lqr-lqr_2_1", "HalfCheetah-v5", "Pendulum-v1"]


@pytest.mark.parametrize("env_id", REPLAYED)
def test_a_replayed_episode_goes_on_bit_for_bit(env_id):
    played, restored = make(env_id, seed=7), make(env_id, seed=7)
    past, so_far, rest = np.split(random_actions(played, 50), [20, 30])
    played.reset(seed=1)
    play(played, past)  # an earlier episode, which must not matter
    for env in (played, restored):
        assert env.reset(seed=42)[0].dtype == np.float32
    assert play(restored, so_far) == play(played, so_far)
    assert play(restored, rest) == play(played, rest)


def test_the_seed_at_loading_draws_the_model_of_lqr():
    stiffness = [make("lqr-lqr_2_1", seed).unwrapped.dmc.physics.model.jnt_stiffness.tolist() for seed in (1, 1, 2)]
    assert stiffness[0] == stiffness[1] != stiffness[2]


def run_python(code, **environ):
    """Run `code`, which makes an `env`, in a fresh process in which nobody has set MUJOCO_GL, unless `environ` does."""
    clean = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"}
    return subprocess.run(
        [sys.executable, "-c", f"from mst_mrq import AgentEnv, Args\n{code}"],
        env={**clean, "PYTHONPATH": str(Path(__file__).parents[1]), **environ}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip


def test_a_headless_run_is_silent():
    code = "env = AgentEnv(Args(env_id=x)); env.reset(seed=0); env.step(env.action_space.sample())"
    child = run_python(f"for x in ('dog-run', 'HalfCheetah-v5'): {code}", MUJOCO_GL="disable")
    assert (child.returncode, child.stdout, child.stderr) == (0, "", "")


def test_a_frame_is_a_picture_and_without_opengl_it_is_refused_before_the_run():
    code = "env = AgentEnv(Args(env_id='cartpole-swingup', capture_video=True)); env.reset(seed=0); f = env.render()\n"
    child = run_python(code, MUJOCO_GL="disable")
    assert "ValueError: no cartpole-swingup: " in child.stderr
    child = run_python(f"{code}print(f.shape, f.dtype, f.std() > 5)", MUJOCO_GL="egl")
    if child.returncode and "ValueError: no cartpole-swingup: " in child.stderr:
        pytest.skip("this machine has no EGL")
    assert (child.stdout.strip(), child.stderr) == ("(480, 480, 3) uint8 True", "")
