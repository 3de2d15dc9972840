"""What an algorithm remembers between acting and learning: a rollout, or a replay memory, as named, typed batches."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from sbac.adapters import Step


class RolloutBatch(NamedTuple):
    """T steps of n environments, time first.

    `next_value` of row t is V of row t + 1, except at the end of the rollout and where a time limit cut an episode;
    the states to ask there are `bootstrap_obs`, and `bootstrap_index` says where their values go.
    """

    obs: Tensor  # (T * n, *obs_shape)
    action: Tensor  # (T * n, *action_shape)
    reward: Tensor  # (T, n)
    terminated: Tensor  # (T, n) bool
    truncated: Tensor  # (T, n) bool
    kept: Tensor | slice  # which of the T * n rows are transitions: all, but for empty reset steps
    bootstrap_obs: Tensor  # (M, *obs_shape)
    bootstrap_index: tuple[Tensor, Tensor]  # t and environment, (M,) each


class ReplayBatch(NamedTuple):
    """B transitions, drawn uniformly with replacement."""

    obs: Tensor  # (B, *obs_shape)
    action: Tensor  # (B, action_dim), in [-1, 1]
    reward: Tensor  # (B,)
    terminated: Tensor  # (B,) as 0.0 or 1.0
    successor: Tensor  # (B, *obs_shape)


def _stored_dtype(dtype: Any) -> Any:
    """The networks compute in float32, so nothing is gained by keeping more."""
    return np.float32 if dtype == np.float64 else dtype


class RolloutBuffer:
    """The last steps of each environment, in order, for on-policy learning.

    Args:
        buffer_size: Steps of each environment, T, at least 1.
        observation_space: Of one environment.
        action_space: Of one environment.
        device: Where batches go.
        n_envs: Number of environments, n.

    Attributes:
        pos: Steps held so far, from 0 to T.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: torch.device | str = "cpu",
        n_envs: int = 1,
    ) -> None:
        self.buffer_size = buffer_size
        self.n_envs = n_envs
        self.device = torch.device(device)
        rows = (buffer_size, n_envs)
        self.obs = np.zeros((*rows, *(observation_space.shape or ())), _stored_dtype(observation_space.dtype))
        is_box = isinstance(action_space, spaces.Box)
        self.action = np.zeros((*rows, *(action_space.shape or ())), np.float32 if is_box else np.int64)
        self.reward = np.zeros(rows, np.float32)
        self.terminated = np.zeros(rows, bool)
        self.truncated = np.zeros(rows, bool)
        self.valid = np.zeros(rows, bool)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.pos = 0
        self._cut_obs: list[np.ndarray] = []
        self._cut_index: list[tuple[int, int]] = []

    @property
    def full(self) -> bool:
        """Whether T steps are held."""
        return self.pos == self.buffer_size

    def size(self) -> int:
        """Transitions held, over all environments."""
        return int(self.valid[: self.pos].sum())

    def add(self, obs: np.ndarray, action: np.ndarray, step: Step) -> None:
        """Append what n environments did.

        Args:
            obs: What was acted on, (n, *obs_shape).
            action: In the units of the algorithm, (n, *action_shape).
            step: What came of it.
        """
        if self.full:
            raise ValueError(f"the rollout already holds its {self.buffer_size} steps; call reset() first")
        row = self.pos
        self.obs[row] = obs
        self.action[row] = action
        self.reward[row] = step.reward
        self.terminated[row] = step.terminated
        self.truncated[row] = step.truncated
        self.valid[row] = step.valid
        for i in np.flatnonzero(step.truncated & ~step.terminated):
            self._cut_obs.append(np.array(step.successor[i], self.obs.dtype))
            self._cut_index.append((row, int(i)))
        # The newest successors are what a rollout that ends here bootstraps from.
        self._last_successor = np.array(step.successor, self.obs.dtype)
        self.pos += 1

    def get(self) -> RolloutBatch:
        """All that is held, as tensors that stay true until the next `add`."""
        last = self.pos - 1
        cuts = [(i, obs) for i, obs in zip(self._cut_index, self._cut_obs, strict=True) if i[0] < last]
        bootstrap_obs = self._last_successor
        times, environments = np.full(self.n_envs, last), np.arange(self.n_envs)
        if cuts:
            bootstrap_obs = np.concatenate([bootstrap_obs, np.stack([obs for _, obs in cuts])])
            times = np.concatenate([times, [t for (t, _), _ in cuts]])
            environments = np.concatenate([environments, [i for (_, i), _ in cuts]])
        held = slice(0, self.pos)
        return RolloutBatch(
            obs=self._tensor(self.obs[held].reshape(-1, *self.obs.shape[2:])),
            action=self._tensor(self.action[held].reshape(-1, *self.action.shape[2:])),
            reward=self._tensor(self.reward[held]),
            terminated=self._tensor(self.terminated[held]),
            truncated=self._tensor(self.truncated[held]),
            kept=slice(None) if self.valid[held].all() else self._tensor(self.valid[held].ravel()),
            bootstrap_obs=self._tensor(bootstrap_obs),
            bootstrap_index=(self._tensor(times), self._tensor(environments)),
        )

    def get_state(self) -> dict[str, np.ndarray]:
        """Everything held, as arrays, for a full checkpoint."""
        state = {name: getattr(self, name)[: self.pos] for name in _ROLLOUT_ARRAYS}
        state["cut_index"] = np.array(self._cut_index, dtype=np.int64).reshape(-1, 2)
        state["cut_obs"] = np.array(self._cut_obs, dtype=self.obs.dtype).reshape(-1, *self.obs.shape[2:])
        if self.pos:
            state["last_successor"] = self._last_successor
        return state

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Hold what `get_state` returned.

        Raises:
            ValueError: The arrays were made for other spaces or do not fit into this buffer, which stays as it was.
        """
        _require_fit(self, _ROLLOUT_ARRAYS, state)
        self.reset()
        self.pos = len(state["obs"])
        for name in _ROLLOUT_ARRAYS:
            getattr(self, name)[: self.pos] = state[name]
        self._cut_index = [(int(t), int(i)) for t, i in state["cut_index"]]
        self._cut_obs = list(state["cut_obs"])
        if self.pos:
            self._last_successor = state["last_successor"]

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.as_tensor(array, device=self.device)


_ROLLOUT_ARRAYS = ("obs", "action", "reward", "terminated", "truncated", "valid")


class ReplayBuffer:
    """The last transitions of all environments, for off-policy learning (Lin 1992; Mnih et al. 2015).

    Args:
        buffer_size: How many transitions to keep, over all environments; older ones are overwritten.
        observation_space: Of one environment.
        action_space: Of one environment, a Box.
        device: Where batches go.
        n_envs: Number of environments, n.
        generator: Draws the batches.

    Attributes:
        pos: Where the next transition goes.
        full: Whether old transitions are being overwritten.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: torch.device | str = "cpu",
        n_envs: int = 1,
        generator: np.random.Generator | None = None,
    ) -> None:
        self.buffer_size = buffer_size
        self.n_envs = n_envs
        self.device = torch.device(device)
        self.generator = generator if generator is not None else np.random.default_rng()
        obs_shape = (buffer_size, *(observation_space.shape or ()))
        obs_dtype = _stored_dtype(observation_space.dtype)
        # np.empty, so that memory is taken as the buffer fills and not at once.
        self.obs = np.empty(obs_shape, obs_dtype)
        self.successor = np.empty(obs_shape, obs_dtype)
        self.action = np.empty((buffer_size, int(np.prod(action_space.shape or ()))), np.float32)
        self.reward = np.empty(buffer_size, np.float32)
        self.terminated = np.empty(buffer_size, np.float32)
        self.pos = 0
        self.full = False

    def size(self) -> int:
        """Transitions held."""
        return self.buffer_size if self.full else self.pos

    def add(self, obs: np.ndarray, action: np.ndarray, step: Step) -> None:
        """Append what n environments did, leaving out empty reset steps.

        Args:
            obs: What was acted on, (n, *obs_shape).
            action: In [-1, 1], (n, *action_shape).
            step: What came of it.
        """
        kept = np.flatnonzero(step.valid)
        rows = (self.pos + np.arange(len(kept))) % self.buffer_size
        self.obs[rows] = obs[kept]
        self.action[rows] = action.reshape(self.n_envs, -1)[kept]
        self.reward[rows] = step.reward[kept]
        self.terminated[rows] = step.terminated[kept]
        self.successor[rows] = step.successor[kept]
        self.full = self.full or self.pos + len(kept) >= self.buffer_size
        self.pos = (self.pos + len(kept)) % self.buffer_size

    def sample(self, batch_size: int) -> ReplayBatch:
        """Draw transitions uniformly, with replacement.

        Args:
            batch_size: How many, B.

        Raises:
            ValueError: The buffer is empty.
        """
        if self.size() == 0:
            raise ValueError("cannot sample from an empty replay buffer: collect or load transitions first")
        rows = self.generator.integers(self.size(), size=batch_size)
        return ReplayBatch(
            obs=self._tensor(self.obs[rows]),
            action=self._tensor(self.action[rows]),
            reward=self._tensor(self.reward[rows]),
            terminated=self._tensor(self.terminated[rows]),
            successor=self._tensor(self.successor[rows]),
        )

    def reset(self) -> None:
        """Forget everything."""
        self.pos = 0
        self.full = False

    def get_state(self) -> dict[str, np.ndarray]:
        """Everything held, as arrays, for a full checkpoint."""
        state = {name: getattr(self, name)[: self.size()] for name in _REPLAY_ARRAYS}
        state["pos"] = np.array(self.pos)
        return state

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Hold what `get_state` returned.

        Raises:
            ValueError: The arrays were made for other spaces or do not fit into this buffer, which stays as it was.
        """
        _require_fit(self, _REPLAY_ARRAYS, state)
        size, pos = len(state["obs"]), int(state["pos"])
        self.full = size == self.buffer_size
        # The ring of a smaller buffer may begin anywhere: laid out from its oldest transition, the first to go.
        in_order = self.full or pos in (0, size)
        rows = slice(size) if in_order else (np.arange(size) - pos) % size
        for name in _REPLAY_ARRAYS:
            getattr(self, name)[rows] = state[name]
        self.pos = pos % self.buffer_size if self.full else size

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.as_tensor(array, device=self.device)


_REPLAY_ARRAYS = ("obs", "action", "reward", "terminated", "successor")


def _require_fit(buffer: RolloutBuffer | ReplayBuffer, names: tuple[str, ...], state: dict[str, np.ndarray]) -> None:
    size = len(state[names[0]])
    for name in names:
        own, given = getattr(buffer, name), state[name]
        if given.shape != (size, *own.shape[1:]) or given.dtype != own.dtype or size > len(own):
            raise ValueError(
                f"{type(buffer).__name__}: the stored {name} has shape {given.shape} and dtype {given.dtype}, which "
                f"does not fit this buffer's {own.shape} and {own.dtype}: it was made with other spaces, another "
                "number of environments or a larger buffer"
            )
