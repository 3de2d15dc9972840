"""Hindsight replay: which goals are drawn and how often, what they are worth, and a task that needs them.

The goals that a transition may be given are found by brute force, in a record of all steps that is kept beside the
buffer. In `Walk`, whatever is achieved is achieved once, so that a goal tells where it is from.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.wrappers import TransformReward
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from sbac import DDPG, TD3
from sbac.base import BaseAlgorithm
from sbac.buffers import ReplayBatch, ReplayBuffer
from sbac.envs import Environments, make_environments
from sbac.hindsight import HerReplayBuffer
from sbac.noise import NormalActionNoise
from tests.environments import BitFlip

BOX = spaces.Box(-1000, 1000, (2,), np.float32)
GOAL_SPACE = spaces.Dict({"observation": BOX, "achieved_goal": BOX, "desired_goal": BOX})
ACTION = spaces.Box(-1, 1, (1,), np.float32)

Pair = tuple[float, float]


class Silent(gymnasium.Env[Any, Any]):
    """After step t of its episode e, environment i has achieved (100 i + e, t); asked for is (100 i + e, -1).

    The reward is minus the distance, one number for each pair of goals. There is no compute_reward.
    """

    observation_space: spaces.Space[Any] = GOAL_SPACE
    action_space = ACTION

    def __init__(self, index: int = 0, lengths: tuple[int, ...] = (3, 6, 1, 2), terminates: bool = False) -> None:
        self.index, self.lengths, self.terminates = index, lengths, terminates
        self.episode, self.t = -1, 0

    def reset(self, **kwargs: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        super().reset(**kwargs)
        self.episode, self.t = self.episode + 1, 0
        return self._obs(), {}

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        self.t += 1
        ended = self.t == self.lengths[self.episode % len(self.lengths)]
        return self._obs(), -(self.t + 1.0), ended and self.terminates, ended and not self.terminates, {}

    def _obs(self) -> dict[str, np.ndarray]:
        number = 100 * self.index + self.episode
        now = np.array([number, self.t], np.float32)
        return {"observation": now, "achieved_goal": now, "desired_goal": np.array([number, -1], np.float32)}


class Walk(Silent):
    def compute_reward(self, achieved_goal: Any, desired_goal: Any, info: Any) -> Any:
        return -np.linalg.norm(achieved_goal - desired_goal, axis=-1)


class SinglesOnly(Silent):
    def compute_reward(self, achieved_goal: Any, desired_goal: Any, info: Any) -> float:
        return -float(np.linalg.norm(achieved_goal - desired_goal))


class SinglesOnlyByIndex(Silent):
    """For a batch, this returns as many numbers as a goal has."""

    def compute_reward(self, achieved_goal: Any, desired_goal: Any, info: Any) -> Any:
        return -np.sqrt((achieved_goal[0] - desired_goal[0]) ** 2 + (achieved_goal[1] - desired_goal[1]) ** 2)


class ReadsInfo(Silent):
    def compute_reward(self, achieved_goal: Any, desired_goal: Any, info: Any) -> Any:
        return info["distance"]


WALKS: list[Callable[[], Walk]] = [
    partial(Walk, 0),
    partial(Walk, 1, (99,)),
    partial(Walk, 2, (1, 4), terminates=True),
]
N_ENVS = len(WALKS)


class Collected:
    """A buffer, its environments, and a record of what went into it."""

    def __init__(self, n_rows: int, mode: AutoresetMode = AutoresetMode.SAME_STEP, **kwargs: Any) -> None:
        self.door: Environments = make_environments(SyncVectorEnv(WALKS, autoreset_mode=mode))
        self.buffer = her(n_rows * N_ENVS, n_envs=N_ENVS, **kwargs)
        self.buffer.attach(self.door)
        self.record: list[list[tuple[Pair, Pair, bool] | None]] = []  # observation, achieved afterwards, terminated
        self.obs = self.door.reset()

    def step(self, n_steps: int) -> None:
        for _ in range(n_steps):
            action = np.zeros((N_ENVS, 1), np.float32)
            step = self.door.step(action)
            self.buffer.add(self.obs, action, step)
            befores, afters = pairs(self.obs["achieved_goal"]), pairs(step.successor["achieved_goal"])
            entries = zip(befores, afters, step.terminated, step.valid, strict=True)
            self.record.append([(a, b, bool(c)) if is_valid else None for a, b, c, is_valid in entries])
            self.obs = step.obs

    def allowed(self, strategy: str) -> dict[Pair, list[Pair]]:
        """The goals that each transition held may be given."""
        held = [entry for row in self.record[-self.buffer.n_rows :] for entry in row if entry is not None]
        found = {}
        for obs, _, _ in held:
            episode = [after for before, after, _ in held if before[0] == obs[0]]
            later = [goal for goal in episode if goal[1] > obs[1]]
            found[obs] = {"future": later, "final": [max(later)], "episode": episode}[strategy]
        return found

    def check(self, n_draws: int = 4_000) -> None:
        """Every transition, goal and frequency is as it should be; frequencies within 5 standard deviations."""
        share = 1 - 1 / (1 + self.buffer.n_sampled_goal)
        allowed = self.allowed(self.buffer.goal_selection_strategy)
        batch = self.buffer.sample(n_draws)
        drawn = Counter(zip(pairs(batch.obs["observation"]), pairs(batch.obs["desired_goal"]), strict=True))
        expected = {}
        for obs, goals in allowed.items():
            each = 1 / len(allowed)
            expected[obs, (obs[0], -1.0)] = each * (1 - share)
            expected.update({(obs, goal): each * share / len(goals) for goal in goals})
        assert not drawn.keys() - expected.keys(), "a goal that the transition must not be given"
        for key, probability in expected.items():
            deviation = np.sqrt(n_draws * probability * (1 - probability))
            assert abs(drawn[key] - n_draws * probability) <= 5 * deviation, (key, drawn[key], n_draws * probability)

        # Reward, successor and end belong to the transition and the goal.
        terminated = {entry[0]: entry[2] for row in self.record for entry in row if entry is not None}
        np.testing.assert_array_equal(batch.successor["desired_goal"], batch.obs["desired_goal"])
        np.testing.assert_array_equal(
            batch.successor["achieved_goal"], batch.obs["achieved_goal"] + torch.tensor([0, 1])
        )
        distance = np.linalg.norm(batch.successor["achieved_goal"] - batch.obs["desired_goal"], axis=1)
        np.testing.assert_allclose(batch.reward, -distance, rtol=1e-6)
        assert batch.terminated.tolist() == [terminated[obs] for obs in pairs(batch.obs["observation"])]


def pairs(array: Any) -> list[Pair]:
    return [tuple(row) for row in array.tolist()]


def her(buffer_size: int = 100, n_envs: int = 1, seed: int = 0, **kwargs: Any) -> HerReplayBuffer:
    return HerReplayBuffer(
        buffer_size, GOAL_SPACE, ACTION, n_envs=n_envs, generator=np.random.default_rng(seed), **kwargs
    )


def equal(one: ReplayBatch, other: ReplayBatch) -> bool:
    def parts(batch: ReplayBatch) -> list[Any]:
        trees = [*batch.obs.values(), *batch.successor.values()]
        return [*trees, batch.action, batch.reward, batch.discount, batch.terminated, torch.tensor(batch.rows)]

    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(parts(one), parts(other), strict=True))


# Goals.


@pytest.mark.parametrize("strategy", ["future", "final", "episode"])
@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
def test_goals_are_those_of_the_episode_by_the_strategy(strategy: str, mode: AutoresetMode) -> None:
    """From the first step on, over three turns of a ring that is shorter than some episodes and longer than others."""
    collected = Collected(n_rows=9, mode=mode, goal_selection_strategy=strategy)
    for _ in range(27):
        collected.step(1)
        collected.check()


@pytest.mark.parametrize("n_rows", [1, 2, 3])
@pytest.mark.parametrize("strategy", ["future", "final", "episode"])
def test_goals_in_the_smallest_rings(strategy: str, n_rows: int) -> None:
    collected = Collected(n_rows, goal_selection_strategy=strategy)
    for _ in range(12):
        collected.step(1)
        collected.check(n_draws=1_000)


@pytest.mark.parametrize("strategy", ["future", "final", "episode"])
def test_a_reset_from_outside_ends_an_episode(strategy: str) -> None:
    collected = Collected(n_rows=9, goal_selection_strategy=strategy)
    for n_steps in (2, 3, 7, 1, 5):
        collected.step(n_steps)
        collected.check()
        collected.obs = collected.door.reset()
        collected.check()


@pytest.mark.parametrize(("n_sampled_goal", "share"), [(0, 0.0), (1, 0.5), (4, 0.8), (9, 0.9)])
def test_share_of_transitions_that_keep_their_goal(n_sampled_goal: int, share: float) -> None:
    collected = Collected(n_rows=20, n_sampled_goal=n_sampled_goal)
    collected.step(20)
    assert collected.buffer.her_ratio == pytest.approx(share)
    collected.check()


class _Past(HerReplayBuffer):
    def _goal_rows(self, index: np.ndarray) -> np.ndarray:
        goal = super()._goal_rows(index)
        return np.where(self.age.reshape(-1)[index] > 0, index - self.n_envs, goal)


class _NextEpisode(HerReplayBuffer):
    def _goal_rows(self, index: np.ndarray) -> np.ndarray:
        return np.minimum(super()._goal_rows(index) + self.n_envs, (self.pos - 1) * self.n_envs + index % self.n_envs)


class _OtherEnvironment(HerReplayBuffer):
    def _goal_rows(self, index: np.ndarray) -> np.ndarray:
        goal = super()._goal_rows(index)
        return goal - goal % self.n_envs + (goal + 1) % self.n_envs


class _AlwaysTheNext(HerReplayBuffer):
    def _goal_rows(self, index: np.ndarray) -> np.ndarray:
        return index


@pytest.mark.parametrize("wrong", [_Past, _NextEpisode, _OtherEnvironment, _AlwaysTheNext])
def test_wrong_goals_are_noticed(wrong: type[HerReplayBuffer]) -> None:
    """The check above can fail: goals of the past, of another episode or environment, or with wrong frequencies."""
    collected = Collected(n_rows=20)
    collected.step(12)
    collected.check()
    collected.buffer.__class__ = wrong
    with pytest.raises(AssertionError):
        collected.check()


def test_a_discrete_goal_and_further_parts_of_the_observation() -> None:
    """compute_reward gets goals without a dimension of their own, and the other parts stay as they were."""
    parts = {"observation": BOX, "achieved_goal": spaces.Discrete(9), "desired_goal": spaces.Discrete(9), "more": BOX}

    class Numbers(Silent):
        observation_space = spaces.Dict(parts)

        def _obs(self) -> dict[str, Any]:
            now = np.array([self.episode, self.t], np.float32)
            return {"observation": now, "achieved_goal": np.int64(self.t), "desired_goal": np.int64(8), "more": now + 1}

        def step(self, action: Any) -> Any:
            obs, _, *rest = super().step(action)
            return obs, float(self.t == 8), *rest

        def compute_reward(self, achieved_goal: Any, desired_goal: Any, info: Any) -> Any:
            assert len(info) == len(achieved_goal)
            return achieved_goal == desired_goal

    door = make_environments(partial(Numbers, lengths=(4,)))
    buffer = HerReplayBuffer(50, Numbers.observation_space, ACTION, goal_selection_strategy="final")
    buffer.attach(door)
    obs = door.reset()
    for _ in range(12):
        step = door.step(np.zeros((1, 1), np.float32))
        buffer.add(obs, np.zeros((1, 1), np.float32), step)
        obs = step.obs
    batch = buffer.sample(500)
    assert set(batch.obs["desired_goal"].tolist()) == {4, 8}
    np.testing.assert_array_equal(batch.reward, batch.successor["achieved_goal"] == batch.obs["desired_goal"])
    np.testing.assert_array_equal(batch.obs["more"], batch.obs["observation"] + 1)


# Arguments and environments.


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_steps": 3}, "n_steps=3 .* use n_steps=1"),
        ({"n_sampled_goal": -1}, "n_sampled_goal must be a whole number, at least 0, not -1"),
        ({"goal_selection_strategy": "futur"}, "no goal_selection_strategy 'futur'; did you mean 'future'"),
        ({"goal_selection_strategy": "past"}, "'past'; known: episode, final, future"),
    ],
)
def test_wrong_arguments_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        her(**kwargs)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (BOX, r"needs a Dict observation space with the keys observation, achieved_goal, desired_goal, but it is Box"),
        (spaces.Dict({"observation": BOX}), r"but Dict.* lacks achieved_goal and desired_goal"),
        (spaces.Dict({**GOAL_SPACE.spaces, "desired_goal": ACTION}), r"goals that are arrays of one shape"),
        (spaces.Dict({**GOAL_SPACE.spaces, "desired_goal": spaces.Tuple([BOX])}), r"goals that are arrays"),
    ],
)
def test_spaces_that_are_not_of_goal_environments_are_refused(space: spaces.Space[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HerReplayBuffer(100, space, ACTION)


def small(env: Any, cls: type[BaseAlgorithm] = DDPG, **kwargs: Any) -> BaseAlgorithm:
    arguments = {
        "learning_starts": 20,
        "batch_size": 16,
        "buffer_size": 1_000,
        "replay_buffer_class": HerReplayBuffer,
        "policy_kwargs": {"net_arch": [16, 16]},
        "seed": 0,
    }
    return cls("MultiInputPolicy", env, **{**arguments, **kwargs})


def test_environments_that_do_not_fit_are_refused_when_the_model_is_made() -> None:
    with pytest.raises(ValueError, match=r"needs a Dict observation space"):
        DDPG("MlpPolicy", "Pendulum-v1", replay_buffer_class=HerReplayBuffer)
    with pytest.raises(ValueError, match=r"a method compute_reward.*have none"):
        small(Silent)
    with pytest.raises(ValueError, match=r"must give one reward .* failed: TypeError.* single pair: KeyError"):
        small(ReadsInfo)
    with pytest.raises(ValueError, match=r"n_steps=1"):
        small(Walk, n_steps=3)


TWO = [partial(Walk, 0), partial(Walk, 1)]
FORKED = partial(SubprocVecEnv, start_method="fork")


@pytest.mark.parametrize("kind", [list, SyncVectorEnv, AsyncVectorEnv, DummyVecEnv, FORKED])
def test_environments_of_each_kind_compute_the_rewards(kind: Callable[..., Any]) -> None:
    with small(kind(TWO)) as model:
        model.learn(60)
        batch = model.replay_buffer.sample(200)
    distance = np.linalg.norm(batch.successor["achieved_goal"] - batch.obs["desired_goal"], axis=1)
    np.testing.assert_allclose(batch.reward, -distance, rtol=1e-6)
    assert len(np.unique(distance)) > 5


class Native(VectorEnv[Any, Any, Any]):
    """Two Walks in one, with one compute_reward for them."""

    num_envs = 2
    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(self) -> None:
        walks = SyncVectorEnv(TWO)
        self.single_observation_space, self.observation_space = GOAL_SPACE, walks.observation_space
        self.single_action_space, self.action_space = ACTION, walks.action_space
        self.reset, self.step = walks.reset, walks.step
        self.compute_reward = Walk().compute_reward


def test_a_native_vector_environment_computes_the_rewards_itself() -> None:
    native, sync = small(VectorWrapper(Native())), small(SyncVectorEnv(TWO))
    native.learn(60)
    sync.learn(60)
    assert equal(native.replay_buffer.sample(200), sync.replay_buffer.sample(200))


@pytest.mark.parametrize("kind", [AsyncVectorEnv, FORKED])
def test_workers_must_have_a_compute_reward_for_batches(kind: Callable[..., Any]) -> None:
    env = kind([Silent])
    with pytest.raises(ValueError, match="have none"):
        small(env)
    env.close()
    with pytest.raises(ValueError, match=r"run elsewhere, must give one reward for each row"):
        small(kind([SinglesOnly]))


@pytest.mark.parametrize("singles_only", [SinglesOnly, SinglesOnlyByIndex])
def test_a_compute_reward_for_single_goals_is_called_once_for_each_transition(singles_only: type[Silent]) -> None:
    with pytest.warns(UserWarning, match="called once for each transition"):
        slow = small(singles_only)
    fast = small(Walk)
    slow.learn(40)
    fast.learn(40)
    assert equal(slow.replay_buffer.sample(100), fast.replay_buffer.sample(100))


@pytest.mark.parametrize("change", [lambda reward: reward / 10, lambda reward: reward - 0.1])
def test_rewards_that_a_wrapper_changed_are_noticed(change: Callable[[Any], Any]) -> None:
    model = small(lambda: TransformReward(Walk(), change))
    with pytest.warns(UserWarning, match=r"100% of the rewards are not what compute_reward says .* not -[0-9]+;"):
        model.learn(40)


def test_rewards_that_are_right_give_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    small(Walk).learn(60)
    assert not recwarn.list


# States and files.


@pytest.mark.parametrize("strategy", ["future", "final", "episode"])
def test_a_buffer_goes_on_from_its_state_as_if_never_stored(strategy: str) -> None:
    one = Collected(n_rows=9, goal_selection_strategy=strategy)
    for n_steps in (1, 5, 8, 9):
        one.step(n_steps)
        other = her(one.buffer.buffer_size, N_ENVS, goal_selection_strategy=strategy)
        other.attach(one.door)
        other.set_state(copy.deepcopy(one.buffer.get_state()))
        other.generator.bit_generator.state = one.buffer.generator.bit_generator.state
        assert equal(one.buffer.sample(200), other.sample(200))
        one.buffer = other
    one.check()


def test_how_many_rows_follow_is_not_stored_but_found_again() -> None:
    collected = Collected(n_rows=9)
    for _ in range(40):
        collected.step(1)
        buffer = collected.buffer
        held, left = buffer._rows_held(), buffer.left.copy()
        state = copy.deepcopy(buffer.get_state())
        assert "left" not in state
        buffer.set_state(state)
        assert np.array_equal(buffer.left[:held], left[:held])


@pytest.mark.parametrize("strategy", ["future", "final", "episode"])
@pytest.mark.parametrize("n_steps", [5, 9, 13])
def test_a_larger_buffer_takes_the_state_of_a_smaller_one(strategy: str, n_steps: int) -> None:
    """A ring that has wrapped is laid out anew, and the beginnings that it lost stay lost."""
    collected = Collected(n_rows=9, goal_selection_strategy=strategy)
    collected.step(n_steps)
    larger = her(30 * N_ENVS, N_ENVS, goal_selection_strategy=strategy)
    larger.attach(collected.door)
    larger.set_state(collected.buffer.get_state())
    collected.buffer, collected.record = larger, collected.record[-9:]
    collected.check()
    collected.step(10)
    collected.check()


@pytest.mark.parametrize("cls", [DDPG, TD3])
def test_a_model_and_its_file_draw_the_same_batches(cls: type[BaseAlgorithm], tmp_path: Path) -> None:
    model = small(TWO, cls, replay_buffer_kwargs={"n_sampled_goal": 2, "goal_selection_strategy": "episode"})
    model.learn(60).save(tmp_path / "model", full=True)
    loaded = cls.load(tmp_path / "model", env=TWO)
    buffer = loaded.replay_buffer
    assert type(buffer) is HerReplayBuffer
    assert (buffer.n_sampled_goal, buffer.goal_selection_strategy) == (2, "episode")
    for _ in range(3):
        assert equal(model.replay_buffer.sample(50), buffer.sample(50))
    loaded.learn(20, reset_num_timesteps=False)

    model.save_replay_buffer(tmp_path / "buffer")
    empty = small(TWO, cls, replay_buffer_kwargs={"n_sampled_goal": 2, "goal_selection_strategy": "episode"})
    empty.load_replay_buffer(tmp_path / "buffer")
    empty.generator.bit_generator.state = model.generator.bit_generator.state
    assert equal(model.replay_buffer.sample(50), empty.replay_buffer.sample(50))


def test_a_file_of_a_plain_buffer_is_refused_by_name_and_nothing_changed(tmp_path: Path) -> None:
    small(Walk, replay_buffer_class=ReplayBuffer).learn(30).save_replay_buffer(tmp_path / "plain")
    model = small(Walk).learn(30)
    before = copy.deepcopy(model.replay_buffer.get_state())
    with pytest.raises(ValueError, match=r"HerReplayBuffer: the state lacks reached, age: .* another class"):
        model.load_replay_buffer(tmp_path / "plain")
    after = model.replay_buffer.get_state()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    # The other way round, what hindsight needs besides is left aside.
    model.save_replay_buffer(tmp_path / "her")
    plain = small(Walk, replay_buffer_class=ReplayBuffer)
    plain.load_replay_buffer(tmp_path / "her")
    assert plain.replay_buffer.size() == 30


@pytest.mark.parametrize("value", [-1, 99])
def test_impossible_episodes_are_refused_and_nothing_changed(value: int) -> None:
    collected = Collected(10)
    collected.step(8)
    buffer = collected.buffer
    before = copy.deepcopy(buffer.get_state())
    state = copy.deepcopy(before)
    state["age"][4, 1] = value
    with pytest.raises(ValueError, match=r"HerReplayBuffer: the stored age does not count the rows of episodes"):
        buffer.set_state(state)
    after = buffer.get_state()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_without_an_environment_a_model_predicts_but_samples_nothing(tmp_path: Path) -> None:
    small(Walk).learn(40).save(tmp_path / "model", full=True)
    model = DDPG.load(tmp_path / "model")
    model.predict(Walk().reset()[0])
    with pytest.raises(ValueError, match=r"no environment: pass env= to load, or call model.set_env\(env\)"):
        model.train(1)
    model.set_env(Walk)
    model.train(1)


# Learning.


class Reach(gymnasium.Env[Any, Any]):
    """Move a point from the middle of a square to a spot near its rim, and stay there until the 25 steps are over.

    -1 for each step that ends outside the spot, else 0. The spot covers 0.5 % of the square.
    """

    box = spaces.Box(-1, 1, (2,), np.float32)
    observation_space = spaces.Dict({"observation": box, "achieved_goal": box, "desired_goal": box})
    action_space = box

    def reset(self, **kwargs: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        super().reset(**kwargs)
        angle, radius = self.np_random.uniform(0, 2 * np.pi), self.np_random.uniform(0.7, 1)
        self.goal = (radius * np.array([np.cos(angle), np.sin(angle)])).astype(np.float32)
        self.point = np.zeros(2, np.float32)
        self.steps = 0
        return self._obs(), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        self.point = np.clip(self.point + 0.1 * action, -1, 1).astype(np.float32)
        self.steps += 1
        reward = float(self.compute_reward(self.point, self.goal, {}))
        return self._obs(), reward, False, self.steps == 25, {"is_success": reward == 0}

    def compute_reward(self, achieved_goal: Any, desired_goal: Any, info: Any) -> Any:
        return np.where(np.linalg.norm(achieved_goal - desired_goal, axis=-1) > 0.08, -1.0, 0.0)

    def _obs(self) -> dict[str, np.ndarray]:
        return {"observation": self.point, "achieved_goal": self.point, "desired_goal": self.goal}


def learner(
    cls: type[BaseAlgorithm], buffer: type[ReplayBuffer], seed: int, env: type[Any] = Reach, **kwargs: Any
) -> BaseAlgorithm:
    return cls(
        "MultiInputPolicy",
        env,
        learning_rate=1e-3,
        tau=0.02,
        gamma=0.9,
        batch_size=64,
        learning_starts=500,
        action_noise=NormalActionNoise(0.0, 0.2),
        replay_buffer_class=buffer,
        policy_kwargs={"net_arch": [64, 64], "action_layer": 0, "final_init": None},
        seed=seed,
        **kwargs,
    )


def success_rate(model: BaseAlgorithm, env: Any, n_episodes: int = 100) -> float:
    """The share of episodes that end at their goal, without noise."""
    successes = 0
    for seed in range(n_episodes):
        obs, _ = env.reset(seed=1_000_000 + seed)
        is_over = False
        while not is_over:
            obs, _, _, is_over, info = env.step(model.predict(obs)[0])
        successes += info["is_success"]
    return successes / n_episodes


def test_the_success_rate_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    model = learner(DDPG, HerReplayBuffer, seed=0)
    rows: list[dict[str, Any]] = []
    monkeypatch.setattr(model.logger, "dump", lambda step: rows.append(dict(model.logger.name_to_value)))
    model.learn(550)
    assert [row["rollout/success_rate"] for row in rows if "rollout/success_rate" in row][-1] == np.mean(
        model.ep_success_buffer
    )
    assert len(model.ep_success_buffer) == 22


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("cls", [DDPG, TD3])
def test_a_goal_that_is_hardly_ever_met_by_chance_is_learned_with_hindsight(
    cls: type[BaseAlgorithm], seed: int
) -> None:
    """At least 0.9; it was 1.0 with each seed."""
    assert success_rate(learner(cls, HerReplayBuffer, seed).learn(4_000), Reach()) >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_goal_that_is_hardly_ever_met_by_chance_is_not_learned_without(seed: int) -> None:
    """At most 0.2, after as many steps; it was 0.0 with each seed."""
    assert success_rate(learner(DDPG, ReplayBuffer, seed).learn(4_000), Reach()) <= 0.2


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bits_are_flipped_to_a_goal_with_hindsight_and_not_without(seed: int) -> None:
    """At least 0.9 with, at most 0.2 without, after 9 000 steps; it was 1.0, 1.0, 1.0 and 0.01, 0.0, 0.0."""
    with_it, without = (learner(DDPG, buffer, seed, BitFlip).learn(9_000) for buffer in (HerReplayBuffer, ReplayBuffer))
    assert success_rate(with_it, BitFlip()) >= 0.9
    assert success_rate(without, BitFlip()) <= 0.2


def test_by_chance_bits_are_hardly_ever_those_of_the_goal() -> None:
    """Each state is as likely as any: 1 of 2^8. Were all transitions at their goals, both learners would learn."""
    env = BitFlip()
    env.action_space.seed(0)
    rewards = []
    for seed in range(1_000):
        env.reset(seed=seed)
        rewards += [env.step(env.action_space.sample())[1] for _ in range(8)]
    assert 0.002 < np.mean(np.array(rewards) == 0) < 0.008
    # Who knows the rule is there after one step.
    for seed in range(10):
        obs, _ = env.reset(seed=seed)
        assert env.step(-obs["observation"] * obs["desired_goal"])[1] == 0
