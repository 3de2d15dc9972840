"""Normalisation in the model: exact statistics, frozen where nothing is learned, saved, in all algorithms."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from sbac import A2C, DDPG, TD3, evaluate_policy
from sbac.adapters import Step
from sbac.normalization import CLIP, Normalizer, merge, moments_of
from sbac.policies import StochasticActorCritic

TREE = spaces.Dict(
    {
        "eye": spaces.Box(0, 255, (36, 36, 1), np.uint8),
        "place": spaces.Discrete(3),
        "speed": spaces.Box(-np.inf, np.inf, (2, 2), np.float64),
        "count": spaces.Box(0, 1000, (1,), np.int32),
    }
)


class Sensors(gymnasium.Env[Any, Any]):
    """Numbers of very different sizes, with rewards in the thousands; remembers all that was acted on."""

    observation_space = TREE
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, length: int = 7) -> None:
        self.length = length
        self.seen: list[Any] = []
        self.rewards: list[float] = []
        self.ends: list[bool] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self._now(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.seen.append(self.obs)
        self.steps += 1
        self.rewards.append(float(self.np_random.normal(1000, 50)))
        self.ends.append(self.steps == self.length)
        return self._now(), self.rewards[-1], False, self.steps == self.length, {}

    def _now(self) -> Any:
        self.obs = {
            "eye": self.np_random.integers(0, 256, (36, 36, 1), dtype=np.uint8),
            "place": int(self.np_random.integers(3)),
            "speed": self.np_random.normal([[1e6, 3], [0, -1e-3]], [[1, 100], [1e-4, 2]]),
            "count": self.np_random.integers(0, 1000, (1,), dtype=np.int32),
        }
        return self.obs


class Numbers(gymnasium.Env[Any, Any]):
    """A vector whose mean and deviation are far from 0 and 1."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self._now(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return self._now(), float(self.np_random.normal(5, 3)), False, self.steps == 9, {}

    def _now(self) -> Any:
        return self.np_random.normal([100, -3, 0], [5, 0.1, 1]).astype(np.float32)


SMALL: dict[str, tuple[Any, dict[str, Any]]] = {
    "a2c": (A2C, {"n_steps": 4}),
    "ddpg": (DDPG, {"learning_starts": 8, "batch_size": 4, "buffer_size": 300}),
    "td3": (TD3, {"learning_starts": 8, "batch_size": 4, "buffer_size": 300}),
}


@pytest.fixture(params=SMALL)
def name(request: Any) -> Any:
    return request.param


@pytest.fixture
def cls(name: str) -> Any:
    return SMALL[name][0]


@pytest.fixture
def make(name: str) -> Any:
    cls, arguments = SMALL[name]

    def make(env: Any = Numbers, **overrides: Any) -> Any:
        network = {"net_arch": [8]}
        return cls(
            "auto", env, **{"seed": 0, "policy_kwargs": network, "normalize_obs": True, **arguments, **overrides}
        )

    return make


# Moments.


def test_moments_are_exact_in_whatever_portions_they_come() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal([1e8, 0, -3], [1, 1e-6, 1e3], (5_000, 3))
    total = np.zeros((3, 3))
    for portion in np.split(values, np.sort(rng.integers(0, 5_000, 300))):
        total = merge(total, moments_of(portion))
    assert (total[0] == 5_000).all()
    np.testing.assert_allclose(total[1], values.mean(0), rtol=1e-12, atol=1e-18)
    np.testing.assert_allclose(total[2] / 5_000, values.var(0), rtol=1e-8)
    # The mean of squares less the square of the mean loses a deviation of 1 beside a mean of 1e8.
    naive = np.square(values).sum(0) / 5_000 - np.square(values.sum(0) / 5_000)
    assert abs(naive[0] - values[:, 0].var()) > 0.5


def test_merging_nothing_changes_nothing() -> None:
    some = moments_of(np.array([[1.0, 2.0], [3.0, 5.0]]))
    nothing = np.zeros((3, 2))
    np.testing.assert_array_equal(merge(some, nothing), some)
    np.testing.assert_array_equal(merge(nothing, some), some)
    np.testing.assert_array_equal(merge(nothing, nothing), nothing)
    np.testing.assert_array_equal(some, [[2, 2], [2, 3.5], [2, 4.5]])


def test_moments_of_workers_put_together_are_those_of_all_they_saw() -> None:
    rng = np.random.default_rng(1)
    everything: list[np.ndarray] = []
    shared = Normalizer(Numbers.observation_space, obs=True, reward=False)
    workers = [Normalizer(Numbers.observation_space, obs=True, reward=False) for _ in range(3)]
    for turn in range(40):
        worker = workers[turn % 3]
        worker.moments.copy_(shared.moments)  # pull
        for _ in range(int(rng.integers(1, 6))):
            obs = rng.normal(50, 2, (2, 3)).astype(np.float32)
            everything.append(obs)
            worker.observe(obs, step_of(2), 0.9)
        shared.add(worker.take_delta())  # push
    values = np.concatenate(everything).astype(np.float64)
    assert float(shared.moments[0, 0]) == len(values)
    np.testing.assert_allclose(shared.moments[1], values.mean(0), rtol=1e-6)
    np.testing.assert_allclose(shared.moments[2] / len(values), values.var(0), rtol=1e-6)


def step_of(n: int, reward: Any = 0.0, ended: Any = False, valid: Any = True) -> Step:
    def each(value: Any, dtype: Any) -> np.ndarray:
        return np.broadcast_to(np.asarray(value, dtype), n).copy()

    flags = each(ended, bool)
    return Step(np.zeros((n, 3)), each(reward, float), flags, flags & False, None, each(valid, bool), [{}] * n)


# In training.


@pytest.mark.parametrize(("n_envs", "mode"), [(1, AutoresetMode.SAME_STEP), *((3, mode) for mode in AutoresetMode)])
def test_statistics_are_those_of_all_observations_that_were_acted_on(make: Any, n_envs: int, mode: Any) -> None:
    envs = [Sensors(length=5 + i) for i in range(n_envs)]
    vector = SyncVectorEnv([lambda env=env: env for env in envs], autoreset_mode=mode)
    gamma = 0.9
    model = make(vector, normalize_reward=True, gamma=gamma)
    model.learn(30)
    normalizer = model.policy.normalizer
    for name, columns in (("count", slice(0, 1)), ("speed", slice(1, 5))):
        values = np.array([obs[name] for env in envs for obs in env.seen], np.float64)
        values = values.reshape(len(values), -1)
        count, mean, squares = normalizer.moments[:, columns].numpy()
        assert (count == len(values)).all()
        np.testing.assert_allclose(mean, values.mean(0), rtol=1e-6)
        np.testing.assert_allclose(squares / count, values.var(0), rtol=1e-6)
    assert normalizer.moments.shape == (3, 1 + 4 + 1)  # neither the image nor the place

    returns = []
    for env in envs:
        running = 0.0
        for reward, end in zip(env.rewards, env.ends, strict=True):
            running = gamma * running + reward
            returns.append(running)
            running *= not end
    count, mean, squares = normalizer.moments[:, -1].numpy()
    assert (count, mean, squares / count) == pytest.approx((len(returns), np.mean(returns), np.var(returns)), rel=1e-6)
    scaled = normalizer.normalize_reward(torch.tensor([1000.0, -1e9]))
    assert scaled.tolist() == pytest.approx([1000 / np.std(returns), -CLIP], rel=1e-5)


def test_networks_see_standardised_numbers_and_images_as_they_are(make: Any) -> None:
    env = Sensors()
    model = make(env)
    model.learn(24)
    model.policy.normalizer.refresh()
    obs = {
        "eye": torch.full((1, 36, 36, 1), 51, dtype=torch.uint8),
        "place": torch.tensor([1]),
        "speed": torch.as_tensor(np.array([obs["speed"] for obs in env.seen])[:1]),
        "count": torch.tensor([[10_000]]),
    }
    seen = model.policy.preprocessor(obs)
    assert seen["eye"].unique().tolist() == pytest.approx([0.2])
    assert seen["place"].tolist() == [[0, 1, 0]]
    assert seen["count"].tolist() == [[CLIP]]
    speeds = np.array([obs["speed"] for obs in env.seen])
    expected = ((speeds - speeds.mean(0)) / np.sqrt(speeds.var(0) + 1e-8))[0]
    # A deviation of 1 beside a million is at the limit of float32.
    assert seen["speed"][0].numpy() == pytest.approx(expected, abs=0.1)
    assert seen["speed"].dtype == torch.float32


def test_clips_and_epsilon_can_be_chosen_and_parts_left_out(make: Any) -> None:
    env = Sensors()
    kwargs = {"clip_obs": 0.5, "clip_reward": 2.0, "epsilon": 0.25, "keys": ["count"]}
    model = make(env, normalize_reward=True, policy_kwargs={"net_arch": [8], "normalizer_kwargs": kwargs})
    model.learn(24)
    normalizer = model.policy.normalizer
    normalizer.refresh()
    assert normalizer.moments.shape == (3, 1 + 1)  # of the count and of the return
    counts = np.array([obs["count"] for obs in env.seen], np.float64).reshape(-1)
    obs = {name: torch.as_tensor(np.array([obs[name] for obs in env.seen])) for name in env.seen[0]}
    expected = np.clip((counts - counts.mean()) / np.sqrt(counts.var() + 0.25), -0.5, 0.5)
    assert np.abs(expected).max() == 0.5 > np.abs(expected).min()
    np.testing.assert_allclose(normalizer(obs)["count"].numpy().reshape(-1), expected, rtol=1e-4, atol=1e-6)
    assert normalizer(obs)["speed"] is obs["speed"]
    count, _, squares = normalizer.moments[:, -1]
    reward = torch.tensor([0.1, 1e9], dtype=torch.float64)
    expected_reward = [0.1 / float(torch.sqrt(squares / count + 0.25)), 2.0]
    assert normalizer.normalize_reward(reward).tolist() == pytest.approx(expected_reward)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"clip_ob": 1}, "no argument 'clip_ob'; did you mean 'clip_obs'"),
        ({"clip_obs": 0}, "clip_obs must be a finite number above 0"),
        ({"epsilon": -1}, "epsilon must be a finite number at least 0"),
        ({"keys": ["spede"]}, "no part 'spede'; did you mean 'speed'"),
        (3, "must be a dict"),
    ],
)
def test_wrong_arguments_of_the_normaliser_are_refused(make: Any, wrong: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make(Sensors(), policy_kwargs={"normalizer_kwargs": wrong})


def test_a_number_that_never_changes_is_only_shifted() -> None:
    normalizer = Normalizer(Numbers.observation_space, obs=True, reward=False)
    for _ in range(5):
        normalizer.observe(np.array([[7.0, 0.0, 1.0]]), step_of(1), 0.9)
    assert normalizer(torch.tensor([[7.0, 0.5, 1.0]])).tolist() == [[7.0, 0.5, 1.0]]  # not yet
    normalizer.refresh()
    assert normalizer(torch.tensor([[7.0, 0.5, 1.0]])).tolist() == [[0.0, 0.5, 0.0]]


def test_a_running_return_begins_anew_with_each_episode() -> None:
    normalizer = Normalizer(Numbers.observation_space, obs=False, reward=True)
    obs = np.zeros((2, 3))
    normalizer.observe(obs, step_of(2, [1.0, 10.0], [False, True]), 0.5)
    assert normalizer.running_return.tolist() == [1.0, 0.0]
    normalizer.observe(obs, step_of(2, [1.0, 10.0]), 0.5)
    assert normalizer.running_return.tolist() == [1.5, 10.0]
    normalizer.observe(obs, step_of(2, [1.0, 77.0], valid=[True, False]), 0.5)
    assert normalizer.running_return.tolist() == [1.75, 0.0]
    seen = [1.0, 10.0, 1.5, 10.0, 1.75]
    count, mean, squares = normalizer.moments[:, 0].tolist()
    assert (count, mean, squares) == pytest.approx((5, np.mean(seen), 5 * np.var(seen)))
    normalizer.begin_episodes()
    normalizer.observe(obs, step_of(2, 3.0), 0.5)
    assert normalizer.running_return.tolist() == [3.0, 3.0]


def test_within_a_rollout_the_policy_that_acts_is_the_one_that_learns() -> None:
    model = A2C("MlpPolicy", Numbers, n_steps=5, normalize_obs=True, seed=0)
    used = []

    def watch(locals_: Any, _: Any) -> bool:
        used.append(tuple(locals_["self"].policy.normalizer.shift.tolist()))
        return True

    model.learn(20, callback=watch)
    assert [len(set(used[i : i + 5])) for i in (0, 5, 10, 15)] == [1] * 4
    assert len(set(used)) == 4
    assert used[0] == (0, 0, 0)
    assert used[5][0] == pytest.approx(100, abs=10)


# Frozen elsewhere.


def test_predictions_and_evaluations_leave_the_statistics_alone(make: Any) -> None:
    model = make(normalize_reward=True).learn(40)
    before = {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}
    obs = np.float32([[1e5, 0, 0], [-1e5, 3, 3]])
    first = model.predict(obs)[0]
    evaluate_policy(model, Numbers, n_eval_episodes=3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.policy.state_dict().items())
    np.testing.assert_array_equal(model.predict(obs)[0], first)


def test_the_file_alone_is_enough(make: Any, cls: Any, tmp_path: Any) -> None:
    model = make(normalize_reward=True).learn(60)
    model.save(tmp_path / "model")
    obs = np.random.default_rng(0).normal(100, 5, (20, 3)).astype(np.float32)
    np.testing.assert_array_equal(cls.load(tmp_path / "model").predict(obs)[0], model.predict(obs)[0])
    if cls is not A2C:
        return
    np.save(tmp_path / "obs.npy", obs)
    code = (
        "import sys, numpy, sbac; model = sbac.load(sys.argv[1]); "
        "print(model.predict(numpy.load(sys.argv[2]))[0].tobytes().hex())"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "model.zip"), str(tmp_path / "obs.npy")]
    told = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.strip()
    assert told == model.predict(obs)[0].tobytes().hex()
    assert len(set(model.predict(obs)[0].ravel().tolist())) > 1

    plain = make(normalize_obs=False).learn(60)
    assert not any("normalizer" in name for name in plain.policy.state_dict())


def test_the_file_alone_gives_the_same_evaluation_in_a_fresh_process(tmp_path: Any) -> None:
    """To the last bit; other statistics would give another."""
    arguments = {"seed": 0, "normalize_obs": True, "normalize_reward": True, "policy_kwargs": {"net_arch": [8]}}
    off = {"learning_starts": 50, "batch_size": 8, "buffer_size": 500}
    models = {
        "a2c": A2C("MlpPolicy", "Pendulum-v1", n_envs=2, learning_rate=0.01, **arguments).learn(100),
        "td3": TD3("MlpPolicy", "Pendulum-v1", **off, **arguments).learn(80),
    }
    code = (
        "import sys, sbac\n"
        "for path in sys.argv[1:]:\n"
        "    rewards = sbac.evaluate_policy(sbac.load(path), 'Pendulum-v1', n_eval_episodes=1, seed=7)\n"
        "    print(*(reward.hex() for reward in rewards))\n"
    )
    here = []
    for name, model in models.items():
        model.save(tmp_path / name)
        here.append(
            [float(number).hex() for number in evaluate_policy(model, "Pendulum-v1", n_eval_episodes=1, seed=7)]
        )
    paths = [str(tmp_path / f"{name}.zip") for name in models]
    told = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True).stdout
    assert [line.split() for line in told.splitlines()] == here

    for model, before in zip(models.values(), here, strict=True):
        for name, statistics in model.policy.named_buffers():
            if "normalizer" in name:
                statistics.mul_(2)
        assert float(evaluate_policy(model, "Pendulum-v1", n_eval_episodes=1, seed=7)[0]).hex() != before[0]


def test_the_same_seed_gives_the_same_statistics_and_weights(make: Any) -> None:
    one, other = (make(normalize_reward=True, n_envs=2).learn(50) for _ in range(2))
    state = other.policy.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in one.policy.state_dict().items())
    plain = make(normalize_obs=False, n_envs=2).learn(50)
    assert not torch.equal(next(plain.policy.parameters()), next(one.policy.parameters()))


def test_an_interrupted_run_goes_on_exactly(make: Any, cls: Any, tmp_path: Any) -> None:
    def whole() -> Any:
        return make(normalize_reward=True, n_envs=2)

    uninterrupted = whole().learn(80)
    cut = whole()
    cut.learn(80, callback=lambda locals_, _: locals_["self"].num_timesteps < 46)
    cut.save(tmp_path / "cut", full=True)
    loaded = cls.load(tmp_path / "cut", env=Numbers)
    loaded.learn(80 - loaded.num_timesteps, reset_num_timesteps=False)
    state = uninterrupted.policy.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.policy.state_dict().items())


def test_replay_holds_what_the_environment_sent(make: Any, cls: Any) -> None:
    if cls is A2C:
        rollout = make(normalize_reward=True)
        rollout.learn(8, callback=lambda locals_, _: locals_["self"].num_timesteps < 3)
        assert rollout.rollout_buffer.get().obs[:, 0].mean() > 50
        return
    model = make(normalize_reward=True).learn(60)
    batch = model.replay_buffer.sample(50)
    assert batch.obs[:, 0].mean() > 50
    assert batch.reward.mean() > 3


def test_the_loss_sees_normalised_rewards(make: Any, monkeypatch: Any) -> None:
    seen: list[torch.Tensor] = []
    model = make(normalize_reward=True)
    update = model._update
    monkeypatch.setattr(model, "_update", lambda batch: (seen.append(batch.reward.flatten()), update(batch))[1])
    model.learn(200)
    deviation = float(torch.sqrt(model.policy.normalizer.moments[2, -1] / model.policy.normalizer.moments[0, -1]))
    rewards = torch.cat(seen[-40:])
    assert float(rewards.mean()) == pytest.approx(5 / deviation, rel=0.3)
    assert deviation > 5


def test_targets_read_with_the_same_statistics() -> None:
    model = TD3("MlpPolicy", Numbers, normalize_obs=True, seed=0, **SMALL["td3"][1]).learn(40)
    assert model.actor_target.preprocessor is model.actor.preprocessor is model.policy.preprocessor
    assert sum("normalizer" in name for name in model.policy.state_dict()) == 3


def test_masks_beside_observations_are_no_numbers_to_normalise() -> None:
    policy = StochasticActorCritic(
        Numbers.observation_space, spaces.Discrete(2), torch.device("cpu"), normalize_obs=True
    )
    obs = {"observation": np.ones((2, 3), np.float32), "action_mask": np.ones((2, 2), bool)}
    policy.observe(obs, step_of(2), 0.9)
    assert policy.normalizer is not None
    assert policy.normalizer.moments[1].tolist() == [1, 1, 1]


@pytest.mark.parametrize("make", [A2C, DDPG, TD3])
@pytest.mark.parametrize("reward", [False, True])
def test_where_all_is_image_or_one_hot_there_is_nothing_to_normalise(make: Any, reward: bool) -> None:
    class Seeing(Sensors):
        observation_space = spaces.Dict({key: TREE[key] for key in ("eye", "place")})

        def _now(self) -> Any:
            return {key: super(Seeing, self)._now()[key] for key in ("eye", "place")}

    kwargs: dict[str, Any] = {"normalize_obs": True, "normalize_reward": reward, "seed": 0}
    if make is not A2C:
        kwargs |= {"learning_starts": 5, "batch_size": 4, "buffer_size": 50}
    model = make("MultiInputPolicy", Seeing, policy_kwargs={"net_arch": [8]}, **kwargs).learn(15)
    assert model.policy.normalizer.moments.shape == (3, int(reward))
