"""Action distributions: what a stochastic policy draws from, and the terms that its loss needs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor
from torch.nn import functional

from sbac.observations import n_choices
from sbac.trees import Tree, leaves, space_tree, tree_map

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


class Distribution(ABC):
    """A batch of B independent distributions over the actions of one space."""

    @abstractmethod
    def log_prob(self, action: Tensor) -> Tensor:
        """log pi(a|s) of each action: (B,)."""

    @abstractmethod
    def entropy(self) -> Tensor:
        """The entropy of each distribution in nats: (B,)."""

    def slopes(self, action: Tensor, of_log_prob: Tensor, of_entropy: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """The way back from `log_prob` and `entropy`, where it can be written out; None leaves it to autograd.

        Args:
            action: Those whose `log_prob` was taken.
            of_log_prob: The gradient with respect to the logarithm of each action's probability, (B,).
            of_entropy: The gradient with respect to each entropy, (B,).

        Returns:
            The gradient with respect to what the network gave, (B, width), and that of the logarithms of the standard
            deviations, (d,), where there are such.
        """
        return None

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
        mask: Which actions are allowed, (B, n) bool; the others have probability 0, and those allowed share the rest as
            if there were no others. A row that allows nothing counts as one that allows all. None allows all.
    """

    def __init__(self, logits: Tensor, mask: Tensor | None = None) -> None:
        self.forbidden = None if mask is None else ~(mask | ~mask.any(-1, keepdim=True))
        self.logits = logits if self.forbidden is None else logits.masked_fill(self.forbidden, -math.inf)
        self._normalized: Tensor | None = None  # kept where no graph is wanted, of which each use has one of its own
        self._known: tuple[Tensor, Tensor] | None = None  # likewise

    def log_prob(self, action: Tensor) -> Tensor:
        return self._log_probs().gather(-1, action.long().unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        return self._probs_and_entropy()[1]

    def mode(self) -> Tensor:
        return self.logits.argmax(-1)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        # Gumbel-max: argmax(logits - log E) with E ~ Exp(1) is distributed as softmax(logits).
        waiting = torch.empty_like(self.logits).exponential_(generator=generator)
        score = self.logits - waiting.log_()
        if self.forbidden is not None:
            score = score.masked_fill(self.forbidden, -math.inf)  # where E is 0 too, and the score no number
        return score.argmax(-1)

    def slopes(self, action: Tensor, of_log_prob: Tensor, of_entropy: Tensor) -> tuple[Tensor, Tensor | None] | None:
        if self.forbidden is not None:
            return None
        # d log pi(a) / d z = 1_a - p, d H / d z = -p (log p + H)
        log_probs = self._log_probs().detach()
        probs, entropy = (term.detach() for term in self._probs_and_entropy())
        slope = (log_probs + entropy.unsqueeze(-1)).mul_(of_entropy.unsqueeze(-1)).add_(of_log_prob.unsqueeze(-1))
        slope.mul_(probs).neg_()
        return slope.scatter_add_(-1, action.long().unsqueeze(-1), of_log_prob.unsqueeze(-1)), None

    def _log_probs(self) -> Tensor:
        if self.logits.requires_grad:
            return torch.log_softmax(self.logits, dim=-1)
        if self._normalized is None:
            self._normalized = torch.log_softmax(self.logits, dim=-1)
        return self._normalized

    def _probs_and_entropy(self) -> tuple[Tensor, Tensor]:
        if self._known is not None and not self.logits.requires_grad:
            return self._known
        log_probs = self._log_probs()
        if self.forbidden is not None:
            log_probs = log_probs.masked_fill(self.forbidden, 0.0)  # 0 log 0 = 0, also for the gradient
        probs = log_probs.exp()
        found = probs, -(probs * log_probs).sum(-1)
        if not self.logits.requires_grad:
            self._known = found
        return found


class MultiCategoricalDistribution(Distribution):
    """d independent choices, each of its own number of values, counted from 0.

    Args:
        logits: Unnormalised log-probabilities of all choices in a row, (B, sum of n_values).
        n_values: How many values each choice has, d numbers.
        mask: Which values are allowed, (B, sum of n_values) bool, as for `CategoricalDistribution`; None allows all.
    """

    def __init__(self, logits: Tensor, n_values: Sequence[int], mask: Tensor | None = None) -> None:
        masks = [None] * len(n_values) if mask is None else mask.split(list(n_values), dim=-1)
        parts = logits.split(list(n_values), dim=-1)
        self.choices = [CategoricalDistribution(*part) for part in zip(parts, masks, strict=True)]

    def log_prob(self, action: Tensor) -> Tensor:
        parts = zip(self.choices, action.unbind(-1), strict=True)
        return torch.stack([choice.log_prob(part) for choice, part in parts]).sum(0)

    def entropy(self) -> Tensor:
        return torch.stack([choice.entropy() for choice in self.choices]).sum(0)

    def mode(self) -> Tensor:
        return torch.stack([choice.mode() for choice in self.choices], dim=-1)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return torch.stack([choice.sample(generator) for choice in self.choices], dim=-1)


class BernoulliDistribution(Distribution):
    """d independent switches, 0 or 1.

    Args:
        logits: log p - log (1 - p) of each being 1, (B, d).
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def log_prob(self, action: Tensor) -> Tensor:
        # log p = -softplus(-logit), log (1 - p) = -softplus(logit)
        return -functional.softplus(torch.where(action > 0.5, -self.logits, self.logits)).sum(-1)

    def entropy(self) -> Tensor:
        # H = softplus(logit) - p logit
        return (functional.softplus(self.logits) - torch.sigmoid(self.logits) * self.logits).sum(-1)

    def mode(self) -> Tensor:
        return (self.logits > 0).to(self.logits.dtype)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        draw = torch.empty_like(self.logits).uniform_(generator=generator)
        return (draw < torch.sigmoid(self.logits)).to(self.logits.dtype)


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

    def slopes(self, action: Tensor, of_log_prob: Tensor, of_entropy: Tensor) -> tuple[Tensor, Tensor | None] | None:
        # With u = (a - mu) / sigma: d log pi / d mu = u / sigma, d log pi / d log sigma = u^2 - 1,
        # d H / d log sigma = 1
        per_sigma = torch.exp(-self.log_std.detach())
        standardized = (action - self.mean.detach()) * per_sigma
        slope = of_log_prob.unsqueeze(-1) * standardized
        of_log_std = (slope * standardized - of_log_prob.unsqueeze(-1)).sum(0) + of_entropy.sum()
        return slope.mul_(per_sigma), of_log_std

    def mode(self) -> Tensor:
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.empty_like(self.mean).normal_(generator=generator)
        return (self.mean + self.log_std.exp() * noise).detach()


class SquashedDiagGaussianDistribution(DiagGaussianDistribution):
    """The hyperbolic tangent of independent normal variables: all actions lie in [-1, 1].

    log pi(a) = log N(u; mu, sigma) - sum log (1 - tanh(u)^2) with a = tanh(u): Haarnoja et al. 2018, arXiv:1812.05905,
    appendix C.

    Args:
        mean: Of the normal variables, (B, d).
        log_std: Logarithm of their standard deviations, (d,).
    """

    def log_prob(self, action: Tensor) -> Tensor:
        # In float32, tanh is 1 from 9 on: an action on a bound counts as one just inside.
        edge = 1 - 2 * torch.finfo(action.dtype).eps
        unbounded = torch.atanh(action.clamp(-edge, edge))
        return super().log_prob(unbounded) - _log_slope(unbounded).sum(-1)

    def entropy(self) -> Tensor:
        """H = H(N) + E[log (1 - tanh(u)^2)], the expectation by Gauss-Hermite quadrature in each dimension."""
        nodes, weights = (torch.as_tensor(x, dtype=self.mean.dtype, device=self.mean.device) for x in _QUADRATURE)
        unbounded = self.mean.unsqueeze(-1) + self.log_std.exp().unsqueeze(-1) * nodes  # (B, d, nodes)
        return super().entropy() + (_log_slope(unbounded) * weights).sum((-1, -2))

    def slopes(self, action: Tensor, of_log_prob: Tensor, of_entropy: Tensor) -> tuple[Tensor, Tensor | None] | None:
        return None

    def mode(self) -> Tensor:
        """tanh of the mean, which is the median in each dimension."""
        return torch.tanh(self.mean)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return torch.tanh(super().sample(generator))


def _quadrature(n_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes x and weights w such that sum w f(x) is E[f(x)] for a standard normal x."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n_nodes)
    return nodes, weights / weights.sum()


_QUADRATURE = _quadrature(32)


def _log_slope(unbounded: Tensor) -> Tensor:
    """log (1 - tanh(u)^2), without loss of digits where tanh is close to 1."""
    return 2 * (math.log(2) - unbounded - functional.softplus(-2 * unbounded))


class CombinedDistribution(Distribution):
    """Independent distributions over the parts of a Dict or Tuple action, nested as the space is.

    Args:
        parts: A distribution in the place of each part.
    """

    def __init__(self, parts: Tree) -> None:
        self.parts = parts

    def log_prob(self, action: Tree) -> Tensor:
        pairs = zip(leaves(self.parts), leaves(action), strict=True)
        return torch.stack([part.log_prob(values) for (_, part), (_, values) in pairs]).sum(0)

    def entropy(self) -> Tensor:
        return torch.stack([part.entropy() for _, part in leaves(self.parts)]).sum(0)

    def mode(self) -> Tree:
        return tree_map(lambda part: part.mode(), self.parts)

    def sample(self, generator: torch.Generator | None = None) -> Tree:
        return tree_map(lambda part: part.sample(generator), self.parts)


class DistributionFamily:
    """The distributions over one action space: what a network must give for one, and what is made of it.

    Args:
        space: Discrete, Box, MultiDiscrete, MultiBinary, or a Dict or Tuple of these.
        squash: Whether Boxes get a `SquashedDiagGaussianDistribution`.

    Attributes:
        width: How many numbers a network must give for each state.
        n_dims: Dimensions of all Boxes; each has a standard deviation.
        n_choices: Length of a mask: the values of all Discrete and MultiDiscrete parts in a row.
    """

    def __init__(self, space: spaces.Space[Any], squash: bool = False) -> None:
        self._tree = space_tree(space)
        self._squash = squash
        self._is_combined = isinstance(space, (spaces.Dict, spaces.Tuple))
        self._is_choice = isinstance(space, spaces.Discrete)
        self._shape = tuple(space.shape or ())
        parts = [part for _, part in leaves(self._tree)]
        self.n_dims = sum(_size(part) for part in parts if isinstance(part, spaces.Box))
        self.n_choices = n_choices(space)
        self.width = self.n_dims + self.n_choices + sum(_size(p) for p in parts if isinstance(p, spaces.MultiBinary))

    def __call__(self, parameters: Tensor, log_std: Tensor | None = None, mask: Tensor | None = None) -> Distribution:
        """The distributions that a network describes.

        Args:
            parameters: (B, width).
            log_std: (n_dims,), where there are Boxes.
            mask: Which choices are allowed, (B, n_choices) bool; None allows all.
        """
        if not self._is_combined:
            return self._make(self._tree, parameters, log_std, mask)
        used = used_dims = used_choices = 0

        def make(part: spaces.Space[Any]) -> Distribution:
            nonlocal used, used_dims, used_choices
            choices, dims = n_choices(part), _size(part) if isinstance(part, spaces.Box) else 0
            width = choices or _size(part)
            made = self._make(
                part,
                parameters[:, used : used + width],
                None if log_std is None else log_std[used_dims : used_dims + dims],
                None if mask is None else mask[:, used_choices : used_choices + choices],
            )
            used, used_dims, used_choices = used + width, used_dims + dims, used_choices + choices
            return made

        return CombinedDistribution(tree_map(make, self._tree))

    def flat(self, action: Tree) -> Tree:
        """Actions (B, *shape) as the distributions take them: (B,) of a Discrete, (B, d) of the others."""
        return tree_map(
            lambda part, leaf: leaf if isinstance(part, spaces.Discrete) else leaf.reshape(len(leaf), -1),
            self._tree,
            action,
        )

    def act(self, parameters: np.ndarray, deterministic: bool, generator: torch.Generator | None) -> np.ndarray | None:
        """`mode` or `sample`, (B,), of what a network gave without a mask; None for any space but Discrete."""
        if not self._is_choice:
            return None
        if not deterministic:
            # As `CategoricalDistribution.sample`, to the last bit.
            waiting = torch.empty_like(torch.from_numpy(parameters)).exponential_(generator=generator)
            parameters = parameters - waiting.log_().numpy()
        return parameters.argmax(-1)

    def to_numpy(self, action: Tree) -> Tree:
        """Actions of a distribution as arrays (B, *shape)."""
        if not self._is_combined:
            array: np.ndarray = action.cpu().numpy()
            return array if array.shape[1:] == self._shape else array.reshape(len(array), *self._shape)
        return tree_map(
            lambda part, leaf: leaf.cpu().numpy().reshape(len(leaf), *(part.shape or ())), self._tree, action
        )

    def _make(
        self, space: spaces.Space[Any], parameters: Tensor, log_std: Tensor | None, mask: Tensor | None
    ) -> Distribution:
        if isinstance(space, spaces.Discrete):
            return CategoricalDistribution(parameters, mask)
        if isinstance(space, spaces.MultiDiscrete):
            return MultiCategoricalDistribution(parameters, space.nvec.reshape(-1).tolist(), mask)
        if isinstance(space, spaces.MultiBinary):
            return BernoulliDistribution(parameters)
        assert log_std is not None
        if self._squash:
            return SquashedDiagGaussianDistribution(parameters, log_std)
        return DiagGaussianDistribution(parameters, log_std)


def _size(space: spaces.Space[Any]) -> int:
    return math.prod(space.shape or ())
