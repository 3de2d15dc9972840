"""A name in a folder that one process holds at a time, so that two do not write the same files."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Self

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]


class Hold:
    """``with hold:`` keeps other processes out until its end, or until this process ends, however it does.

    Where that cannot be had (the folder cannot be written to, the file system has no locks), nobody is kept out. May be
    entered again while it is held.

    Args:
        path: A file to lock, which is there only while it is held.
        refusal: What to say to a process that comes second.
    """

    def __init__(self, path: Path, refusal: str) -> None:
        self._path = path
        self._refusal = refusal
        self._file: IO[bytes] | None = None
        self._depth = 0

    def __enter__(self) -> Self:
        """Take hold.

        Raises:
            ValueError: Another process has it.
        """
        self._depth += 1
        if not self.keeps():
            self._depth -= 1
            raise ValueError(self._refusal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                if self._is_held(file):
                    self._path.unlink()
            file.close()

    def keeps(self) -> bool:
        """Within ``with``: take hold anew, since a process loses its locks on a file when any part of it closes that.

        Returns:
            Whether no other process has it.
        """
        if fcntl is None or self._depth == 0:
            return True
        if self._file is not None and not self._is_held(self._file):
            self._file.close()
            self._file = None
        while self._file is None:
            try:
                file = self._path.open("ab")
            except OSError:  # nothing can be written there
                return True
            try:
                # Of the process, so that children that outlive it hold nothing.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                file.close()
                return False
            except OSError:  # a file system without locks
                file.close()
                return True
            if self._is_held(file):
                self._file = file
            else:  # who had it before has removed it
                file.close()
        return True

    def _is_held(self, file: IO[bytes]) -> bool:
        """Whether the file that is locked is the one that others find."""
        with suppress(OSError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return os.path.samestat(self._path.stat(), os.fstat(file.fileno()))
        return False
