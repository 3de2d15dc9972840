"""Atari as in the papers: Gymnasium's wrappers, put together."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation, TransformReward


def make_atari(
    env_id: str,
    frame_stack: int = 4,
    frame_skip: int = 4,
    terminal_on_life_loss: bool = True,
    clip_reward: bool = True,
    **kwargs: Any,
) -> gymnasium.Env[Any, Any]:
    """An Atari game as it is learned from (Mnih et al. 2015, "Human-level control", Methods).

    Up to 30 idle steps at the start, every fourth frame, the larger of the last two, in grey and 84 x 84 pixels, the
    last four in a row. To measure a policy by the game's own score, set `terminal_on_life_loss` and `clip_reward` to
    False.

    Args:
        env_id: Such as "ALE/Pong-v5".
        frame_stack: Frames of an observation, at least 1.
        frame_skip: Frames of the game for each action, at least 1.
        terminal_on_life_loss: Whether an episode ends with a life.
        clip_reward: Whether only the sign of a reward counts.
        **kwargs: For `gymnasium.make`.

    Returns:
        An environment with observations (frame_stack, 84, 84) of uint8.

    Raises:
        ImportError: ale-py is not installed.
    """
    try:
        import ale_py
    except ImportError as error:
        raise ImportError("Atari games need ale-py: pip install 'sbac[atari]'") from error
    gymnasium.register_envs(ale_py)
    env = gymnasium.make(env_id, **{"frameskip": 1, **kwargs})
    env = AtariPreprocessing(env, frame_skip=frame_skip, terminal_on_life_loss=terminal_on_life_loss)
    env = FrameStackObservation(env, frame_stack)
    return TransformReward(env, lambda reward: float(np.sign(float(reward)))) if clip_reward else env
