"""Flat parameters: the same steps as torch takes with separate ones, and nothing else moved."""

from __future__ import annotations

import copy
import inspect
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sbac.guards import NotFiniteError
from sbac.optimization import RMSpropTFLike, without_compiler
from sbac.trainable import Trainable, _step


class Net(Trainable):
    """Two layers with a frozen scale and a running mean."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 1)
        self.scale = nn.Parameter(torch.tensor([2.0]), requires_grad=False)
        self.register_buffer("running", torch.zeros(3))
        self.to(dtype)
        with torch.no_grad():
            for parameter in (*self.first.parameters(), *self.second.parameters()):
                parameter.normal_(generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))).squeeze(-1) * self.scale


def flat_net(seed: int = 0, dtype: torch.dtype = torch.float32) -> Net:
    net = Net(seed, dtype)
    net.flatten()
    return net


def loss_of(net: nn.Module, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return (net(x) - x.sum(1)).square().mean()


def trainable(net: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


# Layout.


def test_parameters_and_gradients_are_views_of_one_tensor() -> None:
    net, separate = flat_net(), Net()
    assert net.flat.shape == net.flat.grad.shape == (4 * 8 + 8 + 8 + 1,)
    start = 0
    for own, same in zip(trainable(net), trainable(separate), strict=True):
        assert torch.equal(own, same)
        for view, whole in ((own, net.flat), (own.grad, net.flat.grad)):
            assert view is not None
            assert whole is not None
            assert view.data_ptr() == whole.data_ptr() + start * whole.element_size()
            assert view.is_contiguous()
        start += own.numel()

    with torch.no_grad():
        net.flat.fill_(0.5)
    assert (net.first.weight == 0.5).all()
    assert (net.second.bias == 0.5).all()
    assert net.scale.item() == 2


def test_the_flat_tensor_does_not_show_in_the_module() -> None:
    net, separate = flat_net(), Net()
    assert net.state_dict().keys() == separate.state_dict().keys()
    assert [name for name, _ in net.named_parameters()] == [name for name, _ in separate.named_parameters()]


def test_parameters_of_two_dtypes_are_refused() -> None:
    net = Net()
    net.second.double()
    with pytest.raises(ValueError, match=r"Net needs trainable parameters of one dtype on one device, got .*float64"):
        net.flatten()


class NewTensors(torch.optim.Optimizer):
    """Gradient descent as some write it: with a new tensor at each step."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in filter(lambda parameter: parameter.grad is not None, group["params"]):
                parameter.data = parameter.data - group["lr"] * parameter.grad
        return closure


# Steps.

OPTIMIZERS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.Adam, {}),
    (torch.optim.Adam, {"weight_decay": 0.1, "betas": (0.5, 0.9)}),
    (torch.optim.AdamW, {"weight_decay": 0.1}),
    (torch.optim.RMSprop, {"alpha": 0.9, "eps": 1e-5}),
    (torch.optim.SGD, {"momentum": 0.9}),
    (NewTensors, {}),
]


@pytest.mark.parametrize(("optimizer_class", "kwargs"), OPTIMIZERS)
@pytest.mark.parametrize("max_grad_norm", [None, 0.5, 1e6])
@pytest.mark.parametrize(("dtype", "n_steps"), [(torch.float32, 1), (torch.float64, 5)])
def test_a_step_is_that_of_torch_over_separate_parameters(
    optimizer_class: Any,
    kwargs: dict[str, Any],
    max_grad_norm: float | None,
    dtype: torch.dtype,
    n_steps: int,
) -> None:
    net, separate = flat_net(dtype=dtype), Net(dtype=dtype)
    net.set_optimizer(optimizer_class, 0.01, **kwargs)
    optimizer = optimizer_class(trainable(separate), lr=0.01, **kwargs)
    before = net.flat.clone()

    for seed in range(n_steps):
        norm = net.descend(loss_of(net, seed, dtype), max_grad_norm)

        optimizer.zero_grad()
        loss_of(separate, seed, dtype).backward()
        limit = math.inf if max_grad_norm is None else max_grad_norm
        separate_norm = nn.utils.clip_grad_norm_(trainable(separate), limit)
        optimizer.step()

        # The norm is that of before clipping.
        torch.testing.assert_close(norm, separate_norm)
        assert norm > 0.5
    for own, same in zip(trainable(net), trainable(separate), strict=True):
        torch.testing.assert_close(own, same, atol=1e-7, rtol=0)
    assert (net.flat - before).abs().max() > 1e-4
    assert net.scale.item() == 2


def test_the_gradient_is_cut_to_the_norm_that_is_asked_for() -> None:
    net = flat_net()
    net.set_optimizer(torch.optim.SGD, 1.0)
    before = net.flat.clone()
    norm = net.descend(loss_of(net, 0), max_grad_norm=0.25)
    assert norm > 0.25
    assert torch.linalg.vector_norm(net.flat - before).item() == pytest.approx(0.25, rel=1e-5)


def test_gradients_do_not_add_up_from_step_to_step() -> None:
    net = flat_net()
    net.set_optimizer(torch.optim.SGD, 0.0)
    norms = [net.descend(loss_of(net, 0)).item() for _ in range(3)]
    assert norms == [norms[0]] * 3


def test_a_parameter_that_the_loss_does_not_need_stays() -> None:
    net = flat_net()
    net.set_optimizer(torch.optim.SGD, 0.1)
    before = copy.deepcopy(net.second.state_dict())
    net.descend(net.first.weight.square().sum())
    assert all(torch.equal(before[name], tensor) for name, tensor in net.second.state_dict().items())
    assert net.second.weight.grad is not None
    assert (net.second.weight.grad == 0).all()


def test_gradients_of_other_modules_are_left_alone() -> None:
    actor, critic, plain = nn.Linear(4, 4), flat_net(1), nn.Linear(4, 4)
    critic_gradient = critic.flat.grad
    assert critic_gradient is not None
    critic_gradient.fill_(7)

    class Actor(Trainable):
        def __init__(self) -> None:
            super().__init__()
            self.layer = actor

    trained = Actor()
    trained.flatten()
    trained.set_optimizer(torch.optim.SGD, 0.1)
    before = trained.flat.clone()
    trained.descend(-critic(plain(trained.layer(torch.ones(2, 4)))).mean())
    assert not torch.equal(trained.flat, before)
    assert (critic_gradient == 7).all()
    assert all(parameter.grad is None for parameter in plain.parameters())


def test_the_step_size_can_be_changed() -> None:
    net = flat_net()
    net.set_optimizer(torch.optim.SGD, 1.0)
    net.set_learning_rate(0.25)
    before = net.flat.clone()
    net.descend(loss_of(net, 0))
    assert net.flat.grad is not None
    torch.testing.assert_close(net.flat, before - 0.25 * net.flat.grad)


# What is not finite.

NOT_FINITE: dict[str, Callable[[Net], Tensor]] = {
    "NaN loss": lambda net: loss_of(net, 0) * math.nan,
    "infinite loss with a finite gradient": lambda net: net.first.weight.sum() + math.inf,
    "NaN loss with a finite gradient": lambda net: net.first.weight.sum() + math.nan,
    "finite loss with an infinite gradient": lambda net: (net.first.weight - net.first.weight.detach()).sqrt().sum(),
    "one NaN in the gradient": lambda net: loss_of(net, 0) + (net.second.bias * 0).sqrt().sum(),
}


@pytest.mark.parametrize("case", NOT_FINITE)
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_what_is_not_finite_leaves_everything_as_it_was(case: str, max_grad_norm: float | None) -> None:
    net, same = flat_net(), flat_net()
    for each in (net, same):
        each.set_optimizer(torch.optim.Adam, 0.01)
        each.descend(loss_of(each, 1))
    with pytest.raises(NotFiniteError, match=r"Net: the loss is \S+ and the norm of its gradient .* learning rate"):
        net.descend(NOT_FINITE[case](net), max_grad_norm)
    assert torch.equal(net.flat, same.flat)

    # The optimizer did not notice either.
    for each in (net, same):
        each.descend(loss_of(each, 2))
    assert torch.equal(net.flat, same.flat)


# Target networks.


@pytest.mark.parametrize("tau", [0.0, 0.005, 0.3, 1.0])
def test_a_target_follows_by_the_formula(tau: float) -> None:
    target, source = flat_net(1, torch.float64), flat_net(2, torch.float64)
    source.running.fill_(5)
    expected = [
        tau * new.detach() + (1 - tau) * old.detach()
        for new, old in zip(trainable(source), trainable(target), strict=True)
    ]
    source_before = source.flat.clone()
    target.follow(source, tau)
    for own, formula in zip(trainable(target), expected, strict=True):
        torch.testing.assert_close(own.detach(), formula, atol=1e-12, rtol=0)
    assert torch.equal(source.flat, source_before)
    # Running statistics are copied.
    assert (target.running == 5).all()
    if tau in (0, 1):
        assert torch.equal(target.flat, source.flat if tau else flat_net(1, torch.float64).flat)


# State.


def test_a_saved_module_goes_on_as_if_never_saved() -> None:
    net = flat_net(0)
    net.set_optimizer(torch.optim.Adam, 0.01)
    for seed in range(3):
        net.descend(loss_of(net, seed))

    loaded = flat_net(9)
    loaded.set_optimizer(torch.optim.Adam, 0.01)
    loaded.load_state_dict(copy.deepcopy(net.state_dict()))
    loaded.optimizer.load_state_dict(copy.deepcopy(net.optimizer.state_dict()))
    assert torch.equal(loaded.flat, net.flat)
    for seed in range(3, 6):
        for each in (net, loaded):
            each.descend(loss_of(each, seed), max_grad_norm=0.5)
    assert torch.equal(loaded.flat, net.flat)
    assert torch.equal(loaded.first.weight, net.first.weight)


def test_training_mode_is_set_on_all_layers() -> None:
    net = flat_net()
    net.set_training_mode(False)
    assert not net.first.training
    net.set_training_mode(True)
    assert net.first.training


# What others do to the parameters.


def descended(net: Net, seed: int) -> Net:
    net.descend(loss_of(net, seed))
    return net


def replace_values(net: Net) -> None:
    nn.utils.vector_to_parameters(torch.linspace(-1, 1, net.flat.numel()), trainable(net))


def go_through_float64(net: Net) -> None:
    net.double().float()


def learn_by_hand(net: Net) -> None:
    net.zero_grad()
    loss_of(net, 5).backward()


MEDDLERS: dict[str, Callable[[Net], Any]] = {
    "zero_grad": lambda net: net.zero_grad(),
    "the optimizer's zero_grad": lambda net: net.optimizer.zero_grad(),
    "the optimizer's zero_grad, to zero": lambda net: net.optimizer.zero_grad(set_to_none=False),
    "vector_to_parameters": replace_values,
    "double and float": go_through_float64,
    "gradients of another loss": learn_by_hand,
}


@pytest.mark.parametrize("meddle", MEDDLERS)
def test_learning_goes_on_whatever_became_of_storage_and_gradients(meddle: str) -> None:
    net, separate = flat_net(), Net()
    flat = net.flat
    net.set_optimizer(torch.optim.Adam, 0.01)
    optimizer = torch.optim.Adam(trainable(separate), lr=0.01)
    for seed in range(4):
        if seed == 2:
            MEDDLERS[meddle](net)
            # The other network gets the values, and keeps its optimizer.
            values = nn.utils.parameters_to_vector(trainable(net)).detach().clone()
            start = 0
            for parameter in trainable(separate):
                parameter.data.copy_(values[start : start + parameter.numel()].view_as(parameter))
                start += parameter.numel()
        loss = loss_of(net, seed)
        if seed == 3 and "zero_grad" in meddle:
            MEDDLERS[meddle](net)
        net.descend(loss)
        optimizer.zero_grad()
        loss_of(separate, seed).backward()
        optimizer.step()
        for own, same in zip(trainable(net), trainable(separate), strict=True):
            torch.testing.assert_close(own, same, atol=1e-6, rtol=0)
    assert net.flat is flat
    assert net.flat.data_ptr() == net.first.weight.data_ptr()


@pytest.mark.parametrize("whose", ["target", "source"])
@pytest.mark.parametrize("meddle", ["vector_to_parameters", "double and float"])
def test_a_target_follows_whatever_became_of_storage(meddle: str, whose: str) -> None:
    target, source = flat_net(1), flat_net(2)
    MEDDLERS[meddle](target if whose == "target" else source)
    source.running.fill_(5)
    expected = [0.25 * new + 0.75 * old for new, old in zip(trainable(source), trainable(target), strict=True)]
    target.follow(source, 0.25)
    for own, formula in zip(trainable(target), expected, strict=True):
        torch.testing.assert_close(own, formula)
    assert (target.running == 5).all()


def test_parameters_of_another_dtype_do_not_learn() -> None:
    net = flat_net()
    net.set_optimizer(torch.optim.SGD, 0.1)
    net.double()
    with pytest.raises(ValueError, match=r"made with parameters of torch.float32 .* first.weight is now of .*float64"):
        net.descend(loss_of(net, 0, torch.float64))
    descended(net.float(), 0)


# Frozen parameters.


@pytest.mark.parametrize(("optimizer_class", "kwargs"), OPTIMIZERS)
def test_frozen_parameters_keep_their_values_while_the_others_learn(
    optimizer_class: Any, kwargs: dict[str, Any]
) -> None:
    net, separate = flat_net(), Net()
    net.set_optimizer(optimizer_class, 0.01, **kwargs)
    optimizer = optimizer_class(trainable(separate), lr=0.01, **kwargs)
    descended(net, 0)
    loss_of(separate, 0).backward()
    optimizer.step()

    net.first.requires_grad_(False)
    separate.first.requires_grad_(False)
    frozen = copy.deepcopy(net.first.state_dict())
    for seed in (1, 2):
        norm = net.descend(loss_of(net, seed))
        optimizer.zero_grad()
        loss_of(separate, seed).backward()
        optimizer.step()
        # The norm is that of what learns.
        torch.testing.assert_close(norm, nn.utils.get_total_norm([p.grad for p in trainable(separate)]))
    for name, value in net.first.state_dict().items():
        assert torch.equal(value, frozen[name])
    for own, same in zip(net.second.parameters(), separate.second.parameters(), strict=True):
        torch.testing.assert_close(own, same, atol=1e-6, rtol=0)

    net.first.requires_grad_(True)
    descended(net, 3)
    assert not torch.equal(net.first.weight, frozen["weight"])


def test_a_network_that_is_all_frozen_stays() -> None:
    net = flat_net()
    net.set_optimizer(torch.optim.Adam, 0.01, weight_decay=0.1)
    descended(net, 0)
    before = net.flat.clone()
    net.requires_grad_(False)
    assert net.descend(loss_of(net, 1), max_grad_norm=0.5) == 0
    assert torch.equal(net.flat, before)


def test_what_was_frozen_at_the_start_says_that_it_cannot_learn() -> None:
    net = flat_net()
    net.set_optimizer(torch.optim.SGD, 0.1)
    net.scale.requires_grad_(True)
    with pytest.raises(ValueError, match=r"Net: scale was frozen when the network was made, and cannot learn now"):
        descended(net, 0)


# Copies.


def through_pickle(net: Net) -> Net:
    return pickle.loads(pickle.dumps(net))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
@pytest.mark.parametrize("n_steps", [0, 2])
def test_a_copy_learns_the_same_and_apart(duplicate: Callable[[Net], Net], n_steps: int) -> None:
    net = flat_net()
    net.set_optimizer(torch.optim.Adam, 0.01)
    for seed in range(n_steps):
        descended(net, seed)
    before = net.flat.clone()

    twin = duplicate(net)
    assert torch.equal(twin.flat, before)
    for seed in (3, 4):
        descended(twin, seed)
    assert torch.equal(net.flat, before)
    assert torch.equal(nn.utils.parameters_to_vector(trainable(twin)), twin.flat)
    assert not torch.equal(twin.flat, before)
    for seed in (3, 4):
        descended(net, seed)
    # Equal, so that the copy has the optimizer's moments too.
    assert torch.equal(twin.flat, net.flat)
    assert twin.optimizer.param_groups[0]["params"][0] is twin.flat


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
def test_a_module_that_was_not_flattened_can_be_copied(duplicate: Callable[[Net], Net]) -> None:
    net = Net()
    twin = duplicate(net)
    twin.flatten()
    assert torch.equal(twin.flat, flat_net().flat)


# Gradient and step apart.


def test_gradient_and_step_are_descend_in_two() -> None:
    net, same = flat_net(), flat_net()
    for each in (net, same):
        each.set_optimizer(torch.optim.Adam, 0.01)
    norm = net.gradient(loss_of(net, 0), max_grad_norm=0.5)
    assert torch.equal(net.flat, same.flat)
    net.step()
    assert torch.equal(norm, same.descend(loss_of(same, 0), max_grad_norm=0.5))
    assert torch.equal(net.flat, same.flat)


def test_a_step_can_be_undone() -> None:
    net = flat_net()
    net.set_optimizer(torch.optim.Adam, 0.01)
    net.undo_step()  # nothing, as there was none
    assert torch.equal(net.flat, flat_net().flat)
    before = descended(net, 0).flat.clone()
    descended(net, 1)
    assert not torch.equal(net.flat, before)
    net.undo_step()
    assert torch.equal(net.flat, before)
    assert torch.equal(nn.utils.parameters_to_vector(trainable(net)), before)


@pytest.mark.parametrize("rate", [math.inf, 3e38])
def test_a_step_to_where_no_number_is_is_not_taken(rate: float) -> None:
    net = flat_net()
    net.set_optimizer(torch.optim.SGD, rate)
    before = net.flat.clone()
    with pytest.raises(NotFiniteError, match=r"Net: the optimizer's step leads to weights .* smaller learning rate"):
        net.descend(100 * loss_of(net, 0))
    assert torch.equal(net.flat, before)


def test_large_weights_are_finite() -> None:
    net = flat_net()
    net.set_optimizer(torch.optim.SGD, 1.0)
    with torch.no_grad():
        net.flat.fill_(3e38)
    net.descend(net.second.bias.sum() * 0)
    assert (net.flat == 3e38).all()


# The optimizer's arguments.


@pytest.mark.parametrize("wrong", ["Adam", None, nn.Linear, torch.optim])
def test_what_is_no_optimizer_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"optimizer_class .* must be a subclass of torch.optim.Optimizer, .*, not "):
        flat_net().set_optimizer(wrong, 0.1)


def test_an_optimizer_that_needs_the_loss_again_is_refused() -> None:
    with pytest.raises(ValueError, match=r"optimizer_class: LBFGS computes the loss again within a step, .*\.Adam"):
        flat_net().set_optimizer(torch.optim.LBFGS, 0.1)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (3, "must be a dict of the optimizer's arguments, not 3"),
        ([("eps", 1)], "must be a dict"),
        ({"epsilon": 1e-5}, "{'epsilon': 1e-05, .*epsilon"),
        ({"betas": (2, 2)}, "Invalid beta"),
        ({"lr": 0.1}, "must not hold lr, which learning_rate sets"),
    ],
)
def test_wrong_arguments_of_an_optimizer_are_named(wrong: Any, text: str) -> None:
    with pytest.raises(ValueError, match=f"policy_kwargs: optimizer_kwargs .*{text}".replace(" .*must", " must")):
        flat_net().set_optimizer(torch.optim.Adam, 0.1, wrong)


def test_arguments_of_an_optimizer_win_over_defaults() -> None:
    net = flat_net()
    net.set_optimizer(torch.optim.Adam, 0.1, {"eps": 1e-3}, eps=1e-5, weight_decay=0.1)
    assert net.optimizer.param_groups[0]["eps"] == 1e-3
    assert net.optimizer.param_groups[0]["weight_decay"] == 0.1


# RMSprop as in TensorFlow.


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_rmsprop_follows_its_formula(momentum: float, weight_decay: float) -> None:
    lr, alpha, eps = 0.05, 0.9, 1e-3
    theta = np.array([1.0, -2.0, 0.5])
    parameter = nn.Parameter(torch.tensor(theta))
    optimizer = RMSpropTFLike([parameter], lr, alpha, eps, weight_decay, momentum)

    square, velocity = np.ones(3), np.zeros(3)
    for k in range(6):
        gradient = np.array([0.1, -1.0, 3.0]) * (k + 1)
        parameter.grad = torch.tensor(gradient)
        optimizer.step()

        decayed = gradient + weight_decay * theta
        square = alpha * square + (1 - alpha) * decayed**2
        velocity = momentum * velocity + lr * decayed / np.sqrt(square + eps)
        theta = theta - velocity
        np.testing.assert_allclose(parameter.detach().numpy(), theta, rtol=1e-12)


def test_the_first_step_of_rmsprop_is_short_where_that_of_torch_is_long() -> None:
    steps = []
    for optimizer_class in (RMSpropTFLike, torch.optim.RMSprop):
        parameter = nn.Parameter(torch.zeros(1))
        parameter.grad = torch.full((1,), 0.01)
        optimizer_class([parameter], lr=1.0, alpha=0.99, eps=1e-8).step()
        steps.append(-parameter.item())
    # 0.01 / sqrt(0.99 + 0.01 * 0.01^2), and 0.01 / sqrt(0.01 * 0.01^2)
    assert steps == pytest.approx([0.0100504, 10.0], rel=1e-4)


def test_rmsprop_skips_what_has_no_gradient_and_returns_the_loss() -> None:
    used, unused = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = RMSpropTFLike([used, unused], lr=0.1)

    def closure() -> float:
        loss = used.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 1
    assert used.item() < 1
    assert unused.item() == 1


OPTIMIZERS = [
    (torch.optim.RMSprop, {"eps": 1e-5}),
    (torch.optim.RMSprop, {"weight_decay": 0.1, "alpha": 0.9}),
    (torch.optim.RMSprop, {"momentum": 0.5}),
    (torch.optim.RMSprop, {"centered": True}),
    (torch.optim.RMSprop, {"maximize": True}),
    (torch.optim.RMSprop, {"foreach": True}),
    (torch.optim.Adam, {"fused": True}),
    (torch.optim.Adam, {"fused": True, "weight_decay": 0.1, "betas": (0.5, 0.9), "eps": 1e-3}),
    (torch.optim.Adam, {"fused": True, "amsgrad": True}),
    (torch.optim.Adam, {"fused": True, "maximize": True}),
    (torch.optim.Adam, {}),
    (torch.optim.AdamW, {"fused": True}),
    (torch.optim.SGD, {"momentum": 0.9}),
    (RMSpropTFLike, {}),
]


@pytest.mark.parametrize(("optimizer_class", "arguments"), OPTIMIZERS)
def test_the_short_step_is_the_optimizers_own_to_the_last_bit(optimizer_class: Any, arguments: dict[str, Any]) -> None:
    parameters = [nn.Parameter(torch.linspace(-1, 1, 1001)) for _ in range(2)]
    optimizers = [optimizer_class([parameter], lr=0.01, **arguments) for parameter in parameters]
    generator = torch.Generator().manual_seed(0)
    for k in range(6):
        gradient = torch.randn(1001, generator=generator)
        for parameter, optimizer in zip(parameters, optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.param_groups[0]["lr"] = 0.01 / (k + 1)
        optimizers[0].step()
        _step(optimizers[1])
        assert torch.equal(*parameters)
    own, short = (optimizer.state_dict()["state"] for optimizer in optimizers)
    assert own.keys() == short.keys()
    for name, value in own.get(0, {}).items():
        assert value is short[0][name] is None or torch.equal(torch.as_tensor(value), torch.as_tensor(short[0][name]))
        assert value is None or torch.as_tensor(value).dtype == torch.as_tensor(short[0][name]).dtype


@pytest.mark.parametrize(("algorithm", "env"), [("A2C", "CartPole-v1"), ("TD3", "Pendulum-v1")])
def test_a_program_does_not_wait_for_the_compiler(algorithm: str, env: str, tmp_path: Path) -> None:
    """To make, save and load a model, and to train it, torch's compiler is not imported: it takes seconds."""
    program = f"""
import sys
from sbac import {algorithm}
model = {algorithm}("MlpPolicy", "{env}", seed=0)
model.learn(200)
model.save("model.zip")
{algorithm}.load("model.zip")
sys.exit("torch._dynamo" in sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment).returncode == 0


def test_the_compiler_finds_optimizers_as_torch_left_them() -> None:
    functions = [inspect.unwrap(getattr(torch.optim.Optimizer, name)) for name in ("add_param_group", "state_dict")]
    before = [dict(vars(function)) for function in functions]
    with without_compiler():
        torch.optim.RMSprop([nn.Parameter(torch.ones(3))]).state_dict()
    assert [vars(function) for function in functions] == before


@pytest.mark.parametrize("optimizer_class", [torch.optim.RMSprop, torch.optim.Adam])
def test_who_hooks_into_an_optimizer_or_schedules_it_is_called(optimizer_class: Any) -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = optimizer_class([parameter], lr=1.0)
    parameter.grad = torch.ones(3)
    calls: list[int] = []
    _step(optimizer)
    handle = optimizer.register_step_post_hook(lambda *_: calls.append(1))
    _step(optimizer)
    handle.remove()
    _step(optimizer)
    assert calls == [1]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    _step(optimizer)
    scheduler.step()  # warns where it was called before the optimizer's step, which it counts
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    "wrong", [{"lr": -1}, {"alpha": 1}, {"alpha": -0.1}, {"eps": 0}, {"weight_decay": -1}, {"momentum": 1}]
)
def test_rmsprop_refuses_what_is_out_of_range(wrong: dict[str, Any]) -> None:
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=rf"RMSpropTFLike needs .* not .*{name}={value}"):
        RMSpropTFLike([nn.Parameter(torch.ones(1))], **wrong)
