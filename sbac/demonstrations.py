"""Recorded behaviour as the beginning of a replay buffer: Minari datasets, or plain arrays."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

from sbac.adapters import Step
from sbac.buffers import ReplayBuffer
from sbac.envs import ActionCodec
from sbac.guards import NotFiniteError, nearest
from sbac.observations import value_limits
from sbac.trees import Tree, all_finite, first_not_finite, leaves, rows, space_tree, tree_map

REQUIRED = ("observations", "actions", "rewards", "terminations", "truncations")
OPTIONAL = ("next_observations",)


class _Transitions(NamedTuple):
    """N transitions in order; itself a tree of arrays. Where one does not go on in the next, it is marked as an end."""

    obs: Tree  # (N, *obs_shape)
    action: np.ndarray  # (N, *action_shape), in the units of an algorithm
    reward: np.ndarray  # (N,)
    terminated: np.ndarray  # (N,) bool
    truncated: np.ndarray  # (N,) bool
    successor: Tree  # (N, *obs_shape)


def load_demonstrations(buffer_or_model: Any, source: Any) -> int:
    """Add recorded transitions to a replay buffer.

    They are treated like what the agent collects: drawn alike, given the largest priority where replay is prioritised,
    and overwritten, oldest first, when the buffer is full. With several environments each column of the buffer gets a
    stretch of the recording, all of one length; n-step returns end where a stretch does.

    Args:
        buffer_or_model: A `ReplayBuffer`, or a model that has one.
        source: A Minari dataset, or any object whose ``iterate_episodes()`` gives episodes of T steps with
            ``observations``, (T + 1, *obs_shape), ``actions``, (T, *action_shape), ``rewards``, ``terminations`` and
            ``truncations``, (T,). Or a mapping with arrays of these names, each of N rows in the order in which they
            happened, observations included, and ``next_observations``, (N, *obs_shape). Without those, what follows a
            row is the next row, and the last row of an episode that was truncated, or is not over at the end of the
            arrays, is left out: nobody knows what followed. (Nor after a terminal row, where only hindsight replay
            asks: give it ``next_observations``.) Actions are in the environment's own units; observations are trees of
            arrays where the space is a Dict or a Tuple.

    Returns:
        How many transitions were added.

    Raises:
        TypeError: `buffer_or_model` or `source` is none of these.
        ValueError: An array is missing, has another shape or dtype than the spaces ask for, or holds actions or
            observations that the spaces exclude; or there is no transition. Nothing is added.
        NotFiniteError: NaN or infinity in an array. Nothing is added.

    Warns:
        UserWarning: There are more transitions than the buffer keeps; only the last of them are added.
    """
    buffer = getattr(buffer_or_model, "replay_buffer", buffer_or_model)
    if not isinstance(buffer, ReplayBuffer):
        raise TypeError(
            f"demonstrations go into a ReplayBuffer or a model that has one, not into {type(buffer_or_model).__name__}"
        )
    reader = _Reader(buffer.observation_space, buffer.action_space)
    if hasattr(source, "iterate_episodes"):
        episodes = [reader.episode(episode, i) for i, episode in enumerate(source.iterate_episodes())]
        if not episodes:
            raise ValueError("demonstrations: the dataset holds no episodes")
        transitions = _Transitions(*tree_map(lambda *them: np.concatenate(them), *episodes))
    elif isinstance(source, Mapping):
        transitions = reader.arrays(source)
    else:
        raise TypeError(
            "demonstrations: the source must be a Minari dataset (an object with iterate_episodes) or a mapping of "
            f"arrays with the keys {', '.join(REQUIRED)}, not {type(source).__name__}"
        )

    n_found = len(transitions.reward)
    if n_found == 0:
        raise ValueError("demonstrations: the source holds no transition whose successor is known")
    if n_found > buffer.buffer_size:
        warnings.warn(
            f"the demonstrations hold {n_found:,} transitions, the buffer keeps {buffer.buffer_size:,}: the first "
            f"{n_found - buffer.buffer_size:,} were left out; choose a larger buffer_size to keep all",
            stacklevel=2,
        )
        transitions = _Transitions(*rows(transitions, slice(-buffer.buffer_size, None)))
    _add(buffer, transitions)
    return len(transitions.reward)


def _add(buffer: ReplayBuffer, transitions: _Transitions) -> None:
    """Each column of the buffer takes an equal stretch; the last ones are filled up with empty rows."""
    n, n_envs = len(transitions.reward), buffer.n_envs
    n_rows = -(-n // n_envs)
    index = np.arange(n_envs * n_rows).reshape(n_envs, n_rows).T
    valid = index < n
    index = np.minimum(index, n - 1)
    transitions.truncated[index[-1]] |= ~transitions.terminated[index[-1]]
    infos: list[dict[str, Any]] = [{}] * n_envs
    for row in range(n_rows):
        now, there = _Transitions(*rows(transitions, index[row])), valid[row]
        step = Step(
            now.successor, now.reward, now.terminated & there, now.truncated & there, now.successor, there, infos
        )
        buffer.add(now.obs, now.action, step)


class _Reader:
    """Turns what was recorded into transitions, and refuses what does not fit the spaces."""

    def __init__(self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
        self._observation_tree = space_tree(observation_space)
        self._action_space = action_space
        self._codec = ActionCodec(action_space)

    def episode(self, episode: Any, number: int) -> _Transitions:
        """An episode of T steps with T + 1 observations."""
        where = f" of episode {number}"
        missing = [name for name in REQUIRED if not hasattr(episode, name)]
        if missing:
            raise ValueError(f"demonstrations: there are no {', '.join(missing)}{where}")
        n = _length("rewards" + where, episode.rewards)
        obs = self._obs("observations", episode.observations, n + 1, where)
        transitions = _Transitions(
            obs=rows(obs, slice(0, -1)),
            action=self._actions(episode.actions, n, where),
            reward=self._rewards(episode.rewards, n, where),
            terminated=self._flags("terminations", episode.terminations, n, where),
            truncated=self._flags("truncations", episode.truncations, n, where),
            successor=rows(obs, slice(1, None)),
        )
        transitions.truncated[-1:] |= ~transitions.terminated[-1:]
        return transitions

    def arrays(self, source: Mapping[str, Any]) -> _Transitions:
        """N rows in order."""
        unknown = [name for name in source if name not in (*REQUIRED, *OPTIONAL)]
        if unknown:
            raise ValueError(
                f"demonstrations: unknown array {unknown[0]!r}{nearest(str(unknown[0]), (*REQUIRED, *OPTIONAL))}"
            )
        missing = [name for name in REQUIRED if name not in source]
        if missing:
            raise ValueError(f"demonstrations: there are no {', '.join(missing)}; given: {', '.join(source)}")
        n = _length("rewards", source["rewards"])
        obs = self._obs("observations", source["observations"], n)
        follows = "next_observations" in source
        transitions = _Transitions(
            obs=obs,
            action=self._actions(source["actions"], n),
            reward=self._rewards(source["rewards"], n),
            terminated=self._flags("terminations", source["terminations"], n),
            truncated=self._flags("truncations", source["truncations"], n),
            successor=self._obs("next_observations", source["next_observations"], n) if follows else obs,
        )
        return transitions if follows else _with_next_rows(transitions)

    def _obs(self, name: str, given: Any, n: int, where: str = "") -> Tree:
        given_leaves = dict(leaves(given, name))
        asked = dict(leaves(self._observation_tree, name))
        if given_leaves.keys() != asked.keys():
            raise ValueError(
                f"demonstrations: the observations{where} are {', '.join(given_leaves)}, "
                f"but the observation space asks for {', '.join(asked)}"
            )
        checked = {path: self._observed(path, given_leaves[path], n, asked[path], where) for path in asked}
        paths = iter(asked)
        return tree_map(lambda _: checked[next(paths)], self._observation_tree)

    def _observed(self, path: str, given: Any, n: int, space: spaces.Space[Any], where: str) -> np.ndarray:
        # The networks compute in float32: what is larger than that holds would become infinite.
        dtype = np.dtype(np.float32 if space.dtype == np.float64 else space.dtype)
        array = _array(path + where, given, (n, *(space.shape or ())), dtype)
        limits = value_limits(space)
        if limits is not None:
            _require_within(path + where, array, *limits)
        return array

    def _actions(self, given: Any, n: int, where: str = "") -> np.ndarray:
        space = self._action_space
        array = _array("actions" + where, given, (n, *(space.shape or ())), np.dtype(space.dtype))
        if isinstance(space, spaces.Box):
            _require_within("actions" + where, array, space.low, space.high)
        return self._codec.from_env(array)

    def _rewards(self, given: Any, n: int, where: str = "") -> np.ndarray:
        return _array("rewards" + where, given, (n,), np.dtype(np.float32))

    def _flags(self, name: str, given: Any, n: int, where: str = "") -> np.ndarray:
        array = np.asarray(given)
        if array.dtype.kind in "iuf" and np.isin(array, (0, 1)).all():
            array = array.astype(bool)
        return _array(name + where, array, (n,), np.dtype(bool))


def _with_next_rows(transitions: _Transitions) -> _Transitions:
    """What follows each row is the next one; rows of which nobody knows what followed are dropped."""
    terminated = transitions.terminated
    ended = terminated | transitions.truncated
    known = terminated | ~ended
    known[-1:] = terminated[-1:]
    following = np.arange(len(ended)) + known
    # No target asks what followed a terminal row: its own observation will do.
    following -= terminated
    # Where the last row of an episode is dropped, the episode ends a row earlier.
    cut = transitions.truncated.copy()
    cut[:-1] |= ~ended[:-1] & ~known[1:]
    together = transitions._replace(truncated=cut, successor=rows(transitions.obs, following))
    return _Transitions(*rows(together, known))


def _length(name: str, given: Any) -> int:
    if np.ndim(given) == 0:
        raise ValueError(f"demonstrations: {name} must be an array, not {given!r}")
    return len(given)


def _array(name: str, given: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """What was given as an array of finite numbers.

    Raises:
        ValueError: Its shape is another, or its dtype does not become the one asked for without loss of meaning.
        NotFiniteError: It holds NaN or infinity.
    """
    array = np.asarray(given)
    if array.shape != shape or array.dtype.kind not in "biuf" or not np.can_cast(array.dtype, dtype, "same_kind"):
        raise ValueError(
            f"demonstrations: {name} must have shape {shape} and a dtype that fits {dtype}, "
            f"not shape {array.shape} and {array.dtype}"
        )
    with np.errstate(over="ignore"):
        array = array.astype(dtype)
    if not all_finite(array):
        row = first_not_finite(array)
        raise NotFiniteError(f"demonstrations: {name} must be finite, but row {row} is {np.asarray(given)[row]}")
    if dtype.kind in "iu" and (array != given).any():
        raise ValueError(
            f"demonstrations: {name} must fit {dtype}, which holds numbers from {np.iinfo(dtype).min} to "
            f"{np.iinfo(dtype).max}, but they reach from {np.min(given)} to {np.max(given)}"
        )
    return array


def _require_within(name: str, array: np.ndarray, low: Any, high: Any) -> None:
    outside = ((array < low) | (array > high)).any(axis=tuple(range(1, array.ndim)))
    if outside.any():
        row = int(np.argmax(outside))
        raise ValueError(
            f"demonstrations: {name} must lie within {low} and {high}, but row {row} is {array[row]} "
            f"({np.count_nonzero(outside)} of {len(array)} rows do not), in the environment's own units"
        )
