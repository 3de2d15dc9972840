"""A run that was stopped, saved in full and loaded goes on as if never stopped, bit for bit, whatever the replay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from sbac import DDPG, TD3
from sbac.buffers import ReplayBuffer
from sbac.hindsight import HerReplayBuffer
from sbac.prioritized import PrioritizedReplayBuffer

TOTAL = 200


class Drift(gymnasium.Env[Any, Any]):
    """Push a point that drifts at random to a goal. Some episodes terminate, the others are cut after 11 steps."""

    box = spaces.Box(-10, 10, (2,), np.float32)
    observation_space = spaces.Dict({"observation": box, "achieved_goal": box, "desired_goal": box})
    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, **kwargs: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        super().reset(**kwargs)
        self.goal = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        self.point = np.zeros(2, np.float32)
        self.steps = 0
        return self._obs(), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        push = action + self.np_random.normal(size=2)
        self.point = np.clip(self.point + 0.3 * push, -10, 10).astype(np.float32)
        self.steps += 1
        reward = float(self.compute_reward(self.point, self.goal, {}))
        terminated = bool(np.abs(self.point).max() > 2)
        return self._obs(), reward, terminated, self.steps == 11 and not terminated, {}

    def compute_reward(self, achieved_goal: Any, desired_goal: Any, info: Any) -> Any:
        return -np.linalg.norm(achieved_goal - desired_goal, axis=-1)

    def _obs(self) -> dict[str, np.ndarray]:
        return {"observation": self.point, "achieved_goal": self.point, "desired_goal": self.goal}


def make(cls: Any, buffer: type[ReplayBuffer], arguments: dict[str, Any]) -> Any:
    return cls(
        "MultiInputPolicy",
        Drift,
        learning_starts=40,
        batch_size=8,
        replay_buffer_class=buffer,
        policy_kwargs={"net_arch": [8, 8]},
        seed=0,
        **{"buffer_size": 90, **arguments},
    )


def weights(model: Any) -> np.ndarray:
    return np.concatenate([tensor.detach().numpy().ravel() for tensor in model.policy.state_dict().values()])


def stopped(cls: Any, buffer: type[ReplayBuffer], arguments: dict[str, Any], stop: int) -> Any:
    """A model whose run was stopped by a callback after `stop` of its `TOTAL` transitions, or a few more."""

    def go_on(locals_: dict[str, Any], globals_: dict[str, Any]) -> bool:
        return bool(locals_["self"].num_timesteps < stop)

    return make(cls, buffer, arguments).learn(TOTAL, callback=go_on)


def loaded(model: Any, path: Path) -> Any:
    model.save(path, full=True)
    return type(model).load(path, env=Drift)


def assert_same(one: Any, other: Any) -> None:
    np.testing.assert_array_equal(weights(one), weights(other))
    state, others = one.replay_buffer.get_state(), other.replay_buffer.get_state()
    assert state.keys() == others.keys()
    for name in state:
        np.testing.assert_array_equal(state[name], others[name], err_msg=name)


CASES: list[tuple[type[ReplayBuffer], dict[str, Any], int]] = [
    (ReplayBuffer, {"n_steps": 3}, 100),
    (PrioritizedReplayBuffer, {}, 20),
    (PrioritizedReplayBuffer, {"n_steps": 3}, 160),
    (PrioritizedReplayBuffer, {"n_envs": 3, "n_steps": 3}, 75),
    (PrioritizedReplayBuffer, {"n_envs": 2, "train_freq": (1, "episode"), "gradient_steps": 5}, 100),
    (HerReplayBuffer, {}, 44),
    (HerReplayBuffer, {"n_envs": 3}, 160),
    (HerReplayBuffer, {"replay_buffer_kwargs": {"goal_selection_strategy": "final"}}, 75),
    (HerReplayBuffer, {"n_envs": 3, "replay_buffer_kwargs": {"goal_selection_strategy": "episode"}}, 100),
]


@pytest.mark.parametrize(("buffer", "arguments", "stop"), CASES)
@pytest.mark.parametrize("cls", [DDPG, TD3])
def test_a_stopped_run_goes_on_from_its_file_bit_for_bit(
    cls: Any, buffer: type[ReplayBuffer], arguments: dict[str, Any], stop: int, tmp_path: Path
) -> None:
    """Stopped before learning began, at 40, in the first round of the ring, which has 90 places, or in a later one."""
    whole = make(cls, buffer, arguments).learn(TOTAL)
    model = loaded(stopped(cls, buffer, arguments, stop), tmp_path / "model")
    assert stop <= model.num_timesteps < stop + 3
    model.learn(TOTAL - model.num_timesteps, reset_num_timesteps=False)
    assert whole.n_updates > 20
    assert_same(whole, model)


@pytest.mark.parametrize(
    ("buffer", "forgotten", "value"),
    [
        (PrioritizedReplayBuffer, "largest_priority", np.array(1.0)),
        (PrioritizedReplayBuffer, "priority", 1.0),
        (HerReplayBuffer, "age", 0),
        (ReplayBuffer, "reward", 0.0),
    ],
)
def test_what_a_buffer_forgets_shows_in_the_weights(
    buffer: type[ReplayBuffer], forgotten: str, value: Any, tmp_path: Path
) -> None:
    strategy = {"goal_selection_strategy": "episode"} if buffer is HerReplayBuffer else {}
    arguments = {"replay_buffer_kwargs": strategy}
    whole = make(DDPG, buffer, arguments).learn(TOTAL)
    model = loaded(stopped(DDPG, buffer, arguments, 100), tmp_path / "model")
    state = {name: array.copy() for name, array in model.replay_buffer.get_state().items()}
    state[forgotten][...] = value
    model.replay_buffer.set_state(state)
    model.learn(TOTAL - model.num_timesteps, reset_num_timesteps=False)
    assert not np.array_equal(weights(whole), weights(model))


@pytest.mark.parametrize("cls", [DDPG, TD3])
def test_a_class_makes_as_many_environments_as_the_model_has(cls: Any, tmp_path: Path) -> None:
    model = make(cls, ReplayBuffer, {"n_envs": 3}).learn(60)
    model.save(tmp_path / "model", full=True)
    other = cls.load(tmp_path / "model", env=Drift)
    assert other.n_envs == other.env.num_envs == 3
    assert other.replay_buffer.size() == 60
    old = model.env
    model.set_env(Drift)
    assert model.env is not old
    assert model.env.num_envs == 3
