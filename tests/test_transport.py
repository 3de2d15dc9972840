"""What passes between workers: shared weights, gradients, counts, messages, all within this process."""

from __future__ import annotations

import gc
import os
import pickle
import socket
import struct
import sys
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sbac import optimization
from sbac.guards import NotFiniteError
from sbac.optimization import RMSpropTFLike
from sbac.trainable import Trainable
from sbac.transport import (
    ALL_GRANTED,
    ALLOWED,
    FREELY,
    ROLLOUT,
    STEPS,
    STOP,
    TURN,
    UPDATES,
    SharedMemory,
    SharedMemoryTransport,
)
from sbac.workers import _Process

LEARNING_RATE = 0.01


class Net(Trainable):
    """Two layers and a batch normalisation, so that there are buffers too."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.flatten()
        self.set_optimizer(torch.optim.RMSprop, LEARNING_RATE, {"alpha": 0.99, "eps": 1e-5})

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Worker(SharedMemoryTransport):
    """A worker's end, and the parent's."""

    parent: socket.socket


def transports(n_workers: int, start: Net) -> tuple[SharedMemory, list[Worker]]:
    """Workers of one process, over the weights of `start`."""
    memory = SharedMemory.holding(start.state_tensors(), n_workers, first_step=0)
    memory.rows[:, TURN] = FREELY
    made = []
    for rank in range(n_workers):
        ours, theirs = socket.socketpair()
        transport = Worker(memory, rank, theirs)
        transport.parent = ours
        theta = Net(seed=100 + rank)
        transport.hold(theta, dict)
        made.append(transport)
    return memory, made


def loss_of(net: Net, x: Tensor) -> Tensor:
    return (net(x) - x.sum(1, keepdim=True)).square().mean()


@pytest.mark.parametrize("optimizer", [torch.optim.NAdam, torch.optim.Rprop, torch.optim.ASGD])
def test_optimizers_whose_statistics_begin_elsewhere_are_refused(optimizer):
    net = Net(seed=0)
    net.set_optimizer(optimizer, LEARNING_RATE)
    with pytest.raises(ValueError, match=f"{optimizer.__name__} keeps statistics that processes cannot share"):
        net.state_tensors()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.AdamW])
def test_optimizers_whose_statistics_begin_at_zero_are_shared(optimizer):
    net = Net(seed=0)
    net.set_optimizer(optimizer, LEARNING_RATE)
    assert "flat" in net.state_tensors()


def test_the_look_at_an_optimizer_does_not_depend_on_the_weights(monkeypatch):
    net = Net(seed=0)
    copy = optimization.copy.deepcopy

    def moving(value: Any) -> Any:
        with torch.no_grad():
            net.flat += 1.0  # another worker's push, between one copy and the next
        return copy(value)

    monkeypatch.setattr(optimization.copy, "deepcopy", moving)
    assert net.state_tensors()["optimizer/square_avg"].sum() == 0


def test_a_push_keeps_what_others_wrote_in_the_meantime(monkeypatch):
    memory, (worker,) = transports(1, Net(seed=0))
    start = memory.tensors["flat"].clone()
    local = Net(seed=0)
    local.gradient(loss_of(local, torch.ones(4, 3)))
    step = worker._shared.step

    def interrupted() -> None:
        step()
        memory.tensors["flat"] += 1.0  # another worker's push, while the step is computed

    monkeypatch.setattr(worker._shared, "step", interrupted)
    worker.push(local, LEARNING_RATE)
    alone = Net(seed=0)
    alone.gradient(loss_of(alone, torch.ones(4, 3)))
    alone.step()
    assert torch.allclose(memory.tensors["flat"] - start, alone.flat.detach() - start + 1.0, atol=1e-6)


@pytest.mark.parametrize("n_workers", [1, 2])
def test_ten_pushes_are_ten_rmsprop_steps_written_out_by_hand(n_workers):
    start = Net(seed=0)
    theta, square_avg = start.flat.detach().clone(), torch.zeros_like(start.flat.detach())
    accumulated = torch.zeros_like(theta)  # what a worker that never clears its gradient would push
    wrong = theta.clone()
    memory, workers = transports(n_workers, start)
    local = [Net(seed=50 + rank) for rank in range(n_workers)]
    by_hand = Net(seed=0)
    for turn in range(10):
        rank = turn % n_workers
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(turn))
        workers[rank].pull(local[rank])
        assert torch.equal(local[rank].flat, memory.tensors["flat"])
        local[rank].gradient(loss_of(local[rank], x))
        workers[rank].push(local[rank], LEARNING_RATE)
        workers[rank].report(8, {})

        # v <- alpha v + (1 - alpha) g^2, theta <- theta - eta g / (sqrt(v) + eps), the gradient by autograd alone.
        with torch.no_grad():
            start_of = 0
            for parameter in by_hand.parameters():
                parameter.copy_(theta[start_of : start_of + parameter.numel()].view_as(parameter))
                start_of += parameter.numel()
        gradient = torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss_of(by_hand, x), list(by_hand.parameters()))]
        )
        square_avg = 0.99 * square_avg + 0.01 * gradient**2
        theta = theta - LEARNING_RATE * gradient / (square_avg.sqrt() + 1e-5)
        accumulated = accumulated + gradient
        wrong = wrong - LEARNING_RATE * accumulated / (square_avg.sqrt() + 1e-5)
        assert torch.allclose(memory.tensors["flat"], theta, rtol=0, atol=1e-6)
    assert torch.allclose(memory.tensors["optimizer/square_avg"], square_avg, rtol=1e-5, atol=1e-9)
    assert (wrong - theta).abs().max() > 0.01
    assert memory.rows[:, UPDATES].sum() == 10
    assert memory.rows[:, STEPS].sum() == 80


@pytest.mark.parametrize(
    ("optimizer", "first"), [(torch.optim.RMSprop, 0.0), (RMSpropTFLike, 1.0), (torch.optim.Adam, 0.0)]
)
def test_shared_statistics_begin_as_the_optimizers_own_do(optimizer, first):
    alone, shared, worker = Net(seed=0), Net(seed=0), Net(seed=0)
    for net in (alone, shared):
        net.set_optimizer(optimizer, LEARNING_RATE)
    tensors = {name: tensor.clone() for name, tensor in shared.state_tensors().items()}
    assert all((value == first).all() for name, value in tensors.items() if name.endswith(("square_avg", "exp_avg_sq")))
    shared.live_in(tensors)
    for turn in range(3):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(turn))
        worker.follow(shared, 1.0)
        worker.gradient(loss_of(worker, x))
        shared.step_along(worker)
        alone.descend(loss_of(alone, x))
    assert torch.equal(tensors["flat"], alone.flat)
    # The running statistics of the normalisation came along too.
    assert torch.equal(shared.layers[1].running_mean, alone.layers[1].running_mean)


def test_what_an_optimizer_keeps_in_new_tensors_cannot_be_shared():
    class Renewing(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter]["sum"] = self.state[parameter].get("sum", 0) + parameter.grad

    net = Net(seed=0)
    net.set_optimizer(Renewing, LEARNING_RATE, {"fused": False})
    with pytest.raises(ValueError, match=r"Renewing keeps statistics that processes cannot share"):
        net.state_tensors()


def test_frozen_weights_stay_whatever_others_push():
    start = Net(seed=0)
    memory, (worker,) = transports(1, start)
    worker._shared.layers[2].weight.requires_grad_(False)
    worker._shared._bind()
    local = Net(seed=0)
    before = memory.tensors["flat"].clone()
    local.gradient(loss_of(local, torch.ones(4, 3)))
    worker.push(local, LEARNING_RATE)
    moved = memory.tensors["flat"] != before
    assert moved[-1]
    assert not moved[-5:-1].any()


def test_a_push_to_weights_that_are_not_finite_is_refused_and_changes_nothing():
    start = Net(seed=0)
    memory, (worker,) = transports(1, start)
    local = Net(seed=0)
    local.gradient(loss_of(local, torch.ones(4, 3)))
    with pytest.raises(NotFiniteError, match="weights that are NaN or infinite"):
        worker.push(local, learning_rate=1e38)
    assert torch.equal(memory.tensors["flat"], start.flat)


def test_a_gradient_that_is_not_finite_is_never_pushed():
    local = Net(seed=0)
    with pytest.raises(NotFiniteError):
        local.gradient(loss_of(local, torch.full((4, 3), float("nan"))))


def test_staleness_counts_the_updates_of_others():
    start = Net(seed=0)
    _, (first, second) = transports(2, start)
    local = Net(seed=0)
    first.pull(local)
    local.gradient(loss_of(local, torch.ones(4, 3)))
    for _ in range(3):
        second.pull(local)
        second.report(1, {})
    first.report(1, {"loss": torch.tensor(2.0)})
    first.report(1, {"loss": torch.tensor(3.0)})
    assert first._sums == {"loss": 5.0, "staleness": 3 + 4}


def test_a_rollout_is_short_only_where_all_steps_are_granted():
    memory, (worker,) = transports(1, Net(seed=0))
    memory.flags[ROLLOUT] = 5
    memory.rows[0, ALLOWED] = 3
    worker.parent.sendall(b".")
    memory.flags[ALL_GRANTED] = 1
    assert worker.begin() == 3
    memory.flags[STOP] = 1
    assert worker.begin() == 0


def test_a_worker_whose_parent_is_gone_ends():
    _, (worker,) = transports(1, Net(seed=0))
    worker.parent.close()
    with pytest.raises(SystemExit):
        worker.begin()


def test_rewards_ends_and_infos_are_reported_and_infos_that_cannot_be_sent_are_cut_to_their_plain_part():
    _, (worker,) = transports(1, Net(seed=0))
    end = {"episode": {"r": 2.0, "l": 2, "t": 0.0}, "is_success": True, "stream": sys.stdout}
    worker.observe(np.array([1.5, 0.5]), np.array([False, False]), [{}, {}])
    worker.observe(np.array([0.5, 0.5]), np.array([False, True]), [{}, end])
    worker.report(4, {"loss": torch.tensor(2.0)})
    worker._tell()
    data = worker.parent.recv(1 << 20)
    kind, report = pickle.loads(data[8:])
    assert kind == "report"
    assert report[:4] == (0, 4, 1, {"loss": 2.0, "staleness": 0.0})
    assert report.reward.tolist() == [[1.5, 0.5], [0.5, 0.5]]
    assert report.done.tolist() == [[False, False], [False, True]]
    assert report.infos == [(1, 1, {"episode": {"r": 2.0, "l": 2, "t": 0.0}, "is_success": True})]
    assert report.pickled_infos is None


def test_a_message_that_is_cut_off_is_never_waited_for():
    ours, theirs = socket.socketpair()
    process = object.__new__(_Process)
    process.socket, process._arrived = ours, bytearray()
    ours.setblocking(False)
    whole = [pickle.dumps(("report", text)) for text in ("first", "second" * 1000)]
    stream = b"".join(struct.pack("<Q", len(data)) + data for data in whole)
    theirs.sendall(stream[:-1])
    assert list(process.messages()) == [("report", "first")]
    assert list(process.messages()) == []
    theirs.sendall(stream[-1:])
    assert list(process.messages()) == [("report", "second" * 1000)]
    theirs.sendall(stream[:5])
    theirs.close()
    with pytest.raises(EOFError):
        list(process.messages())


def test_shared_memory_holds_tensors_of_every_kind_and_leaves_nothing_behind():
    tensors = {
        "flat": torch.arange(5, dtype=torch.float32),
        "step": torch.tensor(3.0),
        "count": torch.tensor([7, 8], dtype=torch.int64),
        "none": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
    }
    gc.collect()
    before = open_blocks()
    memory = SharedMemory.holding(tensors, 2, first_step=9)
    assert open_blocks() > before
    second = SharedMemory(memory.layout, 2, memory.descriptor)
    memory.tensors["flat"][1] = 70
    memory.rows[1, STEPS] = 12
    assert second.tensors["flat"].tolist() == [0, 70, 2, 3, 4]
    assert second.rows[1, STEPS] == 12
    for name in ("step", "count", "none", "flags"):
        assert torch.equal(second.tensors[name], tensors[name])
        assert second.tensors[name].dtype == tensors[name].dtype
    copies = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    second.copy_to(copies)
    assert torch.equal(copies["count"], tensors["count"])
    memory.close()
    del memory, second
    gc.collect()
    assert open_blocks() == before


def open_blocks() -> int:
    """How many blocks of shared memory this process holds open."""
    found = 0
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the listing itself
            found += "memfd:sbac" in os.readlink(f"/proc/self/fd/{descriptor}")
    return found
