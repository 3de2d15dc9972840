"""The statistics of Stable-Baselines3's VecNormalize, as those of a model that normalises by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from sbac.archive import ArchiveError
from sbac.normalization import Normalizer
from sbac.pickles import read_pickle, restore, state_of
from sbac.trees import leaves, space_tree

_WRAPPER = "stable_baselines3.common.vec_env.vec_normalize.VecNormalize"
_MOMENTS = "stable_baselines3.common.running_mean_std.RunningMeanStd"
_MAX_SIZE = 2**26  # bytes of the file


def read_vecnormalize(
    path: Path, observation_space: spaces.Space[Any], gamma: float
) -> tuple[dict[str, Any], dict[str, np.ndarray], list[str]]:
    """Read what ``VecNormalize.save`` wrote. Executes nothing from it.

    Args:
        path: The file.
        observation_space: Of the model.
        gamma: Of the model.

    Returns:
        Arguments of the policy, among them ``arguments``, those of the model; the arrays of the normaliser, as a model
        file has them; and what is to be said.

    Raises:
        ArchiveError: The file is damaged or hostile, or does not fit the model.
        FileNotFoundError: There is no such file.
    """
    with path.open("rb") as file:
        content = file.read(_MAX_SIZE + 1)
    try:
        return _convert(content, observation_space, gamma)
    except Exception as error:  # of whatever is in the place of a part
        raise ArchiveError(f"{path} (statistics of VecNormalize): {error}") from error


def _convert(
    content: bytes, observation_space: spaces.Space[Any], gamma: float
) -> tuple[dict[str, Any], dict[str, np.ndarray], list[str]]:
    state = state_of(read_pickle(content), _WRAPPER)
    epsilon, clip_obs, clip_reward, own_gamma = (
        float(restore(state[name])) for name in ("epsilon", "clip_obs", "clip_reward", "gamma")
    )
    norm_obs, norm_reward = state["norm_obs"] is True, state["norm_reward"] is True
    chosen: dict[str, Any] = {"clip_obs": clip_obs, "clip_reward": clip_reward, "epsilon": epsilon}
    parts = dict(leaves(space_tree(observation_space)))
    keys = list(parts)
    if norm_obs and isinstance(observation_space, spaces.Dict):
        keys = restore(state.get("norm_obs_keys")) or keys
        if set(keys) != {key for key, leaf in parts.items() if isinstance(leaf, spaces.Box)}:
            chosen["keys"] = keys
    normalizer = Normalizer(observation_space, norm_obs, norm_reward, **chosen)

    columns, scales = [], []
    if norm_obs:
        statistics = state["obs_rms"] if isinstance(observation_space, spaces.Dict) else {"": state["obs_rms"]}
        for key, leaf in parts.items():
            if key not in keys:
                continue
            count, mean, variance = _moments(statistics[key])
            if mean.shape != leaf.shape:
                where = f" of {key!r}" if key else ""
                raise ValueError(f"its observations{where} have shape {mean.shape}, the model's are {leaf}")
            columns.append(_column(count, mean, variance))
            scales.append((mean.reshape(-1), 1 / np.sqrt(variance.reshape(-1) + epsilon)))
    if norm_reward:
        columns.append(_column(*_moments(state["ret_rms"])))
    own = "policy/preprocessor.normalizer"
    arrays = {
        f"{own}.moments": np.concatenate(columns, axis=1) if columns else np.zeros((3, 0)),
        f"{own}.shift": np.concatenate([shift for shift, _ in scales] or [np.zeros(0)]).astype(np.float32),
        f"{own}.scale": np.concatenate([scale for _, scale in scales] or [np.zeros(0)]).astype(np.float32),
    }
    for name in ("moments", "shift", "scale"):
        expected = tuple(getattr(normalizer, name).shape)
        if arrays[f"{own}.{name}"].shape != expected:
            raise ValueError("it normalises images or parts that are no Box, which sbac does not")
    if not (norm_obs or norm_reward):
        arrays = {}
    remarks = []
    if norm_reward and own_gamma != gamma:
        remarks.append(
            f"VecNormalize discounts returns by {own_gamma:g}, the model by {gamma:g}: sbac goes on with the model's"
        )
    defaults = {"clip_obs": 10.0, "clip_reward": 10.0, "epsilon": 1e-8}
    chosen = {name: value for name, value in chosen.items() if value != defaults.get(name)}
    kwargs: dict[str, Any] = {"arguments": {"normalize_obs": norm_obs, "normalize_reward": norm_reward}}
    return kwargs | ({"normalizer_kwargs": chosen} if chosen else {}), arrays, remarks


def _moments(node: Any) -> tuple[float, np.ndarray, np.ndarray]:
    state = state_of(node, _MOMENTS)
    mean, variance = (np.asarray(restore(state[name]), np.float64) for name in ("mean", "var"))
    count = float(restore(state["count"]))
    if mean.shape != variance.shape or not (np.isfinite(mean).all() and (variance >= 0).all() and count >= 0):
        raise ValueError("its statistics are no means and variances")
    return count, mean, variance


def _column(count: float, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Count, mean and sum of squared deviations, (3, d); of what has seen nothing, zeros."""
    flat = mean.reshape(-1)
    if count < 1:
        return np.zeros((3, len(flat)))
    return np.stack([np.full(len(flat), count), flat, variance.reshape(-1) * count])
