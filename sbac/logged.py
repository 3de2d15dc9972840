"""`Logged`: an algorithm's counters and its log, of which `outputs` knows where it goes."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sbac.guards import require_whole
from sbac.logger import Logger
from sbac.outputs import Outputs
from sbac.statistics import EpisodeStatistics, TrainingLog


class Logged:
    """What an algorithm knows of its training and tells of it.

    Args:
        stats_window_size: Over how many finished episodes ``rollout/ep_rew_mean`` is taken.
        tensorboard_log: Folder for event files, or None.
        verbose: 0 is silent, 1 prints a table as training goes.

    Attributes:
        num_timesteps: Transitions collected since the counter was last reset, over all environments.
        n_updates: Gradient steps made.
        episodes: What is known of the episodes of training.
    """

    episodes: EpisodeStatistics

    def __init__(self, stats_window_size: int, tensorboard_log: str | None, verbose: int) -> None:
        self.stats_window_size = require_whole("stats_window_size", stats_window_size, 1)
        if not (tensorboard_log is None or isinstance(tensorboard_log, (str, Path))):
            raise ValueError(f"tensorboard_log must be a folder or None, not {tensorboard_log!r}")
        self.tensorboard_log = None if tensorboard_log is None else str(tensorboard_log)
        self.verbose = require_whole("verbose", verbose, 0)
        self.num_timesteps = 0
        self.n_updates = 0
        self._training_log = TrainingLog(1, 0)
        self._outputs = Outputs()

    @property
    def logger(self) -> Logger:
        """Where numbers go. Before `learn`, or without verbose and tensorboard_log, one without outputs."""
        return self._outputs.logger

    def set_logger(self, logger: Logger) -> None:
        """Log to `logger`; the table of `verbose` and the event file of `tensorboard_log` are added to it."""
        self._outputs.logger = logger

    @property
    def ep_info_buffer(self) -> deque[dict[str, float]]:
        """The last episodes, each ``{"r": return, "l": length, "t": seconds since training started}``."""
        return self.episodes.infos

    @property
    def ep_success_buffer(self) -> deque[float]:
        """1 or 0 for each of the last episodes whose environment said ``is_success``."""
        return self.episodes.successes

    def _start_log(self, run: str, is_new_run: bool, interval: int) -> None:
        """Open the outputs, and begin to gather numbers for a row every `interval` counts."""
        self._outputs.open(run, is_new_run, self.verbose, self.tensorboard_log)
        self._training_log = TrainingLog(interval, self.num_timesteps)

    def _log(self, numbers: Mapping[str, Tensor]) -> None:
        """Count an update and remember its numbers."""
        self.n_updates += 1
        self._training_log.add(numbers)

    def _dump_if_due(self, count: int) -> None:
        """Write a row of the log every `log_interval` counts."""
        if self._training_log.is_due(count, self.num_timesteps):
            self._dump_logs(count)

    def _dump_logs(self, count: int | None = None) -> None:
        self._training_log.record(self.logger, count, self.num_timesteps, self.episodes)
        self.logger.record("train/n_updates", self.n_updates)
        self._record_more()
        self.logger.dump(self.num_timesteps)

    def _record_more(self) -> None:
        """What one algorithm logs beyond the means of its updates' numbers."""
