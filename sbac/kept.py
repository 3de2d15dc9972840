"""What a policy computed as it acted, so that it need not compute it again to learn from it."""

from __future__ import annotations

from typing import Generic, TypeVar

from torch import Tensor

from sbac.trees import Tree

T = TypeVar("T")


class Kept(Generic[T]):
    """Something for each step of a rollout, true as long as the weights are those that acted.

    Args:
        is_on: Whether anything is kept: between the beginning of a rollout and its end.
    """

    def __init__(self, is_on: bool = False) -> None:
        self.is_on = is_on
        self._seen: tuple[Tree, T] | None = None  # by the last act
        self._steps: list[tuple[Tree, T] | None] = []  # the newest ones of the rollout
        self._sum: float | None = None  # of the weights

    def see(self, obs: Tree, found: T, weights: Tensor) -> None:
        """The policy found this in observations, and acts on it; in an evaluation, perhaps, and not in training."""
        if not self.is_on:
            return
        self._seen = (obs, found)
        if self._sum is None:
            self._sum = float(weights.detach().sum())

    def note(self, obs: Tree) -> None:
        """Training took a step from these observations."""
        if self.is_on:
            self._steps.append(self._seen if self._seen is not None and self._seen[0] is obs else None)
            self._seen = None

    def of_steps(self, n_steps: int, weights: Tensor) -> list[tuple[Tree, T] | None]:
        """For each step of a rollout that ends now, what was seen, and what was found in it.

        None where nothing is known of it, or nothing is true any more.
        """
        if self._sum is None or len(self._steps) > n_steps or self._sum != float(weights.detach().sum()):
            return [None] * n_steps
        return [None] * (n_steps - len(self._steps)) + self._steps
