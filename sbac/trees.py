"""Observations are one array, or a tree of arrays: dicts and tuples, nested as the observation space is.

Every function takes a single array for the tree that it mostly is. The branches of a dict are taken in the order of
their names, since environments may send them in any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

Tree = Any
"""An array or tensor, or a dict or tuple of trees."""


def tree_map(function: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """A tree of the same form, with `function` applied to each leaf and to the leaves at its place in `others`."""
    if type(tree) is np.ndarray:  # the most frequent, and to ask for a Mapping takes a while
        return function(tree, *others)
    if isinstance(tree, Mapping):
        return {key: tree_map(function, tree[key], *(other[key] for other in others)) for key in sorted(tree)}
    if isinstance(tree, tuple):
        return tuple(tree_map(function, branch, *(other[i] for other in others)) for i, branch in enumerate(tree))
    return function(tree, *others)


def leaves(tree: Tree, name: str = "") -> Iterator[tuple[str, Any]]:
    """Each leaf with its path, such as ``camera/left``; the path of a single array is `name`."""
    if isinstance(tree, Mapping):
        branches: Any = sorted(tree.items())
    elif isinstance(tree, tuple):
        branches = enumerate(tree)
    else:
        yield name, tree
        return
    for key, branch in branches:
        yield from leaves(branch, f"{name}/{key}" if name else str(key))


def space_tree(space: spaces.Space[Any]) -> Tree:
    """The spaces of the leaves, as a tree of the form that the observations have."""
    if isinstance(space, spaces.Dict):
        return {key: space_tree(branch) for key, branch in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(space_tree(branch) for branch in space.spaces)
    return space


def tree_like(tree: Tree, arrays: Mapping[str, Any], name: str) -> Tree:
    """The tree of the form of `tree` whose leaves are found in `arrays` under their paths below `name`."""
    paths = iter([path for path, _ in leaves(tree, name)])
    return tree_map(lambda _: arrays[next(paths)], tree)


def batch_size(tree: Tree) -> int:
    """The first dimension, which all leaves share."""
    return len(next(leaves(tree))[1])


def rows(tree: Tree, index: Any) -> Tree:
    """The rows `index` of each leaf: a view for a slice or a number, a copy for an array of numbers."""
    return tree[index] if type(tree) is np.ndarray else tree_map(lambda leaf: leaf[index], tree)


def set_rows(tree: Tree, index: Any, values: Tree) -> None:
    """Overwrite the rows `index` of each leaf."""
    if type(tree) is np.ndarray:
        tree[index] = values
    else:
        tree_map(lambda leaf, value: leaf.__setitem__(index, value), tree, values)


def copy_tree(tree: Tree) -> Tree:
    """A tree whose arrays own their memory."""
    return tree_map(np.array, tree)


def all_finite(array: np.ndarray) -> bool:
    """Whether an array holds neither NaN nor infinity."""
    return array.dtype.kind != "f" or bool(np.count_nonzero(np.isfinite(array)) == array.size)  # sooner than all()


def first_not_finite(batch: np.ndarray) -> int:
    """The index of the first row of a batch (n, ...) that holds NaN or infinity."""
    rows = np.isfinite(batch.reshape(len(batch), -1)).all(axis=1)
    return int(np.argmin(rows))
