"""A3C and A2C where an environment's steps take uneven time: equal steps, and equal seconds.

CartPole-v1 whose every step sleeps for 0 to 20 ms, drawn anew each time, as a simulator, a game or a robot may. Eight
environments in eight processes for both: A2C waits for the slowest of them at each step, A3C for none. A2C
learns from 5 steps of all of them at a time, A3C from 20 of one.

    python -m tests.benchmarks.uneven_steps            # trains; writes docs/results/uneven_steps.csv
    python -m tests.benchmarks.uneven_steps --plot     # draws docs/results/uneven_steps.svg from it
"""

from __future__ import annotations

import csv
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode

from sbac import A2C, A3C
from sbac.callbacks import BaseCallback

HERE = Path(__file__).parents[2] / "docs/results"
SECONDS = 0.02
N, STEPS, SEEDS = 8, 40_000, (0, 1, 2)
COMMON = {"learning_rate": 7e-4, "ent_coef": 0.01}


class Uneven(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Each step takes 0 to 20 ms more."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        self._delays = np.random.default_rng()

    def step(self, action: Any) -> Any:
        time.sleep(self._delays.uniform(0, SECONDS))
        return self.env.step(action)


def make() -> gymnasium.Env[Any, Any]:
    """One environment."""
    return Uneven(gymnasium.make("CartPole-v1"))


class Curve(BaseCallback):
    """The mean return of the last hundred episodes, with steps and seconds since the first step."""

    def __init__(self, algorithm: str, seed: int) -> None:
        super().__init__()
        self.label = (algorithm, seed)
        self.rows: list[tuple[Any, ...]] = []
        self.start = 0.0

    def _on_step(self) -> bool:
        self.start = self.start or time.perf_counter()
        if self.num_timesteps // 500 > len(self.rows) and self.model.ep_info_buffer:
            mean = float(np.mean([episode["r"] for episode in self.model.ep_info_buffer]))
            seconds = round(time.perf_counter() - self.start, 2)
            self.rows.append((*self.label, self.num_timesteps, seconds, round(mean, 2)))
        return True


def train() -> None:
    """Train both algorithms with each seed."""
    rows = []
    for seed in SEEDS:
        a3c = Curve("A3C", seed)
        A3C("MlpPolicy", make, n_workers=N, n_steps=20, seed=seed, **COMMON).learn(STEPS, callback=a3c)
        a2c = Curve("A2C", seed)
        env = AsyncVectorEnv([make] * N, context="spawn", autoreset_mode=AutoresetMode.SAME_STEP)
        with A2C("MlpPolicy", env, n_steps=5, seed=seed, **COMMON) as model:
            model.learn(STEPS, callback=a2c)
        rows += a3c.rows + a2c.rows
        HERE.mkdir(exist_ok=True)
        print(seed, a3c.rows[-1], a2c.rows[-1], flush=True)
        with (HERE / "uneven_steps.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("algorithm", "seed", "steps", "seconds", "ep_rew_mean"))
            writer.writerows(rows)


def plot() -> None:
    """Draw both curves over steps and over seconds: mean and range of the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves: dict[tuple[str, int], list[tuple[float, float, float]]] = defaultdict(list)
    with (HERE / "uneven_steps.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            key = (row["algorithm"], int(row["seed"]))
            curves[key].append((float(row["steps"]), float(row["seconds"]), float(row["ep_rew_mean"])))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for axis, column, name in ((axes[0], 0, "transitions"), (axes[1], 1, "seconds")):
        for algorithm, colour in (("A3C", "#0072b2"), ("A2C", "#d55e00")):
            own = [np.array(curve) for (label, _), curve in curves.items() if label == algorithm]
            grid = np.linspace(max(c[0, column] for c in own), min(c[-1, column] for c in own), 200)
            values = np.stack([np.interp(grid, curve[:, column], curve[:, 2]) for curve in own])
            axis.plot(grid, values.mean(0), color=colour, label=algorithm)
            axis.fill_between(grid, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
        axis.set_xlabel(name)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes[0].set_xticks(range(0, STEPS + 1, 10_000))
    axes[0].set_ylabel("return, mean of 100 episodes")
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(HERE / "uneven_steps.svg")


if __name__ == "__main__":
    plot() if "--plot" in sys.argv else train()
