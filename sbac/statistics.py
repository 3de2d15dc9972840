"""What is known of a training run: its episodes, the numbers of its updates, and when to log them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sbac.adapters import Infos, Step
from sbac.logger import Logger

HEARTBEAT = 10_000
"""Transitions after which a row is due at the latest, so that an episode without end is not silent."""


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

    def forget(self) -> None:
        """Begin to count anew, as a new run does."""
        self.count = 0
        self.infos.clear()
        self.successes.clear()

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
        # The empty step of next-step autoreset earns nothing, whatever a wrapper makes of its reward.
        is_usual = np.count_nonzero(step.valid) == len(step.valid)
        self.running_return += step.reward if is_usual else np.where(step.valid, step.reward, 0.0)
        self.running_length += step.valid
        if np.count_nonzero(ended):  # sooner than any()
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
        if isinstance(step.infos, Infos):
            step.infos.ends[i]["episode"] = episode
        self.running_return[i] = 0
        self.running_length[i] = 0
        self.record({**info, "episode": episode})

    def record(self, info: Mapping[str, Any]) -> None:
        """Count an episode that ended, by the info of its last step with the ``episode``."""
        self.infos.append(info["episode"])
        if "is_success" in info:
            self.successes.append(float(info["is_success"]))
        self.count += 1


class TrainingLog:
    """Gathers the numbers of one call of `learn`.

    Args:
        interval: Counts (rollouts, episodes) between two rows.
        num_timesteps: Transitions collected when training starts.
    """

    def __init__(self, interval: int, num_timesteps: int) -> None:
        self._interval = interval
        self._start_time = time.perf_counter()
        self._start_timesteps = num_timesteps
        self._last_count = 0
        self._last_timesteps = num_timesteps
        self._sums: dict[
            str, tuple[Tensor | float, int]
        ] = {}  # and of how many updates each: TD3's actor learns in some only
        self.n_updates = 0  # since the last row

    @property
    def seconds(self) -> float:
        """Since training started."""
        return time.perf_counter() - self._start_time

    def add(self, numbers: Mapping[str, Tensor]) -> None:
        """Remember the numbers of one update; a row shows their means. They stay on their device until then."""
        self.n_updates += 1
        for name, value in numbers.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + _mean(value), count + 1)

    def add_sums(self, sums: Mapping[str, float], n_updates: int) -> None:
        """Remember the numbers of several updates by their sums."""
        self.n_updates += n_updates
        for name, value in sums.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value, count + n_updates)

    def is_due(self, count: int, num_timesteps: int) -> bool:
        """Whether to write a row, now that there were `count` rollouts or episodes."""
        return count - self._last_count >= self._interval or num_timesteps - self._last_timesteps >= HEARTBEAT

    def record(self, logger: Logger, count: int | None, num_timesteps: int, episodes: EpisodeStatistics) -> None:
        """Hand everything since the last row to the logger, and begin anew. None leaves the last count as it is."""
        self._last_count = self._last_count if count is None else count
        self._last_timesteps = num_timesteps
        if episodes.infos:
            logger.record("rollout/ep_rew_mean", float(np.mean([episode["r"] for episode in episodes.infos])))
            logger.record("rollout/ep_len_mean", float(np.mean([episode["l"] for episode in episodes.infos])))
        if episodes.successes:
            logger.record("rollout/success_rate", float(np.mean(episodes.successes)))
        elapsed = max(self.seconds, 1e-9)
        logger.record("time/fps", int((num_timesteps - self._start_timesteps) / elapsed))
        logger.record("time/time_elapsed", round(elapsed, 3))
        logger.record("time/episodes", episodes.count)
        logger.record("time/total_timesteps", num_timesteps)
        for name, (total, count) in self._sums.items():
            logger.record(f"train/{name}", float(total) / count)
        self._sums, self.n_updates = {}, 0

    def get_state(self) -> dict[str, Any]:
        """Everything gathered, as plain data, for a full checkpoint."""
        return {
            "seconds": self.seconds,
            "start_timesteps": self._start_timesteps,
            "last_count": self._last_count,
            "last_timesteps": self._last_timesteps,
            "sums": {name: (float(total), count) for name, (total, count) in self._sums.items()},
            "n_updates": self.n_updates,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `get_state` returned. The time in between does not count."""
        self._start_time = time.perf_counter() - state["seconds"]
        self._start_timesteps = state["start_timesteps"]
        self._last_count, self._last_timesteps = state["last_count"], state["last_timesteps"]
        self._sums, self.n_updates = dict(state["sums"]), state["n_updates"]


def _mean(value: Tensor) -> Tensor | float:
    """The mean, which stays on its device; on the CPU it is a number, sooner than torch's."""
    if not (value.is_cpu and value.numel()):
        return value.detach().mean()
    if not value.ndim:
        return value.item()
    if value.dtype not in _AS_ARRAYS:
        return value.sum(dtype=torch.float64).item() / value.numel()
    return float(np.add.reduce(value.detach().numpy(), axis=None, dtype=np.float64)) / value.numel()


_AS_ARRAYS = (torch.float32, torch.float64)
