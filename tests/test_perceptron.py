"""What is written out equals the modules and autograd, and gives way to them where it is not the same."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from sbac import A2C, DDPG, TD3
from sbac.buffers import RolloutBatch
from sbac.deterministic import DeterministicActorCritic
from sbac.envs import Spaces
from sbac.look import Look
from sbac.normalization import Normalizer
from sbac.perceptron import ALL, FEW, FEW_COLUMNS, FEW_OUTPUTS, Gradient, Perceptron, add_product, times
from sbac.policies import StochasticActorCritic
from sbac.preprocessing import Preprocessor

CPU = torch.device("cpu")


class Net(nn.Module):
    """Two hidden layers of 64 and a head, in two parts."""

    def __init__(self, activation: type[nn.Module] = nn.Tanh, last: nn.Module | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 64), activation(), nn.Linear(64, 64), activation())
        self.head = nn.Linear(64, 2) if last is None else nn.Sequential(nn.Linear(64, 2), last)
        self.way = Perceptron(self, "body", "head")

    def plainly(self, x: Tensor) -> Tensor:
        """Through the modules."""
        return self.head(self.body(x))


def places(net: nn.Module) -> dict[int, Gradient]:
    """Room for the gradients of all parameters."""
    rooms = {id(p): torch.zeros_like(p) for p in net.parameters()}
    return {key: Gradient(room, room.numpy()) for key, room in rooms.items()}


# 8 rows are few, and are for NumPy; 128 are for torch.
@pytest.mark.parametrize("n_rows", [1, 8, 128])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("last", [None, nn.Tanh(), nn.ReLU()])
def test_both_ways_through_give_the_same(n_rows: int, activation: type[nn.Module], last: nn.Module | None) -> None:
    torch.manual_seed(n_rows)
    net, x = Net(activation, last), torch.randn(n_rows, 3, requires_grad=True)
    assert net.way.plain().is_by_numpy(n_rows) == (n_rows < 128)
    expected, slope = net.plainly(x), torch.randn(n_rows, 2)
    expected.backward(slope)

    trace, into = net.way.trace(x), places(net)
    assert trace is not None and not trace.output.requires_grad
    torch.testing.assert_close(trace.output, expected.detach(), rtol=1e-6, atol=1e-6)
    of_input = trace.back(slope, into, ALL)
    torch.testing.assert_close(of_input, x.grad, rtol=1e-5, atol=1e-6)
    for parameter in net.parameters():
        torch.testing.assert_close(into[id(parameter)].tensor, parameter.grad, rtol=1e-5, atol=1e-5)
    trace.back(slope, into)  # adds
    torch.testing.assert_close(into[id(net.body[0].weight)].tensor, 2 * net.body[0].weight.grad, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(net.way(x), expected.detach(), rtol=1e-6, atol=1e-6)
    acted = net.way.act(x.detach().numpy())
    assert (acted is None) == (n_rows == 128)
    if acted is not None:
        np.testing.assert_allclose(acted, expected.detach().numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n_rows", [FEW_OUTPUTS // 64, FEW_OUTPUTS // 64 + 1])
def test_many_outputs_of_few_inputs_are_not_for_numpy(n_rows: int) -> None:
    owner = nn.ModuleDict({"net": nn.Sequential(nn.Linear(3, 64), nn.ReLU())})
    way, x = Perceptron(owner, "net"), torch.linspace(-1, 1, 3 * n_rows).view(n_rows, 3)
    assert n_rows * 3 * 64 < FEW
    trace = way.trace(x)
    assert trace is not None and trace._is_few is (n_rows * 64 <= FEW_OUTPUTS)
    torch.testing.assert_close(trace.output, owner["net"](x).detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n_rows", [8, 128])
@pytest.mark.parametrize("asked", [slice(None, -1), slice(-1, None), slice(1, 2)])
def test_gradients_of_some_inputs_are_those_among_all(n_rows: int, asked: slice) -> None:
    torch.manual_seed(n_rows)
    net, x, slope = Net(), torch.randn(n_rows, 3), torch.randn(n_rows, 2)
    trace = net.way.trace(x)
    assert trace is not None
    of_all, of_some = trace.back(slope, {}, ALL), trace.back(slope, {}, asked)
    assert of_all is not None and of_some is not None and of_some.is_contiguous()
    torch.testing.assert_close(of_some, of_all[:, asked], rtol=1e-6, atol=1e-6)


# Of few columns and of many, of layers that are wide and narrow: on both sides of where the way turns.
@pytest.mark.parametrize("n_in", [1, 2, FEW_COLUMNS // 3, FEW_COLUMNS // 3 + 1, FEW_COLUMNS, FEW_COLUMNS + 1])
@pytest.mark.parametrize("n_out", [1, 2, 255, 256])
@pytest.mark.parametrize("several", [(), (2,)])
@pytest.mark.parametrize("n_rows", [8, 256])
def test_products_are_the_same_either_way_round(n_in: int, n_out: int, several: tuple[int, ...], n_rows: int) -> None:
    torch.manual_seed(n_in)
    gradient, weight = torch.randn(*several, n_rows, n_out), torch.randn(*several, n_out, n_in)
    below = torch.randn(*several, n_rows, n_in)
    found = times(gradient, weight)
    assert found.is_contiguous()
    torch.testing.assert_close(found, gradient @ weight, rtol=1e-5, atol=1e-4)
    place = torch.full((*several, n_out, n_in), torch.nan)
    add_product(place, 0, gradient, below)
    expected = torch.einsum("...bo,...bi->...oi", gradient, below)
    torch.testing.assert_close(place, expected, rtol=1e-5, atol=1e-4)
    add_product(place, 1, gradient, below)
    torch.testing.assert_close(place, 2 * expected, rtol=1e-5, atol=2e-4)


class Tied(nn.Module):
    """One layer, which stands there twice."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(64, 64)
        self.net = nn.Sequential(layer, nn.Tanh(), layer)
        self.way = Perceptron(self, "net")


@pytest.mark.parametrize("n_rows", [8, 128])
def test_zeros_need_not_be_read_but_what_was_added_is(n_rows: int) -> None:
    net, x = Tied(), torch.randn(n_rows, 64)
    net.net(x).backward(slope := torch.randn(n_rows, 64))
    trace, into = net.way.trace(x), places(net)
    for place in into.values():
        place.is_zero = True
    assert trace is not None
    trace.back(slope, into)
    for parameter in net.parameters():
        torch.testing.assert_close(into[id(parameter)].tensor, parameter.grad, rtol=1e-5, atol=1e-4)


def test_only_those_learn_that_are_asked() -> None:
    net = Net()
    trace, into = net.way.trace(torch.randn(4, 3)), places(net)
    del into[id(net.body[0].weight)]
    assert trace is not None and trace.back(torch.ones(4, 2), into) is None
    assert id(net.body[0].weight) not in into
    assert into[id(net.body[0].bias)].tensor.any()


def hooked(net: Net, seen: list[str]) -> None:
    net.body[1].register_forward_hook(lambda *_: seen.append("hook"))


def hooked_at_the_part(net: Net, seen: list[str]) -> None:
    net.body.register_forward_pre_hook(lambda *_: seen.append("hook"))


def given_another_forward(net: Net, seen: list[str]) -> None:
    net.body[1].forward = lambda x: (seen.append("forward"), x)[1]


def replaced(net: Net, seen: list[str]) -> None:
    class Loud(nn.Tanh):
        def forward(self, input: Tensor) -> Tensor:
            seen.append("module")
            return super().forward(input)

    net.body[3] = Loud()


@pytest.mark.parametrize("change", [hooked, hooked_at_the_part, given_another_forward, replaced])
def test_what_somebody_puts_into_a_network_is_called(change: Callable[[Net, list[str]], None]) -> None:
    net, x, seen = Net(), torch.randn(4, 3), list[str]()
    assert net.way.trace(x) is not None
    change(net, seen)
    assert net.way.trace(x) is None and net.way.act(x.numpy()) is None
    with torch.no_grad():
        net.way(x)
    assert len(seen) == 1


@pytest.mark.parametrize(
    "module",
    [nn.Linear(64, 2, bias=False), nn.GELU(), nn.Dropout(0.5), nn.LayerNorm(64), nn.Linear(64, 2, dtype=torch.float64)],
    ids=lambda module: type(module).__name__,
)
def test_what_is_not_written_out_is_left_to_the_modules(module: nn.Module) -> None:
    net = Net()
    net.head = module
    assert net.way.trace(torch.randn(4, 3)) is None


def test_layers_within_layers_are_not_left_out() -> None:
    net, x = Net(), torch.randn(4, 3)
    net.body = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 64), nn.Tanh())
    assert net.way.trace(x) is None
    with torch.no_grad():
        assert torch.equal(net.way(x), net.plainly(x))


def test_what_watches_gradients_gets_them() -> None:
    net, x = Net(), torch.randn(4, 3)
    net.way.trace(x)
    net.body[0].weight.register_hook(lambda gradient: gradient * 0)
    assert net.way.trace(x) is None
    assert net.way.act(x.numpy()) is not None  # there is no gradient


def test_torch_sees_what_it_traces() -> None:
    net, first, second = Net().requires_grad_(False), torch.randn(4, 3), torch.randn(4, 3)
    with torch.no_grad():
        traced = torch.jit.trace(lambda x: net.way(x), first, check_trace=False)
        torch.testing.assert_close(traced(second), net.plainly(second))
        mapped = torch.func.vmap(lambda row: net.way(row[None]))(second)
    torch.testing.assert_close(mapped[:, 0], net.plainly(second).detach())


def test_numbers_that_are_not_finite_pass_without_a_word() -> None:
    net, x = Net(nn.ReLU), torch.full((4, 3), 1e38)
    with torch.no_grad():
        net.body[0].weight.fill_(1e38)
    with np.errstate(all="raise"):
        assert net.way.act(x.numpy()) is not None
        assert net.way.act(np.full((4, 3), 1e300)) is not None
        trace = net.way.trace(x)
        assert trace is not None
        trace.back(torch.full((4, 2), 1e38), places(net))


def test_inputs_of_another_kind_are_left_to_the_modules() -> None:
    net = Net()
    assert net.way.trace(torch.randn(4, 3, dtype=torch.float64)) is None
    assert net.way.trace(torch.randn(3)) is None
    assert net.way.act(np.zeros(3)) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net.way.trace(torch.randn(4, 3)) is None


def test_weights_that_were_given_other_memory_are_the_ones_that_count() -> None:
    net, x = Net(), torch.randn(4, 3)
    first = net.way.act(x.numpy())
    for parameter in net.parameters():
        parameter.data = parameter.data * 2
    second = net.way.act(x.numpy())
    assert first is not None and second is not None and not np.allclose(first, second)
    np.testing.assert_allclose(second, net.plainly(x).detach().numpy(), rtol=1e-6, atol=1e-6)
    net.head.weight = nn.Parameter(torch.zeros(2, 64))
    np.testing.assert_allclose(net.way.act(x.numpy()), net.head.bias.detach().numpy()[None].repeat(4, 0), atol=1e-7)


@pytest.mark.parametrize("n_out", [1, 2])
def test_what_stands_in_place_of_a_part_is_noticed_also_where_it_is_equal(n_out: int) -> None:
    """Of one number, too, which Python would compare by its value."""
    part = nn.Sequential(nn.Linear(1, n_out), nn.ReLU())
    linear: Any = part[0]
    look = Look([part, linear])
    assert look.is_still_so()
    for name in ("weight", "bias"):
        own = linear._parameters[name]
        for other in (nn.Parameter(own.detach().clone()), nn.Parameter(torch.zeros(3)), None):
            linear._parameters[name] = other
            assert not look.is_still_so()
        linear._parameters[name] = own
        assert look.is_still_so()
    part[1] = nn.ReLU()
    assert not look.is_still_so()
    assert not Look().is_still_so()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_has_its_own_way(copied: Callable[[Any], Any]) -> None:
    net, x = Net(), torch.randn(4, 3)
    net.way.trace(x)
    other = copied(net)
    with torch.no_grad():
        other.head.bias += 1
    before, after = net.way.act(x.numpy()), other.way.act(x.numpy())
    assert before is not None and after is not None
    np.testing.assert_allclose(after, before + 1, rtol=1e-6, atol=1e-6)


# Whole updates: the reference is the same model, in which a hook that does nothing closes the short way.


def close_short_way(model: Any) -> None:
    for module in model.policy.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_: None)


def rollout(model: A2C, n_rows: int) -> RolloutBatch:
    torch.manual_seed(0)
    n_steps = n_rows // 2
    return RolloutBatch(
        obs=torch.randn(n_rows, 3),
        action=torch.as_tensor(np.stack([model.action_space.sample() for _ in range(n_rows)])),
        reward=torch.randn(n_steps, 2),
        terminated=torch.rand(n_steps, 2) < 0.1,
        truncated=torch.zeros(n_steps, 2, dtype=torch.bool),
        kept=slice(None),
        share=torch.full((n_rows,), 1 / n_rows),
        bootstrap_obs=torch.randn(2, 3),
        bootstrap_index=(torch.full((2,), n_steps - 1), torch.arange(2)),
    )


ACTIONS = {
    "Discrete": spaces.Discrete(3),
    "Box": spaces.Box(-1, 1, (2,), np.float32),
    "MultiDiscrete": spaces.MultiDiscrete([2, 3]),
    "MultiBinary": spaces.MultiBinary(3),
}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("n_rows", [10, 300])
@pytest.mark.parametrize("squash", [False, True])
def test_updates_of_a2c_equal_those_by_autograd(action: str, n_rows: int, squash: bool) -> None:
    if squash and action != "Box":
        return
    known = Spaces(spaces.Box(-5, 5, (3,), np.float32), ACTIONS[action], 2)
    known.action_space.seed(0)
    kwargs = {"squash": True} if squash else None
    models = [A2C("MlpPolicy", known, seed=0, ent_coef=0.1, policy_kwargs=kwargs) for _ in range(2)]
    close_short_way(models[1])
    batch = rollout(models[0], n_rows)
    assert type(models[0].policy) is StochasticActorCritic
    numbers = [model._update(batch) for model in models]
    for name in numbers[0]:
        torch.testing.assert_close(numbers[0][name], numbers[1][name], rtol=1e-5, atol=1e-6)
    # A step of RMSprop does not tell large gradients from small ones, so that what is compared is the gradient.
    torch.testing.assert_close(models[0].policy._gradient, models[1].policy._gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cls", [DDPG, TD3])
@pytest.mark.parametrize("net_arch", [[16, 16], [256, 256]])
@pytest.mark.parametrize("action_layer", [0, 1])
def test_updates_of_ddpg_and_td3_equal_those_by_autograd(cls: Any, net_arch: list[int], action_layer: int) -> None:
    kwargs = {"net_arch": net_arch, "action_layer": action_layer}
    models = [cls("MlpPolicy", "Pendulum-v1", learning_starts=50, seed=0, policy_kwargs=kwargs) for _ in range(2)]
    models[0].learn(50)
    close_short_way(models[1])
    batch = models[0].replay_buffer.sample(32)
    for model in models:
        assert isinstance(model.policy, DeterministicActorCritic)
        model.n_updates = 1  # the next update is one of TD3's actor too
        with model._updating():
            model._update(batch)
    for name in ("actor", "critic"):
        gradients = [getattr(model, name)._gradient for model in models]
        assert gradients[0].any()
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


# What is frozen, in every way through.


def freeze(policy: StochasticActorCritic, name: str) -> None:
    for parameter_name, parameter in policy.named_parameters():
        if parameter_name.startswith(name):
            parameter.requires_grad_(False)


@pytest.mark.parametrize("action", [*ACTIONS, "Dict"])
@pytest.mark.parametrize("part", ["log_std", "value_net", "policy_net", "action_net", "policy_net.0.weight"])
@pytest.mark.parametrize("is_short", [True, False])
def test_frozen_parts_of_a2c_stay_and_the_others_learn(action: str, part: str, is_short: bool) -> None:
    space = spaces.Dict({"a": ACTIONS["Box"], "b": ACTIONS["Box"]}) if action == "Dict" else ACTIONS[action]
    known = Spaces(spaces.Box(-5, 5, (3,), np.float32), space, 2)
    models = [A2C("MlpPolicy", known, seed=0, ent_coef=0.1, max_grad_norm=None) for _ in range(2)]
    if action == "Dict":
        space.seed(0)
        drawn = [space.sample() for _ in range(10)]
        acted = {key: torch.as_tensor(np.stack([one[key] for one in drawn])) for key in ("a", "b")}
        batch = rollout(A2C("MlpPolicy", Spaces(known[0], ACTIONS["Box"], 2)), 10)._replace(action=acted)
    else:
        batch = rollout(models[0], 10)
    if not is_short:
        close_short_way(models[1])
    freeze(models[1].policy, part)
    before = {name: parameter.clone() for name, parameter in models[1].policy.named_parameters()}
    for model in models:
        model._update(batch)
    whole = dict(models[0].policy.named_parameters())
    for name, parameter in models[1].policy.named_parameters():
        if name.startswith(part):
            assert torch.equal(parameter, before[name])
        else:
            torch.testing.assert_close(parameter.grad, whole[name].grad, rtol=1e-4, atol=1e-6)


# What somebody puts around or in place of a network.


@pytest.mark.parametrize("part", ["actor", "critic", "critic.q_networks.0", "actor.features_extractor"])
def test_hooks_around_the_perceptrons_are_called(part: str) -> None:
    kwargs = {"net_arch": [8]}
    model = TD3("MlpPolicy", "Pendulum-v1", learning_starts=20, batch_size=8, policy_kwargs=kwargs, seed=0).learn(25)
    called: list[str] = []
    model.policy.get_submodule(part).register_forward_hook(lambda *_: called.append(part))
    model.train(2)
    assert called


def test_networks_of_ones_own_are_asked_themselves() -> None:
    kwargs = {"net_arch": [8]}
    model = DDPG("MlpPolicy", "Pendulum-v1", learning_starts=20, policy_kwargs=kwargs, seed=0)
    own: Any = type(model.actor)

    class Halved(own):
        def forward(self, obs: Tensor) -> Tensor:
            return super().forward(obs) / 2

    one = np.float32([0.1, 0.2, 0.3])
    whole = model.predict(one)[0]
    model.actor.__class__ = Halved
    obs = torch.randn(5, 3)
    assert torch.equal(model.actor.evaluate(obs)[0], model.actor(obs).detach())
    np.testing.assert_allclose(model.predict(one)[0], whole / 2, rtol=1e-5)


@pytest.mark.parametrize("cls", [A2C, TD3])
@pytest.mark.parametrize("later", ["a preprocessor of one's own", "a normaliser"])
def test_what_is_put_in_front_later_is_not_left_out(cls: Any, later: str) -> None:
    class Tenfold(Preprocessor):
        def forward(self, obs: Tensor) -> Tensor:
            return super().forward(obs) * 10

    box = spaces.Box(-5, 5, (3,), np.float32)
    model = cls("MlpPolicy", Spaces(box, spaces.Box(-1, 1, (2,), np.float32), 2), seed=0)
    policy = model.policy
    obs = np.float32([[0.1, 0.2, 0.3], [0.3, -0.1, 0.2]])
    expected = policy.act(10 * obs, deterministic=True)
    if later == "a normaliser":
        policy.preprocessor.normalizer = Normalizer(box, obs=True, reward=False)
        policy.preprocessor.normalizer.scale.fill_(10)
    else:
        policy.preprocessor = Tenfold(box)
        for network in (policy.actor, policy.critic) if cls is TD3 else ():
            object.__setattr__(network, "preprocessor", policy.preprocessor)
    np.testing.assert_allclose(policy.act(obs, deterministic=True), expected, rtol=1e-5)


@pytest.mark.parametrize("cls", [A2C, TD3])
@pytest.mark.parametrize("how", ["load_state_dict(assign=True)", "layers"])
def test_what_takes_the_place_of_parameters_learns(cls: Any, how: str) -> None:
    kwargs: dict[str, Any] = {"policy_kwargs": {"net_arch": [8]}, "seed": 0}
    if cls is TD3:
        kwargs |= {"learning_starts": 10, "batch_size": 4}
    model, same = (cls("MlpPolicy", "Pendulum-v1", **kwargs).learn(15) for _ in range(2))
    policy = model.policy
    if how == "layers":
        for part in (policy, policy.value_net) if cls is A2C else (policy.actor.mu, policy.critic.q_networks[0].q_net):
            for name, layer in part.named_children():
                if isinstance(layer, nn.Linear):
                    setattr(part, name, copy.deepcopy(layer))
    else:
        policy.load_state_dict({name: values.clone() for name, values in policy.state_dict().items()}, assign=True)
    for one in (model, same):
        one.learn(15, reset_num_timesteps=False)
    for own, other in zip(policy.parameters(), same.policy.parameters(), strict=True):
        assert torch.equal(own, other)


def test_parameters_of_other_shapes_say_that_they_cannot_learn() -> None:
    model = A2C("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": [8]}, seed=0)
    nn.utils.parametrizations.weight_norm(model.policy.action_net)
    with pytest.raises(ValueError, match=r"StochasticActorCritic: its parameters are others .* cannot learn"):
        model.learn(10)


def test_a_gradient_that_was_given_other_memory_is_noticed() -> None:
    model = A2C("MlpPolicy", Spaces(spaces.Box(-5, 5, (3,), np.float32), spaces.Discrete(3), 2), seed=0)
    batch = rollout(model, 10)
    gradient = next(model.policy.parameters()).grad
    assert gradient is not None
    gradient.share_memory_()
    assert model._update(batch)["grad_norm"] > 0


def test_a_distribution_that_was_looked_at_keeps_its_graph() -> None:
    policy = A2C("MlpPolicy", "CartPole-v1", seed=0).policy
    distribution = policy.get_distribution(torch.randn(3, 4))
    with torch.no_grad():
        distribution.entropy()
    assert distribution.log_prob(torch.zeros(3)).requires_grad
