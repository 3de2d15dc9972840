"""A2C's gradient step: against stable-baselines3, and against its formulas written out."""

from __future__ import annotations

from typing import Any, NamedTuple

import gymnasium
import numpy as np
import pytest
import stable_baselines3
import torch
from gymnasium import spaces
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike as PeerRMSpropTFLike
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor

from sbac import A2C
from sbac.envs import Spaces, Step
from sbac.optimization import RMSpropTFLike
from tests.environments import Recorder

DISCRETE = Spaces(gymnasium.make("CartPole-v1").observation_space, spaces.Discrete(2), 2)
CONTINUOUS = Spaces(spaces.Box(-2, 2, (3,), np.float32), spaces.Box(-1, 1, (2,), np.float32), 2)


class Rollout(NamedTuple):
    """Steps of n environments, time first."""

    obs: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    successor: np.ndarray  # the true one, also where an episode ended
    next_obs: np.ndarray  # after the last step: what to act on next


def make_rollout(known: Spaces, seed: int, n_steps: int = 6) -> Rollout:
    """Random experience with a termination, a time limit in the middle and one in the last step."""
    rng = np.random.default_rng(seed)
    shape = (n_steps, known.n_envs)
    obs = rng.uniform(-1, 1, (n_steps + 1, known.n_envs, *known.observation_space.shape)).astype(np.float32)
    terminated, truncated = np.zeros(shape, bool), np.zeros(shape, bool)
    if n_steps > 1:
        terminated[1, 0] = truncated[2, 1] = truncated[-1, 1] = True
    ended = (terminated | truncated)[..., None]
    successor = np.where(ended, rng.uniform(-1, 1, obs[1:].shape), obs[1:]).astype(np.float32)
    if isinstance(known.action_space, spaces.Discrete):
        action = rng.integers(known.action_space.n, size=shape)
    else:
        action = rng.normal(size=(*shape, *known.action_space.shape)).astype(np.float32)
    reward = rng.normal(size=shape).astype(np.float32)
    return Rollout(obs[:-1], action, reward, terminated, truncated, successor, obs[-1])


def update(model: A2C, rollout: Rollout) -> dict[str, Tensor]:
    """The gradient step of a model on given experience."""
    model.rollout_buffer.reset()
    valid = np.ones(model.n_envs, bool)
    for t in range(len(rollout.obs)):
        next_obs = rollout.obs[t + 1] if t + 1 < len(rollout.obs) else rollout.next_obs
        step = Step(
            next_obs,
            rollout.reward[t].astype(np.float64),
            rollout.terminated[t],
            rollout.truncated[t],
            rollout.successor[t],
            valid,
            [{}] * model.n_envs,
        )
        model.rollout_buffer.add(rollout.obs[t], rollout.action[t], step)
    return model._update(model.rollout_buffer.get())


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def weights(model: A2C) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}


# Against stable-baselines3.


class Idle(gymnasium.Env[Any, Any]):
    """Spaces without a task."""

    def __init__(self, known: Spaces) -> None:
        self.observation_space, self.action_space = known.observation_space, known.action_space


def peer_of(model: A2C, known: Spaces, **kwargs: Any) -> Any:
    peer = stable_baselines3.A2C("MlpPolicy", DummyVecEnv([lambda: Idle(known)] * known.n_envs), **kwargs)
    peer.set_logger(Logger(None, []))
    peer.policy.load_state_dict(in_peers_names(weights(model)))
    return peer


def in_peers_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    named = {}
    for name, tensor in state.items():
        if name.startswith("value_net.4."):
            name = name.replace("value_net.4.", "value_net.")
        elif name.startswith(("policy_net.", "value_net.")):
            name = f"mlp_extractor.{name}"
        named[name] = tensor
    return named


def update_peer(peer: Any, rollout: Rollout) -> None:
    """What stable-baselines3's `collect_rollouts` does with such experience, and its gradient step."""
    buffer, policy = peer.rollout_buffer, peer.policy
    buffer.reset()
    starts = np.zeros(buffer.n_envs, bool)
    with torch.no_grad():
        for t in range(len(rollout.obs)):
            action = rollout.action[t]
            value, log_prob, _ = policy.evaluate_actions(torch.tensor(rollout.obs[t]), torch.tensor(action))
            after = policy.predict_values(torch.tensor(rollout.successor[t])).flatten().numpy()
            reward = rollout.reward[t] + peer.gamma * after * rollout.truncated[t]
            buffer.add(rollout.obs[t], action.reshape(buffer.n_envs, -1), reward, starts, value.flatten(), log_prob)
            starts = rollout.terminated[t] | rollout.truncated[t]
        last_values = policy.predict_values(torch.tensor(rollout.next_obs))
    buffer.compute_returns_and_advantage(last_values=last_values, dones=starts)
    peer.train()


@pytest.mark.parametrize("known", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])
@pytest.mark.parametrize("optimizer", ["rmsprop", "rmsprop_tf_like", "adam"])
@pytest.mark.parametrize("gae_lambda", [1.0, 0.9])
@pytest.mark.parametrize("normalize_advantage", [False, True])
def test_gradient_steps_equal_those_of_stable_baselines3(known, optimizer, gae_lambda, normalize_advantage):
    arguments: dict[str, Any] = {
        "n_steps": 6,
        "gamma": 0.95,
        "gae_lambda": gae_lambda,
        "ent_coef": 0.02,
        "normalize_advantage": normalize_advantage,
        "use_rms_prop": optimizer != "adam",
        "seed": 1,
        "device": "cpu",
    }
    own, peers = {}, {}
    if optimizer == "rmsprop_tf_like":
        kwargs = {"optimizer_kwargs": {"alpha": 0.99, "eps": 1e-5}}
        own = {"policy_kwargs": {"optimizer_class": RMSpropTFLike, **kwargs}}
        peers = {"policy_kwargs": {"optimizer_class": PeerRMSpropTFLike, **kwargs}}
    model = A2C("MlpPolicy", known, **arguments, **own)
    peer = peer_of(model, known, **arguments, **peers)

    # RMSprop's first step hardly depends on the gradient's length, so that one step alone would hide much.
    for seed in range(4):
        rollout = make_rollout(known, seed)
        before = weights(model)
        update(model, rollout)
        update_peer(peer, rollout)
        assert difference(in_peers_names(weights(model)), peer.policy.state_dict()) < 1e-6
        assert difference(weights(model), before) > 1e-5


@pytest.mark.parametrize("known", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])
def test_a_time_limit_taken_for_a_termination_gives_other_weights(known):
    right, wrong = (A2C("MlpPolicy", known, n_steps=6, seed=1) for _ in range(2))
    for seed in range(2):
        rollout = make_rollout(known, seed)
        update(right, rollout)
        none = np.zeros_like(rollout.truncated)
        update(wrong, rollout._replace(terminated=rollout.terminated | rollout.truncated, truncated=none))
    assert difference(weights(right), weights(wrong)) > 1e-4


# Against the formulas.


def network(state: dict[str, Tensor], prefix: str, obs: Tensor) -> Tensor:
    """Two hidden layers of tanh."""
    for layer in ("0", "2"):
        obs = torch.tanh(obs @ state[f"{prefix}.{layer}.weight"].T + state[f"{prefix}.{layer}.bias"])
    return obs


def value_of(state: dict[str, Tensor], obs: Tensor) -> Tensor:
    hidden = network(state, "value_net", obs)
    return (hidden @ state["value_net.4.weight"].T + state["value_net.4.bias"]).squeeze(-1)


def log_probs_of(state: dict[str, Tensor], obs: Tensor) -> Tensor:
    hidden = network(state, "policy_net", obs)
    return torch.log_softmax(hidden @ state["action_net.weight"].T + state["action_net.bias"], -1)


def returns_by_hand(state: dict[str, Tensor], rollout: Rollout, gamma: float) -> Tensor:
    """R <- r + gamma R, backwards; R is 0 after a termination and V(s') after a time limit or the last step."""
    n_steps, n_envs = rollout.reward.shape
    returns = torch.zeros(n_steps, n_envs)
    for i in range(n_envs):
        for t in reversed(range(n_steps)):
            if rollout.terminated[t, i]:
                following = torch.tensor(0.0)
            elif rollout.truncated[t, i] or t == n_steps - 1:
                following = value_of(state, torch.tensor(rollout.successor[t, i]))
            else:
                following = returns[t + 1, i]
            returns[t, i] = float(rollout.reward[t, i]) + gamma * following
    return returns.detach()


def test_gradient_step_by_hand_with_discrete_actions():
    model = A2C("MlpPolicy", DISCRETE, n_steps=6, gamma=0.9, ent_coef=0.1, vf_coef=0.4, learning_rate=0.01, seed=3)
    rollout = make_rollout(DISCRETE, seed=5)
    state = {name: tensor.requires_grad_() for name, tensor in weights(model).items()}
    obs, action = torch.tensor(rollout.obs), torch.tensor(rollout.action)

    value, log_probs = value_of(state, obs), log_probs_of(state, obs)
    returns = returns_by_hand(state, rollout, 0.9)
    advantage = (returns - value).detach()
    policy_loss = -(log_probs.gather(-1, action[..., None]).squeeze(-1) * advantage).mean()
    entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
    value_loss = ((returns - value) ** 2).mean()
    loss = policy_loss - 0.1 * entropy + 0.4 * value_loss
    gradient = dict(zip(state, torch.autograd.grad(loss, list(state.values())), strict=True))

    norm = torch.sqrt(sum((g**2).sum() for g in gradient.values()))
    assert norm > 0.5, "the test is to clip"
    expected = {}
    for name, tensor in state.items():
        clipped = gradient[name] * 0.5 / (norm + 1e-6)
        expected[name] = tensor.detach() - 0.01 * clipped / (torch.sqrt(0.01 * clipped**2) + 1e-5)

    numbers = update(model, rollout)
    assert difference(weights(model), expected) < 1e-6
    assert numbers["policy_loss"].item() == pytest.approx(policy_loss.item(), abs=1e-6)
    assert numbers["value_loss"].item() == pytest.approx(value_loss.item(), abs=1e-6)
    assert numbers["entropy_loss"].item() == pytest.approx(-entropy.item(), abs=1e-6)
    assert numbers["grad_norm"].item() == pytest.approx(norm.item(), abs=1e-5)
    spread = 1 - (returns - value).detach().var(correction=0) / returns.var(correction=0)
    assert numbers["explained_variance"].item() == pytest.approx(spread.item(), abs=1e-5)


def test_gradient_step_by_hand_with_continuous_actions_and_normalized_advantages():
    model = A2C(
        "MlpPolicy",
        CONTINUOUS,
        n_steps=6,
        gamma=0.9,
        ent_coef=0.1,
        learning_rate=0.01,
        max_grad_norm=None,
        normalize_advantage=True,
        policy_kwargs={"optimizer_class": torch.optim.SGD, "log_std_init": -0.5},
        seed=3,
    )
    rollout = make_rollout(CONTINUOUS, seed=5)
    state = {name: tensor.requires_grad_() for name, tensor in weights(model).items()}
    obs, action = torch.tensor(rollout.obs), torch.tensor(rollout.action)

    mean = network(state, "policy_net", obs) @ state["action_net.weight"].T + state["action_net.bias"]
    normal = torch.distributions.Normal(mean, state["log_std"].exp())
    value = value_of(state, obs)
    returns = returns_by_hand(state, rollout, 0.9)
    advantage = (returns - value).detach()
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    policy_loss = -(normal.log_prob(action).sum(-1) * advantage).mean()
    loss = policy_loss - 0.1 * normal.entropy().sum(-1).mean() + 0.5 * ((returns - value) ** 2).mean()
    gradient = torch.autograd.grad(loss, list(state.values()))
    expected = {name: tensor.detach() - 0.01 * g for (name, tensor), g in zip(state.items(), gradient, strict=True)}

    update(model, rollout)
    assert difference(weights(model), expected) < 1e-6


@pytest.mark.parametrize("terminated", [False, True])
def test_one_step_actor_critic_by_hand(terminated):
    known = DISCRETE._replace(n_envs=1)
    plain = {"optimizer_class": torch.optim.SGD}
    model = A2C(
        "MlpPolicy", known, n_steps=1, gamma=0.9, learning_rate=0.1, max_grad_norm=None, policy_kwargs=plain, seed=2
    )
    rollout = make_rollout(known, seed=1, n_steps=1)._replace(terminated=np.array([[terminated]]))
    state = {name: tensor.requires_grad_() for name, tensor in weights(model).items()}
    obs, successor = torch.tensor(rollout.obs[0]), torch.tensor(rollout.successor[0])

    # A = r + gamma V(s') - V(s), where nothing follows a termination
    value, next_value = value_of(state, obs), 0.0 if terminated else value_of(state, successor).detach()
    target = torch.tensor(rollout.reward[0]) + 0.9 * next_value
    log_prob = log_probs_of(state, obs)[0, int(rollout.action[0, 0])]
    loss = (-(target - value).detach() * log_prob + 0.5 * (target - value) ** 2).sum()
    gradient = torch.autograd.grad(loss, list(state.values()))
    expected = {name: tensor.detach() - 0.1 * g for (name, tensor), g in zip(state.items(), gradient, strict=True)}

    update(model, rollout)
    assert difference(weights(model), expected) < 1e-6


def test_normalizing_a_single_advantage_leaves_it():
    known = DISCRETE._replace(n_envs=1)
    plain, normalized = (A2C("MlpPolicy", known, n_steps=1, normalize_advantage=flag, seed=2) for flag in (False, True))
    for model in (plain, normalized):
        update(model, make_rollout(known, seed=1, n_steps=1))
    assert difference(weights(plain), weights(normalized)) == 0


# The loop.


def test_learn_updates_on_what_it_collected():
    """Rollouts of two environments through several ends of episodes, rebuilt from what a callback sees."""
    recorded: list[tuple[np.ndarray, np.ndarray, Step]] = []
    updates = []

    class Recording(A2C):
        def _update(self, batch: Any) -> dict[str, Tensor]:
            updates.append((list(recorded), weights(self)))
            recorded.clear()
            return super()._update(batch)

    model = Recording("MlpPolicy", "CartPole-v1", n_envs=2, n_steps=25, seed=0)
    before = [model.env.reset(seed=model._env_seed)]
    model.set_env(model.env)

    def record(locals_: dict[str, Any], _: Any) -> None:
        step = locals_["step"]
        recorded.append((before[-1].copy(), locals_["actions"].copy(), step))
        before.append(step.obs)

    model.learn(200, callback=record)
    assert len(updates) == 4
    assert sum(step.terminated.sum() for steps, _ in updates for _, _, step in steps) > 3

    # The same experience by the way of the other tests gives the same final weights.
    again = A2C("MlpPolicy", model.env, n_steps=25, seed=0)
    for steps, state in updates:
        assert difference(weights(again), state) == 0
        stacked = [np.stack([getattr(step, name) for _, _, step in steps]) for name in Step._fields[1:5]]
        rollout = Rollout(
            np.stack([obs for obs, _, _ in steps]), np.stack([a for _, a, _ in steps]), *stacked, steps[-1][2].obs
        )
        update(again, rollout)
    assert difference(weights(again), weights(model)) == 0


def test_rollouts_bootstrap_from_the_last_successor_although_the_run_ends_within_them():
    model = A2C("MlpPolicy", "CartPole-v1", n_envs=2, n_steps=8, seed=0).learn(2 * 8 + 2 * 3)
    assert (model.n_updates, model.rollout_buffer.pos) == (2, 0)


def test_continuous_actions_are_clipped_for_the_environment_only():
    seen = []

    class Bounded(Idle):
        def reset(self, **kwargs: Any) -> Any:
            super().reset(**kwargs)
            return np.zeros(3, np.float32), {}

        def step(self, action: Any) -> Any:
            seen.append(action)
            return np.zeros(3, np.float32), 0.0, False, False, {}

    env = Bounded(CONTINUOUS._replace(action_space=spaces.Box(2.0, 6.0, (2,), np.float32)))
    taken = []
    A2C("MlpPolicy", env, seed=0).learn(50, callback=lambda locals_, _: taken.append(locals_["actions"][0]))
    taken_array = np.array(taken)
    assert np.abs(taken_array).max() > 1
    assert np.array(seen) == pytest.approx(4 + 2 * np.clip(taken_array, -1, 1), abs=1e-5)


@pytest.mark.parametrize("space", [spaces.Text(3), spaces.Tuple([spaces.Discrete(2), spaces.Text(3)])])
def test_spaces_that_it_cannot_act_in_are_refused(space):
    with pytest.raises(ValueError, match=r"A2C acts in Box, Discrete, .*, not in Text\(.*TransformAction"):
        A2C("MlpPolicy", DISCRETE._replace(action_space=space))


@pytest.mark.parametrize("rescales", [True, False])
def test_the_environment_gets_actions_in_the_units_that_were_asked_for(rescales):
    env, made = Recorder(spaces.Box(-0.5, 3, (2,), np.float32)), []
    model = A2C("MlpPolicy", env, policy_kwargs={"rescale_actions": rescales}, seed=0)
    model.learn(12, callback=lambda values, _: made.append(values["actions"][0].copy()))
    expected = np.array(made) * (1.75 if rescales else 1) + (1.25 if rescales else 0)
    np.testing.assert_allclose(env.received, np.clip(expected, -0.5, 3), rtol=1e-6, atol=1e-6)
    assert (np.array(made) != expected).any() == rescales
