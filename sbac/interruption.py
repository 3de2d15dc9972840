"""How a training ends when it is asked to from outside: by Ctrl-C, or by the SIGTERM of a scheduler."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from sbac.hooks import BaseCallback
from sbac.resume import CheckpointCallback


class Interruption(BaseCallback):
    """A first signal stops training at the next step, where a checkpoint is written; a second one stops it at once.

    A3C, whose workers may be slow or hang, stops without that step: they end the rollouts that they are in, if they can
    in two seconds.

    To be the last of the callbacks, so that the others have done their part of the step.

    Attributes:
        checkpoints: Writes the checkpoint, if there is one.
        signal: The first signal that came; None before.
        has_begun: Whether the model is in training, that of a resumed run as it was saved.
        at_once: Whether a second one cut the training off in the midst of a step.
        phase: "learning", "saving" (which nothing interrupts) or "saved" (the rest may be cut off).
    """

    signal: signal.Signals | None = None
    has_begun = False
    at_once = False
    phase = "learning"

    def __init__(self) -> None:
        super().__init__()
        self.checkpoints: CheckpointCallback | None = None
        self._has_asked = False

    @property
    def code(self) -> int:
        """The exit code by convention: 130 for Ctrl-C, 143 for SIGTERM, 0 without a signal."""
        return 0 if self.signal is None else 128 + self.signal

    def press(self, number: int, *_: object) -> None:
        """Handle a signal. May come in the midst of a print, so that it writes past Python's streams."""
        is_first = self.signal is None
        self.signal = self.signal or signal.Signals(number)
        if self.phase == "saving":
            self._say("saving the model first")
        elif self.phase == "learning" and is_first:
            self._say("stopping at the next step, then saving the model (again: at once)")
        else:
            if self.phase == "learning":
                self.phase = "saving"  # a third one must not keep the model from being saved
            raise KeyboardInterrupt(self.code)

    def _say(self, text: str) -> None:
        beside_the_bar = "\n" if os.isatty(2) else ""
        with suppress(OSError):
            os.write(2, f"{beside_the_bar}{text}\n".encode())

    def _on_training_start(self) -> None:
        self.has_begun = True

    def _on_step(self) -> bool:
        if self.signal is not None and self.checkpoints is not None and not self._has_asked:
            self._has_asked = True
            self.checkpoints.write_after_step()
        return self.signal is None

    def _on_idle(self) -> bool:
        return self._on_step()


@contextmanager
def interruption() -> Iterator[Interruption]:
    """While it lasts, Ctrl-C and SIGTERM are handled by what it yields."""
    handler = Interruption()
    before = {number: signal.signal(number, handler.press) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield handler
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
