"""Worker processes, seen from their parent: started, granted steps, listened to, and replaced when they fail.

Workers are fresh interpreters, as with the start method "spawn", but none imports the main script again: it needs no
``if __name__ == "__main__":``, and functions and classes that it defines are sent by value.
"""

from __future__ import annotations

import os
import pickle
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import cloudpickle
import numpy as np

from sbac.guards import WorkerFault
from sbac.processes import kill_with_descendants
from sbac.transport import (
    ALL_GRANTED,
    ALLOWED,
    ASK_STATE,
    BEAT,
    FREELY,
    LOOK_SECONDS,
    ROLLOUT,
    STEPS,
    STOP,
    TURN,
    UPDATES,
    WAKE,
    Report,
    SharedMemory,
    SharedMemoryTransport,
    anonymous_file,
)

BEAT_SECONDS = 0.5
"""How often the parent looks whether workers are alive."""

SET_UP_SECONDS = 60.0
"""How long a worker may take to start, where `worker_timeout` is shorter; longer where several share a core."""

FAREWELL_SECONDS = 2.0
"""How long workers may take to finish a last rollout and close their environments, where training was stopped."""

STATE_SECONDS = 3.0
"""How long a worker that waits for its turn may take to tell its state; a worker that was stopped never does."""

CLOSING_SECONDS = 30.0
"""How long they may take to close their environments, where training is complete."""


_LAUNCH = "launch"
"""Of the state of a worker that was not started yet: the number of its launch."""


class _Process:
    """A worker as the parent sees it: its process, its end of the socket, and what of a message has arrived."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.process: subprocess.Popen[bytes] | None = None
        self.error: str | None = None
        self.is_set_up = self.is_done = False
        self.last_beat = -1
        self.silent_seconds = 0.0
        self.began_at: dict[str, np.ndarray] = {}
        self.began_after = 0  # updates
        self._arrived = bytearray()
        self.socket, self._theirs = socket.socketpair()
        self.socket.setblocking(False)

    def start(self, memory: SharedMemory, payload: bytes) -> None:
        """Start it, once whoever ends workers knows of it: Ctrl-C may come at any moment."""
        theirs = self._theirs
        given = anonymous_file(len(payload))
        with os.fdopen(given, "wb", closefd=False) as file:
            file.write(payload)
        os.lseek(given, 0, os.SEEK_SET)
        path = [entry for entry in sys.path if isinstance(entry, str)]
        code = (
            f"import sys; sys.path[:] = {path!r}; "
            f"from sbac.transport import serve; serve({memory.descriptor}, {theirs.fileno()}, {given})"
        )
        # One thread each, whatever library the environment computes with.
        threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS", "NUMEXPR")}
        # Ctrl-C reaches all processes of a terminal, and is for the parent to answer: workers inherit the mask, until
        # `serve` handles it.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                env={**os.environ, **threads},
                pass_fds=(memory.descriptor, theirs.fileno(), given),
                stdin=subprocess.DEVNULL,
            )
        finally:
            theirs.close()
            os.close(given)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def call(self, what: bytes) -> None:
        """End the worker's wait, if it waits."""
        with suppress(OSError):  # full of earlier calls, or of a dead worker
            self.socket.send(what)

    def messages(self) -> Iterator[tuple[str, Any]]:
        """What arrived whole. Never waits for the rest: the worker may have been stopped in the midst of it.

        Raises:
            EOFError: The worker is gone.
        """
        is_gone = False
        try:
            while chunk := self.socket.recv(1 << 18):
                self._arrived += chunk
            is_gone = True
        except BlockingIOError:
            pass
        except OSError:
            is_gone = True
        while len(self._arrived) >= 8:
            (length,) = struct.unpack_from("<Q", self._arrived)
            if len(self._arrived) < 8 + length:
                break
            message = bytes(self._arrived[8 : 8 + length])
            del self._arrived[: 8 + length]
            yield pickle.loads(message)
        if is_gone:
            raise EOFError

    def end(self, patience: float = 0.0) -> int:
        """See the process off, also one that is stopped, and leave no zombie. Returns its exit code."""
        if self.process is None:
            self._theirs.close()
            self.socket.close()
            return 0
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        self.kill()
        self.socket.close()
        return self.process.wait()

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""
        return None if self.process is None else self.process.poll()

    def kill(self) -> None:
        """Let it end with all that it started, without waiting for that."""
        if self.process is not None and self.process.poll() is None:
            kill_with_descendants(self.process.pid)


class WorkerStates:
    """What workers leave behind, so that others can go on where they were: random states, episodes, environments.

    Of one that has not finished a rollout, that is what it was started with: a state, or only the number of its launch,
    from which its random numbers follow.

    Args:
        n_workers: How many.

    Attributes:
        running: The workers that are asked for their states, while some run in turn.
    """

    def __init__(self, n_workers: int) -> None:
        self.n_workers = n_workers
        self.running: Workers | None = None
        self.clear()

    def clear(self) -> None:
        """Let all begin new episodes."""
        self.by_rank: list[dict[str, np.ndarray] | None] = [None] * self.n_workers

    def warn_of_missing(self) -> None:
        """Warn of workers in turn that did not leave theirs."""
        missing = [rank for rank, state in enumerate(self.by_rank) if state is None]
        if missing:
            warnings.warn(
                f"workers {missing} did not tell their states: a run that goes on from here begins them anew",
                stacklevel=3,
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "running": None}  # a copy is in no training

    def get_state(self) -> dict[str, np.ndarray]:
        """All of them, as arrays, for a full checkpoint. Workers that run freely have none that fit together."""
        if self.running is not None:
            self.running.ask_states()
        found = enumerate(self.by_rank)
        return {f"{rank}/{name}": array for rank, state in found if state for name, array in state.items()}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Hold what `get_state` returned."""
        self.clear()
        if any(int(path.partition("/")[0]) >= self.n_workers for path in state):
            return  # of more workers than there are now: all begin new episodes
        for path, array in state.items():
            rank, _, name = path.partition("/")
            own = self.by_rank[int(rank)] = self.by_rank[int(rank)] or {}
            own[name] = array


class Workers:
    """Starts workers, grants them steps, gathers their reports, and replaces those that fail.

    Args:
        work: ``work(transport, launch, state)``, run in each worker; sent by value.
        memory: The block that they share.
        total: Transitions to take, over all workers.
        rollout: Transitions of one rollout at most.
        n_envs: Environments of each worker.
        launches: How many workers were started before, so that none repeats another's random numbers.
        states: Where workers go on, and what they leave in turn.
        first_turn: How many rollouts there were before, so that the turns go on.
        max_restarts: How many workers may be replaced.
        timeout: Seconds without a step after which a worker counts as hanging.
        in_turn: Whether one worker at a time takes one rollout, or all run freely.

    Attributes:
        restarts: How many workers were replaced.
        launches: How many were started, with those before.

    Raises:
        TypeError: `work` cannot be sent.
        OSError: No process can be started.
    """

    def __init__(
        self,
        work: Callable[[SharedMemoryTransport, int, Any], None],
        memory: SharedMemory,
        total: int,
        rollout: int,
        n_envs: int,
        launches: int,
        states: WorkerStates,
        first_turn: int,
        max_restarts: int,
        timeout: float,
        in_turn: bool,
    ) -> None:
        self.restarts = 0
        self._work, self._memory = work, memory
        self._total = -(-total // n_envs) * n_envs
        self._rollout, self._n_envs = rollout, n_envs
        self.launches = launches
        self._max_restarts, self._timeout = max_restarts, timeout
        self._set_up_seconds = SET_UP_SECONDS * max(1.0, len(memory.rows) / usable_cores())
        self._in_turn, self._first_turn = in_turn, first_turn
        self._rank_in_turn = first_turn % len(memory.rows)
        self._states = states
        self._reported = np.zeros_like(memory.rows)
        self._looked_at = time.monotonic()
        self._processes: list[_Process] = []
        self._selector = selectors.DefaultSelector()
        memory.rows[:] = 0
        memory.flags[[STOP, ROLLOUT, ALL_GRANTED]] = 0, rollout, 0
        memory.rows[:, TURN] = 0 if in_turn else FREELY
        try:
            for rank in range(len(memory.rows)):
                self._processes.append(_Process(rank))
                self._launch(self._processes[rank])
        except BaseException:
            self.stop()
            raise

    def _launch(self, process: _Process) -> None:
        rank = process.rank
        state = self._states.by_rank[rank]
        process.began_at = {_LAUNCH: np.array(self.launches)} if state is None else state
        process.began_after = int(self._memory.rows[rank, UPDATES])
        launch = int(process.began_at.get(_LAUNCH, self.launches))
        going_on = None if _LAUNCH in process.began_at else state
        whole = (self._memory.layout, len(self._memory.rows), rank, launch, going_on, self._work)
        try:
            payload = cloudpickle.dumps(whole)
        except Exception as error:
            raise TypeError(
                "what the workers need cannot be sent to them: the function that makes the environment or an argument "
                f"holds something that belongs to this process ({type(error).__name__}: {error}); let the function "
                "make or open it itself"
            ) from error
        if state is None:  # else it has random numbers already
            self.launches += 1
        self._states.by_rank[rank] = None
        process.start(self._memory, payload)
        self._selector.register(process.socket, selectors.EVENT_READ, process)

    @property
    def steps(self) -> int:
        """Transitions that the workers took."""
        return int(self._memory.rows[:, STEPS].sum())

    @property
    def updates(self) -> int:
        """Updates that they made."""
        return int(self._memory.rows[:, UPDATES].sum())

    def reports(self, goes_on: Callable[[], bool]) -> tuple[list[Report], bool]:
        """Grant steps, wait a moment for reports, and replace workers that died or hang.

        Args:
            goes_on: Whether training goes on; asked where a worker failed, which else is not replaced.

        Returns:
            The reports, and whether training goes on.

        Raises:
            WorkerFault: More workers failed than may be replaced.
        """
        self._grant()
        found: list[Report] = []
        failed: dict[_Process, str] = {}
        for key, _ in self._selector.select(LOOK_SECONDS):
            reports, is_gone = self._read(key.data)
            found.extend(reports)
            if is_gone:
                self._selector.unregister(key.fileobj)
                failed[key.data] = _cause(key.data)
        for process, cause in self._silent():
            if process not in failed:
                self._selector.unregister(process.socket)
                process.end()
                failed[process] = cause
        if failed and not goes_on():
            for process in failed:
                process.end()
                process.is_done = True
                found.append(self._untold(process.rank))
            return found, False
        for process, cause in failed.items():
            found.append(self._replace(process, cause))
        return found, True

    def ask_states(self) -> None:
        """Let workers that wait for their turns tell their states. Those of workers that run would not fit together."""
        self._states.clear()
        if not self._in_turn:
            return
        if self._is_turn_over():
            waited_for = {process for process in self._processes if not self._take_beginning(process)}
            for process in waited_for:
                process.call(ASK_STATE)
            deadline = time.monotonic() + STATE_SECONDS
            while waited_for and time.monotonic() < deadline:
                for key, _ in self._selector.select(LOOK_SECONDS):
                    _, is_gone = self._read(key.data)
                    if is_gone or self._states.by_rank[key.data.rank] is not None:
                        waited_for.discard(key.data)
        self._states.warn_of_missing()

    def _take_beginning(self, process: _Process) -> bool:
        """Take what a worker was started with for its state, if it has not finished a rollout since."""
        if self._memory.rows[process.rank, UPDATES] == process.began_after:
            self._states.by_rank[process.rank] = process.began_at
        return self._states.by_rank[process.rank] is not None

    def finish(self, goes_on: Callable[[], bool]) -> tuple[list[Report], bool]:
        """All steps are taken: let workers close their environments, which may take a while.

        Args:
            goes_on: Asked now and then; if not, nobody waits any longer.

        Returns:
            Their last reports, and whether it went on to the end.
        """
        return self._see_off(CLOSING_SECONDS, goes_on)

    def stop(self) -> list[Report]:
        """Let workers finish their rollouts and go; end those that do not go. Returns their last reports."""
        found: list[Report] = []
        try:
            found, _ = self._see_off(FAREWELL_SECONDS, lambda: True)
        finally:
            for process in self._processes:
                process.kill()  # all of them first, should somebody lose patience here
            for process in self._processes:
                process.end()
                if self._states.by_rank[process.rank] is None:
                    self._take_beginning(process)
            self._selector.close()
        found.extend(self._untold(rank) for rank in range(len(self._processes)))
        return found

    def _see_off(self, seconds: float, goes_on: Callable[[], bool]) -> tuple[list[Report], bool]:
        if not self._memory.flags[STOP]:
            self._states.clear()
            self._memory.flags[STOP] = 1
        found: list[Report] = []
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            waited_for = [process for process in self._processes if process.is_set_up and not process.is_done]
            if not waited_for:
                return found, True
            if not goes_on():
                return found, False
            for process in waited_for:
                process.call(WAKE)
            for key, _ in self._selector.select(LOOK_SECONDS):
                reports, is_gone = self._read(key.data)
                found.extend(reports)
                if is_gone:
                    self._selector.unregister(key.fileobj)
                    key.data.is_done = True
        return found, True

    def _grant(self) -> None:
        """Hand out the steps that are left: large shares at first, single rollouts towards the end.

        So nobody waits for the parent while there is much to do, and all end together at the exact count.
        """
        rows = self._memory.rows
        if self._in_turn:
            row, rank = rows[self._rank_in_turn], self._rank_in_turn
            if self._is_turn_over():
                row[ALLOWED] = row[STEPS]  # what a rollout that ended with its episode did not need
                rank = self._rank_in_turn = (self._first_turn + int(rows[:, TURN].sum())) % len(rows)
                left = self._total - int(rows[:, ALLOWED].sum())
                if left:
                    self._memory.flags[ALL_GRANTED] = left <= self._rollout
                    rows[rank, ALLOWED] += min(self._rollout, left)
                    rows[rank, TURN] += 1
                    self._processes[rank].call(WAKE)
            return
        for row, process in zip(rows, self._processes, strict=True):
            left = self._total - int(rows[:, ALLOWED].sum())
            share = max(left // (2 * len(rows)) // self._rollout, 1) * self._rollout
            if left and row[ALLOWED] - row[STEPS] < max(share // 2, self._rollout):
                row[ALLOWED] += min(share, left)
                process.call(WAKE)
        if not self._memory.flags[ALL_GRANTED] and rows[:, ALLOWED].sum() == self._total:
            self._memory.flags[ALL_GRANTED] = 1
            for process in self._processes:
                process.call(WAKE)

    def _is_turn_over(self) -> bool:
        """Whether the worker whose turn it was has told of its rollout, and nobody has the next turn yet."""
        return bool(self._reported[self._rank_in_turn, UPDATES] == self._memory.rows[self._rank_in_turn, TURN])

    def _read(self, process: _Process) -> tuple[list[Report], bool]:
        """The reports that a worker sent, and whether it is gone."""
        found: list[Report] = []
        try:
            for kind, content in process.messages():
                if kind == "report":
                    self._reported[process.rank, [STEPS, UPDATES]] += (content.steps, content.updates)
                    found.append(_opened(content))
                elif kind == "ready":
                    process.is_set_up = True
                elif kind == "error":
                    process.error = content
                elif kind == "state":
                    self._states.by_rank[process.rank] = content
        except EOFError:
            return found, True
        return found, False

    def _untold(self, rank: int) -> Report:
        """The steps and updates that a worker counted but did not live to report."""
        steps, updates = self._memory.rows[rank, [STEPS, UPDATES]] - self._reported[rank, [STEPS, UPDATES]]
        self._reported[rank, [STEPS, UPDATES]] += (steps, updates)
        nothing = np.zeros((0, self._n_envs))
        return Report(rank, int(steps), int(updates), {}, nothing, nothing.astype(bool), [])

    def _replace(self, process: _Process, cause: str) -> Report:
        rank, rows = process.rank, self._memory.rows
        pid = None if process.process is None else process.process.pid
        happened = f"worker {rank} (process {pid}) {cause} after {rows[rank, STEPS]:,} steps"
        detail = f":\n{process.error}" if process.error else ""
        if process.error and not process.is_set_up and not rows[:, STEPS].any():
            raise WorkerFault(f"worker {rank} could not be set up{detail}")
        if self.restarts >= self._max_restarts:
            raise WorkerFault(
                f"{happened}, and max_worker_restarts={self._max_restarts} workers were replaced already; the weights "
                f"are those of the last update{detail}"
            )
        self.restarts += 1
        self._states.by_rank[rank] = None
        if not self._in_turn:
            # What it was granted and did not take is for whoever has time.
            rows[rank, ALLOWED] = rows[rank, STEPS]
            self._memory.flags[ALL_GRANTED] = 0
        warnings.warn(f"{happened}; replaced ({self.restarts} of {self._max_restarts}){detail}", stacklevel=4)
        self._processes[rank] = _Process(rank)
        self._launch(self._processes[rank])
        return self._untold(rank)

    def _silent(self) -> list[tuple[_Process, str]]:
        """Workers that have shown no life for too long, or died while a child of theirs holds the socket."""
        now = time.monotonic()
        if now - self._looked_at < BEAT_SECONDS:
            return []
        # Where the parent itself was away, in an evaluation or suspended, it could not have seen them alive.
        passed = min(now - self._looked_at, 2 * BEAT_SECONDS)
        self._looked_at = now
        for process in self._processes:
            beat = int(self._memory.rows[process.rank, BEAT])
            process.silent_seconds = process.silent_seconds + passed if beat == process.last_beat else 0.0
            process.last_beat = beat
        found: list[tuple[_Process, str]] = []
        for process in self._processes:
            code, patience = process.poll(), self._patience(process)
            if process.is_done:
                continue
            if code is not None:
                found.append((process, _ended_by(code)))
            elif process.silent_seconds > patience:
                found.append((process, f"took no step for {patience:g} seconds and was ended"))
        return found

    def _patience(self, process: _Process) -> float:
        return self._timeout if process.is_set_up else max(self._timeout, self._set_up_seconds)


def usable_cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _opened(report: Report) -> Report:
    """A report with all that environments sent, where this process can hold it."""
    if report.pickled_infos is None:
        return report
    try:
        return report._replace(infos=pickle.loads(report.pickled_infos), pickled_infos=None)
    except Exception:  # of whatever the classes in it do
        return report


def _cause(process: _Process) -> str:
    """See off a worker that left, and say why it did."""
    code = process.end(patience=2.0)
    return "raised an error" if process.error else _ended_by(code)


def _ended_by(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
