"""Environments and flags: what a step returns, and that one line says what is wrong before it does harm."""

import ast
import importlib
import importlib.util
import os
import re
import signal
import sys
import threading
import types
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.spaces import Box

from conftest import ROOT, all_scripts, assert_one_error, life  # isort: skip
from mst_sac import Args, make_env

ID, NAN, INF = "test_env:Tiny-v0", float("nan"), float("inf")


class Tiny(gym.Env):
    """Counts its steps in `t` since the reset and in `age` since it was made. Holds another environment as `env`."""

    def __init__(self, actions=None, observations=None, obs=None, reward=None, length=8, terminates=False, inside=None):
        self.action_space = actions or Box(-1, 1, (2,), np.float32)
        self.observation_space = observations or Box(-1, 1, (3,), np.float32)
        self.obs, self.reward = obs or (lambda env: np.full(3, env.t / 10, np.float32)), reward or (lambda env: 1.0)
        self.length, self.terminates, self.age = length, terminates, 0
        self.env = inside

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return self.obs(self), {}

    def step(self, action):
        self.t, self.age, self.action = self.t + 1, self.age + 1, action
        ends = self.t == self.length
        ended = np.array([ends and self.terminates]), ends and not self.terminates
        return self.obs(self), self.reward(self), *ended, {"episode": None, "contacts": np.zeros(id(self) % 7)}


def register(limit=None, **parts) -> None:
    """`ID` is a Tiny with these parts and a limit in its spec."""
    gym.registry.pop("Tiny-v0", None)
    gym.register("Tiny-v0", lambda: Tiny(**parts), max_episode_steps=limit)


def make(flags=(), **parts) -> gym.Env:
    register(**parts)
    return make_env(Args(env_id=ID, **dict(flags)))


def third_step(env: gym.Env, action: float = 1.0) -> tuple:
    env.reset(seed=0)
    return [env.step(np.full(env.action_space.shape, action, np.float32)) for _ in range(3)][-1]


@pytest.fixture
def run(main):
    """A short run on `ID`: 60 agent steps, of which 20 train."""
    own = ["--env", ID, "--action-repeat", "1", "--max-episode-steps", "None", "--total-timesteps", "60"]
    return lambda *flags: main(*own, *flags)


# DEEPMIND CONTROL
# dog: 9 observations, fish: scalars and a target drawn at reset, quadruped: actions outside [-1, 1]
@pytest.mark.parametrize("env_id", ["dog-run", "fish-swim", "ball_in_cup-catch", "quadruped-run"])
def test_a_step_is_two_dm_control_steps_bit_for_bit(env_id):
    env = make_env(Args(env_id=env_id))
    from dm_control import suite

    raw = suite.load(*env_id.split("-"), task_kwargs={"random": 5})
    env.reset(seed=5)
    raw.reset()
    low, high = raw.action_spec().minimum, raw.action_spec().maximum
    for action in np.random.default_rng(0).uniform(-1, 1, (50, *env.action_space.shape)).astype(np.float32):
        gradient = 2 / (high - low)  # as RescaleAction rounds
        obs, reward, terminated, truncated, _ = env.step(action)
        in_bounds = (action - (gradient * -low - 1)) / gradient
        first, second = raw.step(in_bounds), raw.step(in_bounds)
        plain = np.concatenate([np.ravel(second.observation[name]) for name in raw.observation_spec()])
        assert (obs.tobytes(), reward) == (plain.astype(np.float32).tobytes(), first.reward + second.reward)
        assert (terminated, truncated) == (False, False)


# reacher, finger and fish write into the model at reset
@pytest.mark.parametrize("env_id", ["dog-run", "reacher-easy", "finger-turn_hard", "fish-swim", "HalfCheetah-v5"])
def test_a_replayed_episode_goes_on_bit_for_bit(env_id):
    played, restored = (make_env(Args(env_id=env_id, seed=7)) for _ in range(2))
    actions = np.random.default_rng(0).uniform(-1, 1, (50, *played.action_space.shape)).astype(np.float32)
    played.reset(seed=1)
    for action in actions[:20]:  # an earlier episode, which must not matter
        played.step(action)
    for env in (played, restored):
        assert env.reset(seed=42)[0].dtype == np.float32
    for action in actions[20:]:
        ours, theirs = played.step(action), restored.step(action)
        assert (ours[0].tobytes(), *ours[1:4]) == (theirs[0].tobytes(), *theirs[1:4])


# ACTIONS
NO_BOX = [spaces.MultiDiscrete([2, 3]), spaces.Discrete(3), spaces.Dict(a=Box(-1, 1, (2,))), Box(0, 10, (2,), np.int64)]
NOT_FLAT = [Box(-1, 1, (2, 2)), Box(-1, 1, ())]
NO_RANGE = [Box(-INF, INF, (2,)), Box(-1, INF, (2,)), Box(np.float32([0, -1]), np.float32([0, 1]))]


@pytest.mark.parametrize("actions", [*NO_BOX, *NOT_FLAT, *NO_RANGE], ids=str)
def test_actions_that_no_rescaling_serves_are_refused_in_a_line(run, actions):
    register(actions=actions)
    assert_one_error(run(), 2, f"{ID} has actions {actions}", "a bounded Box")


BOXES = [(dtype([-1, 0]), dtype([1, 10]), 0.5, dtype([0.5, 7.5])) for dtype in (np.float32, np.float64)]
BOXES.append((np.float32([-0.33]), np.float32([0.87]), 1.0, np.float32([0.87])))  # RescaleAction alone: 0.87000006


@pytest.mark.parametrize(("low", "high", "action", "rescaled"), BOXES, ids=str)
def test_actions_in_minus_1_to_1_are_rescaled_to_the_box_and_never_leave_it(low, high, action, rescaled):
    env = make(actions=Box(low, high, dtype=low.dtype))
    third_step(env, action)
    assert env.unwrapped.action.tolist() == rescaled.tolist()


# REWARDS AND OBSERVATIONS
@pytest.mark.parametrize("reward", [np.array([2.0]), np.array(2.0), 2, np.float32(2), np.array([[2]]), True], ids=repr)
@pytest.mark.parametrize("repeat", [1, 2])
def test_any_one_number_is_a_reward(reward, repeat):
    result = third_step(make({"action_repeat": repeat}, reward=lambda env: reward))[1]
    assert (result, type(result)) == (repeat * float(np.ravel(reward)[0]), float)


BYTES, DICT = Box(0, 255, (1, 2), np.uint8), spaces.Dict(b=Box(-1, 1, (2,)), a=spaces.Discrete(3), c=Box(0, 9, ()))
GOOD = {"a": 1, "b": np.ones(2), "c": 7}
FLAT = [(BYTES, np.array([[3, 4]]), [3, 4]), (Box(-1, 1, (3,)), [0.5, 0, 1.1], [0.5, 0, 1.1])]
FLAT += [(BYTES, np.array([[0.5, 0.25]]), [0.5, 0.25]), (DICT, GOOD, [1, 1, 0, 1, 0, 7])]
FLAT += [(spaces.Discrete(3), 2, [0, 0, 1])]


@pytest.mark.parametrize(("space", "obs", "flat"), FLAT, ids=str)
def test_observations_are_flat_float32(space, obs, flat):
    result = third_step(make(observations=space, obs=lambda env: obs))[0]
    assert (result.tolist(), result.dtype) == (np.float32(flat).tolist(), np.float32)


OF_3, NOT_FINITE = Box(-1, 1, (3,)), [np.full(3, NAN), np.array([0, INF, 0]), np.full(3, 1e300)]
BAD = [(OF_3, np.zeros(3), bad) for bad in (*NOT_FINITE, None, np.zeros(2), 1.0)]
BAD += [(DICT, GOOD, GOOD | bad) for bad in ({"a": 3}, {"a": -1}, {"b": np.ones(3)}, {"c": NAN})]
BAD += [(DICT, GOOD, {"a": 1, "b": np.ones(2)}), (spaces.Discrete(3), 0, -1), (spaces.Discrete(3), 0, 3)]
BAD += [(spaces.MultiDiscrete([2, 3]), np.zeros(2, int), np.array([2, 0])), (spaces.MultiBinary(1), [0], [2])]


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize(("space", "good", "bad"), BAD, ids=str)
def test_an_observation_that_is_not_of_its_space_is_named_with_its_step_and_ends_the_run(run, space, good, bad):
    register(observations=space, obs=lambda env: bad if env.t == 5 else good)
    assert_one_error(run(), 1, ID, "at step 5 of an episode", " ".join(str(bad).split()))


def test_observations_without_a_fixed_length_are_refused_in_a_line(run):
    register(observations=spaces.Sequence(Box(-1, 1, (2,))))
    assert_one_error(run(), 2, "observations Sequence")


@all_scripts
def test_a_reward_that_is_not_finite_ends_the_run_in_a_line(run):
    register(reward=lambda env: NAN if env.age == 45 else 1.0)  # an evaluation takes 9 steps of each environment
    assert_one_error(run(), 1, ID, "reward nan", "agent step 44")


def test_an_action_of_the_actor_that_is_not_finite_ends_the_run_in_a_line(run, monkeypatch):
    register()
    monkeypatch.setattr("mst_mrq.Agent.explore", lambda *args: np.float32([NAN, 0]))
    assert_one_error(run(), 1, "action at agent step 0", "nan")


class Threaded(Tiny):
    """Starts a thread that ends when it is closed."""

    def __init__(self):
        super().__init__()
        self.closed = threading.Event()
        threading.Thread(target=self.closed.wait).start()

    def close(self):
        self.closed.set()


gym.register("Threaded-v0", Threaded)


@pytest.mark.parametrize(("at", "code"), [((), 0), (("ReplayBuffer.add", 50, signal.SIGTERM), 75)])
def test_environments_are_closed_so_that_their_threads_end(tmp_path, at, code):
    ended = life("mst_mrq", "--env", "test_env:Threaded-v0", "--total-timesteps", "60", cwd=tmp_path, at=at)
    assert (ended.code, ended.err) == (code, "")


def test_an_error_of_the_environment_keeps_its_traceback(run):
    register(obs=lambda env: {}["mine"])
    with pytest.raises(KeyError, match="mine"):
        run()


# LENGTHS OF EPISODES
INNER = gym.wrappers.TimeLimit(Tiny(), 200)
LIMITS = [
    ({"limit": 400, "inside": INNER}, {}, 400),  # of the environment itself, not of one that it holds
    ({"limit": 50}, {"max_episode_steps": 30}, 30),
    ({"limit": 50}, {"max_episode_steps": 200}, 50),
    ({}, {"max_episode_steps": 200}, 200),
    ({"limit": 50}, {"action_repeat": 3}, 17),  # 16 agent steps have 48 of the 50
    ({"limit": 50}, {"action_repeat": 3, "max_episode_steps": 5}, 5),  # counted in agent steps
]


@pytest.mark.parametrize(("limits", "flags", "limit"), LIMITS, ids=str)
def test_the_limit_is_where_episodes_truncate(limits, flags, limit):
    register(length=None, **limits)
    args = Args(env_id=ID, **flags)
    env = make_env(args)
    env.reset(seed=0)
    ends = [env.step(np.zeros(2, np.float32))[2:4] for _ in range(limit)]
    assert ends == [(False, False)] * (limit - 1) + [(False, True)]
    assert args.max_episode_steps == limit


# 1 - 5 / limit, between 0.95 and 0.995. Reacher-v5 has 50 steps, a task of the suite 1,000
DISCOUNTS = [({"limit": 400}, "--action-repeat 2", 0.975), ({}, "", 0.995), ({}, "--env Reacher-v5", 0.95)]


@pytest.mark.parametrize("script", ["mst_sac", "mst_ddpg"])
@pytest.mark.parametrize(("limits", "flags", "gamma"), [*DISCOUNTS, ({}, "--env dog-run --action-repeat 4", 0.98)])
def test_the_discount_follows_the_limit_and_the_table_names_both(run, limits, flags, gamma):
    register(**limits)
    ended = run("--dry-run", *flags.split())
    assert f"discount factor {gamma}\n" in ended.out
    assert ("none is declared" in ended.out) == (not limits and not flags)


@pytest.mark.parametrize("script", ["mst_mrq", "mst_mrsac"])
def test_without_any_window_of_the_encoders_horizon_a_line_names_it(run):
    register(length=4)
    assert_one_error(run(), 1, "--encoder-horizon")


@all_scripts
@pytest.mark.parametrize(("length", "terminates"), [(1, True), (4, True), (5, False)])
def test_short_episodes_train_where_there_is_a_window(run, length, terminates):
    register(length=length, terminates=terminates)
    ended = run()
    assert ended.code == 0
    assert f"return {length:7.1f} +-   0.0" in ended.out
    assert not (torch.full((64,), 2e-40) * 0.5).any()  # main() flushes denormal numbers, 15 times as slow in AdamW


# NAMES AND FLAGS
@all_scripts
def test_directory_and_id_have_no_character_that_a_file_system_or_wandb_refuses(run, script, monkeypatch):
    ids, spec = [], importlib.machinery.ModuleSpec("wandb", None)
    wandb = types.SimpleNamespace(init=lambda **kwargs: ids.append(kwargs["id"]), __spec__=spec)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    register()
    monkeypatch.setenv("HOME", str(Path.cwd()))
    assert run("--total-timesteps", "1", "--track", "--runs-dir=~/x").code == 0
    assert ids == [path.name for path in Path("x").iterdir()] == [f"test_env-Tiny-v0__{script}__1"]


REFUSED = {  # and words of the one line
    "--total-timesteps 0": "--total-timesteps 0: write a number from 1 up\n",
    "--eval-interval 0": "--eval-interval 0",
    "--max-episode-steps 0": "--max-episode-steps 0",
    "--gamma -1": "--gamma -1.0: write a number from 0 to 1",
    "--gamma nan": "--gamma nan",
    "--actor-lr -1": "--actor-lr -1.0",
    "--seed -1": "--seed -1",
    "--scale -1": "--scale -1.0: write a number from 0.001",
    "--width-scale 0": "--width-scale 0.0",
    "--initial-temperature 0": "--initial-temperature 0.0: write a number from 0.001",
    "--critic-sparsity 1": "--critic-sparsity 1.0: write a number from 0 to 0.999",
    "--drop-fraction 1.5": "--drop-fraction 1.5",
    "--schedule-start 2": "--schedule-start 2.0",
    "--env dog-rum": "dog-rum is neither a task of the DeepMind Control suite",
    "--env HalfCheetah": "HalfCheetah is neither",
    "--env HalfCheeta-v5": "Did you mean: `HalfCheetah`",
    "--env HalfCheetah-v55": "HalfCheetah",
    "--env no_such_package:Thing-v0": "PYTHONPATH",
    "--q-horizon 6": "--encoder-horizon must be at least --q-horizon",
    "--track": "pip install wandb",
    "--cuda": "--no-cuda",
}


@pytest.mark.parametrize("script", ["mst_mrsac"])  # it has an encoder and a temperature
@pytest.mark.parametrize(("flags", "words"), REFUSED.items())
def test_a_value_that_cannot_be_is_refused_in_one_line(main, flags, words):
    if (flags == "--cuda" and torch.cuda.is_available()) or (flags == "--track" and importlib.util.find_spec("wandb")):
        pytest.skip("it can be here")
    assert_one_error(main(*flags.split()), 2, words)
    assert not Path("runs").exists()  # whose config.json would refuse the corrected command


@pytest.mark.parametrize("script", ["mst_sac"])
def test_a_share_of_the_target_above_1_is_refused(main, script):
    assert_one_error(main("--tau", "2"), 2, "--tau 2.0: write a number from 0 to 1")


def test_what_tyro_and_the_file_system_refuse_ends_before_the_run(main):
    for flags in ("--seed 1.5", "--critic-regime rigl", "--no-such-flag 1"):
        ended = main(*flags.split())
        assert ended.code == 2
        assert flags.split()[0] in ended.err  # tyro's message, in a frame
    Path("file").touch()  # a path below it fails for root as well, whom permissions do not stop
    assert_one_error(main("--runs-dir", "file/runs"), 2, "file/runs", "--runs-dir")


def test_too_large_a_buffer_ends_with_its_flag_and_the_table_names_its_size(main):
    with pytest.raises(MemoryError, match=f"--buffer-size {10**13}"):
        main("--buffer-size", f"{10**13}")
    # cartpole: 5 observations, 1 action, 3 numbers of a step; 1,000,000 * 9 * 4 bytes are 0.03 GiB
    assert "0.03 GiB of replay buffer" in main("--dry-run", "--buffer-size", "1000000").out


def test_a_run_that_trains_nothing_says_so(main):
    ended = main("--learning-starts", "500", "--total-timesteps", "30")
    assert ended.code == 0
    assert ended.err == "warning: nothing will be trained: --learning-starts is beyond --total-timesteps\n"


@all_scripts
def test_help_names_and_explains_every_flag_and_the_exit_codes(script, main, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    ended = main("--help")
    assert (ended.code, ended.err) == (0, "")
    assert max(map(len, ended.out.splitlines())) <= 100  # a terminal would break words
    text = re.sub(r"[\s│]+", "", re.sub(r"\x1b\[[\d;]*m", "", ended.out))  # without frame, colours and line breaks
    assert "Exitcodes:0finished,75stoppedbyasignal,2wrongflags,1otherfailure." in text
    source = (ROOT / f"{script}.py").read_text()
    (args,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Args")
    assert len(args.body) > 40
    for field in args.body:
        (comment,) = re.findall(r"  # (.+)", "\n".join(source.splitlines()[field.lineno - 1 : field.end_lineno]))
        assert f"--{field.target.id.replace('_', '-')}" in text
        assert re.sub(r"\s", "", comment) in text


@all_scripts
def test_dry_run_prints_the_table_and_creates_nothing(script, main):
    ended = main("--dry-run", "--env", "dog-run", "--width-scale", "1")
    assert (ended.code, ended.err) == (0, "")
    if script == "mst_mrq":
        assert "2,094,336 parameters" in ended.out  # the encoder on dog, Appendix C's "2M"
    assert list(Path().iterdir()) == []


def test_a_headless_run_is_silent_and_mujoco_gl_is_the_users(tmp_path):
    ended = life("mst_sac", "--env", "dog-run", "--dry-run", cwd=tmp_path)
    assert (ended.code, ended.err) == (0, "")
    assert os.environ.get("MUJOCO_GL", "disable") == "disable"
