"""Replay of stacked frames that stores each frame once."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from gymnasium import spaces

from sbac.buffers import ReplayBuffer
from sbac.stored import require_stacks
from sbac.trees import Tree, copy_tree, leaves, rows, space_tree, tree_like, tree_map

_TELLING = 1_000  # transitions held, from which on it is said that observations are no moving stacks


class FrameStackReplayBuffer(ReplayBuffer):
    """Replay for observations of ``gymnasium.wrappers.FrameStackObservation``: the last k frames along the first axis.

    Of each observation the newest frame is stored. The k - 1 before it are the newest frames of the rows before, where
    the observation is, bit for bit, the one before it moved on by one frame. Where it is not (an episode begins, the
    environments were reset from outside, or whatever else it may be) the whole stack lies in a small table, and so
    does that of the oldest row, whose earlier frames have been overwritten. Batches are those of `ReplayBuffer`, bit
    for bit.

    An algorithm takes it by ``replay_buffer_class=FrameStackReplayBuffer``.

    Args:
        buffer_size: As of `ReplayBuffer`.
        observation_space: Of one environment: a Box of shape (k, *frame_shape), or a Dict or Tuple of such with one k.
        action_space: As of `ReplayBuffer`.
        device: As of `ReplayBuffer`.
        n_envs: As of `ReplayBuffer`.
        generator: As of `ReplayBuffer`.
        n_steps: As of `ReplayBuffer`.

    Attributes:
        stack_size: Frames in one observation, k.

    Raises:
        ValueError: The observation space is none of stacked frames.
        MemoryError: The buffer would be larger than the memory of this machine.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: Any = "cpu",
        n_envs: int = 1,
        generator: np.random.Generator | None = None,
        n_steps: int = 1,
    ) -> None:
        self.stack_size = _stack_size(observation_space)
        self._has_warned = False
        super().__init__(buffer_size, observation_space, action_space, device, n_envs, generator, n_steps)

    def reset(self) -> None:
        super().reset()
        self._stacks: dict[int, Tree] = {}  # whole ones, by place
        self._is_whole = np.zeros((self.n_rows, self.n_envs), bool)  # the places that have one

    @property
    def nbytes(self) -> int:
        """Bytes that the buffer takes when full, the tables of successors and whole stacks not counted."""
        return super().nbytes + self._is_whole.nbytes

    def _row_space(self) -> spaces.Space[Any]:
        return _frame_space(self.observation_space)

    def _forget(self, row: int) -> None:
        if self.full:
            # The next row will be the oldest: of what its stack is made, the frames of this row are about to go.
            oldest = (row + 1) % self.n_rows
            self._keep_whole(oldest, self._take(self._places_of(oldest)), ~self._is_whole[oldest])
            for place in self._places_of(row)[self._is_whole[row]]:
                del self._stacks[int(place)]
            self._is_whole[row] = False
        super()._forget(row)

    def _keep(self, row: int, obs: Tree) -> None:
        stacks = tree_map(lambda leaf, room: np.array(leaf, room.dtype), obs, self.obs)
        is_new = np.ones(self.n_envs, bool)
        if self._rows_held() > 0 and self.n_rows > 1:
            is_new = ~_moved_on(self._take(self._places_of((row - 1) % self.n_rows)), stacks)
        tree_map(lambda leaf, stack: leaf.__setitem__(row, stack[:, -1]), self.obs, stacks)
        self._keep_whole(row, stacks, is_new)
        if not self._has_warned and self.size() >= _TELLING and 2 * len(self._stacks) > self.size():
            self._has_warned = True
            warnings.warn(
                f"FrameStackReplayBuffer: of {self.size():,} observations, {len(self._stacks):,} are not the one "
                f"before moved on by one of {self.stack_size} frames, and are kept whole, which takes more memory than "
                "ReplayBuffer: leave out replay_buffer_class, or stack frames along the first axis, as "
                "gymnasium.wrappers.FrameStackObservation does",
                stacklevel=4,
            )

    def _take(self, index: np.ndarray) -> Tree:
        places = (index[:, None] - self.n_envs * np.arange(self.stack_size)[::-1]) % self.buffer_size  # (B, k)
        stacks = tree_map(lambda leaf: leaf.reshape(self.buffer_size, *leaf.shape[2:])[places], self.obs)
        is_whole = self._is_whole.reshape(-1)[places]
        for b in np.flatnonzero(is_whole.any(axis=1)):
            # The nearest whole stack, and by how many frames this one has moved on since.
            moved = int(np.argmax(is_whole[b, ::-1]))
            whole = self._stacks[int(places[b, self.stack_size - 1 - moved])]
            kept = self.stack_size - moved
            tree_map(np.copyto, rows(rows(stacks, b), slice(kept)), rows(whole, slice(moved, None)))
        return stacks

    def _keep_whole(self, row: int, stacks: Tree, which: np.ndarray) -> None:
        """Put stacks of a row, (n, k, *frame_shape), into the table."""
        for i in np.flatnonzero(which):
            self._stacks[row * self.n_envs + int(i)] = copy_tree(rows(stacks, i))
        self._is_whole[row] |= which

    def _places_of(self, row: int) -> np.ndarray:
        return row * self.n_envs + np.arange(self.n_envs)

    def get_state(self) -> dict[str, np.ndarray]:
        state = {**super().get_state(), "whole_index": np.array(list(self._stacks), dtype=np.int64)}
        if self._stacks:
            state.update(leaves(tree_map(lambda *them: np.stack(them), *self._stacks.values()), "whole"))
        return state

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Hold what `get_state` returned.

        Raises:
            ValueError: As of `ReplayBuffer`; or the state is that of another class. The buffer stays as it was.
        """
        if "whole_index" not in state:
            raise ValueError(
                f"{type(self).__name__}: the state lacks whole_index: it was stored by another class of buffer, whose "
                "rows hold whole stacks; give the model that class as replay_buffer_class, or store what a "
                f"{type(self).__name__} holds"
            )
        one = tree_map(lambda leaf: np.empty((1, 1, self.stack_size, *leaf.shape[2:]), leaf.dtype), self.obs)
        require_stacks(self, state, self.n_envs, one)
        super().set_state(state)
        index, n_held = state["whole_index"], len(state["reward"])
        whole = tree_like(self.obs, state, "whole") if len(index) else None
        places = self._places(n_held, int(state["pos"]))
        for k, (row, i) in enumerate(zip(*np.divmod(index, self.n_envs), strict=True)):
            self._stacks[int(places[row]) * self.n_envs + int(i)] = copy_tree(rows(whole, k))
            self._is_whole[places[row], i] = True


def _stack_size(space: spaces.Space[Any]) -> int:
    """How many frames an observation holds.

    Raises:
        ValueError: A part of the space is no stack of frames, or parts have different numbers of them.
    """
    parts = list(leaves(space_tree(space)))
    for name, part in parts:
        wrong = ""
        if not isinstance(part, spaces.Box) or len(part.shape) < 2:
            wrong = "is not of shape (frames, *frame_shape)"
        elif part.shape[0] != parts[0][1].shape[0]:
            wrong = f"has {part.shape[0]} of them and {parts[0][0]!r} {parts[0][1].shape[0]}"
        elif any((bound != bound[:1]).any() for bound in (part.low, part.high)):
            wrong = "has different bounds along its first axis"
        if wrong:
            where = f" (at {name!r} in {space})" if name else ""
            raise ValueError(
                "FrameStackReplayBuffer needs observations of stacked frames, as "
                f"gymnasium.wrappers.FrameStackObservation makes them, but {part}{where} {wrong}: leave out "
                "replay_buffer_class for ReplayBuffer, which takes all observations"
            )
    return int(parts[0][1].shape[0])


def _frame_space(space: spaces.Space[Any]) -> spaces.Space[Any]:
    """Of one frame: the space of stacks without its first axis."""
    if isinstance(space, spaces.Dict):
        return spaces.Dict({name: _frame_space(part) for name, part in space.spaces.items()})
    if isinstance(space, spaces.Tuple):
        return spaces.Tuple([_frame_space(part) for part in space.spaces])
    assert isinstance(space, spaces.Box)
    return spaces.Box(space.low[0], space.high[0], dtype=space.dtype.type)


def _moved_on(before: Tree, after: Tree) -> np.ndarray:
    """In which environments `after` begins, bit for bit, with the frames after the first of `before`, (n,)."""
    pairs = zip(leaves(before), leaves(after), strict=True)
    return np.all([(_bits(a[:, 1:]) == _bits(b[:, :-1])).all(axis=1) for (_, a), (_, b) in pairs], axis=0)


def _bits(frames: np.ndarray) -> np.ndarray:
    """Those of each row, (n, bytes): they tell -0.0 from 0.0."""
    return np.ascontiguousarray(frames.reshape(len(frames), -1)).view(np.uint8)
