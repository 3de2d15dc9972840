"""What it takes to put an environment back in the midst of an episode: its random state before the reset that began
the episode, and the actions since.

Played again in a copy, wrappers included, they give the same episode wherever all that an environment does follows from
its own generator, `np_random`, and from its actions. Whether they did is for the caller to check.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces

from sbac.trees import Tree, leaves, space_tree, tree_map

_ARRAY = (np.ndarray, np.generic)
LIMIT = 2**26
"""Bytes of actions that are kept of one episode. One that goes on for longer is not recorded any more."""


class Recording(NamedTuple):
    """An episode up to now.

    Args:
        random_state: Of the environment's bit generator, before the reset.
        seed: What the reset was given.
        actions: In the environment's own units, as bytes, (steps, bytes of an action).
    """

    random_state: dict[str, Any]
    seed: int | None
    actions: np.ndarray


class Tape:
    """Records the running episode of one environment.

    Args:
        env: The environment, with its wrappers.
    """

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        self._env = env
        self._form = space_tree(env.action_space)
        self._spaces = [space for _, space in leaves(self._form)]
        self._dtype = self._spaces[0].dtype if len(self._spaces) == 1 else None
        self._start: tuple[dict[str, Any], int | None] | None = None
        self._actions = bytearray()
        self._n_actions = 0

    def begin(self, seed: int | None, options: dict[str, Any] | None) -> None:
        """Take note of the random state; right before the environment is reset."""
        self._actions.clear()
        self._n_actions = 0
        # Options may hold anything, so that a reset with them can't be made again from a file.
        generator = bit_generator(self._env) if options is None else None
        self._start = None if generator is None else (dict(generator.state), seed)

    def add(self, action: Any) -> None:
        """Take note of an action; right before the environment is stepped."""
        if self._start is None:
            return
        if isinstance(action, _ARRAY) and action.dtype is self._dtype:
            self._actions += action.tobytes()
        else:
            for (_, leaf), space in zip(leaves(action), self._spaces, strict=True):
                self._actions += np.asarray(leaf, space.dtype).tobytes()
        self._n_actions += 1
        if len(self._actions) > LIMIT:
            self._start = None
            self._actions.clear()

    def recording(self) -> Recording | None:
        """The running episode; None where there is no way back to it."""
        if self._start is None:
            return None
        actions = np.frombuffer(bytes(self._actions), np.uint8)
        return Recording(*self._start, actions.reshape(self._n_actions, -1) if self._n_actions else actions[None][:0])

    def play(self, env: gymnasium.Env[Any, Any], recording: Recording) -> tuple[Tree, float]:
        """Begin a recorded episode anew and take its actions.

        Args:
            env: Through which to reset and step: the environment itself, or a wrapper that records.
            recording: Of this environment, or one like it.

        Returns:
            The observation that this leads to, and the sum of the rewards.

        Raises:
            ValueError: There is no generator to put back, or the episode ends before its last action.
        """
        generator = bit_generator(self._env)
        if generator is None:
            raise ValueError("it has no random generator np_random")
        generator.state = recording.random_state
        obs, _ = env.reset(seed=recording.seed)
        total = 0.0
        for row in recording.actions:
            obs, reward, terminated, truncated, _ = env.step(self._action(row.tobytes()))
            total += float(reward)
            if terminated or truncated:
                raise ValueError("its episode ended earlier")
        return obs, total

    def _action(self, content: bytes) -> Any:
        """The action that was recorded as these bytes."""
        position = 0

        def read(space: spaces.Space[Any]) -> Any:
            nonlocal position
            shape = space.shape or ()
            leaf = np.frombuffer(content, space.dtype, int(np.prod(shape)), position).reshape(shape).copy()
            position += leaf.nbytes
            return leaf if shape else leaf[()]

        return tree_map(read, self._form)


def bit_generator(env: gymnasium.Env[Any, Any]) -> np.random.BitGenerator | None:
    """The bit generator of an environment's own random numbers, if it has one."""
    generator = getattr(env.unwrapped, "np_random", None)
    return generator.bit_generator if isinstance(generator, np.random.Generator) else None
