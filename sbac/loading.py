"""From a file to a model, whichever algorithm wrote it."""

from __future__ import annotations

from typing import Any

from sbac.a2c import A2C
from sbac.a3c import A3C
from sbac.archive import ArchiveError, inspect_archive, write_archive
from sbac.base import BaseAlgorithm
from sbac.ddpg import DDPG
from sbac.guards import nearest
from sbac.saving import PathLike
from sbac.sb3 import read_stable_baselines
from sbac.sb3_file import is_stable_baselines
from sbac.td3 import TD3

ALGORITHMS: dict[str, type[BaseAlgorithm]] = {"a2c": A2C, "a3c": A3C, "ddpg": DDPG, "td3": TD3}


def algorithm(name: str) -> type[BaseAlgorithm]:
    """The class of an algorithm.

    Args:
        name: Such as "ddpg"; upper or lower case.

    Raises:
        ValueError: There is no such algorithm; names the nearest.
    """
    if name.lower() not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {name!r}{nearest(name, ALGORITHMS)}")
    return ALGORITHMS[name.lower()]


def load(path: PathLike, *args: Any, **kwargs: Any) -> BaseAlgorithm:
    """Read a model from a file with the class that wrote it. Arguments as of `BaseAlgorithm.load`.

    The file may be one of Stable-Baselines3's A2C, DDPG or TD3.

    Raises:
        ArchiveError: The file is damaged, foreign, or of an unknown class.
        FileNotFoundError: There is no such file.
    """
    if is_stable_baselines(path):
        name = read_stable_baselines(path)[0].meta["class"]
    else:
        name = inspect_archive(path)["meta"].get("class")
    if str(name).lower() not in ALGORITHMS:
        known = ", ".join(cls.__name__ for cls in ALGORITHMS.values())
        raise ArchiveError(f"{path} holds a model of {name}, which is none of {known}")
    return algorithm(str(name)).load(path, *args, **kwargs)


def inspect(path: PathLike) -> dict[str, Any]:
    """What is in a model file: its meta data, configuration, and the arrays' names, shapes and sizes.

    Nothing in the file is executed, and no array is read.

    Raises:
        ArchiveError: The file is damaged or foreign.
        FileNotFoundError: There is no such file.
    """
    return inspect_archive(path)


def convert(path: PathLike, out: PathLike, vecnormalize: PathLike | None = None) -> list[str]:
    """Make a model file of sbac of one of Stable-Baselines3's A2C, DDPG or TD3. Executes nothing from it.

    Args:
        path: The file; ".zip" may be left out.
        out: Where to write; ".zip" is appended where there is no suffix.
        vecnormalize: What ``VecNormalize.save`` wrote beside it, or None.

    Returns:
        What was left out, and what is taken instead.

    Raises:
        ArchiveError: A file is damaged, or the model has something that sbac has not; names it.
        FileNotFoundError: There is no such file.
    """
    archive, remarks = read_stable_baselines(path, vecnormalize)
    write_archive(out, archive)
    return remarks
