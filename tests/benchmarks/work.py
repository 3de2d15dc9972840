"""The works that are measured: each is one function for each side, and one call measures one side, alone in a process.

    python -m tests.benchmarks.work a2c/CartPole-8 sbac

prints how much of the work was done in a second.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch


class Work(NamedTuple):
    """What is measured."""

    title: str
    unit: str
    sides: Mapping[str, Callable[[float], float]]  # of how much of the work to do, 1 is all; returns units a second
    threads: int | None = 1  # of torch; None leaves it to each library
    wanted: str = ""  # how often the second side's speed the first one's is to be
    is_disturbed: bool = False  # whether another process keeps one core busy meanwhile


def _rate(do: Callable[[int], Any], units: int) -> float:
    start = time.perf_counter()
    do(units)
    return units / (time.perf_counter() - start)


def _learning(model: Any, warm_up: int, steps: int) -> float:
    """Steps a second, once everything was touched."""
    model.learn(warm_up)
    return _rate(lambda n: model.learn(n, reset_num_timesteps=False), steps)


# The algorithms, each with the same networks, batches and rates on both sides.


def a2c(n_envs: int, is_native: bool, steps: int) -> dict[str, Callable[[float], float]]:
    def ours(share: float) -> float:
        from sbac import A2C

        env: Any = "CartPole-v1"
        if is_native:
            env = gymnasium.make_vec("CartPole-v1", n_envs, vectorization_mode="vector_entry_point")
        return _learning(A2C("MlpPolicy", env, n_envs=n_envs, seed=0), 50 * n_envs, int(steps * share))

    def theirs(share: float) -> float:
        from stable_baselines3 import A2C
        from stable_baselines3.common.env_util import make_vec_env

        model = A2C("MlpPolicy", make_vec_env("CartPole-v1", n_envs, seed=0), seed=0, device="cpu")
        return _learning(model, 50 * n_envs, int(steps * share))

    return {"sbac": ours, "stable-baselines3": theirs}


def _images() -> dict[str, Callable[[float], float]]:
    class Pictures(gymnasium.Env[Any, Any]):
        """84 x 84 x 4 pixels, made beforehand."""

        observation_space = gymnasium.spaces.Box(0, 255, (4, 84, 84), np.uint8)
        action_space = gymnasium.spaces.Discrete(6)

        def __init__(self) -> None:
            self._pixels = np.random.default_rng(0).integers(0, 256, (8, 4, 84, 84), np.uint8)
            self._t = 0

        def reset(
            self, *, seed: int | None = None, options: dict[str, Any] | None = None
        ) -> tuple[Any, dict[str, Any]]:
            super().reset(seed=seed)
            return self._pixels[0], {}

        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            self._t += 1
            return self._pixels[self._t % 8], 1.0, self._t % 200 == 0, False, {}

    def ours(share: float) -> float:
        from sbac import A2C

        return _learning(A2C("CnnPolicy", Pictures, n_envs=8, seed=0), 80, int(1_600 * share))

    def theirs(share: float) -> float:
        from stable_baselines3 import A2C
        from stable_baselines3.common.env_util import make_vec_env

        model = A2C("CnnPolicy", make_vec_env(Pictures, 8), seed=0, device="cpu")
        return _learning(model, 80, int(1_600 * share))

    return {"sbac": ours, "stable-baselines3": theirs}


def _envpool(n_envs: int, steps: int) -> dict[str, Callable[[float], float]]:
    """A2C in environments that step together in another language, against those that step one after the other."""

    def in_envpool(share: float) -> float:
        import envpool

        from sbac import A2C

        env = envpool.make("CartPole-v1", env_type="gymnasium", num_envs=n_envs, num_threads=1, seed=0)
        return _learning(A2C("MlpPolicy", env, seed=0), 50 * n_envs, int(steps * share))

    return {"sbac": in_envpool, "Gymnasium's environments": a2c(n_envs, False, steps)["sbac"]}


def _workers(n_workers: int, n_envs: int, steps: int) -> Callable[[float], float]:
    from tests.benchmarks.a3c import workers_speed

    return lambda share: workers_speed(n_workers, n_envs, n_steps=5, steps=int(steps * share))


def _plain_worker(share: float) -> float:
    from tests.benchmarks.plain_a3c import train

    return train("CartPole-v1", int(6_000 * share), 5)


def _off_policy(
    algorithm: str,
    env: str,
    net_arch: list[int] | None,
    steps: int,
    action_layer: int = 0,
    ours_only: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> dict[str, Callable[[float], float]]:
    common = {"learning_starts": 300, "buffer_size": 50_000, "train_freq": 1, "gradient_steps": 1, **arguments}

    def ours(share: float) -> float:
        import sbac

        kwargs = {} if net_arch is None else {"policy_kwargs": {"net_arch": net_arch, "action_layer": action_layer}}
        model = getattr(sbac, algorithm)("MlpPolicy", env, seed=0, **common, **kwargs, **(ours_only or {}))
        return _learning(model, 350, int(steps * share))

    def theirs(share: float) -> float:
        import stable_baselines3

        kwargs = {} if net_arch is None else {"policy_kwargs": {"net_arch": net_arch}}
        model = getattr(stable_baselines3, algorithm)("MlpPolicy", env, seed=0, device="cpu", **common, **kwargs)
        return _learning(model, 350, int(steps * share))

    return {"sbac": ours, "stable-baselines3": theirs}


def _half_cheetah(steps: int, **ours_only: Any) -> dict[str, Callable[[float], float]]:
    """TD3 with 256-256 and batches of 256 on both sides."""
    return _off_policy("TD3", "HalfCheetah-v5", [256, 256], steps, ours_only=ours_only, batch_size=256)


def _sbx(share: float) -> float:
    import sbx

    model = sbx.TD3(
        "MlpPolicy",
        "HalfCheetah-v5",
        seed=0,
        learning_starts=300,
        batch_size=256,
        train_freq=1,
        gradient_steps=1,
        policy_kwargs={"net_arch": [256, 256]},
    )
    return _learning(model, 350, int(600 * share))


def floor(batch: int, net_arch: tuple[int, int], obs_dim: int, action_dim: int) -> dict[str, Callable[[float], float]]:
    """TD3's updates against the matrix products that they cannot do without, at the rate of this machine."""
    from sbac import TD3
    from sbac.envs import Spaces

    known = Spaces(
        gymnasium.spaces.Box(-1, 1, (obs_dim,), np.float32), gymnasium.spaces.Box(-1, 1, (action_dim,), np.float32), 1
    )

    def ours(share: float) -> float:
        from sbac.buffers import ReplayBatch

        model = TD3("MlpPolicy", known, batch_size=batch, policy_kwargs={"net_arch": list(net_arch)}, buffer_size=2000)
        row = torch.randn(batch, obs_dim), torch.rand(batch, action_dim)
        zeros, ones = torch.zeros(batch), torch.ones(batch)
        drawn = ReplayBatch(row[0], row[1], zeros, ones, zeros, row[0], ones, np.arange(batch))

        def update(n: int) -> None:
            for _ in range(n):
                with model._updating():
                    model._update(drawn)
                model.n_updates += 1

        update(20)
        return _rate(update, int(200 * share))

    def products(share: float) -> float:
        from sbac.memory import keep_freed_memory
        from sbac.perceptron import FEW_COLUMNS, times

        keep_freed_memory()  # as a model does: what is measured are products, not pages

        def network(n_in: int, n_out: int) -> list[torch.Tensor]:
            sizes = zip((n_in, *net_arch), (*net_arch, n_out), strict=True)
            return [torch.randn(above, below) / below**0.5 for below, above in sizes]

        def forward(weights: list[torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
            kept = [x]
            for w in weights:
                kept.append(kept[-1].mm(w.t()))
            return kept

        def backward(weights: list[torch.Tensor], kept: list[torch.Tensor], learns: bool, to_action: bool) -> None:
            gradient = kept[-1]
            for k in range(len(weights) - 1, -1, -1):
                if learns and kept[k].shape[1] <= FEW_COLUMNS:  # whichever way round is sooner
                    kept[k].t().mm(gradient)
                elif learns:
                    gradient.t().mm(kept[k])
                if k > 0:
                    gradient = times(gradient, weights[k])
                elif to_action:
                    times(gradient, weights[k][:, -action_dim:])

        # Each network has weights of its own, as in an update, which has to fetch them all.
        obs, joined = torch.randn(batch, obs_dim), torch.randn(batch, obs_dim + action_dim)
        actor, actor_target = [network(obs_dim, action_dim) for _ in range(2)]
        critic, other_critic, *critic_targets = [network(obs_dim + action_dim, 1) for _ in range(4)]

        def update(n: int) -> None:
            for k in range(n):
                forward(actor_target, obs)
                for weights in critic_targets:
                    forward(weights, joined)
                for weights in (critic, other_critic):
                    backward(weights, forward(weights, joined), learns=True, to_action=False)
                if k % 2:
                    backward(critic, forward(critic, joined), learns=False, to_action=True)
                    backward(actor, forward(actor, obs), learns=True, to_action=False)

        update(20)
        return _rate(update, int(200 * share))

    return {"sbac": ours, "the matrix products alone": products}


def _predict(net_arch: list[int]) -> dict[str, Callable[[float], float]]:
    obs = np.float32([0.1, 0.2, 0.3])

    def asked(model: Any, share: float) -> float:
        def predict(n: int) -> None:
            for _ in range(n):
                model.predict(obs, deterministic=True)

        predict(100)
        return _rate(predict, int(5_000 * share))

    def ours(share: float) -> float:
        from sbac import TD3

        kwargs = {"net_arch": net_arch}
        return asked(TD3("MlpPolicy", "Pendulum-v1", policy_kwargs=kwargs, buffer_size=1000), share)

    def theirs(share: float) -> float:
        from stable_baselines3 import TD3

        kwargs = {"net_arch": net_arch}
        return asked(TD3("MlpPolicy", "Pendulum-v1", policy_kwargs=kwargs, buffer_size=1000, device="cpu"), share)

    return {"sbac": ours, "stable-baselines3": theirs}


def _sample() -> dict[str, Callable[[float], float]]:
    steps = 20_000

    def drawn(model: Any, share: float) -> float:
        model.learn(steps)

        def sample(n: int) -> None:
            for _ in range(n):
                model.replay_buffer.sample(256)

        sample(20)
        return _rate(sample, int(1_000 * share))

    def ours(share: float) -> float:
        from sbac import DDPG

        model = DDPG("MlpPolicy", "Pendulum-v1", buffer_size=steps, learning_starts=steps - 1, gradient_steps=1)
        return drawn(model, share)

    def theirs(share: float) -> float:
        from stable_baselines3 import DDPG

        model = DDPG(
            "MlpPolicy", "Pendulum-v1", buffer_size=steps, learning_starts=steps, gradient_steps=1, device="cpu"
        )
        return drawn(model, share)

    return {"sbac": ours, "stable-baselines3": theirs}


def _environment_alone(n_envs: int, steps: int) -> dict[str, Callable[[float], float]]:
    """A2C against its environments alone, stepped by Gymnasium with actions that are ready."""

    def alone(share: float) -> float:
        env = gymnasium.vector.SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * n_envs)
        env.reset(seed=0)
        actions = np.random.default_rng(0).integers(0, 2, (100, n_envs))

        def step(n: int) -> None:
            for k in range(n // n_envs):
                env.step(actions[k % 100])

        return _rate(step, int(steps * share))

    return {"sbac": a2c(n_envs, False, steps)["sbac"], "the environments alone": alone}


def _import(what: str) -> Callable[[float], float]:
    def imported(share: float) -> float:
        # From bytecode, as pip leaves it behind: that of a checkout may be missing.
        with tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, "PYTHONPYCACHEPREFIX": folder}
            environment.pop("PYTHONDONTWRITEBYTECODE", None)

            def run(n: int) -> None:
                for _ in range(n):
                    subprocess.run([sys.executable, "-c", f"import {what}"], check=True, env=environment)

            run(1)
            return _rate(run, max(1, int(4 * share)))

    return imported


WORKS: dict[str, Work] = {
    "a2c/CartPole-8": Work("A2C, CartPole-v1, 8 environments, defaults", "steps", a2c(8, False, 20_000), wanted="3.0"),
    "a2c/native-64": Work(
        "A2C, natively vectorised CartPole-v1, 64 environments", "steps", a2c(64, True, 100_000), wanted="4.0"
    ),
    "a2c/environment": Work(
        "A2C, CartPole-v1, 8 environments: against the environments alone", "steps", _environment_alone(8, 20_000)
    ),
    "a2c/envpool-64": Work("A2C, CartPole-v1, 64 environments of envpool", "steps", _envpool(64, 60_000)),
    "a3c/workers": Work(
        "A3C, CartPole-v1, two workers with 8 environments each",
        "steps",
        {"sbac": _workers(2, 8, 40_000), "one worker": _workers(1, 8, 40_000)},
        wanted="1.7",
    ),
    "a3c/plain-8": Work(
        "A3C, CartPole-v1, one worker with 8 environments",
        "steps",
        {"sbac": _workers(1, 8, 40_000), "a plain PyTorch loop": _plain_worker},
        wanted="5",
    ),
    "a3c/plain-1": Work(
        "A3C, CartPole-v1, one worker with 1 environment",
        "steps",
        {"sbac": _workers(1, 1, 12_000), "a plain PyTorch loop": _plain_worker},
    ),
    "ddpg/Pendulum": Work(
        "DDPG, Pendulum-v1, 64-64, batch 128",
        "steps",
        _off_policy("DDPG", "Pendulum-v1", [64, 64], 1_500, batch_size=128),
        wanted="2.5",
    ),
    "td3/Pendulum": Work(
        "TD3, Pendulum-v1, 64-64, batch 128",
        "steps",
        _off_policy("TD3", "Pendulum-v1", [64, 64], 1_500, batch_size=128),
        wanted="2.5",
    ),
    "ddpg/paper": Work(
        "DDPG, Pendulum-v1, 400-300, batch 64",
        "steps",
        _off_policy("DDPG", "Pendulum-v1", [400, 300], 800, action_layer=1, batch_size=64),
        wanted="1.5",
    ),
    "td3/HalfCheetah-1": Work(
        "TD3, HalfCheetah-v5, 256-256, batch 256, one thread",
        "steps",
        _half_cheetah(400),
        wanted="1.4",
    ),
    "td3/HalfCheetah-2": Work(
        "TD3, HalfCheetah-v5, 256-256, batch 256, two threads",
        "steps",
        {**_half_cheetah(400, n_threads=2), "sbx": _sbx},
        threads=2,
        wanted="1.7; sbx 1.1",
    ),
    "td3/disturbed": Work(
        "TD3, HalfCheetah-v5, 256-256, batch 256, threads by default, one core kept busy by another process",
        "steps",
        _half_cheetah(300),
        threads=None,
        wanted="4",
        is_disturbed=True,
    ),
    "td3/floor-256": Work("TD3, update, 256-256, batch 256", "updates", floor(256, (256, 256), 17, 6)),
    "td3/floor-400": Work("TD3, update, 400-300, batch 256", "updates", floor(256, (400, 300), 17, 6), wanted="0.85"),
    "predict/64": Work("predict, one observation, 64-64", "calls", _predict([64, 64]), wanted="6"),
    "predict/400": Work("predict, one observation, 400-300", "calls", _predict([400, 300]), wanted="6"),
    "replay/sample": Work("replay buffer, a batch of 256", "batches", _sample(), wanted="1"),
    "images": Work("A2C, Nature CNN, 8 environments of 84 x 84 x 4", "steps", _images(), wanted="1.3"),
    "import": Work(
        "import sbac: against torch and gymnasium",
        "imports",
        {"sbac": _import("sbac"), "torch and gymnasium": _import("torch, gymnasium")},
        wanted="1/1.15",
    ),
}


def main() -> None:
    """Measure one side of one work, and print its rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=WORKS)
    parser.add_argument("side")
    parser.add_argument("--share", type=float, default=1.0, help="how much of the work to do")
    options = parser.parse_args()
    work = WORKS[options.work]
    if work.threads is not None:
        torch.set_num_threads(work.threads)
    print(work.sides[options.side](options.share))


if __name__ == "__main__":
    main()
