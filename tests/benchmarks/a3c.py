"""How fast A3C's workers are, starting up not counted."""

from __future__ import annotations

import time

from sbac import A3C
from sbac.callbacks import BaseCallback


class Speed(BaseCallback):
    """Steps per second once a tenth of the training is over."""

    def _on_training_start(self) -> None:
        self.first: tuple[float, int] | None = None

    def _on_rollout_start(self) -> None:
        total = self.model._total_timesteps
        self.last = (time.perf_counter(), self.model.num_timesteps)
        if self.first is None and self.last[1] > total / 10:
            self.first = self.last
        if self.last[1] < total * 0.95:
            self.until = self.last

    @property
    def value(self) -> float:
        """Between a tenth and nineteen twentieths."""
        assert self.first is not None
        return (self.until[1] - self.first[1]) / (self.until[0] - self.first[0])


def workers_speed(n_workers: int, n_envs: int, n_steps: int, steps: int) -> float:
    """Steps per second of all workers together, on CartPole-v1, each of whom takes so many."""
    speed = Speed()
    model = A3C("MlpPolicy", "CartPole-v1", n_workers=n_workers, n_envs=n_envs, n_steps=n_steps, seed=0)
    model.learn(steps * n_workers, callback=speed)
    return speed.value
