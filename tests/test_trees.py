"""Trees of arrays, and observations that are trees, from the environment to the file."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import FlattenObservation

import sbac
from sbac import A2C, DDPG, TD3, EnvironmentFault
from sbac.trees import batch_size, copy_tree, leaves, rows, set_rows, space_tree, tree_map

BOX = spaces.Box(-1, 1, (3,), np.float32)
NUMBER = spaces.Box(0, 9, (), np.float32)
NESTED = spaces.Dict({"b": spaces.Tuple([BOX, spaces.Discrete(4)]), "a": spaces.Dict({"x": NUMBER})})


def tree() -> Any:
    return {"b": (np.arange(6.0).reshape(2, 3), np.array([3, 1])), "a": {"x": np.array([7.0, 8.0])}}


def as_lists(of: Any) -> Any:
    return tree_map(lambda leaf: np.asarray(leaf).tolist(), of)


# Functions of trees.


def test_a_single_array_is_the_smallest_tree() -> None:
    array = np.arange(6).reshape(3, 2)
    assert tree_map(lambda leaf: leaf + 1, array).tolist() == [[1, 2], [3, 4], [5, 6]]
    assert [(name, leaf is array) for name, leaf in leaves(array)] == [("", True)]
    assert [(name, leaf is array) for name, leaf in leaves(array, "obs")] == [("obs", True)]
    assert batch_size(array) == 3
    assert rows(array, 1).tolist() == [2, 3]
    set_rows(array, 1, np.array([8, 9]))
    assert array.tolist() == [[0, 1], [8, 9], [4, 5]]
    assert space_tree(BOX) is BOX


def test_a_function_is_applied_to_each_leaf_and_those_at_its_place() -> None:
    doubled = tree_map(lambda leaf: 2 * leaf, tree())
    assert as_lists(doubled) == {"b": ([[0, 2, 4], [6, 8, 10]], [6, 2]), "a": {"x": [14, 16]}}
    assert type(doubled["b"]) is tuple
    # The second tree may name its branches in another order.
    other = {"a": {"x": 1}, "b": (10, 100)}
    added = tree_map(lambda leaf, number, third: leaf + number + third, tree(), other, other)
    assert as_lists(added) == {"b": ([[20, 21, 22], [23, 24, 25]], [203, 201]), "a": {"x": [9, 10]}}
    assert list(added) == list(doubled) == ["a", "b"], "branches are in the order of their names"
    with pytest.raises(KeyError, match="b"):
        tree_map(lambda leaf, _: leaf, tree(), {"a": {"x": 1}})


def test_leaves_are_named_by_their_paths() -> None:
    assert [name for name, _ in leaves(tree())] == ["a/x", "b/0", "b/1"]
    assert [name for name, _ in leaves(tree(), "obs")] == ["obs/a/x", "obs/b/0", "obs/b/1"]
    assert [leaf.tolist() for name, leaf in leaves(tree()) if name == "a/x"] == [[7, 8]]
    assert list(leaves({})) == []


def test_the_spaces_of_the_leaves() -> None:
    assert dict(leaves(space_tree(NESTED))) == {"a/x": NUMBER, "b/0": BOX, "b/1": spaces.Discrete(4)}
    assert type(space_tree(NESTED)["b"]) is tuple
    sample = NESTED.sample()
    assert [name for name, _ in leaves(sample)] == [name for name, _ in leaves(space_tree(NESTED))]


def test_rows_are_views_for_a_number_or_a_slice_and_copies_for_an_array() -> None:
    whole = tree()
    assert batch_size(whole) == 2
    assert as_lists(rows(whole, 1)) == {"b": ([3, 4, 5], 1), "a": {"x": 8}}
    view, copy = rows(whole, slice(0, 1)), rows(whole, np.array([1, 1, 0]))
    assert as_lists(copy)["a"]["x"] == [8, 8, 7]
    whole["a"]["x"][:] = 0
    assert as_lists(view)["a"]["x"] == [0]
    assert as_lists(copy)["a"]["x"] == [8, 8, 7]


def test_rows_are_overwritten_in_each_leaf() -> None:
    whole = tree()
    set_rows(whole, 0, {"a": {"x": -1}, "b": (np.full(3, -2), -3)})
    assert as_lists(whole) == {"b": ([[-2, -2, -2], [3, 4, 5]], [-3, 1]), "a": {"x": [-1, 8]}}
    set_rows(whole, slice(None), tree())
    assert as_lists(whole) == as_lists(tree())


def test_a_copy_owns_its_memory() -> None:
    whole = tree()
    copy = copy_tree(whole)
    for _, leaf in leaves(whole):
        leaf[:] = 0
    assert as_lists(copy) == as_lists(tree())
    assert all(leaf.base is None for _, leaf in leaves(copy_tree(rows(tree(), 1))))


# Observations.


class Parts(gymnasium.Env[Any, Any]):
    """Parts of several kinds; rewards the action for being what one of them says. Ends in both ways."""

    observation_space = spaces.Dict(
        {
            "place": spaces.Box(-1, 1, (2,), np.float32),
            "light": spaces.Discrete(3),
            "more": spaces.Dict({"wanted": spaces.Box(-1, 1, (1,), np.float32)}),
        }
    )

    def __init__(self, discrete: bool = False) -> None:
        self.action_space = spaces.Discrete(2) if discrete else spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        super().reset(**kwargs)
        self.t = 0
        return self._obs(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        reward = -abs(float(np.sum(action)) - float(self.wanted[0]))
        obs = self._obs()
        return obs, reward, self.t == 7, self.t == 5 and obs["light"] == 0, {}

    def _obs(self) -> Any:
        self.wanted = self.np_random.uniform(-1, 1, 1).astype(np.float32)
        return {
            "place": self.np_random.uniform(-1, 1, 2).astype(np.float32),
            "light": self.np_random.integers(3),
            "more": {"wanted": self.wanted},
        }


class InTuple(gymnasium.ObservationWrapper[Any, Any, Any]):
    """The same parts in a tuple, in the order in which a Dict lays them flat."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        space: Any = env.observation_space
        self.observation_space = spaces.Tuple([space["light"], spaces.Tuple([space["more"]["wanted"]]), space["place"]])

    def observation(self, observation: Any) -> Any:
        return observation["light"], (observation["more"]["wanted"],), observation["place"]


MAKERS: dict[str, Callable[..., Any]] = {
    "a2c": lambda policy, env, **kwargs: A2C(policy, env, n_steps=4, learning_rate=1e-2, **kwargs),
    "ddpg": lambda policy, env, **kwargs: DDPG(policy, env, learning_starts=12, batch_size=8, **OFF_POLICY, **kwargs),
    "td3": lambda policy, env, **kwargs: TD3(policy, env, learning_starts=12, batch_size=8, **OFF_POLICY, **kwargs),
}
OFF_POLICY: dict[str, Any] = {"buffer_size": 60, "n_steps": 2, "learning_rate": 1e-2}


@pytest.fixture(params=MAKERS)
def learner(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Makes a small model of each algorithm in `Parts`, as they are or wrapped."""
    discrete = request.param == "a2c"

    def make(wrap: Callable[[Any], Any] = lambda env: env, policy: str = "MultiInputPolicy", **kwargs: Any) -> Any:
        small = {"n_envs": 2, "seed": 0, "policy_kwargs": {"net_arch": [8, 8]}, **kwargs}
        return MAKERS[request.param](policy, kwargs.get("env", lambda: wrap(Parts(discrete))), **small)

    return make


def same(a: Any, b: Any) -> bool:
    pairs = zip(a.policy.state_dict().values(), b.policy.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("wrap", [lambda env: env, InTuple], ids=["Dict", "Tuple"])
def test_a_tree_teaches_the_same_as_its_parts_laid_flat(learner: Any, wrap: Any) -> None:
    """The same weights, bit for bit: in the rollout or replay, at episodes' ends, and in the networks."""
    flat = learner(FlattenObservation, policy="MlpPolicy").learn(160)
    of_tree = learner(wrap).learn(160)
    assert flat.n_updates == of_tree.n_updates > 15
    assert flat.episodes.count > 20
    assert same(flat, of_tree)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_trees_of_all_autoreset_modes_train(learner: Any, mode: AutoresetMode) -> None:
    model = learner()
    discrete = isinstance(model.action_space, spaces.Discrete)
    env = gymnasium.vector.SyncVectorEnv([lambda: Parts(discrete)] * 3, autoreset_mode=mode)
    maker = {A2C: "a2c", DDPG: "ddpg", TD3: "td3"}[type(model)]
    model = MAKERS[maker]("MultiInputPolicy", env, seed=0, policy_kwargs={"net_arch": [8]}).learn(150)
    assert 150 <= model.num_timesteps <= 152
    assert model.n_updates > 10
    assert max(episode["l"] for episode in model.ep_info_buffer) <= 7
    assert all(tensor.isfinite().all() for tensor in model.policy.state_dict().values())


def test_predict_takes_a_tree_or_a_batch_of_them(learner: Any) -> None:
    model = learner().learn(30)
    space = model.observation_space
    samples = [space.sample() for _ in range(4)]
    batch = tree_map(lambda *them: np.stack(them), *samples)
    actions, _ = model.predict(batch)
    assert actions.shape == (4, *model.action_space.shape)
    singles = np.stack([model.predict(sample)[0] for sample in samples])
    assert actions == pytest.approx(singles, abs=1e-6)
    # In another order, and with lists for arrays.
    shuffled = {"more": batch["more"], "light": batch["light"].tolist(), "place": batch["place"].tolist()}
    assert np.array_equal(model.predict(shuffled)[0], actions)


@pytest.mark.parametrize(
    "wrong",
    [
        {"place": np.zeros(2), "light": 1},
        {"place": np.zeros(2), "light": 1, "more": np.zeros(1)},
        {"place": np.zeros(2), "light": 1, "more": {"wanted": np.zeros(1)}, "extra": np.zeros(1)},
        {"place": np.zeros(3), "light": 1, "more": {"wanted": np.zeros(1)}},
        {"place": np.zeros(2), "light": 1, "more": {"wanted": np.zeros(2)}},
        {"place": np.zeros((5, 2)), "light": 1, "more": {"wanted": np.zeros(1)}},
        (np.zeros(2), 1, np.zeros(1)),
        np.zeros(4),
        None,
    ],
)
def test_predict_refuses_trees_of_another_form(learner: Any, wrong: Any) -> None:
    with pytest.raises(ValueError, match="predict: the observation"):
        learner().predict(wrong)


def test_models_of_trees_come_back(learner: Any, tmp_path: Path) -> None:
    model = learner()
    model.learn(70, callback=lambda *_: model.num_timesteps < 58)
    model.save(tmp_path / "model", full=True)
    loaded = sbac.load(tmp_path / "model", env=model.get_env())
    assert same(loaded, model)
    assert loaded.observation_space == model.observation_space
    for name, buffer in model._buffers().items():
        state, expected = loaded._buffers()[name].get_state(), buffer.get_state()
        assert state.keys() == expected.keys()
        assert {"obs/place", "obs/light", "obs/more/wanted"} <= state.keys()
        assert all(np.array_equal(state[key], expected[key]) for key in expected)
    loaded.learn(20)
    assert loaded.n_updates > model.n_updates


def test_global_evaluation_of_a_tree(learner: Any) -> None:
    model = learner()
    mean, spread = sbac.evaluate_policy(model, model.get_env(), n_eval_episodes=4)
    assert np.isfinite([mean, spread]).all()


class OtherParts(gymnasium.vector.VectorEnv[Any, Any, Any]):
    """A vector environment that sends what it is told to.

    Args:
        obs: The observations of every step.
    """

    num_envs = 2
    single_observation_space = spaces.Dict({"a": spaces.Box(-9, 9, (1,), np.float32), "b": BOX})
    single_action_space = spaces.Box(-1, 1, (1,), np.float32)
    observation_space = gymnasium.vector.utils.batch_space(single_observation_space, 2)
    action_space = gymnasium.vector.utils.batch_space(single_action_space, 2)

    def __init__(self, obs: Any) -> None:
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.obs = obs

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> Any:
        return self.obs, {}

    def step(self, actions: Any) -> Any:
        return self.obs, np.ones(2), np.zeros(2, bool), np.zeros(2, bool), {}


@pytest.mark.parametrize(
    "obs",
    [
        {"a": np.zeros((2, 1), np.float32)},
        {"a": np.zeros((2, 1), np.float32), "b": np.zeros((2, 3), np.float32), "c": np.zeros((2, 1), np.float32)},
        {"a": np.zeros((2, 1), np.float32), "b": np.zeros((2, 4), np.float32)},
        {"a": np.zeros((2, 1), np.float32), "b": np.zeros((2, 3), np.float64)},
        np.zeros((2, 4), np.float32),
    ],
)
def test_an_environment_that_sends_another_tree_than_it_promises_is_named(obs: Any) -> None:
    model = DDPG("MultiInputPolicy", OtherParts(obs), learning_starts=4, batch_size=4, policy_kwargs={"net_arch": [8]})
    with pytest.raises(EnvironmentFault):
        model.learn(10)


@pytest.mark.parametrize("make", [A2C, DDPG, TD3])
def test_an_environment_may_send_the_parts_in_any_order_and_have_them_so_in_its_space(make: Any) -> None:
    def after(names: str, in_space: str) -> Any:
        parts = {"a": np.full((2, 1), 5, np.float32), "b": np.arange(6, dtype=np.float32).reshape(2, 3) / 6}
        env = OtherParts({name: parts[name] for name in names})
        env.single_observation_space = spaces.Dict(
            OrderedDict((name, OtherParts.single_observation_space[name]) for name in in_space)
        )
        assert list(env.single_observation_space) == list(in_space)
        seen: list[Any] = []
        model = make("MultiInputPolicy", env, seed=0, policy_kwargs={"net_arch": [8]})
        model.learn(20, callback=lambda locals_, _: seen.append(locals_["actions"].copy()))
        one = {name: part[0] for name, part in env.obs.items()}
        return np.array(seen), model.policy.act(env.obs, deterministic=True), model.predict(one)[0]

    expected = after("ab", "ab")
    for names, in_space in (("ba", "ab"), ("ab", "ba"), ("ba", "ba")):
        assert all(np.array_equal(one, other) for one, other in zip(after(names, in_space), expected, strict=True))
