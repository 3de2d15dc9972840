"""Running statistics of observations and returns: parts of a policy, saved and loaded with it, frozen in `predict`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from sbac.adapters import Step
from sbac.guards import nearest, require_constant
from sbac.preprocessing import is_image_space
from sbac.trees import Tree, leaves, space_tree, tree_map

CLIP = 10.0
"""Normalised numbers are clipped to this size, unless another is asked for."""


def moments_of(values: np.ndarray) -> np.ndarray:
    """Count, mean and sum of squared deviations of each column of an array (n, d): (3, d) float64."""
    if not len(values):
        return np.zeros((3, values.shape[1]))
    mean = values.mean(0, dtype=np.float64)
    return np.stack([np.full(len(mean), float(len(values))), mean, np.square(values - mean).sum(0)])


def merge(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The moments, (3, d), of all that is behind two arrays of moments.

    With delta the difference of the means: n = n_1 + n_2, mean = mean_1 + delta n_2 / n,
    M2 = M2_1 + M2_2 + delta^2 n_1 n_2 / n (Chan, Golub and LeVeque 1979, equation 2.1).
    """
    count = one[0] + other[0]
    share = other[0] / np.maximum(count, 1.0)
    delta = other[1] - one[1]
    return np.stack([count, one[1] + delta * share, one[2] + other[2] + delta**2 * one[0] * share])


class Ledger:
    """What several processes observed, each in an account of its own, so that they need no lock and lose nothing.

    Args:
        accounts: Shared by all: (n + 1, 2, 3, d) float64. Each process has two pages, of which one is valid, so that
            one that is killed as it writes leaves a whole one; the last account is what was observed before.
        valid: Shared by all: which of the two pages, (n,).
        rank: The account to write to.
    """

    def __init__(self, accounts: np.ndarray, valid: np.ndarray, rank: int = 0) -> None:
        self._accounts, self._valid, self._rank = accounts, valid, rank

    @staticmethod
    def blank(n: int, before: Tensor) -> Tensor:
        """Accounts of n processes that observed nothing yet beyond `before`, (3, d)."""
        accounts = torch.zeros(n + 1, 2, *before.shape, dtype=torch.float64)
        accounts[-1, 0] = before
        return accounts

    def add(self, moments: np.ndarray) -> None:
        """Count in what this process observed."""
        page = int(self._valid[self._rank])
        own = self._accounts[self._rank]
        own[1 - page] = merge(own[page], moments)
        self._valid[self._rank] = 1 - page

    def total(self) -> np.ndarray:
        """The moments of what all of them observed, (3, d)."""
        total = self._accounts[-1, 0]
        for account, page in zip(self._accounts[:-1], self._valid, strict=True):
            total = merge(total, account[int(page)])
        return total


class Normalizer(nn.Module):
    """Observations as (x - mean) / deviation, and rewards divided by the deviation of the discounted return.

    All Boxes are normalised, each number by itself, but for images. Mean and deviation are those of everything that was
    observed in training, as it was sent, in float64. A number that was always the same is only shifted.

    Args:
        observation_space: Of one environment.
        obs: Whether to normalise observations.
        reward: Whether to normalise rewards.
        clip_obs: Normalised observations are clipped to this size, above 0.
        clip_reward: Normalised rewards likewise.
        epsilon: Added to variances, at least 0.
        keys: Which parts of Dict observations to normalise; None takes all.

    Attributes:
        moments: Count, mean and sum of squared deviations, (3, d): of the numbers of all normalised leaves in a row,
            and, with `reward`, of the discounted return, which is the last.
        delta: The moments of what was observed since `take_delta`, for workers that put theirs together.
        running_return: r_t + gamma r_{t-1} + ... of the running episode of each environment, (n,).
        ledger: Where several processes take in what others observed at the same time.
    """

    ledger: Ledger | None = None
    moments: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        obs: bool,
        reward: bool,
        clip_obs: float = CLIP,
        clip_reward: float = CLIP,
        epsilon: float = 1e-8,
        keys: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        require_constant("normalizer_kwargs: clip_obs", clip_obs, above=0)
        require_constant("normalizer_kwargs: clip_reward", clip_reward, above=0)
        require_constant("normalizer_kwargs: epsilon", epsilon, minimum=0)
        names = [name for name, _ in leaves(space_tree(observation_space))]
        for key in keys or ():
            if key not in names:
                close = nearest(str(key), names)
                raise ValueError(f"normalizer_kwargs: keys: observations have no part {key!r}{close}")
        self.normalizes_obs, self.normalizes_reward = obs, reward
        self.clip_obs, self.clip_reward, self.epsilon = float(clip_obs), float(clip_reward), float(epsilon)
        n_numbers = 0
        remaining = iter(names)

        def place(leaf: spaces.Space[Any]) -> slice | None:
            nonlocal n_numbers
            is_chosen = next(remaining) in (names if keys is None else keys)
            if not (obs and is_chosen and isinstance(leaf, spaces.Box)) or is_image_space(leaf):
                return None
            size = int(np.prod(leaf.shape))
            n_numbers += size
            return slice(n_numbers - size, n_numbers)

        self._places = tree_map(place, space_tree(observation_space))
        self._n_numbers = n_numbers
        self.register_buffer("moments", torch.zeros(3, n_numbers + reward, dtype=torch.float64))
        self.register_buffer("shift", torch.zeros(n_numbers))
        self.register_buffer("scale", torch.ones(n_numbers))
        self.delta = np.zeros(tuple(self.moments.shape))
        self.running_return = np.zeros(0)

    def forward(self, obs: Tree) -> Tree:
        """Tensors (B, *obs_shape) as they are kept -> the same, with the normalised leaves in float32."""

        def normalize(place: slice | None, leaf: Tensor) -> Tensor:
            if place is None:
                return leaf
            flat = leaf.reshape(len(leaf), -1).float()
            normalized = (flat - self.shift[place]) * self.scale[place]
            return normalized.clamp(-self.clip_obs, self.clip_obs).reshape(leaf.shape)

        return tree_map(normalize, self._places, obs) if self._n_numbers else obs

    def observe(self, obs: Tree, step: Step, gamma: float) -> None:
        """Take note of observations that were acted on, (n, *obs_shape), and of what came of it.

        `forward` goes on as before until `refresh`.
        """
        valid = slice(None) if step.valid.all() else step.valid
        columns = [
            np.asarray(leaf, np.float64).reshape(len(leaf), -1)[valid]
            for (_, place), (_, leaf) in zip(leaves(self._places), leaves(obs), strict=True)
            if place is not None
        ]
        if self.normalizes_reward:
            if len(self.running_return) != len(step.reward):
                self.running_return = np.zeros(len(step.reward))
            self.running_return = self.running_return * gamma + step.reward
            columns.append(self.running_return[valid, None])
            self.running_return = np.where(step.terminated | step.truncated | ~step.valid, 0.0, self.running_return)
        if not columns:  # all are images or one-hot
            return
        seen = moments_of(np.concatenate(columns, axis=1))
        self.add(seen)
        self.delta = merge(self.delta, seen)

    def add(self, moments: np.ndarray) -> None:
        """Count in what somebody observed, given as moments."""
        self.moments.copy_(torch.as_tensor(merge(self.moments.cpu().numpy(), moments)))

    def take_delta(self) -> np.ndarray:
        """The moments of what was observed since the last call, for `add` of a normaliser that did not see it."""
        delta, self.delta = self.delta, np.zeros_like(self.delta)
        return delta

    def take_in(self, before: np.ndarray, other: Normalizer | None) -> None:
        """Hold `before` and what another one observed since its last `take_delta`.

        Args:
            before: Moments, (3, d), to which to add.
            other: Whose own moments hold them already, where nobody else was counted in meanwhile.
        """
        assert other is not None
        delta = other.take_delta()
        if self.ledger is not None:
            self.ledger.add(delta)
            self.moments.copy_(torch.as_tensor(self.ledger.total()))
            return
        counted = other.moments.cpu().numpy()
        is_alone = np.array_equal(before[0] + delta[0], counted[0])
        self.moments.copy_(torch.as_tensor(counted if is_alone else merge(before, delta)))

    def refresh(self) -> None:
        """Use from now on the mean and the deviation of all that was observed so far."""
        count, mean, squares = self.moments[:, : self._n_numbers]
        deviation = torch.sqrt(squares / count.clamp(min=1) + self.epsilon)
        self.shift.copy_(mean)
        self.scale.copy_(torch.where(squares > 0, 1 / deviation, 1.0))

    def normalize_reward(self, reward: Tensor) -> Tensor:
        """Rewards, or sums of them, of any shape, divided by the deviation of all discounted returns so far."""
        if not self.normalizes_reward:
            return reward
        count, _, squares = self.moments[:, -1]
        if squares <= 0:
            return reward
        deviation = torch.sqrt(squares / count + self.epsilon)
        return (reward / deviation).to(reward.dtype).clamp(-self.clip_reward, self.clip_reward)

    def begin_episodes(self) -> None:
        """All environments begin new episodes."""
        self.running_return = np.zeros(0)


def make_normalizer(
    observation_space: spaces.Space[Any], obs: bool, reward: bool, kwargs: Mapping[str, Any] | None
) -> Normalizer:
    """A `Normalizer` with the further arguments that `policy_kwargs` hold.

    Raises:
        ValueError: It has no such arguments; names the nearest.
    """
    if not (kwargs is None or isinstance(kwargs, Mapping)):
        raise ValueError(f"policy_kwargs: normalizer_kwargs must be a dict of Normalizer's arguments, not {kwargs!r}")
    known = ("clip_obs", "clip_reward", "epsilon", "keys")
    for name in kwargs or {}:
        if name not in known:
            raise ValueError(f"policy_kwargs: normalizer_kwargs has no argument {name!r}{nearest(str(name), known)}")
    return Normalizer(observation_space, obs, reward, **(kwargs or {}))
