"""Prioritised replay: what is drawn how often, what it counts, and sums that stay exact."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from sbac import DDPG, TD3, NotFiniteError
from sbac.adapters import Step
from sbac.buffers import ReplayBuffer
from sbac.codec import encode
from sbac.prioritized import PrioritizedReplayBuffer, SumTree
from sbac.schedules import ConstantSchedule, LinearSchedule

OBS = spaces.Box(-1000, 1000, (2,), np.float32)
ACTION = spaces.Box(-1, 1, (2,), np.float32)


def step_of(
    t: int, n_envs: int, truncated: tuple[int, ...] = (), invalid: tuple[int, ...] = ()
) -> tuple[np.ndarray, np.ndarray, Step]:
    """Step `t`, whose numbers tell when and where: it leads from (environment, t) to (environment, t + 1)."""
    env = np.arange(n_envs)
    obs = np.stack([env, np.full(n_envs, t)], axis=1).astype(np.float32)
    successor = obs + np.array([0, 1], np.float32)
    ended, valid = np.isin(env, truncated), ~np.isin(env, invalid)
    step = Step(successor, 100.0 * t + env, np.zeros(n_envs, bool), ended, successor, valid, [{}] * n_envs)
    return obs, np.zeros((n_envs, 2), np.float32), step


def prioritized(buffer_size: int, n_envs: int = 1, n_steps: int = 0, seed: int = 0, **kwargs: Any) -> Any:
    """A buffer that holds steps 0 to `n_steps` - 1 of each environment."""
    generator = np.random.default_rng(seed)
    buffer = PrioritizedReplayBuffer(buffer_size, OBS, ACTION, n_envs=n_envs, generator=generator, **kwargs)
    for t in range(n_steps):
        buffer.add(*step_of(t, n_envs))
    return buffer


def batch_of(buffer: ReplayBuffer, rows: list[int]) -> Any:
    """A batch of the transitions in these rows."""
    return buffer._batch(np.array(rows), 0.99)


def give_errors(buffer: Any, errors: list[float]) -> None:
    """TD errors to rows 0, 1, 2, ..."""
    buffer.update_priorities(batch_of(buffer, list(range(len(errors)))), torch.tensor(errors))


def assert_same(a: Any, b: Any) -> None:
    for name in a._fields:
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype, name
        np.testing.assert_array_equal(x, y, err_msg=name)


# The sums.


@pytest.mark.parametrize("size", [1, 2, 3, 8, 13, 100])
def test_sums_are_those_of_the_leaves_after_thousands_of_updates(size: int) -> None:
    rng = np.random.default_rng(size)
    tree, plain = SumTree(size), np.zeros(size)
    for _ in range(3000):
        index = rng.integers(size, size=rng.integers(1, 9))
        # Over 24 orders of magnitude: sums that are kept by adding differences lose the small ones for good.
        values = 10.0 ** rng.uniform(-12, 12, size=len(index)) * (rng.random(len(index)) < 0.8)
        tree.set(index, values)
        plain[index] = values
    np.testing.assert_array_equal(tree.values, plain)
    assert tree.total == pytest.approx(plain.sum(), rel=1e-14)

    # No history in the sums: bit for bit those of a tree that was given the same numbers at once.
    fresh = SumTree(size)
    fresh.values[:] = plain
    fresh.sum_up()
    np.testing.assert_array_equal(tree._nodes, fresh._nodes)
    tree.set(np.arange(size), np.zeros(size))
    assert tree.total == 0


def test_the_place_of_a_partial_sum() -> None:
    tree = SumTree(6)
    tree.set(np.arange(6), np.array([1.0, 0.0, 2.0, 0.0, 4.0, 0.0]))
    assert tree.total == 7
    mass = np.array([0.0, 0.99, 1.0, 2.99, 3.0, 6.99])
    np.testing.assert_array_equal(tree.find(mass), [0, 0, 2, 2, 4, 4])
    # At the very end, which rounding may ask for, lies the last number that is not 0.
    np.testing.assert_array_equal(tree.find(np.array([7.0, 7.5])), [4, 4])
    assert mass[0] == 0.0 and mass[-1] == 6.99

    running = np.random.default_rng(0)
    values = running.random(50) * (running.random(50) < 0.7)
    tree = SumTree(50)
    tree.set(np.arange(50), values)
    mass = running.random(1000) * tree.total
    np.testing.assert_array_equal(tree.find(mass), np.searchsorted(np.cumsum(values), mass, side="right"))


# The distribution.


def test_draws_follow_the_stated_distribution() -> None:
    buffer = prioritized(8, n_steps=8, alpha=0.7, epsilon=0.1)
    errors = np.array([0.0, 0.1, -0.2, 0.5, 1.0, -2.0, 5.0, 10.0])
    give_errors(buffer, errors.tolist())
    p = (np.abs(errors) + 0.1) ** 0.7
    probability = p / p.sum()

    # Batches of one, so that all draws are independent.
    n = 20_000
    counts = np.bincount(np.concatenate([buffer._draw(1) for _ in range(n)]), minlength=8)
    chi_square = float(((counts - n * probability) ** 2 / (n * probability)).sum())
    assert chi_square < 24.32  # the 99.9 % point with 7 degrees of freedom
    uniform = float(((counts - n / 8) ** 2 / (n / 8)).sum())
    assert uniform > 1000


def test_a_batch_takes_one_from_each_equal_part_of_the_priority() -> None:
    buffer = prioritized(5, n_steps=5, alpha=1.0, epsilon=1e-9)
    give_errors(buffer, [1.0, 1.0, 2.0, 4.0, 8.0])
    for _ in range(20):
        # Parts of 1: the priority of row 4 is 8 of 16 of them, whatever is drawn within each.
        np.testing.assert_array_equal(
            np.bincount(buffer.sample(16).rows, minlength=5)[2:] - [2, 4, 8], [0, 0, 0], err_msg="strata"
        )
    # Parts that do not fit the rows: each count is what is expected, to less than 2, and right on average.
    counts = np.stack([np.bincount(buffer.sample(7).rows, minlength=5) for _ in range(2000)])
    expected = 7 * np.array([1, 1, 2, 4, 8]) / 16
    assert (np.abs(counts - expected) < 2).all()
    np.testing.assert_allclose(counts.mean(0), expected, atol=0.04)


def test_weights_by_hand() -> None:
    buffer = prioritized(4, n_steps=3, alpha=0.5, beta=0.5, epsilon=1.0)
    give_errors(buffer, [3.0, -8.0, 15.0])  # p = 4, 9, 16, so that p^alpha = 2, 3, 4 and P = 2/9, 3/9, 4/9
    batch = buffer.sample(300)
    assert set(batch.rows) == {0, 1, 2}
    by_hand = (3 * np.array([2, 3, 4]) / 9) ** -0.5  # N = 3
    np.testing.assert_allclose(batch.weight, (by_hand / by_hand.max())[batch.rows], rtol=1e-6)
    assert batch.weight.dtype == torch.float32
    assert batch.weight.max() == 1

    # The largest of the batch, not of the buffer.
    give_errors(buffer, [1e9, 1e9, 15.0])
    assert set(buffer.sample(2).rows) == {0, 1}
    assert buffer.sample(2).weight.tolist() == [1, 1]


def test_beta_is_annealed() -> None:
    errors = [0.0, 3.0]

    def weights(progress_remaining: float, **kwargs: Any) -> list[float]:
        buffer = prioritized(2, n_steps=2, alpha=1.0, epsilon=1.0, **kwargs)
        give_errors(buffer, errors)  # p = 1, 4
        batch = buffer.sample(200, progress_remaining=progress_remaining)
        return [float(batch.weight[batch.rows == row][0]) for row in (0, 1)]

    for progress_remaining, beta in ((1.0, 0.4), (0.5, 0.7), (0.0, 1.0)):
        assert weights(progress_remaining) == pytest.approx([1, 4**-beta])
    assert weights(0.5, beta=LinearSchedule(0.0, 1.0)) == pytest.approx([1, 0.5])
    assert weights(0.1, beta=0) == [1, 1]
    assert weights(0.1, beta=ConstantSchedule(0.5)) == weights(0.9, beta=0.5) == pytest.approx([1, 0.5])


def test_alpha_0_is_uniform_replay() -> None:
    buffer = prioritized(10, n_steps=10, alpha=0.0)
    give_errors(buffer, np.logspace(-6, 6, 10).tolist())
    assert buffer.sample(64).weight.tolist() == [1.0] * 64
    n = 20_000
    counts = np.bincount(np.concatenate([buffer._draw(1) for _ in range(n)]), minlength=10)
    assert ((counts - n / 10) ** 2 / (n / 10)).sum() < 27.88  # the 99.9 % point with 9 degrees of freedom


def test_weights_take_back_the_bias() -> None:
    """With beta 1, the weighted mean over draws is the mean over the buffer, up to the scale by the largest weight."""
    buffer = prioritized(6, n_steps=6, alpha=1.0, beta=1.0, epsilon=1.0)
    give_errors(buffer, [0.0, 1.0, 2.0, 3.0, 4.0, 9.0])
    batch = buffer.sample(60_000)
    weighted = float((batch.weight * batch.reward).sum() / batch.weight.sum())
    assert weighted == pytest.approx(250, rel=0.01)  # the rewards are 0, 100, ..., 500
    assert float(batch.reward.mean()) > 330


# Rows that come and go.


def test_a_new_transition_gets_the_largest_priority_so_far() -> None:
    buffer = prioritized(4, n_steps=2, alpha=0.5, epsilon=1.0)
    np.testing.assert_array_equal(buffer._tree.values, [1, 1, 0, 0])
    give_errors(buffer, [24.0, 0.0])
    buffer.add(*step_of(2, 1))
    give_errors(buffer, [3.0])  # the largest so far, though it is there no more
    buffer.add(*step_of(3, 1))
    np.testing.assert_array_equal(buffer._tree.values, [2, 1, 5, 5])
    # Round the ring.
    buffer.add(*step_of(4, 1))
    np.testing.assert_array_equal(buffer._tree.values, [5, 1, 5, 5])
    assert buffer._tree.total == 16

    buffer.reset()
    assert buffer._tree.total == 0
    with pytest.raises(ValueError, match="empty replay buffer"):
        buffer.sample(1)
    buffer.add(*step_of(0, 1))
    assert buffer._tree.total == 1


def test_errors_below_1_do_not_lower_what_is_new() -> None:
    buffer = prioritized(4, n_steps=1)
    give_errors(buffer, [0.001])
    buffer.add(*step_of(1, 1))
    assert buffer._tree.values[1] == 1


def test_empty_steps_are_never_drawn() -> None:
    buffer = prioritized(6, n_envs=2)
    buffer.add(*step_of(0, 2, truncated=(1,)))
    buffer.add(*step_of(1, 2, invalid=(1,)))
    buffer.add(*step_of(2, 2))
    np.testing.assert_array_equal(buffer._tree.values, [1, 1, 1, 0, 1, 1])
    draws = np.concatenate([buffer.sample(5).rows for _ in range(200)])
    assert set(draws) == {0, 1, 2, 4, 5}
    # A transition takes the empty step's place, and an empty step a transition's.
    late = batch_of(buffer, [0, 1, 2])
    buffer.add(*step_of(3, 2, truncated=(0,)))
    buffer.add(*step_of(4, 2, invalid=(0,)))
    np.testing.assert_array_equal(buffer._tree.values, [1, 1, 0, 1, 1, 1])
    # Errors that come too late for row 2 do not bring it back.
    buffer.update_priorities(late, torch.tensor([0.0, 0.0, 5.0]))
    assert buffer._tree.values[2] == 0
    buffer.reset()
    buffer.update_priorities(late, torch.tensor([1.0, 1.0, 1.0]))
    assert buffer._tree.total == 0


@pytest.mark.parametrize("n_envs", [1, 3, 4])
def test_sums_stay_those_of_the_rows_round_the_ring(n_envs: int) -> None:
    rng = np.random.default_rng(n_envs)
    buffer = prioritized(40, n_envs=n_envs)
    invalid: tuple[int, ...] = ()
    for t in range(200):
        ends = tuple(np.flatnonzero((rng.random(n_envs) < 0.2) & ~np.isin(np.arange(n_envs), invalid)))
        buffer.add(*step_of(t, n_envs, truncated=ends, invalid=invalid))
        invalid = ends
        if buffer.size():
            batch = buffer.sample(7)
            assert (buffer.flags.reshape(-1)[batch.rows] & 4 == 0).all()
            buffer.update_priorities(batch, torch.as_tensor(rng.normal(size=7) * 100))
        assert np.count_nonzero(buffer._tree.values) == buffer.size()
        assert buffer._tree.total == pytest.approx(buffer._tree.values.sum(), rel=1e-14)
    assert buffer.full


@pytest.mark.parametrize("kind", ["uniform", "prioritized"])
def test_n_step_transitions(kind: str) -> None:
    cls = {"uniform": ReplayBuffer, "prioritized": PrioritizedReplayBuffer}[kind]
    buffer = cls(10, OBS, ACTION, generator=np.random.default_rng(0), n_steps=3)
    for t in range(5):
        buffer.add(*step_of(t, 1))
    batch = buffer.sample(100, gamma=0.5)
    first = (batch.rows == 1).nonzero()[0][0]
    assert batch.reward[first] == 100 + 0.5 * 200 + 0.25 * 300
    assert batch.discount[first] == 0.125
    assert batch.successor[first].tolist() == [0, 4]


def test_observations_in_a_dict() -> None:
    space = spaces.Dict({"a": OBS, "b": spaces.Discrete(4)})
    buffer = PrioritizedReplayBuffer(8, space, ACTION, n_envs=2, generator=np.random.default_rng(0))
    for t in range(3):
        obs, action, step = step_of(t, 2)
        index = np.full(2, t)
        buffer.add(
            {"a": obs, "b": index}, action, step._replace(obs=None, successor={"a": step.successor, "b": index + 1})
        )
    buffer.update_priorities(batch_of(buffer, [0, 1, 2, 3]), torch.full((4,), -1e-9))
    batch = buffer.sample(50)
    assert set(batch.rows) >= {4, 5}
    np.testing.assert_array_equal(batch.successor["b"], batch.obs["b"] + 1)
    np.testing.assert_array_equal(batch.obs["a"][:, 1], batch.obs["b"])


# What is refused.


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_errors_that_are_not_finite_are_refused_and_nothing_is_changed(wrong: float) -> None:
    buffer = prioritized(6, n_steps=5)
    give_errors(buffer, [1.0, 2.0, 3.0, 4.0])
    before = {name: array.copy() for name, array in buffer.get_state().items()}
    nodes = buffer._tree._nodes.copy()
    said = (
        r"1 of 3 TD errors are not finite, the first is .*(nan|inf) of the transition in row 3; all priorities are as"
    )
    with pytest.raises(NotFiniteError, match=said):
        buffer.update_priorities(batch_of(buffer, [2, 3, 0]), torch.tensor([9.0, wrong, 9.0]))
    np.testing.assert_array_equal(buffer._tree._nodes, nodes)
    for name, array in buffer.get_state().items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)


def test_the_largest_float_does_not_break_the_sums() -> None:
    buffer = prioritized(8, n_steps=8, alpha=1.0)
    largest = float(np.finfo(np.float32).max)
    give_errors(buffer, [largest] * 8)
    assert np.isfinite(buffer._tree.total)
    assert torch.isfinite(buffer.sample(8).weight).all()
    with pytest.raises(NotFiniteError):  # beyond what the networks compute with
        buffer.update_priorities(batch_of(buffer, [0]), torch.tensor([1e300], dtype=torch.float64))


def test_errors_of_another_shape_are_refused() -> None:
    buffer = prioritized(6, n_steps=5)
    with pytest.raises(ValueError, match=r"td_error has shape \(2, 3\), the batch has \(3,\)"):
        buffer.update_priorities(batch_of(buffer, [0, 1, 2]), torch.ones(2, 3))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("alpha", -0.1),
        ("alpha", 1.1),
        ("alpha", LinearSchedule(0, 1)),
        ("beta", -0.1),
        ("beta", 2),
        ("beta", LinearSchedule(0.4, 1.5)),
        ("beta", "linear"),
        ("epsilon", 0.0),
        ("epsilon", float("nan")),
    ],
)
def test_arguments_out_of_range_are_refused(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{argument} .*must be a finite number"):
        prioritized(4, **{argument: value})


# Stored and restored.


def test_one_generator_draws_the_same_batches() -> None:
    one, two, other = (prioritized(50, n_steps=40, seed=seed) for seed in (7, 7, 8))
    for buffer in (one, two, other):
        give_errors(buffer, np.linspace(0, 5, 30).tolist())
    for _ in range(3):
        assert_same(one.sample(8), two.sample(8))
    assert not np.array_equal(one.sample(32).rows, other.sample(32).rows)


def test_a_copy_is_a_buffer_of_its_own() -> None:
    buffer = prioritized(6, n_steps=5)
    twin = copy.deepcopy(buffer)
    give_errors(twin, [3.0, 2.0])
    twin.add(*step_of(5, 1))
    assert buffer._tree.total == 5
    assert twin._tree.total == pytest.approx(twin._tree.values.sum())
    assert twin._tree.values[5] == twin._tree.values[0] > 1


@pytest.mark.parametrize("stored_at", [0, 2, 13, 20])
def test_a_restored_buffer_goes_on_as_if_never_stored(stored_at: int) -> None:
    def drive(buffer: Any, start: int, stop: int) -> list[Any]:
        batches = []
        for t in range(start, stop):
            invalid = (1,) if t % 5 == 3 else ()
            buffer.add(*step_of(t, 3, truncated=(1,) if t % 5 == 2 else (), invalid=invalid))
            batches.append(buffer.sample(5))
            buffer.update_priorities(batches[-1], batches[-1].reward / 7 - t)
        return batches

    never_stored, stored = prioritized(30, n_envs=3), prioritized(30, n_envs=3)
    drive(never_stored, 0, stored_at)
    drive(stored, 0, stored_at)
    restored = prioritized(30, n_envs=3, seed=1)
    drive(restored, 40, 47)
    restored.set_state({name: array.copy() for name, array in stored.get_state().items()})
    restored.generator.bit_generator.state = stored.generator.bit_generator.state
    for one, two in zip(drive(never_stored, stored_at, 27), drive(restored, stored_at, 27), strict=True):
        assert_same(one, two)
    np.testing.assert_array_equal(never_stored._tree._nodes, restored._tree._nodes)


def test_a_larger_buffer_keeps_the_priorities_with_their_transitions() -> None:
    small = prioritized(5, n_steps=7)
    errors = {t: float(t) for t in range(2, 7)}
    small.update_priorities(batch_of(small, list(range(5))), torch.as_tensor(small.reward[:, 0] / 100))
    large = prioritized(9)
    large.set_state(small.get_state())
    priority = (np.array([errors[int(reward // 100)] for reward in large.reward[:5, 0]]) + 1e-6) ** 0.6
    np.testing.assert_allclose(large._tree.values[:5], priority, rtol=1e-6)
    assert large._tree.values[5:].tolist() == [0] * 4
    assert large._tree.total == pytest.approx(priority.sum(), rel=1e-6)


def test_a_uniform_buffer_becomes_a_prioritised_one_and_back() -> None:
    uniform = ReplayBuffer(8, OBS, ACTION, n_envs=2)
    uniform.add(*step_of(0, 2, truncated=(0,)))
    uniform.add(*step_of(1, 2, invalid=(0,)))
    buffer = prioritized(8, n_envs=2, n_steps=4)
    give_errors(buffer, [100.0])
    buffer.set_state(uniform.get_state())
    np.testing.assert_array_equal(buffer._tree.values, [1, 1, 0, 1, 0, 0, 0, 0])
    uniform.set_state(buffer.get_state())
    assert uniform.size() == 3


@pytest.mark.parametrize("damage", ["nan", "negative", "zero", "largest", "shape"])
def test_impossible_priorities_are_refused_and_nothing_is_changed(damage: str) -> None:
    buffer = prioritized(6, n_steps=3)
    give_errors(buffer, [1.0, 2.0, 3.0])
    state = {name: array.copy() for name, array in prioritized(6, n_steps=5).get_state().items()}
    if damage == "largest":
        state["largest_priority"] = np.array(0.0)
    elif damage == "shape":
        state["priority"] = state["priority"][:2]
    else:
        state["priority"][1] = {"nan": np.nan, "negative": -1, "zero": 0}[damage]
    before = {name: array.copy() for name, array in buffer.get_state().items()}
    with pytest.raises(ValueError, match=r"PrioritizedReplayBuffer: the stored priorit"):
        buffer.set_state(state)
    for name, array in buffer.get_state().items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)


def test_its_size_in_bytes_counts_the_sums() -> None:
    plain = ReplayBuffer(1000, OBS, ACTION)
    assert prioritized(1000).nbytes == plain.nbytes + 2 * 1024 * 8


# In an algorithm.

SMALL: dict[str, Any] = {
    "learning_starts": 20,
    "batch_size": 16,
    "buffer_size": 200,
    "policy_kwargs": {"net_arch": [16, 16]},
    "replay_buffer_class": PrioritizedReplayBuffer,
}


def model_of(cls: Any, seed: int = 0, env: Any = "Pendulum-v1", **arguments: Any) -> Any:
    return cls("MlpPolicy", env, seed=seed, **{**SMALL, **arguments})


def weights_of(model: Any) -> np.ndarray:
    return np.concatenate([tensor.detach().numpy().ravel() for tensor in model.policy.state_dict().values()])


@pytest.mark.parametrize("cls", [DDPG, TD3])
@pytest.mark.parametrize("arguments", [{}, {"n_envs": 3, "n_steps": 3}], ids=["plain", "many"])
def test_an_algorithm_learns_with_it_and_the_same_seed_gives_the_same_bits(cls: Any, arguments: dict[str, Any]) -> None:
    one, two = (model_of(cls, **arguments).learn(200) for _ in range(2))
    np.testing.assert_array_equal(weights_of(one), weights_of(two))
    tree = one.replay_buffer._tree
    held = tree.values[tree.values > 0]
    assert len(np.unique(held)) > 100  # the errors arrive
    np.testing.assert_array_equal(tree._nodes, two.replay_buffer._tree._nodes)
    uniform = model_of(cls, **arguments, replay_buffer_class=ReplayBuffer).learn(200)
    assert not np.array_equal(weights_of(one), weights_of(uniform))


@pytest.mark.parametrize("cls", [DDPG, TD3])
def test_the_loss_counts_each_transition_by_its_weight(cls: Any) -> None:
    """A batch with weights 1 and 0 teaches the critic what the first half alone teaches it, at half the size."""
    losses = []
    for half in (False, True):
        model = model_of(cls, target_policy_noise=0.0) if cls is TD3 else model_of(cls)
        model.learn(20)
        batch = batch_of(model.replay_buffer, list(range(8)) if half else list(range(16)))
        weight = torch.ones(8) if half else torch.cat([torch.ones(8), torch.zeros(8)])
        losses.append(float(model._update(batch._replace(weight=weight))["critic_loss"].detach()))
    assert losses[0] == pytest.approx(losses[1] / 2, rel=1e-5)


@pytest.mark.parametrize("cls", [DDPG, TD3])
def test_a_model_file_holds_it_as_data_and_goes_on_bit_for_bit(cls: Any, tmp_path: Path) -> None:
    kwargs = {"alpha": 0.5, "beta": LinearSchedule(0.3, 0.9), "epsilon": 0.01}
    assert encode({"class": PrioritizedReplayBuffer, "kwargs": kwargs})[1] == {}
    model = model_of(cls, replay_buffer_kwargs=kwargs).learn(250)  # beyond one round of the ring
    model.save(tmp_path / "model", full=True)
    loaded = cls.load(tmp_path / "model")
    buffer = loaded.replay_buffer
    assert type(buffer) is PrioritizedReplayBuffer
    assert (buffer.alpha, buffer.beta, buffer.epsilon) == (0.5, LinearSchedule(0.3, 0.9), 0.01)
    for each in (model, loaded):
        each.train(20)
    np.testing.assert_array_equal(weights_of(model), weights_of(loaded))
    np.testing.assert_array_equal(model.replay_buffer._tree._nodes, buffer._tree._nodes)
    assert_same(model.replay_buffer.sample(32), buffer.sample(32))


def test_a_file_of_the_buffer_alone(tmp_path: Path) -> None:
    model = model_of(DDPG).learn(60)
    model.save_replay_buffer(tmp_path / "buffer")
    other = model_of(DDPG, seed=1)
    other.load_replay_buffer(tmp_path / "buffer")
    np.testing.assert_array_equal(model.replay_buffer._tree._nodes, other.replay_buffer._tree._nodes)


def test_progress_reaches_beta() -> None:
    seen: list[float] = []

    def beta(progress_remaining: float) -> float:
        seen.append(progress_remaining)
        return 1 - progress_remaining

    model_of(DDPG, replay_buffer_kwargs={"beta": beta}).learn(100)
    seen = seen[2:]  # the constructor asks at both ends
    assert seen == sorted(seen, reverse=True)
    assert seen[0] == pytest.approx(1 - 21 / 100)
    assert seen[-1] == 0.0


def test_the_sums_of_a_million_stay_those_of_what_is_there() -> None:
    buffer, errors = prioritized(1_000_000), np.random.default_rng(1)
    # As if filled: a million calls of add would take long.
    for array in (buffer.obs, buffer.action, buffer.reward):
        array[:] = 0
    buffer._newest = np.zeros((1, 2), np.float32)
    buffer.full = True
    buffer._tree.values[:] = np.random.default_rng(0).random(1_000_000) + 1e-6
    buffer._tree.sum_up()
    before = buffer._tree.total
    for _ in range(20):
        buffer.update_priorities(buffer.sample(256), torch.from_numpy(errors.random(256) * 9))
    total = buffer._tree.total
    assert total != before
    assert total == pytest.approx(buffer._tree.values.sum(), rel=1e-12)
    buffer._tree.sum_up()
    assert buffer._tree.total == total
