"""Memory that was freed, and is needed again at once."""

from __future__ import annotations

import numpy as np

KEPT = 31 * 2**20
"""Bytes of a block that is just below the largest by whose size the C library goes, 32 MiB."""


def keep_freed_memory() -> None:
    """Let the C library keep up to 62 MiB that were freed, for what is allocated next.

    An update allocates and frees the same blocks as the one before. At first glibc returns large ones to the system,
    which hands out empty pages in their place, each with an interrupt: with two critics of 256-256 and batches of 256
    that may take a fifth of an update. It keeps more once a larger block was freed (mallopt(3), M_MMAP_THRESHOLD and
    M_TRIM_THRESHOLD), as happens sooner or later in many programs. Here one is freed that was never written to, and so
    never took memory. Other C libraries are not concerned.
    """
    np.empty(KEPT, np.uint8)
