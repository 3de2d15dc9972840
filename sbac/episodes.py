"""What is known of the episodes of training: the running ones, and the last that ended."""

from __future__ import annotations

from collections import deque

import numpy as np

from sbac.adapters import Infos, Step


class EpisodeStatistics:
    """Returns and lengths of episodes.

    Args:
        n_envs: Number of environments, n.
        window: How many of the last episodes to remember.

    Attributes:
        infos: The last episodes, each ``{"r": return, "l": length, "t": seconds since training started}``.
        successes: 1 or 0 for each of the last episodes whose environment said ``is_success``.
        count: Episodes ended since it was last reset.
        running_return: Of the running episodes, (n,).
        running_length: Of the running episodes, (n,).
    """

    def __init__(self, n_envs: int, window: int) -> None:
        self.infos: deque[dict[str, float]] = deque(maxlen=window)
        self.successes: deque[float] = deque(maxlen=window)
        self.count = 0
        self.running_return = np.zeros(n_envs)
        self.running_length = np.zeros(n_envs, dtype=np.int64)

    def start(self) -> None:
        """Every environment begins a new episode."""
        self.running_return[:] = 0
        self.running_length[:] = 0

    def add(self, step: Step, ended: np.ndarray, seconds: float) -> None:
        """Count a step.

        Args:
            step: Of n environments.
            ended: Where it ended an episode, (n,) bool.
            seconds: Since training started.
        """
        self.running_return += step.reward
        self.running_length += step.valid
        if ended.any():
            for i in np.flatnonzero(ended):
                self._end(int(i), step, seconds)

    def _end(self, i: int, step: Step, seconds: float) -> None:
        info = step.infos[i]
        # A wrapper that records episodes below a wrapper that changes rewards knows the true return.
        episode = info.get("episode") or {
            "r": float(self.running_return[i]),
            "l": int(self.running_length[i]),
            "t": round(seconds, 6),
        }
        self.infos.append(episode)
        if isinstance(step.infos, Infos):
            step.infos.ends[i]["episode"] = episode
        if "is_success" in info:
            self.successes.append(float(info["is_success"]))
        self.running_return[i] = 0
        self.running_length[i] = 0
        self.count += 1
