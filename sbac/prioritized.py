"""Prioritised replay: transitions are drawn the more often, the further off their values were."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from sbac.adapters import Step
from sbac.buffers import EMPTY, ReplayBatch, ReplayBuffer
from sbac.guards import NotFiniteError, require_constant, require_number
from sbac.schedules import FloatOrSchedule, LinearSchedule, value_at
from sbac.trees import Tree

BETA = LinearSchedule(0.4, 1.0)
"""The paper's annealing, for the proportional variant."""


class SumTree:
    """Numbers whose sum is always known, and in which the place of a partial sum is found in logarithmic time.

    A complete binary tree in one array: node k has the children 2k and 2k + 1, and the numbers are the leaves. Each
    inner node is computed anew from its children whenever one of them changes, so that errors do not add up over time:
    after any history the sums are, bit for bit, those of the leaves that are there.

    Args:
        size: How many numbers, at least 1. All are 0 at first.
    """

    def __init__(self, size: int) -> None:
        self._depth = (size - 1).bit_length()
        self._first = 1 << self._depth
        self._size = size
        self._nodes = np.zeros(2 * self._first)

    @property
    def values(self) -> np.ndarray:
        """The numbers, a view, (size,)."""
        return self._nodes[self._first : self._first + self._size]

    @property
    def total(self) -> float:
        """The sum of all."""
        return float(self._nodes[1])

    @property
    def nbytes(self) -> int:
        """Bytes taken."""
        return self._nodes.nbytes

    def clear(self) -> None:
        """Make all 0."""
        self._nodes[:] = 0.0

    def set(self, index: np.ndarray, values: np.ndarray) -> None:
        """Replace the numbers at `index`, (B,), by `values`, (B,), at least 0; of one that stands twice, the last."""
        self.values[index] = values
        left, right = self._children
        nodes = index + self._first
        for _ in range(self._depth):
            nodes >>= 1
            self._nodes[nodes] = left[nodes] + right[nodes]

    def sum_up(self) -> None:
        """Compute all sums anew, after `values` was written to directly."""
        left, right = self._children
        for level in reversed(range(self._depth)):
            nodes = slice(1 << level, 2 << level)
            self._nodes[nodes] = left[nodes] + right[nodes]

    def find(self, mass: np.ndarray) -> np.ndarray:
        """The least indices at which the running sum exceeds `mass`, (B,), from 0 to `total`. Never that of a 0."""
        left, right = self._children
        mass = mass.copy()
        nodes = np.ones(len(mass), dtype=np.int64)
        for _ in range(self._depth):
            left_sum = left[nodes]
            # Rounding can leave a mass that reaches beyond all that is there: no step leads to where nothing is.
            goes_right = (mass >= left_sum) & (right[nodes] > 0)
            mass -= left_sum * goes_right
            nodes = 2 * nodes + goes_right
        return nodes - self._first

    @property
    def _children(self) -> tuple[np.ndarray, np.ndarray]:
        """The left and the right child of each inner node, as views."""
        return self._nodes[0::2], self._nodes[1::2]


class PrioritizedReplayBuffer(ReplayBuffer):
    """Replay that prefers transitions with large TD errors (Schaul et al. 2016, arXiv:1511.05952).

    This is the paper's proportional variant. Transition i is drawn with probability P(i) = p_i^alpha / sum_k p_k^alpha
    (equation 1), where p_i = abs(delta_i) + epsilon from the last time that it was learned from; a new one gets the
    largest priority so far, 1 at first. In the loss it counts (N P(i))^-beta, divided by the largest of these in its
    batch (section 3.4), which takes back what the preference does to expectations: wholly where beta is 1. Draws are
    stratified as in appendix B.2.1: a batch of B takes one from each B-th of the total priority.

    An algorithm takes it by ``replay_buffer_class=PrioritizedReplayBuffer``, and `alpha`, `beta` and `epsilon` by
    ``replay_buffer_kwargs``. The paper divides the learning rate of uniform replay by four.

    Args:
        buffer_size: As of `ReplayBuffer`.
        observation_space: As of `ReplayBuffer`.
        action_space: As of `ReplayBuffer`.
        device: As of `ReplayBuffer`.
        n_envs: As of `ReplayBuffer`.
        generator: As of `ReplayBuffer`.
        n_steps: As of `ReplayBuffer`.
        alpha: How much priorities matter, in [0, 1]; with 0 all are drawn alike.
        beta: How much of the bias the weights take back, in [0, 1]: a number, or a schedule of the remaining progress.
        epsilon: Added to each error, above 0, so that no transition is forgotten.

    Raises:
        ValueError: `alpha`, `beta` or `epsilon` is out of its range.
        MemoryError: The buffer would be larger than the memory that is free.
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
        alpha: float = 0.6,
        beta: FloatOrSchedule = BETA,
        epsilon: float = 1e-6,
    ) -> None:
        require_constant("alpha", alpha, minimum=0, maximum=1)
        require_number("beta", beta, minimum=0, maximum=1)
        require_constant("epsilon", epsilon, above=0)
        self.alpha = alpha
        self.beta = beta
        self.epsilon = epsilon
        self._tree = SumTree(max(buffer_size, n_envs))  # of p^alpha, 0 where no transition is
        super().__init__(buffer_size, observation_space, action_space, device, n_envs, generator, n_steps)

    def reset(self) -> None:
        super().reset()
        self._tree.clear()
        self._largest = 1.0  # p^alpha of what is new

    @property
    def nbytes(self) -> int:
        """Bytes that the buffer takes when full, the table of successors not counted."""
        return super().nbytes - self._priority.nbytes + self._tree.nbytes

    def add(self, obs: Tree, action: np.ndarray, step: Step, *others: Any) -> None:
        index = self.pos * self.n_envs + np.arange(self.n_envs)
        super().add(obs, action, step, *others)
        self._tree.set(index, np.where(step.valid, self._largest, 0.0))

    def sample(self, batch_size: int, gamma: float = 0.99, progress_remaining: float = 1.0) -> ReplayBatch:
        """Draw transitions by their priorities, with replacement.

        Args:
            batch_size: How many, B.
            gamma: Discount factor, for returns over several steps.
            progress_remaining: 1 at the start of training, 0 at its end; `beta` depends on it.

        Raises:
            ValueError: The buffer is empty.
        """
        batch = super().sample(batch_size, gamma, progress_remaining)
        priority = self._tree.values[batch.rows]
        # (N P(i))^-beta divided by the largest in the batch: N and the sum in P cancel.
        weight = (priority.min() / priority) ** value_at(self.beta, progress_remaining)
        return batch._replace(weight=self._tensor(weight.astype(np.float32)))

    def update_priorities(self, batch: ReplayBatch, td_error: Tensor) -> None:
        """Set the priorities of a batch that was drawn since the last `add`.

        Args:
            batch: What `sample` returned.
            td_error: delta of each of its transitions, (B,), of either sign.

        Raises:
            NotFiniteError: An error is NaN or infinite. All priorities are as before.
            ValueError: The shape is not (B,).
        """
        errors = td_error.detach().to("cpu", torch.float32).numpy()
        if errors.shape != batch.rows.shape:
            raise ValueError(f"update_priorities: td_error has shape {errors.shape}, the batch has {batch.rows.shape}")
        wrong = np.flatnonzero(~np.isfinite(errors))
        if wrong.size:
            raise NotFiniteError(
                f"update_priorities: {wrong.size} of {errors.size} TD errors are not finite, the first is "
                f"{errors[wrong[0]]} of the transition in row {batch.rows[wrong[0]]}; all priorities are as before. "
                "The critic has probably diverged: try a smaller learning rate or max_grad_norm"
            )
        priority = (np.abs(errors, dtype=np.float64) + self.epsilon) ** self.alpha
        is_there = self._tree.values[batch.rows] > 0  # not so where an empty step or a reset came in between
        self._tree.set(batch.rows, priority * is_there)
        self._largest = max(self._largest, float(priority.max()))

    def get_state(self) -> dict[str, np.ndarray]:
        return {**super().get_state(), "largest_priority": np.array(self._largest)}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Hold what `get_state` returned, also that of a `ReplayBuffer`, whose transitions count as new.

        Raises:
            ValueError: The arrays were made for other spaces, another number of environments or a larger buffer, or
                hold impossible priorities. The buffer stays as it was.
        """
        is_there = (state["flags"] & EMPTY) == 0
        state = {"priority": is_there.astype(np.float64), "largest_priority": np.array(1.0), **state}
        priority, largest = state["priority"], float(state["largest_priority"])
        if priority.shape == is_there.shape and not (
            np.isfinite(priority).all() and np.array_equal(priority > 0, is_there) and 1 <= largest < np.inf
        ):
            raise ValueError(
                f"{type(self).__name__}: the stored priorities must be finite, above 0 for each transition and 0 where "
                "there is none, and the largest at least 1: the state was not made by this buffer, or is damaged"
            )
        super().set_state(state)
        self._tree.sum_up()
        self._largest = largest

    @property
    def _priority(self) -> np.ndarray:
        """p^alpha of each row, a view, (n_rows, n_envs)."""
        return self._tree.values[: self.buffer_size].reshape(self.n_rows, self.n_envs)

    def _draw(self, batch_size: int) -> np.ndarray:
        parts = (np.arange(batch_size) + self.generator.random(batch_size)) / batch_size
        return self._tree.find(parts * self._tree.total)

    def _arrays(self) -> dict[str, np.ndarray]:
        return {**super()._arrays(), "priority": self._priority}
