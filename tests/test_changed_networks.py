"""What somebody adds to a network, puts in place of its parts or around its training counts, or is refused."""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from sbac import A2C, A3C, DDPG, TD3
from sbac.buffers import ReplayBatch, ReplayBuffer, RolloutBatch, RolloutBuffer
from sbac.deterministic import Critic
from sbac.look import Glance, Look, forget
from sbac.policies import StochasticActorCritic
from sbac.trainable import Trainable

OFF_POLICY: dict[str, Any] = {"learning_starts": 20, "batch_size": 16, "buffer_size": 200, "seed": 0}
SMALL: dict[str, Any] = {"net_arch": [16, 16]}


def td3(**kwargs: Any) -> TD3:
    return TD3("MlpPolicy", "Pendulum-v1", policy_kwargs=SMALL, **{**OFF_POLICY, **kwargs})


def a2c(**kwargs: Any) -> A2C:
    return A2C("MlpPolicy", "CartPole-v1", policy_kwargs=SMALL, seed=0, **kwargs)


def moved(parts: Any, learn: Callable[[], Any]) -> list[bool]:
    """Which parameters of some parts a training moves."""
    parameters = [parameter for part in parts for parameter in part.parameters()]
    before = [parameter.detach().clone() for parameter in parameters]
    learn()
    return [not torch.equal(*pair) for pair in zip(before, parameters, strict=True)]


# Layers that come later.


class WithExtra(StochasticActorCritic):
    """Has a layer that it makes behind `super().__init__`, which lays out what is there."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.extra = nn.Linear(4, 4)

    def _actor_features(self, obs: Any) -> Tensor:
        return self.features_extractor(self.extra(obs))

    def _critic_features(self, obs: Any) -> Tensor:
        return self._actor_features(obs)


def test_layers_that_a_derived_policy_adds_learn_and_are_saved(tmp_path: Any) -> None:
    model = A2C(WithExtra, "CartPole-v1", seed=0)
    assert moved([model.policy.extra], lambda: model.learn(50)) == [True, True]
    model.save(tmp_path / "model", full=True)
    again = A2C.load(tmp_path / "model", env="CartPole-v1", custom_objects={"policy": WithExtra})
    for one in (model, again):
        one.learn(50, reset_num_timesteps=False)
    assert torch.equal(model.policy.flat, again.policy.flat)


@pytest.mark.parametrize("make", [a2c, td3])
def test_a_layer_that_is_added_to_a_model_is_named(make: Callable[[], Any]) -> None:
    model = make()
    network: nn.Sequential = model.policy.policy_net if isinstance(model, A2C) else model.actor.mu
    network.insert(0, nn.Linear(network[0].in_features, network[0].in_features))
    with pytest.raises(ValueError, match=r"(others than those that it was made with|came after .*), and cannot learn"):
        model.learn(50)


def test_a_part_that_is_added_may_be_frozen() -> None:
    model = a2c()
    model.policy.teacher = nn.Linear(3, 3).requires_grad_(False)
    assert moved([model.policy], lambda: model.learn(50)).count(False) == 2
    model = a2c()
    model.policy.teacher = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"teacher\.weight, teacher\.bias came after the network was made"):
        model.learn(50)


# Layers in place of others, while a model trains.


def test_a_layer_that_a_callback_replaces_learns_at_once() -> None:
    model, new = td3(), nn.Linear(16, 1)

    def replace(*_: Any) -> bool:
        if model.num_timesteps == 30:
            model.actor.mu[4] = new
        return True

    assert moved([new], lambda: model.learn(50, callback=replace)) == [True, True]


@pytest.mark.parametrize("cls", [DDPG, TD3])
def test_a_layer_that_is_replaced_learns_without_acting(cls: Any) -> None:
    model = cls("MlpPolicy", "Pendulum-v1", policy_kwargs=SMALL, **OFF_POLICY).learn(30)
    q_net = model.critic.q_networks[0].q_net
    model.actor.mu[0], q_net[len(q_net) - 1] = nn.Linear(3, 16), nn.Linear(16, 1)
    assert all(moved([model.actor.mu[0], *model.critic.q_networks], lambda: model.train(4)))


def test_weights_that_are_assigned_learn_without_acting() -> None:
    model = td3().learn(30)
    model.policy.load_state_dict(td3().policy.state_dict(), assign=True)
    for parameter in model.policy.parameters():
        parameter.requires_grad_(True)
    assert all(moved([model.actor, model.critic, model.actor_target], lambda: model.train(4)))


@pytest.mark.parametrize("part", ["critic", "actor"])
def test_an_equal_layer_in_place_of_another_changes_nothing(part: str) -> None:
    flats = []
    for is_replaced in (False, True):
        model = DDPG("MlpPolicy", "Pendulum-v1", policy_kwargs=SMALL, **OFF_POLICY).learn(30)
        if is_replaced:
            # The critic's step moves it, along which the actor's then goes.
            layers: Any = model.critic.q_networks[0].q_net if part == "critic" else model.actor.mu
            layers[0] = copy.deepcopy(layers[0])
        model.train(3)
        flats.append(torch.cat([model.critic.flat, model.actor.flat]))
    assert torch.equal(*flats)


def test_a_layer_with_modes_that_is_put_in_is_still_as_the_model_predicts() -> None:
    model = a2c()
    model.policy.policy_net.insert(2, nn.Dropout(0.5))
    model.learn(20)
    obs = np.float32([0.1, 0.2, 0.3, 0.4])
    model.predict(obs, deterministic=True)
    policy: Any = model.policy
    with torch.no_grad():
        logits = [policy.get_distribution(torch.as_tensor(obs[None])).logits for _ in range(5)]
    assert all(torch.equal(logits[0], other) for other in logits)


def test_targets_evaluate_also_where_the_whole_policy_trains() -> None:
    policy = td3(dropout=0.5).policy
    policy.train()
    assert policy.actor.training and policy.critic.training
    assert not any(module.training for part in (policy.actor_target, policy.critic_target) for module in part.modules())


# Optimizers and gradients.


@pytest.mark.parametrize("make", [a2c, td3])
@pytest.mark.parametrize("optimizer_class", [torch.optim.RMSprop, torch.optim.Adam, torch.optim.SGD])
def test_another_optimizer_steps_all_that_it_was_given(make: Callable[[], Any], optimizer_class: Any) -> None:
    model = make()
    network: Trainable = model.policy if isinstance(model, A2C) else model.actor
    kwargs = {"fused": True} if optimizer_class is torch.optim.Adam else {}
    network.optimizer = optimizer_class(network.parameters(), lr=1e-2, **kwargs)
    assert all(moved([network], lambda: model.learn(60)))


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, lambda: torch.set_grad_enabled(False)])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_learning_turns_gradients_on(around: Callable[[], Any], layer_norm: bool) -> None:
    one, other = a2c(layer_norm=layer_norm), a2c(layer_norm=layer_norm)
    with around(), contextlib.ExitStack() as stack:
        stack.callback(torch.set_grad_enabled, True)
        one.learn(40)
        assert not torch.is_grad_enabled()
    assert torch.equal(one.policy.flat, other.learn(40).policy.flat)


# One look for an update, where nobody else can change anything in the meantime.


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Look]:
    """Those that were made, and not taken for granted."""
    made: list[Look] = []
    is_the_same = Look._is_the_same

    def noted(self: Look) -> bool:
        made.append(self)
        return is_the_same(self)

    monkeypatch.setattr(Look, "_is_the_same", noted)
    return made


def hook(model: Any, calls: list[Any]) -> Any:
    return model.critic.q_networks[0].q_net[0].register_forward_hook(lambda *_: calls.append(1))


@pytest.mark.parametrize("cls", [DDPG, TD3])
def test_networks_are_looked_at_once_in_an_update(cls: Any, looks: list[Look]) -> None:
    model = cls("MlpPolicy", "Pendulum-v1", policy_kwargs=SMALL, **OFF_POLICY).learn(30)
    looks.clear()
    model.train(4)
    assert len(looks) == 4 and len({*map(id, looks)}) == 1
    calls: list[Any] = []
    handle = hook(model, calls)
    model.train(4)
    assert calls and len(looks) > 12  # at each part, since a hook may do anything
    handle.remove()
    model.train(2)
    calls.clear(), looks.clear()
    model.train(4)
    assert not calls and len(looks) == 4


@pytest.mark.parametrize("cls", [DDPG, TD3])
def test_a_policy_in_place_of_another_is_looked_at(cls: Any) -> None:
    model = cls("MlpPolicy", "Pendulum-v1", policy_kwargs=SMALL, **OFF_POLICY).learn(30)
    model.policy = copy.deepcopy(model.policy)
    model.train(2)
    model.actor.mu[0] = nn.Linear(3, 16)
    calls: list[Any] = []
    hook(model, calls)
    assert all(moved([model.actor], lambda: model.train(2))) and calls


def test_a_copy_of_a_model_learns_by_itself() -> None:
    model = td3().learn(30)
    twin = copy.deepcopy(model)
    model.train(2)
    flat = model.critic.flat.detach().clone()
    twin.train(2)
    assert torch.equal(model.critic.flat, flat) and torch.equal(twin.critic.flat, flat)


@contextlib.contextmanager
def at_each_part(self: Glance, policy: nn.Module, model: object) -> Iterator[None]:
    """In the place of `Glance.at`: no look answers for others."""
    forget()
    yield


def clip(network: nn.Module) -> None:
    for parameter in network.parameters():
        parameter.data = parameter.data.clamp(-0.05, 0.05)


def by_a_schedule(model: Any) -> None:
    def tau(progress: float) -> float:
        clip(model.critic)
        return 0.1

    model.tau = tau


def by_a_schedule_that_asks_another_model(model: Any) -> None:
    teacher = td3(seed=1)
    teacher.actor.mu[0].register_forward_hook(lambda module, inputs, output: 0.3 * output)
    model.tau = lambda progress: 0.1 + abs(float(teacher.predict(np.ones(3, np.float32))[0][0])) / 10


def by_a_hook_of_the_optimizer(model: Any) -> None:
    model.critic.optimizer.register_step_post_hook(lambda *_: clip(model.critic))


def by_a_method(model: Any) -> None:
    step = model.critic.step

    def and_clip() -> None:
        step()
        clip(model.critic)

    model.critic.step = and_clip


def by_another_class(model: Any) -> None:
    class Clips(Critic):
        def action_gradient(self, *args: Any) -> tuple[Tensor, Tensor]:
            clip(self)
            return super().action_gradient(*args)

    model.critic.__class__ = Clips


def by_another_preprocessor(model: Any) -> None:
    old, model.policy.preprocessor = model.policy.preprocessor, copy.deepcopy(model.policy.preprocessor)
    old.register_forward_hook(lambda module, inputs, output: 0.5 * output)


def by_new_hooks(model: Any) -> None:
    for module in model.actor.modules():
        module._forward_hooks = OrderedDict()
    model.actor.register_forward_hook(lambda module, inputs, output: 0.5 * output)


def by_a_compiler(model: Any) -> None:
    model.critic.compile(backend="eager")


CHANGES = [
    by_a_schedule,
    by_a_schedule_that_asks_another_model,
    by_a_hook_of_the_optimizer,
    by_a_method,
    by_another_class,
    by_another_preprocessor,
    by_new_hooks,
    by_a_compiler,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("cls", [DDPG, TD3])
def test_what_somebody_changes_within_an_update_is_seen_at_once(
    cls: Any, change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    states = []
    for is_at_each_part in (False, True):
        with monkeypatch.context() as patched:
            if is_at_each_part:
                patched.setattr(Glance, "at", at_each_part)
            model = cls("MlpPolicy", "Pendulum-v1", policy_kwargs=SMALL, **OFF_POLICY).learn(30)
            change(model)
            model.train(6)
            states.append(model.policy.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_an_update_within_an_update_leaves_no_trust() -> None:
    model = td3().learn(30)
    with model._updating():
        model.train(2)
    calls: list[Any] = []
    hook(model, calls)
    model.critic(torch.zeros(1, 3), torch.zeros(1, 1))
    assert len(calls) == 1


def test_nothing_is_so_where_nobody_has_looked() -> None:
    model = td3().learn(30)
    with model._updating():
        assert not Look().is_still_so()


def test_targets_follow_a_buffer_that_a_layer_was_given_later() -> None:
    model = DDPG("MlpPolicy", "Pendulum-v1", policy_kwargs=SMALL, **OFF_POLICY).learn(30)
    for network in (model.critic, model.critic_target):
        network.q_networks[0].q_net[0].register_buffer("mask", torch.ones(3))
    model.critic.q_networks[0].q_net[0].mask.zero_()
    model.train(1)
    assert not model.critic_target.q_networks[0].q_net[0].mask.any()


class HooksIn(TD3):
    """Looks into its critic while it learns."""

    calls: list[Any]

    def _update(self, batch: ReplayBatch) -> dict[str, Tensor]:
        handle = hook(self, self.calls)
        numbers = super()._update(batch)
        handle.remove()
        return numbers


@pytest.mark.parametrize("how", ["a class", "an attribute"])
def test_an_update_of_somebody_else_may_hook_into_the_networks(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = HooksIn if how == "a class" else TD3
    model = cls("MlpPolicy", "Pendulum-v1", policy_kwargs=SMALL, **OFF_POLICY)
    calls: list[Any] = []
    if isinstance(model, HooksIn):
        model.calls = calls
    model.learn(30)
    if how == "an attribute":
        update = model._update

        def hooked(batch: ReplayBatch) -> dict[str, Tensor]:
            handle = hook(model, calls)
            numbers = update(batch)
            handle.remove()
            return numbers

        monkeypatch.setattr(model, "_update", hooked)
    calls.clear()
    model.train(4)
    assert len(calls) == 6  # four steps of the critic, two of the actor


class Blinds(nn.Linear):
    """Of somebody else: puts zeros in place of another network's first layer whenever it is called."""

    def forward(self, x: Tensor) -> Tensor:
        self.layers[0].weight = nn.Parameter(torch.zeros_like(self.layers[0].weight))
        return super().forward(x)


def test_what_a_module_of_somebody_else_changes_is_seen_at_once() -> None:
    model = td3().learn(20)
    model.actor.mu[2] = Blinds(16, 16)
    object.__setattr__(model.actor.mu[2], "layers", [nn.Linear(1, 1)])
    assert all(moved([model.actor], lambda: model.train(2)))
    model = td3().learn(20)
    model.actor.mu[2] = Blinds(16, 16)
    object.__setattr__(model.actor.mu[2], "layers", model.critic.q_networks[0].q_net)
    assert not any(moved([model.actor], lambda: model.train(2)))  # Q no longer depends on the action


def test_to_train_without_gradients_is_refused() -> None:
    model = td3(layer_norm=True).learn(30)
    with torch.no_grad(), pytest.raises(RuntimeError, match="Critic cannot learn while gradients are turned off"):
        model.train(1)


# Buffers of modules.


class Average(nn.Module):
    """A body that gives its running average a new tensor at each step, as many are written."""

    features_dim = 3

    def __init__(self, observation_space: spaces.Space[Any]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.scale = nn.Linear(3, 3)

    def forward(self, obs: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * obs.detach().mean(0)
        return self.scale(obs - self.mean)


def test_targets_follow_buffers_that_are_new_tensors() -> None:
    kwargs = {"features_extractor_class": Average, **SMALL}
    model = TD3("MlpPolicy", "Pendulum-v1", policy_kwargs=kwargs, tau=1.0, policy_delay=1, **OFF_POLICY).learn(40)
    own, target = model.critic.features_extractor.mean, model.critic_target.features_extractor.mean
    assert own.abs().min() > 0
    assert torch.equal(own, target)


def test_workers_share_buffers_that_are_new_tensors() -> None:
    kwargs = {"features_extractor_class": Average, **SMALL}
    model = A3C("MlpPolicy", "Pendulum-v1", policy_kwargs=kwargs, n_workers=1, seed=0).learn(40)
    assert model.policy.features_extractor.mean.abs().min() > 0


class FrozenBody(nn.Module):
    """A body that is frozen from the beginning."""

    features_dim = 3

    def __init__(self, observation_space: spaces.Space[Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.requires_grad_(False)

    def forward(self, obs: Tensor) -> Tensor:
        return torch.tanh(self.layer(obs))


def test_targets_follow_frozen_weights_that_somebody_loaded() -> None:
    kwargs = {"features_extractor_class": FrozenBody, **SMALL}
    model = TD3("MlpPolicy", "Pendulum-v1", policy_kwargs=kwargs, tau=0.5, policy_delay=1, **OFF_POLICY).learn(24)
    own, target = (network.features_extractor.layer for network in (model.critic, model.critic_target))
    other = FrozenBody(model.observation_space).layer
    assert not torch.equal(own.weight, other.weight)
    own.load_state_dict(other.state_dict())
    model.learn(1, reset_num_timesteps=False)
    for layer in (own, target):
        assert torch.equal(layer.weight, other.weight) and torch.equal(layer.bias, other.bias)


# Batches that a derived buffer changes.


class Brighter(ReplayBuffer):
    """Changes the weights of its batches in their place."""

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        batch = super().sample(*args, **kwargs)
        batch.weight.mul_(2.0)
        return batch


def test_the_weights_of_a_batch_are_its_own() -> None:
    model = td3(replay_buffer_class=Brighter).learn(30)
    for _ in range(3):
        assert (model.replay_buffer.sample(16).weight == 2).all()


class Squares(gymnasium.Env[Any, Any]):
    """Images of noise."""

    observation_space = spaces.Box(0, 255, (36, 36, 1), np.uint8)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return self._image(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return self._image(), float(action), False, False, {}

    def _image(self) -> np.ndarray:
        return self.np_random.integers(256, size=(36, 36, 1), dtype=np.uint8)


class Negative(RolloutBuffer):
    """Gives images to learn from that were not seen."""

    def get(self) -> RolloutBatch:
        batch = super().get()
        return batch._replace(obs=255 - batch.obs)


def close_short_way(model: A2C) -> None:
    """By a hook that does nothing, before which torch's modules compute everything anew."""
    body: Any = model.policy.features_extractor
    body.cnn[0].register_forward_hook(lambda *_: None)


def by_vector(model: A2C) -> Callable[..., bool]:
    """A callback that makes all weights larger, and gives them other memory."""

    def change(*_: Any) -> bool:
        if model.num_timesteps == 8:
            vector = nn.utils.parameters_to_vector(model.policy.parameters()).detach()
            nn.utils.vector_to_parameters(1.5 * vector, model.policy.parameters())
        return True

    return change


@pytest.mark.parametrize("change", ["buffer", "weights"])
def test_what_was_computed_to_act_is_not_used_where_something_else_is_learned_from(change: str) -> None:
    def trained(is_short: bool) -> Tensor:
        model = A2C("CnnPolicy", Squares, seed=0, n_envs=2)
        if change == "buffer":
            model.rollout_buffer.__class__ = Negative
        if not is_short:
            close_short_way(model)
        callback = by_vector(model) if change == "weights" else None
        return model.learn(20, callback=callback).policy.flat.detach()

    torch.testing.assert_close(trained(True), trained(False), rtol=1e-4, atol=1e-5)
