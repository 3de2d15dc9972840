"""Model files of Stable-Baselines3, and its VecNormalize statistics, as what a model file of sbac holds.

Nothing in such a file is executed: its pickles are read as data (`pickles.py`), its tensors with ``weights_only``. What
has no form here is refused by name, where the model would act otherwise without it, or left out with a remark.
"""

from __future__ import annotations

import base64
import inspect
import json
import math
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from sbac.archive import FORMAT_VERSION, Archive, ArchiveError, Source, find_file
from sbac.codec import decode, encode
from sbac.noise import ActionNoise, NormalActionNoise, OrnsteinUhlenbeckActionNoise
from sbac.observations import MASK
from sbac.optimization import RMSpropTFLike
from sbac.pickles import Made, Name, describe, read_pickle, restore, state_of
from sbac.preprocessing import has_channels_last, is_image_space
from sbac.sb3_file import Members, is_stable_baselines
from sbac.sb3_statistics import read_vecnormalize
from sbac.sb3_weights import CNN, COMBINED, FLATTEN, PolicyWeights
from sbac.schedules import LinearSchedule, Schedule
from sbac.trees import leaves, space_tree

_COMMON = "stable_baselines3.common"
_STOCHASTIC = {
    f"{_COMMON}.policies.ActorCriticPolicy": FLATTEN,
    f"{_COMMON}.policies.ActorCriticCnnPolicy": CNN,
    f"{_COMMON}.policies.MultiInputActorCriticPolicy": COMBINED,
}
_DETERMINISTIC = {
    "stable_baselines3.td3.policies.TD3Policy": FLATTEN,
    "stable_baselines3.td3.policies.CnnPolicy": CNN,
    "stable_baselines3.td3.policies.MultiInputPolicy": COMBINED,
}
_EXTRACTORS = {f"{_COMMON}.torch_layers.{name}": name for name in (FLATTEN, CNN, COMBINED)}
_POLICIES = {FLATTEN: "MlpPolicy", CNN: "CnnPolicy", COMBINED: "MultiInputPolicy"}
_BUFFERS = {f"{_COMMON}.buffers.{kind}Buffer" for kind in ("Replay", "DictReplay", "Rollout", "DictRollout")}
_N_STEP_BUFFER = f"{_COMMON}.buffers.NStepReplayBuffer"  # which n_steps above 1 asks for
_FIRST_RATE = {"A2C": 7e-4, "DDPG": 1e-3, "TD3": 1e-3}  # where a schedule cannot be read
_OF_SDE = ("use_sde", "full_std", "use_expln", "squash_output")
# Of an optimizer's group: what the constructor does not take, and how it computes rather than what.
_NOT_ARGUMENTS = {"params", "lr", "initial_lr", "foreach", "fused", "capturable", "differentiable"}
_NOT_ARGUMENTS |= {"maximize", "decoupled_weight_decay"}
_MAX_DATA = 2**26  # bytes of the JSON
_MAX_ENVIRONMENTS = 2**16


def read_stable_baselines(path: Source, vecnormalize: str | Path | None = None) -> tuple[Archive, list[str]]:
    """Read a model file of Stable-Baselines3 as one of sbac. Executes nothing from it.

    Args:
        path: The file, with or without its .zip; or a binary file open for reading that can seek.
        vecnormalize: What ``VecNormalize.save`` wrote beside it, or None.

    Returns:
        The content, and what is to be said of it: what was left out, and what is taken instead.

    Raises:
        ArchiveError: A file is damaged or hostile, or the model has something that sbac has not; names it.
        FileNotFoundError: There is no such file.
    """
    source = find_file(Path(path)) if isinstance(path, (str, os.PathLike)) else path
    label = str(getattr(source, "name", "the given file")) if not isinstance(source, Path) else str(source)
    if not is_stable_baselines(source):
        raise ArchiveError(f"{label} is no file of Stable-Baselines3, or is damaged")
    try:
        with zipfile.ZipFile(source) as file:
            model = _Model(Members(file))
            model.convert()
    except Exception as error:  # damage surfaces as errors of zipfile, json and torch of all kinds
        raise ArchiveError(f"{label} (a Stable-Baselines3 file): {str(error) or type(error).__name__}") from error
    if vecnormalize is not None:
        gamma = model.arguments["gamma"]
        kwargs, arrays, remarks = read_vecnormalize(Path(vecnormalize), model.observation_space, gamma)
        model.arguments |= kwargs.pop("arguments")
        model.arguments["policy_kwargs"] |= kwargs
        model.arrays |= arrays
        model.remarks += remarks
    elif model.was_normalized:
        model.remarks.append(
            "the model was trained behind a VecNormalize, whose statistics are in a file of their own: without "
            "vecnormalize=..., it reads observations as they are"
        )
    return model.archive(), model.remarks


class _Model:
    """A model on its way from their file to ours."""

    def __init__(self, members: Members) -> None:
        self._members = members
        data = json.loads(members.read("data", _MAX_DATA))
        if not isinstance(data, dict):
            raise ValueError("data: it holds no object")
        self._data: dict[str, Any] = data
        self.remarks: list[str] = []
        self.arrays: dict[str, np.ndarray] = {}
        self.arguments: dict[str, Any] = {}

    def convert(self) -> None:
        """Fill `arguments` and `arrays`."""
        kind, extractor = self._policy_kind()
        if self._get("use_sde", False):
            raise ValueError("it explores with use_sde, state-dependent exploration, which sbac does not have")
        self.observation_space = self._space("observation_space")
        self.action_space = self._space("action_space")
        self._check_spaces()
        kwargs, extractor, shares_body = self._policy_kwargs(extractor)

        tensors = self._members.tensors("policy.pth")
        weights = PolicyWeights(tensors, self.observation_space, self.action_space, extractor)
        if kind == "A2C":
            weights.read_stochastic(shares_body)
            kwargs["share_features_extractor"] = shares_body
            kwargs["rescale_actions"] = False  # it acts in the environment's own units
        else:
            weights.read_deterministic()
            kwargs |= {"action_layer": 0, "final_init": None}
            if shares_body and extractor != FLATTEN:
                self.remarks.append(
                    "actor and critic share a body (share_features_extractor=True): here each has a copy, so that they "
                    "predict the same, and learn apart from now on"
                )
        kwargs["net_arch"] = weights.net_arch
        if weights.extractor_kwargs:
            kwargs["features_extractor_kwargs"] = weights.extractor_kwargs
        is_ddpg = weights.n_critics == 1 and self._get("policy_delay") == 1 and self._get("target_noise_clip") == 0
        self.kind = "DDPG" if kind == "TD3" and is_ddpg else kind
        self.arrays = weights.arrays()
        kwargs |= self._optimizers(weights)
        images = [leaf for _, leaf in leaves(space_tree(self.observation_space)) if is_image_space(leaf)]
        if any(has_channels_last(image) for image in images):
            kwargs["channels_last"] = False  # they were turned before they came into the file
        self.arguments = {"policy": _POLICIES[extractor], "policy_kwargs": kwargs} | self._hyperparameters(weights)
        # The others have such an observation without it too.
        self.was_normalized = self.kind == "A2C" and self._data.get("_last_original_obs") is not None
        self._meta = {
            "class": self.kind,
            "format_version": FORMAT_VERSION,
            "versions": {"stable-baselines3": self._members.text("_stable_baselines3_version")},
            "counters": {"num_timesteps": self._whole("num_timesteps", 0), "n_updates": self._whole("_n_updates", 0)},
        }

    def archive(self) -> Archive:
        """The content of a model file of sbac."""
        config, objects = encode(
            {
                "arguments": self.arguments,
                "observation_space": self.observation_space,
                "action_space": self.action_space,
                "env_id": None,
            }
        )
        assert not objects
        return Archive(meta=self._meta, config=config, arrays=self.arrays)

    # What the file says.

    def _get(self, name: str, default: Any = None) -> Any:
        """An entry: plain, or what its pickle describes."""
        value = self._data.get(name, default)
        if not (isinstance(value, dict) and ":serialized:" in value):
            return value
        try:
            return read_pickle(base64.b64decode(value[":serialized:"], validate=True))
        except (ValueError, TypeError) as error:
            raise ValueError(f"data: {name}: {error}") from error

    def _restore(self, name: str, node: Any) -> Any:
        try:
            return restore(node)
        except ValueError as error:
            raise ValueError(f"data: {name}: {error}") from error

    def _number(self, name: str, default: float | None = None) -> float:
        value = self._restore(name, self._get(name, default))
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
            raise ValueError(f"data: {name} is {describe(value)}, where a finite number belongs")
        return float(value)

    def _whole(self, name: str, default: int | None = None) -> int:
        value = self._number(name, default)
        if value != int(value):
            raise ValueError(f"data: {name} is {value}, where a whole number belongs")
        return int(value)

    def _policy_kind(self) -> tuple[str, str]:
        """The algorithm, DDPG counting as TD3, and the body's class."""
        policy = self._get("policy_class")
        if not isinstance(policy, Name):
            raise ValueError(f"its policy is {describe(policy)}, which sbac cannot read: train it anew")
        path = policy.path
        if path in _DETERMINISTIC and "policy_delay" in self._data:
            return "TD3", _DETERMINISTIC[path]
        of_others = {"n_epochs", "clip_range", "cg_max_steps"} & self._data.keys()  # PPO, TRPO
        if path in _STOCHASTIC and "normalize_advantage" in self._data and not of_others:
            return "A2C", _STOCHASTIC[path]
        why = f"it has {min(of_others)}" if of_others else f"its policy is {path}"
        raise ValueError(f"it holds a model of another algorithm ({why}): sbac reads those of A2C, DDPG and TD3")

    def _space(self, name: str) -> spaces.Space[Any]:
        space = self._restore(name, self._get(name))
        if not isinstance(space, spaces.Space):
            raise ValueError(f"data: {name} is {describe(space)}, where a space belongs")
        return space

    def _check_spaces(self) -> None:
        places = [("actions", self.action_space)]
        places += [(f"observations {name}".strip(), leaf) for name, leaf in leaves(space_tree(self.observation_space))]
        for name, space in places:
            if np.any(getattr(space, "start", 0)):
                raise ValueError(f"its {name} are {space}: Stable-Baselines3 counts from 0 wherever the space begins")
        if isinstance(self.action_space, spaces.Dict):
            raise ValueError(f"its actions are {self.action_space}, in which Stable-Baselines3 does not act")
        if isinstance(self.observation_space, spaces.Dict) and MASK in self.observation_space.spaces:
            raise ValueError(f"its observations have a part {MASK!r}, to which sbac would keep and it did not")

    def _policy_kwargs(self, extractor: str) -> tuple[dict[str, Any], str, bool]:
        """The arguments of the policy that are not read off the weights, the body's class, and whether it is shared."""
        given = self._get("policy_kwargs", {})
        if not isinstance(given, dict):
            raise ValueError(f"data: policy_kwargs is {describe(given)}")
        given = {key: value for key, value in given.items() if isinstance(key, str)}
        kwargs: dict[str, Any] = {}
        shares_body = "td3" not in str(getattr(self._get("policy_class"), "path", ""))
        for name, node in given.items():
            where = f"policy_kwargs: {name}"
            if name in ("net_arch", "n_critics", "optimizer_class", "optimizer_kwargs"):
                continue  # read off the weights and the optimizer
            if name == "activation_fn":
                kwargs[name] = self._torch_class(where, node)
            elif name == "features_extractor_class":
                path = node.path if isinstance(node, Name) else ""
                if path not in _EXTRACTORS:
                    raise ValueError(
                        f"its {name} is {describe(node)}, a body of the user's own, which cannot be converted"
                    )
                extractor = _EXTRACTORS[path]
            elif name == "features_extractor_kwargs":
                unknown = set(self._restore(where, node) or {}) - {"features_dim", "cnn_output_dim", "normalized_image"}
                if unknown:
                    raise ValueError(f"its {name} have {sorted(unknown)}, which sbac's bodies have not")
            elif name in _OF_SDE:
                continue  # without use_sde, which was looked at, they do nothing
            elif name in ("ortho_init", "normalize_images", "share_features_extractor"):
                if not isinstance(node, bool):
                    raise ValueError(f"{where} is {describe(node)}, where True or False belongs")
                if name == "share_features_extractor":
                    shares_body = node
                else:
                    kwargs[name] = node
            elif name == "log_std_init":
                kwargs[name] = float(self._restore(where, node))
            else:
                raise ValueError(f"its policy has an argument {name!r}, which sbac's has not")
        if "td3" in str(getattr(self._get("policy_class"), "path", "")):
            kwargs.pop("ortho_init", None)
        return kwargs, extractor, shares_body

    def _torch_class(self, where: str, node: Any) -> Any:
        try:
            if isinstance(node, Name) and node.path.startswith("torch."):
                return decode({"__class__": node.path})
        except (ValueError, ImportError):
            pass
        raise ValueError(f"{where} is {describe(node)}, which is none of torch's own and cannot be converted")

    # The optimizers.

    def _optimizers(self, weights: PolicyWeights) -> dict[str, Any]:
        """Take over what optimizers remember; returns their class and arguments."""
        policy_kwargs = self._get("policy_kwargs", {})
        node = policy_kwargs.get("optimizer_class") if isinstance(policy_kwargs, dict) else None
        if node is None:
            optimizer_class: Any = torch.optim.Adam
        elif isinstance(node, Name) and node.path == f"{_COMMON}.sb2_compat.rmsprop_tf_like.RMSpropTFLike":
            optimizer_class = RMSpropTFLike
        else:
            optimizer_class = self._torch_class("policy_kwargs: optimizer_class", node)
        self._rate: float | None = None
        arguments: dict[str, Any] = {}
        for network in weights.networks:
            if network.endswith("_target"):
                continue
            name = f"{network}.optimizer.pth"
            if name not in self._members.infos:
                self.remarks.append(f"there is no {name}: the optimizer of the {network} begins afresh")
                continue
            saved = self._members.tensors(name)
            try:
                group = saved["param_groups"][0]
                given = {key: value for key, value in group.items() if key not in _NOT_ARGUMENTS}
                rate = float(group["lr"])
                arrays = weights.optimizer_arrays(network, saved)
            except Exception as error:  # of whatever shape the content has
                raise ValueError(f"{name}: it is no state of an optimizer: {error!r}") from error
            known = inspect.signature(optimizer_class).parameters
            arguments = {key: value for key, value in given.items() if key in known}
            for key, value in given.items():
                if value and key not in known:
                    raise ValueError(f"{name}: {key} is {value!r}, which {optimizer_class.__name__} does not have here")
                numbers = value if isinstance(value, (tuple, list)) else [value]
                if not all(number is None or isinstance(number, (bool, int, float)) for number in numbers):
                    raise ValueError(f"{name}: {key} is {type(value).__name__}, where a number belongs")
            self._rate = rate if math.isfinite(rate) and rate > 0 else self._rate
            if arrays is None:
                self.remarks.append(
                    f"the optimizer of the {network} remembers something of some parameters only: it begins afresh"
                )
            self.arrays |= arrays or {}
        return {"optimizer_class": optimizer_class, "optimizer_kwargs": arguments}

    # Hyperparameters.

    def _hyperparameters(self, weights: PolicyWeights) -> dict[str, Any]:
        n_envs = self._whole("n_envs", 1)
        if not 0 < n_envs <= _MAX_ENVIRONMENTS:
            raise ValueError(f"data: n_envs is {n_envs}, where 1 to {_MAX_ENVIRONMENTS} belong")
        seed, folder = self._get("seed"), self._get("tensorboard_log")
        arguments: dict[str, Any] = {
            "gamma": self._number("gamma"),
            "n_envs": n_envs,
            "stats_window_size": self._whole("_stats_window_size", 100),
            "tensorboard_log": folder if isinstance(folder, str) else None,
            "verbose": int(self._whole("verbose", 0) > 0),
            "seed": None if seed is None else self._whole("seed"),
        }
        usual = _BUFFERS | {_N_STEP_BUFFER} if self._whole("n_steps", 1) > 1 else _BUFFERS
        for name in ("rollout_buffer_class", "replay_buffer_class"):
            node = self._get(name)
            if node is not None and not (isinstance(node, Name) and node.path in usual):
                self.remarks.append(f"{name} is {describe(node)}: sbac takes its usual buffer instead")
        rate = self._learning_rate()
        if self.kind == "A2C":
            arguments |= {name: self._number(name) for name in ("gae_lambda", "ent_coef", "vf_coef", "max_grad_norm")}
            arguments["normalize_advantage"] = self._get("normalize_advantage") is True
            return arguments | {"learning_rate": rate, "n_steps": self._whole("n_steps")}
        arguments |= {name: self._whole(name) for name in ("buffer_size", "learning_starts", "batch_size")}
        arguments |= {
            "actor_learning_rate": rate,
            "critic_learning_rate": rate,
            "tau": self._number("tau"),
            "train_freq": self._train_freq(),
            "gradient_steps": max(self._whole("gradient_steps"), -1),
            "action_noise": self._action_noise(),
            "n_steps": self._whole("n_steps", 1),
            "n_critics": weights.n_critics,
        }
        if self.kind == "TD3":
            arguments["policy_delay"] = self._whole("policy_delay")
            arguments |= {name: self._number(name) for name in ("target_policy_noise", "target_noise_clip")}
        return arguments

    def _learning_rate(self) -> float | Schedule:
        node = self._get("learning_rate")
        try:
            return _schedule(node)
        except ValueError:
            rate = self._rate or _FIRST_RATE[self.kind]
            self.remarks.append(
                f"learning_rate is {describe(node)}, which is not read: sbac takes {rate:g} instead, "
                f"{'what it came to last' if self._rate else 'the usual one'}; pass learning_rate=... for another"
            )
            return rate

    def _train_freq(self) -> int | tuple[int, str]:
        node = self._get("train_freq")
        if isinstance(node, Made) and node.path == f"{_COMMON}.type_aliases.TrainFreq":
            number, unit = node.args
            unit = _train_frequency_unit(unit)
            node = [number, unit]
        number, unit = node if isinstance(node, (list, tuple)) and len(node) == 2 else (node, "step")
        if isinstance(number, bool) or not isinstance(number, int) or number < 1 or unit not in ("step", "episode"):
            raise ValueError(f"data: train_freq is {describe(node)}, where a number of steps or episodes belongs")
        return number if unit == "step" else (number, unit)

    def _action_noise(self) -> ActionNoise | None:
        node = self._get("action_noise")
        try:
            return None if node is None else _noise(node)
        except ValueError as error:
            self.remarks.append(f"action_noise is not read ({error}): sbac takes none instead; pass action_noise=...")
            return None


def _train_frequency_unit(node: Any) -> Any:
    """The value of an Enum's member, which Pythons write as a call of the class or, up to 3.11.3, by its name."""
    path = f"{_COMMON}.type_aliases.TrainFrequencyUnit"
    if isinstance(node, Made) and node.path == path and len(node.args) == 1:
        return node.args[0]
    if isinstance(node, Made) and node.path == "builtins.getattr" and len(node.args) == 2:
        owner, name = node.args
        if isinstance(owner, Name) and owner.path == path:
            return {"STEP": "step", "EPISODE": "episode"}.get(name)
    return node


def _schedule(node: Any) -> float | Schedule:
    """A number, or one of the schedules that are data.

    Raises:
        ValueError: It is another.
    """
    module = f"{_COMMON}.utils"
    for _ in range(3):  # a FloatSchedule is around another
        if isinstance(node, Made) and node.path == f"{module}.FloatSchedule":
            node = state_of(node, node.path).get("value_schedule")
    if isinstance(node, Made) and node.path == f"{module}.LinearSchedule":
        state = restore(state_of(node, node.path))
        return LinearSchedule(*(float(state[name]) for name in ("start", "end", "end_fraction")))
    if isinstance(node, Made) and node.path == f"{module}.ConstantSchedule":
        node = state_of(node, node.path).get("val")
    value = restore(node)
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
        raise ValueError(f"{describe(value)} is no schedule")
    return float(value)


def _noise(node: Any) -> ActionNoise:
    """The noise of one environment.

    Raises:
        ValueError: It is no noise of Stable-Baselines3's own.
    """
    module = f"{_COMMON}.noise"
    if isinstance(node, Made) and node.path == f"{module}.VectorizedActionNoise":
        node = state_of(node, node.path).get("_base_noise")
    if isinstance(node, Made) and node.path == f"{module}.NormalActionNoise":
        state = state_of(node, node.path)
        return NormalActionNoise(*(restore(state.get(name)) for name in ("_mu", "_sigma")))
    if isinstance(node, Made) and node.path == f"{module}.OrnsteinUhlenbeckActionNoise":
        state = state_of(node, node.path)
        names = ("_mu", "_sigma", "_theta", "_dt", "initial_noise")
        return OrnsteinUhlenbeckActionNoise(*(restore(state.get(name)) for name in names))
    raise ValueError(describe(node))
