"""Buffers: what a rollout bootstraps from, what a replay draws, its bytes, and states that go on as if never stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import stable_baselines3.common.buffers
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from sbac import DDPG
from sbac.buffers import CUT, ReplayBuffer, RolloutBatch, RolloutBuffer
from sbac.envs import Step, make_environments
from sbac.trees import Tree, leaves, rows, space_tree, tree_map
from tests.environments import EPISODE_LENGTHS, TIME_LIMIT, counters

OBS = spaces.Box(-1000, 1000, (3,), np.float32)
ACTION = spaces.Box(-1, 1, (2,), np.float32)


def step_of(
    t: int,
    n_envs: int,
    terminated: tuple[int, ...] = (),
    truncated: tuple[int, ...] = (),
    invalid: tuple[int, ...] = (),
    dtype: Any = np.float32,
) -> tuple[np.ndarray, np.ndarray, Step]:
    """Step `t`, whose numbers all tell when and where: obs is t, successor t + 0.5, reward 100 t + environment."""
    env = np.arange(n_envs)

    def flags(indices: tuple[int, ...]) -> np.ndarray:
        return np.isin(env, indices)

    obs = np.stack([env, np.full(n_envs, t), env + 10 * t], axis=1).astype(dtype)
    action = np.stack([env / 10, np.full(n_envs, t / 1000)], axis=1).astype(np.float32)
    successor = obs + np.array([0, 0.5, 0], dtype)
    step = Step(
        obs + 1, 100.0 * t + env, flags(terminated), flags(truncated), successor, ~flags(invalid), [{}] * n_envs
    )
    return obs, action, step


def filled(
    n_steps: int, n_envs: int, buffer_size: int | None = None, **ends: dict[int, tuple[int, ...]]
) -> RolloutBuffer:
    buffer = RolloutBuffer(buffer_size or n_steps, OBS, ACTION, n_envs=n_envs)
    for t in range(n_steps):
        buffer.add(*step_of(t, n_envs, **{name: where.get(t, ()) for name, where in ends.items()}))
    return buffer


def bootstraps(batch: RolloutBatch) -> dict[tuple[int, int], list[float]]:
    """Which observation is asked for the value that follows (t, environment)."""
    times, environments = batch.bootstrap_index
    keys = list(zip(times.tolist(), environments.tolist(), strict=True))
    assert len(set(keys)) == len(keys)
    return dict(zip(keys, batch.bootstrap_obs.tolist(), strict=True))


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, tuple):
        return all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


# Rollouts.


def test_a_rollout_bootstraps_from_its_last_successors() -> None:
    batch = filled(3, n_envs=2).get()
    assert bootstraps(batch) == {(2, 0): [0, 2.5, 20], (2, 1): [1, 2.5, 21]}
    assert batch.obs.shape == (6, 3)
    assert batch.action.shape == (6, 2)
    np.testing.assert_array_equal(batch.reward, [[0, 1], [100, 101], [200, 201]])
    np.testing.assert_array_equal(batch.obs[:, :2], [[0, 0], [1, 0], [0, 1], [1, 1], [0, 2], [1, 2]])
    assert batch.kept == slice(None)


def test_a_time_limit_bootstraps_from_the_state_in_which_it_struck() -> None:
    batch = filled(4, n_envs=2, truncated={1: (1,), 2: (0, 1)}).get()
    assert bootstraps(batch) == {
        (3, 0): [0, 3.5, 30],
        (3, 1): [1, 3.5, 31],
        (1, 1): [1, 1.5, 11],
        (2, 0): [0, 2.5, 20],
        (2, 1): [1, 2.5, 21],
    }


def test_a_termination_bootstraps_from_nothing() -> None:
    # Also where the time limit struck in the same step.
    batch = filled(3, n_envs=2, terminated={0: (0,), 1: (1,)}, truncated={1: (1,)}).get()
    assert bootstraps(batch).keys() == {(2, 0), (2, 1)}
    np.testing.assert_array_equal(batch.terminated, [[True, False], [False, True], [False, False]])
    np.testing.assert_array_equal(batch.truncated, [[False, False], [False, True], [False, False]])


def test_a_time_limit_in_the_last_step_bootstraps_once() -> None:
    batch = filled(2, n_envs=2, truncated={1: (0,)}).get()
    assert bootstraps(batch) == {(1, 0): [0, 1.5, 10], (1, 1): [1, 1.5, 11]}


def test_a_rollout_that_was_cut_short_ends_where_it_was_cut() -> None:
    buffer = filled(3, n_envs=2, buffer_size=8, truncated={0: (1,), 2: (0,)})
    assert not buffer.full
    assert buffer.size() == 6
    batch = buffer.get()
    assert batch.reward.shape == (3, 2)
    assert batch.obs.shape == (6, 3)
    assert bootstraps(batch) == {(2, 0): [0, 2.5, 20], (2, 1): [1, 2.5, 21], (0, 1): [1, 0.5, 1]}


def test_empty_reset_steps_are_not_kept() -> None:
    buffer = filled(3, n_envs=2, truncated={0: (1,)}, invalid={1: (1,)})
    batch = buffer.get()
    np.testing.assert_array_equal(batch.kept, [True, True, True, False, True, True])
    assert buffer.size() == 5
    assert (0, 1) in bootstraps(batch)


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
@pytest.mark.parametrize("n_steps", [1, 4, 7, 30])
def test_every_transition_is_followed_by_its_true_successor(mode: AutoresetMode, n_steps: int) -> None:
    door = make_environments(SyncVectorEnv(counters(), autoreset_mode=mode))
    buffer = RolloutBuffer(n_steps, OBS, spaces.Box(-1, 1, (1,), np.float32), n_envs=3)
    obs, action = door.reset(), np.zeros((3, 1), np.float32)
    missed = 0
    for _ in range(0, 60, n_steps):
        successors = []
        buffer.reset()
        while not buffer.full:
            step = door.step(action)
            buffer.add(obs, action, step)
            successors.append(step.successor)
            obs = step.obs

        batch = buffer.get()
        shifted = torch.cat([batch.obs.reshape(n_steps, 3, 3)[1:], torch.full((1, 3, 3), torch.nan)])
        followed = shifted.clone()
        followed[batch.bootstrap_index] = batch.bootstrap_obs
        asked = torch.zeros(n_steps * 3, dtype=torch.bool)
        asked[batch.kept] = True
        asked &= ~batch.terminated.ravel()
        truth = torch.as_tensor(np.stack(successors)).reshape(-1, 3)
        assert torch.equal(followed.reshape(-1, 3)[asked], truth[asked])
        missed += int((shifted.reshape(-1, 3)[asked] != truth[asked]).any(1).sum())
    # The row below alone is not always the successor: it starts the next episode, or the rollout is over.
    assert missed > 60 // n_steps


def test_what_is_held_is_a_copy() -> None:
    buffer = RolloutBuffer(2, OBS, ACTION, n_envs=2)
    obs, action, step = step_of(0, 2, truncated=(0,))
    buffer.add(obs, action, step)
    for array in (obs, action, step.reward, step.truncated, step.successor):
        array[:] = 0
    buffer.add(*step_of(1, 2))
    batch = buffer.get()
    np.testing.assert_array_equal(batch.obs[:2, 2], [0, 1])
    np.testing.assert_array_equal(batch.reward[0], [0, 1])
    assert bootstraps(batch)[0, 0] == [0, 0.5, 0]
    np.testing.assert_array_equal(batch.truncated[0], [True, False])


def test_a_full_rollout_refuses_more() -> None:
    buffer = filled(2, n_envs=1, truncated={0: (0,)})
    assert buffer.full
    with pytest.raises(ValueError, match=r"already holds its 2 steps; call reset\(\) first"):
        buffer.add(*step_of(2, 1))
    buffer.reset()
    assert (buffer.pos, buffer.size()) == (0, 0)
    buffer.add(*step_of(3, 1))
    assert bootstraps(buffer.get()) == {(0, 0): [0, 3.5, 30]}


def test_types_of_a_rollout() -> None:
    buffer = RolloutBuffer(2, spaces.Box(-1, 1, (3,), np.float64), spaces.Discrete(3), n_envs=2)
    for t in range(2):
        obs, _, step = step_of(t, 2, truncated=(1,), dtype=np.float64)
        buffer.add(obs, np.array([2, 0]), step)
    batch = buffer.get()
    # The networks compute in float32, also in the states that are bootstrapped from.
    assert batch.obs.dtype == batch.bootstrap_obs.dtype == torch.float32
    assert batch.action.dtype == torch.int64
    assert batch.action.tolist() == [2, 0, 2, 0]
    assert batch.reward.dtype == torch.float32
    assert batch.terminated.dtype == batch.truncated.dtype == torch.bool

    discrete = RolloutBuffer(1, spaces.Discrete(5), spaces.Box(-1, 1, (2, 2), np.float32), n_envs=2)
    ends = np.zeros(2, bool)
    index = np.array([4, 1])
    discrete.add(index, np.zeros((2, 2, 2)), Step(index, np.zeros(2), ends, ends, index, ~ends, [{}, {}]))
    batch = discrete.get()
    assert batch.obs.tolist() == [4, 1]
    assert batch.obs.dtype == torch.int64
    assert batch.action.shape == (2, 2, 2)

    pixels = RolloutBuffer(1, spaces.Box(0, 255, (4, 4, 1), np.uint8), spaces.Discrete(3))
    assert pixels.obs.dtype == np.uint8


@pytest.mark.parametrize("stored_at", [0, 1, 3, 5])
def test_a_restored_rollout_goes_on_as_if_never_stored(stored_at: int) -> None:
    ends: dict[str, dict[int, tuple[int, ...]]] = {
        "terminated": {1: (0,)},
        "truncated": {0: (1,), 2: (0,), 3: (1,)},
        "invalid": {1: (1,)},
    }
    n_steps, n_envs = 5, 2
    never_stored = filled(n_steps, n_envs, **ends)

    state = filled(stored_at, n_envs, buffer_size=n_steps, **ends).get_state()
    restored = filled(n_steps, n_envs, truncated=dict.fromkeys(range(5), (0, 1)))
    restored.set_state(state)
    assert restored.pos == stored_at
    for t in range(stored_at, n_steps):
        restored.add(*step_of(t, n_envs, **{name: where.get(t, ()) for name, where in ends.items()}))

    assert all(equal(a, b) for a, b in zip(never_stored.get(), restored.get(), strict=True))
    assert bootstraps(never_stored.get()) == bootstraps(restored.get())


@pytest.mark.parametrize(
    "foreign",
    [
        RolloutBuffer(3, spaces.Box(-1, 1, (4,), np.float32), ACTION, n_envs=2),
        RolloutBuffer(3, OBS, spaces.Discrete(2), n_envs=2),
        RolloutBuffer(3, OBS, ACTION, n_envs=3),
    ],
)
def test_a_foreign_rollout_is_refused_and_nothing_changed(foreign: RolloutBuffer) -> None:
    buffer = filled(2, n_envs=2, buffer_size=3)
    before = buffer.get()
    with pytest.raises(ValueError, match=r"RolloutBuffer: the stored \w+ has shape .* does not fit"):
        buffer.set_state(foreign.get_state())
    with pytest.raises(ValueError, match=r"RolloutBuffer: the stored obs has shape \(4, 2, 3\) .* a larger buffer"):
        buffer.set_state(filled(4, n_envs=2).get_state())
    assert all(equal(a, b) for a, b in zip(before, buffer.get(), strict=True))


# Replay.


def replay(buffer_size: int, n_envs: int, n_rows: int, seed: int = 0, n_steps: int = 1) -> ReplayBuffer:
    buffer = ReplayBuffer(
        buffer_size, OBS, ACTION, n_envs=n_envs, generator=np.random.default_rng(seed), n_steps=n_steps
    )
    for t in range(n_rows):
        buffer.add(*step_of(t, n_envs))
    return buffer


SPACES: dict[str, spaces.Space[Any]] = {
    "box": OBS,
    "float64": spaces.Box(-1000, 1000, (2,), np.float64),
    "discrete": spaces.Discrete(10_000),
    "tree": spaces.Dict(
        {
            "place": spaces.Box(-1e4, 1e4, (2,), np.float64),
            "camera": spaces.Box(0, 255, (2, 2, 1), np.uint8),
            "more": spaces.Tuple([spaces.Discrete(10_000), spaces.Box(-1e4, 1e4, (), np.float32)]),
        }
    ),
}


def observation(space: spaces.Space[Any], number: int) -> Tree:
    """The observation `number` of a space; no two are equal."""

    def leaf(part: spaces.Space[Any]) -> np.ndarray:
        if part.dtype == np.uint8:
            return np.array([number % 256, number // 256, 7, 255], np.uint8).reshape(part.shape)
        return np.full(part.shape, number / 3 if part.dtype == np.float64 else number, part.dtype)

    return tree_map(leaf, space_tree(space))


@dataclass
class Transition:
    """What a buffer keeps that stores both observations of each transition."""

    obs: Tree
    reward: float
    terminated: bool
    successor: Tree
    goes_on: bool  # whether the next row of its environment is the next step of its episode


class Reference:
    """Environments at random, and a buffer that stores both observations of each transition, in plain dicts.

    Args:
        space: Of the observations.
        n_envs: Number of environments.
        seed: Of what happens.
        has_empty_steps: Whether an environment resets in a step of its own.
    """

    def __init__(self, space: spaces.Space[Any], n_envs: int, seed: int, has_empty_steps: bool) -> None:
        self.space, self.n_envs, self.has_empty_steps = space, n_envs, has_empty_steps
        self.rng = np.random.default_rng(seed)
        self.transitions: dict[tuple[int, int], Transition] = {}  # by row and environment
        self.n_rows, self.n_breaks = 0, 0
        self._n_seen = 0
        self._obs = [self._new() for _ in range(n_envs)]
        self._resets = [False] * n_envs

    def step(self) -> tuple[Tree, np.ndarray, Step]:
        """A row: what to hand to `ReplayBuffer.add`. The action is (row, environment)."""
        if self.rng.random() < 0.15:
            # Somebody resets all environments, in the middle of episodes.
            self._obs, self._resets = [self._new() for _ in self._obs], [False] * self.n_envs
            self.n_breaks += 1
            for env in range(self.n_envs):
                if (last := self.transitions.get((self.n_rows - 1, env))) is not None:
                    last.goes_on = False
        row, obs, valid = self.n_rows, list(self._obs), ~np.array(self._resets)
        terminated, truncated = (valid & (self.rng.random(self.n_envs) < 0.15) for _ in range(2))
        reward = np.where(valid, self.rng.normal(size=self.n_envs), 0.0)
        successor = [self._new() for _ in obs]
        for env in np.flatnonzero(valid):
            ended = bool(terminated[env] | truncated[env])
            self.transitions[row, int(env)] = Transition(
                obs[env], float(reward[env]), bool(terminated[env]), successor[env], not ended
            )
            if self.has_empty_steps:
                self._resets[env], self._obs[env] = ended, successor[env]
            else:
                self._obs[env] = self._new() if ended else successor[env]
        for env in np.flatnonzero(~valid):
            self._resets[env], self._obs[env] = False, successor[env]
        self.n_rows += 1
        action = np.stack([np.full(self.n_envs, row), np.arange(self.n_envs)], axis=1).astype(np.float32)
        infos: list[dict[str, Any]] = [{}] * self.n_envs
        step = Step(stacked(self._obs), reward, terminated, truncated, stacked(successor), valid, infos)
        return stacked(obs), action, step

    def target(self, held: range, row: int, env: int, n_steps: int, gamma: float) -> tuple[float, float, Transition]:
        """The sum of rewards over up to n steps, the discount after them and the last of these transitions."""
        reward, discount = 0.0, 1.0
        for _ in range(n_steps):
            last = self.transitions[row, env]
            reward += discount * last.reward
            discount *= gamma
            row += 1
            if not last.goes_on or row not in held:
                break
        return reward, discount, last

    def check(self, buffer: ReplayBuffer, held: range) -> None:
        """Draw from a buffer often enough to meet each transition of the rows `held`, and compare all of them."""
        expected = {(row, env) for row, env in self.transitions if row in held}
        assert buffer.size() == len(expected)
        if not expected:
            return
        batch = buffer.sample(20 * len(expected), gamma=0.9)
        drawn = [(int(row), int(env)) for row, env in batch.action.tolist()]
        assert set(drawn) == expected
        first = {key: k for k, key in enumerate(drawn)}
        for key, k in first.items():
            reward, discount, last = self.target(held, *key, buffer.n_steps, gamma=0.9)
            assert batch.reward[k].item() == pytest.approx(reward, rel=1e-5, abs=1e-6)
            assert batch.discount[k].item() == pytest.approx(discount, rel=1e-6)
            assert batch.terminated[k].item() == float(last.terminated)
            assert_same(rows(batch.obs, k), self.transitions[key].obs)
            assert_same(rows(batch.successor, k), last.successor)
            if buffer.n_steps == 1:
                assert batch.reward[k].item() == np.float32(reward)
            assert batch.rows[k] % self.n_envs == key[1]
        assert (batch.weight == 1).all()
        assert batch.weight.shape == batch.reward.shape == batch.discount.shape == batch.terminated.shape

    def _new(self) -> Tree:
        self._n_seen += 1
        return observation(self.space, self._n_seen)


def stacked(trees: list[Tree]) -> Tree:
    return tree_map(lambda *them: np.stack(them), *trees)


def assert_same(tensors: Tree, arrays: Tree) -> None:
    """Equal, once float64 has become float32."""
    expected = dict(leaves(arrays))
    for name, tensor in leaves(tensors):
        array = expected.pop(name)
        array = array.astype(np.float32) if array.dtype == np.float64 else array
        assert tensor.numpy().dtype == array.dtype
        np.testing.assert_array_equal(tensor.numpy(), array)
    assert not expected


def newest(reference: Reference, n_rows: int, oldest: int = 0) -> range:
    return range(max(reference.n_rows - n_rows, oldest), reference.n_rows)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize("has_empty_steps", [False, True])
@pytest.mark.parametrize(("n_envs", "buffer_size"), [(1, 10), (3, 10), (3, 24), (1, 1), (3, 2)])
def test_the_same_can_be_drawn_as_if_both_observations_were_stored(
    space: str, n_steps: int, has_empty_steps: bool, n_envs: int, buffer_size: int
) -> None:
    reference = Reference(SPACES[space], n_envs, seed=buffer_size + n_envs, has_empty_steps=has_empty_steps)
    generator = np.random.default_rng(0)
    buffer = ReplayBuffer(buffer_size, reference.space, ACTION, n_envs=n_envs, generator=generator, n_steps=n_steps)
    assert buffer.n_rows == max(buffer_size // n_envs, 1)
    for _ in range(3 * buffer.n_rows + 30):
        buffer.add(*reference.step())
        reference.check(buffer, newest(reference, buffer.n_rows))
    # All of it happened: the ring went round, episodes ended in both ways, and were broken off.
    assert buffer.full
    assert reference.n_breaks > 1
    assert sum(not transition.goes_on for transition in reference.transitions.values()) > 8
    assert (len(reference.transitions) < reference.n_rows * n_envs) == has_empty_steps


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("n_steps", [1, 4])
def test_real_environments_fill_it_rightly(mode: AutoresetMode, n_steps: int) -> None:
    """A Counter observes (index, episode, step), and all else follows from these."""
    door = make_environments(SyncVectorEnv(counters(), autoreset_mode=mode))
    buffer = ReplayBuffer(
        48, door.observation_space, door.action_space, n_envs=3, generator=np.random.default_rng(0), n_steps=n_steps
    )
    obs, action = door.reset(), np.zeros((3, 1), np.float32)
    unfinished = set()
    for t in range(60):
        if t == 53:
            obs = door.reset()
        step = door.step(action)
        buffer.add(obs, action, step)
        obs = step.obs
        if t in (52, 59):
            unfinished |= {tuple(successor) for successor in step.successor.tolist()}
    batch = buffer.sample(1_000, gamma=0.5)
    spans = []
    for (index, episode, t), reward, discount, terminated, successor in zip(
        batch.obs.int().tolist(),
        batch.reward.tolist(),
        batch.discount.tolist(),
        batch.terminated.tolist(),
        batch.successor.int().tolist(),
        strict=True,
    ):
        lengths = EPISODE_LENGTHS[index]
        length = lengths[episode % len(lengths)]
        span = successor[2] - t
        spans.append(span)
        assert 1 <= span <= n_steps
        assert successor[:2] == [index, episode]
        # An action of 0 is 1 in a Counter's own units.
        assert reward == sum(0.5**k * (100 * episode + 10 * (t + k + 1) + 1) for k in range(span))
        assert discount == 0.5**span
        assert terminated == (successor[2] == length)
        assert span == n_steps or successor[2] in (length, TIME_LIMIT) or tuple(successor) in unfinished
    assert set(spans) >= {1, n_steps}
    assert (batch.terminated == 1).any()
    assert ((batch.successor[:, 2] == TIME_LIMIT) & (batch.terminated == 0)).any()


# Returns over n steps, by hand: rewards 1, 2, 4, 8, ..., gamma 1/2, three steps.


def powers_of_two(
    n_rows: int,
    buffer_size: int = 20,
    terminated: tuple[int, ...] = (),
    truncated: tuple[int, ...] = (),
    broken: tuple[int, ...] = (),
    invalid: tuple[int, ...] = (),
    n_steps: int = 3,
) -> dict[int, tuple[float, float, float, float]]:
    """By the row begun in: reward, discount, terminated, and what it bootstraps from, which is row + 1 in a run."""
    buffer = ReplayBuffer(
        buffer_size, spaces.Box(-99, 99, (1,), np.float32), ACTION, generator=np.random.default_rng(0), n_steps=n_steps
    )
    for t in range(n_rows):
        begins_anew = t - 1 in (*terminated, *truncated, *broken)
        obs = np.array([[-float(t) if begins_anew else float(t)]], np.float32)
        ends = [np.array([t in where]) for where in (terminated, truncated)]
        step = Step(obs, np.array([2.0**t]), *ends, np.array([[t + 1]], np.float32), np.array([t not in invalid]), [{}])
        buffer.add(obs, np.full((1, 2), t / 100), step)
    batch = buffer.sample(600, gamma=0.5)
    columns = (batch.reward, batch.discount, batch.terminated, batch.successor[:, 0])
    begun = (batch.action[:, 0] * 100).round().int().tolist()
    return dict(zip(begun, zip(*(column.tolist() for column in columns), strict=True), strict=True))


def test_three_steps_in_the_middle_and_at_the_newest_row() -> None:
    assert powers_of_two(5) == {
        0: (1 + 1 + 1, 0.125, 0, 3),
        1: (2 + 2 + 2, 0.125, 0, 4),
        2: (4 + 4 + 4, 0.125, 0, 5),
        3: (8 + 8, 0.25, 0, 5),
        4: (16, 0.5, 0, 5),
    }
    assert powers_of_two(2, n_steps=1) == {0: (1, 0.5, 0, 1), 1: (2, 0.5, 0, 2)}
    assert powers_of_two(1) == {0: (1, 0.5, 0, 1)}


def test_three_steps_end_where_the_episode_terminated() -> None:
    assert powers_of_two(5, terminated=(2,)) == {
        0: (3, 0.125, 1, 3),
        1: (4, 0.25, 1, 3),
        2: (4, 0.5, 1, 3),
        3: (16, 0.25, 0, 5),
        4: (16, 0.5, 0, 5),
    }


def test_three_steps_end_at_a_time_limit_and_bootstrap_from_the_state_in_which_it_struck() -> None:
    expected = {
        0: (2, 0.25, 0, 2),
        1: (2, 0.5, 0, 2),
        2: (12, 0.125, 0, 5),
        3: (16, 0.25, 0, 5),
        4: (16, 0.5, 0, 5),
    }
    assert powers_of_two(5, truncated=(1,)) == expected
    # And so they do where somebody else reset the environment.
    assert powers_of_two(5, broken=(1,)) == expected
    both = powers_of_two(5, truncated=(1,), terminated=(1,))
    assert both == {**expected, 0: (2, 0.25, 1, 2), 1: (2, 0.5, 1, 2)}, "a termination in the same step counts"


def test_three_steps_do_not_reach_into_an_empty_step() -> None:
    assert powers_of_two(6, truncated=(1,), invalid=(2,)) == {
        0: (2, 0.25, 0, 2),
        1: (2, 0.5, 0, 2),
        3: (24, 0.125, 0, 6),
        4: (32, 0.25, 0, 6),
        5: (32, 0.5, 0, 6),
    }


def test_three_steps_go_on_where_the_ring_begins_again_but_not_from_the_newest_row_to_the_oldest() -> None:
    # Rows 4, 5, 2, 3 lie in the places 0, 1, 2, 3.
    assert powers_of_two(6, buffer_size=4) == {
        2: (12, 0.125, 0, 5),
        3: (24, 0.125, 0, 6),
        4: (32, 0.25, 0, 6),
        5: (32, 0.5, 0, 6),
    }
    assert powers_of_two(6, buffer_size=4, truncated=(3,)) == {
        2: (8, 0.25, 0, 4),
        3: (8, 0.5, 0, 4),
        4: (32, 0.25, 0, 6),
        5: (32, 0.5, 0, 6),
    }
    # The newest row in the ring's last place.
    assert powers_of_two(8, buffer_size=4)[7] == (128, 0.5, 0, 8)
    # More steps than rows.
    assert powers_of_two(9, buffer_size=2, n_steps=5) == {7: (256, 0.25, 0, 9), 8: (256, 0.5, 0, 9)}


# The ring.


@pytest.mark.parametrize(("buffer_size", "n_envs"), [(10, 3), (10, 1), (10, 2), (10, 10), (3, 4), (1, 1), (2, 7)])
def test_the_ring_holds_exactly_the_newest_transitions(buffer_size: int, n_envs: int) -> None:
    buffer = ReplayBuffer(buffer_size, OBS, ACTION, n_envs=n_envs)
    n_rows = max(buffer_size // n_envs, 1)
    assert buffer.buffer_size == n_rows * n_envs, "rounded down to whole rows, of which there is at least one"
    rewards: list[list[float]] = []
    for t in range(25):
        obs, action, step = step_of(t, n_envs)
        buffer.add(obs, action, step)
        rewards.append(step.reward.tolist())

        assert buffer.size() == min(len(rewards), n_rows) * n_envs
        assert buffer.full == (len(rewards) >= n_rows)
        assert buffer.pos == len(rewards) % n_rows
        oldest_first = np.roll(buffer.reward, -buffer.pos, axis=0) if buffer.full else buffer.reward[: buffer.pos]
        assert oldest_first.tolist() == rewards[-n_rows:]


def test_each_place_holds_one_transition() -> None:
    batch = replay(10, n_envs=3, n_rows=7).sample(200)
    t, env = (batch.reward / 100).floor(), batch.reward % 100
    assert len(set(batch.reward.tolist())) == 9
    torch.testing.assert_close(batch.obs, torch.stack([env, t, env + 10 * t], dim=1))
    torch.testing.assert_close(batch.successor, torch.stack([env, t + 0.5, env + 10 * t], dim=1))
    torch.testing.assert_close(batch.action, torch.stack([env / 10, t / 1000], dim=1))


def test_empty_reset_steps_and_ends() -> None:
    buffer = ReplayBuffer(12, OBS, ACTION, n_envs=3, generator=np.random.default_rng(0))
    buffer.add(*step_of(0, 3, terminated=(0, 2), truncated=(1, 2)))
    buffer.add(*step_of(1, 3, invalid=(0, 1)))
    buffer.add(*step_of(2, 3, invalid=(0, 1, 2)))
    assert buffer.size() == 4
    batch = buffer.sample(100)
    # A time limit is not death.
    told = set(zip(batch.reward.tolist(), batch.terminated.tolist(), strict=True))
    assert told == {(0, 1), (1, 0), (2, 1), (102, 0)}
    assert batch.terminated.dtype == torch.float32

    only_empty = ReplayBuffer(12, OBS, ACTION, n_envs=3)
    only_empty.add(*step_of(0, 3, invalid=(0, 1, 2)))
    assert only_empty.size() == 0
    with pytest.raises(ValueError, match="empty replay buffer"):
        only_empty.sample(1)


def test_types_of_a_replay() -> None:
    buffer = ReplayBuffer(4, spaces.Box(-1, 1, (3,), np.float64), spaces.Box(-1, 1, (2, 2), np.float64), n_envs=2)
    obs, _, step = step_of(0, 2, dtype=np.float64)
    buffer.add(obs / 3, np.arange(8.0).reshape(2, 2, 2), step)
    batch = buffer.sample(3)
    assert {field.dtype for name, field in batch._asdict().items() if name != "rows"} == {torch.float32}
    assert batch.rows.dtype == np.int64
    assert batch.action.shape == (3, 4)
    np.testing.assert_array_equal(buffer.obs[0], (obs / 3).astype(np.float32))
    np.testing.assert_array_equal(buffer.action[0], np.arange(8).reshape(2, 4))

    assert ReplayBuffer(2, spaces.Box(0, 255, (8, 8), np.uint8), ACTION).obs.dtype == np.uint8
    assert ReplayBuffer(2, spaces.Discrete(4), ACTION).obs.dtype == np.int64
    tree = ReplayBuffer(6, SPACES["tree"], ACTION, n_envs=2).obs
    shapes = {name: (leaf.shape, leaf.dtype.name) for name, leaf in leaves(tree)}
    assert shapes == {
        "place": ((3, 2, 2), "float32"),
        "camera": ((3, 2, 2, 2, 1), "uint8"),
        "more/0": ((3, 2), "int64"),
        "more/1": ((3, 2), "float32"),
    }


@pytest.mark.parametrize("n_rows", [5, 13])
def test_draws_are_uniform_over_what_is_held(n_rows: int) -> None:
    buffer = replay(10, n_envs=1, n_rows=n_rows)
    n, cells = 50_000, buffer.size()
    _, counts = np.unique(buffer.sample(n).reward, return_counts=True)
    assert len(counts) == cells
    chi_square = float(((counts - n / cells) ** 2 / (n / cells)).sum())
    # The 99.9 % points of chi-square with 4 and 9 degrees of freedom.
    assert chi_square < {5: 18.47, 10: 27.88}[cells]


def test_draws_are_uniform_also_where_steps_are_empty() -> None:
    buffer = ReplayBuffer(24, OBS, ACTION, n_envs=2, generator=np.random.default_rng(0))
    for t in range(20):
        buffer.add(*step_of(t, 2, invalid=((0,), (0, 1), (), (1,))[t % 4]))
    assert buffer.size() == 12
    n = 48_000
    _, counts = np.unique(buffer.sample(n).reward, return_counts=True)
    assert len(counts) == 12
    # The 99.9 % point of chi-square with 11 degrees of freedom.
    assert float(((counts - n / 12) ** 2 / (n / 12)).sum()) < 31.26


def test_one_generator_draws_the_same_batches() -> None:
    draws = [[buffer.sample(8) for _ in range(3)] for buffer in (replay(50, 1, 40, seed=7), replay(50, 1, 40, seed=7))]
    assert all(equal(a, b) for a, b in zip(*draws, strict=True))
    assert not equal(draws[0][0].reward, draws[0][1].reward)
    assert not equal(draws[0][0].reward, replay(50, 1, 40, seed=8).sample(8).reward)


def test_the_global_generator_is_left_alone() -> None:
    np.random.seed(0)
    expected = np.random.random(4)
    np.random.seed(0)
    replay(10, 1, 5).sample(4)
    np.testing.assert_array_equal(np.random.random(4), expected)


def test_an_empty_replay_cannot_be_sampled() -> None:
    buffer = replay(10, 1, 12)
    buffer.reset()
    assert buffer.size() == 0
    with pytest.raises(ValueError, match="empty replay buffer: collect or load transitions first"):
        buffer.sample(1)


def test_after_a_reset_it_fills_as_if_new() -> None:
    reference = Reference(OBS, 3, seed=1, has_empty_steps=True)
    buffer = ReplayBuffer(15, OBS, ACTION, n_envs=3)
    for t in range(18):
        buffer.add(*reference.step())
        if t == 7:
            buffer.reset()
            assert (buffer.size(), buffer.pos, buffer.full) == (0, 0, False)
        if t > 7:
            reference.check(buffer, newest(reference, 5, oldest=8))


def test_a_batch_is_a_copy_and_so_is_what_is_held() -> None:
    buffer = ReplayBuffer(4, OBS, ACTION)
    obs, action, step = step_of(0, 1, truncated=(0,))
    buffer.add(obs, action, step)
    for array in (obs, action, step.reward, step.successor):
        array[:] = 0
    buffer.add(*step_of(1, 1))
    batch = buffer.sample(30)
    assert sorted(set(batch.successor[:, 1].tolist())) == [0.5, 1.5]
    assert sorted(set(batch.obs[:, 2].tolist())) == [0, 10]
    for tensor in (batch.obs, batch.action, batch.reward, batch.successor, batch.terminated, batch.discount):
        tensor.fill_(77)
    again = buffer.sample(30)
    assert sorted(set(again.successor[:, 1].tolist())) == [0.5, 1.5]
    assert sorted(set(again.reward.tolist())) == [0, 100]
    assert set(again.discount.tolist()) == {np.float32(0.99)}


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "3"])
def test_a_wrong_number_of_steps_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="n_steps must be a whole number, at least 1"):
        ReplayBuffer(10, OBS, ACTION, n_steps=wrong)


def test_saturation_is_the_share_of_the_newest_actions_at_a_bound() -> None:
    buffer = ReplayBuffer(6, OBS, ACTION, n_envs=2)
    assert buffer.saturation() == 0

    def act(action: list[list[float]]) -> None:
        obs, _, step = step_of(0, 2)
        buffer.add(obs, np.array(action), step)

    act([[1, -1], [-0.9995, 1]])
    assert buffer.saturation() == 1
    act([[0, 0.99], [-0.99, 1]])
    assert buffer.saturation() == 5 / 8
    assert buffer.saturation(n_transitions=2) == 1 / 4
    assert buffer.saturation(n_transitions=3) == 5 / 8, "whole rows are looked at"
    act([[0, 0], [0, 0]])
    act([[1, 0], [0, 0]])
    assert buffer.saturation() == 2 / 12, "the first row is overwritten"
    assert buffer.saturation(n_transitions=4) == 1 / 8, "the newest lie at both ends of the ring"


# Bytes.


@pytest.mark.parametrize(
    ("shape", "dtype", "action_dim", "ours", "both", "peers"),
    [
        ((3,), np.float32, 1, 21, 33, 40),  # Pendulum
        ((2,), np.float32, 1, 17, 25, 32),  # MountainCarContinuous
        ((4,), np.float64, 1, 25, 41, 80),  # InvertedPendulum
        ((17,), np.float64, 6, 97, 165, 308),  # HalfCheetah
        ((105,), np.float64, 8, 457, 877, 1_724),  # Ant
        ((84, 84, 4), np.uint8, 2, 28_237, 56_461, 56_468),  # images
        ((11,), np.float32, 1, 53, 97, 104),  # the least at which 0.55 of `both` is reached
    ],
)
def test_bytes_of_a_transition(
    shape: tuple[int, ...], dtype: Any, action_dim: int, ours: int, both: int, peers: int
) -> None:
    """Beside one that stores both observations in the same dtypes, and stable-baselines3's, which keeps float64 too.

    With o bytes of an observation and c = 4 action_dim + 5 of all else, o + c <= 0.55 (2 o + c) where o >= 4.5 c.
    """
    space, actions = spaces.Box(0, 1, shape, dtype), spaces.Box(-1, 1, (action_dim,), np.float32)
    buffer = ReplayBuffer(20, space, actions, n_envs=4)
    assert buffer.nbytes == 20 * ours
    leaf = buffer.obs
    assert isinstance(leaf, np.ndarray)
    assert buffer.nbytes + leaf.nbytes == 20 * both
    assert (ours <= 0.55 * both) == (leaf.nbytes / 20 >= 4.5 * (4 * action_dim + 5))

    peer = stable_baselines3.common.buffers.ReplayBuffer(20, space, actions, device="cpu", n_envs=4)
    arrays = {name: array for name, array in vars(peer).items() if isinstance(array, np.ndarray)}
    assert {"observations", "next_observations", "actions", "rewards", "dones", "timeouts"} == arrays.keys()
    assert sum(array.nbytes for array in arrays.values()) == 20 * peers
    assert ours <= 0.55 * peers


def test_the_table_of_successors_holds_one_observation_for_each_episode_and_no_more() -> None:
    buffer = ReplayBuffer(300, OBS, ACTION, n_envs=3)
    obs = np.zeros((3, 3), np.float32)
    for t in range(1, 1_001):
        ends = np.array([t % 7 == 0, t % 13 == 0, False])
        successor = np.full((3, 3), t, np.float32)
        following = np.where(ends[:, None], -successor, successor)
        step = Step(following, np.zeros(3), ends & (t % 2 == 0), ends & (t % 2 == 1), successor, ~np.zeros(3, bool), [])
        buffer.add(obs, np.zeros((3, 2)), step)
        assert len(buffer._successor_of) == np.count_nonzero(buffer.flags & CUT)
        obs = following
    # Of the steps 901 to 1000.
    assert len(buffer._successor_of) == (1_000 // 7 - 900 // 7) + (1_000 // 13 - 900 // 13)
    assert all(row.base is None and row.nbytes == 12 for row in buffer._successor_of.values())


def test_more_than_the_machine_has_is_refused_with_the_number() -> None:
    pixels = spaces.Box(0, 255, (84, 84, 4), np.uint8)
    # 84 x 84 x 4 + 2 x 4 + 4 + 1 = 28 237 bytes each, 1e9 of them.
    text = r"would take 26297\.8 GiB \(1,000,000,000 transitions of 28,237 bytes\), and this machine has [\d.]+ GiB"
    with pytest.raises(MemoryError, match=text):
        ReplayBuffer(10**9, pixels, ACTION)
    with pytest.raises(MemoryError, match=r"26297\.8 GiB .*: choose a smaller buffer_size"):
        ReplayBuffer(10**9, pixels, ACTION, n_envs=8)


def test_a_large_buffer_says_how_large_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    pixels = spaces.Box(0, 255, (84, 84, 4), np.uint8)
    buffer = ReplayBuffer(40_000, pixels, ACTION)
    text = capsys.readouterr().out
    assert "replay buffer: 1.1 GiB (40,000 transitions of 28,237 bytes) when full" in text
    assert "GiB of memory are free" in text
    assert buffer.nbytes == 40_000 * 28_237
    ReplayBuffer(10_000, pixels, ACTION)
    assert capsys.readouterr().out == ""


# States.


def history(seed: int, n_rows: int, n_envs: int, space: str, has_empty_steps: bool) -> list[Any]:
    reference = Reference(SPACES[space], n_envs, seed, has_empty_steps)
    return [reference.step() for _ in range(n_rows)]


def copied(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array.copy() for name, array in state.items()}


@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize(
    ("space", "n_envs", "has_empty_steps"), [("box", 1, False), ("box", 3, True), ("tree", 3, False), ("tree", 2, True)]
)
def test_a_restored_replay_goes_on_as_if_never_stored(
    space: str, n_envs: int, has_empty_steps: bool, n_steps: int
) -> None:
    """Stored when empty, at each place of the ring in its first two rounds, and after."""

    def make() -> ReplayBuffer:
        generator = np.random.default_rng(3)
        return ReplayBuffer(5 * n_envs, SPACES[space], ACTION, n_envs=n_envs, generator=generator, n_steps=n_steps)

    steps = history(4, 18, n_envs, space, has_empty_steps)
    for stored_at in range(13):
        never_stored, restored = make(), make()
        for step in history(5, stored_at % 8, n_envs, space, not has_empty_steps):
            restored.add(*step)  # something else, which is to be forgotten
        for step in steps[:stored_at]:
            never_stored.add(*step)
        restored.set_state(copied(never_stored.get_state()))
        for step in [None, *steps[stored_at:]]:
            if step is not None:
                never_stored.add(*step)
                restored.add(*step)
            assert (restored.pos, restored.full, restored.size()) == (
                never_stored.pos,
                never_stored.full,
                never_stored.size(),
            )
            if never_stored.size():
                assert equal(never_stored.sample(30), restored.sample(30))
        states = never_stored.get_state(), restored.get_state()
        assert states[0].keys() == states[1].keys()
        assert restored.get_state()["reward"].tobytes() == never_stored.get_state()["reward"].tobytes()


def test_a_state_is_of_named_arrays_and_a_restored_replay_shares_no_memory_with_it() -> None:
    steps = history(4, 12, 2, "tree", True)
    buffer, restored = (ReplayBuffer(16, SPACES["tree"], ACTION, n_envs=2) for _ in range(2))
    for step in steps:
        buffer.add(*step)
    state = copied(buffer.get_state())
    assert all(type(array) is np.ndarray for array in state.values())
    assert {"pos", "action", "reward", "flags", "obs/place", "obs/more/0", "newest/camera"} <= state.keys()
    restored.set_state(state)
    for array in state.values():
        array.fill(0)
    buffer.generator, restored.generator = (np.random.default_rng(0) for _ in range(2))
    assert equal(buffer.sample(100), restored.sample(100))


@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize("n_rows", [0, 3, 5, 7, 11])
@pytest.mark.parametrize("space", ["box", "tree"])
def test_a_replay_restored_into_a_larger_one_forgets_the_oldest_first(space: str, n_rows: int, n_steps: int) -> None:
    reference = Reference(SPACES[space], 2, seed=6, has_empty_steps=True)
    small = ReplayBuffer(10, SPACES[space], ACTION, n_envs=2)
    for _ in range(n_rows):
        small.add(*reference.step())
    large = ReplayBuffer(16, SPACES[space], ACTION, n_envs=2, n_steps=n_steps)
    large.set_state(copied(small.get_state()))
    held = min(n_rows, 5)
    assert (large.pos, large.full) == (held, False)
    for _ in range(20):
        reference.check(large, newest(reference, 8, oldest=n_rows - held))
        large.add(*reference.step())


def test_a_replay_of_the_same_size_from_a_larger_one_that_was_not_full() -> None:
    reference = Reference(OBS, 1, seed=7, has_empty_steps=False)
    large, small = ReplayBuffer(20, OBS, ACTION), ReplayBuffer(10, OBS, ACTION)
    for _ in range(10):
        large.add(*reference.step())
    small.set_state(copied(large.get_state()))
    assert (small.size(), small.pos, small.full) == (10, 0, True)
    for _ in range(12):
        reference.check(small, newest(reference, 10))
        small.add(*reference.step())


def shortened(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {**state, "action": state["action"][:1]}


FOREIGN: dict[str, Callable[[], dict[str, np.ndarray]]] = {
    "observation shape": lambda: ReplayBuffer(30, spaces.Box(-1, 1, (4,), np.float32), ACTION, n_envs=3).get_state(),
    "observation dtype": lambda: ReplayBuffer(30, spaces.Box(0, 9, (3,), np.uint8), ACTION, n_envs=3).get_state(),
    "action dimensions": lambda: ReplayBuffer(30, OBS, spaces.Box(-1, 1, (3,), np.float32), n_envs=3).get_state(),
    "number of environments": lambda: replay(9, 1, 5).get_state(),
    "larger": lambda: replay(60, 3, 15).get_state(),
    "unequal lengths": lambda: shortened(replay(30, 3, 5).get_state()),
}


@pytest.mark.parametrize("foreign", FOREIGN)
def test_a_foreign_replay_is_refused_and_nothing_changed(foreign: str) -> None:
    buffer = replay(30, 3, 5)
    before = copied(buffer.get_state())
    with pytest.raises(ValueError, match=r"ReplayBuffer: the stored \w+ has shape .* and dtype .* does not fit"):
        buffer.set_state(FOREIGN[foreign]())
    after = buffer.get_state()
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("missing", ["pos", "obs", "action", "reward", "flags", "newest", "after_index", "after"])
def test_a_state_without_its_arrays_is_refused_and_nothing_changed(missing: str) -> None:
    buffer = replay(30, 3, 2)
    before = copied(buffer.get_state())
    state = replay(30, 3, 4, seed=1).get_state()
    del state[missing]
    with pytest.raises(KeyError, match=missing):
        buffer.set_state(state)
    after = buffer.get_state()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def damaged(name: str, change: Callable[[np.ndarray], Any]) -> Callable[[], dict[str, np.ndarray]]:
    def make() -> dict[str, np.ndarray]:
        state = copied(replay(30, 3, 4, seed=1).get_state())
        return {**state, name: np.asarray(change(state[name]))}

    return make


DAMAGED: dict[str, tuple[str, Callable[[], dict[str, np.ndarray]]]] = {
    "pos beyond the rows": ("pos", damaged("pos", lambda pos: pos + 1)),
    "pos below 0": ("pos", damaged("pos", lambda pos: pos * 0 - 1)),
    "pos a float": ("pos", damaged("pos", lambda pos: pos + 0.5)),
    "pos twice": ("pos", damaged("pos", lambda pos: [pos, pos])),
    "a cut without a successor": ("after_index", damaged("after_index", lambda index: index[1:])),
    "a successor without a cut": ("after_index", damaged("after_index", lambda index: [*index[1:], 11])),
    "a place twice": ("after_index", damaged("after_index", lambda index: [*index[1:], index[1]])),
    "a place out of range": ("after_index", damaged("after_index", lambda index: [*index[1:], 99])),
    "places as floats": ("after_index", damaged("after_index", lambda index: index + 0.25)),
    "places in a table": ("after_index", damaged("after_index", lambda index: index[None])),
    "a flag that was lost": ("after_index", damaged("flags", lambda flags: flags * 0)),
    "too few successors": ("after", damaged("after", lambda after: after[1:])),
    "successors of another shape": ("after", damaged("after", lambda after: after[:, :1])),
    "successors of another dtype": ("after", damaged("after", lambda after: after.astype(np.float64))),
    "too few newest": ("newest", damaged("newest", lambda newest: newest[1:])),
    "newest of another shape": ("newest", damaged("newest", lambda newest: newest[:, :1])),
    "newest of another dtype": ("newest", damaged("newest", lambda newest: newest.astype(np.uint8))),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_state_whose_parts_do_not_fit_together_is_refused_and_nothing_changed(damage: str) -> None:
    buffer = replay(30, 3, 5)
    buffer.set_state(copied(replay(30, 3, 4, seed=1).get_state()))  # the state itself is right
    before = copied(buffer.get_state())
    assert 2 <= len(before["after_index"]) < 12
    assert 11 not in before["after_index"]
    name, state = DAMAGED[damage]
    with pytest.raises(ValueError, match=f"ReplayBuffer: the stored {name}, of shape .* should be .*damaged"):
        buffer.set_state(state())
    after = buffer.get_state()
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_images_of_an_environment_are_stored_as_they_are() -> None:
    space = spaces.Box(0, 255, (2, 2), np.uint8)
    buffer = ReplayBuffer(3, space, ACTION)
    image = np.array([[[0, 255], [1, 254]]], np.uint8)
    ends = np.zeros(1, bool)
    buffer.add(image, np.zeros((1, 2)), Step(image, np.zeros(1), ends, ends, image, ~ends, [{}]))
    assert torch.equal(buffer.sample(1).obs, torch.as_tensor(image))


def test_a_buffer_may_take_back_its_own_state() -> None:
    model = DDPG("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [8]}, learning_starts=500, seed=0).learn(450)
    buffer = model.replay_buffer
    before = {name: array.copy() for name, array in buffer.get_state().items()}
    buffer.set_state(buffer.get_state())
    after = buffer.get_state()
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert before["flags"].any()
