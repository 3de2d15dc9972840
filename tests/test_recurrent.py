"""LSTM policies: memories that begin with episodes, gradients through rollouts, and a task that needs them."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from sbac import A2C, evaluate_policy
from sbac.adapters import Step
from sbac.envs import Spaces
from sbac.recurrent import RecurrentActorCritic

CPU = torch.device("cpu")


class Cue(gymnasium.Env[Any, Any]):
    """Shows one of two lights at the first step only, and asks for it ten steps later. Best: 1. By chance: 0.5."""

    observation_space = spaces.Box(0, 1, (3,), np.float32)
    action_space = spaces.Discrete(2)
    delay = 10

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps, self.light = 0, int(self.np_random.integers(2))
        obs = np.zeros(3, np.float32)
        obs[self.light] = 1
        return obs, {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        asked = self.steps == self.delay
        self.steps += 1
        obs = np.zeros(3, np.float32)
        obs[2] = self.steps == self.delay
        return obs, float(asked and action == self.light), asked, False, {}


class Noise(gymnasium.Env[Any, Any]):
    """Random observations; episodes of several lengths, which end in both ways.

    Args:
        index: Of the environment.
    """

    observation_space = spaces.Box(-5, 5, (3,), np.float32)
    action_space = spaces.Discrete(3)

    def __init__(self, index: int = 0) -> None:
        self.index = index
        self.episode = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps, self.episode = 0, self.episode + 1
        return self._now(), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        over = self.steps == 2 + self.index + self.episode % 3
        return self._now(), float(self.np_random.normal()), over and self.episode % 2 == 0, over, {}

    def _now(self) -> Any:
        return self.np_random.normal(size=3).astype(np.float32)


def make(n_envs: int = 3, mode: AutoresetMode = AutoresetMode.SAME_STEP, **kwargs: Any) -> A2C:
    env = SyncVectorEnv([lambda i=i: Noise(i) for i in range(n_envs)], autoreset_mode=mode)
    network = {"lstm_hidden_size": 8, "net_arch": [6], "ortho_init": False}
    return A2C("MlpLstmPolicy", env, **{"n_steps": 7, "seed": 0, "policy_kwargs": network, **kwargs})


# A task that needs a memory.


@pytest.mark.parametrize("seed", [0, 1])
def test_a_memory_task_is_solved_with_an_lstm_and_not_without(seed: int) -> None:
    def learn(policy: str, **network: Any) -> float:
        model = A2C(
            policy,
            Cue,
            n_envs=16,
            n_steps=11,
            learning_rate=1e-2,
            use_rms_prop=False,
            gamma=1.0,
            seed=seed,
            policy_kwargs=network,
        )
        model.learn(32_000)
        mean, _ = evaluate_policy(model, Cue, n_eval_episodes=100, seed=1000)
        return mean

    assert learn("MlpLstmPolicy", lstm_hidden_size=32) == 1
    assert learn("MlpPolicy", net_arch=[32]) < 0.65  # by chance 0.5, with a standard error of 0.05


# The memory of a rollout.


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_the_update_remembers_what_acting_remembered(mode: AutoresetMode, monkeypatch: Any) -> None:
    """Through ends of both kinds, empty reset steps, and from rollout to rollout."""
    model = make(mode=mode, learning_rate=1e-9)
    acted: list[torch.Tensor] = []
    family = model.policy.family

    class Recorder:
        def __init__(self, into: list[torch.Tensor]) -> None:
            self.into = into

        def __call__(self, parameters: torch.Tensor, *rest: Any) -> Any:
            self.into.append(parameters.detach())
            return family(parameters, *rest)

        def __getattr__(self, name: str) -> Any:
            return getattr(family, name)

    n_checked = 0
    update = model._update

    def check(batch: Any) -> Any:
        nonlocal n_checked
        with torch.no_grad():
            distributions: list[torch.Tensor] = []
            monkeypatch.setattr(model.policy, "family", Recorder(distributions))
            model.policy.evaluate_rollout(batch)
            monkeypatch.setattr(model.policy, "family", Recorder(acted))
        expected = torch.stack([one for one in acted if len(one) == 3][-len(batch.reward) :]).flatten(0, 1)
        kept = batch.kept
        torch.testing.assert_close(distributions[0][kept], expected[kept], rtol=1e-5, atol=1e-6)
        n_checked += 1
        # Forgetting nothing at the ends, or all at the start of the rollout, would give something else.
        endless = batch._replace(terminated=batch.terminated & False, truncated=batch.truncated & False)
        monkeypatch.setattr(model.policy, "family", Recorder(others := []))
        model.policy.evaluate_rollout(endless._replace(kept=slice(None)))
        monkeypatch.setattr(model.policy, "family", Recorder(acted))
        assert (others[0][kept] - expected[kept]).abs().max() > 1e-4
        return update(batch)

    monkeypatch.setattr(model.policy, "family", Recorder(acted))
    monkeypatch.setattr(model, "_update", check)
    model.learn(100)
    assert n_checked >= 4


def test_gradients_flow_through_the_whole_rollout_as_in_torchs_own_lstm() -> None:
    known = Spaces(spaces.Box(-5, 5, (3,), np.float32), spaces.Discrete(3), 2)
    model = A2C("MlpLstmPolicy", known, n_steps=9, seed=0, policy_kwargs={"lstm_hidden_size": 8})
    policy = model.policy
    assert isinstance(policy, RecurrentActorCritic)
    batch = rollout(model, n_steps=9)
    value, log_prob, entropy, next_value, back = policy.evaluate_rollout(batch)
    one = torch.ones_like(value)
    policy.gradient(value.sum() + log_prob.sum() + entropy.sum(), back=lambda: back(one, one, one))
    ours = policy.lstm.weight_hh.grad.clone()

    lstm = torch.nn.LSTM(3, 8)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        getattr(lstm, f"{name}_l0").data.copy_(getattr(policy.lstm, name))
    latent, last = lstm(batch.obs.view(9, 2, 3))
    expected = policy.value_net(latent).squeeze(-1)
    torch.testing.assert_close(value.view(9, 2), expected)
    distribution = policy.family(policy.action_net(latent.flatten(0, 1)))
    (expected.sum() + distribution.log_prob(batch.action).sum() + distribution.entropy().sum()).backward()
    torch.testing.assert_close(ours, lstm.weight_hh_l0.grad)

    # The value after the last step has the memory of all of them.
    after, _ = lstm(batch.bootstrap_obs[None], last)
    torch.testing.assert_close(next_value, policy.value_net(after[0]).squeeze(-1))
    assert not next_value.requires_grad
    assert (next_value - policy.predict_values(batch.bootstrap_obs)).abs().max() > 1e-3


def rollout(model: A2C, n_steps: int) -> Any:
    rng = np.random.default_rng(0)
    no = np.zeros(2, bool)
    obs = rng.normal(size=(n_steps + 1, 2, 3)).astype(np.float32)
    model.policy.begin_rollout()
    for t in range(n_steps):
        step = Step(obs[t + 1], rng.normal(size=2), no, no, obs[t + 1], ~no, [{}, {}])
        model.rollout_buffer.add(obs[t], rng.integers(3, size=2), step)
    return model.rollout_buffer.get()


# Elsewhere.


def test_predict_hands_its_state_on_and_forgets_where_an_episode_begins() -> None:
    model = make().learn(30)
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(6, 4, 3)).astype(np.float32)

    state = None
    for t in range(3):
        _, state = model.predict(obs[t], state=state, episode_start=np.full(4, t == 0))
    assert [part.shape for part in state] == [(4, 8), (4, 8)]
    begins = np.array([True, False, False, True])
    _, after = model.predict(obs[3], state=state, episode_start=begins)
    _, fresh = model.predict(obs[3])
    np.testing.assert_allclose(after[0][begins], fresh[0][begins], rtol=1e-6)
    assert np.abs(after[0][~begins] - fresh[0][~begins]).max() > 1e-3

    # One observation alone is a batch of one.
    _, single = model.predict(obs[3, 1], state=tuple(part[1:2] for part in state), episode_start=False)
    np.testing.assert_allclose(single[0], after[0][1:2], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(model.policy.predict(obs[3], state=state, episode_start=begins)[1][0], after[0])


def test_a_state_of_another_number_of_observations_is_named() -> None:
    model = make()
    _, state = model.predict(np.zeros((2, 3), np.float32))
    for n in (1, 3):
        with pytest.raises(ValueError, match=rf"state must be h and c of shape \({n}, 8\), .* \(2, 8\)"):
            model.predict(np.zeros((n, 3), np.float32), state, np.ones(n, bool))


def test_predicting_and_evaluating_leave_the_memory_of_training_alone() -> None:
    def learn(callback: Any = None) -> A2C:
        return make().learn(63, callback=callback)

    def meddle(locals_: Any, _: Any) -> bool:
        model = locals_["self"]
        model.predict(np.zeros((5, 3), np.float32), deterministic=False)
        evaluate_policy(model, Noise, n_eval_episodes=2)
        return True

    assert torch.equal(learn().policy.flat, learn(meddle).policy.flat)


@pytest.mark.parametrize("n_steps", [40, 42])
def test_an_interrupted_recurrent_run_goes_on_exactly(n_steps: int, tmp_path: Any) -> None:
    def model(**kwargs: Any) -> A2C:
        network = {"lstm_hidden_size": 8}
        return A2C("MlpLstmPolicy", "CartPole-v1", n_envs=2, n_steps=7, seed=0, policy_kwargs=network, **kwargs)

    whole = model().learn(126)
    cut = model()
    cut.learn(126, callback=lambda locals_, _: locals_["self"].num_timesteps < n_steps)
    cut.save(tmp_path / "cut", full=True)
    loaded = A2C.load(tmp_path / "cut", env="CartPole-v1")
    assert ("memory_h" in loaded.policy.get_running_state()) is True
    loaded.learn(126 - loaded.num_timesteps, reset_num_timesteps=False)
    cut.learn(126 - cut.num_timesteps, reset_num_timesteps=False)
    assert torch.equal(cut.policy.flat, whole.policy.flat)
    assert torch.equal(loaded.policy.flat, whole.policy.flat)


def test_images_and_several_inputs_have_lstm_policies_too() -> None:
    image = spaces.Box(0, 255, (36, 36, 1), np.uint8)
    tree = spaces.Dict({"eye": image, "v": spaces.Box(-1, 1, (2,), np.float32)})
    for name, space in (("CnnLstmPolicy", image), ("MultiInputLstmPolicy", tree)):
        model = A2C(name, Spaces(space, spaces.Discrete(2), 1), seed=0)
        assert model.policy.lstm.hidden_size == 256
        state = model.predict(space.sample())[1]
        assert state[0].shape == (1, 256)
    with pytest.raises(ValueError, match="one body: share_features_extractor must be True"):
        A2C("MlpLstmPolicy", "CartPole-v1", policy_kwargs={"share_features_extractor": False})
    with pytest.raises(ValueError, match="lstm_hidden_size must be a whole number"):
        A2C("MlpLstmPolicy", "CartPole-v1", policy_kwargs={"lstm_hidden_size": 0})
