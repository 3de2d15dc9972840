"""sbac: actor-critic reinforcement learning in PyTorch.

>>> from sbac import A2C
>>> model = A2C("MlpPolicy", "CartPole-v1").learn(1_000)
"""

from sbac.a2c import A2C
from sbac.a3c import A3C
from sbac.archive import ArchiveError
from sbac.ddpg import DDPG
from sbac.evaluation import evaluate_policy
from sbac.guards import EnvironmentFault, NotFiniteError, WorkerFault
from sbac.loading import convert, inspect, load
from sbac.td3 import TD3

__version__ = "0.1.0"

__all__ = [
    "A2C",
    "A3C",
    "DDPG",
    "TD3",
    "ArchiveError",
    "EnvironmentFault",
    "NotFiniteError",
    "WorkerFault",
    "convert",
    "evaluate_policy",
    "inspect",
    "load",
]
