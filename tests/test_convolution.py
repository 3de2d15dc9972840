"""Convolutions written out equal autograd's, and what was computed to act serves to learn only where it is the same."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from sbac import A2C
from sbac.callbacks import CheckpointCallback
from sbac.convolution import Convolutions
from sbac.kept import Kept
from sbac.networks import NatureCNN
from sbac.perceptron import Gradient
from sbac.policies import CnnActorCritic


class Pictures(nn.Module):
    """Two convolutions, each unlike the other."""

    def __init__(self) -> None:
        super().__init__()
        first = nn.Conv2d(4, 8, kernel_size=(3, 5), stride=2, padding=1)
        second = nn.Conv2d(8, 6, kernel_size=3, padding=(0, 2), dilation=2, groups=2)
        self.cnn = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten())
        self.way = Convolutions(self, "cnn")


def places(net: nn.Module) -> dict[int, Gradient]:
    """Room for the gradients of all parameters."""
    rooms = {id(p): torch.zeros_like(p) for p in net.parameters()}
    return {key: Gradient(room, room.numpy()) for key, room in rooms.items()}


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_both_ways_through_convolutions_are_autograds(form: torch.memory_format) -> None:
    torch.manual_seed(0)
    net, x = Pictures(), torch.rand(5, 4, 20, 17).contiguous(memory_format=form)
    expected = net.cnn(x)
    expected.backward(slope := torch.randn_like(expected))
    trace, into = net.way.trace(x), places(net)
    assert trace is not None and not trace.output.requires_grad
    torch.testing.assert_close(trace.output, expected.detach(), rtol=1e-6, atol=1e-6)
    trace.back(slope, into)
    for parameter in net.parameters():
        torch.testing.assert_close(into[id(parameter)].tensor, parameter.grad, rtol=1e-5, atol=1e-5)
    trace.back(slope, {key: place for key, place in into.items() if key != id(net.cnn[0].weight)})  # adds
    torch.testing.assert_close(into[id(net.cnn[2].bias)].tensor, 2 * net.cnn[2].bias.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(into[id(net.cnn[0].weight)].tensor, net.cnn[0].weight.grad, rtol=1e-5, atol=1e-5)


def test_frozen_layers_get_no_gradient_and_those_above_theirs() -> None:
    net, x = Pictures(), torch.rand(5, 4, 20, 17)
    expected = net.cnn(x)
    expected.backward(slope := torch.randn_like(expected))
    trace, above = net.way.trace(x), places(net.cnn[2])
    assert trace is not None
    trace.back(slope, above)
    for parameter in net.cnn[2].parameters():
        torch.testing.assert_close(above[id(parameter)].tensor, parameter.grad, rtol=1e-5, atol=1e-5)
    trace.back(slope, {})  # all are frozen


def another_activation(net: Pictures) -> None:
    net.cnn[1] = nn.Tanh()


def without_bias(net: Pictures) -> None:
    net.cnn[0] = nn.Conv2d(4, 8, 3, bias=False)


def around_the_edge(net: Pictures) -> None:
    net.cnn[0] = nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular")


def by_name(net: Pictures) -> None:
    net.cnn[0] = nn.Conv2d(4, 8, 3, padding="same")


def not_laid_flat(net: Pictures) -> None:
    net.cnn[-1] = nn.Flatten(2)


def of_doubles(net: Pictures) -> None:
    net.cnn[0].weight.data = net.cnn[0].weight.data.double()


def hooked(net: Pictures) -> None:
    net.cnn[2].register_forward_hook(lambda *_: None)


def hooked_for_gradients(net: Pictures) -> None:
    net.cnn[0].weight.register_hook(lambda gradient: gradient)


@pytest.mark.parametrize(
    "change",
    [
        another_activation,
        without_bias,
        around_the_edge,
        by_name,
        not_laid_flat,
        of_doubles,
        hooked,
        hooked_for_gradients,
    ],
)
def test_what_is_not_plain_is_left_to_autograd(change: Callable[[Pictures], None]) -> None:
    net, x = Pictures(), torch.rand(2, 4, 20, 17)
    assert net.way.trace(x) is not None  # looked at once
    change(net)
    assert net.way.trace(x) is None
    assert net.way.trace(x.flatten(1)) is None


def test_replaced_layers_are_seen_and_copies_have_their_own() -> None:
    net, x = Pictures(), torch.rand(2, 4, 20, 17)
    assert net.way.trace(x) is not None
    copies = [copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    net.cnn[0] = nn.Conv2d(4, 8, 3)
    for one in (net, *copies):
        trace = one.way.trace(x)
        assert trace is not None
        torch.testing.assert_close(trace.output, one.cnn(x).detach(), rtol=1e-6, atol=1e-6)


# A policy on images.


class Dots(gymnasium.Env[Any, Any]):
    """Random pixels; episodes of 9 steps, rewards for what the first pixel says."""

    observation_space = spaces.Box(0, 255, (36, 36, 1), np.uint8)
    action_space = spaces.Discrete(3)

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(**kwargs)
        self.steps = 0
        return self._see(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        reward = float(self.obs[0, 0, 0] % 3 == action)
        self.steps += 1
        return self._see(), reward, self.steps == 9, False, {}

    def _see(self) -> np.ndarray:
        self.obs = self.np_random.integers(0, 256, (36, 36, 1), dtype=np.uint8)
        return self.obs


SMALL: dict[str, Any] = {"n_envs": 2, "seed": 0, "policy_kwargs": {"features_extractor_kwargs": {"features_dim": 32}}}


def test_nature_cnn_equals_its_modules() -> None:
    torch.manual_seed(0)
    body = NatureCNN(spaces.Box(0, 1, (2, 40, 44), np.float32), features_dim=16)
    x = torch.rand(6, 2, 40, 44)
    expected = body(x)
    expected.backward(slope := torch.randn_like(expected))
    chain, into = body.trace(x), places(body)
    assert chain is not None
    torch.testing.assert_close(chain.output, expected.detach(), rtol=1e-5, atol=1e-6)
    chain.back(slope, into)
    for parameter in body.parameters():
        torch.testing.assert_close(into[id(parameter)].tensor, parameter.grad, rtol=1e-4, atol=1e-5)


def rollout(model: A2C, change: Callable[[A2C], None] = lambda model: None) -> None:
    """Five steps without learning from them, with a change after three."""
    model.policy.begin_rollout()
    for t in range(5):
        if t == 3:
            change(model)
        obs = model._obs
        action = model.policy.act(obs, deterministic=False, generator=model._act_generator)
        step = model.env.step(action, model._codec)
        model.rollout_buffer.add(obs, action, step)
        model.policy.observe(obs, step, 0.99)
        model._obs = step.obs


def gradient(model: A2C) -> Tensor:
    """Of a loss of the rollout."""
    found = model.policy.evaluate_rollout(model.rollout_buffer.get())
    back = lambda: found.back(found.value, torch.ones_like(found.value), torch.full_like(found.value, 0.1))  # noqa: E731
    model.policy.gradient(torch.zeros(()), None, back)
    return model.policy._gradient.clone()


def evaluate_beside(model: A2C) -> None:
    model.predict(np.zeros((2, 36, 36, 1), np.uint8))


def change_a_weight(model: A2C) -> None:
    with torch.no_grad():
        model.policy.features_extractor.cnn[0].weight[0, 0, 0, 0] += 0.5


@pytest.mark.parametrize(
    ("change", "is_used"), [(lambda model: None, True), (evaluate_beside, True), (change_a_weight, False)]
)
def test_what_was_computed_to_act_is_used_to_learn_where_it_is_the_same(
    change: Callable[[A2C], None], is_used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = A2C("CnnPolicy", Dots, **SMALL)
    model._obs = model.env.reset(0)
    rollout(model, change)
    seen: list[int] = []
    trace = NatureCNN.trace

    def counted(body: NatureCNN, obs: Tensor) -> Any:
        seen.append(len(obs))
        return trace(body, obs)

    monkeypatch.setattr(NatureCNN, "trace", counted)
    kept = gradient(model)
    assert seen == ([] if is_used else [2] * 5)  # steps of two environments
    anew = gradient(model)  # of which nothing is kept any more
    assert seen[-5:] == [2] * 5
    assert torch.equal(kept, anew)
    monkeypatch.setattr(NatureCNN, "trace", lambda *_: None)
    torch.testing.assert_close(kept, gradient(model), rtol=1e-4, atol=1e-5)  # by autograd


def test_a_run_on_images_resumes_exactly_from_the_midst_of_a_rollout(tmp_path: Path) -> None:
    def model() -> A2C:
        return A2C("CnnPolicy", Dots, **SMALL)

    whole = model().learn(60)
    checkpoints = CheckpointCallback(save_freq=8, save_path=tmp_path)  # 16 of 2 x 5 transitions a rollout
    model().learn(30, callback=checkpoints)
    (newest,) = [path for path in checkpoints.checkpoints() if "_16_" in path.name]
    resumed = A2C.load(newest, env=Dots)
    assert resumed.rollout_buffer.pos == 3
    resumed.learn(60 - 16, reset_num_timesteps=False)
    assert torch.equal(resumed.policy.flat, whole.policy.flat)


def test_copies_of_a_policy_keep_nothing() -> None:
    model = A2C("CnnPolicy", Dots, **SMALL)
    model._obs = model.env.reset(0)
    rollout(model)
    assert isinstance(model.policy, CnnActorCritic)
    assert not copy.deepcopy(model.policy)._kept.is_on
    assert torch.equal(copy.deepcopy(model.policy).flat, model.policy.flat)


def test_kept_belongs_to_the_newest_steps_and_to_observations_that_were_trained_on() -> None:
    weights, obs = torch.ones(3), [np.zeros(1) for _ in range(4)]
    kept: Kept[str] = Kept(is_on=True)
    for t, one in enumerate(obs[:3]):
        kept.see(one, f"step {t}", weights)
        if t == 1:
            kept.see(np.zeros(1), "of an evaluation", weights)
        kept.note(one)
    first, last = (obs[0], "step 0"), (obs[2], "step 2")
    assert kept.of_steps(3, weights) == [first, None, last]
    assert kept.of_steps(5, weights) == [None, None, first, None, last]
    assert kept.of_steps(2, weights) == [None, None]
    assert kept.of_steps(3, weights + 1) == [None, None, None]
    off: Kept[str] = Kept()
    off.see(obs[0], "step 0", weights)
    off.note(obs[0])
    assert off.of_steps(1, weights) == [None]
