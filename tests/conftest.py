"""What all tests share: one thread, and small models of each algorithm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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


@dataclass
class MakeModel:
    """Makes small models of an algorithm.

    Attributes:
        cls: The algorithm.
        env_id: Where its models learn, unless another environment is given.
        arguments: Of the small models, unless others are given.
    """

    cls: type[BaseAlgorithm]
    env_id: str
    arguments: dict[str, Any]

    def __call__(self, env: Any = None, **overrides: Any) -> Any:
        small = {"seed": 0, "policy_kwargs": {"net_arch": [16, 8]}, **self.arguments}
        return self.cls("MlpPolicy", self.env_id if env is None else env, **{**small, **overrides})


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small only lose time to threads, and sums keep their order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=sorted(SMALL))
def make_model(request: pytest.FixtureRequest) -> MakeModel:
    """Makes a small model; the test runs once for each algorithm."""
    return MakeModel(*SMALL[request.param])
