"""What environments and users really do: it works, or one line says what is wrong before it does harm."""

import ast
import concurrent.futures
import importlib
import importlib.util
import os
import re
import sys
import types
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from gymnasium import spaces
from gymnasium.spaces import Box

from conftest import ROOT, SCRIPTS, all_scripts, assert_one_error, life  # isort: skip
from mst_sac import AgentEnv, Args

ID, NAN, INF = "test_boundary:Tiny-v0", float("nan"), float("inf")


class Tiny(gym.Env):
    """Counts its steps in `t` since the reset and in `age` since it was made."""

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


WIDE = (np.float32([-3e38]), np.float32([3e38]), 0, np.float32([0]))  # its width is no float32
BOXES = [(dtype([-1, 0, 2]), dtype([1, 10, 2]), 0.5, dtype([0.5, 7.5, 2])) for dtype in (np.float16, np.float64)]


@pytest.mark.parametrize(("low", "high", "action", "rescaled"), [*BOXES, WIDE], ids=str)
def test_actions_in_minus_1_to_1_are_rescaled_to_the_box(low, high, action, rescaled):
    env = make(actions=Box(low, high, dtype=low.dtype))
    third_step(env, action)
    assert (env.unwrapped.action.tolist(), env.unwrapped.action.dtype) == (rescaled.tolist(), low.dtype)
    assert env.action_space == Box(-1, 1, low.shape, np.float32)


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


FAULTS = [  # an environment of the evaluation takes 8 steps until step 50: the 45th of one is the run's, in training
    ({"reward": lambda env: NAN if env.age == 45 else 1.0}, "reward is no finite number: nan"),
    ({"obs": lambda env: np.full(3, NAN if env.age == 45 else 0.1)}, "[nan, nan, nan]"),
]


@all_scripts
@pytest.mark.parametrize(("parts", "named"), FAULTS)
def test_nan_of_an_environment_ends_the_run_in_a_line_that_names_what_where_and_when(run, parts, named):
    register(**parts)
    assert_one_error(run(), 1, ID, "agent step 44", "at step 5 of an episode", named)


# LENGTHS OF EPISODES
@pytest.mark.parametrize("terminates", [True, False])
def test_an_end_is_the_termination_or_truncation_of_the_environment(terminates):
    assert third_step(make(length=3, terminates=terminates))[2:4] == (terminates, not terminates)


LIMITS = [
    ({"limit": 50, "inside": 200}, {}, 50),
    ({"limit": 200, "inside": 50}, {}, 50),
    ({"limit": 50}, {"max_episode_steps": 30}, 30),
    ({"limit": 50}, {"max_episode_steps": 200}, 50),
    ({}, {"max_episode_steps": 200}, 200),
    ({"inside": 50}, {"action_repeat": 3}, 17),  # 16 agent steps have 48 of the 50
    ({"inside": 50}, {"action_repeat": 3, "max_episode_steps": 5}, 5),  # counted in agent steps
]


@pytest.mark.parametrize(("limits", "flags", "limit"), LIMITS, ids=str)
def test_the_limit_is_where_episodes_truncate(limits, flags, limit):
    env = make(flags, length=None, **limits)
    env.reset(seed=0)
    ends = [env.step(np.zeros(2, np.float32))[2:4] for _ in range(limit)]
    assert ends == [(False, False)] * (limit - 1) + [(False, True)]
    assert env.limit == limit


# 1 - 5 / limit, between 0.95 and 0.995. Reacher-v5 has 50 steps
DISCOUNTS = [({"limit": 400}, "--action-repeat 2", 0.975), ({}, "", 0.995), ({}, "--env gymnasium:Reacher", 0.95)]


@pytest.mark.parametrize("script", ["mst_sac", "mst_ddpg"])
@pytest.mark.parametrize(("limits", "flags", "gamma"), DISCOUNTS)
@pytest.mark.filterwarnings("ignore:.*Using the latest versioned environment")
def test_the_discount_follows_the_limit_and_the_table_names_both(run, limits, flags, gamma):
    register(**limits)
    ended = run("--dry-run", *flags.split())
    assert f"discount factor {gamma}, " in ended.out
    assert ("no declared limit" in ended.out) == (not limits and not flags)


@all_scripts
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


SHORT = [(1, True, "None"), (4, True, "None"), (5, False, "None"), (None, False, "7")]


@all_scripts
@pytest.mark.parametrize(("length", "terminates", "limit"), SHORT)
def test_short_episodes_train_where_there_is_a_window(run, length, terminates, limit):
    register(length=length, terminates=terminates)
    ended = run("--max-episode-steps", limit)
    assert (ended.code, ended.err) == (0, "")
    assert f"return {length or 7:7.1f} +-   0.0" in ended.out
    assert not (torch.full((64,), 2e-40) * 0.5).any()  # main() flushes denormal numbers, 15 times as slow in AdamW


# NAMES, LIBRARIES AND PROCESSES
@all_scripts
def test_directory_and_id_have_no_character_that_a_file_system_or_wandb_refuses(run, script, monkeypatch):
    ids = []
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **kwargs: ids.append(kwargs["id"])))
    register()
    assert run("--total-timesteps", "1", "--track").code == 0
    assert ids == [path.name for path in Path("runs").iterdir()] == [f"test_boundary-Tiny-v0__{script}__1"]


@all_scripts
@pytest.mark.parametrize("suite", [None, types.SimpleNamespace()], ids=["missing", "mismatched"])
def test_a_missing_or_mismatched_dm_control_is_a_line_with_the_versions(main, monkeypatch, suite):
    monkeypatch.setitem(sys.modules, "dm_control.suite", suite)
    assert_one_error(main("--env", "dog-run"), 2, "dog-run", "dm_control 1.0.50", "mujoco 3.17.0")


def test_windows_is_refused_in_one_line(main, monkeypatch):
    cli = tyro.cli
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", os.name)  # another name once all is imported, for the imports need the real one
        patch.setattr(tyro, "cli", lambda *args, **kwargs: (cli(*args, **kwargs), setattr(os, "name", "nt"))[0])
        ended = main()
    assert_one_error(ended, 2, "Linux, macOS and WSL")
    at_the_top = re.compile(r"^(import|from) fcntl", re.MULTILINE)  # which Windows does not have
    assert [script for script in SCRIPTS if at_the_top.search((ROOT / f"{script}.py").read_text())] == []


POOL = concurrent.futures.ThreadPoolExecutor(1)


class Threaded(Tiny):
    def __init__(self, number: float):
        super().__init__(reward=lambda env: POOL.submit(lambda: number).result())
        self.reward(self)  # starts the thread


gym.register("Threaded-v0", Threaded, kwargs={"number": 1.0})
gym.register("Nan-v0", Threaded, kwargs={"number": NAN})


@pytest.mark.parametrize(("name", "lines"), [("Threaded-v0", 0), ("Nan-v0", 1)])
def test_an_environment_that_starts_threads_is_evaluated_in_processes(script, name, lines, tmp_path):
    flags = ["--env", f"test_boundary:{name}", "--eval-processes", "--total-timesteps", "20"]
    ended = life(script, *flags, cwd=tmp_path)
    assert (ended.code, ended.err.count("\n")) == (lines, lines)
    assert lines or "return     8.0 +-   0.0" in ended.out


# FLAGS
REFUSED = {  # and words of the one line
    "--total-timesteps 0": "--total-timesteps 0: write a number from 1",
    "--eval-interval 0": "--eval-interval 0",
    "--batch-size 0": "--batch-size 0",
    "--max-episode-steps 0": "--max-episode-steps 0",
    "--gamma 2": "--gamma 2.0: write a number from 0 to 1",
    "--gamma nan": "--gamma nan",
    "--actor-lr -1": "--actor-lr -1.0",
    "--weight-decay inf": "--weight-decay inf",
    "--seed -1": "--seed -1",
    "--width-scale 0": "--width-scale 0.0: write a number from 0.001",
    "--initial-temperature 0": "--initial-temperature 0.0: write a number from 0.001",
    "--exp-name ../a": "--exp-name ../a names a folder",
    "--exp-name a:b": "--exp-name a:b names a folder",
    **{
        f"--env {name}": f"no {name}: "
        for name in ("dog-rum", "HalfCheetah-v55", "nothing", "no_such_package:Thing-v0")
    },
    "--q-horizon 6": "--encoder-horizon must be at least --q-horizon",
    f"--buffer-size {10**13}": "allocate memory",
    # The Sparsifier's words
    "--critic-sparsity 1": "sparsity is 1.0: write the share of zeros, in [0, 1)",
    "--encoder-regime dst --encoder-sparsity -0.1": "-0.1",
    "--drop-fraction 1.5": "drop fractions 1.5 and 0.0: write numbers in [0, 1]",
    "--critic-regime d2s --schedule-start 0.9 --schedule-end 0.5": "schedule_start < schedule_end",
}
if not torch.cuda.is_available():
    REFUSED["--cuda"] = "--cuda needs a GPU that torch sees: train with --no-cuda"


@pytest.mark.parametrize("script", ["mst_mrsac"])  # it has an encoder and a temperature
@pytest.mark.parametrize(("flags", "words"), REFUSED.items())
def test_a_value_that_cannot_be_is_refused_in_one_line(main, flags, words):
    assert_one_error(main(*flags.split()), 2, words)
    assert not Path("runs").exists()  # whose config.json would refuse the corrected command


def test_what_tyro_wandb_and_the_file_system_refuse_ends_before_the_run(main):
    for flags in ("--seed 1.5", "--critic-regime rigl", "--no-such-flag 1"):
        ended = main(*flags.split())
        assert ended.code == 2
        assert flags.split()[0] in ended.err  # tyro's message, in a frame
    if not importlib.util.find_spec("wandb"):
        assert_one_error(main("--track"), 1, "wandb")
    Path("file").touch()  # a path below it fails for root as well, whom permissions do not stop
    assert_one_error(main("--runs-dir", "file/runs"), 1, "file/runs", "--runs-dir")


@all_scripts
def test_help_names_and_explains_every_flag_and_the_exit_codes(script, main):
    ended = main("--help")
    assert (ended.code, ended.err) == (0, "")
    text = re.sub(r"[\s│]+", "", re.sub(r"\x1b\[[\d;]*m", "", ended.out))  # without frame, colours and line breaks
    assert "Exitcodes:0finished,75stopped,2wrongusage,1otherfailure." in text
    source = (ROOT / f"{script}.py").read_text()
    firsts = re.findall(r"\n\n    # .*\n    (\w+): ", source.partition("# NETWORKS")[0])  # of the groups of Args
    named = re.findall(r"[a-z]\((?:from)?--([\w-]+)\)", text.partition("Exitcodes")[0])
    assert named == ["env", "buffer-size", *(name.replace("_", "-") for name in firsts[2:])]
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
        assert "2,094,336" in ended.out  # the encoder on dog, Appendix C's "2M"
        assert "4,478,760" in ended.out  # the agent
    assert list(Path().iterdir()) == []
