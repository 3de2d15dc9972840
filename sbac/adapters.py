"""Vector environments of each kind, adapted to one `Step`.

Gymnasium's reset themselves in one of three ways, those of Stable-Baselines in a fourth; all yield the same
transitions.
"""

from __future__ import annotations

import multiprocessing.connection
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from sbac.guards import EnvironmentFault
from sbac.observations import MASK
from sbac.trees import Tree, copy_tree, rows, set_rows


class Step(NamedTuple):
    """What one step of n environments gave.

    `obs` is what to act on next: after an episode's end, the first observation of the next episode (or, where the
    environment resets in a step of its own, the last of the old one, and the step after it is not `valid`).
    `successor` is the true next state s_{t+1}, also where an episode ended. Only `terminated` stops a bootstrap.
    """

    obs: Tree  # (n, *obs_shape)
    reward: np.ndarray  # (n,) float64
    terminated: np.ndarray  # (n,) bool
    truncated: np.ndarray  # (n,) bool
    successor: Tree  # (n, *obs_shape)
    valid: np.ndarray  # (n,) bool: False for the empty step of next-step autoreset
    infos: Sequence[dict[str, Any]]


class Infos(Sequence[dict[str, Any]]):
    """One info dictionary per environment, made only when somebody looks.

    At an episode's end it also holds, as in Stable-Baselines, ``terminal_observation``, ``TimeLimit.truncated`` and,
    once the algorithm has counted it, ``episode`` with the keys r, l and t.

    Args:
        raw: The infos of n environments as Gymnasium sends them: an array (n, ...) for each key.
        n_envs: n.
        ends: What else the infos of the environments hold whose episodes ended, by their numbers.
    """

    def __init__(self, raw: Mapping[str, Any], n_envs: int, ends: dict[int, dict[str, Any]]) -> None:
        self._raw = raw
        self._n_envs = n_envs
        self.ends = ends

    def __len__(self) -> int:
        return self._n_envs

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._n_envs))]
        index = range(self._n_envs)[index]
        if index not in self.ends:
            return _one_info(self._raw, index)
        source = self._raw
        final = self._raw.get("final_info")
        if isinstance(final, Mapping):
            # Gymnasium's vector RecordEpisodeStatistics writes beside final_info, not into it.
            source = {key: self._raw[key] for key in ("episode", "_episode") if key in self._raw} | dict(final)
        return {**_one_info(source, index), **self.ends[index]}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(self._n_envs))


def _one_info(raw: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The entries of Gymnasium's vector info that environment `index` sent."""
    info: dict[str, Any] = {}
    for key, value in raw.items():
        if (key.startswith("_") and key[1:] in raw) or key in ("final_obs", "final_info"):
            continue
        sent = raw.get(f"_{key}")
        if sent is not None and not sent[index]:
            continue
        if isinstance(value, Mapping):
            info[key] = _one_info(value, index)
        else:
            info[key] = value[index] if isinstance(value, (list, tuple)) or np.ndim(value) > 0 else value
    return info


class Adapter(Protocol):
    """A vector environment, seen through `Step`.

    `action_mask` is what the infos that came with the newest observations allow, (n, k) bool, or None.
    """

    env: Any
    num_envs: int
    action_mask: np.ndarray | None
    observation_space: spaces.Space[Any]
    action_space: spaces.Space[Any]

    def reset(self, seed: int | None) -> Tree:
        """Begin new episodes everywhere, from a seed if there is one. Returns observations (n, *obs_shape)."""

    def step(self, actions: Tree) -> Step:
        """Take a step with the environments' own actions, (n, *action_shape)."""

    def close(self) -> None:
        """Close the environments."""


class GymnasiumAdapter(Adapter):
    """A Gymnasium ``VectorEnv`` in any of its three autoreset modes.

    Args:
        env: The vector environment.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        self.env = env
        self.num_envs = env.num_envs
        # envpool is a VectorEnv without the single_ names: its spaces already are those of one environment.
        self.observation_space = getattr(env, "single_observation_space", env.observation_space)
        self.action_space = getattr(env, "single_action_space", env.action_space)
        mode = env.metadata.get("autoreset_mode")
        if mode is None:
            warnings.warn(
                f"{env!r} does not state metadata['autoreset_mode']; "
                "taken for next-step autoreset, Gymnasium's default",
                stacklevel=4,
            )
        self._mode = AutoresetMode(mode or AutoresetMode.NEXT_STEP)
        self._ended = np.zeros(self.num_envs, dtype=bool)
        self._all_valid = np.ones(self.num_envs, dtype=bool)
        self._all_valid.setflags(write=False)
        # Only of Gymnasium's own, without wrappers, is it known that nothing writes into what they returned.
        self._reuses_memory = not (isinstance(env, (SyncVectorEnv, AsyncVectorEnv)) and env.copy)
        self.action_mask: np.ndarray | None = None

    def reset(self, seed: int | None) -> Tree:
        seeds: Any = seed
        if seed is not None and isinstance(self.env.unwrapped, (SyncVectorEnv, AsyncVectorEnv)):
            seeds = _words(seed, self.num_envs)
        obs, raw = self.env.reset(seed=seeds)
        self.action_mask = _masks(raw, self.num_envs)
        self._ended = np.zeros(self.num_envs, dtype=bool)
        return copy_tree(obs) if self._reuses_memory else obs

    def step(self, actions: Tree) -> Step:
        obs, reward, terminated, truncated, raw = self.env.step(actions)
        terminated, truncated = np.asarray(terminated, bool), np.asarray(truncated, bool)
        if self._reuses_memory:
            obs = copy_tree(obs)
        self.action_mask = _masks(raw, self.num_envs)
        valid = ~self._ended if self._mode is AutoresetMode.NEXT_STEP else self._all_valid
        ended = terminated | truncated
        successor = obs
        ends: dict[int, dict[str, Any]] = {}
        if np.count_nonzero(ended):  # sooner than any()
            indices = np.flatnonzero(ended)
            if self._mode is AutoresetMode.SAME_STEP:
                if "final_obs" not in raw:
                    raise EnvironmentFault(
                        f"{self.env!r} resets in the same step but sent no 'final_obs' at an episode's end; "
                        "its infos must hold the last observation of each episode"
                    )
                successor = copy_tree(obs)
                for i in indices:
                    set_rows(successor, i, raw["final_obs"][i])
            elif self._mode is AutoresetMode.DISABLED:
                obs, raw_at_reset = self.env.reset(options={"reset_mask": ended})
                first_masks = _masks(raw_at_reset, self.num_envs)
                if self.action_mask is not None and first_masks is not None:
                    self.action_mask[ended] = first_masks[ended]
                if self._reuses_memory:
                    obs = copy_tree(obs)
            ends = _ends(indices, successor, terminated)
        self._ended = ended
        return Step(obs, reward, terminated, truncated, successor, valid, Infos(raw, self.num_envs, ends))

    def close(self) -> None:
        base = self.env.unwrapped
        if isinstance(base, AsyncVectorEnv) and killed_workers(base):
            # Its own close would wait for ever for the answers to the step in which a worker died.
            for process in base.processes:
                process.terminate()
            for process in base.processes:
                process.join()
            for pipe in base.parent_pipes:
                if pipe is not None:
                    pipe.close()
            base.closed = True
        self.env.close()


class StableBaselinesAdapter(Adapter):
    """A ``VecEnv`` as Stable-Baselines has them, known by its shape alone: it resets in the same step.

    Args:
        env: The vector environment.
    """

    def __init__(self, env: Any) -> None:
        self.env = env
        self.num_envs = int(env.num_envs)
        self.observation_space = env.observation_space
        self.action_space = env.action_space
        self.action_mask: np.ndarray | None = None

    def reset(self, seed: int | None) -> Tree:
        if seed is not None:
            # It counts on from one seed, environment by environment: from a random one, so that runs do not overlap.
            self.env.seed(_words(seed, 1)[0])
        obs = copy_tree(self.env.reset())  # environments of this kind may write into what they returned
        self.action_mask = self._masks(getattr(self.env, "reset_infos", []))
        return obs

    def step(self, actions: Tree) -> Step:
        is_tree = not isinstance(actions, np.ndarray)
        obs, reward, done, infos = self.env.step(
            [rows(actions, i) for i in range(self.num_envs)] if is_tree else actions
        )
        obs, done = copy_tree(obs), np.asarray(done, bool)
        first = getattr(self.env, "reset_infos", infos)
        self.action_mask = self._masks([first[i] if done[i] else infos[i] for i in range(self.num_envs)])
        truncated = np.zeros(self.num_envs, dtype=bool)
        successor = obs
        if done.any():
            successor = copy_tree(obs)
            for i in np.flatnonzero(done):
                truncated[i] = infos[i].get("TimeLimit.truncated", False)
                set_rows(successor, i, infos[i]["terminal_observation"])
        valid = np.ones(self.num_envs, dtype=bool)
        return Step(obs, reward, done & ~truncated, truncated, successor, valid, infos)

    def _masks(self, infos: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
        return stack_masks([info.get(MASK) for info in infos])

    def close(self) -> None:
        self.env.close()


def _masks(raw: Mapping[str, Any], n_envs: int) -> np.ndarray | None:
    """The masks in Gymnasium's vector info, (n, k) bool; all is allowed where an environment sent none."""
    sent = raw.get(MASK)
    if sent is None:
        return None
    if not isinstance(sent, np.ndarray) or sent.dtype == object:
        return stack_masks(sent)
    mask = sent.reshape(n_envs, -1) != 0
    is_sent = raw.get(f"_{MASK}")
    return mask if is_sent is None else mask | ~np.asarray(is_sent)[:, None]


def stack_masks(sent: Sequence[Any]) -> np.ndarray | None:
    """One mask for each environment, or None in its place, as (n, k) bool: who sent none allows all."""
    length = next((np.size(mask) for mask in sent if mask is not None), None)
    if length is None:
        return None
    return np.stack([np.ones(length, bool) if mask is None else np.ravel(mask) != 0 for mask in sent])


def _words(seed: int, count: int) -> list[int]:
    """Seeds derived from one seed, of 31 bits each."""
    return [int(word) for word in np.random.SeedSequence(seed).generate_state(count) >> 1]


def killed_workers(env: AsyncVectorEnv, patience: float = 0.0) -> dict[int, int | None]:
    """Exit codes of the workers that are gone although their environment raised nothing.

    A pipe breaks a moment before its process counts as dead: `patience` is how many seconds to wait for that.
    """
    if env.closed:
        return {}
    ended = multiprocessing.connection.wait([process.sentinel for process in env.processes], timeout=patience)
    codes: dict[int, int | None] = {}
    for i, (pipe, process) in enumerate(zip(env.parent_pipes, env.processes, strict=True)):
        if pipe is not None and process.sentinel in ended:
            process.join()
            codes[i] = process.exitcode
    return codes


def _ends(indices: np.ndarray, successor: Tree, terminated: np.ndarray) -> dict[int, dict[str, Any]]:
    return {
        int(i): {"terminal_observation": rows(successor, i), "TimeLimit.truncated": not terminated[i]} for i in indices
    }
