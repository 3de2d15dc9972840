"""Small environments whose every transition is known, and some that misbehave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit

TIME_LIMIT = 5


class Counter(gymnasium.Env[np.ndarray, np.ndarray]):
    """Deterministic: observes (index, episode, step), and is rewarded with 100 episode + 10 step + action.

    Args:
        index: Tells environments apart.
        lengths: After how many steps the episodes terminate, in turn.
    """

    def __init__(self, index: int = 0, lengths: Sequence[int] = (3,)) -> None:
        self.observation_space = spaces.Box(-1000, 1000, (3,), np.float32)
        self.action_space = spaces.Box(-1, 3, (1,), np.float32)  # asymmetric: -1, 0, 1 become -1, 1, 3
        self.index, self.lengths = index, lengths
        self.episode, self.t = -1, 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return self._obs(), {"only_at_reset": True}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.t += 1
        reward = 100.0 * self.episode + 10.0 * self.t + float(action[0])
        terminated = self.t >= self.lengths[self.episode % len(self.lengths)]
        info = {"t": self.t, "name": f"env {self.index}", "outer": {"inner": {"episode": self.episode}}}
        if terminated:
            info["is_success"] = True
        return self._obs(), reward, terminated, False, info

    def _obs(self) -> np.ndarray:
        return np.array([self.index, self.episode, self.t], dtype=np.float32)


class InPlace(Counter):
    """Writes every observation into one array and returns that; each action it sets to 0 once it was taken."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.memory = np.zeros(3, np.float32)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        found = super().step(action)
        action[...] = 0
        return found

    def _obs(self) -> np.ndarray:
        self.memory[:] = super()._obs()
        return self.memory


EPISODE_LENGTHS = ((3, 99, 4), (99, 2), (1, 4, 99))
"""Of three Counters: with a time limit of 5, episodes end in both ways and at different times, but never in both."""


def counters(kind: type[Counter] = Counter) -> list[Callable[[], gymnasium.Env[Any, Any]]]:
    """Factories of three Counters under a time limit."""

    def factory(index: int) -> Callable[[], gymnasium.Env[Any, Any]]:
        return lambda: TimeLimit(kind(index, EPISODE_LENGTHS[index]), TIME_LIMIT)

    return [factory(index) for index in range(len(EPISODE_LENGTHS))]


class Random(gymnasium.Env[np.ndarray, np.ndarray]):
    """Observes a new random number at each step; an episode never ends."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(0, 1, (1,), np.float64)
        self.action_space = spaces.Discrete(2)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return self.np_random.random(1), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return self.np_random.random(1), 0.0, False, False, {}


class Recorder(gymnasium.Env[np.ndarray, Any]):
    """Remembers the actions that it was sent.

    Args:
        action_space: Any.
    """

    def __init__(self, action_space: spaces.Space[Any]) -> None:
        self.observation_space = spaces.Box(-1, 1, (2,), np.float32)
        self.action_space = action_space
        self.received: list[Any] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.received.append(np.array(action))
        return np.zeros(2, np.float32), 0.0, False, False, {}


class Misbehaving(gymnasium.Env[np.ndarray, Any]):
    """Well-behaved but for one step of one environment.

    Args:
        index: Of this environment.
        culprit: Index of the environment that misbehaves.
        at: In which of its steps, from 1; 0 is its reset.
        what: It sends "shape", "float64", "list", "nan" or "inf_reward", or "raise"s.
    """

    def __init__(self, index: int, culprit: int, at: int, what: str) -> None:
        self.observation_space = spaces.Box(-10, 10, (2,), np.float32)
        self.action_space = spaces.Box(-1, 1, (1,), np.float32)
        self.fault = what if index == culprit else ""
        self.at, self.t = at, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self._obs(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        obs = self._obs()
        reward = np.inf if self.fault == "inf_reward" and self.t == self.at else 1.0
        return obs, reward, False, False, {}

    def _obs(self) -> Any:
        obs = np.full(2, self.t, dtype=np.float32)
        if self.t != self.at:
            return obs
        match self.fault:
            case "raise":
                raise ValueError("boom")
            case "shape":
                return obs[:1]
            case "float64":
                return obs.astype(np.float64)
            case "list":
                return [0.5, 0.5]
            case "nan":
                return np.array([0.0, np.nan], dtype=np.float32)
        return obs


class ShapedVecEnv:
    """A VecEnv of the Stable-Baselines kind, known by its shape alone.

    Args:
        factories: Make the environments.
    """

    def __init__(self, factories: Sequence[Callable[[], gymnasium.Env[Any, Any]]]) -> None:
        self.envs = [factory() for factory in factories]
        self.num_envs = len(self.envs)
        self.observation_space = self.envs[0].observation_space
        self.action_space = self.envs[0].action_space
        self.seeds: list[int | None] = [None] * self.num_envs
        self.closed = False

    def seed(self, seed: int | None = None) -> None:
        self.seeds = [None if seed is None else seed + i for i in range(self.num_envs)]

    def reset(self) -> np.ndarray:
        obs = np.stack([env.reset(seed=seed)[0] for env, seed in zip(self.envs, self.seeds, strict=True)])
        self.seeds = [None] * self.num_envs
        return obs

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        observations, rewards, dones, infos = [], [], [], []
        for env, action in zip(self.envs, self.actions, strict=True):
            obs, reward, terminated, truncated, info = env.step(action)
            info["TimeLimit.truncated"] = truncated and not terminated
            if terminated or truncated:
                info["terminal_observation"] = obs
                obs, _ = env.reset()
            observations.append(obs)
            rewards.append(reward)
            dones.append(terminated or truncated)
            infos.append(info)
        return np.stack(observations), np.array(rewards), np.array(dones), infos

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        self.step_async(actions)
        return self.step_wait()

    def close(self) -> None:
        self.closed = True


class InPlaceVecEnv(ShapedVecEnv):
    """Writes all observations into one array; where episodes ended, it says so with whole numbers."""

    def reset(self) -> np.ndarray:
        self.memory = super().reset()
        return self.memory

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        obs, reward, done, infos = super().step_wait()
        self.memory[:] = obs
        return self.memory, reward, done.astype(np.int64), infos


class InPlaceVectorEnv(gymnasium.vector.VectorWrapper[Any, Any, Any]):
    """Writes all observations into one array, and 0 into the actions once they were taken.

    Args:
        env: Several environments.
        flags: The dtype of what says where episodes ended.
    """

    def __init__(self, env: gymnasium.vector.VectorEnv[Any, Any, Any], flags: Any = bool) -> None:
        super().__init__(env)
        self.flags = flags

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        obs, infos = self.env.reset(**kwargs)
        if kwargs.get("options"):
            self.memory[:] = obs
        else:
            self.memory = obs
        return self.memory, infos

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        obs, reward, terminated, truncated, infos = self.env.step(actions)
        self.memory[:] = obs
        actions[...] = 0
        return self.memory, reward, terminated.astype(self.flags), truncated.astype(self.flags), infos


class BareVectorEnv(gymnasium.vector.VectorEnv[Any, Any, Any]):
    """Two natively vectorised environments; each step ends both episodes.

    Args:
        metadata: States the autoreset mode, or nothing.
    """

    num_envs = 2
    single_observation_space = spaces.Box(-1, 1, (1,), np.float32)
    single_action_space = spaces.Discrete(2)
    observation_space = spaces.Box(-1, 1, (2, 1), np.float32)
    action_space = spaces.MultiDiscrete([2, 2])

    def __init__(self, metadata: dict[str, Any]) -> None:
        self.metadata = metadata

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        return np.zeros((2, 1), np.float32), {}

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        ended = np.ones(2, bool)
        return np.ones((2, 1), np.float32), np.ones(2), ended, ~ended, {}


class BitFlip(gymnasium.Env[Any, Any]):
    """Flip bits, which are -1 or 1, until they are those of the goal, and leave them so until `n` steps are over.

    Each action is n numbers; bits whose number is above 0.5 are flipped. -1 for each step that ends at other bits than
    the goal's, else 0: of the 2^n states one is right, and nothing tells how near the others are (Andrychowicz et al.
    2017, section 3.1, where one bit is flipped at a time).

    Args:
        n: How many bits.
    """

    def __init__(self, n: int = 8) -> None:
        box = spaces.Box(-1, 1, (n,), np.float32)
        self.observation_space = spaces.Dict({"observation": box, "achieved_goal": box, "desired_goal": box})
        self.action_space = box
        self.n = n

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        super().reset(seed=seed)
        self.bits, self.goal = (np.float32(self.np_random.integers(2, size=self.n) * 2 - 1) for _ in range(2))
        self.steps = 0
        return self._obs(), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        self.bits = np.where(action > 0.5, -self.bits, self.bits)
        self.steps += 1
        reward = float(self.compute_reward(self.bits, self.goal, {}))
        return self._obs(), reward, False, self.steps == self.n, {"is_success": reward == 0}

    def compute_reward(self, achieved_goal: Any, desired_goal: Any, info: Any) -> Any:
        return np.where(np.any(achieved_goal != desired_goal, axis=-1), -1.0, 0.0)

    def _obs(self) -> dict[str, np.ndarray]:
        return {"observation": self.bits, "achieved_goal": self.bits, "desired_goal": self.goal}
