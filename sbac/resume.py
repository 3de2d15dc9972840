"""The checkpoints of a run: written now and then, and found again to go on from."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from sbac import checkpoint
from sbac.archive import ArchiveError, remove_leftovers
from sbac.buffers import ReplayBuffer
from sbac.evaluation import vec_normalizers
from sbac.guards import require_whole
from sbac.hold import Hold
from sbac.hooks import BaseCallback
from sbac.segments import Segments

PathLike: TypeAlias = str | os.PathLike[str]


class CheckpointCallback(BaseCallback):
    """Saves a full checkpoint every `save_freq` calls, as ``{name_prefix}_{num_timesteps}_steps.zip``.

    A checkpoint holds all that exact resuming takes, replay buffer and the model's normalisation included, whatever
    `save_replay_buffer` and `save_vecnormalize` say. Of a replay buffer above 8 MiB it writes what is new, into the
    folder ``{name_prefix}_replay`` beside, which belongs to the checkpoints. It is written once all callbacks are done
    with the step. One that can't be written (the disk is full, say) is warned of, and training goes on. Two processes
    cannot write checkpoints of one prefix into one folder at the same time: the second is refused.

    Args:
        save_freq: Calls between two checkpoints, at least 1; a call is one step of all n environments.
        save_path: The folder, made if need be.
        name_prefix: How the names of the files begin.
        save_replay_buffer: Also write the replay buffer alone, as
            ``{name_prefix}_replay_buffer_{num_timesteps}_steps.zip``.
        save_vecnormalize: Also let the `VecNormalize` of Stable-Baselines that the environment is in, if it is in one,
            write its statistics, as ``{name_prefix}_vecnormalize_{num_timesteps}_steps.pkl``.
        verbose: 2 tells of each file.
        resume: "auto" lets `learn` go on from the newest checkpoint in the folder, if there is one, as
            ``learn(resume=True)`` does. None leaves that to `learn`.
        keep_last: How many checkpoints to keep, at least 1: when one was written, older ones of this run are removed.
            None keeps all.
    """

    def __init__(
        self,
        save_freq: int,
        save_path: PathLike,
        name_prefix: str = "rl_model",
        save_replay_buffer: bool = False,
        save_vecnormalize: bool = False,
        verbose: int = 0,
        resume: str | None = None,
        keep_last: int | None = None,
    ) -> None:
        super().__init__(verbose)
        self.save_freq = require_whole("save_freq", save_freq, 1)
        self.save_path = Path(save_path)
        if not isinstance(name_prefix, str) or Path(name_prefix).name != name_prefix:
            raise ValueError(f"name_prefix begins the names of files in save_path, so it cannot be {name_prefix!r}")
        self.name_prefix = name_prefix
        self.save_replay_buffer, self.save_vecnormalize = save_replay_buffer, save_vecnormalize
        if resume not in (None, "auto"):
            raise ValueError(f"resume must be 'auto' or None, not {resume!r}")
        self.resume = resume
        self.keep_last = None if keep_last is None else require_whole("keep_last", keep_last, 1)
        self._written: list[Path] = []  # of this run, from the oldest
        self._segments = Segments(self.save_path / f"{name_prefix}_replay")
        self.hold = Hold(
            self.save_path / f".{name_prefix}.lock",
            f"another process is writing checkpoints {name_prefix}_*_steps.zip into {save_path}: let it end first, or "
            "name another folder or prefix",
        )

    def _init_callback(self) -> None:
        self.save_path.mkdir(parents=True, exist_ok=True)
        for folder in (self.save_path, self._segments.folder):
            remove_leftovers(folder)

    def _on_step(self) -> bool:
        if self.n_calls % self.save_freq == 0:
            self.write_after_step()
        return True

    def write_after_step(self) -> None:
        """Write a checkpoint once all callbacks are done with the present step."""
        self.model._defer(self._write)

    def _write(self) -> None:
        step = self.model.num_timesteps  # of A3C a little later than the callback's
        path = self.save_path / f"{self.name_prefix}_{step}_steps.zip"
        if not self.hold.keeps():
            warnings.warn(f"the checkpoint of step {step} was not written: another process writes there", stacklevel=2)
            return
        try:
            if isinstance(getattr(self.model, "replay_buffer", None), ReplayBuffer):
                checkpoint.save(self.model, path, None, None, full=True, segments=self._segments)
            else:
                self.model.save(path, full=True)
            if self.save_replay_buffer and hasattr(self.model, "replay_buffer"):
                self.model.save_replay_buffer(self._buffer_beside(path))
            for normalizer in vec_normalizers(self.training_env)[:1] if self.save_vecnormalize else ():
                normalizer.save(str(self._statistics_beside(path)))
        except OSError as error:
            warnings.warn(f"the checkpoint of step {step} was not written: {error}", stacklevel=2)
            return
        if self.verbose >= 2:
            print(f"Saved a checkpoint: {path}")
        self._written = [*(other for other in self._written if other != path), path]
        if self.keep_last is not None:
            old, self._written = self._written[: -self.keep_last], self._written[-self.keep_last :]
            try:
                self._remove(old)
            except OSError as error:
                warnings.warn(f"older checkpoints could not be removed: {error}", stacklevel=2)

    def _remove(self, old: list[Path]) -> None:
        """Remove checkpoints, and then the segments of the replay buffer that none of those left needs."""
        for path in old:
            path.unlink(missing_ok=True)
            self._buffer_beside(path).unlink(missing_ok=True)
            self._statistics_beside(path).unlink(missing_ok=True)
        needed: list[str] = []
        unknown_until = 0
        for path in self.checkpoints():
            try:
                needed += checkpoint.referred_segments(path)
            except ArchiveError:  # damaged or newer: what it needs was written before it
                unknown_until = max(unknown_until, path.stat().st_mtime_ns)
        self._segments.prune(needed, unknown_until)

    def _buffer_beside(self, path: Path) -> Path:
        number = path.name.removeprefix(f"{self.name_prefix}_")
        return path.with_name(f"{self.name_prefix}_replay_buffer_{number}")

    def _statistics_beside(self, path: Path) -> Path:
        number = path.stem.removeprefix(f"{self.name_prefix}_")
        return path.with_name(f"{self.name_prefix}_vecnormalize_{number}.pkl")

    def checkpoints(self) -> list[Path]:
        """The checkpoints in the folder, from the oldest to the newest."""
        pattern = re.compile(rf"{re.escape(self.name_prefix)}_(\d+)_steps\.zip")
        found = []
        for path in self.save_path.glob("*.zip"):
            if match := pattern.fullmatch(path.name):
                # By the clock first: an earlier run may have left later steps in the folder, or an earlier version
                # files that do not say when they were written.
                found.append((checkpoint.written_at(path), int(match[1]), path))
        return [path for *_, path in sorted(found)]

    def restore(self, model: Any) -> dict[str, Any] | None:
        """Bring a model to its newest checkpoint that can be read.

        Returns:
            What `checkpoint.continue_run` needs; None where there is no checkpoint, and the model is as it was.

        Raises:
            ArchiveError: There are checkpoints, but none that can be resumed from.
            ValueError: The newest is not of this algorithm, or of other spaces.
        """
        found = self.checkpoints()
        for i in reversed(range(len(found))):
            try:
                run, remarks = checkpoint.restore(model, found[i], self._segments)
            except ArchiveError as error:
                warnings.warn(f"a checkpoint cannot be resumed from, the one before is tried: {error}", stacklevel=2)
                continue
            for remark in remarks:
                warnings.warn(remark, stacklevel=2)
            self._written = found[: i + 1]
            print(f"resumed from {found[i]}, at step {model.num_timesteps:,}")
            return run
        if found:
            raise ArchiveError(
                f"none of the {len(found)} checkpoints {self.name_prefix}_*_steps.zip in {self.save_path} can be "
                "resumed from (the warnings say why); to begin anew, name another folder or prefix, or move them away"
            )
        return None


@contextmanager
def folders_held(callback: BaseCallback) -> Iterator[None]:
    """While it lasts, no other process writes into the folders of the checkpoints among these callbacks.

    Raises:
        ValueError: One does already.
    """
    with ExitStack() as stack:
        for one in callback.everyone():
            if isinstance(one, CheckpointCallback):
                one.save_path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(one.hold)
        yield


def resume_run(model: Any, callback: BaseCallback, is_asked: bool) -> dict[str, Any] | None:
    """Bring a model to the newest checkpoint of a run, if that is wanted.

    Args:
        model: In which to go on.
        callback: What `learn` was given; a `CheckpointCallback` in it knows the folder.
        is_asked: Whether `learn` was told to resume, rather than the callback.

    Returns:
        What `checkpoint.continue_run` needs; None for a run that begins.

    Raises:
        ValueError: There is no `CheckpointCallback`.
    """
    everywhere = [one for one in callback.everyone() if isinstance(one, CheckpointCallback)]
    if is_asked and not everywhere:
        raise ValueError(
            "learn(resume=True) goes on from the newest checkpoint of a CheckpointCallback: pass one as callback"
        )
    for one in everywhere:
        if is_asked or one.resume:
            run = one.restore(model)
            if run is not None:
                return run
            if is_asked:
                print(f"nothing to resume in {one.save_path}: training begins at the beginning")
    return None
