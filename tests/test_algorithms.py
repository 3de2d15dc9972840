"""What holds for every algorithm: seeds, frames around `learn`, spaces, failures, schedules."""

from __future__ import annotations

import ast
import copy
import inspect
import random
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import stable_baselines3
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from torch import Tensor

import sbac
from sbac import A2C, DDPG, TD3, EnvironmentFault, NotFiniteError
from sbac.base import BaseAlgorithm
from sbac.callbacks import BaseCallback, CallbackList, EvalCallback, ProgressBarCallback
from sbac.logger import configure
from sbac.schedules import ConstantSchedule, LinearSchedule
from tests.conftest import MakeModel

# Every hyperparameter that is a float and may be a schedule.
FLOATS = {
    "A2C": ["learning_rate", "gamma", "gae_lambda", "ent_coef", "vf_coef", "max_grad_norm"],
    "DDPG": ["actor_learning_rate", "critic_learning_rate", "gamma", "tau", "max_grad_norm"],
    "TD3": [
        "actor_learning_rate",
        "critic_learning_rate",
        "gamma",
        "tau",
        "max_grad_norm",
        "target_policy_noise",
        "target_noise_clip",
    ],
}


def weights(model: BaseAlgorithm) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}


def same(a: BaseAlgorithm | dict[str, Tensor], b: BaseAlgorithm | dict[str, Tensor]) -> bool:
    """Whether two models have the same weights, bit for bit."""
    a, b = (weights(x) if isinstance(x, BaseAlgorithm) else x for x in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Task(gymnasium.Env[Any, Any]):
    """Noise for observations; what `fault` says happens at step `fault_at` of this environment's life.

    Args:
        make_model: Whose algorithm's kind of actions to take.
        fault_at: Counted from 1; 0 is never.
        fault: A reward, an observation, or an error to raise.
    """

    observation_space = spaces.Box(-1, 1, (3,), np.float32)

    def __init__(self, make_model: MakeModel, fault_at: int = 0, fault: Any = None, length: int = 7) -> None:
        is_box = make_model.cls is not A2C
        self.action_space = spaces.Box(-2, 2, (1,), np.float32) if is_box else spaces.Discrete(2)
        self.fault_at, self.fault, self.length, self.steps = fault_at, fault, length, 0

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(**kwargs)
        return self._obs(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        obs, reward = self._obs(), float(np.sum(action))
        if self.steps == self.fault_at:
            if isinstance(self.fault, Exception):
                raise self.fault
            if isinstance(self.fault, np.ndarray):
                obs = self.fault
            else:
                reward = self.fault
        return obs, reward, self.steps % self.length == 0, self.steps % (2 * self.length) == 5, {}

    def _obs(self) -> np.ndarray:
        return self.np_random.uniform(-1, 1, 3).astype(np.float32)


# Seeds.


def test_learn_within_learn_is_refused_and_the_model_is_as_it_was(make_model):
    model, whole = make_model(), make_model().learn(80)

    def learn_again(*_: object) -> None:
        if model.num_timesteps == 40:
            with pytest.raises(RuntimeError, match="learn was called while learn of the same model runs"):
                model.learn(10)

    model.learn(80, callback=learn_again)
    assert same(model, whole)
    assert (model.num_timesteps, model.n_updates) == (whole.num_timesteps, whole.n_updates)
    assert model.learn(10, reset_num_timesteps=False).num_timesteps == 90
    copied: list[BaseAlgorithm] = []
    model.learn(10, callback=lambda *_: copied.append(copy.deepcopy(model)))
    copied[0].learn(10)  # a copy is in no training


@pytest.fixture
def _three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_three_threads")
def test_threads_are_chosen_for_the_network_or_by_the_user_and_given_back(make_model, tmp_path):
    seen: list[int] = []

    def look(*_: object) -> None:
        seen.append(torch.get_num_threads())

    first, second = (make_model(n_threads=2).learn(60, callback=look) for _ in range(2))
    assert set(seen) == {2} and torch.get_num_threads() == 3
    assert first.n_updates > 5 and same(first, second)
    first.save(tmp_path / "model")
    loaded = type(first).load(tmp_path / "model", env=first.get_env())
    seen.clear()
    loaded.learn(10, callback=look)
    assert set(seen) == {2}
    seen.clear()
    make_model().learn(10, callback=look)
    assert set(seen) == {1} and torch.get_num_threads() == 3
    with pytest.raises(ValueError, match="n_threads must be a whole number, at least 1, not 0"):
        make_model(n_threads=0)


@pytest.mark.parametrize("n_envs", [1, 3])
def test_a_seed_fixes_every_weight(make_model, n_envs):
    def short() -> gymnasium.Env[Any, Any]:
        return gymnasium.make(make_model.env_id, max_episode_steps=20)

    first, second, other = (make_model(short, n_envs=n_envs, seed=seed).learn(120) for seed in (5, 5, 6))
    assert first.n_updates > 5
    assert same(first, second)
    assert not same(first, other)
    returns = [[episode["r"] for episode in model.ep_info_buffer] for model in (first, second, other)]
    assert returns[0] == returns[1] != returns[2]


def test_no_seed_means_another_run_each_time(make_model):
    assert not same(make_model(seed=None), make_model(seed=None))


def test_weights_at_the_start_depend_on_the_seed_only(make_model):
    torch.manual_seed(1)
    first = make_model(n_envs=1)
    torch.manual_seed(2)
    assert same(first, make_model(n_envs=2))


def test_environments_of_one_model_are_seeded_apart(make_model):
    model = make_model(n_envs=4, seed=0)
    model.learn(1)
    assert len(np.unique(model._obs.round(6), axis=0)) == 4


def test_global_generators_are_left_alone(make_model, tmp_path):
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()

    model = make_model(n_envs=2).learn(60)
    model.predict(model.observation_space.sample(), deterministic=False)
    sbac.evaluate_policy(model, make_model.env_id, n_eval_episodes=1, deterministic=False)
    model.save(tmp_path / "model", full=True)
    type(model).load(tmp_path / "model")

    assert random.getstate() == before[0]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[1], strict=True))
    assert torch.equal(torch.get_rng_state(), before[2])


# What goes on beside the learning changes no bit of it.


class Predicts(BaseCallback):
    def _on_step(self) -> bool:
        obs = self.model.observation_space.sample()
        self.model.predict(obs, deterministic=False)
        self.model.predict(np.stack([obs, obs]))
        return True


def with_nothing(make_model: MakeModel, folder: Path) -> BaseAlgorithm:
    return make_model(n_envs=2).learn(200)


def with_evaluation(make_model: MakeModel, folder: Path) -> BaseAlgorithm:
    env_id = make_model.env_id
    short = [lambda: gymnasium.make(env_id, max_episode_steps=20)]
    callback = CallbackList(
        [
            EvalCallback(short * 2, n_eval_episodes=3, eval_freq=7, deterministic=False, verbose=0),
            EvalCallback(short, n_eval_episodes=1, eval_freq=10, best_model_save_path=folder, verbose=0),
        ]
    )
    return make_model(n_envs=2).learn(200, callback=callback)


def with_logs(make_model: MakeModel, folder: Path) -> BaseAlgorithm:
    model = make_model(n_envs=2, verbose=1, tensorboard_log=str(folder))
    model.set_logger(configure(folder / "log", ["csv", "json", "log"]))
    return model.learn(200, log_interval=1)


def with_progress_bar(make_model: MakeModel, folder: Path) -> BaseAlgorithm:
    return make_model(n_envs=2).learn(200, progress_bar=True)


def with_predictions(make_model: MakeModel, folder: Path) -> BaseAlgorithm:
    return make_model(n_envs=2).learn(200, callback=[Predicts(), ProgressBarCallback()])


def with_saves(make_model: MakeModel, folder: Path) -> BaseAlgorithm:
    model = make_model(n_envs=2)
    return model.learn(200, callback=lambda *_: model.save(folder / "model", full=True))


@pytest.mark.parametrize(
    "run", [with_evaluation, with_logs, with_progress_bar, with_predictions, with_saves], ids=lambda run: run.__name__
)
def test_learning_does_not_notice(make_model, run, tmp_path, capsys):
    assert same(with_nothing(make_model, tmp_path), run(make_model, tmp_path))


def test_numbers_are_logged(make_model, tmp_path):
    model = make_model(n_envs=2, tensorboard_log=str(tmp_path / "events"))
    model.set_logger(configure(tmp_path, ["csv"]))
    model.learn(300, log_interval=1)
    header = (tmp_path / "progress.csv").read_text().splitlines()[0].split(",")
    common = {"rollout/ep_rew_mean", "rollout/ep_len_mean", "time/fps", "time/time_elapsed", "time/total_timesteps"}
    own = {"A2C": {"policy_loss", "value_loss", "entropy_loss", "explained_variance", "learning_rate"}}
    of_critics = {"actor_loss", "critic_loss", "q_mean", "target_mean", "td_error", "updates_per_transition"}
    expected = own.get(type(model).__name__, of_critics) | {"n_updates"}
    if not model.ep_info_buffer:
        common -= {"rollout/ep_rew_mean", "rollout/ep_len_mean"}
    assert common | {f"train/{name}" for name in expected} <= set(header)
    assert [folder.name for folder in (tmp_path / "events").iterdir()] == [f"{type(model).__name__}_1"]


def test_each_new_run_has_its_own_folder_of_event_files(make_model, tmp_path):
    model = make_model(tensorboard_log=str(tmp_path))
    name = type(model).__name__
    model.learn(20)
    model.learn(20, reset_num_timesteps=False)
    model.learn(20)
    model.learn(20, tb_log_name="other")
    model.close()
    folders = {folder.name: list(folder.iterdir()) for folder in tmp_path.iterdir()}
    assert sorted(folders) == sorted([f"{name}_1", f"{name}_2", "other_1"])
    assert all(len(files) == 1 for files in folders.values())


# How long.


@pytest.mark.parametrize(("n_envs", "asked", "run"), [(1, 1, 1), (4, 1, 4), (4, 40, 40), (4, 41, 44), (3, 50, 51)])
def test_total_timesteps_is_exact_but_for_the_last_step_of_all_environments(make_model, n_envs, asked, run):
    calls = []
    model = make_model(n_envs=n_envs).learn(asked, callback=lambda *_: calls.append(1))
    assert model.num_timesteps == run
    assert len(calls) == run // n_envs


def test_learning_for_one_step_leaves_finite_weights(make_model):
    model = make_model().learn(1)
    assert all(tensor.isfinite().all() for tensor in weights(model).values())


@pytest.mark.parametrize("wrong", [0, -5, 1.5, float("nan"), "many", None])
def test_total_timesteps_must_be_a_whole_number(make_model, wrong):
    with pytest.raises(ValueError, match="total_timesteps"):
        make_model().learn(wrong)


@pytest.mark.parametrize("stop_at", [2, 26, 40, 54])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(make_model, stop_at):
    """Steps of two environments: within a rollout and at its end, before and after learning starts."""
    whole = make_model(n_envs=2).learn(120)
    model = make_model(n_envs=2)
    model.learn(120, callback=lambda *_: model.num_timesteps < stop_at)
    assert model.num_timesteps == stop_at
    model.learn(120 - stop_at, reset_num_timesteps=False)
    assert model.num_timesteps == 120
    assert same(whole, model)


def test_a_second_run_counts_from_zero_and_begins_new_episodes(make_model):
    model = make_model().learn(30)
    updates, resets = model.n_updates, model.env.reset_count
    model.learn(10)
    assert (model.num_timesteps, model.env.reset_count) == (10, resets + 1)
    assert model.n_updates > updates
    model.learn(10, reset_num_timesteps=False)
    assert (model.num_timesteps, model.env.reset_count) == (20, resets + 1)


def test_episodes_are_counted_right(make_model):
    env = [lambda: Task(make_model, length=4), lambda: Task(make_model, length=4)]
    model = make_model(env, stats_window_size=3).learn(80)
    # Each ends by termination at its steps 4, 8, ..., 40 and by a time limit at 5, 13, ..., 37.
    assert model.episodes.count == 2 * (10 + 5)
    assert len(model.ep_info_buffer) == 3
    assert all(episode["l"] in (1, 3, 4) for episode in model.ep_info_buffer)


# Environments.


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
def test_vector_environments_of_all_autoreset_modes_train(make_model, mode):
    env = gymnasium.make_vec(
        make_model.env_id,
        num_envs=3,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": mode},
        max_episode_steps=15,
    )
    model = make_model(env).learn(150)
    assert 150 <= model.num_timesteps <= 152
    assert model.episodes.count >= 150 // 15 - 3
    assert model.n_updates > 10
    assert max(episode["l"] for episode in model.ep_info_buffer) <= 15
    assert all(tensor.isfinite().all() for tensor in weights(model).values())


def test_evaluating_in_the_training_environment_begins_new_episodes(make_model):
    model = make_model(n_envs=2)
    model.learn(50, callback=lambda *_: model.num_timesteps < 30)
    sbac.evaluate_policy(model, model.get_env(), n_eval_episodes=2)
    resets = model.env.reset_count
    model.learn(20, reset_num_timesteps=False)
    assert model.env.reset_count == resets + 1
    assert max([episode["l"] for episode in model.ep_info_buffer], default=0) <= 20


def test_a_rollout_does_not_reach_from_old_environments_into_new_ones():
    model = A2C("MlpPolicy", "CartPole-v1", n_steps=10, seed=0)
    model.learn(100, callback=lambda *_: model.num_timesteps < 13)
    assert model.rollout_buffer.pos == 3
    model.set_env("CartPole-v1")
    positions = []
    model.learn(2, reset_num_timesteps=False, callback=lambda *_: positions.append(model.rollout_buffer.pos))
    assert positions == [1, 2]


def test_predict_takes_one_observation_or_a_batch(make_model):
    model = make_model().learn(40)
    space, action_space = model.observation_space, model.action_space
    batch = np.stack([space.sample() for _ in range(5)])
    for deterministic in (True, False):
        actions, state = model.predict(batch, deterministic=deterministic)
        assert state is None
        assert actions.shape == (5, *action_space.shape)
        assert all(action in action_space for action in actions)
        one, _ = model.predict(batch[0], deterministic=deterministic)
        assert one in action_space
    actions, _ = model.predict(batch)
    singles = np.stack([model.predict(obs)[0] for obs in batch])
    assert actions == pytest.approx(singles, abs=1e-5)
    assert np.array_equal(model.predict(batch)[0], actions), "deterministic by default"


def test_stochastic_predictions_differ_where_the_policy_is_stochastic():
    model = A2C("MlpPolicy", "CartPole-v1", seed=0)
    actions = [int(model.predict(np.zeros(4, np.float32), deterministic=False)[0]) for _ in range(50)]
    assert 10 < sum(actions) < 40


@pytest.mark.parametrize("wrong", [np.zeros(7), np.zeros((2, 9)), np.zeros((1, 2, 3)), "text", None, 3.0])
def test_predict_refuses_other_shapes(make_model, wrong):
    model = make_model()
    shape = re.escape(str(model.observation_space.shape))
    with pytest.raises(ValueError, match=f"predict: the observation .*{shape}"):
        model.predict(wrong)


def test_predict_refuses_what_is_not_finite(make_model):
    model = make_model()
    with pytest.raises(NotFiniteError, match="NaN"):
        model.predict(np.full(model.observation_space.shape, np.nan, np.float32))


def test_discrete_observations_and_actions_that_do_not_start_at_zero():
    class Corridor(gymnasium.Env[Any, Any]):
        observation_space = spaces.Discrete(4, start=-2)
        action_space = spaces.Discrete(3, start=5)

        def reset(self, **kwargs: Any) -> Any:
            super().reset(**kwargs)
            return -2, {}

        def step(self, action: int) -> Any:
            assert action in self.action_space
            return int(self.np_random.integers(-2, 2)), 1.0, False, False, {}

    model = A2C("MlpPolicy", Corridor(), seed=0).learn(50)
    assert model.predict(np.int64(1))[0] in Corridor.action_space
    assert model.predict(np.array([-2, 0, 1]))[0].shape == (3,)


def test_no_environment_no_learning(make_model, tmp_path):
    make_model().save(tmp_path / "model")
    model = make_model.cls.load(tmp_path / "model")
    assert model.get_env() is None
    with pytest.raises(ValueError, match=r"set_env\(env\)"):
        model.learn(10)
    model.set_env(make_model.env_id)
    assert model.learn(10).num_timesteps == 10


def test_another_environment_must_have_the_models_spaces(make_model):
    model = make_model()
    other = gymnasium.make("MountainCarContinuous-v0")
    with pytest.raises(ValueError, match="another observation space") as caught:
        model.set_env(other)
    assert str(model.observation_space) in str(caught.value)
    assert str(other.observation_space) in str(caught.value)
    with pytest.raises(ValueError, match="1 environments at once, got 3"):
        model.set_env([lambda: gymnasium.make(make_model.env_id)] * 3)
    old = model.env
    model.learn(10)
    model.set_env(make_model.env_id)
    model.learn(10, reset_num_timesteps=False)
    assert model.env is not old
    assert model.num_timesteps == 20


def test_a_model_is_a_context_that_closes_its_environments(make_model):
    class Closable(Task):
        closed = False

        def close(self) -> None:
            type(self).closed = True

    with make_model(Closable(make_model)) as model:
        model.learn(10)
    assert Closable.closed


# Failures.


@pytest.mark.parametrize(
    ("fault", "error", "text"),
    [
        (float("nan"), NotFiniteError, "environment 1 sent the reward nan at step 21"),
        (float("-inf"), NotFiniteError, "environment 1 sent the reward -inf at step 21"),
        (np.array([0, np.nan, 0], np.float32), NotFiniteError, r"environment 1 sent an observation .* at step 21"),
        (np.zeros(4, np.float32), EnvironmentFault, r"environment 1 \(Task\) .* shape \(4,\) .* at its step 21"),
        (KeyError("wheel"), EnvironmentFault, r"environment 1 \(Task\) raised KeyError at its step 21: 'wheel'"),
    ],
)
def test_a_faulty_environment_is_named_and_leaves_the_weights_alone(make_model, fault, error, text):
    model = make_model([lambda: Task(make_model), lambda: Task(make_model, 21, fault)])
    with pytest.raises(error, match=text):
        model.learn(200)
    assert model.num_timesteps == 40

    healthy = make_model([lambda: Task(make_model)] * 2).learn(40)
    assert healthy.n_updates > 0
    assert same(model, healthy)


def test_rewards_too_large_for_a_gradient_leave_finite_weights(make_model):
    model = make_model(Task(make_model, 21, 1e30))
    with pytest.raises(NotFiniteError, match="the weights are those of before this update"):
        model.learn(500)
    assert model.num_timesteps >= 21
    assert all(tensor.isfinite().all() for tensor in weights(model).values())
    assert all(np.isfinite(model.predict(model.observation_space.sample())[0]).all() for _ in range(3))


def test_an_error_in_a_callback_ends_the_run_and_names_the_callback(make_model):
    class Broken(BaseCallback):
        closed = False

        def _on_step(self) -> bool:
            raise RuntimeError("broken")

        def close(self) -> None:
            self.closed = True

    broken = Broken()
    with pytest.raises(RuntimeError, match="broken") as caught:
        make_model().learn(10, callback=broken)
    assert "Broken._on_step at step 1" in caught.value.__notes__[0]
    assert broken.closed


# Hyperparameters.


def test_a_constant_schedule_is_the_number_itself(make_model):
    names = FLOATS[make_model.cls.__name__]
    plain = make_model(**dict.fromkeys(names, 0.5)).learn(60)
    scheduled = make_model(**dict.fromkeys(names, ConstantSchedule(0.5))).learn(60)
    assert same(plain, scheduled)


@pytest.mark.parametrize("index", range(7))
def test_every_float_may_be_a_schedule(make_model, index):
    names = FLOATS[make_model.cls.__name__]
    name = names[index % len(names)]
    asked = []

    def schedule(progress_remaining: float) -> float:
        asked.append(progress_remaining)
        return 0.25 + progress_remaining / 4

    falling = make_model(**{name: schedule})
    assert {1.0, 0.0} <= set(asked), "checked at both ends before anything is run"
    asked.clear()
    falling.learn(60)
    assert asked[-1] == pytest.approx(0.0)
    assert all(0 <= progress <= 1 for progress in asked)
    assert all(a >= b for a, b in pairwise(asked))
    assert not same(falling, make_model(**{name: 0.5}).learn(60))


def test_a_schedule_that_leaves_its_range_is_refused_at_once(make_model):
    for name in FLOATS[make_model.cls.__name__]:
        with pytest.raises(ValueError, match=f"^{name} with 0 of the progress remaining must be .*, not -0.5$"):
            make_model(**{name: LinearSchedule(0.5, -0.5)})
        with pytest.raises(ValueError, match=f"^{name} with 1 of the progress remaining must be .*, not nan$"):
            make_model(**{name: lambda progress: float("nan")})


def test_a_learning_rate_that_falls_to_zero(make_model, monkeypatch):
    model = make_model(learning_rate=LinearSchedule(1e-2, 0.0))
    rates = []

    def spy(network, step, *args):
        rates.append((model.num_timesteps, network.optimizer.param_groups[0]["lr"]))
        return step(*args)

    for network in model._trained().values():
        monkeypatch.setattr(network.optimizer, "step", partial(spy, network, network.optimizer.step))
    model.learn(100)
    assert len(rates) > 20
    assert all(rate == pytest.approx(1e-2 * (1 - steps / 100)) for steps, rate in rates)
    assert rates[-1] == (100, 0.0)


def test_an_unknown_name_is_answered_by_the_nearest(make_model):
    name = make_model.cls.__name__
    with pytest.raises(TypeError, match=f"{name} has no argument 'gama'; did you mean 'gamma'"):
        make_model(gama=0.9)
    with pytest.raises(ValueError, match=f"{name} has no policy 'MLPolicy'; did you mean 'MlpPolicy'"):
        make_model.cls("MLPolicy", make_model.env_id)
    with pytest.raises(ValueError, match=r"policy_kwargs: .* no argument 'activation'; did you mean 'activation_fn'"):
        make_model(policy_kwargs={"activation": torch.nn.ReLU})
    with pytest.raises(ValueError, match="CartPole"):
        make_model("CartPol-v1")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"gamma": 1.1}, "gamma .* at most 1, not 1.1"),
        ({"gamma": -0.1}, "gamma .* at least 0"),
        ({"gamma": float("nan")}, "gamma .* finite"),
        ({"gamma": "0.99"}, "gamma .* '0.99'"),
        ({"learning_rate": 0.0}, "learning_rate .* above 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm .* above 0"),
        ({"n_envs": 0}, "n_envs .* at least 1"),
        ({"seed": -1}, "seed .* at least 0"),
        ({"stats_window_size": 0}, "stats_window_size .* at least 1"),
        ({"device": "abacus"}, "device .* 'abacus'"),
        ({"policy_kwargs": {"net_arch": [0]}}, "net_arch"),
        ({"policy_kwargs": {"net_arch": {"pi": [8]}}}, "net_arch"),
    ],
)
def test_values_out_of_range_are_refused_with_their_name(make_model, arguments, text):
    with pytest.raises(ValueError, match=text):
        make_model(**arguments)


@pytest.mark.parametrize(
    ("cls", "arguments", "text"),
    [
        (A2C, {"n_steps": 0}, "n_steps .* at least 1"),
        (A2C, {"gae_lambda": 2}, "gae_lambda .* at most 1"),
        (A2C, {"ent_coef": -1}, "ent_coef .* at least 0"),
        (A2C, {"vf_coef": -1}, "vf_coef .* at least 0"),
        (DDPG, {"tau": 2}, "tau .* at most 1"),
        (DDPG, {"batch_size": 0}, "batch_size .* at least 1"),
        (DDPG, {"learning_starts": -1}, "learning_starts .* at least 0"),
        (DDPG, {"train_freq": 0}, "train_freq .* at least 1"),
        (DDPG, {"gradient_steps": -2}, "gradient_steps .* at least -1"),
        (DDPG, {"weight_decay": -1}, "weight_decay .* at least 0"),
        (DDPG, {"actor_learning_rate": 0}, "actor_learning_rate .* above 0"),
        (DDPG, {"critic_learning_rate": 0}, "critic_learning_rate .* above 0"),
        (DDPG, {"train_freq": (0, "episode")}, "train_freq .* at least 1"),
        (DDPG, {"train_freq": (1, "epoch")}, "'step' or 'episode', not in 'epoch'"),
        (DDPG, {"n_steps": 0}, "n_steps .* at least 1"),
        (DDPG, {"target_update_interval": 0}, "target_update_interval .* at least 1"),
        (DDPG, {"n_critics": 0}, "n_critics .* at least 1"),
        (DDPG, {"dropout": 1}, "dropout .* below 1"),
        (DDPG, {"dropout": lambda _: 0.1}, "dropout .* below 1"),
        (DDPG, {"weight_decay": lambda _: 0.1}, "weight_decay .* at least 0"),
        (DDPG, {"preset": "stable-baseline"}, "DDPG has no preset .* did you mean 'stable-baselines3'"),
        (TD3, {"tau": 2}, "tau .* at most 1"),
        (TD3, {"batch_size": 0}, "batch_size .* at least 1"),
        (TD3, {"learning_starts": -1}, "learning_starts .* at least 0"),
        (TD3, {"train_freq": 0}, "train_freq .* at least 1"),
        (TD3, {"gradient_steps": -2}, "gradient_steps .* at least -1"),
        (TD3, {"weight_decay": -1}, "weight_decay .* at least 0"),
        (TD3, {"actor_learning_rate": 0}, "actor_learning_rate .* above 0"),
        (TD3, {"policy_delay": 0}, "policy_delay .* at least 1"),
        (TD3, {"target_policy_noise": -0.1}, "target_policy_noise .* at least 0"),
        (TD3, {"target_noise_clip": -0.1}, "target_noise_clip .* at least 0"),
        (TD3, {"n_critics": 0}, "n_critics .* at least 1"),
        (TD3, {"dropout": 1}, "dropout .* below 1"),
        (TD3, {"preset": "papers"}, "TD3 has no preset 'papers'; did you mean 'paper'"),
    ],
)
def test_values_out_of_range_of_one_algorithm(cls, arguments, text):
    with pytest.raises(ValueError, match=text):
        cls("MlpPolicy", {A2C: "CartPole-v1", DDPG: "Pendulum-v1", TD3: "Pendulum-v1"}[cls], **arguments)


def test_a_subclass_may_pass_its_arguments_on(make_model):
    base: Any = make_model.cls

    class Own(base):
        def __init__(self, *args: Any, extra: int = 3, **kwargs: Any) -> None:
            self.extra = extra
            super().__init__(*args, **kwargs)

    model = Own("MlpPolicy", make_model.env_id, gamma=0.9, extra=4)
    assert (model.gamma, model.extra) == (0.9, 4)
    with pytest.raises(TypeError, match="Own has no argument 'gama'; did you mean 'gamma'"):
        Own("MlpPolicy", make_model.env_id, gama=0.9)


# Attributes.


def test_attributes_from_which_parts_are_built_refuse_other_values(make_model, tmp_path):
    model = make_model()
    given: dict[str, Any] = {"n_steps": 3, "weight_decay": 0.25, "dropout": 0.5, "layer_norm": True, "n_envs": 2}
    if make_model.cls is A2C:
        given |= {"rms_prop_eps": 1e-3, "use_rms_prop": False}
    else:
        given |= {"train_freq": 10, "buffer_size": 50, "n_critics": 3}
    loadable = {"n_steps", "train_freq", "buffer_size", "weight_decay", "rms_prop_eps"}
    model.save(tmp_path / "model")
    for copied in (
        model,
        copy.deepcopy(model),
        make_model.cls.load(tmp_path / "model"),
        make_model().load(tmp_path / "model"),
    ):
        for name, value in given.items():
            before = getattr(copied, name)
            with pytest.raises(AttributeError, match=rf"{name} is .* load\(path, {name}={value!r}\)"):
                setattr(copied, name, value)
            assert getattr(copied, name) == before
            setattr(copied, name, before)
    for name in loadable & given.keys():  # what the message promises
        assert getattr(make_model.cls.load(tmp_path / "model", **{name: given[name]}), name) == given[name]

    # Others count from the next step on.
    model.gamma, model.max_grad_norm, model.n_threads = 0.5, 3.0, 1
    if make_model.cls is not A2C:
        model.batch_size, model.tau, model.learning_starts, model.gradient_steps = 4, 0.5, 20, 3
        model.learn(30)
        assert model.n_updates == 3 * 10


def test_a_subclass_makes_its_attributes_in_any_order(make_model):
    base: Any = make_model.cls

    class Own(base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.n_steps = 7
            super().__init__(*args, **kwargs)
            self.n_steps = 2

    assert Own("MlpPolicy", make_model.env_id).n_steps == 2


# Parameters.


def test_parameters_go_out_and_in(make_model):
    model, other = make_model(seed=0).learn(60), make_model(seed=1)
    parameters = model.get_parameters()
    other.set_parameters(parameters)
    assert same(model, other)
    for name, network in model._trained().items():
        theirs = other._trained()[name].optimizer.state_dict()["state"]
        for index, state in network.optimizer.state_dict()["state"].items():
            assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(theirs[index][k])) for k, v in state.items())

    model.learn(60, reset_num_timesteps=False)
    assert not same(model, other)
    model.set_parameters({"policy": parameters["policy"]}, exact_match=False)
    assert same(model, other)


def test_parameters_are_copies_on_the_way_out_and_in(make_model):
    def flat(parameters: Any) -> list[Tensor]:
        """The weights and all that the optimizers remember."""
        states = [s for name in sorted(set(parameters) - {"policy"}) for s in parameters[name]["state"].values()]
        return [torch.as_tensor(v).clone() for group in (parameters["policy"], *states) for v in group.values()]

    def equal(a: list[Tensor], b: list[Tensor]) -> bool:
        return len(a) == len(b) and all(map(torch.equal, a, b))

    model, other = make_model(seed=0).learn(60), make_model(seed=1).learn(20)
    best = model.get_parameters()
    before = flat(best)
    assert equal(flat(model.get_parameters()), before)

    # What one model learns is nothing to the other, nor to what it was given.
    other.set_parameters(best)
    other.learn(60, reset_num_timesteps=False)
    assert equal(flat(model.get_parameters()), before) and equal(flat(best), before)
    assert not equal(flat(other.get_parameters()), before)

    # What was taken stays as it was, and brings all of it back.
    model.learn(60, reset_num_timesteps=False)
    assert equal(flat(best), before) and not equal(flat(model.get_parameters()), before)
    model.set_parameters(best)
    assert equal(flat(model.get_parameters()), before)

    # Also what others took, as torch gives it.
    states: dict[str, Any] = {"policy": model.policy.state_dict()}
    for name, network in model._trained().items():
        states[f"{name}.optimizer"] = network.optimizer.state_dict()
    other.set_parameters(states)
    other.learn(60, reset_num_timesteps=False)
    assert equal(flat(model.get_parameters()), before)


def test_parameters_that_do_not_fit_change_nothing(make_model, tmp_path):
    model = make_model(seed=0)
    before = weights(model)
    good = make_model(seed=1).get_parameters()
    name, tensor = next(iter(good["policy"].items()))
    for wrong in (
        {**good, "nonsense": {}},
        {"policy": good["policy"]},
        {**good, "policy": {**good["policy"], name: tensor[:-1]}},
        {**good, "policy": {**good["policy"], "nonsense": tensor}},
        {**good, "policy": {key: value for key, value in good["policy"].items() if key != name}},
    ):
        with pytest.raises(ValueError, match=r"missing|do not fit"):
            model.set_parameters(wrong)
        assert same(model, before)

    make_model(seed=1).save(tmp_path / "other")
    model.set_parameters(tmp_path / "other")
    assert same(model, make_model(seed=1))


# How far a reader has to walk.


def files_touched(run: Callable[[], object], package: str) -> set[str]:
    """The files of a package in which a function is called while `run` runs."""
    touched = set()

    def trace(frame: Any, event: str, _: Any) -> None:
        if event == "call" and package in (path := Path(frame.f_code.co_filename)).parts:
            touched.add(path.name)

    sys.setprofile(trace)
    try:
        run()
    finally:
        sys.setprofile(None)
    return touched


@pytest.mark.parametrize("cls", [DDPG, TD3])
def test_one_step_and_update_are_read_in_few_files(cls):
    name = cls.__name__
    model = cls("MlpPolicy", "Pendulum-v1", learning_starts=8, batch_size=8, seed=0).learn(20)

    def update() -> None:
        model._update(model.replay_buffer.sample(8))

    def step_and_update() -> None:
        obs = model._obs
        action = model._explore(obs)
        step = model.env.step(action)
        model._remember(obs, action, step)
        model._obs = step.obs
        update()

    mathematics = files_touched(update, "sbac")
    everything = files_touched(step_and_update, "sbac")
    print(f"one {name} update:", *sorted(mathematics), "| with its step, also:", *sorted(everything - mathematics))
    # What is there for speed alone, and changes no number beyond rounding: where parts of modules are, whether these
    # are still plain, and several critics at once.
    speed = {"part.py", "look.py", "ensemble.py"} if cls is TD3 else {"part.py", "look.py"}
    assert speed <= mathematics
    mathematics -= speed
    # The algorithm itself; base: present values of schedules; deterministic, perceptron: mu, Q and the way back from
    # them; trainable: the steps of weights and targets; buffers, trees: the batch. A step adds the door to the
    # environment, its adapter, what watches it, the tape of its actions, noise, and what policies take note of.
    parts = {"base.py", "deterministic.py", "perceptron.py", "trainable.py", "buffers.py", "trees.py"}
    assert mathematics == {f"{name.lower()}.py", *parts}
    assert everything - mathematics - speed == {
        "envs.py",
        "adapters.py",
        "watched.py",
        "tape.py",
        "noise.py",
        "policies.py",
    }

    peer = getattr(stable_baselines3, name)("MlpPolicy", "Pendulum-v1", learning_starts=8, batch_size=8, device="cpu")
    peer.learn(20)
    peers = files_touched(lambda: peer.train(gradient_steps=1, batch_size=8), "stable_baselines3")
    print(f"one {name} update of stable-baselines3:", *sorted(peers))
    assert len(mathematics) < len(peers)


# DDPG and TD3 are written out apart, so that each can be read alone, and must not drift.


def normalised(cls: type[BaseAlgorithm]) -> ast.ClassDef:
    """The syntax of a class, without comments and docstrings, under a common name."""
    source = textwrap.dedent(inspect.getsource(cls)).replace(cls.__name__, "Algorithm")
    (tree,) = ast.parse(source).body
    assert isinstance(tree, ast.ClassDef)
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return tree


def parts(cls: type[BaseAlgorithm]) -> dict[str, str]:
    """The functions and attributes of a class by name, as text."""
    named = {}
    for node in normalised(cls).body:
        name = node.name if isinstance(node, ast.FunctionDef) else ast.unparse(getattr(node, "target", None) or node)
        named[name] = ast.unparse(node)
    return named


def statements(cls: type[BaseAlgorithm], name: str) -> list[str]:
    """A function's arguments with their defaults, and its statements, each as one line of text."""
    (function,) = [node for node in normalised(cls).body if isinstance(node, ast.FunctionDef) and node.name == name]
    names, defaults = function.args.args, function.args.defaults
    with_default = zip(names[len(names) - len(defaults) :], defaults, strict=True)
    arguments = [f"{argument.arg} = {ast.unparse(default)}" for argument, default in with_default]
    return arguments + [" ".join(ast.unparse(statement).split()) for statement in function.body]


SHARED = {
    "policy_aliases",
    "policy",
    "_fixed",
    "_shorthands",
    "learn",
    "_explore",
    "_remember",
    "_can_learn",
    "_learn",
    "train",
    "_start_episodes",
    "action_noise",
    "learning_rate",
    "actor",
    "critic",
    "actor_target",
    "critic_target",
    "_check_spaces",
    "_record_more",
    "_buffers",
}


@pytest.mark.parametrize("name", sorted(SHARED))
def test_what_ddpg_and_td3_share_is_the_same_in_both(name):
    assert parts(DDPG)[name] == parts(TD3)[name]


def test_ddpg_and_td3_have_nothing_else_but_what_makes_them_differ():
    for cls in (DDPG, TD3):
        assert parts(cls).keys() - SHARED == {"presets", "__init__", "_update"}


def test_where_the_constructors_of_ddpg_and_td3_differ():
    ddpg, td3 = statements(DDPG, "__init__"), statements(TD3, "__init__")
    assert [line for line in ddpg if line not in td3] == [
        "buffer_size = 100000",
        "learning_starts = 128",
        "batch_size = 128",
        "tau = 0.001",
        "action_noise = 'ornstein_uhlenbeck'",
        "actor_learning_rate = 0.0001",
        "critic_learning_rate = 0.001",
        "n_critics = 1",
        "paper = {'net_arch': (400, 300), 'action_layer': None, 'final_init': 0.003}",
        "network_kwargs: dict[str, Any] = {**paper, **plain, **self.policy_kwargs}",
        "if action_noise == 'ornstein_uhlenbeck': "
        "action_noise = OrnsteinUhlenbeckActionNoise(mean=0.0, sigma=0.2, theta=0.15, dt=1.0) "
        "elif not (action_noise is None or isinstance(action_noise, ActionNoise)): raise "
        "ValueError(f\"action_noise must be an ActionNoise, 'ornstein_uhlenbeck' or None, not {action_noise!r}\")",
    ]
    assert [line for line in td3 if line not in ddpg] == [
        "buffer_size = 1000000",
        "learning_starts = 1000",
        "batch_size = 256",
        "tau = 0.005",
        "action_noise = 'normal'",
        "policy_delay = 2",
        "target_policy_noise = 0.2",
        "target_noise_clip = 0.5",
        "actor_learning_rate = 0.0003",
        "critic_learning_rate = 0.0003",
        "n_critics = 2",
        "self.policy_delay = require_whole('policy_delay', policy_delay, 1)",
        "require_number('target_policy_noise', target_policy_noise, minimum=0)",
        "require_number('target_noise_clip', target_noise_clip, minimum=0)",
        "self.target_policy_noise = target_policy_noise",
        "self.target_noise_clip = target_noise_clip",
        "network_kwargs: dict[str, Any] = {**plain, **self.policy_kwargs}",
        "if action_noise == 'normal': action_noise = NormalActionNoise(mean=0.0, sigma=0.1) "
        "elif not (action_noise is None or isinstance(action_noise, ActionNoise)): raise "
        "ValueError(f\"action_noise must be an ActionNoise, 'normal' or None, not {action_noise!r}\")",
    ]
    in_both = [line for line in ddpg if line in td3]
    assert in_both == [line for line in td3 if line in ddpg], "and what is the same is in the same order"


def test_where_the_updates_of_ddpg_and_td3_differ():
    ddpg, td3 = statements(DDPG, "_update"), statements(TD3, "_update")
    in_both = [line for line in ddpg if line in td3]
    assert in_both == [
        "actor, critic = (self.actor, self.critic)",
        "actor_target, critic_target = (self.actor_target, self.critic_target)",
        "max_grad_norm = None if self.max_grad_norm is None else self._now(self.max_grad_norm)",
        "n = len(batch.reward)",
        "q, back = critic.evaluate(batch.obs, batch.action)",
        "td_error = q - target",
        "weighted = batch.weight * td_error",
        "critic_loss = (weighted * td_error).sum() / n",
        "of_q = weighted * (2 / n)",
        "critic.descend(critic_loss, max_grad_norm, partial(back, of_q))",
    ]
    # The steps of actor and targets are the same statements, which TD3 takes at every second update.
    delayed = next(line for line in td3 if line.startswith("if n_critic_steps % self.policy_delay == 0:"))
    for line in (
        "action, back = actor.evaluate(batch.obs)",
        "actor_q, of_action = critic.action_gradient(batch.obs, action)",
        "actor_loss = -actor_q.mean()",
        "with critic.undone_on_error(): actor.descend(actor_loss, max_grad_norm, partial(back, of_action / -n))",
    ):
        assert line in ddpg
        assert line in delayed
    for line in ("critic_target.follow(critic, tau)", "actor_target.follow(actor, tau)"):
        assert line in ddpg[-2]
        assert line in delayed
