"""Makes the files in `tests/data`, which every later version must load: ``python -m tests.make_data``, once a format.

A file that is there stays as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sbac import A2C, A3C, DDPG, TD3
from sbac.archive import FORMAT_VERSION
from sbac.base import BaseAlgorithm
from sbac.schedules import LinearSchedule

DATA = Path(__file__).parent / "data"
SMALL: dict[str, Any] = {"policy_kwargs": {"net_arch": [4]}, "seed": 0}
REPLAY: dict[str, Any] = {"learning_starts": 8, "batch_size": 4, "buffer_size": 20, "n_steps": 2}
MODELS: dict[str, tuple[type[BaseAlgorithm], str, dict[str, Any]]] = {
    "a2c": (A2C, "CartPole-v1", {"n_envs": 2, "learning_rate": LinearSchedule(1e-3, 1e-4)}),
    "a3c": (A3C, "CartPole-v1", {"n_workers": 2, "n_steps": 7, "deterministic": True}),
    "ddpg": (DDPG, "Pendulum-v1", REPLAY),
    "td3": (TD3, "Pendulum-v1", {**REPLAY, "normalize_obs": True, "layer_norm": True}),
}


def main() -> None:
    DATA.mkdir(exist_ok=True)
    for name, (cls, env_id, arguments) in MODELS.items():
        path = DATA / f"{name}_format{FORMAT_VERSION}.zip"
        if path.exists():
            print(f"{path} is there, and stays")
            continue
        model = cls("MlpPolicy", env_id, **SMALL, **arguments)
        model.learn(16, callback=lambda *_, model=model: model.num_timesteps < 14)
        model.save(path, full=True)
        obs = np.stack([model.observation_space.sample() for _ in range(8)]).clip(-10, 10)
        np.savez(path.with_suffix(".npz"), obs=obs, action=model.predict(obs)[0])


if __name__ == "__main__":
    main()
