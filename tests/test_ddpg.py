"""DDPG's gradient step, against stable-baselines3 and its formulas written out, and the loop, which TD3 shares."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import stable_baselines3
import torch
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import Tensor

from sbac import DDPG, TD3
from sbac.buffers import ReplayBatch
from sbac.envs import Spaces
from sbac.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise

KNOWN = Spaces(spaces.Box(-2, 2, (3,), np.float32), spaces.Box(-1, 1, (2,), np.float32), 1)
SMALL = {"policy_kwargs": {"net_arch": [8, 8]}, "batch_size": 4}


def make_batch(seed: int, size: int = 16, gamma: float = 0.9) -> ReplayBatch:
    """Random transitions over one to three steps, a third of them terminations, of unequal weights."""
    rng = np.random.default_rng(seed)

    def tensor(array: Any) -> Tensor:
        return torch.tensor(np.asarray(array, np.float32))

    return ReplayBatch(
        obs=tensor(rng.uniform(-2, 2, (size, 3))),
        action=tensor(rng.uniform(-1, 1, (size, 2))),
        reward=tensor(rng.normal(size=size)),
        terminated=tensor(rng.random(size) < 1 / 3),
        successor=tensor(rng.uniform(-2, 2, (size, 3))),
        discount=tensor(gamma ** rng.integers(1, 4, size)),
        weight=tensor(rng.uniform(0.2, 1.8, size)),
        rows=np.arange(size),
    )


def weights(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}


def difference(a: dict[str, Tensor], b: dict[str, Tensor], prefix: str = "") -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a if name.startswith(prefix))


# Against stable-baselines3.


class Idle(gymnasium.Env[Any, Any]):
    """Spaces without a task."""

    observation_space, action_space, _ = KNOWN


def in_peers_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("q_networks.0.q_net", "qf0"): tensor for name, tensor in state.items()}


def test_gradient_steps_equal_those_of_stable_baselines3():
    arguments: dict[str, Any] = {"learning_rate": 1e-3, "tau": 0.05, "seed": 1, "device": "cpu"}
    arch = {"net_arch": {"pi": [32, 16], "qf": [24, 16]}}
    model = DDPG("MlpPolicy", KNOWN, policy_kwargs={**arch, "action_layer": 0, "final_init": None}, **arguments)
    peer = stable_baselines3.DDPG("MlpPolicy", Idle(), policy_kwargs=arch, **arguments)
    peer.set_logger(Logger(None, []))
    peer.policy.load_state_dict(in_peers_names(weights(model)))

    for seed in range(5):
        batch = make_batch(seed)._replace(weight=torch.ones(16))
        before = weights(model)
        model._update(batch)
        given = ReplayBufferSamples(
            batch.obs,
            batch.action,
            batch.successor,
            batch.terminated[:, None],
            batch.reward[:, None],
            batch.discount[:, None],
        )
        peer.replay_buffer.sample = lambda *_, given=given, **__: given
        peer.train(gradient_steps=1, batch_size=16)

        new = weights(model)
        assert difference(in_peers_names(new), peer.policy.state_dict()) < 1e-6
        for network in ("actor.", "critic.", "actor_target.", "critic_target."):
            assert difference(new, before, network) > 1e-6


# Against the formulas.


class ByHand:
    """Lillicrap et al. 2015, Algorithm 1, in plain autograd: the default network, Adam, and ways to get it wrong.

    Args:
        state: The weights to begin with.
        wrong: What to get wrong, if anything.
    """

    TAU, ACTOR_RATE, CRITIC_RATE = 0.1, 1e-3, 5e-3

    def __init__(self, state: dict[str, Tensor], wrong: str = "", weight_decay: float = 0.0) -> None:
        self.state = {name: tensor.clone() for name, tensor in state.items()}
        self.wrong = wrong
        self.weight_decay = weight_decay
        self.moments = {name: (torch.zeros_like(tensor), torch.zeros_like(tensor)) for name, tensor in state.items()}
        self.steps = 0

    def mu(self, network: str, obs: Tensor) -> Tensor:
        w = {name: self.state[f"{network}.mu.{name}"] for name in self._layers((0, 2, 4))}
        hidden = torch.relu(obs @ w["0.weight"].T + w["0.bias"])
        hidden = torch.relu(hidden @ w["2.weight"].T + w["2.bias"])
        return torch.tanh(hidden @ w["4.weight"].T + w["4.bias"])

    def q(self, network: str, obs: Tensor, action: Tensor) -> Tensor:
        """The action joins at the second layer."""
        prefix = f"{network}.q_networks.0"
        first = {name: self.state[f"{prefix}.state_net.{name}"] for name in self._layers((0,))}
        then = {name: self.state[f"{prefix}.q_net.{name}"] for name in self._layers((0, 2))}
        hidden = torch.relu(obs @ first["0.weight"].T + first["0.bias"])
        hidden = torch.relu(torch.cat([hidden, action], 1) @ then["0.weight"].T + then["0.bias"])
        return (hidden @ then["2.weight"].T + then["2.bias"]).squeeze(1)

    def update(self, batch: ReplayBatch) -> None:
        self.steps += 1
        online = "" if self.wrong == "no target networks" else "_target"
        next_q = self.q(f"critic{online}", batch.successor, self.mu(f"actor{online}", batch.successor))
        goes_on = 1.0 if self.wrong == "bootstrap at termination" else 1 - batch.terminated
        discount = 0.9 if self.wrong == "gamma for its power" else batch.discount
        target = (batch.reward + discount * goes_on * next_q).detach()
        weight = 1.0 if self.wrong == "no weights" else batch.weight
        if self.wrong == "actor first":
            self.update_actor(batch)
        self.descend(
            "critic.",
            lambda: (weight * (self.q("critic", batch.obs, batch.action) - target) ** 2).mean(),
            self.CRITIC_RATE,
            self.weight_decay,
        )
        if self.wrong != "actor first":
            self.update_actor(batch)
        if self.wrong != "targets stay":
            for name in self.state:
                if "_target." in name:
                    source = self.state[name.replace("_target.", ".")]
                    self.state[name] = self.TAU * source + (1 - self.TAU) * self.state[name]

    def update_actor(self, batch: ReplayBatch) -> None:
        sign = 1 if self.wrong == "descend Q" else -1
        decay = self.weight_decay if self.wrong == "decay the actor" else 0.0
        self.descend(
            "actor.",
            lambda: sign * self.q("critic", batch.obs, self.mu("actor", batch.obs)).mean(),
            self.ACTOR_RATE,
            decay,
        )

    def descend(self, prefix: str, loss: Callable[[], Tensor], rate: float, weight_decay: float) -> None:
        """One step of Adam (Kingma & Ba 2015, Algorithm 1) for the weights below a prefix."""
        names = [name for name in self.state if name.startswith(prefix)]
        for name in names:
            self.state[name] = self.state[name].requires_grad_()
        gradients = torch.autograd.grad(loss(), [self.state[name] for name in names])
        for name, gradient in zip(names, gradients, strict=True):
            weight = self.state[name].detach()
            gradient = gradient + weight_decay * weight
            m, v = self.moments[name]
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            self.moments[name] = (m, v)
            m_hat, v_hat = m / (1 - 0.9**self.steps), v / (1 - 0.999**self.steps)
            self.state[name] = weight - rate * m_hat / (v_hat.sqrt() + 1e-8)

    @staticmethod
    def _layers(indices: tuple[int, ...]) -> list[str]:
        return [f"{index}.{kind}" for index in indices for kind in ("weight", "bias")]


def make_default(**overrides: Any) -> DDPG:
    """The default network with larger last layers, so that three steps are told from wrong ones."""
    return DDPG(
        "MlpPolicy",
        KNOWN,
        tau=ByHand.TAU,
        actor_learning_rate=ByHand.ACTOR_RATE,
        critic_learning_rate=ByHand.CRITIC_RATE,
        seed=3,
        **{"policy_kwargs": {"net_arch": [40, 30], "final_init": 0.3}, **overrides},
    )


def updated(model: DDPG) -> dict[str, Tensor]:
    for seed in range(3):
        model._update(make_batch(seed))
    return weights(model)


def updated_by_hand(state: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
    by_hand = ByHand(state, **kwargs)
    for seed in range(3):
        by_hand.update(make_batch(seed))
    return {name: tensor.detach() for name, tensor in by_hand.state.items()}


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_gradient_steps_by_hand(weight_decay):
    model = make_default(weight_decay=weight_decay)
    expected = updated_by_hand(weights(model), weight_decay=weight_decay)
    assert difference(updated(model), expected) < 1e-6


@pytest.mark.parametrize(
    "wrong",
    [
        "bootstrap at termination",
        "no target networks",
        "targets stay",
        "actor first",
        "descend Q",
        "decay the actor",
        "gamma for its power",
        "no weights",
    ],
)
def test_wrong_gradient_steps_are_told_apart(wrong):
    model = make_default(weight_decay=0.01)
    expected = updated_by_hand(weights(model), weight_decay=0.01, wrong=wrong)
    assert difference(updated(model), expected) > 1e-4


def test_what_an_update_returns():
    model, batch = make_default(), make_batch(0)
    by_hand = ByHand(weights(model))
    with torch.no_grad():
        next_q = by_hand.q("critic_target", batch.successor, by_hand.mu("actor_target", batch.successor))
        target = batch.reward + batch.discount * (1 - batch.terminated) * next_q
        q = by_hand.q("critic", batch.obs, batch.action)
    numbers = model._update(batch)
    assert numbers.keys() == {"critic_loss", "actor_loss", "q_mean", "target_mean", "td_error"}
    torch.testing.assert_close(numbers["td_error"], (q - target).abs())
    torch.testing.assert_close(numbers["q_mean"].mean(), q.mean())
    torch.testing.assert_close(numbers["target_mean"].mean(), target.mean())
    torch.testing.assert_close(numbers["critic_loss"].detach(), (batch.weight * (q - target) ** 2).mean())
    # The actor's loss is that of the critic after its step.
    by_hand.update(batch)
    before = ByHand({**by_hand.state, **{name: t for name, t in weights(make_default()).items() if "actor." in name}})
    assert numbers["actor_loss"].item() == pytest.approx(
        -before.q("critic", batch.obs, before.mu("actor", batch.obs)).mean().item(), abs=1e-5
    )


def test_default_network_is_that_of_the_paper():
    """400 and 300 units, the action at the second layer, fan-in initialisation, last layers in +-0.003."""
    model = DDPG("MlpPolicy", KNOWN, seed=0)
    state = weights(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if name.startswith(("actor.", "critic."))}
    critic = "critic.q_networks.0"
    assert shapes == {
        "actor.mu.0.weight": (400, 3),
        "actor.mu.0.bias": (400,),
        "actor.mu.2.weight": (300, 400),
        "actor.mu.2.bias": (300,),
        "actor.mu.4.weight": (2, 300),
        "actor.mu.4.bias": (2,),
        f"{critic}.state_net.0.weight": (400, 3),
        f"{critic}.state_net.0.bias": (400,),
        f"{critic}.q_net.0.weight": (300, 402),
        f"{critic}.q_net.0.bias": (300,),
        f"{critic}.q_net.2.weight": (1, 300),
        f"{critic}.q_net.2.bias": (1,),
    }
    for name, bound in (
        ("actor.mu.0.weight", 3**-0.5),
        ("actor.mu.2.weight", 400**-0.5),
        ("actor.mu.2.bias", 400**-0.5),
        ("actor.mu.4.weight", 3e-3),
        (f"{critic}.q_net.0.weight", 402**-0.5),
        (f"{critic}.q_net.2.weight", 3e-3),
    ):
        assert 0.95 * bound < float(state[name].abs().max()) <= bound, name
    for name, tensor in state.items():
        if name.startswith(("actor.", "critic.")):
            network, rest = name.split(".", 1)
            assert torch.equal(state[f"{network}_target.{rest}"], tensor), "targets begin as copies"


def test_the_two_learning_rates():
    """Adam's first step moves each weight by its learning rate, to within epsilon."""
    for arguments, actor_rate, critic_rate in (
        ({}, 1e-4, 1e-3),
        ({"actor_learning_rate": 2e-3, "critic_learning_rate": 5e-4}, 2e-3, 5e-4),
        ({"learning_rate": 3e-3}, 3e-3, 3e-3),
    ):
        model = DDPG("MlpPolicy", KNOWN, seed=0, **arguments)
        before = weights(model)
        model._update(make_batch(0))
        assert difference(weights(model), before, "actor.") == pytest.approx(actor_rate, rel=1e-2)
        assert difference(weights(model), before, "critic.") == pytest.approx(critic_rate, rel=1e-2)
        assert (model.actor_learning_rate, model.critic_learning_rate) == (actor_rate, critic_rate)
        assert model.learning_rate == arguments.get("learning_rate")


def test_gradient_norms_are_limited_in_each_network():
    model = make_default(max_grad_norm=1e-3, policy_kwargs={"optimizer_class": torch.optim.SGD, "final_init": 0.3})
    before = weights(model)
    model._update(make_batch(0))
    for network, rate in (("actor.", ByHand.ACTOR_RATE), ("critic.", ByHand.CRITIC_RATE)):
        moved = [(weights(model)[name] - before[name]).square().sum() for name in before if name.startswith(network)]
        assert float(sum(moved)) ** 0.5 == pytest.approx(rate * 1e-3, rel=2e-2)


# The loop, the same for both.


@pytest.fixture(params=[DDPG, TD3])
def cls(request: pytest.FixtureRequest) -> Any:
    return request.param


class Cycle(gymnasium.Env[Any, Any]):
    """Rewards nothing; an episode ends after `length` steps, by termination or by truncation."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Box(-3, 1, (2,), np.float32)

    def __init__(self, length: int, truncates: bool = False) -> None:
        self.length, self.truncates, self.steps = length, truncates, 0
        self.actions: list[np.ndarray] = []

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(**kwargs)
        self.steps = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.actions.append(action)
        self.steps += 1
        ended = self.steps == self.length
        return np.full(2, self.steps / 100, np.float32), 0.0, ended and not self.truncates, ended and self.truncates, {}


@pytest.mark.parametrize("n_envs", [1, 4, 7])
def test_one_gradient_step_for_each_transition_after_learning_starts(cls, n_envs):
    model = cls("MlpPolicy", "Pendulum-v1", n_envs=n_envs, learning_starts=28, seed=0, **SMALL)
    model.learn(84)
    assert model.num_timesteps == 84
    assert model.n_updates == 84 - 28
    # And after another run, without a beginning of random actions.
    model.learn(84)
    assert model.n_updates == 2 * 84 - 28


def test_empty_reset_steps_are_not_counted_as_transitions(cls):
    env = gymnasium.vector.SyncVectorEnv([lambda: Cycle(3), lambda: Cycle(5)])
    assert env.metadata["autoreset_mode"] is gymnasium.vector.AutoresetMode.NEXT_STEP
    model = cls("MlpPolicy", env, learning_starts=0, seed=0, **SMALL).learn(60)
    # Of four steps environment 0 wastes one, of six environment 1: 12 steps give 9 + 10 transitions.
    assert 60 <= model.num_timesteps <= 61
    assert model.n_updates == model.num_timesteps == model.replay_buffer.size()


@pytest.mark.parametrize(
    ("train_freq", "gradient_steps", "n_envs"),
    [
        (1, 1, 1),
        (4, 2, 1),
        (4, -1, 1),
        ((4, "step"), 3, 1),
        (1, -1, 4),
        (1, 1, 4),
        (3, -1, 2),
        ((2, "step"), 3, 2),
        (1, 0, 1),
        ((1, "episode"), 2, 1),
        ((2, "episode"), 3, 1),
        ((2, "episode"), -1, 1),
    ],
)
def test_as_many_gradient_steps_as_stable_baselines3(cls, train_freq, gradient_steps, n_envs):
    arguments = {"train_freq": train_freq, "gradient_steps": gradient_steps, "learning_starts": 24, **SMALL}
    model = cls("MlpPolicy", lambda: Cycle(6), n_envs=n_envs, **arguments).learn(72)
    peers_env = make_vec_env(lambda: Cycle(6), n_envs)
    # A copy, since its DDPG writes n_critics into the policy_kwargs that it is given.
    peer = getattr(stable_baselines3, cls.__name__)("MlpPolicy", peers_env, device="cpu", **copy.deepcopy(arguments))
    peer.learn(72)
    assert (model.num_timesteps, model.n_updates) == (peer.num_timesteps, peer._n_updates)
    assert model.n_updates > 0 or gradient_steps == 0


def test_learning_every_second_episode_of_several_environments(cls, monkeypatch):
    """Episodes of 3 and 5 steps end at steps 3, 5 | 6, 9 | 10, 12 | 15 and 15."""
    envs = [lambda: Cycle(3), lambda: Cycle(5, truncates=True)]
    model = cls("MlpPolicy", envs, learning_starts=0, train_freq=(2, "episode"), seed=0, **SMALL)
    trained, train = [], model.train
    monkeypatch.setattr(model, "train", lambda n: (trained.append((model.num_timesteps // 2, n)), train(n)))
    model.learn(32)
    assert trained == [(5, 10), (9, 8), (12, 6), (15, 6)]
    assert model.n_updates == 30


@pytest.mark.parametrize("buffer_size", [30, 31, 1000])
def test_learning_starts_also_with_a_buffer_that_it_fills(cls, buffer_size):
    model = cls("MlpPolicy", "Pendulum-v1", learning_starts=30, buffer_size=buffer_size, seed=0, **SMALL)
    model.learn(60)
    assert 30 <= model.n_updates <= 31


def test_a_buffer_that_can_never_be_filled_enough_is_refused(cls):
    with pytest.raises(ValueError, match=r"buffer_size=50 .* 100 transitions"):
        cls("MlpPolicy", KNOWN, buffer_size=50, learning_starts=100, batch_size=8)


def test_train_learns_without_acting(cls):
    model = cls("MlpPolicy", "Pendulum-v1", learning_starts=20, seed=0, **SMALL).learn(20)
    before = weights(model)
    model.train(gradient_steps=3)
    assert (model.n_updates, model.num_timesteps) == (3, 20)
    assert difference(weights(model), before) > 0


def test_what_is_stored_is_what_happened(cls):
    """Time limits are no terminations, successors are true, and actions are in the units of the algorithm."""
    envs = [Cycle(3), Cycle(4, truncates=True)]
    model = cls("MlpPolicy", [lambda: envs[0], lambda: envs[1]], learning_starts=100, seed=0, **SMALL).learn(24)
    batch = model.replay_buffer.sample(1_000)
    assert set(batch.rows) == set(range(24))
    row, env = np.divmod(batch.rows, 2)
    step = np.where(env == 0, row % 3, row % 4)
    for own, expected in ((batch.obs, step / 100), (batch.successor, (step + 1) / 100)):
        assert own.numpy() == pytest.approx(np.stack([expected, expected], axis=1))
    ended = step == np.where(env == 0, 2, 3)
    assert (batch.terminated.numpy() == (ended & (env == 0))).all(), "environment 0 only"
    native = np.stack([np.array(env.actions) for env in envs], axis=1)[row, env]
    assert native == pytest.approx(-1 + 2 * batch.action.numpy(), abs=1e-6)


def test_noise_begins_anew_where_an_episode_ends_and_only_there(cls, monkeypatch):
    envs = [lambda: Cycle(3), lambda: Cycle(5, truncates=True)]
    noise = OrnsteinUhlenbeckActionNoise(0.0, 0.2)
    model = cls("MlpPolicy", envs, learning_starts=4, action_noise=noise, seed=0, **SMALL)
    seen = []

    def record(locals_: dict[str, Any], _: Any) -> None:
        if model.num_timesteps > 4:
            seen.append((locals_["dones"].copy(), model.action_noise.get_state()["state"].copy()))

    model.learn(40, callback=record)
    assert sum(dones.any() for dones, _ in seen) > 5
    for dones, state in seen:
        assert ((state == 0).all(axis=1) == dones).all()

    # New episodes, new noise: also at the start of another run.
    assert model.action_noise.get_state()["state"].any()
    at_start, explore = [], model._explore

    def spy(obs):
        at_start.append(model.action_noise.get_state()["state"].copy())
        return explore(obs)

    monkeypatch.setattr(model, "_explore", spy)
    model.learn(2)
    assert not at_start[0].any()


def test_first_actions_are_uniform_and_later_ones_are_the_policys(cls):
    small = {"policy_kwargs": {"net_arch": [8, 8], "final_init": 3e-3}, "batch_size": 4}
    model = cls("MlpPolicy", Cycle(10), learning_starts=2_000, action_noise=None, seed=0, **small)
    seen = []
    model.learn(2_050, callback=lambda locals_, _: seen.append((locals_["actions"][0], locals_["step"])))
    first = np.sort(np.array([action for action, _ in seen[:2_000]]), axis=0)
    # Kolmogorov's distance to the uniform distribution: 2.2 / sqrt(n) is exceeded once in ten thousand times.
    steps = np.linspace(0, 1, 2_000)[:, None]
    assert np.abs((first + 1) / 2 - steps).max() < 2.2 / 2_000**0.5
    for action, _ in seen[2_000:]:
        assert np.abs(action).max() < 0.1, "the first policy hardly acts: its last layer is within +-0.003"


def test_actions_are_the_policys_with_noise_and_stay_in_bounds(cls):
    noise = NormalActionNoise(0.0, 5.0)
    model = cls("MlpPolicy", Cycle(10), learning_starts=5, action_noise=noise, seed=0, **SMALL)
    seen = []
    model.learn(200, callback=lambda locals_, _: seen.append(locals_["actions"].copy()))
    actions = np.concatenate(seen)
    assert np.abs(actions).max() == 1
    assert (np.abs(actions[5:]) == 1).mean() > 0.7, "noise this large nearly always reaches a bound"
    assert np.array(model.env.env.envs[0].unwrapped.actions).min() >= -3
    assert np.array(model.env.env.envs[0].unwrapped.actions).max() <= 1
    assert noise.n_envs is None, "the user's object is left alone"


def test_noise_that_is_assigned_is_bound_as_by_the_constructor(cls):
    given = NormalActionNoise(0.0, [0.3, 0.1])
    seen = []
    for first in (given, None):
        model = cls("MlpPolicy", Cycle(7), learning_starts=5, action_noise=first, seed=0, **SMALL)
        if first is None:
            model.action_noise = given
        model.learn(30)
        seen.append(model.replay_buffer.action[:30].copy())
    np.testing.assert_array_equal(*seen)
    assert given.n_envs is None, "the user's object is left alone"

    before = model.action_noise
    with pytest.raises(ValueError, match=r"sigma has shape \(3,\), but the actions have shape \(2,\)"):
        model.action_noise = NormalActionNoise(0.0, [0.1, 0.2, 0.3])
    assert model.action_noise is before
    model.action_noise = None
    model.learn(10)


def test_the_buffers_oldest_transitions_are_overwritten(cls):
    model = cls("MlpPolicy", Cycle(100), learning_starts=10, buffer_size=20, seed=0, **SMALL).learn(50)
    held = (model.replay_buffer.sample(1_000).successor[:, 0] * 100).round().int().tolist()
    assert model.replay_buffer.full
    assert sorted(set(held)) == list(range(31, 51))


@pytest.mark.parametrize(
    "space", [spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.Box(-np.inf, np.inf, (2,), np.float32)]
)
def test_spaces_that_it_cannot_act_in_are_refused(cls, space):
    with pytest.raises(ValueError, match=cls.__name__) as caught:
        cls("MlpPolicy", KNOWN._replace(action_space=space))
    assert str(space) in str(caught.value)


@pytest.mark.parametrize("noise", ["gaussian", 0.1, object()])
def test_noise_of_no_known_kind_is_refused(cls, noise):
    with pytest.raises(ValueError, match="action_noise"):
        cls("MlpPolicy", KNOWN, action_noise=noise)
