"""What was stored of a buffer, looked at before a buffer takes it."""

from __future__ import annotations

from typing import NoReturn

import numpy as np

from sbac.trees import Tree, leaves


def require_fit(buffer: object, own: dict[str, np.ndarray], state: dict[str, np.ndarray], n_rows: int) -> None:
    """Refuse stored arrays that a buffer cannot hold.

    Raises:
        ValueError: Naming the first array that does not fit, and both shapes.
    """
    for name, array in own.items():
        given = state[name]
        if given.shape != (n_rows, *array.shape[1:]) or given.dtype != array.dtype or n_rows > len(array):
            raise ValueError(
                f"{type(buffer).__name__}: the stored {name} has shape {given.shape} and dtype {given.dtype}, which "
                f"does not fit this buffer's {array.shape} and {array.dtype}: it was made with other spaces, another "
                "number of environments or a larger buffer"
            )


def require_ring(buffer: object, state: dict[str, np.ndarray], cut: np.ndarray, obs: Tree) -> None:
    """Refuse the state of a replay buffer that does not say of each row what followed it.

    Args:
        buffer: What is to take it.
        state: Its pos, after_index, and the leaves of after and newest are looked at; `require_fit` sees to the rest.
        cut: Which rows are not followed by the next, (n_rows, n_envs): those of which after_index must speak.
        obs: Room for observations as the buffer's batches have them, (_, n_envs, *obs_shape).

    Raises:
        ValueError: Naming the array, and what it should be.
    """
    n_rows = len(cut)
    pos, after_index = state["pos"], state["after_index"]
    if pos.shape != () or pos.dtype.kind not in "iu" or not 0 <= pos <= n_rows:
        _refuse(buffer, state, "pos", f"one whole number from 0 to {n_rows}, the rows held")
    if after_index.dtype.kind not in "iu" or not np.array_equal(np.sort(after_index, axis=None), np.flatnonzero(cut)):
        what = f"the places of the {np.count_nonzero(cut)} transitions at which episodes were cut"
        _refuse(buffer, state, "after_index", what)
    if after_index.ndim != 1:
        _refuse(buffer, state, "after_index", "a list")
    _require_rows(buffer, state, "after", len(after_index), obs)
    _require_rows(buffer, state, "newest", cut.shape[1] if n_rows else 0, obs)


def require_stacks(buffer: object, state: dict[str, np.ndarray], n_envs: int, obs: Tree) -> None:
    """Refuse the state of a replay buffer whose rows hold frames, unless each row's stack can be put together.

    Args:
        buffer: What is to take it.
        state: Its reward, pos, whole_index and the leaves of whole are looked at.
        n_envs: Number of environments.
        obs: Room for whole observations, (_, n_envs, *obs_shape).

    Raises:
        ValueError: Naming the array, and what it should be.
    """
    n_rows, index = len(state["reward"]), state["whole_index"]
    if index.ndim != 1 or index.dtype.kind not in "iu" or len(np.unique(index)) != len(index):
        _refuse(buffer, state, "whole_index", "a list of places")
    if len(index) and not 0 <= index.min() <= index.max() < n_rows * n_envs:
        _refuse(buffer, state, "whole_index", f"places among those of {n_rows} rows of {n_envs} environments")
    oldest = int(state["pos"]) % n_rows * n_envs + np.arange(n_envs) if n_rows else index
    if not np.isin(oldest, index).all():
        _refuse(buffer, state, "whole_index", "places with those of the oldest row, before which there are no frames")
    _require_rows(buffer, state, "whole", len(index), obs)


def _require_rows(buffer: object, state: dict[str, np.ndarray], part: str, n: int, obs: Tree) -> None:
    """Refuse a stored part that is not `n` of the observations for which `obs` has room, (_, n_envs, *obs_shape)."""
    for name, leaf in leaves(obs, part):
        shape = (n, *leaf.shape[2:])
        if n and (state[name].shape != shape or state[name].dtype != leaf.dtype):
            _refuse(buffer, state, name, f"of shape {shape} and dtype {leaf.dtype}")


def _refuse(buffer: object, state: dict[str, np.ndarray], name: str, what: str) -> NoReturn:
    given = state[name]
    raise ValueError(
        f"{type(buffer).__name__}: the stored {name}, of shape {given.shape} and dtype {given.dtype}, should be "
        f"{what}: the state is damaged, or was made with other spaces or another number of environments"
    )
