"""Between the actions of an algorithm and those of an environment."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces


class ActionCodec:
    """From the actions of an algorithm to those of an environment, and back.

    An algorithm acts in [-1, 1] wherever the environment's Box is finite, and counts discrete actions from 0.

    Args:
        space: The action space of one environment.
    """

    def __init__(self, space: spaces.Space[Any]) -> None:
        self.space = space
        self.rescales = False
        if isinstance(space, spaces.Box):
            self._dtype = np.dtype(space.dtype)
            self._low = space.low.astype(np.float64)
            self._high = space.high.astype(np.float64)
            self.rescales = bool(np.isfinite(self._low).all() and np.isfinite(self._high).all())
            self._center = (self._high / 2 + self._low / 2) if self.rescales else np.zeros_like(self._low)
            self._half_range = (self._high / 2 - self._low / 2) if self.rescales else np.ones_like(self._low)
            if self.rescales:
                # Where rounding would keep +-1 off a bound, reach a little beyond it: `to_env` clips.
                short = (self._center + self._half_range < self._high) | (self._center - self._half_range > self._low)
                self._half_range += short * np.spacing(np.maximum(np.abs(self._low), np.abs(self._high)))
        elif isinstance(space, spaces.Discrete):
            self._start = int(space.start)

    def to_env(self, action: np.ndarray) -> np.ndarray:
        """Actions (..., *shape) of an algorithm in the environment's own units, inside its bounds."""
        if isinstance(self.space, spaces.Box):
            native = np.clip(self._center + self._half_range * action, self._low, self._high)
            return (np.rint(native) if np.issubdtype(self._dtype, np.integer) else native).astype(self._dtype)
        if isinstance(self.space, spaces.Discrete):
            return (action + self._start).astype(self.space.dtype)
        return action

    def from_env(self, action: np.ndarray) -> np.ndarray:
        """Actions (..., *shape) of an environment in the units of an algorithm."""
        if isinstance(self.space, spaces.Box):
            half_range = np.where(self._half_range > 0, self._half_range, 1.0)
            return ((np.asarray(action, dtype=np.float64) - self._center) / half_range).astype(np.float32)
        if isinstance(self.space, spaces.Discrete):
            return np.asarray(action) - self._start
        return np.asarray(action)
