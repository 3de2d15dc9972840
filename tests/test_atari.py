"""Images: a game of Atari where it is installed, and a task drawn in NumPy that is not Atari."""

from __future__ import annotations

import sys
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from sbac import A2C, evaluate_policy
from sbac.atari import make_atari

SIZE, SQUARE, LENGTH = 36, 6, 10


class MovingSquare(gymnasium.Env[Any, Any]):
    """A bright square moves about in a dark, noisy image; name the quarter that it is in: 1 for each right answer.

    Best: 10. By chance: 2.5.
    """

    observation_space = spaces.Box(0, 255, (SIZE, SIZE, 1), np.uint8)
    action_space = spaces.Discrete(4)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self._next(), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        reward = float(action == self.corner)
        self.steps += 1
        return self._next(), reward, False, self.steps == LENGTH, {}

    def _next(self) -> np.ndarray:
        self.corner = int(self.np_random.integers(4))
        half = SIZE // 2
        row, column = self.np_random.integers(half - SQUARE, size=2) + half * np.array(divmod(self.corner, 2))
        image = self.np_random.integers(0, 60, (SIZE, SIZE, 1), dtype=np.uint8)
        image[row : row + SQUARE, column : column + SQUARE] = 255
        return image


def test_a_square_is_found_in_an_image() -> None:
    model = A2C("CnnPolicy", MovingSquare, n_envs=8, gamma=0.0, learning_rate=1e-3, use_rms_prop=False, seed=0)

    def score() -> float:
        return evaluate_policy(model, MovingSquare, n_eval_episodes=20, seed=1000)[0]

    assert score() < 5
    model.learn(6_000)
    assert score() > 9


def test_pong_runs_for_ten_thousand_frames() -> None:
    model = A2C("auto", lambda: make_atari("ALE/Pong-v5"), n_envs=4, seed=0)
    assert model.observation_space == spaces.Box(0, 255, (4, 84, 84), np.uint8)
    model.learn(2_500)  # four frames each
    assert model.num_timesteps == 2_500
    action, _ = model.predict(model.observation_space.sample())
    assert action in model.action_space


def test_without_ale_py_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ale_py", None)
    with pytest.raises(ImportError, match=r"pip install 'sbac\[atari\]'"):
        make_atari("ALE/Pong-v5")
