"""Flat parameters: the same steps as torch takes with separate ones, and nothing else moved."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sbac.guards import NotFiniteError
from sbac.networks import Trainable
from sbac.optimization import RMSpropTFLike


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


# Steps.

OPTIMIZERS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.Adam, {}),
    (torch.optim.Adam, {"weight_decay": 0.1, "betas": (0.5, 0.9)}),
    (torch.optim.AdamW, {"weight_decay": 0.1}),
    (torch.optim.RMSprop, {"alpha": 0.9, "eps": 1e-5}),
    (torch.optim.SGD, {"momentum": 0.9}),
]


@pytest.mark.parametrize(("optimizer_class", "kwargs"), OPTIMIZERS)
@pytest.mark.parametrize("max_grad_norm", [None, 0.5, 1e6])
@pytest.mark.parametrize(("dtype", "n_steps"), [(torch.float32, 1), (torch.float64, 5)])
def test_a_step_is_that_of_torch_over_separate_parameters(
    optimizer_class: Callable[..., torch.optim.Optimizer],
    kwargs: dict[str, Any],
    max_grad_norm: float | None,
    dtype: torch.dtype,
    n_steps: int,
) -> None:
    net, separate = flat_net(dtype=dtype), Net(dtype=dtype)
    net.set_optimizer(optimizer_class, 0.01, **kwargs)  # type: ignore[arg-type]
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


# RMSprop as in TensorFlow.


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_rmsprop_follows_its_formula(momentum: float, weight_decay: float) -> None:
    lr, alpha, eps = 0.05, 0.9, 1e-3
    theta = np.array([1.0, -2.0, 0.5])
    parameter = nn.Parameter(torch.tensor(theta))
    optimizer = RMSpropTFLike([parameter], lr, alpha, eps, weight_decay, momentum)

    square, velocity = np.ones(3), np.zeros(3)
    for step in range(6):
        gradient = np.array([0.1, -1.0, 3.0]) * (step + 1)
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


@pytest.mark.parametrize(
    "wrong", [{"lr": -1}, {"alpha": 1}, {"alpha": -0.1}, {"eps": 0}, {"weight_decay": -1}, {"momentum": 1}]
)
def test_rmsprop_refuses_what_is_out_of_range(wrong: dict[str, float]) -> None:
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=rf"RMSpropTFLike needs .* not .*{name}={value}"):
        RMSpropTFLike([nn.Parameter(torch.ones(1))], **wrong)  # type: ignore[arg-type]
