"""TD3's gradient step, against stable-baselines3 and its formulas written out, and the arguments that DDPG shares."""

from __future__ import annotations

import csv
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import stable_baselines3
import torch
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import Tensor, nn

from sbac import DDPG, TD3
from sbac.buffers import ReplayBatch
from sbac.logger import configure
from sbac.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from sbac.schedules import LinearSchedule
from tests.test_ddpg import KNOWN, SMALL, Cycle, Idle, difference, make_batch, weights


@pytest.fixture(params=[DDPG, TD3])
def cls(request: pytest.FixtureRequest) -> Any:
    return request.param


def same(a: Any, b: Any) -> bool:
    """Whether two models have the same weights, bit for bit."""
    return difference(weights(a), weights(b)) == 0


def train_on(model: Any, batches: list[ReplayBatch]) -> None:
    """One gradient step on each of these batches."""
    given = iter(batches)
    with mock.patch.object(model.replay_buffer, "sample", lambda *_: next(given)):
        model.train(len(batches))


@contextmanager
def fixed_noise(noises: list[Tensor]) -> Iterator[None]:
    """Standard normal numbers are these, in turn, in both libraries."""
    ours, theirs = iter(noises), iter(noises)

    def normal(mean: float, std: float, shape: torch.Size) -> Tensor:
        noise = next(ours)
        assert noise.shape == shape
        return mean + std * noise

    def normal_(tensor: Tensor, mean: float = 0, std: float = 1) -> Tensor:
        return tensor.copy_(mean + std * next(theirs))

    with mock.patch.object(torch, "normal", normal), mock.patch.object(Tensor, "normal_", normal_):
        yield


def noise_of(seed: int, size: int = 16) -> Tensor:
    """Standard normal numbers, and two so large that they are clipped."""
    eps = torch.randn((size, 2), generator=torch.Generator().manual_seed(100 + seed))
    eps[:2] = torch.tensor([[9.0, -9.0], [-9.0, 9.0]])
    return eps


# Against stable-baselines3.


def in_peers_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    named = {}
    for name, tensor in state.items():
        for i in range(3):
            name = name.replace(f"q_networks.{i}.q_net", f"qf{i}")
        named[name] = tensor
    return named


@pytest.mark.parametrize(("n_critics", "policy_delay"), [(2, 2), (1, 1), (3, 3)])
def test_gradient_steps_equal_those_of_stable_baselines3(n_critics: int, policy_delay: int) -> None:
    shared: dict[str, Any] = {
        "learning_rate": 1e-3,
        "tau": 0.05,
        "policy_delay": policy_delay,
        "target_policy_noise": 0.3,
        "target_noise_clip": 0.4,
        "seed": 1,
        "device": "cpu",
    }
    policy_kwargs = {"net_arch": {"pi": [32, 16], "qf": [24, 16]}, "n_critics": n_critics}
    model = TD3("MlpPolicy", KNOWN, policy_kwargs=policy_kwargs, **shared)
    peer = stable_baselines3.TD3("MlpPolicy", Idle(), policy_kwargs=policy_kwargs, **shared)
    peer.set_logger(Logger(None, []))
    peer.policy.load_state_dict(in_peers_names(weights(model)))

    for step in range(1, 7):
        batch = make_batch(step)._replace(weight=torch.ones(16))
        columns = (batch.terminated[:, None], batch.reward[:, None], batch.discount[:, None])
        given = ReplayBufferSamples(batch.obs, batch.action, batch.successor, *columns)
        before = weights(model)
        with fixed_noise([noise_of(step)]):
            train_on(model, [batch])
            peer.replay_buffer.sample = lambda *_, given=given, **__: given
            peer.train(gradient_steps=1, batch_size=16)

        new = weights(model)
        assert difference(in_peers_names(new), peer.policy.state_dict()) < 1e-6
        assert difference(new, before, "critic.") > 1e-6
        for network in ("actor.", "critic_target.", "actor_target."):
            assert (difference(new, before, network) > 1e-6) == (step % policy_delay == 0)


# Against the formulas.


class ByHand:
    """Fujimoto et al. 2018, Algorithm 1, in plain autograd: a network of two layers, Adam, and ways to get it wrong.

    Args:
        state: The weights to begin with.
        wrong: What to get wrong, if anything.
    """

    TAU, ACTOR_RATE, CRITIC_RATE, DELAY, SIGMA, CLIP = 0.1, 1e-3, 5e-3, 2, 0.3, 0.5

    def __init__(self, state: dict[str, Tensor], wrong: str = "") -> None:
        self.state = {name: tensor.clone() for name, tensor in state.items()}
        self.wrong = wrong
        self.moments = {name: (torch.zeros_like(tensor), torch.zeros_like(tensor), 0) for name, tensor in state.items()}
        self.n_critics = len({name.split(".")[2] for name in state if name.startswith("critic.")})
        self.step = 0

    def mlp(self, prefix: str, x: Tensor) -> Tensor:
        for layer in (0, 2, 4):
            x = x @ self.state[f"{prefix}.{layer}.weight"].T + self.state[f"{prefix}.{layer}.bias"]
            x = torch.relu(x) if layer < 4 else x
        return x

    def mu(self, network: str, obs: Tensor) -> Tensor:
        return torch.tanh(self.mlp(f"{network}.mu", obs))

    def q(self, network: str, obs: Tensor, action: Tensor) -> list[Tensor]:
        joined = torch.cat([obs, action], 1)
        return [self.mlp(f"{network}.q_networks.{i}.q_net", joined).squeeze(1) for i in range(self.n_critics)]

    def update(self, batch: ReplayBatch, truncated: Tensor, noise: Tensor) -> None:
        self.step += 1
        eps = self.SIGMA * noise
        if self.wrong != "noise not clipped":
            eps = eps.clamp(-self.CLIP, self.CLIP)
        if self.wrong == "no noise":
            eps = torch.zeros_like(eps)
        next_action = self.mu("actor_target", batch.successor) + eps
        if self.wrong != "target action not clamped":
            next_action = next_action.clamp(-1, 1)
        next_qs = torch.stack(self.q("critic_target", batch.successor, next_action))
        next_q = next_qs.mean(0) if self.wrong == "mean over critics" else next_qs.min(0).values
        goes_on = 1 - batch.terminated
        if self.wrong == "bootstrap at termination":
            goes_on = torch.ones_like(goes_on)
        if self.wrong == "no bootstrap at truncation":
            goes_on = goes_on * (1 - truncated)
        target = (batch.reward + batch.discount * goes_on * next_q).detach()
        self.descend(
            "critic.",
            lambda: sum((batch.weight * (q - target) ** 2).mean() for q in self.q("critic", batch.obs, batch.action)),
            self.CRITIC_RATE,
        )
        is_due = self.step % self.DELAY == 0
        if is_due or self.wrong == "actor not delayed":
            self.descend("actor.", lambda: -self.actors_q(batch.obs).mean(), self.ACTOR_RATE)
        if is_due or self.wrong == "targets not delayed":
            for name in self.state:
                if "_target." in name:
                    source = self.state[name.replace("_target.", ".")].detach()
                    self.state[name] = self.TAU * source + (1 - self.TAU) * self.state[name]

    def actors_q(self, obs: Tensor) -> Tensor:
        qs = self.q("critic", obs, self.mu("actor", obs))
        return torch.stack(qs).min(0).values if self.wrong == "actor climbs the least critic" else qs[0]

    def descend(self, prefix: str, loss: Callable[[], Tensor], rate: float) -> None:
        """One step of Adam (Kingma & Ba 2015, Algorithm 1) for the weights below a prefix."""
        names = [name for name in self.state if name.startswith(prefix)]
        for name in names:
            self.state[name] = self.state[name].requires_grad_()
        gradients = torch.autograd.grad(loss(), [self.state[name] for name in names])
        for name, gradient in zip(names, gradients, strict=True):
            m, v, k = self.moments[name]
            m, v, k = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2, k + 1
            self.moments[name] = (m, v, k)
            m_hat, v_hat = m / (1 - 0.9**k), v / (1 - 0.999**k)
            self.state[name] = self.state[name].detach() - rate * m_hat / (v_hat.sqrt() + 1e-8)


def make(n_critics: int = 2, **overrides: Any) -> TD3:
    """With last layers so large that target actions reach the bounds."""
    arguments: dict[str, Any] = {
        "tau": ByHand.TAU,
        "actor_learning_rate": ByHand.ACTOR_RATE,
        "critic_learning_rate": ByHand.CRITIC_RATE,
        "policy_delay": ByHand.DELAY,
        "target_policy_noise": ByHand.SIGMA,
        "target_noise_clip": ByHand.CLIP,
        "policy_kwargs": {"net_arch": [40, 30], "final_init": 0.5},
    }
    return TD3("MlpPolicy", KNOWN, n_critics=n_critics, seed=3, **{**arguments, **overrides})


def both_updated(n_critics: int = 2, wrong: str = "") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights after five updates, and the weights as the formulas have them."""
    model = make(n_critics)
    by_hand = ByHand(weights(model), wrong)
    batches, noises = [make_batch(seed) for seed in range(5)], [noise_of(seed) for seed in range(5)]
    for batch, noise in zip(batches, noises, strict=True):
        # Every third transition was cut by a time limit, which the batch of an off-policy learner need not tell.
        truncated = (torch.arange(16) % 3 == 0).float()
        by_hand.update(batch, truncated, noise)
    with fixed_noise(noises):
        train_on(model, batches)
    return weights(model), {name: tensor.detach() for name, tensor in by_hand.state.items()}


@pytest.mark.parametrize("n_critics", [1, 2, 3])
def test_gradient_steps_by_hand(n_critics: int) -> None:
    assert difference(*both_updated(n_critics)) < 1e-6


@pytest.mark.parametrize(
    "wrong",
    [
        "bootstrap at termination",
        "no bootstrap at truncation",
        "noise not clipped",
        "no noise",
        "target action not clamped",
        "mean over critics",
        "actor not delayed",
        "targets not delayed",
        "actor climbs the least critic",
    ],
)
def test_wrong_gradient_steps_are_told_apart(wrong: str) -> None:
    assert difference(*both_updated(wrong=wrong)) > 1e-4


def test_a_target_by_hand() -> None:
    """Networks of biases alone, so that the target can be computed in the head."""
    model = make(policy_kwargs={"net_arch": []}, target_policy_noise=0.4, target_noise_clip=0.5)
    for network in (model.actor_target, model.critic_target, model.critic):
        network.flat.data.zero_()
    first, second = (q_network.q_net[0] for q_network in model.critic_target.q_networks)
    # Q'_1 = 1 + a_1, Q'_2 = 3 - a_1 - a_2, mu' = tanh(x), and x such that mu' = (0.8, 0).
    model.actor_target.mu[0].bias.data[:] = torch.tensor([np.arctanh(0.8), 0.0])
    first.weight.data[0, 3:], first.bias.data[:] = torch.tensor([1.0, 0.0]), 1.0
    second.weight.data[0, 3:], second.bias.data[:] = torch.tensor([-1.0, -1.0]), 3.0
    rows = {name: tensor[:3] for name, tensor in make_batch(0)._asdict().items()}
    batch = ReplayBatch(**rows)._replace(
        reward=torch.tensor([1.0, 1.0, 1.0]),
        discount=torch.tensor([0.5, 0.25, 0.5]),
        terminated=torch.tensor([0.0, 0.0, 1.0]),
        weight=torch.tensor([1.0, 2.0, 3.0]),
    )
    # Noise of 2 is 0.8, clipped to 0.5; 0.8 + 0.5 is clamped to 1. Noise of -0.5 is -0.2.
    with fixed_noise([torch.tensor([[2.0, 2.0], [-0.5, 0.5], [0.0, 0.0]])]):
        numbers = model._update(batch)
    # a' = (1, 0.5): Q' = 2 and 1.5. a' = (0.6, 0.2): Q' = 1.6 and 2.2. Targets: 1 + 0.75, 1 + 0.4, 1; Q itself is 0.
    torch.testing.assert_close(numbers["td_error"], torch.tensor([1.75, 1.4, 1.0]))
    assert numbers["target_mean"].mean().item() == pytest.approx((1.75 + 1.4 + 1) / 3)
    assert numbers["critic_loss"].item() == pytest.approx(2 * (1.75**2 + 2 * 1.4**2 + 3) / 3)
    assert numbers["q_mean"].mean().item() == 0
    assert "actor_loss" not in numbers, "the first update is the critics' alone"


# What moves when.


def moved(model: Any, n: int) -> dict[str, list[int]]:
    """At which of n updates each network moved."""
    at: dict[str, list[int]] = {name: [] for name in ("actor", "critic", "actor_target", "critic_target")}
    for update in range(1, n + 1):
        before = weights(model)
        train_on(model, [make_batch(update)])
        for name, updates in at.items():
            if difference(weights(model), before, f"{name}.") > 0:
                updates.append(update)
    return at


def test_the_actor_and_the_targets_move_at_every_third_update() -> None:
    every = list(range(1, 11))
    late = {"actor": [3, 6, 9], "critic": every, "actor_target": [3, 6, 9], "critic_target": [3, 6, 9]}
    assert moved(make(policy_delay=3), 10) == late
    assert moved(make(policy_delay=1), 10) == dict.fromkeys(late, every)


def test_the_delay_goes_on_where_a_model_was_saved(tmp_path: Path) -> None:
    model = make(policy_delay=3)
    train_on(model, [make_batch(seed) for seed in range(2)])
    model.save(tmp_path / "model")
    assert moved(TD3.load(tmp_path / "model"), 5)["actor"] == [1, 4]


def test_hard_updates_of_the_targets() -> None:
    """With tau 1 the targets become the networks, every few updates of the actor."""
    ddpg = DDPG("MlpPolicy", KNOWN, target_update_interval=3, tau=1.0, learning_rate=1e-3, seed=0)
    every, hard = list(range(1, 8)), [3, 6]
    expected = {"actor": every, "critic": every, "actor_target": hard, "critic_target": hard}
    assert moved(ddpg, 7) == expected
    train_on(ddpg, [make_batch(0)] * 2)
    assert ddpg.n_updates == 9
    assert torch.equal(ddpg.actor.flat, ddpg.actor_target.flat)
    assert torch.equal(ddpg.critic.flat, ddpg.critic_target.flat)

    td3 = make(target_update_interval=2, tau=1.0)
    at = moved(td3, 12)
    assert at["actor"] == [2, 4, 6, 8, 10, 12]
    assert at["actor_target"] == at["critic_target"] == [4, 8, 12]
    assert torch.equal(td3.actor.flat, td3.actor_target.flat)
    assert torch.equal(td3.critic.flat, td3.critic_target.flat)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"n_critics": 3},
        {"n_steps": 3, "n_envs": 2},
        {"target_update_interval": 2, "max_grad_norm": 0.1, "weight_decay": 0.01},
        {"optimizer_class": torch.optim.SGD, "layer_norm": True, "train_freq": (1, "episode")},
    ],
    ids=lambda arguments: ", ".join(arguments) or "plain",
)
def test_without_its_three_ideas_td3_is_ddpg(arguments: dict[str, Any]) -> None:
    """One critic, no delay, no noise on the target action: the same weights, bit for bit."""
    shared: dict[str, Any] = {
        "n_critics": 1,
        "n_envs": 1,
        "learning_starts": 20,
        "buffer_size": 50,
        "batch_size": 8,
        "tau": 0.01,
        "learning_rate": 1e-3,
        "action_noise": OrnsteinUhlenbeckActionNoise(0.0, 0.2),
        "policy_kwargs": {"net_arch": [8, 8], "action_layer": 1, "final_init": 0.1},
        "seed": 5,
        **arguments,
    }
    ddpg = DDPG("MlpPolicy", lambda: Cycle(7), **shared).learn(100)
    td3 = TD3("MlpPolicy", lambda: Cycle(7), policy_delay=1, target_policy_noise=0.0, **shared).learn(100)
    assert ddpg.n_updates == td3.n_updates > 50
    assert same(ddpg, td3)
    noisy = TD3("MlpPolicy", lambda: Cycle(7), policy_delay=1, target_policy_noise=0.2, **shared).learn(100)
    assert not same(ddpg, noisy)


def test_default_network_has_two_critics_of_256_units() -> None:
    shapes = {name: tuple(t.shape) for name, t in weights(TD3("MlpPolicy", KNOWN)).items() if "weight" in name}
    expected = {"actor.mu.0": (256, 3), "actor.mu.2": (256, 256), "actor.mu.4": (2, 256)}
    for i in range(2):
        q = f"critic.q_networks.{i}.q_net"
        expected |= {f"{q}.0": (256, 5), f"{q}.2": (256, 256), f"{q}.4": (1, 256)}
    expected |= {name.replace(".", "_target.", 1): shape for name, shape in expected.items()}
    assert shapes == {f"{name}.weight": shape for name, shape in expected.items()}


# Arguments that both have.


def logged(folder: Path) -> list[dict[str, str]]:
    with (folder / "progress.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("n_envs", [1, 4, 7])
def test_one_update_for_each_transition_is_logged(cls: Any, n_envs: int, tmp_path: Path) -> None:
    model = cls("MlpPolicy", lambda: Cycle(6), n_envs=n_envs, learning_starts=28, seed=0, **SMALL)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(112, log_interval=1)
    rows = [row for row in logged(tmp_path) if row["train/n_updates"] not in ("", "0")]
    assert len(rows) > 1
    assert {float(row["train/updates_per_transition"]) for row in rows} == {1.0}
    assert float(rows[-1]["train/n_updates"]) == 112 - 28

    half = cls("MlpPolicy", lambda: Cycle(6), n_envs=n_envs, learning_starts=28, train_freq=2, gradient_steps=n_envs)
    half.batch_size = 4
    half.set_logger(configure(str(tmp_path / "half"), ["csv"]))
    half.learn(28 + 8 * n_envs)
    assert float(logged(tmp_path / "half")[-1]["train/updates_per_transition"]) == pytest.approx(0.5)


def test_names_of_what_is_logged(cls: Any, tmp_path: Path) -> None:
    model = cls("MlpPolicy", lambda: Cycle(6), learning_starts=8, learning_rate=1e-3, seed=0, **SMALL)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(60)
    row = logged(tmp_path)[-1]
    names = {name for name, value in row.items() if value}
    common = {"rollout/ep_rew_mean", "rollout/ep_len_mean", "rollout/action_saturation", "rollout/noise_scale"}
    common |= {"time/fps", "time/time_elapsed", "time/episodes", "time/total_timesteps"}
    train = {"n_updates", "updates_per_transition", "critic_loss", "actor_loss", "q_mean", "target_mean", "td_error"}
    assert names == common | {f"train/{name}" for name in (*train, "learning_rate")}
    assert float(row["rollout/noise_scale"]) == {DDPG: 0.2, TD3: 0.1}[cls]
    assert 0 <= float(row["rollout/action_saturation"]) <= 1

    apart = cls("MlpPolicy", lambda: Cycle(6), learning_starts=8, actor_learning_rate=1e-4, action_noise=None, **SMALL)
    apart.critic_learning_rate = LinearSchedule(1e-3, 0.0)
    apart.set_logger(configure(str(tmp_path / "apart"), ["csv"]))
    apart.learn(60)
    row = logged(tmp_path / "apart")[-1]
    assert "rollout/noise_scale" not in row
    assert "train/learning_rate" not in row
    assert (float(row["train/actor_learning_rate"]), float(row["train/critic_learning_rate"])) == (1e-4, 0)


def test_means_of_what_is_logged_are_over_the_updates_that_had_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The actor's loss is the mean over its own updates, not over all."""
    model = TD3("MlpPolicy", lambda: Cycle(6), learning_starts=8, policy_delay=3, seed=0, **SMALL)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    losses, update = [], model._update

    def spy(batch: ReplayBatch) -> dict[str, Tensor]:
        numbers = update(batch)
        losses.append({name: float(value.detach().mean()) for name, value in numbers.items()})
        return numbers

    monkeypatch.setattr(model, "_update", spy)
    model.learn(50, log_interval=100)
    row = logged(tmp_path)[-1]
    assert len(losses) == 42
    assert sum("actor_loss" in numbers for numbers in losses) == 14
    for name in ("actor_loss", "critic_loss", "td_error"):
        mean = np.mean([numbers[name] for numbers in losses if name in numbers])
        assert float(row[f"train/{name}"]) == pytest.approx(mean, rel=1e-4)


def test_learning_starts_counts_transitions(cls: Any) -> None:
    for learning_starts in (0, 1, 10, 17):
        model = cls("MlpPolicy", lambda: Cycle(6), n_envs=2, learning_starts=learning_starts, seed=0, **SMALL)
        first = []
        model.learn(40, callback=lambda *_, model=model, first=first: first.append(model.n_updates))
        # The callback is asked before the learning of its step.
        n_before = next(i for i, n in enumerate(first) if n > 0)
        assert 2 * n_before == learning_starts // 2 * 2 + 2


def test_schedules_are_asked_at_each_update(cls: Any) -> None:
    arguments = {"gamma": LinearSchedule(0.5, 0.9), "tau": LinearSchedule(0.1, 0.0), "learning_starts": 8}
    model = cls("MlpPolicy", lambda: Cycle(6), seed=0, **arguments, **SMALL)
    gammas, taus = [], []
    sample, follow = model.replay_buffer.sample, model.critic_target.follow

    def spy_sample(size: int, gamma: float, progress: float) -> ReplayBatch:
        gammas.append((model.num_timesteps, gamma))
        assert progress == pytest.approx(1 - model.num_timesteps / 40)
        return sample(size, gamma, progress)

    def spy_follow(source: Any, tau: float) -> None:
        taus.append((model.num_timesteps, tau))
        follow(source, tau)

    model.replay_buffer.sample = spy_sample
    model.critic_target.follow = spy_follow
    model.learn(40)
    assert [steps for steps, _ in gammas] == list(range(9, 41))
    assert [steps for steps, _ in taus] == list(range(9, 41) if cls is DDPG else range(10, 41, 2))
    assert all(gamma == pytest.approx(0.5 + 0.4 * steps / 40) for steps, gamma in gammas)
    assert all(tau == pytest.approx(0.1 - 0.1 * steps / 40) for steps, tau in taus)


def test_schedules_of_the_noise_on_target_actions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target actor of zeros that never moves: the target action is the noise."""
    model = TD3(
        "MlpPolicy",
        lambda: Cycle(6),
        tau=0.0,
        target_policy_noise=LinearSchedule(0.8, 0.0),
        target_noise_clip=LinearSchedule(0.2, 0.6),
        learning_starts=8,
        seed=0,
        **SMALL,
    )
    model.actor_target.flat.data.zero_()
    seen, forward = [], model.critic_target.forward

    def spy(obs: Tensor, action: Tensor) -> Tensor:
        seen.append((model.num_timesteps / 40, action.unique().tolist()))
        return forward(obs, action)

    monkeypatch.setattr(model.critic_target, "forward", spy)
    with mock.patch.object(torch, "normal", lambda mean, std, shape: torch.full(shape, mean + std)):
        model.learn(40)
    assert len(seen) == 32
    for done, actions in seen:
        assert actions == pytest.approx([min(0.8 * (1 - done), 0.2 + 0.4 * done)], abs=1e-6)


def kinds(network: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in network.modules())


def test_normalisation_and_dropout_are_in_the_right_networks(cls: Any) -> None:
    model = cls("MlpPolicy", KNOWN, layer_norm=True, dropout=0.25, policy_kwargs={"net_arch": [8, 6, 4]})
    n_critics = model.n_critics
    for network in (model.actor, model.actor_target):
        assert (kinds(network, nn.LayerNorm), kinds(network, nn.Dropout)) == (3, 0)
        names = [type(layer).__name__ for layer in network.mu]
        assert names == ["Linear", "LayerNorm", "ReLU"] * 3 + ["Linear", "Tanh"], "before each activation"
    for network in (model.critic, model.critic_target):
        assert (kinds(network, nn.LayerNorm), kinds(network, nn.Dropout)) == (3 * n_critics, 3 * n_critics)
        assert {module.p for module in network.modules() if isinstance(module, nn.Dropout)} == {0.25}
        for q_network in network.q_networks:
            names = [type(layer).__name__ for layer in (*q_network.state_net, *q_network.q_net)]
            assert names == ["Linear", "Dropout", "LayerNorm", "ReLU"] * 3 + ["Linear"]

    plain = cls("MlpPolicy", KNOWN)
    assert kinds(plain.policy, nn.LayerNorm) == kinds(plain.policy, nn.Dropout) == 0


def test_dropout_is_of_the_critic_in_training_alone(cls: Any) -> None:
    model = cls("MlpPolicy", KNOWN, dropout=0.5, seed=0)
    batch = make_batch(0)
    model.policy.set_training_mode(True)
    assert not torch.equal(model.critic(batch.obs, batch.action), model.critic(batch.obs, batch.action))
    assert torch.equal(model.critic_target(batch.obs, batch.action), model.critic_target(batch.obs, batch.action))
    assert torch.equal(model.actor(batch.obs), model.actor(batch.obs))
    model.policy.set_training_mode(False)
    assert torch.equal(model.critic(batch.obs, batch.action), model.critic(batch.obs, batch.action))


def test_dropout_is_fixed_by_the_seed_and_leaves_the_global_generator_alone(cls: Any, tmp_path: Path) -> None:
    arguments = {"learning_starts": 10, "learning_rate": 1e-2, "buffer_size": 100, **SMALL}

    def run(seed: int = 0, dropout: float = 0.3) -> Any:
        return cls("MlpPolicy", lambda: Cycle(6), n_envs=2, dropout=dropout, seed=seed, **arguments).learn(60)

    torch.manual_seed(1)
    before = torch.get_rng_state()
    model = run()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = run()
    assert same(model, again)
    assert not same(model, run(dropout=0.1))
    assert not same(model, run(seed=1))

    # What a full checkpoint goes on with are the same draws.
    state = model._update_state
    model.save(tmp_path / "model", full=True)
    loaded = cls.load(tmp_path / "model")
    assert torch.equal(loaded._update_state, state)
    torch.manual_seed(3)
    loaded.train(15)
    model.train(15)
    assert same(model, loaded)
    assert not torch.equal(model._update_state, state)
    assert not same(model, again)
    again._update_state = torch.Generator().manual_seed(9).get_state()
    again.train(15)
    assert not same(model, again), "other draws, other weights"


def test_three_critics(cls: Any, tmp_path: Path) -> None:
    model = cls("MlpPolicy", lambda: Cycle(6), n_critics=3, learning_starts=10, seed=0, **SMALL).learn(40)
    batch = make_batch(0)
    q = model.critic(batch.obs[:, :2], batch.action)
    assert q.shape == (3, 16)
    assert len({tuple(row) for row in q.tolist()}) == 3
    model.save(tmp_path / "model")
    loaded = cls.load(tmp_path / "model")
    assert loaded.n_critics == 3
    assert same(loaded, model)


@pytest.mark.parametrize(
    "optimizer_class", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop], ids=lambda kind: kind.__name__
)
def test_other_optimizers(cls: Any, optimizer_class: Any, tmp_path: Path) -> None:
    arguments = {"optimizer_class": optimizer_class, "weight_decay": 0.03, "learning_starts": 10, "learning_rate": 1e-2}
    model = cls("MlpPolicy", lambda: Cycle(6), seed=0, **arguments, **SMALL).learn(40)
    decay = {}
    for name in ("actor", "critic"):
        optimizer = getattr(model, name).optimizer
        assert type(optimizer) is optimizer_class
        assert optimizer.param_groups[0]["lr"] == 1e-2
        decay[name] = optimizer.param_groups[0]["weight_decay"]
    assert decay == {"actor": inspect.signature(optimizer_class).parameters["weight_decay"].default, "critic": 0.03}
    adam = cls("MlpPolicy", lambda: Cycle(6), seed=0, **{**arguments, "optimizer_class": torch.optim.Adam}, **SMALL)
    assert not same(model, adam.learn(40))
    model.save(tmp_path / "model", full=True)
    loaded = cls.load(tmp_path / "model")
    assert loaded.optimizer_class is optimizer_class
    model.train(4)
    loaded.train(4)
    assert same(loaded, model)


def test_a_step_of_gradient_descent_is_as_long_as_the_rate_says(cls: Any) -> None:
    """With plain gradient descent, twice the rate is twice the way."""
    ways = []
    for rate in (1e-3, 2e-3):
        model = cls("MlpPolicy", KNOWN, optimizer_class=torch.optim.SGD, learning_rate=rate, seed=0)
        before = model.critic.flat.detach().clone()
        with fixed_noise([noise_of(0)]):
            train_on(model, [make_batch(0)])
        ways.append(model.critic.flat.detach() - before)
    torch.testing.assert_close(2 * ways[0], ways[1], rtol=1e-2, atol=1e-7)
    assert ways[0].abs().max() > 1e-5


def test_arguments_of_the_optimizer(cls: Any) -> None:
    kwargs = {"optimizer_class": torch.optim.SGD, "optimizer_kwargs": {"momentum": 0.5}}
    model = cls("MlpPolicy", KNOWN, policy_kwargs=kwargs)
    for network in (model.actor, model.critic):
        assert type(network.optimizer) is torch.optim.SGD
        assert network.optimizer.param_groups[0]["momentum"] == 0.5


def test_n_steps_reach_the_targets(cls: Any) -> None:
    model = cls("MlpPolicy", lambda: Cycle(50), n_steps=3, gamma=0.5, learning_starts=40, seed=0, **SMALL).learn(40)
    assert model.replay_buffer.n_steps == 3
    batch = model.replay_buffer.sample(400, 0.5)
    span = ((batch.successor - batch.obs)[:, 0] * 100).round()
    # Of 40 transitions the last two span less.
    assert set(span.tolist()) == {1, 2, 3}
    assert torch.equal(batch.discount, 0.5**span)


# Presets.


PRESETS = [(cls, name) for cls in (DDPG, TD3) for name in cls.presets]


@pytest.mark.parametrize(("cls", "preset"), PRESETS)
def test_presets_set_their_values_say_so_and_come_back(
    cls: Any, preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = cls.presets[preset]
    model = cls("MlpPolicy", KNOWN, preset=preset, seed=0)
    for name, value in values.items():
        assert getattr(model, name) == value
    text = capsys.readouterr().out
    assert text == (
        f"{cls.__name__}, preset {preset!r}: {', '.join(f'{name}={value!r}' for name, value in values.items())}\n"
        if values
        else ""
    )
    assert len(text.splitlines()) <= 1
    model.save(tmp_path / "model")
    loaded = cls.load(tmp_path / "model")
    assert capsys.readouterr().out == "", "nothing is filled in: the file holds every argument"
    assert loaded.preset == preset
    for name in values:
        assert getattr(loaded, name) == getattr(model, name)
    assert same(loaded, model)


@pytest.mark.parametrize(("cls", "preset"), PRESETS)
@pytest.mark.parametrize(
    "given",
    [
        {"learning_rate": 3e-4},
        {"actor_learning_rate": 5e-5},
        {"critic_learning_rate": LinearSchedule(1e-3, 0.0)},
        {"batch_size": 32, "tau": 0.5, "action_noise": NormalActionNoise(0.0, 0.3)},
        {"policy_kwargs": {"net_arch": [8]}},
    ],
    ids=lambda given: ", ".join(given),
)
def test_what_is_given_beside_a_preset_wins_also_in_a_file(
    cls: Any, preset: str, given: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = cls("MlpPolicy", KNOWN, preset=preset, **given)
    text = capsys.readouterr().out
    assert not any(f" {name}=" in text for name in given)
    model.save(tmp_path / "model")
    for made in (model, cls.load(tmp_path / "model")):
        for name, value in given.items():
            if name == "action_noise":
                assert made.action_noise.to_config() == value.to_config()
            elif name == "policy_kwargs":
                assert made.policy_kwargs == {**cls.presets[preset].get("policy_kwargs", {}), **value}
            else:
                assert getattr(made, name) == value
        rates = [network.optimizer.param_groups[0]["lr"] for network in (made.actor, made.critic)]
        assert rates == [
            value(1.0) if callable(value) else value for value in (made.actor_learning_rate, made.critic_learning_rate)
        ]
        if "actor_learning_rate" in given:
            assert made.critic_learning_rate == 1e-3, "the preset's, and the default's of DDPG"


def test_an_argument_given_by_place_wins_too(capsys: pytest.CaptureFixture[str]) -> None:
    model = DDPG("MlpPolicy", KNOWN, 5e-4, 5_000, preset="stable-baselines3")
    assert (model.learning_rate, model.buffer_size, model.batch_size) == (5e-4, 5_000, 256)
    assert "buffer_size" not in capsys.readouterr().out


def test_the_preset_of_stable_baselines3_is_its_ddpg(capsys: pytest.CaptureFixture[str]) -> None:
    model = DDPG("MlpPolicy", KNOWN, preset="stable-baselines3", seed=0)
    parameters = inspect.signature(stable_baselines3.DDPG).parameters
    names = ["learning_rate", "buffer_size", "learning_starts", "batch_size", "tau", "gamma", "train_freq"]
    for name in [*names, "gradient_steps", "action_noise", "n_steps"]:
        assert getattr(model, name) == parameters[name].default, name
    peer = stable_baselines3.DDPG("MlpPolicy", Idle(), device="cpu", buffer_size=10, seed=0)
    shapes = {name: tensor.shape for name, tensor in in_peers_names(weights(model)).items()}
    assert shapes == {name: tensor.shape for name, tensor in peer.policy.state_dict().items()}
    # And weights of the same spread.
    for name, tensor in peer.policy.state_dict().items():
        if name.endswith("weight"):
            assert in_peers_names(weights(model))[name].std().item() == pytest.approx(tensor.std().item(), rel=0.15), (
                name
            )


def test_the_preset_of_the_paper_of_td3() -> None:
    model = TD3("MlpPolicy", KNOWN, preset="paper")
    assert (model.actor_learning_rate, model.critic_learning_rate, model.batch_size) == (1e-3, 1e-3, 100)
    assert [layer.out_features for layer in model.actor.mu if isinstance(layer, nn.Linear)] == [400, 300, 2]
    assert len(model.critic.q_networks) == 2


def test_the_preset_of_the_notes_is_the_default() -> None:
    assert same(DDPG("MlpPolicy", KNOWN, preset="notes", seed=0), DDPG("MlpPolicy", KNOWN, seed=0))
