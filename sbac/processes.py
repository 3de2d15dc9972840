"""Ends a process with all that it started."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path


def descendants(pid: int) -> list[int]:
    """Processes that a process started and those that they started, as Linux tells; elsewhere none are found."""
    found: list[int] = []
    with suppress(OSError):  # it has just ended
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in map(int, children.read_text().split()):
                found += [child, *descendants(child)]
    return found


def kill_with_descendants(pid: int) -> None:
    """SIGKILL to a process that has not been waited for yet, and to all that it started."""
    family = descendants(pid)  # before it ends, after which nobody knows whose they were
    # First of all it, which may start others in their place, unless it is this one.
    for member in (*family, pid) if pid == os.getpid() else (pid, *family):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(member, signal.SIGKILL)
