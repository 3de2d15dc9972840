"""Evaluation: equal shares of episodes, true returns, and nothing left behind."""

from __future__ import annotations

import random
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import RecordEpisodeStatistics, TimeLimit, TransformReward
from gymnasium.wrappers.vector import TransformReward as TransformVectorReward

from sbac import A2C
from sbac.envs import make_environments
from sbac.evaluation import Episodes, Evaluations, evaluate_policy, evaluation_seed, layers


class FixedLength(gymnasium.Env[np.ndarray, Any]):
    """Episodes of `length` steps with a reward of `reward` each; the observation is the step's number."""

    observation_space = spaces.Box(-1e3, 1e3, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, length: int, reward: float = 1.0, truncates: bool = False) -> None:
        self.length, self.reward, self.truncates = length, reward, truncates
        self.now, self.resets, self.closed, self.rendered = 0, 0, False, 0
        self.seeds: list[int | None] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.now, self.resets = 0, self.resets + 1
        return np.array([0], np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.now += 1
        ended = self.now == self.length
        info = {"is_success": self.length > 2} if ended else {}
        ends = (False, True) if self.truncates else (True, False)
        return np.array([self.now], np.float32), self.reward, ended and ends[0], ended and ends[1], info

    def render(self) -> None:
        self.rendered += 1

    def close(self) -> None:
        self.closed = True


class Constant:
    """Takes action 1 and remembers what it was given."""

    def __init__(self) -> None:
        self.observations: list[np.ndarray] = []
        self.starts: list[np.ndarray] = []
        self.states: list[Any] = []
        self.deterministic: set[bool] = set()

    def predict(
        self,
        observation: np.ndarray,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, Any]:
        self.observations.append(observation.copy())
        self.starts.append(np.array(episode_start))
        self.states.append(state)
        self.deterministic.add(deterministic)
        return np.ones(len(observation), dtype=np.int64), (0 if state is None else state + 1)


def of_lengths(*lengths: int, mode: AutoresetMode = AutoresetMode.SAME_STEP) -> SyncVectorEnv:
    """Environment i: episodes of lengths[i] steps, each step worth 10 ** i."""
    makers = [partial(FixedLength, length, 10.0**i) for i, length in enumerate(lengths)]
    return SyncVectorEnv(makers, autoreset_mode=mode)


@pytest.mark.parametrize("mode", AutoresetMode)
def test_episodes_are_shared_out_evenly_whatever_their_lengths(mode: AutoresetMode) -> None:
    returns, lengths = evaluate_policy(
        Constant(), of_lengths(1, 2, 3, mode=mode), n_eval_episodes=6, return_episode_rewards=True
    )
    assert sorted(returns) == [1, 1, 20, 20, 300, 300]
    assert sorted(lengths) == [1, 1, 2, 2, 3, 3]

    mean, deviation = evaluate_policy(Constant(), of_lengths(1, 2, 3, mode=mode), n_eval_episodes=6)
    assert mean == pytest.approx((1 + 20 + 300) / 3)
    assert deviation == pytest.approx(np.std([1, 20, 300]))


def test_what_an_empty_reset_step_sends_is_ignored() -> None:
    env = TransformVectorReward(of_lengths(1, 2, mode=AutoresetMode.NEXT_STEP), lambda reward: reward + 7)
    returns, lengths = evaluate_policy(Constant(), env, n_eval_episodes=4, return_episode_rewards=True, warn=False)
    assert sorted(returns) == [8, 8, 34, 34]
    assert sorted(lengths) == [1, 1, 2, 2]


@pytest.mark.parametrize("mode", AutoresetMode)
def test_what_an_empty_reset_step_sends_is_not_among_the_returns_of_training(mode: AutoresetMode) -> None:
    env = TransformVectorReward(of_lengths(1, 2, mode=mode), lambda reward: reward + 7)
    episodes = A2C("MlpPolicy", env, seed=0).learn(60).ep_info_buffer
    assert len(episodes) > 20
    assert {(episode["r"], episode["l"]) for episode in episodes} == {(8, 1), (34, 2)}


def test_the_rest_of_the_shares_goes_to_the_first_environments() -> None:
    returns, _ = evaluate_policy(Constant(), of_lengths(1, 2, 3), n_eval_episodes=4, return_episode_rewards=True)
    assert sorted(returns) == [1, 1, 20, 300]
    returns, _ = evaluate_policy(Constant(), of_lengths(1, 2, 3), n_eval_episodes=2, return_episode_rewards=True)
    assert sorted(returns) == [1, 20]


def test_a_stable_baselines_vec_env_gives_the_same() -> None:
    vec_env = pytest.importorskip("stable_baselines3.common.vec_env")
    env = vec_env.DummyVecEnv([partial(FixedLength, 2, 1.0), partial(FixedLength, 3, 10.0, True)])
    returns, lengths = evaluate_policy(Constant(), env, n_eval_episodes=4, return_episode_rewards=True)
    assert sorted(returns) == [2, 2, 30, 30]
    assert sorted(lengths) == [2, 2, 3, 3]


@pytest.mark.parametrize("truncates", [False, True])
def test_both_ends_of_an_episode_count(truncates: bool) -> None:
    mean, _ = evaluate_policy(Constant(), FixedLength(4, 0.5, truncates), n_eval_episodes=3)
    assert mean == 2.0


@pytest.mark.parametrize("mode", AutoresetMode)
def test_the_model_hears_where_episodes_start_and_keeps_its_state(mode: AutoresetMode) -> None:
    model = Constant()
    evaluate_policy(model, of_lengths(2, 3, mode=mode), n_eval_episodes=6, deterministic=False)
    observations, starts = np.stack(model.observations)[..., 0], np.stack(model.starts)
    assert starts[0].all()
    assert (starts[observations == 0]).all()  # every first observation of an episode is announced
    if mode is not AutoresetMode.NEXT_STEP:  # which acts on an episode's last observation, without effect
        assert not starts[observations > 0].any()
    assert model.states == [None, *range(len(model.states) - 1)]
    assert model.deterministic == {False}


def test_the_recorded_episode_counts_where_a_wrapper_changes_rewards() -> None:
    changed = TransformReward(RecordEpisodeStatistics(FixedLength(3)), lambda reward: -5 * float(reward))
    assert evaluate_policy(Constant(), changed, n_eval_episodes=2) == (3.0, 0.0)


@pytest.mark.parametrize("recorded_outside", [False, True])
def test_changed_rewards_without_a_record_of_the_true_ones_are_warned_of(recorded_outside: bool) -> None:
    env: gymnasium.Env[Any, Any] = TransformReward(FixedLength(3), lambda reward: -5 * float(reward))
    env = RecordEpisodeStatistics(env) if recorded_outside else env
    with pytest.warns(UserWarning, match="TransformReward"):
        assert evaluate_policy(Constant(), env, n_eval_episodes=2) == (-15.0, 0.0)
    assert evaluate_policy(Constant(), env, n_eval_episodes=2, warn=False) == (-15.0, 0.0)


def test_rewards_that_a_vec_normalize_changed_are_told() -> None:
    vec_env = pytest.importorskip("stable_baselines3.common.vec_env")
    monitor = pytest.importorskip("stable_baselines3.common.monitor")

    def normalized(make: Any, **kwargs: Any) -> Any:
        return vec_env.VecNormalize(vec_env.DummyVecEnv([make]), clip_reward=0.5, training=False, **kwargs)

    with pytest.warns(UserWarning, match="as changed by VecNormalize"):
        assert evaluate_policy(Constant(), normalized(lambda: FixedLength(3, 10.0)), n_eval_episodes=2) == (1.5, 0.0)
    knows_its_own: list[Any] = [
        normalized(lambda: FixedLength(3, 10.0), norm_reward=False),
        normalized(lambda: monitor.Monitor(FixedLength(3, 10.0))),
        normalized(lambda: RecordEpisodeStatistics(FixedLength(3, 10.0))),
    ]
    for env in knows_its_own:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert evaluate_policy(Constant(), env, n_eval_episodes=2) == (30.0, 0.0)


def test_a_lost_life_is_no_episode_in_a_monitored_stable_baselines_environment() -> None:
    monitor = pytest.importorskip("stable_baselines3.common.monitor")
    vec_env = pytest.importorskip("stable_baselines3.common.vec_env")

    class EndsEarly(gymnasium.Wrapper[Any, Any, Any, Any]):
        """Ends an episode at each second step, and goes on after the reset, until the inner one has ended."""

        over = True

        def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
            if self.over:
                return self.env.reset(**kwargs)
            return self.last, {}

        def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
            self.last, reward, self.over, truncated, info = self.env.step(action)
            return self.last, reward, self.over or self.last[0] % 2 == 0, truncated, info

    env = vec_env.DummyVecEnv([lambda: EndsEarly(monitor.Monitor(FixedLength(5)))])
    returns, lengths = evaluate_policy(Constant(), env, n_eval_episodes=2, return_episode_rewards=True)
    assert (returns, lengths) == ([5.0, 5.0], [5, 5])


def test_the_callback_sees_each_step_of_the_counted_episodes() -> None:
    seen: list[tuple[int, float, bool, float, int]] = []
    successes: list[bool] = []

    def callback(locals_: dict[str, Any], globals_: dict[str, Any]) -> None:
        assert {"env", "model", "rewards", "dones", "infos", "actions", "episode_lengths"} <= set(locals_)
        i = locals_["i"]
        seen.append(
            (
                i,
                locals_["reward"],
                locals_["done"],
                locals_["current_rewards"][i],
                len(locals_["episode_rewards"]),
            )
        )
        if locals_["done"]:
            successes.append(locals_["info"].get("is_success"))

    env = of_lengths(1, 3, mode=AutoresetMode.NEXT_STEP)
    evaluate_policy(Constant(), env, n_eval_episodes=3, callback=callback)
    assert [row for row in seen if row[0] == 0] == [(0, 1.0, True, 1.0, 0), (0, 1.0, True, 1.0, 1)]
    assert [row[:4] for row in seen if row[0] == 1] == [(1, 10.0, k == 3, 10.0 * k) for k in (1, 2, 3)]
    assert successes == [False, False, True]


def test_what_is_made_here_is_closed_here_and_nothing_else() -> None:
    made: list[FixedLength] = []

    def factory() -> FixedLength:
        made.append(FixedLength(2))
        return made[-1]

    evaluate_policy(Constant(), factory, n_eval_episodes=1)
    evaluate_policy(Constant(), [factory, factory], n_eval_episodes=2)
    assert len(made) == 3 and all(env.closed for env in made)

    class Broken:
        def predict(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        evaluate_policy(Broken(), factory)
    assert made[-1].closed

    mine = FixedLength(2)
    evaluate_policy(Constant(), mine, n_eval_episodes=1, render=True)
    door = make_environments(FixedLength(2))
    evaluate_policy(Constant(), door, n_eval_episodes=1)
    assert not mine.closed and mine.rendered == 2
    assert not door.env.envs[0].unwrapped.closed


def test_the_seed_reaches_the_environments_and_fixes_the_result() -> None:
    env = FixedLength(2)
    evaluate_policy(Constant(), env, n_eval_episodes=1, seed=3)
    evaluate_policy(Constant(), env, n_eval_episodes=1)
    assert env.seeds[0] is not None and env.seeds[1:] == [None] * (len(env.seeds) - 1)

    first, again, other = (
        evaluate_policy(Constant(), "CartPole-v1", 4, seed=seed, return_episode_rewards=True) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_thresholds_and_arguments() -> None:
    nothing: Any = object()
    with pytest.raises(AssertionError, match=r"is 4, not above reward_threshold=4"):
        evaluate_policy(Constant(), FixedLength(4), 2, reward_threshold=4.0)
    assert evaluate_policy(Constant(), FixedLength(4), 2, reward_threshold=3.9) == (4.0, 0.0)
    with pytest.raises(ValueError, match="n_eval_episodes must be at least 1, not 0"):
        evaluate_policy(Constant(), FixedLength(4), n_eval_episodes=0)
    with pytest.raises(TypeError, match="predict; object has none"):
        evaluate_policy(nothing, FixedLength(4))


def test_the_global_generators_are_left_alone() -> None:
    before = random.getstate(), repr(np.random.get_state()), torch.random.get_rng_state()
    model = A2C("MlpPolicy", "CartPole-v1", seed=0)
    evaluate_policy(model, "CartPole-v1", 2, deterministic=False, seed=0)
    assert random.getstate() == before[0]
    assert repr(np.random.get_state()) == before[1]
    assert torch.equal(torch.random.get_rng_state(), before[2])


def test_a_model_evaluated_in_its_own_environment_begins_new_episodes_when_it_learns_on() -> None:
    model = A2C("MlpPolicy", "CartPole-v1", seed=0).learn(50)
    resets = model.env.reset_count
    evaluate_policy(model, model.get_env(), 2)
    assert model.env.reset_count == resets + 1
    model.learn(50, reset_num_timesteps=False)
    assert model.env.reset_count == resets + 2


@pytest.mark.parametrize("wraps", [partial(TimeLimit, max_episode_steps=3), lambda env: lambda: env])
def test_a_model_evaluated_in_its_own_environment_in_another_wrapper_begins_new_episodes(wraps: Any) -> None:
    env = FixedLength(7)
    model = A2C("MlpPolicy", RecordEpisodeStatistics(env), n_steps=5, seed=0).learn(10)
    evaluate_policy(model, wraps(env), 2)
    model.learn(5, reset_num_timesteps=False)
    np.testing.assert_array_equal(model.rollout_buffer.obs[:, 0, 0], [0, 1, 2, 3, 4])

    resets = model.env.reset_count
    evaluate_policy(model, FixedLength(7), 2)
    assert model.env.reset_count == resets, "other environments leave the episodes of training alone"


def test_layers_are_all_that_is_wrapped() -> None:
    inner = FixedLength(2)
    wrapped = RecordEpisodeStatistics(inner)
    door = make_environments(wrapped)
    found = list(layers(door))
    assert found[0] is door and found[1] is door.env
    assert found[-2:] == [wrapped, inner]


def test_evaluation_seeds_are_apart_from_the_seed() -> None:
    seeds = [evaluation_seed(seed, step) for seed in range(50) for step in (0, 1000)]
    assert len(set(seeds)) == 100 and not set(seeds) & set(range(100))
    assert evaluation_seed(None, 0) is None


def test_evaluations_survive_the_file(tmp_path: Path) -> None:
    evaluations = Evaluations()
    evaluations.add(10, Episodes([1.0, 2.0], [3, 4], [{}, {}]))
    evaluations.write(tmp_path)
    assert set(np.load(tmp_path / "evaluations.npz")) == {"timesteps", "results", "ep_lengths"}
    evaluations.add(20, Episodes([5.0, 7.0], [1, 1], [{"is_success": True}, {}]))
    evaluations.write(tmp_path)

    read = Evaluations.read(tmp_path, 2, until=20)
    assert (read.timesteps, read.results, read.ep_lengths) == ([10, 20], [[1, 2], [5, 7]], [[3, 4], [1, 1]])
    np.testing.assert_equal(read.successes, [[np.nan, np.nan], [1.0, np.nan]])
    assert read.best() == 6.0
    assert Evaluations.read(tmp_path, 2, until=19).timesteps == [10]
    assert Evaluations.read(tmp_path / "none", 2, until=19) == Evaluations()
    assert [path.name for path in tmp_path.iterdir()] == ["evaluations.npz"]

    with pytest.raises(ValueError, match=r"shape \(2, 2\), which evaluations of 3"):
        Evaluations.read(tmp_path, 3, until=20)
    (tmp_path / "evaluations.npz").write_bytes(b"PK\x03\x04 but not really")
    with pytest.raises(ValueError, match=r"evaluations\.npz holds no evaluations"):
        Evaluations.read(tmp_path, 2, until=20)
