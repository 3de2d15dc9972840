"""Bad input gets one clear error that names the argument or the environment, before anything is trained or lost."""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer as PeerBuffer

from sbac import A2C, A3C, DDPG, TD3, EnvironmentFault, NotFiniteError, evaluate_policy
from sbac.buffers import ReplayBuffer
from sbac.callbacks import CheckpointCallback, EvalCallback
from sbac.envs import Spaces, make_environments
from sbac.hindsight import HerReplayBuffer
from sbac.optimization import RMSpropTFLike
from sbac.prioritized import PrioritizedReplayBuffer

TINY = {"policy_kwargs": {"net_arch": [8]}, "seed": 0}
OFF = {**TINY, "learning_starts": 8, "batch_size": 4, "buffer_size": 100}


class Scripted(gymnasium.Env[Any, Any]):
    """Sends what it is told at its third step."""

    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, **sent: Any) -> None:
        self.observation_space = sent.pop("space", spaces.Box(-1, 1, (2,), np.float32))
        self.sent = sent
        self.steps = 0

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        return self._obs(), {}

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        self.steps += 1
        sent = {"obs": self._obs(), "reward": 0.0, "terminated": False, "truncated": False}
        if self.steps == 3:
            sent.update(self.sent)
        return sent["obs"], sent["reward"], sent["terminated"], sent["truncated"], {}

    def _obs(self) -> Any:
        discrete = isinstance(self.observation_space, spaces.Discrete)
        return int(self.observation_space.start) if discrete else np.zeros(2, np.float32)


@pytest.mark.parametrize(
    ("sent", "parts"),
    [
        ({"reward": "a"}, ["reward 'a'"]),
        ({"reward": np.array([1.0])}, ["reward array([1.])"]),
        ({"terminated": "no"}, ["terminated 'no'"]),
        ({"truncated": None}, ["truncated None"]),
    ],
)
def test_an_environment_that_sends_no_number_or_flag_is_named(sent: dict[str, Any], parts: list[str]) -> None:
    door = make_environments([Scripted, lambda: Scripted(**sent)])
    door.reset()
    with pytest.raises(EnvironmentFault) as caught:
        for _ in range(3):
            door.step(np.zeros((2, 1)))
    for part in ["environment 1 (Scripted)", "its step 3", *parts]:
        assert part in str(caught.value)


@pytest.mark.parametrize("sent", [1, 6, -1])
def test_a_discrete_observation_outside_its_space_is_named(sent: int) -> None:
    space = spaces.Discrete(4, start=2)
    model = A2C("MlpPolicy", lambda: Scripted(space=space, obs=sent), **TINY)
    with pytest.raises(EnvironmentFault, match=rf"environment 0 sent the observation {sent} at step 3.*from 2 to 5"):
        model.learn(20)
    with pytest.raises(ValueError, match=r"whole numbers from 2 to 5"):
        model.predict(sent)
    with pytest.raises(ValueError, match=r"whole numbers from 2 to 5"):
        model.predict(2.5)
    model.predict(5)


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (np.array([300, 7]), "holds 300, which would become 44 as uint8"),
        (np.array([7, -1]), "holds -1, which would become 255 as uint8"),
        (np.array([[3.0, 4.0], [0.0, 0.9]]), r"holds 0.9, which would become 0 as uint8; .*Box\(0, 255.*not scaled"),
        ([0.5, 0.5], "holds 0.5"),
    ],
)
@pytest.mark.parametrize("is_part", [False, True])
def test_an_observation_that_its_space_cannot_hold_is_named(sent: Any, message: str, is_part: bool) -> None:
    space = spaces.Box(0, 255, (2,), np.uint8)
    known = Spaces(spaces.Dict({"a": space}) if is_part else space, spaces.Discrete(2), 1)
    model = A2C("auto", known, **TINY)

    def predict(obs: Any) -> Any:
        return model.predict({"a": obs} if is_part else obs)[0]

    with pytest.raises(ValueError, match=f"predict: the observation.* {message}"):
        predict(sent)
    with pytest.raises(NotFiniteError, match="holds NaN or infinity"):
        predict([np.nan, 1.0])
    expected = predict(np.array([3, 255], np.uint8))
    for same in (np.array([3, 255]), np.array([3.0, 255.0]), [3, 255]):
        np.testing.assert_array_equal(predict(same), expected)


def test_what_reset_returns_is_not_an_observation() -> None:
    model = A2C("MlpPolicy", "CartPole-v1", **TINY)
    with pytest.raises(ValueError, match="pair of observation and info"):
        model.predict(model.get_env().reset())


def test_other_spaces_are_named_with_both_before_anything_runs(tmp_path: Path) -> None:
    DDPG("MlpPolicy", "Pendulum-v1", **OFF).save(tmp_path / "model")
    for act in (
        lambda: DDPG.load(tmp_path / "model", env="CartPole-v1"),
        lambda: evaluate_policy(DDPG.load(tmp_path / "model"), "CartPole-v1", 1),
    ):
        with pytest.raises(ValueError) as caught:
            act()
        assert "(3,), float32" in str(caught.value)
        assert "(4,), float32" in str(caught.value)
    model = A2C("MlpPolicy", "CartPole-v1", **TINY)
    with pytest.raises(ValueError, match=r"another observation space"):
        model.learn(100, callback=EvalCallback("Pendulum-v1", eval_freq=10, verbose=0))
    assert model.num_timesteps == 0


@pytest.mark.parametrize(
    "space", [spaces.Box(-1, 1, (0,), np.float32), spaces.Box(-1, 1, (3, 0), np.float32), spaces.Dict({})], ids=str
)
@pytest.mark.parametrize("cls", [A2C, A3C, DDPG, TD3])
def test_a_space_with_nothing_in_it_is_named(cls: Any, space: spaces.Space[Any]) -> None:
    class Empty(Scripted):
        def __init__(self, of: str) -> None:
            super().__init__(**({"space": space} if of == "observation" else {}))
            if of == "action":
                self.action_space = space

    there = re.escape(f"and there is nothing in {space}")
    with pytest.raises(ValueError, match=f"{cls.__name__} needs something to observe, {there}"):
        cls("auto", lambda: Empty("observation"))
    with pytest.raises(ValueError, match=f"{cls.__name__} needs something to choose in each action, {there}"):
        cls("MlpPolicy", lambda: Empty("action"))


def test_an_empty_part_of_an_action_is_named_and_one_of_an_observation_does_no_harm() -> None:
    parts = {"a": spaces.Box(-1, 1, (2,), np.float32), "b": spaces.Box(-1, 1, (0,), np.float32)}

    class Parts(gymnasium.Env[Any, Any]):
        observation_space = spaces.Dict(parts)

        def __init__(self, action_space: spaces.Space[Any]) -> None:
            self.action_space = action_space

        def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
            return self.observation_space.sample(), {}

        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            return self.observation_space.sample(), 0.0, False, False, {}

    assert A2C("auto", lambda: Parts(spaces.Discrete(2)), **TINY).learn(40).num_timesteps == 40
    assert TD3("auto", lambda: Parts(parts["a"]), **OFF).learn(40).num_timesteps == 40
    for space in (spaces.Dict(parts), spaces.Dict(a=parts["a"], b=spaces.Tuple([]))):
        with pytest.raises(ValueError, match=r"to choose in each action, and there is nothing in .* in Dict"):
            A2C("auto", lambda space=space: Parts(space))


@pytest.mark.parametrize("cls", [DDPG, TD3])
def test_policies_that_remember_are_said_to_be_of_others(cls: Any) -> None:
    with pytest.raises(ValueError, match=r"has no policy 'MlpLstmPolicy'.*with an LSTM are for A2C and A3C"):
        cls("MlpLstmPolicy", "Pendulum-v1")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"policy": None}, "policy must be"),
        ({"policy": 5}, "policy must be"),
        ({"policy_kwargs": "foo"}, "policy_kwargs must be a dict"),
        ({"verbose": "abc"}, "verbose"),
        ({"tensorboard_log": 3}, "tensorboard_log"),
        ({"device": [1, 2]}, "device"),
        ({"device": "gpu9"}, "device"),
        ({"seed": -1}, "seed"),
        ({"gamma": lambda remaining: 3 * remaining}, "gamma"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"max_grad_norm": 0}, "max_grad_norm"),
        ({"weight_decay": lambda remaining: remaining}, "weight_decay"),
        ({"dropout": 1.0}, "dropout"),
        ({"stats_window_size": 0}, "stats_window_size"),
        ({"n_envs": 0}, "n_envs"),
    ],
)
@pytest.mark.parametrize(("cls", "env"), [(A2C, "CartPole-v1"), (DDPG, "Pendulum-v1"), (TD3, "Pendulum-v1")])
def test_each_bad_argument_is_named(cls: Any, env: str, arguments: dict[str, Any], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        cls(**{"policy": "MlpPolicy", "env": env, **arguments})


class Extended(ReplayBuffer):
    def __init__(self, *args: Any, colour: str = "red", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.colour = colour


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"class": "HerReplayBuffer"}, "{0}_class must be {1} or a class derived from it, not 'HerReplayBuffer'"),
        ({"class": dict}, "{0}_class must be {1} or a class derived from it, not builtins.dict"),
        ({"class": PeerBuffer}, "not stable_baselines3.common.buffers.ReplayBuffer"),
        ({"class": lambda *args, **kwargs: None}, "{0}_class must be {1} or a class derived from it, not <function"),
        ({"kwargs": "n_envs=2"}, "{0}_kwargs must be a dict of {1}'s further arguments, not 'n_envs=2'"),
        ({"kwargs": [("n_envs", 2)]}, "{0}_kwargs must be a dict"),
        ({"kwargs": {"n_envs": 2}}, "{0}_kwargs: 'n_envs' of {1} is set by the model: leave it out"),
        ({"kwargs": {"alpha": 1}}, "{1} has no argument 'alpha'; it has none beyond those that the model sets"),
    ],
)
@pytest.mark.parametrize(
    ("cls", "env", "part", "base"),
    [
        (A2C, "CartPole-v1", "rollout_buffer", "RolloutBuffer"),
        (DDPG, "Pendulum-v1", "replay_buffer", "ReplayBuffer"),
        (TD3, "Pendulum-v1", "replay_buffer", "ReplayBuffer"),
    ],
)
def test_a_wrong_buffer_is_named(
    cls: Any, env: str, part: str, base: str, arguments: dict[str, Any], text: str
) -> None:
    given = {f"{part}_{name}": value for name, value in arguments.items()}
    with pytest.raises(ValueError, match=re.escape(text.format(part, base))):
        cls("MlpPolicy", env, **given)


@pytest.mark.parametrize("cls", [DDPG, TD3])
def test_a_misspelt_argument_of_a_buffer_names_the_nearest(cls: Any) -> None:
    def make(**arguments: Any) -> Any:
        return cls("MlpPolicy", "Pendulum-v1", **OFF, **arguments)

    with pytest.raises(ValueError, match="PrioritizedReplayBuffer has no argument 'betta'; did you mean 'beta'"):
        make(replay_buffer_class=PrioritizedReplayBuffer, replay_buffer_kwargs={"betta": 0.5})
    with pytest.raises(ValueError, match=r"HerReplayBuffer has no argument 'n_sample_goals'.*'n_sampled_goal'"):
        make(replay_buffer_class=HerReplayBuffer, replay_buffer_kwargs={"n_sample_goals": 4})
    with pytest.raises(ValueError, match="Extended has no argument 'color'; did you mean 'colour'"):
        make(replay_buffer_class=Extended, replay_buffer_kwargs={"color": "blue"})
    model = make(replay_buffer_class=Extended, replay_buffer_kwargs={"colour": "blue"})
    assert model.replay_buffer.colour == "blue"
    model = make(replay_buffer_class=None, replay_buffer_kwargs=None)
    assert type(model.replay_buffer) is model.replay_buffer_class is ReplayBuffer


def test_a_device_that_is_not_there_is_named() -> None:
    if torch.cuda.is_available():
        A2C("MlpPolicy", "CartPole-v1", device="cuda")
    else:
        with pytest.raises(ValueError, match=r"device must be .* not 'cuda'"):
            A2C("MlpPolicy", "CartPole-v1", device="cuda")


def test_progress_ends_at_zero_although_the_last_step_goes_beyond() -> None:
    seen: list[float] = []

    def rate(remaining: float) -> float:
        seen.append(remaining)
        return 1e-3 * math.sqrt(remaining)

    model = A2C("MlpPolicy", "CartPole-v1", n_envs=8, learning_rate=rate, **TINY).learn(100)
    assert model.num_timesteps == 104
    assert min(seen) == 0.0


def test_evaluating_in_the_training_environments_cuts_their_episodes_cleanly() -> None:
    def meddle(locals_: dict[str, Any], globals_: dict[str, Any]) -> bool:
        model = locals_["self"]
        if model.num_timesteps == 55:
            evaluate_policy(model, model.get_env(), n_eval_episodes=1)
        return True

    model = DDPG("MlpPolicy", "Pendulum-v1", **OFF).learn(100, callback=meddle)
    batch = model.replay_buffer.sample(2000)
    # Pendulum's angular velocity changes by at most 0.05 * (15 + 3 * 2) a step; a false successor jumps.
    jumps = (batch.successor[:, 2] - batch.obs[:, 2]).abs().max()
    assert jumps <= 1.06
    assert model.num_timesteps == 100


def test_a_new_run_forgets_the_statistics_of_the_last() -> None:
    model = A2C("MlpPolicy", "CartPole-v1", **TINY).learn(200)
    assert model.ep_info_buffer
    model.learn(1)
    assert not model.ep_info_buffer


def test_another_run_name_is_another_folder(tmp_path: Path) -> None:
    model = A2C("MlpPolicy", "CartPole-v1", tensorboard_log=str(tmp_path), **TINY)
    model.learn(10, tb_log_name="first")
    model.learn(10, tb_log_name="second", reset_num_timesteps=False)
    model.learn(10, tb_log_name="second", reset_num_timesteps=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first_1", "second_1"]


def test_epsilon_reaches_the_optimizer_of_ones_own_choice() -> None:
    chosen = {"net_arch": [8], "optimizer_class": RMSpropTFLike}
    model = A2C("MlpPolicy", "CartPole-v1", rms_prop_eps=0.5, policy_kwargs=chosen)
    assert model.policy.optimizer.param_groups[0]["eps"] == 0.5


def test_custom_objects_of_other_algorithms_are_ignored(tmp_path: Path) -> None:
    A2C("MlpPolicy", "CartPole-v1", **TINY).save(tmp_path / "model")
    model = A2C.load(tmp_path / "model", custom_objects={"clip_range": 0.1, "gamma": 0.5})
    assert model.gamma == 0.5


@pytest.mark.parametrize("cls", [DDPG, TD3])
def test_a_run_too_short_to_learn_anything_says_so(cls: Any) -> None:
    model = cls("MlpPolicy", "Pendulum-v1", **{**OFF, "learning_starts": 50})
    with pytest.warns(UserWarning, match=r"nothing will be learned.* 50 transitions \(learning_starts\).* be 50"):
        model.learn(50)
    assert model.n_updates == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(1, reset_num_timesteps=False)  # the buffer holds enough by now
    assert model.n_updates == 1


@pytest.mark.parametrize("cls", [DDPG, TD3])
def test_a_run_shorter_than_its_train_freq_is_warned_of(cls: Any) -> None:
    model = cls("MlpPolicy", "Pendulum-v1", learning_starts=10, train_freq=50, n_envs=2)
    with pytest.warns(UserWarning, match=r"is due 100 transitions after learning_starts \(train_freq\).* be 60"):
        model.learn(60)
    assert model.n_updates == 0


@pytest.mark.parametrize("cls", [DDPG, TD3])
@pytest.mark.parametrize("buffer", [ReplayBuffer, PrioritizedReplayBuffer])
def test_transitions_as_stable_baselines_adds_them_are_answered(cls: Any, buffer: type[ReplayBuffer]) -> None:
    model = cls("MlpPolicy", "Pendulum-v1", replay_buffer_class=buffer)
    obs = np.zeros((1, 3), np.float32)
    with pytest.raises(TypeError, match=r"takes \(obs, action, step\).*6 arguments.*sbac.load_demonstrations\(model"):
        model.replay_buffer.add(obs, obs, np.zeros((1, 1)), np.zeros(1), np.zeros(1), [{}])
    assert model.replay_buffer.size() == 0


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        *((cls, name) for cls in (A2C, A3C, DDPG, TD3) for name in ("layer_norm", "normalize_obs", "normalize_reward")),
        *((cls, name) for cls in (A2C, A3C) for name in ("use_rms_prop", "normalize_advantage")),
    ],
)
def test_what_is_true_or_false_is_no_word(cls: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be True or False, not 'no'"):
        cls("MlpPolicy", "Pendulum-v1", **{name: "no"})


@pytest.mark.parametrize("cls", [DDPG, TD3])
def test_an_update_that_fails_half_way_is_taken_back(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = cls("MlpPolicy", "Pendulum-v1", **OFF).learn(20)
    if cls is TD3 and model.n_updates % 2 == 0:
        model.train(1)  # the next update is one of the actor too
    before = {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}
    monkeypatch.setattr(model.critic, "action_gradient", lambda obs, action: (action.sum(1), action * float("nan")))
    with pytest.raises(NotFiniteError, match="Actor"):
        model.train(1)
    after = model.policy.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_arguments_of_an_optimizer_are_a_dict() -> None:
    with pytest.raises(ValueError, match="optimizer_kwargs must be a dict"):
        DDPG("MlpPolicy", "Pendulum-v1", policy_kwargs={"optimizer_kwargs": 3})
    assert DDPG("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": []}).learn(5).num_timesteps == 5


@pytest.mark.parametrize("cls", [DDPG, TD3])
def test_the_learning_rate_can_be_set_later(cls: Any) -> None:
    model = cls("MlpPolicy", "Pendulum-v1", **OFF)
    model.learning_rate = 1e-5
    assert model.actor_learning_rate == model.critic_learning_rate == model.learning_rate == 1e-5
    with pytest.raises(ValueError, match="learning_rate"):
        model.learning_rate = -1


def test_a_checkpoint_may_bring_its_replay_buffer_as_a_file_of_its_own(tmp_path: Path) -> None:
    callback = CheckpointCallback(50, tmp_path, name_prefix="run", save_replay_buffer=True)
    DDPG("MlpPolicy", "Pendulum-v1", **OFF).learn(60, callback=callback)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run_50_steps.zip", "run_replay_buffer_50_steps.zip"]
    model = DDPG("MlpPolicy", "Pendulum-v1", **OFF)
    model.load_replay_buffer(tmp_path / "run_replay_buffer_50_steps")
    assert model.replay_buffer.size() == 50
