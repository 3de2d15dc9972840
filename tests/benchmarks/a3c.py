"""How fast A3C's workers are: two against one, and one against a plain PyTorch loop. Run on idle cores.

    python -m tests.benchmarks.a3c [--repeats 5]

All of it runs in turn within one call, on CartPole-v1 with the same two perceptrons of 64-64 units, the same rollouts
and one thread a worker. Starting up is not measured: speed is that between the first tenth and the end of a training.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from statistics import median

import torch

from sbac import A3C
from sbac.callbacks import BaseCallback
from tests.benchmarks.plain_a3c import train as train_plain


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


def sbac_speed(n_workers: int, n_envs: int, n_steps: int, steps: int) -> float:
    """Steps per second of all workers together."""
    speed = Speed()
    model = A3C("MlpPolicy", "CartPole-v1", n_workers=n_workers, n_envs=n_envs, n_steps=n_steps, seed=0)
    model.learn(steps * n_workers, callback=speed)
    return speed.value


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    for n_steps in (5, 20):
        workloads: dict[str, Callable[[], float]] = {
            "plain loop, 1 worker, 1 environment": lambda n=n_steps: train_plain("CartPole-v1", 6_000, n),
            "sbac, 1 worker, 1 environment": lambda n=n_steps: sbac_speed(1, 1, n, 15_000),
            "sbac, 2 workers, 1 environment each": lambda n=n_steps: sbac_speed(2, 1, n, 15_000),
            "sbac, 1 worker, 8 environments": lambda n=n_steps: sbac_speed(1, 8, n, 60_000),
            "sbac, 2 workers, 8 environments each": lambda n=n_steps: sbac_speed(2, 8, n, 60_000),
        }
        measured: dict[str, list[float]] = {name: [] for name in workloads}
        for _ in range(repeats):
            for name, run in workloads.items():
                measured[name].append(run())
        plain, one, two, one8, two8 = (measured[name] for name in workloads)
        print(f"\nn_steps = {n_steps}")
        for name, values in measured.items():
            print(f"  {name:40} {median(values):8.0f} steps/s  ({min(values):.0f} to {max(values):.0f})")
        for name, above, below in (
            ("2 workers / 1 worker, 1 environment each", two, one),
            ("2 workers / 1 worker, 8 environments each", two8, one8),
            ("1 worker with 1 environment / plain loop", one, plain),
            ("1 worker with 8 environments / plain loop", one8, plain),
        ):
            ratios = [a / b for a, b in zip(above, below, strict=True)]
            print(f"  {name:44} {median(ratios):5.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
