"""What observations policies can read, and whether one is a single observation or a batch."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

from sbac.guards import NotFiniteError
from sbac.trees import Tree, all_finite, leaves, space_tree, tree_map


def check_observation_space(space: spaces.Space[Any], algorithm: str) -> None:
    """Refuse observations that no policy can read.

    Raises:
        ValueError: A part of the space is neither Box nor Discrete.
    """
    for name, leaf in leaves(space_tree(space)):
        if not isinstance(leaf, (spaces.Box, spaces.Discrete)):
            where = f" (at {name!r} in {space})" if name else ""
            raise ValueError(
                f"{algorithm} reads Box and Discrete observations, and Dict and Tuple of them, not {leaf}{where}; "
                "gymnasium.wrappers.FlattenObservation turns most spaces into a Box"
            )


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
        if isinstance(promise, spaces.Discrete) and not _all_within(leaf, promise):
            raise ValueError(
                f"predict: the observation{part} is {leaf}; the model was made for whole numbers from "
                f"{promise.start} to {promise.start + promise.n - 1}"
            )
        leaf = leaf.astype(promise.dtype, copy=False)
        if not all_finite(leaf):
            raise NotFiniteError(f"predict: the observation{part} holds NaN or infinity: {leaf}")
        return leaf[None] if single else leaf

    names = iter(promised)
    return tree_map(lambda _: checked(next(names)), space_tree(space)), single


def _all_within(array: np.ndarray, space: spaces.Discrete) -> bool:
    below, above = array < space.start, array >= space.start + space.n
    return array.dtype.kind in "iu" and not (below.any() or above.any())
