"""Callbacks: who is called when, what stops training, what is written, and that learning does not notice."""

from __future__ import annotations

import io
import os
import re
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from sbac import A2C
from sbac.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    ConvertCallback,
    EvalCallback,
    EventCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
    MaybeCallback,
    ProgressBarCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
    make_callback,
)
from sbac.envs import make_environments
from sbac.evaluation import Episodes, evaluation_seed
from sbac.logger import configure


class Bandit(gymnasium.Env[np.ndarray, Any]):
    """Episodes of two steps, each rewarded with the action; succeeded when the action is 1."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Discrete(10)

    def __init__(self) -> None:
        self.now, self.closed = 0, False
        self.seeds: list[int | None] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        self.now = 0
        self.seeds.append(seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.now += 1
        ended = self.now == 2
        return (
            np.zeros(1, np.float32),
            float(action),
            ended,
            False,
            {"is_success": action == 1} if ended else {},
        )

    def close(self) -> None:
        self.closed = True


class Model:
    """As much of an algorithm as callbacks see; it always takes `action`."""

    def __init__(self, n_envs: int = 1, seed: int | None = None, action: int = 0) -> None:
        self.n_envs, self.seed, self.action = n_envs, seed, action
        self.env = make_environments([Bandit] * n_envs)
        self.observation_space, self.action_space = self.env.observation_space, self.env.action_space
        self.logger = configure(None, [])
        self.num_timesteps = self._total_timesteps = 0
        self.ep_info_buffer: deque[dict[str, float]] = deque(maxlen=100)
        self.saved: list[tuple[Path, bool]] = []
        self.dumped: list[int] = []

    def get_env(self) -> Any:
        return self.env.env

    def predict(self, observation: np.ndarray, **kwargs: Any) -> tuple[np.ndarray, None]:
        return np.full(len(observation), self.action), None

    def save(self, path: Path, full: bool = False) -> None:
        path.touch()
        self.saved.append((path, full))

    def _defer(self, function: Callable[[], None]) -> None:
        function()

    def _dump_logs(self) -> None:
        self.dumped.append(self.num_timesteps)

    def learn(
        self,
        callback: MaybeCallback,
        steps: int,
        actions: dict[int, int] | None = None,
        dones: Callable[[int], list[bool]] | None = None,
        progress_bar: bool = False,
    ) -> int:
        """Vector steps in rollouts of two; `actions` says from which call on which action is the policy's.

        Returns the number of steps made.
        """
        made = 0
        self._total_timesteps = self.num_timesteps + steps * self.n_envs
        one: Any = make_callback(callback, progress_bar)
        one.init_callback(self)
        try:
            one.on_training_start({"total": steps}, globals())
            for made in range(1, steps + 1):
                if made % 2 == 1:
                    one.on_rollout_start()
                self.action = (actions or {}).get(made, self.action)
                self.num_timesteps += self.n_envs
                one.update_locals({"dones": dones(made) if dones else [False] * self.n_envs, "made": made})
                if not one.on_step():
                    break
                if made % 2 == 0:
                    one.on_rollout_end()
            one.on_training_end()
        finally:
            one.close()
        return made


class Recorder(BaseCallback):
    """Writes down its hooks; answers `answer(n_calls)`."""

    def __init__(self, name: str = "", book: list[str] | None = None, answer: Callable[[int], Any] | None = None):
        super().__init__()
        self.name, self.answer = name, answer
        self.book: list[str] = [] if book is None else book

    def _init_callback(self) -> None:
        self.book.append(self.name + "init")

    def _on_training_start(self) -> None:
        self.book.append(self.name + "start")

    def _on_rollout_start(self) -> None:
        self.book.append(self.name + "(")

    def _on_step(self) -> Any:
        self.book.append(self.name + str(self.num_timesteps))
        return True if self.answer is None else self.answer(self.n_calls)

    def _on_rollout_end(self) -> None:
        self.book.append(self.name + ")")

    def _on_training_end(self) -> None:
        self.book.append(self.name + "end")


# The frame.


def test_hooks_come_in_order_and_are_counted() -> None:
    callback = Recorder()
    Model(n_envs=3).learn(callback, 3)
    assert callback.book == ["init", "start", "(", "3", "6", ")", "(", "9", "end"]
    assert (callback.n_calls, callback.num_timesteps) == (3, 9)
    assert callback.locals["made"] == 3 and callback.locals["total"] == 3
    assert callback.globals is globals()


def test_a_callback_sees_the_model_its_logger_and_its_environments() -> None:
    model, callback = Model(), BaseCallback()
    watched: Any = model
    model.learn(callback, 1)
    assert callback.model is watched
    assert callback.logger is model.logger
    assert callback.training_env is model.env.env
    assert callback.parent is None and callback.verbose == 0


def test_nested_lists_call_everyone_in_order_also_where_one_stops() -> None:
    book: list[str] = []
    first = Recorder("a", book, answer=lambda n: n < 2)
    rest = [Recorder("b", book), CallbackList([Recorder("c", book)])]
    seen: list[int] = []

    def function(locals_: dict[str, Any], globals_: dict[str, Any]) -> None:
        seen.append(locals_["made"])

    assert Model().learn([first, [rest, function], None], 10) == 2
    assert book[:6] == ["ainit", "binit", "cinit", "astart", "bstart", "cstart"]
    assert book[6:] == ["a(", "b(", "c(", "a1", "b1", "c1", "a2", "b2", "c2", "aend", "bend", "cend"]
    assert seen == [1, 2]


@pytest.mark.parametrize(("answer", "steps"), [(None, 5), (True, 5), (1, 5), (np.True_, 5), (False, 1), (0, 1)])
def test_functions_stop_training_by_returning_false(answer: Any, steps: int) -> None:
    assert Model().learn(lambda locals_, globals_: answer, 5) == steps


def test_a_forgotten_return_goes_on_and_is_told_once() -> None:
    class Forgetful(BaseCallback):
        def _on_step(self) -> None:
            pass

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert Model().learn([Forgetful(), lambda locals_, globals_: None], 5) == 5
    assert [str(warning.message) for warning in caught] == [
        "Forgetful._on_step returned None, taken for True; return True or False"
    ]


def test_all_are_asked_whether_to_go_on_while_no_step_is_told_of() -> None:
    asked: list[object] = []

    class Waiting(BaseCallback):
        def __init__(self, answer: bool | None) -> None:
            super().__init__()
            self.answer = answer

        def _on_idle(self) -> bool | None:
            asked.append(self.answer)
            return self.answer

    assert make_callback([BaseCallback(), Waiting(True)]).on_idle()
    assert asked == [True]
    assert not make_callback([Waiting(False), EveryNTimesteps(1, [Waiting(True)])]).on_idle()
    assert asked == [True, False, True]
    with pytest.warns(UserWarning, match=r"Waiting\._on_idle returned None, taken for True"):
        assert make_callback(Waiting(None)).on_idle()


@pytest.mark.parametrize("hook", ["_init_callback", "_on_training_start", "_on_rollout_start", "_on_rollout_end"])
def test_errors_pass_through_with_the_innermost_callback_and_the_step(hook: str) -> None:
    class Broken(BaseCallback): ...

    def fail(self: BaseCallback) -> None:
        raise KeyError("mine")

    fail.__name__ = hook
    setattr(Broken, hook, fail)
    with pytest.raises(KeyError, match="mine") as caught:
        Model().learn([BaseCallback(), EveryNTimesteps(1, [Broken()])], 4)
    step = 2 if hook == "_on_rollout_end" else 0
    assert caught.value.__notes__ == [f"raised by callback Broken.{hook} at step {step}"]


def test_an_error_in_a_function_is_noted_too() -> None:
    def fails_at_three(locals_: dict[str, Any], globals_: dict[str, Any]) -> None:
        if locals_["made"] == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        Model().learn([[fails_at_three]], 5)
    assert caught.value.__notes__ == ["raised by callback ConvertCallback._on_step at step 3"]


def test_close_reaches_everyone_also_after_an_error() -> None:
    closed: list[str] = []

    class Closing(BaseCallback):
        def close(self) -> None:
            closed.append("closed")

        def _on_step(self) -> bool:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        Model().learn([EveryNTimesteps(1, Closing())], 2)
    assert closed == ["closed"]


def test_make_callback_takes_what_users_pass_and_refuses_the_rest() -> None:
    callback = BaseCallback()
    assert make_callback(callback) is callback
    assert isinstance(make_callback(print), ConvertCallback)
    assert isinstance(make_callback(None), CallbackList)
    with_bar = make_callback(callback, progress_bar=True)
    assert isinstance(with_bar, CallbackList) and with_bar.callbacks[0] is callback
    assert isinstance(with_bar.callbacks[1], ProgressBarCallback)
    wrong: Any
    for wrong in (EvalCallback, 3, [3]):
        with pytest.raises(TypeError, match="callback must be a BaseCallback"):
            make_callback(wrong)


# Events.


@pytest.mark.parametrize(
    ("n_envs", "start", "expected"),
    [(1, 0, [4, 8, 12]), (3, 0, [6, 9, 12]), (1, 5, [8, 12, 16]), (4, 0, [4, 8, 12, 16, 20, 24])],
)
def test_every_n_timesteps_at_multiples_however_it_starts(n_envs: int, start: int, expected: list[int]) -> None:
    child = Recorder()
    model = Model(n_envs)
    model.num_timesteps = start
    model.learn(EveryNTimesteps(4, child), (expected[-1] - start) // n_envs)
    assert [int(entry) for entry in child.book if entry.isdigit()] == expected
    assert isinstance(child.parent, EveryNTimesteps)


def test_every_n_timesteps_passes_on_a_stop_and_refuses_zero() -> None:
    assert Model().learn(EveryNTimesteps(3, lambda locals_, globals_: False), 10) == 3
    with pytest.raises(ValueError, match="n_steps must be a whole number, at least 1, not 0"):
        EveryNTimesteps(0, None)


def test_log_every_n_timesteps() -> None:
    model = Model(n_envs=2)
    model.learn(LogEveryNTimesteps(4), 6)
    assert model.dumped == [4, 8, 12]


def test_a_callback_with_an_event_of_its_own() -> None:
    class EveryOther(EventCallback):
        def _on_step(self) -> bool:
            return self.n_calls % 2 == 1 or self._on_event()

    child = Recorder(answer=lambda n: n < 2)
    assert Model().learn(EveryOther(child), 10) == 4
    assert Model().learn(EveryOther(), 5) == 5


def test_checkpoints_are_full_and_named_after_the_step(tmp_path: Path) -> None:
    model = Model(n_envs=4)
    model.learn(CheckpointCallback(2, tmp_path / "a" / "b", name_prefix="mine", save_replay_buffer=True), 5)
    assert model.saved == [(tmp_path / "a" / "b" / f"mine_{step}_steps.zip", True) for step in (8, 16)]
    with pytest.raises(ValueError, match="save_freq must be a whole number, at least 1, not 0"):
        CheckpointCallback(0, tmp_path)


def test_checkpoints_come_with_the_statistics_of_a_vec_normalize_where_asked_for(tmp_path: Path) -> None:
    vec_env = pytest.importorskip("stable_baselines3.common.vec_env")
    env = vec_env.VecNormalize(vec_env.DummyVecEnv([Bandit]))
    callback = CheckpointCallback(2, tmp_path, name_prefix="mine", save_vecnormalize=True, keep_last=1)
    A2C("MlpPolicy", env, seed=0).learn(5, callback=callback)
    assert [path.name for path in tmp_path.glob("*.pkl")] == ["mine_vecnormalize_4_steps.pkl"]
    saved = vec_env.VecNormalize.load(tmp_path / "mine_vecnormalize_4_steps.pkl", vec_env.DummyVecEnv([Bandit]))
    assert 0 < saved.obs_rms.count < env.obs_rms.count
    A2C("MlpPolicy", Bandit, seed=0).learn(
        5, callback=CheckpointCallback(2, tmp_path / "plain", save_vecnormalize=True)
    )
    assert not list((tmp_path / "plain").glob("*.pkl"))


# Evaluation.


def test_evaluation_logs_writes_and_keeps_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, best, after = Model(n_envs=2), Recorder(), Recorder()
    rows: list[dict[str, Any]] = []
    dump = model.logger.dump

    def remember_and_dump(step: int) -> None:
        rows.append({**model.logger.name_to_value, "step": step})
        dump(step)

    monkeypatch.setattr(model.logger, "dump", remember_and_dump)
    callback = EvalCallback(
        Bandit(),
        best,
        after,
        n_eval_episodes=3,
        eval_freq=2,
        log_path=tmp_path,
        best_model_save_path=tmp_path / "b",
    )
    model.learn(callback, 7, actions={1: 1, 3: 3, 5: 2})

    assert [(row["step"], row["eval/mean_reward"], row["eval/success_rate"]) for row in rows] == [
        (4, 2, 1),
        (8, 6, 0),
        (12, 4, 0),
    ]
    assert all(row["eval/mean_ep_length"] == 2 and row["time/total_timesteps"] == row["step"] for row in rows)
    assert (callback.best_mean_reward, callback.last_mean_reward) == (6, 4)
    assert model.saved == [(tmp_path / "b" / "best_model.zip", False)] * 2
    assert [entry for entry in best.book if entry.isdigit()] == ["4", "8"]
    assert [entry for entry in after.book if entry.isdigit()] == ["4", "8", "12"]
    assert best.locals["made"] == 7  # kept up to date as well
    with np.load(tmp_path / "evaluations.npz") as file:
        assert file["timesteps"].tolist() == [4, 8, 12]
        assert file["results"].tolist() == [[2] * 3, [6] * 3, [4] * 3]
        assert file["ep_lengths"].tolist() == [[2] * 3] * 3
        assert file["successes"].tolist() == [[1] * 3, [0] * 3, [0] * 3]
    assert "Evaluation at step 8: return 6.00 +/- 0.00, episode length 2.0" in capsys.readouterr().out


def test_a_resumed_training_continues_the_file_and_the_best(tmp_path: Path) -> None:
    def evaluate(start: int, steps: int, action: int, n_eval_episodes: int = 2) -> tuple[Model, EvalCallback]:
        model = Model(action=action)
        model.num_timesteps = start
        callback = EvalCallback(
            Bandit(), None, None, n_eval_episodes, 2, tmp_path, best_model_save_path=tmp_path, verbose=0
        )
        model.learn(callback, steps)
        return model, callback

    evaluate(0, 6, action=3)  # at 2, 4, 6
    model, callback = evaluate(4, 4, action=2)  # from a checkpoint at 4: again 6, then 8
    with np.load(tmp_path / "evaluations.npz") as file:
        assert file["timesteps"].tolist() == [2, 4, 6, 8]
        assert file["results"][:, 0].tolist() == [6, 6, 4, 4]
    assert callback.best_mean_reward == 6 and model.saved == []

    with pytest.raises(ValueError, match="evaluations of 5 episodes cannot continue"):
        evaluate(8, 2, action=1, n_eval_episodes=5)

    model, _ = evaluate(0, 2, action=1)  # a new run begins a new file
    with np.load(tmp_path / "evaluations.npz") as file:
        assert file["timesteps"].tolist() == [2]
    assert len(model.saved) == 1


def test_without_successes_none_are_written(tmp_path: Path) -> None:
    class Silent(gymnasium.Wrapper[Any, Any, Any, Any]):
        def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
            return (*self.env.step(action)[:4], {})

    model = Model()
    model.learn(EvalCallback(Silent(Bandit()), eval_freq=1, log_path=tmp_path, verbose=0), 1)
    assert set(np.load(tmp_path / "evaluations.npz")) == {"timesteps", "results", "ep_lengths"}


def test_each_evaluation_is_seeded_by_seed_and_step_apart_from_training() -> None:
    def seeds(seed: int | None, start: int = 0) -> list[int | None]:
        env, model = Bandit(), Model(seed=seed)
        model.num_timesteps = start
        model.learn(EvalCallback(env, n_eval_episodes=1, eval_freq=1, verbose=0), 3)
        return env.seeds[::2]  # after each evaluation's only episode, the environment resets itself

    seven = seeds(7)
    assert len({*seven, 7}) == 4 and None not in seven
    assert seeds(7, start=1)[:2] == seven[1:], "wherever the run was resumed"
    assert not set(seeds(8)) & set(seven)
    assert set(seeds(None)) == {None}
    direct = Bandit()
    make_environments(direct).reset(seed=evaluation_seed(7, num_timesteps=2))
    assert direct.seeds == [seven[1]]


def test_evaluation_environments_made_by_the_callback_are_closed_by_it() -> None:
    made: list[Bandit] = []

    def factory() -> Bandit:
        made.append(Bandit())
        return made[-1]

    callback = EvalCallback(factory, n_eval_episodes=1, eval_freq=1, verbose=0)
    model = Model()
    model.learn(callback, 2)
    model.learn(callback, 2)  # opens them anew
    assert [env.closed for env in made] == [True, True]
    mine = Bandit()
    model.learn(EvalCallback(mine, n_eval_episodes=1, eval_freq=1, verbose=0), 2)
    assert not mine.closed


def test_the_training_environment_is_refused_in_any_wrapping() -> None:
    model = Model(n_envs=2)
    vector = model.env.env
    for same in (
        model.env,
        vector,
        vector.envs[1],
        vector.envs[1].unwrapped,
        partial(lambda: vector.envs[0].env),
    ):
        with pytest.raises(ValueError, match="eval_env is the training environment itself"):
            model.learn(EvalCallback(same), 1)


def test_other_spaces_are_warned_of() -> None:
    with pytest.warns(UserWarning) as caught:
        Model().learn(EvalCallback("CartPole-v1", eval_freq=0), 1)
    told = [str(warning.message) for warning in caught]
    assert len(told) == 2
    assert told[0].startswith("eval_env has the observation_space Box(")
    assert told[1] == "eval_env has the action_space Discrete(2), the model Discrete(10)"


def test_an_evaluation_normalises_as_the_training_does() -> None:
    vec_env = pytest.importorskip("stable_baselines3.common.vec_env")

    class Far(Bandit):
        """Its observations are 100."""

        observation_space = spaces.Box(0, 200, (1,), np.float32)

        def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
            return super().reset(**kwargs)[0] + 100, {}

        def step(self, action: Any) -> Any:
            obs, *others = super().step(action)
            return obs + 100, *others

    def normalized(**kwargs: Any) -> Any:
        return vec_env.VecNormalize(vec_env.DummyVecEnv([Far]), **kwargs)

    training, evaluation = normalized(), normalized(training=False, norm_reward=False)
    callback = EvalCallback(evaluation, eval_freq=10, n_eval_episodes=1, verbose=0)
    model = A2C("MlpPolicy", training, seed=0).learn(20, callback=callback)
    assert evaluation.obs_rms.mean == training.obs_rms.mean == pytest.approx(100, abs=1e-3)
    assert evaluation.obs_rms is not training.obs_rms
    for other in (vec_env.DummyVecEnv([Far]), normalized(norm_obs=False), Far):
        with pytest.raises(ValueError, match="by 0 VecNormalize, the training environment by 1"):
            model.learn(20, callback=EvalCallback(other))
    A2C("MlpPolicy", normalized(norm_obs=False), seed=0).learn(1, callback=EvalCallback(Far))  # sees the same


@pytest.mark.parametrize("eval_freq", [0, -1])
def test_a_frequency_of_zero_or_less_never_evaluates(eval_freq: int) -> None:
    env = Bandit()
    Model().learn(EvalCallback(env, eval_freq=eval_freq), 3)
    assert env.seeds == []


# Stops.


def evaluated(child: BaseCallback, returns: list[float], as_new_best: bool = False) -> int:
    """After how many of these evaluations `child` stops training."""
    wanted = iter(returns)

    class Scripted(EvalCallback):
        def _evaluate(self) -> None:
            self.last_mean_reward = next(wanted)

    both: dict[str, Any] = {"callback_on_new_best" if as_new_best else "callback_after_eval": [child]}
    return Model().learn(Scripted(Bandit(), eval_freq=1, verbose=0, **both), len(returns))


def test_stop_on_reward_threshold() -> None:
    assert evaluated(StopTrainingOnRewardThreshold(5.0), [1, 4.9, 3, 5.0, 9], as_new_best=True) == 4
    assert evaluated(StopTrainingOnRewardThreshold(5.0), [1, 4.9, 3], as_new_best=True) == 3


@pytest.mark.parametrize(
    ("borne", "min_evals", "returns", "steps"),
    [
        (0, 0, [1, 2, 2, 3], 3),
        (2, 0, [5, 1, 2, 3, 9, 9], 4),
        (2, 0, [5, 1, 2, 6, 1, 2, 3, 9], 7),
        (0, 3, [5, 1, 1, 1, 9], 4),
        (1, 3, [5, 1, 1, 1, 1, 9], 5),
        (9, 0, [1, 1, 1], 3),
    ],
)
def test_stop_on_no_model_improvement(borne: int, min_evals: int, returns: list[float], steps: int) -> None:
    assert evaluated(StopTrainingOnNoModelImprovement(borne, min_evals), returns) == steps


@pytest.mark.parametrize("child", [StopTrainingOnRewardThreshold(1.0), StopTrainingOnNoModelImprovement(1)])
def test_stops_that_need_evaluations_say_so(child: BaseCallback) -> None:
    with pytest.raises(ValueError, match=f"{type(child).__name__} needs the evaluations of an EvalCallback"):
        Model().learn([EveryNTimesteps(1, child)], 1)


def test_stop_on_max_episodes_counts_all_environments(capsys: pytest.CaptureFixture[str]) -> None:
    callback = StopTrainingOnMaxEpisodes(2, verbose=1)
    model = Model(n_envs=2)
    # Environment 0 ends at every step, environment 1 at every second: 1, 3, 4 episodes.
    assert model.learn(callback, 9, dones=lambda step: [True, step % 2 == 0]) == 3
    assert callback.n_episodes == 4
    assert capsys.readouterr().out == "Stopped: 4 episodes ended, in 6 steps\n"
    assert model.learn(callback, 9, dones=lambda step: [True, step % 2 == 0]) == 3  # counts anew


# The progress bar.


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr("sbac.callbacks.time", clock)
    yield clock


def test_elsewhere_than_in_a_terminal_progress_is_plain_lines(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    model = Model(n_envs=2)

    def second_passes(locals_: dict[str, Any], globals_: dict[str, Any]) -> None:
        clock.now += 0.5
        model.ep_info_buffer.append({"r": 2.0 * locals_["made"], "l": 4})

    model.learn(second_passes, 20, progress_bar=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "Model: 20 %  8/40 steps  4 steps/s  0:00:08 left  return 5.0  episode length 4.0",
        "Model: 40 %  16/40 steps  4 steps/s  0:00:06 left  return 9.0  episode length 4.0",
        "Model: 60 %  24/40 steps  4 steps/s  0:00:04 left  return 13.0  episode length 4.0",
        "Model: 80 %  32/40 steps  4 steps/s  0:00:02 left  return 17.0  episode length 4.0",
        "Model: 100 %  40/40 steps  4 steps/s  return 21.0  episode length 4.0",
    ]


def test_plain_lines_come_at_most_every_five_percent(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    def minute_passes(locals_: dict[str, Any], globals_: dict[str, Any]) -> None:
        clock.now += 60

    Model().learn(minute_passes, 1000, progress_bar=True)
    percents = [int(percent) for percent in re.findall(r": (\d+) %", capsys.readouterr().out)]
    assert percents == [*range(5, 101, 5)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_in_a_terminal_progress_is_a_bar_that_gives_the_cursor_back(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setitem(os.environ, "COLUMNS", "120")

    def fails_late(locals_: dict[str, Any], globals_: dict[str, Any]) -> None:
        clock.now += 0.01
        if locals_["made"] == 90:
            raise RuntimeError("late")

    with pytest.raises(RuntimeError, match="late"):
        Model().learn(fails_late, 100, progress_bar=True)
    shown = terminal.getvalue()
    assert "\x1b[?25l" in shown and shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # cursor hidden, shown
    assert "90/100 steps" in shown
    assert len(set(re.findall(r"(\d+)/100 steps", shown))) <= 11  # ten times in a second
    assert sys.stdout is terminal


# With a real algorithm.


def weights(model: A2C) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.policy.parameters()])


def test_evaluation_and_checkpoints_change_nothing_in_training(tmp_path: Path) -> None:
    alone = A2C("MlpPolicy", "CartPole-v1", seed=1).learn(300)
    watched = A2C("MlpPolicy", "CartPole-v1", seed=1)
    callback = EvalCallback("CartPole-v1", eval_freq=70, n_eval_episodes=2, deterministic=False, verbose=0)
    watched.learn(300, callback=[callback, CheckpointCallback(100, tmp_path)], progress_bar=True)
    assert torch.equal(weights(alone), weights(watched))
    assert callback.evaluations.timesteps == [70, 140, 210, 280]
    assert {path.name for path in tmp_path.iterdir()} == {f"rl_model_{step}_steps.zip" for step in (100, 200, 300)}


def test_evaluation_is_reproducible_and_the_best_model_can_be_loaded(tmp_path: Path) -> None:
    def run(folder: Path) -> EvalCallback:
        callback = EvalCallback("CartPole-v1", eval_freq=50, best_model_save_path=folder, verbose=0)
        A2C("MlpPolicy", "CartPole-v1", seed=2).learn(200, callback=callback)
        return callback

    first, again = run(tmp_path / "1"), run(tmp_path / "2")
    assert first.evaluations.results == again.evaluations.results
    best = A2C.load(tmp_path / "1" / "best_model.zip")
    assert best.num_timesteps == 50 * (1 + int(np.argmax(np.mean(first.evaluations.results, axis=1))))


def test_a_real_model_stops_where_a_callback_says(tmp_path: Path) -> None:
    model = A2C("MlpPolicy", "CartPole-v1", n_envs=2, seed=0)
    model.learn(10_000, callback=StopTrainingOnMaxEpisodes(3))
    assert model.episodes.count >= 6 > model.episodes.count - 2
    model.learn(10_000, callback=lambda locals_, globals_: len(locals_["infos"]) == 2 and model.num_timesteps < 40)
    assert model.num_timesteps == 40
    with pytest.raises(ValueError, match="training environment itself"):
        model.learn(10, callback=EvalCallback(model.get_env()))


def test_episodes_summarise_successes_that_are_told() -> None:
    episodes = Episodes([1.0, 3.0], [2, 4], [{"is_success": True}, {}])
    assert episodes.summary() == {"mean_reward": 2.0, "mean_ep_length": 3.0, "success_rate": 1.0}
    assert "success_rate" not in Episodes([1.0], [2], [{}]).summary()
