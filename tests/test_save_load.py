"""Models and files: what comes back, what is refused, and that a file is never lost."""

from __future__ import annotations

import contextlib
import io
import re
import resource
import threading
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import stable_baselines3
import torch
from torch import Tensor

import sbac
from sbac import A2C, A3C, DDPG, TD3, ArchiveError
from sbac.archive import Archive, read_archive, write_archive
from sbac.base import BaseAlgorithm
from sbac.callbacks import CheckpointCallback, EvalCallback
from sbac.codec import encode
from sbac.deterministic import DeterministicActorCritic
from sbac.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from sbac.policies import StochasticActorCritic
from sbac.schedules import LinearSchedule

COUNTERS = ("num_timesteps", "n_updates")


def weights(model: BaseAlgorithm) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}


def same(a: BaseAlgorithm, b: BaseAlgorithm) -> bool:
    a_weights, b_weights = weights(a), weights(b)
    return a_weights.keys() == b_weights.keys() and all(torch.equal(a_weights[n], b_weights[n]) for n in a_weights)


def optimizer_states(model: BaseAlgorithm) -> list[Tensor]:
    return [
        torch.as_tensor(value)
        for _, network in sorted(model._trained().items())
        for state in network.optimizer.state_dict()["state"].values()
        for _, value in sorted(state.items())
    ]


def same_optimizers(a: BaseAlgorithm, b: BaseAlgorithm) -> bool:
    pairs = list(zip(optimizer_states(a), optimizer_states(b), strict=True))
    return len(pairs) > 0 and all(torch.equal(x, y) for x, y in pairs)


def observations(model: BaseAlgorithm, n: int = 20) -> np.ndarray:
    space = model.observation_space
    return np.random.default_rng(0).uniform(-1, 1, (n, *space.shape)).astype(space.dtype)


# What comes back.


def test_predictions_come_back_bit_for_bit(make_model, tmp_path):
    model = make_model().learn(60)
    model.save(tmp_path / "model")
    loaded = make_model.cls.load(tmp_path / "model")
    obs = observations(model)
    assert np.array_equal(loaded.predict(obs)[0], model.predict(obs)[0])
    assert same(loaded, model)
    assert same_optimizers(loaded, model)
    assert (loaded.num_timesteps, loaded.n_updates) == (60, model.n_updates)
    assert not loaded.policy.training or type(loaded) is A2C
    assert loaded.env is None


def test_the_suffix_is_added_and_may_be_left_out(make_model, tmp_path):
    model = make_model()
    model.save(tmp_path / "a" / "model")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["model.zip"]
    for path in (tmp_path / "a" / "model", tmp_path / "a" / "model.zip", str(tmp_path / "a" / "model")):
        assert same(make_model.cls.load(path), model)


def test_an_open_file_will_do(make_model):
    model = make_model()
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    assert same(make_model.cls.load(file), model)


def test_equal_models_give_equal_files(make_model, tmp_path):
    for name in ("a", "b"):
        make_model().learn(40).save(tmp_path / name)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_load_on_an_instance_loads_into_it(make_model, tmp_path):
    source = make_model(seed=1, gamma=0.5).learn(40)
    source.save(tmp_path / "model")
    model = make_model(seed=2)
    logger, env = model.logger, model.env
    assert not same(model, source)
    assert model.load(tmp_path / "model") is model
    assert same(model, source)
    assert (model.gamma, model.num_timesteps) == (0.5, 40)
    assert model.logger is logger
    assert model.env is env
    assert model.learn(20).num_timesteps == 20


def test_sbac_load_finds_the_class(make_model, tmp_path):
    model = make_model()
    model.save(tmp_path / "model")
    loaded = sbac.load(tmp_path / "model", env=make_model.env_id)
    assert type(loaded) is make_model.cls
    assert same(loaded, model)
    assert loaded.learn(5).num_timesteps == 5


def test_a_file_can_be_inspected_without_loading(make_model, tmp_path):
    make_model().learn(30).save(tmp_path / "model")
    content = sbac.inspect(tmp_path / "model")
    assert content["meta"]["class"] == make_model.cls.__name__
    assert content["meta"]["counters"]["num_timesteps"] == 30
    assert content["config"]["arguments"]["gamma"] == 0.99
    assert content["config"]["env_id"] == make_model.env_id
    assert any(array["name"].startswith("policy/") for array in content["arrays"])


def test_constructor_arguments_come_back_and_may_be_overridden(make_model, tmp_path):
    arguments: dict[str, Any] = {
        "gamma": LinearSchedule(0.9, 0.99),
        "stats_window_size": 7,
        "policy_kwargs": {"net_arch": [12], "activation_fn": torch.nn.ELU, "optimizer_class": torch.optim.SGD},
        "max_grad_norm": 0.3,
        "seed": 11,
        "n_envs": 2,
    }
    model = make_model(**arguments).learn(30)
    model.save(tmp_path / "model")
    loaded = make_model.cls.load(tmp_path / "model")
    for name, value in arguments.items():
        assert getattr(loaded, name) == value, name
    assert type(next(iter(loaded._trained().values())).optimizer) is torch.optim.SGD
    assert same(loaded, model)

    changed = make_model.cls.load(tmp_path / "model", learning_rate=0.123, gamma=0.5, seed=3)
    assert (changed.learning_rate, changed.gamma, changed.seed) == (0.123, 0.5, 3)
    rates = {network.optimizer.param_groups[0]["lr"] for network in changed._trained().values()}
    assert rates == {0.123}
    assert same(changed, model)
    with pytest.raises(TypeError, match="did you mean 'gamma'"):
        make_model.cls.load(tmp_path / "model", gama=0.5)


@pytest.mark.parametrize("cls", [DDPG, TD3])
def test_either_learning_rate_may_be_overridden(cls, tmp_path):
    cls("MlpPolicy", "Pendulum-v1", learning_rate=3e-4).save(tmp_path / "model")
    loaded = cls.load(tmp_path / "model")
    assert (loaded.learning_rate, loaded.actor_learning_rate, loaded.critic_learning_rate) == (3e-4, 3e-4, 3e-4)
    loaded = cls.load(tmp_path / "model", actor_learning_rate=1e-5)
    assert (loaded.learning_rate, loaded.actor_learning_rate, loaded.critic_learning_rate) == (None, 1e-5, 3e-4)
    loaded = cls.load(tmp_path / "model", learning_rate=1e-2)
    assert (loaded.learning_rate, loaded.actor_learning_rate, loaded.critic_learning_rate) == (1e-2, 1e-2, 1e-2)


@pytest.mark.parametrize(
    "noise",
    [
        None,
        NormalActionNoise(0.1, 0.2),
        OrnsteinUhlenbeckActionNoise(0.0, 0.3),
        VectorizedActionNoise(OrnsteinUhlenbeckActionNoise(0.0, 0.3), 2),
    ],
    ids=lambda noise: type(noise).__name__,
)
def test_noise_comes_back(noise, tmp_path):
    small = {"learning_starts": 4, "batch_size": 4, "policy_kwargs": {"net_arch": [8]}}
    model = DDPG("MlpPolicy", "Pendulum-v1", n_envs=2, action_noise=noise, seed=0, **small).learn(20)
    model.save(tmp_path / "model", full=True)
    loaded = DDPG.load(tmp_path / "model")
    if noise is None:
        assert loaded.action_noise is None
        return
    assert loaded.action_noise.to_config() == model.action_noise.to_config()
    assert all(np.array_equal(loaded.action_noise(), model.action_noise()) for _ in range(3))


def test_a_subclass_is_saved_with_its_own_arguments(make_model, tmp_path):
    base: Any = make_model.cls

    class Own(base):
        def __init__(self, *args: Any, extra: int = 3, **kwargs: Any) -> None:
            self.extra = extra
            super().__init__(*args, **kwargs)

    model = Own("MlpPolicy", make_model.env_id, gamma=0.9, extra=4)
    model.save(tmp_path / "model")
    loaded = Own.load(tmp_path / "model")
    assert (loaded.gamma, loaded.extra) == (0.9, 4)
    assert same(loaded, model)


# Full checkpoints.


def test_a_full_checkpoint_holds_everything(make_model, tmp_path):
    def short() -> gymnasium.Env[Any, Any]:
        return gymnasium.make(make_model.env_id, max_episode_steps=9)

    model = make_model(short, n_envs=2)
    model.learn(200, callback=lambda *_: model.num_timesteps < 62)  # within a rollout of A2C
    model.save(tmp_path / "model", full=True)
    loaded = make_model.cls.load(tmp_path / "model", env=short)

    for name in COUNTERS:
        assert getattr(loaded, name) == getattr(model, name) > 0, name
    assert loaded.episodes.count == model.episodes.count > 0
    assert same(loaded, model)
    assert same_optimizers(loaded, model)
    assert list(loaded.ep_info_buffer) == list(model.ep_info_buffer)
    for name, buffer in model._buffers().items():
        state, expected = loaded._buffers()[name].get_state(), buffer.get_state()
        assert state.keys() == expected.keys()
        assert all(np.array_equal(state[key], expected[key]) for key in state), name
    assert loaded.generator.random() == model.generator.random()
    for generator in ("_act_generator", "_predict_generator"):
        draws = [torch.rand(3, generator=getattr(m, generator)) for m in (loaded, model)]
        assert torch.equal(*draws)
    obs = observations(model)
    assert np.array_equal(loaded.predict(obs, deterministic=False)[0], model.predict(obs, deterministic=False)[0])
    assert np.array_equal(loaded.episodes.running_return, model.episodes.running_return)
    assert np.array_equal(loaded.episodes.running_length, model.episodes.running_length)
    assert loaded.episodes.running_length.any()


@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize("cls", [DDPG, TD3])
def test_training_goes_on_from_the_buffer_bit_for_bit(cls, n_steps, tmp_path):
    small = {"learning_starts": 10, "batch_size": 8, "buffer_size": 40, "policy_kwargs": {"net_arch": [8]}}
    model = cls("MlpPolicy", "Pendulum-v1", seed=0, n_steps=n_steps, **small).learn(60)
    model.save(tmp_path / "model", full=True)
    loaded = cls.load(tmp_path / "model")
    for own, theirs in zip(model.replay_buffer.sample(16), loaded.replay_buffer.sample(16), strict=True):
        assert np.array_equal(own, theirs)
    model.train(gradient_steps=20)
    loaded.train(gradient_steps=20)
    assert same(loaded, model)
    assert same_optimizers(loaded, model)


class _Counting(torch.optim.Optimizer):
    """Counts its steps in the group, which make its next ones smaller."""

    def __init__(self, params: Any, lr: float = 1e-3, decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "decay": decay, "k": 0, "seen": (), "last": None})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["k"] += 1
            group["seen"] = (*group["seen"][-2:], 1 / group["k"])
            group["last"] = [True, "step", float("inf")]
            for parameter in group["params"]:
                parameter.mul_(1 - group["decay"]).sub_(parameter.grad, alpha=group["lr"] * sum(group["seen"]))


def test_what_optimizers_count_in_their_groups_goes_on_bit_for_bit(make_model, tmp_path):
    policy_kwargs = {"net_arch": [8], "optimizer_class": _Counting}
    model = make_model(policy_kwargs=policy_kwargs).learn(60)
    for full in (False, True):
        model.save(tmp_path / "model", full=full)
        custom_objects = {"policy_kwargs": policy_kwargs}
        loaded = make_model.cls.load(tmp_path / "model", env=make_model.env_id, custom_objects=custom_objects)
        for name, network in model._trained().items():
            ours, theirs = (n.optimizer.param_groups[0] for n in (network, loaded._trained()[name]))
            assert ours["k"] > 10 and len(ours["seen"]) == 3
            assert {**ours, "params": None} == {**theirs, "params": None}
    for m in (model, loaded):
        m.learn(60, reset_num_timesteps=False)
    assert same(model, loaded)

    # Without the optimizer, it begins as it is made; so it does of files that do not say.
    model.save(tmp_path / "model", exclude=["optimizer"])
    assert "optimizers" not in read_archive(tmp_path / "model").config
    loaded = make_model.cls.load(tmp_path / "model", custom_objects={"policy_kwargs": policy_kwargs})
    assert {network.optimizer.param_groups[0]["k"] for network in loaded._trained().values()} == {0}


@pytest.mark.parametrize("cls", [DDPG, TD3])
def test_changed_settings_of_optimizers_come_back_but_for_those_that_are_asked_for(cls, tmp_path):
    model = cls("MlpPolicy", "Pendulum-v1", learning_starts=12, buffer_size=500, seed=0).learn(20)
    group = model.critic.optimizer.param_groups[0]
    group["betas"] = (0.5, 0.9)
    model.save(tmp_path / "model")
    loaded = cls.load(tmp_path / "model", weight_decay=0.25, critic_learning_rate=0.5)
    theirs = loaded.critic.optimizer.param_groups[0]
    assert (theirs["betas"], theirs["weight_decay"], theirs["lr"]) == ((0.5, 0.9), 0.25, 0.5)
    assert loaded.actor.optimizer.param_groups[0]["betas"] == (0.9, 0.999)

    group["weight_decay"] = 0.5
    model.save(tmp_path / "model")
    kwargs = {"optimizer_kwargs": {"betas": (0.7, 0.8)}}
    theirs = cls.load(tmp_path / "model", policy_kwargs=kwargs).critic.optimizer.param_groups[0]
    assert (theirs["betas"], theirs["weight_decay"]) == ((0.7, 0.8), 0.5)


def test_what_is_no_data_in_a_group_is_left_out_and_told(make_model, tmp_path):
    model = make_model()
    name, network = next(iter(model._trained().items()))
    network.optimizer.param_groups[0] |= {"function": lambda: 3, "distance": torch.ones(1), "number": 4}
    with pytest.warns(UserWarning, match=rf"of the {name} keeps 'function', 'distance' in its param_groups") as caught:
        model.save(tmp_path / "model")
    assert [warning.filename for warning in caught] == [__file__]
    group = next(iter(make_model.cls.load(tmp_path / "model")._trained().values())).optimizer.param_groups[0]
    assert group["number"] == 4 and "function" not in group and "distance" not in group


@pytest.mark.parametrize(
    "wrong", [3, {"k": 3}, {"k": [0]}, {"lr": [0.1, 0.2]}, {"params": [None, []]}, {"k": [None, {"__nonsense__": 3}]}]
)
def test_settings_of_optimizers_that_are_none_are_refused(make_model, tmp_path, wrong):
    model = make_model()
    model.save(tmp_path / "model")
    for optimizers in (wrong, dict.fromkeys(model._trained(), wrong)):
        if optimizers == wrong and isinstance(wrong, dict):
            continue  # of no network
        archive = read_archive(tmp_path / "model")
        archive.config["optimizers"] = optimizers
        write_archive(tmp_path / "wrong", archive)
        with pytest.raises(ArchiveError, match="optimizer"):
            make_model.cls.load(tmp_path / "wrong")


@pytest.mark.parametrize("full", [False, True])
def test_what_was_frozen_is_frozen_again(make_model, tmp_path, full):
    def frozen(model: BaseAlgorithm) -> list[str]:
        return [name for name, parameter in model.policy.named_parameters() if not parameter.requires_grad]

    def body(model: Any) -> torch.nn.Module:
        return model.policy.policy_net if hasattr(model.policy, "policy_net") else model.policy.actor.mu[0]

    model = make_model()
    body(model).requires_grad_(False)
    expected = frozen(model)
    before = [parameter.clone() for parameter in body(model).parameters()]
    model.learn(40).save(tmp_path / "model", full=full)
    loaded = make_model.cls.load(tmp_path / "model", env=make_model.env_id)
    assert frozen(loaded) == expected != []
    loaded.learn(40, reset_num_timesteps=False)
    assert all(map(torch.equal, body(loaded).parameters(), before))
    assert not same(loaded, model)
    if full:
        model.learn(40, reset_num_timesteps=False)
        assert same(loaded, model)

    # Weights alone are taken by what learns; and what is thawed is not frozen in the next file.
    other = make_model(seed=1)
    other.set_parameters(tmp_path / "model")
    assert frozen(other) == []
    body(loaded).requires_grad_(True)
    loaded.save(tmp_path / "model")
    assert frozen(make_model.cls.load(tmp_path / "model")) == []


class _HalfFrozen(torch.nn.Module):
    """A body of which the class freezes one part."""

    def __init__(self, observation_space: Any) -> None:
        super().__init__()
        self.features_dim = 4
        self.fixed, self.free = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.fixed.requires_grad_(False)

    def forward(self, obs: Tensor) -> Tensor:
        return torch.tanh(self.free(self.fixed(obs)))


def test_what_the_class_freezes_and_files_that_do_not_say_are_as_before(tmp_path):
    kwargs = {"features_extractor_class": _HalfFrozen, "net_arch": [8]}
    model = A2C("MlpPolicy", "CartPole-v1", policy_kwargs=kwargs, seed=0).learn(20)
    model.save(tmp_path / "model")
    for frozen in (read_archive(tmp_path / "model.zip").config["frozen"], None):
        archive = read_archive(tmp_path / "model.zip", allow_pickle=True)
        archive.config["frozen"] = frozen
        if frozen is None:
            del archive.config["frozen"]
        write_archive(tmp_path / "other", archive)
        loaded = A2C.load(tmp_path / "other", env="CartPole-v1", custom_objects={"policy_kwargs": kwargs})
        body = loaded.policy.features_extractor
        assert {p.requires_grad for p in body.fixed.parameters()} == {False}
        assert all(p.requires_grad for name, p in loaded.policy.named_parameters() if ".fixed." not in name)
        loaded.learn(20, reset_num_timesteps=False)


@pytest.mark.parametrize("frozen", [["nonsense"], "log_std", [3], None])
def test_frozen_parameters_that_the_policy_does_not_have_are_refused(make_model, tmp_path, frozen):
    make_model().save(tmp_path / "model")
    archive = read_archive(tmp_path / "model")
    archive.config["frozen"] = frozen
    write_archive(tmp_path / "model", archive)
    with pytest.raises(ArchiveError, match="frozen parameters"):
        make_model.cls.load(tmp_path / "model")


def _said(load: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load()
    assert all(warning.filename == __file__ for warning in caught)
    return [str(warning.message) for warning in caught]


def test_layers_without_weights_that_differ_are_told(make_model, tmp_path):
    model, load = make_model(), make_model.cls.load
    model.save(tmp_path / "model")
    assert not _said(lambda: load(tmp_path / "model"))

    net = "policy_net" if hasattr(model.policy, "policy_net") else "actor.mu"
    was = type(model.policy.get_submodule(f"{net}.1")).__name__
    model.policy.get_submodule(net)[1] = torch.nn.LeakyReLU(0.3)
    model.save(tmp_path / "model")
    for said in (_said(lambda: load(tmp_path / "model")), _said(lambda: make_model().load(tmp_path / "model"))):
        assert len(said) == 1 and f"{net}.1 is {was}(), was LeakyReLU(negative_slope=0.3). " in said[0]

    # Another version of torch may word settings otherwise, and earlier ones of sbac wrote no layers.
    archive = read_archive(tmp_path / "model")
    archive.config["layers"][f"{net}.1"] = f"{was}(worded=otherwise)"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "__version__", "1.0")
        write_archive(tmp_path / "other", archive)
    assert not _said(lambda: load(tmp_path / "other"))
    write_archive(tmp_path / "same", archive)
    assert len(_said(lambda: load(tmp_path / "same"))) == 1
    del archive.config["layers"]
    write_archive(tmp_path / "earlier", archive)
    assert not _said(lambda: load(tmp_path / "earlier"))
    archive.config["layers"] = ["ReLU()"]
    write_archive(tmp_path / "wrong", archive)
    with pytest.raises(ArchiveError, match="the layers of its policy are"):
        load(tmp_path / "wrong")


def test_an_activation_that_is_forgotten_in_policy_kwargs_is_told_and_what_is_asked_for_is_not(make_model, tmp_path):
    load = make_model.cls.load
    kwargs = {"net_arch": [8], "activation_fn": torch.nn.ELU}
    make_model(policy_kwargs=kwargs, dropout=0.25).save(tmp_path / "model")
    assert not _said(lambda: load(tmp_path / "model", custom_objects={"policy_kwargs": kwargs}))
    assert not _said(lambda: load(tmp_path / "model", dropout=0.5))
    (said,) = _said(lambda: load(tmp_path / "model", custom_objects={"policy_kwargs": {"net_arch": [8]}}))
    assert "was ELU(alpha=1.0)" in said


def test_checkpoints_of_a_run_resume(make_model, tmp_path):
    model = make_model(n_envs=2)
    model.learn(60, callback=CheckpointCallback(10, tmp_path, name_prefix="run"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"run_{n}_steps.zip" for n in (20, 40, 60)]
    loaded = make_model.cls.load(tmp_path / "run_40_steps", env=make_model.env_id)
    loaded.learn(20, reset_num_timesteps=False)
    assert loaded.num_timesteps == 60


def test_a_model_saved_between_acting_and_learning_goes_on_without_its_buffer(make_model, tmp_path):
    """A step is owed its gradient step when a callback saves; without the buffer there is nothing to learn from."""
    model = make_model()
    model.learn(60, callback=lambda *_: model.save(tmp_path / "model") if model.num_timesteps == 50 else None)
    loaded = make_model.cls.load(tmp_path / "model", env=make_model.env_id)
    updates = loaded.n_updates
    loaded.learn(10, reset_num_timesteps=False)
    assert loaded.num_timesteps == 60
    if make_model.cls is not A2C:
        assert loaded.n_updates == updates, "10 transitions are fewer than learning_starts"
    loaded.learn(20, reset_num_timesteps=False)
    assert loaded.n_updates > updates


def test_the_number_of_environments_may_be_given_in_place_of_the_files(make_model, tmp_path):
    make_model(n_envs=2).save(tmp_path / "model")
    for given in (np.int64(3), 3.0):
        assert make_model.cls.load(tmp_path / "model", n_envs=given).n_envs == 3
        assert make_model.cls.load(tmp_path / "model", env=make_model.env_id, n_envs=given).n_envs == 3
    with pytest.raises(ValueError, match="n_envs must be a whole number, at least 1, not '3'"):
        make_model.cls.load(tmp_path / "model", n_envs="3")


@pytest.mark.parametrize(("saved_with", "loaded_with"), [(2, 1), (2, 3), (1, 2)])
def test_a_checkpoint_may_go_on_with_another_number_of_environments(make_model, tmp_path, saved_with, loaded_with):
    model = make_model(n_envs=saved_with)
    model.learn(60, callback=lambda *_: model.num_timesteps < 50)
    model.save(tmp_path / "model", full=True)
    env = [lambda: gymnasium.make(make_model.env_id)] * loaded_with
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = make_model.cls.load(tmp_path / "model", env=env)
    assert loaded.n_envs == loaded_with
    assert same(loaded, model)
    if make_model.cls is A2C:
        assert not caught
    else:
        # Its rows belong to environments, one column each.
        expected = f"collected in {saved_with} environments and the model now has {loaded_with}: it was left out"
        (warning,) = [warning for warning in caught if expected in str(warning.message)]
        assert warning.filename == __file__, "the warning points at the line that loads"
        assert loaded.replay_buffer.size() == 0
    loaded.learn(30)
    assert loaded.n_updates > model.n_updates


def test_the_best_model_of_an_evaluation_can_be_loaded(make_model, tmp_path):
    short = [lambda: gymnasium.make(make_model.env_id, max_episode_steps=10)]
    callback = EvalCallback(short, n_eval_episodes=1, eval_freq=20, best_model_save_path=tmp_path, verbose=0)
    make_model().learn(60, callback=callback)
    loaded = sbac.load(tmp_path / "best_model", env=make_model.env_id)
    assert loaded.num_timesteps in (20, 40, 60)
    loaded.learn(30)


def test_parts_can_be_left_out_and_added(make_model, tmp_path):
    model = make_model(n_envs=2).learn(60)
    buffer_name, buffer = next(iter(model._buffers().items()))

    model.save(tmp_path / "policy", exclude=["optimizer"])
    assert not optimizer_states(make_model.cls.load(tmp_path / "policy"))
    assert same(make_model.cls.load(tmp_path / "policy"), model)

    model.save(tmp_path / "with_generators", include=["generators"])
    assert make_model.cls.load(tmp_path / "with_generators").generator.random() == model.generator.random()

    model.save(tmp_path / "without_buffer", full=True, exclude=[buffer_name])
    assert make_model.cls.load(tmp_path / "without_buffer")._buffers()[buffer_name].size() == 0

    if make_model.cls is not A2C:
        model.save(tmp_path / "with_buffer", include=[buffer_name])
        assert make_model.cls.load(tmp_path / "with_buffer").replay_buffer.size() == buffer.size() > 0
    with pytest.raises(ValueError, match="unknown part 'buffer'; a file can hold optimizer, "):
        model.save(tmp_path / "wrong", include=["buffer"])
    assert not (tmp_path / "wrong.zip").exists()


# The replay buffer alone.


def test_the_replay_buffer_alone(tmp_path):
    small = {"learning_starts": 10, "batch_size": 8, "policy_kwargs": {"net_arch": [8]}, "seed": 0}
    model = DDPG("MlpPolicy", "Pendulum-v1", buffer_size=100, **small).learn(60)
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    assert (tmp_path / "buffer.pkl").exists()

    other = DDPG("MlpPolicy", "Pendulum-v1", buffer_size=200, **small)
    other.load_replay_buffer(tmp_path / "buffer.pkl")
    assert other.replay_buffer.size() == 60
    state, expected = other.replay_buffer.get_state(), model.replay_buffer.get_state()
    assert all(np.array_equal(state[name], expected[name]) for name in expected)
    other.learn(20)
    assert other.n_updates == 20, "there is enough to learn from at once"

    with pytest.raises(ValueError, match="larger buffer"):
        DDPG("MlpPolicy", "Pendulum-v1", buffer_size=50, **small).load_replay_buffer(tmp_path / "buffer.pkl")
    mountain = DDPG("MlpPolicy", "MountainCarContinuous-v0", **small)
    with pytest.raises(ValueError, match="other spaces"):
        mountain.load_replay_buffer(tmp_path / "buffer.pkl")
    assert mountain.replay_buffer.size() == 0
    model.save(tmp_path / "model", full=True)
    with pytest.raises(ArchiveError, match="holds no replay buffer"):
        model.load_replay_buffer(tmp_path / "model")


def test_a2c_has_no_replay_buffer(tmp_path):
    model = A2C("MlpPolicy", "CartPole-v1")
    with pytest.raises(ValueError, match="A2C has no replay buffer"):
        model.save_replay_buffer(tmp_path / "buffer")
    with pytest.raises(ValueError, match="A2C has no replay buffer"):
        model.load_replay_buffer(tmp_path / "buffer")


# What is refused.


def test_a_file_of_another_class_is_refused(make_model, tmp_path):
    make_model().save(tmp_path / "model")
    name, other = make_model.cls.__name__, {A2C: DDPG, DDPG: TD3, TD3: A2C}[make_model.cls]
    with pytest.raises(
        ArchiveError, match=f"holds a model of {name}, not of {other.__name__}: use {name}.load or sbac.load"
    ):
        other.load(tmp_path / "model")


def test_a_missing_file_is_named_with_the_nearest(make_model, tmp_path):
    make_model().save(tmp_path / "pendulum")
    for load in (make_model.cls.load, sbac.load):
        with pytest.raises(FileNotFoundError, match=r"pendolum.*did you mean .*pendulum\.zip"):
            load(tmp_path / "pendolum")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(make_model, tmp_path, share):
    make_model().learn(20).save(tmp_path / "model", full=True)
    content = (tmp_path / "model.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(content[: int(share * len(content))])
    for load in (make_model.cls.load, sbac.load):
        with pytest.raises(ArchiveError, match=r"cut\.zip"):
            load(tmp_path / "cut")


def test_a_changed_file_is_refused(make_model, tmp_path):
    make_model().save(tmp_path / "model")
    with zipfile.ZipFile(tmp_path / "model.zip") as file:
        weight = next(info for info in file.infolist() if info.filename.startswith("policy/"))
    content = bytearray((tmp_path / "model.zip").read_bytes())
    content[weight.header_offset + 30 + len(weight.filename) + weight.file_size - 1] ^= 1
    (tmp_path / "model.zip").write_bytes(content)
    with pytest.raises(ArchiveError, match=r"model\.zip"):
        make_model.cls.load(tmp_path / "model")


def test_foreign_files_are_refused(make_model, tmp_path):
    (tmp_path / "text.zip").write_text("no zip at all")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("readme.txt", "a zip")
    stable_baselines3.PPO("MlpPolicy", "CartPole-v1", device="cpu").save(tmp_path / "peer.zip")
    for name, text in (
        ("text", "not a model file"),
        ("other", "not a model file"),
        ("peer", "another algorithm .*clip_range"),
    ):
        for load in (make_model.cls.load, sbac.load):
            with pytest.raises(ArchiveError, match=text):
                load(tmp_path / name)


def test_an_environment_with_other_spaces_is_refused(make_model, tmp_path):
    model = make_model()
    model.save(tmp_path / "model")
    other = gymnasium.make("MountainCarContinuous-v0")
    with pytest.raises(ValueError, match="another observation space") as caught:
        make_model.cls.load(tmp_path / "model", env=other)
    assert str(model.observation_space) in str(caught.value)
    assert str(other.observation_space) in str(caught.value)


# Objects of the user's own.


class OwnStochastic(StochasticActorCritic):
    pass


class OwnDeterministic(DeterministicActorCritic):
    pass


def halfway(progress_remaining: float) -> float:
    return 0.5 * progress_remaining + 0.4


@pytest.mark.parametrize(
    ("argument", "value"),
    [("gamma", lambda progress: 0.9), ("gamma", halfway), ("policy", None)],
    ids=["lambda", "function", "policy"],
)
def test_own_objects_need_permission_or_a_replacement(make_model, tmp_path, argument, value):
    cls = make_model.cls
    if argument == "policy":
        value = OwnStochastic if cls is A2C else OwnDeterministic
        model = cls(value, make_model.env_id, seed=0)
    else:
        model = make_model(**{argument: value})
    model.save(tmp_path / "model")

    with pytest.raises(ArchiveError) as caught:
        cls.load(tmp_path / "model")
    pattern = rf"argument {argument} .*custom_objects={{'{argument}': \.\.\.}}.*allow_pickle=True"
    assert re.search(pattern, str(caught.value))

    trusted = cls.load(tmp_path / "model", allow_pickle=True)
    assert same(trusted, model)
    if argument == "gamma":
        assert trusted.gamma(0.5) == value(0.5)
    replaced = cls.load(tmp_path / "model", custom_objects={argument: value})
    assert same(replaced, model)
    if argument == "policy":
        assert type(replaced.policy) is value


def test_an_own_object_within_policy_kwargs_is_named(make_model, tmp_path):
    class Wave(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(x)

    kwargs = {"net_arch": [8, 8], "activation_fn": Wave}
    model = make_model(policy_kwargs=kwargs)
    model.save(tmp_path / "model")
    with pytest.raises(ArchiveError, match=r"policy_kwargs\.activation_fn.*Wave.*custom_objects={'policy_kwargs'"):
        make_model.cls.load(tmp_path / "model")
    assert same(make_model.cls.load(tmp_path / "model", custom_objects={"policy_kwargs": kwargs}), model)
    assert same(make_model.cls.load(tmp_path / "model", allow_pickle=True), model)


# A file is never lost.


def forged(model: BaseAlgorithm, path: Path) -> Archive:
    """A model's file, to be written again with other content."""
    model.save(path)
    return read_archive(path)


@contextlib.contextmanager
def refused_at_once(text: str) -> Iterator[None]:
    """What is refused so, with less than 300 MB taken for it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    with pytest.raises(ArchiveError, match=text):
        yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


@pytest.mark.parametrize("space", ["observation_space", "action_space"])
def test_what_is_no_space_makes_no_model_also_beside_an_environment(make_model, tmp_path, space):
    model = make_model()
    model.save(tmp_path / "model")
    archive = read_archive(tmp_path / "model")
    archive.config[space], _ = encode(torch.nn.Module)
    write_archive(tmp_path / "model", archive)
    with pytest.raises(ArchiveError, match=rf"does not describe the {space}: <class .*Module.* is no space"):
        make_model.cls.load(tmp_path / "model", env="CartPole-v1")


@pytest.mark.parametrize("net_arch", [[60_000, 60_000], [100_000_000]])
def test_layers_that_a_file_does_not_hold_are_refused_before_memory_is_taken(make_model, tmp_path, net_arch):
    archive = forged(make_model(), tmp_path / "model")
    archive.config["arguments"]["policy_kwargs"], _ = encode({"net_arch": net_arch})
    write_archive(tmp_path / "model", archive)
    with refused_at_once(r"its networks need more weights than the \d+ that the file holds"):
        make_model.cls.load(tmp_path / "model")


def test_a_memory_that_a_file_does_not_hold_is_refused_likewise(tmp_path):
    archive = forged(A2C("MlpLstmPolicy", "CartPole-v1", seed=0), tmp_path / "model")
    archive.config["arguments"]["policy_kwargs"] = {"lstm_hidden_size": 20_000}
    write_archive(tmp_path / "model", archive)
    with refused_at_once(r"its networks need more weights than the \d+ that the file holds"):
        A2C.load(tmp_path / "model")


def test_spaces_that_a_file_has_no_weights_for_are_refused_likewise(tmp_path):
    archive = forged(A2C("MlpPolicy", "CartPole-v1", seed=0), tmp_path / "model")
    archive.config["observation_space"], _ = encode(gymnasium.spaces.Discrete(50_000_000))
    write_archive(tmp_path / "model", archive)
    with refused_at_once(r"its networks need more weights than the \d+ that the file holds"):
        A2C.load(tmp_path / "model")


def test_critics_that_a_file_does_not_hold_are_refused_likewise(tmp_path):
    archive = forged(TD3("MlpPolicy", "Pendulum-v1", seed=0), tmp_path / "model")
    archive.config["arguments"]["n_critics"] = 1_000_000
    write_archive(tmp_path / "model", archive)
    with refused_at_once(r"its networks need more weights than the \d+ that the file holds"):
        TD3.load(tmp_path / "model")


@pytest.mark.parametrize("name", ["n_envs", "n_workers"])
def test_environments_and_workers_without_end_are_refused(name, tmp_path):
    archive = forged(A3C("MlpPolicy", "CartPole-v1", n_workers=1, seed=0), tmp_path / "model")
    archive.config["arguments"][name] = 10**9
    write_archive(tmp_path / "model", archive)
    with refused_at_once(f"{name} is 1000000000, more than the 65536 that a file may ask for"):
        A3C.load(tmp_path / "model", env="CartPole-v1")


@pytest.mark.parametrize("why", ["an object that cannot be pickled", "a full disk"])
def test_an_earlier_file_survives_a_save_that_fails(make_model, tmp_path, monkeypatch, why):
    good = make_model(seed=0)
    good.save(tmp_path / "model")
    content = (tmp_path / "model.zip").read_bytes()

    model, error = make_model(seed=1), OSError
    if why == "a full disk":

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
    else:
        lock, error = threading.Lock(), ArchiveError
        model.gamma = lambda _: 0.9 if lock else 0.8
    with pytest.raises(error):
        model.save(tmp_path / "model")
    assert (tmp_path / "model.zip").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["model.zip"]
    assert same(make_model.cls.load(tmp_path / "model"), good)


def test_saving_changes_nothing(make_model, tmp_path):
    saved, plain = make_model(), make_model()
    saved.learn(40).save(tmp_path / "model", full=True)
    plain.learn(40)
    for model in (saved, plain):
        model.learn(40, reset_num_timesteps=False)
    assert same(saved, plain)
