"""What environments and users really do: it works, or one line says what is wrong before it does harm."""

import importlib
import os
import subprocess
import sys
import types
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_error
from gymnasium import spaces
from gymnasium.spaces import Box

from mst_sac import AgentEnv, Args

SCRIPTS = ["mst_sac", "mst_ddpg", "mst_mrq", "mst_mrsac"]
IN_ALL = pytest.mark.parametrize("script", SCRIPTS)
ID, NAN, INF = "test_boundary:Tiny-v0", float("nan"), float("inf")


class Tiny(gym.Env):
    """Counts its steps in `t` since the reset and in `age` since it was made. One argument is the faulty part."""

    def __init__(self, actions=None, observations=None, obs=None, reward=None, length=8, terminates=False):
        self.action_space = actions or Box(-1, 1, (2,), np.float32)
        self.observation_space = observations or Box(-1, 1, (3,), np.float32)
        self.obs, self.reward = obs or (lambda env: np.full(3, env.t / 10, np.float32)), reward or (lambda env: 1.0)
        self.length, self.terminates, self.age = length, terminates, 0

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return self.obs(self), {}

    def step(self, action):
        self.t, self.age, self.action = self.t + 1, self.age + 1, action
        ends = self.t == self.length
        return self.obs(self), self.reward(self), ends and self.terminates, ends and not self.terminates, {}


def register(limit=None, inside=None, **parts) -> None:
    """`ID` is a Tiny with these parts, a limit in its spec and a TimeLimit inside."""
    gym.registry.pop("Tiny-v0", None)

    def entry_point():
        return gym.wrappers.TimeLimit(Tiny(**parts), inside) if inside else Tiny(**parts)

    gym.register("Tiny-v0", entry_point, max_episode_steps=limit)


def make(flags=(), **parts) -> AgentEnv:
    register(**parts)
    return AgentEnv(Args(env_id=ID, **dict(flags)))


def third_step(env: AgentEnv, action: float = 1.0) -> tuple:
    env.reset(seed=0)
    return [env.step(np.full(env.action_space.shape, action, np.float32)) for _ in range(3)][-1]


@pytest.fixture
def run(main):
    """A short run on `ID`: 60 agent steps, of which 20 train."""
    own = ["--env", ID, "--action-repeat", "1", "--max-episode-steps", "None", "--total-timesteps", "60"]
    return lambda *flags: main(*own, *flags)


# ACTIONS
NO_BOX = [spaces.MultiDiscrete([2, 3]), spaces.Discrete(3), spaces.MultiBinary(2), spaces.Dict(a=Box(-1, 1, (2,)))]
OF_INTEGERS = [Box(0, 10, (2,), np.int64), Box(0, 255, (2,), np.uint8)]
NOT_FLAT = [Box(-1, 1, (2, 2)), Box(-1, 1, ()), Box(-1, 1, (0,))]
NOT_BOUNDED = [Box(-INF, INF, (2,)), Box(-1, INF, (2,)), Box(np.float32([-1, -INF]), np.float32([1, 1]))]


@pytest.mark.parametrize("actions", [*NO_BOX, *OF_INTEGERS, *NOT_FLAT, *NOT_BOUNDED], ids=str)
def test_actions_that_no_rescaling_serves_are_refused(actions):
    with pytest.raises(ValueError, match=f"^{ID} has actions [^\n]*: agents need a flat, bounded Box of real numbers$"):
        make(actions=actions)


@IN_ALL
def test_a_run_refuses_them_before_it_starts(run, tmp_path):
    register(actions=Box(0, 10, (2,), np.int64))
    assert_one_error(run(), 2, ID, "Box(0, 10, (2,), int64)")
    assert not any(tmp_path.iterdir())


WIDE = np.float32([-3e38, 3e38])  # whose width is no float32


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_actions_are_rescaled_to_the_box(dtype):
    env = make(actions=Box(dtype([-1, 0, 2]), dtype([1, 10, 2]), dtype=dtype))
    third_step(env, 0.5)
    assert (env.unwrapped.action.tolist(), env.unwrapped.action.dtype) == ([0.5, 7.5, 2], dtype)  # the last has 2 alone
    env = make(actions=Box(*WIDE[:, None]))
    third_step(env, 1.0)
    assert env.unwrapped.action.tolist() == WIDE[1:].tolist()


# REWARDS AND OBSERVATIONS
@pytest.mark.parametrize("reward", [np.array([2.0]), np.array(2.0), 2, np.float32(2), np.array([[2]])], ids=repr)
def test_any_one_number_is_a_reward(reward):
    result = third_step(make(reward=lambda env: reward))[1]
    assert (result, type(result)) == (2.0, float)


@pytest.mark.parametrize("reward", [NAN, INF, -INF, np.ones(2), np.ones(0), np.array([NAN]), None, "a", 1e39], ids=repr)
def test_what_is_no_reward_is_refused_by_name(reward):
    with pytest.raises(gym.error.Error, match="^at step 3 of an episode, the reward is no finite number: [^\n]*$"):
        third_step(make(reward=lambda env: reward if env.t == 3 else 1.0))


SHAPES = [np.zeros(2), np.zeros(4), 1.0]


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("obs", [np.full(3, NAN), np.array([0, INF, 0]), np.full(3, 1e300), None, *SHAPES], ids=repr)
def test_what_is_no_observation_is_refused_by_name(obs, at):
    env = make(obs=lambda env: obs if env.t == at else np.zeros(3))
    with pytest.raises(gym.error.Error, match=f"^at step {at} of an episode, the observation is not [^\n]*$"):
        third_step(env)


BYTES, DICT = Box(0, 255, (1, 2), np.uint8), spaces.Dict(b=Box(-1, 1, (2,)), a=Box(0, 9, (), np.int64))
FLAT = [(BYTES, np.array([[3, 4]]), [3, 4]), (Box(-1, 1, (3,)), [0.5, 0, 1], [0.5, 0, 1])]
FLAT += [(DICT, {"a": 7, "b": np.ones(2)}, [1, 1, 7]), (spaces.Discrete(3), 2, [0, 0, 1])]


@pytest.mark.parametrize(("space", "obs", "flat"), FLAT, ids=str)
def test_observations_are_flat_float32(space, obs, flat):
    result = third_step(make(observations=space, obs=lambda env: obs))[0]
    assert (result.tolist(), result.dtype) == (flat, np.float32)


def test_observations_without_a_fixed_length_are_refused():
    with pytest.raises(ValueError, match=f"^{ID} has observations Sequence[^\n]*$"):
        make(observations=spaces.Sequence(Box(-1, 1, (2,))))


# An environment of the evaluation takes 8 steps until step 50, so the 45th action of one is the run's, in training
NAN_REWARD = {"reward": lambda env: NAN if env.age == 45 else 1.0}
NAN_OBS = {"obs": lambda env: np.full(3, NAN if env.age == 45 else 0.1)}


@IN_ALL
@pytest.mark.parametrize(
    ("parts", "named"), [(NAN_REWARD, "reward is no finite number: nan"), (NAN_OBS, "[nan, nan, nan]")]
)
def test_nan_of_an_environment_ends_the_run_in_a_line_that_names_what_where_and_when(run, parts, named):
    register(**parts)
    assert_one_error(run(), 1, ID, "agent step 44", "at step 5 of an episode", named)


@IN_ALL
def test_an_action_is_blamed_where_the_agent_is_the_cause(run, script, monkeypatch):
    register()
    monkeypatch.setattr(importlib.import_module(script).Agent, "explore", lambda *_: np.array([0, NAN], np.float32))
    assert_one_error(run(), 1, ID, "agent step 0", "an action of the actor is not finite")


# LENGTHS OF EPISODES


@pytest.mark.parametrize(
    ("limits", "flags", "limit"),
    [
        ({"limit": 50}, {}, 50),
        ({"inside": 50}, {}, 50),
        ({"limit": 50, "inside": 200}, {}, 50),
        ({"limit": 50}, {"max_episode_steps": 30}, 30),
        ({}, {"max_episode_steps": 200}, 200),
        ({"inside": 50}, {"action_repeat": 3}, 17),  # 16 agent steps have 48 of the 50
        ({"inside": 50}, {"action_repeat": 3, "max_episode_steps": 5}, 5),  # counted in agent steps
        ({"limit": 200, "inside": 50}, {}, 50),
        ({"limit": 50}, {"max_episode_steps": 200}, 50),
    ],
    ids=str,
)
def test_the_limit_is_where_episodes_truncate(limits, flags, limit):
    env = make(flags, length=None, **limits)
    env.reset(seed=0)
    ends = [env.step(np.zeros(2, np.float32))[2:4] for _ in range(limit)]
    assert ends == [(False, False)] * (limit - 1) + [(False, True)]
    assert env.limit == limit


# SimBa's rule: 1 - 5 / limit within 0.95 and 0.995. Reacher-v5 has 50 steps
DISCOUNTS = [({"limit": 50}, "", 0.95), ({"inside": 200}, "", 0.975), ({}, "--max-episode-steps 200", 0.975)]
DISCOUNTS += [({"limit": 400}, "--action-repeat 2", 0.975), ({}, "", 0.995), ({}, "--env gymnasium:Reacher", 0.95)]


@pytest.mark.parametrize("script", ["mst_sac", "mst_ddpg"])
@pytest.mark.parametrize(("limits", "flags", "gamma"), DISCOUNTS)
@pytest.mark.filterwarnings("ignore:.*Using the latest versioned environment")
def test_the_discount_follows_the_limit_and_the_table_names_both(run, limits, flags, gamma):
    register(**limits)
    ended = run("--dry-run", *flags.split())
    assert f"discount factor {gamma}, " in ended.out
    assert ("no declared limit" in ended.out) == (not limits and not flags)


@IN_ALL
def test_an_episode_without_end_ends_the_run_in_a_line_that_names_the_flag(run, script, monkeypatch):
    env_class = importlib.import_module(script).AgentEnv
    reset = env_class.reset
    monkeypatch.setattr(env_class, "reset", lambda env, **kw: (reset(env, **kw), setattr(env, "steps", 99_990))[0])
    register(length=None)
    assert_one_error(run(), 1, ID, "100,000 agent steps", "--max-episode-steps")


@pytest.mark.parametrize("script", ["mst_mrq", "mst_mrsac"])
@pytest.mark.parametrize("length", [1, 4])
def test_without_any_window_of_the_encoders_horizon_a_line_names_it(run, length):
    register(length=length)
    assert_one_error(run(), 1, "--encoder-horizon")


@IN_ALL
@pytest.mark.parametrize(
    ("length", "terminates", "limit"), [(1, 1, "None"), (4, 1, "None"), (5, 0, "None"), (None, 0, "7")]
)
def test_short_episodes_train_where_there_is_a_window(run, length, terminates, limit):
    register(length=length, terminates=terminates)
    ended = run("--max-episode-steps", limit)
    assert (ended.code, ended.err) == (0, "")
    assert f"return {length or 7:7.1f} +-   0.0" in ended.out
    assert not (torch.full((64,), 2e-40) * 0.5).any()  # main() flushes denormal numbers, 15 times as slow in AdamW


# NAMES, LIBRARIES AND PROCESSES
@IN_ALL
def test_directory_and_id_have_no_character_that_a_file_system_or_wandb_refuses(run, script, monkeypatch):
    ids = []
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **kwargs: ids.append(kwargs["id"])))
    register()
    assert run("--total-timesteps", "1", "--track").code == 0
    assert ids == [path.name for path in Path("runs").iterdir()] == [f"test_boundary-Tiny-v0__{script}__1"]


@IN_ALL
@pytest.mark.parametrize("name", ["a/b", "../a", "a:b"])
def test_an_experiment_named_as_a_path_is_refused(run, name, tmp_path):
    assert_one_error(run("--exp-name", name), 2, f"--exp-name {name}")
    assert not any(tmp_path.iterdir())


@IN_ALL
@pytest.mark.parametrize("error", [ModuleNotFoundError("dm_control"), AttributeError("flex_vertedge")], ids=repr)
def test_a_missing_or_mismatched_dm_control_is_a_line_with_the_versions(main, script, monkeypatch, error):
    def fails(name):
        raise error

    monkeypatch.setattr(importlib.import_module(script), "import_module", fails)
    assert_one_error(main("--env", "dog-run"), 2, "dog-run", "dm_control 1.0.50", "mujoco 3.17.0")


def python(*flags: str, cwd: Path, before: str = "") -> tuple[int, str, str]:
    """A short run in a process of its own, which executes `before` first."""
    code = f"{before}\nimport runpy, sys; sys.argv[:] = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    tiny = "--no-cuda --width-scale 0.03 --total-timesteps 20 --learning-starts 15 --batch-size 8 --eval-episodes 2"
    line, paths = [sys.executable, "-c", code, f"{ROOT}/mst_sac.py", *tiny.split()], f"{ROOT}:{ROOT}/tests:{cwd}"
    child = subprocess.run([*line, *flags], cwd=cwd, env={**os.environ, "PYTHONPATH": paths}, capture_output=True,
                           text=True, timeout=120, check=False)  # fmt: skip
    return child.returncode, child.stdout, child.stderr


def test_windows_is_refused_in_one_line(tmp_path):
    # as there: no fcntl; and after the imports, which need the real one, another os.name
    before = "import os, sys, tyro; sys.modules['fcntl'] = None; cli = tyro.cli\n"
    before += "tyro.cli = lambda *args, **kwargs: (cli(*args, **kwargs), setattr(os, 'name', 'nt'))[0]"
    code, _, err = python("--env", "Pendulum-v1", cwd=tmp_path, before=before)
    assert (code, err.count("\n"), err[:7], "Linux, macOS and WSL" in err) == (2, 1, "error: ", True)
    assert not [script for script in SCRIPTS if "\nimport fcntl" in (ROOT / f"{script}.py").read_text()]


@pytest.mark.parametrize("flag", ["--no-eval-processes", "--eval-processes"])
def test_mujoco_warns_once(flag, tmp_path):
    code, out, err = python("--env", "HalfCheetah-v5", "--dry-run", "--eval-episodes", "2", flag, cwd=tmp_path)
    assert code == 0
    assert (out + err).count("WARNING") <= 1


THREADED = """
import concurrent.futures, gymnasium, test_boundary
pool = concurrent.futures.ThreadPoolExecutor(1)
class Threaded(test_boundary.Tiny):
    def __init__(self):
        super().__init__(reward=lambda env: pool.submit(lambda: {reward}).result())
        self.reward(self)  # starts the thread
gymnasium.register("Threaded-v0", Threaded)
"""


@pytest.mark.parametrize(("reward", "lines"), [("1.0", 0), ("float('nan')", 1)])
def test_an_environment_that_starts_threads_is_evaluated_in_processes(reward, lines, tmp_path):
    (tmp_path / "threaded.py").write_text(THREADED.format(reward=reward))
    code, out, err = python("--env", "threaded:Threaded-v0", "--eval-processes", cwd=tmp_path)
    assert (code, err.count("\n")) == (lines, lines)
    assert lines or "return     8.0 +-   0.0" in out
