"""What observations policies can read, and whether one is a single observation or a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from sbac.guards import NotFiniteError
from sbac.trees import Tree, all_finite, leaves, space_tree, tree_map

READABLE = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
MASK = "action_mask"


def check_observation_space(space: spaces.Space[Any], algorithm: str) -> None:
    """Refuse observations that no policy can read.

    Raises:
        ValueError: A part of the space is none of the four kinds of arrays, or there is nothing in it.
    """
    if all(0 in (leaf.shape or ()) for _, leaf in leaves(space_tree(space))):
        raise ValueError(
            f"{algorithm} needs something to observe, and there is nothing in {space}; gymnasium.wrappers."
            "TransformObservation can make a constant number of it"
        )
    for name, leaf in leaves(space_tree(space)):
        if not isinstance(leaf, READABLE):
            where = f" (at {name!r} in {space})" if name else ""
            raise ValueError(
                f"{algorithm} reads Box, Discrete, MultiDiscrete and MultiBinary observations, and Dict and Tuple of "
                f"them, not {leaf}{where}; gymnasium.wrappers.FlattenObservation or TransformObservation can turn it "
                "into a Box"
            )


def check_action_space(space: spaces.Space[Any], algorithm: str) -> None:
    """Refuse actions that no stochastic policy can draw.

    Raises:
        ValueError: A part of the space is none of the four kinds of arrays, or there is nothing in it.
    """
    _require_choice(space, algorithm)
    for name, leaf in leaves(space_tree(space)):
        if not isinstance(leaf, READABLE):
            where = f" (at {name!r} in {space})" if name else ""
            raise ValueError(
                f"{algorithm} acts in Box, Discrete, MultiDiscrete and MultiBinary spaces, and Dict and Tuple of them, "
                f"not in {leaf}{where}; gymnasium.wrappers.TransformAction can make its actions of one of these"
            )


def check_finite_box(space: spaces.Space[Any], algorithm: str) -> None:
    """Refuse actions that no deterministic policy can choose: all but those of a Box with finite bounds.

    Raises:
        ValueError: Naming what acts in such a space, or how to make it one to act in.
    """
    _require_choice(space, algorithm)
    needs = f"{algorithm} acts in a Box with finite bounds"
    if all(isinstance(leaf, READABLE) for _, leaf in leaves(space_tree(space))):
        others = "A2C and A3C act in it as it is"
    else:
        others = "gymnasium.wrappers.TransformAction can make a Box of it"
    if not isinstance(space, spaces.Box):
        raise ValueError(f"{needs}, not in {space}; {others}")
    if not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
        bounded = f"gymnasium.wrappers.TransformAction(env, lambda action: action, spaces.Box(-1, 1, {space.shape}))"
        raise ValueError(
            f"{needs}, and {space} lacks them; {others}, or give it bounds that suit it, such as {bounded}"
        )


def _empty_part(space: spaces.Space[Any]) -> spaces.Space[Any] | None:
    """The first part of a space, or the space itself, in which there is no number at all."""
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        parts = space.spaces.values() if isinstance(space, spaces.Dict) else space.spaces
        found = [_empty_part(part) for part in parts]
        return space if not found else next((part for part in found if part is not None), None)
    return space if 0 in (space.shape or ()) else None


def _require_choice(space: spaces.Space[Any], algorithm: str) -> None:
    empty = _empty_part(space)
    if empty is not None:
        where = "" if empty is space else f" in {space}"
        raise ValueError(
            f"{algorithm} needs something to choose in each action, and there is nothing in {empty}{where}"
        )


def n_choices(space: spaces.Space[Any]) -> int:
    """The number of values of all Discrete and MultiDiscrete parts of an action space: the length of a mask."""
    parts = [part for _, part in leaves(space_tree(space))]
    discrete = sum(int(part.n) for part in parts if isinstance(part, spaces.Discrete))
    return discrete + sum(int(part.nvec.sum()) for part in parts if isinstance(part, spaces.MultiDiscrete))


def split_mask(obs: Tree, space: spaces.Space[Any], n_choices: int) -> tuple[Tree, Any]:
    """Observations, and the mask of allowed actions that is among them or came with them.

    A mask is among them under "action_mask" where the space is a Dict with such a part. Where environments send it as
    ``info["action_mask"]``, the door puts it beside the observation: {"observation": ..., "action_mask": ...}.

    Args:
        obs: Of one or more environments, or a batch, as arrays or tensors.
        space: Of one observation.
        n_choices: Length of a mask; 0 where there is nothing to choose from.

    Returns:
        Observations in the form of the space, and the mask or None.
    """
    is_among_them = isinstance(space, spaces.Dict) and MASK in space.spaces
    if is_among_them:
        return obs, obs[MASK] if n_choices else None
    return (obs["observation"], obs[MASK]) if carries_mask(obs, space) else (obs, None)


def carries_mask(obs: Tree, space: spaces.Space[Any]) -> bool:
    """Whether a mask was put beside observations of this space."""
    is_among_them = isinstance(space, spaces.Dict) and MASK in space.spaces
    return not is_among_them and isinstance(obs, Mapping) and obs.keys() == {"observation", MASK}


def as_batch(observation: Any, space: spaces.Space[Any]) -> tuple[Tree, bool]:
    """One observation, or a batch, as a batch.

    Args:
        observation: Of shape (*obs_shape) or (n, *obs_shape); a tree where the space is one.
        space: Of one observation.

    Returns:
        The batch, in the space's dtypes, and whether a single observation was given.

    Raises:
        ValueError: The observation does not have the form of the space.
        NotFiniteError: It holds NaN or infinity.
    """
    if type(observation) is np.ndarray and isinstance(space, spaces.Box) and observation.dtype == space.dtype:
        single = observation.shape == space.shape  # most are of this kind, and are ready
        if (single or observation.shape[1:] == space.shape) and all_finite(observation):
            return observation[None] if single else observation, single
    if carries_mask(observation, space):
        obs, single = as_batch(observation["observation"], space)
        mask = np.asarray(observation[MASK])
        return {"observation": obs, MASK: mask[None] if single else mask}, single
    is_pair = isinstance(observation, tuple) and len(observation) == 2 and isinstance(observation[1], dict)
    if is_pair and not isinstance(space, spaces.Tuple):
        raise ValueError("predict: this is a pair of observation and info, as reset returns it: pass the first only")
    promised = dict(leaves(space_tree(space)))
    given = dict(leaves(observation))
    if given.keys() != promised.keys():
        raise ValueError(
            f"predict: the observation has the parts {sorted(given) if '' not in given else 'of one array'}, "
            f"but the model was made for {space}"
        )
    first = next(iter(promised))
    single = np.shape(given[first]) == promised[first].shape

    def checked(name: str) -> np.ndarray:
        leaf, promise = np.asarray(given[name]), promised[name]
        part = f" ({name})" if name else ""
        if leaf.shape[0 if single else 1 :] != promise.shape or leaf.dtype.kind not in "fiub":
            raise ValueError(
                f"predict: the observation{part} has shape {leaf.shape} and dtype {leaf.dtype}, but the model was made "
                f"for {promise}: pass shape {promise.shape}, or {('n', *promise.shape)} for a batch"
            )
        limits = value_limits(promise)
        if limits is not None and (
            leaf.dtype.kind not in "biu" or (leaf < limits[0]).any() or (leaf > limits[1]).any()
        ):
            raise ValueError(
                f"predict: the observation{part} is {leaf}; the model was made for whole numbers from "
                f"{limits[0]} to {limits[1]}"
            )
        cast = leaf
        if leaf.dtype != promise.dtype:
            with np.errstate(invalid="ignore"):  # of NaN as a whole number, which is refused below
                cast = leaf.astype(promise.dtype)
        if not (all_finite(cast) and (cast is leaf or all_finite(leaf))):
            raise NotFiniteError(f"predict: the observation{part} holds NaN or infinity: {leaf}")
        # Rounding to another float is no matter, but 300 would become 44 as uint8, and each number below 1 black.
        if cast is not leaf and cast.dtype.kind in "iu" and (changed := cast != leaf).any():
            raise ValueError(
                f"predict: the observation{part} holds {leaf[changed][0]}, which would become {cast[changed][0]} as "
                f"{promise.dtype}; the model was made for {promise}: pass whole numbers as the environment sends "
                "them, images not scaled"
            )
        return cast[None] if single else cast

    names = iter(promised)
    return tree_map(lambda _: checked(next(names)), space_tree(space)), single


def value_limits(space: spaces.Space[Any]) -> tuple[Any, Any] | None:
    """The least and the largest value of a space of whole numbers, each of its shape; None for a Box."""
    if isinstance(space, spaces.Discrete):
        return int(space.start), int(space.start + space.n - 1)
    if isinstance(space, spaces.MultiDiscrete):
        return space.start, space.start + space.nvec - 1
    return (0, 1) if isinstance(space, spaces.MultiBinary) else None
