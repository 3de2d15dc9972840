"""What passes between a worker and the rest of the world: weights, gradients, counts, reports.

On one machine the weights, the optimizer's statistics and a few counters lie in one block of memory that all processes
map. Each worker writes to its own row of counters and its own socket only, so that one that is killed at any moment
leaves no lock held. The block has no name and nobody holds a semaphore: with the last process everything is gone.
"""

from __future__ import annotations

import math
import mmap
import os
import pickle
import select
import signal
import socket
import struct
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, Protocol, Self

import cloudpickle
import numpy as np
import torch
from torch import Tensor

from sbac.normalization import Ledger
from sbac.processes import kill_with_descendants
from sbac.trainable import Trainable

# The columns of a worker's row of counters. The parent writes ALLOWED and TURN, the worker the others. PAGE is that of
# its account in a `Ledger`.
STEPS, UPDATES, BEAT, ALLOWED, TURN, PAGE = range(6)
# The columns of the parent's row: whether workers are to stop, the count of transitions to begin with, how many make a
# whole rollout, and whether all that there are have been granted, so that the last rollouts may be shorter.
STOP, FIRST_STEP, ROLLOUT, ALL_GRANTED = range(4)
ROW = 8  # one row fills a cache line, so that workers do not slow each other down

FREELY = 2**62
"""A TURN that never comes to an end."""

WAKE, ASK_STATE = b".", b"?"
"""What the parent calls to a worker that waits."""

LOOK_SECONDS = 0.05
"""How often a worker reports, and how long the parent waits for a report."""


PARENT_SECONDS, ORPHAN_SECONDS = 1.0, 2.0
"""How often a worker looks whether its parent is there, and how long it may take to end by itself where it is not."""


class ParentGone(SystemExit):
    """Nobody needs the work any more."""


class Report(NamedTuple):
    """What a worker did since its last report."""

    worker: int
    steps: int  # transitions, over all environments of the worker
    updates: int
    numbers: Mapping[str, float]  # sums over the updates
    reward: np.ndarray  # (k, n_envs): of each step of the worker's environments
    done: np.ndarray  # (k, n_envs) bool
    infos: list[tuple[int, int, dict[str, Any]]]  # step, environment and info of each episode that ended
    pickled_infos: bytes | None = None  # the same with all that environments sent, where that could be pickled


class Transport(Protocol):
    """What a worker needs of the world: the weights, the count of steps, and somebody who listens."""

    def begin(self) -> int:
        """Wait until a rollout may begin. Returns how many transitions it may take; 0 ends the work."""

    def count(self) -> int:
        """Transitions that all workers took so far."""

    def pull(self, policy: Trainable) -> None:
        """theta' <- theta."""

    def push(self, policy: Trainable, learning_rate: float) -> None:
        """Step theta along the gradient that theta' computed.

        Raises:
            NotFiniteError: It would lead to weights that are not finite. They are as they were.
        """

    def observe(self, reward: np.ndarray, done: np.ndarray, infos: Sequence[dict[str, Any]]) -> None:
        """Take note of a step of n environments: rewards and ends, (n,) each, and what they sent."""

    def report(self, steps: int, numbers: Mapping[str, Tensor]) -> None:
        """Count a rollout of so many transitions, and tell of it and its update's numbers."""


class SharedMemory:
    """Named tensors and the workers' counters in one block that processes share.

    Args:
        layout: Shape and dtype of each tensor.
        n_workers: How many rows of counters.
        descriptor: Of the block, in a process that did not make it.

    Attributes:
        tensors: By name; views of the block.
        rows: The counters, (n_workers, ROW) int64.
        flags: The parent's row, (ROW,) int64.
        descriptor: To be passed on to the processes.
    """

    def __init__(
        self, layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]], n_workers: int, descriptor: int | None = None
    ) -> None:
        self.layout = dict(layout)
        counters = (n_workers + 1) * ROW
        offsets: dict[str, int] = {}
        size = counters * 8
        for name, (shape, dtype) in self.layout.items():
            offsets[name] = size
            size += -(-math.prod(shape) * dtype.itemsize // 64) * 64
        self.descriptor = anonymous_file(size) if descriptor is None else descriptor
        try:
            block = mmap.mmap(self.descriptor, size)
        except OSError:
            self.close()
            raise
        table = np.frombuffer(block, np.int64, counters).reshape(n_workers + 1, ROW)
        self.flags, self.rows = table[0], table[1:]
        self.tensors: dict[str, Tensor] = {}
        for name, (shape, dtype) in self.layout.items():
            count = math.prod(shape)
            if count:
                flat = torch.frombuffer(block, dtype=dtype, count=count, offset=offsets[name])
                self.tensors[name] = flat.view(shape)
            else:
                self.tensors[name] = torch.empty(shape, dtype=dtype)

    @classmethod
    def holding(cls, tensors: Mapping[str, Tensor], n_workers: int, first_step: int) -> Self:
        """A block with copies of tensors, where the count of transitions begins with `first_step`."""
        memory = cls({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}, n_workers)
        for name, tensor in tensors.items():
            memory.tensors[name].copy_(tensor)
        memory.flags[FIRST_STEP] = first_step
        return memory

    def ledger(self, rank: int = 0) -> Ledger | None:
        """The accounts of what workers observe, if there are such, to be written to by one of them."""
        accounts = self.tensors.get("ledger")
        return None if accounts is None else Ledger(accounts.numpy(), self.rows[:, PAGE], rank)

    def copy_to(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite tensors of the same names with what the block holds now."""
        for name, tensor in tensors.items():
            tensor.copy_(self.tensors[name])

    def close(self) -> None:
        """Give the descriptor back; the memory goes with the last tensor and the last process that use it."""
        os.close(self.descriptor)


def anonymous_file(size: int) -> int:
    """A file in memory without a name, so that nothing of it can be left behind."""
    for stream in range(3):
        try:
            os.fstat(stream)
        except OSError:  # closed; else the file would take its place, and a worker put a stream of its own there
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("sbac")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.truncate(descriptor, size)
    return descriptor


class SharedMemoryTransport(Transport):
    """The `Transport` of worker processes on one machine: weights in shared memory, without locks.

    Args:
        memory: The block.
        rank: Of the worker, which writes to its own row only.
        connection: To the parent.

    All that sends or waits raises `ParentGone` where the parent is.
    """

    def __init__(self, memory: SharedMemory, rank: int, connection: socket.socket) -> None:
        self._memory, self._row, self._connection = memory, memory.rows[rank], connection
        self.rank = rank
        self._readable = select.poll()
        self._readable.register(connection, select.POLLIN)
        self._outbox = bytearray()
        self._shared: Trainable | None = None
        self._version = 0
        self._told_at = time.monotonic()
        self._forget()

    def _forget(self) -> None:
        self._steps = self._updates = 0
        self._sums: dict[str, Tensor | float] = {}
        self._reward: list[np.ndarray] = []
        self._done: list[np.ndarray] = []
        self._infos: list[tuple[int, int, dict[str, Any]]] = []

    def hold(self, policy: Trainable, state: Callable[[], Mapping[str, np.ndarray]]) -> None:
        """Let a policy be the one whose weights and optimizer's statistics all workers share.

        Args:
            policy: theta, from now on in shared memory.
            state: Gives what a successor needs to go on where this worker is between two rollouts.
        """
        policy.live_in(self._memory.tensors)
        self._shared, self._state = policy, state
        normalizer = getattr(policy, "normalizer", None)
        if normalizer is not None:
            normalizer.ledger = self._memory.ledger(self.rank)

    def be_ready(self) -> None:
        """Say that all is made: from now on, steps are expected."""
        self._send("ready", None)

    def begin(self) -> int:
        row, flags = self._row, self._memory.flags
        while not flags[STOP]:
            row[BEAT] += 1
            is_last = flags[ALL_GRANTED]  # read before the budget, which is written before it
            budget = int(row[ALLOWED] - row[STEPS])
            if row[UPDATES] < row[TURN] and budget > 0 and (budget >= flags[ROLLOUT] or is_last):
                return budget
            self._tell()
            self._wait()
        self._tell()
        self._send("state", self._state())
        return 0

    def _wait(self) -> None:
        """Until the parent wakes the worker, or a moment has passed."""
        if self._readable.poll(LOOK_SECONDS * 1000):
            try:
                calls = self._connection.recv(4096)
            except OSError:
                calls = b""
            if not calls:
                raise ParentGone
            if ASK_STATE in calls:
                self._send("state", self._state())

    def count(self) -> int:
        return int(self._memory.flags[FIRST_STEP] + self._memory.rows[:, STEPS].sum())

    def pull(self, policy: Trainable) -> None:
        assert self._shared is not None
        policy.follow(self._shared, tau=1.0)
        self._version = int(self._memory.rows[:, UPDATES].sum())

    def push(self, policy: Trainable, learning_rate: float) -> None:
        assert self._shared is not None
        self._shared.set_learning_rate(learning_rate)
        self._shared.step_along(policy)

    def observe(self, reward: np.ndarray, done: np.ndarray, infos: Sequence[dict[str, Any]]) -> None:
        self._row[BEAT] += 1
        if done.any():
            self._infos.extend((len(self._reward), int(i), infos[int(i)]) for i in np.flatnonzero(done))
        self._reward.append(reward)
        self._done.append(done)

    def report(self, steps: int, numbers: Mapping[str, Tensor]) -> None:
        staleness = int(self._memory.rows[:, UPDATES].sum()) - self._version
        self._row[UPDATES] += 1
        self._row[STEPS] += steps
        self._steps += steps
        self._updates += 1
        for name, value in numbers.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach()
        self._sums["staleness"] = self._sums.get("staleness", 0.0) + staleness
        is_due = time.monotonic() - self._told_at >= LOOK_SECONDS or self._row[TURN] < FREELY
        # Where the parent does not read for a while, training goes on and the next report grows.
        if is_due:
            if self._outbox:
                self._flush(wait=False)
            if not self._outbox:
                self._tell(wait=False)

    def _tell(self, wait: bool = True) -> None:
        if self._updates:
            sums = {name: float(value) for name, value in self._sums.items()}
            reward, done = np.array(self._reward), np.array(self._done)
            plain = [(step, i, _plain(info)) for step, i, info in self._infos]
            try:
                pickled = cloudpickle.dumps(self._infos)
            except Exception:  # environments may put in what no other process can hold
                pickled = None
            told = Report(self.rank, self._steps, self._updates, sums, reward, done, plain, pickled)
            self._outbox += message("report", told)
            self._forget()
        self._flush(wait)  # also what the parent had no room for before
        self._told_at = time.monotonic()

    def _send(self, kind: str, content: Any) -> None:
        self._outbox += message(kind, content)
        self._flush(wait=True)

    def _flush(self, wait: bool) -> None:
        """Send what is to be sent, all of it or, without waiting, what the parent has room for."""
        try:
            while self._outbox:
                sent = self._connection.send(self._outbox, 0 if wait else socket.MSG_DONTWAIT)
                del self._outbox[:sent]
        except BlockingIOError:
            pass
        except OSError:
            raise ParentGone from None


def _plain(info: Mapping[str, Any]) -> dict[str, Any]:
    names = ("episode", "is_success", "TimeLimit.truncated", "terminal_observation")
    return {name: info[name] for name in names if name in info}


def message(kind: str, content: Any) -> bytes:
    """A message as it goes through a socket: its length, and a pickle."""
    data = cloudpickle.dumps((kind, content))
    return struct.pack("<Q", len(data)) + data


def serve(memory_descriptor: int, socket_descriptor: int, payload_descriptor: int) -> None:
    """What a worker process runs, from its start to its end."""
    torch.set_num_threads(1)
    # Ctrl-C reaches all processes of a terminal, and a scheduler's SIGTERM all of a job: they are for the parent to
    # answer. Not ignored but handled, so that programs which an environment starts are not deaf to them, and neither
    # are its forks.
    for number, usual in ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        signal.signal(number, lambda *_: None)
        os.register_at_fork(after_in_child=partial(signal.signal, number, usual))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # blocked until here
    for descriptor in (memory_descriptor, socket_descriptor):
        os.set_inheritable(descriptor, False)  # programs that an environment starts must not keep them open
    connection = socket.socket(fileno=socket_descriptor)
    threading.Thread(target=_end_with_parent, args=(socket_descriptor, os.getppid()), daemon=True).start()
    with os.fdopen(payload_descriptor, "rb") as file:
        data = file.read()
    try:
        layout, n_workers, rank, launch, state, work = pickle.loads(data)
        transport = SharedMemoryTransport(SharedMemory(layout, n_workers, memory_descriptor), rank, connection)
        work(transport, launch, state)
    except ParentGone:
        raise
    except BaseException:  # an environment may raise SystemExit too
        with suppress(OSError):
            connection.sendall(message("error", traceback.format_exc()))
        raise SystemExit(1) from None


def _end_with_parent(socket_descriptor: int, parent: int) -> None:
    """Watch the parent from a thread of a worker, which may be in the midst of a long step when the parent is gone."""
    connection = select.poll()
    connection.register(socket_descriptor, 0)  # tells of its end only
    # Where the parent was forked, the fork keeps the socket open.
    while not connection.poll(PARENT_SECONDS * 1000) and os.getppid() == parent:
        pass
    time.sleep(ORPHAN_SECONDS)
    kill_with_descendants(os.getpid())
