"""Perceptrons side by side give what each of them gives, wherever they are worked on together."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sbac.ensemble
from sbac import DDPG, TD3
from sbac.ensemble import Ensemble, EnsembleTrace
from sbac.perceptron import ALL, Gradient, Perceptron


class Nets(nn.Module):
    """M perceptrons with 4 inputs, whose parameters and gradients lie one behind the other."""

    def __init__(self, n: int, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 64), activation(), nn.Linear(64, 64), activation(), nn.Linear(64, 2))
            for _ in range(n)
        )
        parameters = list(self.parameters())
        flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
        self.gradient = torch.zeros_like(flat)
        self.into: dict[int, Gradient] = {}
        for parameter, own, of_own in zip(
            parameters, *(whole.split([p.numel() for p in parameters]) for whole in (flat, self.gradient)), strict=True
        ):
            parameter.data = own.view_as(parameter)
            room = of_own.view_as(parameter)
            self.into[id(parameter)] = Gradient(room, room.numpy())
        self.ways = [Perceptron(self.nets, str(k)) for k in range(n)]

    def ensemble(self) -> Ensemble | None:
        return Ensemble.of([way.plain().layers for way in self.ways])


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("many", [True, False])
def test_both_ways_through_give_what_autograd_gives(
    n: int, activation: type[nn.Module], shared: bool, many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(n)
    monkeypatch.setattr(sbac.ensemble, "MANY", 0 if many else 128 * 64 * 64)
    nets = Nets(n, activation)
    x = torch.randn(128, 4) if shared else torch.randn(n, 128, 4)
    each = (x.expand(n, 128, 4) if shared else x).clone().requires_grad_()
    expected = torch.stack([net(own) for net, own in zip(nets.nets, each, strict=True)])
    slope = torch.randn(n, 128, 2)
    expected.backward(slope)
    of_parameters = torch.cat([parameter.grad.reshape(-1) for parameter in nets.parameters()])

    ensemble = nets.ensemble()
    assert ensemble is not None
    trace = ensemble.trace(x)
    assert trace.output.shape == (n, 128, 2)
    torch.testing.assert_close(trace.output, expected.detach(), rtol=1e-6, atol=1e-6)
    for place in nets.into.values():
        if place.tensor.dim() == 2:
            place.tensor.fill_(torch.nan)  # not read where it is said to be 0
            place.is_zero = True
    of_input = trace.back(slope, nets.into, ALL)
    torch.testing.assert_close(of_input, each.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(nets.gradient, of_parameters, rtol=1e-5, atol=1e-5)
    of_some = trace.back(slope, {}, slice(-3, None))
    torch.testing.assert_close(of_some, each.grad[..., -3:], rtol=1e-5, atol=1e-6)
    assert trace.back(slope, nets.into) is None  # adds
    torch.testing.assert_close(nets.gradient, 2 * of_parameters, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("left_out", [["0.2.weight"], ["1.4.bias"], ["0.0.weight", "1.0.weight"]])
def test_what_is_left_out_gets_no_gradient_and_the_others_theirs(left_out: list[str]) -> None:
    nets, x, slope = Nets(2), torch.randn(128, 4), torch.randn(2, 128, 2)
    whole = copy.deepcopy(nets)  # of which nothing is left out
    into = {
        id(parameter): Gradient(torch.zeros_like(parameter), None)
        for name, parameter in nets.nets.named_parameters()
        if name not in left_out
    }
    ensemble = nets.ensemble()
    assert ensemble is not None
    trace = ensemble.trace(x)
    of_input = trace.back(slope, into, ALL)
    each = x.expand(2, 128, 4).clone().requires_grad_()
    torch.stack([net(own) for net, own in zip(whole.nets, each, strict=True)]).backward(slope)
    torch.testing.assert_close(of_input, each.grad, rtol=1e-5, atol=1e-6)
    for (name, parameter), reference in zip(nets.nets.named_parameters(), whole.parameters(), strict=True):
        assert (id(parameter) in into) is (name not in left_out)
        if name not in left_out:
            torch.testing.assert_close(into[id(parameter)].tensor, reference.grad, rtol=1e-5, atol=1e-5)


def unlike(nets: Nets) -> None:
    nets.nets[1][1] = nn.Tanh()


def smaller(nets: Nets) -> None:
    nets.nets[1] = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def elsewhere(nets: Nets) -> None:
    nets.nets[1][0].weight.data = nets.nets[1][0].weight.detach().clone()


def tied(nets: Nets) -> None:
    nets.nets[1] = nets.nets[0]


def with_a_layer_of_another_kind(nets: Nets) -> None:
    nets.nets[1][1] = nn.GELU()


@pytest.mark.parametrize("change", [unlike, smaller, elsewhere, tied, with_a_layer_of_another_kind])
def test_those_without_a_common_form_go_their_own_ways(change: Callable[[Nets], None]) -> None:
    nets = Nets(2)
    assert nets.ensemble() is not None
    change(nets)
    assert nets.ensemble() is None


def test_one_goes_its_own_way() -> None:
    assert Nets(1).ensemble() is None


def test_uneven_distances_are_noticed() -> None:
    nets = Nets(3)
    assert nets.ensemble() is not None
    nets.ways = [nets.ways[k] for k in (0, 2, 1)]
    assert nets.ensemble() is None


# Critics: the reference is the same model with a hook that does nothing, which closes the way.


def model_of(n_critics: int = 3, action_layer: int = 0) -> TD3:
    kwargs = {"net_arch": [64, 64], "n_critics": n_critics, "action_layer": action_layer}
    return TD3("MlpPolicy", "Pendulum-v1", learning_starts=200, buffer_size=500, policy_kwargs=kwargs, seed=0)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[EnsembleTrace]:
    """Those ways through that were taken together."""
    taken: list[EnsembleTrace] = []
    plainly = Ensemble.trace

    def trace(self: Ensemble, x: Tensor) -> EnsembleTrace:
        taken.append(plainly(self, x))
        return taken[-1]

    monkeypatch.setattr(Ensemble, "trace", trace)
    return taken


@pytest.mark.filterwarnings("ignore:nothing will be learned")
@pytest.mark.parametrize("n_critics", [2, 3])
@pytest.mark.parametrize("action_layer", [0, 1, 2])
def test_updates_equal_those_by_autograd(n_critics: int, action_layer: int, counted: list[EnsembleTrace]) -> None:
    models = [model_of(n_critics, action_layer) for _ in range(2)]
    models[0].learn(200)
    for module in models[1].policy.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_: None)
    batch = models[0].replay_buffer.sample(256)
    numbers = []
    for model, is_together in zip(models, (True, False), strict=True):
        counted.clear()
        model.n_updates = 1  # the next update is one of the actor too
        with model._updating():
            numbers.append(model._update(batch))
        # Of targets and critics; where the action joins late, below and above.
        assert len(counted) == (2 * (1 + (action_layer > 0)) if is_together else 0)
    for name in numbers[0]:
        torch.testing.assert_close(numbers[0][name], numbers[1][name], rtol=1e-5, atol=1e-6)
    for name in ("actor", "critic"):
        gradients = [getattr(model, name)._gradient for model in models]
        assert gradients[0].any()
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_few_go_their_own_ways(counted: list[EnsembleTrace]) -> None:
    model = model_of().learn(201)
    for n_rows, is_together in ((64, False), (65, True)):
        counted.clear()
        model.train(1, batch_size=n_rows)
        assert bool(counted) is is_together


def test_one_critic_goes_its_own_way(counted: list[EnsembleTrace]) -> None:
    DDPG("MlpPolicy", "Pendulum-v1", learning_starts=50, batch_size=256, seed=0).learn(53)
    assert not counted


@pytest.mark.parametrize("part", ["critic", "critic.q_networks", "critic.q_networks.1", "critic.q_networks.1.q_net.2"])
def test_hooks_are_called_and_those_of_targets_too(part: str) -> None:
    model = model_of().learn(201)
    called: list[str] = []
    for whole in (part, part.replace("critic", "critic_target", 1)):
        if not isinstance(model.policy.get_submodule(whole), nn.ModuleList):  # which is never called
            model.policy.get_submodule(whole).register_forward_hook(lambda *_, whole=whole: called.append(whole))
    model.train(1)
    expected = set() if part == "critic.q_networks" else {part, part.replace("critic", "critic_target", 1)}
    assert set(called) == expected


def test_hooks_of_gradients_get_them() -> None:
    model = model_of().learn(201)
    seen: list[Tensor] = []
    model.critic.q_networks[1].q_net[0].weight.register_hook(seen.append)
    model.train(1)
    assert len(seen) == 1 and seen[0].any()


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_learns_by_itself(how: str) -> None:
    model = model_of().learn(210)
    before = model.critic.flat.clone()
    critic = copy.deepcopy(model.critic) if how == "deepcopy" else pickle.loads(pickle.dumps(model.critic))
    batch = model.replay_buffer.sample(256)
    q, back = critic.evaluate(batch.obs, batch.action)
    critic.descend(q.square().sum(), None, lambda: back(2 * q))
    assert torch.equal(model.critic.flat, before) and not torch.equal(critic.flat, before)


def test_a_member_that_was_replaced_is_the_one_that_counts(counted: list[EnsembleTrace]) -> None:
    model = model_of(n_critics=2).learn(201)
    batch = model.replay_buffer.sample(256)
    model.critic.q_networks[1] = copy.deepcopy(model.critic.q_networks[0])
    counted.clear()
    with torch.no_grad():
        first, second = model.critic(batch.obs, batch.action)
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)
    assert not counted  # it lies elsewhere
    model.critic.take_changes()
    with torch.no_grad():
        first, second = model.critic(batch.obs, batch.action)
    assert counted and torch.equal(first, second)


def test_a_member_of_ones_own_is_asked_itself() -> None:
    model: Any = model_of(n_critics=2).learn(201)
    own = type(model.critic.q_networks[0])

    class Halved(own):
        def forward(self, features: Tensor, action: Tensor) -> Tensor:
            return super().forward(features, action) / 2

    batch = model.replay_buffer.sample(256)
    with torch.no_grad():
        before = model.critic(batch.obs, batch.action)
        model.critic.q_networks[1].__class__ = Halved
        model.critic.q_networks = nn.ModuleList(list(model.critic.q_networks))
        after = model.critic(batch.obs, batch.action)
    torch.testing.assert_close(after, before / torch.tensor([[1.0], [2.0]]), rtol=1e-6, atol=1e-6)


def test_a_frozen_member_stays_and_the_other_learns() -> None:
    model = model_of(n_critics=2).learn(201)
    frozen, other = model.critic.q_networks
    frozen.requires_grad_(False)
    before = [copy.deepcopy(member.state_dict()) for member in (frozen, other)]
    model.train(2)
    assert all(torch.equal(value, frozen.state_dict()[name]) for name, value in before[0].items())
    assert all(not torch.equal(value, other.state_dict()[name]) for name, value in before[1].items())
    frozen.requires_grad_(True)
    model.train(1)
    assert all(not torch.equal(value, frozen.state_dict()[name]) for name, value in before[0].items())
