"""What environments and users really do: either it works, or one line says what is wrong before it does harm."""

import importlib
import itertools
import sys

import gymnasium as gym
import numpy as np
import pytest
from conftest import assert_one_error
from gymnasium.spaces import Box

from mst_sac import AgentEnv, Args

NAN, INF = float("nan"), float("inf")


class Tiny(gym.Env):
    """Counts its steps in `t`, since the reset, and `age`, since it was made. One argument is the faulty part."""

    def __init__(self, actions=None, observations=None, obs=None, reward=None, length=8, terminates=False):
        self.action_space = actions or Box(-1, 1, (2,), np.float32)
        self.observation_space = observations or Box(-1, 1, (3,), np.float32)
        self.obs, self.reward = obs or (lambda env: np.full(3, env.t / 10, np.float32)), reward or (lambda env: 1.0)
        self.length, self.terminates, self.age, self.actions = length, terminates, 0, []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.obs(self), {}

    def step(self, action):
        self.t, self.age = self.t + 1, self.age + 1
        self.actions.append(action)
        ends = self.t == self.length
        return self.obs(self), self.reward(self), ends and self.terminates, ends and not self.terminates, {}


def register(limit=None, inside=None, **parts) -> str:
    """The id of a Tiny with these parts, a limit in its spec and a TimeLimit inside."""
    gym.registry.pop("Tiny-v0", None)

    def entry_point():
        env = Tiny(**parts)
        return gym.wrappers.TimeLimit(env, inside) if inside else env

    gym.register("Tiny-v0", entry_point, max_episode_steps=limit)
    return "test_boundary:Tiny-v0"
