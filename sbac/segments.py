"""A large replay buffer beside its checkpoints, in segments: a checkpoint writes what is new and refers to the rest.

A segment is a file of rows that were added one after the other. It is never changed, and named after the numbers of its
rows and its content. Rows are counted from the first that the buffer was ever given; row k lies in place k modulo the
buffer's rows.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sbac.archive import Archive, ArchiveError, inspect_archive, read_archive, write_archive
from sbac.buffers import ReplayBuffer

SMALL = 2**23
"""Bytes of rows up to which a buffer is no matter: it stays in the checkpoint. A last segment so small is made anew."""

LARGE = 2**26
"""Bytes of rows in one segment, at most."""


class Segment(NamedTuple):
    """A file of the rows from `start` up to `stop`."""

    start: int
    stop: int
    digest: str

    @property
    def name(self) -> str:
        """The file's."""
        return f"{self.start}_{self.stop}_{self.digest}.zip"

    @classmethod
    def named(cls, name: str) -> Segment:
        """The segment in a file of this name.

        Raises:
            ArchiveError: It is no such name; above all, none that leads elsewhere.
        """
        match = re.fullmatch(r"(\d{1,18})_(\d{1,18})_([0-9a-f]{32})\.zip", name)
        if match is None:
            raise ArchiveError(f"{name!r} is no name of a segment")
        return cls(int(match[1]), int(match[2]), match[3])


class Segments:
    """The segments of one buffer.

    Args:
        folder: Where they are, apart from those of other runs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._written: list[Segment] = []
        self._lineage: object = None

    def take(self, buffer: ReplayBuffer) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        """Write the rows that are new.

        Returns:
            What to keep in a checkpoint of the buffer, as plain data and as arrays; None for a buffer that is small.

        Raises:
            OSError: A segment can't be written.
        """
        state = buffer.get_state()
        lasting = {name: state.pop(name) for name in list(state) if _part(name) in buffer.lasting}
        after_index = state.pop("after_index")
        after = {name: state.pop(name) for name in list(state) if _part(name) == "after"}
        n_held = len(lasting["reward"])
        if sum(array.nbytes for array in lasting.values()) <= SMALL:
            return None
        row_bytes = max(sum(array.nbytes for array in lasting.values()) // n_held, 1)
        stop, first = buffer.n_added, buffer.n_added - n_held

        before = self._written if buffer.lineage is self._lineage else []
        written = [segment for segment in before if segment.stop > first]
        start = written[-1].stop if written else first
        if written and start < stop:
            last = written[-1]
            if (last.stop - last.start) * row_bytes <= SMALL:
                start = max(written.pop().start, first)
            else:
                start -= 1  # since then it may have been marked as the end of its episode
        while start < stop:
            end = min(start + max(LARGE // row_bytes, 2), stop)
            # Of rows and of the table beside them, each segment has its own.
            places = np.arange(start, end) % buffer.n_rows
            arrays = {f"rows/{name}": array[places] for name, array in lasting.items()}
            row, environment = np.divmod(after_index, buffer.n_envs)
            number = (row - start) % buffer.n_rows
            inside = number < end - start
            arrays["rows/after_index"] = np.stack([number[inside], environment[inside]], axis=1)
            arrays.update({f"rows/{name}": array[inside] for name, array in after.items()})
            segment = Segment(start, end, _digest(arrays))
            if segment not in before:
                write_archive(self.folder / segment.name, Archive(meta={"class": "Segment"}, arrays=arrays))
            written.append(segment)
            start = end
        self._written, self._lineage = written, buffer.lineage
        names = [segment.name for segment in written]
        return {"folder": self.folder.name, "n_added": stop, "n_rows": buffer.n_rows, "segments": names}, state

    def adopt(self, data: Mapping[str, Any], buffer: ReplayBuffer) -> None:
        """Go on with the segments of a checkpoint, which `buffer` was just restored from."""
        if data["folder"] == self.folder.name and data["n_rows"] == buffer.n_rows:
            buffer.n_added = data["n_added"]
            self._written, self._lineage = [Segment.named(name) for name in data["segments"]], buffer.lineage

    def prune(self, needed: Iterable[str], until: int = 0) -> None:
        """Remove the segments that no checkpoint needs any more, and what a killed process left half written.

        Args:
            needed: The names of those that stay.
            until: Those from before this time stay too, in nanoseconds as of `os.stat_result.st_mtime_ns`.

        Raises:
            OSError: One can't be removed.
        """
        names = set(needed)
        for path in list(self.folder.iterdir()) if self.folder.is_dir() else ():
            if path.name not in names and path.stat().st_mtime_ns > until:
                path.unlink(missing_ok=True)


def read_segments(folder: Path, data: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of a buffer that `Segments.take` left out of a checkpoint.

    Args:
        folder: Where the segments are.
        data: The plain data that `take` returned.

    Raises:
        ArchiveError: A segment is missing or damaged, or they do not make up the buffer.
        KeyError, TypeError, ValueError: The data is not what `take` returned.
    """
    n_rows, stop = int(data["n_rows"]), int(data["n_added"])
    first = max(stop - n_rows, 0)
    segments = [Segment.named(name) for name in data["segments"]]
    _require_whole(folder, segments, first, stop)

    state: dict[str, np.ndarray] = {}
    after: dict[tuple[int, int], tuple[int, int]] = {}  # from row and environment to segment and number in its table
    tables: list[dict[str, np.ndarray]] = []
    for i, segment in enumerate(segments):
        arrays = read_archive(folder / segment.name).arrays
        if _digest(arrays) != segment.digest:
            raise ArchiveError(f"{folder / segment.name} is not the segment that the checkpoint was written with")
        arrays = {key.removeprefix("rows/"): array for key, array in arrays.items()}
        index = arrays.pop("after_index")
        tables.append({key: arrays.pop(key) for key in list(arrays) if _part(key) == "after"})
        kept = np.arange(max(segment.start, first), segment.stop)
        for key, array in arrays.items():
            room = state.setdefault(key, np.empty((stop - first, *array.shape[1:]), array.dtype))
            room[kept % n_rows] = array[kept - segment.start]
        for k, (number, environment) in enumerate(index.tolist()):
            if segment.start + number >= first:
                after[(segment.start + number) % n_rows, environment] = (i, k)
    n_envs = state["reward"].shape[1]
    index_of = [row * n_envs + environment for row, environment in after]
    state["after_index"] = np.array(index_of, dtype=np.int64)
    for key in {key for i, _ in after.values() for key in tables[i]}:
        state[key] = np.stack([tables[i][key][k] for i, k in after.values()])
    return state


def _require_whole(folder: Path, segments: Sequence[Segment], first: int, stop: int) -> None:
    """Refuse segments that are not there or not all, by their names and headers, before memory is taken for rows.

    Raises:
        ArchiveError: Naming the segment, or the rows that are missing.
    """
    reached = first
    forms: dict[str, Any] = {}
    for segment in segments:
        path = folder / segment.name
        if not segment.start <= reached < segment.stop:
            raise ArchiveError(f"{path} does not follow row {reached} of the replay buffer: one is missing or too many")
        reached = segment.stop
        try:
            content = inspect_archive(path)
        except FileNotFoundError:
            raise ArchiveError(
                f"{path} is missing, a segment of the replay buffer: the folder {folder.name} belongs beside its "
                "checkpoints, with all that is in it; model.save(path, full=True) writes one file that holds everything"
            ) from None
        for array in content["arrays"]:
            is_table = _part(array["name"].removeprefix("rows/")) in ("after", "after_index")
            number, *shape = array["shape"] or (-1,)
            form: tuple[list[int], str] = (shape, array["dtype"])
            if (
                not (is_table or number == segment.stop - segment.start)
                or forms.setdefault(array["name"], form) != form
            ):
                raise ArchiveError(f"{path} is no segment of this buffer: {array['name']} has shape {array['shape']}")
    if reached != stop:
        raise ArchiveError(f"the segments in {folder} hold the replay buffer up to row {reached}, not to {stop}")


def _part(name: str) -> str:
    return name.split("/")[0]


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    """What tells one content from another."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype.str} {arrays[name].shape};".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
