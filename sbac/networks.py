"""Bodies, heads and initialisations: from an observation to features, and from features to numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor, nn

from sbac.trees import Tree, leaves, space_tree


class BaseFeaturesExtractor(nn.Module):
    """A body that turns a batch of observations into features.

    Args:
        observation_space: Of one environment.
        features_dim: How many features `forward` returns for each observation.
    """

    def __init__(self, observation_space: spaces.Space[Any], features_dim: int) -> None:
        super().__init__()
        self.observation_space = observation_space
        self.features_dim = features_dim


class FlattenExtractor(BaseFeaturesExtractor):
    """A Box laid flat, or a Discrete observation as one-hot."""

    def __init__(self, observation_space: spaces.Space[Any]) -> None:
        if isinstance(observation_space, spaces.Discrete):
            super().__init__(observation_space, int(observation_space.n))
            self.start: int | None = int(observation_space.start)
        else:
            super().__init__(observation_space, math.prod(observation_space.shape or ()))
            self.start = None

    def forward(self, obs: Tensor) -> Tensor:
        """From (B, *obs_shape) to (B, features_dim), as float32."""
        if self.start is not None:
            return nn.functional.one_hot(obs.long() - self.start, self.features_dim).float()
        return obs.reshape(len(obs), self.features_dim).float()


class CombinedExtractor(BaseFeaturesExtractor):
    """A tree of observations (Dict or Tuple), each leaf as `FlattenExtractor` reads it, joined."""

    def __init__(self, observation_space: spaces.Space[Any]) -> None:
        bodies = [FlattenExtractor(leaf) for _, leaf in leaves(space_tree(observation_space))]
        super().__init__(observation_space, sum(body.features_dim for body in bodies))
        self.bodies = nn.ModuleList(bodies)

    def forward(self, obs: Tree) -> Tensor:
        """From a tree of (B, *leaf_shape) to (B, features_dim), as float32."""
        return torch.cat([body(leaf) for body, (_, leaf) in zip(self.bodies, leaves(obs), strict=True)], dim=1)


def default_extractor(observation_space: spaces.Space[Any]) -> type[BaseFeaturesExtractor]:
    """The body that reads a space where none was asked for."""
    is_tree = isinstance(observation_space, (spaces.Dict, spaces.Tuple))
    return CombinedExtractor if is_tree else FlattenExtractor


def create_mlp(
    input_dim: int,
    output_dim: int,
    net_arch: Sequence[int],
    activation_fn: type[nn.Module] = nn.ReLU,
    layer_norm: bool = False,
    dropout: float = 0.0,
) -> list[nn.Module]:
    """The layers of a perceptron, for `nn.Sequential`.

    Args:
        input_dim: Number of inputs.
        output_dim: Number of outputs; 0 leaves the last layer out, so that a head can be put on.
        net_arch: Units of each hidden layer.
        activation_fn: After each hidden layer.
        layer_norm: Whether to normalise before each activation (Ba et al. 2016, arXiv:1607.06450).
        dropout: Share of each hidden layer's units that training leaves out, in [0, 1), before the normalisation
            (Hiraoka et al. 2022, arXiv:2110.02034).

    Returns:
        Linear layers and activations in turn.
    """
    layers: list[nn.Module] = []
    for units in net_arch:
        layers.append(nn.Linear(input_dim, units))
        if dropout > 0:
            layers.append(nn.Dropout(dropout))
        if layer_norm:
            layers.append(nn.LayerNorm(units))
        layers.append(activation_fn())
        input_dim = units
    if output_dim > 0:
        layers.append(nn.Linear(input_dim, output_dim))
    return layers


@torch.no_grad()
def init_orthogonal(module: nn.Module, gain: float) -> None:
    """Orthogonal weights and zero biases (Saxe et al. 2014) for each linear and convolutional layer of a module."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.orthogonal_(layer.weight, gain=gain)
            if layer.bias is not None:
                layer.bias.zero_()


@torch.no_grad()
def init_fan_in(module: nn.Module) -> None:
    """Weights and biases uniform in +-1/sqrt(f), f the number of a layer's inputs (Lillicrap et al. 2015, section 7).

    The fan-in of a torch layer is the second dimension of its weight, not the first.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            init_uniform(layer, 1 / math.sqrt(layer.in_features))


@torch.no_grad()
def init_uniform(layer: nn.Linear, bound: float) -> None:
    """Weights and biases uniform in +-bound."""
    layer.weight.uniform_(-bound, bound)
    layer.bias.uniform_(-bound, bound)
