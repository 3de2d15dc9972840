"""One environment that is watched and recorded, and several of them that step together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from sbac.guards import EnvironmentFault
from sbac.observations import MASK
from sbac.tape import Recording, Tape
from sbac.trees import Tree, leaves, space_tree, tree_map

_NUMBER = (float, int, np.floating, np.integer)
_FLAG = (bool, np.bool_)


class Watched(gymnasium.Wrapper[Any, Any, Any, Any]):
    """One environment that is named, with the step, when it fails or sends what its space does not allow.

    It is recorded, so that it can be put back.

    Args:
        env: The environment.
        index: Its number among those of a vector environment.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], index: int) -> None:
        super().__init__(env)
        self.tape = Tape(env)
        self.action_mask: Any = None  # that came with the newest observation
        self._index = index
        self._steps = 0
        self._shape = env.observation_space.shape
        self._dtype = np.dtype(env.observation_space.dtype)
        self._promised = dict(leaves(space_tree(env.observation_space)))

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        self.tape.begin(kwargs.get("seed"), kwargs.get("options"))
        try:
            obs, info = self.env.reset(**kwargs)
        except Exception as error:
            raise self._fault("reset", error) from error
        self._check(obs, "reset")
        self.action_mask = info.get(MASK)
        return obs, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self._steps += 1
        self.tape.add(action)
        try:
            obs, reward, terminated, truncated, info = self.env.step(action)
        except Exception as error:
            raise self._fault("step", error) from error
        if not (type(obs) is np.ndarray and obs.shape == self._shape and obs.dtype == self._dtype):
            self._check(obs, "step")
        if not (isinstance(reward, _NUMBER) and isinstance(terminated, _FLAG) and isinstance(truncated, _FLAG)):
            raise EnvironmentFault(
                f"environment {self._index} ({self._name}) sent the reward {reward!r}, terminated {terminated!r} and "
                f"truncated {truncated!r} at {self._where('step')}; a reward is one number, the others True or False"
            )
        self.action_mask = info.get(MASK)
        if terminated or truncated:
            # It may write the first observation of the next episode into the same array.
            obs = tree_map(lambda leaf: leaf.copy() if isinstance(leaf, np.ndarray) else leaf, obs)
        return obs, reward, terminated, truncated, info

    def put_back(self, recording: Recording | None, obs: Tree, total: float) -> str | None:
        """Play a recorded episode again; returns why that did not lead to `obs` and the return `total`, if so."""
        if recording is None:
            return "it could not be recorded"
        try:
            found, found_total = self.tape.play(self, recording)
        except Exception as error:  # of whatever the environment raises, played where it was not recorded
            return str(error)
        expected = dict(leaves(obs))
        same = all(np.array_equal(np.asarray(leaf), expected[name]) for name, leaf in leaves(found))
        return None if same and found_total == total else "played again, its episode came out differently"

    def _check(self, obs: Any, call: str) -> None:
        sent = dict(leaves(obs))
        if sent.keys() != self._promised.keys():
            raise EnvironmentFault(
                f"environment {self._index} ({self._name}) sent an observation with the parts {sorted(sent)} at "
                f"{self._where(call)}; its observation_space promises {sorted(self._promised)}"
            )
        for name, leaf in sent.items():
            array, space = np.asarray(leaf), self._promised[name]
            part = f" ({name})" if name else ""
            is_index = space.shape == () and array.dtype.kind in "iu"
            if array.shape != space.shape or not (is_index or np.can_cast(array.dtype, space.dtype)):
                raise EnvironmentFault(
                    f"environment {self._index} ({self._name}) sent an observation{part} of shape {array.shape} and "
                    f"dtype {array.dtype} at {self._where(call)}; its observation_space promises {space.shape} and "
                    f"{space.dtype}: return an array such as numpy.asarray(obs, dtype=numpy.{space.dtype}) "
                    "or correct the space"
                )

    def _fault(self, call: str, error: Exception) -> EnvironmentFault:
        return EnvironmentFault(
            f"environment {self._index} ({self._name}) raised {type(error).__name__} at {self._where(call)}: {error}"
        )

    def _where(self, call: str) -> str:
        return f"its step {self._steps}" if call == "step" else f"reset after {self._steps} steps"

    @property
    def _name(self) -> str:
        return self.spec.id if self.spec is not None else type(self.unwrapped).__name__


class SameStepVectorEnv(SyncVectorEnv):
    """Gymnasium's `SyncVectorEnv`, which resets in the same step, with less around the steps of simple environments.

    Args:
        makers: A function for each environment.
    """

    def __init__(self, makers: Sequence[Callable[[], gymnasium.Env[Any, Any]]]) -> None:
        super().__init__(makers, autoreset_mode=AutoresetMode.SAME_STEP)
        array_like = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
        self._is_simple = isinstance(self.single_observation_space, spaces.Box) and isinstance(
            self.single_action_space, array_like
        )

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """As of `SyncVectorEnv`: the same arrays and infos."""
        if not self._is_simple:
            return super().step(actions)
        obs: list[Any] = []
        reward: list[Any] = []
        terminated: list[Any] = []
        truncated: list[Any] = []
        infos: dict[str, Any] = {}
        for i, (env, action) in enumerate(zip(self.envs, actions, strict=True)):
            row, r, is_terminated, is_truncated, info = env.step(action)
            if is_terminated or is_truncated:
                infos = self._add_info(infos, {"final_obs": row, "final_info": info}, i)
                row, info = env.reset()
            obs.append(row)
            reward.append(r)
            terminated.append(is_terminated)
            truncated.append(is_truncated)
            if info:
                infos = self._add_info(infos, info, i)
        self._env_obs = obs
        together = np.array(obs, self._observations.dtype)
        return together, np.array(reward, np.float64), np.array(terminated, bool), np.array(truncated, bool), infos
