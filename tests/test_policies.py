"""Policies: shapes for each space, first weights, where the action joins, and targets."""

from __future__ import annotations

import copy
import math
import pickle
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from sbac.bodies import split_net_arch
from sbac.deterministic import DeterministicActorCritic
from sbac.distributions import CategoricalDistribution, DiagGaussianDistribution, Distribution, DistributionFamily
from sbac.guards import NotFiniteError
from sbac.networks import BaseFeaturesExtractor, FlattenExtractor, create_mlp, init_fan_in
from sbac.observations import check_observation_space
from sbac.policies import StochasticActorCritic
from sbac.preprocessing import preprocess

CPU = torch.device("cpu")
BOX = spaces.Box(-1, 1, (17,), np.float32)
N = 5

OBSERVATIONS: dict[str, tuple[spaces.Space[Any], int]] = {
    "vector": (BOX, 17),
    "matrix": (spaces.Box(-1, 1, (2, 3), np.float32), 6),
    "float64": (spaces.Box(-1, 1, (3,), np.float64), 3),
    "pixels": (spaces.Box(0, 255, (4, 4, 1), np.uint8), 16),
    "number": (spaces.Box(-1, 1, (), np.float32), 1),
    "discrete": (spaces.Discrete(4), 4),
    "discrete from 7": (spaces.Discrete(4, start=7), 4),
    "several discrete": (spaces.MultiDiscrete([[2, 3], [4, 2]], start=[[0, -1], [5, 0]]), 11),
    "switches": (spaces.MultiBinary((2, 3)), 6),
    "whole numbers": (spaces.Box(-9, 9, (2,), np.int16), 2),
    "flags": (spaces.Box(0, 1, (3,), np.bool_), 3),
}
ACTIONS: dict[str, spaces.Space[Any]] = {
    "discrete": spaces.Discrete(3),
    "discrete from -1": spaces.Discrete(3, start=-1),
    "vector": spaces.Box(-1, 1, (4,), np.float32),
    "matrix": spaces.Box(-1, 1, (2, 2), np.float32),
    "number": spaces.Box(-1, 1, (), np.float32),
}
MORE_ACTIONS: dict[str, spaces.Space[Any]] = {
    "several discrete": spaces.MultiDiscrete([[2, 3], [4, 2]], start=[[0, -1], [5, 0]]),
    "switches": spaces.MultiBinary((2, 3)),
    "hybrid": spaces.Dict(
        {
            "move": spaces.Box(-1, 1, (2, 2), np.float32),
            "kind": spaces.Discrete(3, start=5),
            "more": spaces.Tuple([spaces.MultiBinary(2), spaces.MultiDiscrete([2, 2])]),
        }
    ),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def sample(space: spaces.Space[Any], n: int = N) -> np.ndarray:
    space.seed(0)
    return np.stack([np.asarray(space.sample(), dtype=space.dtype) for _ in range(n)])


def layers(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def largest(layer: nn.Linear) -> float:
    return max(layer.weight.abs().max().item(), layer.bias.abs().max().item())


# Bodies.


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_observations_are_laid_flat(name: str) -> None:
    space, features_dim = OBSERVATIONS[name]
    extractor = FlattenExtractor(space)
    obs = sample(space)
    features = extractor(preprocess(torch.as_tensor(obs), space, normalize_images=False))
    assert extractor.features_dim == features_dim
    assert features.shape == (N, features_dim)
    assert features.dtype == torch.float32
    if isinstance(space, spaces.Discrete):
        np.testing.assert_array_equal(features, np.eye(4)[obs - space.start])
    elif isinstance(space, spaces.MultiDiscrete):
        parts = zip(space.nvec.ravel(), space.start.ravel(), obs.reshape(N, -1).T, strict=True)
        np.testing.assert_array_equal(features, np.hstack([np.eye(n)[values - start] for n, start, values in parts]))
    else:
        np.testing.assert_array_equal(features, obs.reshape(N, -1).astype(np.float32))


def test_layers_of_a_perceptron() -> None:
    assert [type(layer) for layer in create_mlp(3, 2, [5, 4], nn.Tanh)] == [
        nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear,
    ]  # fmt: skip
    shapes = [tuple(layer.weight.shape) for layer in layers(nn.Sequential(*create_mlp(3, 2, [5, 4])))]
    assert shapes == [(5, 3), (4, 5), (2, 4)]
    assert create_mlp(3, 0, []) == []
    assert len(create_mlp(3, 0, [5])) == 2


class CountingExtractor(BaseFeaturesExtractor):
    """Counts its calls, and repeats the observation."""

    def __init__(self, observation_space: spaces.Space[Any], times: int) -> None:
        super().__init__(observation_space, times * math.prod(observation_space.shape or ()))
        self.weight = nn.Parameter(torch.ones(1))
        self.times, self.calls = times, 0

    def forward(self, obs: Tensor) -> Tensor:
        self.calls += 1
        return self.weight * obs.flatten(1).repeat(1, self.times)


# pi(a|s) and V(s).


@pytest.mark.parametrize("action_name", ACTIONS)
@pytest.mark.parametrize("obs_name", OBSERVATIONS)
def test_shapes_of_a_stochastic_policy(obs_name: str, action_name: str) -> None:
    (obs_space, features_dim), action_space = OBSERVATIONS[obs_name], ACTIONS[action_name]
    policy = StochasticActorCritic(obs_space, action_space, CPU, net_arch=(8, 6))
    obs = sample(obs_space)
    assert policy.policy_net[0].in_features == features_dim

    for deterministic in (True, False):
        action = policy.act(obs, deterministic, torch.Generator().manual_seed(0))
        assert action.shape == (N, *action_space.shape)
        if isinstance(action_space, spaces.Discrete):
            # Counted from 0, whatever the space's start: the door adds it.
            assert action.dtype == np.int64
            assert set(action.tolist()) <= {0, 1, 2}

    value, log_prob, entropy = policy.evaluate_actions(torch.as_tensor(obs), torch.as_tensor(action))
    assert value.shape == log_prob.shape == entropy.shape == (N,)
    assert policy.predict_values(torch.as_tensor(obs)).shape == (N,)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("action_name", ACTIONS)
def test_evaluation_agrees_with_the_distribution(action_name: str, share: bool) -> None:
    policy = StochasticActorCritic(BOX, ACTIONS[action_name], CPU, share_features_extractor=share)
    with torch.no_grad():
        policy.flat.normal_(std=0.3)
    numpy_obs = sample(BOX)
    obs = torch.as_tensor(numpy_obs)
    action = torch.as_tensor(policy.act(numpy_obs, deterministic=False))
    value, log_prob, entropy = policy.evaluate_actions(obs, action)

    distribution = policy.get_distribution(obs)
    flat = action if isinstance(distribution, CategoricalDistribution) else action.reshape(N, -1)
    torch.testing.assert_close(log_prob, distribution.log_prob(flat))
    torch.testing.assert_close(entropy, distribution.entropy())
    torch.testing.assert_close(value, policy.predict_values(obs))
    assert len(set(log_prob.tolist())) == N


def test_acting_is_drawing_from_the_distribution() -> None:
    policy = StochasticActorCritic(BOX, ACTIONS["matrix"], CPU)
    numpy_obs = sample(BOX)
    obs = torch.as_tensor(numpy_obs)
    distribution = policy.get_distribution(obs)

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    drawn = policy.act(numpy_obs, False, generator())
    # A few rows are acted on by NumPy, whose sums are rounded otherwise.
    close = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    close(drawn.reshape(N, -1), distribution.sample(generator()))
    np.testing.assert_array_equal(policy.act(numpy_obs, False, generator()), drawn)
    close(policy.act(numpy_obs, True).reshape(N, -1), distribution.mode().detach().numpy())

    action, value, log_prob = policy(obs, generator=generator())
    close(action, drawn.reshape(N, -1))
    torch.testing.assert_close(log_prob, distribution.log_prob(action))
    torch.testing.assert_close(value, policy.predict_values(obs))
    assert torch.equal(policy(obs, deterministic=True)[0], distribution.mode())


def test_a_choice_is_drawn_from_the_distribution_that_is_learned_by() -> None:
    torch.manual_seed(0)
    policy = StochasticActorCritic(BOX, ACTIONS["discrete"], CPU)
    numpy_obs = np.random.default_rng(0).uniform(-1, 1, (50, 17)).astype(np.float32)
    assert policy._pi.act(numpy_obs) is not None  # few enough to be acted on by NumPy

    def drawn(deterministic: bool) -> tuple[np.ndarray, np.ndarray]:
        one, other = (torch.Generator().manual_seed(3) for _ in range(2))
        distribution = policy.get_distribution(torch.as_tensor(numpy_obs))
        expected = distribution.mode() if deterministic else distribution.sample(one)
        return policy.act(numpy_obs, deterministic, other), expected.numpy()

    for deterministic in (True, False):
        np.testing.assert_array_equal(*drawn(deterministic))

    class Least(CategoricalDistribution):
        def mode(self) -> Tensor:
            return self.logits.argmin(-1)

    class Family(DistributionFamily):
        def __call__(self, parameters: Tensor, *others: Any) -> Distribution:
            return Least(parameters)

    usual = policy.act(numpy_obs, True)
    policy.family = Family(ACTIONS["discrete"])
    found, expected = drawn(True)
    np.testing.assert_array_equal(found, expected)
    assert (found != usual).all()


def test_first_weights_of_a_stochastic_policy_are_orthogonal() -> None:
    policy = StochasticActorCritic(BOX, ACTIONS["vector"], CPU, net_arch=[64, 32], log_std_init=-0.5)
    gains = {
        policy.policy_net[0]: 2**0.5,
        policy.policy_net[2]: 2**0.5,
        policy.value_net[0]: 2**0.5,
        policy.value_net[2]: 2**0.5,
        policy.action_net: 0.01,
        policy.value_net[4]: 1.0,
    }
    assert set(gains) == set(layers(policy))
    for layer, gain in gains.items():
        # Rows are orthogonal to each other, or columns where there are fewer of them.
        weight = layer.weight.detach() / gain
        product = weight @ weight.T if len(weight) <= weight.shape[1] else weight.T @ weight
        torch.testing.assert_close(product, torch.eye(len(product)), atol=1e-5, rtol=0)
        assert (layer.bias == 0).all()
    assert (policy.log_std == -0.5).all()
    assert policy.log_std.shape == (4,)


def test_orthogonal_weights_can_be_left_out() -> None:
    policy = StochasticActorCritic(BOX, ACTIONS["vector"], CPU, ortho_init=False)
    assert all((layer.bias != 0).any() for layer in layers(policy))


def test_the_value_does_not_depend_on_the_actor_nor_the_actor_on_the_value() -> None:
    policy = StochasticActorCritic(BOX, ACTIONS["discrete"], CPU, net_arch={"pi": [8], "vf": [6, 4]})
    shapes = {name: tuple(p.shape) for name, p in policy.named_parameters() if name.endswith("weight")}
    assert shapes == {
        "policy_net.0.weight": (8, 17),
        "action_net.weight": (3, 8),
        "value_net.0.weight": (6, 17),
        "value_net.2.weight": (4, 6),
        "value_net.4.weight": (1, 4),
    }


@pytest.mark.parametrize(("share", "n_bodies"), [(True, 1), (False, 2)])
def test_one_body_is_asked_once_and_two_bodies_are_apart(share: bool, n_bodies: int) -> None:
    policy = StochasticActorCritic(
        BOX,
        ACTIONS["discrete"],
        CPU,
        net_arch=[],
        features_extractor_class=CountingExtractor,
        features_extractor_kwargs={"times": 2},
        share_features_extractor=share,
    )
    bodies = [module for module in policy.modules() if isinstance(module, CountingExtractor)]
    assert len(bodies) == n_bodies
    assert policy.action_net.in_features == 34
    policy.evaluate_actions(torch.as_tensor(sample(BOX)), torch.zeros(N))
    assert [body.calls for body in bodies] == [1] * n_bodies


# Arguments.


def test_net_arch_is_one_list_or_one_for_each_network() -> None:
    names = ("pi", "qf")
    assert split_net_arch([64, 32], names) == ([64, 32], [64, 32])
    assert split_net_arch({"qf": (5,), "pi": []}, names) == ([], [5])


@pytest.mark.parametrize("wrong", [{"pi": [64]}, {"pi": [64], "vf": [64]}, {"pi": [64], "qf": [64], "shared": []}])
def test_net_arch_with_other_keys_is_refused(wrong: dict[str, list[int]]) -> None:
    with pytest.raises(ValueError, match=r"net_arch needs the keys 'pi' and 'qf', not \['pi'"):
        split_net_arch(wrong, ("pi", "qf"))


@pytest.mark.parametrize("wrong", [[0], [-3], [64.0], [64, "32"], "64", 64, None, {"pi": 64, "qf": [64]}])
def test_net_arch_of_other_things_than_whole_numbers_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"net_arch lists the units .* as positive whole numbers, not"):
        split_net_arch(wrong, ("pi", "qf"))


def test_net_arch_takes_numbers_of_numpy() -> None:
    widths = split_net_arch([np.int64(64), 32], ("pi", "vf"))
    assert widths == ([64, 32], [64, 32])
    assert all(type(n) is int for arch in widths for n in arch)


@pytest.mark.parametrize("old", [[{"pi": [8], "vf": [4]}], [16, {"pi": [8], "vf": [4]}]])
def test_the_old_form_of_net_arch_is_answered_with_the_new_one(old: Any) -> None:
    with pytest.raises(ValueError, match=r"policy_kwargs: .* write net_arch=dict\(pi=\[64, 64\], vf=\[64, 64\]\)"):
        StochasticActorCritic(BOX, ACTIONS["vector"], CPU, net_arch=old)


def stochastic_policy(**kwargs: Any) -> StochasticActorCritic:
    return StochasticActorCritic(BOX, ACTIONS["vector"], CPU, **{"net_arch": [8], **kwargs})


@pytest.mark.parametrize("make", ["stochastic", "deterministic"])
@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"activation_fn": nn.Tanh()}, r"activation_fn must be a subclass of torch.nn.Module, .* it is Tanh\(\)"),
        ({"activation_fn": torch.tanh}, r"activation_fn must be a subclass .* it is <built-in"),
        ({"activation_fn": "tanh"}, r"activation_fn must be a subclass .* it is 'tanh'"),
        ({"features_extractor_class": "NatureCNN"}, r"features_extractor_class must be .* it is 'NatureCNN'"),
        ({"features_extractor_class": dict}, r"features_extractor_class must be .* it is <class 'dict'>"),
        ({"features_extractor_kwargs": 5}, r"features_extractor_kwargs must be a dict .*, not 5"),
        ({"features_extractor_kwargs": {"size": 3}}, r".* FlattenExtractor, .* unexpected keyword argument 'size'"),
        ({"dropout": 1.0}, r"dropout must be a finite number at least 0 and below 1, not 1.0"),
        ({"dropout": -0.1}, r"dropout must be"),
        ({"dropout": "0.1"}, r"dropout must be"),
        ({"net_arch": "64"}, r"net_arch lists"),
        ({"net_arch": ""}, r"net_arch lists"),
        ({"net_arch": [True]}, r"net_arch lists"),
    ],
)
def test_arguments_of_both_policies_are_named(make: str, wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"policy_kwargs: {text}"):
        (stochastic_policy if make == "stochastic" else ddpg_policy)(**wrong)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, "0", None])
def test_the_first_log_std_is_a_finite_number(wrong: Any) -> None:
    with pytest.raises(ValueError, match="policy_kwargs: log_std_init must be a finite number, not"):
        stochastic_policy(log_std_init=wrong)


@pytest.mark.parametrize("wrong", [-1e-3, math.nan, "small"])
def test_last_weights_are_bounded_by_a_number_that_is_not_negative(wrong: Any) -> None:
    with pytest.raises(ValueError, match="policy_kwargs: final_init must be a finite number at least 0, not"):
        ddpg_policy(final_init=wrong)


def test_observations_that_no_policy_can_read_are_refused() -> None:
    for space, _ in OBSERVATIONS.values():
        check_observation_space(space, "A2C")
    both = {"a": BOX, "b": spaces.Discrete(3)}
    check_observation_space(spaces.Dict({**both, "c": spaces.Tuple([BOX, spaces.Dict(both)])}), "A2C")
    refused = r"A2C reads Box, Discrete, MultiDiscrete and MultiBinary observations, and Dict and Tuple of them, not "
    with pytest.raises(ValueError, match=refused + r"Text\(.*\); .*FlattenObservation"):
        check_observation_space(spaces.Text(3), "A2C")
    inner = spaces.Tuple([BOX, spaces.Sequence(BOX)])
    with pytest.raises(ValueError, match=refused + r"Sequence\(.*\) \(at 'b/1' in Dict\('a'"):
        check_observation_space(spaces.Dict({"a": BOX, "b": inner}), "A2C")


# mu(s) and Q(s, a).


def ddpg_policy(**kwargs: Any) -> DeterministicActorCritic:
    """The networks of Lillicrap et al. 2015, section 7."""
    arguments: dict[str, Any] = {"net_arch": [400, 300], "n_critics": 1, "action_layer": 1, "final_init": 3e-3}
    return DeterministicActorCritic(BOX, ACTIONS["vector"], CPU, **{**arguments, **kwargs})


@pytest.mark.parametrize("action_name", ["vector", "matrix", "number"])
@pytest.mark.parametrize("obs_name", OBSERVATIONS)
@pytest.mark.parametrize("action_layer", [0, 1, 2])
def test_shapes_of_a_deterministic_policy(obs_name: str, action_name: str, action_layer: int) -> None:
    (obs_space, features_dim), action_space = OBSERVATIONS[obs_name], ACTIONS[action_name]
    policy = DeterministicActorCritic(
        obs_space, action_space, CPU, net_arch=[8, 6], n_critics=3, action_layer=action_layer
    )
    action_dim = math.prod(action_space.shape)
    assert policy.actor.mu[0].in_features == features_dim

    numpy_obs = sample(obs_space)
    action = policy.act(numpy_obs, deterministic=True)
    assert action.shape == (N, *action_space.shape)
    assert (np.abs(action) <= 1).all()

    obs = torch.as_tensor(numpy_obs)
    mu = policy(obs)
    assert mu.shape == (N, action_dim)
    np.testing.assert_allclose(mu.detach().numpy(), action.reshape(N, -1), rtol=1e-6, atol=1e-6)
    q = policy.critic(obs, mu)
    assert q.shape == (3, N)
    torch.testing.assert_close(policy.critic.q1_forward(obs, mu), q[0])
    # The members begin apart, and each depends on the action.
    assert len(set(q[:, 0].tolist())) == 3
    assert (policy.critic(obs, -mu - 0.5) != q).any(1).all()


def test_the_action_joins_at_the_second_layer_of_the_critic() -> None:
    q_network = ddpg_policy().critic.q_networks[0]
    assert [tuple(layer.weight.shape) for layer in layers(q_network)] == [(400, 17), (300, 400 + 4), (1, 300)]
    assert [tuple(layer.weight.shape) for layer in layers(ddpg_policy().actor)] == [(400, 17), (300, 400), (4, 300)]

    at_the_input = ddpg_policy(action_layer=0).critic.q_networks[0]
    assert [tuple(layer.weight.shape) for layer in layers(at_the_input)] == [(400, 17 + 4), (300, 400), (1, 300)]
    at_the_end = ddpg_policy(action_layer=2).critic.q_networks[0]
    assert [tuple(layer.weight.shape) for layer in layers(at_the_end)] == [(400, 17), (300, 400), (1, 300 + 4)]


@pytest.mark.parametrize(("net_arch", "joined"), [([], (1, 17 + 4)), ([9], (1, 9 + 4)), ([9, 7], (7, 9 + 4))])
def test_without_a_layer_asked_for_the_action_joins_at_the_second_if_there_is_one(net_arch: Any, joined: Any) -> None:
    q_network = ddpg_policy(net_arch=net_arch, action_layer=None).critic.q_networks[0]
    assert tuple(layers(q_network.q_net)[0].weight.shape) == joined
    assert ddpg_policy(net_arch=net_arch, action_layer=None).critic(torch.ones(2, 17), torch.ones(2, 4)).shape == (1, 2)


def test_first_weights_are_bounded_by_the_number_of_inputs() -> None:
    policy = ddpg_policy()
    for network, second_inputs in ((policy.actor, 400), (policy.critic, 404)):
        first, second, _ = layers(network)
        for layer, inputs in ((first, 17), (second, second_inputs)):
            assert layer.in_features == inputs
            bound = 1 / math.sqrt(inputs)
            assert 0.97 * bound < largest(layer) <= bound
            assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
        # The number of outputs would have given 1/sqrt(400), a fifth of it, and 1/sqrt(300), too much.
        assert largest(first) > 4 / math.sqrt(first.out_features)
        assert largest(second) < 0.9 / math.sqrt(second.out_features)


def test_last_weights_are_small() -> None:
    for network in (policy := ddpg_policy()).actor, policy.critic, policy.actor_target, policy.critic_target:
        assert 0.9 * 3e-3 < largest(layers(network)[-1]) <= 3e-3

    left_to_fan_in = ddpg_policy(final_init=None)
    for network in (left_to_fan_in.actor, left_to_fan_in.critic):
        last = layers(network)[-1]
        assert 3e-3 < 0.9 / math.sqrt(300) < largest(last) <= 1 / math.sqrt(300)


def test_fan_in_reaches_each_layer_of_a_module() -> None:
    net = nn.Sequential(nn.Linear(100, 4), nn.Sequential(nn.Linear(4, 100)))
    init_fan_in(net)
    assert 0.09 < largest(net[0]) <= 0.1
    assert 0.45 < largest(net[1][0]) <= 0.5


def test_targets_begin_equal_and_apart() -> None:
    policy = ddpg_policy(n_critics=2)
    for network, target in ((policy.actor, policy.actor_target), (policy.critic, policy.critic_target)):
        assert torch.equal(network.flat, target.flat)
        assert network.flat.data_ptr() != target.flat.data_ptr()
        with torch.no_grad():
            network.flat.add_(1)
        assert torch.equal(network.flat, target.flat + 1)
        assert not hasattr(target, "optimizer")


def test_targets_never_train() -> None:
    policy = ddpg_policy(dropout=0.5)  # without such a layer the mode means nothing, and is left alone
    networks = (policy.actor, policy.critic, policy.actor_target, policy.critic_target)
    assert not any(module.training for network in networks for module in network.modules())
    policy.set_training_mode(True)
    assert all(module.training for module in policy.critic.modules())
    assert not any(module.training for network in networks[2:] for module in network.modules())
    policy.set_training_mode(False)
    assert not any(module.training for network in networks for module in network.modules())


def test_actor_and_critic_have_bodies_of_their_own() -> None:
    policy = ddpg_policy(features_extractor_class=CountingExtractor, features_extractor_kwargs={"times": 2})
    bodies = [module for module in policy.modules() if isinstance(module, CountingExtractor)]
    assert len(bodies) == 4
    assert policy.actor.mu[0].in_features == policy.critic.q_networks[0].state_net[0].in_features == 34
    # One body for all members of the critic, asked once.
    policy.critic(torch.as_tensor(sample(BOX)), torch.zeros(N, 4))
    assert policy.critic.features_extractor.calls == 1


def test_wrong_arguments_are_refused() -> None:
    for wrong in (-1, 3, "1"):
        with pytest.raises(ValueError, match=rf"action_layer must be from 0 to 2, .*, not {wrong!r}"):
            ddpg_policy(action_layer=wrong)
    with pytest.raises(ValueError, match="n_critics must be a whole number, at least 1, not 0"):
        ddpg_policy(n_critics=0)
    with pytest.raises(ValueError, match="net_arch needs the keys 'pi' and 'qf'"):
        ddpg_policy(net_arch={"pi": [4], "vf": [4]})


def test_a_gaussian_policy_has_one_standard_deviation_for_all_states() -> None:
    policy = StochasticActorCritic(BOX, ACTIONS["vector"], CPU)
    distribution = policy.get_distribution(torch.as_tensor(sample(BOX)))
    assert isinstance(distribution, DiagGaussianDistribution)
    assert distribution.log_std is policy.log_std
    assert (distribution.entropy() == distribution.entropy()[0]).all()


# For those who hold only the policy.


def make_policy(kind: str, obs_space: spaces.Space[Any], action_space: spaces.Space[Any], **kwargs: Any) -> Any:
    classes: dict[str, Any] = {"stochastic": StochasticActorCritic, "deterministic": DeterministicActorCritic}
    return classes[kind](obs_space, action_space, CPU, **{"net_arch": [8], **kwargs})


KINDS = ["stochastic", "deterministic"]
UNITS = spaces.Box(np.float32([-1, 0]), np.float32([3, 10]))


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_are_in_the_units_of_the_environment(kind: str) -> None:
    policy = make_policy(kind, BOX, UNITS)
    obs = sample(BOX)
    action, state = policy.predict(obs, state="kept", episode_start=np.zeros(N, bool))
    units = np.clip(policy.act(obs, deterministic=True), -1, 1)
    np.testing.assert_allclose(action, [1, 5] + [2, 5] * units, rtol=1e-5)
    assert state == "kept"
    single, _ = policy.predict(obs[0])
    np.testing.assert_allclose(single, action[0], rtol=1e-5)


def test_actions_can_be_made_in_the_units_of_the_environment() -> None:
    policy = make_policy("stochastic", BOX, UNITS, rescale_actions=False)
    obs = sample(BOX)
    mean = policy.act(obs, deterministic=True)
    action, _ = policy.predict(obs)
    np.testing.assert_array_equal(action, np.clip(mean, UNITS.low, UNITS.high))
    assert not np.allclose(action, make_policy("stochastic", BOX, UNITS).codec.to_env(mean))
    with pytest.raises(ValueError, match="leave rescale_actions=False out"):
        make_policy("stochastic", BOX, UNITS, squash=True, rescale_actions=False)


def test_predictions_of_a_discrete_action_begin_where_the_space_does() -> None:
    policy = make_policy("stochastic", BOX, spaces.Discrete(3, start=-1))
    action, _ = policy.predict(sample(BOX, 50), deterministic=False)
    assert set(action.tolist()) == {-1, 0, 1}


def test_draws_leave_the_global_generator_alone_and_depend_on_the_seed() -> None:
    policies = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        policies.append(make_policy("stochastic", BOX, UNITS))
    before = torch.get_rng_state()
    obs = sample(BOX)
    first, same, other = (policy.predict(obs, deterministic=False)[0] for policy in policies)
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()
    assert (policies[0].predict(obs, deterministic=False)[0] != first).any()


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_leave_dropout_out(kind: str) -> None:
    policy = make_policy(kind, BOX, UNITS, dropout=0.5)
    policy.set_training_mode(True)
    obs = sample(BOX)
    np.testing.assert_array_equal(policy.predict(obs)[0], policy.predict(obs)[0])
    assert not any(module.training for module in policy.modules() if isinstance(module, nn.Dropout))


@pytest.mark.parametrize("kind", KINDS)
def test_observations_become_tensors(kind: str) -> None:
    policy = make_policy(kind, BOX, UNITS)
    obs = sample(BOX)
    tensor, is_batch = policy.obs_to_tensor(obs)
    assert is_batch
    np.testing.assert_array_equal(tensor, obs)
    tensor, is_batch = policy.obs_to_tensor(obs[0])
    assert not is_batch
    assert tensor.shape == (1, 17)
    with pytest.raises(ValueError, match=r"has shape \(3,\)"):
        policy.predict(np.zeros(3))
    with pytest.raises(NotFiniteError):
        policy.obs_to_tensor(np.full(17, np.nan))


# Copies.


def value_of(policy: Any, obs: Tensor) -> Tensor:
    return policy.predict_values(obs) if isinstance(policy, StochasticActorCritic) else policy.critic(obs, obs[:, :2])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda policy: pickle.loads(pickle.dumps(policy))])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_a_policy_learns_the_same_and_apart(kind: str, duplicate: Any) -> None:
    policy = make_policy(kind, BOX, UNITS)
    obs = torch.as_tensor(sample(BOX))
    network = policy if kind == "stochastic" else policy.critic
    network.set_optimizer(torch.optim.Adam, 0.01)
    network.descend(value_of(policy, obs).square().mean())
    before = network.flat.clone()

    twin = duplicate(policy)
    other = twin if kind == "stochastic" else twin.critic
    np.testing.assert_array_equal(twin.predict(obs.numpy())[0], policy.predict(obs.numpy())[0])
    other.descend(value_of(twin, obs).square().mean())
    assert torch.equal(network.flat, before)
    network.descend(value_of(policy, obs).square().mean())
    assert torch.equal(network.flat, other.flat)
    assert not torch.equal(network.flat, before)
    torch.testing.assert_close(value_of(twin, obs), value_of(policy, obs))
    if kind == "deterministic":
        twin.critic_target.follow(twin.critic, 1.0)
        assert torch.equal(twin.critic_target.q_networks[0].q_net[0].weight, twin.critic.q_networks[0].q_net[0].weight)
        assert not torch.equal(policy.critic_target.flat, twin.critic_target.flat)


@pytest.mark.parametrize("n_steps", [0, 40])
def test_a_copy_of_a_model_learns_apart(make_model: Any, n_steps: int) -> None:
    model = make_model()
    if n_steps:
        model.learn(n_steps)
    before = [parameter.detach().clone() for parameter in model.policy.parameters()]
    twin = copy.deepcopy(model)
    twin.learn(40)
    after = list(twin.policy.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert all(torch.equal(old, new) for old, new in zip(before, model.policy.parameters(), strict=True))
