"""Environments that worker processes make for themselves: what their parent knows, and how successors go on in them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import gymnasium
import numpy as np
import torch
from gymnasium.envs.registration import EnvCreator, EnvSpec, load_env_creator

from sbac.codec import decode, encode
from sbac.envs import EnvironmentLike, Environments, make_environments
from sbac.observations import split_mask
from sbac.tape import Recording
from sbac.trees import copy_tree, leaves, space_tree, tree_like


class RemoteEnvironments:
    """What can be sent to workers. Stands where other algorithms keep their environments.

    Args:
        env: An id, or a function that makes an environment; closures are fine.
        n_envs: How many each worker makes, at least 1.

    Attributes:
        factory: Makes one environment.
        num_envs: How many each worker makes.
        observation_space: Of one environment.
        action_space: Of one environment, in its own units.
        env_id: The Gymnasium id, where there is one.
        env: None: there is no environment in this process.
        reset_count: 0: nobody else can reset the workers' environments.

    Raises:
        ValueError: A live environment, an unknown id, or `n_envs` below 1.
        TypeError: `env` is neither an id nor a function.
    """

    env = None
    reset_count = 0

    def __init__(self, env: EnvironmentLike, n_envs: int) -> None:
        if not isinstance(env, type) and (hasattr(env, "step") or hasattr(env, "step_async")):
            raise ValueError(
                f"A3C's workers are processes of their own, and a live environment ({type(env).__qualname__}) cannot "
                "be sent to them: pass its id, or a function that makes one, such as lambda: MyEnv()"
            )
        if not (isinstance(env, str) or callable(env)):
            raise TypeError(
                f"env must be an id or a function that makes an environment, which each worker calls, not {env!r}"
            )
        # One is made to see its spaces, so that what is wrong with it shows here and not in the workers.
        probe = make_environments(env, 1)
        self.observation_space, self.action_space = probe.observation_space, probe.action_space
        self.env_id = probe.env_id
        spec = probe.env.unwrapped.envs[0].env.spec if isinstance(env, str) else None  # behind what watches it
        probe.close()
        if isinstance(n_envs, bool) or not isinstance(n_envs, int) or n_envs < 1:
            raise ValueError(f"n_envs must be a whole number, at least 1, not {n_envs!r}")
        self.num_envs = n_envs
        self.factory: Callable[[], gymnasium.Env[Any, Any]] = env if spec is None else _by_spec(spec)

    def close(self) -> None:
        """There is nothing to close: workers close their own."""


def _by_spec(spec: EnvSpec) -> Callable[[], gymnasium.Env[Any, Any]]:
    """A function that makes the environment also where its id is not registered."""
    if isinstance(spec.entry_point, str) and spec.entry_point.startswith("__main__:"):
        # A worker has another main module; what this one defines is sent by value.
        spec = dataclasses.replace(spec, entry_point=cast(EnvCreator, load_env_creator(spec.entry_point)))
    return partial(gymnasium.make, spec)


def worker_state(model: Any, env: Environments) -> dict[str, np.ndarray]:
    """What a worker's successor needs to go on where it is between two rollouts: arrays by name."""
    obs, _ = split_mask(model._obs, model.observation_space, 0)
    recordings = env.recordings()
    starts = [None if one is None else {"random_state": one.random_state, "seed": one.seed} for one in recordings]
    return {
        "act_generator": model._act_generator.get_state().numpy(),
        "update_generator": torch.get_rng_state().numpy(),
        "return": model.episodes.running_return.copy(),
        "length": model.episodes.running_length.copy(),
        "starts": np.frombuffer(json.dumps(encode(starts)[0]).encode(), np.uint8),
        **dict(leaves(copy_tree(obs), "obs")),
        **{f"policy/{name}": array for name, array in model.policy.get_running_state().items()},
        **{f"actions/{i}": one.actions for i, one in enumerate(recordings) if one is not None},
    }


def go_on(model: Any, env: Environments, state: Mapping[str, np.ndarray]) -> None:
    """Begin a worker where another one left `state`. An environment that cannot be put back begins a new episode."""
    model._act_generator.set_state(torch.as_tensor(state["act_generator"]))
    torch.set_rng_state(torch.as_tensor(state["update_generator"]))
    model.episodes.running_return = np.array(state["return"])
    model.episodes.running_length = np.array(state["length"])
    model.policy.set_running_state({name[7:]: array for name, array in state.items() if name.startswith("policy/")})
    recordings = [
        None if start is None else Recording(**start, actions=state[f"actions/{i}"])
        for i, start in enumerate(decode(json.loads(bytes(state["starts"]))))
    ]
    obs = tree_like(space_tree(model.observation_space), dict(state), "obs")
    model._obs, failed = env.put_back(recordings, obs, model.episodes.running_return, model._env_seed)
    if failed:
        model._cut_episodes(sorted(failed))
