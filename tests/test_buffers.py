"""Buffers: what a rollout bootstraps from, the order of the ring, and states that go on as if never stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from sbac.buffers import ReplayBuffer, RolloutBatch, RolloutBuffer
from sbac.envs import Step, make_environments
from tests.environments import counters

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


def replay(buffer_size: int, n_envs: int, n_steps: int, seed: int = 0) -> ReplayBuffer:
    buffer = ReplayBuffer(buffer_size, OBS, ACTION, n_envs=n_envs, generator=np.random.default_rng(seed))
    for t in range(n_steps):
        buffer.add(*step_of(t, n_envs))
    return buffer


@pytest.mark.parametrize(("buffer_size", "n_envs"), [(10, 3), (10, 1), (10, 2), (10, 10), (3, 4), (1, 1), (2, 7)])
def test_the_ring_holds_exactly_the_newest_transitions(buffer_size: int, n_envs: int) -> None:
    buffer = ReplayBuffer(buffer_size, OBS, ACTION, n_envs=n_envs)
    rewards: list[float] = []
    for t in range(25):
        obs, action, step = step_of(t, n_envs)
        buffer.add(obs, action, step)
        rewards += step.reward.tolist()

        assert buffer.size() == min(len(rewards), buffer_size)
        assert buffer.full == (len(rewards) >= buffer_size)
        assert buffer.pos == len(rewards) % buffer_size
        oldest_first = np.roll(buffer.reward, -buffer.pos) if buffer.full else buffer.reward[: buffer.pos]
        assert oldest_first.tolist() == rewards[-buffer_size:]


def test_each_row_holds_one_transition() -> None:
    batch = replay(10, n_envs=3, n_steps=7).sample(200)
    t, env = (batch.reward / 100).floor(), batch.reward % 100
    assert len(set(batch.reward.tolist())) == 10
    torch.testing.assert_close(batch.obs, torch.stack([env, t, env + 10 * t], dim=1))
    torch.testing.assert_close(batch.successor, torch.stack([env, t + 0.5, env + 10 * t], dim=1))
    torch.testing.assert_close(batch.action, torch.stack([env / 10, t / 1000], dim=1))


def test_empty_reset_steps_and_ends() -> None:
    buffer = ReplayBuffer(10, OBS, ACTION, n_envs=3)
    buffer.add(*step_of(0, 3, terminated=(0, 2), truncated=(1, 2)))
    buffer.add(*step_of(1, 3, invalid=(0, 1)))
    buffer.add(*step_of(2, 3, invalid=(0, 1, 2)))
    assert buffer.size() == 4
    np.testing.assert_array_equal(buffer.reward[:4], [0, 1, 2, 102])
    # A time limit is not death.
    np.testing.assert_array_equal(buffer.terminated[:4], [1, 0, 1, 0])
    assert buffer.sample(5).terminated.dtype == torch.float32


def test_types_of_a_replay() -> None:
    buffer = ReplayBuffer(4, spaces.Box(-1, 1, (3,), np.float64), spaces.Box(-1, 1, (2, 2), np.float64), n_envs=2)
    obs, _, step = step_of(0, 2, dtype=np.float64)
    buffer.add(obs / 3, np.arange(8.0).reshape(2, 2, 2), step)
    batch = buffer.sample(3)
    assert {field.dtype for field in batch} == {torch.float32}
    assert batch.action.shape == (3, 4)
    np.testing.assert_array_equal(buffer.obs[:2], (obs / 3).astype(np.float32))
    np.testing.assert_array_equal(buffer.action[:2], np.arange(8).reshape(2, 4))

    assert ReplayBuffer(2, spaces.Box(0, 255, (8, 8), np.uint8), ACTION).obs.dtype == np.uint8
    assert ReplayBuffer(2, spaces.Discrete(4), ACTION).obs.dtype == np.int64


@pytest.mark.parametrize("n_steps", [5, 13])
def test_draws_are_uniform_over_what_is_held(n_steps: int) -> None:
    buffer = replay(10, n_envs=1, n_steps=n_steps)
    n, cells = 50_000, buffer.size()
    _, counts = np.unique(buffer.sample(n).reward, return_counts=True)
    assert len(counts) == cells
    chi_square = float(((counts - n / cells) ** 2 / (n / cells)).sum())
    # The 99.9 % points of chi-square with 4 and 9 degrees of freedom.
    assert chi_square < {5: 18.47, 10: 27.88}[cells]


def test_one_generator_draws_the_same_batches() -> None:
    draws = [[buffer.sample(8) for _ in range(3)] for buffer in (replay(50, 1, 40, seed=7), replay(50, 1, 40, seed=7))]
    assert all(equal(a, b) for a, b in zip(*draws, strict=True))
    assert not equal(draws[0][0].reward, draws[0][1].reward)
    assert not equal(draws[0][0].reward, replay(50, 1, 40, seed=8).sample(8).reward)


def test_the_global_generator_is_left_alone() -> None:
    np.random.seed(0)
    before = np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    replay(10, 1, 5).sample(4)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # type: ignore[index]


def test_an_empty_replay_cannot_be_sampled() -> None:
    buffer = replay(10, 1, 12)
    buffer.reset()
    assert buffer.size() == 0
    with pytest.raises(ValueError, match="empty replay buffer: collect or load transitions first"):
        buffer.sample(1)


@pytest.mark.parametrize("stored_at", [0, 2, 4, 9])
def test_a_restored_replay_goes_on_as_if_never_stored(stored_at: int) -> None:
    never_stored, restored = replay(10, 3, 11, seed=3), replay(10, 3, 1, seed=3)
    state = {name: array.copy() for name, array in replay(10, 3, stored_at).get_state().items()}
    restored.set_state(state)
    for t in range(stored_at, 11):
        restored.add(*step_of(t, 3))
    assert (restored.pos, restored.full) == (never_stored.pos, never_stored.full)
    assert equal(never_stored.sample(30), restored.sample(30))


@pytest.mark.parametrize("n_steps", [4, 10, 13])
def test_a_replay_restored_into_a_larger_one_forgets_the_oldest_first(n_steps: int) -> None:
    buffer = replay(15, 1, 0)
    buffer.set_state(replay(10, 1, n_steps).get_state())
    held = min(n_steps, 10)
    assert (buffer.size(), buffer.pos, buffer.full) == (held, held, False)
    for t in range(100, 108):
        buffer.add(*step_of(t, 1))
    expected = [100.0 * t for t in [*range(n_steps - held, n_steps), *range(100, 108)]][-15:]
    assert sorted(buffer.reward[: buffer.size()].tolist()) == expected


def test_a_full_replay_of_the_same_size_from_one_not_full() -> None:
    buffer = replay(10, 1, 0)
    buffer.set_state(replay(20, 1, 10).get_state())
    assert (buffer.size(), buffer.pos, buffer.full) == (10, 0, True)


def shortened(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {**state, "reward": state["reward"][:1]}


FOREIGN: dict[str, Callable[[], dict[str, np.ndarray]]] = {
    "observation shape": lambda: ReplayBuffer(10, spaces.Box(-1, 1, (4,), np.float32), ACTION).get_state(),
    "observation dtype": lambda: ReplayBuffer(10, spaces.Box(0, 9, (3,), np.uint8), ACTION).get_state(),
    "action dimensions": lambda: ReplayBuffer(10, OBS, spaces.Box(-1, 1, (3,), np.float32)).get_state(),
    "larger": lambda: replay(20, 1, 15).get_state(),
    "unequal lengths": lambda: shortened(replay(10, 1, 5).get_state()),
}


@pytest.mark.parametrize("foreign", FOREIGN)
def test_a_foreign_replay_is_refused_and_nothing_changed(foreign: str) -> None:
    buffer = replay(10, 3, 5)
    before = {name: array.copy() for name, array in buffer.get_state().items()}
    with pytest.raises(ValueError, match=r"ReplayBuffer: the stored \w+ has shape .* and dtype .* does not fit"):
        buffer.set_state(FOREIGN[foreign]())
    after = buffer.get_state()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_a_state_without_its_arrays_is_refused_and_nothing_changed() -> None:
    buffer = replay(10, 3, 2)
    with pytest.raises(KeyError, match="reward"):
        buffer.set_state({name: array for name, array in replay(10, 3, 1).get_state().items() if name != "reward"})
    assert buffer.size() == 6


def test_images_of_an_environment_are_stored_as_they_are() -> None:
    space = spaces.Box(0, 255, (2, 2), np.uint8)
    buffer = ReplayBuffer(3, space, ACTION)
    image = np.array([[[0, 255], [1, 254]]], np.uint8)
    ends = np.zeros(1, bool)
    buffer.add(image, np.zeros((1, 2)), Step(image, np.zeros(1), ends, ends, image, ~ends, [{}]))
    assert torch.equal(buffer.sample(1).obs, torch.as_tensor(image))
