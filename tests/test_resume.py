"""A training that is saved, loaded and continued equals one that was never stopped."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv

from sbac import A2C, DDPG, TD3
from sbac import tape as tape_module
from sbac.base import BaseAlgorithm
from sbac.envs import make_environments
from sbac.tape import Tape
from tests.environments import Counter, Random

SMALL = {"policy_kwargs": {"net_arch": [16, 8]}, "seed": 0}
REPLAY = {"learning_starts": 40, "batch_size": 8, "buffer_size": 300}


def everything(model: BaseAlgorithm) -> dict[str, Any]:
    """The weights, and what the optimizers and the generators hold."""
    state = {f"policy.{name}": value for name, value in model.policy.state_dict().items()}
    for name, network in model._trained().items():
        for index, entries in network.optimizer.state_dict()["state"].items():
            state.update({f"{name}.{index}.{key}": torch.as_tensor(value) for key, value in entries.items()})
    state["act"] = model._act_generator.get_state()
    state["update"] = model._update_state
    state["draw"] = torch.as_tensor(model.generator.random())
    return state


def assert_equal(one: BaseAlgorithm, other: BaseAlgorithm) -> None:
    ours, theirs = everything(one), everything(other)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


# Environments are put back.


@pytest.mark.parametrize("at", [57, 150, 203])
@pytest.mark.parametrize(
    ("cls", "env_id", "arguments"),
    [
        (A2C, "CartPole-v1", {"n_steps": 8}),
        (A2C, "Acrobot-v1", {}),
        (DDPG, "Pendulum-v1", REPLAY),
        (DDPG, "MountainCarContinuous-v0", {**REPLAY, "action_noise": None}),
        (TD3, "Pendulum-v1", REPLAY),
    ],
)
def test_a_run_continued_from_a_file_equals_one_never_stopped(
    cls: type[BaseAlgorithm], env_id: str, arguments: dict[str, Any], at: int, tmp_path: Path
) -> None:
    model = cls("MlpPolicy", env_id, **SMALL, **arguments)
    model.learn(301, callback=lambda *_: model.save(tmp_path / "at", full=True) if model.num_timesteps == at else None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        continued = cls.load(tmp_path / "at", env=env_id)
    assert continued.num_timesteps == at
    continued.learn(301 - at, reset_num_timesteps=False)
    assert_equal(continued, model)
    assert [(e["r"], e["l"]) for e in continued.ep_info_buffer] == [(e["r"], e["l"]) for e in model.ep_info_buffer]


def test_several_environments_with_wrappers_are_put_back_each_in_its_own_episode(tmp_path: Path) -> None:
    def factory() -> gymnasium.Env[Any, Any]:
        # Its wrappers count steps, remember observations and draw from the environment's generator.
        env = gymnasium.wrappers.StickyAction(gymnasium.make("CartPole-v1", max_episode_steps=23), 0.25)
        return gymnasium.wrappers.DelayObservation(env, delay=2)

    model = A2C("MlpPolicy", factory, n_envs=3, n_steps=7, **SMALL)
    model.learn(600, callback=lambda *_: model.save(tmp_path / "at", full=True) if model.num_timesteps == 303 else None)
    continued = A2C.load(tmp_path / "at", env=factory)
    assert len(set(continued.episodes.running_length)) > 1, "their episodes began at different times"
    continued.learn(600 - 303, reset_num_timesteps=False)
    assert_equal(continued, model)


def test_without_being_put_back_the_run_is_another(tmp_path: Path) -> None:
    """The test above would see it."""
    model = A2C("MlpPolicy", "CartPole-v1", **SMALL)
    model.learn(300, callback=lambda *_: model.save(tmp_path / "at", full=True) if model.num_timesteps == 103 else None)
    continued = A2C.load(tmp_path / "at", env="CartPole-v1")
    continued._reset_count = -1
    continued.learn(300 - 103, reset_num_timesteps=False)
    assert not torch.equal(continued.policy.flat, model.policy.flat)


def test_an_environment_found_unequal_begins_a_new_episode_and_the_old_one_is_truncated(tmp_path: Path) -> None:
    # It counts its episodes, which a fresh copy does not know of.
    def factory() -> gymnasium.Env[Any, Any]:
        return Counter(lengths=(5,))

    model = A2C("MlpPolicy", factory, n_steps=20, **SMALL)
    model.learn(40, callback=lambda *_: model.num_timesteps < 8)
    model.save(tmp_path / "at", full=True)
    with pytest.warns(UserWarning, match="will not go on exactly.*0: played again, its episode came out differently"):
        continued = A2C.load(tmp_path / "at", env=factory)
    assert continued._obs.tolist() == [[0, 1, 0]], "the reset after the one that was played again"
    buffer = continued.rollout_buffer
    assert buffer.truncated[:8, 0].tolist() == [False] * 7 + [True]
    assert buffer.get().bootstrap_obs.tolist() == [[0, 1, 3]], "the value of what followed the last step is asked for"
    assert continued.episodes.running_return.tolist() == [0]
    assert continued.episodes.running_length.tolist() == [0]


def test_a_cut_episode_is_truncated_in_the_replay_buffer_too(tmp_path: Path) -> None:
    def factory() -> gymnasium.Env[Any, Any]:
        return Counter(lengths=(5,))

    model = DDPG("MlpPolicy", factory, **SMALL, **REPLAY).learn(8)
    model.save(tmp_path / "at", full=True)
    with pytest.warns(UserWarning, match="will not go on exactly"):
        continued = DDPG.load(tmp_path / "at", env=factory)
    continued.learn(4, reset_num_timesteps=False)
    batch = continued.replay_buffer._batch(np.array([6, 7, 8]), gamma=0.9)
    assert batch.obs[:, 1:].tolist() == [[1, 1], [1, 2], [1, 0]]
    assert batch.successor[:, 1:].tolist() == [[1, 2], [1, 3], [1, 1]]
    assert batch.terminated.tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", ["vector", "options", "too long", "no generator"])
def test_what_cannot_be_put_back_is_said(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "too long":
        monkeypatch.setattr(tape_module, "LIMIT", 10)

    class Ungenerated(Random):
        np_random = None  # type: ignore[assignment]

        def reset(self, **_: Any) -> tuple[np.ndarray, dict[str, Any]]:
            return np.zeros(1), {}

        def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
            return np.zeros(1), 0.0, False, False, {}

    def make() -> Any:
        if kind == "vector":
            return SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")])
        return Ungenerated if kind == "no generator" else "CartPole-v1"

    model = A2C("MlpPolicy", make(), **SMALL).learn(7)
    if kind == "options":
        model.env.env.reset(options={})
    model.save(tmp_path / "at", full=True)
    reason = "made from an id or a function" if kind == "vector" else "could not be recorded"
    with pytest.warns(UserWarning, match=reason):
        continued = A2C.load(tmp_path / "at", env=make())
    assert continued.learn(10, reset_num_timesteps=False).num_timesteps == 17


def test_new_episodes_are_not_those_of_the_start(tmp_path: Path) -> None:
    def make() -> SyncVectorEnv:
        return SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")])

    model = A2C("MlpPolicy", make(), **SMALL)
    model.learn(9)
    model.save(tmp_path / "at", full=True)
    with pytest.warns(UserWarning, match="will not go on exactly"):
        first, again = (A2C.load(tmp_path / "at", env=make()) for _ in range(2))
    assert np.array_equal(first._obs, again._obs), "loading twice gives the same"
    fresh = make_environments(make())
    assert not np.array_equal(first._obs, fresh.reset(model._env_seed))


def test_an_episode_is_recorded_bit_for_bit_whatever_the_actions() -> None:
    space = spaces.Dict(
        {"move": spaces.Box(-1, 1, (2, 2)), "press": spaces.MultiBinary(3), "turn": spaces.Discrete(3, start=-1)}
    )

    class Sum(gymnasium.Env[Any, Any]):
        observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
        action_space = space

        def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
            super().reset(**kwargs)
            self.total = self.np_random.random(2)
            return self.total.copy(), {}

        def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
            assert type(action) is dict and action["move"].shape == (2, 2) and action["turn"] in (-1, 0, 1)
            self.total += self.np_random.random() + action["move"].sum(0) * action["press"].sum() + action["turn"]
            return self.total.copy(), float(self.total.sum()), False, False, {}

    one, other = Sum(), Sum()
    recorder, player = Tape(one), Tape(other)
    space.seed(0)
    one.reset(seed=5)
    for _ in range(3):
        recorder.begin(None, None)
        obs, _ = one.reset()
        total = 0.0
        for _ in range(9):
            action = space.sample()
            recorder.add(action)
            obs, reward, *_ = one.step(action)
            total += reward
    recording = recorder.recording()
    assert recording is not None and recording.actions.shape == (9, 16 + 3 + 8)
    found, found_total = player.play(other, recording)
    assert np.array_equal(found, obs) and found_total == total
    assert other.np_random.random() == one.np_random.random()


def test_an_action_changed_later_is_recorded_as_it_was() -> None:
    env = gymnasium.make("Pendulum-v1")
    recorder = Tape(env)
    recorder.begin(0, None)
    action = np.array([0.5], np.float32)
    recorder.add(action)
    action[:] = 2
    recording = recorder.recording()
    assert recording is not None
    assert recording.actions.tobytes() == np.float32(0.5).tobytes()
    assert recording.seed == 0
