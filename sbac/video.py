"""Films of an environment's frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def check_film(path: Path) -> None:
    """Refuse a name that is not that of a film.

    Raises:
        ValueError: It ends in neither .gif nor .mp4.
    """
    if path.suffix not in (".gif", ".mp4"):
        raise ValueError(f"a film ends in .gif or .mp4, not {path.name!r}")


def write_video(path: Path, frames: Sequence[np.ndarray], fps: float) -> None:
    """Write frames as a film.

    Args:
        path: Ends in .gif (needs nothing more) or .mp4 (needs ``sbac[video]``).
        frames: (height, width, 3) uint8 each.
        fps: Frames a second, above 0.

    Raises:
        ValueError: Another ending, or no frames.
        ImportError: The package that writes .mp4 is not installed.
    """
    check_film(path)
    if not frames:
        raise ValueError("there are no frames to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gif":
        from PIL import Image

        images = [Image.fromarray(frame) for frame in frames]
        images[0].save(path, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
        return
    try:
        from moviepy import ImageSequenceClip
    except ImportError as error:
        raise ImportError("writing .mp4 needs moviepy: pip install 'sbac[video]', or name a .gif") from error
    ImageSequenceClip(list(frames), fps=fps).write_videofile(str(path), logger=None)
