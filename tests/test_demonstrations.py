"""Demonstrations: what is drawn is what was recorded, and what is wrong leaves the buffer as it was."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from sbac import A2C, DDPG, TD3, NotFiniteError
from sbac.buffers import ReplayBuffer
from sbac.demonstrations import load_demonstrations
from sbac.prioritized import PrioritizedReplayBuffer

OBS = spaces.Box(-1000, 1000, (2,), np.float32)
ACTION = spaces.Box(np.array([-1, 0], np.float32), np.array([3, 10], np.float32))  # 1 and 5 become 0 and 0

LENGTHS = (4, 1, 3, 5)
"""Of the episodes recorded; the first and the last terminate, the others are cut by a time limit."""

Transition = tuple[Any, ...]


def observation(episode: int, t: int) -> list[float]:
    return [10.0 * episode, t]


def recorded(successors: bool = True, truncated: tuple[int, ...] = (1, 2)) -> dict[str, Any]:
    """Episodes one after the other as plain arrays; the actions are in the environment's own units."""
    steps = [(episode, t, length) for episode, length in enumerate(LENGTHS) for t in range(length)]
    arrays: dict[str, Any] = {
        "observations": np.array([observation(episode, t) for episode, t, _ in steps]),
        "actions": np.array([[episode, t] for episode, t, _ in steps], np.float32),
        "rewards": np.array([100.0 * episode + t for episode, t, _ in steps]),
        "terminations": np.array([t == n - 1 and episode not in truncated for episode, t, n in steps]),
        "truncations": np.array([t == n - 1 and episode in truncated for episode, t, n in steps]),
    }
    if successors:
        arrays["next_observations"] = np.array([observation(episode, t + 1) for episode, t, _ in steps])
    return arrays


def transition(episode: int, t: int, terminated: bool) -> Transition:
    """One of them as a buffer gives it."""
    action = ((episode - 1) / 2, t / 5 - 1)
    return (*observation(episode, t), *np.float32(action), 100 * episode + t, terminated, *observation(episode, t + 1))


ALL = [
    transition(episode, t, terminated=t == length - 1 and episode in (0, 3))
    for episode, length in enumerate(LENGTHS)
    for t in range(length)
]


def as_dataset(arrays: dict[str, Any]) -> SimpleNamespace:
    """What has the shape of a Minari dataset."""
    episodes, start = [], 0
    for number, length in enumerate(LENGTHS):
        rows = slice(start, start + length)
        episode = {name: array[rows] for name, array in arrays.items() if name != "next_observations"}
        episode["observations"] = np.array([observation(number, t) for t in range(length + 1)])
        episodes.append(SimpleNamespace(**episode))
        start += length
    return SimpleNamespace(iterate_episodes=lambda: iter(episodes), episodes=episodes)


def empty(buffer_size: int = 60, n_envs: int = 1, cls: Any = ReplayBuffer, **kwargs: Any) -> Any:
    return cls(buffer_size, OBS, ACTION, n_envs=n_envs, generator=np.random.default_rng(0), **kwargs)


def held(buffer: ReplayBuffer) -> list[Transition]:
    """The transitions in the buffer, each once, in the order of the rows."""
    rows = np.flatnonzero((buffer.flags.reshape(-1)[: buffer._rows_held() * buffer.n_envs] & 4) == 0)
    return transitions_of(buffer._batch(rows, 1.0))


def transitions_of(batch: Any) -> list[Transition]:
    columns = (batch.obs, batch.action, batch.reward[:, None], batch.terminated[:, None], batch.successor)
    return [tuple(row) for row in np.concatenate(columns, axis=1).tolist()]


def rounded(transitions: list[Transition]) -> list[Transition]:
    return sorted(tuple(round(float(number), 5) for number in each) for each in transitions)


def assert_holds(buffer: ReplayBuffer, expected: list[Transition]) -> None:
    assert rounded(held(buffer)) == rounded(expected)
    assert buffer.size() == len(expected)
    # And what is drawn is what is held, all of it.
    assert set(rounded(transitions_of(buffer.sample(1000)))) == set(rounded(expected))


# What is added.


@pytest.mark.parametrize("cls", [ReplayBuffer, PrioritizedReplayBuffer])
@pytest.mark.parametrize("n_envs", [1, 2, 4, 5, 13, 20])
@pytest.mark.parametrize("form", ["arrays", "dataset"])
def test_what_is_drawn_is_what_was_recorded(cls: Any, n_envs: int, form: str) -> None:
    buffer = empty(n_envs=n_envs, cls=cls)
    source: Any = recorded() if form == "arrays" else as_dataset(recorded())
    assert load_demonstrations(buffer, source) == 13
    assert_holds(buffer, ALL)
    # Evenly over the columns: no more rows than needed.
    assert buffer.pos == -(-13 // n_envs)


def test_without_successors_what_nobody_knows_is_left_out() -> None:
    """Of the episodes cut by a time limit the last row goes: the whole of the second, and one row of the third."""
    buffer = empty()
    assert load_demonstrations(buffer, recorded(successors=False)) == 11
    found = held(buffer)
    known = [each for each in ALL if each[:2] not in [(10.0, 0), (20.0, 2)]]
    # What follows a terminal state is never asked for.
    asked = [each for each in known if not each[5]]
    assert rounded([each for each in found if not each[5]]) == rounded(asked)
    assert rounded([each[:6] for each in found]) == rounded([each[:6] for each in known])


def test_without_successors_an_unfinished_last_episode_loses_its_last_row() -> None:
    arrays = recorded(successors=False)
    arrays["terminations"][-1] = False
    buffer = empty()
    assert load_demonstrations(buffer, arrays) == 10
    assert rounded([each for each in held(buffer) if each[0] == 30]) == rounded(
        [transition(3, t, terminated=False) for t in range(4)]
    )


@pytest.mark.parametrize("successors", [True, False])
@pytest.mark.parametrize("n_envs", [1, 3])
def test_returns_over_several_steps_stay_within_episodes(successors: bool, n_envs: int) -> None:
    buffer = empty(n_envs=n_envs, n_steps=3)
    load_demonstrations(buffer, recorded(successors))
    batch = buffer.sample(500, gamma=0.5)
    steps = np.log2(1 / batch.discount.numpy()).astype(int)
    assert set(steps) == {1, 2, 3}
    episode, t = batch.obs[:, 0].numpy() / 10, batch.obs[:, 1].numpy()
    by_hand = sum((steps > k) * 0.5**k * (100 * episode + t + k) for k in range(3))
    np.testing.assert_allclose(batch.reward, by_hand)
    goes_on = batch.terminated.numpy() == 0
    np.testing.assert_array_equal(batch.successor[goes_on, 0], batch.obs[goes_on, 0])
    np.testing.assert_array_equal(batch.successor[goes_on, 1], (t + steps)[goes_on])
    if n_envs == 1:  # with more columns, a return also ends where a column does
        last = np.array(LENGTHS) - (0 if successors else np.array([0, 1, 1, 0]))
        np.testing.assert_array_equal(steps, np.minimum(3, last[episode.astype(int)] - t))


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("form", ["dataset", "successors", "no successors"])
def test_observations_that_are_alike_do_not_join_episodes(form: str, n_envs: int) -> None:
    """Neither at an end that no flag tells, nor with the empty rows that fill up a column."""
    arrays = {name: array[:11] for name, array in recorded(successors=form == "successors").items()}
    for name in ("observations", "next_observations"):
        if name in arrays:
            arrays[name] = np.zeros_like(arrays[name])
    source: Any = arrays
    if form == "dataset":
        source = as_dataset(recorded())
        for episode in source.episodes:
            episode.observations = np.zeros_like(episode.observations)
            episode.truncations = np.zeros_like(episode.truncations)
    buffer = empty(n_envs=n_envs, n_steps=3)
    load_demonstrations(buffer, source)
    batch = buffer.sample(500, gamma=0.5)
    episode, t = batch.action[:, 0].numpy() * 2 + 1, (batch.action[:, 1].numpy() + 1) * 5
    steps = np.log2(1 / batch.discount.numpy()).astype(int)
    assert set(steps) == {1, 2, 3}
    by_hand = sum((steps > k) * 0.5**k * (100 * episode + t + k) for k in range(3))
    np.testing.assert_allclose(batch.reward, by_hand, atol=1e-4)
    assert (t + steps <= np.array(LENGTHS)[episode.round().astype(int)] + 1e-4).all()


def test_rows_need_not_follow_each_other_where_successors_are_given() -> None:
    shuffled = np.random.default_rng(0).permutation(13)
    buffer = empty(n_envs=2)
    load_demonstrations(buffer, {name: array[shuffled] for name, array in recorded().items()})
    assert_holds(buffer, ALL)


@pytest.mark.parametrize("n_envs", [1, 3])
def test_more_than_the_buffer_keeps(n_envs: int) -> None:
    buffer = empty(6, n_envs)
    with pytest.warns(
        UserWarning, match=r"hold 13 transitions, the buffer keeps 6: the first 7 were left out"
    ) as caught:
        assert load_demonstrations(buffer, recorded()) == 6
    assert caught[0].filename == __file__
    assert buffer.full
    assert_holds(buffer, ALL[-6:])


def test_they_come_after_what_is_there() -> None:
    buffer = empty(20, n_envs=2)
    load_demonstrations(buffer, recorded())  # 7 of 10 rows
    load_demonstrations(buffer, {name: array[:7] for name, array in recorded().items()})  # 4 more
    assert buffer.full
    found = rounded(held(buffer))
    assert all(rounded([each])[0] in found for each in ALL[:7])
    assert set(found) <= set(rounded(ALL))
    # Rows 1 to 6 of the first time, but for the empty one, and all of the second.
    assert buffer.size() == 11 + 7


def test_observations_in_a_dict_and_a_tuple() -> None:
    arrays = recorded()
    space = spaces.Dict({"place": OBS, "pair": spaces.Tuple([spaces.Discrete(5), spaces.Box(-9, 9, (1, 1))])})

    def trees(array: np.ndarray) -> dict[str, Any]:
        return {"pair": (array[:, 1].astype(int) % 5, array[:, :1, None] / 10), "place": array}

    for name in ("observations", "next_observations"):
        arrays[name] = trees(arrays[name])
    buffer = ReplayBuffer(20, space, ACTION, n_envs=3, generator=np.random.default_rng(0))
    assert load_demonstrations(buffer, arrays) == 13
    batch = buffer.sample(300)
    t = batch.obs["place"][:, 1]
    np.testing.assert_array_equal(batch.successor["place"][:, 1], t + 1)
    np.testing.assert_array_equal(batch.obs["pair"][0], t)
    np.testing.assert_array_equal(batch.successor["pair"][1][:, 0, 0], batch.obs["place"][:, 0] / 10)


def test_whole_numbers_and_lists_will_do() -> None:
    arrays = {name: np.asarray(array).astype(int).tolist() for name, array in recorded().items()}
    buffer = empty()
    assert load_demonstrations(buffer, arrays) == 13
    assert_holds(buffer, ALL)


def test_actions_on_the_bounds() -> None:
    space = spaces.Box(-0.7, 0.7, (1,), np.float32)  # a little less than 0.7 as float64
    buffer = ReplayBuffer(4, OBS, space)
    arrays = {name: array[:2] for name, array in recorded().items()}
    assert load_demonstrations(buffer, {**arrays, "actions": np.array([[0.7], [-0.7]])}) == 2
    assert buffer.action[:2, 0, 0].tolist() == [1, -1]


def test_the_source_is_left_as_it_was() -> None:
    source = recorded(successors=False)
    before = {name: array.copy() for name, array in source.items()}
    load_demonstrations(empty(n_envs=4), source)
    for name, array in before.items():
        np.testing.assert_array_equal(source[name], array)


def test_new_transitions_get_the_largest_priority() -> None:
    buffer = empty(n_envs=2, cls=PrioritizedReplayBuffer)
    load_demonstrations(buffer, recorded())
    assert buffer._tree.total == 13


# What is refused.

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "lengths": ({"actions": np.zeros((12, 2))}, r"actions must have shape \(13, 2\) .*, not shape \(12, 2\)"),
    "one more observation": ({"observations": np.zeros((14, 2))}, r"observations must have shape \(13, 2\)"),
    "rewards in a column": ({"rewards": np.zeros((13, 1))}, r"rewards must have shape \(13,\) .*, not shape \(13, 1\)"),
    "rewards a number": ({"rewards": 1.0}, r"rewards must be an array, not 1.0"),
    "observation shape": ({"next_observations": np.zeros((13, 3))}, r"next_observations must have shape \(13, 2\)"),
    "observation dtype": ({"observations": np.full((13, 2), "a")}, "observations must have .* fits float32, not .*<U1"),
    "observation parts": ({"observations": {"a": np.zeros((13, 2))}}, "the observations are observations/a, but"),
    "complex": ({"rewards": np.zeros(13, complex)}, "rewards must have .* not shape .* and complex128"),
    "flags": ({"terminations": np.full(13, 2)}, "terminations must have .* fits bool, not shape .* and int64"),
    "above": (
        {"actions": np.full((13, 2), 4.0)},
        r"within \[-1\.\s+0\.\] and \[ ?3\. 10\.\], but row 0 .*13 of 13 rows",
    ),
    "below": ({"actions": np.full((13, 2), -0.5)}, r"actions must lie within .*, but row 0 is \[-0\.5 -0\.5\]"),
    "unknown": ({"next_observation": 0}, "unknown array 'next_observation'; did you mean 'next_observations'"),
}
NOT_FINITE = {
    "nan observation": ("observations", np.nan),
    "infinite successor": ("next_observations", np.inf),
    "nan action": ("actions", np.nan),
    "nan reward": ("rewards", np.nan),
    "too large a reward": ("rewards", 1e300),
}


def assert_refused(source: Any, error: type[Exception], message: str) -> None:
    buffer = empty(n_envs=2)
    load_demonstrations(buffer, {name: array[:3] for name, array in recorded().items()})
    before = {name: array.copy() for name, array in buffer.get_state().items()}
    with pytest.raises(error, match=message):
        load_demonstrations(buffer, source)
    for name, array in buffer.get_state().items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arrays_are_refused_and_nothing_is_added(what: str) -> None:
    changes, message = WRONG[what]
    assert_refused({**recorded(), **changes}, ValueError, f"demonstrations: .*{message}")


@pytest.mark.parametrize("what", NOT_FINITE)
def test_numbers_that_are_not_finite_are_refused_and_nothing_is_added(what: str) -> None:
    name, value = NOT_FINITE[what]
    arrays = recorded()
    arrays[name] = arrays[name].astype(np.float64)
    arrays[name][-1] = value
    assert_refused(arrays, NotFiniteError, f"demonstrations: {name} must be finite, but row 12 is")


def test_missing_arrays_are_refused() -> None:
    arrays = {name: array for name, array in recorded().items() if name not in ("actions", "rewards")}
    assert_refused(arrays, ValueError, "there are no actions, rewards; given: observations, terminations")
    assert_refused({}, ValueError, "there are no observations, actions")


def test_a_wrong_episode_is_named_and_nothing_is_added() -> None:
    dataset = as_dataset(recorded())
    dataset.episodes[2].observations = dataset.episodes[2].observations[:-1]
    assert_refused(dataset, ValueError, r"observations of episode 2 must have shape \(4, 2\) .*, not shape \(3, 2\)")
    dataset = as_dataset(recorded())
    dataset.episodes[3].actions = dataset.episodes[3].actions + 20
    assert_refused(dataset, ValueError, "actions of episode 3 must lie within")
    dataset = as_dataset(recorded())
    del dataset.episodes[1].truncations
    assert_refused(dataset, ValueError, "there are no truncations of episode 1")


def test_sources_without_transitions_are_refused() -> None:
    assert_refused(SimpleNamespace(iterate_episodes=lambda: iter([])), ValueError, "holds no episodes")
    for successors in (True, False):
        nothing = {name: array[:0] for name, array in recorded(successors).items()}
        assert_refused(nothing, ValueError, "holds no transition whose successor is known")
    alone = {name: array[:1] for name, array in recorded(successors=False).items()}
    assert_refused(alone, ValueError, "holds no transition whose successor is known")


def test_other_sources_are_refused() -> None:
    assert_refused([1, 2], TypeError, "must be a Minari dataset .* not list")


def test_discrete_observations_are_within_their_space() -> None:
    buffer = ReplayBuffer(20, spaces.Discrete(5, start=1), ACTION)
    arrays = recorded(successors=False)
    with pytest.raises(ValueError, match=r"observations must lie within 1 and 5, but row 0 is 0 \(4 of 13 rows"):
        load_demonstrations(buffer, {**arrays, "observations": arrays["observations"][:, 1].astype(int)})
    assert load_demonstrations(buffer, {**arrays, "observations": arrays["observations"][:, 1].astype(int) + 1}) == 11


@pytest.mark.parametrize(
    ("space", "wrong", "message"),
    [
        (spaces.MultiDiscrete([2, 3]), [2, 0], r"within \[0 0\] and \[1 2\], but row 4 is \[2 0\]"),
        (spaces.MultiDiscrete([2, 3], start=[5, 1]), [5, 0], r"within \[5 1\] and \[6 3\], but row 4 is \[5 0\]"),
        (spaces.MultiBinary(2), [7, 1], r"within 0 and 1, but row 4 is \[7 1\]"),
        (spaces.MultiBinary(2), [257, 1], "fit int8, which holds numbers from -128 to 127, but they reach .* 257"),
    ],
)
def test_whole_numbers_observed_are_within_their_space(space: Any, wrong: list[int], message: str) -> None:
    buffer = ReplayBuffer(20, space, ACTION)
    space.seed(0)
    arrays = recorded()
    names = ("observations", "next_observations")
    right = {name: np.array([space.sample() for _ in range(13)], np.int64) for name in names}
    for name in names:
        changed = right[name].copy()
        changed[4] = wrong
        with pytest.raises(ValueError, match=f"demonstrations: {name} must .*{message}"):
            load_demonstrations(buffer, {**arrays, **right, name: changed})
    assert buffer.size() == 0
    assert load_demonstrations(buffer, {**arrays, **right}) == 13


def test_a_model_without_a_replay_buffer_is_refused() -> None:
    with pytest.raises(TypeError, match="go into a ReplayBuffer or a model that has one, not into A2C"):
        load_demonstrations(A2C("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": [4]}), recorded())


# Learning from them.


def pendulum(n_episodes: int, length: int) -> list[dict[str, np.ndarray]]:
    """Random episodes, as Minari has them."""
    env = gymnasium.make("Pendulum-v1", max_episode_steps=length)
    env.action_space.seed(0)
    episodes = []
    for number in range(n_episodes):
        obs = [env.reset(seed=number)[0]]
        steps = []
        for _ in range(length):
            action = env.action_space.sample()
            after, reward, terminated, truncated, _ = env.step(action)
            obs.append(after)
            steps.append((action, float(reward), terminated, truncated))
        names = ("actions", "rewards", "terminations", "truncations")
        columns = dict(zip(names, (np.array(column) for column in zip(*steps, strict=True)), strict=True))
        episodes.append({"observations": np.array(obs), **columns})
    return episodes


@pytest.mark.parametrize("cls", [DDPG, TD3])
@pytest.mark.parametrize("replay_buffer_class", [ReplayBuffer, PrioritizedReplayBuffer])
def test_an_algorithm_learns_from_them(cls: Any, replay_buffer_class: Any) -> None:
    def make() -> Any:
        return cls(
            "MlpPolicy",
            "Pendulum-v1",
            n_envs=2,
            seed=0,
            batch_size=16,
            learning_starts=50,
            buffer_size=500,
            action_noise=None,
            policy_kwargs={"net_arch": [16]},
            replay_buffer_class=replay_buffer_class,
        )

    dataset = SimpleNamespace(iterate_episodes=lambda: (SimpleNamespace(**each) for each in pendulum(4, 20)))
    one, two = make(), make()
    for model in (one, two):
        assert load_demonstrations(model, dataset) == 80
        model.train(gradient_steps=20)
        assert model.n_updates == 20
        before = model.replay_buffer.pos
        obs = model.env.reset()
        # Enough transitions are there: no uniformly random actions, and learning at once.
        np.testing.assert_array_equal(model._explore(obs), model.policy.act(obs, deterministic=True))
        model.learn(20)
        assert (model.replay_buffer.pos, model.n_updates) == (before + 10, 40)
    for name, tensor in one.policy.state_dict().items():
        np.testing.assert_array_equal(tensor, two.policy.state_dict()[name], err_msg=name)


def test_acting_goes_by_the_policy_once_enough_are_loaded() -> None:
    model = DDPG(
        "MlpPolicy", "Pendulum-v1", seed=0, learning_starts=81, batch_size=16, buffer_size=500, action_noise=None
    )
    episodes = pendulum(4, 20)
    load_demonstrations(model, SimpleNamespace(iterate_episodes=lambda: (SimpleNamespace(**each) for each in episodes)))
    model.learn(4)
    # One uniform action for the transition that was still missing; then the policy's, and one more before it learns.
    assert model.n_updates == 3
    held = model.replay_buffer
    assert held.action[80] != pytest.approx(0, abs=0.01)
    np.testing.assert_allclose(held.action[81:84], 0, atol=0.1)  # a fresh actor acts close to 0


def test_a_dataset_of_minari(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    minari = pytest.importorskip("minari")
    pytest.importorskip("h5py")
    from minari.data_collector import EpisodeBuffer

    episodes = pendulum(3, 10)
    buffers = [
        EpisodeBuffer(
            id=number, infos={}, **{name: array if array.ndim > 1 else array.tolist() for name, array in each.items()}
        )
        for number, each in enumerate(episodes)
    ]
    with pytest.warns(UserWarning, match="eval_env"):
        minari.create_dataset_from_buffers(
            dataset_id="test/pendulum-v0",
            buffer=buffers,
            env="Pendulum-v1",
            algorithm_name="random",
            author="a",
            author_email="b",
            code_permalink="c",
            description="d",
        )
    model = DDPG("MlpPolicy", "Pendulum-v1", buffer_size=100, learning_starts=0, batch_size=16, seed=0)
    assert load_demonstrations(model, minari.load_dataset("test/pendulum-v0")) == 30
    buffer = model.replay_buffer
    batch = buffer._batch(np.arange(30), 0.99)
    np.testing.assert_array_equal(batch.obs, np.concatenate([each["observations"][:-1] for each in episodes]))
    np.testing.assert_array_equal(batch.successor, np.concatenate([each["observations"][1:] for each in episodes]))
    np.testing.assert_allclose(batch.action, np.concatenate([each["actions"] for each in episodes]) / 2)
    np.testing.assert_allclose(batch.reward, np.concatenate([each["rewards"] for each in episodes]), rtol=1e-6)
    assert batch.terminated.sum() == 0
