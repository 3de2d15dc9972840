"""Tuned hyperparameters as data: one TOML file an algorithm, one table an environment.

A table holds constructor arguments by name; `n_timesteps` is how long to train. Read by `sbac train` and by
`load_recipe`.
"""

from __future__ import annotations

import tomllib
from importlib import resources
from typing import Any

import gymnasium
from gymnasium.envs.registration import find_highest_version, get_env_id, parse_env_id
from torch import nn

from sbac.guards import nearest
from sbac.noise import noise_from_config
from sbac.schedules import parse_schedule


def load_recipe(algorithm: str, env_id: str) -> dict[str, Any]:
    """The tuned arguments for an environment.

    Args:
        algorithm: Such as "ddpg".
        env_id: Such as "Pendulum-v1"; "Pendulum" is its newest version.

    Returns:
        Constructor arguments by name, and ``n_timesteps``; empty where there is no recipe.
    """
    return {name: read_value(name, value) for name, value in read_recipe(algorithm, env_id).items()}


def read_recipe(algorithm: str, env_id: str) -> dict[str, Any]:
    """As `load_recipe`, but as data: with tables where it has schedules and noises."""
    file = resources.files(__name__) / f"{algorithm.lower()}.toml"
    if not file.is_file():
        return {}
    recipe: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8")).get(registered_id(env_id), {})
    return recipe


def registered_id(env_id: str) -> str:
    """The id that Gymnasium resolves one without a version to; any other id as it is."""
    module, colon, registered = env_id.rpartition(":")
    if registered in gymnasium.registry:
        return env_id
    try:
        namespace, name, version = parse_env_id(registered)
    except gymnasium.error.Error:
        return env_id
    newest = find_highest_version(namespace, name) if version is None else None
    return env_id if newest is None else f"{module}{colon}{get_env_id(namespace, name, newest)}"


def read_value(name: str, value: Any) -> Any:
    """A constructor argument from the form that data can hold.

    Args:
        name: Of the argument.
        value: From TOML. A string such as "lin_0.001" is a schedule, a table for `action_noise` a noise with its
            ``kind`` (mean 0 unless it says more), ``activation_fn`` in `policy_kwargs` the name of a class in
            `torch.nn`; all else stands for itself.

    Raises:
        ValueError: The value names a schedule, a noise or an activation, but wrongly.
    """
    if name == "action_noise" and isinstance(value, dict):
        return noise_from_config({"mean": 0.0, **value})
    if name == "policy_kwargs" and isinstance(value, dict) and isinstance(value.get("activation_fn"), str):
        return {**value, "activation_fn": _activation(value["activation_fn"])}
    if isinstance(value, str) and (value.startswith("lin_") or value.endswith(")")):
        return parse_schedule(value)
    return value


def _activation(name: str) -> type[nn.Module]:
    known = {key: found for key, found in vars(nn.modules.activation).items() if isinstance(found, type)}
    if name not in known or not issubclass(known[name], nn.Module):
        raise ValueError(f"policy_kwargs: activation_fn {name!r} is no class of torch.nn{nearest(name, known)}")
    return known[name]
