"""`Saveable`: a model's parameters and files, as the methods that users call.

What a file holds is in `checkpoint`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from sbac import checkpoint
from sbac.construction import argument_names
from sbac.envs import EnvironmentLike
from sbac.trainable import Trainable

PathLike = str | Path


class LoadsEitherWay:
    """``DDPG.load(path)`` returns a new model; ``model.load(path)`` loads into the model.

    Args:
        function: Of the class, the instance or None, and the arguments that a caller gives.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.__doc__ = function.__doc__

    def __get__(self, instance: Any, owner: type) -> Callable[..., Any]:
        """The function with the class, and the instance if there is one, for its first two arguments."""
        bound = functools.partial(self._function, owner, instance)
        return functools.update_wrapper(bound, self._function)


class Saveable:
    """What an algorithm has of parameters and files.

    Attributes:
        policy: The module with all weights.
    """

    policy: Any

    def get_parameters(self) -> dict[str, dict[str, Any]]:
        """The state of the policy and of each optimizer, by name, in the form of torch's `state_dict`.

        It is a copy, which stays as it is while the model learns on.
        """
        states: dict[str, dict[str, Any]] = {"policy": self.policy.state_dict()}
        for name, network in self._trained().items():
            states[f"{name}.optimizer"] = network.optimizer.state_dict()
        return copy.deepcopy(states)

    def set_parameters(
        self,
        load_path_or_dict: PathLike | Mapping[str, Mapping[str, Any]],
        exact_match: bool = True,
        device: torch.device | str = "auto",
    ) -> None:
        """Take over parameters, by copy.

        Args:
            load_path_or_dict: A model file, or what `get_parameters` returned.
            exact_match: Whether every state must be there, with every name in it.
            device: Accepted for scripts written for Stable-Baselines; parameters go where the model is.

        Raises:
            ValueError: Names are unknown or, with `exact_match`, missing, or shapes differ. Nothing is changed then.
        """
        if isinstance(load_path_or_dict, Mapping):
            given: Mapping[str, Mapping[str, Any]] = load_path_or_dict
        else:
            given = type(self).load(load_path_or_dict).get_parameters()
        own = {"policy", *(f"{name}.optimizer" for name in self._trained())}
        unknown, missing = sorted(set(given) - own), sorted(own - set(given))
        if unknown or (exact_match and missing):
            raise ValueError(f"set_parameters: unknown {unknown}, missing {missing}; known: {sorted(own)}")
        if "policy" in given:
            checkpoint.load_policy(self.policy, given["policy"], exact_match)
        for name, network in self._trained().items():
            if f"{name}.optimizer" in given:
                # torch would go on in the very tensors that it is given.
                network.optimizer.load_state_dict(copy.deepcopy(dict(given[f"{name}.optimizer"])))

    def _trained(self) -> dict[str, Trainable]:
        """The networks that have an optimizer."""
        networks = {"policy": self.policy, **dict(self.policy.named_children())}
        return {name: network for name, network in networks.items() if hasattr(network, "optimizer")}

    def save(
        self,
        path: PathLike | BinaryIO,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
        full: bool = False,
    ) -> None:
        """Write the model to a file, atomically: either the whole file is there, or the one from before.

        Args:
            path: Where to; ".zip" is appended where there is no suffix. Or an open binary file.
            exclude: Parts to leave out, of those that a file can hold: "optimizer", "generators", "episodes", "noise",
                "replay_buffer", "rollout_buffer", "workers", "run".
            include: Parts to add to those of a plain file (which holds the policy and its optimizer).
            full: Hold all that resuming needs, the replay buffer included.

        Raises:
            ArchiveError: The file cannot be written.
            ValueError: An unknown part.
        """
        checkpoint.save(self, path, exclude, include, full)

    @LoadsEitherWay
    def load(
        cls: Any,
        instance: Any,
        path: PathLike | BinaryIO,
        env: EnvironmentLike | None = None,
        device: torch.device | str = "auto",
        custom_objects: Mapping[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        allow_pickle: bool = False,
        vecnormalize: PathLike | None = None,
        **kwargs: Any,
    ) -> Any:
        """Read a model from a file. On the class: a new model. On a model: into that model, which is returned.

        Args:
            path: A file written by `save`, or by Stable-Baselines3; ".zip" may be left out.
            env: Environments to go on learning in, with the model's spaces. Not needed for `predict`.
            device: Where the networks go.
            custom_objects: Values in place of the file's, by argument; for what the file cannot hold as data.
            print_system_info: Print what the file was written with.
            force_reset: Accepted for scripts written for Stable-Baselines; learning begins with new episodes.
            allow_pickle: Unpickle a user's own objects in the file. Only for files that you trust: it runs code.
            vecnormalize: What ``VecNormalize.save`` wrote beside a Stable-Baselines3 file: its statistics become the
                model's own.
            **kwargs: Constructor arguments in place of the file's.

        Raises:
            ArchiveError: The file is damaged, foreign, or holds another algorithm.
            FileNotFoundError: There is no such file.
            ValueError: The environment's spaces are not the model's.
        """
        if instance is not None and env is None:
            env = instance.env
        # Stable-Baselines' habit is to pass custom objects of all its algorithms at once.
        known = argument_names(cls)
        overrides = {**{k: v for k, v in (custom_objects or {}).items() if k in known}, **kwargs}
        model = checkpoint.load(cls, path, env, device, overrides, allow_pickle, print_system_info, vecnormalize)
        if instance is None:
            return model
        model._outputs = instance._outputs  # the log goes on where it went
        vars(instance).update(vars(model))
        return instance

    def save_replay_buffer(self, path: PathLike | BinaryIO) -> None:
        """Write the replay buffer alone to a file.

        Raises:
            ValueError: The algorithm has none.
        """
        checkpoint.save_buffer(self, path)

    def load_replay_buffer(self, path: PathLike | BinaryIO, truncate_last_traj: bool = True) -> None:
        """Replace the replay buffer's content by that of a file.

        Args:
            path: Written by `save_replay_buffer`.
            truncate_last_traj: Accepted for scripts written for Stable-Baselines; whole transitions are stored, so
                that there is no unfinished trajectory to cut.

        Raises:
            ArchiveError: The file is damaged or foreign.
            ValueError: It was made for other spaces or a larger buffer. The buffer is as before.
        """
        checkpoint.load_buffer(self, path)
