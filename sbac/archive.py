"""The model file: a zip of JSON and raw arrays that holds no code.

    meta.json       format, format_version, versions of the software, whatever the caller adds, checksums
    config.json     constructor arguments and spaces as data, see `codec.py`
    <folder>/*.npy  arrays in numpy's format, such as policy/actor.mu.0.weight.npy, optimizer/..., state/...
    state.json      what a full checkpoint adds beside its arrays (optional)
    objects.pkl     a user's own Python objects, by cloudpickle (optional; read only on request)

A file is written whole or not at all. Reading believes nothing that the file says about itself: names, sizes,
shapes and checksums are verified before memory is taken, and nothing but `objects.pkl` can execute code.
Members are stored uncompressed and without a date, so that equal contents give equal bytes.
"""

import contextlib
import difflib
import io
import json
import math
import os
import pickle
import platform
import re
import secrets
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

import cloudpickle
import numpy as np
import torch

FORMAT_VERSION = 1

Source: TypeAlias = str | os.PathLike[str] | BinaryIO

_MAX_JSON = 2**26  # bytes
_CHUNK = 2**20  # bytes copied at a time
_OTHERS = {"meta.json", "config.json", "state.json", "objects.pkl"}  # members that are no arrays

# One number type of numpy in the place of each that only torch has, by size in bytes.
_STAND_INS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}


class ArchiveError(ValueError):
    """A model file is damaged, foreign, too new or hostile, or content does not fit into one."""


@dataclass
class Archive:
    """The content of a model file.

    Attributes:
        meta: Facts about the file, as plain JSON data. Writing adds `format`, `format_version`, `versions`.
        config: What builds the model, as plain JSON data.
        arrays: Arrays of bool, integer, float or complex numbers, or those of `tensor_to_array`, keyed by
            folder and name: "policy/actor.mu.0.weight".
        state: What a full checkpoint adds, as plain JSON data; None without one.
        objects: A user's own Python objects, by path. None if the file has some that were not read.
    """

    meta: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    state: dict[str, Any] | None = None
    objects: dict[str, object] | None = field(default_factory=dict)


# What turns an archive of one version, as read, into one of the next.
_MIGRATIONS: dict[int, Callable[[Archive], Archive]] = {}


def write_archive(path: Source, archive: Archive, *, suffix: str = ".zip") -> Path | None:
    """Write a model file, whole or not at all.

    The file appears under its name only once it is complete and on the disk. If anything fails before, a file
    that had the name keeps its content, and nothing else is left behind.

    Args:
        path: Where to write; missing folders are made. Or a binary file open for writing, which cannot be
            protected in this way.
        archive: What to write.
        suffix: Appended to a path that has none.

    Returns:
        The path written, with its suffix; None for an open file.

    Raises:
        ArchiveError: The content does not fit the format: an array's name or dtype, JSON that is not plain
            data or exceeds 64 MiB, objects that cannot be pickled.
        OSError: The disk is full, the folder is not writable, and the like.
    """
    if not isinstance(path, str | os.PathLike):
        _write_members(path, archive)
        path.flush()
        return None

    path = Path(path)
    if not path.suffix:
        path = Path(f"{path}{suffix}")
    target = Path(os.path.realpath(path))  # a symbolic link stays one
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        with temporary.open("xb") as file:
            _write_members(file, archive)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, temporary)
        temporary.replace(target)
    except OSError as error:
        reason = f"{error.strerror or error} (while writing a model file; any earlier one is unchanged)"
        raise OSError(error.errno, reason, str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # after a success it has moved
            temporary.unlink()

    with contextlib.suppress(OSError):  # the file is whole by now, and not every file system can do this
        _sync_folder(target.parent)
    return path


def read_archive(path: Source, *, allow_pickle: bool = False, members: Callable[[str], bool] | None = None) -> Archive:
    """Read a model file. Executes nothing from it, unless `allow_pickle` is set.

    Args:
        path: The file, with or without its .zip; or a binary file open for reading that can seek.
        allow_pickle: Also load `objects.pkl`. Unpickling runs whatever code the file holds: only for a file
            whose source you trust.
        members: Chooses what to read by name ("state.json", "policy/actor.mu.0.weight.npy"); everything if
            None. `meta.json` and `config.json` are always read.

    Returns:
        The content, brought to the present format version. Arrays are writable, native and own their memory.

    Raises:
        FileNotFoundError: No such file; the message names the most similar one beside it.
        ArchiveError: The file is not one of ours, is damaged, hostile, or was written by a newer sbac.
    """
    with _open_checked(path) as reader:
        wanted = [name for name in reader.members if members is None or members(name)]
        archive = Archive(meta=reader.meta, config=reader.json("config.json"))
        archive.arrays = {name[:-4]: reader.array(name) for name in wanted if name.endswith(".npy")}
        if "state.json" in wanted:
            archive.state = reader.json("state.json")
        if "objects.pkl" in reader.members:
            archive.objects = reader.objects() if allow_pickle and "objects.pkl" in wanted else None

    for version in range(archive.meta["format_version"], FORMAT_VERSION):
        archive = _MIGRATIONS[version](archive)
        archive.meta["format_version"] = version + 1
    return archive


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that were killed left half written in a folder, an hour ago or longer."""
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\.[0-9a-f]{16}\.tmp", path.name):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < time.time() - 3600:
                    path.unlink()


def inspect_archive(path: Source) -> dict[str, Any]:
    """Tell what is in a model file, without reading its arrays or executing anything.

    Args:
        path: As for `read_archive`.

    Returns:
        `meta` and `config` as in the file; `arrays`, a list of dicts (name, shape, dtype, bytes); `state` and
        `objects`, whether the file holds a full checkpoint, and Python objects of the user's own.

    Raises:
        FileNotFoundError, ArchiveError: As for `read_archive`.
    """
    with _open_checked(path) as reader:
        return {
            "meta": reader.meta,
            "config": reader.json("config.json"),
            "arrays": [reader.describe(name) for name in reader.members if name.endswith(".npy")],
            "state": "state.json" in reader.members,
            "objects": "objects.pkl" in reader.members,
        }


def tensor_to_array(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor as an array that a model file can hold.

    A tensor in main memory is not copied: the array shares it. A dtype that numpy lacks, such as bfloat16,
    becomes an unsigned integer in a structured dtype whose one field bears the name of the torch dtype.
    """
    try:
        return tensor.numpy(force=True)
    except TypeError:
        integers = tensor.view(_STAND_INS[tensor.itemsize]).numpy(force=True)
        return integers.view([(str(tensor.dtype).removeprefix("torch."), integers.dtype)])


def array_to_tensor(array: np.ndarray) -> torch.Tensor:
    """Return the tensor that `tensor_to_array` turned into this array. They share their memory."""
    foreign = _torch_dtype(array.dtype)
    if foreign is None:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(f"u{array.itemsize}")).view(foreign)


def _torch_dtype(dtype: np.dtype[Any]) -> torch.dtype | None:
    """The dtype of torch that a structured dtype of one field stands for."""
    name = dtype.names[0] if dtype.names else ""
    found = vars(torch).get(name)
    fits = isinstance(found, torch.dtype) and dtype == np.dtype([(name, f"<u{found.itemsize}")])
    return found if fits else None


def _is_number(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "biufc" or _torch_dtype(dtype) is not None


def _is_array_name(name: str) -> bool:
    """Only folder/name.npy, and above all nothing that leads elsewhere."""
    parts = name.split("/")
    elsewhere = any(part in ("", ".", "..") for part in parts) or "\\" in name or name[1:2] == ":"
    return len(parts) > 1 and name.endswith(".npy") and name.isprintable() and not elsewhere


def _versions() -> dict[str, str]:
    modules = {name: sys.modules.get(name) for name in ("sbac", "torch", "numpy", "gymnasium")}
    versions = {name: str(getattr(module, "__version__", "unknown")) for name, module in modules.items()}
    return {"python": platform.python_version(), **versions}


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_members(file: BinaryIO, archive: Archive) -> None:
    header = {"format": "sbac", "format_version": FORMAT_VERSION, "versions": _versions()}
    with zipfile.ZipFile(file, "w") as target:
        target.writestr(_new_member("config.json"), _to_json("config.json", archive.config))
        for key, array in archive.arrays.items():
            _write_array(target, f"{key}.npy", array)
        if archive.state is not None:
            target.writestr(_new_member("state.json"), _to_json("state.json", archive.state))
        if archive.objects:
            target.writestr(_new_member("objects.pkl"), _to_pickle(archive.objects))

        # The last member vouches for the others: none can be lost, swapped or added unseen.
        checksums = {info.filename: info.CRC for info in target.infolist()}
        meta = {**archive.meta, **header, "checksums": checksums}
        target.writestr(_new_member("meta.json"), _to_json("meta.json", meta))


def _new_member(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)  # dated 1980, so that equal contents give equal bytes
    info.create_system = 3
    return info


def _write_array(target: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    if not _is_array_name(name):
        raise ArchiveError(f"{name!r} is no name for an array in a model file: those are folder/name.npy")
    if not _is_number(array.dtype):
        raise ArchiveError(f"{name!r} has dtype {array.dtype}, but a model file holds arrays of numbers only")

    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    header = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(array.dtype)
    layout = {"shape": array.shape, "fortran_order": False, "descr": descr}
    np.lib.format.write_array_header_1_0(header, layout)
    with target.open(_new_member(name), "w", force_zip64=array.nbytes >= 2**30) as stream:
        stream.write(header.getvalue())
        # Piece by piece in C order, whatever the layout: no second copy of a large array.
        flags: list[Any] = ["external_loop", "buffered", "zerosize_ok"]
        for piece in np.nditer(array, flags, order="C", buffersize=_CHUNK // array.itemsize):
            stream.write(cast(np.ndarray, piece).tobytes())


def _to_json(name: str, value: dict[str, Any]) -> bytes:
    try:
        text = json.dumps(value, indent=1, allow_nan=False)
        if type(value) is not dict or json.loads(text) != value:
            # JSON turns tuples into lists and keys into strings, without a word.
            raise ValueError("it would not be the same after reading; encode it first, see sbac.codec")
    except (TypeError, ValueError, RecursionError) as error:
        raise ArchiveError(f"{name} cannot hold its content: {error}") from error
    if len(text) > _MAX_JSON:
        raise ArchiveError(f"{name} would have {len(text)} bytes, more than the {_MAX_JSON} allowed")
    return text.encode("ascii")


def _to_pickle(objects: dict[str, object]) -> bytes:
    try:
        return cast(bytes, cloudpickle.dumps(objects))
    except Exception as error:  # from the objects' own code
        raise ArchiveError(f"cannot pickle one of {sorted(objects)}: {error!r}") from error


@contextlib.contextmanager
def _open_checked(source: Source) -> Iterator["_Reader"]:
    if not isinstance(source, str | os.PathLike):
        yield _Reader(source, str(getattr(source, "name", "the given file")))
        return
    path = find_file(Path(source))
    with path.open("rb") as file:
        yield _Reader(file, str(path))


def find_file(path: Path) -> Path:
    """The file that a path means: as in writing, a name without a suffix is that of the .zip first.

    Raises:
        FileNotFoundError: There is none; the message names the most similar .zip beside it.
        IsADirectoryError: It is a folder.
    """
    zipped = Path(f"{path}.zip")
    candidates = (path, zipped) if path.suffix else (zipped, path)
    for candidate in candidates:
        if candidate.exists() and not candidate.is_dir():
            return candidate
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a model file")

    neighbours = [entry.name for entry in path.parent.glob("*.zip")]
    nearest = difflib.get_close_matches(candidates[0].name, neighbours, n=1, cutoff=0.5)
    hint = f"did you mean {str(path.parent / nearest[0])!r}?" if nearest else "give a .zip that a model's save wrote"
    raise FileNotFoundError(f"no model file {str(path)!r}; {hint}")


class _Reader:
    """An open model file whose names, sizes and format have been verified."""

    def __init__(self, file: BinaryIO, label: str) -> None:
        self.label = label
        try:
            self.zip = zipfile.ZipFile(file)
            file_size = file.seek(0, os.SEEK_END)
        except Exception as error:  # a broken directory fails in many ways
            raise ArchiveError(f"{label} is not a model file, or was cut short: {error}") from error

        self.members = {info.filename: info for info in self.zip.infolist()}
        if "_stable_baselines3_version" in self.members or {"data", "policy.pth"} <= self.members.keys():
            raise ArchiveError(
                f"{label} is a Stable-Baselines3 file, not a model file of sbac: A2C.load, DDPG.load, TD3.load and "
                "sbac.load read it, and `sbac convert` makes a file of sbac's own of it"
            )
        if "meta.json" not in self.members:
            raise ArchiveError(f"{label} is a zip file, but not a model file of sbac: it has no meta.json")
        self.meta = self.json("meta.json")
        self._check_format()
        self._check_members(file_size)

    def _check_format(self) -> None:
        version = self.meta.get("format_version")
        if self.meta.get("format") != "sbac" or type(version) is not int or version < 1:
            raise ArchiveError(f"{self.label}: meta.json does not say that this is a model file of sbac")
        if version > FORMAT_VERSION:
            versions = self.meta.get("versions")
            writer = versions.get("sbac") if isinstance(versions, dict) else "of unknown version"
            known = f"this sbac reads formats up to {FORMAT_VERSION}: upgrade to at least that version"
            raise ArchiveError(f"{self.label} was written by sbac {writer} in format {version}, but {known}")

    def _check_members(self, file_size: int) -> None:
        if len(self.members) != len(self.zip.infolist()):
            raise ArchiveError(f"{self.label} holds two members of the same name")
        for name in self.members:
            if name not in _OTHERS and not _is_array_name(name):
                raise ArchiveError(f"{self.label} holds {name!r}, which is no member of a model file")

        # Members that share their bytes would let a small file fill the memory.
        if sum(info.file_size for info in self.members.values()) > file_size:
            raise ArchiveError(f"{self.label} is damaged: its members claim more bytes than the file has")

        expected = self.meta.pop("checksums", None)
        expected = expected if isinstance(expected, dict) else {}
        found = {name: info.CRC for name, info in self.members.items() if name != "meta.json"}
        differing = [name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)]
        if differing:
            names = ", ".join(sorted(differing))
            raise ArchiveError(f"{self.label} was changed; missing, new or different are: {names}")

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """Open a member; whatever fails until it is closed becomes an ArchiveError that names it."""
        try:
            info = self.members[name]
            stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
            if not stored or info.flag_bits & 0x1:
                raise ValueError("it is compressed or encrypted, which model files never are")
            with self.zip.open(info) as stream:
                yield cast(BinaryIO, stream)
        # Damage surfaces as errors of zipfile, numpy and json of all kinds.
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise ArchiveError(f"{self.label}: member {name!r} cannot be read: {reason}") from error

    def json(self, name: str) -> dict[str, Any]:
        with self.open(name) as stream:
            if self.members[name].file_size > _MAX_JSON:
                raise ValueError(f"it is larger than the {_MAX_JSON} bytes allowed")
            text = stream.read().decode("utf-8")
            value = json.loads(text, parse_constant=_refuse, object_pairs_hook=_unique)
            if isinstance(value, dict):
                return value
            raise ValueError(f"it holds a {type(value).__name__} where an object belongs")

    def header(self, name: str, stream: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Read an array's header, and compare its claim with the size of the member."""
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError("its format is not version 1.0 of numpy's")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
        if fortran_order or not _is_number(dtype):
            raise ValueError(f"it holds {dtype}, Fortran order {fortran_order}; only numbers in C order may be")

        size = self.members[name].file_size - stream.tell()
        if any(length < 0 for length in shape) or math.prod(shape) * dtype.itemsize != size:
            raise ValueError(f"it claims shape {shape} and dtype {dtype}, but holds {size} bytes")
        return shape, dtype

    def describe(self, name: str) -> dict[str, Any]:
        with self.open(name) as stream:
            shape, dtype = self.header(name, stream)
        kind = dtype.names[0] if dtype.names else dtype.name
        return {"name": name[:-4], "shape": shape, "dtype": kind, "bytes": math.prod(shape) * dtype.itemsize}

    def array(self, name: str) -> np.ndarray:
        with self.open(name) as stream:
            shape, dtype = self.header(name, stream)
            array = np.empty(shape, dtype)
            content = array.reshape(-1).view(np.uint8)
            for start in range(0, len(content), _CHUNK):  # reading the last piece verifies the checksum
                content[start : start + _CHUNK] = np.frombuffer(stream.read(_CHUNK), np.uint8)
        return array.astype(array.dtype.newbyteorder("="), copy=False)

    def objects(self) -> dict[str, object]:
        with self.open("objects.pkl") as stream:
            content = stream.read()
        try:
            return dict(pickle.loads(content))
        except Exception as error:  # from the objects' own code
            problem = f"{type(error).__name__}: {error}; the modules that define the objects must be importable"
            raise ArchiveError(f"{self.label}: cannot load objects.pkl: {problem}") from error


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return result
