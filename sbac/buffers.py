"""What an algorithm remembers between acting and learning: a rollout, or a replay memory, as named, typed batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from sbac.adapters import Step
from sbac.envs import Environments
from sbac.guards import require_memory, require_whole
from sbac.observations import MASK, carries_mask
from sbac.stored import require_fit, require_ring
from sbac.trees import Tree, copy_tree, leaves, rows, set_rows, space_tree, tree_like, tree_map


class RolloutBatch(NamedTuple):
    """T steps of n environments, time first.

    `next_value` of row t is V of row t + 1, except at the end of the rollout and where a time limit cut an episode;
    the states to ask there are `bootstrap_obs`, and `bootstrap_index` says where their values go.
    """

    obs: Tree  # (T * n, *obs_shape)
    action: Tree  # (T * n, *action_shape)
    reward: Tensor  # (T, n)
    terminated: Tensor  # (T, n) bool
    truncated: Tensor  # (T, n) bool
    kept: Tensor | slice  # which of the T * n rows are transitions: all, but for empty reset steps
    share: Tensor  # (T * n,): of each row in a mean over the transitions; 0 where it is none
    bootstrap_obs: Tree  # (M, *obs_shape)
    bootstrap_index: tuple[Tensor, Tensor]  # t and environment, (M,) each


class ReplayBatch(NamedTuple):
    """B transitions, each over one step or, with n-step returns, up to n."""

    obs: Tree  # (B, *obs_shape)
    action: Tensor  # (B, action_dim), in [-1, 1]
    reward: Tensor  # (B,): r_0 + gamma r_1 + ... over the steps that the transition spans
    discount: Tensor  # (B,): gamma to the power of the number of those steps
    terminated: Tensor  # (B,) as 0.0 or 1.0
    successor: Tree  # (B, *obs_shape)
    weight: Tensor  # (B,): what each counts in the loss; 1 where all are drawn alike
    rows: np.ndarray  # (B,): where the transitions are in the buffer


def _empty_obs(shape: tuple[int, ...], space: spaces.Space[Any]) -> Tree:
    """Room for observations. The memory is taken as it fills, not at once.

    The networks compute in float32, so nothing is gained by keeping float64.
    """

    def room(leaf: spaces.Space[Any]) -> np.ndarray:
        dtype = np.float32 if leaf.dtype == np.float64 else leaf.dtype
        return np.empty((*shape, *(leaf.shape or ())), dtype)

    return tree_map(room, space_tree(space))


def _empty_actions(shape: tuple[int, ...], space: spaces.Space[Any]) -> Tree:
    """Room for actions in the units of an algorithm."""

    def room(leaf: spaces.Space[Any]) -> np.ndarray:
        return np.zeros((*shape, *(leaf.shape or ())), np.float32 if isinstance(leaf, spaces.Box) else np.int64)

    return tree_map(room, space_tree(space))


def _as_stored(obs: Tree, stored: Tree) -> Tree:
    """A copy of observations in the dtypes of those stored."""
    if type(stored) is np.ndarray:
        return np.array(obs, stored.dtype)
    return tree_map(lambda leaf, room: np.array(leaf, room.dtype), obs, stored)


def _equal(one: Tree, other: Tree) -> bool:
    if type(one) is np.ndarray:
        return np.array_equal(one, other)
    return all(np.array_equal(a, b) for (_, a), (_, b) in zip(leaves(one), leaves(other), strict=True))


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
        self.observation_space = observation_space
        shape = (buffer_size, n_envs)
        self.obs = _empty_obs(shape, observation_space)
        self.mask: np.ndarray | None = None  # of allowed actions, where environments send it beside observations
        self.action = _empty_actions(shape, action_space)
        self.reward = np.zeros(shape, np.float32)
        self.terminated = np.zeros(shape, bool)
        self.truncated = np.zeros(shape, bool)
        self.valid = np.zeros(shape, bool)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.pos = 0
        self._cut_obs: list[Tree] = []  # what followed where a time limit cut an episode
        self._cut_index: list[tuple[int, int]] = []  # and the step and the environment of each
        self._newest: Tree = None  # what followed the newest step, (n, *obs_shape)

    @property
    def full(self) -> bool:
        """Whether T steps are held."""
        return self.pos == self.buffer_size

    def size(self) -> int:
        """Transitions held, over all environments."""
        return int(self.valid[: self.pos].sum())

    def add(self, obs: Tree, action: Tree, step: Step) -> None:
        """Append what n environments did.

        Args:
            obs: What was acted on, (n, *obs_shape).
            action: In the units of the algorithm, (n, *action_shape).
            step: What came of it.
        """
        if self.full:
            raise ValueError(f"the rollout already holds its {self.buffer_size} steps; call reset() first")
        row = self.pos
        if carries_mask(obs, self.observation_space):
            if self.mask is None:
                self.mask = np.ones((self.buffer_size, *obs[MASK].shape), bool)
            self.mask[row] = obs[MASK]
            obs = obs["observation"]
        set_rows(self.obs, row, obs)
        set_rows(self.action, row, action)
        self.reward[row] = step.reward
        self.terminated[row] = step.terminated
        self.truncated[row] = step.truncated
        self.valid[row] = step.valid
        self._newest = _as_stored(step.successor, self.obs)
        if np.count_nonzero(step.truncated):  # sooner than any()
            for i in np.flatnonzero(step.truncated & ~step.terminated):
                self._cut_obs.append(rows(self._newest, i))
                self._cut_index.append((row, int(i)))
        self.pos += 1

    def cut(self, indices: Sequence[int]) -> None:
        """Say that the episodes of these environments were truncated after the newest step, unless they ended."""
        if self.pos == 0:
            return
        row = self.pos - 1
        for i in indices:
            if self.valid[row, i] and not (self.terminated[row, i] or self.truncated[row, i]):
                self.truncated[row, i] = True
                self._cut_obs.append(rows(self._newest, i))
                self._cut_index.append((row, int(i)))

    def get(self) -> RolloutBatch:
        """All that is held, as tensors that stay true until the next `add`."""
        last = self.pos - 1
        bootstrap_obs = self._newest
        times, environments = np.full(self.n_envs, last), np.arange(self.n_envs)
        cuts = [k for k, (time, _) in enumerate(self._cut_index) if time < last]
        if cuts:
            cut_obs = [self._cut_obs[k] for k in cuts]
            bootstrap_obs = tree_map(
                lambda *them: np.concatenate([them[0], np.stack(them[1:])]), self._newest, *cut_obs
            )
            times = np.concatenate([times, [self._cut_index[k][0] for k in cuts]])
            environments = np.concatenate([environments, [self._cut_index[k][1] for k in cuts]])
        held = slice(0, self.pos)

        def in_a_row(leaf: np.ndarray) -> Tensor:
            return self._tensor(leaf[held].reshape(self.pos * self.n_envs, *leaf.shape[2:]))

        obs = tree_map(in_a_row, self.obs)
        valid = self.valid[held].ravel()
        n_valid = int(np.count_nonzero(valid))
        return RolloutBatch(
            obs=obs if self.mask is None else {"observation": obs, MASK: in_a_row(self.mask)},
            action=tree_map(in_a_row, self.action),
            reward=self._tensor(self.reward[held]),
            terminated=self._tensor(self.terminated[held]),
            truncated=self._tensor(self.truncated[held]),
            kept=slice(None) if n_valid == len(valid) else self._tensor(valid),
            share=self._tensor(valid * np.float32(1 / max(n_valid, 1))),
            bootstrap_obs=tree_map(self._tensor, bootstrap_obs),
            bootstrap_index=(self._tensor(times), self._tensor(environments)),
        )

    def get_state(self) -> dict[str, np.ndarray]:
        """Everything held, as arrays, for a full checkpoint."""
        state = {name: array[: self.pos] for name, array in self._arrays().items()}
        state["cut_index"] = np.array(self._cut_index, dtype=np.int64).reshape(-1, 2)
        if self._cut_obs:
            state.update(leaves(tree_map(lambda *them: np.stack(them), *self._cut_obs), "cut"))
        if self.pos:
            state.update(leaves(self._newest, "newest"))
        return state

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Hold what `get_state` returned.

        Raises:
            ValueError: The arrays were made for other spaces or do not fit into this buffer, which stays as it was.
        """
        n_steps = len(state["reward"])
        if "mask" in state:
            self.mask = np.ones((self.buffer_size, *state["mask"].shape[1:]), bool)
        require_fit(self, self._arrays(), state, n_steps)
        self.reset()
        self.pos = n_steps
        for name, array in self._arrays().items():
            array[:n_steps] = state[name]
        self._cut_index = [(int(t), int(i)) for t, i in state["cut_index"]]
        self._cut_obs = [rows(tree_like(self.obs, state, "cut"), k) for k in range(len(self._cut_index))]
        if n_steps:
            self._newest = tree_like(self.obs, state, "newest")

    def _arrays(self) -> dict[str, np.ndarray]:
        names = ("reward", "terminated", "truncated", "valid", *(("mask",) if self.mask is not None else ()))
        trees = {**dict(leaves(self.obs, "obs")), **dict(leaves(self.action, "action"))}
        return {**trees, **{name: getattr(self, name) for name in names}}

    def _tensor(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.to(self.device)


# What a row's flags say.
TERMINATED, CUT, EMPTY = 1, 2, 4


class ReplayBuffer:
    """The last transitions of all environments, for off-policy learning (Lin 1992; Mnih et al. 2015).

    Each observation is stored once: what followed a row is the next row, and where that is not so (an episode ended, or
    the environments were reset from outside) it lies in a small table beside. Batches are the same as if both
    observations of each transition were stored.

    Args:
        buffer_size: How many transitions to keep, over all environments; rounded down to a multiple of `n_envs`.
        observation_space: Of one environment; a Dict or Tuple makes batches that are trees.
        action_space: Of one environment, a Box.
        device: Where batches go.
        n_envs: Number of environments, n.
        generator: Draws the batches.
        n_steps: Over how many steps a transition spans, at least 1; fewer where its episode ends or is not over yet.

    Raises:
        MemoryError: The buffer would be larger than the memory of this machine. The message says how large.
    """

    lasting: tuple[str, ...] = ("obs", "action", "reward", "flags")
    """Of the arrays in a state, those whose rows stay as they are from the next `add` on: checkpoints write them once.

    A subclass names in addition what it adds of this kind, and leaves out what it changes later.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: torch.device | str = "cpu",
        n_envs: int = 1,
        generator: np.random.Generator | None = None,
        n_steps: int = 1,
    ) -> None:
        self.observation_space = observation_space
        self.action_space = action_space
        self.n_envs = n_envs
        self.device = torch.device(device)
        self.generator = generator if generator is not None else np.random.default_rng()
        self.n_steps = require_whole("n_steps", n_steps, 1)
        self.n_rows = max(buffer_size // n_envs, 1)
        self.buffer_size = self.n_rows * n_envs

        action_dim = int(np.prod(action_space.shape or ()))
        row_space = self._row_space()
        one = [leaf for _, leaf in leaves(_empty_obs((), row_space))]
        require_memory(self.buffer_size, sum(leaf.nbytes for leaf in one) + 4 * action_dim + 4 + 1)
        shape = (self.n_rows, n_envs)
        self.obs = _empty_obs(shape, row_space)
        self.action = np.empty((*shape, action_dim), np.float32)
        self.reward = np.empty(shape, np.float32)
        self.flags = np.zeros(shape, np.uint8)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.pos = 0
        self.full = False
        self.n_added = 0  # rows, ever: the newest has the number n_added - 1, and its place is that modulo n_rows
        self.lineage = object()  # of rows added one after the other: another after each reset
        self.flags[:] = 0
        self._n_empty = 0
        self._successor_of: dict[int, Tree] = {}  # of transitions after which the next row is not what followed
        self._newest: Tree = None  # what followed the newest row, (n, *obs_shape)

    def size(self) -> int:
        """Transitions held."""
        return self._rows_held() * self.n_envs - self._n_empty

    @property
    def nbytes(self) -> int:
        """Bytes that the buffer takes when full, the table of successors not counted."""
        return sum(array.nbytes for array in self._arrays().values())

    def add(self, obs: Tree, action: np.ndarray, step: Step, *others: Any) -> None:
        """Append what n environments did. For transitions as arrays there is `sbac.load_demonstrations`.

        Args:
            obs: What was acted on, (n, *obs_shape).
            action: In [-1, 1], (n, *action_shape).
            step: What came of it. Where `step.valid` is False there was no transition.
            *others: None; scripts for Stable-Baselines pass other arguments, and are told so.

        Raises:
            TypeError: `step` is no `Step`.
        """
        if others or not isinstance(step, Step):
            raise TypeError(
                "replay_buffer.add takes (obs, action, step), with step as env.step(action) of sbac's environments "
                f"returns it, not {3 + len(others)} arguments of which the third is a {type(step).__name__}; to add "
                "transitions as arrays, with next observations, rewards and ends, call "
                "sbac.load_demonstrations(model, {'observations': ..., 'actions': ..., 'rewards': ..., "
                "'terminations': ..., 'truncations': ..., 'next_observations': ...})"
            )
        row = self.pos
        self._forget(row)
        if self._newest is not None and not _equal(self._newest, _as_stored(obs, self.obs)):
            self._find_breaks(obs)
        self._keep(row, obs)
        self.action[row] = action.reshape(self.n_envs, -1)
        self.reward[row] = step.reward
        ended = step.terminated | step.truncated
        self.flags[row] = step.terminated * TERMINATED | ended * CUT | ~step.valid * EMPTY
        self._newest = _as_stored(step.successor, self.obs)
        for i in np.flatnonzero(ended):
            self._successor_of[row * self.n_envs + int(i)] = copy_tree(rows(self._newest, i))
        self._n_empty += int(np.count_nonzero(~step.valid))
        self.pos = (row + 1) % self.n_rows
        self.n_added += 1
        self.full = self.full or self.pos == 0

    def sample(self, batch_size: int, gamma: float = 0.99, progress_remaining: float = 1.0) -> ReplayBatch:
        """Draw transitions uniformly, with replacement.

        Args:
            batch_size: How many, B.
            gamma: Discount factor, for returns over several steps.
            progress_remaining: 1 at the start of training, 0 at its end; for buffers that draw otherwise as it goes on.

        Raises:
            ValueError: The buffer is empty.
        """
        if self.size() == 0:
            raise ValueError("cannot sample from an empty replay buffer: collect or load transitions first")
        return self._batch(self._draw(batch_size), gamma)

    def attach(self, env: Environments) -> None:
        """Learn what environments the transitions come from, before the first is added. Most buffers need not know."""

    def saturation(self, n_transitions: int = 1000) -> float:
        """The share of action components within 0.001 of a bound, over about the newest `n_transitions`."""
        n_rows = min(self._rows_held(), -(-n_transitions // self.n_envs))
        newest = self.action[(self.pos - 1 - np.arange(n_rows)) % self.n_rows]
        return float(np.mean(np.abs(newest) >= 0.999)) if n_rows else 0.0

    def update_priorities(self, batch: ReplayBatch, td_error: Tensor) -> None:
        """Take note of how far off a batch's values were. Without meaning where all are drawn alike."""

    def _draw(self, batch_size: int) -> np.ndarray:
        held = self._rows_held() * self.n_envs
        index = self.generator.integers(held, size=batch_size)
        if self._n_empty:
            flags = self.flags.reshape(-1)
            while (empty := np.flatnonzero(flags[index] & EMPTY)).size:
                index[empty] = self.generator.integers(held, size=empty.size)
        return index

    def _batch(self, index: np.ndarray, gamma: float) -> ReplayBatch:
        reward, discount, last = self._span(index, gamma)
        return ReplayBatch(
            obs=self._tensors(self._take(index)),
            action=self._tensor(self.action.reshape(self.buffer_size, -1).take(index, axis=0)),
            reward=self._tensor(reward),
            discount=self._tensor(discount),
            terminated=self._tensor((self.flags.reshape(-1)[last] & TERMINATED).astype(np.float32)),
            successor=self._tensors(self._successors(last)),
            weight=torch.ones(len(index), device=self.device),
            rows=index,
        )

    def _span(self, index: np.ndarray, gamma: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rewards over up to n steps, the power of gamma that follows them, and each transition's last row."""
        all_rewards, flags = self.reward.reshape(-1), self.flags.reshape(-1)
        reward = all_rewards[index]
        discount = np.full(len(index), gamma, np.float32)
        last = index
        for _ in range(self.n_steps - 1):
            goes_on = ~((flags[last] & CUT) > 0) & ~self._is_newest(last)
            last = np.where(goes_on, (last + self.n_envs) % self.buffer_size, last)
            reward = reward + np.where(goes_on, discount * all_rewards[last], np.float32(0))
            discount = np.where(goes_on, discount * np.float32(gamma), discount)
        return reward, discount, last

    def _successors(self, index: np.ndarray) -> Tree:
        """What followed the rows `index`: the next row, but for the newest and for those in the table."""
        successor = self._take((index + self.n_envs) % self.buffer_size)
        is_cut = self.flags.reshape(-1)[index] & CUT > 0
        for i in is_cut.nonzero()[0]:
            set_rows(successor, i, self._successor_of[int(index[i])])
        is_newest = self._is_newest(index)
        if np.count_nonzero(is_newest):
            for i in (is_newest & ~is_cut).nonzero()[0]:
                set_rows(successor, i, rows(self._newest, index[i] % self.n_envs))
        return successor

    def _is_newest(self, index: np.ndarray) -> np.ndarray:
        return index // self.n_envs == (self.pos - 1) % self.n_rows

    def _find_breaks(self, obs: Tree) -> None:
        """Where the environments were reset from outside, the newest row is not followed by this one."""
        before = (self.pos - 1) % self.n_rows
        now = _as_stored(obs, self.obs)
        for i in np.flatnonzero((self.flags[before] & (CUT | EMPTY)) == 0):
            if not _equal(rows(self._newest, i), rows(now, i)):
                self.flags[before, i] |= CUT
                self._successor_of[before * self.n_envs + int(i)] = copy_tree(rows(self._newest, i))

    def get_state(self) -> dict[str, np.ndarray]:
        """Everything held, for a full checkpoint: views of the buffer's arrays, true until the next `add`."""
        held = slice(0, self._rows_held())
        state = {"pos": np.array(self.pos), "after_index": np.array(list(self._successor_of), dtype=np.int64)}
        state.update({name: array[held] for name, array in self._arrays().items()})
        if self._newest is not None:
            state.update(leaves(self._newest, "newest"))
        if self._successor_of:
            after = list(self._successor_of.values())
            state.update(leaves(tree_map(lambda *them: np.stack(them), *after), "after"))
        return state

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Hold what `get_state` returned.

        Raises:
            ValueError: The arrays were made for other spaces, another number of environments or a larger buffer, or do
                not fit together. The buffer stays as it was.
        """
        own = self._arrays()
        n_held = len(state["reward"])
        require_fit(self, own, state, n_held)
        require_ring(self, state, (state["flags"] & CUT) > 0, _empty_obs((1, self.n_envs), self.observation_space))
        pos, after_index = int(state["pos"]), state["after_index"]
        newest = tree_like(self.obs, state, "newest") if n_held else None
        after = tree_like(self.obs, state, "after") if len(after_index) else None
        # A state of this very buffer views its arrays, which `reset` clears.
        stored = {
            name: state[name].copy() if np.may_share_memory(state[name], array) else state[name]
            for name, array in own.items()
        }
        self.reset()
        self.full = n_held == self.n_rows
        places = self._places(n_held, pos)
        for name, array in own.items():
            array[places] = stored[name]
        self.pos = pos % self.n_rows if self.full else n_held
        self.n_added = self.pos + self.n_rows * self.full
        self._n_empty = int(np.count_nonzero(self.flags & EMPTY))
        self._newest = copy_tree(newest) if n_held else None
        for k, index in enumerate(after_index):
            row, environment = divmod(int(index), self.n_envs)
            key = int(places[row]) * self.n_envs + environment
            self._successor_of[key] = copy_tree(rows(after, k))

    def _arrays(self) -> dict[str, np.ndarray]:
        return {**dict(leaves(self.obs, "obs")), "action": self.action, "reward": self.reward, "flags": self.flags}

    def _forget(self, row: int) -> None:
        """Make place in a row that may hold an old transition of each environment."""
        if self.full:
            for i in np.flatnonzero(self.flags[row] & CUT):
                del self._successor_of[row * self.n_envs + int(i)]
            self._n_empty -= int(np.count_nonzero(self.flags[row] & EMPTY))

    def _places(self, n_held: int, pos: int) -> np.ndarray:
        """Where the rows of a stored ring are, once `full` is known.

        The ring of a smaller buffer may begin anywhere: laid out from its oldest row, the first to be overwritten.
        """
        shift = 0 if self.full or n_held == 0 else pos % n_held
        return (np.arange(n_held) - shift) % max(n_held, 1)

    def _rows_held(self) -> int:
        return self.n_rows if self.full else self.pos

    # What rows hold of observations; another buffer may hold less, and put them together again.

    def _row_space(self) -> spaces.Space[Any]:
        return self.observation_space

    def _keep(self, row: int, obs: Tree) -> None:
        set_rows(self.obs, row, obs)

    def _take(self, index: np.ndarray) -> Tree:
        return tree_map(lambda leaf: leaf.reshape(self.buffer_size, *leaf.shape[2:]).take(index, axis=0), self.obs)

    def _tensor(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.to(self.device)

    def _tensors(self, tree: Tree) -> Tree:
        return tree_map(self._tensor, tree)
