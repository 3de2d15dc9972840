"""What all tests share: one thread, and small models of each algorithm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from sbac import A2C, DDPG, TD3
from sbac.base import BaseAlgorithm

SMALL: dict[str, tuple[type[BaseAlgorithm], str, dict[str, Any]]] = {
    "a2c": (A2C, "CartPole-v1", {"n_steps": 4, "learning_rate": 1e-2}),
    "ddpg": (DDPG, "Pendulum-v1", {"learning_starts": 12, "batch_size": 8, "buffer_size": 500}),
    "td3": (TD3, "Pendulum-v1", {"learning_starts": 12, "batch_size": 8, "buffer_size": 500}),
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small only lose time to threads, and sums keep their order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=sorted(SMALL))
def make_model(request: pytest.FixtureRequest) -> Callable[..., BaseAlgorithm]:
    """Makes a small model; the test runs once for each algorithm. Arguments override the small model's."""
    cls, env_id, arguments = SMALL[request.param]

    def make(env: Any = env_id, **overrides: Any) -> BaseAlgorithm:
        return cls("MlpPolicy", env, **{"seed": 0, "policy_kwargs": {"net_arch": [16, 8]}, **arguments, **overrides})

    make.cls, make.env_id = cls, env_id  # type: ignore[attr-defined]
    return make
