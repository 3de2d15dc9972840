"""The manual's example of an algorithm of one's own learns what can be computed by hand, and has what all have."""

from __future__ import annotations

from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from docs.examples.one_step import OneStepActorCritic
from sbac import evaluate_policy
from sbac.callbacks import CheckpointCallback

LENGTH = 5


class Corridor(gymnasium.Env):
    """From the left end to the right one: each step costs 0.1, and the last one brings 1."""

    observation_space = gymnasium.spaces.Box(0, 1, (LENGTH + 1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.place = 0
        return self._observation(), {}

    def step(self, action):
        self.place = max(0, self.place + (1 if action == 1 else -1))
        arrived = self.place == LENGTH
        return self._observation(), (1.0 if arrived else -0.1), arrived, False, {}

    def _observation(self):
        return np.eye(LENGTH + 1, dtype=np.float32)[self.place]


def corridor() -> gymnasium.Env:
    return gymnasium.wrappers.TimeLimit(Corridor(), 20)


@pytest.mark.parametrize("mode", [None, AutoresetMode.NEXT_STEP], ids=["made by sbac", "next step"])
def test_it_learns_the_shortest_way_and_its_values(mode: AutoresetMode | None) -> None:
    env = corridor if mode is None else SyncVectorEnv([corridor] * 8, autoreset_mode=mode)
    model = OneStepActorCritic("MlpPolicy", env, learning_rate=3e-3, n_envs=8, seed=0)
    assert evaluate_policy(model, corridor, n_eval_episodes=1)[0] < 0
    model.learn(4_800)
    assert evaluate_policy(model, corridor, n_eval_episodes=1)[0] == pytest.approx(1 - 0.1 * (LENGTH - 1))

    # V(s) = -0.1 (1 + gamma + ... + gamma^(m-2)) + gamma^(m-1), m steps before the end.
    best = [-0.1 * sum(0.99**k for k in range(m - 1)) + 0.99 ** (m - 1) for m in range(LENGTH, 0, -1)]
    value = model.policy.predict_values(torch.eye(LENGTH + 1)[:LENGTH])
    torch.testing.assert_close(value, torch.tensor(best), atol=0.1, rtol=0)


def test_it_is_saved_and_goes_on_exactly(tmp_path: Path) -> None:
    whole = OneStepActorCritic("MlpPolicy", "CartPole-v1", n_envs=2, seed=0).learn(400)
    checkpoints = CheckpointCallback(save_freq=50, save_path=tmp_path)
    OneStepActorCritic("MlpPolicy", "CartPole-v1", n_envs=2, seed=0).learn(200, callback=checkpoints)
    again = OneStepActorCritic.load(tmp_path / "rl_model_200_steps", env="CartPole-v1")
    again.learn(200, reset_num_timesteps=False)
    assert torch.equal(again.policy.flat, whole.policy.flat)


def test_it_refuses_what_it_cannot_use() -> None:
    with pytest.raises(ValueError, match="gamma must be"):
        OneStepActorCritic("MlpPolicy", "CartPole-v1", gamma=1.5)
    with pytest.raises(TypeError, match="did you mean 'gamma'"):
        OneStepActorCritic("MlpPolicy", "CartPole-v1", gama=0.9)
