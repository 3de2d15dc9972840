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
        obs: The buffer's own observations, (_, n_envs, *obs_shape).

    Raises:
        ValueError: Naming the array, and what it should be.
    """

    def refuse(name: str, what: str) -> NoReturn:
        given = state[name]
        raise ValueError(
            f"{type(buffer).__name__}: the stored {name}, of shape {given.shape} and dtype {given.dtype}, should be "
            f"{what}: the state is damaged, or was made with other spaces or another number of environments"
        )

    n_rows = len(cut)
    pos, after_index = state["pos"], state["after_index"]
    if pos.shape != () or pos.dtype.kind not in "iu" or not 0 <= pos <= n_rows:
        refuse("pos", f"one whole number from 0 to {n_rows}, the rows held")
    if after_index.dtype.kind not in "iu" or not np.array_equal(np.sort(after_index, axis=None), np.flatnonzero(cut)):
        refuse("after_index", f"the places of the {np.count_nonzero(cut)} transitions at which episodes were cut")
    if after_index.ndim != 1:
        refuse("after_index", "a list")
    for part, n in (("after", len(after_index)), ("newest", cut.shape[1] if n_rows else 0)):
        for name, leaf in leaves(obs, part):
            shape = (n, *leaf.shape[2:])
            if n and (state[name].shape != shape or state[name].dtype != leaf.dtype):
                refuse(name, f"of shape {shape} and dtype {leaf.dtype}")
