"""Tests of the environment block: what a step returns, and that an episode is a function of its seed and actions."""

import os
import subprocess
import sys

import numpy as np
import pytest

from mst_mrq import make_env, replay_episode


def random_actions(env, steps, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (steps, *env.action_space.shape)).astype(np.float32)


def play(env, actions):
    """Step through `actions` or to the end of the episode; return the bits of all that `step` returned."""
    bits = []
    for action in actions:
        obs, reward, terminated, truncated, _ = env.step(action)
        bits.append((obs.tobytes(), float(reward), terminated, truncated))
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
    env = make_env(env_id, seed=1)
    from dm_control import suite

    raw = suite.load(*env_id.split("-"), task_kwargs={"random": 5})
    env.reset(seed=5)
    raw.reset()
    low, high = raw.action_spec().minimum, raw.action_spec().maximum
    for action in random_actions(env, 50):
        in_bounds = action if env_id != "quadruped-run" else low + (action + 1.0) * (high - low) / 2
        obs, reward, terminated, truncated, _ = env.step(action)
        assert obs.dtype == np.float32 and env.observation_space.contains(obs)
        assert (obs.tobytes(), reward) == two_plain_steps(raw, in_bounds)
        assert (terminated, truncated) == (False, False)


def test_an_action_of_one_is_the_upper_bound_of_quadruped():
    env = make_env("quadruped-walk", seed=0)
    env.reset(seed=0)
    env.step(np.ones(12, np.float32))
    assert env.dmc.physics.control().tolist() == pytest.approx([1.0, 1.1, 0.8] * 4)  # quadruped.xml's control ranges


@pytest.mark.parametrize(("action_repeat", "steps"), [(None, 500), (1, 1000), (3, 334)])
def test_a_dm_control_episode_is_1000_env_steps_and_truncates(action_repeat, steps):
    env = make_env("pendulum-swingup", seed=0, action_repeat=action_repeat)
    env.reset(seed=0)
    ends = [end[2:] for end in play(env, random_actions(env, 1001))]
    assert len(ends) == steps
    assert ends[-1] == (False, True)


def test_lqr_without_a_time_limit_of_its_own_truncates_after_500_agent_steps():
    env = make_env("lqr-lqr_2_1", seed=0)
    env.reset(seed=0)
    assert len(play(env, random_actions(env, 501))) == 500


def test_a_gymnasium_termination_passes_through():
    env = make_env("Hopper-v5", seed=0)
    env.reset(seed=0)
    ends = [end[2:] for end in play(env, np.ones((1000, 3), np.float32))]
    assert ends[-1] == (True, False)
    assert len(ends) < 100  # the hopper falls


def test_gymnasium_actions_are_rescaled_and_repeated():
    import gymnasium as gym

    raw, env = gym.make("Pendulum-v1"), make_env("Pendulum-v1", seed=0, action_repeat=4)
    raw.reset(seed=3)
    env.reset(seed=3)
    raw_rewards = [raw.step(np.array([1.0], np.float32))[1] for _ in range(4)]  # torques in [-2, 2]
    obs, reward, _, _, _ = env.step(np.array([0.5], np.float32))
    assert reward == pytest.approx(sum(raw_rewards), rel=1e-12)
    assert obs.dtype == np.float32 and env.action_space.low == -1 and env.action_space.high == 1


@pytest.mark.parametrize(
    "env_id",
    # reacher, finger and fish write into the model at reset, lqr draws its model at loading
    ["dog-run", "reacher-easy", "finger-turn_hard", "fish-swim", "lqr-lqr_2_1", "HalfCheetah-v5", "Pendulum-v1"],
)
def test_a_replayed_episode_goes_on_bit_for_bit(env_id):
    played = make_env(env_id, seed=7)
    past, so_far, rest = np.split(random_actions(played, 50), [20, 30])
    played.reset(seed=1)
    play(played, past)  # an earlier episode, which must not matter
    assert played.reset(seed=42)[0].dtype == np.float32
    bits = play(played, so_far)
    restored = make_env(env_id, seed=7)
    assert replay_episode(restored, 42, so_far).tobytes() == bits[-1][0]
    assert play(restored, rest) == play(played, rest)


def test_the_seed_at_loading_draws_the_model_of_lqr():
    stiffness = [make_env("lqr-lqr_2_1", seed).unwrapped.dmc.physics.model.jnt_stiffness.tolist() for seed in (1, 1, 2)]
    assert stiffness[0] == stiffness[1] != stiffness[2]


def test_episodes_of_different_seeds_differ():
    env = make_env("cartpole-swingup", seed=0)
    assert env.reset(seed=1)[0].tobytes() != env.reset(seed=2)[0].tobytes()


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("dog-rum", "did you mean dog-run"),
        ("ball-in-cup-catch", "did you mean ball_in_cup-catch"),
        ("HalfCheetah-v55", "HalfCheetah-v5"),
        ("nothing-like-this-at-all", "neither a dm_control task nor a Gymnasium environment"),
        ("CartPole-v1", "CartPole-v1 has actions Discrete"),
    ],
)
def test_a_wrong_environment_is_refused_in_one_line_with_what_to_use_instead(env_id, message):
    with pytest.raises(ValueError, match=message) as error:
        make_env(env_id, seed=0)
    assert "\n" not in str(error.value)


def run_python(code, **environ):
    """Run `code` in a fresh process in which nobody has set MUJOCO_GL, unless `environ` does."""
    clean = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"}
    here = os.path.dirname(os.path.abspath(sys.modules[make_env.__module__].__file__))
    return subprocess.run(
        [sys.executable, "-c", f"from {make_env.__module__} import make_env\n{code}"],
        env={**clean, "PYTHONPATH": here, **environ}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_a_headless_run_is_silent():
    code = "env = make_env(env_id, 0); env.reset(seed=0); env.step(env.action_space.sample())"
    child = run_python(f"for env_id in ('dog-run', 'Hopper-v5'): {code}")
    assert (child.returncode, child.stdout, child.stderr) == (0, "", "")


def test_rendering_with_opengl_disabled_is_refused():
    child = run_python("make_env('dog-run', 0, render=True)", MUJOCO_GL="disable")
    assert "ValueError: dog-run has to render, but MUJOCO_GL=disable" in child.stderr


def test_a_rendered_frame_is_a_picture():
    code = "env = make_env('cartpole-swingup', 0, render=True); env.reset(seed=0); f = env.render(); env.close()\n"
    child = run_python(code + "print(f.shape, f.dtype, f.std() > 5)")
    if "no OpenGL to render with" in child.stderr:
        pytest.skip("this machine has neither EGL nor OSMesa")
    assert (child.stdout.strip(), child.stderr) == ("(480, 480, 3) uint8 True", "")
