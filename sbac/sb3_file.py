"""The zip file of a Stable-Baselines3 model: its members, with every size checked before memory is taken."""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sbac.archive import Source, find_file


def is_stable_baselines(path: Source) -> bool:
    """Whether a file is a model of Stable-Baselines3; False where it is no zip file, or is not there."""
    try:
        source = find_file(Path(path)) if isinstance(path, (str, os.PathLike)) else path
        with zipfile.ZipFile(source) as file:
            names = set(file.namelist())
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return False
    return "_stable_baselines3_version" in names or {"data", "policy.pth"} <= names


class Members:
    """The members of a file, whose sizes have been compared with that of the file."""

    def __init__(self, file: zipfile.ZipFile) -> None:
        self._file = file
        self.infos = _checked(file)

    def read(self, name: str, most: float = math.inf) -> bytes:
        """The bytes of a member, of which there may be `most`."""
        if name not in self.infos:
            raise ValueError(f"it has no member {name!r}")
        if self.infos[name].file_size > most:
            raise ValueError(f"the member {name!r} is larger than the {most} bytes allowed")
        return self._file.read(name)

    def text(self, name: str) -> str:
        """A member that is a short text, or "unknown" where there is none."""
        return self.read(name, 2**16).decode("utf-8", "replace").strip() if name in self.infos else "unknown"

    def tensors(self, name: str) -> dict[str, Any]:
        """What a ``.pth`` member holds: a dict of tensors and plain values, nested."""
        content = self.read(name)
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as inner:
                _checked(inner)
            found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:  # of whatever torch's reader meets
            raise ValueError(f"the member {name!r} cannot be read: {str(error).splitlines()[0]}") from error
        if not isinstance(found, dict):
            raise ValueError(f"the member {name!r} holds a {type(found).__name__}, not a dict")
        _check_tensors(name, found)
        return found


def _checked(file: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Refuse members that are compressed, doubled, or claim more bytes than there are."""
    infos = {info.filename: info for info in file.infolist()}
    if len(infos) != len(file.infolist()):
        raise ValueError("it holds two members of the same name")
    for info in infos.values():
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 0x1:
            raise ValueError(f"the member {info.filename!r} is compressed or encrypted, which its library never does")
    assert file.fp is not None
    size = file.fp.seek(0, os.SEEK_END)
    if sum(info.file_size for info in infos.values()) > size:
        raise ValueError("it is damaged: its members claim more bytes than the file has")
    return infos


def _check_tensors(name: str, values: Any) -> None:
    """Refuse tensors that are more than the bytes behind them, or of unusual kinds."""
    pending = [values]
    while pending:
        value = pending.pop()
        if isinstance(value, Mapping):
            pending.extend(value.values())
        elif isinstance(value, (list, tuple)):
            pending.extend(value)
        elif isinstance(value, Tensor):
            is_plain = value.layout == torch.strided and value.device.type == "cpu"
            if not is_plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise ValueError(f"the member {name!r} holds a tensor that is not what it claims to be")
