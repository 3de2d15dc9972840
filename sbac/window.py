"""The window that environments draw in, for a person who watches."""

from __future__ import annotations

import os
import sys


def ready_window() -> None:
    """Leave signals to this process, and say so where nobody would see a window."""
    # SDL, which draws for most environments, takes SIGTERM for itself, and environments never ask it.
    os.environ.setdefault("SDL_NO_SIGNAL_HANDLERS", "1")
    seen_by = ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER")
    if sys.platform == "linux" and not any(map(os.environ.get, seen_by)):
        print("there is no display here, so that no window is seen; --video FILE.gif writes a film", file=sys.stderr)


def is_window_closed() -> bool:
    """Whether the person closed it, which environments that draw with pygame do not look at."""
    pygame = sys.modules.get("pygame")
    return pygame is not None and bool(pygame.display.get_init() and pygame.event.peek(pygame.QUIT))
