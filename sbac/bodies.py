"""What policies are built from, as their arguments name it: hidden layers, bodies, and which policy fits a space."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import nn

from sbac.networks import BaseFeaturesExtractor, NatureCNN, default_extractor, fits_nature_cnn
from sbac.preprocessing import Preprocessor, is_image_space, obs_to_tensor, preprocess
from sbac.trees import space_tree, tree_map

NetArch = Sequence[int] | Mapping[str, Sequence[int]]
"""Units of the hidden layers: one list for both networks, or a dict with a list for each."""


def split_net_arch(net_arch: NetArch, names: tuple[str, str]) -> tuple[list[int], list[int]]:
    """The hidden layers of actor and critic.

    Args:
        net_arch: One list for both, or a dict with the two `names`.
        names: Such as ``("pi", "vf")``.

    Raises:
        ValueError: A dict with other keys, or units that are no positive whole numbers.
    """
    if isinstance(net_arch, Mapping):
        if set(net_arch) != set(names):
            raise ValueError(
                f"policy_kwargs: net_arch needs the keys {names[0]!r} and {names[1]!r}, not {sorted(net_arch)}"
            )
        archs = (net_arch[names[0]], net_arch[names[1]])
    else:
        archs = (net_arch, net_arch)
    if isinstance(net_arch, Sequence) and any(isinstance(entry, Mapping) for entry in net_arch):
        raise ValueError(
            "policy_kwargs: net_arch with a dict inside a list is the form of older Stable-Baselines; write "
            f"net_arch=dict({names[0]}=[64, 64], {names[1]}=[64, 64]) with all layers of each network, not {net_arch!r}"
        )
    if not all(_is_arch(arch) for arch in archs):
        raise ValueError(
            f"policy_kwargs: net_arch lists the units of each hidden layer as positive whole numbers, not {net_arch!r}"
        )
    return [int(n) for n in archs[0]], [int(n) for n in archs[1]]


def _is_arch(arch: object) -> bool:
    return (
        isinstance(arch, Sequence)
        and not isinstance(arch, str)
        and all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n > 0 for n in arch)
    )


def check_module_class(name: str, value: object, example: str) -> None:
    """Refuse an argument of a policy that is no class of layers.

    Raises:
        ValueError: Naming the argument and what was received.
    """
    if not (isinstance(value, type) and issubclass(value, nn.Module)):
        raise ValueError(
            f"policy_kwargs: {name} must be a subclass of torch.nn.Module, such as {example}, and not a function or a "
            f"name; it is {value!r}"
        )


Body = type[nn.Module] | nn.Module
"""A class of bodies, such as `BaseFeaturesExtractor`, or a module of which each network gets a copy."""


def make_extractor(
    observation_space: spaces.Space[Any],
    features_extractor_class: Body | Mapping[str, Body] | None,
    features_extractor_kwargs: Mapping[str, Any] | None,
    network: str,
) -> BaseFeaturesExtractor:
    """The body that was asked for, or the one for the space.

    Args:
        observation_space: As the bodies get observations.
        features_extractor_class: For all networks, or one for each by its name; None takes that for the space.
        features_extractor_kwargs: Arguments of a class, after the space.
        network: The name of the network: "pi", "vf", "qf".

    Returns:
        A module that states how many features it gives, as `features_dim`; one that does not is asked.

    Raises:
        ValueError: What was asked for is no module, cannot read observations, or does not take its arguments.
    """
    asked: Any = features_extractor_class
    if isinstance(asked, Mapping):
        if network not in asked:
            raise ValueError(
                f"policy_kwargs: features_extractor_class has no body for {network!r} among {sorted(asked)}"
            )
        asked = asked[network]
    if asked is None:
        asked = default_extractor(observation_space)
    if not (features_extractor_kwargs is None or isinstance(features_extractor_kwargs, Mapping)):
        raise ValueError(
            "policy_kwargs: features_extractor_kwargs must be a dict of the extractor's arguments, "
            f"not {features_extractor_kwargs!r}"
        )
    if isinstance(asked, nn.Module):
        body: Any = copy.deepcopy(asked)
    else:
        check_module_class("features_extractor_class", asked, "a subclass of BaseFeaturesExtractor")
        arguments = dict(features_extractor_kwargs or {})
        try:
            body = asked(observation_space, **arguments)
        except TypeError as error:
            raise ValueError(
                f"policy_kwargs: features_extractor_class {asked.__name__}, called with the observation space and "
                f"features_extractor_kwargs {arguments}: {error}"
            ) from error
    if not hasattr(body, "features_dim"):
        body.features_dim = _count_features(body, observation_space)
    return body


@torch.no_grad()
def _count_features(body: nn.Module, observation_space: spaces.Space[Any]) -> int:
    zeros = tree_map(lambda leaf: np.zeros((1, *leaf.shape), leaf.dtype) + _least(leaf), space_tree(observation_space))
    mode = body.training
    body.eval()
    try:
        features = body(preprocess(obs_to_tensor(zeros, torch.device("cpu")), observation_space))
    except Exception as error:
        raise ValueError(f"policy_kwargs: the body {body} cannot read {observation_space}: {error}") from error
    body.train(mode)
    if features.ndim != 2:
        raise ValueError(f"policy_kwargs: the body {body} must return (B, features), not {tuple(features.shape)}")
    return features.shape[1]


def _least(space: spaces.Space[Any]) -> Any:
    return space.start if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)) else 0


def image_extractor(
    observation_space: spaces.Space[Any], features_extractor_class: Body | Mapping[str, Body] | None
) -> Body | Mapping[str, Body]:
    """The body that was asked for, or `NatureCNN`.

    Raises:
        ValueError: The observations are not one image.
    """
    if isinstance(observation_space, (spaces.Dict, spaces.Tuple)):
        raise ValueError(f"CnnPolicy reads one image, not {observation_space}; MultiInputPolicy reads Dict and Tuple")
    if not (isinstance(observation_space, spaces.Box) and len(observation_space.shape) == 3):
        raise ValueError(f"CnnPolicy reads images, Boxes of three dimensions, not {observation_space}; use MlpPolicy")
    return features_extractor_class or NatureCNN


def choose_policy(observation_space: spaces.Space[Any]) -> tuple[str, str]:
    """The name of the policy that "auto" stands for, and why."""
    if isinstance(observation_space, (spaces.Dict, spaces.Tuple)):
        return "MultiInputPolicy", f"observations are a {type(observation_space).__name__}"
    if not is_image_space(observation_space):
        return "MlpPolicy", f"observations are no images but {observation_space}"
    if fits_nature_cnn(Preprocessor(observation_space).space):
        return "CnnPolicy", "observations are images"
    return "MlpPolicy", f"images of shape {observation_space.shape} are too small for CnnPolicy"
