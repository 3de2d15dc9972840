"""All that is training but not learning: evaluation, checkpoints, early stops, the progress bar.

A callback is told of five moments: training starts, a rollout starts, a step was taken, a rollout ended,
training ends. At each step it decides whether training goes on, and so it does while A3C's workers tell of no step.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from sbac.envs import EnvironmentLike, Environments
from sbac.evaluation import (
    Evaluations,
    evaluation_seed,
    open_environments,
    require_apart,
    run_episodes,
    share_statistics,
)
from sbac.guards import require_whole
from sbac.hooks import BaseCallback as BaseCallback
from sbac.hooks import Variables
from sbac.resume import CheckpointCallback as CheckpointCallback

if TYPE_CHECKING:
    from rich.progress import Progress

PathLike: TypeAlias = str | os.PathLike[str]
MaybeCallback: TypeAlias = (
    "BaseCallback | Callable[[Variables, Variables], bool | None] | Sequence[MaybeCallback] | None"
)


class ConvertCallback(BaseCallback):
    """A function of ``(locals, globals)`` that stops training by returning False. Nothing counts as True.

    Args:
        callback: The function.
        verbose: Kept for a subclass.
    """

    def __init__(self, callback: Callable[[Variables, Variables], bool | None], verbose: int = 0) -> None:
        super().__init__(verbose)
        self.callback = callback

    def _on_step(self) -> bool:
        go_on = self.callback(self.locals, self.globals)
        return go_on is None or bool(go_on)


class CallbackList(BaseCallback):
    """Callbacks, functions or lists of them, called in order: all of them, also where one stops training.

    Args:
        callbacks: What `learn` takes as a callback, each.
    """

    def __init__(self, callbacks: Sequence[MaybeCallback]) -> None:
        super().__init__()
        self.callbacks = [make_callback(callback) for callback in callbacks]

    def _children(self) -> Sequence[BaseCallback]:
        return self.callbacks

    def _on_step(self) -> bool:
        answers = [callback.on_step() for callback in self.callbacks]
        return all(answers)


class _CutOff(Exception):
    """Training is not to go on, and neither is an evaluation."""


class _WhileGoingOn:
    """A model whose actions are to be had only while training goes on, which is asked once a second.

    Args:
        model: The model.
        goes_on: Whether training goes on.
    """

    def __init__(self, model: Any, goes_on: Callable[[], bool]) -> None:
        self._model, self._goes_on = model, goes_on
        self._asked_at = time.monotonic()

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's."""
        now = time.monotonic()
        if now - self._asked_at >= 1.0:
            self._asked_at = now
            if not self._goes_on():
                raise _CutOff
        return self._model.predict(*args, **kwargs)


class EventCallback(BaseCallback):
    """Calls another callback's `on_step` at an event of its own: where a subclass calls `_on_event`.

    Args:
        callback: The other one, a function or a list.
        verbose: Kept for a subclass.
    """

    def __init__(self, callback: MaybeCallback = None, verbose: int = 0) -> None:
        super().__init__(verbose)
        self.callback = make_callback(callback)

    def _children(self) -> Sequence[BaseCallback]:
        return (self.callback,)

    def _on_event(self) -> bool:
        return self.callback.on_step()


class EveryNTimesteps(EventCallback):
    """Calls another callback whenever `num_timesteps` reaches or passes a multiple of `n_steps`."""

    def __init__(self, n_steps: int, callback: MaybeCallback) -> None:
        super().__init__(callback)
        self.n_steps = require_whole("n_steps", n_steps, 1)
        self.last_time_trigger = 0

    def _on_training_start(self) -> None:
        self.last_time_trigger = self.num_timesteps

    def _on_step(self) -> bool:
        if self.num_timesteps // self.n_steps == self.last_time_trigger // self.n_steps:
            return True
        self.last_time_trigger = self.num_timesteps
        return self._on_event()

    def get_state(self) -> dict[str, Any]:
        return {**super().get_state(), "last_time_trigger": self.last_time_trigger}

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        self.last_time_trigger = state["last_time_trigger"]


class LogEveryNTimesteps(EveryNTimesteps):
    """Writes a row of the log whenever `num_timesteps` reaches or passes a multiple of `n_steps`."""

    def __init__(self, n_steps: int) -> None:
        super().__init__(n_steps, callback=None)

    def _on_event(self) -> bool:
        self.model._dump_logs()
        return True


class EvalCallback(EventCallback):
    """Evaluates the model every `eval_freq` calls, in environments of its own, and keeps the best.

    Logs ``eval/mean_reward``, ``eval/mean_ep_length`` and, where infos hold ``is_success``,
    ``eval/success_rate``. Training goes on exactly as it would without. Each evaluation seeds the
    environments from the model's seed and the step, apart from training: its episodes differ from those of the one
    before, and a run that was resumed evaluates those that it would have without the break.

    Args:
        eval_env: What `sbac.envs.make_environments` takes; never the training environment itself.
        callback_on_new_best: Called after each evaluation with a new best mean return.
        callback_after_eval: Called after each evaluation.
        n_eval_episodes: Episodes of an evaluation, at least 1.
        eval_freq: Calls between two evaluations; a call is one step of all n environments. 0: never.
        log_path: The folder for ``evaluations.npz`` (`sbac.evaluation.Evaluations`); resuming continues it.
        best_model_save_path: The folder for ``best_model.zip``.
        deterministic: Whether to evaluate the policy's mean or most likely action, rather than samples.
        render: Whether to render the evaluation.
        verbose: 1 tells of each evaluation.
        warn: Whether to warn of spaces unlike the model's and of wrappers that change the rewards.

    Attributes:
        best_mean_reward: The best mean return so far, at first minus infinity.
        last_mean_reward: The latest.
        evaluations: All of them.
    """

    def __init__(
        self,
        eval_env: EnvironmentLike,
        callback_on_new_best: MaybeCallback = None,
        callback_after_eval: MaybeCallback = None,
        n_eval_episodes: int = 5,
        eval_freq: int = 10000,
        log_path: PathLike | None = None,
        best_model_save_path: PathLike | None = None,
        deterministic: bool = True,
        render: bool = False,
        verbose: int = 1,
        warn: bool = True,
    ) -> None:
        super().__init__(callback_after_eval, verbose)
        self.callback_on_new_best = make_callback(callback_on_new_best)
        self.eval_env = eval_env
        self.n_eval_episodes = require_whole("n_eval_episodes", n_eval_episodes, 1)
        self.eval_freq = eval_freq
        self.log_path = None if log_path is None else Path(log_path)
        self.best_model_save_path = None if best_model_save_path is None else Path(best_model_save_path)
        self.deterministic, self.render, self.warn = deterministic, render, warn
        self.best_mean_reward = self.last_mean_reward = -np.inf
        self.evaluations = Evaluations()
        self._environments: Environments | None = None

    def _children(self) -> Sequence[BaseCallback]:
        return (self.callback_on_new_best, self.callback)

    def _on_training_start(self) -> None:
        if self._environments is None:
            self._environments, self._made_here = open_environments(self.eval_env)
        if hasattr(self.model, "check_env"):
            self.model.check_env(self._environments)
        require_apart(self._environments, self.model, self.training_env, self.warn)
        share_statistics(self._environments, self.training_env)

        # In a resumed training, take over the evaluations up to here, and with them the best so far.
        if self.log_path and self.num_timesteps > 0 and not self.evaluations.timesteps:
            self.evaluations = Evaluations.read(self.log_path, self.n_eval_episodes, until=self.num_timesteps)
            if self.best_model_save_path is None or (self.best_model_save_path / "best_model.zip").exists():
                self.best_mean_reward = self.evaluations.best()

    def _on_step(self) -> bool:
        if self.eval_freq <= 0 or self.n_calls % self.eval_freq != 0:
            return True
        try:
            self._evaluate()
        except _CutOff:
            warnings.warn(f"the evaluation at step {self.num_timesteps} was cut off: training is to end", stacklevel=2)
            return False
        go_on = True
        if self.last_mean_reward > self.best_mean_reward:
            self.best_mean_reward = self.last_mean_reward
            if self.best_model_save_path:
                self.best_model_save_path.mkdir(parents=True, exist_ok=True)
                self.model.save(self.best_model_save_path / "best_model.zip")
            go_on = self.callback_on_new_best.on_step()
        return self._on_event() and go_on

    def _evaluate(self) -> None:
        assert self._environments is not None, "on_training_start comes before on_step"
        share_statistics(self._environments, self.training_env)
        warn = self.warn and not self.evaluations.timesteps
        how = (self.n_eval_episodes, self.deterministic, self.render)
        seed = evaluation_seed(self.model.seed, self.num_timesteps)
        # What learns here waits for the evaluation; A3C's workers do not, and are to end when they are asked to.
        goes_elsewhere = getattr(self.model, "learns_elsewhere", False)
        model = _WhileGoingOn(self.model, self._root().on_idle) if goes_elsewhere else self.model
        episodes = run_episodes(model, self._environments, *how, warn=warn, seed=seed)
        self.evaluations.add(self.num_timesteps, episodes)
        if self.log_path:
            self.evaluations.write(self.log_path)

        numbers = episodes.summary()
        self.last_mean_reward = numbers["mean_reward"]
        for name, value in numbers.items():
            self.logger.record(f"eval/{name}", value)
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(self.num_timesteps)
        if self.verbose >= 1:
            spread, length = np.std(episodes.returns), numbers["mean_ep_length"]
            text = f"return {self.last_mean_reward:.2f} +/- {spread:.2f}, episode length {length:.1f}"
            print(f"Evaluation at step {self.num_timesteps}: {text}")

    def get_state(self) -> dict[str, Any]:
        rewards = {"best": float(self.best_mean_reward), "last": float(self.last_mean_reward)}
        return {**super().get_state(), **rewards}

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        self.best_mean_reward, self.last_mean_reward = state["best"], state["last"]

    def close(self) -> None:
        if self._environments is not None and self._made_here:
            self._environments.close()
            self._environments = None
        super().close()


class _EvaluationCallback(BaseCallback):
    """A callback that an `EvalCallback` calls, perhaps through a list."""

    def _init_callback(self) -> None:
        self._best_mean_reward()

    def _best_mean_reward(self) -> float:
        parent = self.parent
        while parent is not None:
            if hasattr(parent, "best_mean_reward"):
                return float(parent.best_mean_reward)
            parent = parent.parent
        raise ValueError(
            f"{type(self).__name__} needs the evaluations of an EvalCallback: pass it to one as "
            "callback_on_new_best or callback_after_eval, not to learn"
        )


class StopTrainingOnRewardThreshold(_EvaluationCallback):
    """Stops once an `EvalCallback`'s best mean return reaches a threshold; its ``callback_on_new_best``.

    Args:
        reward_threshold: The mean undiscounted return.
        verbose: 1 tells of the stop.
    """

    def __init__(self, reward_threshold: float, verbose: int = 0) -> None:
        super().__init__(verbose)
        self.reward_threshold = reward_threshold

    def _on_step(self) -> bool:
        best = self._best_mean_reward()
        if best >= self.reward_threshold and self.verbose >= 1:
            print(f"Stopped: the mean return {best:.2f} reached the threshold {self.reward_threshold}")
        return best < self.reward_threshold


class StopTrainingOnNoModelImprovement(_EvaluationCallback):
    """Stops after evaluations in a row without a new best; an `EvalCallback`'s ``callback_after_eval``.

    Args:
        max_no_improvement_evals: How many such evaluations in a row are borne; the next one stops.
        min_evals: How many evaluations pass before counting starts.
        verbose: 1 tells of the stop.
    """

    def __init__(self, max_no_improvement_evals: int, min_evals: int = 0, verbose: int = 0) -> None:
        super().__init__(verbose)
        self.max_no_improvement_evals = max_no_improvement_evals
        self.min_evals = min_evals
        self.last_best_mean_reward = -np.inf
        self.no_improvement_evals = 0

    def _on_step(self) -> bool:
        best = self._best_mean_reward()
        if best > self.last_best_mean_reward:
            self.no_improvement_evals = 0
        elif self.n_calls > self.min_evals:
            self.no_improvement_evals += 1
        self.last_best_mean_reward = best
        go_on = self.no_improvement_evals <= self.max_no_improvement_evals
        if not go_on and self.verbose >= 1:
            print(f"Stopped: no new best mean return in {self.no_improvement_evals} evaluations")
        return go_on

    def get_state(self) -> dict[str, Any]:
        counted = {"last_best": float(self.last_best_mean_reward), "no_improvement": self.no_improvement_evals}
        return {**super().get_state(), **counted}

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        self.last_best_mean_reward, self.no_improvement_evals = state["last_best"], state["no_improvement"]


class StopTrainingOnMaxEpisodes(BaseCallback):
    """Stops once `max_episodes` (at least 1) episodes per environment ended: `max_episodes` x n in all.

    Args:
        max_episodes: For each of the n environments, at least 1.
        verbose: 1 tells of the stop.

    Attributes:
        n_episodes: How many ended since training started, in all environments.
    """

    def __init__(self, max_episodes: int, verbose: int = 0) -> None:
        super().__init__(verbose)
        self.max_episodes = require_whole("max_episodes", max_episodes, 1)
        self.n_episodes = 0

    def _on_training_start(self) -> None:
        self.n_episodes = 0

    def _on_step(self) -> bool:
        self.n_episodes += int(np.sum(self.locals["dones"]))
        go_on = self.n_episodes < self.max_episodes * self.model.n_envs
        if not go_on and self.verbose >= 1:
            print(f"Stopped: {self.n_episodes} episodes ended, in {self.num_timesteps} steps")
        return go_on

    def get_state(self) -> dict[str, Any]:
        return {**super().get_state(), "n_episodes": self.n_episodes}

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        self.n_episodes = state["n_episodes"]


class ProgressBarCallback(BaseCallback):
    """Shows how far training is: steps, steps per second, time left, mean return and episode length.

    In a terminal or notebook it is a bar; elsewhere a plain line, at most every 5 % and every two seconds.
    """

    _bar: Progress | None = None
    _running = False

    def _on_training_start(self) -> None:
        self._total = self.model._total_timesteps
        # Some ten seconds of (time, steps): the speed of late, as learning may start long after acting does.
        self._samples = deque([(time.monotonic(), self.num_timesteps)], maxlen=100)
        self._shown = self._samples[0]
        self._bar = self._make_bar()
        self._running = True

    def _on_step(self) -> bool:
        now = time.monotonic()
        if now - self._samples[-1][0] >= 0.1:
            self._samples.append((now, self.num_timesteps))
            seconds, steps = now - self._shown[0], self.num_timesteps - self._shown[1]
            if self._bar is not None or (seconds >= 2 and steps >= self._total / 20):
                self._show()
        return True

    def close(self) -> None:
        if self._running:
            self._running = False
            self._samples.append((time.monotonic(), self.model.num_timesteps))
            if self._bar is not None or self._shown[1] != self.model.num_timesteps:
                self._show()
            if self._bar is not None:
                self._bar.stop()

    def _make_bar(self) -> Progress | None:
        import rich
        from rich.progress import BarColumn, Progress, TextColumn

        console = rich.get_console()
        if not console.is_jupyter and (console.is_dumb_terminal or not sys.stdout.isatty()):
            return None
        text = TextColumn("{task.description}", markup=False)
        bar = Progress(BarColumn(), text, console=console, auto_refresh=False)
        bar.add_task("", total=self._total, completed=self.num_timesteps)
        bar.start()
        return bar

    def _show(self) -> None:
        self._shown = self._samples[-1]
        if self._bar is None:
            print(f"{type(self.model).__name__}: {self._status()}", flush=True)
        else:
            step, text = self._shown[1], self._status()
            self._bar.update(self._bar.task_ids[0], completed=step, description=text, refresh=True)

    def _status(self) -> str:
        (first_time, first_step), (last_time, step) = self._samples[0], self._samples[-1]
        speed = (step - first_step) / max(last_time - first_time, 1e-9)
        parts = [f"{min(100 * step / self._total, 100):.0f} %", f"{step}/{self._total} steps", f"{speed:.0f} steps/s"]
        if speed > 0 and step < self._total:
            parts.append(f"{timedelta(seconds=round((self._total - step) / speed))} left")
        episodes = self.model.ep_info_buffer
        if episodes:
            parts.append(f"return {np.mean([episode['r'] for episode in episodes]):.1f}")
            parts.append(f"episode length {np.mean([episode['l'] for episode in episodes]):.1f}")
        return "  ".join(parts)


def make_callback(callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
    """One callback from whatever a user passes to `learn`.

    Args:
        callback: A callback, a function of ``(locals, globals)``, a list of these, nested or not, or None.
        progress_bar: Whether to add a `ProgressBarCallback`.

    Raises:
        TypeError: `callback` is none of these.
    """
    if progress_bar:
        return CallbackList([callback, ProgressBarCallback()])
    if isinstance(callback, BaseCallback):
        return callback
    if callback is None or isinstance(callback, (list, tuple)):
        return CallbackList(callback or [])
    if callable(callback) and not isinstance(callback, type):
        return ConvertCallback(callback)
    raise TypeError(f"callback must be a BaseCallback, a function or a list of these, not {callback!r}")
