"""Action distributions: what a stochastic policy draws from, and the terms that its loss needs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


class Distribution(ABC):
    """A batch of B independent distributions over the actions of one space."""

    @abstractmethod
    def log_prob(self, action: Tensor) -> Tensor:
        """log pi(a|s) of each action: (B,)."""

    @abstractmethod
    def entropy(self) -> Tensor:
        """The entropy of each distribution in nats: (B,)."""

    @abstractmethod
    def mode(self) -> Tensor:
        """The most probable action of each distribution."""

    @abstractmethod
    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One draw from each distribution, without gradient."""


class CategoricalDistribution(Distribution):
    """One of n actions, counted from 0.

    Args:
        logits: Unnormalised log-probabilities, (B, n).
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def log_prob(self, action: Tensor) -> Tensor:
        return self._log_probs().gather(-1, action.long().unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        log_probs = self._log_probs()
        return -(log_probs.exp() * log_probs).sum(-1)

    def mode(self) -> Tensor:
        return self.logits.argmax(-1)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        # Gumbel-max: argmax(logits - log E) with E ~ Exp(1) is distributed as softmax(logits).
        waiting = torch.empty_like(self.logits).exponential_(generator=generator)
        return (self.logits - waiting.log_()).argmax(-1)

    def _log_probs(self) -> Tensor:
        return torch.log_softmax(self.logits, dim=-1)


class DiagGaussianDistribution(Distribution):
    """Independent normal distributions, one for each of d action dimensions.

    Args:
        mean: (B, d).
        log_std: Logarithm of the standard deviations, (d,), the same in every state.
    """

    def __init__(self, mean: Tensor, log_std: Tensor) -> None:
        self.mean = mean
        self.log_std = log_std

    def log_prob(self, action: Tensor) -> Tensor:
        # log N(a; mu, sigma) = -((a - mu) / sigma)^2 / 2 - log sigma - log sqrt(2 pi), summed over dimensions
        standardized = (action - self.mean) * torch.exp(-self.log_std)
        return (-0.5 * standardized.square() - self.log_std - LOG_SQRT_2PI).sum(-1)

    def entropy(self) -> Tensor:
        # H = log sigma + log sqrt(2 pi e), summed over dimensions
        return (self.log_std + LOG_SQRT_2PI + 0.5).sum(-1).expand(self.mean.shape[:-1])

    def mode(self) -> Tensor:
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.empty_like(self.mean).normal_(generator=generator)
        return (self.mean + self.log_std.exp() * noise).detach()
