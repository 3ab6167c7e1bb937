"""What a step returns, and that an episode is a function of its seed and actions."""

import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
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


def two_plain_steps(raw, action):
    """Two steps of dm_control itself, its observations concatenated in the order of their spec."""
    first, second = raw.step(action), raw.step(action)
    obs = np.concatenate([np.ravel(second.observation[name]) for name in raw.observation_spec()])
    return obs.astype(np.float32).tobytes(), first.reward + second.reward


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
        assert env.observation_space.contains(obs)
        assert (obs.tobytes(), reward, terminated, truncated) == (*two_plain_steps(raw, in_bounds), False, False)


# 1,000 environment steps; lqr has no limit of its own
@pytest.mark.parametrize(
    ("env_id", "action_repeat", "steps"),
    [
        ("pendulum-swingup", None, 500),
        ("pendulum-swingup", 1, 1000),
        ("cartpole-balance", 3, 334),
        ("lqr-lqr_2_1", None, 500),
    ],
)
def test_a_dm_control_episode_truncates_at_its_limit(env_id, action_repeat, steps):
    env = make(env_id, action_repeat=action_repeat)
    env.reset(seed=0)
    ends = [end[2:] for end in play(env, random_actions(env, 1001))]
    assert (len(ends), env.limit, ends[-1]) == (steps, steps, (False, True))


def test_a_gymnasium_termination_passes_through():
    env = make("Hopper-v5")
    env.reset(seed=0)
    ends = [end[2:] for end in play(env, np.ones((100, 3), np.float32))]
    assert ends[-1] == (True, False)  # the hopper falls


def test_gymnasium_actions_are_rescaled_and_repeated():
    raw, env = gym.make("Pendulum-v1"), make("Pendulum-v1", action_repeat=4)
    raw.reset(seed=3)
    env.reset(seed=3)
    raw_rewards = [raw.step(np.array([1.0], np.float32))[1] for _ in range(4)]  # torques in [-2, 2]
    obs, reward, _, _, _ = env.step(np.array([0.5], np.float32))
    assert reward == pytest.approx(sum(raw_rewards), rel=1e-12)
    assert obs.dtype == np.float32 and env.action_space.low == -1 and env.action_space.high == 1


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


def test_the_seed_at_loading_draws_the_model_of_lqr_and_that_of_reset_the_episode():
    stiffness = [make("lqr-lqr_2_1", seed).unwrapped.dmc.physics.model.jnt_stiffness.tolist() for seed in (1, 1, 2)]
    assert stiffness[0] == stiffness[1] != stiffness[2]
    env = make("cartpole-swingup")
    assert env.reset(seed=1)[0].tobytes() != env.reset(seed=2)[0].tobytes()


@pytest.mark.parametrize("env_id", ["dog-rum", "HalfCheetah-v55", "nothing", "no_such_package:Thing-v0"])
def test_an_environment_that_there_is_not_is_refused_in_one_line(env_id):
    with pytest.raises(ValueError, match=f"^no {env_id}: [^\n]*$"):
        make(env_id)


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
    child = run_python(f"for x in ('dog-run', 'Hopper-v5'): {code}", MUJOCO_GL="disable")
    assert (child.returncode, child.stdout, child.stderr) == (0, "", "")


def test_a_frame_is_a_picture_and_without_opengl_it_is_refused_before_the_run():
    code = "env = AgentEnv(Args(env_id='cartpole-swingup', capture_video=True)); env.reset(seed=0); f = env.render()\n"
    child = run_python(code, MUJOCO_GL="disable")
    assert "ValueError: no cartpole-swingup: " in child.stderr
    child = run_python(f"{code}print(f.shape, f.dtype, f.std() > 5)", MUJOCO_GL="egl")
    if child.returncode and "ValueError: no cartpole-swingup: " in child.stderr:
        pytest.skip("this machine has no EGL")
    assert (child.stdout.strip(), child.stderr) == ("(480, 480, 3) uint8 True", "")
