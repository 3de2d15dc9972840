"""What of a model goes into a file, and how a model comes back from one.

`archive` knows files, `codec` knows values, and this room knows models: which part goes under which name.
"""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import gymnasium
import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from sbac.archive import Archive, ArchiveError, array_to_tensor, read_archive, tensor_to_array, write_archive
from sbac.codec import MissingObjectError, decode, encode
from sbac.construction import argument_names
from sbac.envs import EnvironmentLike, Spaces, number_to_make, require_spaces
from sbac.evaluation import vec_normalizers
from sbac.guards import require_whole
from sbac.observations import split_mask
from sbac.optimization import require_statistics, without_compiler
from sbac.preprocessing import Preprocessor
from sbac.sb3 import read_stable_baselines
from sbac.sb3_file import is_stable_baselines
from sbac.segments import Segments, read_segments
from sbac.tape import Recording
from sbac.traits import changed_settings, differing_layers, freeze, frozen_parameters, layers, settings_to_restore
from sbac.trees import Tree, leaves, space_tree, tree_like

if TYPE_CHECKING:
    from sbac.base import BaseAlgorithm

PathLike = str | Path

PARTS = ("optimizer", "generators", "episodes", "noise", "replay_buffer", "rollout_buffer", "workers", "run")
COUNTERS = (
    "num_timesteps",
    "n_updates",
    "_total_timesteps",
    "_n_rollouts",
    "_steps_since",
    "_transitions_since",
    "_n_transitions",
    "_n_launches",
)
_MAX_COUNT = 2**16  # environments or workers that a file may ask for


def save(
    model: Any,
    path: PathLike | BinaryIO,
    exclude: Iterable[str] | None,
    include: Iterable[str] | None,
    full: bool,
    segments: Segments | None = None,
) -> None:
    """Write a model to a file; see `BaseAlgorithm.save`. With `segments`, a large replay buffer goes there."""
    for name in (*(exclude or ()), *(include or ())):
        if name not in PARTS:
            raise ValueError(f"save: unknown part {name!r}; a file can hold {', '.join(PARTS)}")
    parts = (set(PARTS) if full else {"optimizer"}) - set(exclude or ()) | set(include or ())

    config, objects = encode(
        {
            "arguments": arguments(model),
            "observation_space": model.observation_space,
            "action_space": model.action_space,
            "env_id": None if model.env is None else model.env.env_id,
        }
    )
    config |= {"layers": layers(model.policy), "frozen": frozen_parameters(model.policy)}
    file = Archive(meta=_meta(model), config=config, objects=objects)
    for name, tensor in model.policy.state_dict().items():
        file.arrays[f"policy/{name}"] = tensor_to_array(tensor)
    if "optimizer" in parts:
        config["optimizers"] = {}
        for name, network in model._trained().items():
            config["optimizers"][name] = changed_settings(name, network.optimizer)
            with without_compiler():
                states = network.optimizer.state_dict()["state"]
            for index, state in states.items():
                for key, value in state.items():
                    file.arrays[f"optimizer/{name}/{index}/{key}"] = tensor_to_array(torch.as_tensor(value))
    apart = None if segments is None else segments.take(_replay_buffer(model))
    data, arrays = _state(model, parts if apart is None else parts - {"replay_buffer"})
    if apart is not None:
        data["replay_segments"], rest = apart
        arrays.update({f"replay_buffer/{name}": array for name, array in rest.items()})
    file.arrays.update({f"state/{name}": array for name, array in arrays.items()})
    if parts - {"optimizer"}:
        file.state = data
    write_archive(path, file)


def load(
    cls: type[BaseAlgorithm],
    path: PathLike | BinaryIO,
    env: EnvironmentLike | None,
    device: torch.device | str,
    overrides: Mapping[str, Any],
    allow_pickle: bool,
    print_system_info: bool,
    vecnormalize: PathLike | None = None,
) -> BaseAlgorithm:
    """Make a model from a file; see `BaseAlgorithm.load`."""
    is_foreign = is_stable_baselines(path)
    remarks: list[str] = []
    if is_foreign:
        file, remarks = read_stable_baselines(path, vecnormalize)
    else:
        if vecnormalize is not None:
            raise ValueError(f"vecnormalize goes with a Stable-Baselines3 file, which {path} is not")
        file = read_archive(path, allow_pickle=allow_pickle)
    if file.meta.get("class") != cls.__name__:
        raise ArchiveError(
            f"{path} holds a model of {file.meta.get('class')}, not of {cls.__name__}: "
            f"use {file.meta.get('class')}.load or sbac.load, which finds the class"
        )
    if print_system_info:
        print("Saved with: " + ", ".join(f"{name} {version}" for name, version in file.meta["versions"].items()))

    given = _decode_arguments(file, cls, overrides)
    for name in ("n_envs", "n_workers"):
        count = given.get(name)
        if name not in overrides and isinstance(count, int) and count > _MAX_COUNT:
            raise ArchiveError(f"{path}: {name} is {count}, more than the {_MAX_COUNT} that a file may ask for")
    if "n_envs" in overrides:
        given["n_envs"] = require_whole("n_envs", overrides["n_envs"], 1)
    known = _stored_spaces(file, path, given.get("n_envs"))
    made: Any = known
    if env is not None:
        made = cls.open_environments(env, number_to_make(env, known.n_envs))
        if vecnormalize is not None and vec_normalizers(made):
            raise ValueError(
                f"the environment is in a VecNormalize, and vecnormalize={str(vecnormalize)!r} lets the model "
                "normalise too: pass the environment without its VecNormalize, or leave vecnormalize out"
            )
        given["n_envs"] = made.num_envs
        if is_foreign and Preprocessor(made.observation_space).space == known.observation_space:
            # Stable-Baselines3 turned the environment's images around before the model saw their space.
            known = known._replace(observation_space=made.observation_space)
            if "policy_kwargs" not in overrides:  # else what the file says of the turned images would be said of these
                given["policy_kwargs"].pop("channels_last", None)
        require_spaces(made, known, f"the model in {path}")
    is_own = bool({"policy", "policy_kwargs"} & overrides.keys())
    try:
        with contextlib.nullcontext() if is_own else _no_larger_than(file, path):
            model = cls(env=made, device=device, **given)
    except ArchiveError:
        raise
    except Exception as error:  # whatever strange values of a file lead to
        if overrides:
            raise  # may be about those, which are the caller's
        raise ArchiveError(f"{path}: no model can be made from its arguments: {error}") from error
    for remark in [*remarks, *_restore(model, file, path, bool(overrides))]:
        warnings.warn(remark, stacklevel=3)
    return model


def restore(model: Any, path: PathLike, segments: Segments) -> tuple[dict[str, Any], list[str]]:
    """Bring a model to where a full checkpoint left off, without making another: its own arguments stay.

    The next checkpoint will go on with the `segments` of this one.

    Returns:
        What `continue_run` needs, and what is to be said.

    Raises:
        ArchiveError: The file is damaged or foreign.
        ValueError: It is no full checkpoint of this algorithm.
    """
    # A user's own objects are in the arguments, which the model has already.
    file = read_archive(path, members=lambda name: name != "objects.pkl")
    if file.meta.get("class") != type(model).__name__ or file.state is None:
        kind = "full checkpoint" if file.state is not None else "model without the state of its training"
        raise ValueError(
            f"{path} is a {kind} of {file.meta.get('class')}, from which {type(model).__name__} cannot resume; "
            "name another folder or prefix for its checkpoints"
        )
    try:
        run = decode(file.state.get("run", {}))
    except ValueError as error:
        raise ArchiveError(f"{path}: the state of the run cannot be read: {error}") from error
    require_spaces(model, _stored_spaces(file, path, model.n_envs, instead=model), f"the run of {path}")
    remarks = _changed_arguments(model, file)
    remarks += _restore(model, file, path, bool(remarks))
    if "replay_segments" in file.state and _has_same_environments(model, file):
        segments.adopt(file.state["replay_segments"], model.replay_buffer)
    return run, remarks


def referred_segments(path: PathLike) -> list[str]:
    """The names of the segments that a checkpoint refers to.

    Raises:
        ArchiveError, OSError: As of `archive.read_archive`.
    """
    state = read_archive(path, members=lambda name: name == "state.json").state or {}
    try:
        return [str(name) for name in state["replay_segments"]["segments"]] if "replay_segments" in state else []
    except (KeyError, TypeError) as error:
        raise ArchiveError(f"{path}: the segments of its replay buffer cannot be read: {error!r}") from error


def _stored_spaces(file: Archive, path: Any, n_envs: Any, instead: Any = None) -> Spaces:
    """The spaces in a file.

    Args:
        file: The file.
        path: Where it lies.
        n_envs: Of the model.
        instead: A model whose space stands in for one that is an object of the user's own, which the script has.

    Raises:
        ArchiveError: There are none.
    """
    found = {}
    for name in ("observation_space", "action_space"):
        try:
            found[name] = decode(file.config[name])
            if not isinstance(found[name], gymnasium.Space):
                raise ValueError(f"{found[name]!r} is no space")
        except (KeyError, ValueError) as error:
            if not isinstance(error, MissingObjectError) or instead is None:
                raise ArchiveError(f"{path}: config.json does not describe the {name}: {error}") from error
            found[name] = getattr(instead, name)
    if type(n_envs) is not int:
        raise ArchiveError(f"{path}: config.json does not describe the number of environments, but has {n_envs!r}")
    return Spaces(**found, n_envs=n_envs)


def written_at(path: Path) -> tuple[bool, int]:
    """When a checkpoint was written, for sorting.

    Returns:
        Whether it says so itself, since the copy of a file may be of another time, or is damaged, which whoever
        resumes is to hear of; and the nanoseconds.
    """
    try:
        state = read_archive(path, members=lambda name: name == "state.json").state or {}
    except ArchiveError:
        return True, path.stat().st_mtime_ns
    run = state.get("run")
    written = run.get("written") if isinstance(run, dict) else None
    if type(written) is int and 0 <= written < 2**63:
        return True, written
    return False, path.stat().st_mtime_ns


def run_state(model: Any) -> dict[str, Any]:
    """Where a run is, beside the model: its log and its callbacks."""
    return {
        "written": time.time_ns(),
        "start": model._first_timestep,
        "folder": model._outputs.folder,
        "training_log": model._training_log.get_state(),
        "logger": model.logger.get_state(),
        "callbacks": [(type(one).__name__, one.get_state()) for one in model._callback.everyone()],
    }


def continue_run(model: Any, run: Mapping[str, Any]) -> None:
    """Go on with log and callbacks from where `run_state` was taken, now that all of them have been started."""
    if not run:
        return
    model._training_log.set_state(run["training_log"])
    model.logger.set_state(run["logger"])
    saved = list(run["callbacks"])
    for one in model._callback.everyone():
        # Each takes the state of the next of its kind: those that are new, or gone, leave the others alone.
        index = next((i for i, (kind, _) in enumerate(saved) if kind == type(one).__name__), None)
        if index is not None:
            one.set_state(saved.pop(index)[1])


def _changed_arguments(model: Any, file: Archive) -> list[str]:
    now, then = encode({"arguments": arguments(model)})[0]["arguments"], file.config.get("arguments", {})
    changed = [(name, now[name], then[name]) for name in now if name in then and now[name] != then[name]]
    env_id = None if model.env is None else model.env.env_id
    if (before := file.config.get("env_id")) != env_id and before is not None and env_id is not None:
        changed.append(("env", env_id, before))
    if not changed:
        return []
    values = ", ".join(f"{name} is {value!r}, was {old!r}" for name, value, old in changed)
    return [f"the run is resumed with other arguments than it had: {values}"]


def _restore(model: Any, file: Archive, path: Any, is_changed: bool) -> list[str]:
    """Give a model what a file holds besides its constructor arguments; returns what is to be said of it.

    Args:
        model: The model.
        file: The file.
        path: Where it lies.
        is_changed: Whether the model was made with other arguments on purpose.
    """
    if file.state is not None and "replay_segments" in file.state:
        # Before anything of the model is touched.
        apart = _read_apart(file.state["replay_segments"], path)
        file.arrays.update({f"state/replay_buffer/{name}": array for name, array in apart.items()})
    said = _load_weights(model, file, path, is_changed)
    counters = file.meta.get("counters")
    for name in COUNTERS:
        count = counters.get(name, 0) if isinstance(counters, dict) else None
        if type(count) is not int or not 0 <= count < 2**62:
            raise ArchiveError(f"{path}: meta.json does not count {name}: {count!r}")
        if hasattr(model, name):
            setattr(model, name, count)
    model._obs = None
    if file.state is None:
        return said
    recordings, obs = None, None
    try:
        remarks = [*said, *_set_state(model, file)]
        if model.env is not None and _has_same_environments(model, file):
            recordings = _recordings(model, file)
            if recordings is not None:
                obs = _running_obs(model, file)
    except Exception as error:  # the content passes through setters of numpy and torch, which raise what they like
        raise ArchiveError(f"{path}: the state of the checkpoint cannot be restored: {error!r}") from error
    if recordings is not None:
        remarks += _put_environments_back(model, recordings, obs)
    return remarks


def _read_apart(data: Mapping[str, Any], path: Any) -> dict[str, np.ndarray]:
    """What of a replay buffer is in the segments beside its checkpoint."""
    if not isinstance(path, str | Path):
        raise ArchiveError(
            "this checkpoint has its replay buffer in a folder beside it, and can be loaded by its path only, not from "
            "an open file"
        )
    try:
        return read_segments(Path(path).parent / Path(data["folder"]).name, data)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ArchiveError(f"{path}: its replay buffer cannot be restored: {error}") from error


def load_policy(policy: nn.Module, state: Mapping[str, torch.Tensor], exact_match: bool = True) -> None:
    """Copy weights into a policy, all or none.

    Raises:
        ValueError: A name or a shape does not fit.
    """
    own = policy.state_dict()
    wrong = [
        f"{name}: {tuple(tensor.shape)}, not {tuple(own[name].shape)}"
        for name, tensor in state.items()
        if name in own and tensor.shape != own[name].shape
    ]
    unknown, missing = sorted(set(state) - set(own)), sorted(set(own) - set(state))
    if wrong or unknown or (exact_match and missing):
        raise ValueError(f"weights do not fit the policy: shapes {wrong}, unknown {unknown}, missing {missing}")
    policy.load_state_dict(state, strict=False)


def save_buffer(model: Any, path: PathLike | BinaryIO) -> None:
    """Write the replay buffer alone; see `BaseAlgorithm.save_replay_buffer`."""
    arrays = {f"replay_buffer/{name}": array for name, array in _replay_buffer(model).get_state().items()}
    write_archive(path, Archive(meta={"class": "ReplayBuffer"}, arrays=arrays))


def load_buffer(model: Any, path: PathLike | BinaryIO) -> None:
    """Read the replay buffer alone; see `BaseAlgorithm.load_replay_buffer`."""
    buffer = _replay_buffer(model)
    file = read_archive(path)
    try:
        buffer.set_state(_below(file.arrays, "replay_buffer/"))
    except KeyError as error:
        raise ArchiveError(f"{path} holds no replay buffer: {error} is missing") from error


def _replay_buffer(model: Any) -> Any:
    if not hasattr(model, "replay_buffer"):
        raise ValueError(f"{type(model).__name__} has no replay buffer")
    return model.replay_buffer


def arguments(model: BaseAlgorithm) -> dict[str, Any]:
    """The constructor's arguments as the model's attributes hold them now."""
    names = [name for name in argument_names(type(model)) if name not in ("env", "device", *model._shorthands)]
    return {name: model._policy_argument if name == "policy" else getattr(model, name) for name in names}


def _decode_arguments(file: Archive, cls: type, overrides: Mapping[str, Any]) -> dict[str, Any]:
    stored = file.config.get("arguments")
    if not isinstance(stored, dict):
        raise ArchiveError("config.json holds no arguments")
    arguments: dict[str, Any] = dict(overrides)
    for name, data in stored.items():
        if name in overrides:
            continue
        try:
            arguments[name] = decode(data, file.objects)
        except MissingObjectError as error:
            raise ArchiveError(
                f"the argument {error.path.removeprefix('arguments.')} is an object of the user's own "
                f"({error.describe}), which a model file does not restore by itself: pass custom_objects="
                f"{{{name!r}: ...}}, or, if you trust the file, allow_pickle=True, which runs code from it"
            ) from error
        except ValueError as error:
            raise ArchiveError(f"config.json: the argument {name} cannot be read: {error}") from error
    return arguments


@contextlib.contextmanager
def _no_larger_than(file: Archive, path: Any) -> Iterator[None]:
    """While it lasts, networks with more weights than a file holds are refused, before their memory is filled."""
    n_held = sum(array.size for name, array in file.arrays.items() if name.startswith("policy/"))
    n_made, thread = 0, threading.get_ident()

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal n_made
        if parameter is not None and threading.get_ident() == thread:
            n_made += parameter.numel()
        # Some are made that no file holds, such as a layer that another takes the place of.
        if n_made > 4 * n_held:
            raise ArchiveError(f"{path}: its networks need more weights than the {n_held} that the file holds")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _meta(model: BaseAlgorithm) -> dict[str, Any]:
    counters = {name: int(getattr(model, name)) for name in COUNTERS if hasattr(model, name)}
    return {"class": type(model).__name__, "counters": counters}


def _load_weights(model: BaseAlgorithm, file: Archive, path: Any, is_changed: bool) -> list[str]:
    weights = {name: array_to_tensor(array) for name, array in _below(file.arrays, "policy/").items()}
    versions = file.meta.get("versions")
    is_same_torch = isinstance(versions, dict) and versions.get("torch") == torch.__version__
    try:
        load_policy(model.policy, weights)
        # Earlier versions wrote neither.
        remarks = differing_layers(model.policy, file.config.get("layers"), is_same_torch and not is_changed)
        freeze(model.policy, file.config.get("frozen", []))
    except ValueError as error:
        raise ArchiveError(f"{path}: {error}") from error
    changed = file.config.get("optimizers", {})  # which earlier versions did not write
    if not isinstance(changed, dict):
        raise ArchiveError(f"{path}: config.json does not describe the optimizers, but has {changed!r}")
    for name, network in model._trained().items():
        state: dict[int, dict[str, torch.Tensor]] = {}
        try:
            for key, array in _below(file.arrays, f"optimizer/{name}/").items():
                index, _, entry = key.partition("/")
                state.setdefault(int(index), {})[entry] = array_to_tensor(array)
            for statistics in state.values():
                require_statistics(network.optimizer, statistics)
            settings = settings_to_restore(network.optimizer, changed.get(name, {}))
            with without_compiler():
                groups = network.optimizer.state_dict()["param_groups"]
                groups[0].update(settings)
                network.optimizer.load_state_dict({"state": state, "param_groups": groups})
        except ValueError as error:
            raise ArchiveError(f"{path}: the optimizer of the {name} cannot be restored: {error}") from error
    return remarks


def _state(model: Any, parts: set[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The parts of a full checkpoint, split into plain data and arrays."""
    data: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    if "generators" in parts:
        data["generator"] = encode(model.generator.bit_generator.state)[0]
        for name in ("_act_generator", "_predict_generator"):
            arrays[f"generators/{name}"] = tensor_to_array(getattr(model, name).get_state())
        arrays["generators/_update_state"] = tensor_to_array(model._update_state)
    if "episodes" in parts:
        data["ep_info_buffer"] = encode(list(model.ep_info_buffer))[0]
        data["ep_success_buffer"] = list(model.ep_success_buffer)
        data["n_episodes"] = model.episodes.count
        arrays["episodes/return"] = model.episodes.running_return
        arrays["episodes/length"] = model.episodes.running_length
        arrays.update({f"episodes/policy/{name}": array for name, array in model.policy.get_running_state().items()})
        if model._obs is not None and model.env is not None and model.env.reset_count == model._reset_count:
            obs, _ = split_mask(model._obs, model.observation_space, 0)
            arrays.update(leaves(obs, "episodes/obs"))
            recordings = model.env.recordings()
            data["environments"] = [
                None if tape is None else encode({"random_state": tape.random_state, "seed": tape.seed})[0]
                for tape in recordings
            ]
            for i, tape in enumerate(recordings):
                if tape is not None:
                    arrays[f"environments/{i}/actions"] = tape.actions
    if "run" in parts and model._callback is not None:
        data["run"], objects = encode(run_state(model))
        if objects:
            raise ArchiveError(
                f"the state of a callback or logger must be plain data (numbers, texts, lists, arrays), but holds "
                f"{', '.join(objects)}: see its get_state"
            )
    if "noise" in parts and getattr(model, "action_noise", None) is not None:
        arrays.update({f"noise/{name}": array for name, array in model.action_noise.get_state().items()})
    for name, buffer in model._buffers().items():
        if name in parts:
            arrays.update({f"{name}/{key}": array for key, array in buffer.get_state().items()})
    return data, arrays


def _set_state(model: Any, file: Archive) -> list[str]:
    data, arrays = file.state or {}, _below(file.arrays, "state/")
    remarks: list[str] = []
    same_environments = _has_same_environments(model, file)
    if "generator" in data:
        model.generator.bit_generator.state = decode(data["generator"])
        for name in ("_act_generator", "_predict_generator"):
            getattr(model, name).set_state(array_to_tensor(arrays[f"generators/{name}"]))
        model._update_state = array_to_tensor(arrays["generators/_update_state"])
    if "ep_info_buffer" in data:
        model.episodes.forget()
        model.ep_info_buffer.extend(decode(data["ep_info_buffer"]))
        model.ep_success_buffer.extend(data["ep_success_buffer"])
        model.episodes.count = int(data["n_episodes"])
        if same_environments:
            for name in ("return", "length"):
                own = getattr(model.episodes, f"running_{name}")
                _require_form(f"episodes/{name}", arrays[f"episodes/{name}"], own.shape, own.dtype)
                setattr(model.episodes, f"running_{name}", arrays[f"episodes/{name}"])
            model.policy.set_running_state(_below(arrays, "episodes/policy/"))
        else:
            model.episodes.start()
    noise = _below(arrays, "noise/")
    if noise and same_environments:
        model.action_noise.set_state(noise)
    for name, buffer in model._buffers().items():
        stored = _below(arrays, f"{name}/")
        if stored and same_environments:
            buffer.set_state(stored)
        elif name == "replay_buffer" and stored:
            remarks.append(
                f"the replay buffer of the file was collected in {file.config['arguments']['n_envs']} environments and "
                f"the model now has {model.n_envs}: it was left out, the new one is empty"
            )
    return remarks


def _has_same_environments(model: Any, file: Archive) -> bool:
    """Whether there are as many: what belongs to single ones is of no use to another number of them."""
    return bool(file.config["arguments"]["n_envs"] == model.n_envs)


def _recordings(model: Any, file: Archive) -> list[Recording | None] | None:
    """The running episodes in a file, None if it has none."""
    starts = (file.state or {}).get("environments")
    if starts is None:
        return None
    if len(starts) != model.n_envs:
        raise ValueError(f"it has the running episodes of {len(starts)} environments, not of {model.n_envs}")
    return [
        None if start is None else Recording(**decode(start), actions=file.arrays[f"state/environments/{i}/actions"])
        for i, start in enumerate(starts)
    ]


def _running_obs(model: Any, file: Archive) -> Tree:
    """What the running episodes in a file were at, (n, *obs_shape)."""
    form = space_tree(model.observation_space)
    obs = tree_like(form, _below(file.arrays, "state/"), "episodes/obs")
    for (name, array), (_, space) in zip(leaves(obs, "episodes/obs"), leaves(form), strict=True):
        _require_form(name, array, (model.n_envs, *(space.shape or ())), array.dtype)
    return obs


def _require_form(name: str, array: np.ndarray, shape: tuple[int, ...], dtype: Any) -> None:
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(f"{name} has shape {array.shape} and dtype {array.dtype}, not {shape} and {dtype}")


def _put_environments_back(model: Any, recordings: list[Recording | None], obs: Tree) -> list[str]:
    """Bring each environment to where it was; where that can't be, begin a new episode and truncate the old one."""
    seed = None if model.seed is None else _new_seed(model._env_seed, model.num_timesteps)
    model._obs, failed = model.env.put_back(recordings, obs, model.episodes.running_return, seed)
    model._reset_count = model.env.reset_count
    if not failed:
        return []
    model._cut_episodes(sorted(failed))
    reasons = "; ".join(f"{i}: {why}" for i, why in sorted(failed.items()))
    return [
        "training will not go on exactly as it would have: these environments could not be put back where they were, "
        f"so that they begin new episodes, and their last ones count as truncated ({reasons})"
    ]


def _new_seed(*entropy: int) -> int:
    """A seed of 31 bits for new episodes, which the first ones did not have."""
    return int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1)


def _below(arrays: Mapping[str, np.ndarray], folder: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(folder): array for name, array in arrays.items() if name.startswith(folder)}
