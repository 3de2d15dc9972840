"""Bodies, the layers of perceptrons, and initialisations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor, nn

from sbac.convolution import Chain, Convolutions
from sbac.look import is_hooked
from sbac.perceptron import Perceptron
from sbac.preprocessing import flat_dim, is_image_space
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

    def extra_repr(self) -> str:
        return f"features_dim={self.features_dim}"


class FlattenExtractor(BaseFeaturesExtractor):
    """Lays each observation flat, as `preprocess` gives it.

    Args:
        observation_space: Of the observations.
    """

    def __init__(self, observation_space: spaces.Space[Any]) -> None:
        super().__init__(observation_space, flat_dim(observation_space))

    def forward(self, obs: Tensor) -> Tensor:
        """From (B, *obs_shape), one-hot where Discrete or MultiDiscrete, to (B, features_dim)."""
        return obs.reshape(len(obs), self.features_dim)


class NatureCNN(BaseFeaturesExtractor):
    """Three convolutions and one linear layer (Mnih et al. 2015, "Human-level control", Nature 518).

    Args:
        observation_space: A Box of three dimensions, channels first, of at least 36 x 36 pixels.
        features_dim: How many features `forward` returns for each image.

    Raises:
        ValueError: The space is no such Box.
    """

    def __init__(self, observation_space: spaces.Space[Any], features_dim: int = 512) -> None:
        super().__init__(observation_space, features_dim)
        if not fits_nature_cnn(observation_space):
            raise ValueError(
                f"NatureCNN reads images of at least {SMALLEST_IMAGE} x {SMALLEST_IMAGE} pixels, channels first, not "
                f"{observation_space}; MlpPolicy reads any Box, and gymnasium.wrappers.ResizeObservation makes images "
                "larger"
            )
        n_channels, height, width = observation_space.shape or ()
        self.cnn = nn.Sequential(
            nn.Conv2d(n_channels, 32, kernel_size=8, stride=4),
            nn.ReLU(),
            nn.Conv2d(32, 64, kernel_size=4, stride=2),
            nn.ReLU(),
            nn.Conv2d(64, 64, kernel_size=3, stride=1),
            nn.ReLU(),
            nn.Flatten(),
        )
        n_flat = 64 * after_convolutions(height) * after_convolutions(width)
        self.linear = nn.Sequential(nn.Linear(n_flat, features_dim), nn.ReLU())
        self._cnn, self._linear = Convolutions(self, "cnn"), Perceptron(self, "linear")

    def forward(self, obs: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, features_dim)."""
        if torch.is_grad_enabled():
            obs = _for_both_ways(obs)
        return self.linear(self.cnn(obs))

    def trace(self, obs: Tensor) -> Chain | None:
        """As `forward`, with the way back written out; None where it is left to autograd."""
        below = None if type(self) is not NatureCNN or is_hooked(self) else self._cnn.trace(_for_both_ways(obs))
        above = None if below is None else self._linear.trace(below.output)
        return None if below is None or above is None else Chain(below, above)


def _for_both_ways(images: Tensor) -> Tensor:
    """There and back, convolutions take a quarter less time where a pixel's channels lie side by side."""
    return images.contiguous(memory_format=torch.channels_last) if images.device.type == "cpu" else images


SMALLEST_IMAGE = 36
"""Pixels of a side, below which nothing is left after the convolutions of `NatureCNN`."""


def after_convolutions(side: int) -> int:
    """What the convolutions of `NatureCNN` leave of a side of an image, in pixels."""
    for kernel, stride in ((8, 4), (4, 2), (3, 1)):
        side = (side - kernel) // stride + 1
    return side


def fits_nature_cnn(space: spaces.Space[Any]) -> bool:
    """Whether `NatureCNN` can read a space: a Box of three dimensions, the last two of at least 36."""
    return isinstance(space, spaces.Box) and len(space.shape) == 3 and min(space.shape[1:]) >= SMALLEST_IMAGE


class CombinedExtractor(BaseFeaturesExtractor):
    """A tree of observations (Dict or Tuple), one body for each leaf, joined.

    Images go through a `NatureCNN` each, if they are large enough for it, and everything else is laid flat.

    Args:
        observation_space: Of one environment.
        cnn_output_dim: Features of each image.
    """

    def __init__(self, observation_space: spaces.Space[Any], cnn_output_dim: int = 256) -> None:
        bodies: list[BaseFeaturesExtractor] = []
        for _, leaf in leaves(space_tree(observation_space)):
            is_picture = is_image_space(leaf) and fits_nature_cnn(leaf)
            bodies.append(NatureCNN(leaf, cnn_output_dim) if is_picture else FlattenExtractor(leaf))
        super().__init__(observation_space, sum(body.features_dim for body in bodies))
        self.bodies = nn.ModuleList(bodies)

    def forward(self, obs: Tree) -> Tensor:
        """From a tree of (B, *leaf_shape) to (B, features_dim)."""
        return torch.cat([body(leaf) for body, (_, leaf) in zip(self.bodies, leaves(obs), strict=True)], dim=1)


def default_extractor(observation_space: spaces.Space[Any]) -> type[BaseFeaturesExtractor]:
    """The body that reads a space where none was asked for."""
    is_tree = isinstance(observation_space, (spaces.Dict, spaces.Tuple))
    return CombinedExtractor if is_tree else FlattenExtractor


def has_nothing_to_learn(extractor: nn.Module) -> bool:
    """Whether a body only lays observations flat."""
    if type(extractor) is CombinedExtractor:
        return all(type(body) is FlattenExtractor for body in extractor.bodies)
    return type(extractor) is FlattenExtractor


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
def init_uniform(layer: nn.Module, bound: float) -> None:
    """Weights and biases uniform in +-bound."""
    for parameter in layer.parameters():
        parameter.uniform_(-bound, bound)


def describe(network: nn.Module) -> str:
    """The layers of a network, one a line: where each stands, what it is, and how many parameters it has."""
    rows = []
    for path, layer in network.named_modules():
        if next(layer.children(), None) is None and path:
            size = sum(parameter.numel() for parameter in layer.parameters())
            rows.append((path, str(layer), f"{size:,}"))
    loose = [(name, f"Parameter{tuple(p.shape)}", f"{p.numel():,}") for name, p in network.named_parameters("", False)]
    rows = [*rows, *loose, ("total", "", f"{sum(parameter.numel() for parameter in network.parameters()):,}")]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(f"{path:<{widths[0]}}  {layer:<{widths[1]}}  {size:>{widths[2]}}" for path, layer, size in rows)
