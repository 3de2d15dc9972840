"""What is refused: environments that fail, numbers that are not finite, names and values that do not exist."""

from __future__ import annotations

import difflib
import math
import os
import warnings
from collections.abc import Iterable

import numpy as np

LARGE = 2**30
"""Bytes from which on a replay buffer says how large it is."""


class EnvironmentFault(RuntimeError):
    """An environment raised, died, or sent something that its spaces do not allow."""


class WorkerFault(RuntimeError):
    """Worker processes failed more often than they may be replaced."""


class NotFiniteError(FloatingPointError):
    """NaN or infinity in an observation, a reward, an action, a loss or a gradient."""


def nearest(name: str, known: Iterable[str]) -> str:
    """How an error message continues after an unknown name: the nearest known one, or all of them.

    Returns:
        ``"; did you mean 'gamma'?"`` where a name is near, else ``"; known: a, b, c"``.
    """
    known = sorted(known)
    lowered = {entry.lower(): entry for entry in known}
    close = [entry for entry in lowered if entry.startswith(name.lower())] or difflib.get_close_matches(
        name.lower(), list(lowered), n=1, cutoff=0.6
    )
    if close:
        return f"; did you mean {lowered[close[0]]!r}?"
    return "; known: " + ", ".join(known)


def require_number(
    name: str,
    value: object,
    *,
    minimum: float = -math.inf,
    above: float = -math.inf,
    maximum: float = math.inf,
    below: float = math.inf,
) -> None:
    """Refuse a hyperparameter that is no finite number in its range. A schedule is asked at its start and its end.

    Raises:
        ValueError: Naming the argument, its range and what was received.
    """
    if not callable(value):
        require_constant(name, value, minimum=minimum, above=above, maximum=maximum, below=below)
        return
    for progress_remaining in (1.0, 0.0):
        # A schedule may end on a bound that a number must not lie on: a learning rate goes to 0.
        where = f"{name} with {progress_remaining:g} of the progress remaining"
        bounds = {"minimum": max(minimum, above), "maximum": min(maximum, below)}
        require_constant(where, value(progress_remaining), **bounds)


def require_constant(
    name: str,
    value: object,
    *,
    minimum: float = -math.inf,
    above: float = -math.inf,
    maximum: float = math.inf,
    below: float = math.inf,
) -> None:
    """Refuse what is no finite number in its range; a schedule may not stand for it.

    Raises:
        ValueError: Naming the argument, its range and what was received.
    """
    bounds = [
        f"{word} {bound:g}"
        for word, bound in (("at least", minimum), ("above", above), ("at most", maximum), ("below", below))
        if math.isfinite(bound)
    ]
    number = _number(value)
    if number is None or not (minimum <= number <= maximum and above < number < below):
        raise ValueError(f"{name} must be a finite number {' and '.join(bounds)}".rstrip() + f", not {value!r}")


def require_whole(name: str, value: object, minimum: int) -> int:
    """Refuse a hyperparameter that is no whole number of at least `minimum`; 1e5 counts as whole.

    Returns:
        The value as an int.

    Raises:
        ValueError: Naming the argument and what was received.
    """
    number = _number(value)
    if number is None or number != int(number) or number < minimum:
        raise ValueError(f"{name} must be a whole number, at least {minimum}, not {value!r}")
    return int(number)


def require_memory(n_transitions: int, bytes_each: int) -> None:
    """Say how large a large replay buffer is, and refuse one that does not fit.

    Raises:
        MemoryError: It is larger than the memory of this machine.
    """
    needed = n_transitions * bytes_each
    if needed < LARGE:
        return
    size = f"{needed / 2**30:.1f} GiB ({n_transitions:,} transitions of {bytes_each:,} bytes)"
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf
    if needed > total:
        raise MemoryError(
            f"the replay buffer would take {size}, and this machine has {total / 2**30:.1f} GiB of memory: "
            "choose a smaller buffer_size"
        )
    print(f"replay buffer: {size} when full, {free / 2**30:.1f} GiB of memory are free")


def read_train_freq(train_freq: object) -> tuple[int, str]:
    """How often to learn: a number of steps, or ``(n, "step")`` or ``(n, "episode")``.

    Returns:
        The number, and "step" or "episode".

    Raises:
        ValueError: It is none of these.
    """
    number, unit = (
        train_freq if isinstance(train_freq, (tuple, list)) and len(train_freq) == 2 else (train_freq, "step")
    )
    if unit not in ("step", "episode"):
        raise ValueError(f"train_freq counts in 'step' or 'episode', not in {unit!r}")
    return require_whole("train_freq", number, 1), unit


def require_flag(name: str, value: object) -> bool:
    """Refuse what is neither True nor False: ``"no"`` and 2 would count as True.

    Raises:
        ValueError: Naming the argument and what was received.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be True or False, not {value!r}")
    return bool(value)


def warn_if_nothing_is_learned(held: int, total: int, learning_starts: int, first_after: int) -> None:
    """Say so where a run of an off-policy algorithm ends before its first gradient step.

    Args:
        held: Transitions in the replay buffer.
        total: Transitions to come.
        learning_starts: With more transitions than these, learning begins.
        first_after: Transitions from there to the first gradient step, as `train_freq` asks for.
    """
    if held + total <= learning_starts:
        why = f"learning begins after {learning_starts:,} transitions (learning_starts)"
    elif held + total < learning_starts + first_after:
        why = f"the first gradient step is due {first_after:,} transitions after learning_starts (train_freq)"
    else:
        return
    warnings.warn(f"nothing will be learned: {why}, and there will be {held + total:,}", stacklevel=3)


def _number(value: object) -> float | None:
    """A finite number, or None if it is none."""
    if not isinstance(value, (int, float, np.integer, np.floating)) or isinstance(value, bool):
        return None
    return float(value) if math.isfinite(value) else None
