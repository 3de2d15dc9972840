"""Parts of a user's own: any module as a body, policies of another class, and layers with a training mode."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from sbac import A2C, DDPG, TD3
from sbac.networks import FlattenExtractor
from sbac.policies import StochasticActorCritic

SMALL: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "a2c": (A2C, "vf", {"n_steps": 8, "n_envs": 2}),
    "ddpg": (DDPG, "qf", {"learning_starts": 20, "batch_size": 8, "buffer_size": 300}),
    "td3": (TD3, "qf", {"learning_starts": 20, "batch_size": 8, "buffer_size": 300}),
}


@pytest.fixture(params=SMALL)
def name(request: Any) -> Any:
    return request.param


@pytest.fixture
def critic(name: str) -> str:
    """What an algorithm calls its critic."""
    return SMALL[name][1]


@pytest.fixture
def make(name: str) -> Any:
    cls, _, arguments = SMALL[name]

    def make(**network: Any) -> Any:
        return cls("MlpPolicy", "Pendulum-v1", seed=0, policy_kwargs={"net_arch": [8], **network}, **arguments)

    return make


def bodies(model: Any, kind: type[nn.Module]) -> list[Any]:
    return [module for module in model.policy.modules() if isinstance(module, kind)]


# Bodies.


def test_any_module_may_be_the_body(make: Any) -> None:
    body = nn.Sequential(nn.Linear(3, 5), nn.ReLU())
    before = [parameter.clone() for parameter in body.parameters()]
    model = make(features_extractor_class=body)
    first = [module for module in model.policy.modules() if isinstance(module, nn.Linear) and module.in_features == 3]
    assert len(first) == (1 if isinstance(model, A2C) else 4)
    weights = [module.weight.detach().clone() for module in first]
    model.learn(60)
    # Each network has a copy of its own, which learns, and the module that was given stays as it was.
    assert all(not torch.equal(module.weight, old) for module, old in zip(first, weights, strict=True))
    assert all(torch.equal(parameter, old) for parameter, old in zip(body.parameters(), before, strict=True))


class Twice(nn.Module):
    """Not a BaseFeaturesExtractor: it does not say how many features it has."""

    def __init__(self, observation_space: spaces.Space[Any], times: int = 2) -> None:
        super().__init__()
        self.times = times

    def forward(self, obs: Tensor) -> Tensor:
        return obs.repeat(1, self.times)


def test_a_class_that_does_not_tell_its_features_is_asked(make: Any) -> None:
    model = make(features_extractor_class=Twice, features_extractor_kwargs={"times": 4}).learn(40)
    assert all(body.features_dim == 12 for body in bodies(model, Twice))


def test_actor_and_critic_may_have_bodies_of_their_own(make: Any, critic: str) -> None:
    model = make(features_extractor_class={"pi": Twice, critic: FlattenExtractor}).learn(40)
    if isinstance(model, A2C):
        assert isinstance(model.policy.features_extractor, Twice)
        assert isinstance(model.policy.vf_features_extractor, FlattenExtractor)
        assert model.policy.value_net[0].in_features == 3
    else:
        assert isinstance(model.actor_target.features_extractor, Twice)
        assert isinstance(model.critic_target.features_extractor, FlattenExtractor)
    with pytest.raises(ValueError, match=rf"features_extractor_class has no body for '{critic}' among \['pi'\]"):
        make(features_extractor_class={"pi": Twice})


def test_a_body_that_does_not_fit_is_named(make: Any) -> None:
    with pytest.raises(ValueError, match=r"the body Linear\(in_features=4.* cannot read Box"):
        make(features_extractor_class=nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"must return \(B, features\), not \(1, 3, 1\)"):
        make(features_extractor_class=nn.Unflatten(1, (3, 1)))


class Shy(StochasticActorCritic):
    """Never acts at all."""

    def act(self, obs: Any, deterministic: bool, generator: torch.Generator | None = None) -> Any:
        return 0 * super().act(obs, deterministic, generator)


def test_a_policy_class_of_a_users_own_acts() -> None:
    seen: list[Any] = []
    model = A2C(Shy, "Pendulum-v1", seed=0)
    model.learn(20, callback=lambda locals_, _: seen.append(locals_["actions"]) or True)
    assert len(seen) == 20
    assert not np.any(seen)
    assert model.predict(np.zeros(3, np.float32))[0] == 0


def test_print_shows_layers_sizes_and_counts(make: Any) -> None:
    model = make()
    told = str(model)
    total = sum(parameter.numel() for parameter in model.policy.parameters())
    assert f"{total:,}" in told.splitlines()[-1]
    assert "Linear(in_features=3, out_features=8, bias=True)" in told
    name = "policy_net.0" if isinstance(model, A2C) else "actor.mu.0"
    (line,) = [line for line in told.splitlines() if line.startswith(name)]
    assert line.split()[-1] == str(3 * 8 + 8)
    counts = [int(line.split()[-1].replace(",", "")) for line in told.splitlines()[1:-1]]
    assert sum(counts) == total


# Train and eval mode.


class Normed(nn.Module):
    """Batch normalisation, which learns statistics in training mode, and remembers in which mode it was asked."""

    def __init__(self, observation_space: spaces.Space[Any]) -> None:
        super().__init__()
        self.features_dim = 3
        self.norm = nn.BatchNorm1d(3)
        self.asked: list[tuple[bool, int]] = []

    def forward(self, obs: Tensor) -> Tensor:
        self.asked.append((self.training, len(obs)))
        return self.norm(obs)


def statistics(body: Normed) -> list[Tensor]:
    assert body.norm.running_mean is not None
    assert body.norm.running_var is not None
    return [body.norm.running_mean.clone(), body.norm.running_var.clone()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_batch_normalisation_learns_in_updates_only(make: Any) -> None:
    model = make(features_extractor_class=Normed)
    acting = (model.policy if isinstance(model, A2C) else model.actor).features_extractor

    def watch(locals_: Any, _: Any) -> bool:
        # All that happened since the last update is acting, one batch of n_envs at a time, in evaluation mode.
        steps.append(statistics(acting))
        return True

    steps: list[list[Tensor]] = []
    n_updates_before = model.n_updates
    model.learn(16 if isinstance(model, A2C) else 20, callback=watch)
    assert n_updates_before == 0
    assert all(same(one, steps[0]) for one in steps)  # nothing moved before the first update
    assert not any(mode for mode, size in acting.asked if size == model.n_envs)

    model.learn(40, reset_num_timesteps=False)
    assert model.n_updates > 0
    assert any(mode for mode, size in acting.asked if size > model.n_envs)
    assert not any(mode for mode, size in acting.asked if size == model.n_envs)
    learned = statistics(acting)
    assert not same(learned, steps[0])

    acting.asked.clear()
    obs = np.float32([[1, 0, 3], [0, 1, -3], [0.6, 0.8, 1]])
    alone = np.stack([model.predict(one)[0] for one in obs])
    together = model.predict(obs)[0]
    np.testing.assert_allclose(alone, together, rtol=1e-5, atol=1e-6)  # in training mode they would differ
    assert {mode for mode, _ in acting.asked} == {False}
    assert same(statistics(acting), learned)


@pytest.mark.parametrize("cls", [DDPG, TD3])
def test_targets_copy_the_statistics_and_never_learn_them(cls: Any) -> None:
    network = {"net_arch": [8], "features_extractor_class": Normed}
    arguments = {**SMALL["td3"][2], "target_update_interval": 1}
    model = cls("MlpPolicy", "Pendulum-v1", seed=0, policy_kwargs=network, **arguments).learn(60)
    assert model.n_updates > 10
    for target in (model.actor_target, model.critic_target):
        assert {mode for mode, _ in target.features_extractor.asked} == {False}
    # Both moved together in the last update that moved targets; the critic learned from a batch after that, at most.
    if cls is DDPG:
        assert same(statistics(model.critic.features_extractor), statistics(model.critic_target.features_extractor))
        assert same(statistics(model.actor.features_extractor), statistics(model.actor_target.features_extractor))


def test_a_rollout_that_asks_for_one_value_only_does_not_disturb_batch_normalisation() -> None:
    """In training mode, one observation alone would be an error; the states after a rollout are evaluated instead."""
    network = {"net_arch": [8], "features_extractor_class": Normed}
    model = A2C("MlpPolicy", "Pendulum-v1", n_envs=1, n_steps=4, seed=0, policy_kwargs=network).learn(20)
    asked = model.policy.features_extractor.asked
    assert (False, 1) in asked
    assert (True, 4) in asked
    assert (True, 1) not in asked


class Constant(gymnasium.Env[Any, Any]):
    observation_space = spaces.Box(-1, 1, (3,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        return np.ones(3, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return np.ones(3, np.float32), 0.0, False, False, {}


def test_dropout_drops_in_updates_only(make: Any) -> None:
    class Dropping(nn.Module):
        def __init__(self, observation_space: spaces.Space[Any]) -> None:
            super().__init__()
            self.features_dim, self.drop = 3, nn.Dropout(0.5)
            self.zeros: dict[bool, int] = {True: 0, False: 0}

        def forward(self, obs: Tensor) -> Tensor:
            features = self.drop(obs)
            self.zeros[self.training] += int((features == 0).sum())
            return features

    kind = type(make())
    network = {"net_arch": [8], "features_extractor_class": Dropping}
    model = kind("MlpPolicy", Constant, seed=0, policy_kwargs=network, **SMALL[kind.__name__.lower()][2]).learn(60)
    learning = [model.policy] if kind is A2C else [model.actor, model.critic]
    for one in learning:
        assert one.features_extractor.zeros[True] > 0
    assert all(body.zeros[False] == 0 for body in bodies(model, Dropping))
    if kind is not A2C:
        assert all(t.features_extractor.zeros == {True: 0, False: 0} for t in (model.actor_target, model.critic_target))
    np.testing.assert_array_equal(model.predict(np.ones(3))[0], model.predict(np.ones(3))[0])


@pytest.mark.parametrize("policy", ["MlpPolicy", "MlpLstmPolicy"])
@pytest.mark.parametrize("name", ["squash", "ortho_init", "share_features_extractor", "layer_norm", "normalize_obs"])
def test_flags_of_a_policy_are_flags(policy: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"policy_kwargs: {name} must be True or False, not 'no'"):
        A2C(policy, "Pendulum-v1", policy_kwargs={name: "no"})


def test_flags_of_a_deterministic_policy_are_flags() -> None:
    with pytest.raises(ValueError, match="policy_kwargs: layer_norm must be True or False, not 2"):
        TD3("MlpPolicy", "Pendulum-v1", policy_kwargs={"layer_norm": 2})
