"""Files of Stable-Baselines3, written by the real library: what they predict here, and what is refused of them."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium
import numpy as np
import pytest
import stable_baselines3
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import Tensor, nn

import sbac
from sbac import A2C, DDPG, TD3, ArchiveError
from sbac.buffers import ReplayBatch
from sbac.checkpoint import arguments
from sbac.cli import main
from sbac.envs import Spaces
from sbac.pickles import Made, Name
from sbac.sb3 import _train_frequency_unit
from tests.test_a2c import make_rollout, update, update_peer

VECTOR = spaces.Box(-2, 2, (3,), np.float32)
IMAGE = spaces.Box(0, 255, (2, 36, 40), np.uint8)
TREE = spaces.Dict({"speed": VECTOR, "eye": IMAGE, "place": spaces.Discrete(3), "flags": spaces.MultiBinary(2)})
UNSORTED = spaces.Dict([("speed", VECTOR), ("count", spaces.Box(-1, 1, (2,), np.float32))])
BOX = spaces.Box(np.float32([-1, 0]), np.float32([3, 10]))
SMALL = {"n_steps": 4}
REPLAY = {"buffer_size": 100, "learning_starts": 8, "batch_size": 8}
TWO_BODIES = {"share_features_extractor": False}

# Algorithm, policy, observations, actions, arguments.
CASES: dict[str, tuple[str, str, spaces.Space[Any], spaces.Space[Any], dict[str, Any]]] = {
    "a2c": ("A2C", "MlpPolicy", VECTOR, spaces.Discrete(3), SMALL),
    "a2c box": ("A2C", "MlpPolicy", VECTOR, BOX, {**SMALL, "policy_kwargs": {"log_std_init": 0.5}}),
    "a2c multi discrete": ("A2C", "MlpPolicy", spaces.Discrete(4), spaces.MultiDiscrete([3, 2]), SMALL),
    "a2c multi binary": ("A2C", "MlpPolicy", spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(3), SMALL),
    "a2c other layers": (
        "A2C",
        "MlpPolicy",
        spaces.MultiBinary(4),
        spaces.Discrete(2),
        {**SMALL, "use_rms_prop": False, "policy_kwargs": {"net_arch": {"pi": [8], "vf": [12, 6]}, **TWO_BODIES}},
    ),
    "a2c list": (
        "A2C",
        "MlpPolicy",
        VECTOR,
        BOX,
        {
            **SMALL,
            "policy_kwargs": {
                "net_arch": [7, 5],
                "activation_fn": nn.ReLU,
                "ortho_init": False,
                "optimizer_class": RMSpropTFLike,
                "optimizer_kwargs": {"eps": 1e-4},
            },
        },
    ),
    "a2c image": ("A2C", "CnnPolicy", IMAGE, spaces.Discrete(3), SMALL),
    "a2c two bodies": (
        "A2C",
        "CnnPolicy",
        IMAGE,
        BOX,
        {**SMALL, "policy_kwargs": {**TWO_BODIES, "features_extractor_kwargs": {"features_dim": 32}}},
    ),
    "a2c dict": ("A2C", "MultiInputPolicy", TREE, spaces.Discrete(3), SMALL),
    "a2c unsorted": ("A2C", "MultiInputPolicy", UNSORTED, spaces.Discrete(3), SMALL),
    "a2c pixels laid flat": ("A2C", "MlpPolicy", IMAGE, spaces.Discrete(2), SMALL),
    "ddpg": ("DDPG", "MlpPolicy", VECTOR, BOX, REPLAY),
    "ddpg dict": ("DDPG", "MultiInputPolicy", TREE, BOX, {**REPLAY, "policy_kwargs": {"net_arch": [16]}}),
    "td3": ("TD3", "MlpPolicy", VECTOR, BOX, {**REPLAY, "policy_kwargs": {"net_arch": {"pi": [9], "qf": [8, 7]}}}),
    "td3 image": ("TD3", "CnnPolicy", IMAGE, BOX, {**REPLAY, "policy_kwargs": {"net_arch": [8]}}),
    "td3 unsorted": ("TD3", "MultiInputPolicy", UNSORTED, BOX, {**REPLAY, "policy_kwargs": {"net_arch": [8]}}),
    "td3 three critics": ("TD3", "MlpPolicy", VECTOR, BOX, {**REPLAY, "policy_kwargs": {"n_critics": 3}}),
    "td3 one body": (
        "TD3",
        "CnnPolicy",
        IMAGE,
        BOX,
        {**REPLAY, "policy_kwargs": {"net_arch": [8], "share_features_extractor": True}},
    ),
}


class Noise(gymnasium.Env[Any, Any]):
    """Random observations and rewards; an episode has seven steps."""

    def __init__(self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
        self.observation_space, self.action_space = observation_space, action_space
        observation_space.seed(0)
        self.steps = 0

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        super().reset(**kwargs)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return self.observation_space.sample(), float(np.mean(action)), self.steps == 7, False, {}


def envs(observations: spaces.Space[Any], actions: spaces.Space[Any], n: int = 2) -> DummyVecEnv:
    return DummyVecEnv([lambda: Noise(observations, actions)] * n)


def make_peer(case: str, **overrides: Any) -> Any:
    name, policy, observations, actions, kwargs = CASES[case]
    kwargs = {**kwargs, **overrides}
    kwargs["policy_kwargs"] = dict(kwargs.get("policy_kwargs", {}))
    env = kwargs.pop("env", None) or envs(observations, actions)
    return getattr(stable_baselines3, name)(policy, env, seed=3, device="cpu", **kwargs)


_FILES: dict[str, bytes] = {}


@pytest.fixture
def file_of(tmp_path: Path) -> Callable[[str], tuple[Any, Path]]:
    """A trained model of a case and its file; each is trained once."""

    def make(case: str) -> tuple[Any, Path]:
        path = tmp_path / f"{case.replace(' ', '_')}.zip"
        if case not in _FILES:
            peer = make_peer(case).learn(32)
            decide(peer)
            peer.save(path)
            _FILES[case] = path.read_bytes()
        path.write_bytes(_FILES[case])
        name, _, observations, actions, _ = CASES[case]
        return getattr(stable_baselines3, name).load(path, env=envs(observations, actions), device="cpu"), path

    return make


@torch.no_grad()
def decide(peer: Any) -> None:
    """Give a policy that has hardly learned anything different choices in different states."""
    policy = peer.policy
    if hasattr(policy, "action_net") and not isinstance(peer.action_space, spaces.Box):
        obs = policy.obs_to_tensor(observations_of(peer.observation_space))[0]
        features = policy.extract_features(obs)
        features = features if policy.share_features_extractor else features[0]
        policy.action_net.weight *= 100
        logits = policy.action_net(policy.mlp_extractor.forward_actor(features))
        policy.action_net.bias -= logits.mean(0)


def load(path: Path, case: str, **kwargs: Any) -> Any:
    """Here, without a word about what is not of interest."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "actor and critic share a body|the optimizer of the critic")
        return getattr(sbac, CASES[case][0]).load(path, **kwargs)


def observations_of(space: spaces.Space[Any], n: int = 40) -> Any:
    space.seed(1)
    drawn = [space.sample() for _ in range(n)]
    if isinstance(space, spaces.Dict):
        return {key: np.stack([one[key] for one in drawn]) for key in space.spaces}
    return np.stack(drawn)


def tensors(obs: Any) -> Any:
    return {key: torch.as_tensor(leaf) for key, leaf in obs.items()} if isinstance(obs, dict) else torch.as_tensor(obs)


def largest(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max())


# What a model does.


@pytest.mark.parametrize("case", CASES)
def test_predictions_and_values_equal(case: str, file_of: Any) -> None:
    peer, path = file_of(case)
    model = load(path, case)
    obs = observations_of(model.observation_space)
    theirs = peer.predict(obs, deterministic=True)[0]
    ours = model.predict(obs)[0]
    assert ours.dtype == model.action_space.dtype and ours.shape == theirs.shape
    assert largest(ours, theirs) <= 1e-6 * max(1.0, float(np.abs(theirs).max()))
    assert len(np.unique(theirs.reshape(len(theirs), -1), axis=0)) > 1  # it does not always do the same

    obs_tensors, peers_obs = tensors(obs), peer.policy.obs_to_tensor(obs)[0]
    with torch.no_grad():
        if CASES[case][0] == "A2C":
            drawn = peer.policy(peers_obs)[0]  # not clipped: in the units of the Gaussian
            pairs = list(
                zip(
                    model.policy.evaluate_actions(obs_tensors, drawn),
                    (value.flatten() for value in peer.policy.evaluate_actions(peers_obs, drawn)),
                    strict=True,
                )
            )
        else:
            action = torch.rand(len(ours), 2) * 2 - 1
            pairs = [
                (ours_of(obs_tensors, action), torch.cat(theirs_of(peers_obs, action), 1).T)
                for ours_of, theirs_of in (
                    (model.critic, peer.critic),
                    (model.critic_target, peer.critic_target),
                )
            ]
            pairs.append((model.policy.actor_target(obs_tensors), peer.actor_target(peers_obs)))
    for index, (our, their) in enumerate(pairs):
        assert our.shape == their.shape
        # Log-probability and entropy of such large logits are computed in another order.
        exact = CASES[case][0] != "A2C" or index == 0
        assert largest(our, their) <= (1e-6 if exact else 1e-5) * max(1.0, float(their.abs().max()))


@pytest.mark.parametrize("case", CASES)
def test_a_file_of_our_own_holds_the_same_model(case: str, file_of: Any, tmp_path: Path) -> None:
    _, path = file_of(case)
    model = load(path, case)
    model.save(tmp_path / "ours")
    sbac.convert(path, tmp_path / "converted")
    obs = observations_of(model.observation_space)
    for name in ("ours", "converted"):
        again = sbac.load(tmp_path / name)
        assert type(again) is type(model)
        assert again.num_timesteps == model.num_timesteps == 32
        assert (again.predict(obs)[0] == model.predict(obs)[0]).all()
        assert repr(arguments(again)) == repr(arguments(model))
        for key, network in again._trained().items():
            state = model._trained()[key].optimizer.state_dict()["state"]
            assert state.keys() == network.optimizer.state_dict()["state"].keys()
            for index, entries in network.optimizer.state_dict()["state"].items():
                assert all(torch.equal(value, state[index][name]) for name, value in entries.items())


@pytest.mark.parametrize("case", CASES)
def test_optimizers_go_on_where_they_were(case: str, file_of: Any, tmp_path: Path) -> None:
    """A step along the same gradient, each parameter's own value, leads to the same weights."""
    peer, path = file_of(case)
    model = load(path, case)
    networks = {"policy": peer.policy} if CASES[case][0] == "A2C" else {"actor": peer.actor, "critic": peer.critic}
    shares_body = case == "td3 one body"  # the one case in which the critic's optimizer begins afresh
    for name, network in networks.items():
        ours = model._trained()[name]
        group = ours.optimizer.param_groups[0]
        their_group = network.optimizer.param_groups[0]
        assert group["lr"] == their_group["lr"]
        assert bool(ours.optimizer.state_dict()["state"]) == (name != "critic" or not shares_body)
        ours._lay_if_moved()
        ours._gradient.copy_(ours.flat.detach())
        ours.step()
        for parameter in network.parameters():
            parameter.grad = parameter.detach().clone()
        if name != "critic" or not shares_body:
            network.optimizer.step()
    if shares_body:
        return
    peer.save(tmp_path / "stepped")
    stepped = load(tmp_path / "stepped.zip", case).policy.state_dict()
    before = load(path, case).policy.state_dict()
    for name, tensor in model.policy.state_dict().items():
        assert torch.allclose(tensor, stepped[name], rtol=1e-5, atol=1e-7), name
    assert any(not torch.equal(tensor, before[name]) for name, tensor in stepped.items())


@pytest.mark.parametrize("case", CASES)
def test_training_goes_on(case: str, file_of: Any) -> None:
    _, path = file_of(case)
    name, _, observations, actions, _ = CASES[case]
    model = load(path, case, env=[lambda: Noise(observations, actions)] * 2)
    before = model.n_updates
    model.learn(24, reset_num_timesteps=False)
    assert model.num_timesteps == 56 and model.n_updates > before
    assert name == type(model).__name__


ACTIONS = {"discrete": spaces.Discrete(2), "in its own units": spaces.Box(2, 6, (2,), np.float32)}


@pytest.mark.parametrize("actions", ACTIONS)
def test_a2c_learns_the_same_from_the_same(actions: str, tmp_path: Path) -> None:
    known = Spaces(VECTOR, ACTIONS[actions], 2)
    peer = stable_baselines3.A2C(
        "MlpPolicy", envs(known.observation_space, known.action_space), n_steps=6, device="cpu"
    )
    peer.learn(24).save(tmp_path / "peer")
    peer.set_logger(Logger(None, []))
    model = A2C.load(tmp_path / "peer")
    for seed in range(3):
        rollout = make_rollout(known, seed)
        update(model, rollout)
        update_peer(peer, rollout)
    peer.save(tmp_path / "after")
    after = A2C.load(tmp_path / "after").policy.state_dict()
    before = A2C.load(tmp_path / "peer").policy.state_dict()
    for name, tensor in model.policy.state_dict().items():
        assert torch.allclose(tensor, after[name], rtol=0, atol=2e-6), name
        assert not torch.allclose(tensor, before[name], rtol=0, atol=1e-5), name


@pytest.mark.parametrize("case", ["ddpg", "td3"])
def test_ddpg_and_td3_learn_the_same_from_the_same(case: str, file_of: Any, tmp_path: Path) -> None:
    overrides = {"target_policy_noise": 1e-9} if case == "td3" else {}  # what is drawn differs
    peer = make_peer(case, **overrides).learn(32)
    peer.save(tmp_path / "peer")
    peer.set_logger(Logger(None, []))
    model = load(tmp_path / "peer.zip", case)
    rng = np.random.default_rng(0)

    def tensor(*shape: int) -> Tensor:
        return torch.tensor(rng.uniform(-1, 1, shape), dtype=torch.float32)

    for _ in range(4):
        obs, action, successor = tensor(8, 3), tensor(8, 2), tensor(8, 3)
        reward, ended = tensor(8), (tensor(8) > 0.5).float()
        discount, weight = torch.full((8,), 0.99), torch.ones(8)
        batch = ReplayBatch(
            obs=obs,
            action=action,
            reward=reward,
            terminated=ended,
            successor=successor,
            discount=discount,
            weight=weight,
            rows=np.arange(8),
        )
        model._update(batch)
        model.n_updates += 1
        given = ReplayBufferSamples(obs, action, successor, ended[:, None], reward[:, None], discount[:, None])
        peer.replay_buffer.sample = lambda *_, given=given, **__: given
        peer.train(gradient_steps=1, batch_size=8)
    peer.save(tmp_path / "after")
    after = load(tmp_path / "after.zip", case).policy.state_dict()
    before = load(tmp_path / "peer.zip", case).policy.state_dict()
    for name, own in model.policy.state_dict().items():
        assert torch.allclose(own, after[name], rtol=0, atol=2e-6), name
        assert not torch.equal(own, before[name]), name


# Hyperparameters.


def test_hyperparameters_come_along(tmp_path: Path) -> None:
    given = {"n_steps": 7, "gamma": 0.9, "gae_lambda": 0.8, "ent_coef": 0.01, "vf_coef": 0.4, "max_grad_norm": 0.3}
    given |= {"learning_rate": LinearSchedule(1e-3, 1e-4, 0.5), "normalize_advantage": True, "stats_window_size": 9}
    make_peer("a2c", **given).save(tmp_path / "a2c")
    model = A2C.load(tmp_path / "a2c")
    assert {name: getattr(model, name) for name in given if name != "learning_rate"} == {
        name: value for name, value in given.items() if name != "learning_rate"
    }
    assert (model.seed, model.n_envs) == (3, 2)
    assert [model.learning_rate(p) for p in (1.0, 0.75, 0.1)] == pytest.approx([1e-3, 5.5e-4, 1e-4])

    given = {"tau": 0.1, "gamma": 0.9, "policy_delay": 3, "target_policy_noise": 0.3, "target_noise_clip": 0.4}
    given |= {"gradient_steps": -1, **REPLAY}
    noise = OrnsteinUhlenbeckActionNoise(np.zeros(2), np.float32([0.1, 0.3]), theta=0.2, dt=0.05)
    make_peer("td3", train_freq=(2, "episode"), action_noise=noise, env=envs(VECTOR, BOX, 1), **given).save(
        tmp_path / "td3"
    )
    again = TD3.load(tmp_path / "td3")
    assert {name: getattr(again, name) for name in given} == given
    assert again.train_freq == (2, "episode")
    config = again.action_noise.to_config()
    assert (config["kind"], config["theta"], config["dt"]) == ("ornstein_uhlenbeck", 0.2, 0.05)
    assert config["sigma"] == pytest.approx([0.1, 0.3])

    peer = make_peer("ddpg", action_noise=NormalActionNoise(np.zeros(2), np.full(2, 0.2)))
    peer.learn(10).save(tmp_path / "ddpg")  # with two environments, its noise is around that of one
    ddpg = sbac.load(tmp_path / "ddpg")
    assert type(ddpg) is DDPG
    assert ddpg.action_noise.to_config() == {"kind": "normal", "mean": [0, 0], "sigma": [0.2, 0.2], "dtype": "float32"}


def test_targets_of_several_steps_come_along_without_a_remark(tmp_path: Path) -> None:
    make_peer("td3", n_steps=3, env=envs(VECTOR, BOX, 1)).save(tmp_path / "td3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert TD3.load(tmp_path / "td3").n_steps == 3
    buffer = {"replay_buffer_class": NStepReplayBuffer, "replay_buffer_kwargs": {"n_steps": 3, "gamma": 0.99}}
    make_peer("td3", env=envs(VECTOR, BOX, 1), **buffer).save(tmp_path / "own")
    with pytest.warns(UserWarning, match="NStepReplayBuffer: sbac takes its usual buffer instead"):
        assert TD3.load(tmp_path / "own").n_steps == 1


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    class OwnNoise(NormalActionNoise):
        """Somebody's."""

    noise = OwnNoise(np.zeros(2), np.ones(2))
    make_peer("td3", learning_rate=lambda _: 3e-4, action_noise=noise, env=envs(VECTOR, BOX, 1)).save(tmp_path / "td3")
    with pytest.warns(UserWarning) as caught:
        model = TD3.load(tmp_path / "td3")
    told = sorted(str(warning.message) for warning in caught)
    assert len(told) == 2
    assert "action_noise is not read" in told[0] and "takes none instead" in told[0]
    assert "learning_rate" in told[1] and "takes 0.0003 instead" in told[1]
    assert model.actor_learning_rate == model.critic_learning_rate == 3e-4
    assert model.action_noise is None
    with pytest.warns(UserWarning):
        assert TD3.load(tmp_path / "td3", learning_rate=1e-4).critic_learning_rate == 1e-4


# Images that were turned around.


def test_an_environment_whose_images_have_their_channels_last(tmp_path: Path) -> None:
    env = spaces.Dict({"eye": spaces.Box(0, 255, (36, 40, 3), np.uint8), "speed": VECTOR})
    peer = stable_baselines3.A2C("MultiInputPolicy", envs(env, spaces.Discrete(3)), device="cpu", n_steps=4).learn(16)
    decide(peer)
    peer.save(tmp_path / "peer")
    obs = observations_of(env)
    theirs = peer.predict(obs, deterministic=True)[0]
    assert len(set(theirs.tolist())) > 1
    model = A2C.load(tmp_path / "peer", env=[lambda: Noise(env, spaces.Discrete(3))] * 2)
    assert model.observation_space == env
    assert (model.predict(obs)[0] == theirs).all()
    model.learn(8)
    without = A2C.load(tmp_path / "peer")
    assert without.observation_space["eye"].shape == (3, 36, 40)
    turned = {**obs, "eye": obs["eye"].transpose(0, 3, 1, 2)}
    assert (without.predict(turned)[0] == theirs).all()


def test_an_image_that_seems_to_have_its_channels_last_once_it_was_turned(tmp_path: Path) -> None:
    space = spaces.Box(0, 255, (10, 5, 6), np.uint8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Treating image space as channels-last")
        peer = stable_baselines3.A2C("MlpPolicy", envs(space, BOX), device="cpu", n_steps=4).learn(16)
        peer.save(tmp_path / "peer")
        obs = observations_of(space)
        theirs = peer.predict(obs, deterministic=True)[0]
    model = A2C.load(tmp_path / "peer", env=[lambda: Noise(space, BOX)] * 2)
    assert largest(model.predict(obs)[0], theirs) <= 1e-5
    model.save(tmp_path / "ours")
    assert largest(A2C.load(tmp_path / "ours").predict(obs)[0], theirs) <= 1e-5


# VecNormalize.


@pytest.mark.parametrize("cls", [A2C, TD3])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"clip_obs": 0.8, "epsilon": 0.1, "clip_reward": 0.5},
        {"norm_reward": False},
        {"norm_obs": False},
    ],
    ids=str,
)
def test_statistics_of_vecnormalize_become_the_models_own(cls: Any, settings: Any, tmp_path: Path) -> None:
    space = spaces.Box(np.float32([-5, 90, 0]), np.float32([0, 110, 0.01]))
    wrapped = VecNormalize(envs(space, BOX), gamma=0.9, **settings)
    kwargs: dict[str, Any] = SMALL if cls is A2C else REPLAY
    peer = getattr(stable_baselines3, cls.__name__)("MlpPolicy", wrapped, device="cpu", seed=1, gamma=0.9, **kwargs)
    peer.learn(64).save(tmp_path / "peer")
    wrapped.save(tmp_path / "statistics.pkl")
    model = cls.load(tmp_path / "peer", vecnormalize=tmp_path / "statistics.pkl")
    obs = observations_of(space)
    theirs = peer.predict(wrapped.normalize_obs(obs), deterministic=True)[0]
    assert largest(model.predict(obs)[0], theirs) <= 1e-6 * 10
    reward = np.linspace(-30, 30, 20)
    ours = model.policy.normalize_reward(torch.tensor(reward)).numpy()
    np.testing.assert_allclose(ours, wrapped.normalize_reward(reward), rtol=1e-6)

    if cls is A2C:
        with pytest.warns(UserWarning, match="trained behind a VecNormalize"):
            raw = cls.load(tmp_path / "peer")
    else:
        raw = cls.load(tmp_path / "peer")  # the file does not tell
    if settings != {"norm_obs": False}:
        assert largest(raw.predict(obs)[0], theirs) > 1e-3
    model.save(tmp_path / "ours")
    again = cls.load(tmp_path / "ours", env=[lambda: Noise(space, BOX)] * 2)
    assert (again.predict(obs)[0] == model.predict(obs)[0]).all()
    seen = again.policy.normalizer.moments[0].clone()
    again.learn(20)  # the statistics go on
    assert torch.allclose(again.policy.normalizer.moments[0], seen + 20)


def test_nobody_normalises_twice(tmp_path: Path) -> None:
    wrapped = VecNormalize(envs(VECTOR, BOX))
    stable_baselines3.A2C("MlpPolicy", wrapped, device="cpu", **SMALL).learn(16).save(tmp_path / "peer")
    wrapped.save(tmp_path / "statistics.pkl")
    with pytest.raises(ValueError, match="the environment is in a VecNormalize"):
        A2C.load(tmp_path / "peer", env=wrapped, vecnormalize=tmp_path / "statistics.pkl")
    with pytest.warns(UserWarning, match="trained behind a VecNormalize"):
        assert A2C.load(tmp_path / "peer", env=wrapped).get_env() is wrapped


def test_vecnormalize_of_some_parts_of_a_dict(tmp_path: Path) -> None:
    wrapped = VecNormalize(envs(UNSORTED, spaces.Discrete(3)), norm_obs_keys=["count"])
    peer = stable_baselines3.A2C("MultiInputPolicy", wrapped, device="cpu", seed=1, n_steps=4)
    peer.learn(64).save(tmp_path / "peer")
    wrapped.save(tmp_path / "statistics.pkl")
    model = A2C.load(tmp_path / "peer", vecnormalize=tmp_path / "statistics.pkl")
    obs = observations_of(UNSORTED)
    with torch.no_grad():
        theirs = peer.policy.predict_values(peer.policy.obs_to_tensor(wrapped.normalize_obs(obs))[0]).flatten()
        assert largest(model.policy.predict_values(tensors(obs)), theirs) < 1e-6
    assert model.policy_kwargs["normalizer_kwargs"] == {"keys": ["count"]}


def test_statistics_that_do_not_fit_are_refused(file_of: Any, tmp_path: Path) -> None:
    _, path = file_of("a2c")
    VecNormalize(envs(spaces.Box(-1, 1, (5,)), BOX)).save(tmp_path / "other.pkl")
    with pytest.raises(ArchiveError, match=r"other\.pkl .*: its observations have shape \(5,\)"):
        A2C.load(path, vecnormalize=tmp_path / "other.pkl")
    (tmp_path / "text.pkl").write_bytes(pickle.dumps("no statistics"))
    with pytest.raises(ArchiveError, match=r"there is str 'no statistics' where an object of .*VecNormalize belongs"):
        A2C.load(path, vecnormalize=tmp_path / "text.pkl")
    with pytest.raises(FileNotFoundError):
        A2C.load(path, vecnormalize=tmp_path / "absent.pkl")
    model = A2C.load(path)
    model.save(tmp_path / "ours")
    with pytest.raises(ValueError, match="vecnormalize goes with a Stable-Baselines3 file"):
        A2C.load(tmp_path / "ours", vecnormalize=tmp_path / "other.pkl")


# What cannot be converted.


class OwnBody(BaseFeaturesExtractor):
    """Somebody's."""

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space, 2)
        self.layer = nn.Linear(3, 2)

    def forward(self, obs: Tensor) -> Tensor:
        return self.layer(obs)


class OwnActivation(nn.Tanh):
    """Somebody's."""


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda env: stable_baselines3.PPO("MlpPolicy", env, n_steps=4, batch_size=4), "another algorithm"),
        (lambda env: stable_baselines3.SAC("MlpPolicy", env), "another algorithm .*SACPolicy"),
        (lambda env: stable_baselines3.A2C("MlpPolicy", env, use_sde=True), "use_sde"),
        (
            lambda env: stable_baselines3.A2C("MlpPolicy", env, policy_kwargs={"features_extractor_class": OwnBody}),
            "features_extractor_class is .*OwnBody",
        ),
        (
            lambda env: stable_baselines3.TD3("MlpPolicy", env, policy_kwargs={"activation_fn": OwnActivation}),
            "activation_fn is .*OwnActivation",
        ),
    ],
)
def test_what_cannot_be_converted_is_named(make: Any, text: str, tmp_path: Path) -> None:
    make(envs(VECTOR, BOX)).save(tmp_path / "peer")
    for read in (A2C.load, sbac.load, lambda path: sbac.convert(path, tmp_path / "out")):
        with pytest.raises(ArchiveError, match=text):
            read(tmp_path / "peer")
    assert not (tmp_path / "out.zip").exists()


def test_another_algorithm_of_ours_is_named(file_of: Any) -> None:
    _, path = file_of("ddpg")
    with pytest.raises(ArchiveError, match=r"holds a model of DDPG, not of TD3: use DDPG\.load"):
        TD3.load(path)


# Files that are damaged or hostile.


class Payload:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def rewrite(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Write a zip file anew, each member as `change` gives it."""
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, change(name, content))


def with_pickle(content: bytes, pickled: bytes) -> bytes:
    """A ``.pth`` whose pickle is another."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        members = {name: file.read(name) for name in file.namelist()}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, member in members.items():
            file.writestr(name, pickled if name.endswith("data.pkl") else member)
    return out.getvalue()


@pytest.mark.parametrize("case", ["a2c box", "td3"])
def test_planted_code_never_runs(case: str, file_of: Any, tmp_path: Path) -> None:
    _, path = file_of(case)
    original, trace = path.read_bytes(), tmp_path / "trace"
    with zipfile.ZipFile(path) as file:
        data = json.loads(file.read("data"))
        names = file.namelist()
    payload = Payload(trace)
    with pytest.raises(OSError):  # the planted code does run where it is unpickled
        (tmp_path / "trace").mkdir()
        pickle.loads(pickle.dumps(payload))
    trace.rmdir()
    refused = 0

    def attempt() -> None:
        nonlocal refused
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                sbac.load(path)
        except ArchiveError:
            refused += 1
        assert not trace.exists()

    hidden = [payload, [payload], {"net_arch": payload, "activation_fn": payload}, {"optimizer_class": payload}]
    for key in data:
        for index, value in enumerate(hidden):
            entry = {":type:": "dict", ":serialized:": base64.b64encode(cloudpickle.dumps(value, index + 2)).decode()}
            planted = json.dumps({**data, key: entry}).encode()
            path.write_bytes(original)
            rewrite(path, lambda name, content, planted=planted: planted if name == "data" else content)
            attempt()
    assert refused > len(data)  # the rest is never looked at
    refused = 0
    for member in (name for name in names if name.endswith(".pth")):
        for value in (payload, {"param_groups": [payload], "state": {}}):
            path.write_bytes(original)
            rewrite(path, lambda n, c, m=member, v=value: with_pickle(c, pickle.dumps(v, 2)) if n == m else c)
            attempt()
    assert refused == 2 * sum(name.endswith(".pth") for name in names if name != "pytorch_variables.pth")

    path.write_bytes(original)
    wrapped = VecNormalize(envs(VECTOR, BOX))
    for key, value in wrapped.__getstate__().items():
        for planted in (payload, [payload]):
            setattr(wrapped, key, planted)
            (tmp_path / "statistics.pkl").write_bytes(pickle.dumps(wrapped))
            with contextlib.suppress(ArchiveError):
                sbac.load(path, vecnormalize=tmp_path / "statistics.pkl")
            assert not trace.exists()
        setattr(wrapped, key, value)


def accepted_or_equal(path: Path, peer: Any) -> bool:
    """Whether a file loads: then exactly the original; else with the one error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = sbac.load(path)
    except ArchiveError:
        return False
    obs = observations_of(model.observation_space)
    assert largest(model.predict(obs)[0], peer.predict(obs, deterministic=True)[0]) <= 1e-5
    return True


def test_damaged_files_are_refused_or_are_the_original(file_of: Any) -> None:
    peer, path = file_of("a2c box")
    original = path.read_bytes()
    rng = np.random.default_rng(0)
    assert accepted_or_equal(path, peer)
    for length in rng.integers(0, len(original), 30):
        path.write_bytes(original[:length])
        assert not accepted_or_equal(path, peer)
    flipped = 0
    for place in rng.integers(0, len(original), 120):
        content = bytearray(original)
        content[place] ^= 1 << rng.integers(8)
        path.write_bytes(content)
        flipped += not accepted_or_equal(path, peer)
    assert flipped > 60


def test_lies_about_sizes_are_refused_before_memory_is_taken(file_of: Any, tmp_path: Path) -> None:
    _, path = file_of("a2c")
    original = path.read_bytes()

    def refused(text: str, change: Callable[[str, bytes], bytes], **kwargs: Any) -> None:
        path.write_bytes(original)
        rewrite(path, change, **kwargs)
        with pytest.raises(ArchiveError, match=text):
            sbac.load(path)

    def data(**entries: Any) -> Callable[[str, bytes], bytes]:
        def change(name: str, content: bytes) -> bytes:
            return json.dumps({**json.loads(content), **entries}).encode() if name == "data" else content

        return change

    def pickled(value: Any) -> dict[str, str]:
        return {":type:": "", ":serialized:": base64.b64encode(pickle.dumps(value)).decode()}

    refused("compressed or encrypted", lambda _, content: content, compression=zipfile.ZIP_DEFLATED)
    refused("belong in a policy from", data(observation_space=pickled(spaces.Discrete(2**50))))
    refused("belong in a policy from", data(action_space=pickled(spaces.Discrete(2**50))))
    claim = spaces.MultiBinary(2)
    claim.n = 2**50
    refused("MultiBinary of", data(action_space=pickled(claim)))
    refused("n_envs is", data(n_envs=2**40))
    refused("gamma is str", data(gamma="high"))
    refused("gamma is float", data(gamma=float("nan")))
    refused("n_steps is 2.5", data(n_steps=2.5))
    refused("observation_space is NoneType", data(observation_space=None))
    refused("Expecting value", lambda name, content: b"?" if name == "data" else content)
    refused("holds no object", lambda name, content: b"[]" if name == "data" else content)

    def weights(state: Any, name: str = "policy.pth") -> Callable[[str, bytes], bytes]:
        out = io.BytesIO()
        torch.save(state, out)
        return lambda member, content: out.getvalue() if member == name else content

    with zipfile.ZipFile(io.BytesIO(original)) as file:
        state = torch.load(io.BytesIO(file.read("policy.pth")), weights_only=True)
    key = "mlp_extractor.policy_net.0.weight"
    refused("not what it claims", weights({**state, key: torch.zeros(1).expand(10**6, 10**6)}))
    refused("not what it claims", weights({**state, key: torch.empty(10**6, 10**6, device="meta")}))
    refused(r"has shape \(64, 5\)", weights({**state, key: torch.zeros(64, 5)}))
    refused("torch.float64", weights({**state, key: state[key].double()}))
    refused(
        "lacks action_net.bias", weights({name: value for name, value in state.items() if name != "action_net.bias"})
    )
    refused("layers that sbac's policy has not: extra", weights({**state, "extra": torch.zeros(3)}))
    refused("holds a list", weights([state]))
    refused("no state of an optimizer", weights({"state": {}}, "policy.optimizer.pth"))

    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\0" * 10**7)
    refused("compressed", lambda name, content: inner.getvalue() if name == "policy.pth" else content)


def test_stable_baselines3_need_not_be_installed(file_of: Any, tmp_path: Path) -> None:
    peer, path = file_of("td3")
    wrapped = VecNormalize(envs(VECTOR, BOX))
    wrapped.save(tmp_path / "statistics.pkl")
    script = f"""
import sys
sys.modules["stable_baselines3"] = None  # an import of it fails
import numpy as np, sbac
model = sbac.load({str(path)!r}, vecnormalize={str(tmp_path / "statistics.pkl")!r})
np.save({str(tmp_path / "actions.npy")!r}, model.predict(np.load({str(tmp_path / "obs.npy")!r}))[0])
assert not any(name.startswith("stable_baselines3.") for name in sys.modules)
"""
    obs = observations_of(VECTOR)
    np.save(tmp_path / "obs.npy", obs)
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=120)
    theirs = peer.predict(wrapped.normalize_obs(obs), deterministic=True)[0]
    assert largest(np.load(tmp_path / "actions.npy"), theirs) <= 1e-5


def test_the_command_line_converts(
    file_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peer, path = file_of("td3 one body")
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(path), "ours.zip"]) == 0
    out = capsys.readouterr().out
    assert "note: actor and critic share a body" in out and "ours.zip: TD3, 32 timesteps" in out
    obs = observations_of(IMAGE)
    assert largest(TD3.load("ours").predict(obs)[0], peer.predict(obs, deterministic=True)[0]) <= 1e-5
    assert main(["convert", "ours.zip", "again.zip"]) == 2
    assert "ours.zip is no file of Stable-Baselines3" in capsys.readouterr().err
    assert main(["convert", "absent.zip", "again.zip"]) == 2
    assert not Path("again.zip").exists()


@pytest.mark.parametrize("name", ["STEP", "EPISODE"])
def test_members_of_an_enum_are_read_as_each_python_writes_them(name: str) -> None:
    path = "stable_baselines3.common.type_aliases.TrainFrequencyUnit"
    called = Made(Name(path), (name.lower(),))
    by_name = Made(Name("builtins.getattr"), (Name(path), name))  # Python up to 3.11.3
    assert _train_frequency_unit(called) == _train_frequency_unit(by_name) == name.lower()
    other = Made(Name("builtins.getattr"), (Name("os.path"), name))
    assert _train_frequency_unit(other) is other
