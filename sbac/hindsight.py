"""Hindsight experience replay: transitions learn from goals that were reached, whatever goal was asked for.

Andrychowicz et al. 2017, "Hindsight Experience Replay", arXiv:1707.01495.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from sbac.adapters import Step
from sbac.buffers import CUT, EMPTY, ReplayBatch, ReplayBuffer
from sbac.envs import Environments
from sbac.guards import nearest, require_whole
from sbac.trees import Tree

GOAL_KEYS = ("observation", "achieved_goal", "desired_goal")
STRATEGIES = ("future", "final", "episode")
RUNNING = -1
"""In place of the number of rows that follow in an episode which goes on."""

RewardFunction = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""From goals achieved and goals desired, (B, *goal_shape) each, to rewards, (B,)."""


class HerReplayBuffer(ReplayBuffer):
    """A replay buffer that gives drawn transitions the goals that their episodes reached in the end, or on the way.

    Of each batch, a share of 1 - 1 / (1 + `n_sampled_goal`) is relabelled, drawn anew each time: the desired goal of
    state and successor becomes what one row of the same episode achieved, and the reward becomes
    ``compute_reward(achieved_goal, desired_goal, info)`` of the environment, where the achieved goal is that of the
    successor. Of an episode that is still running, the newest row counts as the last; of one whose beginning was
    overwritten, the oldest row held as the first.

    `terminated` stays as the environment sent it. So the task should go on when its goal is reached, and end by a time
    limit. If it terminates on success, a transition that reaches its new goal still bootstraps from its successor, as
    if the episode went on; and one that ended at the goal asked for counts as an end under its new goal too.

    Observations are a Dict with "observation", "achieved_goal" and "desired_goal", and perhaps more. `compute_reward`
    is that of the first environment. It is given a batch of goals, and for `info` a list of empty dicts, since
    infos are not stored. If it only handles single goals, it is called once for each transition, with a warning; in
    environments that run in processes of their own it must handle batches.

    Args:
        buffer_size: How many transitions to keep, over all environments; rounded down to a multiple of `n_envs`.
        observation_space: Of one environment: a Dict with the three keys.
        action_space: Of one environment, a Box.
        device: Where batches go.
        n_envs: Number of environments, n.
        generator: Draws the batches and the goals.
        n_steps: 1; rewards over several steps are not recomputed.
        n_sampled_goal: Relabelled transitions for each that stays as it was (k in the paper), at least 0.
        goal_selection_strategy: Whose successor's achieved goal is taken. "future": a row from the transition's own to
            its episode's last, uniformly. "final": the episode's last. "episode": any of the episode, uniformly.

    Raises:
        ValueError: The observation space is not that of a goal environment, or an argument is out of its range.
    """

    lasting = (*ReplayBuffer.lasting, "reached", "age")

    obs: dict[str, Tree]

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: torch.device | str = "cpu",
        n_envs: int = 1,
        generator: np.random.Generator | None = None,
        n_steps: int = 1,
        n_sampled_goal: int = 4,
        goal_selection_strategy: str = "future",
    ) -> None:
        self._goal_space = _goal_space(observation_space)
        if n_steps != 1:
            raise ValueError(
                f"HerReplayBuffer cannot sum rewards over n_steps={n_steps} steps, since it recomputes the reward of "
                "one: use n_steps=1"
            )
        self.n_sampled_goal = require_whole("n_sampled_goal", n_sampled_goal, 0)
        if goal_selection_strategy not in STRATEGIES:
            raise ValueError(
                f"HerReplayBuffer has no goal_selection_strategy {goal_selection_strategy!r}"
                f"{nearest(str(goal_selection_strategy), STRATEGIES)}"
            )
        self.goal_selection_strategy = goal_selection_strategy
        super().__init__(buffer_size, observation_space, action_space, device, n_envs, generator, n_steps)

        # What the successor of each row achieved, how many rows of its episode follow, and how many came before: more
        # than are held where the ring has overwritten them.
        shape = (self.n_rows, n_envs)
        self.reached = np.empty((*shape, *(self._goal_space.shape or ())), self.obs["desired_goal"].dtype)
        self.age = np.zeros(shape, np.int64)
        self.left = np.empty(shape, np.int64)
        self._rewards: RewardFunction | None = None
        self._is_checked = False

    @property
    def her_ratio(self) -> float:
        """The share of transitions that are relabelled."""
        return 1 - 1 / (1 + self.n_sampled_goal)

    def attach(self, env: Environments) -> None:
        """Find the environments' `compute_reward`.

        Raises:
            ValueError: There is none, or it does not give one reward for each pair of goals.
        """
        self._rewards = _reward_function(env.env, self._goal_space)
        self._is_checked = False

    def add(self, obs: Tree, action: np.ndarray, step: Step, *others: Any) -> None:
        row, before = self.pos, (self.pos - 1) % self.n_rows
        super().add(obs, action, step, *others)
        self.reached[row] = step.successor["achieved_goal"]
        # Only now it is known whether the row before was its episode's last: somebody else may have reset.
        is_new = (self.flags[before] & (CUT | EMPTY)) > 0
        for i in np.flatnonzero(is_new):
            follow = np.arange(min(self.age[before, i] + 1, self.n_rows))
            self.left[before - follow, i] = follow
        self.age[row] = np.where(is_new, 0, self.age[before] + 1)
        self.left[row] = RUNNING

    def sample(self, batch_size: int, gamma: float = 0.99, progress_remaining: float = 1.0) -> ReplayBatch:
        """Draw transitions uniformly, with replacement, and relabel a share of them.

        Args:
            batch_size: How many, B.
            gamma: Discount factor.
            progress_remaining: Without meaning here.

        Raises:
            ValueError: The buffer is empty, or knows no environments that could compute rewards.
        """
        if self._rewards is None:
            raise ValueError(
                "HerReplayBuffer computes rewards with its environments' compute_reward, but this model has no "
                "environment: pass env= to load, or call model.set_env(env)"
            )
        return super().sample(batch_size, gamma, progress_remaining)

    def _batch(self, index: np.ndarray, gamma: float) -> ReplayBatch:
        assert self._rewards is not None
        if not self._is_checked:
            self._compare_rewards(self._rewards)
        batch = super()._batch(index, gamma)
        chosen = np.flatnonzero(self.generator.random(len(index)) < self.her_ratio)
        if chosen.size:
            reached = self._flat(self.reached)
            goal = reached[self._goal_rows(index[chosen])]
            reward = self._rewards(reached[index[chosen]], goal)
            # The batch's tensors are copies of its own.
            places = self._tensor(chosen)
            batch.obs["desired_goal"][places] = self._tensor(goal)
            batch.successor["desired_goal"][places] = self._tensor(goal)
            batch.reward[places] = self._tensor(reward)
        return batch

    def _goal_rows(self, index: np.ndarray) -> np.ndarray:
        """For each of the rows `index`, one of its episode by the strategy."""
        row, environment = np.divmod(index, self.n_envs)
        newer = (self.pos - 1 - row) % self.n_rows
        left = self.left[row, environment]
        left = np.where(left == RUNNING, newer, left)
        if self.goal_selection_strategy == "future":
            offset = self.generator.integers(0, left, endpoint=True)
        elif self.goal_selection_strategy == "final":
            offset = left
        else:
            older = np.minimum(self.age[row, environment], self._rows_held() - 1 - newer)
            offset = self.generator.integers(-older, left, endpoint=True)
        return (row + offset) % self.n_rows * self.n_envs + environment

    def _compare_rewards(self, rewards: RewardFunction) -> None:
        """Warn where stored rewards are not those that would be recomputed: the two would be mixed in each batch."""
        self._is_checked = True
        n_rows = min(self._rows_held(), 1000)
        index = ((self.pos - 1 - np.arange(n_rows)[:, None]) % self.n_rows * self.n_envs + range(self.n_envs)).ravel()
        index = index[(self.flags.reshape(-1)[index] & EMPTY) == 0]
        sent = self.reward.reshape(-1)[index]
        computed = rewards(self._flat(self.reached)[index], self._flat(self.obs["desired_goal"])[index])
        differs = ~np.isclose(sent, computed, rtol=1e-4, atol=1e-6)
        # A distance on the brink of a threshold may fall to either side of it when rounded to float32.
        if np.mean(differs) > 0.01:
            first = int(np.argmax(differs))
            warnings.warn(
                f"HerReplayBuffer: {np.mean(differs):.0%} of the rewards are not what compute_reward says of the same "
                f"goals, such as {sent[first]:g} and not {computed[first]:g}; relabelled rewards will not match the "
                "others: look for wrappers that change rewards or goals, and rewards that depend on more than goals",
                stacklevel=4,
            )

    def _arrays(self) -> dict[str, np.ndarray]:
        return {**super()._arrays(), "reached": self.reached, "age": self.age, "left": self.left}

    def get_state(self) -> dict[str, np.ndarray]:
        """As of `ReplayBuffer`, without what follows from the ages."""
        state = super().get_state()
        del state["left"]
        return state

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Hold what `get_state` returned.

        Raises:
            ValueError: As of `ReplayBuffer`; or the state is that of another class, which does not know the episodes.
                The buffer stays as it was.
        """
        missing = [name for name in ("reached", "age") if name not in state]
        if missing:
            raise ValueError(
                f"{type(self).__name__}: the state lacks {', '.join(missing)}: it was stored by another class of "
                "buffer, which does not know what episodes achieved; give the model that class as replay_buffer_class, "
                f"or store what a {type(self).__name__} holds"
            )
        age, pos = state["age"], int(state["pos"])
        if age.shape == state["reward"].shape:  # if not, it is refused for that
            in_order = np.roll(age, -pos, axis=0)
            if (age < 0).any() or ((in_order[1:] != 0) & (in_order[1:] != in_order[:-1] + 1)).any():
                raise ValueError(
                    f"{type(self).__name__}: the stored age does not count the rows of episodes: the state was not "
                    "made by this buffer, or is damaged"
                )
            state = {**state, "left": np.roll(_rows_left(in_order), pos, axis=0)}
        super().set_state({"left": age, **state})

    def _flat(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(self.buffer_size, *array.shape[2:])


def _rows_left(age: np.ndarray) -> np.ndarray:
    """How many rows of its episode follow each row, RUNNING while it goes on.

    Args:
        age: How many came before, (T, n_envs), from the oldest row to the newest.
    """
    number = np.arange(len(age))[:, None]
    # The nearest beginning after each row.
    begins = np.where(age == 0, number, len(age))
    following = np.full_like(begins, len(age))
    following[:-1] = np.minimum.accumulate(begins[:0:-1], axis=0)[::-1]
    return np.where(following < len(age), following - 1 - number, RUNNING)


def _goal_space(space: spaces.Space[Any]) -> spaces.Space[Any]:
    """The space of the goals of a goal environment's observations."""
    needs = f"HerReplayBuffer needs a Dict observation space with the keys {', '.join(GOAL_KEYS)}"
    if not isinstance(space, spaces.Dict):
        raise ValueError(f"{needs}, but it is {space}")
    missing = [key for key in GOAL_KEYS if key not in space.spaces]
    if missing:
        raise ValueError(f"{needs}, but {space} lacks {' and '.join(missing)}")
    achieved, desired = space["achieved_goal"], space["desired_goal"]
    for goal in (achieved, desired):
        if not isinstance(goal, (spaces.Box, spaces.Discrete)) or goal.shape != achieved.shape:
            raise ValueError(
                "HerReplayBuffer needs goals that are arrays of one shape, but achieved_goal is "
                f"{achieved} and desired_goal is {desired}"
            )
    return desired


def _reward_function(env: Any, goal_space: spaces.Space[Any]) -> RewardFunction:
    """`compute_reward` of a vector environment's first environment, for batches of goals.

    Args:
        env: A vector environment of Gymnasium or Stable-Baselines.
        goal_space: Of one goal, to see how the function handles a batch.

    Raises:
        ValueError: There is no such function, it fails, or it does not return one number for each pair of goals.
    """
    # Wrappers of a vector environment know nothing of compute_reward.
    base = getattr(env, "unwrapped", env)
    compute, is_here = _find_compute_reward(base)
    if compute is None:
        raise ValueError(
            "HerReplayBuffer needs environments with a method compute_reward(achieved_goal, desired_goal, info), "
            f"but those of {env!r} have none"
        )

    def together(achieved: np.ndarray, desired: np.ndarray) -> np.ndarray:
        n = len(achieved)
        return np.asarray(compute(achieved, desired, [{}] * n), np.float32).reshape(n)

    def one_by_one(achieved: np.ndarray, desired: np.ndarray) -> np.ndarray:
        pairs = zip(achieved, desired, strict=True)
        return np.array([compute(a, d, {}) for a, d in pairs], np.float32).reshape(len(achieved))

    space = copy.deepcopy(goal_space)
    space.seed(0)
    goals = np.stack([space.sample() for _ in range(3)])
    try:
        # Two sizes, since the size of a goal may happen to be that of a batch.
        for n in (2, 3):
            together(goals[:n], goals[::-1][:n])
        return together
    except Exception as error:
        needs = "give one reward for each row of two arrays of goals (numpy.linalg.norm(a - b, axis=-1), for one)"
        if not is_here:
            raise ValueError(
                f"HerReplayBuffer: compute_reward of {env!r}, whose environments run elsewhere, must {needs}, but "
                f"given {n} rows of {goal_space} it failed: {error!r}"
            ) from error
        try:
            one_by_one(goals, goals)
        except Exception as single_error:
            raise ValueError(
                f"HerReplayBuffer: compute_reward of {env!r} must {needs}, but for goals of {goal_space} it failed: "
                f"{error!r}; and for a single pair: {single_error!r}"
            ) from single_error
        warnings.warn(
            f"compute_reward of {env!r} does not handle batches and is called once for each transition, which is "
            f"slow: let it {needs}",
            stacklevel=4,
        )
        return one_by_one


def _find_compute_reward(base: Any) -> tuple[Callable[..., Any] | None, bool]:
    """The function, if there is one, and whether it may be called wrongly: in a worker, that would be the worker's end.

    Args:
        base: A vector environment without wrappers.
    """
    if getattr(base, "envs", None):
        first = base.envs[0]
        return (first.get_wrapper_attr("compute_reward") if first.has_wrapper_attr("compute_reward") else None), True
    if hasattr(base, "env_method"):
        if not base.has_attr("compute_reward"):
            return None, False
        return lambda *goals: base.env_method("compute_reward", *goals, indices=[0])[0], False
    if hasattr(base, "call"):
        if not base.call("has_wrapper_attr", "compute_reward")[0]:
            return None, False
        return lambda *goals: base.call("compute_reward", *goals)[0], False
    return getattr(base, "compute_reward", None), True
