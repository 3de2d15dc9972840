"""Learning: tasks whose best policy is known, with a seed and the margin that is asked for.

The returns of an echo task are minus the distance to what was asked, or the share of right answers, so that the
best is known exactly. The long runs have the marker `slow`.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from sbac import A2C, A3C, DDPG, TD3, evaluate_policy
from sbac.noise import NormalActionNoise
from sbac.recipes import load_recipe

LENGTH = 20  # steps of an echo episode


class DiscreteEcho(gymnasium.Env[Any, Any]):
    """Say which of four lights is on: 1 for each right answer. Best: 20. By chance: 5."""

    observation_space = spaces.Box(0, 1, (4,), np.float32)
    action_space = spaces.Discrete(4)

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(**kwargs)
        self.steps = 0
        return self._next(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        reward = float(action == self.light)
        self.steps += 1
        return self._next(), reward, False, self.steps == LENGTH, {}

    def _next(self) -> np.ndarray:
        self.light = int(self.np_random.integers(4))
        return np.eye(4, dtype=np.float32)[self.light]


class ContinuousEcho(gymnasium.Env[Any, Any]):
    """Repeat two numbers from [-1, 1] on a scale from 0 to 10: minus the squared distance on the first scale.

    Best: 0. Answering with the middle: -20 x 2/3 = -13.3 on average. By uniform chance: -26.7.
    """

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Box(0, 10, (2,), np.float32)

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(**kwargs)
        self.steps = 0
        return self._next(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        assert action in self.action_space
        reward = -float(np.square(action / 5 - 1 - self.asked).sum())
        self.steps += 1
        return self._next(), reward, False, self.steps == LENGTH, {}

    def _next(self) -> np.ndarray:
        self.asked = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.asked


def mean_return(model: Any, env: Any, n_eval_episodes: int = 20) -> float:
    mean, _ = evaluate_policy(model, [env], n_eval_episodes=n_eval_episodes, seed=1000)
    return mean


@pytest.mark.parametrize("seed", [0, 1])
def test_a2c_learns_to_echo_discrete_actions(seed):
    model = A2C("MlpPolicy", DiscreteEcho, n_envs=8, gamma=0.0, learning_rate=3e-3, seed=seed)
    assert mean_return(model, DiscreteEcho) < 12
    model.learn(12_000)
    assert mean_return(model, DiscreteEcho) == 20


@pytest.mark.parametrize("seed", [0, 1])
def test_a3c_learns_to_echo_discrete_actions(seed):
    model = A3C("MlpPolicy", DiscreteEcho, n_workers=2, n_envs=4, gamma=0.0, learning_rate=3e-3, seed=seed)
    model.learn(16_000)
    assert mean_return(model, DiscreteEcho) == 20


@pytest.mark.parametrize("seed", [0, 1])
def test_a2c_learns_to_echo_continuous_actions(seed):
    model = A2C(
        "MlpPolicy", ContinuousEcho, n_envs=8, n_steps=8, gamma=0.0, learning_rate=2e-3, use_rms_prop=False, seed=seed
    )
    assert mean_return(model, ContinuousEcho) < -10
    model.learn(60_000)
    assert mean_return(model, ContinuousEcho) > -1


@pytest.mark.parametrize("seed", [0, 1])
def test_ddpg_learns_to_echo(seed):
    model = DDPG(
        "MlpPolicy",
        ContinuousEcho,
        gamma=0.0,
        actor_learning_rate=1e-3,
        action_noise=NormalActionNoise(0.0, 0.2),
        policy_kwargs={"net_arch": [64, 64]},
        seed=seed,
    )
    assert mean_return(model, ContinuousEcho) < -10
    model.learn(2_000)
    assert mean_return(model, ContinuousEcho) > -1


@pytest.mark.parametrize("seed", [0, 1])
def test_td3_learns_to_echo(seed):
    model = TD3(
        "MlpPolicy",
        ContinuousEcho,
        gamma=0.0,
        learning_rate=1e-3,
        learning_starts=200,
        batch_size=64,
        action_noise=NormalActionNoise(0.0, 0.2),
        policy_kwargs={"net_arch": [32, 32]},
        seed=seed,
    )
    assert mean_return(model, ContinuousEcho) < -10
    model.learn(2_000)
    assert mean_return(model, ContinuousEcho) > -1


@pytest.mark.slow
def test_a2c_solves_cart_pole():
    """CartPole-v1 ends an episode at 500 and counts as solved at 475."""
    model = A2C("MlpPolicy", "CartPole-v1", n_envs=8, seed=0).learn(500_000)
    assert mean_return(model, lambda: gymnasium.make("CartPole-v1"), n_eval_episodes=50) >= 475


@pytest.mark.slow
def test_ddpg_swings_the_pendulum_up_with_its_recipe():
    """About -150 is the best that is possible on average; a random policy has about -1200."""
    recipe = load_recipe("ddpg", "Pendulum-v1")
    steps = recipe.pop("n_timesteps")
    model = DDPG("MlpPolicy", "Pendulum-v1", seed=0, **recipe).learn(steps)
    assert mean_return(model, lambda: gymnasium.make("Pendulum-v1"), n_eval_episodes=50) >= -200


@pytest.mark.slow
def test_td3_swings_the_pendulum_up_with_its_recipe():
    """As above: about -150 is the best, a random policy has about -1200."""
    recipe = load_recipe("td3", "Pendulum-v1")
    steps = recipe.pop("n_timesteps")
    model = TD3("MlpPolicy", "Pendulum-v1", seed=0, **recipe).learn(steps)
    assert mean_return(model, lambda: gymnasium.make("Pendulum-v1"), n_eval_episodes=50) >= -200
